# %% [markdown]
# # 1.4 Decoding and structured output
#
# You will be able to say which distribution a sampler draws from, force a model to answer in a schema without breaking what it knows, and make it answer in fewer forward passes without changing a token.
#
# **You will measure.** A base model that has never seen the format writes valid triage JSON in {{valid_free}} of its answers, and in {{valid_constrained}} under a constraint; {{exact_constrained}} of these are right. On a tuned model, the same constraint built from a template and values that are tokenised apart is still always valid, and exact match is {{exact_apart}} in place of {{exact_whole}}. Temperature 1.5 with top-p 0.9 gives {{right_temperature_first}} or {{right_top_p_first}} right texts, depending on which of the two comes first. With drafts from the schema {{schema_accepted}} drafted tokens are accepted a pass, and the text does not change.
#
# **You need.** Lesson 1.1 (seeds, intervals); what logits, softmax and a tokenizer are.
#
# **Time.** About 80 minutes; the solution runs in {{run:seconds}} s on one CPU core.

# %% [markdown]
# ## Why it matters at work
#
# A model gives you a distribution; the product is what you make of it. Whoever moves a service to another inference server with "the same settings" may get another distribution, and the complaint arrives weeks later as "the answers have become strange".
#
# Structured output looks solved, since every server has a JSON mode. It guarantees a form. A dashboard that counts parsing errors then shows zero, while the labels inside are wrong more often than before, and nothing raises an error.
#
# In interviews: "Write top-p." "Why did accuracy fall when we switched on JSON mode?" "Speculative decoding: is it lossless, and when does it not pay?" At the end of this lesson you have a measured answer to each.

# %% tags=["parameters"]
model_id = "shipped"  # "shipped", the id of a causal language model on the Hub, or a local folder
device = "cpu"  # "cpu", "cuda" or "mps"
steps = 64  # of light tuning on triage; quick: 3
batch_size = 8
learning_rate = 3e-3  # for all weights of the shipped model; 1e-5 to 5e-5 for a real one
train_tickets = 512
test_tickets = 32  # of each run; quick: 4
runs = 3  # each with a company, a start and an order of the data of its own; quick: 2
samples = 4  # of each prompt, when sampling; quick: 2
seed = 0

# %%
import bisect
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise, takewhile
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import display
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from labkit import base_model, triage
from labkit.plots import COLOURS, band, direct_label, intervals, label_lines, use_house_style
from labkit.predict import compare
from labkit.results import ResultCard
from labkit.world import ACTIONS, CATEGORIES, LESSON_SEEDS, URGENCIES, Ticket, Triage, World, complaints

use_house_style()
card = ResultCard("1_4_decoding_and_structured_output")

# %% [markdown]
# ## Two tasks
#
# A customer writes to the support desk of a synthetic company. Two answers are wanted:
#
# - the **triage**: product, category, urgency and action as one line of JSON. There is one right answer, and the model has never seen the format;
# - the **note**: what the clerks did about it, in prose. The shipped model has read many notes about other messages. There are some 2,600 right notes to one message (four sentences in any order, two to six ways to say each), and `right_note` decides exactly whether a text is one of them.

# %%
model, tokenizer = base_model.load(model_id, device=device)
end = tokenizer.eos_token_id
padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
worlds = [World(LESSON_SEEDS[seed + run]) for run in range(runs)]

DESK_SENTENCES = ("The message went to {}.", "This was work for {}.", "It was {} that took the letter.")
PRODUCT_SENTENCES = ("The subject line says {}.", "Under product the clerk wrote {}.")


def right_note(note: str, ticket: Ticket) -> bool:
    """Whether the note has one right sentence each on desk, product, pace and remedy, and nothing else."""
    truth = ticket.triage
    product = f'"{truth.product}"' if truth.product else "no name"
    sorts = (
        [sentence.format(desk) for sentence in DESK_SENTENCES for desk in complaints.DESKS[truth.category]],
        [sentence.format(product) for sentence in PRODUCT_SENTENCES],
        complaints.PACES[truth.urgency],
        complaints.REMEDIES[truth.action],
    )
    sentences = re.split(r"(?<=\.) ", note.strip())
    return len(sentences) == 4 and all(sum(s in sort for s in sentences) == 1 for sort in sorts)


def note_prompt(ticket: Ticket) -> list[int]:
    """The token ids after which the shipped model writes a note."""
    return tokenizer(f"{ticket.text}\n")["input_ids"]


def continuations(
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    processors: Iterable[LogitsProcessor] = (),
    **changes: object,
) -> list[list[int]]:
    """Return the model's continuation of each prompt, up to the end token and with it. Greedy unless `changes` say so.

    One batch, padded on the left. Every setting is stated, since a model on the Hub brings sampling defaults along.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(
        **{
            "do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0,
            "max_new_tokens": max_new_tokens, "eos_token_id": end, "pad_token_id": padding, **changes,
        }
    )  # fmt: skip
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        logits_processor=LogitsProcessorList(processors),
    )
    new = out[:, longest:].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in new]


def text_of(tokens: list[int]) -> str:
    """The tokens as text, without special tokens."""
    return tokenizer.decode(tokens, skip_special_tokens=True)


ticket = worlds[0].tickets(2, part="test")[1]
note = text_of(continuations([note_prompt(ticket)], max_new_tokens=44)[0])
print(
    f"message  {ticket.text}\ntriage   {ticket.triage.to_json()}\nnote     {note}\nright    {right_note(note, ticket)}"
)

# %% [markdown]
# ## From logits to a distribution
#
# The model gives a logit $z_i$ for each of the $v$ tokens. Three settings stand between it and the draw:
#
# - **Temperature** $T > 0$: $p_i \propto e^{z_i / T}$. Below 1 it sharpens, above 1 it flattens; the limit $T \to 0$ is greedy decoding.
# - **Top-k** keeps the $k$ largest logits (Fan et al., 2018).
# - **Top-p**, or nucleus sampling, keeps the shortest run of most probable tokens whose probabilities sum to at least $p$ (Holtzman et al., 2020).
#
# What is kept is normalised to 1 again. Test a sampler by its distribution and not by its samples: the distribution is exact, and one assert sees what ten thousand draws would only suggest.
#
# **Exercise.** `distribution(logits, temperature, top_k, top_p)` takes logits `(n, v)` and returns probabilities `(n, v)`, in the logits' dtype, each row summing to 1. In this order, which is that of `transformers`:
#
# 1. divide by the temperature; `ValueError` unless it is above 0;
# 2. `top_k` (a whole number of 1 or more; `None` is off): keep the `k` largest logits of each row. Tokens that *tie* with the k-th are all kept, so more than `k` may be left; if `k` exceeds `v`, all are kept;
# 3. `top_p` (0 to 1; 1 is off), on the probabilities normalised *after* steps 1 and 2: go down the tokens in order of probability and keep each one as long as those *before* it sum to less than `p`. So the token with which the sum crosses `p` is kept. The most probable one always is, even with `top_p = 0`. If equal tokens stand at the crossing, only as many of them are kept as the sum needs; which ones is up to you.
#
# For a row of logits whose softmax is `[0.5, 0.3, 0.2]`, `top_p=0.6` gives `[0.625, 0.375, 0]`; `temperature=0.5` gives `[0.658, 0.237, 0.105]`. Logits may hold `-inf`; do not change them in place. *About 10 lines.*
#
# <details><summary>Hint 1</summary>A token is removed by setting its logit to minus infinity; one softmax at the end normalises. Which of the three steps needs probabilities on its way?</details>
# <details><summary>Hint 2</summary>Top-k: <code>torch.topk</code> gives the k-th largest value, and a comparison with it keeps ties. Top-p: sort in descending order, take <code>cumsum</code>, and subtract the token's own probability: what is left is the sum before it.</details>
# <details><summary>Hint 3</summary>After sorting you know for each <em>place</em> whether it goes. Bring that back to tokens: <code>torch.zeros_like(gone).scatter(-1, order, gone)</code> with the <code>order</code> from the sort. Let the first place stay in any case.</details>


# %% exercise="distribution" difficulty=2 minutes=12
def distribution(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """Return the probabilities a sampler draws from: logits (n, v) -> (n, v)."""
    ### BEGIN SOLUTION
    if not temperature > 0:
        raise ValueError(f"the temperature must be above 0, not {temperature}; greedy decoding is an argmax")
    logits = logits / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1:
        sorted_probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        gone = sorted_probabilities.cumsum(dim=-1) - sorted_probabilities >= top_p
        gone[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(gone).scatter(-1, order, gone), -math.inf)
    return logits.softmax(dim=-1)
    ### END SOLUTION


# %% check="distribution" points=2
def near(got: Tensor, want: list[list[float]]) -> bool:
    return got.shape == (len(want), len(want[0])) and torch.allclose(
        got, torch.tensor(want, dtype=got.dtype), atol=1e-4
    )


two_rows = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]]).log()
got = distribution(two_rows)
assert got.shape == (2, 3), f"(2, 3) logits must give (2, 3) probabilities; yours are {tuple(got.shape)}"
assert torch.allclose(got.sum(dim=-1), torch.ones(2)), (
    f"Each row must sum to 1; yours sum to {got.sum(dim=-1).tolist()}: softmax over the tokens, the last dimension"
)
given = two_rows.clone()
got = distribution(two_rows[:1], temperature=0.5)
assert torch.equal(two_rows, given), (
    "You changed the logits you were given: the caller still needs them; work on a new tensor"
)
assert not near(got, [[0.2628, 0.4155, 0.3217]]), (
    "A temperature below 1 must sharpen: divide the logits by it, do not multiply"
)
assert near(got, [[0.1053, 0.6579, 0.2368]]), f"With T = 0.5 the row is [0.105, 0.658, 0.237]; yours is {got.tolist()}"
got = distribution(torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log(), top_k=2)
assert torch.allclose(got.sum(), torch.ones(())), "After top-k the rest must sum to 1 again: normalise what is kept"
assert near(got, [[0.0, 0.5714, 0.0, 0.4286]]), (
    f"top_k=2 of [0.1, 0.4, 0.2, 0.3] keeps the second and the fourth, at their own places; yours is {got.tolist()}"
)
got = distribution(torch.tensor([[1.0, 2.0, 2.0, 5.0]]), top_k=2)
assert (got > 0).sum() == 3, (
    "Two tokens tie for the second place: top_k=2 keeps both, three in all; compare with the k-th value"
)
for bad in (0.0, -1.0):
    try:
        distribution(two_rows, temperature=bad)
    except ValueError:
        continue
    raise AssertionError(f"temperature={bad} must raise ValueError: it would divide by zero, or turn the ranking round")
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(3)
for _n, _v, _t, _k in [(1, 1, 0.7, 1), (4, 9, 1.7, 3), (3, 20, 0.3, 50), (2, 5, 1.0, 5), (5, 7, 2.5, 1)]:
    _logits = torch.randn(_n, _v, generator=_generator, dtype=torch.float64)
    _kept = _logits.clone()
    _got = distribution(_logits, temperature=_t, top_k=_k)
    assert torch.equal(_logits, _kept), "You changed the logits you were given: work on a new tensor"
    assert _got.dtype == torch.float64, f"Keep the dtype of the logits, float64; yours is {_got.dtype}"
    _warped = TopKLogitsWarper(_k)(None, TemperatureLogitsWarper(_t)(None, _logits))
    assert torch.allclose(_got, _warped.softmax(dim=-1)), (
        f"temperature {_t} and top_k {_k} of {_v} tokens: not transformers'"
    )
_got = distribution(torch.tensor([[3.0, 3.0, 3.0, 3.0]]), top_k=1)
assert near(_got, [[0.25] * 4]), "When all tokens tie, top_k=1 keeps them all"
### END HIDDEN TESTS

# %% check="distribution" points=2
row = torch.tensor([[0.125, 0.05, 0.5, 0.325]]).log()
given = row.clone()
got = distribution(row, top_p=0.6)
assert torch.equal(row, given), "You changed the logits you were given: the caller still needs them; fill a new tensor"
assert not torch.isnan(got).any(), (
    "The kept set is empty: the most probable token always stays, so nothing is divided by 0"
)
assert not near(got, [[0.0, 0.0, 1.0, 0.0]]), (
    "0.5 alone does not reach 0.6: the token that crosses the threshold is kept as well"
)
assert not near(got, [[0.606, 0.394, 0.0, 0.0]]), (
    "The probabilities stand at their sorted places: bring them back to the tokens"
)
assert near(got, [[0.0, 0.0, 0.6061, 0.3939]]), (
    f"top_p=0.6 of [0.125, 0.05, 0.5, 0.325] keeps 0.5 and 0.325, normalised; yours is {got.tolist()}"
)
got = distribution(row, top_p=0.3)
assert near(got, [[0.0, 0.0, 1.0, 0.0]]), (
    f"top_p=0.3 is below the largest probability: exactly that token is kept; yours is {got.tolist()}"
)
assert near(distribution(row, top_p=0.0), [[0.0, 0.0, 1.0, 0.0]]), (
    "top_p=0 must keep the most probable token, never none"
)
assert near(distribution(given, top_p=1.0), [[0.125, 0.05, 0.5, 0.325]]), "top_p=1 is off: every token stays"
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(4)
for _n, _v, _p in [(1, 1, 0.5), (6, 11, 0.9), (3, 40, 0.35), (4, 2, 0.99), (2, 8, 0.01)]:
    _logits = 2 * torch.randn(_n, _v, generator=_generator, dtype=torch.float64)
    _got = distribution(_logits, top_p=_p)
    for _row, _kept in zip(_logits.softmax(dim=-1).tolist(), (_got > 0).tolist(), strict=True):
        _inside = [q for q, keep in zip(_row, _kept, strict=True) if keep]
        assert sum(_inside) >= _p - 1e-9, f"top_p={_p}: what is kept must sum to at least p"
        assert sum(_inside) - min(_inside) < _p, f"top_p={_p}: the set is not the shortest, its last token could go"
        assert len(_inside) == _v or min(_inside) >= max(q for q, keep in zip(_row, _kept, strict=True) if not keep), (
            f"top_p={_p}: a more probable token was removed and a less probable one kept"
        )
    assert torch.allclose(_got, TopPLogitsWarper(_p)(None, _logits).softmax(dim=-1)), f"top_p={_p}: not transformers'"
_got = distribution(torch.zeros(1, 4), top_p=0.6)
assert near(_got.sort(dim=-1).values, [[0.0, 1 / 3, 1 / 3, 1 / 3]]), (
    "Of four equal tokens top_p=0.6 keeps three, a third each: count places, not values"
)
### END HIDDEN TESTS

# %% check="distribution" points=1
got = distribution(torch.tensor([[0.64, 0.25, 0.09, 0.02]]).log(), temperature=2.0, top_p=0.6)
assert (got > 0).sum() != 1, (
    "You cut before you heat: at T = 2 the largest probability is 0.46, so top_p=0.6 needs two tokens; temperature first"
)
assert near(got, [[0.6154, 0.3846, 0.0, 0.0]]), (
    f"With T = 2, then top_p=0.6, it is [0.615, 0.385, 0, 0]; yours is {got.tolist()}"
)
got = distribution(torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log(), top_k=2, top_p=0.5)
assert (got > 0).sum() == 1, (
    "After top_k=2 the first token has 0.4 / 0.7 = 0.57: top_p works on probabilities that are normalised again"
)
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(5)
for _t, _k, _p in [(1.5, 4, 0.7), (0.6, 8, 0.9), (3.0, 30, 0.5), (1.0, 1, 0.2)]:
    _logits = 2 * torch.randn(5, 30, generator=_generator, dtype=torch.float64)
    _logits[1, 3:] = -math.inf
    _warped = TopKLogitsWarper(_k)(None, TemperatureLogitsWarper(_t)(None, _logits))
    _want = TopPLogitsWarper(_p)(None, _warped).softmax(dim=-1)
    assert torch.allclose(distribution(_logits, _t, _k, _p), _want), (
        f"temperature {_t}, top_k {_k}, top_p {_p}: it differs from transformers' temperature, then top-k, then top-p"
    )
### END HIDDEN TESTS


# %% mistake="leaves the crossing token out" of="distribution" says="the token that crosses the threshold is kept"
def distribution(logits, temperature=1.0, top_k=None, top_p=1.0):
    if not temperature > 0:
        raise ValueError("temperature")
    logits = logits / temperature
    if top_k is not None:
        k = min(top_k, logits.shape[-1])
        logits = logits.masked_fill(logits < logits.topk(k).values[:, -1:], -math.inf)
    if top_p < 1:
        values, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        gone = values.cumsum(dim=-1) > top_p
        gone[:, 0] = False
        logits = logits.masked_fill(gone.gather(-1, order.argsort(dim=-1)), -math.inf)
    return logits.softmax(dim=-1)


# %% mistake="may keep nothing" of="distribution" says="never none"
def distribution(logits, temperature=1.0, top_k=None, top_p=1.0):
    if not temperature > 0:
        raise ValueError("temperature")
    logits = logits / temperature
    if top_k is not None:
        k = min(top_k, logits.shape[-1])
        logits = logits.masked_fill(logits < logits.topk(k).values[:, -1:], -math.inf)
    if top_p < 1:
        values, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        gone = values.cumsum(dim=-1) - values >= top_p
        logits = logits.masked_fill(gone.gather(-1, order.argsort(dim=-1)), -math.inf)
    return logits.softmax(dim=-1)


# %% mistake="top-p before the temperature" of="distribution" says="You cut before you heat"
def distribution(logits, temperature=1.0, top_k=None, top_p=1.0):
    if not temperature > 0:
        raise ValueError("temperature")
    if top_k is not None:
        k = min(top_k, logits.shape[-1])
        logits = logits.masked_fill(logits < logits.topk(k).values[:, -1:], -math.inf)
    if top_p < 1:
        values, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        gone = values.cumsum(dim=-1) - values >= top_p
        gone[:, 0] = False
        logits = logits.masked_fill(gone.gather(-1, order.argsort(dim=-1)), -math.inf)
    return (logits / temperature).softmax(dim=-1)


# %% mistake="exactly k, ties broken by place" of="distribution" says="compare with the k-th value"
def distribution(logits, temperature=1.0, top_k=None, top_p=1.0):
    if not temperature > 0:
        raise ValueError("temperature")
    logits = logits / temperature
    if top_k is not None:
        values, places = logits.topk(min(top_k, logits.shape[-1]))
        logits = torch.full_like(logits, -math.inf).scatter(-1, places, values)
    if top_p < 1:
        values, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        gone = values.cumsum(dim=-1) - values >= top_p
        gone[:, 0] = False
        logits = logits.masked_fill(gone.gather(-1, order.argsort(dim=-1)), -math.inf)
    return logits.softmax(dim=-1)


# %% mistake="top-p on the probabilities before top-k" of="distribution" says="normalised again"
def distribution(logits, temperature=1.0, top_k=None, top_p=1.0):
    if not temperature > 0:
        raise ValueError("temperature")
    logits = logits / temperature
    values, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    gone = values.cumsum(dim=-1) - values >= top_p
    gone[:, 0] = False
    gone = gone.gather(-1, order.argsort(dim=-1)) if top_p < 1 else torch.zeros_like(gone)
    if top_k is not None:
        k = min(top_k, logits.shape[-1])
        gone = gone | (logits < logits.topk(k).values[:, -1:])
    return logits.masked_fill(gone, -math.inf).softmax(dim=-1)


# %% mistake="leaves the tokens sorted" of="distribution" says="bring them back to the tokens"
def distribution(logits, temperature=1.0, top_k=None, top_p=1.0):
    if not temperature > 0:
        raise ValueError("temperature")
    logits = logits / temperature
    if top_k is not None:
        k = min(top_k, logits.shape[-1])
        logits = logits.masked_fill(logits < logits.topk(k).values[:, -1:], -math.inf)
    if top_p < 1:
        logits = logits.sort(dim=-1, descending=True).values
        values = logits.softmax(dim=-1)
        gone = values.cumsum(dim=-1) - values >= top_p
        gone[:, 0] = False
        logits = logits.masked_fill(gone, -math.inf)
    return logits.softmax(dim=-1)


# %% mistake="multiplies by the temperature" of="distribution" says="divide the logits by it"
def distribution(logits, temperature=1.0, top_k=None, top_p=1.0):
    if not temperature > 0:
        raise ValueError("temperature")
    return (logits * temperature).softmax(dim=-1)


# %% mistake="works in place" of="distribution" says="You changed the logits you were given"
def distribution(logits, temperature=1.0, top_k=None, top_p=1.0):
    if not temperature > 0:
        raise ValueError("temperature")
    logits /= temperature
    if top_k is not None:
        k = min(top_k, logits.shape[-1])
        logits[logits < logits.topk(k).values[:, -1:]] = -math.inf
    if top_p < 1:
        values, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        gone = values.cumsum(dim=-1) - values >= top_p
        gone[:, 0] = False
        logits[gone.gather(-1, order.argsort(dim=-1))] = -math.inf
    return logits.softmax(dim=-1)


# %% alternative="row by row, with Python numbers" of="distribution"
def distribution(logits, temperature=1.0, top_k=None, top_p=1.0):
    if temperature <= 0:
        raise ValueError("no temperature of zero or less")
    rows = []
    for row in logits.tolist():
        top = max(row)
        weights = [math.exp((z - top) / temperature) for z in row]
        if top_k is not None:
            least = sorted(row, reverse=True)[: min(top_k, len(row))][-1]
            weights = [w if z >= least else 0.0 for w, z in zip(weights, row, strict=True)]
        total, kept, before = sum(weights), [0.0] * len(row), 0.0
        for token in sorted(range(len(row)), key=lambda i: -weights[i]):
            if before < top_p * total or before == 0.0 or top_p >= 1:
                kept[token] = weights[token]
            before += weights[token]
        rows.append([w / sum(kept) for w in kept])
    return torch.tensor(rows, dtype=logits.dtype)


# %% [markdown]
# The match, on the model's own logits: at each place of the note above, your distribution against the three warpers that `generate` uses.

# %%
with torch.no_grad():
    prompt = note_prompt(ticket)
    whole_text = torch.tensor([prompt + tokenizer(note, add_special_tokens=False)["input_ids"]])
    note_logits = model(whole_text.to(model.device)).logits[0, len(prompt) - 1 :].double().cpu()  # (places, v)
chain = LogitsProcessorList([TemperatureLogitsWarper(1.5), TopKLogitsWarper(50), TopPLogitsWarper(0.9)])
filter_error = (distribution(note_logits, 1.5, 50, 0.9) - chain(None, note_logits).softmax(dim=-1)).abs().max().item()
print(f"largest difference of {note_logits.numel():,d} probabilities: {filter_error:.1e}")
card.record(
    "filter_error", filter_error, format=".1g", label="largest difference to transformers' samplers", tolerance=1e-9
)

# %% [markdown]
# ### The order is a setting too
#
# `transformers` and vLLM apply the temperature first and then cut. llama.cpp's default chain (`samplers` in its `common/common.h`) cuts first and applies the temperature to what is left. Both orders carry the same names and the same numbers in a configuration file. Your function gives both: the second is a cut at temperature 1, whose result is heated afterwards.

# %%
hot, nucleus = 1.5, 0.9
places = len(note_logits)
heated_first = distribution(note_logits, temperature=hot, top_p=nucleus)
cut_first = distribution(distribution(note_logits, top_p=nucleus).log(), temperature=hot)
kept = {"temperature, then top-p": heated_first, "top-p, then temperature": cut_first}
pd.DataFrame(
    [
        {
            f"T = {hot}, p = {nucleus}": name,
            "tokens kept, median": (probabilities > 0).sum(dim=-1).median().item(),
            "tokens kept, most": (probabilities > 0).sum(dim=-1).max().item(),
            "probability of the greedy token, mean": probabilities.max(dim=-1).values.mean().item(),
        }
        for name, probabilities in kept.items()
    ]
).style.format(precision=2).hide(axis="index")

# %% [markdown]
# Where the model is sure, the nucleus at $T = 1$ is one token, and no temperature afterwards brings another one back. Heated first, the many improbable tokens gain weight together, and the nucleus lets some of them in: look at the largest number of tokens kept. What does that do to the notes?
#
# ## Diversity has a price
#
# Sampling is for when you want several *different* good texts: training data, suggestions, paraphrases. Three numbers for the notes of one message:
#
# - **right notes**: the share of samples that `right_note` accepts, the quality;
# - **distinct-2**: different pairs of neighbouring words, as a share of all pairs (Li et al., 2016), the usual measure of diversity;
# - **different right notes** a sample: how many different texts `right_note` accepts, divided by the samples drawn. It is what a user of the notes would pay for.


# %%
def distinct_2(texts: list[str]) -> float:
    """The share of word pairs that are different, over all texts together."""
    pairs = [pair for text in texts for pair in pairwise(text.split())]
    return len(set(pairs)) / max(1, len(pairs))


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share of n."""
    z = 1.96
    centre, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, (centre - half) / (1 + z**2 / n)), min(1.0, (centre + half) / (1 + z**2 / n))


temperatures = (0.1, 0.5, 1.0, 1.5, 2.0)
orders = {
    "temperature alone": lambda t: [TemperatureLogitsWarper(t)],
    "temperature, then top-p": lambda t: [TemperatureLogitsWarper(t), TopPLogitsWarper(nucleus)],
    "top-p, then temperature": lambda t: [TopPLogitsWarper(nucleus), TemperatureLogitsWarper(t)],
}
grids = {name: [t for t in temperatures if t >= 1 or "top-p" not in name] for name in orders}
sampled_tickets = [ticket for world in worlds for ticket in world.tickets(6, part="test")]
right_share: dict[str, list[float]] = {}
new_share: dict[str, list[float]] = {}
diversity: dict[str, list[float]] = {}
for name, warpers in orders.items():
    right_share[name], new_share[name], diversity[name] = [], [], []
    for temperature in grids[name]:
        torch.manual_seed(seed)
        drawn = continuations(
            [note_prompt(ticket) for ticket in sampled_tickets],
            max_new_tokens=44,
            processors=warpers(temperature),
            do_sample=True,
            top_k=0,
            num_return_sequences=samples,
        )
        texts = [text_of(tokens) for tokens in drawn]
        groups = [texts[start : start + samples] for start in range(0, len(texts), samples)]  # one a message
        accepted = [
            [text for text in group if right_note(text, ticket)]
            for group, ticket in zip(groups, sampled_tickets, strict=True)
        ]
        right_share[name].append(float(np.mean([len(group) / samples for group in accepted])))
        new_share[name].append(float(np.mean([len(set(group)) / samples for group in accepted])))
        diversity[name].append(float(np.mean([distinct_2(group) for group in groups])))

alone = "temperature alone"
fig, (left, right) = plt.subplots(1, 2, figsize=(12, 3.8))
shown = {
    alone: COLOURS.before,
    "temperature, then top-p": COLOURS.library,
    "top-p, then temperature": COLOURS.other,
}
for name, colour in shown.items():
    bounds = [wilson(share, len(sampled_tickets)) for share in right_share[name]]
    left.plot(grids[name], right_share[name], "o-", color=colour, label=name.replace(", ", ",\n"))
    band(left, grids[name], [low for low, _ in bounds], [high for _, high in bounds], colour)
    right.plot(diversity[name], right_share[name], "o-", color=colour)
for temperature, x, y in zip(temperatures, diversity[alone], right_share[alone], strict=True):
    if temperature != 0.5:  # its label would stand on its neighbour's
        direct_label(right, x, y, f"T = {temperature:g}", COLOURS.before, offset=(-4, -16))
left.set(xlabel="temperature", ylabel="share of right notes", ylim=(-0.12, 1.05), title=f"Quality, with p = {nucleus}")
label_lines(left, gap=0.16)
right.set(xlabel="distinct-2 (share of word pairs)", ylabel="share of right notes", ylim=(-0.12, 1.05))
right.set(xlim=(None, 1.05), title="Diversity and quality")
plt.show()
diversity_table = pd.DataFrame(
    [
        {"sampler": name, "T": t, "right notes": good, "distinct-2": spread, "different right notes a sample": new}
        for name in orders
        for t, good, spread, new in zip(grids[name], right_share[name], diversity[name], new_share[name], strict=True)
    ]
)
display(
    diversity_table.style.format(precision=2)
    .format("{:.1f}", subset="T")
    .highlight_max(subset="different right notes a sample", props="font-weight: bold")
    .hide(axis="index")
)
for name, key in (
    ("temperature, then top-p", "right_temperature_first"),
    ("top-p, then temperature", "right_top_p_first"),
):
    at_hot = right_share[name][grids[name].index(hot)]
    low, high = wilson(at_hot, len(sampled_tickets))
    label = f"right notes at T = {hot}, p = {nucleus}: {name}"
    card.record(key, at_hot, low=low, high=high, format=".0%", label=label, tolerance=0.1)

# %% [markdown]
# Left: the same two numbers in the configuration, {{right_temperature_first}} or {{right_top_p_first}} right notes at $T = 1.5$, by order alone. Right: the same samples with diversity in place of temperature. It is the fair comparison of samplers: each curve is what one of them offers, and a point further up and to the right is better whatever temperature it took. Where quality collapses, distinct-2 goes on rising, because garbage is diverse; the last column of the table, which counts only different *right* notes, falls with the quality. Never report diversity without quality beside it.
#
# The bands are Wilson's with the number of messages (18) as the sample size: samples of one message are not independent, and this is the cautious count. The temperatures at which a model breaks are its own; measure them again for yours.

# %% [markdown]
# ## Beam search
#
# Sampling draws from the distribution of texts. Greedy decoding tries to find its mode, the most probable text, and fails when a probable first token leads into improbable continuations. Here is such a case, small enough to see:


# %%
def toy_model(prefixes: list[tuple[int, ...]]) -> Tensor:
    """Log-probabilities of the next token, (n, 3), after each prefix. Token 0 ends the text."""
    after = {(): (0.0, 0.6, 0.4), (1,): (0.4, 0.32, 0.28), (2,): (0.9, 0.06, 0.04)}
    return torch.tensor([after.get(prefix, (0.5, 0.3, 0.2)) for prefix in prefixes]).log()


greedy_text, likelihood = (), 1.0
while not greedy_text or greedy_text[-1] != 0:
    log_probs = toy_model([greedy_text])[0]
    greedy_text += (int(log_probs.argmax()),)
    likelihood *= log_probs.max().exp().item()
print(f"greedy: {greedy_text} with probability {likelihood:.2f};  (2, 0) has {0.4 * 0.9:.2f}")

# %% [markdown]
# Beam search keeps the $b$ most probable prefixes alive, instead of one. A longer text has a lower probability, so finished texts of different lengths are compared by
#
# $$\text{score}(y) = \frac{\log p(y)}{|y|^{\lambda}},$$
#
# where $|y|$ counts the generated tokens, *the end token included*, and $\lambda$ is the length penalty. The name misleads: a larger $\lambda$ favours longer texts, because $\log p$ is negative; $\lambda = 0$ compares probabilities, $\lambda = 1$, the library's default, compares means per token.
#
# **Exercise.** `beam_search(next_log_probs, beams, max_new_tokens, end, length_penalty)` returns `(tokens, score)` of the best text: a tuple of ints and a float. `next_log_probs(prefixes)` takes a list of tuples and returns log-probabilities `(len(prefixes), v)` of the next token after each. As in `transformers` with `early_stopping="never"`:
#
# 1. Start with one live prefix, the empty one, with log-probability 0.
# 2. In each step extend every live prefix by every token and rank *all* extensions together by the sum of their log-probabilities. Go down the ranking: an extension that ends with `end` is *finished* if it is among the first `beams` of the ranking, and dropped if it stands lower. The others become the new live prefixes, until there are `beams` of them. (So finished texts take no live place away.)
# 3. After `max_new_tokens` steps, the live prefixes count as finished too.
# 4. Return the finished text with the largest score.
#
# `beam_search(toy_model, 1, 5, end=0)` gives `(1, 0)`; with 2 beams and `length_penalty=0` it gives `(2, 0)` with the score $\log 0.36 = -1.022$. There are no ties in the tests. *About 14 lines.*
#
# <details><summary>Hint 1</summary>Keep pairs (prefix, log-probability). Within a step all live prefixes have the same length, so the length penalty plays no part in the ranking; where does it?</details>
# <details><summary>Hint 2</summary>Add each live prefix's log-probability to its row, <code>flatten()</code>, and sort or <code>topk</code>: the index divided by v (<code>divmod</code>) gives the row and the token. At most 2 · beams places of the ranking matter, since each live prefix has one end token.</details>
# <details><summary>Hint 3</summary>for place, (value, index) in the ranking: row, token = divmod(index, v); extension = live prefix of that row + (token,). If token == end: append to finished when place &lt; beams. Else, if fewer than beams are in the new list: append there. At the end max over finished by value / len(tokens) ** length_penalty.</details>


# %% exercise="beam-search" difficulty=3 minutes=14
def beam_search(
    next_log_probs: Callable[[list[tuple[int, ...]]], Tensor],
    beams: int,
    max_new_tokens: int,
    end: int,
    length_penalty: float = 1.0,
) -> tuple[tuple[int, ...], float]:
    """Return the best text that beam search finds, and its score."""
    ### BEGIN SOLUTION
    live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished: list[tuple[tuple[int, ...], float]] = []
    for _ in range(max_new_tokens):
        sums = next_log_probs([tokens for tokens, _ in live]) + torch.tensor([[value] for _, value in live])
        width = sums.shape[1]
        ranking = sums.flatten().topk(min(2 * beams, sums.numel()))
        extended = []
        for place, (value, index) in enumerate(zip(*(part.tolist() for part in ranking), strict=True)):
            row, token = divmod(index, width)
            extension = ((*live[row][0], token), value)
            if token != end:
                extended.append(extension)
            elif place < beams:
                finished.append(extension)
        live = extended[:beams]
    scored = [(value / len(tokens) ** length_penalty, tokens) for tokens, value in finished + live]
    score, tokens = max(scored)
    return tokens, score
    ### END SOLUTION


# %% check="beam-search" points=2
def table_model(table: dict[tuple[int, ...], tuple[float, ...]], rest: tuple[float, ...]):
    """A next_log_probs that reads probabilities from a table; `rest` for every other prefix."""
    return lambda prefixes: torch.tensor([table.get(tuple(prefix), rest) for prefix in prefixes]).log()


two_ways = table_model({(): (0.02, 0.58, 0.4), (1,): (0.4, 0.35, 0.25), (2,): (0.9, 0.04, 0.06)}, (0.8, 0.15, 0.05))
found = beam_search(two_ways, 1, 4, 0, length_penalty=0.0)
assert isinstance(found, tuple), f"Return (tokens, score); yours is {found!r}"
assert tuple(found[0]) == (1, 0), f"With one beam the best text is (1, 0); yours is {found[0]}"
tokens, score = beam_search(two_ways, 2, 4, 0, length_penalty=0.0)
assert tuple(tokens) == (2, 0), (
    f"Two beams must find (2, 0), whose probability 0.36 exceeds that of every text that starts with 1; yours is {tokens}"
)
assert abs(score - math.log(0.36)) < 1e-4, f"With length_penalty 0 its score is log 0.36 = -1.022; yours is {score:.3f}"
one_family = table_model(
    {
        (): (0.02, 0.68, 0.3),
        (1,): (0.1, 0.5, 0.4),
        (2,): (0.1, 0.48, 0.42),
        (1, 2): (0.95, 0.03, 0.02),
        (1, 1): (0.3, 0.36, 0.34),
    },
    (0.8, 0.15, 0.05),
)
tokens, _ = beam_search(one_family, 2, 3, 0, length_penalty=0.0)
assert tuple(tokens) == (1, 2, 0), (
    "Both of the two best extensions may come from one live prefix, here (1, 1) and (1, 2): rank the extensions of all "
    f"prefixes together; the best text is (1, 2, 0), yours is {tuple(tokens)}"
)
# The empty text is finished in the first step; the best one needs three more.
early_end = table_model(
    {(): (0.31, 0.4, 0.29), (1,): (0.01, 0.98, 0.01), (1, 1): (0.01, 0.98, 0.01)}, (0.97, 0.02, 0.01)
)
tokens, _ = beam_search(early_end, 2, 6, 0, length_penalty=0.0)
assert tuple(tokens) != (0,), "You stop at the first finished text: live prefixes may still lead to a better one"
assert tuple(tokens) == (1, 1, 1, 0), f"The most probable text is (1, 1, 1, 0); yours is {tuple(tokens)}"
tokens, _ = beam_search(table_model({}, (0.1, 0.6, 0.3)), 1, 3, 0, length_penalty=0.0)
assert tuple(tokens) == (1, 1, 1), (
    f"A text that is cut off after max_new_tokens counts as finished: (1, 1, 1) here; yours is {tuple(tokens)}"
)
# The finished text has the probability 0.2, the one that is cut off 0.7 * 0.9.
cut_off = table_model({(): (0.2, 0.7, 0.1)}, (0.04, 0.9, 0.06))
tokens, _ = beam_search(cut_off, 2, 2, 0, length_penalty=0.0)
assert tuple(tokens) == (1, 1), (
    "A text that is cut off counts as finished even where others ended by themselves: (1, 1) with 0.63 beats (0,) with "
    f"0.2; yours is {tuple(tokens)}"
)
# The same as the first, with the tokens renamed: here 2 ends the text.
renamed = table_model({(): (0.4, 0.58, 0.02), (1,): (0.25, 0.35, 0.4), (0,): (0.06, 0.04, 0.9)}, (0.05, 0.15, 0.8))
tokens, _ = beam_search(renamed, 2, 4, 2, length_penalty=0.0)
assert tuple(tokens) == (0, 2), f"With end=2 the best text is (0, 2): take the end token from `end`; yours is {tokens}"


### BEGIN HIDDEN TESTS
def _exhaustive(_step, _v, _n, _end, _penalty):
    """The best score over all texts of at most n tokens, by enumeration."""
    _open, _done = [((), 0.0)], []
    for _ in range(_n):
        _open = [
            ((*_t, _token), _value + _p) for _t, _value in _open for _token, _p in enumerate(_step([_t])[0].tolist())
        ]
        _done += [one for one in _open if one[0][-1] == _end]
        _open = [one for one in _open if one[0][-1] != _end]
    return max(((_value / len(_t) ** _penalty, _t) for _t, _value in _done + _open))


for _seed, _v, _n, _penalty in [(1, 3, 3, 0.0), (2, 4, 3, 1.0), (3, 2, 5, 0.5), (4, 5, 2, 1.0), (5, 3, 1, 1.0)]:

    def _step(_prefixes, _seed=_seed, _v=_v):
        _rows = []
        for _prefix in _prefixes:
            _number = _seed
            for _token in _prefix:
                _number = (_number * 31 + _token + 7) % 1_000_003
            _rows.append(2 * torch.randn(_v, generator=torch.Generator().manual_seed(_number)))
        return torch.stack(_rows).log_softmax(dim=-1)

    _score, _tokens = _exhaustive(_step, _v, _n, 0, _penalty)
    _got = beam_search(_step, _v**_n, _n, 0, _penalty)
    assert tuple(_got[0]) == _tokens, (
        f"With more beams than prefixes the search is exhaustive, so it must find {_tokens}; yours is {tuple(_got[0])}"
    )
    assert abs(_got[1] - _score) < 1e-4, f"The score of {_tokens} is {_score:.4f}; yours is {_got[1]:.4f}"
### END HIDDEN TESTS

# %% check="beam-search" points=2
sure = table_model({(): (0.02, 0.88, 0.1)}, (0.9, 0.06, 0.04))
tokens, score = beam_search(sure, 2, 2, 0, length_penalty=1.0)
assert tuple(tokens) == (1, 0), f"The best text is (1, 0), whatever the length penalty; yours is {tuple(tokens)}"
assert abs(score - math.log(0.792)) > 1e-3, "The end token counts as a token: divide by 2 here, not by 1"
assert abs(score - math.log(0.792) / 2) < 1e-4, (
    f"At length_penalty 1 the log-probability is divided by the length: log 0.792 / 2 = -0.117; yours is {score:.3f}"
)
# (0,) has the log-probability log 0.3 in one token, (1, 0) has log 0.252 in two.
by_length = table_model({(): (0.3, 0.6, 0.1), (1,): (0.42, 0.3, 0.28)}, (0.05, 0.5, 0.45))
tokens, _ = beam_search(by_length, 2, 2, 0, length_penalty=0.0)
assert tuple(tokens) == (0,), (
    f"At length_penalty 0 the most probable text wins, (0,) with 0.3; yours is {tuple(tokens)}"
)
tokens, _ = beam_search(by_length, 2, 2, 0, length_penalty=1.0)
assert tuple(tokens) == (1, 0), (
    f"At length_penalty 1 the mean counts: (1, 0) has log 0.252 / 2 = -0.69, (0,) has -1.20; yours is {tuple(tokens)}"
)
# In the second step two finished texts lead the ranking; two live prefixes must be left all the same.
crowded = table_model(
    {
        (): (0.001, 0.549, 0.45),
        (1,): (0.7, 0.2, 0.1),
        (2,): (0.7, 0.1, 0.2),
        (1, 1): (0.1, 0.5, 0.4),
        (2, 2): (0.98, 0.015, 0.005),
    },
    (0.2, 0.45, 0.35),
)
tokens, _ = beam_search(crowded, 2, 3, 0, length_penalty=3.0)
assert tuple(tokens) == (2, 2, 0), (
    "Finished texts take no live place away: after two of them, (1, 1) and (2, 2) both live on, and (2, 2, 0) wins; "
    f"yours is {tuple(tokens)}"
)
# The end token is third in the ranking of the first step, and so is dropped.
third = table_model({(): (0.28, 0.38, 0.34)}, (0.42, 0.33, 0.25))
tokens, _ = beam_search(third, 2, 3, 0, length_penalty=0.0)
assert tuple(tokens) != (0,), "An end token below the first `beams` places of the ranking is dropped; yours finishes it"
assert tuple(tokens) == (1, 0), (
    f"Of the texts that stay, (1, 0) with 0.16 is the most probable; yours is {tuple(tokens)}"
)
### BEGIN HIDDEN TESTS
torch.manual_seed(8)
_tiny = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.6, bos_token_id=1, eos_token_id=0, pad_token_id=0,
    )
).eval()  # fmt: skip


def _tiny_step(_prefixes):
    with torch.no_grad():
        _ids = torch.tensor([[3, 4, *_prefix] for _prefix in _prefixes])
        return _tiny(_ids).logits[:, -1].log_softmax(dim=-1)


for _beams, _n, _penalty in [(1, 5, 1.0), (2, 6, 0.0), (3, 6, 1.0), (4, 3, 2.0), (5, 7, 0.6)]:
    _library = _tiny.generate(
        input_ids=torch.tensor([[3, 4]]),
        attention_mask=torch.ones(1, 2, dtype=torch.long),
        generation_config=GenerationConfig(
            num_beams=max(_beams, 2), max_new_tokens=_n, length_penalty=_penalty, early_stopping="never",
            eos_token_id=0, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
        ),
    )  # fmt: skip
    _tokens, _score = beam_search(_tiny_step, max(_beams, 2), _n, 0, _penalty)
    _want = _library.sequences[0, 2:].tolist()
    _want = tuple(_want[: _want.index(0) + 1] if 0 in _want else _want)
    assert tuple(_tokens) == _want, (
        f"{_beams} beams, length_penalty {_penalty}: transformers finds {_want}, you {tuple(_tokens)}"
    )
    assert abs(_score - _library.sequences_scores[0].item()) < 1e-3, (
        f"{_beams} beams, length_penalty {_penalty}: transformers' score is {_library.sequences_scores[0]:.4f}, yours {_score:.4f}"
    )
### END HIDDEN TESTS


# %% mistake="each prefix keeps its own best extension" of="beam-search" says="may come from one live prefix"
def beam_search(next_log_probs, beams, max_new_tokens, end, length_penalty=1.0):
    live, finished = [((), 0.0)], []
    for step in range(max_new_tokens):
        log_probs = next_log_probs([tokens for tokens, _ in live])
        extended = []
        for (tokens, value), row in zip(live, log_probs, strict=True):
            for token in row.topk(min(beams, len(row)) if step == 0 else 1).indices.tolist():
                extended.append(((*tokens, token), value + row[token].item()))
        finished += [one for one in extended if one[0][-1] == end]
        live = [one for one in extended if one[0][-1] != end][:beams]
        if not live:
            break
    tokens, value = max(finished + live, key=lambda one: one[1] / len(one[0]) ** length_penalty)
    return tokens, value / len(tokens) ** length_penalty


# %% mistake="stops at the first finished text" of="beam-search" says="You stop at the first finished text"
def beam_search(next_log_probs, beams, max_new_tokens, end, length_penalty=1.0):
    live = [((), 0.0)]
    for _ in range(max_new_tokens):
        log_probs = next_log_probs([tokens for tokens, _ in live])
        extended = [
            ((*tokens, token), value + p)
            for (tokens, value), row in zip(live, log_probs.tolist(), strict=True)
            for token, p in enumerate(row)
        ]
        live = sorted(extended, key=lambda one: -one[1])[:beams]
        for tokens, value in live:
            if tokens[-1] == end:
                return tokens, value / len(tokens) ** length_penalty
    tokens, value = live[0]
    return tokens, value / len(tokens) ** length_penalty


# %% mistake="does not count the end token" of="beam-search" says="The end token counts as a token"
def beam_search(next_log_probs, beams, max_new_tokens, end, length_penalty=1.0):
    live, finished = [((), 0.0)], []
    for _ in range(max_new_tokens):
        log_probs = next_log_probs([tokens for tokens, _ in live])
        extended = sorted(
            (
                ((*tokens, token), value + p)
                for (tokens, value), row in zip(live, log_probs.tolist(), strict=True)
                for token, p in enumerate(row)
            ),
            key=lambda one: -one[1],
        )
        finished += [one for one in extended[:beams] if one[0][-1] == end]
        live = [one for one in extended if one[0][-1] != end][:beams]

    def score(one):
        return one[1] / max(1, len(one[0]) - (one[0][-1] == end)) ** length_penalty

    best = max(finished + live, key=score)
    return best[0], score(best)


# %% mistake="multiplies by the length" of="beam-search" says="At length_penalty 1 the"
def beam_search(next_log_probs, beams, max_new_tokens, end, length_penalty=1.0):
    live, finished = [((), 0.0)], []
    for _ in range(max_new_tokens):
        log_probs = next_log_probs([tokens for tokens, _ in live])
        extended = sorted(
            (
                ((*tokens, token), value + p)
                for (tokens, value), row in zip(live, log_probs.tolist(), strict=True)
                for token, p in enumerate(row)
            ),
            key=lambda one: -one[1],
        )
        finished += [one for one in extended[:beams] if one[0][-1] == end]
        live = [one for one in extended if one[0][-1] != end][:beams]
    tokens, value = max(finished + live, key=lambda one: one[1] * len(one[0]) ** length_penalty)
    return tokens, value * len(tokens) ** length_penalty


# %% mistake="finished texts keep their place in the beam" of="beam-search" says="take no live place away"
def beam_search(next_log_probs, beams, max_new_tokens, end, length_penalty=1.0):
    live, finished = [((), 0.0)], []
    for _ in range(max_new_tokens):
        if not live:
            break
        log_probs = next_log_probs([tokens for tokens, _ in live])
        extended = sorted(
            (
                ((*tokens, token), value + p)
                for (tokens, value), row in zip(live, log_probs.tolist(), strict=True)
                for token, p in enumerate(row)
            ),
            key=lambda one: -one[1],
        )[:beams]
        finished += [one for one in extended if one[0][-1] == end]
        live = [one for one in extended if one[0][-1] != end]
    tokens, value = max(finished + live, key=lambda one: one[1] / len(one[0]) ** length_penalty)
    return tokens, value / len(tokens) ** length_penalty


# %% mistake="finishes an end token anywhere in the ranking" of="beam-search" says="is dropped; yours finishes it"
def beam_search(next_log_probs, beams, max_new_tokens, end, length_penalty=1.0):
    live, finished = [((), 0.0)], []
    for _ in range(max_new_tokens):
        log_probs = next_log_probs([tokens for tokens, _ in live])
        extended = sorted(
            (
                ((*tokens, token), value + p)
                for (tokens, value), row in zip(live, log_probs.tolist(), strict=True)
                for token, p in enumerate(row)
            ),
            key=lambda one: -one[1],
        )
        finished += [one for one in extended if one[0][-1] == end]
        live = [one for one in extended if one[0][-1] != end][:beams]
    tokens, value = max(finished + live, key=lambda one: one[1] / len(one[0]) ** length_penalty)
    return tokens, value / len(tokens) ** length_penalty


# %% mistake="forgets the texts that are cut off" of="beam-search" says="even where others ended by themselves"
def beam_search(next_log_probs, beams, max_new_tokens, end, length_penalty=1.0):
    live, finished = [((), 0.0)], []
    for _ in range(max_new_tokens):
        log_probs = next_log_probs([tokens for tokens, _ in live])
        extended = sorted(
            (
                ((*tokens, token), value + p)
                for (tokens, value), row in zip(live, log_probs.tolist(), strict=True)
                for token, p in enumerate(row)
            ),
            key=lambda one: -one[1],
        )
        finished += [one for one in extended[:beams] if one[0][-1] == end]
        live = [one for one in extended if one[0][-1] != end][:beams]
    tokens, value = max(finished or live, key=lambda one: one[1] / len(one[0]) ** length_penalty)
    return tokens, value / len(tokens) ** length_penalty


# %% mistake="takes token 0 for the end" of="beam-search" says="take the end token from `end`"
def beam_search(next_log_probs, beams, max_new_tokens, end, length_penalty=1.0):
    live, finished = [((), 0.0)], []
    for _ in range(max_new_tokens):
        log_probs = next_log_probs([tokens for tokens, _ in live])
        extended = sorted(
            (
                ((*tokens, token), value + p)
                for (tokens, value), row in zip(live, log_probs.tolist(), strict=True)
                for token, p in enumerate(row)
            ),
            key=lambda one: -one[1],
        )
        finished += [one for one in extended[:beams] if one[0][-1] == 0]
        live = [one for one in extended if one[0][-1] != 0][:beams]
    tokens, value = max(finished + live, key=lambda one: one[1] / len(one[0]) ** length_penalty)
    return tokens, value / len(tokens) ** length_penalty


# %% alternative="a table of tensors instead of lists" of="beam-search"
def beam_search(next_log_probs, beams, max_new_tokens, end, length_penalty=1.0):
    prefixes, values = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1)
    best, best_score = (), -math.inf

    def offer(candidates, sums):
        nonlocal best, best_score
        for candidate, total in zip(candidates.tolist(), sums.tolist(), strict=True):
            if (score := total / len(candidate) ** length_penalty) > best_score:
                best, best_score = tuple(candidate), score

    for _ in range(max_new_tokens):
        log_probs = next_log_probs([tuple(prefix) for prefix in prefixes.tolist()])
        totals = (values[:, None] + log_probs).flatten()
        ranked = totals.argsort(descending=True)
        width = log_probs.shape[1]
        candidates = torch.cat([prefixes[ranked // width], (ranked % width)[:, None]], dim=1)
        over = candidates[:, -1] == end
        offer(candidates[:beams][over[:beams]], totals[ranked][:beams][over[:beams]])
        prefixes, values = candidates[~over][:beams], totals[ranked][~over][:beams]
    offer(prefixes, values)
    return best, best_score


# %% [markdown]
# The match, on notes: four beams, your search against `generate`, which keeps a cache of keys and values and so adds in another order.


# %%
def next_log_probs_after(prompt: list[int]) -> Callable[[list[tuple[int, ...]]], Tensor]:
    """The model as a function from generated prefixes of one length to log-probabilities of the next token."""

    @torch.no_grad()
    def after(prefixes: list[tuple[int, ...]]) -> Tensor:
        ids = torch.tensor([[*prompt, *prefix] for prefix in prefixes], device=model.device)
        return model(ids).logits[:, -1].float().log_softmax(dim=-1).cpu()

    return after


@torch.no_grad()
def log_probability(prompt: list[int], tokens: list[int]) -> float:
    """The log-probability, in nats, that the model gives to these tokens after the prompt."""
    logits = model(torch.tensor([prompt + tokens], device=model.device)).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(dim=-1).gather(1, torch.tensor(tokens, device=model.device)[:, None]).sum().item()


beam_settings = {"num_beams": 4, "early_stopping": "never", "max_new_tokens": 44}
beam_errors, same_text = [], []
for world in worlds:
    prompt = note_prompt(world.tickets(1, part="test")[0])
    tokens, score = beam_search(next_log_probs_after(prompt), 4, 44, end, length_penalty=1.0)
    library = model.generate(
        input_ids=torch.tensor([prompt], device=model.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
        generation_config=GenerationConfig(
            do_sample=False, temperature=1.0, top_p=1.0, top_k=50, repetition_penalty=1.0, length_penalty=1.0,
            eos_token_id=end, pad_token_id=padding, return_dict_in_generate=True, output_scores=True, **beam_settings,
        ),
    )  # fmt: skip
    library_score = library.sequences_scores[0].item()
    library_tokens = library.sequences[0, len(prompt) : len(prompt) + len(tokens)].tolist()
    beam_errors.append(abs(score - library_score))
    same_text.append(list(tokens) == library_tokens)
print(f"same text: {same_text}; largest difference of the scores: {max(beam_errors):.1e} nats a token")
card.record(
    "beam_error",
    max(beam_errors),
    format=".0e",
    label="largest difference to transformers' beam score",
    unit="nats a token",
    tolerance=1e-3,
)

# %% [markdown]
# ### Is the more probable text the better one?

# %%
beam_tickets = [ticket for world in worlds for ticket in world.tickets(16, part="test")]
beam_prompts = [note_prompt(ticket) for ticket in beam_tickets]
found = {
    "greedy": continuations(beam_prompts, max_new_tokens=44),
    "4 beams": continuations(beam_prompts, length_penalty=0.0, **beam_settings),
}
log_p = {
    name: np.array([log_probability(prompt, tokens) for prompt, tokens in zip(beam_prompts, texts, strict=True)])
    for name, texts in found.items()
}
correct = {
    name: np.array([right_note(text_of(tokens), ticket) for tokens, ticket in zip(texts, beam_tickets, strict=True)])
    for name, texts in found.items()
}
rounding = 1e-3  # nats; two ways to add the same numbers differ by less
gained = log_p["4 beams"] - log_p["greedy"]
outcomes = (
    ("greedy_worse", gained > rounding, COLOURS.after, "beam found a more probable text"),
    ("beam_worse", gained < -rounding, COLOURS.wrong, "greedy's was more probable"),
    ("equal", np.abs(gained) <= rounding, COLOURS.before, "the same"),
)
fig, ax = plt.subplots(figsize=(6.4, 4.2))
low, high = min(map(min, log_p.values())) - 0.3, max(map(max, log_p.values())) + 0.3
ax.plot([low, high], [low, high], color=COLOURS.truth, lw=1, ls="--")
for place, (_, mask, colour, label) in enumerate(outcomes):
    ax.plot(log_p["greedy"][mask], log_p["4 beams"][mask], "o", color=colour, ms=6, alpha=0.8)
    corner = {"xycoords": "axes fraction", "ha": "right", "fontweight": "bold", "fontsize": 10}
    ax.annotate(f"{label}: {mask.sum()}", (0.98, 0.2 - 0.08 * place), color=colour, **corner)
ax.set(xlim=(low, high), ylim=(low, high), xlabel="log-probability of the greedy note (nats)")
ax.set(ylabel="log-probability with 4 beams (nats)", title=f"{len(beam_tickets)} notes")
plt.show()
for name, mask, _, label in outcomes[:2]:
    bounds = triage.interval(mask)
    card.record(name, mask.mean(), low=bounds[0], high=bounds[1], format=".0%", label=f"notes: {label}", tolerance=0.1)
for name, key in (("greedy", "right_greedy"), ("4 beams", "right_beams")):
    bounds = triage.interval(correct[name])
    card.record(
        key,
        correct[name].mean(),
        low=bounds[0],
        high=bounds[1],
        format=".0%",
        label=f"right notes, {name}",
        tolerance=0.1,
    )

# %% [markdown]
# In {{greedy_worse}} of the messages greedy decoding missed a more probable note that four beams find. In {{beam_worse}} it is the other way round: beam search is no guarantee either, since the greedy text can be pushed out of the beam by prefixes that looked better at the time.
#
# More probable is not the same as more correct: {{right_greedy}} of the greedy notes are right and {{right_beams}} of those with four beams, and the intervals on the card tell you whether that is a difference. The mode of a model of text can be useless: in a translation model the most probable output of all was the empty one for more than half of the inputs (Stahlberg and Byrne, 2019). Beam search earns its price, four sequences in place of one, where the input nearly determines the output, as in speech recognition and translation, and even there quality falls again with wider beams (Koehn and Knowles, 2017, section 3.6).

# %% [markdown]
# ## Tokens are not text
#
# Now the triage. A constraint says which *strings* are allowed; the model reads and writes *tokens*, and one string has many spellings in tokens. The tokenizer writes one of them, and training has shown the model no other.


# %%
def spellings(text: str) -> int:
    """In how many ways the vocabulary can spell the text."""
    vocabulary = {tokenizer.decode([token]) for token in range(len(tokenizer))}
    ways = [1] + [0] * len(text)
    for stop in range(1, len(text) + 1):
        ways[stop] = sum(ways[start] for start in range(stop) if text[start:stop] in vocabulary)
    return ways[-1]


line = ticket.triage.to_json()
written = tokenizer(line, add_special_tokens=False)["input_ids"]
print(
    f"{spellings('delivery')} ways to spell 'delivery', {spellings(line):,d} to spell the line; the tokenizer writes:"
)
print(" | ".join(tokenizer.decode([token]) for token in written))

# %% [markdown]
# So a program that puts an answer together from pieces, a template here and a value there, must cut where the tokenizer cuts. Otherwise the text is right and the tokens are ones the model has never seen in this order. The same happens at the end of a prompt: a prompt that ends in a space leaves the model without the token "space and word" that it would have written.
#
# **Exercise.** `safe_cuts(encode, text)` returns the list of places $i$, $0 < i <$ `len(text)`, in rising order, at which `text` may be cut: encoding both parts apart and joining the ids gives *exactly* the ids of the whole. `encode` takes a string and returns a list of ids. For an encoder with the vocabulary `a`, `b`, `ab`, `c` that takes the longest match, `"abc"` has the safe cuts `[2]`: the whole is `ab c`, and a cut at 1 gives `a b c`. *About 3 lines.*
#
# <details><summary>Hint 1</summary>Write the sentence of the definition as a condition on one place, and try every place.</details>
# <details><summary>Hint 2</summary>Lists of ids are joined with <code>+</code> and compared with <code>==</code>. Neither their lengths nor the text they decode to are enough: both can agree while the ids differ.</details>
# <details><summary>Hint 3</summary>A list comprehension over <code>range(1, len(text))</code>, keeping i where the ids of <code>text[:i]</code> followed by those of <code>text[i:]</code> equal the ids of the whole.</details>


# %% exercise="safe-cuts" difficulty=1 minutes=6
def safe_cuts(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Return the places at which the text can be cut without changing its tokens."""
    ### BEGIN SOLUTION
    together = list(encode(text))
    return [place for place in range(1, len(text)) if [*encode(text[:place]), *encode(text[place:])] == together]
    ### END SOLUTION


# %% check="safe-cuts" points=2
def longest_match(
    vocabulary: list[str], opening: tuple[int, ...] = (), closing: tuple[int, ...] = ()
) -> Callable[[str], list[int]]:
    """An encoder that takes the longest entry of the vocabulary at each place, between two fixed groups of ids."""

    def encode(text: str) -> list[int]:
        ids = list(opening)
        while text:
            entry = max((entry for entry in vocabulary if text.startswith(entry)), key=len)
            ids.append(vocabulary.index(entry))
            text = text.removeprefix(entry)
        return [*ids, *closing]

    return encode


letters = longest_match(["a", "b", "ab", "c"])
got = safe_cuts(letters, "abc")
assert isinstance(got, list), f"Return a list of places; yours is a {type(got).__name__}"
assert not {0, 3} & set(got), f"A cut leaves something on both sides: 0 < i < len(text) = 3; yours are {got}"
assert got == [2], f'"abc" is "ab c" in tokens, so only a cut at 2 is safe; yours are {got}'
# "aab" is "aa b"; cut at 1 it is "a ab": as many tokens, others.
pairs = longest_match(["a", "b", "aa", "ab"])
got = safe_cuts(pairs, "aab")
assert 1 not in got, (
    "A cut at 1 gives as many tokens as the whole, but others: compare the ids, not their number or text"
)
assert got == [2], f'"aab" is "aa b", so only a cut at 2 is safe; yours are {got}'
got = safe_cuts(pairs, "aaa")
assert got == [2], (
    f'"aaa" is "aa a"; cut at 1 it is "a aa", the same ids in another order, which the model reads as another text: only '
    f"2 is safe; yours are {got}"
)
# This one puts an id in front of every text, as tokenizers do with special tokens.
marked = longest_match(["a", "b", "c"], opening=(9,))
got = safe_cuts(marked, "abc")
assert got == [], (
    f"This encoder puts an id in front of every text, so no cut is safe: the second part would carry it too; yours are {got}. "
    "That the first part's ids begin the whole's is not enough"
)
got = safe_cuts(longest_match(["a", "b", "c"], closing=(9,)), "abc")
assert got == [], (
    f"This encoder puts an id behind every text, so the first part would end with it: no cut is safe; yours are {got}. "
    "That the second part's ids end the whole's is not enough"
)
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(4)
for _vocabulary in (["a", "b"], ["a", "b", "ab", "ba"], ["a", "b", "aab", "bb", "abab"], ["a", "b", "aa", "aaaa"]):
    _encode = longest_match(_vocabulary)
    for _length in (1, 2, 5, 9):
        _text = "".join(_rng.choice(["a", "b"], size=_length))
        _want = []
        for _i in range(1, _length):
            if _encode(_text) == _encode(_text[:_i]) + _encode(_text[_i:]):
                _want.append(_i)
        assert safe_cuts(_encode, _text) == _want, f"{_text!r} with {_vocabulary}: the safe cuts are {_want}"
assert safe_cuts(letters, "a") == [], "A text of one letter cannot be cut"
### END HIDDEN TESTS


# %% mistake="compares the number of tokens" of="safe-cuts" says="compare the ids, not their number"
def safe_cuts(encode, text):
    whole = len(encode(text))
    return [i for i in range(1, len(text)) if len(encode(text[:i])) + len(encode(text[i:])) == whole]


# %% mistake="asks whether the first part begins the whole" of="safe-cuts" says="is not enough"
def safe_cuts(encode, text):
    whole = encode(text)
    return [i for i in range(1, len(text)) if whole[: len(encode(text[:i]))] == encode(text[:i])]


# %% mistake="asks whether the second part ends the whole" of="safe-cuts" says="the second part's ids end the whole's"
def safe_cuts(encode, text):
    whole = encode(text)
    return [i for i in range(1, len(text)) if whole[-len(encode(text[i:])) :] == encode(text[i:])]


# %% mistake="compares the ids without their order" of="safe-cuts" says="the same ids in another order"
def safe_cuts(encode, text):
    whole = sorted(encode(text))
    return [i for i in range(1, len(text)) if sorted(encode(text[:i]) + encode(text[i:])) == whole]


# %% mistake="takes the two ends for cuts" of="safe-cuts" says="A cut leaves something on both sides"
def safe_cuts(encode, text):
    whole = encode(text)
    return [i for i in range(len(text) + 1) if encode(text[:i]) + encode(text[i:]) == whole]


# %% mistake="counts tokens in place of characters" of="safe-cuts" says="only a cut at 2 is safe"
def safe_cuts(encode, text):
    return list(range(1, len(encode(text))))


# %% alternative="breaks off at the first difference" of="safe-cuts"
def safe_cuts(encode, text):
    found = []
    for i in range(1, len(text)):
        joined = iter(encode(text[:i]) + encode(text[i:]))
        if all(next(joined, None) == token for token in encode(text)) and next(joined, None) is None:
            found.append(i)
    return found


# %% [markdown]
# A template with four holes cuts before and after each value. On the line of the ticket above:


# %%
def encode_text(text: str) -> list[int]:
    """The ids of the text alone, without special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


VALUE = re.compile(r'((?<=: )(?:"[^"]*"|null))')  # what stands after a key, quotation marks included
cuts = safe_cuts(encode_text, line)
holes = [place for match in VALUE.finditer(line) for place in match.span()]
print(
    f"safe cuts: {len(cuts)} of {len(line) - 1} places; of the template's {len(holes)} cuts, {len(set(holes) & set(cuts))} are safe"
)

# %% [markdown]
# ## Valid by construction
#
# The schema is closed: category, urgency and action come from lists, and the product is `null` or a name in the ticket's text, a capitalised word in mid-sentence. So all valid answers to a ticket can be written down, each tokenised *as a whole*: no cut, no wrong spelling. As token sequences they form a trie, a tree in which texts with the same beginning share a path; at each step the model may choose among the children of the node it stands at, and everything else gets $-\infty$.


# %%
def valid_answers(ticket: Ticket) -> list[str]:
    """Every triage that the schema admits for the ticket's text, as JSON."""
    products = [None, *dict.fromkeys(re.findall(r"(?<=[a-z] )[A-Z][a-z]+", ticket.text))]
    return [
        Triage(product, category, urgency, action).to_json()
        for product in products
        for category in CATEGORIES
        for urgency in URGENCIES
        for action in ACTIONS
    ]


def tokenised_whole(texts: list[str]) -> list[tuple[int, ...]]:
    """The tokenizer's own spelling of each text."""
    return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


admitted = tokenised_whole(valid_answers(ticket))
print(f"{len(admitted)} valid answers to this ticket, of {min(map(len, admitted))} to {max(map(len, admitted))} tokens")

# %% [markdown]
# **Exercise.** Two things.
#
# 1. *Predict*, before you write anything: the base model has never seen the format, and you will force it to give valid answers only. What share of them is right in all four fields? `predicted_exact` is a share: 0.25 means a quarter. It is graded for being a share, not for being right.
# 2. Write `TrieLogitsProcessor(answers, prompt_length, end)`, a `LogitsProcessor` for `generate`. `answers[i]` lists the token sequences admitted for prompt `i`, as tuples without the end token. `processor(input_ids, scores)` gets the ids so far `(n, t)`, of which the first `prompt_length` columns are the (padded) prompt, and scores `(n, v)`. It returns `(n, v)` scores: unchanged at tokens that may come next, $-\infty$ elsewhere.
#
# - What may come next: the next token of every admitted sequence that begins with the tokens generated so far, and `end` if they *are* an admitted sequence. One sequence may begin another: after `(5,)` of `[(5,), (5, 6)]` both `end` and 6 may come.
# - Where nothing may come (after the end token, when other rows are still being written), allow `end` alone: a row without any allowed token would make `softmax` divide by zero.
# - `n` may be a multiple of the number of prompts: with 4 beams or 4 samples, rows 0 to 3 belong to prompt 0, rows 4 to 7 to prompt 1.
# - Read the state from `input_ids` in every call. Beam search reorders rows between calls, so a state that you carry along is another row's. Do not change `scores` in place.
#
# With `answers=[[(5, 6), (5, 7)]]`, `prompt_length=2` and the ids `[[1, 1, 5]]`, tokens 6 and 7 keep their scores. *About 16 lines.*
#
# <details><summary>Hint 1</summary>Nested dictionaries are a trie: a node maps each next token to its child. Add the end token to every sequence, and a finished answer needs no case of its own.</details>
# <details><summary>Hint 2</summary>Building: start at the root and take <code>node = node.setdefault(token, {})</code> for each token. Walking: <code>node = node.get(token, {})</code>. The row's prompt is <code>row // (n // number of prompts)</code>.</details>
# <details><summary>Hint 3</summary>In the call: <code>masked = torch.full_like(scores, -math.inf)</code>; for each row walk its trie along <code>input_ids[row, prompt_length:].tolist()</code>, take <code>allowed = list(node) or [end]</code>, and copy <code>scores[row, allowed]</code> into the same places of <code>masked</code>.</details>

# %% exercise="triage-processor" difficulty=3 minutes=15
predicted_exact = None
### BEGIN SOLUTION
predicted_exact = 0.02
### END SOLUTION


class TrieLogitsProcessor(LogitsProcessor):
    """Admit only continuations that lead to one of the given token sequences, each followed by the end token."""

    def __init__(self, answers: list[list[tuple[int, ...]]], prompt_length: int, end: int) -> None:
        ### BEGIN SOLUTION
        self.prompt_length, self.end = prompt_length, end
        self.roots: list[dict] = []
        for sequences in answers:
            root: dict = {}
            for sequence in sequences:
                node = root
                for token in (*sequence, end):
                    node = node.setdefault(token, {})
            self.roots.append(root)
        ### END SOLUTION

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        rows_a_prompt = len(input_ids) // len(self.roots)
        masked = torch.full_like(scores, -math.inf)
        for row, generated in enumerate(input_ids[:, self.prompt_length :].tolist()):
            node = self.roots[row // rows_a_prompt]
            for token in generated:
                node = node.get(token, {})
            allowed = list(node) or [self.end]
            masked[row, allowed] = scores[row, allowed]
        return masked
        ### END SOLUTION


# %% check="triage-processor" points=1
assert isinstance(predicted_exact, (int, float)), f"Predict with a number: set predicted_exact, now {predicted_exact!r}"
assert 0 <= predicted_exact <= 1, f"predicted_exact is a share from 0 to 1 (0.03 for 3 %), not {predicted_exact}"


# %% check="triage-processor" points=2
def allowed_by(processor: LogitsProcessor, ids: list[list[int]], v: int = 10) -> list[list[int]]:
    """The tokens that the processor leaves possible in each row, with random scores; checks that they are kept."""
    scores = torch.randn(len(ids), v, generator=torch.Generator().manual_seed(1))
    given = scores.clone()
    out = processor(torch.tensor(ids), scores)
    assert isinstance(out, Tensor), f"Return a tensor of scores; yours is {type(out).__name__}"
    assert out.shape == given.shape, f"Return scores of shape {tuple(given.shape)}"
    assert torch.equal(scores, given), "You changed the scores you were given: fill a new tensor"
    assert not ((out < given - 100) & (out > -math.inf)).any(), (
        "A large negative score is not minus infinity: in a row where every score is that low the token may be drawn "
        "after all; use -math.inf"
    )
    left = out > -math.inf
    assert torch.equal(out[left], given[left]), (
        "Allowed tokens must keep the model's scores; otherwise the constraint chooses, and not the model"
    )
    return [row.nonzero().flatten().tolist() for row in left]


def three_answers() -> LogitsProcessor:
    """A fresh processor for one prompt of two tokens with three answers."""
    return TrieLogitsProcessor([[(5, 6), (5, 7), (8,)]], prompt_length=2, end=0)


got = allowed_by(three_answers(), [[1, 1]])
assert got != [list(range(10))], "Nothing is forbidden: set the score of every other token to minus infinity"
assert got != [[0]], "You walk along the prompt, which is no answer: skip its prompt_length columns"
assert got == [[5, 8]], f"At the start the admitted answers begin with 5 or 8; you allow {got[0]}"
got = allowed_by(three_answers(), [[1, 1, 5]])
assert got == [[6, 7]], f"After 5 come 6 or 7; you allow {got[0]}"
got = allowed_by(three_answers(), [[5, 5, 8]])
assert got == [[0]], f"After (8,), a whole answer, only the end token may come; you allow {got[0]}"
got = allowed_by(TrieLogitsProcessor([[(5,), (5, 6)]], prompt_length=1, end=0), [[1, 5]])
assert got == [[0, 6]], f"(5,) is an answer and begins another one: allow the end token and 6; you allow {got[0]}"
got = allowed_by(three_answers(), [[1, 1, 8, 0]])
assert got != [[]], "After the end token nothing is left, and softmax would divide by zero: allow the end token"
assert got == [[0]], f"After the end token allow the end token alone; you allow {got[0]}"
got = allowed_by(TrieLogitsProcessor([[(5,), (8,)]], prompt_length=1, end=3), [[1, 5], [1, 8]])
assert got == [[3], [3]], f"With end=3 a whole answer is followed by 3: take the end token from `end`; you allow {got}"
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(2)
for _count, _length, _start in [(1, 1, 0), (6, 4, 3), (40, 5, 1), (12, 3, 7)]:
    _answers = sorted({tuple(_rng.integers(1, 5, size=_rng.integers(1, _length + 1)).tolist()) for _ in range(_count)})
    for _answer in _answers[:10]:
        for _done in range(len(_answer) + 1):
            _row = [4] * _start + list(_answer[:_done])
            if not _row:
                continue
            _want = {a[_done] for a in _answers if a[:_done] == _answer[:_done] and len(a) > _done}
            _want |= {0} if _answer[:_done] in _answers else set()
            (_got,) = allowed_by(TrieLogitsProcessor([_answers], _start, 0), [_row])
            assert set(_got) == _want, (
                f"{_answers[:6]}… after {_answer[:_done]}: {sorted(_want)} may come; you allow {_got}"
            )
(_got,) = allowed_by(TrieLogitsProcessor([[(1, 2)]], 0, 0), [[1, 2, 0, 0, 0]])
assert _got == [0], "A row that ended long ago may only get the end token"
### END HIDDEN TESTS

# %% check="triage-processor" points=2
two_prompts = [[(1, 2, 3), (1, 4, 4)], [(1, 2, 5), (6, 6, 6)]]
got = allowed_by(TrieLogitsProcessor(two_prompts, prompt_length=1, end=0), [[9, 1, 2], [9, 1, 2]])
assert got == [[3], [5]], f"Each prompt has its own answers: row 0 admits 3, row 1 admits 5; you allow {got}"
got = allowed_by(TrieLogitsProcessor(two_prompts, prompt_length=1, end=0), [[9, 1, 2], [9, 1, 4], [9, 1, 2], [9, 6, 6]])
assert got == [[3], [4], [5], [6]], (
    "Four rows and two prompts: rows 0 and 1 belong to prompt 0, rows 2 and 3 to prompt 1 (beams of one prompt stand "
    f"together); you allow {got}"
)
fresh = TrieLogitsProcessor([[(1, 2, 3), (4, 5, 6)]], prompt_length=1, end=0)
allowed_by(fresh, [[9], [9]])
allowed_by(fresh, [[9, 1], [9, 4]])
got = allowed_by(fresh, [[9, 4, 5], [9, 1, 2]])  # the beams have changed places
assert got == [[6], [3]], (
    f"Beam search has swapped the rows, and you followed the old ones: read the state from input_ids; you allow {got}"
)
### BEGIN HIDDEN TESTS
torch.manual_seed(9)
_tiny = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=14, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.5, bos_token_id=1, eos_token_id=0, pad_token_id=0,
    )
).eval()  # fmt: skip
_admitted = [[(5, 6, 7), (5, 8), (9,)], [(2, 2, 2, 2), (2, 3)], [(4, 4), (4, 5, 4)]]
_prompts = torch.tensor([[0, 3, 4], [3, 4, 5], [0, 0, 7]])
for _settings in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 0, "num_return_sequences": 4}):
    _out = _tiny.generate(
        input_ids=_prompts,
        attention_mask=(_prompts > 0).long(),
        generation_config=GenerationConfig(max_new_tokens=6, eos_token_id=0, pad_token_id=0, **_settings),
        logits_processor=LogitsProcessorList([TrieLogitsProcessor(_admitted, 3, 0)]),
    )
    for _row, _new in enumerate(_out[:, 3:].tolist()):
        _new = tuple(_new[: _new.index(0)] if 0 in _new else _new)
        _mine = _admitted[_row // (len(_out) // 3)]
        assert _new in _mine, f"generate with {_settings or 'greedy decoding'} gave {_new}, which is not among {_mine}"
### END HIDDEN TESTS


# %% mistake="replaces the model's scores" of="triage-processor" says="must keep the model's scores"
predicted_exact = 0.1


class TrieLogitsProcessor(LogitsProcessor):
    def __init__(self, answers, prompt_length, end):
        self.answers = [[(*a, end) for a in part] for part in answers]
        self.prompt_length, self.end = prompt_length, end

    def __call__(self, input_ids, scores):
        out = torch.full_like(scores, -math.inf)
        for row, done in enumerate(input_ids[:, self.prompt_length :].tolist()):
            part = self.answers[row * len(self.answers) // len(input_ids)]
            ways = {a[len(done)] for a in part if len(a) > len(done) and a[: len(done)] == tuple(done)} or {self.end}
            out[row, list(ways)] = 0.0
        return out


# %% mistake="forgets the end token" of="triage-processor" says="only the end token may come"
predicted_exact = 0.1


class TrieLogitsProcessor(LogitsProcessor):
    def __init__(self, answers, prompt_length, end):
        self.answers, self.prompt_length = answers, prompt_length

    def __call__(self, input_ids, scores):
        out = torch.full_like(scores, -math.inf)
        for row, done in enumerate(input_ids[:, self.prompt_length :].tolist()):
            part = self.answers[row * len(self.answers) // len(input_ids)]
            ways = list({a[len(done)] for a in part if len(a) > len(done) and a[: len(done)] == tuple(done)})
            out[row, ways] = scores[row, ways]
        return out


# %% mistake="walks along the prompt" of="triage-processor" says="You walk along the prompt"
predicted_exact = 0.1


class TrieLogitsProcessor(LogitsProcessor):
    def __init__(self, answers, prompt_length, end):
        self.answers, self.end = [[(*a, end) for a in part] for part in answers], end

    def __call__(self, input_ids, scores):
        out = torch.full_like(scores, -math.inf)
        for row, done in enumerate(input_ids.tolist()):
            part = self.answers[row * len(self.answers) // len(input_ids)]
            ways = {a[len(done)] for a in part if len(a) > len(done) and a[: len(done)] == tuple(done)} or {self.end}
            out[row, list(ways)] = scores[row, list(ways)]
        return out


# %% mistake="one row, one prompt" of="triage-processor" says="Four rows and two prompts"
predicted_exact = 0.1


class TrieLogitsProcessor(LogitsProcessor):
    def __init__(self, answers, prompt_length, end):
        self.answers = [[(*a, end) for a in part] for part in answers]
        self.prompt_length, self.end = prompt_length, end

    def __call__(self, input_ids, scores):
        out = torch.full_like(scores, -math.inf)
        for row, done in enumerate(input_ids[:, self.prompt_length :].tolist()):
            part = self.answers[row % len(self.answers)]
            ways = {a[len(done)] for a in part if len(a) > len(done) and a[: len(done)] == tuple(done)} or {self.end}
            out[row, list(ways)] = scores[row, list(ways)]
        return out


# %% mistake="carries the state from call to call" of="triage-processor" says="you followed the old ones"
predicted_exact = 0.1


class TrieLogitsProcessor(LogitsProcessor):
    def __init__(self, answers, prompt_length, end):
        self.answers = [[(*a, end) for a in part] for part in answers]
        self.prompt_length, self.end, self.left = prompt_length, end, None

    def __call__(self, input_ids, scores):
        done = input_ids[:, self.prompt_length :].tolist()
        place = len(done[0])
        if self.left is None:
            parts = [self.answers[row * len(self.answers) // len(done)] for row in range(len(done))]
            self.left = [[a for a in part if a[:place] == tuple(ids)] for part, ids in zip(parts, done, strict=True)]
        else:
            last = [ids[-1:] for ids in done]
            self.left = [
                [a for a in left if list(a[place - 1 : place]) == token]
                for left, token in zip(self.left, last, strict=True)
            ]
        out = torch.full_like(scores, -math.inf)
        for row, left in enumerate(self.left):
            ways = list({a[place] for a in left if len(a) > place} or {self.end})
            out[row, ways] = scores[row, ways]
        return out


# %% mistake="a large negative number for minus infinity" of="triage-processor" says="is not minus infinity"
predicted_exact = 0.1


class TrieLogitsProcessor(LogitsProcessor):
    def __init__(self, answers, prompt_length, end):
        self.answers = [[(*a, end) for a in part] for part in answers]
        self.prompt_length, self.end = prompt_length, end

    def __call__(self, input_ids, scores):
        out = torch.full_like(scores, -1e9)
        for row, done in enumerate(input_ids[:, self.prompt_length :].tolist()):
            part = self.answers[row * len(self.answers) // len(input_ids)]
            ways = {a[len(done)] for a in part if len(a) > len(done) and a[: len(done)] == tuple(done)} or {self.end}
            out[row, list(ways)] = scores[row, list(ways)]
        return out


# %% mistake="takes token 0 for the end" of="triage-processor" says="take the end token from `end`"
predicted_exact = 0.1


class TrieLogitsProcessor(LogitsProcessor):
    def __init__(self, answers, prompt_length, end):
        self.answers, self.prompt_length = [[(*a, 0) for a in part] for part in answers], prompt_length

    def __call__(self, input_ids, scores):
        out = torch.full_like(scores, -math.inf)
        for row, done in enumerate(input_ids[:, self.prompt_length :].tolist()):
            part = self.answers[row * len(self.answers) // len(input_ids)]
            ways = {a[len(done)] for a in part if len(a) > len(done) and a[: len(done)] == tuple(done)} or {0}
            out[row, list(ways)] = scores[row, list(ways)]
        return out


# %% mistake="a percentage for a share" of="triage-processor" says="is a share from 0 to 1"
predicted_exact = 5


class TrieLogitsProcessor(LogitsProcessor):
    def __init__(self, answers, prompt_length, end):
        self.answers = [[(*a, end) for a in part] for part in answers]
        self.prompt_length, self.end = prompt_length, end

    def __call__(self, input_ids, scores):
        out = torch.full_like(scores, -math.inf)
        for row, done in enumerate(input_ids[:, self.prompt_length :].tolist()):
            part = self.answers[row * len(self.answers) // len(input_ids)]
            ways = {a[len(done)] for a in part if len(a) > len(done) and a[: len(done)] == tuple(done)} or {self.end}
            out[row, list(ways)] = scores[row, list(ways)]
        return out


# %% alternative="no trie: a table from prefixes to next tokens" of="triage-processor"
predicted_exact = 0.0


class TrieLogitsProcessor(LogitsProcessor):
    def __init__(self, answers, prompt_length, end):
        self.tables = []
        for part in answers:
            table = {}
            for answer in part:
                for length, token in enumerate([*answer, end]):
                    table.setdefault(answer[:length], set()).add(token)
            self.tables.append(table)
        self.skip, self.fallback = prompt_length, {end}

    def __call__(self, input_ids, scores):
        forbidden = torch.ones_like(scores, dtype=torch.bool)
        tables = [table for table in self.tables for _ in range(len(scores) // len(self.tables))]
        for flags, ids, table in zip(forbidden, input_ids, tables, strict=True):
            flags[list(table.get(tuple(ids[self.skip :].tolist()), self.fallback))] = False
        return scores.masked_fill(forbidden, -math.inf)


# %% [markdown]
# ### Valid is not right
#
# The experiment: 32 tickets of each of three companies. The base model answers freely and under your constraint; then it is tuned on triage for a few steps, and its weights on the way answer again. In each run company, order of the data and test tickets are others. First the tuning, which needs nothing of yours.


# %%
@functools.cache
def piece_ids(piece: str) -> tuple[int, ...]:
    """The ids of a piece on its own; there are few different ones."""
    return tuple(encode_text(piece))


def tokenised_apart(texts: list[str]) -> list[tuple[int, ...]]:
    """The same texts, template and values tokenised apart: what a program with f-strings produces."""
    return [tuple(token for piece in VALUE.split(text) for token in piece_ids(piece)) for text in texts]


tests = [world.tickets(test_tickets, part="test") for world in worlds]
admitted_texts = [[valid_answers(ticket) for ticket in tickets] for tickets in tests]
whole = [[tokenised_whole(texts) for texts in run] for run in admitted_texts]
apart = [[tokenised_apart(texts) for texts in run] for run in admitted_texts]
longest_answer = 2 + max(len(ids) for part in (whole, apart) for run in part for answers in run for ids in answers)
marks = sorted({0, 3 * steps // 16, steps // 2, steps})
snapshots: list[dict[int, dict[str, Tensor]]] = []  # of each run, the weights after so many steps


def weights() -> dict[str, Tensor]:
    """A copy of the model's weights, in the computer's memory."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}


def keeping(batches: Iterable[triage.Batch], kept: dict[int, dict[str, Tensor]]) -> Iterator[triage.Batch]:
    """The same batches; before those at the marks, the weights are kept."""
    for step, batch in enumerate(batches):
        if step in marks:
            kept[step] = weights()
        yield batch


base_weights = weights()
for run, world in enumerate(worlds):
    model.load_state_dict(base_weights)
    snapshots.append({})
    examples = triage.encode(tokenizer, world.tickets(train_tickets, part="train"))
    batches = keeping(triage.batches(examples, size=batch_size, steps=steps, seed=seed + run), snapshots[run])
    triage.train(model, batches, steps=steps, learning_rate=learning_rate, label=f"run {run + 1} of {runs}")
    snapshots[run][steps] = weights()
_ = model.load_state_dict(base_weights)

# %% [markdown]
# Then the answers. `Admitted` also writes down the probability that the *model* gave to the tokens that the constraint admitted, before it removed the others: a small number means that the model wanted to say something else.


# %%
class Admitted(LogitsProcessor):
    """Apply a processor and record the probability of what it admits, (n,) a step."""

    def __init__(self, inner: LogitsProcessor) -> None:
        self.inner = inner
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        masked = self.inner(input_ids, scores)
        self.steps.append(scores.softmax(dim=-1).masked_fill(masked.isinf(), 0).sum(dim=-1).cpu())
        return masked


class Answers(NamedTuple):
    """What came of a test: is each answer valid and right, and how much probability was admitted on its way."""

    valid: np.ndarray
    exact: np.ndarray
    admitted: np.ndarray


def is_valid(text: str) -> bool:
    """Whether the text is JSON of the triage's schema."""
    try:
        Triage.parse(text)
    except ValueError:
        return False
    return True


def answer(tickets: list[Ticket], constraint: LogitsProcessor | None = None) -> Answers:
    """Answer the tickets, freely or under a constraint, and judge the answers."""
    prompts = [list(example.prompt) for example in triage.encode(tokenizer, tickets)]
    watch = Admitted(constraint) if constraint else None
    texts = continuations(prompts, max_new_tokens=longest_answer, processors=[watch] if watch else [])
    admitted = np.ones(len(tickets))
    for step, probabilities in enumerate(watch.steps if watch else []):
        alive = [step < len(tokens) for tokens in texts]
        admitted *= np.where(alive, probabilities.numpy(), 1)
    answers = [text_of(tokens) for tokens in texts]
    return Answers(np.array([is_valid(text) for text in answers]), triage.score(answers, tickets).exact, admitted)


def constraint(run: int, answers: list[list[tuple[int, ...]]]) -> TrieLogitsProcessor:
    """Your processor for the test tickets of a run."""
    longest = max(len(example.prompt) for example in triage.encode(tokenizer, tests[run]))
    return TrieLogitsProcessor(answers, longest, end)


results: dict[tuple[str, int], list[Answers]] = {}
for run, tickets in enumerate(tests):
    by_whole, by_apart = constraint(run, whole[run]), constraint(run, apart[run])
    for mark, snapshot in snapshots[run].items():
        model.load_state_dict(snapshot)
        results.setdefault(("free", mark), []).append(answer(tickets))
        results.setdefault(("whole", mark), []).append(answer(tickets, by_whole))
    results.setdefault(("apart", steps), []).append(answer(tickets, by_apart))
model.load_state_dict(base_weights)


def pooled(how: str, mark: int, what: str) -> np.ndarray:
    """One entry of all answers over the runs, (runs * test tickets,)."""
    return np.concatenate([getattr(part, what) for part in results[how, mark]])


fig, (left, right) = plt.subplots(1, 2, figsize=(12, 3.8))
for ax, what, title in ((left, "valid", "Valid JSON"), (right, "exact", "Right in all four fields")):
    for how, colour, label in (("free", COLOURS.before, "free"), ("whole", COLOURS.after, "constrained")):
        shares = [pooled(how, mark, what).mean() for mark in marks]
        bounds = [triage.interval(pooled(how, mark, what)) for mark in marks]
        shift = 0.004 * steps * (1 if how == "whole" else -1)  # so that equal points stay visible
        ax.plot([mark + shift for mark in marks], shares, color=colour, label=label)
        intervals(ax, [mark + shift for mark in marks], shares, [b[0] for b in bounds], [b[1] for b in bounds], colour)
    ax.set(xlabel="training steps", ylabel="share of answers (95 % interval)", ylim=(-0.03, 1.05), title=title)
    label_lines(ax)
low, high = triage.interval(pooled("apart", steps, "exact"))
share = pooled("apart", steps, "exact").mean()
intervals(right, [steps], [share], [low], [high], COLOURS.wrong)
direct_label(right, steps, share, "constrained,\ntokenised apart", COLOURS.wrong, offset=(10, -6))
plt.show()

table = pd.DataFrame(
    [
        {
            "steps": mark,
            "valid, free": pooled("free", mark, "valid").mean(),
            "valid, constrained": pooled("whole", mark, "valid").mean(),
            "exact, free": pooled("free", mark, "exact").mean(),
            "exact, constrained": pooled("whole", mark, "exact").mean(),
            "probability admitted (median)": np.median(pooled("whole", mark, "admitted")),
        }
        for mark in marks
    ]
)
shares = dict.fromkeys(table.columns[1:5], "{:.1%}")
display(table.style.format({**shares, "probability admitted (median)": "{:.1e}"}).hide(axis="index"))
for name, how, mark, what, label in (
    ("valid_free", "free", 0, "valid", "valid answers of the base model, free"),
    ("valid_constrained", "whole", 0, "valid", "valid answers of the base model, constrained"),
    ("valid_free_tuned", "free", steps, "valid", "valid answers of the tuned model, free"),
    ("exact_constrained", "whole", 0, "exact", "right answers of the base model, constrained"),
    ("exact_free_tuned", "free", steps, "exact", "right answers of the tuned model, free"),
    ("exact_whole", "whole", steps, "exact", "right answers of the tuned model, constrained"),
    ("exact_apart", "apart", steps, "exact", "right answers of the tuned model, constrained, tokenised apart"),
    ("valid_apart", "apart", steps, "valid", "valid answers of the tuned model, constrained, tokenised apart"),
):
    low, high = triage.interval(pooled(how, mark, what))
    card.record(name, pooled(how, mark, what).mean(), low=low, high=high, format=".1%", label=label, tolerance=0.15)
card.record(
    "admitted",
    np.median(pooled("whole", 0, "admitted")),
    format=".0e",
    label="probability that the base model gave to its constrained answers (median)",
    tolerance=1e-3,
)
compare(
    [("exact match of the base model, constrained", predicted_exact, pooled("whole", 0, "exact").mean())], format=".1%"
)

# %% [markdown]
# Left: the constraint takes validity from {{valid_free}} to {{valid_constrained}} without training; 64 steps of training take it to {{valid_free_tuned}} without a constraint. Right: valid is not right. The base model, forced into the form, answers {{exact_constrained}} of the tickets correctly; a blind draw among 5 categories, 3 urgencies and 5 actions gets 1.3 % of these three fields. The last column of the table says it before you look at any label: to the tokens on its forced path the base model gave a probability of {{admitted}}. Log this number in production. It is an alarm in one direction: a small value says that the model was forced, while a value near 1 says that it knows the form, and nothing about the labels: compare the last two columns.
#
# The single point on the right is the trap. The tuned model, every answer admitted in the spelling of its template and values apart: {{valid_apart}} valid, and {{exact_apart}} right in place of {{exact_whole}}. Text and schema are the same; the model reads tokens in an order that it was never trained on. This is a bug of the program around the model, it raises nothing, and prompt templates, prefilled answers and "jump-ahead" optimisations all invite it.
#
# Grammar engines such as Outlines (Willard and Louf, 2023) and XGrammar (Dong et al., 2024) go another way: they work on characters or bytes and admit *every* token whose text fits, so the model picks the spelling itself. That scales to open strings and recursive schemas, where no list of answers exists.
#
# ### Masking is not conditioning
#
# A second trap is left, and no spelling avoids it. Sampling under a mask divides, at each step, by the probability admitted *there*: $q(y) = \prod_t p(y_t \mid y_{<t}) / a_t$, where $a_t$ is the sum over the admitted tokens. What you would want is the model's distribution given that the answer is valid, $p(y) / \sum_{y'} p(y')$ over the valid answers: one division for all. With the first the model commits itself to a field before it can see that everything behind it is improbable (Park et al., 2024). A closed schema is small enough to compute both exactly, for every valid answer to one ticket:


# %%
@torch.no_grad()
def masked_and_free(prompt: list[int], answers: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """The probability of each answer (n,) when each step is masked, and when nothing is."""
    longest = max(map(len, answers)) + 1
    new = torch.tensor([[*answer] + [end] * (longest - len(answer)) for answer in answers])
    ids = torch.cat([torch.tensor([prompt]).expand(len(new), -1), new], dim=1)
    mask = TrieLogitsProcessor([answers], len(prompt), end)
    masked, plain = torch.zeros(2, len(new), dtype=torch.float64)
    for some in torch.arange(len(new)).split(32):
        scores = model(ids[some].to(model.device)).logits[:, len(prompt) - 1 : -1].double().cpu()  # (32, longest, v)
        for step in range(longest):
            chosen = scores[:, step].gather(1, new[some, step, None])[:, 0]
            admitted_scores = mask(ids[some, : len(prompt) + step], scores[:, step])
            masked[some] += chosen - admitted_scores.logsumexp(dim=-1)
            alive = torch.tensor([step <= len(answers[row]) for row in some.tolist()])  # with the end, without padding
            plain[some] += torch.where(alive, chosen - scores[:, step].logsumexp(dim=-1), 0)
    return masked.exp(), plain.exp()


rows = []
for mark, snapshot in snapshots[0].items():
    model.load_state_dict(snapshot)
    prompt = list(triage.encode(tokenizer, tests[0][:1])[0].prompt)
    by_mask, free = masked_and_free(prompt, whole[0][0])
    by_condition = free / free.sum()
    rows.append(
        {
            "steps": mark,
            "valid without a mask": free.sum().item(),
            "sum with the mask": by_mask.sum().item(),
            "total variation": (by_mask - by_condition).abs().sum().item() / 2,
            "most probable, masked": by_mask.max().item(),
            "most probable, conditioned": by_condition.max().item(),
            "the same answer": "yes" if by_mask.argmax() == by_condition.argmax() else "no",
        }
    )
_ = model.load_state_dict(base_weights)
masking = pd.DataFrame(rows)
display(masking.style.format(precision=2).format("{:.1e}", subset="valid without a mask").hide(axis="index"))
card.record(
    "masking_gap",
    masking["total variation"].iloc[0],
    format=".2f",
    label="total variation, masked against conditioned, base model, one ticket",
    tolerance=0.2,
)

# %% [markdown]
# The masked probabilities sum to 1, so they are a distribution, and for the base model it stands at a total variation of {{masking_gap}} from the conditioned one (0 is equal, 1 is disjoint). Half-way through the training it need not be smaller. What bounds it is the second column, the probability $s$ that a sample without a mask is valid: $q(y)$ is never below $p(y)$, so the total variation is at most $1 - s$. The cure is a model that knows the form, not a better mask. This is one ticket; the bound holds for all.

# %% [markdown]
# ## Guess, then verify
#
# A forward pass gives the model's choice after *every* position of its input, not only the last. So if somebody guesses the next $k$ tokens, one pass over prompt and guess tells, for each of them, whether the model would have written it (Leviathan et al., 2023; Chen et al., 2023). The guess that agrees is kept up to the first disagreement, and the pass has also produced the model's own token at that place. One pass then yields between 1 and $k + 1$ tokens, and with greedy decoding the output is the model's own, token for token.
#
# The guess comes from a *draft*: a small model, or no model at all. Prompt lookup (Saxena, 2023) looks for the last two tokens earlier in the text and guesses that what followed then follows again:


# %%
def prompt_lookup(ids: list[int], length: int, ngram: int = 2) -> list[int]:
    """Guess up to `length` tokens: what followed the earliest occurrence of the last `ngram` tokens, or of fewer."""
    for size in range(min(ngram, len(ids) - 1), 0, -1):
        for start in range(len(ids) - size):
            if ids[start : start + size] == ids[-size:]:
                guess = ids[start + size : start + size + length]
                return guess[: guess.index(end)] if end in guess else guess
    return []


class Decoded(NamedTuple):
    """A text decoded with drafts: its tokens, the target's passes, how many tokens were drafted and how many kept."""

    tokens: list[int]
    passes: int
    drafted: int
    accepted: int


def broken_speculate(
    choices: Callable[[list[int]], list[int]],
    draft: Callable[[list[int]], list[int]],
    prompt: list[int],
    max_new_tokens: int,
    end: int,
) -> Decoded:
    """Decode with drafts. Do not use: it has four bugs."""
    ids, passes, drafted, accepted = list(prompt), 0, 0, 0
    while len(ids) < len(prompt) + max_new_tokens and end not in ids[len(prompt) :]:
        guess = draft(ids)
        chosen = choices(ids + guess)[len(ids) - 1 :]
        passes, drafted = passes + 1, drafted + len(guess)
        agreeing = [token for token, choice in zip(guess, chosen, strict=False) if token == choice]
        accepted += len(agreeing)
        ids += agreeing or chosen[:1]
    return Decoded(ids[len(prompt) :], passes, drafted, accepted)


def counting_model(ids: list[int]) -> list[int]:
    """A target whose next token is the sum of all tokens so far, modulo 10; 0 ends the text."""
    return [sum(ids[: place + 1]) % 10 for place in range(len(ids))]


def own_text(choices: Callable[[list[int]], list[int]], prompt: list[int], max_new_tokens: int, end: int) -> list[int]:
    """Greedy decoding, one token a pass: what every draft must lead to."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        ids.append(choices(ids)[-1])
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


print("the model's own text  ", own_text(counting_model, [3, 4], 8, end=0))
print("after a bad draft     ", broken_speculate(counting_model, lambda ids: [7, 9, 8], [3, 4], 8, end=0))

# %% [markdown]
# **Exercise (find and fix).** Write `speculate` with the same arguments. `choices(ids)` is the target: a list of `len(ids)` tokens, where `choices(ids)[i]` is its greedy choice after `ids[: i + 1]`; each call is one forward pass. `draft(ids)` returns a guess of any length, maybe empty, maybe wrong.
#
# - `tokens` is exactly what `own_text` gives: it ends with the first *generated* `end` token or after `max_new_tokens`, whichever is sooner. The prompt may hold `end` as well; leave the list as it is.
# - Each round asks `draft` once, cuts the guess to the tokens still wanted less one (the target adds one itself), and calls `choices` once. The guess is kept up to the first disagreement; then follows the target's choice at that place, also when the whole guess agreed.
# - `passes` counts calls of `choices`; `drafted` the guessed tokens that were verified (after the cut); `accepted` those of them that became part of `tokens`.
#
# For the model above, prompt `[3, 4]` and `max_new_tokens=4`, a draft that guesses `[7, 4, 8]` every time is right in the first round: tokens `[7, 4, 8, 6]`, 1 pass, 3 drafted, 3 accepted. Return a `Decoded`. *About 14 lines.*
#
# <details><summary>Hint 1</summary>Print what the broken version does in each round for a guess that is wrong in the middle, for one that is right throughout, and for one that contains the end token.</details>
# <details><summary>Hint 2</summary>The four bugs: it counts agreement after a disagreement; it throws the target's own token away when something agreed; it runs past the end token; it runs past max_new_tokens.</details>
# <details><summary>Hint 3</summary>kept = 0, and while kept &lt; len(guess) and guess[kept] == chosen[kept]: kept += 1. The new tokens are chosen[: kept + 1], cut after the first end token. accepted grows by the smaller of kept and the number of new tokens.</details>


# %% exercise="speculate" difficulty=3 minutes=12
def speculate(
    choices: Callable[[list[int]], list[int]],
    draft: Callable[[list[int]], list[int]],
    prompt: list[int],
    max_new_tokens: int,
    end: int,
) -> Decoded:
    """Decode greedily with drafts; the tokens are exactly the target's own."""
    ### BEGIN SOLUTION
    tokens: list[int] = []
    passes = drafted = accepted = 0
    while len(tokens) < max_new_tokens and end not in tokens:
        guess = list(draft(prompt + tokens))[: max_new_tokens - len(tokens) - 1]
        chosen = choices(prompt + tokens + guess)[-len(guess) - 1 :]
        kept = 0
        while kept < len(guess) and guess[kept] == chosen[kept]:
            kept += 1
        new = chosen[: kept + 1]
        if end in new:
            new = new[: new.index(end) + 1]
        passes += 1
        drafted += len(guess)
        accepted += min(kept, len(new))
        tokens += new
    return Decoded(tokens, passes, drafted, accepted)
    ### END SOLUTION


# %% check="speculate" points=2
def step_model(ids: list[int]) -> list[int]:
    """A target that adds all tokens so far, modulo 11, and so never forgets a wrong one."""
    return [(sum(ids[: place + 1]) + place) % 11 for place in range(len(ids))]


def tokens_with(draft: Callable[[list[int]], list[int]], prompt: list[int], wanted: int, end: int = -1) -> list[int]:
    """The tokens that speculate returns; stops a version that would never end."""
    calls, given = [], list(prompt)

    def choices(ids: list[int]) -> list[int]:
        calls.append(ids)
        assert len(calls) <= wanted + 2, "More passes than tokens: each pass must add at least the target's own token"
        return step_model(ids)

    out = speculate(choices, draft, prompt, wanted, end)
    assert isinstance(out, Decoded), f"Return Decoded(tokens, passes, drafted, accepted); yours is {out!r}"
    assert prompt == given, (
        "You changed the caller's prompt: the next text would start with this one; copy the list first"
    )
    return list(out.tokens)


truth = own_text(step_model, [3, 4], 9, end=-1)
assert tokens_with(lambda ids: [], [3, 4], 9) == truth, f"Without a guess it is plain greedy decoding: {truth}"
wrong_then_right = [truth[0], (truth[1] + 1) % 11, *step_model([3, 4, truth[0], (truth[1] + 1) % 11])[-1:]]
got = tokens_with(lambda ids: wrong_then_right if len(ids) == 2 else [], [3, 4], 9)
assert got == truth, (
    "After the first disagreement nothing of the guess counts, even where it agrees again: the target had read a wrong "
    f"token. The greedy text is {truth}, yours is {got}"
)
got = tokens_with(lambda ids: [*truth, 5, 5, 5][len(ids) - 2 :], [3, 4], 9)
assert len(got) <= 9, f"You return {len(got)} tokens, more than max_new_tokens = 9: cut the guess"
assert got == truth, f"With a perfect draft the text is still {truth}; yours is {got}"
last = truth[4]
first_end = truth.index(last)
got = tokens_with(lambda ids: [*truth, 5][len(ids) - 2 :], [3, 4], 9, end=last)
assert got == truth[: first_end + 1], (
    f"The text ends with the first end token ({last} here), also when it is accepted in the middle of a guess: "
    f"{truth[: first_end + 1]}; yours is {got}"
)
after_end = own_text(step_model, [3, 4], 3, end=4)
got = tokens_with(lambda ids: [], [3, 4], 3, end=4)
assert got == after_end, (
    "This prompt ends with the end token, as the turn of a chat does: look for the end token in what was generated, "
    f"not in the prompt. The greedy text is {after_end}, yours is {got}"
)
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(6)
for _case in range(30):
    _prompt = _rng.integers(0, 11, size=_rng.integers(1, 6)).tolist()
    _wanted, _end, _skill = int(_rng.integers(1, 14)), int(_rng.integers(0, 11)), float(_rng.random())
    _greedy = own_text(step_model, _prompt, 40, -1)

    def _draft(_ids, _prompt=_prompt, _greedy=_greedy, _skill=_skill):
        _done = len(_ids) - len(_prompt)
        _noise = _rng.integers(0, 11, size=30).tolist()
        return [t if _rng.random() < _skill else n for t, n in zip(_greedy[_done:], _noise, strict=False)][
            : int(_rng.integers(0, 8))
        ]

    _want = own_text(step_model, _prompt, _wanted, _end)
    _got = tokens_with(_draft, _prompt, _wanted, _end)
    assert _got == _want, f"prompt {_prompt}, end {_end}, {_wanted} tokens: the greedy text is {_want}, yours is {_got}"
### END HIDDEN TESTS

# %% check="speculate" points=2
counted = own_text(step_model, [2], 10, end=-1)
read: list[int] = []


def counting_target(ids: list[int]) -> list[int]:
    read.append(len(ids))
    return step_model(ids)


got = speculate(counting_target, lambda ids: counted[len(ids) - 1 :][:4], [2], 10, -1)
assert len(read) == got.passes, f"passes counts the calls of choices: there were {len(read)}, you say {got.passes}"
assert got.passes != 3, (
    "Three passes for ten tokens: when the whole guess agrees, the target's next token comes for free"
)
assert got.passes == 2, (
    f"A perfect draft of four tokens needs 2 passes for ten tokens, five a pass; yours needs {got.passes}: verify the "
    "whole guess in one pass, and keep the target's own token behind it"
)
assert (got.drafted, got.accepted) == (8, 8), (
    f"8 tokens were drafted and accepted; you count {got.drafted} and {got.accepted}"
)
got = speculate(step_model, lambda ids: [(counted[len(ids) - 1] + 1) % 11] * 3, [2], 6, -1)
assert (got.passes, got.accepted) == (6, 0), (
    f"A draft that is always wrong costs nothing but its price: 6 passes, 0 accepted; yours {got}"
)
assert got.drafted == 3 + 3 + 3 + 2 + 1 + 0, (
    f"Count what was verified: the guess is cut to the tokens still wanted less one, 3 + 3 + 3 + 2 + 1 + 0 = 12; yours {got.drafted}"
)
### BEGIN HIDDEN TESTS
for _k, _wanted in [(1, 7), (3, 8), (5, 5), (9, 12), (2, 1)]:
    _truth = own_text(step_model, [5, 1], _wanted, -1)
    _got = speculate(step_model, lambda _ids, _k=_k, _t=_truth: _t[len(_ids) - 2 :][:_k], [5, 1], _wanted, -1)
    _passes = -(-_wanted // (_k + 1))
    assert (_got.passes, _got.accepted) == (_passes, _wanted - _passes), (
        f"A perfect draft of {_k} tokens, {_wanted} wanted: {_passes} passes, {_wanted - _passes} accepted; yours {_got}"
    )
_truth = own_text(step_model, [5, 1], 9, -1)
_end = _truth[3]
_got = speculate(step_model, lambda _ids: _truth[len(_ids) - 2 :][:8], [5, 1], 9, _end)
_place = _truth.index(_end)
assert (_got.passes, _got.drafted, _got.accepted) == (1, 8, _place + 1), (
    f"Eight drafted, the end token is number {_place + 1} of them: {_place + 1} accepted in one pass; yours {_got}"
)
### END HIDDEN TESTS


# %% mistake="counts agreement after a disagreement" of="speculate" says="nothing of the guess counts"
def speculate(choices, draft, prompt, max_new_tokens, end):
    tokens, passes, drafted, accepted = [], 0, 0, 0
    while len(tokens) < max_new_tokens and end not in tokens:
        guess = draft(prompt + tokens)[: max_new_tokens - len(tokens) - 1]
        chosen = choices(prompt + tokens + guess)[len(prompt + tokens) - 1 :]
        kept = sum(g == c for g, c in zip(guess, chosen, strict=False))
        new = chosen[: kept + 1]
        new = new[: new.index(end) + 1] if end in new else new
        passes, drafted, accepted = passes + 1, drafted + len(guess), accepted + min(kept, len(new))
        tokens += new
    return Decoded(tokens, passes, drafted, accepted)


# %% mistake="throws the target's own token away" of="speculate" says="comes for free"
def speculate(choices, draft, prompt, max_new_tokens, end):
    tokens, passes, drafted, accepted = [], 0, 0, 0
    while len(tokens) < max_new_tokens and end not in tokens:
        guess = draft(prompt + tokens)[: max_new_tokens - len(tokens)]
        chosen = choices(prompt + tokens + guess)[len(prompt + tokens) - 1 :]
        kept = 0
        while kept < len(guess) and guess[kept] == chosen[kept]:
            kept += 1
        new = guess[:kept] or chosen[:1]
        new = new[: new.index(end) + 1] if end in new else new
        passes, drafted, accepted = passes + 1, drafted + len(guess), accepted + min(kept, len(new))
        tokens += new
        if not guess and passes > 3 * max_new_tokens:
            break
    return Decoded(tokens, passes, drafted, accepted)


# %% mistake="runs past the end token" of="speculate" says="The text ends with the first end token"
def speculate(choices, draft, prompt, max_new_tokens, end):
    tokens, passes, drafted, accepted = [], 0, 0, 0
    while len(tokens) < max_new_tokens and (not tokens or tokens[-1] != end):
        guess = draft(prompt + tokens)[: max_new_tokens - len(tokens) - 1]
        chosen = choices(prompt + tokens + guess)[len(prompt + tokens) - 1 :]
        kept = 0
        while kept < len(guess) and guess[kept] == chosen[kept]:
            kept += 1
        tokens += chosen[: kept + 1]
        passes, drafted, accepted = passes + 1, drafted + len(guess), accepted + kept
    return Decoded(tokens, passes, drafted, accepted)


# %% mistake="runs past max_new_tokens" of="speculate" says="more than max_new_tokens"
def speculate(choices, draft, prompt, max_new_tokens, end):
    tokens, passes, drafted, accepted = [], 0, 0, 0
    while len(tokens) < max_new_tokens and end not in tokens:
        guess = draft(prompt + tokens)
        chosen = choices(prompt + tokens + guess)[len(prompt + tokens) - 1 :]
        kept = 0
        while kept < len(guess) and guess[kept] == chosen[kept]:
            kept += 1
        new = chosen[: kept + 1]
        new = new[: new.index(end) + 1] if end in new else new
        passes, drafted, accepted = passes + 1, drafted + len(guess), accepted + min(kept, len(new))
        tokens += new
    return Decoded(tokens, passes, drafted, accepted)


# %% mistake="looks for the end token in the prompt" of="speculate" says="not in the prompt"
def speculate(choices, draft, prompt, max_new_tokens, end):
    ids, passes, drafted, accepted = list(prompt), 0, 0, 0
    while len(ids) < len(prompt) + max_new_tokens and ids[-1] != end:
        guess = draft(list(ids))[: len(prompt) + max_new_tokens - len(ids) - 1]
        chosen = choices(ids + guess)[len(ids) - 1 :]
        kept = 0
        while kept < len(guess) and guess[kept] == chosen[kept]:
            kept += 1
        new = chosen[: kept + 1]
        new = new[: new.index(end) + 1] if end in new else new
        passes, drafted, accepted = passes + 1, drafted + len(guess), accepted + min(kept, len(new))
        ids += new
    return Decoded(ids[len(prompt) :], passes, drafted, accepted)


# %% mistake="writes into the prompt" of="speculate" says="You changed the caller's prompt"
def speculate(choices, draft, prompt, max_new_tokens, end):
    ids, start, passes, drafted, accepted = prompt, len(prompt), 0, 0, 0
    while len(ids) < start + max_new_tokens and end not in ids[start:]:
        guess = draft(list(ids))[: start + max_new_tokens - len(ids) - 1]
        chosen = choices(ids + guess)[len(ids) - 1 :]
        kept = 0
        while kept < len(guess) and guess[kept] == chosen[kept]:
            kept += 1
        new = chosen[: kept + 1]
        new = new[: new.index(end) + 1] if end in new else new
        passes, drafted, accepted = passes + 1, drafted + len(guess), accepted + min(kept, len(new))
        ids += new
    return Decoded(ids[start:], passes, drafted, accepted)


# %% mistake="reads the choices one place too late" of="speculate" says="Without a guess it is plain greedy decoding"
def speculate(choices, draft, prompt, max_new_tokens, end):
    tokens, passes, drafted, accepted = [], 0, 0, 0
    while len(tokens) < max_new_tokens and end not in tokens:
        guess = draft(prompt + tokens)[: max_new_tokens - len(tokens) - 1]
        chosen = choices(prompt + tokens + guess)[len(prompt + tokens) :] or guess or [0]
        kept = 0
        while kept < len(guess) and kept < len(chosen) and guess[kept] == chosen[kept]:
            kept += 1
        new = chosen[: kept + 1]
        new = new[: new.index(end) + 1] if end in new else new
        passes, drafted, accepted = passes + 1, drafted + len(guess), accepted + min(kept, len(new))
        tokens += new
    return Decoded(tokens, passes, drafted, accepted)


# %% mistake="a pass for each guessed token" of="speculate" says="verify the whole guess in one pass"
def speculate(choices, draft, prompt, max_new_tokens, end):
    tokens, passes, drafted, accepted = [], 0, 0, 0
    while len(tokens) < max_new_tokens and end not in tokens:
        guess = draft(prompt + tokens)[: max_new_tokens - len(tokens) - 1]
        drafted += len(guess)
        for token in [*guess, None]:
            choice = choices(prompt + tokens)[-1]
            passes += 1
            tokens.append(choice)
            accepted += token == choice
            if token != choice or choice == end:
                break
    return Decoded(tokens, passes, drafted, accepted)


# %% alternative="the target's text and the guess side by side" of="speculate"
def speculate(choices, draft, prompt, max_new_tokens, end):
    ids, counts = list(prompt), [0, 0, 0]
    for _ in range(max_new_tokens):
        left = max_new_tokens - (len(ids) - len(prompt))
        if left == 0 or (len(ids) > len(prompt) and ids[-1] == end):
            break
        guess = draft(list(ids))[: left - 1]
        answer = choices([*ids, *guess])
        counts[0] += 1
        counts[1] += len(guess)
        for token, choice in zip([*guess, None], answer[len(ids) - 1 :], strict=True):
            ids.append(choice)
            counts[2] += token == choice
            if token != choice or choice == end:
                break
    return Decoded(ids[len(prompt) :], *counts)


# %% [markdown]
# The match needs three workloads: reading a list back (the context holds the answer), the note (new text), and triage by the tuned model. And it needs to know what the library does: a hook counts the passes, and the positions in them.


# %%
def list_prompt(world: World, number: int) -> list[int]:
    """Eight products of the world, to be read back."""
    names = np.random.default_rng([world.seed, number]).permutation(world.entities["product"])[:8]
    return tokenizer(f"On the list: {', '.join(names)}.\nOnce more:")["input_ids"]


prompts_a_run = 2
workloads: dict[str, list[list[list[int]]]] = {"list": [], "note": [], "triage": []}  # [run][number]
for run, world in enumerate(worlds):
    workloads["list"].append([list_prompt(world, number) for number in range(prompts_a_run)])
    workloads["note"].append([note_prompt(ticket) for ticket in tests[run][:prompts_a_run]])
    workloads["triage"].append([list(e.prompt) for e in triage.encode(tokenizer, tests[run][:prompts_a_run])])


def use_weights_for(workload: str, run: int) -> None:
    """Load the tuned weights of the run for triage, and the base weights for everything else."""
    model.load_state_dict(snapshots[run][steps] if workload == "triage" else base_weights)


@torch.no_grad()
def model_choices(ids: list[int]) -> list[int]:
    """The model's greedy choice after each position."""
    return model(torch.tensor([ids], device=model.device)).logits[0].argmax(dim=-1).tolist()


class Work(NamedTuple):
    """What the library did for a text: its tokens, the model's passes, and the drafted positions they verified."""

    tokens: list[int]
    passes: int
    drafted: int


def library_work(prompt: list[int], length: int) -> Work:
    """Decode with transformers' prompt lookup (length 0: without drafts) and count what the model was given."""
    widths: list[int] = []

    def count(_: torch.nn.Module, arguments: tuple, keywords: dict) -> None:
        widths.append((keywords["input_ids"] if "input_ids" in keywords else arguments[0]).shape[1])

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        extra = {"prompt_lookup_num_tokens": length} if length else {}
        (tokens,) = continuations([prompt], max_new_tokens=60, **extra)
    finally:
        hook.remove()
    return Work(tokens, len(widths), sum(widths) - len(prompt) - len(widths) + 1)


# %% [markdown]
# Your function with prompt lookup against `generate` with `prompt_lookup_num_tokens`: the same tokens as plain greedy decoding, in the same number of passes?
#
# For triage there is a better draft than a search in the prompt: the schema itself. After `{"` every valid answer goes on in the same way, and so after each label. `forced_by_schema` guesses exactly the tokens that all admitted answers share from here on.


# %%
def forced_by_schema(
    prompt: list[int], answers: list[tuple[int, ...]], length: int
) -> Callable[[list[int]], list[int]]:
    """A draft: the tokens that all admitted answers share after what was written, at most `length`."""
    known = sorted([*answer, end] for answer in answers)

    def draft(ids: list[int]) -> list[int]:
        written = ids[len(prompt) :]
        low = bisect.bisect_left(known, written)
        high = bisect.bisect_left(known, [*written, math.inf])
        if low == high:
            return []  # the model went its own way
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(known[low], known[high - 1], strict=False))
        return [token for token, _ in shared][len(written) :][:length]

    return draft


rows = []
exact, same_passes = [], []
for workload, by_run in workloads.items():
    drafts = ("prompt lookup", "schema") if workload == "triage" else ("prompt lookup",)
    for name in drafts:
        total = np.zeros(4)
        for run, prompts in enumerate(by_run):
            use_weights_for(workload, run)
            prompt = prompts[0]
            if name == "schema":
                draft = forced_by_schema(prompt, whole[run][0], 8)
            else:
                draft = functools.partial(prompt_lookup, length=8)
            mine = speculate(model_choices, draft, prompt, 60, end)
            exact.append(mine.tokens == library_work(prompt, 0).tokens)
            if name == "prompt lookup":
                same_passes.append(mine.passes == library_work(prompt, 8).passes)
            total += (len(mine.tokens), mine.passes, mine.drafted, mine.accepted)
        length, passes, drafted, accepted = total
        rows.append((workload, name, length, passes, drafted, accepted, accepted / passes, length / passes))
names = ["workload", "draft", "tokens", "passes", "drafted", "accepted", "accepted a pass", "tokens a pass"]
work_table = pd.DataFrame(rows, columns=names)
formats = {**dict.fromkeys(names[2:6], "{:.0f}"), **dict.fromkeys(names[6:], "{:.2f}")}
display(work_table.style.format(formats).hide(axis="index"))
print(
    f"tokens equal to plain greedy decoding: {sum(exact)} of {len(exact)}; passes equal to the library's: {sum(same_passes)} of {len(same_passes)}"
)
card.record(
    "speculative_exact",
    np.mean(exact),
    format=".0%",
    label="texts with drafts that equal plain greedy decoding",
    tolerance=0.1,
)
for key, row, label in (
    ("schema_accepted", -1, "drafts from the schema"),
    ("lookup_accepted", -2, "prompt lookup"),
):
    card.record(
        key,
        work_table["accepted a pass"].iloc[row],
        format=".1f",
        label=f"accepted draft tokens a pass, triage, {label}",
        tolerance=0.5,
    )

# %% [markdown]
# Greedy decoding with drafts gave the model's own tokens in {{speculative_exact}} of the texts, as it must, up to one reservation: a pass over nine positions adds in another order than a pass over one, so where two logits tie to the last bits, the choice may differ.
#
# With drafts from the schema {{schema_accepted}} drafted tokens were accepted a pass, with prompt lookup {{lookup_accepted}}: the keys of the JSON are not in the prompt, but they are known. Structure, which looked like a cost, is what makes decoding cheap here. SGLang's jump-forward decoding goes one step further: with the constraint switched on, forced tokens need no verification at all (Zheng et al., 2024).
#
# ### With sampling, the distribution is kept
#
# When you sample, no single text is right, and losslessness is a statement about distributions, so test it as one. A token is drafted from $q$ and accepted with probability $\min(1, p/q)$; after a rejection the next token is drawn from the positive part of $p - q$, normalised (Leviathan et al., 2023, appendix A.1). The token that comes out then has the distribution $p$, for any $q$; only how often it was accepted depends on $q$. Three drafts for the note above, with your `distribution`:


# %%
def drafted_and_verified(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The distribution (n, v) of a token drafted from q and verified against p, and how often it is accepted (n,)."""
    accepted = torch.minimum(p, q)  # q times min(1, p / q)
    share = accepted.sum(dim=-1, keepdim=True)
    again = (p - q).clamp(min=0)
    again = again / again.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    return accepted + (1 - share) * again, share[:, 0]


target = distribution(note_logits)
drafters = {
    "the model itself, T = 1.5": distribution(note_logits, temperature=1.5),
    "the model's greedy token": distribution(note_logits, top_p=0.0),
    "all tokens alike": torch.full_like(target, 1 / target.shape[1]),
}
rows = []
for name, drafted_from in drafters.items():
    outcome, share = drafted_and_verified(target, drafted_from)
    rows.append(
        {
            "drafted from": name,
            "accepted, mean": share.mean().item(),
            "largest difference to p": (outcome - target).abs().max().item(),
        }
    )
display(
    pd.DataFrame(rows)
    .style.format({"accepted, mean": "{:.1%}", "largest difference to p": "{:.0e}"})
    .hide(axis="index")
)

# %% [markdown]
# The last column is rounding: even a draft that knows nothing leaves the distribution as it is, and costs only time. The middle column is the acceptance, $\sum_i \min(p_i, q_i)$, in the mean over the places of the note.
#
# ## How long a draft?
#
# Verified positions are not free. A pass reads all weights once, however many positions it computes. With $P$ parameters of two bytes, a memory that gives $m$ bytes a second and $a$ operations a second, reading takes $2P / m$ seconds and the arithmetic of $n$ positions $2Pn / a$, at two operations a parameter and position. The two overlap, so a pass takes about as long as the longer one. In units of the reading time:
#
# $$\text{pass}(n) = \max\left(1, \frac{n}{n^*}\right), \qquad n^* = \frac{a}{m}.$$
#
# An H100 SXM has $a = 989 \cdot 10^{12}$ in dense bf16 and $m = 3.35 \cdot 10^{12}$ (NVIDIA's data sheet), so $n^*$ is about 295. This is the roofline (Williams et al., 2009). Real servers reach neither of the two peaks, which moves $n^*$. Reading the cache of long contexts is left out; it takes time without arithmetic and so leaves more room for drafts.
#
# With a batch of $B$ texts, $n$ is $B$ times the positions of one text: one for the newest token and one for each drafted one. `time_a_token` is the time a token relative to the same batch without drafts: 1 gains nothing, 0.5 is twice as fast. You measure passes and drafted tokens with the library, for five draft lengths.

# %%
lengths = (0, 1, 2, 4, 8)
loads = (4, 128, 512)  # texts in the batch
RIDGE = 989 / 3.35  # n*, positions


def measure(prompts: list[list[list[int]]], workload: str) -> dict[int, np.ndarray]:
    """For each draft length (runs, 3): tokens, passes and drafted tokens of each run's prompts."""
    counts = {length: np.zeros((runs, 3), dtype=int) for length in lengths}
    for run, group in enumerate(prompts):
        use_weights_for(workload, run)
        for prompt in group:
            for length in lengths[1:]:
                work = library_work(prompt, length)
                counts[length][run] += (len(work.tokens), work.passes, work.drafted)
    tokens = counts[1][:, 0]
    counts[0] = np.column_stack([tokens, tokens, 0 * tokens])  # the same texts, a pass for each token
    return counts


measured = {workload: measure(prompts, workload) for workload, prompts in workloads.items()}
_ = model.load_state_dict(base_weights)


def time_a_token(counts: np.ndarray, batch: int) -> float:
    """The time a token relative to the same batch without drafts; counts are (runs, 3), as `measure` gives them."""
    tokens, passes, drafted = counts.sum(axis=0)
    positions = batch * (passes + drafted) / passes  # of all texts together, in one pass
    return float(max(1, positions / RIDGE) / max(1, batch / RIDGE) * passes / tokens)


# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(12, 3.8))
for workload, colour in (("list", COLOURS.after), ("triage", COLOURS.other), ("note", COLOURS.before)):
    by_length = np.stack([measured[workload][length] for length in lengths])  # (lengths, runs, 3)
    for run in range(runs):
        left.plot(lengths, by_length[:, run, 0] / by_length[:, run, 1], color=colour, lw=0.8, alpha=0.5)
    totals = by_length.sum(axis=1)
    left.plot(lengths, totals[:, 0] / totals[:, 1], "o-", color=colour, label=workload)
schema_rate = work_table["tokens a pass"].iloc[-1]
left.plot(8, schema_rate, "D", color=COLOURS.other, ms=8)
direct_label(left, 8, schema_rate, "triage, drafted by the schema", COLOURS.other, offset=(-190, -4))
left.set(xlabel="draft length (tokens)", ylabel="tokens a pass", title="Prompt lookup", xticks=lengths)
left.set_ylim(bottom=0.8)
label_lines(left)
for workload, colour in (("list", COLOURS.after), ("note", COLOURS.before)):
    for batch, style in zip(loads, ("-", "--", ":"), strict=True):
        times = [time_a_token(measured[workload][length], batch) for length in lengths]
        right.plot(lengths, times, style, marker="o", color=colour, label=f"{workload}, batch {batch}")
right.axhline(1, color=COLOURS.truth, lw=0.8)
right.set(xlabel="draft length (tokens)", ylabel="time a token (no drafts = 1)", title="What it costs", ylim=(0, None))
right.set_xticks(lengths)
label_lines(right, gap=0.08)
plt.show()

# %% [markdown]
# Left: dots are all runs together, thin lines single runs. Tokens a pass rise with the draft length and level off where the draft's luck ends. Right: what that is worth at three loads, by the roofline and the measured counts. It holds passes and positions, not seconds; overheads of a real server are not in it.
#
# **Exercise (decide).** Choose a draft length for two workloads (`"list"` and `"note"`) at three loads (batches of 4, 128 and 512). `plan` maps each of the six pairs `(workload, batch)` to one of the `lengths` 0, 1, 2, 4, 8. Each choice may take at most 3 % longer a token than the fastest of the five, by `time_a_token(measured[workload][length], batch)`. Before you compute it, say for each load why short or long drafts should win. *1 to 6 lines.*
#
# <details><summary>Hint 1</summary>How many positions does a pass have at each load without drafts, and how many fit below the ridge of 295? Below it a wrong guess costs nothing; above it every position is paid for.</details>
# <details><summary>Hint 2</summary>Go along each line of the right figure to its lowest point. The longest draft has the fewest passes, which is not the same as the least time.</details>
# <details><summary>Hint 3</summary>A dictionary comprehension over the two workloads and <code>loads</code>; the value is the <code>min</code> of <code>lengths</code> with <code>time_a_token</code> as its key.</details>

# %% exercise="draft-length" difficulty=2 minutes=10
plan = {
    ("list", 4): None, ("list", 128): None, ("list", 512): None,
    ("note", 4): None, ("note", 128): None, ("note", 512): None,
}  # fmt: skip
### BEGIN SOLUTION
plan = {
    (workload, batch): min(lengths, key=lambda length: time_a_token(measured[workload][length], batch))
    for workload in ("list", "note")
    for batch in loads
}
### END SOLUTION

# %% check="draft-length" points=2
pairs = [(workload, batch) for workload in ("list", "note") for batch in (4, 128, 512)]
assert isinstance(plan, dict), f"plan is a dictionary; yours is {plan!r}"
assert set(plan) == set(pairs), f"plan needs exactly the six keys {pairs}"
for pair, length in plan.items():
    assert length in (0, 1, 2, 4, 8), f"{pair}: choose one of the lengths 0, 1, 2, 4, 8; yours is {length!r}"


def relative_time(workload: str, batch: int, length: int) -> float:
    """The time a token from the measured counts, relative to no drafts."""
    sums = measured[workload][length].sum(axis=0)
    return max(1, batch * (1 + sums[2] / sums[1]) / 295.2) / max(1, batch / 295.2) * sums[1] / sums[0]


for workload, batch in pairs:
    prices = {length: relative_time(workload, batch, length) for length in (0, 1, 2, 4, 8)}
    fastest = min(prices, key=prices.get)
    mine = plan[workload, batch]
    assert prices[mine] <= 1.03 * prices[fastest] or mine < fastest, (
        f"{workload}, batch {batch}: drafts of {mine} take {prices[mine]:.2f} a token, shorter ones "
        f"{prices[fastest]:.2f}: above the ridge rejected positions are paid for too"
    )
    assert prices[mine] <= 1.03 * prices[fastest], (
        f"{workload}, batch {batch}: drafts of {mine} take {prices[mine]:.2f} a token, longer ones "
        f"{prices[fastest]:.2f}: below the ridge positions are free, and passes are what counts"
    )

# %% mistake="the longest draft everywhere" of="draft-length" says="rejected positions are paid for too"
plan = {(workload, batch): 8 for workload in ("list", "note") for batch in (4, 128, 512)}

# %% mistake="the fewest passes, whatever they cost" of="draft-length" says="rejected positions are paid for too"
plan = {}
for workload in ("list", "note"):
    fewest = min((0, 1, 2, 4, 8), key=lambda length: measured[workload][length].sum(axis=0)[1])
    plan |= {(workload, batch): fewest for batch in (4, 128, 512)}

# %% mistake="no drafts, to be safe" of="draft-length" says="passes are what counts"
plan = {(workload, batch): 0 for workload in ("list", "note") for batch in (4, 128, 512)}

# %% mistake="one choice for each workload" of="draft-length" says="rejected positions are paid for too"
plan = {(workload, batch): 8 if workload == "list" else 0 for workload in ("list", "note") for batch in (4, 128, 512)}

# %% mistake="a number of tokens that was not measured" of="draft-length" says="choose one of the lengths"
plan = {(workload, batch): 3 for workload in ("list", "note") for batch in (4, 128, 512)}

# %% mistake="one length for each workload, without the load" of="draft-length" says="exactly the six keys"
plan = {"list": 8, "note": 0}

# %% alternative="from a table of times" of="draft-length"
times = pd.DataFrame(
    {
        (workload, batch): [time_a_token(measured[workload][k], batch) for k in lengths]
        for workload in ("list", "note")
        for batch in (4, 128, 512)
    },
    index=lengths,
)
plan = {pair: int(length) for pair, length in times.idxmin().items()}

# %% [markdown]
# You chose on some prompts; what counts is others. What your plan costs on prompts that it has not seen, beside no drafts and beside one length for everything:

# %%
unseen = {
    "list": [[list_prompt(world, number) for number in range(prompts_a_run, 2 * prompts_a_run)] for world in worlds],
    "note": [[note_prompt(ticket) for ticket in part[prompts_a_run : 2 * prompts_a_run]] for part in tests],
}
measured_again = {workload: measure(prompts, workload) for workload, prompts in unseen.items()}
rows = []
for name, chosen in (
    ("your plan", plan),
    ("no drafts", dict.fromkeys(plan, 0)),
    ("8 everywhere", dict.fromkeys(plan, 8)),
):
    times_of_plan = {f"{w}, batch {b}": time_a_token(measured_again[w][chosen[w, b]], b) for w, b in plan}
    rows.append({"": name, **times_of_plan, "mean": float(np.mean(list(times_of_plan.values())))})
consequences = pd.DataFrame(rows)
display(consequences.style.format(precision=2).hide(axis="index"))
for name, row, label in (("plan_time", 0, "your plan"), ("always_8_time", 2, "drafts of 8 everywhere")):
    card.record(
        name,
        consequences["mean"].iloc[row],
        format=".2f",
        label=f"time a token on unseen prompts (no drafts = 1), {label}",
        tolerance=0.15,
    )

# %% [markdown]
# The plan takes {{plan_time}} of the time without drafts, in the mean of the six cases; drafts of 8 everywhere take {{always_8_time}}. A batch of 512 is above the ridge before anything is drafted: there a verified position costs what a token costs, and no draft can win. Speculation spends arithmetic that lies idle; a full batch leaves none. Measure the acceptance on your own traffic, and let the load choose the length; Liu et al. (2024) build a server that does so while it runs.

# %% [markdown]
# ## With a real model
#
# Everything above is read from the model and its tokenizer, so the lesson runs on any causal language model of the Hub with a chat template:
#
# ```
# course run 1.4 -p model_id Qwen/Qwen3-0.6B -p device cuda -p learning_rate 2e-5 -p steps 64
# ```
#
# What changes:
#
# - **The notes.** Only the shipped model has read notes of this kind; a Hub model continues the message in its own way, and `right_note` refuses it. The sections on the distribution, on beams and on drafts still hold; the curve of diversity and quality needs a task that the model knows, and a text that shows you when it is wrong.
# - **The constraint.** An instruct model writes JSON already, so free validity is high and the probability admitted is near 1. The trap of boundaries stays: print `safe_cuts` for your own template and tokenizer.
# - **Scale.** A list of all answers does not exist for open strings. Servers compile the schema: vLLM and SGLang take a JSON schema in `response_format`, and commonly compile it with XGrammar. Measure exact match before and after you switch it on.
# - **Drafts.** `prompt_lookup_num_tokens=8` works in any `generate`; `assistant_model=` takes a smaller model of the same family. vLLM calls prompt lookup `ngram`. Ask for acceptance by position and not for a vendor's speed-up: the first transfers from server to server, the second holds for one batch size.
# - **Memory.** The lesson keeps four copies of the weights for each run, in the computer's memory; `-p runs 1` keeps four in all.

# %% [markdown]
# ## Result card

# %%
card.show()

# %% [markdown]
# ## Say it in an interview
#
# <details><summary>We moved a model to another server with the same temperature and top-p, and the texts became worse. What do you check?</summary>
#
# The order first: temperature before top-p (transformers, vLLM) or after it (llama.cpp's default). At a temperature above 1 that decides what is in the nucleus: here {{right_temperature_first}} against {{right_top_p_first}} right texts at T = 1.5, p = 0.9. Then what else is on by default: top-k 40 or 50, min-p, a repetition penalty; then chat template, special tokens and precision. Compare next-token distributions on a few fixed prompts, not samples.
# </details>
#
# <details><summary>JSON mode is on, parsing errors are zero, and accuracy has fallen. Why?</summary>
#
# The constraint guarantees a form and no content. Three causes: the model wanted to say something else and was forced (log the probability that the constraint admits); template and value were tokenised apart, so the model reads spellings that it was never trained on (here exact match was {{exact_apart}} in place of {{exact_whole}}, {{valid_apart}} valid); or the schema leaves no room for what the model needs, such as reasoning before the label or a way to say "unknown". Masking step by step is also not the model's distribution given validity.
# </details>
#
# <details><summary>Is speculative decoding lossless, and when does it not pay?</summary>
#
# Greedy: the output is the target's own, up to ties in floating point. Sampling: the distribution is the target's, if tokens are accepted with probability min(1, p/q) and rejections are resampled from the positive part of p − q. With acceptance probability a at each position, a draft of k tokens yields (1 − a^(k+1)) / (1 − a) tokens a pass. It does not pay where the draft is rarely right (new text with prompt lookup), or where verified positions cost as much as tokens: when the batch already keeps the arithmetic busy, about 300 positions a pass on an H100.
# </details>

# %% [markdown]
# ## Read next
#
# - Ari Holtzman, Jan Buys, Li Du, Maxwell Forbes, Yejin Choi, [The Curious Case of Neural Text Degeneration](https://arxiv.org/abs/1904.09751), 2020. Top-p.
# - Angela Fan, Mike Lewis, Yann Dauphin, [Hierarchical Neural Story Generation](https://arxiv.org/abs/1805.04833), 2018. Top-k.
# - Jiwei Li et al., [A Diversity-Promoting Objective Function for Neural Conversation Models](https://arxiv.org/abs/1510.03055), 2016. Distinct-n.
# - Felix Stahlberg, Bill Byrne, [On NMT Search Errors and Model Errors: Cat Got Your Tongue?](https://arxiv.org/abs/1908.10090), 2019. What the exact mode of a model looks like.
# - Philipp Koehn, Rebecca Knowles, [Six Challenges for Neural Machine Translation](https://arxiv.org/abs/1706.03872), 2017. Wider beams, worse translations.
# - Brandon T. Willard, Rémi Louf, [Efficient Guided Generation for Large Language Models](https://arxiv.org/abs/2307.09702), 2023. Constraints as automata over the vocabulary.
# - Yixin Dong et al., [XGrammar: Flexible and Efficient Structured Generation Engine for Large Language Models](https://arxiv.org/abs/2411.15100), 2024.
# - Kanghee Park et al., [Grammar-Aligned Decoding](https://arxiv.org/abs/2405.21047), 2024. Why masking is not conditioning.
# - Yaniv Leviathan, Matan Kalman, Yossi Matias, [Fast Inference from Transformers via Speculative Decoding](https://arxiv.org/abs/2211.17192), 2023.
# - Charlie Chen et al., [Accelerating Large Language Model Decoding with Speculative Sampling](https://arxiv.org/abs/2302.01318), 2023.
# - Samuel Williams, Andrew Waterman, David Patterson, [Roofline: An Insightful Visual Performance Model for Multicore Architectures](https://doi.org/10.1145/1498765.1498785), 2009.
# - Xiaoxuan Liu et al., [Optimizing Speculative Decoding for Serving Large Language Models Using Goodput](https://arxiv.org/abs/2406.14066), 2024.
# - Apoorv Saxena, [Prompt Lookup Decoding](https://github.com/apoorvumang/prompt-lookup-decoding), 2023.
# - Lianmin Zheng et al., [SGLang: Efficient Execution of Structured Language Model Programs](https://arxiv.org/abs/2312.07104), 2024. Section on compressed finite state machines.
