# %% [markdown]
# # 2.5 Preference tuning with DPO
#
# You will be able to train a preference into an adapter with Direct Preference Optimization, prove that your loss is `trl`'s, and read from the curves how far to go and what the pairs taught besides quality.
#
# **You will measure.** Win rate against the reference: 50 % before, {{win_after}} within a budget of {{kl_budget}} nats of KL (95 % interval {{win_after:interval}}). The same pairs at a small β, trained to the end: {{win_end}} at {{kl_end}} nats. With pairs whose better reply is usually the longer one, an idle sentence stands in {{idle_confounded}} of the replies, in the reference's in {{idle_reference}}. On the same batches your loss differs from `trl`'s by {{parity}}.
#
# **You need.** Lesson 1.5 (supervised finetuning, masks) and 2.1 (adapters); the logistic function; the KL divergence.
#
# **Time.** About 70 minutes, 55 of them for the exercises. The solution runs in {{run:seconds}} s on one CPU core.

# %% [markdown]
# ## Why it matters at work
#
# A support assistant answers correctly but insults every fifth customer. You cannot write the one right answer to each ticket, but you can say which of two replies is better. Pairs are what feedback buttons and reviewers give you, and DPO turns them into weights without a reward model and without sampling in the loop.
#
# It fails quietly. The loss falls, the margin rises, the accuracy on held-out pairs climbs, and the model that comes out rambles, or no longer answers. What a trainer logs by default is measured on the pairs; it does not show what the model says.
#
# In interviews you derive the loss from the KL-constrained objective. Then: "The log-probability of the chosen replies falls while you train. Is that a bug?" And: "Your raters prefer long answers. What do you do?"

# %% tags=["parameters"]
model_id = "shipped"  # "shipped", the id of a causal language model on the Hub, or a local folder
device = "cpu"  # "cpu", "cuda" or "mps"
sft_steps = 80  # of 16 examples; quick: 3
sft_rate = 1.5e-3  # of all weights, for the shipped model of about a million; 1e-5 for a real one
learning_rate = 2.5e-3  # of the adapters, large, as steps are few; 5e-6 to 5e-5 for a real model
rank = 8
betas = (0.05, 0.3)
steps = 16  # quick: 3
batch_size = 8  # pairs
pairs_a_run = 128  # quick: 64
test_questions = 64  # of each run; a reply to each is drawn at every checkpoint; quick: 16
longest_prompt = 56  # tokens; raise it for a tokenizer with shorter tokens
kl_budget = 2.0  # nats a reply that the product allows, in every run
runs = 3  # each with companies, pairs, a start and an order of its own; quick: 2
seed = 3  # the settings above were chosen with the worlds of seed 0

# %%
import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # trl reports its use to the Hub; read when it is imported

import copy
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import datasets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import display
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from scipy import stats
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, get_constant_schedule_with_warmup
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from labkit import adapters, base_model, replies, triage
from labkit.plots import COLOURS, direct_label, label_lines, use_house_style
from labkit.predict import compare
from labkit.results import ResultCard
from labkit.world import LESSON_SEEDS, Preference, World

# peft asks transformers for a property under its old name; the warning says nothing about your code.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
datasets.disable_progress_bars()
use_house_style()
card = ResultCard("2_5_preference_tuning_with_dpo")

# %% [markdown]
# ## A policy with good and bad habits
#
# The task is a question about a passage. A reply is the answer, right or wrong, perhaps with an insult, perhaps with an idle sentence. DPO can only move probability between replies that a model gives, so you begin with a short supervised finetuning on replies *of every quality*, as a model has them that was trained on raw support logs. This finetuned model is the **reference**.

# %%
model, tokenizer = base_model.load(model_id, device=device)  # in eval mode and float32
adapters.use_linear_layers(model)  # GPT-2 keeps its weights transposed (Conv1D); any other model stays as it is
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
for module in model.modules():
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0

asked = partial(replies.asked, tokenizer, longest=longest_prompt)
logs = [one for world in range(4) for one in asked(World(LESSON_SEEDS[900 + world]), 256)]
shown = replies.demonstrations(logs, wrong=0.15, rude=0.25, idle=0.35, seed=seed)
examples = replies.examples(tokenizer, shown)
model.requires_grad_(True)
triage.train(
    model, triage.batches(examples, size=16, steps=sft_steps, seed=seed), steps=sft_steps, learning_rate=sft_rate,
    label="supervised finetuning",
)  # fmt: skip
model.requires_grad_(False)
print(shown[0][0], "\n")
for _, reply in shown[:5]:
    print(repr(reply))

# %% [markdown]
# Grades are exact, since the world knows the answer:
#
# | grade | | a reply that |
# |---|---|---|
# | 3 | good | is the right answer and nothing else |
# | 2 | idle | has the right answer and an idle sentence |
# | 1 | wrong | says anything else, politely |
# | 0 | rude | has an insult, whatever else it says |
#
# A **win** is a better grade than the reference's reply has, and a tie is half a win. As grades mean the same for every question, you may compare a reply with *all* replies of the reference instead of one, which leaves less noise. So the reference itself wins 50 %.


# %%
def win_rate(grades: Sequence[int], reference: Sequence[int]) -> float:
    """The share of pairs (a grade, a grade of the reference) that the first one wins; a tie is half a win."""
    mine, theirs = np.asarray(grades)[:, None], np.asarray(reference)[None, :]
    return float(np.mean((mine > theirs) + 0.5 * (mine == theirs)))


tests = [asked(World(LESSON_SEEDS[seed + 500 + run]), test_questions) for run in range(runs)]
test_prompts = [[replies.prompt_ids(tokenizer, one.prompt) for one in part] for part in tests]


def graded(drawn: Sequence[Sequence[int]], questions: Sequence[Preference]) -> list[int]:
    """The grade of each drawn reply (token ids)."""
    texts = tokenizer.batch_decode(drawn, skip_special_tokens=True)
    return [replies.grade(text, one.chosen) for text, one in zip(texts, questions, strict=True)]


drawn = [replies.sample(model, tokenizer, test_prompts[run], seed=seed + run) for run in range(runs)]
reference_grades = [grade for run in range(runs) for grade in graded(drawn[run], tests[run])]

rows = []
for grade, name in enumerate(replies.GRADES):
    examples = [
        tokenizer.decode(reply, skip_special_tokens=True)
        for reply, one in zip(drawn[0], tests[0], strict=True)
        if graded([reply], [one]) == [grade]
    ]
    rows.append((grade, name, np.mean(np.equal(reference_grades, grade)), examples[0] if examples else ""))
table = pd.DataFrame(rows, columns=["grade", "", "share of the reference's replies", "an example"])
display(table.style.format({"share of the reference's replies": "{:.0%}"}).hide(axis="index"))

# %% [markdown]
# ## The log-probability of a reply
#
# DPO sees a model only through $\log \pi(y \mid x)$: how likely it finds a whole reply $y$ to a prompt $x$. By the chain rule it is a sum over the tokens of the reply,
#
# $$\log \pi(y \mid x) = \sum_{i} \log \pi(y_i \mid x, y_1 \dots y_{i-1}),$$
#
# a sum and not a mean: a longer reply has more factors, and each of them costs.
#
# `trl`'s collator puts $n$ pairs into one batch of $2n$ rows: all chosen replies, then all rejected ones, in the same order. `completion_mask` is 1 on the tokens of the reply, end of sequence included.

# %%
collate = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
tiny_batch = collate(
    [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8, 9, 2]},
        {"prompt_ids": [4], "chosen_ids": [3, 2], "rejected_ids": [2]},
    ]
)
for key, tensor in tiny_batch.items():
    print(key, tensor.tolist())

# %% [markdown]
# **Exercise.** `sequence_logps(logits, input_ids, completion_mask)` returns the log-probability of each row's reply, `(n,)`, in nats.
#
# - `logits` is `(n, t, v)`, as a causal model returns them: those at place $i$ predict the token at place $i + 1$.
# - `input_ids` and `completion_mask` are `(n, t)` int64. Only tokens whose mask is 1 count. The token at place 0 is predicted by nothing and never counts.
# - Gradients flow through it to the logits, and the arguments stay as they are.
#
# With all logits equal and $v = 4$, every token has probability 1/4: the mask `[[0, 1, 1]]` gives `[-2.7726]`, twice $\log \frac14$. *About 3 lines.*
#
# <details><summary>Hint 1</summary>Which rows of the logits predict which tokens? Write the indices of the first and the last one of each down before you slice.</details>
# <details><summary>Hint 2</summary><code>log_softmax</code> over the vocabulary, then <code>gather</code> along the same axis with the ids of the next tokens; gather wants an index with as many axes.</details>
# <details><summary>Hint 3</summary>Logits without the last place, ids and mask without the first. Gather with the ids, an axis added at the end, take that axis off again, multiply by the mask, sum over the places.</details>


# %% exercise="sequence-logps" difficulty=2 minutes=8
def sequence_logps(logits: Tensor, input_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """Return the log-probability of each row's reply: (n, t, v), (n, t), (n, t) -> (n,)."""
    ### BEGIN SOLUTION
    logps = logits[:, :-1].log_softmax(dim=-1).gather(-1, input_ids[:, 1:, None])[..., 0]
    return (logps * completion_mask[:, 1:]).sum(dim=1)
    ### END SOLUTION


# %% check="sequence-logps" points=2
uniform = sequence_logps(torch.zeros(1, 3, 4), torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 1]]))
assert uniform.shape == (1,), f"One number a row: (1, 3, 4) becomes (1,); yours is {tuple(uniform.shape)}"
four = sequence_logps(torch.zeros(1, 4, 4), torch.tensor([[1, 2, 3, 0]]), torch.tensor([[0, 1, 1, 0]]))
assert not torch.allclose(four, torch.tensor([-2.1972]), atol=1e-3), (
    "-2.197 is twice log(1/3), and three is the number of places: normalise over the vocabulary, the last axis"
)
scores = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]]])  # place i predicts token i
shifted = sequence_logps(scores, torch.tensor([[2, 0, 1]]), torch.tensor([[0, 1, 1]]))
assert shifted.item() > -17, (
    "The logits at place i predict the token at place i + 1: yours are compared with the token at their own place"
)
whole = sequence_logps(scores, torch.tensor([[2, 0, 2]]), torch.tensor([[0, 1, 0]]))
assert whole.item() > -1, (
    "Only the reply counts, that is the tokens whose completion_mask is 1: shift the mask with the tokens, not with the logits"
)
assert not torch.allclose(uniform, torch.tensor([-1.3863]), atol=1e-3), (
    "-1.386 is the mean over the reply's tokens: a reply's log-probability is the sum, so that longer replies are less likely"
)
assert torch.allclose(uniform, torch.tensor([-2.7726]), atol=1e-3), (
    f"Two tokens of probability 1/4 give 2 log(1/4) = -2.7726; yours is {uniform.tolist()}"
)
trained = scores.clone().requires_grad_()
assert sequence_logps(trained, torch.tensor([[2, 0, 1]]), torch.tensor([[0, 1, 1]])).requires_grad, (
    "No gradient reaches the logits, so nothing could be trained: no detach, no_grad or numpy here"
)
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(4)
for _n, _t, _v in [(1, 2, 3), (3, 7, 5), (4, 1, 6), (2, 9, 11)]:
    _logits = torch.randn(_n, _t, _v, generator=_generator, dtype=torch.float64) * 3
    _ids = torch.randint(0, _v, (_n, _t), generator=_generator)
    _mask = torch.randint(0, 2, (_n, _t), generator=_generator)
    _want = torch.zeros(_n, dtype=torch.float64)
    for _row in range(_n):
        for _i in range(1, _t):
            if _mask[_row, _i]:
                _want[_row] += torch.log_softmax(_logits[_row, _i - 1], dim=0)[_ids[_row, _i]]
    _kept = [_one.clone() for _one in (_logits, _ids, _mask)]
    _got = sequence_logps(_logits, _ids, _mask)
    assert all(torch.equal(_one, _old) for _one, _old in zip((_logits, _ids, _mask), _kept, strict=True)), (
        "Do not change the tensors that you are given: the batch is used again"
    )
    assert _got.shape == (_n,), f"{(_n, _t, _v)} becomes ({_n},); yours is {tuple(_got.shape)}"
    assert torch.allclose(_got, _want), f"{(_n, _t, _v)}: add the log-probabilities of the tokens whose mask is 1"
### END HIDDEN TESTS


# %% mistake="compares logits and tokens of one place" of="sequence-logps" says="predict the token at place i + 1"
def sequence_logps(logits, input_ids, completion_mask):
    logps = logits.log_softmax(-1).gather(-1, input_ids[..., None])[..., 0]
    return (logps * completion_mask).sum(1)


# %% mistake="a mean over the tokens" of="sequence-logps" says="is the mean over the reply's tokens"
def sequence_logps(logits, input_ids, completion_mask):
    logps = logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
    mask = completion_mask[:, 1:]
    return (logps * mask).sum(1) / mask.sum(1)


# %% mistake="counts the prompt and the padding" of="sequence-logps" says="Only the reply counts"
def sequence_logps(logits, input_ids, completion_mask):
    return logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0].sum(1)


# %% mistake="shifts the mask with the logits" of="sequence-logps" says="shift the mask with the tokens"
def sequence_logps(logits, input_ids, completion_mask):
    logps = logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
    return (logps * completion_mask[:, :-1]).sum(1)


# %% mistake="normalises over the places" of="sequence-logps" says="normalise over the vocabulary"
def sequence_logps(logits, input_ids, completion_mask):
    logps = torch.log_softmax(logits[:, :-1], dim=1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return (logps * completion_mask[:, 1:]).sum(dim=1)


# %% mistake="forgets to normalise the logits" of="sequence-logps" says="log(1/4)"
def sequence_logps(logits, input_ids, completion_mask):
    scores = logits[:, :-1].gather(-1, input_ids[:, 1:, None])[..., 0]
    return (scores * completion_mask[:, 1:]).sum(1)


# %% mistake="cuts the gradient" of="sequence-logps" says="No gradient reaches the logits"
def sequence_logps(logits, input_ids, completion_mask):
    with torch.no_grad():
        logps = torch.log_softmax(logits[:, :-1], dim=-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
        return (logps * completion_mask[:, 1:]).sum(dim=1)


# %% mistake="changes the ids in place" of="sequence-logps" says="the batch is used again"
def sequence_logps(logits, input_ids, completion_mask):
    input_ids[completion_mask == 0] = 0
    logps = torch.log_softmax(logits[:, :-1], dim=-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return (logps * completion_mask[:, 1:]).sum(dim=1)


# %% alternative="a cross-entropy with ignored labels" of="sequence-logps"
def sequence_logps(logits, input_ids, completion_mask):
    labels = input_ids.masked_fill(completion_mask == 0, -100)[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="none"
    )
    return -losses.sum(dim=1)


# %% alternative="a loop over the rows" of="sequence-logps"
def sequence_logps(logits, input_ids, completion_mask):
    found = []
    for row, ids, mask in zip(logits, input_ids, completion_mask, strict=True):
        places = [i for i in range(1, len(ids)) if mask[i] == 1]
        found.append(sum((row[i - 1, ids[i]] - row[i - 1].logsumexp(0) for i in places), row.new_zeros(())))
    return torch.stack(found)


# %% [markdown]
# ## The loss
#
# Fix a reward $r(x, y)$ and ask for the policy that has much of it and stays near the reference,
#
# $$\max_\pi \; \mathbb{E}_{y \sim \pi}[r(x, y)] - \beta \, \mathrm{KL}\big(\pi(\cdot \mid x) \,\|\, \pi_{ref}(\cdot \mid x)\big).$$
#
# Its solution is $\pi(y \mid x) = \frac{1}{Z(x)} \pi_{ref}(y \mid x)\, e^{r(x, y) / \beta}$. Read backwards, *every* policy is the optimum for a reward that you can compute from it: $r = \beta \log \frac{\pi(y \mid x)}{\pi_{ref}(y \mid x)} + \beta \log Z(x)$. Put that into the Bradley-Terry model of a comparison, in which $y_w$ beats $y_l$ with probability $\sigma(r_w - r_l)$. The unknown $Z(x)$ cancels, and maximum likelihood becomes a loss on the policy (Rafailov et al., 2023, section 4):
#
# $$L = -\log \sigma(\beta m), \qquad m = \underbrace{\log \frac{\pi(y_w \mid x)}{\pi_{ref}(y_w \mid x)}}_{\text{log-ratio of the chosen}} - \underbrace{\log \frac{\pi(y_l \mid x)}{\pi_{ref}(y_l \mid x)}}_{\text{of the rejected}}.$$
#
# $m$ is the **margin** in nats, $\beta m$ the implicit reward margin that trainers log. A small β asks for a large margin before it is content: at $\sigma(\beta m) = 0.95$, $m$ is $2.9 / \beta$.
#
# **Exercise.** Three things. `policy` and `reference` are `(2n,)`: log-probabilities in the order of the collator, all $n$ chosen replies first.
#
# 1. `dpo_loss(policy, reference, beta)` returns the loss of each pair, `(n,)`, not yet averaged. It stays finite for margins of ±1,000, and gradients flow through it to `policy`. For `policy = [-2., -5.]`, `reference = [-3., -4.]`, `beta = 0.5` the margin is 2 and the loss `[0.3133]`.
# 2. `push(policy, reference, beta)` returns, `(n,)`, the size of the gradient $|\partial L / \partial \log \pi(y_w)|$ of each pair. In the example it is `[0.1345]`. By hand or by autograd.
# 3. `direction`: in which direction one step of gradient descent would move each log-probability if it could be moved alone: `+1` for up, `-1` for down.
#
# *About 6 lines.*
#
# <details><summary>Hint 1</summary>First get the log-ratio of all 2n replies, then split it into halves. For the push: what is the derivative of −log σ(z)?</details>
# <details><summary>Hint 2</summary><code>tensor.chunk(2)</code> gives the halves. <code>logsigmoid</code> is finite where the logarithm of <code>sigmoid</code> is −∞. The derivative of −log σ(z) is −σ(−z).</details>
# <details><summary>Hint 3</summary>loss = −logsigmoid(β · margin). The push is β · σ(−β · margin): large for a pair in the wrong order, near zero once the margin is large against 1/β.</details>


# %% exercise="dpo-loss" difficulty=2 minutes=10
def dpo_loss(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return the loss of each pair: (2n,), (2n,) -> (n,)."""
    ### BEGIN SOLUTION
    chosen, rejected = (policy - reference).chunk(2)
    return -logsigmoid(beta * (chosen - rejected))
    ### END SOLUTION


def push(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return the size of the loss's gradient with respect to each chosen log-probability: (2n,), (2n,) -> (n,)."""
    ### BEGIN SOLUTION
    chosen, rejected = (policy - reference).chunk(2)
    return beta * torch.sigmoid(-beta * (chosen - rejected))
    ### END SOLUTION


direction = {"chosen": None, "rejected": None}
### BEGIN SOLUTION
direction = {"chosen": +1, "rejected": -1}
### END SOLUTION

# %% check="dpo-loss" points=2
got = dpo_loss(torch.tensor([-2.0, -5.0]), torch.tensor([-3.0, -4.0]), beta=0.5)
assert got.shape == (1,), f"The loss of each pair, (n,) = (1,), not averaged; yours is {tuple(got.shape)}"
assert abs(got.item() - 1.3133) > 1e-3, "1.3133 is the loss of the pair in the wrong order: chosen minus rejected"
assert abs(got.item() - 0.2014) > 1e-3, (
    "0.2014 ignores the reference: the margin is a difference of log-ratios, policy minus reference"
)
assert abs(got.item() - 0.1269) > 1e-3, "0.1269 is the loss without beta: it multiplies the margin inside the sigmoid"
assert abs(got.item() - 0.3133) < 1e-3, f"Margin 2, beta 0.5: -log sigmoid(1) = 0.3133; yours is {got.item():.4f}"
two = dpo_loss(torch.tensor([-1.0, -2.0, -1.0, -6.0]), torch.zeros(4), beta=1.0)
assert two.shape == (2,), f"Four log-probabilities are two pairs, so two losses; yours are {tuple(two.shape)}"
assert torch.allclose(two, torch.tensor([0.6931, 0.0181]), atol=1e-3), (
    "The order is all chosen, then all rejected: of four, pair 0 is places 0 and 2; the losses are [0.6931, 0.0181], "
    f"yours {two.tolist()}"
)
far = dpo_loss(torch.tensor([-1000.0, 0.0]), torch.zeros(2), beta=1.0)
assert abs(far.item() - 1000) < 1, (
    f"At a margin of -1,000 the loss is 1,000; yours is {far.item()}: sigmoid is 0 there, use logsigmoid"
)
assert dpo_loss(torch.zeros(2, requires_grad=True), torch.zeros(2), beta=1.0).requires_grad, (
    "No gradient reaches the policy's log-probabilities, so nothing could be trained: no detach, no_grad or numpy here"
)
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(8)
for _n, _beta in [(1, 0.1), (3, 0.5), (6, 2.0)]:
    _policy, _reference = torch.randn(2, 2 * _n, generator=_generator, dtype=torch.float64) * 4
    _kept = _policy.clone()
    _got = dpo_loss(_policy, _reference, _beta)
    _want = [
        np.log1p(np.exp(-_beta * ((_policy[i] - _reference[i]) - (_policy[_n + i] - _reference[_n + i])).item()))
        for i in range(_n)
    ]
    assert _got.shape == (_n,), f"{2 * _n} log-probabilities are {_n} pairs; yours are {tuple(_got.shape)}"
    assert np.allclose(_got, _want), f"{_n} pairs, beta {_beta}: the losses are {_want}, yours {_got.tolist()}"
    assert torch.equal(_policy, _kept), "Do not change the log-probabilities that you are given"
assert dpo_loss(torch.tensor([1000.0, 0.0]), torch.zeros(2), 1.0).item() < 1e-6, "At a margin of 1,000 the loss is 0"
### END HIDDEN TESTS

# %% check="dpo-loss" points=2
got = push(torch.tensor([-2.0, -5.0]), torch.tensor([-3.0, -4.0]), beta=0.5)
assert got.shape == (1,), f"A size for each pair, (n,) = (1,); yours is {tuple(got.shape)}"
assert got.item() > 0, f"The size of the gradient is positive; its sign is for direction. Yours is {got.item():.4f}"
assert abs(got.item() - 0.3655) > 1e-3, (
    "0.3655 grows with the margin: the pair that is already in order would be pushed hardest. The derivative of -log sigmoid(z) is -sigmoid(-z)"
)
assert abs(got.item() - 0.2689) > 1e-3, "0.2689 lacks the inner derivative: beta multiplies the margin"
assert abs(got.item() - 0.1345) < 1e-3, f"beta sigmoid(-beta m) = 0.5 sigmoid(-1) = 0.1345; yours is {got.item():.4f}"
got = push(torch.tensor([-1.0, -2.0, -1.0, -6.0]), torch.zeros(4), beta=1.0)
assert got.shape == (2,), f"Four log-probabilities are two pairs, so two sizes; yours are {tuple(got.shape)}"
assert not torch.allclose(got, torch.tensor([0.25, 0.0090]), atol=1e-3), (
    "[0.25, 0.009] is the gradient of the mean over the pairs: each pair has its own loss and its own gradient"
)
assert torch.allclose(got, torch.tensor([0.5, 0.0180]), atol=1e-3), (
    f"At margins 0 and 4 and beta 1 the sizes are [0.5, 0.0180]; yours are {got.tolist()}"
)
assert set(direction) == {"chosen", "rejected"}, f"direction has the keys 'chosen' and 'rejected'; yours is {direction}"
assert all(value in (-1, 1) for value in direction.values()), f"direction holds +1 or -1; yours is {direction}"
assert direction["chosen"] != direction["rejected"], (
    "The loss depends on the difference of the two alone, so they are pushed in opposite directions"
)
assert direction["chosen"] == 1, (
    "Descent goes against the gradient: the loss falls as the chosen log-probability grows, so it is pushed up"
)
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(9)
for _n, _beta in [(1, 0.3), (4, 1.0), (5, 0.05)]:
    _policy, _reference = torch.randn(2, 2 * _n, generator=_generator, dtype=torch.float64) * 3
    _leaf = _policy.clone().requires_grad_()
    _ratio = _leaf - _reference
    torch.nn.functional.softplus(-_beta * (_ratio[:_n] - _ratio[_n:])).sum().backward()
    _got = push(_policy, _reference, _beta)
    assert torch.allclose(_got, -_leaf.grad[:_n]), f"{_n} pairs, beta {_beta}: autograd gives {-_leaf.grad[:_n]}"
### END HIDDEN TESTS


# %% mistake="takes rejected minus chosen" of="dpo-loss" says="chosen minus rejected"
def dpo_loss(policy, reference, beta):
    chosen, rejected = (policy - reference).chunk(2)
    return -logsigmoid(beta * (rejected - chosen))


def push(policy, reference, beta):
    chosen, rejected = (policy - reference).chunk(2)
    return beta * torch.sigmoid(-beta * (chosen - rejected))


direction = {"chosen": 1, "rejected": -1}


# %% mistake="forgets the reference" of="dpo-loss" says="ignores the reference"
def dpo_loss(policy, reference, beta):
    chosen, rejected = policy.chunk(2)
    return -logsigmoid(beta * (chosen - rejected))


def push(policy, reference, beta):
    chosen, rejected = (policy - reference).chunk(2)
    return beta * torch.sigmoid(-beta * (chosen - rejected))


direction = {"chosen": 1, "rejected": -1}


# %% mistake="takes every second row for a rejected reply" of="dpo-loss" says="all chosen, then all rejected"
def dpo_loss(policy, reference, beta):
    ratio = policy - reference
    return -logsigmoid(beta * (ratio[::2] - ratio[1::2]))


def push(policy, reference, beta):
    ratio = policy - reference
    return beta * torch.sigmoid(-beta * (ratio[::2] - ratio[1::2]))


direction = {"chosen": 1, "rejected": -1}


# %% mistake="the logarithm of a sigmoid" of="dpo-loss" says="use logsigmoid"
def dpo_loss(policy, reference, beta):
    chosen, rejected = (policy - reference).chunk(2)
    return -torch.log(torch.sigmoid(beta * (chosen - rejected)))


def push(policy, reference, beta):
    chosen, rejected = (policy - reference).chunk(2)
    return beta * torch.sigmoid(-beta * (chosen - rejected))


direction = {"chosen": 1, "rejected": -1}


# %% mistake="beta outside of the sigmoid" of="dpo-loss" says="it multiplies the margin inside the sigmoid"
def dpo_loss(policy, reference, beta):
    chosen, rejected = (policy - reference).chunk(2)
    return -logsigmoid(chosen - rejected)


def push(policy, reference, beta):
    chosen, rejected = (policy - reference).chunk(2)
    return beta * torch.sigmoid(-beta * (chosen - rejected))


direction = {"chosen": 1, "rejected": -1}


# %% mistake="pushes ordered pairs hardest" of="dpo-loss" says="would be pushed hardest"
def dpo_loss(policy, reference, beta):
    chosen, rejected = (policy - reference).chunk(2)
    return -logsigmoid(beta * (chosen - rejected))


def push(policy, reference, beta):
    chosen, rejected = (policy - reference).chunk(2)
    return beta * torch.sigmoid(beta * (chosen - rejected))


direction = {"chosen": 1, "rejected": -1}


# %% mistake="the gradient of the mean" of="dpo-loss" says="the gradient of the mean over the pairs"
def dpo_loss(policy, reference, beta):
    chosen, rejected = (policy - reference).chunk(2)
    return -logsigmoid(beta * (chosen - rejected))


def push(policy, reference, beta):
    leaf = policy.detach().clone().requires_grad_()
    dpo_loss(leaf, reference, beta).mean().backward()
    return leaf.grad.chunk(2)[0].abs()


direction = {"chosen": 1, "rejected": -1}


# %% mistake="cuts the gradient" of="dpo-loss" says="No gradient reaches the policy"
def dpo_loss(policy, reference, beta):
    chosen, rejected = (policy - reference).detach().chunk(2)
    return -logsigmoid(beta * (chosen - rejected))


def push(policy, reference, beta):
    chosen, rejected = (policy - reference).chunk(2)
    return beta * torch.sigmoid(-beta * (chosen - rejected))


direction = {"chosen": 1, "rejected": -1}


# %% mistake="both replies go up" of="dpo-loss" says="pushed in opposite directions"
def dpo_loss(policy, reference, beta):
    chosen, rejected = (policy - reference).chunk(2)
    return -logsigmoid(beta * (chosen - rejected))


def push(policy, reference, beta):
    chosen, rejected = (policy - reference).chunk(2)
    return beta * torch.sigmoid(-beta * (chosen - rejected))


direction = {"chosen": 1, "rejected": 1}


# %% alternative="softplus and autograd" of="dpo-loss"
def dpo_loss(policy, reference, beta):
    n = len(policy) // 2
    odds = (policy[:n] - policy[n:]) - (reference[:n] - reference[n:])
    return torch.nn.functional.softplus(-beta * odds)


def push(policy, reference, beta):
    leaf = policy.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(dpo_loss(leaf, reference, beta).sum(), leaf)
    return gradient[: len(policy) // 2].abs()


direction = {"chosen": 1.0, "rejected": -1.0}

# %% [markdown]
# Note what the loss does *not* ask for. It pushes two log-probabilities apart; both may fall, as long as the rejected one falls faster. In a network they cannot be moved alone: the two replies share tokens and weights. You will look for this below.
#
# ## The reference for nothing
#
# The reference is a second model in memory, of the same size. With an adapter you need no second one: the policy *without* its adapter is the reference.
#
# **Exercise.** `by_reference(policy, function)` returns `function(policy)`, evaluated as if `policy` were the reference.
#
# - `policy` is a `peft` model with one adapter; `function` takes a model and returns anything.
# - During the call, the adapter is off and no gradients are recorded. The model is not copied, merged or unloaded.
# - Afterwards the adapter is on again, also when `function` raised an exception, which you let through.
#
# `by_reference(policy, lambda model: model(input_ids).logits)` gives the logits of the base model. *About 2 lines.*
#
# <details><summary>Hint 1</summary>What ends by itself however a block is left? A context manager.</details>
# <details><summary>Hint 2</summary><code>PeftModel.disable_adapter()</code> is a context manager; so is <code>torch.no_grad()</code>.</details>
# <details><summary>Hint 3</summary>One <code>with</code> that names both, and <code>return function(policy)</code> inside it.</details>


# %% exercise="reference" difficulty=1 minutes=6
def by_reference(policy: PeftModel, function: Callable[[PeftModel], Any]) -> Any:
    """Return `function(policy)` with the adapter off and without gradients."""
    ### BEGIN SOLUTION
    with torch.no_grad(), policy.disable_adapter():
        return function(policy)
    ### END SOLUTION


# %% check="reference" points=2
def small_policy(seed: int) -> tuple[PeftModel, Tensor, Tensor]:
    """A random Llama with a random adapter; also some ids (2, 5), and the base model's logits on them."""
    torch.manual_seed(seed)
    small = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    base, ids = LlamaForCausalLM(small).eval(), torch.randint(0, 20, (2, 5))
    with torch.no_grad():
        logits = base(ids).logits
    return (
        get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")).eval(),
        ids,
        logits,
    )


def small_logits(model: PeftModel, ids: Tensor) -> Tensor:
    """The model's logits on these ids."""
    return model(ids).logits


policy, ids, base_logits = small_policy(0)
adapted_logits = policy(ids).logits.detach()
seen = {}


def look(model: PeftModel) -> Tensor:
    """Note in which state the model is called."""
    seen["gradients"] = torch.is_grad_enabled()
    seen["same"] = model is policy
    return model(ids).logits


got = by_reference(policy, look)
assert seen, "Call the function: function(policy) is what you return"
assert got is not None, "Return what the function returned"
assert not torch.allclose(got, adapted_logits), (
    "These are the policy's own logits: switch the adapter off during the call, or every margin is 0 and stays 0"
)
assert torch.allclose(got, base_logits), "With the adapter off the logits are the base model's; yours are others"
assert not seen["gradients"], "Record no gradients while the reference computes (torch.no_grad): it is never trained"
assert seen["same"], "Pass on the policy itself: a copy is the second model in memory that you want to save"
assert torch.equal(policy(ids).logits, adapted_logits), (
    "Afterwards the adapter must be on again: the policy now answers as the reference does"
)
assert any(p.requires_grad for name, p in policy.named_parameters() if "lora_" in name), (
    "Afterwards the adapter must still be trainable"
)
### BEGIN HIDDEN TESTS
for _seed in (1, 2):
    _policy, _ids, _base = small_policy(_seed)
    _before = _policy(_ids).logits.detach()
    _got = by_reference(_policy, partial(small_logits, ids=_ids))
    assert torch.allclose(_got, _base), "With the adapter off the logits are the base model's; yours are others"
    assert torch.equal(_policy(_ids).logits, _before), "Afterwards the adapter must be on again"
    assert _policy(_ids).logits.requires_grad, "Afterwards gradients are recorded again"
    assert by_reference(_policy, lambda model: "a word") == "a word", "The function may return anything"
### END HIDDEN TESTS

# %% check="reference" points=1
policy, ids, _ = small_policy(3)
adapted_logits = policy(ids).logits.detach()


def fail(model: PeftModel) -> Tensor:
    raise ValueError("a row is too long")


message = None
try:
    by_reference(policy, fail)
except ValueError as error:
    message = str(error)
assert message == "a row is too long", "Let the function's exception through: whoever calls you must see it"
assert torch.equal(policy(ids).logits, adapted_logits), (
    "After an exception the adapter stayed off: from then on you train nothing. Use a context manager, or finally"
)
### BEGIN HIDDEN TESTS
_policy, _ids, _ = small_policy(4)
_before = _policy(_ids).logits.detach()
for _ in range(2):
    try:
        by_reference(_policy, fail)
        raise AssertionError("Let the function's exception through")
    except ValueError:
        pass
assert torch.is_grad_enabled(), "After an exception gradients are recorded again"
assert torch.equal(_policy(_ids).logits, _before), "After an exception the adapter must be on again"
### END HIDDEN TESTS


# %% mistake="the policy is its own reference" of="reference" says="switch the adapter off"
def by_reference(policy, function):
    with torch.no_grad():
        return function(policy)


# %% mistake="leaves the adapter off" of="reference" says="Afterwards the adapter must be on again"
def by_reference(policy, function):
    policy.base_model.disable_adapter_layers()
    with torch.no_grad():
        return function(policy)


# %% mistake="records gradients" of="reference" says="Record no gradients"
def by_reference(policy, function):
    with policy.disable_adapter():
        return function(policy)


# %% mistake="copies the whole policy" of="reference" says="a copy is the second model in memory"
def by_reference(policy, function):
    reference = copy.deepcopy(policy).unload()
    with torch.no_grad():
        return function(reference)


# %% mistake="not after an exception" of="reference" says="After an exception the adapter stayed off"
def by_reference(policy, function):
    policy.base_model.disable_adapter_layers()
    with torch.no_grad():
        value = function(policy)
    policy.base_model.enable_adapter_layers()
    return value


# %% alternative="try and finally" of="reference"
def by_reference(policy, function):
    policy.base_model.disable_adapter_layers()
    try:
        with torch.inference_mode():
            return function(policy)
    finally:
        policy.base_model.enable_adapter_layers()


# %% [markdown]
# The reference never changes, so its log-probabilities of a data set are computed once, before training. `trl` calls that `precompute_ref_log_probs`; it takes the reference's forward pass out of every step.


# %%
def attach(start_seed: int) -> PeftModel:
    """The reference with a fresh adapter on all its linear layers."""
    torch.manual_seed(start_seed)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(adapters.linear_layers(model))
    )
    return get_peft_model(model, config).eval()


def reply_logps(policy: PeftModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The log-probabilities of a batch's replies, (2n,): chosen, then rejected."""
    ids, mask = batch["input_ids"].to(device), batch["completion_mask"].to(device)
    first = int(mask.any(dim=0).int().argmax())  # no logits are needed before the first reply
    kept = ids.shape[1] - first + 1
    output = policy(
        input_ids=ids, attention_mask=batch["attention_mask"].to(device), logits_to_keep=kept, use_cache=False
    )
    return sequence_logps(output.logits.float(), ids[:, first - 1 :], mask[:, first - 1 :])


def with_reference(policy: PeftModel, pairs: Sequence[Preference]) -> list[dict[str, Any]]:
    """Pairs as token ids, with the reference's log-probabilities of both replies."""
    rows: list[dict[str, Any]] = replies.encode(tokenizer, pairs)
    for at in range(0, len(rows), 32):
        part = rows[at : at + 32]
        chosen, rejected = by_reference(policy, partial(reply_logps, batch=collate(part))).chunk(2)
        for row, of_chosen, of_rejected in zip(part, chosen.tolist(), rejected.tolist(), strict=True):
            row["ref_chosen_logps"], row["ref_rejected_logps"] = of_chosen, of_rejected
    return rows


def batches(rows: Sequence[dict[str, Any]], order_seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches without end; every pass is in a new order."""
    order = random.Random(order_seed)
    while True:
        shuffled = order.sample(list(rows), len(rows))
        for at in range(0, len(rows) - batch_size + 1, batch_size):
            yield collate(shuffled[at : at + batch_size])


def fit(
    policy: PeftModel, data: Iterator[dict[str, Tensor]], beta: float, *, until: int = steps,
    visit: Callable[[int], None] = lambda step: None, label: str = "DPO",
) -> list[float]:  # fmt: skip
    """Train the adapter with DPO; call `visit` after each step; return the losses."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = get_constant_schedule_with_warmup(optimizer, num_warmup_steps=5)
    losses = []
    for step in tqdm(range(1, until + 1), desc=label, leave=False):
        batch = next(data)
        reference = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]]).to(device)
        loss = dpo_loss(reply_logps(policy, batch), reference, beta).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        visit(step)
    return losses


train_questions = [asked(World(LESSON_SEEDS[seed + run]), pairs_a_run) for run in range(runs)]
clean = [replies.clean_pairs(part, seed=seed) for part in train_questions]
for one in clean[0][:4]:
    print(f"{one.flaw:11s} {one.chosen!r} is better than {one.rejected!r}")

# %% [markdown]
# ## Match: `trl`'s trainer on the same batches
#
# `DPOTrainer` takes the columns `prompt`, `chosen` and `rejected` as text or as chats, and does the rest: tokens, masks, the reference with the adapter off. Text it is here, since the prompts are plain text. Give it your start and your order, and compare the first steps. `bf16=False` because the default is bfloat16, which has another rounding; `activation_checkpointing=False` because recomputing activations only saves memory.

# %%
parity_steps = min(steps, 6)
parity_beta = betas[-1]
parity_pairs = clean[0][: parity_steps * batch_size]
policy = attach(seed)
start = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(policy).items()}
rows = with_reference(policy, parity_pairs)
in_order = (collate(rows[at : at + batch_size]) for at in range(0, len(rows), batch_size))
my_losses = fit(policy, in_order, parity_beta, until=parity_steps)
policy.unload()

columns = datasets.Dataset.from_list(
    [
        {
            "prompt": replies.layout(one.prompt),
            "chosen": one.chosen,
            "rejected": one.rejected,
        }
        for one in parity_pairs
    ]
)
with tempfile.TemporaryDirectory() as folder:
    settings = DPOConfig(
        folder, beta=parity_beta, learning_rate=learning_rate, max_steps=parity_steps,
        per_device_train_batch_size=batch_size, lr_scheduler_type="constant_with_warmup", warmup_steps=5,
        weight_decay=0.0, bf16=False, activation_checkpointing=False, train_sampling_strategy="sequential",
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=device == "cpu",
        dataloader_pin_memory=False, seed=seed,
    )  # fmt: skip
    trainer = DPOTrainer(
        copy.deepcopy(model),  # trl replaces the model's forward, so it gets a copy
        args=settings, train_dataset=columns, processing_class=tokenizer,
        peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(adapters.linear_layers(model))),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    set_peft_model_state_dict(trainer.model, start)
    trainer.train()
logged = [entry for entry in trainer.state.log_history if "loss" in entry]
parity = max(abs(mine - entry["loss"]) for mine, entry in zip(my_losses, logged, strict=True))
table = pd.DataFrame(
    [
        (i + 1, mine, entry["loss"], entry["rewards/margins"], entry["logps/chosen"])
        for i, (mine, entry) in enumerate(zip(my_losses, logged, strict=True))
    ],
    columns=["step", "your loss", "trl's loss", "trl's rewards/margins", "trl's logps/chosen"],
)
display(table.style.format(precision=5, subset=list(table.columns[1:])).hide(axis="index"))
card.record(
    "parity", parity, format=".0e", unit="nats", tolerance=1e-4, label="your loss and trl's, largest difference"
)

# %% [markdown]
# The first loss is $\log 2 = 0.6931$ for any β and any data, since the policy *is* the reference. If yours starts elsewhere, the reference is wrong. From there the two runs stay within {{parity}}: the rounding of sums in another order. The fourth column is $\beta m$, averaged over the batch. These are training batches, so it rises in any case.
#
# ## How far is the policy from the reference
#
# The margin says how far the policy has moved on *your pairs*. What the objective limits is the KL divergence on *its own replies*, $\mathrm{KL}(\pi \| \pi_{ref}) = \mathbb{E}_{y \sim \pi} \log \frac{\pi(y)}{\pi_{ref}(y)}$. It cannot be summed over all replies, so it is estimated from sampled ones. With $\rho = \log \frac{\pi(y)}{\pi_{ref}(y)}$ for a reply sampled from $\pi$:
#
# - **k1** is $\rho$ itself. Unbiased; single values may be negative.
# - **k3** is $e^{-\rho} - 1 + \rho$ (Schulman, 2020). Never negative, and also unbiased, as $\mathbb{E}_\pi[\pi_{ref} / \pi] = 1$.
# - **stepwise**: at every place of the sampled reply, the KL of the whole next-token distributions, $\sum_v \pi(v) \log \frac{\pi(v)}{\pi_{ref}(v)}$, summed over the reply's places. Unbiased; only the prefixes are sampled, not the next token as well (Amini et al., 2025).
#
# **Exercise.** `kl_estimates(policy_logits, reference_logits, input_ids, completion_mask)` returns a dictionary of three tensors `(n,)`, `"k1"`, `"k3"` and `"stepwise"`, in nats a *reply*. Logits are `(n, t, v)` and shifted as in the first exercise; the rows are replies sampled from the policy. k3 is computed from the whole reply's $\rho$, not token by token.
#
# With $v = 2$, one reply token, policy `[3/4, 1/4]`, reference `[1/4, 3/4]` (as probabilities) and token 0 sampled: k1 is $\log 3 = 1.0986$, k3 is $\frac13 - 1 + \log 3 = 0.4319$, stepwise $\frac12 \log 3 = 0.5493$. *About 8 lines.*
#
# <details><summary>Hint 1</summary>All three come from one tensor: the difference of the two log-softmaxes, (n, t − 1, v). Which part of it does k1 need?</details>
# <details><summary>Hint 2</summary>k1: gather at the sampled tokens, mask, sum. Stepwise: weight with the policy's probabilities and sum over the vocabulary, then mask, sum. <code>torch.expm1</code> is exp − 1 without loss of digits.</details>
# <details><summary>Hint 3</summary>p, q = the log-softmaxes of the logits without their last place. k1 = ((p − q) gathered · mask).sum(1); k3 = expm1(−k1) + k1; stepwise = ((exp(p) · (p − q)).sum(−1) · mask).sum(1).</details>


# %% exercise="kl-estimates" difficulty=3 minutes=11
def kl_estimates(
    policy_logits: Tensor, reference_logits: Tensor, input_ids: Tensor, completion_mask: Tensor
) -> dict[str, Tensor]:
    """Return three estimates of KL(policy || reference) for each sampled reply, each (n,), in nats."""
    ### BEGIN SOLUTION
    mask = completion_mask[:, 1:]
    ours, theirs = policy_logits[:, :-1].log_softmax(dim=-1), reference_logits[:, :-1].log_softmax(dim=-1)
    ratio = ours - theirs
    k1 = (ratio.gather(-1, input_ids[:, 1:, None])[..., 0] * mask).sum(dim=1)
    stepwise = ((ours.exp() * ratio).sum(dim=-1) * mask).sum(dim=1)
    return {"k1": k1, "k3": torch.expm1(-k1) + k1, "stepwise": stepwise}
    ### END SOLUTION


# %% check="kl-estimates" points=3
ours, theirs = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.25, 0.75]).log()
one_token = (torch.tensor([[0, 0]]), torch.tensor([[0, 1]]))
got = kl_estimates(ours.expand(1, 2, 2), theirs.expand(1, 2, 2), *one_token)
assert set(got) == {"k1", "k3", "stepwise"}, f"The keys are k1, k3 and stepwise; yours are {sorted(got)}"
for name, tensor in got.items():
    assert tensor.shape == (1,), f"{name}: one number a reply, (1,); yours is {tuple(tensor.shape)}"
assert got["k1"].item() > 0, (
    "Your k1 has the other direction: log policy minus log reference, at the token that the policy sampled"
)
changed = kl_estimates(torch.stack([ours, theirs])[None], theirs.expand(1, 2, 2), *one_token)
assert changed["k1"].abs().item() > 1e-3, (
    "The distributions differ at place 0 alone, and place 0 predicts the reply's token at place 1: shift the logits against ids and mask"
)
raised = kl_estimates((ours + 3).expand(1, 2, 2), theirs.expand(1, 2, 2), *one_token)
assert abs(raised["k1"].item() - 4.0986) > 1e-3, (
    "A constant added to all logits changes no probability, but it changed your k1 by 3: take log_softmax first"
)
assert abs(got["k1"].item() - 1.0986) < 1e-3, f"k1 is log(0.75 / 0.25) = 1.0986; yours is {got['k1'].item():.4f}"
assert abs(got["k3"].item() - 0.9014) > 1e-3, (
    "0.9014 is exp(k1) - 1 - k1: the ratio in k3 is the reference over the policy, exp(-k1), whose mean is 1"
)
assert abs(got["k3"].item() - 0.4319) < 1e-3, f"k3 is 1/3 - 1 + log 3 = 0.4319; yours is {got['k3'].item():.4f}"
lopsided = kl_estimates(
    torch.tensor([0.9, 0.1]).log().expand(1, 2, 2), torch.tensor([0.5, 0.5]).log().expand(1, 2, 2), *one_token
)["stepwise"].item()
assert abs(lopsided - 0.5108) > 1e-3, (
    "0.5108 is the divergence of the reference from the policy: weight with the policy's probabilities"
)
assert abs(lopsided + 0.5108) > 1e-3, "Weight the log-ratio with the policy's probabilities, not the reference's"
assert abs(lopsided - 0.3681) < 1e-3, (
    f"0.9 log(0.9/0.5) + 0.1 log(0.1/0.5) = 0.3681 nats at the only place; your stepwise estimate is {lopsided:.4f}"
)
longer = (torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0, 1, 1, 0]]))
got = kl_estimates(ours.expand(1, 4, 2), theirs.expand(1, 4, 2), *longer)
assert abs(got["stepwise"].item() - 0.5493) > 1e-3, "Nats a reply: add its tokens' divergences, do not average them"
assert abs(got["k3"].item() - 2 * 0.4319) > 1e-3, (
    "k3 of a reply is computed from the reply's log-ratio: apply the formula after the sum over the tokens"
)
for name, want in {"k1": 2.1972, "k3": 1.3083, "stepwise": 1.0986}.items():
    assert abs(got[name].item() - want) < 1e-3, (
        f"Two equal tokens, then padding: {name} is {want}; yours is {got[name].item():.4f}. Mask the padding, sum the rest"
    )
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(12)
for _n, _t, _v in [(1, 2, 2), (3, 6, 4), (4, 9, 7)]:
    _p, _q = torch.randn(2, _n, _t, _v, generator=_generator, dtype=torch.float64)
    _ids = torch.randint(0, _v, (_n, _t), generator=_generator)
    _mask = torch.randint(0, 2, (_n, _t), generator=_generator)
    _got = kl_estimates(_p, _q, _ids, _mask)
    _k1, _stepwise = torch.zeros(2, _n, dtype=torch.float64)
    for _row in range(_n):
        for _i in range(1, _t):
            _one, _other = torch.log_softmax(_p[_row, _i - 1], 0), torch.log_softmax(_q[_row, _i - 1], 0)
            _k1[_row] += _mask[_row, _i] * (_one - _other)[_ids[_row, _i]]
            _stepwise[_row] += _mask[_row, _i] * torch.nn.functional.kl_div(
                _other, _one, log_target=True, reduction="sum"
            )
    for _name, _want in {"k1": _k1, "k3": torch.exp(-_k1) - 1 + _k1, "stepwise": _stepwise}.items():
        assert torch.allclose(_got[_name], _want), (
            f"{_name} of {(_n, _t, _v)} random logits: {_want}, yours {_got[_name]}"
        )
_same = torch.randn(2, 5, 3, generator=_generator)
_got = kl_estimates(_same, _same + 1.0, torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64))
assert all(tensor.abs().max() < 1e-5 for tensor in _got.values()), "Equal distributions have divergence 0"
### END HIDDEN TESTS


# %% mistake="the other direction" of="kl-estimates" says="Your k1 has the other direction"
def kl_estimates(policy_logits, reference_logits, input_ids, completion_mask):
    mask = completion_mask[:, 1:]
    p, q = policy_logits[:, :-1].log_softmax(-1), reference_logits[:, :-1].log_softmax(-1)
    k1 = ((q - p).gather(-1, input_ids[:, 1:, None])[..., 0] * mask).sum(1)
    return {"k1": k1, "k3": torch.expm1(-k1) + k1, "stepwise": ((q.exp() * (q - p)).sum(-1) * mask).sum(1)}


# %% mistake="the ratio upside down in k3" of="kl-estimates" says="the ratio in k3 is the reference over the policy"
def kl_estimates(policy_logits, reference_logits, input_ids, completion_mask):
    mask = completion_mask[:, 1:]
    p, q = policy_logits[:, :-1].log_softmax(-1), reference_logits[:, :-1].log_softmax(-1)
    k1 = ((p - q).gather(-1, input_ids[:, 1:, None])[..., 0] * mask).sum(1)
    return {"k1": k1, "k3": torch.expm1(k1) - k1, "stepwise": ((p.exp() * (p - q)).sum(-1) * mask).sum(1)}


# %% mistake="weights with the reference" of="kl-estimates" says="not the reference's"
def kl_estimates(policy_logits, reference_logits, input_ids, completion_mask):
    mask = completion_mask[:, 1:]
    p, q = policy_logits[:, :-1].log_softmax(-1), reference_logits[:, :-1].log_softmax(-1)
    k1 = ((p - q).gather(-1, input_ids[:, 1:, None])[..., 0] * mask).sum(1)
    return {"k1": k1, "k3": torch.expm1(-k1) + k1, "stepwise": ((q.exp() * (p - q)).sum(-1) * mask).sum(1)}


# %% mistake="logits of the token's own place" of="kl-estimates" says="shift the logits against ids and mask"
def kl_estimates(policy_logits, reference_logits, input_ids, completion_mask):
    p, q = policy_logits.log_softmax(-1), reference_logits.log_softmax(-1)
    k1 = ((p - q).gather(-1, input_ids[..., None]).squeeze(-1) * completion_mask).sum(1)
    stepwise = ((p.exp() * (p - q)).sum(-1) * completion_mask).sum(1)
    return {"k1": k1, "k3": torch.expm1(-k1) + k1, "stepwise": stepwise}


# %% mistake="logits as log-probabilities" of="kl-estimates" says="take log_softmax first"
def kl_estimates(policy_logits, reference_logits, input_ids, completion_mask):
    p, q, mask = policy_logits[:, :-1], reference_logits[:, :-1], completion_mask[:, 1:]
    k1 = ((p - q).gather(-1, input_ids[:, 1:, None]).squeeze(-1) * mask).sum(1)
    stepwise = ((p.exp() * (p - q)).sum(-1) * mask).sum(1)
    return {"k1": k1, "k3": torch.expm1(-k1) + k1, "stepwise": stepwise}


# %% mistake="nats a token" of="kl-estimates" says="do not average them"
def kl_estimates(policy_logits, reference_logits, input_ids, completion_mask):
    mask = completion_mask[:, 1:]
    size = mask.sum(1).clamp(min=1)
    p, q = policy_logits[:, :-1].log_softmax(-1), reference_logits[:, :-1].log_softmax(-1)
    k1 = ((p - q).gather(-1, input_ids[:, 1:, None])[..., 0] * mask).sum(1) / size
    return {"k1": k1, "k3": torch.expm1(-k1) + k1, "stepwise": ((p.exp() * (p - q)).sum(-1) * mask).sum(1) / size}


# %% mistake="k3 token by token" of="kl-estimates" says="apply the formula after the sum"
def kl_estimates(policy_logits, reference_logits, input_ids, completion_mask):
    mask = completion_mask[:, 1:]
    p, q = policy_logits[:, :-1].log_softmax(-1), reference_logits[:, :-1].log_softmax(-1)
    rho = (p - q).gather(-1, input_ids[:, 1:, None])[..., 0] * mask
    return {
        "k1": rho.sum(1),
        "k3": (torch.expm1(-rho) + rho).sum(1),
        "stepwise": ((p.exp() * (p - q)).sum(-1) * mask).sum(1),
    }


# %% mistake="counts the padding" of="kl-estimates" says="Mask the padding"
def kl_estimates(policy_logits, reference_logits, input_ids, completion_mask):
    p, q = policy_logits[:, :-1].log_softmax(-1), reference_logits[:, :-1].log_softmax(-1)
    k1 = (p - q).gather(-1, input_ids[:, 1:, None])[..., 0].sum(1)
    return {"k1": k1, "k3": torch.expm1(-k1) + k1, "stepwise": (p.exp() * (p - q)).sum(-1).sum(1)}


# %% alternative="torch.distributions and masked fills" of="kl-estimates"
def kl_estimates(policy_logits, reference_logits, input_ids, completion_mask):
    p = torch.distributions.Categorical(logits=policy_logits[:, :-1])
    q = torch.distributions.Categorical(logits=reference_logits[:, :-1])
    ids, out = input_ids[:, 1:], completion_mask[:, 1:] == 0
    rho = (p.log_prob(ids) - q.log_prob(ids)).masked_fill(out, 0).sum(-1)
    stepwise = torch.distributions.kl_divergence(p, q).masked_fill(out, 0).sum(-1)
    return {"k1": rho, "k3": rho + torch.exp(-rho) - 1, "stepwise": stepwise}


# %% [markdown]
# ## What the curves can tell
#
# At every checkpoint you look at two sorts of things. From held-out *pairs*: the log-ratios of the chosen and of the rejected replies, and their difference, the margin. From *sampled* replies: their length, their KL and, because this world has exact grades, their win rate.
#
# **Exercise.** Write the alarms that a training run should raise. `alarms(curve)` returns a set of names. `curve` maps names to lists, one entry a checkpoint, the reference first: `"chosen"` and `"margin"` (log-ratios in nats; both 0 at first), `"length"` (mean tokens of a sampled reply), `"win"` (win rate) and `"error"` (its standard error).
#
# | name | raised when |
# |---|---|
# | `"displaced"` | at the last checkpoint the margin is above 0 and the chosen log-ratio below 0 |
# | `"longer"` | at the last checkpoint the length is more than 1.25 times the first |
# | `"over-optimised"` | the last win rate is lower than the best by more than twice the standard error of their difference, $\sqrt{e_{best}^2 + e_{last}^2}$, **and** the last margin is higher than the one at the best. Of equally good checkpoints, the first is the best |
#
# `alarms({"chosen": [0., 1., -2.], "margin": [0., 4., 9.], "length": [8., 8., 8.], "win": [0.5, 0.7, 0.6], "error": [0.02, 0.02, 0.02]})` is `{"displaced", "over-optimised"}`. *About 10 lines.*
#
# <details><summary>Hint 1</summary>Each alarm looks at the last checkpoint and one other. Which one?</details>
# <details><summary>Hint 2</summary><code>np.argmax</code> gives the first of equal maxima. The error of a difference is smaller than the sum of the errors.</details>
# <details><summary>Hint 3</summary>best = int(np.argmax(curve["win"])). Then three conditions on the entries at −1, 0 and best; add the name of each that holds to a set.</details>


# %% exercise="alarms" difficulty=2 minutes=9
def alarms(curve: Mapping[str, Sequence[float]]) -> set[str]:
    """Return the names of the alarms that a training curve raises."""
    ### BEGIN SOLUTION
    raised = set()
    if curve["margin"][-1] > 0 > curve["chosen"][-1]:
        raised.add("displaced")
    if curve["length"][-1] > 1.25 * curve["length"][0]:
        raised.add("longer")
    best = int(np.argmax(curve["win"]))
    loss = curve["win"][best] - curve["win"][-1]
    if loss > 2 * np.hypot(curve["error"][best], curve["error"][-1]) and curve["margin"][-1] > curve["margin"][best]:
        raised.add("over-optimised")
    return raised
    ### END SOLUTION


# %% check="alarms" points=1
calm = {"chosen": [0.0, 1.0], "margin": [0.0, 4.0], "length": [8.0, 8.0], "win": [0.5, 0.7], "error": [0.02, 0.02]}
assert isinstance(alarms(calm), set), f"Return a set of names; yours is a {type(alarms(calm)).__name__}"
assert alarms(calm) == set(), f"A calm curve raises nothing, set(); yours is {alarms(calm)}"
got = alarms({**calm, "chosen": [0.0, -1.0]})
assert got == {"displaced"}, f"The margin grew while the chosen replies became less likely: displaced; yours is {got}"
got = alarms({**calm, "chosen": [0.0, -1.0], "margin": [0.0, -4.0]})
assert "displaced" not in got, (
    "With a negative margin the run has not learned the pairs at all: that is not displacement"
)
recovered = {"chosen": [0.0, -1.0, 1.0], "margin": [0.0, 4.0, 5.0], "length": [8.0] * 3}
got = alarms({**recovered, "win": [0.5, 0.7, 0.7], "error": [0.02] * 3})
assert got == set(), (
    f"The chosen replies fell and came back: the last checkpoint alone counts, nothing is raised; yours is {got}"
)
got = alarms({**calm, "length": [8.0, 10.5]})
assert got == {"longer"}, f"10.5 tokens are more than 1.25 times 8: longer; yours is {got}"
got = alarms(
    {
        "chosen": [0.0, 1.0, 1.0],
        "margin": [0.0, 4.0, 5.0],
        "length": [8.0, 8.0, 9.9],
        "win": [0.5, 0.7, 0.7],
        "error": [0.02] * 3,
    }
)
assert got == set(), f"9.9 tokens are less than 1.25 times 8, so nothing is raised; yours is {got}"
got = alarms({**calm, "length": [8.0, 10.0]})
assert got == set(), f"10 tokens are 1.25 times 8 and not more, so nothing is raised; yours is {got}"
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(2)
for _case in range(40):
    _n = int(_rng.integers(1, 6))
    _curve = {
        "chosen": _rng.normal(0, 3, _n).tolist(),
        "margin": _rng.normal(2, 3, _n).tolist(),
        "length": _rng.uniform(5, 15, _n).tolist(),
        "win": [0.5] * _n,
        "error": [0.02] * _n,
    }
    _want = ({"displaced"} if _curve["margin"][-1] > 0 and _curve["chosen"][-1] < 0 else set()) | (
        {"longer"} if _curve["length"][-1] / _curve["length"][0] > 1.25 else set()
    )
    assert alarms(_curve) == _want, f"{_curve} raises {_want or 'nothing'}, you {alarms(_curve)}"
### END HIDDEN TESTS

# %% check="alarms" points=2
falling = {
    "chosen": [0.0, 1.0, 1.0],
    "margin": [0.0, 4.0, 9.0],
    "length": [8.0, 8.0, 8.0],
    "win": [0.5, 0.7, 0.6],
    "error": [0.02, 0.02, 0.02],
}
got = alarms(falling)
assert got == {"over-optimised"}, (
    f"The win rate fell from 70 % at the best checkpoint to 60 % while the margin grew: over-optimised; yours is {got}. "
    "Compare the last checkpoint with the best one, not with the first"
)
got = alarms({**falling, "error": [0.02, 0.04, 0.04]})
assert "over-optimised" not in got, (
    "10 points are less than twice the error of the difference, 2 sqrt(0.04^2 + 0.04^2) = 11 points: that may be noise"
)
got = alarms({**falling, "error": [0.02, 0.03, 0.03]})
assert "over-optimised" in got, (
    "Errors of 3 points add up as squares: 2 sqrt(0.03^2 + 0.03^2) = 8.5 points, less than the 10 that were lost"
)
got = alarms({**falling, "margin": [0.0, 4.0, 3.0]})
assert "over-optimised" not in got, (
    "The margin fell as well, so the curve that you optimise warned you: over-optimised means that it did not"
)
twice = {"chosen": [0.0, 1.0, 1.0, 1.0], "margin": [0.0, 4.0, 9.0, 6.0], "length": [8.0] * 4}
got = alarms({**twice, "win": [0.5, 0.7, 0.7, 0.6], "error": [0.02] * 4})
assert got == {"over-optimised"}, (
    f"Two checkpoints have 70 %: the first of them is the best, and from its margin of 4 to the last 6 it grew; yours is {got}"
)
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(3)
for _case in range(60):
    _n = int(_rng.integers(1, 7))
    _win, _error = _rng.integers(8, 17, _n) / 20, _rng.uniform(0.005, 0.06, _n)
    _margin = _rng.normal(3, 2, _n)
    _best = sorted(range(_n), key=lambda i: (-_win[i], i))[0]
    _noise = (_error[_best] ** 2 + _error[-1] ** 2) ** 0.5
    _want = bool(_win[_best] - _win[-1] > 2 * _noise and _margin[-1] > _margin[_best])
    _curve = {
        "chosen": [1.0] * _n,
        "margin": _margin.tolist(),
        "length": [8.0] * _n,
        "win": _win.tolist(),
        "error": _error.tolist(),
    }
    _got = "over-optimised" in alarms(_curve)
    assert _got == _want, f"{_curve}: {'over-optimised' if _want else 'not over-optimised'}"
### END HIDDEN TESTS


# %% mistake="compares with the first checkpoint" of="alarms" says="not with the first"
def alarms(curve):
    raised = set()
    if curve["margin"][-1] > 0 and curve["chosen"][-1] < 0:
        raised.add("displaced")
    if curve["length"][-1] > 1.25 * curve["length"][0]:
        raised.add("longer")
    if curve["win"][0] - curve["win"][-1] > 2 * np.hypot(curve["error"][0], curve["error"][-1]):
        raised.add("over-optimised")
    return raised


# %% mistake="ignores the noise" of="alarms" says="that may be noise"
def alarms(curve):
    raised = set()
    if curve["margin"][-1] > 0 and curve["chosen"][-1] < 0:
        raised.add("displaced")
    if curve["length"][-1] > 1.25 * curve["length"][0]:
        raised.add("longer")
    best = int(np.argmax(curve["win"]))
    if curve["win"][-1] < curve["win"][best] and curve["margin"][-1] > curve["margin"][best]:
        raised.add("over-optimised")
    return raised


# %% mistake="adds the errors up" of="alarms" says="add up as squares"
def alarms(curve):
    raised = set()
    if curve["margin"][-1] > 0 and curve["chosen"][-1] < 0:
        raised.add("displaced")
    if curve["length"][-1] > 1.25 * curve["length"][0]:
        raised.add("longer")
    best = int(np.argmax(curve["win"]))
    lost = curve["win"][best] - curve["win"][-1]
    if lost > 2 * (curve["error"][best] + curve["error"][-1]) and curve["margin"][-1] > curve["margin"][best]:
        raised.add("over-optimised")
    return raised


# %% mistake="does not look at the margin" of="alarms" says="The margin fell as well"
def alarms(curve):
    raised = set()
    if curve["margin"][-1] > 0 and curve["chosen"][-1] < 0:
        raised.add("displaced")
    if curve["length"][-1] > 1.25 * curve["length"][0]:
        raised.add("longer")
    best = int(np.argmax(curve["win"]))
    if curve["win"][best] - curve["win"][-1] > 2 * np.hypot(curve["error"][best], curve["error"][-1]):
        raised.add("over-optimised")
    return raised


# %% mistake="any fall of the chosen" of="alarms" says="that is not displacement"
def alarms(curve):
    raised = set()
    if curve["chosen"][-1] < 0:
        raised.add("displaced")
    if curve["length"][-1] > 1.25 * curve["length"][0]:
        raised.add("longer")
    best = int(np.argmax(curve["win"]))
    lost = curve["win"][best] - curve["win"][-1]
    if lost > 2 * np.hypot(curve["error"][best], curve["error"][-1]) and curve["margin"][-1] > curve["margin"][best]:
        raised.add("over-optimised")
    return raised


# %% alternative="a set comprehension over conditions" of="alarms"
def alarms(curve):
    chosen, margin, length, win, error = (
        np.array(curve[key]) for key in ("chosen", "margin", "length", "win", "error")
    )
    best = np.flatnonzero(win == win.max())[0]
    z = (win[best] - win[-1]) ** 2 > 4 * (error[best] ** 2 + error[-1] ** 2)
    conditions = {
        "displaced": margin[-1] > 0 and chosen[-1] < 0,
        "longer": length[-1] / length[0] > 1.25,
        "over-optimised": z and margin[-1] > margin[best],
    }
    return {name for name, holds in conditions.items() if holds}


# %% [markdown]
# ## The experiment: win rate against KL
#
# Two values of β, three runs each, on clean pairs. Each run has a company of its own for its pairs, and another for the questions on which it is measured. For all β, a run has the same pairs in the same order and the same start.
#
# How good can a policy be at a given KL? Here you can say exactly. Let $q_g$ be the share of grade $g$ among the reference's replies and $p_g$ among the policy's. The win rate depends on $p$ alone, and $\mathrm{KL}(\pi \| \pi_{ref}) \geq \sum_g p_g \log \frac{p_g}{q_g}$, because grading is a function of the reply (data processing inequality; averaging over questions keeps it, as KL is convex). The best $p$ for its KL tilts $q$ towards grades that win, $p_g \propto q_g\, e^{\lambda w_g}$ with $w_g$ the win rate of grade $g$. This is the frontier: but for the noise of the sample, no policy is above it. To put all the mass on what the reference does with probability $q_3$ costs only $\log \frac{1}{q_3}$ nats.


# %%
class Point(NamedTuple):
    """What is measured at a checkpoint of a run."""

    step: int
    grades: list[int]  # of one sampled reply to each test question
    kl: dict[str, np.ndarray]  # the three estimates, each (questions,), in nats
    length: float  # mean tokens of a sampled reply
    idle: float  # the share of sampled replies with an idle sentence
    chosen: np.ndarray  # log-ratios on held-out pairs, each (pairs,), in nats
    rejected: np.ndarray


def frontier(reference: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """KL in nats and win rate of the best policies, for growing tilts; both (200,)."""
    present = sorted(set(reference))
    q = np.array([np.mean(np.equal(reference, grade)) for grade in present])
    win = np.array([win_rate([grade], reference) for grade in present])
    tilted = q * np.exp(np.linspace(0, 60, 200)[:, None] * win)
    p = tilted / tilted.sum(axis=1, keepdims=True)
    return np.sum(p * np.log(p / q), axis=1), p @ win


def habits(sampled: Sequence[Sequence[int]]) -> tuple[float, float]:
    """The mean number of tokens of sampled replies, and the share of them with an idle sentence."""
    texts = tokenizer.batch_decode(sampled, skip_special_tokens=True)
    return float(np.mean([len(reply) for reply in sampled])), float(np.mean([replies.is_idle(text) for text in texts]))


@torch.no_grad()
def observe(policy: PeftModel, run: int, step: int, held_out: Sequence[dict[str, Any]]) -> Point:
    """Sample a reply to each test question, grade it and estimate its KL; measure the margin on held-out pairs."""
    sampled = replies.sample(policy, tokenizer, test_prompts[run], seed=10_000 * (seed + run) + step)
    rows = [
        {"prompt_ids": prompt, "chosen_ids": reply, "rejected_ids": reply[:1]}
        for prompt, reply in zip(test_prompts[run], sampled, strict=True)
    ]
    batch = {key: tensor[: len(rows)].to(device) for key, tensor in collate(rows).items()}  # the sampled half
    first = int(batch["completion_mask"].any(dim=0).int().argmax()) - 1

    def logits(model: PeftModel) -> Tensor:
        output = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False,
            logits_to_keep=batch["input_ids"].shape[1] - first,
        )  # fmt: skip
        return output.logits.float()

    ids, mask = batch["input_ids"][:, first:], batch["completion_mask"][:, first:]
    kl = kl_estimates(logits(policy), by_reference(policy, logits), ids, mask)
    ratios = []
    for at in range(0, len(held_out), 32):
        pairs = collate(held_out[at : at + 32])
        reference = torch.stack([pairs["ref_chosen_logps"], pairs["ref_rejected_logps"]])
        ratios.append(reply_logps(policy, pairs).cpu().view(2, -1) - reference)
    estimates = {name: value.cpu().numpy() for name, value in kl.items()}
    return Point(step, graded(sampled, tests[run]), estimates, *habits(sampled), *torch.cat(ratios, dim=1).numpy())


def train(
    run: int, rows: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]], beta: float, *, visits: int,
    label: str = "DPO",
) -> list[Point]:  # fmt: skip
    """One run of DPO, measured before the first step and at `visits` checkpoints; the last is after the last step."""
    policy = attach(seed + run)
    at = {max(1, round(steps * (visit + 1) / visits)) for visit in range(visits)}
    zeros = np.zeros(len(held_out))
    points = [Point(0, graded(drawn[run], tests[run]), {}, *habits(drawn[run]), zeros, zeros)]

    def visit(step: int) -> None:
        if step in at:
            points.append(observe(policy, run, step, held_out))

    fit(policy, batches(rows, seed + run), beta, visit=visit, label=label)
    policy.unload()
    return points


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over runs and Student's 95 % interval of it; of a single run, the value itself."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean, mean
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return mean, mean - half, mean + half


def wins(point: Point) -> float:
    return win_rate(point.grades, reference_grades)


def nats(point: Point) -> float:
    """The stepwise estimate of the KL, averaged over the questions; 0 for the reference."""
    return float(point.kl["stepwise"].mean()) if point.kl else 0.0


def all_with_reference(parts: Sequence[Sequence[Preference]]) -> list[list[dict[str, Any]]]:
    """The pairs of each run, with the reference's log-probabilities, computed once for all that train on them."""
    policy = attach(seed)
    rows = [with_reference(policy, part) for part in parts]
    policy.unload()
    return rows


train_rows = all_with_reference(clean)
held_out = all_with_reference([replies.clean_pairs(part[:32], seed=seed + 1) for part in tests])
found = {
    beta: [train(run, train_rows[run], held_out[run], beta, visits=4, label=f"beta {beta:g}") for run in range(runs)]
    for beta in betas
}

# %%
shades = dict(zip(betas, (COLOURS.other, COLOURS.after, COLOURS.library), strict=False))
fig, ax = plt.subplots(figsize=(7.5, 4.2))
best_kl, best_win = frontier(reference_grades)
furthest = max(max(nats(point) for point in curve) for curves in found.values() for curve in curves)
ax.plot([*best_kl, max(furthest, best_kl[-1])], [*best_win, best_win[-1]], color=COLOURS.truth, lw=1.5)
direct_label(ax, best_kl[-1], best_win[-1], "the frontier", COLOURS.truth, offset=(10, -14))
for (beta, curves), below in zip(found.items(), (-4, 8, -14), strict=False):
    for curve in curves:
        ax.plot(
            [nats(point) for point in curve], [wins(point) for point in curve], color=shades[beta], lw=0.8, alpha=0.5
        )
    middle = [(np.mean([nats(p) for p in at]), np.mean([wins(p) for p in at])) for at in zip(*curves, strict=True)]
    ax.plot(*zip(*middle, strict=True), "o-", color=shades[beta], ms=5)
    direct_label(ax, *middle[-1], f"β = {beta:g}", shades[beta], offset=(6, below))
ax.axhline(0.5, color=COLOURS.before, lw=1, ls="--")
ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
ax.set_xlim(left=0)
ticks = [tick for tick in (0, 0.3, 1, 3, 10, 30, 100, 300) if tick <= max(1.2 * furthest, 1)]
ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
ax.set(
    xlabel="KL from the reference (nats a reply, square-root scale)", ylabel="win rate against the reference",
    title="What a nat of KL buys",
)  # fmt: skip
plt.show()
card.record("replies_a_point", runs * test_questions, format="d", label="sampled replies behind each point")

# %% [markdown]
# Thin lines are runs, thick ones their means; points are checkpoints, from the reference on the left to the last step. The scale of KL is a square root because near the reference it grows with the square of the distance (Gao et al., 2022, draw their curves so).
#
# Read it from left to right. Every policy lies below the frontier, up to the noise of {{replies_a_point}} sampled replies a point: a part of its KL goes into changes that no grade rewards, such as which idle sentence it uses, or how it spells a number. In the first steps β makes no difference: at a margin of 0 it only scales the gradient, and AdamW divides the scale out again. Later it decides when a pair counts as settled. Compare how far the two go, and whether the curve still rises where it ends: KL that buys no win rate is what the next figures look into.
#
# ## Which estimate of the KL
#
# Three estimators, all unbiased, of the same replies, at every checkpoint (± one standard error):

# %%
rows = []
for beta, curves in found.items():
    for points in list(zip(*curves, strict=True))[1:]:
        cells = []
        for name in ("k1", "k3", "stepwise"):
            values = np.concatenate([point.kl[name] for point in points])
            cells.append(f"{values.mean():.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f}")
        rows.append((f"{beta:g}", points[0].step, *cells))
display(
    pd.DataFrame(rows, columns=["beta", "step", "k1 (nats)", "k3 (nats)", "stepwise (nats)"]).style.hide(axis="index")
)
for name in ("k1", "k3", "stepwise"):
    values = np.concatenate([curve[-2].kl[name] for curve in found[betas[-1]]])
    label = f"KL by {name}, beta {betas[-1]:g}, last checkpoint but one"
    card.record(f"kl_{name}", values.mean(), format=".2f", unit="nats", tolerance=1.5, label=label)

# %% [markdown]
# k1 and the stepwise estimate are both unbiased, so where they differ it is noise of the sampled replies. The stepwise one needs both models' whole distributions and usually has the smaller error. Now read k3, for instance at the last checkpoint but one of the larger β: {{kl_k3}}, where k1 has {{kl_k1}} and stepwise {{kl_stepwise}}.
#
# k3 is unbiased only thanks to replies that the policy hardly ever gives. Its term $\pi_{ref} / \pi$ averages to 1, but a part of that 1 sits on the flawed replies that training has made rare. As long as you do not sample them, k3 is too low by about the probability that the reference gives to what has disappeared, at most one nat, and its small standard error does not warn you. Once in a while you do sample one, and k3 is too high, by more. A nat matters at a budget of two nats and not at fifty. Token by token, as GRPO uses it, k3 suffers less, since a single token moves less than a reply.
#
# ## What more training does
#
# The same runs by steps, at the smaller β: what the pairs see on the left, what users see on the right.


# %%
def curve_of(curves: Sequence[Sequence[Point]]) -> dict[str, list[float]]:
    """The curve of a setting, averaged over its runs: what `alarms` reads."""
    at = list(zip(*curves, strict=True))
    each = [[wins(point) for point in points] for points in at]
    return {
        "chosen": [float(np.mean([p.chosen.mean() for p in points])) for points in at],
        "margin": [float(np.mean([(p.chosen - p.rejected).mean() for p in points])) for points in at],
        "length": [float(np.mean([p.length for p in points])) for points in at],
        "win": [float(np.mean(values)) for values in each],
        "error": [float(np.std(values) / max(1, len(values) - 1) ** 0.5) for values in each],
    }


def shares(curves: Sequence[Sequence[Point]]) -> np.ndarray:
    """The share of each grade at each checkpoint, over all runs: (checkpoints, 4)."""
    at = [np.concatenate([point.grades for point in points]) for points in zip(*curves, strict=True)]
    return np.array([[np.mean(grades == grade) for grade in range(len(replies.GRADES))] for grades in at])


small = found[betas[0]]
visited = [point.step for point in small[0]]
fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8))
for name, colour in (("chosen", COLOURS.after), ("rejected", COLOURS.wrong)):
    for curve in small:
        left.plot(visited, [getattr(point, name).mean() for point in curve], color=colour, lw=0.8, alpha=0.5)
    middle = [np.mean([getattr(point, name).mean() for point in at]) for at in zip(*small, strict=True)]
    left.plot(visited, middle, color=colour, label=name)
left.axhline(0, color=COLOURS.before, lw=1, ls="--")
left.set(xlabel="step", ylabel="log-ratio, held-out pairs (nats)", title=f"β = {betas[0]:g}: both may fall")
label_lines(left)
palette = (COLOURS.library, COLOURS.wrong, COLOURS.before, COLOURS.after)
for grade, name in enumerate(replies.GRADES):
    right.plot(visited, shares(small)[:, grade], "o-", ms=4, color=palette[grade], label=name)
right.set(xlabel="step", ylabel="share of sampled replies", ylim=(-0.03, 1.03), title="What it says")
label_lines(right)
plt.show()

rows = []
for beta, curves in found.items():
    curve = curve_of(curves)
    best = curve["win"].index(max(curve["win"]))
    raised = ", ".join(sorted(alarms(curve))) or "none"
    rows.append(
        (
            f"{beta:g}",
            visited[best],
            curve["win"][best],
            curve["win"][-1],
            curve["chosen"][-1],
            curve["margin"][-1],
            curve["length"][-1],
            raised,
        )
    )
columns = [
    "beta",
    "best at step",
    "best win rate",
    "last win rate",
    "last chosen log-ratio",
    "last margin",
    "last length (tokens)",
    "your alarms",
]
formats = {
    "best win rate": "{:.1%}",
    "last win rate": "{:.1%}",
    "last chosen log-ratio": "{:+.1f}",
    "last margin": "{:+.1f}",
    "last length (tokens)": "{:.1f}",
}
display(pd.DataFrame(rows, columns=columns).style.format(formats).hide(axis="index"))

small_curve = curve_of(small)
for when, place in (("reference", 0), ("last", -1)):
    what = "of the reference" if when == "reference" else f"at beta {betas[0]:g}, last checkpoint"
    lengths = [curve[place].length for curve in small]
    wrong = float(shares(small)[place, replies.GRADES.index("wrong")])
    card.record(f"wrong_{when}", wrong, format=".0%", tolerance=0.1, label=f"wrong but not rude, {what}")
    for extreme, length in (("shortest", min(lengths)), ("longest", max(lengths))):
        card.record(
            f"length_{when}_{extreme}", length, format=".0f", tolerance=8,
            label=f"mean length of a reply {what}: the run with the {extreme}", unit="tokens",
        )  # fmt: skip
best = small_curve["win"].index(max(small_curve["win"]))
for when, place, tolerance in (("best", best, 10), ("last", len(visited) - 1, 60)):
    what = f"at beta {betas[0]:g}, {when} checkpoint"
    card.record(f"small_win_{when}", small_curve["win"][place], format=".1%", tolerance=0.08, label=f"win rate {what}")
    card.record(
        f"small_margin_{when}", small_curve["margin"][place], format=".0f", tolerance=tolerance, unit="nats",
        label=f"margin {what}",
    )  # fmt: skip

# %% [markdown]
# At β = 0.05 the win rate is {{small_win_best}} at its best checkpoint and {{small_win_last}} at the last, while the held-out margin goes from {{small_margin_best}} to {{small_margin_last}}. The margin is what training reports, and the loss gains from a larger one for as long as you train: the pairs can be told apart, and at this β a pair is not settled before $2.9 / 0.05 = 58$ nats. The margin can only come from log-ratios, that is from distance to the reference. On the left you see how much of it comes from the rejected replies, which are pushed towards probability zero; the mass that they lose goes wherever the weights let it, and no pair says where. On the right you see where it went: {{wrong_last}} of the sampled replies are wrong and not rude, {{wrong_reference}} of the reference's. Such a reply wins against an insult, loses against a good answer, and stands in no pair. *How* it is wrong is left to chance, and so differs from run to run: the mean length of a reply is {{length_last_shortest}} in one run and {{length_last_longest}} in another (the reference's: {{length_reference_shortest}} to {{length_reference_longest}}), the end of sequence counted. A model may fall silent or ramble, and the curves of training look alike.
#
# When the chosen log-ratio is negative, even the *better* replies have become less likely (displacement; Pal et al., 2024; Razin et al., 2024). It is an early sign that mass goes to replies that are in no pair. It is no proof of harm, and the win rate can fall without it. So the alarms look at both. Twice a standard error is a weak test with three runs (Student's factor for two degrees of freedom is 4.3), so an alarm is a reason to look at the replies, not a verdict.

# %% [markdown]
# ## Length, learned by accident
#
# Reviewers like effort. Suppose that in your data the better reply is usually also the longer one: every pair sets a right, polite reply against a wrong or a rude one, all labels are correct, and an idle sentence stands in the *better* reply in 90 % of the pairs, else in the worse one. No pair compares a reply with and without it. Nobody ever said that idle sentences are good; they only go along with what is.
#
# Two ways to train on the same questions:
#
# - **as they come**: 90 % longer;
# - **balanced**: the idle sentence in the better reply in half of the pairs.
#
# The margin is measured on balanced pairs that were held out, on those with the longer reply chosen and on those with the shorter one apart. A policy that has learned what makes a reply better has a positive margin on both.

# %%
gentle_beta = betas[-1]
lopsided = [replies.confounded_pairs(part, longer=0.9, seed=seed) for part in train_questions]
balanced = [replies.confounded_pairs(part, longer=0.5, seed=seed) for part in train_questions]
checked = [replies.confounded_pairs(part[:32], longer=0.5, seed=seed + 1) for part in tests]
lopsided_rows, balanced_rows = all_with_reference(lopsided), all_with_reference(balanced)
checked_rows = all_with_reference(checked)
ways = {"as they come": lopsided_rows, "balanced": balanced_rows}
by_way = {
    name: [train(run, data[run], checked_rows[run], gentle_beta, visits=1, label=name) for run in range(runs)]
    for name, data in ways.items()
}
print(lopsided[0][0].chosen, "\n   is better than\n", lopsided[0][0].rejected)

# %%
is_longer = [np.array([len(one.chosen) > len(one.rejected) for one in part]) for part in checked]
last = {"the reference": [curve[0] for curve in by_way["balanced"]]}
last |= {name: [curve[-1] for curve in curves] for name, curves in by_way.items()}
margins = {
    name: np.array(
        [
            [(point.chosen - point.rejected)[kind].mean() for kind in (mask, ~mask)]
            for point, mask in zip(points, is_longer, strict=True)
        ]
    )
    for name, points in last.items()
}  # of each run, for pairs whose longer reply is chosen and for those whose shorter one is
colours = {"the reference": COLOURS.before, "as they come": COLOURS.wrong, "balanced": COLOURS.after}
fig, axes = plt.subplots(1, 3, figsize=(12.5, 3.2), sharey=True)
for place, (name, points) in enumerate(last.items()):
    for ax, values in ((axes[0], [point.idle for point in points]), (axes[2], [wins(point) for point in points])):
        ax.plot(values, [place] * len(values), "o", ms=5, alpha=0.4, color=colours[name])
        ax.plot([np.mean(values)], [place], "|", ms=22, mew=2.5, color=colours[name])
    for column, (marker, above) in enumerate(((">", -0.12), ("<", 0.12))):
        values = margins[name][:, column]
        axes[1].plot(values, [place + above] * len(values), marker, ms=5, alpha=0.4, color=colours[name])
        axes[1].plot([values.mean()], [place + above], "|", ms=14, mew=2.5, color=colours[name])
axes[0].set_yticks(range(len(last)), list(last))
axes[0].set_ylim(len(last) - 0.5, -0.5)
axes[0].set(xlabel="share of replies with an idle sentence", title="What nobody asked for", xlim=(-0.03, 1.03))
axes[1].set(xlabel="margin (nats); > longer, < shorter reply chosen", title="Where the margin comes from")
axes[1].axvline(0, color=COLOURS.truth, lw=1, ls="--")
axes[2].set(xlabel="win rate against the reference", title="What it is worth", xlim=(0, 1))
axes[2].axvline(0.5, color=COLOURS.truth, lw=1, ls="--")
plt.show()

rows = [
    (
        name,
        *margins[name].mean(axis=0),
        np.mean([point.idle for point in last[name]]),
        np.mean([wins(point) for point in last[name]]),
        ", ".join(sorted(alarms(curve_of(curves)))) or "none",
    )
    for name, curves in by_way.items()
]
columns = ["pairs", "margin, longer chosen", "margin, shorter chosen", "idle sentence", "win rate", "your alarms"]
formats = {columns[1]: "{:+.1f}", columns[2]: "{:+.1f}", columns[3]: "{:.0%}", columns[4]: "{:.1%}"}
display(pd.DataFrame(rows, columns=columns).style.format(formats).hide(axis="index"))

for key, place, what in (("margin_longer", 1, "longer"), ("margin_shorter", 2, "shorter")):
    label = f"margin of the pairs as they come, {what} reply chosen"
    card.record(key, rows[0][place], format="+.1f", tolerance=8, unit="nats", label=label)
idle_reference = [curve[0].idle for curve in by_way["balanced"]]
mean, low, high = mean_interval(idle_reference)
card.record("idle_reference", mean, format=".0%", tolerance=0.1, label="the reference's replies with an idle sentence")
for key, name in (("idle_confounded", "as they come"), ("idle_balanced", "balanced")):
    mean, low, high = mean_interval([curve[-1].idle for curve in by_way[name]])
    card.record(
        key,
        mean,
        format=".0%",
        low=max(low, 0),
        high=min(high, 1),
        tolerance=0.1,
        label=f"with an idle sentence, pairs {name}",
    )

# %% [markdown]
# From {{idle_reference}} of the reference's replies, the share with an idle sentence goes to {{idle_confounded}} with the pairs as they come and to {{idle_balanced}} with balanced pairs.
#
# Nothing that a trainer logs would worry you about the first row: all labels are right, the loss falls, and on pairs like those of the training set, where 90 % have the longer reply chosen, the margin is positive. Held-out pairs in which length and quality disagree give it away: as the pairs come, the margin is {{margin_longer}} where the longer reply is the better one and {{margin_shorter}} where the shorter one is. Whether an idle sentence stands in a reply is easier to see than whether the answer is in the passage, and the loss takes what is easiest.
#
# With balanced pairs the two margins need not be equal either. A log-ratio is a sum over tokens, so a long rejected reply has more to lose than a short one.
#
# What helps is the data. In balanced pairs length predicts nothing, so preferring it gains nothing. What the figure does not show: real raters do like some long answers for good reasons, and then balancing throws a true preference away. Park et al. (2024) penalise the length difference inside the loss instead, and choose the size of the penalty on held-out judgements. `trl` can also divide each log-ratio by the reply's number of tokens (`loss_type="sigmoid_norm"`). That changes how much a sentence of fifteen tokens can earn compared with an answer of four, and needs another β; it cannot know which of the two your raters meant.
#
# ## Decide: how far do you go?
#
# The product allows {{kl_budget}} nats of KL a reply, in every run: whoever approved the reference will not approve a model that has drifted further. You have a table of checkpoints and must ship one.
#
# The questions of each run are cut in two. You choose on the first half (**validation**) and are judged on the second (**test**): the best of eight noisy numbers looks better than it is.
#
# **Exercise.**
#
# 1. `choose(table, budget)` returns the key of the checkpoint to ship. `table` maps `(beta, step)` to a list of `(kl, win)`, one a run. Admissible is a checkpoint whose KL is at most `budget` in *every* run. Of those, the one with the highest mean win rate; of equal ones, the one with the fewest steps. When none is admissible, return `None`: you ship the reference.
# 2. `my_beta`: if you could train at one β only, one of `betas`, with this budget. And `predicted_win`, the win rate on the test half that you expect from it, as a share. Graded for being answered; measured below.
#
# `choose({(0.1, 10): [(0.5, 0.6), (3.0, 0.9)], (1.0, 10): [(0.4, 0.6), (0.6, 0.7)]}, 2.0)` is `(1.0, 10)`. *About 6 lines.*
#
# <details><summary>Hint 1</summary>Filter first, then compare. What is compared, and over what is it averaged?</details>
# <details><summary>Hint 2</summary><code>max</code> with a key that returns a tuple compares the second entry where the first are equal; fewer steps must count as more.</details>
# <details><summary>Hint 3</summary>kept = the keys whose largest kl is at most the budget. If there are none, None. Else max(kept, key=lambda key: (mean of the wins, −step)).</details>

# %% exercise="decide" difficulty=2 minutes=11
my_beta = None
predicted_win = None
### BEGIN SOLUTION
my_beta, predicted_win = 0.3, 0.7
### END SOLUTION


def choose(table: Mapping[tuple[float, int], Sequence[tuple[float, float]]], budget: float) -> tuple[float, int] | None:
    """Return the (beta, step) to ship: the best mean win rate whose KL is within the budget in every run."""
    ### BEGIN SOLUTION
    kept = [key for key, measured in table.items() if all(kl <= budget for kl, _ in measured)]
    if not kept:
        return None
    return max(kept, key=lambda key: (np.mean([win for _, win in table[key]]), -key[1]))
    ### END SOLUTION


# %% check="decide" points=1
assert my_beta in betas, f"my_beta is one of {betas}; yours is {my_beta!r}"
assert isinstance(predicted_win, (int, float, np.number)), f"Predict with a number, now {predicted_win!r}"
assert 0 <= predicted_win <= 1, f"predicted_win is a share between 0 and 1 (0.6 for 60 %), not {predicted_win}"

# %% check="decide" points=2
checkpoints = {
    (0.1, 10): [(0.5, 0.60), (0.7, 0.64)],
    (0.1, 20): [(1.5, 0.90), (2.5, 0.92)],
    (1.0, 20): [(0.9, 0.65), (1.1, 0.63)],
}
kept_copy = repr(checkpoints)
got = choose(checkpoints, 2.0)
assert got != (0.1, 20), "One run of (0.1, 20) is at 2.5 nats: a mean of 2.0 is not within the budget in every run"
assert got == (1.0, 20), f"Within 2 nats the best mean is 64 % at (1.0, 20); you choose {got}"
got = choose(checkpoints, 9.0)
assert got == (0.1, 20), f"With 9 nats everything is admissible and (0.1, 20) is best; you choose {got}"
got = choose(checkpoints, 0.1)
assert got is None, f"Within 0.1 nats nothing is admissible: ship the reference, None; you choose {got}"
got = choose(checkpoints, 2.5)
assert got == (0.1, 20), f"A KL of exactly the budget is within it ('at most'): (0.1, 20) at 2.5; you choose {got}"
lucky = {(0.1, 10): [(0.5, 0.95), (0.5, 0.45)], (1.0, 30): [(0.5, 0.75), (0.5, 0.75)]}
assert choose(lucky, 1.0) == (1.0, 30), "One lucky run is not a better checkpoint: compare the means of the runs"
equal = {(0.1, 30): [(0.5, 0.75)], (1.0, 10): [(0.9, 0.75)], (0.5, 20): [(0.1, 0.75)]}
assert choose(equal, 1.0) == (1.0, 10), (
    f"Of equal win rates take the fewest steps, (1.0, 10); you choose {choose(equal, 1.0)}"
)
assert repr(checkpoints) == kept_copy, "Do not change the table that you read"
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(5)
for _case in range(40):
    _table = {
        (float(_rng.choice([0.05, 0.3, 2.0])), int(_step)): [
            (float(_rng.random() * 3), float(_rng.integers(8, 17) / 20)) for _ in range(int(_rng.integers(1, 4)))
        ]
        for _step in _rng.permutation(60)[: int(_rng.integers(1, 8))]
    }
    _budget = float(_rng.choice([0.0, 1.0, 2.0, 3.0]))
    _kept = {key: part for key, part in _table.items() if max(kl for kl, _ in part) <= _budget}
    _order = sorted(_kept, key=lambda key: (-round(float(np.mean([win for _, win in _kept[key]])), 12), key[1]))
    _got = choose(_table, _budget)
    if not _kept:
        assert _got is None, f"Nothing is within {_budget} nats: None, not {_got}"
    else:
        _best = float(np.mean([win for _, win in _kept[_order[0]]]))
        _equal = [key for key in _kept if abs(np.mean([win for _, win in _kept[key]]) - _best) < 1e-9]
        assert _got in _equal, f"budget {_budget}: the rule chooses {_order[0]} from {_table}, you {_got}"
### END HIDDEN TESTS

# %% mistake="a mean KL within the budget" of="decide" says="not within the budget in every run"
my_beta, predicted_win = betas[0], 0.6


def choose(table, budget):
    kept = [k for k, part in table.items() if np.mean([kl for kl, _ in part]) <= budget]
    return max(kept, key=lambda k: (np.mean([w for _, w in table[k]]), -k[1])) if kept else None


# %% mistake="the best win rate, whatever it costs" of="decide" says="not within the budget in every run"
my_beta, predicted_win = betas[0], 0.6


def choose(table, budget):
    return max(table, key=lambda k: (np.mean([w for _, w in table[k]]), -k[1]))


# %% mistake="always ships something" of="decide" says="ship the reference"
my_beta, predicted_win = betas[0], 0.6


def choose(table, budget):
    kept = [k for k, part in table.items() if max(kl for kl, _ in part) <= budget]
    if not kept:
        return min(table, key=lambda k: max(kl for kl, _ in table[k]))
    return max(kept, key=lambda k: (np.mean([w for _, w in table[k]]), -k[1]))


# %% mistake="compares the best runs" of="decide" says="One lucky run"
my_beta, predicted_win = betas[0], 0.6


def choose(table, budget):
    kept = [k for k, part in table.items() if max(kl for kl, _ in part) <= budget]
    return max(kept, key=lambda k: (max(w for _, w in table[k]), -k[1])) if kept else None


# %% mistake="of equals the smallest KL" of="decide" says="take the fewest steps"
my_beta, predicted_win = betas[0], 0.6


def choose(table, budget):
    kept = [k for k, part in table.items() if max(kl for kl, _ in part) <= budget]
    return (
        max(kept, key=lambda k: (np.mean([w for _, w in table[k]]), -max(kl for kl, _ in table[k]))) if kept else None
    )


# %% mistake="a win rate in percent" of="decide" says="a share between 0 and 1"
my_beta, predicted_win = betas[0], 70


def choose(table, budget):
    kept = [k for k, part in table.items() if max(kl for kl, _ in part) <= budget]
    return max(kept, key=lambda k: (np.mean([w for _, w in table[k]]), -k[1])) if kept else None


# %% mistake="strictly below the budget" of="decide" says="exactly the budget is within it"
my_beta, predicted_win = betas[0], 0.6


def choose(table, budget):
    kept = [k for k, part in table.items() if max(kl for kl, _ in part) < budget]
    return max(kept, key=lambda k: (np.mean([w for _, w in table[k]]), -k[1])) if kept else None


# %% alternative="one pass that keeps the best" of="decide"
my_beta, predicted_win = betas[-1], 1


def choose(table, budget):
    best, best_win = None, -1.0
    for key in sorted(table, key=lambda k: k[1]):
        kls, rates = zip(*table[key], strict=True)
        win = sum(rates) / len(rates)
        if max(kls) <= budget and win > best_win + 1e-12:
            best, best_win = key, win
    return best


# %%
def half(point: Point, part: slice) -> tuple[float, float]:
    """KL (nats a reply) and win rate of a checkpoint on a part of the test questions."""
    kl = float(point.kl["stepwise"][part].mean()) if point.kl else 0.0
    return kl, win_rate(point.grades[part], reference_grades)


validation, test = slice(0, test_questions // 2), slice(test_questions // 2, test_questions)
by_key = {(beta, at[0].step): at for beta, curves in found.items() for at in list(zip(*curves, strict=True))[1:]}
reference_points = [curve[0] for curve in found[betas[0]]]
table = {key: [half(point, validation) for point in points] for key, points in by_key.items()}
mine = {key: measured for key, measured in table.items() if key[0] == my_beta}
rules = {f"KL ≤ {budget:g}": choose(table, budget) for budget in sorted({0.1, kl_budget})}
rules[f"KL ≤ {kl_budget:g}, your β alone"] = choose(mine, kl_budget)
rules["no budget"] = choose(table, float("inf"))
rules[f"β = {betas[0]:g}, to the end"] = (betas[0], steps)

rows, spans = [], []
for name, key in rules.items():
    points = by_key.get(key, reference_points) if key else reference_points
    chosen_on = np.mean([half(point, validation)[1] for point in points])
    tested = [half(point, test) for point in points]
    spans.append(mean_interval([win for _, win in tested]))
    what = f"β = {key[0]:g}, step {key[1]}" if key else "the reference"
    rows.append((name, what, chosen_on, spans[-1][0], np.mean([kl for kl, _ in tested])))
columns = ["rule", "ships", "win rate, validation", "win rate, test", "KL, test (nats)"]
formats = {columns[2]: "{:.1%}", columns[3]: "{:.1%}", columns[4]: "{:.2f}"}
display(pd.DataFrame(rows, columns=columns).style.format(formats).hide(axis="index"))
yours = f"KL ≤ {kl_budget:g}, your β alone"
compare([(f"test win rate, {yours}", predicted_win, dict(zip(rules, spans, strict=True))[yours][0])], format=".1%")

fig, ax = plt.subplots(figsize=(7.5, 3.6))
for place, (name, (mean, low, high)) in enumerate(zip(rules, spans, strict=True)):
    colour = COLOURS.after if name == yours else COLOURS.wrong if "end" in name else COLOURS.before
    ax.plot([low, high], [place, place], color=colour, lw=1.8)
    ax.plot([mean], [place], "o", color=colour, ms=6)
ax.axvline(0.5, color=COLOURS.truth, lw=1, ls="--")
ax.set_yticks(range(len(rules)), list(rules))
ax.invert_yaxis()
ax.set(xlabel="win rate on the test half (mean of the runs, 95 % interval)", title="What a rule ships")
plt.show()

(shipped_win, shipped_low, shipped_high), shipped_kl = (
    spans[list(rules).index(f"KL ≤ {kl_budget:g}")],
    rows[list(rules).index(f"KL ≤ {kl_budget:g}")][-1],
)
card.record("kl_budget", kl_budget, format="g", label="the budget of KL, in nats a reply")
card.record(
    "win_after",
    shipped_win,
    format=".1%",
    low=shipped_low,
    high=shipped_high,
    tolerance=0.06,
    label="win rate within the budget",
)
card.record("kl_after", shipped_kl, format=".2f", tolerance=1.0, label="its KL from the reference", unit="nats")
card.record(
    "win_end",
    spans[-1][0],
    format=".1%",
    low=spans[-1][1],
    high=spans[-1][2],
    tolerance=0.06,
    label="win rate at the smaller beta, trained to the end",
)
card.record("kl_end", rows[-1][-1], format=".0f", tolerance=10.0, label="its KL from the reference", unit="nats")

# %% [markdown]
# With a budget of {{kl_budget}} nats your rule ships {{win_after}} on the test half, at {{kl_after}} of KL; the smaller β trained to the end has {{win_end}} at {{kl_end}}. Three things to take from the table:
#
# - **Compare the columns validation and test.** The chosen checkpoint is the best of many, so its validation number is too high on average, though not in every table. The test half does not know the choice.
# - **β is no budget.** It says when a pair is settled. Where the KL stands after a number of steps depends on the pairs, the rate and the optimizer as well. If a limit of KL matters, measure the KL and stop there.
# - **Read the intervals.** They come from three runs. Where those of two rules overlap, you cannot tell which is better: take the cheaper one, with fewer steps and less KL.
#
# ## With a real model
#
# Names and sizes are read from the model and the prompts are plain text, so the lesson runs with any causal language model:
#
# ```
# course run 2.5 -p model_id Qwen/Qwen3-0.6B -p device cuda -p sft_rate 1e-5 -p learning_rate 2e-5 -p longest_prompt 80 -p steps 100
# ```
#
# What changes:
#
# - **Rates and β.** Learning rates of 1e-6 (all weights; `trl`'s default) to 5e-5 (adapters) with β = 0.1 to 0.5 are usual, for one epoch. Real replies have hundreds of tokens, so the same margin is a smaller change of each.
# - **The judge.** No exact grades. A stronger model compares two replies, in both orders, since judges favour the first one and the longer one; report length-controlled win rates (Dubois et al., 2024), and keep a set of human judgements to validate the judge.
# - **Pairs on policy.** The frontier is reached by moving probability between replies that the policy gives. Pairs written by other models are off its distribution and displace more; sample both replies from your reference and let the judge order them (Guo et al., 2024).
# - **The template.** An instruct model wants its chat template: give `DPOTrainer` lists of messages in place of the texts, and sample with the same template. The trainer finds the reply as what follows the common beginning of the tokenized prompt and of the whole chat, and warns where they diverge, as they do with templates that add thinking tags to the assistant's turn.
# - **Memory.** Policy and reference share the weights, through the disabled adapter. Activations are for two replies a pair; `precompute_ref_log_probs=True` saves the reference's forward pass in every step.

# %% [markdown]
# ## Result card

# %%
card.show()

# %% [markdown]
# ## Say it in an interview
#
# <details><summary>Derive the DPO loss in four sentences. Where does β come from, and what does it do?</summary>
#
# Maximise reward minus β times the KL from the reference; the optimum is the reference times exp(r/β), normalised. Solve for r: β times the log-ratio plus a term of the prompt alone. In Bradley-Terry only the difference of two rewards counts, so that term cancels, and the likelihood of the comparisons is log σ(β · margin). β is the price of a nat of KL, and in the loss the scale at which a pair is settled: at a margin of 2.9/β the model gives 95 %. It does not bound the KL. With pairs that can be separated the loss has no minimum at finite margins, so the number of steps and the rate decide how far you go as well.
# </details>
#
# <details><summary>The log-probability of the chosen replies falls during training. Is that a bug?</summary>
#
# Not by itself: the loss sees the difference only. Chosen and rejected share tokens and weights, so pushing the rejected one down takes the chosen one along, the more the more alike they are (Pal et al., 2024; Razin et al., 2024). The mass has to go somewhere, and replies that stand in no pair get it. So look at where it went: sample. If the samples get worse, raise β, lower the rate, stop earlier, drop pairs that are nearly identical, or add a likelihood term on the chosen replies (`loss_type=["sigmoid", "sft"]`).
# </details>
#
# <details><summary>Your raters prefer long answers. How do you notice, and what do you do?</summary>
#
# Notice: plot reply length next to the win rate; split held-out pairs by which reply is longer and compare the margins. Here, pairs whose better reply was the longer one in 90 % took the share of replies with an idle sentence from {{idle_reference}} to {{idle_confounded}}, with all labels right. Do: balance or reweight the pairs by length ({{idle_balanced}} here), since a confounded data set cannot tell what raters meant; a length-normalised loss changes how strongly length pays, not what the data say. And judge with a length-controlled win rate.
# </details>

# %% [markdown]
# ## Read next
#
# - Rafael Rafailov et al., [Direct Preference Optimization: Your Language Model is Secretly a Reward Model](https://arxiv.org/abs/2305.18290), 2023. Sections 4 and 5.
# - Leo Gao, John Schulman, Jacob Hilton, [Scaling Laws for Reward Model Overoptimization](https://arxiv.org/abs/2210.10760), 2022. Gold reward against the square root of the KL.
# - Rafael Rafailov et al., [Scaling Laws for Reward Model Overoptimization in Direct Alignment Algorithms](https://arxiv.org/abs/2406.02900), 2024. The same for DPO and its relatives.
# - Arka Pal et al., [Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive](https://arxiv.org/abs/2402.13228), 2024.
# - Noam Razin et al., [Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization](https://arxiv.org/abs/2410.08847), 2024.
# - Ryan Park, Rafael Rafailov, Stefano Ermon, Chelsea Finn, [Disentangling Length from Quality in Direct Preference Optimization](https://arxiv.org/abs/2403.19159), 2024.
# - Yu Meng, Mengzhou Xia, Danqi Chen, [SimPO: Simple Preference Optimization with a Reference-Free Reward](https://arxiv.org/abs/2405.14734), 2024. A length-normalised reward.
# - Yann Dubois et al., [Length-Controlled AlpacaEval: A Simple Way to Debias Automatic Evaluators](https://arxiv.org/abs/2404.04475), 2024.
# - Shangmin Guo et al., [Direct Language Model Alignment from Online AI Feedback](https://arxiv.org/abs/2402.04792), 2024.
# - John Schulman, [Approximating KL Divergence](http://joschu.net/blog/kl-approx.html), 2020; Afra Amini, Tim Vieira, Ryan Cotterell, [Better Estimation of the KL Divergence Between Language Models](https://arxiv.org/abs/2504.10637), 2025.
