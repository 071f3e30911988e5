# %% [markdown]
# # 1.5 Supervised finetuning
#
# You will be able to finetune all weights of a language model with `Trainer` or `SFTTrainer`, prove that padding, packing and accumulation leave the loss as it is, and say what the model forgot in exchange.
#
# **You will measure.** Exact match on ticket triage: {{exact_match_before}} before, {{exact_match_after}} after (95 % interval {{exact_match_after:interval}}). The price: the loss on the pretraining stream goes from {{stream_before}} to {{stream_after}} nats a token, and the share of questions about a passage that are answered exactly from {{reading_before}} to {{reading_after}}; with one example in eight replayed, to {{replay_reading}}. Packed without care, the finetuned model's loss is off by {{naive_error}} nats; packed with care, by {{packing_error_after}}.
#
# **You need.** Lesson 1.1 (seeds, intervals); autograd; what an attention mask and a position do in a transformer.
#
# **Time.** About 70 minutes; the solution runs in {{run:seconds}} s on one CPU core.

# %% [markdown]
# ## Why it matters at work
#
# Somebody has a thousand labelled tickets and wants a model that answers like them. Calling `SFTTrainer` takes fifteen lines, and nearly every mistake in them is silent: the loss falls, the run ends, and the model is a little worse than it could be, or has lost what it was bought for.
#
# The mistakes reach good libraries. Until October 2024 the widely used training loops, `Trainer` among them, averaged the loss of accumulated batches wrongly (Debut et al., 2024), so the same data and the same effective batch gave another model for each number of accumulation steps.
#
# In interviews it is asked as "you halve the batch and double the accumulation, and the curve moves: why?", and as "your finetuned model is great at the task, and customers say that it got dumber. What did you measure, and what do you change?"

# %% tags=["parameters"]
model_id = "shipped"  # "shipped", the id of a causal language model on the Hub, or a local folder
device = "cpu"  # "cpu", "cuda" or "mps"
learning_rate = 1e-3  # right for the shipped model of about a million weights; 1e-5 to 2e-5 for a real one
steps = 96  # quick: 3
batch_size = 4
test_tickets = 64  # of each run; quick: 8
documents = 32  # held-out documents of the pretraining stream, for measuring what is forgotten; quick: 8
questions = 64  # about a passage each, in each of the two domains, for the same purpose; quick: 8
target = 0.7  # the exact match that the product asks for
most_forgetting = 0.5  # the rise of the stream's loss that is allowed, as a share of plain finetuning's
runs = 3  # each with a company and an order of the data of its own; quick: 2
seed = 0

# %%
import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # trl reports its use to the Hub; read when it is imported

import copy
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import datasets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import display
from matplotlib.colors import ListedColormap
from scipy import stats
from torch import Tensor
from torch.optim import SGD
from tqdm.auto import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from labkit import base_model, triage
from labkit.base_model.probe import copying, validation
from labkit.plots import COLOURS, direct_label, intervals, label_lines, use_house_style
from labkit.predict import compare
from labkit.results import ResultCard
from labkit.triage import Example
from labkit.world import LESSON_SEEDS, TRAIN_SEEDS, VALIDATION_SEEDS, World
from labkit.world.stream import document

datasets.disable_progress_bars()
use_house_style()
card = ResultCard("1_5_supervised_finetuning")

# %% [markdown]
# ## Read all, learn the answer
#
# The task is the triage of support tickets: a message comes in, one line of JSON goes out. The company is synthetic and new in every run, so no model can have seen its products. An `Example` holds the token ids of the two parts apart, as tuples: `prompt` is the chat template with the message, `answer` the JSON and the end-of-sequence token. `len(example)` counts both.

# %%
model, tokenizer = base_model.load(model_id, device=device)  # in eval mode and float32
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token  # what trl does as well; the first exercise is about its price
pad_id = tokenizer.pad_token_id
for module in model.modules():
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0  # GPT-2 has some; without it two ways to compute one step can be compared
worlds = [World(LESSON_SEEDS[seed + run]) for run in range(runs)]
tickets = worlds[0].tickets(8, part="train")
eight = triage.encode(tokenizer, tickets)

print(tickets[0].text, "\n\n", tickets[0].triage.to_json(), "\n")
print(f"{len(eight[0].prompt)} tokens of prompt, {len(eight[0].answer)} of answer; the last one is", end=" ")
print(repr(tokenizer.decode([eight[0].answer[-1]])))

# %% [markdown]
# Supervised finetuning minimises the mean cross-entropy of the *answer* tokens. With ids $x_1 \dots x_t$ of a row, labels $y_1 \dots y_t$ and the set $C$ of the places, in all rows of the batch, whose label counts,
#
# $$L = -\frac{1}{|C|} \sum_{i \in C} \log p(y_i \mid x_1 \dots x_{i-1}), \qquad y_i = -100 \text{ where the place does not count.}$$
#
# −100 is PyTorch's `ignore_index`. The prompt is read but not learned: you want the answer given the message, and a model of messages is not what you pay for. (It is a choice. With very short answers, learning the instruction too can help; Shi et al., 2024.)
#
# Rows of a batch must be equally long, so shorter ones are padded. The function that does this is called a collator.
#
# **Exercise.** `collate(examples, pad_id)` returns a dictionary of three `int64` tensors, each `(n, t)`: `n` examples, `t` the length of the longest (prompt and answer together). Rows are filled up on the right.
#
# | key | on the prompt | on the answer | on the padding |
# |---|---|---|---|
# | `"input_ids"` | its ids | its ids | `pad_id` |
# | `"attention_mask"` | 1 | 1 | 0 |
# | `"labels"` | −100 | its ids, each at its own place | −100 |
#
# - The labels are **not** shifted: `model(labels=…)` compares the logits at place $i$ with the label at $i + 1$ by itself.
# - `pad_id` may be an id that occurs in the examples. Many tokenizers have no padding token, and the usual substitute is the end-of-sequence token, with which every answer ends.
#
# `collate([Example((5, 6), (7, 2)), Example((5,), (2,))], pad_id=2)` gives
#
# ```text
# input_ids       [[5, 6, 7, 2], [5, 2, 2, 2]]
# attention_mask  [[1, 1, 1, 1], [1, 1, 0, 0]]
# labels          [[-100, -100, 7, 2], [-100, 2, -100, -100]]
# ```
#
# *About 9 lines.*
#
# <details><summary>Hint 1</summary>Where does padding begin in a row? You know it from the lengths. What would you mistake for padding if you looked for <code>pad_id</code> instead?</details>
# <details><summary>Hint 2</summary>Start with three full tensors: <code>torch.full((n, t), pad_id)</code>, zeros, and −100 everywhere. Then fill row by row. An <code>Example</code> has a <code>len</code>; <code>prompt</code> and <code>answer</code> are tuples and can be added.</details>
# <details><summary>Hint 3</summary>In row r: the ids up to the example's length are <code>torch.tensor(prompt + answer)</code>, the mask is 1 up to the same place, and the labels from <code>len(prompt)</code> up to it are <code>torch.tensor(answer)</code>.</details>


# %% exercise="collate" difficulty=2 minutes=10
def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Return `input_ids`, `attention_mask` and `labels` of the examples, right-padded, each (n, t) int64."""
    ### BEGIN SOLUTION
    shape = (len(examples), max(map(len, examples)))
    ids, mask, labels = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100)
    for row, example in enumerate(examples):
        end = len(example)
        ids[row, :end] = torch.tensor(example.prompt + example.answer)
        mask[row, :end] = 1
        labels[row, len(example.prompt) : end] = torch.tensor(example.answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    ### END SOLUTION


# %% check="collate" points=2
two = [Example((5, 6, 8), (7, 2)), Example((5,), (9, 2))]
got = collate(two, pad_id=0)
assert isinstance(got, dict), (
    f"Return a dictionary, which Trainer hands on as model(**batch); yours is a {type(got).__name__}"
)
assert set(got) == {"input_ids", "attention_mask", "labels"}, (
    f"The three keys are input_ids, attention_mask and labels; yours are {sorted(got)}"
)
for key, tensor in got.items():
    assert isinstance(tensor, Tensor), f"{key} is a torch tensor; yours is a {type(tensor).__name__}"
    assert tensor.shape == (2, 5), f"{key} is (examples, longest) = (2, 5); yours is {tuple(tensor.shape)}"
    assert tensor.dtype == torch.int64, f"{key} holds whole numbers, torch.int64; yours is {tensor.dtype}"
assert got["input_ids"].tolist() != [[5, 6, 8, 7, 2], [0, 0, 5, 9, 2]], (
    "You fill up on the left. That is right for generation; in training fill up on the right"
)
assert got["input_ids"].tolist() == [[5, 6, 8, 7, 2], [5, 9, 2, 0, 0]], (
    f"input_ids are prompt, answer, padding: [5, 9, 2, 0, 0] in the second row; yours is {got['input_ids'][1].tolist()}"
)
labels = got["labels"].tolist()
assert labels != [[-100, -100, 7, 2, -100], [9, 2, -100, -100, -100]], (
    "Your labels are shifted to the left. The model shifts them itself: shifted twice, it learns to skip a token"
)
assert labels[0] != [5, 6, 8, 7, 2], "Your labels keep the prompt: labels before the answer must be -100"
assert labels[1][3:] == [-100, -100], (
    f"Padding must not be learned: its labels are -100, the second row ends in {labels[1][3:]}"
)
assert labels == [[-100, -100, -100, 7, 2], [-100, 9, 2, -100, -100]], (
    f"labels are -100 but for the answer's ids, each at its own place; yours are {labels}"
)
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(3)
for _n in (1, 2, 7):
    _examples = [
        Example(
            tuple(_rng.integers(3, 90, _rng.integers(1, 9)).tolist()),
            tuple(_rng.integers(3, 90, _rng.integers(1, 6)).tolist()),
        )
        for _ in range(_n)
    ]
    _got = collate(_examples, pad_id=1)
    for _row, _example in enumerate(_examples):
        _end = len(_example)
        _ids, _labels = _got["input_ids"][_row].tolist(), _got["labels"][_row].tolist()
        assert _ids[:_end] == [*_example.prompt, *_example.answer], f"Row {_row} must start with prompt and answer"
        assert set(_ids[_end:]) <= {1}, f"Row {_row} is filled up with {set(_ids[_end:])} instead of pad_id = 1"
        _learned = [i for i, label in enumerate(_labels) if label != -100]
        assert _learned == list(range(len(_example.prompt), _end)), (
            f"Row {_row}: exactly the answer's places are learned"
        )
        assert _labels[_learned[0] : _end] == list(_example.answer), f"Row {_row}: an answer's label is its own id"
assert collate([Example((), (4, 2))], pad_id=0)["labels"].tolist() == [[4, 2]], "A prompt may be empty"
### END HIDDEN TESTS

# %% check="collate" points=1
padded_with_end = collate([Example((5, 2, 6), (7, 2)), Example((5,), (2,))], pad_id=2)
assert padded_with_end["attention_mask"].tolist() != [[0, 0, 0, 1, 1], [0, 1, 0, 0, 0]], (
    "Your attention mask hides the prompt: it says what is read, and the prompt is read. The labels say what is learned"
)
assert padded_with_end["attention_mask"].min() == 0, "Your attention mask is 1 everywhere: on the padding it is 0"
assert padded_with_end["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], (
    "Here the padding is the end-of-sequence token, 2, which also occurs inside: count the tokens, do not compare ids; "
    f"your mask is {padded_with_end['attention_mask'].tolist()}"
)
assert padded_with_end["labels"].tolist() == [[-100, -100, -100, 7, 2], [-100, 2, -100, -100, -100]], (
    "The end of the answer must be learned also when it is the padding token, or the model never learns to stop; "
    f"your labels are {padded_with_end['labels'].tolist()}"
)
### BEGIN HIDDEN TESTS
for _pad in (0, 2, 7):
    _got = collate([Example((7, 7), (7, 2)), Example((7,), (2,)), Example((2, 2, 2), (7, 7, 2))], pad_id=_pad)
    assert _got["attention_mask"].sum(dim=1).tolist() == [4, 2, 6], f"pad_id {_pad}: the mask has one 1 a real token"
    assert (_got["labels"] != -100).sum(dim=1).tolist() == [2, 1, 3], f"pad_id {_pad}: exactly the answers are learned"
### END HIDDEN TESTS

# %% check="collate" points=1
theirs = DataCollatorForLanguageModeling(pad_token_id=3)(
    [
        {"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, 2]},
        {"input_ids": [8, 9, 4, 3, 2], "labels": [-100, 9, 4, 3, 2]},
        {"input_ids": [6, 2], "labels": [-100, 2]},
    ]
)
mine = collate([Example((5, 6), (7, 2)), Example((8,), (9, 4, 3, 2)), Example((6,), (2,))], pad_id=3)
assert set(mine) == set(theirs), f"trl's collator returns {sorted(theirs)}, yours {sorted(mine)}"
for key in theirs:
    assert torch.equal(mine[key], theirs[key]), (
        f"{key} differs from what trl's collator returns: {mine[key].tolist()}, not {theirs[key].tolist()}"
    )
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(8)
for _n in (1, 3, 6):
    _examples = [
        Example(
            tuple(_rng.integers(0, 50, _rng.integers(1, 12)).tolist()),
            tuple(_rng.integers(0, 50, _rng.integers(1, 7)).tolist()),
        )
        for _ in range(_n)
    ]
    _rows = [{"input_ids": [*e.prompt, *e.answer], "labels": [-100 for _ in e.prompt] + [*e.answer]} for e in _examples]
    _theirs, _mine = DataCollatorForLanguageModeling(pad_token_id=0)(_rows), collate(_examples, pad_id=0)
    for _key in _theirs:
        assert torch.equal(_mine[_key], _theirs[_key]), f"{_key} of {_n} random examples differs from trl's collator's"
### END HIDDEN TESTS


# %% mistake="keeps the prompt in the labels" of="collate" says="Your labels keep the prompt"
def collate(examples, pad_id):
    t = max(len(e) for e in examples)
    ids = torch.tensor([[*e.prompt, *e.answer] + [pad_id] * (t - len(e)) for e in examples])
    mask = torch.tensor([[1] * len(e) + [0] * (t - len(e)) for e in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


# %% mistake="shifts the labels itself" of="collate" says="Your labels are shifted to the left"
def collate(examples, pad_id):
    t = max(len(e) for e in examples)
    ids = torch.tensor([[*e.prompt, *e.answer] + [pad_id] * (t - len(e)) for e in examples])
    mask = torch.tensor([[1] * len(e) + [0] * (t - len(e)) for e in examples])
    labels = torch.tensor([[-100] * len(e.prompt) + [*e.answer] + [-100] * (t - len(e)) for e in examples])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.cat([labels[:, 1:], torch.full((len(ids), 1), -100)], 1),
    }


# %% mistake="learns the padding" of="collate" says="Padding must not be learned"
def collate(examples, pad_id):
    t = max(len(e) for e in examples)
    ids = torch.tensor([[*e.prompt, *e.answer] + [pad_id] * (t - len(e)) for e in examples])
    mask = torch.tensor([[1] * len(e) + [0] * (t - len(e)) for e in examples])
    labels = torch.tensor([[-100] * len(e.prompt) + [*e.answer] + [pad_id] * (t - len(e)) for e in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# %% mistake="finds the padding by its id" of="collate" says="count the tokens, do not compare ids"
def collate(examples, pad_id):
    t = max(len(e) for e in examples)
    ids = torch.tensor([[*e.prompt, *e.answer] + [pad_id] * (t - len(e)) for e in examples])
    labels = torch.tensor([[-100] * len(e.prompt) + [*e.answer] + [-100] * (t - len(e)) for e in examples])
    return {"input_ids": ids, "attention_mask": (ids != pad_id).long(), "labels": labels}


# %% mistake="never learns the end" of="collate" says="the model never learns to stop"
def collate(examples, pad_id):
    t = max(len(e) for e in examples)
    ids = torch.tensor([[*e.prompt, *e.answer] + [pad_id] * (t - len(e)) for e in examples])
    mask = torch.tensor([[1] * len(e) + [0] * (t - len(e)) for e in examples])
    labels = torch.tensor([[-100] * len(e.prompt) + [*e.answer] + [-100] * (t - len(e)) for e in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(ids == pad_id, -100)}


# %% mistake="a mask of what is learned" of="collate" says="Your attention mask hides the prompt"
def collate(examples, pad_id):
    t = max(len(e) for e in examples)
    ids = torch.tensor([[*e.prompt, *e.answer] + [pad_id] * (t - len(e)) for e in examples])
    labels = torch.tensor([[-100] * len(e.prompt) + [*e.answer] + [-100] * (t - len(e)) for e in examples])
    return {"input_ids": ids, "attention_mask": (labels != -100).long(), "labels": labels}


# %% mistake="pads on the left" of="collate" says="You fill up on the left"
def collate(examples, pad_id):
    t = max(len(e) for e in examples)
    ids = torch.tensor([[pad_id] * (t - len(e)) + [*e.prompt, *e.answer] for e in examples])
    mask = torch.tensor([[0] * (t - len(e)) + [1] * len(e) for e in examples])
    labels = torch.tensor([[-100] * (t - len(e.answer)) + [*e.answer] for e in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# %% alternative="pad_sequence and a comparison of places" of="collate"
def collate(examples, pad_id):
    rows = [torch.tensor([*e.prompt, *e.answer]) for e in examples]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    place = torch.arange(ids.shape[1])
    ends = torch.tensor([len(row) for row in rows])[:, None]
    starts = torch.tensor([len(e.prompt) for e in examples])[:, None]
    return {
        "input_ids": ids,
        "attention_mask": (place < ends).long(),
        "labels": torch.where((place >= starts) & (place < ends), ids, -100),
    }


# %% [markdown]
# What does the attention mask buy here? In training, with the padding on the right, nothing for a plain causal model: it never looks to the right, and no label counts on the padding. It matters where padding stands on the left, as in generation.


# %%
def on_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch on the model's device."""
    return {key: tensor.to(model.device) for key, tensor in batch.items()}


@torch.no_grad()
def loss_of(**inputs: Any) -> float:
    """The model's loss on these inputs, labels among them; without a key-value cache unless you ask for one."""
    return model(**{"use_cache": False, **inputs}).loss.item()


batch = on_device(collate(eight, pad_id))
padded_loss = loss_of(**batch)
without_mask = loss_of(input_ids=batch["input_ids"], labels=batch["labels"])
print(
    f"loss of eight tickets: {padded_loss:.4f} nats a token; without the attention mask it differs by {abs(without_mask - padded_loss):.0e}"
)

shuffled = triage.batches(triage.encode(tokenizer, worlds[0].tickets(512)), size=8, steps=32, seed=seed)
grouped = [one.attention_mask for one in shuffled]
print(
    f"padding in batches of 8 tickets of similar length: {1 - sum(m.sum() for m in grouped) / sum(m.numel() for m in grouped):.0%},",
    end=" ",
)
print(f"in the eight above, as they came: {1 - batch['attention_mask'].float().mean():.0%}")

# %% [markdown]
# ## Many examples, one row
#
# Padding is computed and thrown away. Chat data, where one turn has 20 tokens and the next 2,000, wastes most of a batch. **Packing** puts examples one after the other into a single row $(1, T)$, with no padding at all. Two things must then start again with every example, or the row is one long text to the model:
#
# - the **position**: the first token of each example stands at 0;
# - the **attention**: with $s(i)$ the number of the example that place $i$ belongs to, place $i$ may look at place $j$ exactly when $s(i) = s(j)$ and $j \le i$: a matrix of triangles along the diagonal.
#
# If either fails, examples read each other: *cross-contamination* (Krell et al., 2021). How much that hurts is disputed for pretraining: GPT-3 had no mask between documents (Brown et al., 2020, appendix B); for Llama 3 a mask mattered little in standard pretraining and much on very long sequences (Grattafiori et al., 2024, section 3.2); Zhao et al. (2024) measured a clear gain. Finetuning examples are short and alike and contradict each other, and in use each comes alone.
#
# **Exercise.** Two functions.
#
# 1. `pack(examples)` returns a dictionary of three `int64` tensors, each `(1, T)`, `T` being the sum of the lengths: `"input_ids"`; `"position_ids"`, which count from 0 in each example; and `"labels"`, −100 on prompts and each answer's ids at their own places, as before. One more −100: the **first token of every example** is never a label, not even when it belongs to the answer because the prompt is empty. What stands before it in the row is another example's end.
# 2. `block_mask(lengths)` returns the `bool` tensor `(1, 1, T, T)` (batch, head, query, key) for examples of these lengths: `True` at `[0, 0, i, j]` when place $i$ may look at place $j$.
#
# `pack([Example((5, 6), (7, 2)), Example((), (9, 2))])` has `position_ids` `[[0, 1, 2, 3, 0, 1]]` and `labels` `[[-100, -100, 7, 2, -100, 2]]`; `block_mask([2, 1])[0, 0]` is `[[True, False, False], [True, True, False], [False, False, True]]`. *About 10 lines.*
#
# <details><summary>Hint 1</summary>Neither function needs the other. For the mask, draw the 3 × 3 matrix of the example: which two conditions make an entry true?</details>
# <details><summary>Hint 2</summary>For the mask, give every place the number of its example (<code>torch.repeat_interleave</code>) and compare all pairs; <code>tril</code> keeps the past. For the labels, build a list per example and set its first entry at the end.</details>
# <details><summary>Hint 3</summary>owner = repeat_interleave(arange(len(lengths)), tensor(lengths)); allowed = owner[:, None] == owner[None, :], then <code>.tril()</code> and two leading axes with <code>[None, None]</code>. In pack, extend three lists example by example, and write −100 at the place where the example begins.</details>


# %% exercise="pack" difficulty=3 minutes=13
def pack(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return `input_ids`, `position_ids` and `labels` of the examples in one row, each (1, T) int64."""
    ### BEGIN SOLUTION
    ids, positions, labels = [], [], []
    for example in examples:
        ids += example.prompt + example.answer
        positions += range(len(example))
        own = [-100] * len(example.prompt) + list(example.answer)
        labels += [-100, *own[1:]]
    return {
        name: torch.tensor([row])
        for name, row in zip(("input_ids", "position_ids", "labels"), (ids, positions, labels), strict=True)
    }
    ### END SOLUTION


def block_mask(lengths: Sequence[int]) -> Tensor:
    """Return which place may look at which, (1, 1, T, T) bool, for packed examples of these lengths."""
    ### BEGIN SOLUTION
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (owner[:, None] == owner[None, :]).tril()[None, None]
    ### END SOLUTION


# %% check="pack" points=2
packed = pack([Example((5, 6), (7, 2)), Example((8,), (9, 4, 2))])
assert set(packed) == {"input_ids", "position_ids", "labels"}, (
    f"The keys are input_ids, position_ids and labels; yours are {sorted(packed)}"
)
for key, tensor in packed.items():
    assert isinstance(tensor, Tensor), f"{key} is a torch tensor; yours is a {type(tensor).__name__}"
    assert (tensor.shape, tensor.dtype) == ((1, 8), torch.int64), (
        f"{key} is one row of 4 + 4 places, (1, 8) int64; yours is {tuple(tensor.shape)} {tensor.dtype}"
    )
assert packed["input_ids"].tolist() == [[5, 6, 7, 2, 8, 9, 4, 2]], (
    f"input_ids are the examples one after the other, without padding; yours are {packed['input_ids'].tolist()}"
)
assert packed["position_ids"].tolist() != [[0, 1, 2, 3, 4, 5, 6, 7]], (
    "Your positions run on: the second example starts at 4 instead of 0, as if the first one were its context"
)
assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]], (
    f"position_ids count from 0 in each example; yours are {packed['position_ids'].tolist()}"
)
assert packed["labels"][0, 3] == packed["labels"][0, 7] == 2, (
    "The end of an answer is a label: its own example predicts it. It is an example's first token that nothing predicts"
)
assert packed["labels"].tolist() == [[-100, -100, 7, 2, -100, 9, 4, 2]], (
    f"labels are -100 on the prompts and the answers' ids at their places; yours are {packed['labels'].tolist()}"
)
no_prompt = pack([Example((5,), (7, 2)), Example((), (9, 2))])["labels"].tolist()
assert no_prompt != [[-100, 7, 2, 9, 2]], (
    "The first token of an example is still a label: the end of the example before it would be trained to predict it"
)
assert no_prompt == [[-100, 7, 2, -100, 2]], (
    f"With an empty prompt the labels are [-100, 7, 2, -100, 2]; yours are {no_prompt}"
)
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(5)
for _n in (1, 2, 5):
    _examples = [
        Example(
            tuple(_rng.integers(0, 90, _rng.integers(0, 5)).tolist()),
            tuple(_rng.integers(0, 90, _rng.integers(1, 6)).tolist()),
        )
        for _ in range(_n)
    ]
    _rows = [{"input_ids": [*e.prompt, *e.answer], "labels": [-100 for _ in e.prompt] + [*e.answer]} for e in _examples]
    _theirs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(_rows)
    _mine = pack(_examples)
    for _key in ("input_ids", "position_ids", "labels"):
        assert torch.equal(_mine[_key], _theirs[_key]), (
            f"{_n} random examples: {_key} differs from trl's padding-free collator: {_mine[_key].tolist()}, not {_theirs[_key].tolist()}"
        )
### END HIDDEN TESTS

# %% check="pack" points=2
allowed = block_mask([2, 3])
assert allowed.dtype == torch.bool, f"Return a mask of True and False (torch.bool); yours is {allowed.dtype}"
assert allowed.shape == (1, 1, 5, 5), (
    f"The mask is (batch, head, query, key) = (1, 1, 5, 5); yours is {tuple(allowed.shape)}"
)
square = allowed[0, 0]
assert not square[2:, :2].any(), (
    "An example looks at the one before it: allow a pair only when both belong to one example"
)
assert not square[0, 1], (
    "Place 0 looks at place 1, its own future: queries are the rows, keys the columns, and only j <= i counts"
)
assert square.diagonal().all(), "A place also looks at itself: j <= i, not j < i"
assert square[4, 2], "Place 4 does not see place 2, which belongs to its own example and lies in the past"
assert torch.equal(
    square, torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]).bool()
), f"For lengths 2 and 3 the mask is two triangles along the diagonal; yours is {square.int().tolist()}"
### BEGIN HIDDEN TESTS
for _lengths in ([1], [4], [1, 1, 1], [3, 1, 2], [1, 5, 1, 4]):
    _want = torch.block_diag(*[torch.ones(n, n).tril() for n in _lengths]).bool()
    _got = block_mask(_lengths)
    assert _got.shape == (1, 1, sum(_lengths), sum(_lengths)), f"lengths {_lengths}: the mask is (1, 1, T, T)"
    assert torch.equal(_got[0, 0], _want), f"lengths {_lengths}: the mask is not a row of triangles"
### END HIDDEN TESTS

# %% check="pack" points=1
torch.manual_seed(3)
sizes = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
tiny = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).eval()
three = [Example((5, 6), (7, 2)), Example((8, 31, 12, 9), (9, 4, 2)), Example((20,), (21, 22, 23, 24, 2))]
with torch.no_grad():
    summed = 0.0
    for one in three:  # each alone in its row: nothing to pad, nothing to pack
        alone = torch.tensor([one.prompt + one.answer])
        log_p = tiny(input_ids=alone).logits[0, len(one.prompt) - 1 : -1].log_softmax(-1)
        summed -= log_p.gather(1, torch.tensor(one.answer)[:, None]).sum().item()
    row = pack(three)
    full = torch.zeros(1, 1, 17, 17).masked_fill(~block_mask([4, 7, 6]), -1e30)
    packed_loss = tiny(**row, attention_mask=full, use_cache=False).loss.item()
assert abs(packed_loss - summed / 10) < 1e-5, (
    f"Packed, the loss is {packed_loss:.6f}; the examples alone give {summed / 10:.6f} a token: an example "
    "reads another one, or other labels count"
)


# %% mistake="positions run on" of="pack" says="Your positions run on"
def pack(examples):
    ids = [t for e in examples for t in (*e.prompt, *e.answer)]
    labels = [t for e in examples for t in [-100] * len(e.prompt) + [*e.answer]]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.arange(len(ids))[None],
        "labels": torch.tensor([labels]),
    }


def block_mask(lengths):
    return torch.block_diag(*[torch.ones(n, n).tril() for n in lengths]).bool()[None, None]


# %% mistake="lets one example predict the next one's first token" of="pack" says="The first token of an example is still a label"
def pack(examples):
    ids = [t for e in examples for t in (*e.prompt, *e.answer)]
    labels = [t for e in examples for t in [-100] * len(e.prompt) + [*e.answer]]
    positions = [i for e in examples for i in range(len(e))]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "labels": torch.tensor([labels]),
    }


def block_mask(lengths):
    return torch.block_diag(*[torch.ones(n, n).tril() for n in lengths]).bool()[None, None]


# %% mistake="cuts the labels at the wrong end" of="pack" says="The end of an answer is a label"
def pack(examples):
    ids = [t for e in examples for t in (*e.prompt, *e.answer)]
    labels = [t for e in examples for t in [*([-100] * len(e.prompt) + [*e.answer])[:-1], -100]]
    positions = [i for e in examples for i in range(len(e))]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "labels": torch.tensor([labels]),
    }


def block_mask(lengths):
    return torch.block_diag(*[torch.ones(n, n).tril() for n in lengths]).bool()[None, None]


# %% mistake="an ordinary causal mask" of="pack" says="looks at the one before it"
def pack(examples):
    ids = [t for e in examples for t in (*e.prompt, *e.answer)]
    labels = [t for e in examples for t in [-100, *([-100] * len(e.prompt) + [*e.answer])[1:]]]
    positions = [i for e in examples for i in range(len(e))]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "labels": torch.tensor([labels]),
    }


def block_mask(lengths):
    return torch.ones(sum(lengths), sum(lengths)).tril().bool()[None, None]


# %% mistake="blocks that see the future" of="pack" says="its own future"
def pack(examples):
    ids = [t for e in examples for t in (*e.prompt, *e.answer)]
    labels = [t for e in examples for t in [-100, *([-100] * len(e.prompt) + [*e.answer])[1:]]]
    positions = [i for e in examples for i in range(len(e))]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "labels": torch.tensor([labels]),
    }


def block_mask(lengths):
    return torch.block_diag(*[torch.ones(n, n) for n in lengths]).bool()[None, None]


# %% mistake="a mask that is added, not asked" of="pack" says="Return a mask of True and False"
def pack(examples):
    ids = [t for e in examples for t in (*e.prompt, *e.answer)]
    labels = [t for e in examples for t in [-100, *([-100] * len(e.prompt) + [*e.answer])[1:]]]
    positions = [i for e in examples for i in range(len(e))]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "labels": torch.tensor([labels]),
    }


def block_mask(lengths):
    return torch.block_diag(*[torch.ones(n, n).tril() for n in lengths]).log()[None, None]


# %% alternative="positions by arithmetic, triangles by block_diag" of="pack"
def pack(examples):
    lengths = torch.tensor([len(e) for e in examples])
    ids = torch.cat([torch.tensor([*e.prompt, *e.answer]) for e in examples])
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    positions = torch.arange(len(ids)) - starts
    first_answers = torch.tensor([max(1, len(e.prompt)) for e in examples]).repeat_interleave(lengths)
    labels = torch.where(positions >= first_answers, ids, -100)
    return {"input_ids": ids[None], "position_ids": positions[None], "labels": labels[None]}


def block_mask(lengths):
    return torch.block_diag(*[torch.ones(n, n).tril() for n in lengths]).bool()[None, None]


# %% [markdown]
# Here are the eight tickets both ways: as a padded batch, in which {{padding_share}} of the places are padding, and the attention that the packed row allows.

# %%
lengths = [len(example) for example in eight]
allowed = block_mask(lengths)
kinds = torch.where(batch["labels"] != -100, 2, batch["attention_mask"]).cpu()  # 0 padding, 1 prompt, 2 answer

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(1.7, 1))
left.imshow(kinds, aspect="auto", cmap=ListedColormap(["#f4e3da", "#c9c9c9", COLOURS.after]), interpolation="nearest")
first = eight[0]
left.text(len(first.prompt) / 2, 0, "prompt: read, label -100", ha="center", va="center", fontsize=9)
left.text(
    len(first.prompt) + len(first.answer) / 2, 0, "answer: learned", ha="center", va="center", fontsize=9, color="white"
)
shortest = int(np.argmin(lengths))
left.text(
    (lengths[shortest] + kinds.shape[1] - 1) / 2,
    shortest,
    "padding",
    ha="center",
    va="center",
    fontsize=9,
    color=COLOURS.wrong,
)
left.set(xlabel="place in the row / tokens", ylabel="example", title=f"A padded batch: {kinds.numel()} places")
left.grid(False)
right.imshow(allowed[0, 0], cmap=ListedColormap(["#fcfcfb", COLOURS.after]), interpolation="nearest")
right.set(xlabel="key / tokens", ylabel="query / tokens", title=f"Packed: one row of {sum(lengths)}")
right.grid(False)
plt.show()
card.record(
    "padding_share",
    1 - sum(lengths) / kinds.numel(),
    format=".0%",
    tolerance=0.1,
    label="padding in a batch of eight tickets as they come",
)

# %% [markdown]
# A dense mask of $T^2$ entries still computes what it forbids; kernels for packed rows (FlashAttention's *varlen*, PyTorch's FlexAttention) visit the triangles alone. So packing saves the padding in every layer, and needs such a kernel not to lose it again in attention when $T$ is large.
#
# ## A test that needs no reference
#
# You will meet packing in libraries whose kernels you did not write. Comparing the loss with the padded one finds a leak only if the leak changes that loss visibly. A sharper test asks the model directly: *change one example; does anything move in the others?*
#
# **Exercise (write the test).** `contamination(logits_of, input_ids, lengths)` returns a `float`.
#
# - `logits_of` is a function from ids `(1, T)` to logits `(1, T, V)`. Positions and mask are fixed inside it.
# - `input_ids` is `(1, T)` `int64`, and `lengths` says where the examples lie in it, in order.
# - For **each** example in turn, replace all of its tokens $x$ by $(x + 1) \bmod V$, leave the others as they are, and compare the logits with those of the unchanged row at the places of all **other** examples. Return the largest absolute change that you see anywhere; 0.0 for a single example.
# - `input_ids` is the caller's: it must be as before when you return.
#
# A model that at each place returns the sum of all ids up to it (as each of $V = 50$ logits) has the contamination 2.0 for `input_ids = [[3, 5, 8]]` and `lengths = [2, 1]`: changing the first example to 4, 6 moves the last place from 16 to 18, and changing the second moves nothing but itself. *About 9 lines.*
#
# <details><summary>Hint 1</summary>Which places may move when example k is changed? Which must not? A leak can go forward and, with a wrong mask, backward.</details>
# <details><summary>Hint 2</summary>Run once unchanged. Then loop over the examples with a running start; <code>clone</code> the ids before you change a stretch of them. V is the last dimension of the logits.</details>
# <details><summary>Hint 3</summary>moved = (logits_of(changed) - before).abs() is (1, T, V). Set <code>moved[:, start:end]</code> to 0, take the maximum, keep the largest over all examples, and return it as a float.</details>


# %% exercise="contamination" difficulty=3 minutes=10
@torch.no_grad()
def contamination(logits_of: Callable[[Tensor], Tensor], input_ids: Tensor, lengths: Sequence[int]) -> float:
    """Return how far the logits of an example move at most when another example of the packed row is changed."""
    ### BEGIN SOLUTION
    before = logits_of(input_ids)
    worst, start = 0.0, 0
    for length in lengths:
        end = start + length
        changed = input_ids.clone()
        changed[:, start:end] = (changed[:, start:end] + 1) % before.shape[-1]
        moved = (logits_of(changed) - before).abs()
        moved[:, start:end] = 0
        worst, start = max(worst, moved.max().item()), end
    return worst
    ### END SOLUTION


# %% check="contamination" points=2
def spread(values: Tensor, vocabulary: int = 50) -> Tensor:
    """One number a place, (1, T), as equal logits, (1, T, V)."""
    return values.float()[..., None].repeat(1, 1, vocabulary)


def block_sums(ids: Tensor) -> Tensor:
    """A clean model of examples of lengths 2, 1 and 3: sums that start again with each example."""
    return spread(torch.cat([part.cumsum(1) for part in ids.split([2, 1, 3], dim=1)], dim=1))


ids = torch.tensor([[3, 5, 8, 1, 4, 9]])
kept = ids.clone()
got = contamination(block_sums, ids, [2, 1, 3])
assert torch.equal(ids, kept), "You changed the caller's input_ids: work on a clone"
assert isinstance(got, float), f"Return a Python float; yours is {type(got).__name__}"
assert got == 0.0, (
    f"A clean model was accused ({got}): an example may move its own logits, so look at the places of the others only"
)
got = contamination(lambda ids: spread(ids.cumsum(1)), torch.tensor([[3, 5, 8]]), [2, 1])
assert got != 0.0, (
    "A model that sums over everything before a place was acquitted: compare at the places of the other examples"
)
assert got == 2.0, f"In the example of the text the answer is 2.0, the largest absolute change; yours is {got}"
assert isinstance(got, float), f"Return a Python float; yours is {type(got).__name__}"
got = contamination(lambda ids: spread(ids.cumsum(1)) * (torch.arange(50) == 7), torch.tensor([[3, 5, 8]]), [2, 1])
assert got == 2.0, f"One logit of 50 moves by 2.0: take the largest change over the vocabulary; you return {got}"
### BEGIN HIDDEN TESTS
_rng = torch.Generator().manual_seed(2)
for _lengths in ([1], [5], [2, 3], [1, 1, 1, 1], [4, 1, 2]):
    _ids = torch.randint(0, 50, (1, sum(_lengths)), generator=_rng)
    _clean = lambda ids, n=_lengths: spread(torch.cat([part.cumsum(1) for part in ids.split(n, dim=1)], dim=1))
    assert contamination(_clean, _ids, _lengths) == 0.0, f"lengths {_lengths}: a clean model was accused"
### END HIDDEN TESTS

# %% check="contamination" points=2
guilty = {
    "reads backward, as without a causal mask": lambda ids: spread(ids.flip(1).cumsum(1).flip(1)),
    "the second example reads the first one's last token, the third nothing": lambda ids: spread(
        torch.cat([ids[:, :2], ids[:, 1:2] + ids[:, 2:3], ids[:, 3:]], dim=1)
    ),
    "only the third example is contaminated, by the second": lambda ids: spread(
        torch.cat([ids[:, :3], ids[:, 2:3] + ids[:, 3:]], dim=1)
    ),
    "only the first example is contaminated, by the third": lambda ids: spread(
        torch.cat([ids[:, :2] + ids[:, 5:], ids[:, 2:]], dim=1)
    ),
    "its logits fall": lambda ids: spread(-ids.cumsum(1)),
    "two logits move in opposite directions": lambda ids: torch.stack([ids.cumsum(1), -ids.cumsum(1)], dim=-1).float(),
}
for crime, logits_of in guilty.items():
    got = contamination(logits_of, torch.tensor([[0, 0, 1, 0, 1, 1]]), [2, 1, 3])
    assert got > 0.0, (
        f"A contaminated model was acquitted: {crime}. Change every example in turn and look at all others"
    )
### BEGIN HIDDEN TESTS
_ids = torch.tensor([[3, 5, 8, 1, 4, 9]])
for _leak, _want in ((0.5, 1.5), (2.0, 6.0)):
    _third_reads_second = lambda ids, leak=_leak: spread(
        torch.cat([ids[:, :5], ids[:, 5:] + leak * ids[:, 2:5].sum()], dim=1)
    )
    _got = contamination(_third_reads_second, _ids, [2, 3, 1])
    assert abs(_got - _want) < 1e-6, (
        f"Three tokens, each moved by 1, leak {_leak} each: the largest change is {_want}, not {_got}"
    )
for _vocabulary, _want in ((10, 9.0), (12, 1.0)):
    _got = contamination(lambda ids, v=_vocabulary: spread(ids.cumsum(1), v), torch.tensor([[9, 0]]), [1, 1])
    assert _got == _want, (
        f"The token 9 becomes {10 % _vocabulary} when the logits have {_vocabulary} entries, their last dimension: the "
        f"contamination is {_want}, yours is {_got}"
    )
### END HIDDEN TESTS


# %% mistake="looks at the changed example too" of="contamination" says="A clean model was accused"
def contamination(logits_of, input_ids, lengths):
    before, worst, start = logits_of(input_ids), 0.0, 0
    for length in lengths:
        changed = input_ids.clone()
        changed[:, start : start + length] = (changed[:, start : start + length] + 1) % before.shape[-1]
        worst = max(worst, (logits_of(changed) - before).abs().max().item())
        start += length
    return worst


# %% mistake="changes the caller's row" of="contamination" says="work on a clone"
def contamination(logits_of, input_ids, lengths):
    before, worst, start = logits_of(input_ids), 0.0, 0
    for length in lengths:
        end = start + length
        input_ids[:, start:end] = (input_ids[:, start:end] + 1) % before.shape[-1]
        moved = (logits_of(input_ids) - before).abs()
        moved[:, start:end] = 0
        worst, start = max(worst, moved.max().item()), end
    return worst


# %% mistake="changes the first example only" of="contamination" says="A contaminated model was acquitted"
def contamination(logits_of, input_ids, lengths):
    before, changed = logits_of(input_ids), input_ids.clone()
    changed[:, : lengths[0]] = (changed[:, : lengths[0]] + 1) % before.shape[-1]
    moved = (logits_of(changed) - before).abs()[:, lengths[0] :]
    return moved.max().item() if moved.numel() else 0.0


# %% mistake="looks at later examples only" of="contamination" says="reads backward"
def contamination(logits_of, input_ids, lengths):
    before, worst, start = logits_of(input_ids), 0.0, 0
    for length in lengths:
        end = start + length
        changed = input_ids.clone()
        changed[:, start:end] = (changed[:, start:end] + 1) % before.shape[-1]
        moved = (logits_of(changed) - before).abs()[:, end:]
        worst, start = max([worst, *moved.flatten().tolist()]), end
    return worst


# %% mistake="leaves the last example alone" of="contamination" says="the first example is contaminated, by the third"
def contamination(logits_of, input_ids, lengths):
    before, worst, start = logits_of(input_ids), 0.0, 0
    for length in lengths[:-1]:
        end = start + length
        changed = input_ids.clone()
        changed[:, start:end] = (changed[:, start:end] + 1) % before.shape[-1]
        moved = (logits_of(changed) - before).abs()
        moved[:, start:end] = 0
        worst, start = max(worst, moved.max().item()), end
    return worst


# %% mistake="the mean over the vocabulary" of="contamination" says="take the largest change over the vocabulary"
def contamination(logits_of, input_ids, lengths):
    before, worst, start = logits_of(input_ids), 0.0, 0
    for length in lengths:
        end = start + length
        changed = input_ids.clone()
        changed[:, start:end] = (changed[:, start:end] + 1) % before.shape[-1]
        moved = (logits_of(changed) - before).abs().mean(-1)
        moved[:, start:end] = 0
        worst, start = max(worst, moved.max().item()), end
    return worst


# %% mistake="a mean in which changes cancel" of="contamination" says="A contaminated model was acquitted"
def contamination(logits_of, input_ids, lengths):
    before, worst, start = logits_of(input_ids), 0.0, 0
    for length in lengths:
        end = start + length
        changed = input_ids.clone()
        changed[:, start:end] = (changed[:, start:end] + 1) % before.shape[-1]
        moved = logits_of(changed) - before
        moved[:, start:end] = 0
        worst, start = max(worst, moved.sum().abs().item() / 3), end
    return worst


# %% alternative="two masks over owners" of="contamination"
def contamination(logits_of, input_ids, lengths):
    owner = torch.tensor([k for k, n in enumerate(lengths) for _ in range(n)], device=input_ids.device)
    before = logits_of(input_ids)
    rows = [torch.where(owner == k, (input_ids + 1) % before.shape[-1], input_ids) for k in range(len(lengths))]
    moved = torch.cat([(logits_of(changed) - before).abs().amax(-1) for changed in rows])
    return (
        float(moved[owner[None, :] != torch.arange(len(lengths), device=owner.device)[:, None]].max())
        if len(lengths) > 1
        else 0.0
    )


# %% [markdown]
# Now a packed row of four tickets, fed to the model in six ways, each of which you can find in somebody's training loop. The first column compares the loss with the padded batch's, the second is your test.
#
# **Predict** before you run it, on paper: the cell lists the six ways in `ways_to_feed`. Two of them keep the examples apart. Which?

# %%
FORBIDDEN = torch.finfo(torch.float32).min  # added to a score, it leaves nothing of it after the softmax


def ways_to_feed(row: dict[str, Tensor], allowed: Tensor) -> dict[str, dict[str, Any]]:
    """What else than the ids somebody passes for a packed row (1, T) whose attention should be `allowed`."""
    restart = {"position_ids": row["position_ids"]}
    added = torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, FORBIDDEN)
    return {
        "nothing but the ids": {},
        "positions restart, and a mask of ones": {**restart, "attention_mask": torch.ones_like(row["input_ids"])},
        "positions restart, cache on (the default)": {**restart, "use_cache": True},
        "positions restart, no mask, no cache": restart,
        "your mask as numbers that are added": {**restart, "attention_mask": added},
        "your mask as bool, eager attention": {**restart, "attention_mask": allowed},
    }


def packed_errors(examples: Sequence[Example]) -> pd.DataFrame:
    """For each way of feeding the packed examples: the loss minus the padded batch's, and the contamination."""
    right = loss_of(**on_device(collate(examples, pad_id)))
    row, lengths = on_device(pack(examples)), [len(example) for example in examples]
    usual = model.config._attn_implementation
    found = []
    for name, inputs in ways_to_feed(row, block_mask(lengths).to(model.device)).items():
        model.set_attn_implementation("eager" if "eager" in name else usual)
        error = loss_of(input_ids=row["input_ids"], labels=row["labels"], **inputs) - right
        logits_of = lambda ids, inputs=inputs: model(input_ids=ids, **{"use_cache": False, **inputs}).logits
        found.append((name, error, contamination(logits_of, row["input_ids"], lengths)))
    model.set_attn_implementation(usual)
    return pd.DataFrame(found, columns=["how the row is fed", "error of the loss / nats", "contamination / logits"])


errors = packed_errors(eight[:4])
display(errors.style.format({errors.columns[1]: "{:+.1e}", errors.columns[2]: "{:.1e}"}).hide(axis="index"))
naive, _, cached, *_ = errors[errors.columns[1]].abs()
card.record(
    "naive_error_before",
    naive,
    format=".3f",
    tolerance=1.0,
    label="base model, packed with the ids alone: the loss is off by",
    unit="nats",
)
card.record(
    "half_fix_error",
    cached,
    format=".2f",
    tolerance=2.0,
    label="base model, positions restart but the cache is on: the loss is off by",
    unit="nats",
)

# %% [markdown]
# Two rows are right, to rounding: your mask, and the row that gives *no* mask at all. transformers finds the borders of the examples in `position_ids` alone, wherever the positions do not go up by one, but only when there is neither an attention mask nor a cache. A mask of ones, or `use_cache` left on, and it silently treats the row as one text whose positions repeat. Half a repair is not half the error: with the cache on the loss is off by {{half_fix_error}} nats, with nothing repaired by {{naive_error_before}}. Trainers switch the cache off; a loop of your own has to.
#
# The last row is another trap. PyTorch's fused attention (`sdpa`, the default) reads a bool mask as permission. The eager implementation *adds* the mask to the scores, and adds True as 1.
#
# The two columns have different units and different uses. An error of the loss can be small because the leak happens not to matter to a model that does not know the task, or because errors of two signs cancel; the contamination is zero or it is not. Further down you meet the same table again, after training.
#
# `SFTTrainer(packing=True)` and `padding_free=True` build exactly your `pack`, without a mask, as you see next; further down you compare the whole step. trl recommends FlashAttention for it; with the versions here, PyTorch's own attention keeps the examples apart as well. Its strategy `"wrapped"` is the first row of the table: it cuts the stream of tokens every `max_length`, and lets examples read each other.

# %%
flattened = DataCollatorForLanguageModeling(pad_token_id=pad_id, padding_free=True)(
    [
        {key: tensor[0].tolist() for key, tensor in collate([example], pad_id).items() if key != "attention_mask"}
        for example in eight
    ]
)
for key, tensor in pack(eight).items():
    print(f"{key:12} equal to trl's padding-free collator's: {torch.equal(tensor, flattened[key])}")

# %% [markdown]
# ## Accumulate, and get the same gradient
#
# When a batch does not fit into memory, it is split into micro-batches whose gradients add up before one optimizer step. The sum should be the gradient of the whole batch. With documents of the pretraining stream beside tickets, as later in this lesson, the micro-batches have very different numbers of labels:


# %%
def stream_examples(first: int, count: int, longest: int) -> list[Example]:
    """`count` documents of the pretraining stream, from number `first` on, none longer than `longest` tokens."""
    found: list[Example] = []
    number = first
    while len(found) < count:
        ids = [*tokenizer(document(TRAIN_SEEDS[number]).text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) <= longest:
            found.append(Example(tuple(ids[:1]), tuple(ids[1:])))  # all of it is learned, but for the first token
        number += 1
    return found


def mean_of_means(model: torch.nn.Module, micro_batches: Sequence[dict[str, Tensor]]) -> float:
    """Accumulate the gradient of the loss over the micro-batches; return the loss. Do not use: it has a bug."""
    total = 0.0
    for batch in micro_batches:
        loss = model(**batch, use_cache=False).loss / len(micro_batches)
        loss.backward()
        total += loss.item()
    return total


def flat_gradient(model: torch.nn.Module) -> Tensor:
    """A copy of the gradient of all weights, as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


def relative_difference(gradient: Tensor, reference: Tensor) -> float:
    """The length of the difference, as a share of the reference's length."""
    return ((gradient - reference).norm() / reference.norm()).item()


mixed = [*eight[:4], *stream_examples(0, 4, longest=10_000)]
splits = {
    size: [on_device(collate(mixed[at : at + size], pad_id)) for at in range(0, 8, size)] for size in (8, 4, 2, 1)
}
print("labels in micro-batches of 2:", [int((part["labels"] != -100).sum()) for part in splits[2]])
rows, gradients = [], {}
for size, parts in splits.items():
    model.zero_grad()
    loss = mean_of_means(model, parts)
    gradients[size] = flat_gradient(model)
    rows.append((f"{len(parts)} of {size}", loss, relative_difference(gradients[size], gradients[8])))
columns = ["micro-batches", "loss / nats a token", "gradient, off by"]
display(
    pd.DataFrame(rows, columns=columns).style.format({columns[1]: "{:.4f}", columns[2]: "{:.1%}"}).hide(axis="index")
)
model.zero_grad()
card.record(
    "accumulation_bug",
    rows[2][2],
    format=".0%",
    tolerance=0.5,
    label="mean of means, 4 micro-batches of 2: the gradient is off by",
)

# %% [markdown]
# The same eight examples and the same weights have four losses and four gradients. Nothing fails, and a smaller loss is no better model: it is a loss of something else.
#
# **Exercise (find and fix).** Write `accumulate(model, micro_batches)` with the same interface:
#
# - it leaves in `.grad` the gradient of the loss of the whole batch, $L$ from the beginning of the lesson: the mean over *all* counted labels of all micro-batches (to a relative 1e-6: sums in another order), and returns that loss as a `float`;
# - a micro-batch is a dictionary with `input_ids`, `attention_mask`, `labels`, each `(n, t)`, with its own `n` and `t`. It may have no counted label at all, and then contributes nothing; the whole batch has at least one;
# - which labels count? The logits at place $i$ predict the label at $i + 1$, so a label at place 0 is predicted by nothing: the model leaves it out of its loss, and your count must too. (`collate` puts −100 there unless a prompt is empty. Whoever sets `labels = input_ids` has a label there.)
# - one backward pass a micro-batch, before the next one is read: only then does memory stay that of one micro-batch. The gradients are zero when it is called, and it makes no optimizer step.
# - the micro-batches are the caller's: leave them as they are.
#
# Two micro-batches, one with 10 counted labels and a mean loss of 1.0, one with 30 and 2.0: the loss is 1.75, not 1.5. *About 6 lines.*
#
# <details><summary>Hint 1</summary>By what should each micro-batch's <em>sum</em> of losses be divided? When do you know that number?</details>
# <details><summary>Hint 2</summary>Count first, over all micro-batches. Then either weight each mean with its share of the labels, or ask the model for a sum over that count: <code>model(…, num_items_in_batch=n)</code> divides the sum of the losses by n instead of averaging. The second survives a micro-batch without labels.</details>
# <details><summary>Hint 3</summary>n is the sum over micro-batches of the number of entries in <code>labels[:, 1:]</code> that are not −100. In the loop: the loss with <code>num_items_in_batch=n</code>, backward, add its item to the total.</details>


# %% exercise="accumulate" difficulty=2 minutes=9
def accumulate(model: torch.nn.Module, micro_batches: Sequence[dict[str, Tensor]]) -> float:
    """Leave the gradient of the whole batch's loss in `.grad`, one backward pass a micro-batch; return the loss."""
    ### BEGIN SOLUTION
    counted = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)
    total = 0.0
    for batch in micro_batches:
        share = model(**batch, use_cache=False, num_items_in_batch=counted).loss
        share.backward()
        total += share.item()
    return total
    ### END SOLUTION


# %% check="accumulate" points=2
torch.manual_seed(1)
sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
small = LlamaForCausalLM(LlamaConfig(**sizes)).double().eval()
whole = {"input_ids": torch.randint(0, 40, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.int64)}
whole["labels"] = whole["input_ids"].clone()
for place, answer_length in enumerate((1, 2, 7, 8)):
    whole["labels"][place, : 9 - answer_length] = -100


def parts_of(whole: dict[str, Tensor], sizes: list[int]) -> list[dict[str, Tensor]]:
    """The rows of a batch in micro-batches of these sizes."""
    split = {key: tensor.split(sizes) for key, tensor in whole.items()}
    return [{key: tensors[place] for key, tensors in split.items()} for place in range(len(sizes))]


def accumulated(whole: dict[str, Tensor], sizes: list[int]) -> tuple[float, float, float]:
    """Your loss, the whole batch's loss, and how far your gradient is from the whole batch's."""
    small.zero_grad()
    small(**whole, use_cache=False).loss.backward()
    wanted, loss = flat_gradient(small), small(**whole, use_cache=False).loss.item()
    small.zero_grad()
    mine = accumulate(small, parts_of(whole, sizes))
    assert any(p.grad is not None for p in small.parameters()), (
        "No gradient was left in .grad: call backward on each part"
    )
    return mine, loss, relative_difference(flat_gradient(small), wanted)


mine, loss, off = accumulated(whole, [4])
assert off < 1e-6, f"With a single micro-batch the gradient must be the batch's own; yours is off by {off:.0%}"
mine, loss, off = accumulated(whole, [2, 2])
assert off < 1e-6, (
    f"Split in two, the gradient is off by {off:.0%}: micro-batches with 3 and 15 labels do not weigh the same. "
    "Divide every sum by the number of labels in all micro-batches"
)
assert isinstance(mine, float), f"Return the loss as a float; yours is {type(mine).__name__}"
assert abs(mine - loss) < 1e-6, f"The loss of the whole batch is {loss:.6f}; you return {mine:.6f}"
### BEGIN HIDDEN TESTS
for _sizes in ([1, 1, 1, 1], [1, 3], [3, 1], [2, 1, 1]):
    _mine, _loss, _off = accumulated(whole, _sizes)
    assert _off < 1e-6, f"micro-batches of {_sizes}: the gradient is off by {_off:.1e}"
    assert abs(_mine - _loss) < 1e-6, f"micro-batches of {_sizes}: the loss is {_loss:.6f}, you return {_mine:.6f}"
### END HIDDEN TESTS

# %% check="accumulate" points=1
rows_alive, most_alive = 0, 0


def opened(module: torch.nn.Module, inputs: Any, logits: Tensor) -> None:
    """Count the rows whose logits wait for their backward pass."""
    global rows_alive, most_alive
    if not logits.requires_grad:
        return
    rows_alive += len(logits)
    most_alive = max(most_alive, rows_alive)
    logits.register_hook(lambda gradient: closed(len(gradient)))


def closed(rows: int) -> None:
    """Their backward pass has come."""
    global rows_alive
    rows_alive -= rows


weights = {name: tensor.clone() for name, tensor in small.state_dict().items()}
parts = parts_of({key: tensor.clone() for key, tensor in whole.items()}, [1, 1, 1, 1])
small.zero_grad()
hook = small.lm_head.register_forward_hook(opened)
try:
    accumulate(small, parts)
finally:
    hook.remove()
assert most_alive <= 1, (
    f"{most_alive} rows wait for their backward pass at once, where a micro-batch has 1: call backward on each "
    "micro-batch before you read the next. Memory is what accumulation is for"
)
assert all(torch.equal(weights[name], tensor) for name, tensor in small.state_dict().items()), (
    "The weights have changed: accumulate leaves the gradient, and the optimizer step is the caller's"
)
assert [set(part) for part in parts] == [set(whole)] * 4, "You took entries out of the caller's micro-batches"
for key, tensor in whole.items():
    assert torch.equal(torch.cat([part[key] for part in parts]), tensor), f"You changed the caller's {key}"

# %% check="accumulate" points=1
everything = {key: tensor.clone() for key, tensor in whole.items()}
everything["labels"] = everything["input_ids"].clone()  # labels at place 0 as well
everything["labels"][:2, 3:] = everything["attention_mask"][:2, 3:] = 0
everything["labels"][:2, 3:] = -100  # two short rows: 3 tokens and padding
mine, loss, off = accumulated(everything, [2, 2])
assert off < 1e-6, (
    f"With a label at place 0 the gradient is off by {off:.0%}: nothing predicts it, so count labels[:, 1:] only"
)
### BEGIN HIDDEN TESTS
_mine, _loss, _off = accumulated(everything, [1, 1, 2])
assert abs(_mine - _loss) < 1e-6, f"With labels at place 0 the loss is {_loss:.6f}, you return {_mine:.6f}"
_short, _long = parts_of(everything, [2, 2])
_short = {key: tensor[:, :3] for key, tensor in _short.items()}  # the same batch, with the padding cut off
_mine = accumulate(small, [_short, _long])
assert abs(_mine - _loss) < 1e-6, f"Micro-batches of widths 3 and 9: the loss is {_loss:.6f}, you return {_mine:.6f}"
### END HIDDEN TESTS

# %% check="accumulate" points=1
silent = {key: tensor.clone() for key, tensor in whole.items()}
silent["labels"][:2] = -100
mine, loss, off = accumulated(silent, [2, 2])
assert not math.isnan(mine), (
    "A micro-batch without a counted label has the mean 0 / 0: sum, and divide by the whole batch's count"
)
assert off < 1e-6, f"A micro-batch without a counted label contributes nothing; your gradient is off by {off:.0%}"
### BEGIN HIDDEN TESTS
_mine, _loss, _off = accumulated(silent, [1, 1, 1, 1])
assert _off < 1e-6, f"Micro-batches without labels contribute nothing; your gradient is off by {_off:.1e}"
assert abs(_mine - _loss) < 1e-6, f"The loss is {_loss:.6f}, you return {_mine}"
### END HIDDEN TESTS


# %% mistake="the mean of means" of="accumulate" says="do not weigh the same"
def accumulate(model, micro_batches):
    total = 0.0
    for batch in micro_batches:
        loss = model(**batch, use_cache=False).loss / len(micro_batches)
        loss.backward()
        total += loss.item()
    return total


# %% mistake="weighs by examples" of="accumulate" says="do not weigh the same"
def accumulate(model, micro_batches):
    rows = sum(len(batch["labels"]) for batch in micro_batches)
    total = 0.0
    for batch in micro_batches:
        loss = model(**batch, use_cache=False).loss * len(batch["labels"]) / rows
        loss.backward()
        total += loss.item()
    return total


# %% mistake="counts the tokens that are read" of="accumulate" says="With a single micro-batch"
def accumulate(model, micro_batches):
    n = sum(int(batch["attention_mask"].sum()) for batch in micro_batches)
    total = 0.0
    for batch in micro_batches:
        loss = model(**batch, use_cache=False, num_items_in_batch=n).loss
        loss.backward()
        total += loss.item()
    return total


# %% mistake="keeps the last micro-batch only" of="accumulate" says="off by"
def accumulate(model, micro_batches):
    n = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)
    total = 0.0
    for batch in micro_batches:
        model.zero_grad()
        loss = model(**batch, use_cache=False, num_items_in_batch=n).loss
        loss.backward()
        total += loss.item()
    return total


# %% mistake="one backward pass at the end" of="accumulate" says="wait for their backward pass at once"
def accumulate(model, micro_batches):
    n = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)
    loss = sum(model(**batch, use_cache=False, num_items_in_batch=n).loss for batch in micro_batches)
    loss.backward()
    return loss.item()


# %% mistake="makes the step as well" of="accumulate" says="the optimizer step is the caller's"
def accumulate(model, micro_batches):
    n = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)
    total = 0.0
    for batch in micro_batches:
        loss = model(**batch, use_cache=False, num_items_in_batch=n).loss
        loss.backward()
        total += loss.item()
    SGD(model.parameters(), lr=0.1).step()
    return total


# %% mistake="takes the labels out of the batch" of="accumulate" says="You took entries out of the caller's micro-batches"
def accumulate(model, micro_batches):
    n = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)
    total = 0.0
    for batch in micro_batches:
        targets = batch.pop("labels")[:, 1:].flatten()
        logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / n
        loss.backward()
        total += loss.item()
    return total


# %% mistake="counts labels that nothing predicts" of="accumulate" says="count labels[:, 1:] only"
def accumulate(model, micro_batches):
    n = sum(int((batch["labels"] != -100).sum()) for batch in micro_batches)
    total = 0.0
    for batch in micro_batches:
        loss = model(**batch, use_cache=False, num_items_in_batch=n).loss
        loss.backward()
        total += loss.item()
    return total


# %% mistake="weights the means, and dies of an empty one" of="accumulate" says="has the mean 0 / 0"
def accumulate(model, micro_batches):
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches]
    total = 0.0
    for batch, count in zip(micro_batches, counts, strict=True):
        loss = model(**batch, use_cache=False).loss * count / sum(counts)
        loss.backward()
        total += loss.item()
    return total


# %% alternative="sums of losses, divided at the end" of="accumulate"
def accumulate(model, micro_batches):
    loss, labels = 0.0, 0
    for batch in micro_batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        targets = batch["labels"][:, 1:].flatten()
        summed = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
        summed.backward()
        loss, labels = loss + summed.item(), labels + int((targets >= 0).sum())
    for parameter in model.parameters():
        parameter.grad.div_(labels)
    return loss / labels


# %% [markdown]
# What is wrong with the mean of means: a label in micro-batch $k$ of $K$ with $n_k$ labels gets the weight $1 / (K n_k)$ instead of $1 / \sum_k n_k$. Labels in short micro-batches shout, and how loud depends on how the batch happened to be cut.
#
# Your gradient is the whole batch's up to a relative {{accumulation_error}}, where the mean of means was off by {{accumulation_bug}}. `Trainer` does what you did: it fetches all micro-batches of a step, counts their labels (from place 1 on), and passes the count to the model as `num_items_in_batch`. Across GPUs the same average needs the same care (`average_tokens_across_devices`). A model or a loss of your own that ignores the argument falls back to the old behaviour, which a flag of the trainer can show.

# %%
QUIET: dict[str, Any] = {
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": device == "cpu",
    "dataloader_pin_memory": False,
    "remove_unused_columns": False,  # the dataset holds Examples, which collate reads
    "train_sampling_strategy": "sequential",  # the order of the examples is ours
    "seed": seed,
}


class KeepGradient(TrainerCallback):
    """Keeps the gradient that the optimizer is about to use."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: torch.nn.Module, **_: Any) -> None:
        self.gradient = flat_gradient(model)


def one_step(
    kind: type[Trainer], data: Any, *, micro: int = 8, accumulation: int = 1, old_mean: bool = False, **more: Any
) -> tuple[float, Tensor]:
    """Make one optimizer step at rate 0 with a trainer; return the loss that it logs and its gradient, unclipped."""
    arguments = TrainingArguments
    if kind is SFTTrainer:
        arguments, more = SFTConfig, {"activation_checkpointing": False, **more}  # it would change the time alone
    extra = (
        {"processing_class": tokenizer} if kind is SFTTrainer else {"data_collator": partial(collate, pad_id=pad_id)}
    )
    keep = KeepGradient()
    with tempfile.TemporaryDirectory() as folder:
        settings = arguments(
            folder, **QUIET, max_steps=1, learning_rate=0.0, max_grad_norm=0.0,
            per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation, **more,
        )  # fmt: skip
        # trl replaces the model's forward, so it gets a copy
        trainer = kind(copy.deepcopy(model), settings, train_dataset=data, callbacks=[keep], **extra)
        trainer.remove_callback(PrinterCallback)
        if old_mean:
            trainer.model_accepts_loss_kwargs = False
        trainer.train()
    return trainer.state.log_history[0]["loss"], keep.gradient


whole_loss, whole_gradient = one_step(Trainer, mixed)
model.zero_grad()
my_loss = accumulate(model, splits[2])
rows = [("your accumulate, 4 of 2", my_loss, relative_difference(flat_gradient(model), whole_gradient))]
model.zero_grad()
for name, old_mean in (("Trainer, 4 of 2", False), ("Trainer, 4 of 2, without num_items_in_batch", True)):
    loss, gradient = one_step(Trainer, mixed, micro=2, accumulation=4, old_mean=old_mean)
    rows.append((name, loss, relative_difference(gradient, whole_gradient)))
columns = ["", "loss / nats a token", "gradient, off by"]
display(
    pd.DataFrame([("Trainer, 1 of 8", whole_loss, 0.0), *rows], columns=columns)
    .style.format({columns[1]: "{:.4f}", columns[2]: "{:.1e}"})
    .hide(axis="index")
)
card.record(
    "accumulation_error",
    rows[0][2],
    format=".1g",
    tolerance=1e-5,
    label="your accumulation: the gradient is off by (relative)",
)

# %% [markdown]
# ## Warm up, then decay
#
# Adam divides by an estimate of the gradient's size, and in the first steps that estimate comes from a few batches and varies most (Liu et al., 2020). So the rate climbs for some steps before it falls. With $w$ warm-up steps and $n$ steps in all, transformers multiplies the learning rate of step $k = 0, 1, \dots$ by
#
# $$f(k) = \begin{cases} k / w & k < w \\ (n - k) / (n - w) & \text{linear} \\ \tfrac12 \left(1 + \cos\left(\pi \, \frac{k - w}{n - w}\right)\right) & \text{cosine} \end{cases} \qquad \text{and 0 for } k \ge n.$$
#
# Here $n$ counts *optimizer* steps. Pass the number of micro-batches instead, and with 8 accumulation steps a linear schedule ends near 7/8 of the full rate.
#
# **Exercise.** Two functions.
#
# 1. `rate_factor(step, warmup, total, shape)` returns $f$ as a `float`; `shape` is `"linear"` or `"cosine"`, anything else raises `ValueError`. `warmup` may be 0: there is no warm-up, and step 0 has the full rate. `total` is larger than `warmup`. `rate_factor(1, 4, 10, "linear")` is 0.25, `rate_factor(7, 4, 10, "linear")` is 0.5, and so is cosine's.
# 2. `optimizer_steps(examples, batch_size, accumulation, epochs)` returns, as an `int`, how many optimizer steps `Trainer` makes: an epoch has as many micro-batches as it takes to hold all examples, the last one may be smaller; every `accumulation` micro-batches give a step, and what is left at the end of an **epoch** gives one more. `optimizer_steps(10, 4, 2, 3)` is 6: 3 micro-batches, so 2 steps, in each of 3 epochs.
#
# *About 9 lines.*
#
# <details><summary>Hint 1</summary>What is f at step 0, and at the last step, n − 1? For the second: where do you round up, and how often?</details>
# <details><summary>Hint 2</summary>After the warm-up, everything depends on the progress (k − w) / (n − w), which runs from 0 to 1. <code>math.ceil</code> rounds up.</details>
# <details><summary>Hint 3</summary>Warm-up first: if step &lt; warmup, return step / warmup (never reached when warmup is 0). Then progress = min(1, …); linear is 1 − progress. For the steps: ceil(examples / batch_size), that divided by accumulation and rounded up again, times epochs.</details>


# %% exercise="schedule" difficulty=2 minutes=9
def rate_factor(step: int, warmup: int, total: int, shape: str) -> float:
    """Return the factor of the learning rate at optimizer step `step`, counted from 0."""
    ### BEGIN SOLUTION
    if shape not in ("linear", "cosine"):
        raise ValueError(f"shape is 'linear' or 'cosine', not {shape!r}")
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / (total - warmup))
    return 1.0 - progress if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    ### END SOLUTION


def optimizer_steps(examples: int, batch_size: int, accumulation: int, epochs: int) -> int:
    """Return how many optimizer steps Trainer makes."""
    ### BEGIN SOLUTION
    micro_batches = math.ceil(examples / batch_size)
    return math.ceil(micro_batches / accumulation) * epochs
    ### END SOLUTION


# %% check="schedule" points=2
got = [rate_factor(step, 4, 10, "linear") for step in range(4)]
assert got != [0.25, 0.5, 0.75, 1.0], (
    "Your warm-up begins at 1 / w. The library's begins at 0: its first optimizer step changes nothing"
)
assert got == [0.0, 0.25, 0.5, 0.75], (
    f"With a warm-up of 4 the first four factors are 0, 0.25, 0.5, 0.75; yours are {got}"
)
assert rate_factor(4, 4, 10, "linear") == 1.0, (
    f"The warm-up ends at the full rate, so the decay starts at step 4: 1.0, not {rate_factor(4, 4, 10, 'linear'):.2f}"
)
got = rate_factor(7, 4, 10, "linear")
assert abs(got - 0.5) < 1e-12, f"Half-way between step 4 and step 10, linear is 0.5; yours is {got:.3f}"
got = rate_factor(7, 4, 10, "cosine")
assert abs(got) > 1e-9, (
    "Your cosine has fallen to 0 half-way and comes back: from w to n it makes half a turn, an angle of π"
)
assert abs(got - 0.5) < 1e-12, f"Half-way between step 4 and step 10, cosine is 0.5; yours is {got:.3f}"
assert rate_factor(12, 4, 10, "linear") == 0.0, (
    f"After step n the rate stays 0; yours is {rate_factor(12, 4, 10, 'linear'):.2f}, and a negative rate climbs the loss"
)
assert rate_factor(12, 4, 10, "cosine") == 0.0, (
    f"After step n cosine stays 0 too; yours is {rate_factor(12, 4, 10, 'cosine'):.2f}: it must not climb again"
)
assert rate_factor(0, 0, 10, "cosine") == 1.0, "Without a warm-up, step 0 has the full rate"
for step in (5, 1):
    try:
        rate_factor(step, 4, 10, "square")
    except ValueError:
        refused = True
    else:
        refused = False
    assert refused, (
        f"An unknown shape must raise ValueError at every step, also at step {step} of a warm-up of 4: "
        "a typing error would train with another schedule"
    )
### BEGIN HIDDEN TESTS
for _warmup, _total in ((0, 7), (3, 20), (1, 2), (10, 11), (25, 100)):
    for _shape in ("linear", "cosine"):
        _weight = torch.nn.Parameter(torch.zeros(1))
        _library = get_scheduler(_shape, SGD([_weight], lr=1.0), _warmup, _total).lr_lambdas[0]
        for _step in range(_total + 3):
            if _step > _total and _shape == "cosine":
                continue  # the library's cosine rises again after its end; no step is ever made there
            _got, _want = rate_factor(_step, _warmup, _total, _shape), _library(_step)
            assert abs(_got - _want) < 1e-9, (
                f"{_shape}, warm-up {_warmup} of {_total}: step {_step} has the factor {_want:.6f} in transformers, yours is {_got:.6f}"
            )
### END HIDDEN TESTS

# %% check="schedule" points=1
got = optimizer_steps(10, 4, 2, 3)
assert got != 9, (
    "9 counts micro-batches: the schedule advances once per optimizer step, every `accumulation` micro-batches"
)
assert got != 3, "Two steps an epoch, not one: what is left at the end of an epoch is a step as well, so round up"
assert got != 5, (
    "9 micro-batches in all are 4.5 steps of two, but Trainer ends a step with each epoch: round up in the epoch"
)
assert got == 6, f"optimizer_steps(10, 4, 2, 3) is 6: 3 micro-batches, 2 steps, 3 epochs; yours is {got}"
assert type(got) is int, f"Return an int; yours is {type(got).__name__}"
### BEGIN HIDDEN TESTS
for _case, _want in {
    (8, 4, 2, 1): 1,
    (9, 4, 2, 1): 2,
    (1, 8, 4, 5): 5,
    (1000, 8, 4, 3): 96,
    (17, 1, 8, 2): 6,
    (7, 7, 1, 4): 4,
}.items():
    assert optimizer_steps(*_case) == _want, f"optimizer_steps{_case} is {_want}, yours is {optimizer_steps(*_case)}"
### END HIDDEN TESTS


# %% mistake="begins at one" of="schedule" says="Your warm-up begins at 1 / w"
def rate_factor(step, warmup, total, shape):
    if shape not in ("linear", "cosine"):
        raise ValueError(shape)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / (total - warmup))
    return 1 - progress if shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def optimizer_steps(examples, batch_size, accumulation, epochs):
    return math.ceil(math.ceil(examples / batch_size) / accumulation) * epochs


# %% mistake="decays from step 0 on" of="schedule" says="The warm-up ends at the full rate"
def rate_factor(step, warmup, total, shape):
    if shape not in ("linear", "cosine"):
        raise ValueError(shape)
    if step < warmup:
        return step / warmup
    progress = min(1.0, step / total)
    return 1 - progress if shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def optimizer_steps(examples, batch_size, accumulation, epochs):
    return math.ceil(math.ceil(examples / batch_size) / accumulation) * epochs


# %% mistake="a whole turn of the cosine" of="schedule" says="it makes half a turn"
def rate_factor(step, warmup, total, shape):
    if shape not in ("linear", "cosine"):
        raise ValueError(shape)
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / (total - warmup))
    return 1 - progress if shape == "linear" else 0.5 * (1 + math.cos(2 * math.pi * progress))


def optimizer_steps(examples, batch_size, accumulation, epochs):
    return math.ceil(math.ceil(examples / batch_size) / accumulation) * epochs


# %% mistake="a negative rate after the end" of="schedule" says="After step n the rate stays 0"
def rate_factor(step, warmup, total, shape):
    if shape not in ("linear", "cosine"):
        raise ValueError(shape)
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / (total - warmup)
    return 1 - progress if shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def optimizer_steps(examples, batch_size, accumulation, epochs):
    return math.ceil(math.ceil(examples / batch_size) / accumulation) * epochs


# %% mistake="a cosine that climbs again" of="schedule" says="it must not climb again"
def rate_factor(step, warmup, total, shape):
    if shape not in ("linear", "cosine"):
        raise ValueError(shape)
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / (total - warmup)
    return max(0.0, 1 - progress) if shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def optimizer_steps(examples, batch_size, accumulation, epochs):
    return math.ceil(math.ceil(examples / batch_size) / accumulation) * epochs


# %% mistake="looks at the shape after the warm-up" of="schedule" says="also at step 1 of a warm-up of 4"
def rate_factor(step, warmup, total, shape):
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / (total - warmup))
    if shape == "linear":
        return 1 - progress
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    raise ValueError(shape)


def optimizer_steps(examples, batch_size, accumulation, epochs):
    return math.ceil(math.ceil(examples / batch_size) / accumulation) * epochs


# %% mistake="counts micro-batches" of="schedule" says="9 counts micro-batches"
def rate_factor(step, warmup, total, shape):
    if shape not in ("linear", "cosine"):
        raise ValueError(shape)
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / (total - warmup))
    return 1 - progress if shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def optimizer_steps(examples, batch_size, accumulation, epochs):
    return math.ceil(examples / batch_size) * epochs


# %% mistake="drops the rest of an epoch" of="schedule" says="so round up"
def rate_factor(step, warmup, total, shape):
    if shape not in ("linear", "cosine"):
        raise ValueError(shape)
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / (total - warmup))
    return 1 - progress if shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def optimizer_steps(examples, batch_size, accumulation, epochs):
    return examples // (batch_size * accumulation) * epochs


# %% alternative="interpolation between corners" of="schedule"
def rate_factor(step, warmup, total, shape):
    corners = {"linear": lambda x: x, "cosine": lambda x: np.sin(x * np.pi / 2) ** 2}
    if shape not in corners:
        raise ValueError("no such shape")
    rising = np.interp(step, [0, warmup], [0.0, 1.0]) if step < warmup else 1.0
    falling = corners[shape](np.interp(step, [warmup, total], [1.0, 0.0]))
    return float(rising * falling)


def optimizer_steps(examples, batch_size, accumulation, epochs):
    steps = 0
    for _ in range(epochs):
        left = len(range(0, examples, batch_size))
        while left > 0:
            left -= accumulation
            steps += 1
    return steps


# %%
warmup = max(1, steps // 10)
fig, ax = plt.subplots(figsize=(7, 3))
gaps = []
for shape, colour in (("linear", COLOURS.after), ("cosine", COLOURS.other)):
    scheduler = get_scheduler(shape, SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), warmup, steps)
    library = [scheduler.lr_lambdas[0](step) for step in range(steps)]
    yours = [rate_factor(step, warmup, steps, shape) for step in range(steps)]
    gaps += [abs(a - b) for a, b in zip(library, yours, strict=True)]
    ax.plot(library, color=COLOURS.library, lw=6, alpha=0.25)
    ax.plot(yours, color=colour, lw=1.5, label=shape)
direct_label(ax, warmup, 0.2, "transformers (wide) under yours (thin)", COLOURS.library, offset=(14, 0))
ax.set(
    xlabel="optimizer step",
    ylabel="factor of the learning rate",
    title=f"Warm-up of {warmup}, then decay",
    ylim=(0, 1.08),
)
label_lines(ax)
plt.show()
print(
    f"largest difference to transformers: {max(gaps):.0e}; at the first step the factor is {yours[0]:g}, at the last {yours[-1]:.1e}"
)

# %% [markdown]
# ## Match: one step of `SFTTrainer`
#
# `SFTTrainer` takes text, applies the chat template, makes labels, collates and trains. Before you hand over, put your own first step beside its first step: same weights, same eight tickets, one optimizer step at learning rate 0, so that every row starts from the same model. The first two rows feed it your tokens; the others what a first try would feed it.

# %%
tokens = datasets.Dataset.from_list(
    [
        {key: tensor[0].tolist() for key, tensor in collate([example], pad_id).items() if key != "attention_mask"}
        for example in eight
    ]
)
said = [
    ({"role": "user", "content": one.text}, {"role": "assistant", "content": one.triage.to_json()}) for one in tickets
]
pairs = datasets.Dataset.from_list([{"prompt": [ask], "completion": [reply]} for ask, reply in said])
chats = datasets.Dataset.from_list([{"messages": [ask, reply]} for ask, reply in said])
exact: dict[str, Any] = {"bf16": False}
tries = {
    "your tokens, bf16=False": (tokens, exact),
    "your tokens, packing=True, bf16=False": (tokens, {"packing": True, "max_length": sum(lengths), **exact}),
    "your tokens, default settings": (tokens, {}),
    "columns prompt and completion, bf16=False": (pairs, exact),
    "a column of messages, bf16=False": (chats, exact),
}
own_loss, own_gradient = one_step(Trainer, eight)
rows = [("Trainer with your collate", own_loss, 0.0)]
for name, (data, settings) in tries.items():
    loss, gradient = one_step(SFTTrainer, data, micro=1 if "packing" in name else 8, **settings)
    rows.append((name, loss, relative_difference(gradient, own_gradient)))
columns = ["", "loss of the step / nats a token", "gradient, off by"]
display(
    pd.DataFrame(rows, columns=columns).style.format({columns[1]: "{:.6f}", columns[2]: "{:.1e}"}).hide(axis="index")
)
card.record(
    "sft_parity",
    abs(rows[1][1] - own_loss),
    format=".1g",
    tolerance=1e-5,
    label="loss of SFTTrainer's first step, difference to yours",
    unit="nats",
)
card.record(
    "bf16_difference",
    rows[3][2],
    format=".1%",
    tolerance=0.1,
    label="SFTTrainer's default bf16: the gradient differs by",
)
card.record(
    "messages_difference",
    rows[5][2],
    format=".0%",
    tolerance=1.0,
    label="a column of messages: the gradient differs by",
)

# %% [markdown]
# Same tokens, same step: the losses differ by {{sft_parity}} nats. What the other rows say:
#
# - **bf16 is on by default**, also on a CPU: {{bf16_difference}} of the gradient is rounding. That is what training in bfloat16 is; know it before you search for a bug in a difference in the third digit. `gradient_checkpointing` is on as well (slower, the same numbers), the default rate is 2e-5, and what is longer than `max_length` = 1,024 tokens is cut off at the end, where your answers are.
# - **The name of the column decides what is learned.** `prompt` and `completion`: the answer. `messages` or `text`: everything, the customer's message included, unless you ask for `assistant_only_loss`. The gradient differs by {{messages_difference}}, and the loss is not comparable.
# - The prompt and completion row equals yours only where the chat template renders an answer as `triage.encode` does. Some templates add line breaks or empty thinking blocks; then print one row of `trainer.train_dataset` and read it.

# %% [markdown]
# ## Finetune all weights
#
# Three runs with `Trainer`, your collator and a linear schedule, each run with its own company and its own order of tickets; each ticket is seen once. No test ticket is a training ticket. The product asks for an exact match of `target`. Beside the tickets' loss you watch what the base model could do before you touched it, in three ways:
#
# - the loss on held-out documents of the *pretraining stream*. The stream is synthetic, so its entropy is known: no model can be below that floor, save for its small looseness;
# - the same loss by sort of document, among them passages with questions (*reading*), the same facts in two layouts (*restate*), lists and rolls (*register*), letters of complaint and what was done about them, words on signs, and facts as one line of JSON (*record*), with other keys than a triage;
# - the share of questions about a passage that it answers exactly, in two domains. One is the *company* that the tickets write to. The other is a *port* with its ships, piers and storms: no ticket is about it.


# %%
start = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
trained_on = [triage.encode(tokenizer, world.tickets(steps * batch_size, part="train")) for world in worlds]
tests = [world.tickets(test_tickets, part="test") for world in worlds]
longest = max(len(example) for examples in trained_on for example in examples)


class Outcome(NamedTuple):
    """What a model can do: which test tickets are right, (n,) bool each field; the stream's loss; shares of questions
    about a passage that it answers, by domain."""

    score: triage.Score
    stream: float
    company: float
    port: float

    @property
    def exact_match(self) -> float:
        return float(self.score.exact.mean())

    @property
    def reading(self) -> float:
        return (self.company + self.port) / 2


held_out: dict[str, list[Example]] = defaultdict(list)  # by sort of document, at most 12 each
nats: dict[str, float] = defaultdict(float)
for number in range(600):
    sample = document(VALIDATION_SEEDS[number])
    if len(held_out[sample.sort]) < 12:
        ids = [*tokenizer(sample.text)["input_ids"], tokenizer.eos_token_id]
        held_out[sample.sort].append(Example(tuple(ids[:1]), tuple(ids[1:])))
        nats[sample.sort] += sample.nats


def sort_losses() -> dict[str, float]:
    """The model's loss on held-out documents of each sort, in nats a token."""
    return {sort: loss_of(**on_device(collate(found, pad_id))) for sort, found in held_out.items()}


def stream_loss() -> float:
    """The model's loss on held-out documents of the pretraining stream, in nats a token."""
    return validation(model, tokenizer, documents).model


def outcome(run: int) -> Outcome:
    """Measure the model as it stands on the run's test tickets, on the stream, and on questions about a passage."""
    model.eval()
    texts = triage.answers(model, tokenizer, tests[run])
    reads = [copying(model, tokenizer, 1, questions=questions, domain=name) for name in ("company", "port")]
    return Outcome(triage.score(texts, tests[run]), stream_loss(), *reads)


def order(run: int, replay: float) -> list[Example]:
    """The run's examples, a share `replay` of them documents of the stream, in batches of similar length."""
    rng = np.random.default_rng(seed + run)
    count = steps * batch_size
    replayed = round(replay * count)
    pool = trained_on[run][: count - replayed] + stream_examples(10_000 * (1 + run), replayed, longest)
    pool = [pool[index] for index in rng.permutation(count)]
    window = 8 * batch_size
    sorted_pool = [one for at in range(0, count, window) for one in sorted(pool[at : at + window], key=len)]
    return [one for at in rng.permutation(steps) for one in sorted_pool[at * batch_size : (at + 1) * batch_size]]


class Watch(TrainerCallback):
    """Advances a progress bar, and measures the stream's loss after some of the steps."""

    def __init__(self, bar: tqdm, at: Sequence[int]) -> None:
        self.bar, self.at, self.stream = bar, at, {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update()
        if state.global_step in self.at:
            model.eval()  # the trainer goes back to train mode with its next step
            self.stream[state.global_step] = stream_loss()


def finetune(
    run: int, rate: float = 1.0, replay: float = 0.0, watch_at: Sequence[int] = ()
) -> tuple[list[float], dict[int, float]]:
    """Train all weights from the base's; return the loss of each step, and the stream's loss at the steps of `watch_at`."""
    model.load_state_dict(start)
    model.requires_grad_(True)
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=steps, desc=f"run {run + 1} of {runs}", leave=False) as bar,
    ):
        watch = Watch(bar, watch_at)
        settings = TrainingArguments(
            folder, **QUIET, max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=learning_rate * rate,
            lr_scheduler_type="linear", warmup_steps=warmup, weight_decay=0.0, max_grad_norm=1.0,
        )  # fmt: skip
        trainer = Trainer(
            model, settings, partial(collate, pad_id=pad_id), train_dataset=order(run, replay), callbacks=[watch]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], watch.stream


floor = validation(model, tokenizer, documents).floor
quarter = max(1, steps // 4)
watch_at = sorted({max(1, steps // 8), quarter, max(1, steps // 2)})
before, sorts_before = [outcome(run) for run in range(runs)], sort_losses()
plain, losses, watched, tuned, sorts_after = [], [], [], [], []
for run in range(runs):
    loss, seen = finetune(run, watch_at=watch_at)
    plain.append(outcome(run))
    sorts_after.append(sort_losses())
    losses.append(loss)
    watched.append({0: before[run].stream, **seen, steps: plain[-1].stream})
    tuned.append({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})

# %%
fields = [*triage.FIELDS, "all four"]


def pooled(outcomes: Sequence[Outcome], field: str = "all four") -> np.ndarray:
    """Which answers are right over all runs, (runs * test tickets,)."""
    return np.concatenate([one.score.exact if field == "all four" else one.score.fields[field] for one in outcomes])


fig, ax = plt.subplots()
for shift, outcomes, label, colour in (
    (-0.1, before, "base", COLOURS.before),
    (0.1, plain, "finetuned", COLOURS.after),
):
    shares = [pooled(outcomes, field) for field in fields]
    bounds = [triage.interval(share) for share in shares]
    place, values = np.arange(len(fields)) + shift, [share.mean() for share in shares]
    intervals(ax, place, values, [low for low, _ in bounds], [high for _, high in bounds], colour)
    direct_label(ax, place[-1], values[-1], label, colour, offset=(24, -4))
ax.plot([len(fields) - 0.8] * runs, [one.exact_match for one in plain], "_", ms=14, mew=2, color=COLOURS.after)
ax.axhline(target, color=COLOURS.truth, lw=1, ls="--")
direct_label(ax, -0.45, target, "target", COLOURS.truth, offset=(0, 4))
ax.set_xticks(range(len(fields)), fields)
ax.set(xlim=(-0.5, len(fields) - 0.1), ylim=(-0.03, 1.05), ylabel="share of tickets right (95 % interval)")
ax.set_title(f"{steps} steps of {batch_size} tickets, all weights (dashes: the runs)")
plt.show()
for name, label, outcomes in (
    ("before", "exact match of the base model", before),
    ("after", "exact match after finetuning", plain),
):
    low, high = triage.interval(pooled(outcomes))
    card.record(
        f"exact_match_{name}", pooled(outcomes).mean(), format=".1%", low=low, high=high, tolerance=0.1, label=label
    )
card.record(
    "runs_on_target",
    sum(one.exact_match >= target for one in plain),
    format="d",
    tolerance=2,
    label=f"of {runs} runs, so many reach an exact match of {target:.0%}",
)

# %% [markdown]
# An answer counts only when it is JSON with exactly the four keys, so the base model, which has never seen the format, scores nothing. The bars are 95 % Wilson intervals over all test tickets of all runs: they say what other tickets could have given. How much the company and the order of the data matter, the dashes say: of the three runs, {{runs_on_target}} reach the target.


# %%
def smooth(values: Sequence[float], width: int = 8) -> np.ndarray:
    """The mean of each value and the up to `width` - 1 before it."""
    return np.array([np.mean(values[max(0, end - width) : end]) for end in range(1, len(values) + 1)])


fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
for run in range(runs):
    left.plot(
        np.arange(1, steps + 1), smooth(losses[run]), color=COLOURS.after, lw=1.2, label="tickets" if run == 0 else None
    )
    right.plot(
        list(watched[run]),
        list(watched[run].values()),
        "o-",
        ms=4,
        color=COLOURS.wrong,
        lw=1.5,
        label="stream" if run == 0 else None,
    )
left.set(yscale="log", xlabel="optimizer step", ylabel="loss of the answers (nats a token)", title="What it learns")
right.axhline(floor, color=COLOURS.truth, ls="--", lw=1)
direct_label(right, 0, floor, "entropy of the stream: the floor", COLOURS.truth, offset=(4, -14))
right.set(xlabel="optimizer step", ylabel="loss on the stream (nats a token)", title="What it forgets")
right.set_ylim(bottom=0)
label_lines(left)
label_lines(right)
plt.show()

fig, (sorts, reads) = plt.subplots(1, 2, figsize=(11, 3.4), width_ratios=(1.7, 1))
names = sorted(held_out, key=lambda sort: np.mean([after[sort] for after in sorts_after]) - sorts_before[sort])
for place, sort in enumerate(names):
    lowest = nats[sort] / sum(len(one.answer) for one in held_out[sort])
    after = [losses_of_run[sort] for losses_of_run in sorts_after]
    sorts.plot([sorts_before[sort], np.mean(after)], [place, place], color=COLOURS.after, lw=1.5)
    sorts.plot([lowest], [place], "|", ms=14, mew=2, color=COLOURS.truth)
    sorts.plot([sorts_before[sort]], [place], "o", color=COLOURS.before)
    sorts.plot(after, [place] * runs, "|", ms=10, mew=1.5, color=COLOURS.after)
    sorts.plot([np.mean(after)], [place], "o", color=COLOURS.after)
direct_label(sorts, lowest, place, "floor", COLOURS.truth, offset=(-14, 9))
direct_label(sorts, sorts_before[sort], place, "base", COLOURS.before, offset=(4, 9))
direct_label(sorts, float(np.mean(after)), place, "finetuned", COLOURS.after, offset=(-30, 9))
sorts.set_yticks(range(len(names)), names)
sorts.set(xlabel="loss (nats a token)", ylabel="sort of document", title="Where the loss rises (bars: the runs)")
sorts.set_xlim(left=0)
sorts.set_ylim(top=len(names) - 0.3)
for place, domain in enumerate(("company", "port")):
    base = getattr(before[0], domain)
    shares = [getattr(one, domain) for one in plain]
    low, high = triage.interval(np.arange(questions) < round(base * questions))
    intervals(reads, [place - 0.1], [base], [low], [high], COLOURS.before)
    reads.plot([place + 0.1] * runs, shares, "_", ms=14, mew=2, color=COLOURS.after)
    reads.plot([place + 0.1], [np.mean(shares)], "o", color=COLOURS.after)
direct_label(reads, 0.9, base, "base", COLOURS.before, offset=(-34, -4))
direct_label(reads, 1.1, float(np.mean(shares)), "finetuned", COLOURS.after, offset=(12, -4))
reads.set_xticks([0, 1], ["company", "port"])
reads.set(xlim=(-0.5, 1.8), ylim=(0, 1.03), ylabel="questions answered (share)", title="What it can no longer do")
plt.show()


def mean_interval(
    values: Sequence[float], lowest: float = -math.inf, highest: float = math.inf
) -> tuple[float, float, float]:
    """The mean over runs and Student's 95 % interval, cut to what is possible."""
    mean, n = float(np.mean(values)), len(values)
    half = 0.0 if n < 2 else float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return mean, max(lowest, mean - half), min(highest, mean + half)


for name, values, highest, how, label, unit in (
    ("stream", [one.stream for one in plain], math.inf, ".2f", "loss on the stream", "nats"),
    ("reading", [one.reading for one in plain], 1, ".0%", "questions answered from a passage", ""),
    ("company", [one.company for one in plain], 1, ".0%", "questions about the company", ""),
    ("port", [one.port for one in plain], 1, ".0%", "questions about the port", ""),
):
    base = getattr(before[0], name)  # the same in every run: the base model and the held-out texts are
    card.record(f"{name}_before", base, format=how, label=f"{label}, base model", unit=unit)
    mean, low, high = mean_interval(values, 0, highest)
    card.record(
        f"{name}_after", mean, format=how, low=low, high=high, tolerance=0.3, label=f"{label}, finetuned", unit=unit
    )
for sort in ("record", "reading"):
    for when, value in (("before", sorts_before[sort]), ("after", np.mean([after[sort] for after in sorts_after]))):
        card.record(
            f"{sort}_sort_{when}",
            value,
            format=".2f",
            tolerance=0.5,
            label=f"loss on documents of the sort {sort}, {when} finetuning",
            unit="nats",
        )
early, late = (np.mean([seen[step] - seen[0] for seen in watched]) for step in (quarter, steps))
card.record(
    "early_share",
    early / late,
    format=".0%",
    tolerance=0.5,
    label="rise after a quarter of the steps, as a share of the final rise",
)
card.record("floor", floor, format=".2f", label="entropy of the stream, the floor of that loss", unit="nats")

# %% [markdown]
# Nobody looks at these panels, save the first, when only the task is evaluated. The loss on the stream goes from {{stream_before}} to {{stream_after}} nats, above a floor of {{floor}}. As an ability: given a passage and a question about it, the base model answers {{reading_before}} of the questions exactly, and after finetuning {{reading_after}}. The tickets did not need that ability, and nothing in the loss held on to it: *catastrophic forgetting* (McCloskey and Cohen, 1989).
#
# A mean hides what is lost. The *records* are the documents most like an answer to a ticket, one line of JSON with other keys: their loss goes from {{record_sort_before}} to {{record_sort_after}} nats, that of the passages with questions (*reading*) from {{reading_sort_before}} to {{reading_sort_after}}. And forgetting is not confined to what the new data is about. Questions about the company go from {{company_before}} to {{company_after}}, those about the port, which no ticket mentions, from {{port_before}} to {{port_after}}. Nor does the task's loss warn you: it looks like any healthy run. After a quarter of the steps, not far from the peak of the rate, the rise of the stream's loss is already {{early_share}} of what it is at the end.
#
# What the figures do not show: the dashes are three runs that share their held-out documents and questions, so they tell you how much training varies, not what other questions would give; the grey bars (95 % Wilson) tell you that for the base model.
#
# And packing again, now that the model knows the task. Fed with the ids alone, the row's loss was off by {{naive_error_before}} nats before training; now it is off by {{naive_error}} nats, beside a right loss of {{tuned_loss}}. The same bug has another size in every model: test the one that you train, and by contamination rather than by loss.

# %%
fresh = triage.encode(tokenizer, tests[-1][:4])
errors = packed_errors(fresh)
display(errors.style.format({errors.columns[1]: "{:+.1e}", errors.columns[2]: "{:.1e}"}).hide(axis="index"))
naive, _, _, _, masked, _ = errors[errors.columns[1]].abs()
card.record(
    "naive_error",
    naive,
    format=".2f",
    tolerance=1.0,
    label="finetuned model, packed with the ids alone: the loss is off by",
    unit="nats",
)
card.record(
    "packing_error_after",
    masked,
    format=".1g",
    tolerance=1e-5,
    label="finetuned model, packed with positions and mask: the loss is off by",
    unit="nats",
)
card.record(
    "tuned_loss",
    loss_of(**on_device(collate(fresh, pad_id))),
    format=".3f",
    tolerance=0.3,
    label="loss of the finetuned model on four test tickets",
    unit="nats",
)

# %% [markdown]
# ## Decide: what may it forget?
#
# The product needs the tickets, and it also answers questions about passages. It was agreed that the model that is shipped may cost at most half of what plain finetuning cost: its rise of the stream's loss may be `most_forgetting` times the plain runs' mean rise, a limit in nats that the next cell prints.
#
# Four plans, each with the same number of steps and of examples in a batch, so nobody gets more compute:
#
# | plan | `rate` | `replay` | `average` | idea |
# |---|---|---|---|---|
# | `"plain"` | 1 | 0 | 1 | what you just ran |
# | `"lower rate"` | 0.5 | 0 | 1 | smaller steps stay nearer to the base |
# | `"replay"` | 1 | 1/8 | 1 | one example in eight is a document of the stream *instead of* a ticket (rehearsal: Robins, 1995; mixed into instruction tuning by Ouyang et al., 2022) |
# | `"average"` | 1 | 0 | 0.75 | 3/4 of the weights trained plainly plus 1/4 of the base's: no training at all (Wortsman et al., 2022) |
#
# `rate` multiplies the learning rate, `replay` is the share of documents among the examples, and `average` the weight of the finetuned model in the mixture of weights. Replayed documents are new ones from the same source as the base's training data, in which nothing repeats; none is longer than the longest ticket, so that they do not pad the batches. What is measured is the loss on held-out documents of every sort and length.


# %%
class Plan(NamedTuple):
    """A way to finetune: factor of the learning rate, share of replayed documents, weight of the finetuned weights."""

    rate: float = 1.0
    replay: float = 0.0
    average: float = 1.0


plans = {"plain": Plan(), "lower rate": Plan(rate=0.5), "replay": Plan(replay=1 / 8), "average": Plan(average=0.75)}
plain_rises = [one.stream - base.stream for one, base in zip(plain, before, strict=True)]
limit = most_forgetting * float(np.mean(plain_rises))
print("plain finetuning, rise of the stream's loss in each run:", ", ".join(f"{rise:+.2f}" for rise in plain_rises))
print(f"the limit: {limit:.2f} nats a token")

# %% [markdown]
# **Exercise (decide).** Decide before you measure.
#
# 1. `my_plan` is the plan that you would ship, a `Plan(rate=…, replay=…, average=…)`: one of the four or your own, with `rate` above 0 and at most 1, `replay` from 0 to 0.5, `average` above 0 and at most 1.
# 2. `predicted_exact_match` (0 to 1) and `predicted_rise` (nats a token by which the stream's loss rises) are what you expect of it, as means over the runs. Both are graded for being possible, not for being right.
# 3. `choose(outcomes, limit)` is the rule by which the table will be read, fixed before there is a table. `outcomes` maps a plan's name to a list with one pair `(exact match, rise)` for each run; it returns a name.
#     - A plan is **admissible** when its rise is at most `limit` in *every* run: you ship one run, not a mean.
#     - Of the admissible plans, take the one with the highest *mean* exact match: the best run of three was luck.
#     - If no plan is admissible, take the one whose *worst* rise is smallest.
#
# With `{"a": [(0.9, 0.1), (0.9, 0.4)], "b": [(0.6, 0.1), (0.8, 0.2)]}` the rule chooses `"a"` for a limit of 0.5, `"b"` for 0.25, and `"b"` for 0.05. *About 8 lines.*
#
# <details><summary>Hint 1</summary>Two numbers describe a plan: its mean exact match and its worst rise. What happens first, the limit or the maximum?</details>
# <details><summary>Hint 2</summary>Two dictionaries from name to number; then <code>max(names, key=…)</code> over the admissible names, or <code>min</code> over all when there is none.</details>
# <details><summary>Hint 3</summary>worst = {name: max of the second entries}, mean = {name: average of the first}; admissible = [name for name in outcomes if worst[name] ≤ limit]; return max(admissible, key=mean.get) if admissible else min(worst, key=worst.get).</details>


# %% exercise="decide" difficulty=4 minutes=12
### BEGIN SOLUTION
my_plan = Plan(rate=1.0, replay=1 / 8, average=1.0)
predicted_exact_match = 0.8
predicted_rise = 0.2
### END SOLUTION


def choose(outcomes: dict[str, list[tuple[float, float]]], limit: float) -> str:
    """Return the plan to ship: the highest mean exact match among those whose rise is within the limit in every run."""
    ### BEGIN SOLUTION
    worst = {name: max(rise for _, rise in pairs) for name, pairs in outcomes.items()}
    mean = {name: sum(right for right, _ in pairs) / len(pairs) for name, pairs in outcomes.items()}
    admissible = [name for name in outcomes if worst[name] <= limit]
    return max(admissible, key=mean.__getitem__) if admissible else min(worst, key=worst.__getitem__)
    ### END SOLUTION


# %% check="decide" points=1
assert isinstance(my_plan, Plan), f"Set my_plan = Plan(rate=…, replay=…, average=…); yours is {my_plan!r}"
assert 0 < my_plan.rate <= 1, f"rate multiplies the learning rate: above 0 and at most 1, not {my_plan.rate}"
assert 0 <= my_plan.replay <= 0.5, (
    f"replay is a share of the examples, from 0 to 0.5, not {my_plan.replay}: 1/8 is 0.125"
)
assert 0 < my_plan.average <= 1, (
    f"average is the weight of the finetuned model: above 0 and at most 1, not {my_plan.average}"
)
for name, value, low, high in (
    ("predicted_exact_match", predicted_exact_match, 0, 1),
    ("predicted_rise", predicted_rise, -1, 20),
):
    assert isinstance(value, (int, float)), f"Predict with a number before you measure: {name} is {value!r}"
    assert low <= value <= high, (
        f"{name} lies between {low} and {high}, yours is {value}: exact match is a share, a rise is in nats"
    )

# %% check="decide" points=3
table = {"a": [(0.9, 0.1), (0.9, 0.4)], "b": [(0.6, 0.1), (0.8, 0.2)]}
assert choose(table, 0.5) == "a", (
    f"Within a limit of 0.5 both are admissible and a has the higher exact match; you choose {choose(table, 0.5)!r}"
)
assert choose(table, 0.25) == "b", (
    "In its second run a rises by 0.4: it is not admissible at 0.25, whatever its exact match and its mean rise; "
    f"you choose {choose(table, 0.25)!r}"
)
assert choose(table, 0.4) == "a", "A rise of exactly the limit is allowed: at most"
nothing_fits = choose(table, 0.05)
assert nothing_fits == "b", (
    f"With a limit of 0.05 nothing is admissible: take the smallest worst rise, b with 0.2; you return {nothing_fits!r}"
)
lucky = {"lucky": [(1.0, 0.1), (0.2, 0.1), (0.3, 0.1)], "steady": [(0.7, 0.1), (0.7, 0.1), (0.7, 0.1)]}
assert choose(lucky, 1.0) == "steady", (
    "One lucky run is no better plan: compare the mean over the runs, 0.5 against 0.7"
)
assert choose({"improves": [(0.9, -0.6)], "keeps": [(0.5, 0.0)]}, 0.25) == "improves", (
    "A negative rise is a stream that is predicted better than before: no reason to refuse a plan"
)
uneven = {"x": [(0.8, 0.2), (0.8, 0.2)], "y": [(0.7, 0.0), (0.7, 0.3)]}
assert choose(uneven, 0.1) == "x", (
    "Nothing is admissible, and the worst run counts: 0.2 for x, 0.3 for y, though y's mean is lower"
)
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(6)
for _case in range(30):
    _table = {
        f"plan {k}": [(float(_rng.random()), float(_rng.normal(0.2, 0.2))) for _ in range(int(_rng.integers(1, 5)))]
        for k in range(int(_rng.integers(1, 6)))
    }
    _limit = float(_rng.choice([-1.0, 0.1, 0.3, 0.5]))
    _kept = {name: pairs for name, pairs in _table.items() if all(rise <= _limit for _, rise in pairs)}
    if _kept:
        _want = sorted(_kept, key=lambda name: np.mean([right for right, _ in _kept[name]]))[-1]
    else:
        _want = sorted(_table, key=lambda name: np.max([rise for _, rise in _table[name]]))[0]
    _before = repr(_table)
    assert choose(_table, _limit) == _want, (
        f"limit {_limit}: the rule chooses {_want!r} from {_table}, you {choose(_table, _limit)!r}"
    )
    assert repr(_table) == _before, "Do not change the table that you read"
### END HIDDEN TESTS

# %% mistake="the best task score, whatever it costs" of="decide" says="it is not admissible at 0.25"
my_plan, predicted_exact_match, predicted_rise = Plan(), 0.9, 0.5


def choose(outcomes, limit):
    return max(outcomes, key=lambda name: np.mean([right for right, _ in outcomes[name]]))


# %% mistake="a mean rise within the limit" of="decide" says="whatever its exact match and its mean rise"
my_plan, predicted_exact_match, predicted_rise = Plan(), 0.9, 0.5


def choose(outcomes, limit):
    kept = [n for n in outcomes if np.mean([rise for _, rise in outcomes[n]]) <= limit]
    if kept:
        return max(kept, key=lambda n: np.mean([right for right, _ in outcomes[n]]))
    return min(outcomes, key=lambda n: max(rise for _, rise in outcomes[n]))


# %% mistake="refuses the limit itself" of="decide" says="A rise of exactly the limit is allowed"
my_plan, predicted_exact_match, predicted_rise = Plan(), 0.9, 0.5


def choose(outcomes, limit):
    worst = {n: max(rise for _, rise in outcomes[n]) for n in outcomes}
    kept = [n for n in outcomes if worst[n] < limit]
    return max(kept, key=lambda n: np.mean([right for right, _ in outcomes[n]])) if kept else min(worst, key=worst.get)


# %% mistake="gives up when nothing fits" of="decide" says="With a limit of 0.05 nothing is admissible"
my_plan, predicted_exact_match, predicted_rise = Plan(), 0.9, 0.5


def choose(outcomes, limit):
    kept = [n for n in outcomes if max(rise for _, rise in outcomes[n]) <= limit]
    return max(kept, key=lambda n: np.mean([right for right, _ in outcomes[n]])) if kept else None


# %% mistake="compares the best runs" of="decide" says="One lucky run is no better plan"
my_plan, predicted_exact_match, predicted_rise = Plan(), 0.9, 0.5


def choose(outcomes, limit):
    worst = {n: max(rise for _, rise in outcomes[n]) for n in outcomes}
    kept = [n for n in outcomes if worst[n] <= limit]
    return max(kept, key=lambda n: max(right for right, _ in outcomes[n])) if kept else min(worst, key=worst.get)


# %% mistake="always the safest plan" of="decide" says="Within a limit of 0.5 both are admissible"
my_plan, predicted_exact_match, predicted_rise = Plan(), 0.9, 0.5


def choose(outcomes, limit):
    return min(outcomes, key=lambda n: max(rise for _, rise in outcomes[n]))


# %% mistake="shares in percent" of="decide" says="replay is a share of the examples"
my_plan, predicted_exact_match, predicted_rise = Plan(replay=12.5), 80, 0.2


def choose(outcomes, limit):
    worst = {n: max(rise for _, rise in outcomes[n]) for n in outcomes}
    kept = [n for n in outcomes if worst[n] <= limit]
    return max(kept, key=lambda n: np.mean([right for right, _ in outcomes[n]])) if kept else min(worst, key=worst.get)


# %% alternative="one sort with a compound key, another plan" of="decide"
my_plan, predicted_exact_match, predicted_rise = Plan(0.75, 0.25, 0.9), 0, -0.1


def choose(outcomes, limit):
    def rank(name):
        right, rise = np.array(outcomes[name]).T
        fits = rise.max() <= limit
        return (fits, right.mean() if fits else -rise.max())

    return sorted(outcomes, key=rank)[-1]


# %% [markdown]
# Now the plans are run, three runs each, with the same companies for all. A plan of your own is trained as well.

# %%
measured = {"plain": plain}
entries = plans if my_plan in plans.values() else {**plans, "yours": my_plan}
mine_is = next(name for name, plan in entries.items() if plan == my_plan)
for name, plan in entries.items():
    if name in measured:
        continue
    measured[name] = []
    for run in range(runs):
        if (plan.rate, plan.replay) == (1.0, 0.0):
            model.load_state_dict(tuned[run])  # trained above
        else:
            finetune(run, plan.rate, plan.replay)
        if plan.average < 1.0:
            model.load_state_dict(
                {
                    key: torch.lerp(start[key], weight, plan.average) if weight.is_floating_point() else weight
                    for key, weight in model.state_dict().items()
                }
            )
        measured[name].append(outcome(run))
rises = {
    name: [one.stream - base.stream for one, base in zip(found, before, strict=True)]
    for name, found in measured.items()
}
verdict = choose(
    {
        name: [(one.exact_match, rise) for one, rise in zip(found, rises[name], strict=True)]
        for name, found in measured.items()
    },
    limit,
)

fig, ax = plt.subplots(figsize=(7.5, 4.2))
for name, found in measured.items():
    colour = COLOURS.after if name == mine_is else COLOURS.before if name == "plain" else COLOURS.other
    rights = [one.exact_match for one in found]
    ax.plot(rises[name], rights, "o", ms=4, color=colour, alpha=0.5)
    low, high = triage.interval(pooled(found))
    intervals(ax, [np.mean(rises[name])], [pooled(found).mean()], [low], [high], colour)
    ax.plot([np.mean(rises[name])], [pooled(found).mean()], "o", color=colour, label=name)
ax.axvline(limit, color=COLOURS.wrong, lw=1, ls="--")
ax.text(
    limit,
    0.02,
    " the limit",
    color=COLOURS.wrong,
    fontsize=10,
    fontweight="bold",
    transform=ax.get_xaxis_transform(),
)
ax.axvline(0, color=COLOURS.truth, lw=1)
ax.text(0, 0.02, " the base", color=COLOURS.truth, fontsize=10, fontweight="bold", transform=ax.get_xaxis_transform())
ax.set(
    xlabel="rise of the stream's loss (nats a token)",
    ylabel="exact match on tickets",
    title="What a plan learns, and what it costs",
)
ax.margins(x=0.16, y=0.1)
label_lines(ax)
plt.show()

rows = []
for name, found in measured.items():
    mean, low, high = mean_interval(rises[name])
    reading = mean_interval([one.reading for one in found], 0, 1)
    rows.append(
        (
            name,
            *entries[name],
            pooled(found).mean(),
            mean,
            max(rises[name]),
            reading[0],
            "chosen" if name == verdict else "",
        )
    )
    if name in ("lower rate", "replay", "average", "plain"):
        key = name.replace(" ", "_")
        card.record(
            f"{key}_rise",
            mean,
            format="+.2f",
            low=low,
            high=high,
            tolerance=0.3,
            label=f"rise of the stream's loss, plan {name}",
            unit="nats",
        )
        if name != "plain":
            share_low, share_high = triage.interval(pooled(found))
            card.record(
                f"{key}_exact_match",
                pooled(found).mean(),
                format=".1%",
                low=share_low,
                high=share_high,
                tolerance=0.15,
                label=f"exact match, plan {name}",
            )
            card.record(
                f"{key}_reading",
                reading[0],
                format=".0%",
                low=reading[1],
                high=reading[2],
                tolerance=0.15,
                label=f"questions read right, plan {name}",
            )
remedies = [
    (rise - plain_rise, one.exact_match - old.exact_match)
    for name in ("lower rate", "replay", "average")
    for rise, plain_rise, one, old in zip(rises[name], plain_rises, measured[name], plain, strict=True)
]
for key, count, label in (
    ("milder", sum(more < 0 for more, _ in remedies), "the stream's loss rises less than in the plain run"),
    ("costlier", sum(gain < 0 for _, gain in remedies), "fewer tickets are right than in the plain run"),
):
    card.record(key, count, format="d", tolerance=3, label=f"of {len(remedies)} runs with a remedy: {label}")
columns = [
    "plan",
    "rate",
    "replay",
    "average",
    "exact match",
    "rise / nats",
    "worst rise / nats",
    "questions read right",
    "your rule",
]
formats = {
    "rate": "{:g}",
    "replay": "{:g}",
    "average": "{:g}",
    "exact match": "{:.1%}",
    "rise / nats": "{:+.2f}",
    "worst rise / nats": "{:+.2f}",
    "questions read right": "{:.0%}",
}
display(pd.DataFrame(rows, columns=columns).style.format(formats).hide(axis="index"))
compare(
    [(f"exact match of your plan ({mine_is})", predicted_exact_match, pooled(measured[mine_is]).mean())], format=".1%"
)
compare([(f"rise of the stream's loss, your plan ({mine_is})", predicted_rise, np.mean(rises[mine_is]))], format=".2f")

# %% [markdown]
# Up is better, left is better. Small dots are runs; the bars are 95 % Wilson intervals of the exact match over all test tickets. In numbers, exact match and rise of the stream's loss:
#
# | plan | exact match | rise | questions read right |
# |---|---|---|---|
# | plain | {{exact_match_after}} | {{plain_rise}} | {{reading_after}} |
# | lower rate | {{lower_rate_exact_match}} | {{lower_rate_rise}} | {{lower_rate_reading}} |
# | replay | {{replay_exact_match}} | {{replay_rise}} | {{replay_reading}} |
# | average | {{average_exact_match}} | {{average_rise}} | {{average_reading}} |
#
# Compare within a run, since all plans share its company and its test: in {{milder}} of the nine runs with a remedy the stream's loss rises less than in the plain run, and in {{costlier}} of the nine fewer tickets are right. What each of them takes away:
#
# - *Replay* takes an eighth of the tickets, and more than an eighth of the gradient, because a document has more labels than an answer and every label counts the same.
# - *A lower rate* learns less in a step. At other numbers of steps it compares otherwise, and it is not the same as stopping early.
# - *An average* gives back a part of what was learned. It costs no training, so it is the only one that you can tune after the fact: measure several weights on a development set, not on the test.
#
# Which one wins is a question about your number of steps, your data and your limit; without a limit you would look at the exact match alone. So fix the rule first, and let the table speak.
#
# What the figure does not show: three runs are few, and the limit is on a mean over sorts of documents. A plan within it may still lose the one sort that your users need.

# %% [markdown]
# ## With a real model
#
# Names, template and sizes are read from the model, so the lesson runs with any causal language model that has a chat template:
#
# ```
# course run 1.5 -p model_id Qwen/Qwen3-0.6B -p device cuda -p learning_rate 1e-5 -p batch_size 8 -p runs 1
# ```
#
# What changes:
#
# - **The floor and the stream.** A Hub model has never seen this stream, so its loss on it is no measure of forgetting: with replay it *falls*. Take held-out text of the kind your model was trained on (web text, code, chats) and a benchmark that customers care about; the entropy is unknown, so you only have the difference to the base.
# - **Replay without the pretraining data.** Most open models ship without it. A public mixture of the same kind, or answers that the base model itself wrote to general prompts, is the usual substitute; a few per cent often suffice (Scialom et al., 2022; Ibrahim et al., 2024).
# - **Memory.** Full finetuning in mixed precision with AdamW takes about 16 bytes a parameter before activations (Rajbhandari et al., 2020, section 3.1): 10 GB for 0.6 billion. That is where accumulation, gradient checkpointing and the adapters of lesson 2.1 come in, which also forget less (Biderman et al., 2024).
# - **Packing.** On a GPU take `SFTTrainer(packing=True)` with FlashAttention, and run your `contamination` once on the model and the attention implementation that you train with.
# - **Dropout.** GPT-2 has some, and a trainer's `model.train()` switches it on. The lesson sets it to 0, or no two steps could be compared.

# %% [markdown]
# ## Result card

# %%
card.show()

# %% [markdown]
# ## Say it in an interview
#
# <details><summary>You halve the batch, double the accumulation steps, and the loss curve moves. Why, and what do you do?</summary>
#
# The gradient should be the same up to rounding, so first make it so: one batch, both ways, compare gradients. The usual cause is averaging means of micro-batches that have unequal numbers of counted labels; each must be a sum divided by the labels of the whole step, on all devices. Other causes: the schedule counts micro-batches, clipping happens per micro-batch, dropout or the order of the data differs, batch statistics. Then say what the bug did: it overweighted labels in short micro-batches, so it changed the objective and not only the noise.
# </details>
#
# <details><summary>How do you know that packing does not leak between examples?</summary>
#
# Two tests. The packed loss equals the mean over the examples one by one, to rounding, on a model that knows the task: on an untrained one a leak may hardly change it. And a perturbation: change the tokens of one example; no logit of another may move. They find different things, for instance positions that do not restart leak nothing, and yet change the loss of a model with absolute positions. In transformers the borders are read from the positions, and only without an attention mask and without a cache.
# </details>
#
# <details><summary>The finetuned model is great at the task, and users say that it got dumber. What do you measure, what do you change?</summary>
#
# Measure what it could do before: the loss on held-out text of the old kind, and one or two abilities that users need, before and after, over several runs. Here exact match went from {{exact_match_before}} to {{exact_match_after}}, and reading from a passage from {{reading_before}} to {{reading_after}}, also in a domain that the new data never mentioned ({{port_before}} to {{port_after}}). Then the remedies in the order of their price: average with the base's weights, which needs no training; a lower rate; fewer steps only if the curve says so (here the rise after a quarter of the steps was {{early_share}} of the final one); replay old data, which takes the place of new; train an adapter. Agree on a limit before you look, and take the best task score within it.
# </details>

# %% [markdown]
# ## Read next
#
# - Mario Michael Krell, Matej Kosec, Sergio P. Perez, Andrew Fitzgibbon, [Efficient Sequence Packing without Cross-contamination](https://arxiv.org/abs/2107.02027), 2021.
# - Tom Brown et al., [Language Models are Few-Shot Learners](https://arxiv.org/abs/2005.14165), 2020, appendix B; Aaron Grattafiori et al., [The Llama 3 Herd of Models](https://arxiv.org/abs/2407.21783), 2024, section 3.2; Yu Zhao et al., [Analysing The Impact of Sequence Composition on Language Model Pre-Training](https://arxiv.org/abs/2402.13991), 2024. Packed pretraining, without and with a mask.
# - Achintya Kundu et al., [Enhancing Training Efficiency Using Packing with Flash Attention](https://arxiv.org/abs/2407.09105), 2024. The padding-free path that transformers and trl use.
# - Liyuan Liu et al., [On the Variance of the Adaptive Learning Rate and Beyond](https://arxiv.org/abs/1908.03265), 2020. Why Adam wants a warm-up.
# - Lysandre Debut et al., [Fixing Gradient Accumulation](https://huggingface.co/blog/gradient_accumulation), 2024. The maintainers on the averaging bug.
# - Long Ouyang et al., [Training language models to follow instructions with human feedback](https://arxiv.org/abs/2203.02155), 2022. Supervised finetuning, and pretraining gradients mixed in against regressions.
# - Zhengyan Shi et al., [Instruction Tuning With Loss Over Instructions](https://arxiv.org/abs/2405.14394), 2024.
# - Michael McCloskey and Neal J. Cohen, [Catastrophic Interference in Connectionist Networks](https://doi.org/10.1016/S0079-7421(08)60536-8), 1989; Anthony Robins, [Catastrophic Forgetting, Rehearsal and Pseudorehearsal](https://doi.org/10.1080/09540099550039318), 1995.
# - Thomas Scialom, Tuhin Chakrabarty, Smaranda Muresan, [Fine-tuned Language Models are Continual Learners](https://arxiv.org/abs/2205.12393), 2022; Adam Ibrahim et al., [Simple and Scalable Strategies to Continually Pre-train Large Language Models](https://arxiv.org/abs/2403.08763), 2024.
# - Mitchell Wortsman et al., [Robust fine-tuning of zero-shot models](https://arxiv.org/abs/2109.01903), 2022. Averaging with the weights you started from.
# - Samyam Rajbhandari et al., [ZeRO: Memory Optimizations Toward Training Trillion Parameter Models](https://arxiv.org/abs/1910.02054), 2020. Where the bytes of mixed-precision training go.
# - Dan Biderman et al., [LoRA Learns Less and Forgets Less](https://arxiv.org/abs/2405.09673), 2024.
