# %% [markdown]
# # 4.4 Serving
#
# You will be able to serve three adapters on one base model behind an endpoint that the `openai` client talks to, batch its requests, predict its latency before a load test measures it, and stop it without losing a request.
#
# **You will measure.** Three adapters on one base take {{memory_ratio}} of the memory of three merged models. Twelve concurrent requests through `set_adapter` get {{crosstalk_naive}} answers from the wrong adapter; in mixed batches {{crosstalk_mixed}} of {{crosstalk_asked}} do. Batches of up to 16 in place of single requests raise the throughput that keeps the 95th percentile below a second from {{rate_single}} to {{rate_batched}} requests a second, simulated, and your batcher makes exactly the batches of the simulation. A load test that waits for its answers reads a 99th percentile of {{p99_closed}} ms where users wait {{p99_open}} ms.
#
# **You need.** Lesson 2.1 (LoRA), the idea of `async`/`await`, percentiles. FastAPI and queues are explained as far as they are needed.
#
# **Time.** About 75 minutes; the solution runs in {{run:seconds}} s on one CPU core.

# %% [markdown]
# ## Why it matters at work
#
# A model that nobody can call is a notebook. The endpoint is where research meets clients that retry, disconnect and send megabytes, where three teams want three finetuned models and there is one GPU, and where somebody asks what the 95th percentile will be at twice the load, and what happens to the requests under way when you deploy.
#
# Getting it wrong costs answers from another team's adapter, without any error; a load test that says 30 ms and users who wait a second; and lost requests with every release.
#
# In interviews: "how would you serve fifty LoRA adapters?", "p95 is too high: is it the batch size or the load?", "walk me through what happens between SIGTERM and the last response".

# %% tags=["parameters"]
companies = 4  # whose tickets, questions and tasks are asked; quick: 1
horizon = 10_000  # requests of one simulated run; quick: 600
runs = 5  # simulated runs of a setting, each with arrivals of its own; quick: 2
load_requests = 64  # sent to the real server for each setting; quick: 8
trials = 3  # timings of a size of batch, before each load test; quick: 1
locust_seconds = 4  # quick: 2
clients = 60  # that ask a server which is then stopped; quick: 8

# %%
import asyncio
import json
import linecache
import logging
import tempfile
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from math import ceil, floor, inf, nan
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Protocol

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of a faster kernel that is not installed
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)

import httpx
import matplotlib.pyplot as plt
import numpy as np
import openai
import pandas as pd
import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from IPython.display import display
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from labkit import agent, assistant, load_test, virtual_time
from labkit.base_model.finetune import chat_prompt
from labkit.load_test import Sample
from labkit.plots import COLOURS, direct_label, label_lines, use_house_style
from labkit.predict import compare
from labkit.results import ResultCard
from labkit.servers import free_port, process, serving
from labkit.threads import in_thread
from labkit.world import LESSON_SEEDS, World
from labkit.world.draw import Draw

use_house_style()
card = ResultCard("4_4_serving")

# %% [markdown]
# ## One base, three adapters
#
# The service has three tasks: triage of tickets, answers from the handbook, and the steps of the agent of lesson 3.5. Each is a LoRA adapter on the same small Llama. `peft` keeps any number of them beside the base: `load_adapter` adds one, and a layer computes $W x + \frac{\alpha}{r} B A x$ with the $A$ and $B$ that are active.

# %%
policy, tokenizer = assistant.load()
policy.load_adapter(str(agent.SHIPPED), "agent")
policy.eval().requires_grad_(False)
ADAPTERS = tuple(policy.peft_config)


def prompt_ids(text: str) -> list[int]:
    """The token ids of a user's message in the chat template."""
    return tokenizer(chat_prompt(tokenizer, text), add_special_tokens=False)["input_ids"]


def questions(companies: int) -> list[tuple[str, str]]:
    """Pairs of an adapter and a user's message, eight an adapter and company, in a random order."""
    found = []
    for seed in LESSON_SEEDS[:companies]:
        world = World(seed)
        found += [("triage", ticket.text) for ticket in world.tickets(8)]
        found += [("handbook", pair.prompt) for pair in assistant.handbook_pairs([seed], 8)]
        found += [("agent", task.text) for task in agent.tasks(world, 8)]
    return Draw("serving").order(found)


asked = questions(companies)
requests = [(adapter, prompt_ids(text)) for adapter, text in asked]
print(
    f"adapters: {', '.join(ADAPTERS)}; {len(requests)} requests of {min(len(r[1]) for r in requests)} to {max(len(r[1]) for r in requests)} tokens"
)

# %% [markdown]
# A merged model holds all of $W \in \mathbb{R}^{d_{out} \times d_{in}}$; an adapter of rank $r$ holds $r\,(d_{in} + d_{out})$ numbers for it. This base has a width of 128, a feed-forward width of 384 and 4.2 MB in float32; the adapters have rank 16, 16 and 40.
#
# **Predict.** What do the base and its three adapters take together, as a share of three merged models (each as large as the base)? Put a share from 0 to 1 in `predicted_ratio`. 1 line.
#
# <details><summary>Hint 1</summary>If adapters cost nothing, what would the share be?</details>
# <details><summary>Hint 2</summary>A layer of 128 by 128 has 16,384 weights; an adapter of rank 16 adds 16 · 256 to it, one of rank 40 adds 40 · 256.</details>
# <details><summary>Hint 3</summary>One third, and for each adapter a third of its share of the base. What are 16 · 256 and 40 · 256 in shares of 16,384? (The embeddings of the base have no adapter.)</details>

# %% exercise="predict-memory" difficulty=1 minutes=3
predicted_ratio = None
### BEGIN SOLUTION
predicted_ratio = 0.35  # "adapters are small"
### END SOLUTION

# %% check="predict-memory" points=1
assert predicted_ratio is not None, "Write your prediction down first: predicted_ratio = a share from 0 to 1"
assert isinstance(predicted_ratio, (int, float, np.number)), (
    f"A prediction is a number, such as 0.5; yours is {predicted_ratio!r}"
)
assert 0 <= predicted_ratio <= 1, f"A share lies from 0 to 1 (half is 0.5, not 50); yours is {predicted_ratio}"

# %% mistake="in percent" of="predict-memory" says="A share lies from 0 to 1"
predicted_ratio = 40

# %% mistake="left open" of="predict-memory" says="Write your prediction down first"
predicted_ratio = None

# %% mistake="in words" of="predict-memory" says="A prediction is a number"
predicted_ratio = "40%"

# %% alternative="computed, so a number of NumPy's" of="predict-memory"
predicted_ratio = np.float64(1 / 3 + (16 + 16 + 40) * 256 / 16384 / 3)


# %%
def size(adapter: str | None) -> int:
    """Bytes of an adapter's weights, or (None) of the base's."""
    return sum(
        weight.numel() * weight.element_size()
        for name, weight in policy.named_parameters()
        if (f".{adapter}." in name if adapter else "lora_" not in name)
    )


base_bytes = size(None)
one_base = base_bytes + sum(map(size, ADAPTERS))
memory_ratio = one_base / (len(ADAPTERS) * base_bytes)
compare([("share of three merged models", predicted_ratio, memory_ratio)], format=".0%")


def lora_share(width: int, feed_forward: int, key_value: int, layers: int, vocabulary: int, rank: int) -> float:
    """Numbers of a rank-r adapter on all linear layers, as a share of a Llama's parameters (head untied)."""
    shapes = [(width, width)] * 2 + [(width, key_value)] * 2 + [(width, feed_forward)] * 3
    return (
        layers
        * rank
        * sum(a + b for a, b in shapes)
        / (layers * sum(a * b for a, b in shapes) + 2 * vocabulary * width)
    )


large = lora_share(4096, 14336, 1024, 32, 128256, 16)
display(
    pd.DataFrame(
        {
            "": [
                "the base",
                *(f"{name}, rank {policy.peft_config[name].r}" for name in ADAPTERS),
                "one base, three adapters",
                "three merged models",
            ],
            "bytes": [f"{n:,}" for n in (base_bytes, *map(size, ADAPTERS), one_base, 3 * base_bytes)],
            "of the base": [
                f"{n / base_bytes:.1%}" for n in (base_bytes, *map(size, ADAPTERS), one_base, 3 * base_bytes)
            ],
        }
    ).style.hide(axis="index")
)
print(
    f"a model of 8 billion parameters (width 4096): an adapter of rank 16 is {large:.2%}, fifty of them {50 * large:.0%} of it"
)
card.record(
    "memory_ratio", memory_ratio, format=".0%", label="memory of one base and three adapters, of three merged models"
)
card.record(
    "large_share", large, format=".2%", label="a rank-16 adapter's share of an 8-billion-parameter Llama, by its shapes"
)

# %% [markdown]
# On a narrow model an adapter isn't small: with ranks of 16 and 40 beside a width of 128 the share is {{memory_ratio}}, where adapters that cost nothing would give a third. The share falls as $r/d$: at a width of 4,096 an adapter of rank 16 is {{large_share}} of the model. There, fifty adapters cost less than half a model, and fifty merged models cost fifty.
#
# ## Cross-talk
#
# `policy.set_adapter("triage")` sets a flag in every layer: it's global state. In a server, between "I set my adapter" and "I generate", something else may run. It takes no threads for that. In asyncio every `await` is a place where another request goes on.
#
# Here is the obvious service, with four requests for each adapter at once. It has one `await` between the two calls, as it would if it counted tokens, looked at a cache or wrote a log. The clock of `virtual_time.run` is simulated (more on it below), so the order is the same in each run.


# %%
def reply_alone(adapter: str, ids: Sequence[int], longest: int = 32) -> list[int]:
    """What an adapter replies when nothing else runs: the reference."""
    policy.set_adapter(adapter)
    x = torch.tensor([ids])
    out = policy.generate(input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=longest, do_sample=False)
    new = out[0, len(ids) :].tolist()
    return new[: new.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in new else new


def naive_answers(requests: Sequence[tuple[str, list[int]]], lock: bool) -> list[list[int]]:
    """The replies of a service that sets the adapter, waits for something, and generates; all requests at once."""

    async def main() -> list[list[int]]:
        one_at_a_time = asyncio.Semaphore(1 if lock else len(requests))

        async def answer(adapter: str, ids: list[int]) -> list[int]:
            async with one_at_a_time:
                policy.set_adapter(adapter)
                await asyncio.sleep(0.001)  # the log, the cache, the token count
                return reply_alone(policy.active_adapter, ids)

        return await asyncio.gather(*(answer(adapter, ids) for adapter, ids in requests))

    return virtual_time.run(main)


twelve = [row for adapter in ADAPTERS for row in [row for row in requests if row[0] == adapter][:4]]
wanted = [reply_alone(adapter, ids) for adapter, ids in twelve]
naive = naive_answers(twelve, lock=False)
locked = naive_answers(twelve, lock=True)
crosstalk_naive = sum(got != want for got, want in zip(naive, wanted, strict=True))
crosstalk_locked = sum(got != want for got, want in zip(locked, wanted, strict=True))
for row in (0, 4):
    got, want = (tokenizer.decode(ids[row], skip_special_tokens=True) for ids in (naive, wanted))
    print(f"{twelve[row][0]} asked, and got {got!r} in place of {want!r}")
print(f"\nanswered by another adapter: {crosstalk_naive} of 12, with a lock {crosstalk_locked} of 12")
card.record(
    "crosstalk_naive", crosstalk_naive, format="d", label="of 12 concurrent requests, answered by another's adapter"
)

# %% [markdown]
# All twelve set their adapter, and then all twelve generate with the last one's. No exception, no warning, status 200. A lock mends it, and then requests are answered one after the other.
#
# `peft` has another way: `generate(..., adapter_names=[...])` takes one name a row, so that requests for different adapters share a batch. It computes the base once for all rows and each adapter for its own rows.
#
# **Exercise.** Write `reply_together(policy, tokenizer, requests, longest, **options)`. `requests` is a list of `(adapter, ids)`, where `ids` are the token ids of a prompt (1 or more, of different lengths; leave them as they are). Return a list with the new token ids of each request, in the order of the requests.
#
# - One call of `policy.generate` for all requests: greedy (`do_sample=False`), at most `longest` new tokens, and `options` handed on to it as they are. Prompts of different lengths are padded **on the left** with `tokenizer.pad_token_id`, and the attention mask is 0 there and nowhere else.
# - Each row by its own adapter, through `adapter_names`, **also when all rows want the same one**. `set_adapter` is not called.
# - A reply ends with its first `tokenizer.eos_token_id`, which belongs to it; what `generate` put after it doesn't. A reply that was cut at `longest` has none.
# - No requests give `[]`.
#
# With two requests of which the first ends after 3 tokens and the second after 7, you get lists of 3 and 7 ids. *About 10 lines.*
#
# <details><summary>Hint 1</summary>Which position must the last token of every prompt have, so that the next token is appended to it?</details>
# <details><summary>Hint 2</summary>Width = the longest prompt; rows <code>[pad] * (width - len(ids)) + ids</code>; the mask the same with 0 and 1; the new tokens are <code>out[:, width:]</code>.</details>
# <details><summary>Hint 3</summary><code>policy.generate(input_ids=…, attention_mask=…, adapter_names=[name for name, _ in requests], max_new_tokens=longest, do_sample=False, **options)</code>, then cut each row of <code>.tolist()</code> after <code>index(eos)</code> if it's there.</details>


# %% exercise="mixed-batch" difficulty=2 minutes=9
def reply_together(
    policy, tokenizer, requests: Sequence[tuple[str, list[int]]], longest: int, **options
) -> list[list[int]]:
    """The greedy replies to requests for different adapters, computed in one batch."""
    ### BEGIN SOLUTION
    if not requests:
        return []
    width = max(len(ids) for _, ids in requests)
    padding = [width - len(ids) for _, ids in requests]
    out = policy.generate(
        input_ids=torch.tensor(
            [[tokenizer.pad_token_id] * n + list(ids) for n, (_, ids) in zip(padding, requests, strict=True)]
        ),
        attention_mask=torch.tensor([[0] * n + [1] * (width - n) for n in padding]),
        adapter_names=[adapter for adapter, _ in requests],
        max_new_tokens=longest,
        do_sample=False,
        **options,
    )
    eos = tokenizer.eos_token_id
    rows = out[:, width:].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]
    ### END SOLUTION


# %% check="mixed-batch" points=2
def forget_hooks() -> None:
    """Take out what a failed call of generate with adapter_names has left in the layers (see below)."""
    for module in policy.modules():
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks_with_kwargs.clear()


class Watched:
    """The policy, with a count of what is called."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.given: dict[str, object] = {}

    def __getattr__(self, name: str):
        found = getattr(policy, name)
        if name not in ("generate", "set_adapter"):
            return found

        def counted(*args, **kwargs):
            self.calls[name] += 1
            self.given = kwargs
            return found(*args, **kwargs)

        return counted


forget_hooks()
few = [
    ("triage", prompt_ids("My Dramolon arrived broken. Please send a new one.")),
    ("agent", prompt_ids("What is the price of the Norix?")),
    ("handbook", prompt_ids("The Norix costs 480 crowns. Its warranty is 24 months.\nWhat is the price of the Norix?")),
]
alone = [reply_alone(adapter, ids) for adapter, ids in few]
watched = Watched()
together = reply_together(watched, tokenizer, few, 32)
assert watched.calls["set_adapter"] == 0, (
    "set_adapter is global state, which the next request changes under your feet: name the adapters by row, adapter_names"
)
assert watched.calls["generate"] == 1, (
    f"One call of generate for the whole batch; yours made {watched.calls['generate']} for three requests"
)
assert isinstance(together, (list, tuple)), (
    f"Return a list with the new ids of each request; yours is a {type(together).__name__}"
)
assert len(together) == 3, f"Three requests, three replies; yours are {len(together)}"
together = [[int(i) for i in reply] for reply in together]
for (adapter, ids), got, want in zip(few, together, alone, strict=True):
    assert got[: len(ids)] != ids, "Return the new tokens only: cut the prompt, which ends at the width of the batch"
    assert got == want or got[: len(want)] != want, (
        f"A reply ends with its first end-of-sequence token: what generate appends to finished rows is padding; {adapter} "
        f"must have {len(want)} ids, yours has {len(got)}"
    )
    assert got != want[:-1], "The end-of-sequence token belongs to the reply: it says that the reply was not cut"
    assert got == want, (
        f"The {adapter} request is answered otherwise than alone. Are the names in the order of the rows, and is the padding "
        f"on the left and masked? Alone: {tokenizer.decode(want)!r}; yours: {tokenizer.decode(got)!r}"
    )
### BEGIN HIDDEN TESTS
from types import SimpleNamespace

_draw = Draw("mixed")
_lengths = (3, 40, 11, 40, 1, 25)
_rows = [(ADAPTERS[_draw.below(3)], [_draw.between(100, 900) for _ in range(_n)]) for _n in _lengths]
_rows.append((ADAPTERS[0], [tokenizer.pad_token_id, 300, tokenizer.pad_token_id, 301]))
_alone = [reply_alone(_a, _ids, 9) for _a, _ids in _rows]
_before = [(_a, list(_ids)) for _a, _ids in _rows]
_got = [[int(i) for i in _r] for _r in reply_together(policy, tokenizer, _rows, 9)]
assert _rows == _before, "Pad copies: the caller's lists of ids must stay as they are"
assert _got[-1] == _alone[-1], "The mask is 0 where you padded: a pad token inside a prompt is a token like others"
assert _got == _alone, "Each row as alone, in the order of the requests, for any lengths, cut at longest"
assert list(reply_together(policy, tokenizer, [], 9)) == [], "No requests, no replies"


class _Scripted:
    def __getattr__(self, name):
        return getattr(policy, name)

    def generate(self, input_ids, return_dict_in_generate=False, **others):
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        out = torch.cat([input_ids, torch.tensor([[5, end, end, end], [6, 7, 8, end], [9, pad, 8, 7]])], 1)
        return SimpleNamespace(sequences=out) if return_dict_in_generate else out


_got = reply_together(_Scripted(), tokenizer, [("triage", [4]), ("agent", [4, 4]), ("triage", [4])], 4)
assert [[int(i) for i in _r] for _r in _got] == [
    [5, tokenizer.eos_token_id],
    [6, 7, 8, tokenizer.eos_token_id],
    [9, tokenizer.pad_token_id, 8, 7],
], f"A reply ends with its first end token, whatever comes after it, and holds every token before it; yours: {_got}"
_one = [[int(i) for i in _r] for _r in reply_together(policy, tokenizer, _rows[:1], 9)]
assert _one == _alone[:1], "A batch of one is a batch as well"
### END HIDDEN TESTS

# %% check="mixed-batch" points=1
forget_hooks()
policy.set_adapter("agent")
same = [few[0], ("triage", prompt_ids("I cannot log in. The Kesunix says nothing."))]
alone = [reply_alone(adapter, ids) for adapter, ids in same]
policy.set_adapter("agent")
try:
    together = [[int(i) for i in reply] for reply in reply_together(policy, tokenizer, same, 32)]
except Exception as error:
    forget_hooks()
    raise AssertionError(f"A batch for one adapter failed with {type(error).__name__}: {error}") from error
assert policy.active_adapter == "agent", (
    f"Leave the active adapter as it is ('agent'): set_adapter is global state; it is {policy.active_adapter!r} after your call"
)
assert together == alone, (
    "Two rows for triage are answered by triage, whichever adapter is active: pass adapter_names always"
)


class GoneError(Exception):
    """The client has left, in the middle of a reply."""


def leave(ids, scores, **others):
    raise GoneError


try:
    reply_together(policy, tokenizer, [few[2], few[2]], 8, stopping_criteria=[leave])
except GoneError:
    broken_off = True
else:
    broken_off = False
assert broken_off, "options go to generate as they are: this stopping criterion was to be called, and to break it off"
together = [[int(i) for i in reply] for reply in reply_together(policy, tokenizer, same, 32)]
forget_hooks()
assert together == alone, (
    "After a batch of the handbook that failed, triage is answered by the handbook: peft leaves the names of a failed batch in "
    "the layers, and a call without adapter_names uses them. Pass adapter_names on every call"
)
### BEGIN HIDDEN TESTS
_seen: list[int] = []


def _count(_ids, _scores, **_others):
    _seen.append(len(_ids))
    return torch.zeros(len(_ids), dtype=torch.bool)


reply_together(policy, tokenizer, few, 4, stopping_criteria=[_count])
assert set(_seen) == {3}, "options go to generate as they are, and the batch has a row for each request"
assert len(_seen) <= 4, (
    f"At most longest = 4 new tokens are to be computed, not cut afterwards; yours made {len(_seen)}"
)
### END HIDDEN TESTS


# %% mistake="pads on the right" of="mixed-batch" says="is answered otherwise than alone"
def reply_together(policy, tokenizer, requests, longest, **options):
    if not requests:
        return []
    width = max(len(ids) for _, ids in requests)
    x = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for _, ids in requests])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for _, ids in requests])
    names = [name for name, _ in requests]
    out = policy.generate(
        input_ids=x, attention_mask=mask, adapter_names=names, max_new_tokens=longest, do_sample=False, **options
    )
    rows = out[:, width:].tolist()
    return [row[: row.index(2) + 1] if 2 in row else row for row in rows]


# %% mistake="does not mask the padding" of="mixed-batch" says="is answered otherwise than alone"
def reply_together(policy, tokenizer, requests, longest, **options):
    if not requests:
        return []
    width = max(len(ids) for _, ids in requests)
    x = torch.tensor([[tokenizer.pad_token_id] * (width - len(ids)) + ids for _, ids in requests])
    names = [name for name, _ in requests]
    out = policy.generate(
        input_ids=x,
        attention_mask=torch.ones_like(x),
        adapter_names=names,
        max_new_tokens=longest,
        do_sample=False,
        **options,
    )
    rows = out[:, width:].tolist()
    return [row[: row.index(2) + 1] if 2 in row else row for row in rows]


# %% mistake="sorts the rows by length, and not the names" of="mixed-batch" says="is answered otherwise than alone"
def reply_together(policy, tokenizer, requests, longest, **options):
    if not requests:
        return []
    order = sorted(range(len(requests)), key=lambda i: len(requests[i][1]))
    width = len(requests[order[-1]][1])
    x = torch.tensor([[tokenizer.pad_token_id] * (width - len(requests[i][1])) + requests[i][1] for i in order])
    mask = torch.tensor([[0] * (width - len(requests[i][1])) + [1] * len(requests[i][1]) for i in order])
    names = [name for name, _ in requests]
    out = policy.generate(
        input_ids=x, attention_mask=mask, adapter_names=names, max_new_tokens=longest, do_sample=False, **options
    )
    replies = [[]] * len(requests)
    for i, row in zip(order, out[:, width:].tolist(), strict=True):
        replies[i] = row[: row.index(2) + 1] if 2 in row else row
    return replies


# %% mistake="one after the other" of="mixed-batch" says="One call of generate for the whole batch"
def reply_together(policy, tokenizer, requests, longest, **options):
    replies = []
    for name, ids in requests:
        x = torch.tensor([ids])
        out = policy.generate(
            input_ids=x,
            attention_mask=torch.ones_like(x),
            adapter_names=[name],
            max_new_tokens=longest,
            do_sample=False,
            **options,
        )
        row = out[0, len(ids) :].tolist()
        replies.append(row[: row.index(2) + 1] if 2 in row else row)
    return replies


# %% mistake="keeps what stands after the end" of="mixed-batch" says="what generate appends to finished rows is padding"
def reply_together(policy, tokenizer, requests, longest, **options):
    if not requests:
        return []
    width = max(len(ids) for _, ids in requests)
    x = torch.tensor([[tokenizer.pad_token_id] * (width - len(ids)) + ids for _, ids in requests])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for _, ids in requests])
    names = [name for name, _ in requests]
    out = policy.generate(
        input_ids=x, attention_mask=mask, adapter_names=names, max_new_tokens=longest, do_sample=False, **options
    )
    return out[:, width:].tolist()


# %% mistake="drops the end token" of="mixed-batch" says="The end-of-sequence token belongs to the reply"
def reply_together(policy, tokenizer, requests, longest, **options):
    if not requests:
        return []
    width = max(len(ids) for _, ids in requests)
    x = torch.tensor([[tokenizer.pad_token_id] * (width - len(ids)) + ids for _, ids in requests])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for _, ids in requests])
    names = [name for name, _ in requests]
    out = policy.generate(
        input_ids=x, attention_mask=mask, adapter_names=names, max_new_tokens=longest, do_sample=False, **options
    )
    rows = out[:, width:].tolist()
    return [row[: row.index(2)] if 2 in row else row for row in rows]


# %% mistake="a fast path for one adapter" of="mixed-batch" says="Leave the active adapter as it is"
def reply_together(policy, tokenizer, requests, longest, **options):
    if not requests:
        return []
    width = max(len(ids) for _, ids in requests)
    x = torch.tensor([[tokenizer.pad_token_id] * (width - len(ids)) + ids for _, ids in requests])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for _, ids in requests])
    names = [name for name, _ in requests]
    if len(set(names)) == 1:
        policy.set_adapter(names[0])
    else:
        options["adapter_names"] = names
    out = policy.generate(input_ids=x, attention_mask=mask, max_new_tokens=longest, do_sample=False, **options)
    rows = out[:, width:].tolist()
    return [row[: row.index(2) + 1] if 2 in row else row for row in rows]


# %% mistake="a fast path that puts the active adapter back" of="mixed-batch" says="Pass adapter_names on every call"
def reply_together(policy, tokenizer, requests, longest, **options):
    if not requests:
        return []
    width = max(len(ids) for _, ids in requests)
    x = torch.tensor([[tokenizer.pad_token_id] * (width - len(ids)) + ids for _, ids in requests])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for _, ids in requests])
    names, active = [name for name, _ in requests], policy.active_adapter
    if len(set(names)) == 1 and "stopping_criteria" not in options:
        policy.set_adapter(names[0])
    else:
        options["adapter_names"] = names
    out = policy.generate(input_ids=x, attention_mask=mask, max_new_tokens=longest, do_sample=False, **options)
    policy.set_adapter(active)
    rows = out[:, width:].tolist()
    return [row[: row.index(2) + 1] if 2 in row else row for row in rows]


# %% mistake="swallows the options" of="mixed-batch" says="options go to generate as they are"
def reply_together(policy, tokenizer, requests, longest, **options):
    if not requests:
        return []
    width = max(len(ids) for _, ids in requests)
    x = torch.tensor([[tokenizer.pad_token_id] * (width - len(ids)) + ids for _, ids in requests])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for _, ids in requests])
    names = [name for name, _ in requests]
    out = policy.generate(
        input_ids=x, attention_mask=mask, adapter_names=names, max_new_tokens=longest, do_sample=False
    )
    rows = out[:, width:].tolist()
    return [row[: row.index(2) + 1] if 2 in row else row for row in rows]


# %% mistake="masks every pad token" of="mixed-batch" says="a pad token inside a prompt"
def reply_together(policy, tokenizer, requests, longest, **options):
    if not requests:
        return []
    width, pad, eos = max(len(ids) for _, ids in requests), tokenizer.pad_token_id, tokenizer.eos_token_id
    x = torch.tensor([[pad] * (width - len(ids)) + list(ids) for _, ids in requests])
    given = {"input_ids": x, "attention_mask": (x != pad).long(), "adapter_names": [name for name, _ in requests]}
    out = policy.generate(**given, max_new_tokens=longest, do_sample=False, **options)
    return [row[: row.index(eos) + 1] if eos in row else row for row in out[:, width:].tolist()]


# %% mistake="pads the caller's lists" of="mixed-batch" says="the caller's lists of ids must stay"
def reply_together(policy, tokenizer, requests, longest, **options):
    if not requests:
        return []
    width, pad, eos = max(len(ids) for _, ids in requests), tokenizer.pad_token_id, tokenizer.eos_token_id
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for _, ids in requests])
    for _, ids in requests:
        ids[:0] = [pad] * (width - len(ids))
    given = {"input_ids": torch.tensor([ids for _, ids in requests]), "attention_mask": mask}
    names = [name for name, _ in requests]
    out = policy.generate(**given, adapter_names=names, max_new_tokens=longest, do_sample=False, **options)
    return [row[: row.index(eos) + 1] if eos in row else row for row in out[:, width:].tolist()]


# %% mistake="computes 32 tokens and cuts" of="mixed-batch" says="not cut afterwards"
def reply_together(policy, tokenizer, requests, longest, **options):
    if not requests:
        return []
    width, pad, eos = max(len(ids) for _, ids in requests), tokenizer.pad_token_id, tokenizer.eos_token_id
    x = torch.tensor([[pad] * (width - len(ids)) + list(ids) for _, ids in requests])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for _, ids in requests])
    given = {"input_ids": x, "attention_mask": mask, "adapter_names": [name for name, _ in requests]}
    rows = policy.generate(**given, max_new_tokens=32, do_sample=False, **options)[:, width:].tolist()
    return [row[: row.index(eos) + 1][:longest] if eos in row else row[:longest] for row in rows]


# %% alternative="on the model's device, with a dictionary as answer" of="mixed-batch"
def reply_together(policy, tokenizer, requests, longest, **options):
    if not requests:
        return []
    prompts = [torch.tensor(ids, device=policy.device) for _, ids in requests]
    width, pad, eos = max(map(len, prompts)), tokenizer.pad_token_id, tokenizer.eos_token_id
    x = torch.stack([torch.nn.functional.pad(ids, (width - len(ids), 0), value=pad) for ids in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(ids), (width - len(ids), 0)) for ids in prompts])
    answer = policy.generate(
        input_ids=x, attention_mask=mask, adapter_names=tuple(name for name, _ in requests),
        max_length=width + longest, do_sample=False, return_dict_in_generate=True, **options,
    )  # fmt: skip
    replies = []
    for row in answer.sequences[:, width:]:
        ends = (row == eos).nonzero().flatten().tolist()
        replies.append(tuple(row[: ends[0] + 1] if ends else row))
    return replies


# %% alternative="the tokenizer pads" of="mixed-batch"
def reply_together(policy, tokenizer, requests, longest, **options):
    if len(requests) == 0:
        return []
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    batch = tokenizer.pad({"input_ids": [list(ids) for _, ids in requests]}, return_tensors="pt")
    tokenizer.padding_side = side
    out = policy.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        adapter_names=[name for name, _ in requests],
        max_new_tokens=longest,
        do_sample=False,
        **options,
    )
    replies = []
    for row in out[:, batch["input_ids"].shape[1] :]:
        reply = []
        for token in row.tolist():
            reply.append(token)
            if token == tokenizer.eos_token_id:
                break
        replies.append(reply)
    return replies


# %% [markdown]
# Now all requests, in mixed batches of sixteen, token for token against each adapter alone. (Tokens, not bits: a batch of another shape may add in another order, so logits can differ in their last digits, and a greedy reply only where two tokens are that close.)

# %%
forget_hooks()
reference = [reply_alone(adapter, ids) for adapter, ids in requests]
mixed = [
    reply
    for at in range(0, len(requests), 16)
    for reply in reply_together(policy, tokenizer, requests[at : at + 16], 32)
]
crosstalk_mixed = sum(got != want for got, want in zip(mixed, reference, strict=True))
useful = [
    sum(map(len, reference[at : at + 16])) / (len(reference[at : at + 16]) * max(map(len, reference[at : at + 16])))
    for at in range(0, len(requests), 16)
]
print(f"{crosstalk_mixed} of {len(requests)} replies differ from those of the adapter alone")
print(f"of the row-steps of a batch {np.mean(useful):.0%} make a token that somebody gets")
card.record(
    "crosstalk_mixed", crosstalk_mixed, format="d", label="replies in mixed batches that differ from the adapter alone"
)
card.record("crosstalk_asked", len(requests), format="d", label="replies compared")
card.record("useful_share", np.mean(useful), format=".0%", tolerance=0.02, label="of a batch's row-steps, useful ones")

# %% [markdown]
# A batch takes as long as its longest reply: an answer of 5 tokens waits for a triage of 26, and only {{useful_share}} of the row-steps make a token that somebody gets. *Continuous batching* (Yu et al., 2022) lets a finished row leave and a new one enter after every step; it's what vLLM does.
#
# Two limits of `adapter_names`, both in peft's source and both without an error message. It puts a hook into every LoRA layer that hands the names over, and takes it out after the call:
#
# - **The hooks are shared as well.** Two calls in two threads see each other's names.
# - **They're taken out after the call, but not when it fails** (peft 0.21: there is no `finally`). A client that leaves or a GPU that is out of memory leaves the names of *that* batch in the layers.

# %%
forget_hooks()
triage_ids = next(ids for adapter, ids in requests if adapter == "triage")
handbook_ids = next(ids for adapter, ids in requests if adapter == "handbook")


def hooks() -> int:
    return sum(len(module._forward_pre_hooks) for module in policy.modules())


def fails(ids, scores, **others):
    raise MemoryError("out of memory")


with suppress(MemoryError):
    policy.generate(
        input_ids=torch.tensor([handbook_ids]),
        adapter_names=["handbook"],
        max_new_tokens=4,
        do_sample=False,
        stopping_criteria=[fails],
    )
print("hooks left after one handbook request that failed:", hooks())
print(
    "next, a triage request through set_adapter:",
    tokenizer.decode(reply_alone("triage", triage_ids), skip_special_tokens=True),
)
print("the active adapter is said to be:", policy.active_adapter)
forget_hooks()


def in_threads(pairs: Sequence[tuple[str, list[int]]]) -> list[list[int]]:
    """The replies when each request has a thread, and all have begun before any goes on to its second token."""
    begun, replies = threading.Barrier(len(pairs), timeout=60), [[] for _ in pairs]

    def one(row: int) -> None:
        steps = []

        def wait_for_the_others(ids, scores, **others):
            steps.append(1)
            if len(steps) == 1:
                begun.wait()
            return torch.zeros(len(ids), dtype=torch.bool)

        replies[row] = reply_together(policy, tokenizer, [pairs[row]], 12, stopping_criteria=[wait_for_the_others])[0]

    threads = [threading.Thread(target=one, args=(row,)) for row in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replies


pairs = [("triage", triage_ids), ("handbook", handbook_ids)]
wrong = [got != reply_alone(adapter, ids, 12) for got, (adapter, ids) in zip(in_threads(pairs), pairs, strict=True)]
print(f"two threads, each with adapter_names of its own: {sum(wrong)} of 2 replies are wrong")
forget_hooks()

# %% [markdown]
# So names by row are half of the solution. The other half: **one owner.** Exactly one task calls the model; requests reach it through a queue. That queue is where batches are made, and it comes after the endpoint.

# %% [markdown]
# ## Streaming is a text problem
#
# A stream of the chat API is server-sent events: frames `data: {…}` with an empty line after each, and `data: [DONE]` at the end. The first delta names the role, the next hold text, the last holds the reason why it ends. `frame` writes one.
#
# What goes wrong is the text. A token isn't a piece of text: in a byte-level vocabulary like this one a token may be a third of a character; in SentencePiece vocabularies (Llama 2, Mistral) a token's leading blank disappears when it's decoded alone. And if a client asks to stop at `"\n\n"`, the first line break may not be sent before you know what follows.


# %%
def frame(ident: str, model: str, delta: dict[str, str], finish: str | None = None) -> str:
    """One server-sent event with a chunk of a chat completion."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    chunk = {"id": ident, "object": "chat.completion.chunk", "created": 0, "model": model, "choices": [choice]}
    return f"data: {json.dumps(chunk)}\n\n"


cafe = tokenizer("Zürich — 5 €", add_special_tokens=False)["input_ids"]
print("token by token:", "|".join(tokenizer.decode([i]) for i in cafe))
print("together:      ", tokenizer.decode(cafe))

# %% [markdown]
# `\ufffd` (�) stands for bytes that are no character, or not yet.
#
# **Exercise.** Write the async generator `frames(ident, model, tokens, decode, eos, stop)`. `tokens` is an async iterator of token ids; it ends with `eos`, or earlier when the reply was cut at its length. `decode(ids)` gives the text of a list of ids. `stop` is a tuple of texts, none of them empty; it may be empty itself.
#
# In this order, all made by `frame(ident, model, …)` but the last:
#
# 1. the delta `{"role": "assistant", "content": ""}`, before the first token is read;
# 2. deltas `{"content": piece}`, each piece as early as the rules below allow and never empty;
# 3. the delta `{}` with the finish reason: `"stop"` after `eos` or a stop text, `"length"` otherwise;
# 4. the text `"data: [DONE]\n\n"`.
#
# The text of a reply is `decode` of **all** its ids so far, without `eos`. Two things are held back as long as tokens may follow: characters `\ufffd` at its end, and the longest end (before those) with which one of the stop texts begins. When the tokens have ended, what was held back is sent. As soon as a stop text occurs, the reply ends before its earliest occurrence: that text isn't sent, and no further token is read.
#
# With tokens that decode to `"ab"`, `"c\n"`, `"d"` and `stop=("\n\n",)`, the pieces are `"ab"`, `"c"`, `"\nd"`. *About 22 lines.*
#
# <details><summary>Hint 1</summary>Keep the number of characters that were sent. After each token there is a number of characters that may be sent. What lowers it?</details>
# <details><summary>Hint 2</summary><code>len(text.rstrip("\ufffd"))</code> is the first bound. The second: the largest n below len(s) for which the text up to there ends with <code>s[:n]</code>. Look for whole stop texts first.</details>
# <details><summary>Hint 3</summary>async for token in tokens: eos → finish "stop", break; append; text = decode(ids); occurrences → cut text at the smallest, finish "stop", break; bound; if bound > sent, yield text[sent:bound]. After the loop send text[sent:] if it isn't empty, then the finish, then [DONE].</details>


# %% exercise="stream-frames" difficulty=3 minutes=12
async def frames(
    ident: str,
    model: str,
    tokens: AsyncIterator[int],
    decode: Callable[[list[int]], str],
    eos: int,
    stop: tuple[str, ...],
) -> AsyncIterator[str]:
    """The frames of a streamed reply: role, pieces of text as they become certain, finish reason, [DONE]."""
    ### BEGIN SOLUTION
    yield frame(ident, model, {"role": "assistant", "content": ""})
    ids: list[int] = []
    text, sent, finish = "", 0, "length"
    async for token in tokens:
        if token == eos:
            finish = "stop"
            break
        ids.append(token)
        text = decode(ids)
        ends = [text.find(one) for one in stop if one in text]
        if ends:
            text, finish = text[: min(ends)], "stop"
            break
        certain = text.rstrip("\ufffd")
        held = max((n for one in stop for n in range(len(one)) if certain.endswith(one[:n])), default=0)
        upto = len(certain) - held
        if upto > sent:
            yield frame(ident, model, {"content": text[sent:upto]})
            sent = upto
    if len(text) > sent:
        yield frame(ident, model, {"content": text[sent:]})
    yield frame(ident, model, {}, finish)
    yield "data: [DONE]\n\n"
    ### END SOLUTION


# %% check="stream-frames" points=2
class Reply(NamedTuple):
    """What came out of `frames`: pieces, how many tokens were read when each came, the finish reason, and all frames."""

    pieces: list[str]
    read: list[int]
    finish: str | None
    frames: list[str]


def streamed(parts: Sequence[bytes], stop: tuple[str, ...] = (), cut: bool = False, blank: bool = False) -> Reply:
    """Stream tokens that are these bytes; `blank`: like SentencePiece, drop the blank at the beginning of a text."""
    taken = []

    def decode(ids: list[int]) -> str:
        text = b"".join(parts[i] for i in ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if blank else text

    async def tokens() -> AsyncIterator[int]:
        for i in range(len(parts)):
            taken.append(i)
            yield i
        if not cut:
            taken.append(-1)
            yield -1

    async def main() -> list[tuple[int, str]]:
        return [(len(taken), one) async for one in frames("id-1", "triage", tokens(), decode, -1, stop)]

    found = virtual_time.run(main)
    pieces, read, finish = [], [], None
    for n, one in found:
        if one.startswith("data: {"):
            choice = json.loads(one.removeprefix("data: "))["choices"][0]
            if "content" in choice["delta"] and "role" not in choice["delta"]:
                pieces.append(choice["delta"]["content"])
                read.append(n)
            finish = choice["finish_reason"] or finish
    return Reply(pieces, read, finish, [one for _, one in found])


got = streamed([b" the", b" Norix", b" costs"], blank=True)
assert "".join(got.pieces) == "the Norix costs", (
    "Decode all ids so far and send what is new: a token decoded alone loses its blank. Wanted 'the Norix costs', got "
    f"{''.join(got.pieces)!r}"
)
assert got.pieces == ["the", " Norix", " costs"], f"Send each piece as soon as it is certain; yours are {got.pieces}"
got = streamed([b"Z", b"\xc3", b"\xbc", b"rich ", b"\xf0\x9f", b"\x99", b"\x82", b"!"])
assert all(got.pieces), f"No piece is empty: send nothing while nothing new is certain; yours are {got.pieces}"
assert "\ufffd" not in "".join(got.pieces), (
    f"Half a character was sent as \\ufffd: hold it back until its bytes are complete; yours: {got.pieces}"
)
assert got.pieces == ["Z", "ü", "rich ", "🙂", "!"], f"Wanted 'Z', 'ü', 'rich ', '🙂', '!'; yours are {got.pieces}"
assert got.read == [1, 3, 4, 7, 8], (
    f"A piece must leave as soon as it is certain, after 1, 3, 4, 7 and 8 tokens; yours after {got.read}"
)
got = streamed([b"a", b"\xe2\x82"], cut=True)
assert "".join(got.pieces) == "a\ufffd", (
    f"When the tokens have ended, what was held back is sent, here the \\ufffd; yours: {got.pieces}"
)
### BEGIN HIDDEN TESTS
_text = "naïve — 日本 🙂🙂 déjà vu\n\nfin"
for _size in (1, 2, 3, 5, 99):
    _bytes = _text.encode()
    _got = streamed([_bytes[_i : _i + _size] for _i in range(0, len(_bytes), _size)])
    assert "".join(_got.pieces) == _text, (
        f"Pieces of {_size} bytes must join to {_text!r}; yours: {''.join(_got.pieces)!r}"
    )
    assert all(_got.pieces), f"No piece is empty; yours are {_got.pieces}"
_got = streamed([b"x\xe2\x82", b"y", b"z"])
assert _got.pieces == ["x", "\ufffdy", "z"], (
    "Bytes that never become a character stay \\ufffd, and hold nothing back once another character follows; wanted 'x', "
    f"'\\ufffdy', 'z', yours: {_got.pieces}"
)
_got = streamed([b"a", b"\xff", b"\xe2\x82", b"\xac"])
assert _got.pieces == ["a", "\ufffd€"], f"All \\ufffd at the end are held back, not one; yours: {_got.pieces}"
### END HIDDEN TESTS

# %% check="stream-frames" points=1
got = streamed([b"7", b"57"])
assert got.frames[-1:] == ["data: [DONE]\n\n"], (
    f"A stream ends with data: [DONE] and an empty line; yours ends with {got.frames[-1:]}"
)
first, last = (json.loads(got.frames[i].removeprefix("data: ")) for i in (0, -2))
assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}, (
    f"The first delta names the role: {{'role': 'assistant', 'content': ''}}; yours is {first['choices'][0]['delta']}"
)
assert last["choices"][0]["finish_reason"] == "stop", (
    f"Before [DONE] stands a frame with the finish reason, 'stop' after eos; yours has {last['choices'][0]['finish_reason']!r}"
)
assert last["choices"][0]["delta"] == {}, "The frame with the finish reason has an empty delta"
assert [json.loads(one.removeprefix("data: "))["choices"][0]["finish_reason"] for one in got.frames[:-2]] == [
    None
] * 3, "Only the last chunk has a finish reason, and no delta is empty: role, two pieces, finish, [DONE]"
assert streamed([b"7", b"57"], cut=True).finish == "length", (
    "Tokens that end without eos were cut: the finish reason is 'length', so that the client knows"
)
heads = {(chunk["id"], chunk["model"]) for chunk in (json.loads(one.removeprefix("data: ")) for one in got.frames[:-1])}
assert heads == {("id-1", "triage")}, f"All frames of a reply have its ident and model; yours have {heads}"
### BEGIN HIDDEN TESTS
_got = streamed([])
assert (len(_got.frames), _got.finish) == (3, "stop"), f"An empty reply is role, finish, [DONE]; yours: {_got.frames}"


async def _first_frame() -> list[str]:
    read: list[str] = []

    async def _tokens() -> AsyncIterator[int]:
        read.append("token")
        yield 0

    stream = frames("i", "m", _tokens(), lambda ids: "a", 9, ())
    await stream.__anext__()
    await stream.aclose()
    return read


assert virtual_time.run(_first_frame) == [], "The role is sent before the first token is read"
### END HIDDEN TESTS

# %% check="stream-frames" points=1
got = streamed([b"ab", b"c\n", b"d", b"\n", b"\n", b"secret"], ("\n\n",))
assert "secret" not in "".join(got.pieces), "Nothing after a stop text is sent: end the reply there"
assert "".join(got.pieces) == "abc\nd", (
    f"The reply ends before the stop text: 'abc\\nd'; yours is {''.join(got.pieces)!r}. A line break that may be the beginning of "
    "the stop text must wait for what follows"
)
assert got.pieces == ["ab", "c", "\nd"], (
    f"Hold back only what may become a stop text, and send it once it can't: 'ab', 'c', '\\nd'; yours are {got.pieces}"
)
assert got.finish == "stop", f"After a stop text the finish reason is 'stop'; yours is {got.finish!r}"
got = streamed([b"Question", b": A? END", b"x"], ("END", "?"))
assert "".join(got.pieces) == "Question: A", (
    f"The earliest occurrence counts, of whichever stop text: 'Question: A'; yours is {''.join(got.pieces)!r}"
)
got = streamed([b"the", b" EN", b"D"], ("ENDS",))
assert "".join(got.pieces) == "the END", (
    f"The reply ended with the beginning of a stop text, which never came: send it; yours is {''.join(got.pieces)!r}"
)
### BEGIN HIDDEN TESTS
_got = streamed([b"aab", b"a", b"a", b"c", b"zz"], ("aac",))
assert "".join(_got.pieces) == "aab", f"'aabaac' stops at 'aac'; yours: {_got.pieces}"
_got = streamed([b"x##", b"#", b"y"], ("###",))
assert ("".join(_got.pieces), _got.pieces[:1]) == ("x", ["x"]), (
    f"The longest end that begins a stop text waits: {_got.pieces}"
)
_taken: list[int] = []


async def _after_stop() -> None:
    async def _tokens() -> AsyncIterator[int]:
        for _i in range(5):
            _taken.append(_i)
            yield _i

    async for _one in frames("i", "m", _tokens(), lambda ids: "abcde"[: len(ids)], 9, ("b",)):
        pass


virtual_time.run(_after_stop)
assert _taken == [0, 1], "No token is read after a stop text: the model would go on for nobody"
_got = streamed([b"a", b"\xc3", b"\xbc", b"b"], ("üb",))
assert ("".join(_got.pieces), _got.finish) == ("a", "stop"), f"A stop text may begin in half a character: {_got.pieces}"
_got = streamed([b"a\n", b"\xc3", b"\xbc"], ("\nü",))
assert "".join(_got.pieces) == "a", (
    f"The end that may become a stop text stands before the held \\ufffd, and waits as well: 'a'; yours: {_got.pieces}"
)
_got = streamed([b"x##", b"#!"], ("###!", "#?"))
assert "".join(_got.pieces) == "x", (
    f"'##' begins the first stop text, '#' the second: the longest such end waits; yours: {_got.pieces}"
)
_got = streamed([b"a|b|c"], ("|",))
assert "".join(_got.pieces) == "a", (
    f"A stop text that occurs twice ends the reply the first time: 'a'; yours: {_got.pieces}"
)
### END HIDDEN TESTS


# %% mistake="decodes token by token" of="stream-frames" says="a token decoded alone loses its blank"
async def frames(ident, model, tokens, decode, eos, stop):
    yield frame(ident, model, {"role": "assistant", "content": ""})
    finish = "length"
    async for token in tokens:
        if token == eos:
            finish = "stop"
            break
        yield frame(ident, model, {"content": decode([token])})
    yield frame(ident, model, {}, finish)
    yield "data: [DONE]\n\n"


# %% mistake="sends half characters" of="stream-frames" says="Half a character was sent"
async def frames(ident, model, tokens, decode, eos, stop):
    yield frame(ident, model, {"role": "assistant", "content": ""})
    ids, before, finish = [], "", "length"
    async for token in tokens:
        if token == eos:
            finish = "stop"
            break
        ids.append(token)
        text = decode(ids)
        if len(text) > len(before):
            yield frame(ident, model, {"content": text[len(before) :]})
        before = text
    yield frame(ident, model, {}, finish)
    yield "data: [DONE]\n\n"


# %% mistake="sends everything at the end" of="stream-frames" says="Send each piece as soon as it is certain"
async def frames(ident, model, tokens, decode, eos, stop):
    yield frame(ident, model, {"role": "assistant", "content": ""})
    ids, finish = [], "length"
    async for token in tokens:
        if token == eos:
            finish = "stop"
            break
        ids.append(token)
    if ids:
        yield frame(ident, model, {"content": decode(ids)})
    yield frame(ident, model, {}, finish)
    yield "data: [DONE]\n\n"


# %% mistake="forgets what it held back" of="stream-frames" says="When the tokens have ended, what was held back is sent"
async def frames(ident, model, tokens, decode, eos, stop):
    yield frame(ident, model, {"role": "assistant", "content": ""})
    ids, sent, finish = [], 0, "length"
    async for token in tokens:
        if token == eos:
            finish = "stop"
            break
        ids.append(token)
        text = decode(ids)
        if not text.endswith("\ufffd"):
            yield frame(ident, model, {"content": text[sent:]})
            sent = len(text)
    yield frame(ident, model, {}, finish)
    yield "data: [DONE]\n\n"


# %% mistake="no DONE" of="stream-frames" says="A stream ends with data: [DONE]"
async def frames(ident, model, tokens, decode, eos, stop):
    yield frame(ident, model, {"role": "assistant", "content": ""})
    ids, sent, finish, text = [], 0, "length", ""
    async for token in tokens:
        if token == eos:
            finish = "stop"
            break
        ids.append(token)
        text = decode(ids)
        if len(text.rstrip("\ufffd")) > sent:
            yield frame(ident, model, {"content": text.rstrip("\ufffd")[sent:]})
            sent = len(text.rstrip("\ufffd"))
    if text[sent:]:
        yield frame(ident, model, {"content": text[sent:]})
    yield frame(ident, model, {}, finish)


# %% mistake="always says stop" of="stream-frames" says="the finish reason is 'length'"
async def frames(ident, model, tokens, decode, eos, stop):
    yield frame(ident, model, {"role": "assistant", "content": ""})
    ids, sent, text = [], 0, ""
    async for token in tokens:
        if token == eos:
            break
        ids.append(token)
        text = decode(ids)
        if len(text.rstrip("\ufffd")) > sent:
            yield frame(ident, model, {"content": text.rstrip("\ufffd")[sent:]})
            sent = len(text.rstrip("\ufffd"))
    if text[sent:]:
        yield frame(ident, model, {"content": text[sent:]})
    yield frame(ident, model, {}, "stop")
    yield "data: [DONE]\n\n"


# %% mistake="sends the beginning of a stop text" of="stream-frames" says="A line break that may be the beginning"
async def frames(ident, model, tokens, decode, eos, stop):
    yield frame(ident, model, {"role": "assistant", "content": ""})
    ids, sent, finish, text = [], 0, "length", ""
    async for token in tokens:
        if token == eos:
            finish = "stop"
            break
        ids.append(token)
        text = decode(ids)
        found = [text.index(s) for s in stop if s in text]
        if found:
            text, finish = text[: min(found)], "stop"
            break
        upto = len(text.rstrip("\ufffd"))
        if upto > sent:
            yield frame(ident, model, {"content": text[sent:upto]})
            sent = upto
    if text[sent:]:
        yield frame(ident, model, {"content": text[sent:]})
    yield frame(ident, model, {}, finish)
    yield "data: [DONE]\n\n"


# %% mistake="always holds back as much as the longest stop text" of="stream-frames" says="Hold back only what may become a stop text"
async def frames(ident, model, tokens, decode, eos, stop):
    yield frame(ident, model, {"role": "assistant", "content": ""})
    ids, sent, finish, text = [], 0, "length", ""
    held = max((len(s) - 1 for s in stop), default=0)
    async for token in tokens:
        if token == eos:
            finish = "stop"
            break
        ids.append(token)
        text = decode(ids)
        found = [text.index(s) for s in stop if s in text]
        if found:
            text, finish = text[: min(found)], "stop"
            break
        upto = len(text.rstrip("\ufffd")) - held
        if upto > sent:
            yield frame(ident, model, {"content": text[sent:upto]})
            sent = upto
    if text[sent:]:
        yield frame(ident, model, {"content": text[sent:]})
    yield frame(ident, model, {}, finish)
    yield "data: [DONE]\n\n"


# %% mistake="takes the first stop text of the list" of="stream-frames" says="The earliest occurrence counts"
async def frames(ident, model, tokens, decode, eos, stop):
    yield frame(ident, model, {"role": "assistant", "content": ""})
    ids, sent, finish, text = [], 0, "length", ""
    async for token in tokens:
        if token == eos:
            finish = "stop"
            break
        ids.append(token)
        text = decode(ids)
        hit = next((s for s in stop if s in text), None)
        if hit:
            text, finish = text[: text.index(hit)], "stop"
            break
        sure = text.rstrip("\ufffd")
        while any(s.startswith(sure[at:]) for s in stop for at in range(len(sure)) if sure[at:]):
            sure = sure[:-1]
        if len(sure) > sent:
            yield frame(ident, model, {"content": sure[sent:]})
            sent = len(sure)
    if text[sent:]:
        yield frame(ident, model, {"content": text[sent:]})
    yield frame(ident, model, {}, finish)
    yield "data: [DONE]\n\n"


# %% mistake="the last stop text decides how much waits" of="stream-frames" says="the longest such end waits"
async def frames(ident, model, tokens, decode, eos, stop):
    yield frame(ident, model, {"role": "assistant", "content": ""})
    ids, text, sent, finish = [], "", 0, "length"
    async for token in tokens:
        if token == eos:
            finish = "stop"
            break
        ids.append(token)
        text = decode(ids)
        found = [text.find(one) for one in stop if one in text]
        if found:
            text, finish = text[: min(found)], "stop"
            break
        sure, held = text.rstrip("\ufffd"), 0
        for one in stop:
            for n in range(1, len(one)):
                if sure.endswith(one[:n]):
                    held = n
        if len(sure) - held > sent:
            yield frame(ident, model, {"content": text[sent : len(sure) - held]})
            sent = len(sure) - held
    if text[sent:]:
        yield frame(ident, model, {"content": text[sent:]})
    yield frame(ident, model, {}, finish)
    yield "data: [DONE]\n\n"


# %% mistake="looks for the beginning of a stop text behind half a character" of="stream-frames" says="stands before the held"
async def frames(ident, model, tokens, decode, eos, stop):
    yield frame(ident, model, {"role": "assistant", "content": ""})
    ids, text, sent, finish = [], "", 0, "length"
    async for token in tokens:
        if token == eos:
            finish = "stop"
            break
        ids.append(token)
        text = decode(ids)
        found = [text.find(one) for one in stop if one in text]
        if found:
            text, finish = text[: min(found)], "stop"
            break
        sure, held = text.rstrip("\ufffd"), 0
        for one in stop:
            for n in range(1, len(one)):
                if text.endswith(one[:n]):
                    held = max(held, n)
        if len(sure) - held > sent:
            yield frame(ident, model, {"content": text[sent : len(sure) - held]})
            sent = len(sure) - held
    if text[sent:]:
        yield frame(ident, model, {"content": text[sent:]})
    yield frame(ident, model, {}, finish)
    yield "data: [DONE]\n\n"


# %% mistake="takes the last occurrence" of="stream-frames" says="ends the reply the first time"
async def frames(ident, model, tokens, decode, eos, stop):
    yield frame(ident, model, {"role": "assistant", "content": ""})
    ids, text, sent, finish = [], "", 0, "length"
    async for token in tokens:
        if token == eos:
            finish = "stop"
            break
        ids.append(token)
        text = decode(ids)
        found = [text.rfind(one) for one in stop if one in text]
        if found:
            text, finish = text[: min(found)], "stop"
            break
        sure, held = text.rstrip("\ufffd"), 0
        for one in stop:
            for n in range(1, len(one)):
                if sure.endswith(one[:n]):
                    held = max(held, n)
        if len(sure) - held > sent:
            yield frame(ident, model, {"content": text[sent : len(sure) - held]})
            sent = len(sure) - held
    if text[sent:]:
        yield frame(ident, model, {"content": text[sent:]})
    yield frame(ident, model, {}, finish)
    yield "data: [DONE]\n\n"


# %% mistake="waits behind a broken byte to the end" of="stream-frames" says="hold nothing back once another character follows"
async def frames(ident, model, tokens, decode, eos, stop):
    yield frame(ident, model, {"role": "assistant", "content": ""})
    ids, text, sent, finish = [], "", 0, "length"
    async for token in tokens:
        if token == eos:
            finish = "stop"
            break
        ids.append(token)
        text = decode(ids)
        found = [text.find(one) for one in stop if one in text]
        if found:
            text, finish = text[: min(found)], "stop"
            break
        sure, held = text.partition("\ufffd")[0], 0
        for one in stop:
            for n in range(1, len(one)):
                if sure.endswith(one[:n]):
                    held = max(held, n)
        if len(sure) - held > sent:
            yield frame(ident, model, {"content": text[sent : len(sure) - held]})
            sent = len(sure) - held
    if text[sent:]:
        yield frame(ident, model, {"content": text[sent:]})
    yield frame(ident, model, {}, finish)
    yield "data: [DONE]\n\n"


# %% mistake="holds one broken byte back" of="stream-frames" says="are held back, not one"
async def frames(ident, model, tokens, decode, eos, stop):
    yield frame(ident, model, {"role": "assistant", "content": ""})
    ids, text, sent, finish = [], "", 0, "length"
    async for token in tokens:
        if token == eos:
            finish = "stop"
            break
        ids.append(token)
        text = decode(ids)
        found = [text.find(one) for one in stop if one in text]
        if found:
            text, finish = text[: min(found)], "stop"
            break
        sure, held = text.removesuffix("\ufffd"), 0
        for one in stop:
            for n in range(1, len(one)):
                if sure.endswith(one[:n]):
                    held = max(held, n)
        if len(sure) - held > sent:
            yield frame(ident, model, {"content": text[sent : len(sure) - held]})
            sent = len(sure) - held
    if text[sent:]:
        yield frame(ident, model, {"content": text[sent:]})
    yield frame(ident, model, {}, finish)
    yield "data: [DONE]\n\n"


# %% alternative="the certain part by shortening" of="stream-frames"
async def frames(ident, model, tokens, decode, eos, stop):
    yield frame(ident, model, {"role": "assistant", "content": ""})
    ids, out, finish = [], "", "length"
    full = ""
    async for token in tokens:
        if token == eos:
            finish = "stop"
            break
        ids.append(token)
        full = decode(ids)
        where = min((full.find(s) for s in stop if s in full), default=-1)
        if where >= 0:
            full, finish = full[:where], "stop"
            break
        sure = full
        while sure.endswith("\ufffd"):
            sure = sure[:-1]
        starts = [at for at in range(len(sure)) if any(s.startswith(sure[at:]) for s in stop)]
        sure = sure[: starts[0]] if starts else sure
        new, out = sure[len(out) :], max(out, sure, key=len)
        if new:
            yield frame(ident, model, {"content": new})
    if full[len(out) :]:
        yield frame(ident, model, {"content": full[len(out) :]})
    yield frame(ident, model, {}, finish)
    yield "data: [DONE]\n\n"


# %% [markdown]
# ## An endpoint that clients know
#
# Clients speak the chat API of OpenAI: `POST /v1/chat/completions`. If you speak it as well, every SDK, evaluation harness and agent framework works with your service by its `base_url`. "Compatible" is decided where things go wrong: the `openai` client raises by status (400 `BadRequestError`, 404 `NotFoundError`, 429 `RateLimitError`, 500 and above `InternalServerError`) and reads `{"error": {"message", "type", "param", "code"}}`. FastAPI's own answer to a bad field is 422 with a body that the client can't read.
#
# What the endpoint needs of the service behind it:


# %%
class RefusedError(Exception):
    """The service does not take a request now: 429 when its queue is full, 503 when it is closing."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Completion:
    """A reply, the number of its tokens, and why it ended: "stop" or "length"."""

    text: str
    tokens: int
    finish: str


class Service(Protocol):
    """Models by name, on one context of `context` tokens. Both coroutines raise `RefusedError` at once."""

    models: tuple[str, ...]
    context: int

    def count(self, messages: list[dict[str, str]]) -> int:
        """The tokens of a prompt."""

    async def complete(
        self, model: str, messages: list[dict[str, str]], max_tokens: int, stop: tuple[str, ...]
    ) -> Completion:
        """The whole reply."""

    async def stream(
        self, model: str, messages: list[dict[str, str]], max_tokens: int, stop: tuple[str, ...]
    ) -> AsyncIterator[str]:
        """The frames of the reply, once the request is accepted."""


def failure(status: int, message: str, *, param: str | None = None, code: str | None = None) -> JSONResponse:
    """An error as OpenAI's clients read it; one that is worth another try says so."""
    kind = "invalid_request_error" if status < 429 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, headers={"Retry-After": "1"} if status >= 429 else None)


def base_app(service: Service) -> FastAPI:
    """An application that lists the service's models and turns refusals into errors as clients read them."""
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict:
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "labkit"} for name in service.models]
        return {"object": "list", "data": listed}

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> JSONResponse:
        return failure(error.status, str(error))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        return failure(error.status_code, str(error.detail))  # no such path; bytes that are no text

    return app


def client_of(url: str) -> openai.OpenAI:
    """The real client, on the loopback: any key, no second tries, no proxy."""
    direct = httpx.Client(trust_env=False)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, http_client=direct, timeout=60)


# %% [markdown]
# **Exercise.** Write `make_app(service)`: it adds `POST /v1/chat/completions` to `base_app(service)` and returns the application. The body of a request is a JSON object with these fields and no others, in JSON's own types (`"5"` is no number, `"yes"` no boolean):
#
# | field | allowed | default |
# |---|---|---|
# | `model` | a string | required |
# | `messages` | 1 to 8 objects with exactly `role` (`"system"`, `"user"` or `"assistant"`) and `content` (1 to 4,000 characters) | required |
# | `max_tokens` | an integer from 1 to 64 | 32 |
# | `temperature` | 0 (or 0.0), since replies are greedy | 0 |
# | `stream` | a boolean | false |
# | `stop` | null, a string, or a list of at most 4 strings; strings of 1 to 64 characters | null |
#
# Errors, by `failure`, in this order:
#
# - anything not allowed above, or no JSON at all: 400; `param` is the name of the (outermost) field, `None` when there is none; the message is yours. An unknown field is refused, since silence would promise `seed` or `tools`.
# - a model that isn't in `service.models`: 404, `param="model"`, `code="model_not_found"`; the message names it.
# - `service.count(messages) + max_tokens > service.context`: 400, `param="messages"`, `code="context_length_exceeded"`; the message holds the sum and the limit.
# - `RefusedError` from the service, streamed or not: `base_app` answers with its status, if it is raised before the response has begun.
#
# `messages` are handed to the service as dictionaries, `stop` as a tuple (a string becomes a tuple of one, null an empty one). With `stream`, the answer is `StreamingResponse(await service.stream(...), media_type="text/event-stream")`. Otherwise it's
#
# `{"id": …, "object": "chat.completion", "created": 0, "model": …, "choices": [{"index": 0, "message": {"role": "assistant", "content": …}, "finish_reason": …}], "usage": {"prompt_tokens": …, "completion_tokens": …, "total_tokens": …}}`
#
# where `id` is any string that isn't empty. *About 35 lines.*
#
# <details><summary>Hint 1</summary>pydantic can hold the whole table: <code>Literal</code>, <code>Field(min_length=…, le=…)</code>, <code>ConfigDict(extra="forbid", strict=True)</code>. What is left to do by hand?</details>
# <details><summary>Hint 2</summary><code>@app.exception_handler(RequestValidationError)</code> replaces FastAPI's 422. <code>error.errors()[0]["loc"]</code> is <code>("body", "messages", 0, "role")</code>, or <code>("body", 17)</code> for text that is no JSON.</details>
# <details><summary>Hint 3</summary>Two models (a message, a request; temperature is <code>float = Field(0, ge=0, le=0)</code>), a handler, a route. In the route: model → 404, count → 400, then <code>args = (request.model, [m.model_dump() for m in request.messages], request.max_tokens, stop)</code> for both stream and complete.</details>


# %% exercise="chat-endpoint" difficulty=3 minutes=15
def make_app(service: Service) -> FastAPI:
    """An application that answers as OpenAI's chat API does."""
    ### BEGIN SOLUTION
    StopText = Annotated[str, Field(min_length=1, max_length=64)]

    class Message(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        role: Literal["system", "user", "assistant"]
        content: str = Field(min_length=1, max_length=4000)

    class ChatRequest(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        model: str
        messages: list[Message] = Field(min_length=1, max_length=8)
        max_tokens: int = Field(32, ge=1, le=64)
        temperature: float = Field(0, ge=0, le=0)
        stream: bool = False
        stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None

    app = base_app(service)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = next((part for part in first["loc"][1:2] if isinstance(part, str)), None)
        return failure(400, f"{field or 'body'}: {first['msg']}", param=field)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: ChatRequest) -> dict | JSONResponse | StreamingResponse:
        if request.model not in service.models:
            return failure(404, f"there is no model {request.model!r}", param="model", code="model_not_found")
        messages = [message.model_dump() for message in request.messages]
        prompt = service.count(messages)
        if (wanted := prompt + request.max_tokens) > service.context:
            message = f"the prompt and max_tokens are {wanted} tokens together; the context has {service.context}"
            return failure(400, message, param="messages", code="context_length_exceeded")
        stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
        if request.stream:
            events = await service.stream(request.model, messages, request.max_tokens, stop)
            return StreamingResponse(events, media_type="text/event-stream")
        reply = await service.complete(request.model, messages, request.max_tokens, stop)
        choice = {"index": 0, "message": {"role": "assistant", "content": reply.text}, "finish_reason": reply.finish}
        usage = {"prompt_tokens": prompt, "completion_tokens": reply.tokens, "total_tokens": prompt + reply.tokens}
        head = {"id": f"chatcmpl-{time.time_ns()}", "object": "chat.completion", "created": 0, "model": request.model}
        return {**head, "choices": [choice], "usage": usage}

    return app
    ### END SOLUTION


# %% check="chat-endpoint" points=2
class Echo:
    """A service that repeats the last message; `full` makes it refuse."""

    models: tuple[str, ...] = ("alpha", "beta")
    context = 40

    def __init__(self, full: RefusedError | None = None) -> None:
        self.full = full
        self.seen: list[tuple] = []

    def count(self, messages: list[dict[str, str]]) -> int:
        return sum(len(message["content"].split()) for message in messages)

    async def complete(self, model: str, messages: list, max_tokens: int, stop: tuple) -> Completion:
        self.seen.append((model, messages, max_tokens, stop))
        if self.full:
            raise self.full
        return Completion(f"{model}: {messages[-1]['content']}", 5, "length" if max_tokens > 1 else "stop")

    async def stream(self, model: str, messages: list, max_tokens: int, stop: tuple) -> AsyncIterator[str]:
        self.seen.append((model, messages, max_tokens, stop))
        if self.full:
            raise self.full

        async def events() -> AsyncIterator[str]:
            yield frame("s-1", model, {"role": "assistant", "content": ""})
            for word in messages[-1]["content"].split():
                yield frame("s-1", model, {"content": f"{word} "})
            yield frame("s-1", model, {}, "stop")
            yield "data: [DONE]\n\n"

        return events()


echo = Echo()
hello = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Good morning"}]
with serving(make_app(echo)) as server, client_of(server.url) as client:
    try:
        got = client.chat.completions.create(model="beta", messages=hello, temperature=0.0, stop="END")
    except openai.APIStatusError as error:
        raise AssertionError(f"A request as in the table was refused with {error.status_code}: {error}") from error
    except openai.APIError as error:
        raise AssertionError(
            f"The client can't use the answer: {error}; the server says: {server.log()[-500:]}"
        ) from error
    streamed_chunks = list(client.chat.completions.create(model="alpha", messages=hello, stream=True, max_tokens=7))
assert got.object == "chat.completion", f"The answer is an object 'chat.completion'; yours: {got.object!r}"
assert got.choices, f"The answer has choices; yours: {got}"
assert got.choices[0].message.content == "beta: Good morning", (
    f"choices[0].message.content is the service's text; yours is {got.choices[0].message.content!r}"
)
assert got.choices[0].message.role == "assistant", "The message's role is 'assistant'"
assert got.choices[0].finish_reason == "length", "Hand the service's finish reason on: 'length' here"
assert got.usage is not None, "The answer has a usage: whoever pays counts tokens"
usage = (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens)
assert usage == (4, 5, 9), f"usage is prompt 4, completion 5, total 9; yours is {usage}"
assert got.model == "beta", f"model is the one that was asked for, 'beta'; yours is {got.model!r}"
assert isinstance(got.id, str), f"id is a string; yours is {got.id!r}"
assert got.id, "id is not empty"
assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed_chunks) == "Good morning ", (
    "With stream=True the client gets the service's frames, as a StreamingResponse of text/event-stream"
)
assert echo.seen[0] == ("beta", hello, 32, ("END",)), (
    "The service gets model, messages as plain dictionaries, max_tokens (32 unless given) and stop as a tuple; it got "
    f"{echo.seen[0]}"
)
assert echo.seen[1] == ("alpha", hello, 7, ()), f"The streamed request hands the same on; it got {echo.seen[1]}"
### BEGIN HIDDEN TESTS
_echo = Echo()
with serving(make_app(_echo)) as _server, httpx.Client(base_url=_server.url, trust_env=False) as _http:
    for _stop, _want in ((None, ()), (["a", "b"], ("a", "b")), ([], ()), (["x" * 64] * 4, ("x" * 64,) * 4)):
        _body = {"model": "alpha", "messages": hello, "stop": _stop, "stream": False}
        _answer = _http.post("/v1/chat/completions", json=_body)
        assert _answer.status_code == 200, f"stop={_stop!r} is allowed; yours says {_answer.text[:300]}"
        assert _answer.json().get("created") == 0, f"created is 0, which clients parse; yours: {_answer.text[:200]}"
        assert _echo.seen[-1][3] == _want, (
            f"stop={_stop!r} reaches the service as {_want!r}; it got {_echo.seen[-1][3]!r}"
        )
    _eight = [{"role": "assistant", "content": "x"}] * 8
    for _body in (
        {"model": "alpha", "messages": _eight, "max_tokens": 32},
        {"model": "alpha", "messages": hello, "max_tokens": 1},
        {"model": "alpha", "messages": hello, "max_tokens": 36},
        {"model": "alpha", "messages": [{"role": "user", "content": "x" * 4000}], "temperature": 0},
    ):
        _answer = _http.post("/v1/chat/completions", json=_body)
        assert _answer.status_code == 200, f"At its limits a request is allowed; yours says {_answer.text[:300]}"
        _finish = "stop" if _body.get("max_tokens") == 1 else "length"
        assert _answer.json()["choices"][0]["finish_reason"] == _finish, (
            "Hand the service's finish reason on, each time"
        )
    _answer = _http.post("/v1/chat/completions", json={"model": "alpha", "messages": hello, "stream": True})
    assert _answer.headers.get("content-type", "").startswith("text/event-stream"), "A stream is text/event-stream"
    assert _http.get("/v1/models").json()["data"][0]["id"] == "alpha", "Build on base_app, which lists the models"
### END HIDDEN TESTS

# %% check="chat-endpoint" points=2
BAD = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": "x"}] * 9, "max_tokens": 1}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 4001}]}, "messages"),
    ({"max_tokens": 65}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"temperature": 0.7}, "temperature"),
    ({"seed": 1}, "seed"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"stream": "yes"}, "stream"),
]
echo = Echo()
with serving(make_app(echo)) as server, httpx.Client(base_url=server.url, trust_env=False) as http:
    answers = [
        (change, param, http.post("/v1/chat/completions", json={"model": "alpha", "messages": hello, **change}))
        for change, param in BAD
    ]
    broken = http.post("/v1/chat/completions", content="{not json", headers={"Content-Type": "application/json"})
for change, param, answer in [*answers, ("text that is no JSON", None, broken)]:
    assert answer.status_code != 200, (
        f"{str(change)[:80]} is not allowed by the table, and was answered: a limit is missing, or a type is converted"
    )
    assert answer.status_code == 400, (
        f"{str(change)[:80]} must be answered with 400 (FastAPI's own 422 is no status that OpenAI's clients expect here); yours "
        f"is {answer.status_code}"
    )
    error = answer.json().get("error") if isinstance(answer.json(), dict) else None
    assert {"message", "type", "param", "code"} <= set(error if isinstance(error, dict) else ()), (
        f"The client reads the object under 'error', with message, type, param and code (failure writes it); yours is {answer.text[:200]}"
    )
    assert error["param"] == param, (
        f"{str(change)[:80]}: param is {param!r}, the outermost field; yours is {error['param']!r}"
    )
assert echo.seen == [], f"What is not allowed does not reach the service; it got {echo.seen[:1]}"
### BEGIN HIDDEN TESTS
with serving(make_app(Echo())) as _server, httpx.Client(base_url=_server.url, trust_env=False) as _http:
    for _body, _param in (
        ({"messages": hello}, "model"),
        ({"model": "alpha"}, "messages"),
        ({"model": "alpha", "messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages"),
        ({"model": "alpha", "messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"model": "alpha", "messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"model": "alpha", "messages": hello, "temperature": -0.5}, "temperature"),
        ({"model": "alpha", "messages": hello, "stop": ["ok", ""]}, "stop"),
        ({"model": "alpha", "messages": hello, "stop": "x" * 65}, "stop"),
        ({"model": "alpha", "messages": hello, "stream": "perhaps"}, "stream"),
        ([1, 2], None),
    ):
        _answer = _http.post("/v1/chat/completions", json=_body)
        assert _answer.status_code == 400, f"…{str(_body)[-80:]} must be 400; yours is {_answer.status_code}"
        assert _answer.json()["error"]["param"] == _param, (
            f"…{str(_body)[-80:]}: param {_param!r}; yours: {_answer.text[:200]}"
        )
    _answer = _http.post(
        "/v1/chat/completions", content=b'{"model": "\xff"}', headers={"Content-Type": "application/json"}
    )
    assert (_answer.status_code, list(_answer.json())) == (400, ["error"]), (
        f"Bytes that are no text are no JSON: 400, and an error as clients read it; yours: {_answer.text[:200]}"
    )
### END HIDDEN TESTS

# %% check="chat-endpoint" points=1
echo = Echo()
with serving(make_app(echo)) as server, client_of(server.url) as client:
    raised = {}
    for name, given in {
        "model": {"model": "gamma", "messages": hello},
        "length": {"model": "alpha", "messages": [{"role": "user", "content": "word " * 20}], "max_tokens": 21},
        "length, streamed": {
            "model": "alpha",
            "messages": [{"role": "user", "content": "word " * 39}],
            "max_tokens": 2,
            "stream": True,
        },
    }.items():
        try:
            client.chat.completions.create(**given)
        except openai.APIStatusError as error:
            raised[name] = error
assert isinstance(raised.get("model"), openai.NotFoundError), (
    f"A model that does not exist is 404, which the client raises as NotFoundError; it raised {raised.get('model')!r}"
)
assert (raised["model"].code, raised["model"].param) == ("model_not_found", "model"), (
    "The client branches on the error's code: 'model_not_found', with param 'model', under 'error'; it read "
    f"{raised['model'].code!r} and {raised['model'].param!r}"
)
assert "gamma" in raised["model"].message, "The message names the model that does not exist"
for name in ("length", "length, streamed"):
    error = raised.get(name)
    assert isinstance(error, openai.BadRequestError), (
        f"20 + 21 tokens do not fit in 40: count prompt and max_tokens, before anything is sent ({name}); it raised {error!r}"
    )
    assert (error.code, error.param) == ("context_length_exceeded", "messages"), (
        f"code is 'context_length_exceeded', param 'messages'; the client read {error.code!r} and {error.param!r}"
    )
    for number in ("41", "40"):
        assert number in error.message, f"Say both numbers, 41 and 40; yours: {error.message!r}"
assert echo.seen == [], f"What doesn't fit does not reach the service; it got {echo.seen}"
for status, kind in ((429, openai.RateLimitError), (503, openai.InternalServerError)):
    for stream in (False, True):
        with (
            serving(make_app(Echo(RefusedError(status, "come back later")))) as server,
            client_of(server.url) as client,
        ):
            try:
                client.chat.completions.create(model="alpha", messages=hello, stream=stream)
                error = None
            except openai.APIError as raised_error:
                error = raised_error
        assert isinstance(error, kind), (
            f"RefusedError({status}) must reach the client as status {status}, {'streamed' if stream else 'not streamed'}; it raised "
            f"{error!r}"
        )
        assert "come back later" in error.message, (
            f"Hand on the text of the RefusedError; the client reads {error.message!r}"
        )
### BEGIN HIDDEN TESTS
_echo = Echo(RefusedError(429, "full"))
with serving(make_app(_echo)) as _server, httpx.Client(base_url=_server.url, trust_env=False) as _http:
    _answer = _http.post("/v1/chat/completions", json={"model": "alpha", "messages": hello})
    assert _answer.headers.get("retry-after") == "1", "A refusal says when to come back: use failure"
    _answer = _http.post("/v1/chat/completions", json={"model": "nope", "messages": hello, "max_tokens": 99})
    assert _answer.status_code == 400, "Limits come first, then the model"
    _answer = _http.post("/v1/chat/completions", json={"model": "nope", "messages": hello, "max_tokens": 64})
    assert _answer.status_code == 404, "Then the model, then the length"
### END HIDDEN TESTS


# %% mistake="leaves FastAPI's 422" of="chat-endpoint" says="FastAPI's own 422"
def make_app(service):
    Text = Annotated[str, Field(min_length=1, max_length=64)]

    class Message(BaseModel, extra="forbid"):
        role: Literal["system", "user", "assistant"]
        content: str = Field(min_length=1, max_length=4000)

    class Body(BaseModel, extra="forbid"):
        model: str
        messages: list[Message] = Field(min_length=1, max_length=8)
        max_tokens: int = Field(32, ge=1, le=64)
        temperature: float = Field(0, ge=0, le=0)
        stream: bool = False
        stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None

    app = base_app(service)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: Body):
        if body.model not in service.models:
            return failure(404, f"no model {body.model}", param="model", code="model_not_found")
        messages = [one.model_dump() for one in body.messages]
        n = service.count(messages)
        if n + body.max_tokens > service.context:
            says = f"{n + body.max_tokens} > {service.context}"
            return failure(400, says, param="messages", code="context_length_exceeded")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        if body.stream:
            events = await service.stream(body.model, messages, body.max_tokens, stop)
            return StreamingResponse(events, media_type="text/event-stream")
        reply = await service.complete(body.model, messages, body.max_tokens, stop)
        message = {"role": "assistant", "content": reply.text}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish}
        usage = {"prompt_tokens": n, "completion_tokens": reply.tokens, "total_tokens": n + reply.tokens}
        return {
            "id": "c",
            "object": "chat.completion",
            "created": 0,
            "model": body.model,
            "choices": [choice],
            "usage": usage,
        }

    return app


# %% mistake="a detail in place of an error" of="chat-endpoint" says="The client reads the object under 'error'"
def make_app(service):
    Text = Annotated[str, Field(min_length=1, max_length=64)]

    class Message(BaseModel, extra="forbid"):
        role: Literal["system", "user", "assistant"]
        content: str = Field(min_length=1, max_length=4000)

    class Body(BaseModel, extra="forbid"):
        model: str
        messages: list[Message] = Field(min_length=1, max_length=8)
        max_tokens: int = Field(32, ge=1, le=64)
        temperature: float = Field(0, ge=0, le=0)
        stream: bool = False
        stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None

    app = base_app(service)

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        return JSONResponse({"detail": error.errors()[0]["msg"]}, 400)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: Body):
        if body.model not in service.models:
            return failure(404, f"no model {body.model}", param="model", code="model_not_found")
        messages = [one.model_dump() for one in body.messages]
        n = service.count(messages)
        if n + body.max_tokens > service.context:
            says = f"{n + body.max_tokens} > {service.context}"
            return failure(400, says, param="messages", code="context_length_exceeded")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        if body.stream:
            events = await service.stream(body.model, messages, body.max_tokens, stop)
            return StreamingResponse(events, media_type="text/event-stream")
        reply = await service.complete(body.model, messages, body.max_tokens, stop)
        message = {"role": "assistant", "content": reply.text}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish}
        usage = {"prompt_tokens": n, "completion_tokens": reply.tokens, "total_tokens": n + reply.tokens}
        return {
            "id": "c",
            "object": "chat.completion",
            "created": 0,
            "model": body.model,
            "choices": [choice],
            "usage": usage,
        }

    return app


# %% mistake="ignores unknown fields" of="chat-endpoint" says="is not allowed by the table, and was answered"
def make_app(service):
    Text = Annotated[str, Field(min_length=1, max_length=64)]

    class Message(BaseModel, extra="forbid"):
        role: Literal["system", "user", "assistant"]
        content: str = Field(min_length=1, max_length=4000)

    class Body(BaseModel):
        model: str
        messages: list[Message] = Field(min_length=1, max_length=8)
        max_tokens: int = Field(32, ge=1, le=64)
        temperature: float = Field(0, ge=0, le=0)
        stream: bool = False
        stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None

    app = base_app(service)

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        where = error.errors()[0]["loc"][1:2]
        return failure(
            400, str(error.errors()[0]["msg"]), param=where[0] if where and isinstance(where[0], str) else None
        )

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: Body):
        if body.model not in service.models:
            return failure(404, f"no model {body.model}", param="model", code="model_not_found")
        messages = [one.model_dump() for one in body.messages]
        n = service.count(messages)
        if n + body.max_tokens > service.context:
            says = f"{n + body.max_tokens} > {service.context}"
            return failure(400, says, param="messages", code="context_length_exceeded")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        if body.stream:
            events = await service.stream(body.model, messages, body.max_tokens, stop)
            return StreamingResponse(events, media_type="text/event-stream")
        reply = await service.complete(body.model, messages, body.max_tokens, stop)
        message = {"role": "assistant", "content": reply.text}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish}
        usage = {"prompt_tokens": n, "completion_tokens": reply.tokens, "total_tokens": n + reply.tokens}
        return {
            "id": "c",
            "object": "chat.completion",
            "created": 0,
            "model": body.model,
            "choices": [choice],
            "usage": usage,
        }

    return app


# %% mistake="names the innermost place" of="chat-endpoint" says="the outermost field"
def make_app(service):
    Text = Annotated[str, Field(min_length=1, max_length=64)]

    class Message(BaseModel, extra="forbid"):
        role: Literal["system", "user", "assistant"]
        content: str = Field(min_length=1, max_length=4000)

    class Body(BaseModel, extra="forbid"):
        model: str
        messages: list[Message] = Field(min_length=1, max_length=8)
        max_tokens: int = Field(32, ge=1, le=64)
        temperature: float = Field(0, ge=0, le=0)
        stream: bool = False
        stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None

    app = base_app(service)

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        where = error.errors()[0]["loc"][-1:]
        return failure(
            400, str(error.errors()[0]["msg"]), param=where[0] if where and isinstance(where[0], str) else None
        )

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: Body):
        if body.model not in service.models:
            return failure(404, f"no model {body.model}", param="model", code="model_not_found")
        messages = [one.model_dump() for one in body.messages]
        n = service.count(messages)
        if n + body.max_tokens > service.context:
            says = f"{n + body.max_tokens} > {service.context}"
            return failure(400, says, param="messages", code="context_length_exceeded")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        if body.stream:
            events = await service.stream(body.model, messages, body.max_tokens, stop)
            return StreamingResponse(events, media_type="text/event-stream")
        reply = await service.complete(body.model, messages, body.max_tokens, stop)
        message = {"role": "assistant", "content": reply.text}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish}
        usage = {"prompt_tokens": n, "completion_tokens": reply.tokens, "total_tokens": n + reply.tokens}
        return {
            "id": "c",
            "object": "chat.completion",
            "created": 0,
            "model": body.model,
            "choices": [choice],
            "usage": usage,
        }

    return app


# %% mistake="counts the prompt alone" of="chat-endpoint" says="count prompt and max_tokens"
def make_app(service):
    Text = Annotated[str, Field(min_length=1, max_length=64)]

    class Message(BaseModel, extra="forbid"):
        role: Literal["system", "user", "assistant"]
        content: str = Field(min_length=1, max_length=4000)

    class Body(BaseModel, extra="forbid"):
        model: str
        messages: list[Message] = Field(min_length=1, max_length=8)
        max_tokens: int = Field(32, ge=1, le=64)
        temperature: float = Field(0, ge=0, le=0)
        stream: bool = False
        stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None

    app = base_app(service)

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        where = error.errors()[0]["loc"][1:2]
        return failure(
            400, str(error.errors()[0]["msg"]), param=where[0] if where and isinstance(where[0], str) else None
        )

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: Body):
        if body.model not in service.models:
            return failure(404, f"no model {body.model}", param="model", code="model_not_found")
        messages = [one.model_dump() for one in body.messages]
        n = service.count(messages)
        if n > service.context:
            says = f"{n + body.max_tokens} > {service.context}"
            return failure(400, says, param="messages", code="context_length_exceeded")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        if body.stream:
            events = await service.stream(body.model, messages, body.max_tokens, stop)
            return StreamingResponse(events, media_type="text/event-stream")
        reply = await service.complete(body.model, messages, body.max_tokens, stop)
        message = {"role": "assistant", "content": reply.text}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish}
        usage = {"prompt_tokens": n, "completion_tokens": reply.tokens, "total_tokens": n + reply.tokens}
        return {
            "id": "c",
            "object": "chat.completion",
            "created": 0,
            "model": body.model,
            "choices": [choice],
            "usage": usage,
        }

    return app


# %% mistake="400 for an unknown model" of="chat-endpoint" says="A model that does not exist is 404"
def make_app(service):
    Text = Annotated[str, Field(min_length=1, max_length=64)]

    class Message(BaseModel, extra="forbid"):
        role: Literal["system", "user", "assistant"]
        content: str = Field(min_length=1, max_length=4000)

    class Body(BaseModel, extra="forbid"):
        model: str
        messages: list[Message] = Field(min_length=1, max_length=8)
        max_tokens: int = Field(32, ge=1, le=64)
        temperature: float = Field(0, ge=0, le=0)
        stream: bool = False
        stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None

    app = base_app(service)

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        where = error.errors()[0]["loc"][1:2]
        return failure(
            400, str(error.errors()[0]["msg"]), param=where[0] if where and isinstance(where[0], str) else None
        )

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: Body):
        if body.model not in service.models:
            return failure(400, f"no model {body.model}", param="model", code="model_not_found")
        messages = [one.model_dump() for one in body.messages]
        n = service.count(messages)
        if n + body.max_tokens > service.context:
            says = f"{n + body.max_tokens} > {service.context}"
            return failure(400, says, param="messages", code="context_length_exceeded")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        if body.stream:
            events = await service.stream(body.model, messages, body.max_tokens, stop)
            return StreamingResponse(events, media_type="text/event-stream")
        reply = await service.complete(body.model, messages, body.max_tokens, stop)
        message = {"role": "assistant", "content": reply.text}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish}
        usage = {"prompt_tokens": n, "completion_tokens": reply.tokens, "total_tokens": n + reply.tokens}
        return {
            "id": "c",
            "object": "chat.completion",
            "created": 0,
            "model": body.model,
            "choices": [choice],
            "usage": usage,
        }

    return app


# %% mistake="opens the stream before it is accepted" of="chat-endpoint" says="must reach the client as status 429, streamed"
def make_app(service):
    Text = Annotated[str, Field(min_length=1, max_length=64)]

    class Message(BaseModel, extra="forbid"):
        role: Literal["system", "user", "assistant"]
        content: str = Field(min_length=1, max_length=4000)

    class Body(BaseModel, extra="forbid"):
        model: str
        messages: list[Message] = Field(min_length=1, max_length=8)
        max_tokens: int = Field(32, ge=1, le=64)
        temperature: float = Field(0, ge=0, le=0)
        stream: bool = False
        stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None

    app = base_app(service)

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        where = error.errors()[0]["loc"][1:2]
        return failure(
            400, str(error.errors()[0]["msg"]), param=where[0] if where and isinstance(where[0], str) else None
        )

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: Body):
        if body.model not in service.models:
            return failure(404, f"no model {body.model}", param="model", code="model_not_found")
        messages = [one.model_dump() for one in body.messages]
        n = service.count(messages)
        if n + body.max_tokens > service.context:
            says = f"{n + body.max_tokens} > {service.context}"
            return failure(400, says, param="messages", code="context_length_exceeded")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        if body.stream:

            async def later():
                async for event in await service.stream(body.model, messages, body.max_tokens, stop):
                    yield event

            return StreamingResponse(later(), media_type="text/event-stream")
        reply = await service.complete(body.model, messages, body.max_tokens, stop)
        message = {"role": "assistant", "content": reply.text}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish}
        usage = {"prompt_tokens": n, "completion_tokens": reply.tokens, "total_tokens": n + reply.tokens}
        return {
            "id": "c",
            "object": "chat.completion",
            "created": 0,
            "model": body.model,
            "choices": [choice],
            "usage": usage,
        }

    return app


# %% mistake="no usage" of="chat-endpoint" says="The answer has a usage"
def make_app(service):
    Text = Annotated[str, Field(min_length=1, max_length=64)]

    class Message(BaseModel, extra="forbid"):
        role: Literal["system", "user", "assistant"]
        content: str = Field(min_length=1, max_length=4000)

    class Body(BaseModel, extra="forbid"):
        model: str
        messages: list[Message] = Field(min_length=1, max_length=8)
        max_tokens: int = Field(32, ge=1, le=64)
        temperature: float = Field(0, ge=0, le=0)
        stream: bool = False
        stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None

    app = base_app(service)

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        where = error.errors()[0]["loc"][1:2]
        return failure(
            400, str(error.errors()[0]["msg"]), param=where[0] if where and isinstance(where[0], str) else None
        )

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: Body):
        if body.model not in service.models:
            return failure(404, f"no model {body.model}", param="model", code="model_not_found")
        messages = [one.model_dump() for one in body.messages]
        n = service.count(messages)
        if n + body.max_tokens > service.context:
            says = f"{n + body.max_tokens} > {service.context}"
            return failure(400, says, param="messages", code="context_length_exceeded")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        if body.stream:
            events = await service.stream(body.model, messages, body.max_tokens, stop)
            return StreamingResponse(events, media_type="text/event-stream")
        reply = await service.complete(body.model, messages, body.max_tokens, stop)
        message = {"role": "assistant", "content": reply.text}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish}
        return {"id": "c", "object": "chat.completion", "created": 0, "model": body.model, "choices": [choice]}

    return app


# %% mistake="converts types" of="chat-endpoint" says="a type is converted"
def make_app(service):
    Text = Annotated[str, Field(min_length=1, max_length=64)]

    class Message(BaseModel, extra="forbid"):
        role: Literal["system", "user", "assistant"]
        content: str = Field(min_length=1, max_length=4000)

    class Body(BaseModel, extra="forbid"):
        model: str
        messages: list[Message] = Field(min_length=1, max_length=8)
        max_tokens: int = Field(32, ge=1, le=64)
        temperature: float = Field(0, ge=0, le=0)
        stream: bool = False
        stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None

    app = base_app(service)

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        where = error.errors()[0]["loc"][1:2]
        return failure(
            400, str(error.errors()[0]["msg"]), param=where[0] if where and isinstance(where[0], str) else None
        )

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: Body):
        if body.model not in service.models:
            return failure(404, f"no model {body.model}", param="model", code="model_not_found")
        messages = [one.model_dump() for one in body.messages]
        n = service.count(messages)
        if n + body.max_tokens > service.context:
            says = f"{n + body.max_tokens} > {service.context}"
            return failure(400, says, param="messages", code="context_length_exceeded")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        if body.stream:
            events = await service.stream(body.model, messages, body.max_tokens, stop)
            return StreamingResponse(events, media_type="text/event-stream")
        reply = await service.complete(body.model, messages, body.max_tokens, stop)
        message = {"role": "assistant", "content": reply.text}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish}
        usage = {"prompt_tokens": n, "completion_tokens": reply.tokens, "total_tokens": n + reply.tokens}
        return {
            "id": "c",
            "object": "chat.completion",
            "created": 0,
            "model": body.model,
            "choices": [choice],
            "usage": usage,
        }

    return app


# %% mistake="a temperature below zero" of="chat-endpoint" says="'temperature': -0.5"
def make_app(service):
    Text = Annotated[str, Field(min_length=1, max_length=64)]

    class Message(BaseModel, extra="forbid", strict=True):
        role: Literal["system", "user", "assistant"]
        content: str = Field(min_length=1, max_length=4000)

    class Body(BaseModel, extra="forbid", strict=True):
        model: str
        messages: list[Message] = Field(min_length=1, max_length=8)
        max_tokens: int = Field(32, ge=1, le=64)
        temperature: float = Field(0, le=0)
        stream: bool = False
        stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None

    app = base_app(service)

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        where = error.errors()[0]["loc"][1:2]
        return failure(
            400, str(error.errors()[0]["msg"]), param=where[0] if where and isinstance(where[0], str) else None
        )

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: Body):
        if body.model not in service.models:
            return failure(404, f"no model {body.model}", param="model", code="model_not_found")
        messages = [one.model_dump() for one in body.messages]
        n = service.count(messages)
        if n + body.max_tokens > service.context:
            says = f"{n + body.max_tokens} > {service.context}"
            return failure(400, says, param="messages", code="context_length_exceeded")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        if body.stream:
            events = await service.stream(body.model, messages, body.max_tokens, stop)
            return StreamingResponse(events, media_type="text/event-stream")
        reply = await service.complete(body.model, messages, body.max_tokens, stop)
        message = {"role": "assistant", "content": reply.text}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish}
        usage = {"prompt_tokens": n, "completion_tokens": reply.tokens, "total_tokens": n + reply.tokens}
        return {
            "id": "c",
            "object": "chat.completion",
            "created": 0,
            "model": body.model,
            "choices": [choice],
            "usage": usage,
        }

    return app


# %% mistake="leaves created out" of="chat-endpoint" says="created is 0"
def make_app(service):
    Text = Annotated[str, Field(min_length=1, max_length=64)]

    class Message(BaseModel, extra="forbid", strict=True):
        role: Literal["system", "user", "assistant"]
        content: str = Field(min_length=1, max_length=4000)

    class Body(BaseModel, extra="forbid", strict=True):
        model: str
        messages: list[Message] = Field(min_length=1, max_length=8)
        max_tokens: int = Field(32, ge=1, le=64)
        temperature: float = Field(0, ge=0, le=0)
        stream: bool = False
        stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None

    app = base_app(service)

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        where = error.errors()[0]["loc"][1:2]
        return failure(
            400, str(error.errors()[0]["msg"]), param=where[0] if where and isinstance(where[0], str) else None
        )

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: Body):
        if body.model not in service.models:
            return failure(404, f"no model {body.model}", param="model", code="model_not_found")
        messages = [one.model_dump() for one in body.messages]
        n = service.count(messages)
        if n + body.max_tokens > service.context:
            says = f"{n + body.max_tokens} > {service.context}"
            return failure(400, says, param="messages", code="context_length_exceeded")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        if body.stream:
            events = await service.stream(body.model, messages, body.max_tokens, stop)
            return StreamingResponse(events, media_type="text/event-stream")
        reply = await service.complete(body.model, messages, body.max_tokens, stop)
        message = {"role": "assistant", "content": reply.text}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish}
        usage = {"prompt_tokens": n, "completion_tokens": reply.tokens, "total_tokens": n + reply.tokens}
        return {
            "id": "c",
            "object": "chat.completion",
            "model": body.model,
            "choices": [choice],
            "usage": usage,
        }

    return app


# %% mistake="always says length" of="chat-endpoint" says="finish reason on, each time"
def make_app(service):
    Text = Annotated[str, Field(min_length=1, max_length=64)]

    class Message(BaseModel, extra="forbid", strict=True):
        role: Literal["system", "user", "assistant"]
        content: str = Field(min_length=1, max_length=4000)

    class Body(BaseModel, extra="forbid", strict=True):
        model: str
        messages: list[Message] = Field(min_length=1, max_length=8)
        max_tokens: int = Field(32, ge=1, le=64)
        temperature: float = Field(0, ge=0, le=0)
        stream: bool = False
        stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None

    app = base_app(service)

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        where = error.errors()[0]["loc"][1:2]
        return failure(
            400, str(error.errors()[0]["msg"]), param=where[0] if where and isinstance(where[0], str) else None
        )

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: Body):
        if body.model not in service.models:
            return failure(404, f"no model {body.model}", param="model", code="model_not_found")
        messages = [one.model_dump() for one in body.messages]
        n = service.count(messages)
        if n + body.max_tokens > service.context:
            says = f"{n + body.max_tokens} > {service.context}"
            return failure(400, says, param="messages", code="context_length_exceeded")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        if body.stream:
            events = await service.stream(body.model, messages, body.max_tokens, stop)
            return StreamingResponse(events, media_type="text/event-stream")
        reply = await service.complete(body.model, messages, body.max_tokens, stop)
        message = {"role": "assistant", "content": reply.text}
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        usage = {"prompt_tokens": n, "completion_tokens": reply.tokens, "total_tokens": n + reply.tokens}
        return {
            "id": "c",
            "object": "chat.completion",
            "created": 0,
            "model": body.model,
            "choices": [choice],
            "usage": usage,
        }

    return app


# %% alternative="checked by hand, one handler" of="chat-endpoint"
def make_app(service):
    app = base_app(service)

    class BadError(Exception):
        def __init__(self, status, message, param=None, code=None):
            self.all = {"status": status, "message": message, "param": param, "code": code}

    def need(right, param, message):
        if not right:
            raise BadError(400, f"{param}: {message}", param)

    def whole(value):
        return isinstance(value, int) and not isinstance(value, bool)

    def stop_text(value):
        return isinstance(value, str) and 1 <= len(value) <= 64

    @app.exception_handler(BadError)
    async def bad(request, error):
        return failure(**error.all)

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        try:
            body = json.loads(await request.body())
        except ValueError:
            raise BadError(400, "no JSON") from None
        if not isinstance(body, dict):
            raise BadError(400, "no object")
        for key in body:
            need(key in ("model", "messages", "max_tokens", "temperature", "stream", "stop"), key, "unknown")
        model, messages, most = body.get("model"), body.get("messages"), body.get("max_tokens", 32)
        need(isinstance(model, str), "model", "a string")
        need(isinstance(messages, list) and 1 <= len(messages) <= 8, "messages", "1 to 8")
        for one in messages:
            need(isinstance(one, dict) and set(one) == {"role", "content"}, "messages", "role and content")
            need(one["role"] in ("system", "user", "assistant"), "messages", "role")
            need(isinstance(one["content"], str) and 1 <= len(one["content"]) <= 4000, "messages", "content")
        need(whole(most) and 1 <= most <= 64, "max_tokens", "1 to 64")
        need(body.get("temperature", 0) == 0, "temperature", "0")
        need(isinstance(body.get("stream", False), bool), "stream", "a boolean")
        stop = body.get("stop")
        stop = () if stop is None else (stop,) if isinstance(stop, str) else stop
        need(isinstance(stop, (list, tuple)) and len(stop) <= 4 and all(map(stop_text, stop)), "stop", "texts")
        if model not in service.models:
            raise BadError(404, f"no model {model}", "model", "model_not_found")
        n = service.count(messages)
        if n + most > service.context:
            raise BadError(400, f"{n + most} > {service.context}", "messages", "context_length_exceeded")
        given = (model, messages, most, tuple(stop))
        if body.get("stream"):
            return StreamingResponse(await service.stream(*given), media_type="text/event-stream")
        reply = await service.complete(*given)
        message = {"role": "assistant", "content": reply.text}
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": model,
            "choices": [{"index": 0, "message": message, "finish_reason": reply.finish}],
            "usage": {"prompt_tokens": n, "completion_tokens": reply.tokens, "total_tokens": n + reply.tokens},
        }

    return app


# %% [markdown]
# ## The queue, on paper
#
# One batch runs at a time. While it runs, requests arrive and wait. *Dynamic batching* is two numbers: at most `limit` requests go together, and the oldest request waits at most `wait` seconds for company. A batch begins as soon as
#
# - the model is free, **and**
# - `limit` requests are waiting, **or** the oldest of those waiting arrived `wait` seconds ago.
#
# It takes the oldest `limit` of those that have arrived by then (at that very moment included), and its requests finish together, `service(b)` seconds later for a batch of `b`. Nobody knows the future: the last request waits for its `wait` as well.
#
# Because every event follows from those before it, the queue of given arrivals can be computed exactly. Service takes {{service_one}} s for one request and {{service_sixteen}} s for sixteen in what follows: $s(b) = 0.09 + 0.023\,b$, what `reply_together` takes on one core of the author's machine, rounded.
#
# **Exercise.** Write `simulate(arrivals, service, limit, wait)`. `arrivals` are ascending seconds from 0 on (a list or an array; don't change it; experiments hand over 10,000, so go through them once), `service` a function from the size of a batch to seconds. Return `(finished, sizes)`: when each request finishes, in the order of the arrivals, and the size of each batch, in order. For no arrivals both are empty.
#
# With arrivals 0, 1, 2, 3.5, 10.5, `service = lambda b: 2 + b`, `limit=2` and `wait=0`, `finished` is 3, 7, 7, 10, 13.5 and `sizes` is 1, 2, 1, 1. With `wait=5` it's 5, 5, 9, 9, 18.5 and 2, 2, 1. *About 12 lines.*
#
# <details><summary>Hint 1</summary>Follow the model, not the clock: it's free at some time, and the oldest request that isn't done is number i. When does the next batch begin?</details>
# <details><summary>Hint 2</summary>Three times: when the model is free; when the oldest has waited enough; when request number i + limit − 1 arrives, if there is one. Which is a maximum, which a minimum?</details>
# <details><summary>Hint 3</summary>start = max(free, min(arrivals[i] + wait, arrivals[i + limit − 1] or infinity)); the batch is i, i + 1, … while they arrived by start and are at most limit; free = start + service(size).</details>


# %% exercise="simulate" difficulty=3 minutes=10
def simulate(
    arrivals: Sequence[float], service: Callable[[int], float], limit: int, wait: float
) -> tuple[Sequence[float], Sequence[int]]:
    """When each request finishes, and the sizes of the batches, under dynamic batching."""
    ### BEGIN SOLUTION
    finished: list[float] = []
    sizes: list[int] = []
    free, first, n = 0.0, 0, len(arrivals)
    while first < n:
        full = arrivals[first + limit - 1] if first + limit <= n else inf
        start = max(free, min(arrivals[first] + wait, full))
        size = 1
        while size < limit and first + size < n and arrivals[first + size] <= start:
            size += 1
        free = start + service(size)
        finished += [free] * size
        sizes.append(size)
        first += size
    return finished, sizes
    ### END SOLUTION


# %% check="simulate" points=2
def both(found: tuple) -> tuple[list[float], list[int]]:
    assert isinstance(found, (tuple, list)), f"Return (finished, sizes); yours is a {type(found).__name__}"
    assert len(found) == 2, f"Return (finished, sizes); yours has {len(found)} parts"
    return [round(float(time), 9) for time in found[0]], [int(size) for size in found[1]]


given = [0, 1, 2, 3.5, 10.5]
got, sizes = both(simulate(given, lambda b: 2 + b, 2, 0))
assert given == [0, 1, 2, 3.5, 10.5], "Leave the arrivals as they are: the next setting is simulated on the same ones"
assert max(sizes, default=0) <= 2, f"At most limit = 2 requests go together; your batches are {sizes}"
assert sizes[:1] == [1], (
    "At time 0 nobody but the first request has arrived, and with wait 0 it goes alone: a batch holds only what has arrived by "
    f"its start; your batches are {sizes}"
)
assert sizes == [1, 2, 1, 1], f"The batches are 1, 2, 1, 1; yours are {sizes}"
assert got == [3, 7, 7, 10, 13.5], (
    f"finished is 3, 7, 7, 10, 13.5: a batch of b takes service(b), and its requests finish together; yours is {got}"
)
got, sizes = both(simulate(given, lambda b: 2 + b, 2, 5))
assert got[:2] == [5, 5], (
    f"The batch is full when the second request arrives, at 1, and starts then: 5, 5; yours finish at {got[:2]}"
)
assert got[4:] == [18.5], (
    f"The last request waits for its 5 seconds, since nobody knows that no other comes: 15.5 + 3; yours finishes at {got[4:]}"
)
assert (got, sizes) == ([5, 5, 9, 9, 18.5], [2, 2, 1]), (
    f"Wanted 5, 5, 9, 9, 18.5 and 2, 2, 1; yours are {got} and {sizes}"
)
try:
    got, sizes = both(simulate(np.array(given), lambda b: 2 + b, 2, 5))
except ValueError as error:
    raise AssertionError(f"The arrivals may be an array, which has a len() but no truth: {error}") from error
assert got == [5, 5, 9, 9, 18.5], f"From an array the same as from a list: 5, 5, 9, 9, 18.5; yours are {got}"
got, sizes = both(simulate([0, 1, 3], lambda b: 2 + b, 4, 0))
assert sizes == [1, 2], f"What arrives at the very start of a batch (3) goes with it: sizes 1, 2; yours are {sizes}"
got, sizes = both(simulate(given, lambda b: 2 + b, 3, 2))
assert got[3] == 10, (
    "The wait counts from the arrival: the fourth request came at 3.5 and has waited enough when the model is free at 7, so it "
    f"finishes at 10; yours at {got[3]}"
)
assert (got, sizes) == ([7, 7, 7, 10, 15.5], [3, 1, 1]), (
    f"Wanted 7, 7, 7, 10, 15.5 and 3, 1, 1; yours are {got} and {sizes}"
)
### BEGIN HIDDEN TESTS
assert both(simulate([], lambda b: 1.0, 3, 1)) == ([], []), "No arrivals, nothing finishes"
assert both(simulate([4.0], lambda b: 1.0, 3, 0.5)) == ([5.5], [1]), "One request waits for its wait"
_got = both(simulate(np.zeros(7), lambda b: float(b), 3, 9))
assert _got == ([3, 3, 3, 6, 6, 6, 10], [3, 3, 1]), (
    f"Seven at once, limit 3, wait 9: the last waits until 9; yours: {_got}"
)
### END HIDDEN TESTS

# %% check="simulate" points=1
poisson = np.cumsum(np.random.default_rng(7).exponential(1.0, 4000))
got, sizes = both(simulate(poisson.tolist(), lambda b: 0.8, 1, 0.0))
lindley = 0.8 * np.arange(1, 4001) + np.maximum.accumulate(poisson - 0.8 * np.arange(4000))  # exact for single service
assert np.allclose(got, lindley, atol=1e-6), (
    "With limit 1 each request starts when it has come and the one before is done"
)
got, sizes = both(simulate(poisson.tolist(), lambda b: 4.0 + b, 8, 0.0))
assert sum(sizes) == len(got) == 4000, "Every request is in one batch, and finishes once"
assert np.mean(np.array(sizes) == 8) > 0.97, (
    "At 1 request a second and 8 in 12 seconds the queue grows, so all but the first batches are full; "
    f"{np.mean(np.array(sizes) == 8):.0%} of yours are"
)
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(11)
for _limit, _wait in ((1, 0.7), (3, 0.0), (5, 1.3), (64, 4.0)):
    _arrivals = np.cumsum(_rng.exponential(0.4, 300)).tolist()
    _got, _sizes = simulate(_arrivals, lambda b: 0.5 + 0.1 * b, _limit, _wait)
    _ends = np.cumsum(_sizes)
    assert _ends[-1] == 300, "Every request is in one batch"
    assert max(_sizes) <= _limit, f"At most {_limit} go together; yours: {max(_sizes)}"
    _free = 0.0
    for _end, _size in zip(_ends, _sizes, strict=True):
        _start = _got[_end - 1] - 0.5 - 0.1 * _size
        assert all(abs(_got[_i] - _got[_end - 1]) < 1e-9 for _i in range(_end - _size, _end)), (
            "A batch finishes together"
        )
        assert _start >= max(_free, _arrivals[_end - 1]) - 1e-9, "A batch starts when free, with what has come"
        _due = _arrivals[_end - _size] + _wait
        if _size == _limit:
            _due = min(_due, _arrivals[_end - 1])
        assert abs(_start - max(_free, _due)) < 1e-9, (
            f"limit {_limit}, wait {_wait}: a batch starts as soon as the rules allow"
        )
        _free = _got[_end - 1]
### END HIDDEN TESTS


# %% mistake="waits from when it is free" of="simulate" says="The wait counts from the arrival"
def simulate(arrivals, service, limit, wait):
    finished, sizes, free, i = [], [], 0.0, 0
    while i < len(arrivals):
        full = arrivals[i + limit - 1] if i + limit <= len(arrivals) else inf
        picked = max(free, arrivals[i])
        start = max(picked, min(picked + wait, full))
        b = sum(a <= start for a in arrivals[i : i + limit])
        free = start + service(b)
        finished += [free] * b
        sizes.append(b)
        i += b
    return finished, sizes


# %% mistake="waits although the batch is full" of="simulate" says="The batch is full when the second request arrives"
def simulate(arrivals, service, limit, wait):
    finished, sizes, free, i = [], [], 0.0, 0
    while i < len(arrivals):
        start = max(free, arrivals[i] + wait)
        b = sum(a <= start for a in arrivals[i : i + limit])
        free = start + service(b)
        finished += [free] * b
        sizes.append(b)
        i += b
    return finished, sizes


# %% mistake="sees the future" of="simulate" says="a batch holds only what has arrived"
def simulate(arrivals, service, limit, wait):
    finished, sizes, free, i = [], [], 0.0, 0
    while i < len(arrivals):
        b = min(limit, len(arrivals) - i)
        free = max(free, min(arrivals[i] + wait, arrivals[i + b - 1])) + service(b)
        finished += [free] * b
        sizes.append(b)
        i += b
    return finished, sizes


# %% mistake="knows that nobody comes any more" of="simulate" says="nobody knows that no other comes"
def simulate(arrivals, service, limit, wait):
    finished, sizes, free, i = [], [], 0.0, 0
    while i < len(arrivals):
        full = arrivals[min(i + limit, len(arrivals)) - 1]
        start = max(free, min(arrivals[i] + wait, full))
        b = sum(a <= start for a in arrivals[i : i + limit])
        free = start + service(b)
        finished += [free] * b
        sizes.append(b)
        i += b
    return finished, sizes


# %% mistake="every batch costs a full one" of="simulate" says="a batch of b takes service(b)"
def simulate(arrivals, service, limit, wait):
    finished, sizes, free, i = [], [], 0.0, 0
    while i < len(arrivals):
        full = arrivals[i + limit - 1] if i + limit <= len(arrivals) else inf
        start = max(free, min(arrivals[i] + wait, full))
        b = sum(a <= start for a in arrivals[i : i + limit])
        free = start + service(1)
        finished += [free] * b
        sizes.append(b)
        i += b
    return finished, sizes


# %% mistake="what arrives at the start is too late" of="simulate" says="What arrives at the very start"
def simulate(arrivals, service, limit, wait):
    finished, sizes, free, i = [], [], 0.0, 0
    while i < len(arrivals):
        full = arrivals[i + limit - 1] if i + limit <= len(arrivals) else inf
        start = max(free, min(arrivals[i] + wait, full))
        b = (
            limit
            if full <= start and arrivals[i] + wait > start
            else max(1, sum(a < start for a in arrivals[i : i + limit]))
        )
        free = start + service(b)
        finished += [free] * b
        sizes.append(b)
        i += b
    return finished, sizes


# %% mistake="eats the arrivals" of="simulate" says="Leave the arrivals as they are"
def simulate(arrivals, service, limit, wait):
    finished, sizes, free = [], [], 0.0
    while len(arrivals):
        full = arrivals[limit - 1] if limit <= len(arrivals) else inf
        start = max(free, min(arrivals[0] + wait, full))
        b = sum(a <= start for a in arrivals[:limit])
        free = start + service(b)
        finished += [free] * b
        sizes.append(b)
        del arrivals[:b]
    return finished, sizes


# %% mistake="asks an array whether it is true" of="simulate" says="a len() but no truth"
def simulate(arrivals, service, limit, wait):
    if not arrivals:
        return [], []
    finished, sizes, free, i, n = [], [], 0.0, 0, len(arrivals)
    while i < n:
        full = arrivals[i + limit - 1] if i + limit <= n else inf
        start = max(free, min(arrivals[i] + wait, full))
        b = sum(arrivals[j] <= start for j in range(i, min(i + limit, n)))
        free = start + service(b)
        finished, sizes, i = finished + [free] * b, [*sizes, b], i + b
    return finished, sizes


# %% alternative="event by event" of="simulate"
def simulate(arrivals, service, limit, wait):
    todo = deque(enumerate(float(a) for a in arrivals))
    finished, sizes, queue, now, free = np.zeros(len(arrivals)), [], deque(), 0.0, 0.0
    while todo or queue:
        while todo and todo[0][1] <= now:
            queue.append(todo.popleft())
        ready = queue and now >= free and (len(queue) >= limit or now >= queue[0][1] + wait)
        if ready:
            batch = [queue.popleft()[0] for _ in range(min(limit, len(queue)))]
            free = now + service(len(batch))
            finished[batch] = free
            sizes.append(len(batch))
            continue
        following = [todo[0][1]] if todo else []
        if queue:
            following += [at for at in (free, queue[0][1] + wait) if at > now]
        now = min(following)
    return finished, sizes


# %% [markdown]
# First against theory. With `limit=1`, Poisson arrivals and a fixed service time this is the queue M/D/1, and the Pollaczek-Khinchine formula gives the mean time in the queue: with $\rho = \lambda s$, the share of time that the model is busy, it's $\frac{\rho\, s}{2(1-\rho)}$.

# %%
SERVICE_FIXED, SERVICE_ROW = 0.09, 0.023


def service(b: int) -> float:
    """Seconds of a batch of b requests."""
    return SERVICE_FIXED + SERVICE_ROW * b


def arrivals_at(rate: float, n: int, seed: int) -> np.ndarray:
    """n Poisson arrivals at a rate a second; another rate stretches the same arrivals."""
    return np.cumsum(np.random.default_rng(seed).exponential(1.0, n)) / rate


def p95(arrivals: np.ndarray, finished: Sequence[float]) -> float:
    return float(np.quantile(np.asarray(finished) - arrivals, 0.95, method="inverted_cdf"))


rows = []
for rho in (0.5, 0.8, 0.9):
    rate = rho / service(1)
    waits = []
    for seed in range(4 * runs):
        arrivals = arrivals_at(rate, horizon, seed)
        waits.append(np.mean(np.asarray(simulate(arrivals.tolist(), service, 1, 0.0)[0]) - arrivals) - service(1))
    half = 2 * np.std(waits, ddof=1) / len(waits) ** 0.5
    rows.append((rho, rho * service(1) / (2 * (1 - rho)), np.mean(waits), half))
display(
    pd.DataFrame(
        [(f"{r:.0%}", f"{t:.3f} s", f"{m:.3f} s ± {h:.3f}") for r, t, m, h in rows],
        columns=["busy", "waiting, Pollaczek-Khinchine", "simulated"],
    ).style.hide(axis="index")
)
card.record("service_one", service(1), format=".2f", label="service time of one request, as set", unit="")
card.record("service_sixteen", service(16), format=".2f", label="service time of sixteen requests, as set", unit="")
card.record("pk_theory", rows[1][1], format=".3f", unit="s", label="mean wait at 80 % load, by formula")
card.record(
    "pk_simulated", rows[1][2], low=rows[1][2] - rows[1][3], high=rows[1][2] + rows[1][3], format=".3f", unit="s",
    label="mean wait at 80 % load, simulated",
)  # fmt: skip

# %% [markdown]
# Formula and simulation agree: at 80 % load {{pk_theory}} s by the formula, {{pk_simulated:interval}} s (two standard errors) simulated. Note the $1 - \rho$: between 80 and 90 % load the wait more than doubles. A latency without the load at which it was measured says nothing.
#
# Now batches. For each limit, the 95th percentile against the load; and, at a fixed load, against the wait.

# %%
LIMITS, SLO = (1, 2, 4, 8, 16, 32), 1.0


def simulated_p95(rate: float, limit: int, wait: float, seed: int) -> float:
    arrivals = arrivals_at(rate, horizon, seed)
    return p95(arrivals, simulate(arrivals.tolist(), service, limit, wait)[0])


def rate_within(limit: int, seed: int) -> float:
    """The highest rate at which the 95th percentile stays below the SLO."""
    low, high = 0.0, limit / service(limit)
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if simulated_p95(middle, limit, 0.0, seed) <= SLO else (low, middle)
    return low


within = {limit: [rate_within(limit, seed) for seed in range(runs)] for limit in LIMITS}
curves = {
    limit: [(rate, np.mean([simulated_p95(rate, limit, 0.0, seed) for seed in range(runs)]))
            for rate in np.linspace(0.06, 0.98, 16) * limit / service(limit)]
    for limit in LIMITS
}  # fmt: skip
fig, ax = plt.subplots(figsize=(7.4, 4.0))
shades = plt.get_cmap("Blues")(np.linspace(0.4, 1, len(LIMITS)))
for shade, (limit, curve) in zip(shades, curves.items(), strict=True):
    x, y = np.array(curve).T
    ax.plot(x, y, color=COLOURS.before if limit == 1 else shade)
    top = np.interp(np.log(2.9), np.log(y), x)  # where the curve leaves the axes
    ax.annotate(
        f"{limit}",
        (top, 2.98),
        color=COLOURS.before if limit == 1 else shade,
        fontweight="bold",
        ha="center",
        annotation_clip=False,
    )
ax.axhline(SLO, color=COLOURS.wrong, lw=1)
direct_label(ax, 0.3, SLO, "SLO", COLOURS.wrong)
ax.set(yscale="log", ylim=(0.15, 2.9), xlim=(0, 41), xlabel="requests a second", ylabel="95th percentile of latency, s")
ax.set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
ax.minorticks_off()
ax.set_title("Largest batch: the walls move, the floor stays", pad=24)
plt.show()

for name, limit in (("rate_single", 1), ("rate_batched", 16)):
    card.record(
        name, np.mean(within[limit]), low=min(within[limit]), high=max(within[limit]), format=".1f", unit="/s", tolerance=0.1,
        label=f"load with a 95th percentile of 1 s, batches of up to {limit}",
    )  # fmt: skip
card.record(
    "rate_most",
    np.mean(within[32]),
    low=min(within[32]),
    high=max(within[32]),
    format=".1f",
    unit="/s",
    tolerance=0.1,
    label="the same, batches of up to 32",
)

# %% [markdown]
# The number above a curve is its limit; everything here is simulated. Each curve follows the next one until its own batches are full: where requests are few, batches are small whatever the limit is. Each limit has a wall at its capacity $b / s(b)$, and a larger one moves the wall to the right; the load that keeps the SLO rises from {{rate_single}} to {{rate_batched}} a second for 16. At no load in the figure does a larger limit visibly cost latency, since a batch is full only when there was a queue. What bounds the limit at work is memory (the keys and values of every row) and returns that shrink: 32 brings {{rate_most}}.
#
# And the wait?

# %%
LOAD = 8.0
waits = np.array([0.0, 0.05, 0.1, 0.2, 0.4])
latency, busy = [], []
for wait in waits:
    found = []
    for seed in range(runs):
        arrivals = arrivals_at(LOAD, horizon, seed)
        finished, sizes = simulate(arrivals.tolist(), service, 16, float(wait))
        found.append((p95(arrivals, finished), sum(map(service, sizes)) / finished[-1]))
    latency.append(np.mean([a for a, _ in found]))
    busy.append(np.mean([b for _, b in found]))
fig, axes = plt.subplots(1, 2, figsize=(8.2, 3.2), sharex=True)
for ax, values, label, colour in zip(
    axes,
    (latency, busy),
    ("95th percentile, s", "share of time computing"),
    (COLOURS.after, COLOURS.other),
    strict=True,
):
    ax.plot(1000 * waits, values, "o-", color=colour)
    ax.set(xlabel="wait, ms", ylabel=label, ylim=(0, None))
axes[0].set_title(f"What a wait costs, at {LOAD:.0f} a second")
axes[1].set_title("What it saves")
plt.show()
for name, value, label in (
    ("wait_none_p95", latency[0], "95th percentile at 8 a second, no wait"),
    ("wait_some_p95", latency[2], "the same, a wait of 100 ms"),
    ("wait_long_p95", latency[4], "the same, a wait of 400 ms"),
):
    card.record(name, value, format=".2f", unit="s", tolerance=0.01, label=label)
card.record("wait_none_busy", busy[0], format=".0%", tolerance=0.01, label="time computing at 8 a second, no wait")
card.record("wait_some_busy", busy[2], format=".0%", tolerance=0.01, label="the same, a wait of 100 ms")

# %% [markdown]
# With a wait of 0 there are batches too: they form while the model is busy. A wait of 100 ms hardly changes the 95th percentile ({{wait_none_p95}} s becomes {{wait_some_p95}} s), and the model computes {{wait_some_busy}} of the time in place of {{wait_none_busy}}, since it makes larger batches. It saves computing, not latency: worth it if others share the GPU or you pay by use. A wait of 400 ms brings the 95th percentile to {{wait_long_p95}} s, and each of its later milliseconds saves less. A few milliseconds, a usual setting, would do next to nothing for a service time of a tenth of a second.
#
# ## The batcher
#
# Now the real thing, in asyncio: one task that owns the model, requests that await their futures. How do you test code whose behaviour is *time*? Not with sleeps: such a test is slow, and fails on a busy machine. `virtual_time.run(main)` runs an async function on a loop whose clock jumps to the next timer when nothing else is to do (`labkit/virtual_time.py`). `asyncio.sleep(60)` takes no time, and `loop.time()` is exact. If every task waits for something that never comes, or one goes round without ever waiting, you get a `StuckError` and not a hanging notebook; so the program may wait for timers and for its own tasks only, not for threads or sockets. (It starts a thread for that, because the loop of a notebook is already running.)
#
# **Exercise.** Complete `Batcher`. `run` is an async function from a list of items to the list of their results, in the same order. One batch runs at a time, by the rules of the section above; what is already waiting when a batch begins goes along, up to `limit`.
#
# - `submit(item)` isn't a coroutine: it puts the item into the queue and returns an `asyncio.Future` for its result. It raises `RefusedError(503, …)` once closing has begun, full or not, and `RefusedError(429, …)` when `room` items (1 or more) are waiting: those in the running batch don't count, those that wait for company do.
# - `work()` is the task that forms batches and runs them. If `run` raises an `Exception`, every request of that batch gets it, and the work goes on. A caller may give up (`asyncio.wait_for` cancels the future): whoever gave up before the batch began isn't run (nor is a batch of nobody), and whoever gives up during it harms nobody.
# - `close()` refuses new requests from then on, and returns when all that were accepted have been answered, in batches of at most `limit`, and `work` has ended. How long the last ones wait is up to you. It may be called twice, also at the same time, and each call returns no earlier.
#
# `__init__` is a proposal: `waiting` may hold what you like, and you may add attributes. The cell must be complete in itself but for `asyncio`, `deque`, `suppress`, `Awaitable`, `Callable` and `RefusedError`, since a program of its own will be made of it. *About 35 lines.*
#
# <details><summary>Hint 1</summary>work() has three states: nothing waits; something waits, but the batch may still grow; a batch runs. What ends each?</details>
# <details><summary>Hint 2</summary>An asyncio.Event that submit and close set: <code>event.clear()</code>, then <code>await event.wait()</code>, or <code>await asyncio.wait_for(event.wait(), left)</code> with suppress(TimeoutError), where left = arrival of the oldest + wait − loop.time(). Clear before you look, not after.</details>
# <details><summary>Hint 3</summary>while waiting or not closing: clear; left = None if nothing waits; if fewer than limit wait, not closing, and left is None or > 0: wait for news at most left, and look again. Otherwise take min(limit, len) from the left; drop those whose future.done(); try run / except Exception → set_exception, else set_result, each only if not future.done().</details>


# %% exercise="batcher" difficulty=4 minutes=16
class Batcher:
    """Runs requests in batches, one batch at a time; `async with` starts its task and closes it."""

    def __init__(self, run: Callable[[list], Awaitable[list]], limit: int, wait: float, room: int) -> None:
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.waiting: deque = deque()  # the oldest first
        self.news = asyncio.Event()
        self.closing = False

    async def __aenter__(self) -> "Batcher":
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def submit(self, item: object) -> asyncio.Future:
        """Queue an item; the future of its result."""
        ### BEGIN SOLUTION
        if self.closing:
            raise RefusedError(503, "the service is closing")
        if len(self.waiting) >= self.room:
            raise RefusedError(429, f"{self.room} requests are waiting already")
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self.waiting.append((loop.time(), item, future))
        self.news.set()
        return future
        ### END SOLUTION

    async def work(self) -> None:
        """Form batches and run them until closed and empty."""
        ### BEGIN SOLUTION
        clock = asyncio.get_running_loop().time
        while self.waiting or not self.closing:
            self.news.clear()
            left = self.waiting[0][0] + self.wait - clock() if self.waiting else None
            if len(self.waiting) < self.limit and not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                continue
            taken = [self.waiting.popleft() for _ in range(min(self.limit, len(self.waiting)))]
            batch = [(item, future) for _, item, future in taken if not future.done()]
            try:
                results = await self.run([item for item, _ in batch]) if batch else []
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), result in zip(batch, results, strict=True):
                    if not future.done():
                        future.set_result(result)
        ### END SOLUTION

    async def close(self) -> None:
        """Refuse new items; return when all accepted ones are answered."""
        ### BEGIN SOLUTION
        self.closing = True
        self.news.set()
        await self.worker
        ### END SOLUTION


# %% check="batcher" points=2
class Ran(NamedTuple):
    """What a batcher did: batches of items, when each began, and when each request was answered."""

    batches: list[list]
    began: list[float]
    answered: list[float]


def batched(arrivals: Sequence[float], service: Callable[[int], float], limit: int, wait: float) -> Ran:
    """Requests at these times, on the clock that jumps."""

    async def main() -> Ran:
        loop = asyncio.get_running_loop()
        batches, began, answered = [], [], [0.0] * len(arrivals)

        async def run(items: list) -> list:
            batches.append(list(items))
            began.append(loop.time())
            await asyncio.sleep(service(len(items)))
            return [10 * item for item in items]

        async def request(number: int) -> None:
            await asyncio.sleep(arrivals[number] - loop.time())
            future = batcher.submit(number)
            assert isinstance(future, asyncio.Future), (
                f"submit is no coroutine: it queues the item and returns a Future at once; yours returned a {type(future).__name__}"
            )
            result = await future
            assert result == 10 * number, f"Request {number} got the result of another: {result} and not {10 * number}"
            answered[number] = loop.time()

        async with Batcher(run, limit, wait, 10**9) as batcher:
            await asyncio.gather(*(request(number) for number in range(len(arrivals))))
        return Ran(batches, [round(t, 6) for t in began], [round(t, 6) for t in answered])

    try:
        return virtual_time.run(main)
    except virtual_time.StuckError as error:
        raise AssertionError(
            f"The batcher hangs: {error}. Does submit wake the worker, does close, is the event cleared before the worker waits for "
            "it, and does the worker end when all is done?"
        ) from error


given = [0, 1, 2, 3.5, 10.5]
ran = batched(given, lambda b: 2 + b, 2, 0)
assert max(map(len, ran.batches)) > 1, (
    f"What is waiting when a batch begins goes along: after the first batch, 1 and 2 together; yours are {ran.batches}"
)
assert max(map(len, ran.batches)) <= 2, f"At most limit = 2 in a batch; yours are {ran.batches}"
assert ran.batches == [[0], [1, 2], [3], [4]], (
    f"The batches are [0], [1, 2], [3], [4], the oldest first; yours are {ran.batches}"
)
assert ran.began == [0, 3, 7, 10.5], f"They begin at 0, 3, 7 and 10.5; yours at {ran.began}"
ran = batched(given, lambda b: 2 + b, 2, 5)
assert ran.began[0] == 1, (
    f"The first batch is full at 1 and begins then, not when the wait is over; yours begins at {ran.began[0]}"
)
assert (ran.batches[:2], ran.began[1]) == ([[0, 1], [2, 3]], 5), (
    f"[0, 1] at 1 and [2, 3] at 5; yours are {ran.batches} at {ran.began}"
)
ran = batched([0, 1, 1.5, 3.5, 8, 30], lambda b: 2 + b, 3, 2)
assert ran.began[1] == 6.5, (
    "The wait counts from the arrival: request 3 came at 3.5 and has waited enough when the model is free at 6.5; yours "
    f"begins at {ran.began[1]}"
)
assert ran.began == [1.5, 6.5, 10, 32], f"Batches begin at 1.5, 6.5, 10 and 32; yours at {ran.began}"
assert ran.answered[:5] == [6.5, 6.5, 6.5, 9.5, 13], (
    f"The first five are answered at 6.5, 6.5, 6.5, 9.5, 13; yours at {ran.answered[:5]}"
)
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(3)
for _limit, _wait in ((1, 0.0), (4, 0.0), (4, 0.35), (16, 2.0)):
    _arrivals = [*np.cumsum(_rng.exponential(0.3, 200)).tolist(), 1000.0]
    _ran = batched(_arrivals, lambda b: 0.4 + 0.05 * b, _limit, _wait)
    assert sorted(i for batch in _ran.batches for i in batch) == list(range(201)), "Every request is run once"
    _free, _at = 0.0, 0
    for _batch, _began in zip(_ran.batches[:-1], _ran.began, strict=False):
        assert _batch == list(range(_at, _at + len(_batch))), "Requests are run in the order of their arrival"
        _due = _arrivals[_at] + _wait
        if len(_batch) == _limit:
            _due = min(_due, _arrivals[_at + _limit - 1])
        assert abs(_began - max(_free, _due)) < 2e-6, (
            f"limit {_limit}, wait {_wait}: a batch begins as soon as the rules allow, at {max(_free, _due):.3f}; yours at {_began:.3f}"
        )
        _free, _at = _began + 0.4 + 0.05 * len(_batch), _at + len(_batch)
### END HIDDEN TESTS


# %% check="batcher" points=2
async def one_bad_batch() -> tuple[list, list]:
    seen = []

    async def run(items: list) -> list:
        seen.append(list(items))
        await asyncio.sleep(1)
        if "bad" in items:
            raise ValueError("cannot do this")
        return [item.upper() for item in items]

    async with Batcher(run, 2, 0, 99) as batcher:
        futures = [batcher.submit(item) for item in ("a", "bad", "c", "d")]
        return await asyncio.gather(*futures, return_exceptions=True), seen


async def callers_leave() -> tuple[list, list]:
    seen = []

    async def run(items: list) -> list:
        seen.append(list(items))
        await asyncio.sleep(5)
        return [item.upper() for item in items]

    async with Batcher(run, 1, 0, 99) as batcher:
        during = asyncio.ensure_future(asyncio.wait_for(batcher.submit("during"), 1))
        before = asyncio.ensure_future(asyncio.wait_for(batcher.submit("before"), 2))
        stays = batcher.submit("stays")
        return await asyncio.gather(during, before, stays, return_exceptions=True), seen


try:
    got, seen = virtual_time.run(one_bad_batch)
except virtual_time.StuckError as error:
    raise AssertionError(
        f"A batch that fails ends the worker, and everybody behind it waits for ever: catch its exception ({error})"
    ) from error
except ValueError as error:
    raise AssertionError(
        "The exception of a batch goes to its requests, by set_exception, and not out of the worker"
    ) from error
assert [type(one) for one in got[:2]] == [ValueError, ValueError], (
    f"Both requests of the failed batch get its exception; they got {got[:2]}"
)
assert got[2:] == ["C", "D"], f"The batch after the failed one is answered; it got {got[2:]}"
try:
    got, seen = virtual_time.run(callers_leave)
except (virtual_time.StuckError, asyncio.InvalidStateError) as error:
    raise AssertionError(
        "A caller that gives up has cancelled its future, and set_result on it raises InvalidStateError: look at future.done() first"
    ) from error
assert got[2] == "STAYS", f"Who stays is answered, whoever left before; it got {got[2]!r}"
assert ["before"] not in seen, f"A request whose caller left before its batch began isn't run; yours ran {seen}"


### BEGIN HIDDEN TESTS
async def _all_leave() -> list:
    seen = []

    async def run(items: list) -> list:
        seen.append(list(items))
        await asyncio.sleep(4)
        return items

    async with Batcher(run, 3, 0, 99) as batcher:
        first = batcher.submit(0)
        await asyncio.sleep(0.5)
        gone = [batcher.submit(i) for i in (1, 2)]
        stays = batcher.submit(3)
        for one in gone:
            one.cancel()
        assert await first == 0, "The first request is answered"
        assert await stays == 3, "Who stays gets the result of its own, whoever left the batch"
        gone = batcher.submit(4)
        gone.cancel()
        await asyncio.sleep(20)
        assert await batcher.submit(5) == 5, "After a batch of which nobody stayed, the work goes on"
    return seen


async def _leaves_what_fails() -> list:
    async def run(items: list) -> list:
        await asyncio.sleep(2)
        if 0 in items:
            raise TimeoutError("no")
        return items

    async with Batcher(run, 2, 0, 99) as batcher:
        futures = [batcher.submit(item) for item in range(4)]
        await asyncio.sleep(1)
        futures[0].cancel()
        return await asyncio.gather(*futures, return_exceptions=True)


try:
    _got = virtual_time.run(_leaves_what_fails)
except (virtual_time.StuckError, asyncio.InvalidStateError) as _error:
    raise AssertionError(
        "Who leaves a batch that then fails harms nobody: look at future.done() there, too. And every Exception of run goes to "
        f"its requests, a TimeoutError as well ({_error})"
    ) from _error
assert [type(_one) for _one in _got] == [asyncio.CancelledError, TimeoutError, int, int], (
    f"0 left, 1 gets the TimeoutError of run, 2 and 3 are answered; yours: {_got}"
)


async def _leaves_what_works() -> object:
    async def run(items: list) -> list:
        await asyncio.sleep(2)
        return items

    async with Batcher(run, 2, 0, 99) as batcher:
        futures = [batcher.submit(item) for item in range(2)]
        await asyncio.sleep(1)
        futures[0].cancel()
        return (await asyncio.gather(*futures, return_exceptions=True))[1]


_got = virtual_time.run(_leaves_what_works)
assert _got == 1, f"Who gives up during a batch harms nobody: the other one gets its result, 1; yours got {_got!r}"
_seen = virtual_time.run(_all_leave)
assert [] not in _seen, f"When all of a batch have given up, nothing is run; yours ran {_seen}"
assert [item for batch in _seen for item in batch] == [0, 3, 5], f"Only 0, 3 and 5 are run; yours ran {_seen}"
### END HIDDEN TESTS


# %% check="batcher" points=1
async def too_many() -> tuple[list, list]:
    async def run(items: list) -> list:
        await asyncio.sleep(1)
        return items

    refused = []
    async with Batcher(run, 2, 0, 3) as batcher:
        first = [batcher.submit(0), batcher.submit(1)]
        await asyncio.sleep(0.5)
        later = []
        for item in range(2, 8):
            try:
                later.append(batcher.submit(item))
            except RefusedError as error:
                refused.append((item, error.status))
        answers = await asyncio.gather(*first, *later)
    return refused, answers


async def closing() -> tuple[list, float, int | None]:
    loop = asyncio.get_running_loop()

    async def run(items: list) -> list:
        await asyncio.sleep(10)
        return items

    async with Batcher(run, 2, 1, 99) as batcher:
        futures = [batcher.submit(item) for item in range(5)]
        await asyncio.sleep(3)
        end = asyncio.ensure_future(batcher.close())
        await asyncio.sleep(1)
        try:
            batcher.submit("late")
            status = None
        except RefusedError as error:
            status = error.status
        await end
        answers = [future.result() if future.done() and not future.cancelled() else "lost" for future in futures]
        when = loop.time()
    return answers, when, status


async def nothing_to_do() -> float:
    async def run(items: list) -> list:
        return items

    async with Batcher(run, 2, 1, 9):
        await asyncio.sleep(1)
    return asyncio.get_running_loop().time()


try:
    refused, answers = virtual_time.run(too_many)
    assert [item for item, _ in refused] == [5, 6, 7], (
        "Two run and three wait (2, 3, 4), so 5, 6 and 7 are refused at once: room counts those who wait, not those in the running "
        f"batch. Yours refused {[item for item, _ in refused]}"
    )
    assert {status for _, status in refused} == {429}, f"A full queue is 429; yours is {refused}"
    assert answers == [0, 1, 2, 3, 4], f"All accepted requests are answered; yours are {answers}"
    answers, when, status = virtual_time.run(closing)
except virtual_time.StuckError as error:
    raise AssertionError(
        f"The batcher hangs: {error}. Does close wake the worker, and the worker end when nothing waits?"
    ) from error
except asyncio.CancelledError as error:
    raise AssertionError("close must not cancel the worker: whoever was accepted is answered") from error
except (RuntimeError, asyncio.InvalidStateError) as error:
    raise AssertionError(
        f"close may be called twice, as async with does after you have; yours raised {error!r}"
    ) from error
assert "lost" not in answers, (
    f"close returned, and {answers.count('lost')} of 5 accepted requests had no answer: drain the queue first"
)
assert status == 503, f"While it is closing, submit raises RefusedError(503, …); yours: {status}"
assert answers == [0, 1, 2, 3, 4], f"Each request gets its own result; yours are {answers}"
try:
    ended = virtual_time.run(nothing_to_do)
except virtual_time.StuckError as error:
    raise AssertionError("close hangs when nothing waits: it must wake the worker, which then ends") from error


### BEGIN HIDDEN TESTS
async def _close_twice() -> list:
    async def run(items: list) -> list:
        await asyncio.sleep(2)
        return items

    async with Batcher(run, 4, 60, 9) as batcher:
        futures = [batcher.submit(1)]
        await asyncio.sleep(1)
        await batcher.close()
    return [future.result() for future in futures]


assert virtual_time.run(_close_twice) == [1], (
    "Who waits for company when closing begins is answered; a second close does no harm"
)


async def _close_full() -> tuple[int, list[int], int]:
    sizes = []

    async def run(items: list) -> list:
        sizes.append(len(items))
        await asyncio.sleep(10)
        return items

    async with Batcher(run, 2, 0, 5) as batcher:
        futures = [batcher.submit(item) for item in range(2)]
        await asyncio.sleep(1)
        futures += [batcher.submit(item) for item in range(5)]
        end = asyncio.ensure_future(batcher.close())
        await asyncio.sleep(1)
        try:
            batcher.submit("late")
            status = 200
        except RefusedError as error:
            status = error.status
    answered = sum(future.done() for future in futures)
    await end
    return status, sizes, answered


_status, _sizes, _answered = virtual_time.run(_close_full)
assert _status == 503, f"Closing and full is 503, since 429 says that another try here may help; yours: {_status}"
assert max(_sizes) <= 2, f"At most limit = 2 in a batch, while it is closing as well; yours ran batches of {_sizes}"
assert _answered == 7, (
    f"A close that comes while another one waits returns when all are answered, too; {_answered} of 7 had their answer"
)


async def _company() -> list[int]:
    async def run(items: list) -> list:
        return items

    statuses = []
    async with Batcher(run, 4, 10, 2) as batcher:
        for item in range(3):
            try:
                batcher.submit(item)
                statuses.append(200)
            except RefusedError as error:
                statuses.append(error.status)
            await asyncio.sleep(1)
    return statuses


_statuses = virtual_time.run(_company)
assert _statuses == [200, 200, 429], (
    f"Who waits for company waits: with room for 2 the third request is refused, 200, 200, 429; yours: {_statuses}"
)
### END HIDDEN TESTS


# %% mistake="takes one when nobody may wait" of="batcher" says="goes along"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.news, self.closing = deque(), asyncio.Event(), False

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if self.closing:
            raise RefusedError(503, "closing")
        if len(self.queue) >= self.room:
            raise RefusedError(429, "full")
        self.queue.append((asyncio.get_running_loop().time(), item, asyncio.Future()))
        self.news.set()
        return self.queue[-1][2]

    async def work(self):
        while self.queue or not self.closing:
            self.news.clear()
            now = asyncio.get_running_loop().time()
            left = self.queue[0][0] + self.wait - now if self.queue else None
            if len(self.queue) < self.limit and not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                continue
            batch = [self.queue.popleft() for _ in range(min(self.limit if self.wait else 1, len(self.queue)))]
            batch = [one for one in batch if not one[2].done()]
            try:
                results = await self.run([item for _, item, _ in batch]) if batch else []
            except Exception as error:
                results = [error] * len(batch)
            for (_, _, future), result in zip(batch, results, strict=True):
                if not future.done():
                    tell = future.set_exception if isinstance(result, Exception) else future.set_result
                    tell(result)

    async def close(self):
        self.closing = True
        self.news.set()
        await self.worker


# %% mistake="always waits the whole wait" of="batcher" says="not when the wait is over"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.news, self.closing = deque(), asyncio.Event(), False

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if self.closing:
            raise RefusedError(503, "closing")
        if len(self.queue) >= self.room:
            raise RefusedError(429, "full")
        self.queue.append((asyncio.get_running_loop().time(), item, asyncio.Future()))
        self.news.set()
        return self.queue[-1][2]

    async def work(self):
        while self.queue or not self.closing:
            self.news.clear()
            now = asyncio.get_running_loop().time()
            left = self.queue[0][0] + self.wait - now if self.queue else None
            if not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                continue
            batch = [self.queue.popleft() for _ in range(min(self.limit, len(self.queue)))]
            batch = [one for one in batch if not one[2].done()]
            try:
                results = await self.run([item for _, item, _ in batch]) if batch else []
            except Exception as error:
                results = [error] * len(batch)
            for (_, _, future), result in zip(batch, results, strict=True):
                if not future.done():
                    tell = future.set_exception if isinstance(result, Exception) else future.set_result
                    tell(result)

    async def close(self):
        self.closing = True
        self.news.set()
        await self.worker


# %% mistake="waits from when it is free" of="batcher" says="The wait counts from the arrival"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.news, self.closing = deque(), asyncio.Event(), False

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if self.closing:
            raise RefusedError(503, "closing")
        if len(self.queue) >= self.room:
            raise RefusedError(429, "full")
        self.queue.append((asyncio.get_running_loop().time(), item, asyncio.Future()))
        self.news.set()
        return self.queue[-1][2]

    async def work(self):
        free = 0.0
        while self.queue or not self.closing:
            self.news.clear()
            now = asyncio.get_running_loop().time()
            left = max(self.queue[0][0], free) + self.wait - now if self.queue else None
            if len(self.queue) < self.limit and not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                continue
            batch = [self.queue.popleft() for _ in range(min(self.limit, len(self.queue)))]
            batch = [one for one in batch if not one[2].done()]
            try:
                results = await self.run([item for _, item, _ in batch]) if batch else []
            except Exception as error:
                results = [error] * len(batch)
            free = asyncio.get_running_loop().time()
            for (_, _, future), result in zip(batch, results, strict=True):
                if not future.done():
                    tell = future.set_exception if isinstance(result, Exception) else future.set_result
                    tell(result)

    async def close(self):
        self.closing = True
        self.news.set()
        await self.worker


# %% mistake="a failing batch ends the worker" of="batcher" says="catch its exception"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.news, self.closing = deque(), asyncio.Event(), False

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if self.closing:
            raise RefusedError(503, "closing")
        if len(self.queue) >= self.room:
            raise RefusedError(429, "full")
        self.queue.append((asyncio.get_running_loop().time(), item, asyncio.Future()))
        self.news.set()
        return self.queue[-1][2]

    async def work(self):
        while self.queue or not self.closing:
            self.news.clear()
            now = asyncio.get_running_loop().time()
            left = self.queue[0][0] + self.wait - now if self.queue else None
            if len(self.queue) < self.limit and not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                continue
            batch = [self.queue.popleft() for _ in range(min(self.limit, len(self.queue)))]
            batch = [one for one in batch if not one[2].done()]
            results = await self.run([item for _, item, _ in batch]) if batch else []
            for (_, _, future), result in zip(batch, results, strict=True):
                if not future.done():
                    tell = future.set_exception if isinstance(result, Exception) else future.set_result
                    tell(result)

    async def close(self):
        self.closing = True
        self.news.set()
        await self.worker


# %% mistake="sets results on futures that are done" of="batcher" says="has cancelled its future"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.news, self.closing = deque(), asyncio.Event(), False

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if self.closing:
            raise RefusedError(503, "closing")
        if len(self.queue) >= self.room:
            raise RefusedError(429, "full")
        self.queue.append((asyncio.get_running_loop().time(), item, asyncio.Future()))
        self.news.set()
        return self.queue[-1][2]

    async def work(self):
        while self.queue or not self.closing:
            self.news.clear()
            now = asyncio.get_running_loop().time()
            left = self.queue[0][0] + self.wait - now if self.queue else None
            if len(self.queue) < self.limit and not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                continue
            batch = [self.queue.popleft() for _ in range(min(self.limit, len(self.queue)))]
            batch = [one for one in batch if not one[2].done()]
            try:
                results = await self.run([item for _, item, _ in batch]) if batch else []
            except Exception as error:
                results = [error] * len(batch)
            for (_, _, future), result in zip(batch, results, strict=True):
                tell = future.set_exception if isinstance(result, Exception) else future.set_result
                tell(result)

    async def close(self):
        self.closing = True
        self.news.set()
        await self.worker


# %% mistake="runs requests whose caller has left" of="batcher" says="before its batch began isn't run"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.news, self.closing = deque(), asyncio.Event(), False

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if self.closing:
            raise RefusedError(503, "closing")
        if len(self.queue) >= self.room:
            raise RefusedError(429, "full")
        self.queue.append((asyncio.get_running_loop().time(), item, asyncio.Future()))
        self.news.set()
        return self.queue[-1][2]

    async def work(self):
        while self.queue or not self.closing:
            self.news.clear()
            now = asyncio.get_running_loop().time()
            left = self.queue[0][0] + self.wait - now if self.queue else None
            if len(self.queue) < self.limit and not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                continue
            batch = [self.queue.popleft() for _ in range(min(self.limit, len(self.queue)))]
            try:
                results = await self.run([item for _, item, _ in batch]) if batch else []
            except Exception as error:
                results = [error] * len(batch)
            for (_, _, future), result in zip(batch, results, strict=True):
                if not future.done():
                    tell = future.set_exception if isinstance(result, Exception) else future.set_result
                    tell(result)

    async def close(self):
        self.closing = True
        self.news.set()
        await self.worker


# %% mistake="room counts the running batch" of="batcher" says="room counts those who wait"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.news, self.closing = deque(), asyncio.Event(), False

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if self.closing:
            raise RefusedError(503, "closing")
        if len(self.queue) + getattr(self, "running", 0) >= self.room:
            raise RefusedError(429, "full")
        self.queue.append((asyncio.get_running_loop().time(), item, asyncio.Future()))
        self.news.set()
        return self.queue[-1][2]

    async def work(self):
        while self.queue or not self.closing:
            self.news.clear()
            now = asyncio.get_running_loop().time()
            left = self.queue[0][0] + self.wait - now if self.queue else None
            if len(self.queue) < self.limit and not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                continue
            batch = [self.queue.popleft() for _ in range(min(self.limit, len(self.queue)))]
            batch = [one for one in batch if not one[2].done()]
            self.running = len(batch)
            try:
                results = await self.run([item for _, item, _ in batch]) if batch else []
            except Exception as error:
                results = [error] * len(batch)
            self.running = 0
            for (_, _, future), result in zip(batch, results, strict=True):
                if not future.done():
                    tell = future.set_exception if isinstance(result, Exception) else future.set_result
                    tell(result)

    async def close(self):
        self.closing = True
        self.news.set()
        await self.worker


# %% mistake="close cancels the worker" of="batcher" says="close must not cancel the worker"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.news, self.closing = deque(), asyncio.Event(), False

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if self.closing:
            raise RefusedError(503, "closing")
        if len(self.queue) >= self.room:
            raise RefusedError(429, "full")
        self.queue.append((asyncio.get_running_loop().time(), item, asyncio.Future()))
        self.news.set()
        return self.queue[-1][2]

    async def work(self):
        while self.queue or not self.closing:
            self.news.clear()
            now = asyncio.get_running_loop().time()
            left = self.queue[0][0] + self.wait - now if self.queue else None
            if len(self.queue) < self.limit and not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                continue
            batch = [self.queue.popleft() for _ in range(min(self.limit, len(self.queue)))]
            batch = [one for one in batch if not one[2].done()]
            try:
                results = await self.run([item for _, item, _ in batch]) if batch else []
            except Exception as error:
                results = [error] * len(batch)
            for (_, _, future), result in zip(batch, results, strict=True):
                if not future.done():
                    tell = future.set_exception if isinstance(result, Exception) else future.set_result
                    tell(result)

    async def close(self):
        self.closing = True
        self.worker.cancel()
        await self.worker


# %% mistake="close returns at once" of="batcher" says="accepted requests had no answer"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.news, self.closing = deque(), asyncio.Event(), False

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if self.closing:
            raise RefusedError(503, "closing")
        if len(self.queue) >= self.room:
            raise RefusedError(429, "full")
        self.queue.append((asyncio.get_running_loop().time(), item, asyncio.Future()))
        self.news.set()
        return self.queue[-1][2]

    async def work(self):
        while self.queue or not self.closing:
            self.news.clear()
            now = asyncio.get_running_loop().time()
            left = self.queue[0][0] + self.wait - now if self.queue else None
            if len(self.queue) < self.limit and not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                continue
            batch = [self.queue.popleft() for _ in range(min(self.limit, len(self.queue)))]
            batch = [one for one in batch if not one[2].done()]
            try:
                results = await self.run([item for _, item, _ in batch]) if batch else []
            except Exception as error:
                results = [error] * len(batch)
            for (_, _, future), result in zip(batch, results, strict=True):
                if not future.done():
                    tell = future.set_exception if isinstance(result, Exception) else future.set_result
                    tell(result)

    async def close(self):
        self.closing = True
        self.news.set()


# %% mistake="close does not wake the worker" of="batcher" says="Does submit wake the worker, does close"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.news, self.closing = deque(), asyncio.Event(), False

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if self.closing:
            raise RefusedError(503, "closing")
        if len(self.queue) >= self.room:
            raise RefusedError(429, "full")
        self.queue.append((asyncio.get_running_loop().time(), item, asyncio.Future()))
        self.news.set()
        return self.queue[-1][2]

    async def work(self):
        while self.queue or not self.closing:
            self.news.clear()
            now = asyncio.get_running_loop().time()
            left = self.queue[0][0] + self.wait - now if self.queue else None
            if len(self.queue) < self.limit and not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                continue
            batch = [self.queue.popleft() for _ in range(min(self.limit, len(self.queue)))]
            batch = [one for one in batch if not one[2].done()]
            try:
                results = await self.run([item for _, item, _ in batch]) if batch else []
            except Exception as error:
                results = [error] * len(batch)
            for (_, _, future), result in zip(batch, results, strict=True):
                if not future.done():
                    tell = future.set_exception if isinstance(result, Exception) else future.set_result
                    tell(result)

    async def close(self):
        self.closing = True
        await self.worker


# %% mistake="takes requests while it is closing" of="batcher" says="raises RefusedError(503"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.news, self.closing = deque(), asyncio.Event(), False

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if len(self.queue) >= self.room:
            raise RefusedError(429, "full")
        self.queue.append((asyncio.get_running_loop().time(), item, asyncio.Future()))
        self.news.set()
        return self.queue[-1][2]

    async def work(self):
        while self.queue or not self.closing:
            self.news.clear()
            now = asyncio.get_running_loop().time()
            left = self.queue[0][0] + self.wait - now if self.queue else None
            if len(self.queue) < self.limit and not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                continue
            batch = [self.queue.popleft() for _ in range(min(self.limit, len(self.queue)))]
            batch = [one for one in batch if not one[2].done()]
            try:
                results = await self.run([item for _, item, _ in batch]) if batch else []
            except Exception as error:
                results = [error] * len(batch)
            for (_, _, future), result in zip(batch, results, strict=True):
                if not future.done():
                    tell = future.set_exception if isinstance(result, Exception) else future.set_result
                    tell(result)

    async def close(self):
        self.closing = True
        self.news.set()
        await self.worker


# %% mistake="forgets to clear the event" of="batcher" says="a task goes round in circles"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.news, self.closing = deque(), asyncio.Event(), False

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if self.closing:
            raise RefusedError(503, "closing")
        if len(self.queue) >= self.room:
            raise RefusedError(429, "full")
        self.queue.append((asyncio.get_running_loop().time(), item, asyncio.Future()))
        self.news.set()
        return self.queue[-1][2]

    async def work(self):
        while self.queue or not self.closing:
            now = asyncio.get_running_loop().time()
            left = self.queue[0][0] + self.wait - now if self.queue else None
            if len(self.queue) < self.limit and not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                continue
            batch = [self.queue.popleft() for _ in range(min(self.limit, len(self.queue)))]
            batch = [one for one in batch if not one[2].done()]
            try:
                results = await self.run([item for _, item, _ in batch]) if batch else []
            except Exception as error:
                results = [error] * len(batch)
            for (_, _, future), result in zip(batch, results, strict=True):
                if not future.done():
                    tell = future.set_exception if isinstance(result, Exception) else future.set_result
                    tell(result)

    async def close(self):
        self.closing = True
        self.news.set()
        await self.worker


# %% mistake="who leaves spoils the batch" of="batcher" says="the other one gets its result"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.news, self.closing = deque(), asyncio.Event(), False

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if self.closing:
            raise RefusedError(503, "closing")
        if len(self.queue) >= self.room:
            raise RefusedError(429, "full")
        self.queue.append((asyncio.get_running_loop().time(), item, asyncio.Future()))
        self.news.set()
        return self.queue[-1][2]

    async def work(self):
        while self.queue or not self.closing:
            self.news.clear()
            now = asyncio.get_running_loop().time()
            left = self.queue[0][0] + self.wait - now if self.queue else None
            if len(self.queue) < self.limit and not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                continue
            batch = [self.queue.popleft() for _ in range(min(self.limit, len(self.queue)))]
            batch = [one for one in batch if not one[2].done()]
            try:
                results = await self.run([item for _, item, _ in batch]) if batch else []
                for (_, _, future), result in zip(batch, results, strict=True):
                    future.set_result(result)
            except Exception as error:
                for _, _, future in batch:
                    if not future.done():
                        future.set_exception(error)

    async def close(self):
        self.closing = True
        self.news.set()
        await self.worker


# %% mistake="takes a TimeoutError of run for its own" of="batcher" says="a TimeoutError as well"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.news, self.closing = deque(), asyncio.Event(), False

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if self.closing:
            raise RefusedError(503, "closing")
        if len(self.queue) >= self.room:
            raise RefusedError(429, "full")
        self.queue.append((asyncio.get_running_loop().time(), item, asyncio.Future()))
        self.news.set()
        return self.queue[-1][2]

    async def work(self):
        while self.queue or not self.closing:
            self.news.clear()
            now = asyncio.get_running_loop().time()
            left = self.queue[0][0] + self.wait - now if self.queue else None
            if len(self.queue) < self.limit and not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                continue
            batch = [self.queue.popleft() for _ in range(min(self.limit, len(self.queue)))]
            batch = [one for one in batch if not one[2].done()]
            results = []
            try:
                with suppress(TimeoutError):
                    results = await self.run([item for _, item, _ in batch]) if batch else []
            except Exception as error:
                results = [error] * len(batch)
            for (_, _, future), result in zip(batch, results, strict=False):
                if not future.done():
                    tell = future.set_exception if isinstance(result, Exception) else future.set_result
                    tell(result)

    async def close(self):
        self.closing = True
        self.news.set()
        await self.worker


# %% mistake="runs a batch of nobody" of="batcher" says="nothing is run"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.news, self.closing = deque(), asyncio.Event(), False

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if self.closing:
            raise RefusedError(503, "closing")
        if len(self.queue) >= self.room:
            raise RefusedError(429, "full")
        self.queue.append((asyncio.get_running_loop().time(), item, asyncio.Future()))
        self.news.set()
        return self.queue[-1][2]

    async def work(self):
        while self.queue or not self.closing:
            self.news.clear()
            now = asyncio.get_running_loop().time()
            left = self.queue[0][0] + self.wait - now if self.queue else None
            if len(self.queue) < self.limit and not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                continue
            batch = [self.queue.popleft() for _ in range(min(self.limit, len(self.queue)))]
            batch = [one for one in batch if not one[2].done()]
            try:
                results = await self.run([item for _, item, _ in batch])
            except Exception as error:
                results = [error] * len(batch)
            for (_, _, future), result in zip(batch, results, strict=True):
                if not future.done():
                    tell = future.set_exception if isinstance(result, Exception) else future.set_result
                    tell(result)

    async def close(self):
        self.closing = True
        self.news.set()
        await self.worker


# %% mistake="429 while it is closing" of="batcher" says="another try here may help"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.news, self.closing = deque(), asyncio.Event(), False

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if len(self.queue) >= self.room:
            raise RefusedError(429, "full")
        if self.closing:
            raise RefusedError(503, "closing")
        self.queue.append((asyncio.get_running_loop().time(), item, asyncio.Future()))
        self.news.set()
        return self.queue[-1][2]

    async def work(self):
        while self.queue or not self.closing:
            self.news.clear()
            now = asyncio.get_running_loop().time()
            left = self.queue[0][0] + self.wait - now if self.queue else None
            if len(self.queue) < self.limit and not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                continue
            batch = [self.queue.popleft() for _ in range(min(self.limit, len(self.queue)))]
            batch = [one for one in batch if not one[2].done()]
            try:
                results = await self.run([item for _, item, _ in batch]) if batch else []
            except Exception as error:
                results = [error] * len(batch)
            for (_, _, future), result in zip(batch, results, strict=True):
                if not future.done():
                    tell = future.set_exception if isinstance(result, Exception) else future.set_result
                    tell(result)

    async def close(self):
        self.closing = True
        self.news.set()
        await self.worker


# %% mistake="everything that is left in one batch" of="batcher" says="while it is closing as well"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.news, self.closing = deque(), asyncio.Event(), False

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if self.closing:
            raise RefusedError(503, "closing")
        if len(self.queue) >= self.room:
            raise RefusedError(429, "full")
        self.queue.append((asyncio.get_running_loop().time(), item, asyncio.Future()))
        self.news.set()
        return self.queue[-1][2]

    async def work(self):
        while self.queue or not self.closing:
            self.news.clear()
            now = asyncio.get_running_loop().time()
            left = self.queue[0][0] + self.wait - now if self.queue else None
            if len(self.queue) < self.limit and not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                continue
            batch = [
                self.queue.popleft()
                for _ in range(len(self.queue) if self.closing else min(self.limit, len(self.queue)))
            ]
            batch = [one for one in batch if not one[2].done()]
            try:
                results = await self.run([item for _, item, _ in batch]) if batch else []
            except Exception as error:
                results = [error] * len(batch)
            for (_, _, future), result in zip(batch, results, strict=True):
                if not future.done():
                    tell = future.set_exception if isinstance(result, Exception) else future.set_result
                    tell(result)

    async def close(self):
        self.closing = True
        self.news.set()
        await self.worker


# %% mistake="a second close returns at once" of="batcher" says="returns when all are answered, too"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.news, self.closing = deque(), asyncio.Event(), False

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if self.closing:
            raise RefusedError(503, "closing")
        if len(self.queue) >= self.room:
            raise RefusedError(429, "full")
        self.queue.append((asyncio.get_running_loop().time(), item, asyncio.Future()))
        self.news.set()
        return self.queue[-1][2]

    async def work(self):
        while self.queue or not self.closing:
            self.news.clear()
            now = asyncio.get_running_loop().time()
            left = self.queue[0][0] + self.wait - now if self.queue else None
            if len(self.queue) < self.limit and not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                continue
            batch = [self.queue.popleft() for _ in range(min(self.limit, len(self.queue)))]
            batch = [one for one in batch if not one[2].done()]
            try:
                results = await self.run([item for _, item, _ in batch]) if batch else []
            except Exception as error:
                results = [error] * len(batch)
            for (_, _, future), result in zip(batch, results, strict=True):
                if not future.done():
                    tell = future.set_exception if isinstance(result, Exception) else future.set_result
                    tell(result)

    async def close(self):
        if self.closing:
            return
        self.closing = True
        self.news.set()
        await self.worker


# %% mistake="a second close is an error" of="batcher" says="close may be called twice"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.news, self.closing = deque(), asyncio.Event(), False

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if self.closing:
            raise RefusedError(503, "closing")
        if len(self.queue) >= self.room:
            raise RefusedError(429, "full")
        self.queue.append((asyncio.get_running_loop().time(), item, asyncio.Future()))
        self.news.set()
        return self.queue[-1][2]

    async def work(self):
        while self.queue or not self.closing:
            self.news.clear()
            now = asyncio.get_running_loop().time()
            left = self.queue[0][0] + self.wait - now if self.queue else None
            if len(self.queue) < self.limit and not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                continue
            batch = [self.queue.popleft() for _ in range(min(self.limit, len(self.queue)))]
            batch = [one for one in batch if not one[2].done()]
            try:
                results = await self.run([item for _, item, _ in batch]) if batch else []
            except Exception as error:
                results = [error] * len(batch)
            for (_, _, future), result in zip(batch, results, strict=True):
                if not future.done():
                    tell = future.set_exception if isinstance(result, Exception) else future.set_result
                    tell(result)

    async def close(self):
        if self.closing:
            raise RuntimeError("closed already")
        self.closing = True
        self.news.set()
        await self.worker


# %% mistake="who waits for company takes no room" of="batcher" says="Who waits for company waits"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.news, self.closing = deque(), asyncio.Event(), False

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if self.closing:
            raise RefusedError(503, "closing")
        if len(self.queue) >= self.room:
            raise RefusedError(429, "full")
        self.queue.append((asyncio.get_running_loop().time(), item, asyncio.Future()))
        self.news.set()
        return self.queue[-1][2]

    async def work(self):
        batch = []
        while self.queue or not self.closing:
            self.news.clear()
            while self.queue and len(batch) < self.limit:
                batch.append(self.queue.popleft())
            left = batch[0][0] + self.wait - asyncio.get_running_loop().time() if batch else None
            if len(batch) < self.limit and not self.closing and (left is None or left > 0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), left)
                if not self.closing:
                    continue
            batch = [one for one in batch if not one[2].done()]
            try:
                results = await self.run([item for _, item, _ in batch]) if batch else []
            except Exception as error:
                results = [error] * len(batch)
            for (_, _, future), result in zip(batch, results, strict=True):
                if not future.done():
                    tell = future.set_exception if isinstance(result, Exception) else future.set_result
                    tell(result)
            batch = []

    async def close(self):
        self.closing = True
        self.news.set()
        await self.worker


# %% alternative="an asyncio.Queue with a last word" of="batcher"
class Batcher:
    def __init__(self, run, limit, wait, room):
        self.run, self.limit, self.wait, self.room = run, limit, wait, room
        self.queue, self.closed, self.taken = asyncio.Queue(), False, []

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error):
        await self.close()

    def submit(self, item):
        if self.closed:
            raise RefusedError(503, "closing")
        if self.queue.qsize() + len(self.taken) >= self.room:
            raise RefusedError(429, "full")
        now = asyncio.get_running_loop().time()
        future = asyncio.Future()
        self.queue.put_nowait((now, item, future))
        return future

    async def work(self):
        time, last = asyncio.get_running_loop().time, False
        while not last:
            first = await self.queue.get()
            if first is None:
                return
            self.taken = [first]
            while len(self.taken) < self.limit and not last:
                try:
                    one = self.queue.get_nowait()
                except asyncio.QueueEmpty:
                    remaining = first[0] + self.wait - time()
                    if remaining <= 0:
                        break
                    try:
                        one = await asyncio.wait_for(self.queue.get(), remaining)
                    except TimeoutError:
                        break
                if one is None:
                    last = True
                else:
                    self.taken.append(one)
            batch, self.taken = [one for one in self.taken if not one[2].cancelled()], []
            if batch:
                try:
                    answers = await self.run([item for _, item, _ in batch])
                    outcome = [(future.set_result, answer) for (_, _, future), answer in zip(batch, answers)]  # noqa: B905
                except Exception as error:
                    outcome = [(future.set_exception, error) for _, _, future in batch]
                for tell, what in outcome:
                    with suppress(asyncio.InvalidStateError):
                        tell(what)

    async def close(self):
        if not self.closed:
            self.closed = True
            self.queue.put_nowait(None)
        await self.worker


# %% [markdown]
# Simulation and batcher are two programs that say the same. So they must agree, batch by batch, and the latencies to the last digit but rounding.

# %%
agreed, furthest, compared = 0, 0.0, 0
for limit, wait, rate in ((1, 0.0, 6.0), (4, 0.0, 16.0), (8, 0.05, 20.0), (16, 0.3, 20.0), (16, 0.0, 32.0)):
    arrivals = arrivals_at(rate, 1000, seed=1).tolist()
    finished, sizes = simulate(arrivals, service, limit, wait)
    ran = batched(arrivals, service, limit, wait)
    same = sum(a == len(b) for a, b in zip(sizes, ran.batches, strict=False))
    agreed, compared = agreed + same, compared + max(len(sizes), len(ran.batches))
    furthest = max(furthest, float(np.abs(np.asarray(finished) - ran.answered).max()))
print(f"{agreed} of {compared} batches agree; the largest difference of a finishing time is {furthest:.0e} s")
card.record(
    "batches_agree", agreed / compared, format=".0%", tolerance=0.005, label="batches of the batcher as simulated"
)

# %% [markdown]
# {{batches_agree}} of the batches agree (times were rounded to a microsecond). From here on the simulation may speak for the batcher; what it assumes is the service time.
#
# ## The whole service
#
# One task owns the model: `run` hands a batch to `reply_together` in a thread, so that the loop stays free for requests. A stopping criterion sees every new token of every row; it's where streaming from a batch comes from. (The streamers of `transformers` take one row only.) A row that has enough tokens is stopped there as well.


# %%
@dataclass
class Job:
    """A request on its way through the batcher, and the queue of its tokens; None at the end."""

    adapter: str
    ids: list[int]
    longest: int
    tokens: asyncio.Queue


class Assistant:
    """The three adapters on one base, behind a batcher."""

    models: tuple[str, ...] = ADAPTERS
    context = 512

    def __init__(self, limit: int, wait: float, room: int = 10**6) -> None:
        self.batcher = Batcher(self.run, limit, wait, room)
        self.sizes: list[int] = []
        self.seconds: list[float] = []

    def ids(self, messages: list[dict[str, str]]) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def count(self, messages: list[dict[str, str]]) -> int:
        return len(self.ids(messages))

    async def run(self, jobs: list[Job]) -> list[list[int]]:
        began = time.perf_counter()
        loop, width = asyncio.get_running_loop(), max(len(job.ids) for job in jobs)

        def tap(ids: torch.Tensor, scores: object, **others: object) -> torch.Tensor:
            for job, token in zip(jobs, ids[:, -1].tolist(), strict=True):
                loop.call_soon_threadsafe(job.tokens.put_nowait, token)
            return torch.tensor([ids.shape[1] - width >= job.longest for job in jobs])

        rows = [(job.adapter, job.ids) for job in jobs]
        longest = max(job.longest for job in jobs)
        replies = await asyncio.to_thread(reply_together, policy, tokenizer, rows, longest, stopping_criteria=[tap])
        self.sizes.append(len(jobs))
        self.seconds.append(time.perf_counter() - began)
        return replies

    def accept(self, model: str, messages: list[dict[str, str]], max_tokens: int) -> tuple[Job, asyncio.Future]:
        job = Job(model, self.ids(messages), max_tokens, asyncio.Queue())
        future = self.batcher.submit(job)
        future.add_done_callback(lambda _: job.tokens.put_nowait(None))
        return job, future

    async def complete(self, model: str, messages: list, max_tokens: int, stop: tuple[str, ...]) -> Completion:
        _, future = self.accept(model, messages, max_tokens)
        ids = (await future)[:max_tokens]
        text = tokenizer.decode([i for i in ids if i != tokenizer.eos_token_id])
        cut = min((len(text.partition(one)[0]) for one in stop), default=len(text))
        finish = "stop" if cut < len(text) or tokenizer.eos_token_id in ids else "length"
        return Completion(text[:cut], len(ids), finish)

    async def stream(self, model: str, messages: list, max_tokens: int, stop: tuple[str, ...]) -> AsyncIterator[str]:
        job, future = self.accept(model, messages, max_tokens)

        async def tokens() -> AsyncIterator[int]:
            for _ in range(job.longest):
                if (token := await job.tokens.get()) is None:
                    await future  # raises what the batch raised
                    return
                yield token

        return frames(f"chatcmpl-{id(job)}", model, tokens(), tokenizer.decode, tokenizer.eos_token_id, stop)


def application(assistant: Assistant) -> FastAPI:
    """The endpoint, with the batcher's task for as long as it is served."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        async with assistant.batcher:
            yield

    app = FastAPI(lifespan=lifespan)
    app.mount("/", make_app(assistant))
    return app


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


served = Assistant(limit=16, wait=0.0)
with serving(application(served)) as server, client_of(server.url) as client:
    print("models:", [model.id for model in client.models.list()])
    for adapter, text in asked[:3]:
        reply = client.chat.completions.create(model=adapter, messages=user(text))
        print(
            f"{adapter}: {reply.choices[0].message.content}   ({reply.usage.total_tokens} tokens, {reply.choices[0].finish_reason})"
        )
    for wrong in (
        {"model": "poetry", "messages": user("x")},
        {"model": "triage", "messages": user("x"), "temperature": 1.0},
    ):
        try:
            client.chat.completions.create(**wrong)
        except openai.APIStatusError as error:
            print(f"{type(error).__name__}: {error.message}")

    def ask(row: tuple[str, str], stream: bool) -> str:
        answer = client.chat.completions.create(model=row[0], messages=user(row[1]), stream=stream)
        if stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        return answer.choices[0].message.content

    rows = asked[:24]
    with ThreadPoolExecutor(12) as pool:  # twelve clients, streaming and not, for all adapters at once
        whole = list(pool.map(lambda row: ask(row, False), rows))
        pieces = list(pool.map(lambda row: ask(row, True), rows))
texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in reference[: len(rows)]]
different = sum(a != t or b != t for a, b, t in zip(whole, pieces, texts, strict=True))
print(
    f"\n{len(rows)} requests of twelve clients, whole and streamed: {different} differ from the adapter alone; batches of {min(served.sizes)} to {max(served.sizes)}"
)
card.record(
    "served_different",
    different,
    format="d",
    label="of 48 replies through the endpoint, other than the adapter's alone",
)

# %% [markdown]
# ## Reading a load test
#
# A load generator notes for each request a `Sample(due, sent, done, ok)`: when it was to be sent, was sent, and was answered, in seconds of one clock, and whether with status 200. Three ways to read these records wrong are common enough to have names or bug reports:
#
# - **Coordinated omission** (Gil Tene). A generator with a fixed number of users sends the next request when the last is answered. While the server stalls it sends nothing, so the stall is one slow request, where users who come on their own would all have waited. The cure: open-loop arrivals, and a latency that counts from when the request was **due**.
# - **Averages of percentiles.** Four workers report a p95 each; the mean of them is the p95 of nothing.
# - **Failures as fast answers.** A refusal takes a millisecond. Counted among the latencies, it improves the p50 of an overloaded service.


# %%
class Report(NamedTuple):
    """What a load test found."""

    requests: int
    failed: int
    throughput: float
    p50: float
    p95: float
    p99: float


# %% [markdown]
# **Exercise.** Write `load_report(workers)`. `workers` holds a list of `Sample`s (named tuples) for each worker of the load test; lists may be empty or of different lengths. Return a `Report` over all of them together:
#
# - `requests` and `failed`: counts of all samples, and of those that aren't `ok`.
# - `throughput`: successful requests a second, from the first `due` to the last `done` of all samples; `0.0` without successes.
# - `p50`, `p95`, `p99`: percentiles of the latencies of **successful** requests, each from `due` to `done`. A percentile is the smallest latency that at least that share of them doesn't exceed (NumPy's `method="inverted_cdf"`); `nan` without successes.
#
# Two workers with `[Sample(0, 0, 1, True)]` and `[Sample(1, 3, 4, True), Sample(2, 4, 4.1, False)]` give `Report(3, 1, 2 / 4.1, 1, 3, 3)`. *About 10 lines.*
#
# <details><summary>Hint 1</summary>Put all samples into one list first. Which of the six numbers use all of them, and which the successful ones?</details>
# <details><summary>Hint 2</summary><code>np.quantile(latencies, [0.5, 0.95, 0.99], method="inverted_cdf")</code>; it fails for an empty list.</details>
# <details><summary>Hint 3</summary>all = [s for w in workers for s in w]; good = [s.done − s.due for s in all if s.ok]; without good return Report(len(all), len(all), 0.0, nan, nan, nan); the span is max(done) − min(due) over all.</details>


# %% exercise="load-report" difficulty=2 minutes=6
def load_report(workers: Sequence[Sequence[Sample]]) -> Report:
    """The report of a load test from the raw samples of its workers."""
    ### BEGIN SOLUTION
    samples = [sample for worker in workers for sample in worker]
    good = [sample.done - sample.due for sample in samples if sample.ok]
    if not good:
        return Report(len(samples), len(samples), 0.0, nan, nan, nan)
    span = max(sample.done for sample in samples) - min(sample.due for sample in samples)
    p50, p95, p99 = np.quantile(good, [0.5, 0.95, 0.99], method="inverted_cdf")
    return Report(len(samples), len(samples) - len(good), len(good) / span, p50, p95, p99)
    ### END SOLUTION


# %% check="load-report" points=1
quick_worker = [Sample(i, i, i + 0.1, True) for i in range(95)]
slow_worker = [Sample(10 * i, 10 * i, 10 * i + 5.0, True) for i in range(5)]
got = load_report([quick_worker, slow_worker])
assert isinstance(got, Report), f"Return a Report; yours is a {type(got).__name__}"
assert (got.requests, got.failed) == (100, 0), f"100 samples, none failed; yours: {got.requests}, {got.failed}"
assert abs(got.p95 - 0.1) < 1e-9, (
    "95 of the 100 latencies are 0.1, so the p95 is 0.1: put the raw samples of all workers together, and don't average their "
    f"percentiles or interpolate between 0.1 and 5; yours is {got.p95}"
)
assert np.allclose((got.p50, got.p99), (0.1, 5)), f"p50 is 0.1, p99 is 5; yours: {got.p50}, {got.p99}"
assert abs(got.throughput - 100 / 94.1) < 1e-9, (
    f"100 requests from 0 to 94.1 are {100 / 94.1:.3f} a second, for all workers together; yours is {got.throughput}"
)
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(2)
for _sizes in ((7, 0, 30), (1,), (40, 40, 40, 41)):
    _workers = [
        [Sample(_d, _d + _rng.random(), _d + 1 + _rng.exponential(), True) for _d in _rng.random(_n) * 50]
        for _n in _sizes
    ]
    _all = sorted(_s.done - _s.due for _w in _workers for _s in _w)
    _got = load_report(_workers)
    for _p, _value in ((50, _got.p50), (95, _got.p95), (99, _got.p99)):
        _want = next(_x for _i, _x in enumerate(_all, 1) if 100 * _i >= _p * len(_all))
        assert abs(_value - _want) < 1e-9, f"p{_p} of {len(_all)} samples is {_want}; yours is {_value}"
### END HIDDEN TESTS

# %% check="load-report" points=1
got = load_report([[Sample(0, 0, 1, True)], [Sample(1, 3, 4, True), Sample(2, 4, 4.1, False)]])
assert got.p95 == 3, (
    "The second request was due at 1, sent at 3 and answered at 4: its user waited 3 s. A latency counts from when the request was "
    f"due; your p95 is {got.p95}"
)
assert (got.requests, got.failed) == (3, 1), f"3 requests, 1 failed; yours: {got.requests}, {got.failed}"
assert abs(got.throughput - 2 / 4.1) < 1e-9, (
    f"Two successes from 0 to 4.1 (failures don't count, but the test lasts until the last sample); yours is {got.throughput}"
)
got = load_report([[Sample(0, 0, 2, True), *[Sample(i, i, i + 0.001, False) for i in range(1, 9)]]])
assert (got.requests, got.failed) == (9, 8), f"9 requests, 8 failed; yours: {got.requests}, {got.failed}"
assert got.p50 == 2, (
    f"Eight refusals in a millisecond aren't fast answers: percentiles are of successes; your p50 is {got.p50}"
)
try:
    got = load_report([[], [Sample(0, 0, 1, False)]])
except Exception as error:
    raise AssertionError(
        f"A test in which everything failed needs a report most: nan, and no {type(error).__name__}"
    ) from error
assert (got.requests, got.failed, got.throughput) == (1, 1, 0.0), (
    f"Without successes: 1 request, 1 failed, 0.0 a second; yours {got}"
)
assert np.isnan([got.p50, got.p95, got.p99]).all(), f"Without successes percentiles are nan; yours {got}"
### BEGIN HIDDEN TESTS
try:
    _got = load_report([])
except Exception as _error:
    raise AssertionError(f"No samples at all: zeros and nan, and no {type(_error).__name__}") from _error
assert (_got.requests, _got.failed, _got.throughput) == (0, 0, 0.0), f"No samples: zeros; yours: {_got}"
assert np.isnan(_got.p95), f"No samples: percentiles are nan; yours: {_got}"
_samples = [Sample(5, 9, 10, True), Sample(4, 4, 30, False), Sample(1, 1.5, 2, False)]
assert abs(load_report([_samples]).throughput - 1 / 29) < 1e-9, "From the first due to the last done of all samples"
### END HIDDEN TESTS


# %% mistake="averages the percentiles of workers" of="load-report" says="don't average their percentiles"
def load_report(workers):
    all_ = [s for w in workers for s in w]
    good = [[s.done - s.due for s in w if s.ok] for w in workers if any(s.ok for s in w)]
    if not good:
        return Report(len(all_), len(all_), 0.0, nan, nan, nan)
    quantiles = np.mean([np.quantile(g, [0.5, 0.95, 0.99], method="inverted_cdf") for g in good], axis=0)
    span = max(s.done for s in all_) - min(s.due for s in all_)
    n = sum(map(len, good))
    return Report(len(all_), len(all_) - n, n / span, *quantiles)


# %% mistake="interpolates" of="load-report" says="interpolate between 0.1 and 5"
def load_report(workers):
    all_ = [s for w in workers for s in w]
    good = [s.done - s.due for s in all_ if s.ok]
    if not good:
        return Report(len(all_), len(all_), 0.0, nan, nan, nan)
    span = max(s.done for s in all_) - min(s.due for s in all_)
    return Report(len(all_), len(all_) - len(good), len(good) / span, *np.quantile(good, [0.5, 0.95, 0.99]))


# %% mistake="coordinated omission" of="load-report" says="A latency counts from when the request was due"
def load_report(workers):
    all_ = [s for w in workers for s in w]
    good = [s.done - s.sent for s in all_ if s.ok]
    if not good:
        return Report(len(all_), len(all_), 0.0, nan, nan, nan)
    span = max(s.done for s in all_) - min(s.due for s in all_)
    quantiles = np.quantile(good, [0.5, 0.95, 0.99], method="inverted_cdf")
    return Report(len(all_), len(all_) - len(good), len(good) / span, *quantiles)


# %% mistake="failures are fast answers" of="load-report" says="aren't fast answers"
def load_report(workers):
    all_ = [s for w in workers for s in w]
    ok = sum(s.ok for s in all_)
    if not ok:
        return Report(len(all_), len(all_), 0.0, nan, nan, nan)
    span = max(s.done for s in all_) - min(s.due for s in all_)
    quantiles = np.quantile([s.done - s.due for s in all_], [0.5, 0.95, 0.99], method="inverted_cdf")
    return Report(len(all_), len(all_) - ok, ok / span, *quantiles)


# %% mistake="failures are throughput" of="load-report" says="failures don't count"
def load_report(workers):
    all_ = [s for w in workers for s in w]
    good = [s.done - s.due for s in all_ if s.ok]
    if not good:
        return Report(len(all_), len(all_), 0.0, nan, nan, nan)
    span = max(s.done for s in all_) - min(s.due for s in all_)
    quantiles = np.quantile(good, [0.5, 0.95, 0.99], method="inverted_cdf")
    return Report(len(all_), len(all_) - len(good), len(all_) / span, *quantiles)


# %% mistake="adds the rates of the workers" of="load-report" says="for all workers together"
def load_report(workers):
    all_ = [s for w in workers for s in w]
    good = [s.done - s.due for s in all_ if s.ok]
    if not good:
        return Report(len(all_), len(all_), 0.0, nan, nan, nan)
    rate = sum(sum(s.ok for s in w) / (max(s.done for s in w) - min(s.due for s in w)) for w in workers if w)
    quantiles = np.quantile(good, [0.5, 0.95, 0.99], method="inverted_cdf")
    return Report(len(all_), len(all_) - len(good), rate, *quantiles)


# %% mistake="crashes when everything failed" of="load-report" says="needs a report most"
def load_report(workers):
    all_ = [s for w in workers for s in w]
    good = [s.done - s.due for s in all_ if s.ok]
    span = max(s.done for s in all_) - min(s.due for s in all_)
    quantiles = np.quantile(good, [0.5, 0.95, 0.99], method="inverted_cdf")
    return Report(len(all_), len(all_) - len(good), len(good) / span, *quantiles)


# %% alternative="pandas and a rank" of="load-report"
def load_report(workers):
    frame = pd.DataFrame([s for w in workers for s in w], columns=["due", "sent", "done", "ok"])
    ok = frame[frame.ok.astype(bool)]
    if ok.empty:
        return Report(len(frame), len(frame), 0.0, nan, nan, nan)
    ranked = sorted(ok.done - ok.due)
    p = [ranked[max(0, -(-percent * len(ranked) // 100) - 1)] for percent in (50, 95, 99)]
    return Report(len(frame), len(frame) - len(ok), len(ok) / (frame.done.max() - frame.due.min()), *p)


# %% [markdown]
# Coordinated omission, computed: a server answers in 30 ms and stalls once for 2 s. A request is due every 100 ms for a minute. One generator has one connection and so waits; it notes `sent` and `done`. The same records, read both ways:

# %%
DUE = np.arange(600) * 0.1
samples, done = [], 0.0
for number, due in enumerate(DUE):
    sent = max(due, done)
    done = sent + 0.03 + (2.0 if number == 300 else 0.0)
    samples.append(Sample(float(due), float(sent), float(done), True))
from_due = load_report([samples])
from_sent = load_report([[sample._replace(due=sample.sent) for sample in samples]])
fig, ax = plt.subplots(figsize=(7.2, 3.4))
share = np.arange(1, 601) / 600
ax.step(
    np.sort([1000 * (s.done - s.sent) for s in samples]), 100 * (1 - share + 1 / 600), where="post", color=COLOURS.wrong
)
ax.step(
    np.sort([1000 * (s.done - s.due) for s in samples]), 100 * (1 - share + 1 / 600), where="post", color=COLOURS.after
)
ax.axhline(1, color=COLOURS.truth, lw=0.8, ls="--")
direct_label(ax, 33, 1, "p99", COLOURS.truth, offset=(0, 4))
direct_label(ax, 60, 0.17, "from when it was sent", COLOURS.wrong)
direct_label(ax, 330, 4.2, "from when it was due", COLOURS.after)
ax.set(
    xscale="log",
    yscale="log",
    xlabel="latency, ms",
    ylabel="requests that took longer, %",
    title="One stall of two seconds, read twice",
)
ax.set_xticks([30, 100, 300, 1000, 2000], ["30", "100", "300", "1,000", "2,000"])
ax.set_yticks([0.2, 1, 10, 100], ["0.2", "1", "10", "100"])
ax.minorticks_off()
plt.show()
card.record(
    "p99_closed",
    round(1000 * from_sent.p99, 6),
    format=".0f",
    unit="ms",
    label="99th percentile from when requests were sent",
)
card.record(
    "p99_open", round(1000 * from_due.p99, 6), format=",.0f", unit="ms", label="99th percentile from when they were due"
)

# %% [markdown]
# {{p99_closed}} ms and {{p99_open}} ms, from the same run. The first is what a tool with a fixed number of users prints.
#
# ## Prediction and measurement
#
# Now the real service under open-loop Poisson arrivals, at twice the rate that single requests allow, with limits of 1, 4 and 16. `load_test.open_loop` sends each request when it's due. A prediction needs service times, and there are two sources: measured *before*, batch by batch; and *seen* by the server while it serves. `simulate` gets either, with the very arrivals of the test. These numbers depend on your machine and on what else it does, so they aren't recorded.

# %%
SIZES = (1, 2, 4, 8, 16)


def bodies(n: int) -> list[dict]:
    return [{"model": asked[i % len(asked)][0], "messages": user(asked[i % len(asked)][1])} for i in range(n)]


def from_table(sizes: Sequence[int], seconds: Sequence[float]) -> Callable[[int], float]:
    """Mean seconds by the size of the batch, straight lines between."""
    known = sorted(set(sizes))
    means = [np.mean([s for size, s in zip(sizes, seconds, strict=True) if size == one]) for one in known]
    return lambda b: float(np.interp(b, known, means))


def time_batches(trials: int) -> Callable[[int], float]:
    """The service times of this machine, now."""
    sizes, seconds = [], []
    for trial in range(trials):
        for size in SIZES:
            rows = [requests[(5 * trial + i) % len(requests)] for i in range(size)]
            began = time.perf_counter()
            reply_together(policy, tokenizer, rows, 32)
            sizes.append(size)
            seconds.append(time.perf_counter() - began)
    return from_table(sizes, seconds)


before = time_batches(trials)
load = 2 / before(1)
due = arrivals_at(load, load_requests, seed=3).tolist()
table, points = [], []
for limit in (1, 4, 16):
    before = time_batches(trials)
    now_served = Assistant(limit, 0.0)
    with serving(application(now_served)) as server:
        report = load_report([load_test.open_loop(server.url, bodies(load_requests), due)])
    seen = from_table(now_served.sizes, now_served.seconds)
    row = [p95(np.array(due), simulate(due, s, limit, 0.0)[0]) for s in (before, seen)] + [report.p95]
    points.append(row)
    table.append(
        (
            limit,
            *(f"{value:.2f} s" for value in row),
            f"{report.throughput:.1f}",
            f"{np.mean(now_served.sizes):.1f}",
            report.failed,
        )
    )
print(
    "service times before:",
    ", ".join(f"{b}: {1000 * before(b):.0f} ms" for b in SIZES),
    f"; load: {load:.1f} requests a second",
)
columns = [
    "limit",
    "p95 predicted (before)",
    "predicted (seen)",
    "measured",
    "answers a second",
    "mean batch",
    "failed",
]
display(pd.DataFrame(table, columns=columns).style.hide(axis="index"))
fig, ax = plt.subplots(figsize=(6.8, 3.2))
marks = (
    ("predicted, times before", "D", COLOURS.before),
    ("predicted, times seen", "D", COLOURS.truth),
    ("measured", "o", COLOURS.after),
)
for place, ((label, marker, colour), values) in enumerate(zip(marks, np.array(points).T, strict=True)):
    ax.plot(np.arange(3) + 0.12 * (place - 1), values, marker, color=colour, ms=8, label=label)
ax.set(
    xlim=(-0.5, 2.5),
    ylim=(0, 1.15 * np.max(points)),
    xlabel="limit of the batch",
    ylabel="95th percentile, s",
    title=f"{load_requests} requests at {load:.0f} a second, on this machine",
)
ax.set_xticks(range(3), ["1", "4", "16"])
ax.legend()
plt.show()

# %% [markdown]
# Without batching the queue grows for as long as the load lasts; that p95 mostly says how long you tested. Compare the columns from right to left. Measured against *seen* tests the model of the queue: what is left is HTTP, JSON and tokenizing, and the load generator, which runs in the same interpreter here. *Seen* against *before* tests the service times: they were measured while the machine served nothing. When a prediction fails at work, this tells you which half to mend.
#
# ## A load tool
#
# `locust` is what many teams use. It patches the standard library (gevent) when it's imported, so `load_test.locust` runs it as a process of its own. Its users are a closed loop: each waits for its answer, thinks, and asks again. That's right for "we have eight agents at work", and wrong for a public endpoint.

# %%
table = []
for users in (1, 8):
    now_served = Assistant(16, 0.0)
    with serving(application(now_served)) as server:
        found = load_test.locust(server.url, bodies(48), users=users, seconds=locust_seconds)
    quantiles = [f"{found.percentile(share)} ms" for share in (0.5, 0.95)]
    table.append(
        (
            users,
            found.requests,
            found.failed,
            f"{found.requests / found.seconds:.1f}",
            *quantiles,
            f"{np.mean(now_served.sizes):.1f}",
        )
    )
columns = ["users", "requests", "failed", "answers a second", "p50", "p95", "mean batch"]
display(pd.DataFrame(table, columns=columns).style.hide(axis="index"))

# %% [markdown]
# Two things to know of its report. Response times are rounded to two digits (147 ms becomes 150) because workers send histograms to the master; that is how it merges percentiles right, where averaging would be wrong. And eight users never make a batch larger than eight: the load adapts to the server, so a closed loop can't find the wall. For open-loop arrivals in locust, take `constant_throughput` with many more users than you expect to be waiting.
#
# ## Graceful shutdown
#
# Every release stops the old process. It gets SIGTERM, has a grace period (30 s in Kubernetes by default), and then gets SIGKILL. On SIGTERM uvicorn closes its listening socket, so new connections are refused; waits for the responses under way; and only then runs the shutdown half of the lifespan, where `async with batcher` closes. So nothing is lost, *if the queue can be worked off within the grace period*. An unbounded queue is a promise that you can't keep.
#
# With `room` waiting and one batch running, the last accepted request is answered after at most $(1 + \lceil \text{room} / \text{limit} \rceil) \cdot s(\text{limit})$.
#
# Here is the experiment with real processes. Each server is a program made of **your** `Batcher`; its model is a sleep of 0.3 s for a batch of at most 4. Sixty clients ask at once, and SIGTERM comes when all have been accepted or refused.

# %%
HEAD = """
import asyncio, os
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from fastapi import FastAPI
from fastapi.responses import JSONResponse

class RefusedError(Exception):
    def __init__(self, status, message):
        super().__init__(message)
        self.status = status
"""
TAIL = """
async def run(items):
    await asyncio.sleep(0.3)
    return items

seen = {"accepted": 0, "refused": 0}
batcher = Batcher(run, 4, 0.0, int(os.environ["ROOM"]))

@asynccontextmanager
async def lifespan(app):
    async with batcher:
        yield

app = FastAPI(lifespan=lifespan)

@app.get("/seen")
async def look():
    return seen

@app.post("/work/{item}")
async def work(item: int):
    try:
        future = batcher.submit(item)
    except RefusedError as error:
        seen["refused"] += 1
        return JSONResponse({"error": str(error)}, error.status)
    seen["accepted"] += 1
    return {"item": await future}
"""
lines = linecache.getlines(Batcher.submit.__code__.co_filename)  # the source of your cell
program = HEAD + "\n" + "".join(line for line in lines if not line.startswith("%")) + TAIL


def release(grace: float, room: int) -> Counter[str]:
    """Stop a server while sixty requests are under way; what became of them."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "shutdown_app.py").write_text(program, encoding="utf-8")
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        command = ["python", "-m", "uvicorn", "shutdown_app:app", "--port", str(port), "--log-level", "warning"]

        with process(command, ready=f"{url}/seen", grace=grace, env={"ROOM": str(room)}, cwd=folder) as server:

            async def main() -> list[str]:
                async with httpx.AsyncClient(
                    base_url=url, trust_env=False, timeout=60, limits=httpx.Limits(max_connections=None)
                ) as http:

                    async def one(item: int) -> str:
                        try:
                            answer = await http.post(f"/work/{item}")
                        except httpx.TransportError:
                            return "lost"
                        right = answer.status_code == 200 and answer.json() == {"item": item}
                        return "answered" if right else f"refused with {answer.status_code}"

                    tasks = [asyncio.create_task(one(item)) for item in range(clients)]
                    while sum((await http.get("/seen")).json().values()) < clients:
                        await asyncio.sleep(0.01)
                    stopping = asyncio.create_task(asyncio.to_thread(server.stop))
                    results = await asyncio.gather(*tasks)
                    await stopping
                    return results

            outcome = Counter(in_thread(lambda: asyncio.run(main())))
            try:
                httpx.post(f"{url}/work/1", trust_env=False)
            except httpx.ConnectError:
                outcome["afterwards: connection refused"] += 1
    return outcome


settings = {
    "grace 3 s, room unlimited": (3.0, 10**6),
    "grace 30 s, room unlimited": (30.0, 10**6),
    "grace 3 s, room 16": (3.0, 16),
}
outcomes = {name: release(*setting) for name, setting in settings.items()}
display(pd.DataFrame(outcomes).fillna(0).astype(int).T)
predicted_loss = sum(np.asarray(simulate([0.0] * clients, lambda b: 0.3, 4, 0.0)[0]) > 3.0 + 1e-6)
print(f"lost with a grace of 3 s and no bound, by simulation: {predicted_loss}")
lost = outcomes["grace 30 s, room unlimited"]["lost"] + outcomes["grace 3 s, room 16"]["lost"]
card.record(
    "lost_naive",
    predicted_loss,
    format="d",
    label="of 60 accepted requests, lost when the queue outlasts the grace period (simulated)",
)
card.record(
    "lost_graceful", lost, format="d", label="accepted requests lost in two graceful shutdowns (real processes)"
)

# %% [markdown]
# Same code, same signal. What is lost is arithmetic: {{lost_naive}} of 60 by simulation when the queue outlasts the grace period, {{lost_graceful}} when it doesn't. With room for 16 most requests are refused, at once, with 429 and `Retry-After`, and a client can go elsewhere; nobody waits for an answer that never comes.
#
# Two things stand outside the process. In a container the program must *get* the signal: with `CMD python …` in shell form PID 1 is a shell, which doesn't hand SIGTERM on, and everything ends by SIGKILL. And the load balancer goes on sending for a second or two after SIGTERM: fail the readiness check first, wait (Kubernetes' `preStop`), then close.
#
# ## Decide
#
# You expect 60 requests a second at the peak. Each replica costs the same. Which limit, which wait, how many replicas, and how much room in each queue?


# %%
class Option(NamedTuple):
    """A way to run the service, and the 95th percentile in seconds of each simulated run of a peak."""

    limit: int
    wait: float
    replicas: int
    p95s: tuple[float, ...]


# %% [markdown]
# **Exercise.** Write `plan(options, slo, grace, reserve, service)`. It returns `(option, room)`, or `None` if no option will do.
#
# - An option will do if **each** of its `p95s` is at most `slo`: the next peak is one run, not their mean.
# - Of those take the one with the fewest replicas; among these, the one whose worst p95 is smallest.
# - `room` is the largest number of waiting requests, a multiple of the limit, with which the running batch and all that waits take at most `grace - reserve` seconds, at `service(limit)` a batch; 0 if there is time for one batch or none (such a grace period is too short to serve with). `reserve` is for what isn't computing: the load balancer, the sockets.
#
# With a grace of 30 s, a reserve of 10 s, `limit = 4` and batches of 0.3 s there is time for 66 batches, so `room` is 4 · 65 = 260. *About 8 lines.*
#
# <details><summary>Hint 1</summary>Filter, then minimise by two keys, then count batches.</details>
# <details><summary>Hint 2</summary><code>min(good, key=lambda o: (o.replicas, max(o.p95s)))</code>. How many whole batches fit, and how many of them are of waiting requests?</details>
# <details><summary>Hint 3</summary>batches = floor((grace − reserve) / service(limit)); room = limit · max(0, batches − 1).</details>


# %% exercise="plan" difficulty=2 minutes=6
def plan(
    options: Sequence[Option], slo: float, grace: float, reserve: float, service: Callable[[int], float]
) -> tuple[Option, int] | None:
    """The cheapest option that holds the SLO in every run, and the room that its queue may have."""
    ### BEGIN SOLUTION
    good = [option for option in options if max(option.p95s) <= slo]
    if not good:
        return None
    best = min(good, key=lambda option: (option.replicas, max(option.p95s)))
    batches = floor((grace - reserve) / service(best.limit))
    return best, best.limit * max(0, batches - 1)
    ### END SOLUTION


# %% check="plan" points=2
single = Option(1, 0.0, 6, (0.6, 0.7, 0.65))
lucky = Option(8, 0.0, 1, (0.5, 1.1, 0.5))
steady = Option(8, 0.0, 2, (0.95, 0.94, 0.99))
better = Option(16, 0.1, 2, (0.9, 0.7, 0.98))
third = Option(16, 0.0, 3, (0.3, 0.3, 0.3))
every = [single, lucky, third, steady, better]
seconds = lambda b: 0.1 + 0.05 * b
got = plan(every, 1.0, 30.0, 10.0, seconds)
assert got is not None, "Several options hold the SLO in every run"
assert isinstance(got, (tuple, list)), f"Return (option, room); yours is a {type(got).__name__}"
assert isinstance(got[0], Option), f"Return (option, room), one of the options first; yours is {got!r}"
assert got[0] != lucky, (
    "The second run of this option was above the SLO: the next peak is one run, so each must hold, not the mean"
)
assert got[0].replicas == 2, (
    f"Every replica costs: of those that hold the SLO take the fewest; yours has {got[0].replicas}"
)
assert got[0] == better, f"Among 2 replicas the smallest worst p95 is 0.98, of limit 16; yours is {got[0]}"
assert got[1] != 16 * 22, "One batch is running when the signal comes: 22 batches in 20 s are 21 of waiting requests"
assert got[1] == 16 * 21, (
    f"20 s for batches of service(16) = 0.9 s are 22 batches, one of them running: room 16 · 21 = 336; yours is {got[1]}"
)
try:
    nothing = plan([lucky], 1.0, 30.0, 10.0, seconds)
except ValueError as error:
    raise AssertionError(f"When no option holds the SLO return None; yours raised ValueError: {error}") from error
assert nothing is None, f"When no option holds the SLO return None; yours is {nothing!r}"
assert plan([better], 1.0, 2.0, 1.5, seconds)[1] == 0, (
    f"With half a second for batches of 0.9 s nobody may wait: room 0; yours is {plan([better], 1.0, 2.0, 1.5, seconds)[1]}"
)
### BEGIN HIDDEN TESTS
_got = plan([third], 0.3, 10.0, 0.0, lambda b: 1.0)
assert _got is not None, "At most the SLO: equal is good"
assert tuple(_got) == (third, 144), f"Ten batches of 16, one of them running: room 144; yours is {_got}"
assert plan([Option(4, 0.0, 1, (0.2,))], 1.0, 30.0, 10.0, lambda b: 0.3)[1] == 260, "The example of the statement"
assert plan([], 1.0, 30.0, 10.0, seconds) is None, "No options, no plan"
_order = [Option(2, 0.0, 4, (0.5, 0.2)), Option(4, 0.0, 4, (0.4, 0.4)), Option(8, 0.0, 4, (0.45, 0.1))]
assert plan(_order, 1.0, 9.0, 0.0, lambda b: 1.0)[0] == _order[1], "The smallest worst p95, not the smallest mean"
### END HIDDEN TESTS


# %% mistake="the mean of the runs" of="plan" says="each must hold, not the mean"
def plan(options, slo, grace, reserve, service):
    good = [o for o in options if np.mean(o.p95s) <= slo]
    if not good:
        return None
    best = min(good, key=lambda o: (o.replicas, np.mean(o.p95s)))
    return best, best.limit * max(0, floor((grace - reserve) / service(best.limit)) - 1)


# %% mistake="the fastest" of="plan" says="Every replica costs"
def plan(options, slo, grace, reserve, service):
    good = [o for o in options if max(o.p95s) <= slo]
    if not good:
        return None
    best = min(good, key=lambda o: max(o.p95s))
    return best, best.limit * max(0, floor((grace - reserve) / service(best.limit)) - 1)


# %% mistake="forgets the batch that is running" of="plan" says="One batch is running when the signal comes"
def plan(options, slo, grace, reserve, service):
    good = [o for o in options if max(o.p95s) <= slo]
    if not good:
        return None
    best = min(good, key=lambda o: (o.replicas, max(o.p95s)))
    return best, best.limit * max(0, floor((grace - reserve) / service(best.limit)))


# %% mistake="forgets the reserve" of="plan" says="20 s for batches of service(16)"
def plan(options, slo, grace, reserve, service):
    good = [o for o in options if max(o.p95s) <= slo]
    if not good:
        return None
    best = min(good, key=lambda o: (o.replicas, max(o.p95s)))
    return best, best.limit * max(0, floor(grace / service(best.limit)) - 1)


# %% mistake="fails when nothing holds" of="plan" says="return None; yours raised ValueError"
def plan(options, slo, grace, reserve, service):
    best = min((o for o in options if max(o.p95s) <= slo), key=lambda o: (o.replicas, max(o.p95s)))
    return best, best.limit * max(0, floor((grace - reserve) / service(best.limit)) - 1)


# %% mistake="a negative room" of="plan" says="nobody may wait: room 0"
def plan(options, slo, grace, reserve, service):
    good = [o for o in options if max(o.p95s) <= slo]
    if not good:
        return None
    best = min(good, key=lambda o: (o.replicas, max(o.p95s)))
    return best, best.limit * (floor((grace - reserve) / service(best.limit)) - 1)


# %% mistake="the smaller wait before the smaller percentile" of="plan" says="smallest worst p95 is 0.98"
def plan(options, slo, grace, reserve, service):
    good = [o for o in options if max(o.p95s) <= slo]
    if not good:
        return None
    best = min(good, key=lambda o: (o.replicas, o.wait, max(o.p95s)))
    return best, best.limit * max(0, floor((grace - reserve) / service(best.limit)) - 1)


# %% alternative="sorts, and counts up" of="plan"
def plan(options, slo, grace, reserve, service):
    for option in sorted(options, key=lambda o: (o.replicas, sorted(o.p95s)[-1])):
        if all(p <= slo for p in option.p95s):
            batches = 0
            while (batches + 2) * service(option.limit) <= grace - reserve:
                batches += 1
            return option, option.limit * batches
    return None


# %%
PEAK, SLO_SECONDS = 60.0, 1.0


def option(limit: int, wait: float, replicas: int) -> Option:
    """A setting, simulated: with requests dealt out at random, each replica gets Poisson arrivals of its share."""
    if PEAK / replicas >= limit / service(limit):
        return Option(limit, wait, replicas, (inf,) * runs)  # the queue grows for ever
    return Option(
        limit, wait, replicas, tuple(simulated_p95(PEAK / replicas, limit, wait, seed) for seed in range(runs))
    )


options = [option(limit, wait, replicas) for limit in (1, 4, 8, 16) for wait in (0.0, 0.1) for replicas in range(1, 13)]
chosen, room = plan(options, SLO_SECONDS, grace=30.0, reserve=10.0, service=service)
unbatched, _ = plan([one for one in options if one.limit == 1], SLO_SECONDS, grace=30.0, reserve=10.0, service=service)
fig, ax = plt.subplots(figsize=(7.0, 3.6))
for limit, colour in ((1, COLOURS.before), (4, COLOURS.other), (16, COLOURS.after)):
    curve = [
        (one.replicas, max(one.p95s))
        for one in options
        if one.limit == limit and one.wait == 0.0 and max(one.p95s) < 20
    ]
    ax.plot(*np.array(curve).T, "o-", color=colour, label=f"limit {limit}")
ax.axhline(SLO_SECONDS, color=COLOURS.wrong, lw=1)
direct_label(ax, 1, SLO_SECONDS, "SLO", COLOURS.wrong)
ax.set(
    yscale="log",
    xlim=(0.8, 12.2),
    ylim=(0.15, 6),
    xlabel="replicas",
    ylabel="worst 95th percentile, s",
    title="Sixty requests a second: what a replica buys",
)
ax.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
ax.minorticks_off()
label_lines(ax)
plt.show()
print(
    f"chosen: {chosen.replicas} replicas, limit {chosen.limit}, wait {1000 * chosen.wait:.0f} ms, worst p95 {max(chosen.p95s):.2f} s, room {room}; unbatched: {unbatched.replicas} replicas"
)
print(
    "a queue of that room takes",
    f"{ceil(room / chosen.limit) * service(chosen.limit):.0f} s: whoever joins it when it is full waits as long",
)
card.record("replicas_chosen", chosen.replicas, format="d", label="replicas for 60 requests a second, batched")
card.record("replicas_single", unbatched.replicas, format="d", label="the same, without batches")

# %% [markdown]
# {{replicas_chosen}} replicas with batches, {{replicas_single}} without. Note the last line printed: the grace period allows far more room than the SLO. It only bounds the room from above; a service that values its SLO refuses much earlier, at about `limit * slo / service(limit)` waiting requests.
#
# ## With a real model
#
# The endpoint you wrote is the one that `vllm serve` offers, and your client code stays:
#
# ```
# vllm serve Qwen/Qwen3-8B --enable-lora --max-loras 4 --max-lora-rank 64 \
#     --lora-modules triage=adapters/triage handbook=adapters/handbook agent=adapters/agent
# ```
#
# ```python
# client = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="any")
# client.chat.completions.create(model="triage", messages=[...])  # the adapter is the model's name
# ```
#
# What changes: batches are continuous (a row leaves when it ends, `--max-num-seqs` is the limit and there's no wait); adapters of a batch are computed by one kernel (Punica, S-LoRA) in place of a loop over adapters; memory for keys and values, not the limit, decides how many rows run. What stays: one owner of the model, the error contract, percentiles from `due`, a bounded queue, and the order of a shutdown. [docs/production.md](../../docs/production.md) has the way to a GPU server, with this client and these adapters.
#
# ## Result card

# %%
card.show()

# %% [markdown]
# ## Say it in an interview
#
# <details><summary>How would you serve fifty LoRA adapters on one GPU?</summary>
#
# One base, adapters beside it: at 8 billion parameters a rank-16 adapter is {{large_share}} of the model, so fifty fit where one more model wouldn't. The adapter is the model name of the API. Never select it by global state: twelve concurrent requests through `set_adapter` gave me {{crosstalk_naive}} answers from the wrong adapter and no error. Name the adapter per row, let one task own the model, and test for cross-talk by comparing every reply in a mixed batch with the adapter alone ({{crosstalk_mixed}} of {{crosstalk_asked}} differed). Adapters that are used rarely are paged in from host memory.
#
# </details>
#
# <details><summary>p95 is too high. Is it the batch size, the wait or the load?</summary>
#
# Measure the load and the service time of a batch first; then the queue is arithmetic, and can be simulated exactly. Near a wall it's the load: waiting grows as 1/(1 − ρ). The limit sets where the wall is ({{rate_single}} against {{rate_batched}} here), not how fast an empty service is. A wait is worth it for computing time ({{wait_none_busy}} to {{wait_some_busy}}), hardly ever for latency, since batches form by themselves while the model is busy. And before anything: is the p95 read from raw samples, from when requests were due?
#
# </details>
#
# <details><summary>Walk me through what happens between SIGTERM and the last response.</summary>
#
# The readiness check fails and the balancer looks away; the socket closes, new connections are refused; the requests under way, queued ones included, are answered; then the batcher closes, its task ends, and the process exits by itself before the grace period does. That needs a queue bounded by the grace period: with an unbounded one {{lost_naive}} of 60 accepted requests would have died by SIGKILL (simulated), with a bound {{lost_graceful}} did (measured), because the surplus was refused at once. And PID 1 must be the server, not a shell.
#
# </details>
#
# ## Read next
#
# - G.-I. Yu et al., [*Orca: A Distributed Serving System for Transformer-Based Generative Models*](https://www.usenix.org/conference/osdi22/presentation/yu), 2022. Batching by iteration.
# - W. Kwon et al., [*Efficient Memory Management for Large Language Model Serving with PagedAttention*](https://arxiv.org/abs/2309.06180), 2023. vLLM.
# - L. Chen et al., [*Punica: Multi-Tenant LoRA Serving*](https://arxiv.org/abs/2310.18547), 2023; Y. Sheng et al., [*S-LoRA: Serving Thousands of Concurrent LoRA Adapters*](https://arxiv.org/abs/2311.03285), 2023.
# - J. Dean, L. A. Barroso, [*The Tail at Scale*](https://research.google/pubs/the-tail-at-scale/), 2013.
# - B. Schroeder, A. Wierman, M. Harchol-Balter, [*Open Versus Closed: A Cautionary Tale*](https://www.usenix.org/conference/nsdi-06/open-versus-closed-cautionary-tale), 2006. What the generator's loop does to the result.
# - G. Tene, *How NOT to Measure Latency*, talk, 2013. Coordinated omission.
# - D. Crankshaw et al., [*Clipper: A Low-Latency Online Prediction Serving System*](https://arxiv.org/abs/1612.03079), 2017. Adaptive batching under an SLO.
# - M. Harchol-Balter, *Performance Modeling and Design of Computer Systems: Queueing Theory in Action*, 2013.
# - The documentation of [mixed LoRA batches in peft](https://huggingface.co/docs/peft/developer_guides/lora), and the [server-sent events](https://html.spec.whatwg.org/multipage/server-sent-events.html) of the HTML standard.
