# %% [markdown]
# # 1.6 Evaluation and data quality
#
# You will be able to score structured answers without hiding failures, find test tickets in your training data, measure the habits of a judge before you trust it, and decide whether to buy few clean labels or many noisy ones.
#
# **You will measure.** One labelling budget, spent on few clean labels instead of many noisy ones, is worth {{gain}} points of exact match ({{gain:interval}} over four runs). A judge calls A the better of two identical replies in {{judge_identical}} of the cases; where the worse reply is the longer one it is right in {{judge_worse_longer}} of the pairs, where the better one is, in {{judge_better_longer}}. A detector by n-gram overlap finds {{recall_overlap}} of the test tickets that leaked into training; a search for exact copies, {{recall_exact}}.
#
# **You need.** Lesson 1.1 (seeds, bootstrap intervals, pairing). Python, NumPy, and the idea of a train/test split.
#
# **Time.** About 70 minutes; the solution runs in {{run:seconds}} s on one CPU core.

# %% [markdown]
# ## Why it matters at work
#
# Every decision about a model rests on a number that somebody computed: a score, a win rate, a benchmark. Each has a way to be wrong that raises no error: answers that do not parse are dropped from the average, test items stand in the training set, the judge likes whatever is shown first.
#
# The price is concrete. A leaked test set ships a model that fails on the first new customer; a biased judge picks the wrong model of two; a labelling budget spent on noise buys tickets that teach the model the noise.
#
# In interviews this is asked as "our judge prefers the new model in 70% of comparisons, do we ship?" and "we have 1,000 dollars for labels: how do you spend them?"

# %% tags=["parameters"]
model_id = "shipped"  # "shipped", the id of a causal language model with a chat template on the Hub, or a local folder
device = "cpu"  # "cpu", "cuda" or "mps"
learning_rate = 2e-3  # right for the shipped model of about a million weights; 1e-5 for a real one
steps = 60  # of each triage training; quick: 3
judge_steps = 160  # quick: 3
batch_size = 8
test_tickets = 96  # of each run; quick: 48
runs = 4  # each with a company, an order of the data and noise of its own; quick: 2
label_noise = 0.2  # the chance that a crowd worker gets a field wrong
seed = 0

# %%
import itertools
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import NamedTuple

import jinja2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import yaml
from datasets import Dataset, disable_progress_bars
from datasketch import MinHash, MinHashLSH
from datasketch.hashfunc import sha1_hash32
from IPython.display import display
from scipy import stats

from labkit import base_model, triage
from labkit.plots import COLOURS, direct_label, intervals, label_lines, use_house_style
from labkit.predict import compare
from labkit.results import ResultCard
from labkit.world import ACTIONS, CATEGORIES, LESSON_SEEDS, URGENCIES, Ticket, Triage, World

use_house_style()
disable_progress_bars()  # of datasets: its tables here are small
card = ResultCard("1_6_evaluation_and_data_quality")


class F1(NamedTuple):
    """Micro and macro F1 of a set of answers, each from 0 to 1."""

    micro: float
    macro: float


# %% [markdown]
# ## What counts as right
#
# The task is ticket triage, as in the lessons that follow: a customer's message in, one line of JSON out, with a product (or `null` when the message names none), a category, an urgency and an action. Here is a ticket, its right answer, and four wrong ones.

# %%
model, tokenizer = base_model.load(model_id, device=device)
start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
worlds = [World(LESSON_SEEDS[seed + run]) for run in range(runs)]
tests = [world.tickets(test_tickets, part="test") for world in worlds]

ticket = next(ticket for ticket in tests[0] if ticket.triage.product)
answer = ticket.triage.to_json()
other_urgency = next(urgency for urgency in URGENCIES if urgency != ticket.triage.urgency)
wrong_answers = {
    "one field wrong": answer.replace(f'"{ticket.triage.urgency}"', f'"{other_urgency}"'),
    "product missed": answer.replace(f'"{ticket.triage.product}"', "null"),
    "an invented category": answer.replace(f'"{ticket.triage.category}"', '"complaint"'),
    "no end": answer[:-1],
}
print(ticket.text, "\n", answer)
for text in wrong_answers.values():
    print(text)

# %% [markdown]
# Exact match, the share of answers with all four fields right, calls all four equally wrong. It is the number that a downstream system cares about, and a poor guide for finding out what to mend. Three others go with it:
#
# - **validity**: the share of answers that parse *and* keep the schema (`Triage.parse` raises `ValueError` for the last two above);
# - **field F1**, in which each field is a slot that can hold a value. Per field, count true positives TP, false positives FP and false negatives FN over all tickets:
#
# | the right value is | the answer says | counts |
# |---|---|---|
# | a value | the same value | 1 TP |
# | a value | another value | 1 FP and 1 FN |
# | a value | `null`, or the answer does not parse | 1 FN |
# | `null` | a value | 1 FP |
# | `null` | `null`, or the answer does not parse | nothing |
#
# $$F_1 = \frac{2\,\mathrm{TP}}{2\,\mathrm{TP} + \mathrm{FP} + \mathrm{FN}}, \qquad \text{and } F_1 = 1 \text{ when nothing was counted.}$$
#
# - **Micro** F1 adds up the counts of all fields first; **macro** F1 is the mean of the four fields' $F_1$. (There are two formulas in use under the name macro F1. The other one, the $F_1$ of the mean precision and mean recall, can be far higher; Opitz and Burst, 2019.)
#
# For a field that is never `null`, and answers that always parse, $F_1$ is accuracy. The difference is in what fails.
#
# **Exercise.** Write `triage_f1(texts, golds)`. `texts` is a list of $n$ answers as strings, `golds` the $n$ right `Triage` objects; return `F1(micro, macro)`, two floats from 0 to 1. `Triage.parse(text)` reads an answer or raises `ValueError`; the fields are named in `triage.FIELDS`. No tickets at all: `F1(1.0, 1.0)`.
#
# For one ticket that is answered rightly and a second whose answer does not parse, both with four values: TP = 4, FN = 4, FP = 0, so micro is $8/12 \approx 0.667$; each field alone gives the same, so macro is 0.667 too. *About 15 lines.*
#
# <details><summary>Hint 1</summary>What does a system claim whose answer cannot be read? Nothing. What does it owe? Everything that the ticket holds.</details>
# <details><summary>Hint 2</summary>Keep three counts a field. Go over tickets, then over fields; compare two values, either of which may be <code>None</code>. <code>getattr(gold, field)</code> reads a field by its name.</details>
# <details><summary>Hint 3</summary>With <code>want</code> and <code>got</code> (None when the answer does not parse): a hit when both are equal and not None; if it is no hit, a false positive when got is not None, and a false negative when want is not None. Both can be true at once.</details>


# %% exercise="triage-f1" difficulty=2 minutes=11
def triage_f1(texts: Sequence[str], golds: Sequence[Triage]) -> F1:
    """Return the micro and macro F1 of n answers over the four fields; an answer that does not parse claims nothing."""
    ### BEGIN SOLUTION
    counts = np.zeros((len(triage.FIELDS), 3), dtype=int)  # true positives, false positives, false negatives
    for text, gold in zip(texts, golds, strict=True):
        try:
            said = Triage.parse(text)
        except ValueError:
            said = None
        for row, field in enumerate(triage.FIELDS):
            want, got = getattr(gold, field), getattr(said, field, None)
            hit = got is not None and got == want
            counts[row] += (hit, got is not None and not hit, want is not None and not hit)

    def f1(tp: int, fp: int, fn: int) -> float:
        return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0

    return F1(float(f1(*counts.sum(axis=0))), float(np.mean([f1(*row) for row in counts])))
    ### END SOLUTION


# %% check="triage-f1" points=2
full = Triage("Velmora", "billing", "low", "refund")
nameless = Triage(None, "billing", "low", "refund")
torn = full.to_json()[:-1]
got = triage_f1([full.to_json(), torn], [full, full])
assert abs(got.micro - 1) > 1e-9, (
    "You left out the answer that does not parse, and half of the answers that fail make a perfect score: each of its "
    "values is a false negative"
)
assert abs(got.micro - 8 / 12) < 1e-9, f"One right answer, one that does not parse: TP 4, FN 4, so 8/12; yours is {got}"
wrong_category = Triage(None, "setup", "low", "refund")
got = triage_f1([wrong_category.to_json(), nameless.to_json()], [nameless, full])
assert abs(got.micro - 0.625) > 1e-9, "micro and macro are swapped: micro adds up the counts of all fields first"
assert abs(got.micro - 12 / 15) > 1e-9, (
    "null answered by null is nothing to find and nothing found: it is no true positive"
)
invented = full.to_json().replace("billing", "complaint")
got = triage_f1([full.to_json(), invented], [full, full])
assert abs(got.micro - 14 / 16) > 1e-9, (
    "An answer with an invented category is JSON, but breaks the schema: Triage.parse refuses it, so it claims nothing"
)
got = triage_f1([Triage("Velmora", "setup", "low", "refund").to_json()], [full])
assert abs(got.micro - 6 / 7) > 1e-9, (
    "A wrong value is two errors: it claims what is not so (FP) and misses what is (FN)"
)
assert abs(got.micro - 6 / 8) < 1e-9, (
    f"Three fields right, one wrong: TP 3, FP 1, FN 1, so 6/8; yours is {got.micro:.3f}"
)
for said, gold, what in (
    (nameless, full, "null where there is a value is one false negative"),
    (full, nameless, "a value where null is right is one false positive"),
):
    got = triage_f1([said.to_json()], [gold])
    assert abs(got.micro - 6 / 7) < 1e-9, f"TP 3 and {what}: 6/7 = 0.857; yours is {got.micro:.3f}"
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(21)


def _random_triage():
    return Triage(
        [None, "Velmora", "Salitan"][_rng.integers(3)],
        CATEGORIES[_rng.integers(2)],
        URGENCIES[_rng.integers(3)],
        ACTIONS[_rng.integers(2)],
    )


for _n in (0, 1, 2, 7, 40):
    _golds = [_random_triage() for _ in range(_n)]
    _said = [_random_triage() if _rng.random() < 0.8 else None for _ in range(_n)]
    _texts = ["{}" if said is None else said.to_json() for said in _said]
    _slots = {(i, f, getattr(g, f)) for i, g in enumerate(_golds) for f in triage.FIELDS if getattr(g, f) is not None}
    _claims = {
        (i, f, getattr(s, f))
        for i, s in enumerate(_said)
        if s is not None
        for f in triage.FIELDS
        if getattr(s, f) is not None
    }
    _want = 2 * len(_slots & _claims) / (len(_slots) + len(_claims)) if _slots or _claims else 1.0
    _got = triage_f1(_texts, _golds)
    assert abs(_got.micro - _want) < 1e-9, f"{_n} random tickets: micro F1 is {_want:.4f}, yours is {_got.micro:.4f}"
### END HIDDEN TESTS

# %% check="triage-f1" points=2
full, nameless = (Triage(product, "billing", "low", "refund") for product in ("Velmora", None))
golds = [full, Triage("Salitan", "setup", "high", "call"), Triage("Nevira", "defect", "low", "repair")]
said = [
    Triage(None, "delivery", "low", "refund"),
    Triage(None, "billing", "high", "call"),
    Triage("Nevira", "setup", "low", "repair"),
]
got = triage_f1([one.to_json() for one in said], golds)
assert abs(got.macro - 14 / 22) > 1e-9, (
    "micro and macro are swapped: micro adds up the counts, macro is the mean over the fields"
)
mean_precision, mean_recall = (1 + 0 + 1 + 1) / 4, (1 / 3 + 0 + 1 + 1) / 4
of_means = 2 * mean_precision * mean_recall / (mean_precision + mean_recall)
assert abs(got.macro - of_means) > 1e-9, (
    "Your macro is the F1 of the mean precision and the mean recall: take each field's F1 first, then their mean"
)
assert abs(got.macro - 0.625) < 1e-9, (
    f"Product has F1 1/2 (1 TP, 2 FN), category 0, urgency and action 1: macro is the mean of the four fields' F1, "
    f"0.625; yours is {got.macro:.4f}"
)
got = triage_f1([nameless.to_json()], [nameless])
assert abs(got.macro - 1) < 1e-9, (
    f"Only null in a field, and null answered: nothing was counted, so its F1 is 1 by convention; your macro is {got.macro}"
)
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(22)
_choices = ([None, "Velmora", "Salitan"], CATEGORIES[:2], URGENCIES, ACTIONS[:2])
for _n in (0, 1, 3, 25):
    _golds, _said = (
        [Triage(*(values[_rng.integers(len(values))] for values in _choices)) for _ in range(_n)] for _ in range(2)
    )
    _said = [said if _rng.random() < 0.8 else None for said in _said]
    _scores = []
    for _f in triage.FIELDS:
        _slots = {(i, getattr(g, _f)) for i, g in enumerate(_golds) if getattr(g, _f) is not None}
        _claims = {(i, getattr(s, _f)) for i, s in enumerate(_said) if s is not None and getattr(s, _f) is not None}
        _scores.append(2 * len(_slots & _claims) / (len(_slots) + len(_claims)) if _slots or _claims else 1.0)
    _got = triage_f1(["no" if said is None else said.to_json() for said in _said], _golds)
    assert abs(_got.macro - np.mean(_scores)) < 1e-9, (
        f"{_n} random tickets: macro F1, the mean of the four fields' F1, is {np.mean(_scores):.4f}; yours is {_got.macro:.4f}"
    )
### END HIDDEN TESTS


# %% mistake="drops answers that do not parse" of="triage-f1" says="You left out the answer that does not parse"
def triage_f1(texts, golds):
    counts = {field: [0, 0, 0] for field in triage.FIELDS}
    for text, gold in zip(texts, golds, strict=True):
        try:
            said = Triage.parse(text)
        except ValueError:
            continue
        for field, count in counts.items():
            want, got = getattr(gold, field), getattr(said, field)
            hit = got is not None and got == want
            count[0] += hit
            count[1] += got is not None and not hit
            count[2] += want is not None and not hit
    f1 = lambda tp, fp, fn: 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0
    return F1(f1(*map(sum, zip(*counts.values(), strict=True))), sum(f1(*c) for c in counts.values()) / 4)


# %% mistake="null for null is a hit" of="triage-f1" says="it is no true positive"
def triage_f1(texts, golds):
    counts = {field: [0, 0, 0] for field in triage.FIELDS}
    for text, gold in zip(texts, golds, strict=True):
        try:
            said = asdict(Triage.parse(text))
        except ValueError:
            said = dict.fromkeys(triage.FIELDS, "unreadable")
        for field, count in counts.items():
            want, got = getattr(gold, field), said[field]
            count[0] += got == want
            count[1] += got != want and got not in (None, "unreadable")
            count[2] += got != want and want is not None
    f1 = lambda tp, fp, fn: 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0
    return F1(f1(*map(sum, zip(*counts.values(), strict=True))), sum(f1(*c) for c in counts.values()) / 4)


# %% mistake="a wrong value is one error" of="triage-f1" says="A wrong value is two errors"
def triage_f1(texts, golds):
    counts = {field: [0, 0, 0] for field in triage.FIELDS}
    for text, gold in zip(texts, golds, strict=True):
        try:
            said = Triage.parse(text)
        except ValueError:
            said = None
        for field, count in counts.items():
            want, got = getattr(gold, field), getattr(said, field, None)
            if got is not None:
                count[0 if got == want else 1] += 1
            elif want is not None:
                count[2] += 1
    f1 = lambda tp, fp, fn: 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0
    return F1(f1(*map(sum, zip(*counts.values(), strict=True))), sum(f1(*c) for c in counts.values()) / 4)


# %% mistake="F1 of the mean precision and recall" of="triage-f1" says="take each field's F1 first"
def triage_f1(texts, golds):
    counts = {field: [0, 0, 0] for field in triage.FIELDS}
    for text, gold in zip(texts, golds, strict=True):
        try:
            said = Triage.parse(text)
        except ValueError:
            said = None
        for field, count in counts.items():
            want, got = getattr(gold, field), getattr(said, field, None)
            hit = got is not None and got == want
            count[0] += hit
            count[1] += got is not None and not hit
            count[2] += want is not None and not hit
    tp, fp, fn = map(sum, zip(*counts.values(), strict=True))
    micro = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0
    precision = np.mean([c[0] / (c[0] + c[1]) if c[0] + c[1] else 1.0 for c in counts.values()])
    recall = np.mean([c[0] / (c[0] + c[2]) if c[0] + c[2] else 1.0 for c in counts.values()])
    return F1(micro, 2 * precision * recall / (precision + recall) if precision + recall else 0.0)


# %% mistake="swaps micro and macro" of="triage-f1" says="micro and macro are swapped"
def triage_f1(texts, golds):
    counts = {field: [0, 0, 0] for field in triage.FIELDS}
    for text, gold in zip(texts, golds, strict=True):
        try:
            said = Triage.parse(text)
        except ValueError:
            said = None
        for field, count in counts.items():
            want, got = getattr(gold, field), getattr(said, field, None)
            hit = got is not None and got == want
            count[0] += hit
            count[1] += got is not None and not hit
            count[2] += want is not None and not hit
    f1 = lambda tp, fp, fn: 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0
    return F1(sum(f1(*c) for c in counts.values()) / 4, f1(*map(sum, zip(*counts.values(), strict=True))))


# %% mistake="any JSON is an answer" of="triage-f1" says="breaks the schema"
def triage_f1(texts, golds):
    import json

    counts = {field: [0, 0, 0] for field in triage.FIELDS}
    for text, gold in zip(texts, golds, strict=True):
        try:
            said = json.loads(text)
        except ValueError:
            said = {}
        for field, count in counts.items():
            want, got = getattr(gold, field), said.get(field)
            hit = got is not None and got == want
            count[0] += hit
            count[1] += got is not None and not hit
            count[2] += want is not None and not hit
    f1 = lambda tp, fp, fn: 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0
    return F1(f1(*map(sum, zip(*counts.values(), strict=True))), sum(f1(*c) for c in counts.values()) / 4)


# %% alternative="sets of claims against sets of slots" of="triage-f1"
def is_readable(text):
    try:
        Triage.parse(text)
        return True
    except ValueError:
        return False


def triage_f1(texts, golds):
    slots = {(i, field, value) for i, gold in enumerate(golds) for field, value in asdict(gold).items() if value}
    readable = [(i, Triage.parse(text)) for i, text in enumerate(texts) if is_readable(text)]
    claims = {(i, field, value) for i, said in readable for field, value in asdict(said).items() if value}

    def dice(a, b):
        return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0

    of_field = [dice(*({e for e in part if e[1] == field} for part in (slots, claims))) for field in triage.FIELDS]
    return F1(dice(slots, claims), sum(of_field) / len(of_field))


# %% [markdown]
# ### Four metrics along one training
#
# The model has never seen the format. It is trained on {{checked_tickets}} rightly labelled tickets, and looked at on the way. (Full finetuning; `fit` puts the weights back to the start first. You meet this run again at the end.)


# %%
def fit(tickets: Sequence[Ticket], run: int, label: str, looks: Sequence[int] = ()) -> dict[int, list[str]]:
    """Train the model from its start on the tickets; its answers to the run's test tickets before the steps in `looks`
    and after the last one."""
    model.load_state_dict(start)
    examples, found = triage.encode(tokenizer, tickets), {}

    def watched():
        for step, batch in enumerate(triage.batches(examples, size=batch_size, steps=steps, seed=seed + run)):
            if step in looks:
                found[step] = triage.answers(model, tokenizer, tests[run])
            yield batch

    triage.train(model, watched(), steps=steps, learning_rate=learning_rate, label=f"{label}, run {run + 1}")
    return found | {steps: triage.answers(model, tokenizer, tests[run])}


def is_valid(text: str) -> bool:
    """Whether an answer parses and keeps the schema."""
    try:
        Triage.parse(text)
    except ValueError:
        return False
    return True


checked_tickets = batch_size * 60  # as many as the default number of steps sees
checked = worlds[0].tickets(checked_tickets, part="train")
looks = sorted({steps // 12, steps // 3, 2 * steps // 3, 11 * steps // 12})
watched_run = fit(checked, 0, "watched", looks)
golds = [ticket.triage for ticket in tests[0]]
table = pd.DataFrame(
    [
        {
            "step": step,
            "valid": np.mean([is_valid(text) for text in texts]),
            "micro F1": triage_f1(texts, golds).micro,
            "macro F1": triage_f1(texts, golds).macro,
            "exact match": triage.score(texts, tests[0]).exact.mean(),
        }
        for step, texts in watched_run.items()
    ]
).set_index("step")
by_field = pd.DataFrame(
    [
        {"step": step} | {name: part.mean() for name, part in triage.score(texts, tests[0]).fields.items()}
        for step, texts in watched_run.items()
    ]
).set_index("step")

fig, ax = plt.subplots()
for name, colour in zip(table.columns, (COLOURS.before, COLOURS.after, COLOURS.other, COLOURS.library), strict=True):
    ax.plot(table.index, table[name], "o-", color=colour, label=name, ms=5)
ax.set(ylim=(-0.03, 1.05), xlabel="training step", ylabel="share, or F1", title="Form comes first, then content")
label_lines(ax)
plt.show()
display(table.join(by_field).style.format("{:.2f}"))

look = steps // 3
card.record("checked_tickets", checked_tickets, format="d", label="tickets of the watched training")
card.record("early_step", look, format="d", label="an early step of the watched training")
card.record("early_valid", table["valid"][look], format=".0%", label="valid answers at that step", tolerance=0.3)
card.record("early_exact", table["exact match"][look], format=".0%", label="exact match at that step", tolerance=0.3)
card.record("early_micro", table["micro F1"][look], format=".2f", label="micro F1 at that step", tolerance=0.3)
card.record(
    "early_best", by_field.loc[look].max(), format=".0%", label="its best field right at that step", tolerance=0.4
)
card.record(
    "early_worst", by_field.loc[look].min(), format=".0%", label="its worst field right at that step", tolerance=0.4
)

# %% [markdown]
# At step {{early_step}}, {{early_valid}} of the answers are valid, micro F1 is {{early_micro}}, and exact match {{early_exact}}: three numbers for the same answers, and a report with one of them leaves out what the others say. Validity tells whether the format was learnt, and nothing about content. Exact match cannot be above the worst field. Where to look is in the last four columns, the share of tickets with the field right (an answer that does not parse has none): at that step {{early_best}} for the best field and {{early_worst}} for the worst. When micro and macro F1 differ much, the fields differ much.

# %% [markdown]
# ## Several tries: pass@k
#
# Where an answer can be verified (tests pass, the JSON validates, a human accepts one of five drafts), the question is: with $k$ tries, does at least one succeed? For a problem that a sample solves with probability $p$, $\text{pass@}k = 1 - (1 - p)^k$. You have $n \ge k$ samples, of which $c$ are right, and the plug-in $1 - (1 - c/n)^k$ suggests itself.
#
# It is biased: $(1-x)^k$ is convex for $k \ge 2$, so by Jensen's inequality the plug-in is too low on average, and the more so the smaller $n$ is. Chen et al. (2021, section 2.1) take the share of all subsets of $k$ of the $n$ samples that hold at least one right one:
#
# $$\widehat{\text{pass@}k} = 1 - \binom{n - c}{k} \Big/ \binom{n}{k}.$$
#
# That is the average over all ways to have drawn only $k$ samples, so it is unbiased.
#
# **Exercise.** Two things.
#
# 1. *Predict.* A problem has $p = 0.1$, so pass@10 is $1 - 0.9^{10} \approx 0.65$. You draw $n = 10$ samples and use the plug-in. What does it give on average over many repetitions? Put a share from 0 to 1 into `predicted_plug_in`.
# 2. Write `pass_at_k(n, c, k)`, the unbiased estimate as a float. For $n = 4$, $c = 1$, $k = 2$ it is 0.5: of the six pairs, three hold the right sample. `ValueError` unless $0 \le c \le n$ and $1 \le k \le n$. It must hold for thousands of samples: `pass_at_k(5000, 1, 2500)` is 0.5. *About 3 lines.*
#
# <details><summary>Hint 1</summary>How often does the plug-in give exactly 0 here, and can it make up for that? For the estimate: count subsets, do not draw them.</details>
# <details><summary>Hint 2</summary>Binomial coefficients of 5,000 overflow a float. Python's whole numbers do not: <code>math.comb</code>. It is 0 when there are too few wrong samples to fill a subset, which is what you want.</details>
# <details><summary>Hint 3</summary>One minus <code>math.comb(n - c, k)</code> over <code>math.comb(n, k)</code>; the division of two large whole numbers is exact to a float's precision.</details>

# %% exercise="pass-at-k" difficulty=1 minutes=7
predicted_plug_in = None
### BEGIN SOLUTION
predicted_plug_in = 0.55
### END SOLUTION


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from n samples of which c are right (Chen et al., 2021)."""
    ### BEGIN SOLUTION
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n; got n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)
    ### END SOLUTION


# %% check="pass-at-k" points=1
assert predicted_plug_in is not None, "Write your prediction down first: predicted_plug_in = a share from 0 to 1"
assert isinstance(predicted_plug_in, (int, float)), (
    f"A prediction is a number, such as 0.5; yours is {predicted_plug_in!r}"
)
assert 0 <= predicted_plug_in <= 1, f"A share lies from 0 to 1 (half is 0.5, not 50); yours is {predicted_plug_in}"

# %% check="pass-at-k" points=2
got = pass_at_k(4, 1, 2)
assert abs(got - 0.4375) > 1e-9, (
    "This is the plug-in, too low on average: count the subsets of k samples without a right one"
)
assert abs(got - 1) > 1e-9, "One right sample of four does not make every pair right: count subsets of k = 2"
assert abs(got - 0.5) < 1e-9, f"3 of the 6 pairs hold the right sample, so 0.5; yours is {got}"
for n in (1, 3, 6):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        share = sum(any(subset) for subset in subsets) / len(subsets)
        assert abs(pass_at_k(n, c, k) - share) < 1e-9, (
            f"n={n}, c={c}, k={k}: {share:.4f} of all subsets hold a right sample; yours is {pass_at_k(n, c, k)}"
        )
try:
    large = pass_at_k(5000, 1, 2500)
except (OverflowError, RecursionError, MemoryError):
    large = math.nan
assert abs(large - 0.5) < 1e-9, (
    f"pass_at_k(5000, 1, 2500) is 0.5; yours is {large}: floats overflow here, so use whole numbers or a running product"
)
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(4)
for _ in range(30):
    _n = int(_rng.integers(1, 300))
    _c, _k = int(_rng.integers(0, _n + 1)), int(_rng.integers(1, _n + 1))
    _want = 1.0 - float(stats.hypergeom(_n, _c, _k).pmf(0))
    assert abs(pass_at_k(_n, _c, _k) - _want) < 1e-7, (
        f"n={_n}, c={_c}, k={_k}: {_want:.6f}, yours is {pass_at_k(_n, _c, _k)}"
    )
assert pass_at_k(10_000, 0, 10_000) == 0, "No right sample: 0"
assert pass_at_k(10_000, 10_000, 1) == 1, "Only right samples: 1"
### END HIDDEN TESTS

# %% check="pass-at-k" points=1
for bad in ((4, 5, 2), (4, -1, 2), (4, 1, 0), (4, 1, 5)):
    try:
        pass_at_k(*bad)
        refused = False
    except Exception as error:
        refused = isinstance(error, ValueError)
    assert refused, (
        f"pass_at_k{bad} must raise ValueError: 0 <= c <= n, and k from 1 to n (pass@5 is unknown from 4 samples)"
    )

# %% mistake="the plug-in" of="pass-at-k" says="This is the plug-in"
predicted_plug_in = 0.65


def pass_at_k(n, c, k):
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError
    return 1 - (1 - c / n) ** k


# %% mistake="right as soon as one sample is" of="pass-at-k" says="does not make every pair right"
predicted_plug_in = 0.65


def pass_at_k(n, c, k):
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError
    return float(c > 0)


# %% mistake="coefficients as floats" of="pass-at-k" says="floats overflow here"
predicted_plug_in = 0.65


def pass_at_k(n, c, k):
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError
    lose = ways = 1.0
    for i in range(k):
        lose *= max(n - c - i, 0)
        ways *= n - i
    return 1 - lose / ways


# %% mistake="believes pass@5 from four samples" of="pass-at-k" says="pass@5 is unknown from 4 samples"
predicted_plug_in = 0.65


def pass_at_k(n, c, k):
    if c < 0 or c > n or k < 1:
        raise ValueError
    return 1.0 if n - c < k else 1 - math.comb(n - c, k) / math.comb(n, k)


# %% mistake="predicts in percent" of="pass-at-k" says="half is 0.5, not 50"
predicted_plug_in = 65


def pass_at_k(n, c, k):
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# %% alternative="a running product" of="pass-at-k"
predicted_plug_in = 0.4


def pass_at_k(n, c, k):
    if c < 0 or c > n or k < 1 or k > n:
        raise ValueError("out of range")
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


# %% [markdown]
# No simulation is needed to see the bias: average each estimate over the binomial distribution of $c$.

# %%
chance, tries = 0.1, 10
sizes = np.array([10, 12, 15, 20, 30, 50, 100, 200])
truth = 1 - (1 - chance) ** tries
means = {"plug-in": [], "unbiased": []}
for n in sizes.tolist():
    weights = stats.binom.pmf(np.arange(n + 1), n, chance)
    means["plug-in"].append(weights @ [1 - (1 - c / n) ** tries for c in range(n + 1)])
    means["unbiased"].append(weights @ [pass_at_k(n, c, tries) for c in range(n + 1)])

fig, ax = plt.subplots()
ax.axhline(truth, color=COLOURS.truth, lw=1, ls="--")
for (name, values), colour in zip(means.items(), (COLOURS.wrong, COLOURS.after), strict=True):
    ax.plot(sizes, values, "o-", color=colour, label=name, ms=5)
ax.set(xscale="log", ylim=(0.4, 0.75), xlabel="samples n a problem", ylabel=f"mean estimate of pass@{tries}")
ax.set_xticks([10, 20, 50, 100, 200], ["10", "20", "50", "100", "200"])
ax.minorticks_off()
ax.set_title("The same model, scored with more samples")
direct_label(ax, 10, truth, "truth", COLOURS.truth)
label_lines(ax)
plt.show()
compare([("mean plug-in estimate, 10 samples", predicted_plug_in, means["plug-in"][0])], format=".1%")
card.record("pass_truth", truth, format=".1%", label="pass@10 of a problem with p = 0.1")
card.record("pass_plug_in", means["plug-in"][0], format=".1%", label="its plug-in estimate from 10 samples, on average")
card.record(
    "pass_error",
    max(abs(np.array(means["unbiased"]) - truth)),
    format=".0e",
    label="largest bias of yours",
    tolerance=1e-9,
)

# %% [markdown]
# From 10 samples the plug-in gives {{pass_plug_in}} on average where {{pass_truth}} is right; yours is off by {{pass_error}}, which is rounding. Two teams that compare plug-in scores from 10 and from 200 samples see an improvement that nobody made. The figure does not show variance: with $n = k$ the unbiased estimate of one problem is 0 or 1, so draw several times $k$ samples, and put the interval over *problems*.

# %% [markdown]
# ## The task as a file
#
# A score is a fact about a model *and* a prompt, a target, a stopping rule and a metric. Groups that share evaluations write those down: lm-evaluation-harness (Biderman et al., 2024) takes a task as a YAML file. The fields used here:
#
# | field | meaning |
# |---|---|
# | `task`, `dataset_path`, `dataset_kwargs` | its name, and where `datasets.load_dataset` finds the documents |
# | `training_split`, `test_split`, `fewshot_split` | which split is what; few-shot examples come from the last |
# | `output_type` | `generate_until`: free text up to a stop string |
# | `doc_to_text`, `doc_to_target` | [Jinja](https://jinja.palletsprojects.com) templates of prompt and right answer; a document's columns are their variables |
# | `target_delimiter`, `fewshot_delimiter` | between prompt and target of a few-shot example, and after it (by default one space, and two line ends) |
# | `generation_kwargs` | decoding; the answer is cut *before* the first string in `until` |
# | `metric_list` | what is computed an answer, and how it is aggregated |
#
# The harness is not installed here: the few lines below do what it does with these fields, so you can prove a task on your own documents before you rent a GPU. (Version 0.4.13 of the harness reads the corrected file of this lesson and builds the same prompts, targets and few-shot contexts.)

# %%
REQUIRED = {
    "task": str,
    "dataset_path": str,
    "training_split": str,
    "test_split": str,
    "fewshot_split": str,
    "output_type": str,
    "doc_to_text": str,
    "doc_to_target": str,
    "generation_kwargs": dict,
    "metric_list": list,
}
environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


def read_task(text: str) -> dict:
    """Parse a task file and check its structure; ValueError says what is missing or has the wrong type."""
    task = yaml.safe_load(text)
    for field, kind in REQUIRED.items():
        if not isinstance(task.get(field), kind):
            raise ValueError(f"{field} must be a {kind.__name__}; it is {task.get(field)!r}")
    for metric in task["metric_list"]:
        if missing := {"metric", "aggregation", "higher_is_better"} - metric.keys():
            raise ValueError(f"a metric lacks {sorted(missing)}")
    return task


def render(task: dict, document: dict) -> tuple[str, str]:
    """The prompt and the target of a document; a variable that the document lacks raises an error."""
    prompt, target = (
        environment.from_string(task[field]).render(**document) for field in ("doc_to_text", "doc_to_target")
    )
    return prompt, target


def cut(task: dict, generated: str) -> str:
    """What is left of a generated text: everything before the first stop string."""
    ends = [generated.find(stop) for stop in task["generation_kwargs"]["until"]]
    return generated[: min((end for end in ends if end >= 0), default=len(generated))]


def as_document(ticket: Ticket) -> dict:
    """A ticket as a row of the data set: `answer` is the line of JSON, `triage` the same as a dictionary."""
    return {
        "id": ticket.id,
        "text": ticket.text,
        "triage": asdict(ticket.triage),
        "answer": ticket.triage.to_json(),
    }


documents = Dataset.from_list([as_document(ticket) for ticket in tests[0]])
broken_yaml = """
task: ticket_triage
dataset_path: json
dataset_kwargs:
  data_files: {train: train.jsonl, test: test.jsonl}
training_split: train
test_split: test
fewshot_split: test
num_fewshot: 2
output_type: generate_until
doc_to_text: "{{ text }} "
doc_to_target: "{{ triage }}"
target_delimiter: ""
generation_kwargs: {until: ["}"], do_sample: false, max_gen_toks: 64}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
prompt, target = render(read_task(broken_yaml), documents[0])
print(f"prompt: {prompt!r}\ntarget: {target!r}")

# %% [markdown]
# **Exercise (find and fix).** The file above is read without a complaint and scores every model wrongly. It has four defects. Put the corrected file, as a string, into `task_yaml`, such that
#
# - the prompt is the ticket's text and nothing else: no character before or after it. (With `--apply_chat_template` the harness puts it into the user's turn, exactly as the model was trained.)
# - the target is the line of JSON that the model is to write, character for character;
# - an answer is cut at the end of its line, and a right answer survives the cut;
# - the test split is evaluated, and few-shot examples come from the training split.
#
# The columns of a document are `id`, `text`, `triage` and `answer`. Everything else in the file stays. *4 lines change.*
#
# <details><summary>Hint 1</summary>Look at the printed prompt and target character by character. What does Python print for a dictionary that JSON would not?</details>
# <details><summary>Hint 2</summary>The cut removes the stop string and everything after it. What is then left of a right answer, if it stops at the closing brace?</details>
# <details><summary>Hint 3</summary>The four lines are fewshot_split, doc_to_text (one character too many), doc_to_target (another column) and until (a line end, written "\\n" inside a Python string that is not raw).</details>

# %% exercise="task-file" difficulty=2 minutes=7
task_yaml = broken_yaml
### BEGIN SOLUTION
task_yaml = """
task: ticket_triage
dataset_path: json
dataset_kwargs:
  data_files: {train: train.jsonl, test: test.jsonl}
training_split: train
test_split: test
fewshot_split: train
num_fewshot: 2
output_type: generate_until
doc_to_text: "{{ text }}"
doc_to_target: "{{ answer }}"
target_delimiter: ""
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 64}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
### END SOLUTION


# %% check="task-file" points=1
def document_of(text: str, right: Triage) -> dict:
    return as_document(Ticket("t", text, right))


for right in (Triage(None, "setup", "high", "call"), Triage("Velmora", "billing", "low", "refund")):
    _, target = render(read_task(task_yaml), document_of("The thing is broken.", right))
    assert "'" not in target, (
        f"The target is {target}: Python's spelling of a dictionary, with single quotes and None. No model that writes "
        "JSON can match it; take the column that holds the JSON"
    )
    assert target == right.to_json(), (
        f"The target must be {right.to_json()!r}, character for character; yours is {target!r}"
    )
### BEGIN HIDDEN TESTS
for _ticket in World(LESSON_SEEDS[77]).tickets(20):
    assert render(read_task(task_yaml), as_document(_ticket))[1] == _ticket.triage.to_json(), (
        "The target is not the JSON"
    )
### END HIDDEN TESTS

# %% check="task-file" points=1
for text in ("The thing is broken.", "Is it 100% & <safe>?"):
    prompt, _ = render(read_task(task_yaml), document_of(text, Triage(None, "setup", "high", "call")))
    assert prompt == prompt.rstrip(), (
        f"The prompt ends in white space ({prompt[-3:]!r}): the model never saw that, and the next token is another one"
    )
    assert prompt == text, f"The prompt must be the ticket's text and nothing else; of {text!r} you make {prompt!r}"
### BEGIN HIDDEN TESTS
for _ticket in World(LESSON_SEEDS[78]).tickets(20):
    assert render(read_task(task_yaml), as_document(_ticket))[0] == _ticket.text, "The prompt is not the ticket's text"
### END HIDDEN TESTS

# %% check="task-file" points=1
right_answer = Triage("Velmora", "billing", "low", "refund").to_json()
left_over = cut(read_task(task_yaml), right_answer + "\nHello! My order")
stops = read_task(task_yaml)["generation_kwargs"]["until"]
assert len(left_over) >= len(right_answer), (
    f"Your stop strings {stops} cut a right answer to {left_over!r}, which is no JSON any more"
)
assert left_over == right_answer, (
    f"After the end of the line, nothing belongs to the answer; with the stop strings {stops} you keep {left_over!r}"
)
### BEGIN HIDDEN TESTS
for _right in (Triage(None, "setup", "high", "call"), Triage("Two Words", "account", "normal", "explain")):
    assert cut(read_task(task_yaml), _right.to_json()) == _right.to_json(), "A right answer must survive the cut"
### END HIDDEN TESTS

# %% check="task-file" points=1
splits = {name: read_task(task_yaml)[f"{name}_split"] for name in ("training", "test", "fewshot")}
assert splits["test"] == "test", f"The test split must be evaluated, not {splits['test']!r}"
assert splits["fewshot"] == "train", (
    f"Few-shot examples come from {splits['fewshot']!r}: they show test tickets with their answers; take them from training"
)
assert splits["training"] == "train", f"The training split is train, not {splits['training']!r}"
mine, given = read_task(task_yaml), read_task(broken_yaml)
for task in (mine, given):
    for field in ("fewshot_split", "doc_to_text", "doc_to_target"):
        del task[field]
    del task["generation_kwargs"]["until"]
changed = sorted(field for field in {*mine, *given} if mine.get(field) != given.get(field))
assert not changed, f"Everything else in the file stays, or the score is that of another task; you changed {changed}"

# %% mistake="asks Jinja for JSON" of="task-file" says="character for character"
task_yaml = (
    broken_yaml.replace("{{ triage }}", "{{ triage | tojson }}")
    .replace('}} "', '}}"')
    .replace('"}"]', '"\\n"]')
    .replace("fewshot_split: test", "fewshot_split: train")
)

# %% mistake="keeps the dictionary" of="task-file" says="Python's spelling of a dictionary"
task_yaml = (
    broken_yaml.replace('}} "', '}}"').replace('"}"]', '"\\n"]').replace("fewshot_split: test", "fewshot_split: train")
)

# %% mistake="overlooks the space" of="task-file" says="The prompt ends in white space"
task_yaml = (
    broken_yaml.replace("{{ triage }}", "{{ answer }}")
    .replace('"}"]', '"\\n"]')
    .replace("fewshot_split: test", "fewshot_split: train")
)

# %% mistake="stops at the brace" of="task-file" says="cut a right answer"
task_yaml = (
    broken_yaml.replace("{{ triage }}", "{{ answer }}")
    .replace('}} "', '}}"')
    .replace("fewshot_split: test", "fewshot_split: train")
)

# %% mistake="evaluates the training split" of="task-file" says="The test split must be evaluated"
task_yaml = (
    broken_yaml.replace("{{ triage }}", "{{ answer }}")
    .replace('}} "', '}}"')
    .replace('"}"]', '"\\n"]')
    .replace("_split: test", "_split: train")
)

# %% mistake="counts closing braces, and samples" of="task-file" says="the score is that of another task"
task_yaml = (
    broken_yaml.replace("fewshot_split: test", "fewshot_split: train")
    .replace("{{ text }} ", "{{ text }}")
    .replace("{{ triage }}", "{{ answer }}")
    .replace('["}"], do_sample: false', '["\\n"], do_sample: true')
)

# %% alternative="edits the parsed file" of="task-file"
task = yaml.safe_load(broken_yaml)
task["fewshot_split"] = task["training_split"]
task["doc_to_text"] = "{{ text | trim }}"
task["doc_to_target"] = (
    '{"product": {% if triage.product %}"{{ triage.product }}"{% else %}null{% endif %}, "category": '
    '"{{ triage.category }}", "urgency": "{{ triage.urgency }}", "action": "{{ triage.action }}"}'
)
task["generation_kwargs"]["until"] = ["\n\n", "\n"]
task_yaml = yaml.safe_dump(task)

# %% [markdown]
# The proof on our documents: through the model's chat template, the task's prompts are the very token ids that `labkit.triage` trains on, and a two-shot context reads as it should.

# %%
task = read_task(task_yaml)
same = 0
for document, example in zip(documents, triage.encode(tokenizer, tests[0]), strict=True):
    prompt, target = render(task, document)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = (
        tokenizer(chat, add_special_tokens=False)["input_ids"]
        + tokenizer(target, add_special_tokens=False)["input_ids"]
    )
    same += ids == [*example.prompt, *example.answer[:-1]]  # the last token of an answer ends the text
print(f"{same} of {len(documents)} documents give the token ids of the training code")
examples = [render(task, as_document(ticket)) for ticket in worlds[0].tickets(task["num_fewshot"], part="train")]
shots = "".join(f"{prompt}{task['target_delimiter']}{target}\n\n" for prompt, target in examples)
print("without a chat template, the model would read:\n\n" + shots + render(task, documents[0])[0])

# %% [markdown]
# The last print shows a weakness that no exact check sees: with `target_delimiter: ""`, right for a chat template, the plain few-shot prompt runs text and JSON together. One file is one way of asking. State which, and compare scores only from the same file and the same version of it (`metadata.version`).

# %% [markdown]
# ## The test set in the training set
#
# Contamination is rarely a copied file. Tickets were exported twice, with the mail's signature or without; somebody typed one off a screen; a web page quotes three of them. To know what a detector is worth, you plant leaks yourself: 32 of the test tickets go into the training texts, a quarter each as an exact copy, *retyped* (lower case, no punctuation), with *slips* of the fingers, and *quoted* inside a longer page.


# %%
LEAKS = ("copy", "retyped", "slips", "quoted")


class Planted(NamedTuple):
    """Texts to train on and to test on; for each of the latter what was done with it (one of LEAKS, or "clean") and
    which training text it became (-1: none)."""

    train: list[str]
    test: list[str]
    kind: np.ndarray
    became: np.ndarray


def slip(word: str, rng: np.random.Generator) -> str:
    """The word with two letters swapped, one dropped, or one doubled."""
    at, how = rng.integers(len(word) - 1), rng.integers(3)
    return word[:at] + (word[at + 1] + word[at], "", 2 * word[at])[how] + word[at + (2, 1, 1)[how] :]


def leaked(text: str, kind: str, page: Sequence[str], rng: np.random.Generator) -> str:
    """The text as it turns up in training data."""
    if kind == "retyped":
        return re.sub(r"[^\w ]", "", text).lower()
    if kind == "slips":
        words = text.split()
        long = [at for at, word in enumerate(words) if len(word) > 3]
        for at in {int(rng.choice(long)), *(at for at in long if rng.random() < 0.15)}:  # at least one
            words[at] = slip(words[at], rng)
        return " ".join(words)
    return f"Page 3 of the export\n\n{page[0]}\n\n{text}\n\n{page[1]}" if kind == "quoted" else text


def plant(run: int, leaks: int = 32) -> Planted:
    """Training and test texts of the run's company, with planted leaks; the same run gives the same texts."""
    rng = np.random.default_rng([seed, run, 1])
    train = [ticket.text for ticket in worlds[run].tickets(480, part="train")]
    test = [ticket.text for ticket in tests[run]]
    pages = [ticket.text for ticket in worlds[run].tickets(480 + 2 * leaks, part="train")[480:]]
    kind, became = np.full(len(test), "clean", dtype=object), np.full(len(test), -1)
    for place, which in enumerate(rng.permutation(len(test))[:leaks]):
        kind[which], became[which] = LEAKS[place % len(LEAKS)], len(train)
        train.append(leaked(test[which], kind[which], pages[2 * place : 2 * place + 2], rng))
    return Planted(train, test, kind, became)


def normalised(text: str) -> str:
    """Lower case, with everything but letters and digits as single spaces."""
    return " ".join(re.findall(r"\w+", text.lower()))


def shingles(text: str, n: int = 5) -> set[str]:
    """The character n-grams of the normalised text; a shorter text is one shingle."""
    flat = normalised(text)
    return {flat[at : at + n] for at in range(max(1, len(flat) - n + 1))}


planted = plant(0)
for kind in ("clean", *LEAKS):
    print(f"{kind:8} {planted.test[int(np.flatnonzero(planted.kind == kind)[0])]}")
with_slips = planted.train[planted.became[planted.kind == "slips"][0]]
print("\nas leaked with slips:", with_slips, "\nsome of its shingles:", sorted(shingles(with_slips))[:6])

# %% [markdown]
# Cut each text into *shingles*, its overlapping character n-grams; a slip of the finger spoils five shingles of a hundred. With $T$ the set of shingles of a test text and $D$ that of a training text, there are two measures (Broder, 1997):
#
# $$\text{containment } \frac{|T \cap D|}{|T|}, \qquad \text{Jaccard similarity } J = \frac{|T \cap D|}{|T \cup D|}.$$
#
# Contamination asks whether the test text stands *in* the training text, so it is the containment that counts. And it must be taken for one training text at a time: pooled over all of them, every phrase of a test ticket occurs somewhere.
#
# **Exercise.** Two functions.
#
# 1. `overlap(test, train)` takes two lists of shingle sets and returns an array of shape `(len(test), len(train))`: the share of test text $i$'s shingles that training text $j$ holds; 0 for an empty test set. With `test = [{"a", "b"}]` and `train = [{"a"}, {"a", "b", "c", "d"}]` it is `[[0.5, 1.0]]`. No texts on one side: an array with a dimension of 0.
# 2. `precision_recall(flagged, planted)` takes two boolean arrays `(n,)` and returns two floats: the share of flagged texts that are planted, and the share of planted texts that are flagged. Nothing flagged: precision 1.0. Nothing planted: recall 1.0.
#
# *About 8 lines.*
#
# <details><summary>Hint 1</summary>A ticket quoted on a long page shares all of its shingles with the page, but the page shares few of its own. By what do you divide?</details>
# <details><summary>Hint 2</summary><code>len(a &amp; b)</code> is the size of an intersection. For the second function, <code>flagged &amp; planted</code> are the hits; divide their number by two different things.</details>
# <details><summary>Hint 3</summary>Fill <code>np.zeros((len(test), len(train)))</code> in two loops, skipping empty test sets. <code>hits / flagged.sum()</code> is precision, <code>hits / planted.sum()</code> recall.</details>


# %% exercise="find-leaks" difficulty=2 minutes=10
def overlap(test: Sequence[set[str]], train: Sequence[set[str]]) -> np.ndarray:
    """Return the share of each test set that each training set holds, (len(test), len(train))."""
    ### BEGIN SOLUTION
    held = np.zeros((len(test), len(train)))
    for row, wanted in enumerate(test):
        if wanted:
            held[row] = [len(wanted & text) / len(wanted) for text in train]
    return held
    ### END SOLUTION


def precision_recall(flagged: np.ndarray, planted: np.ndarray) -> tuple[float, float]:
    """Return precision and recall of boolean flags (n,) against the planted ones (n,)."""
    ### BEGIN SOLUTION
    hits = np.sum(flagged & planted)
    precision = hits / flagged.sum() if flagged.any() else 1.0
    recall = hits / planted.sum() if planted.any() else 1.0
    return float(precision), float(recall)
    ### END SOLUTION


# %% check="find-leaks" points=2
first, second = {"a", "b"}, {"b", "c"}
overlap([first], [second])
assert (first, second) == ({"a", "b"}, {"b", "c"}), (
    "Your function changed a set it was given: use t & d, which makes a new set, not t &= d or t.intersection_update(d)"
)
got = np.asarray(overlap([{"a", "b"}, {"c"}], [{"a"}, {"a", "b", "c", "d"}, set()]))
assert got.shape == (2, 3), (
    f"Two test sets and three training sets give shape (2, 3), one row a test set; yours is {got.shape}"
)
assert abs(got[0, 1] - 0.5) > 1e-9, (
    "A test text quoted inside a longer one must have overlap 1: divide by the size of the test set, not of the union "
    "or of the training text"
)
assert not (got[0] == 1).all(), "Compare with one training text at a time: pooled, every phrase occurs somewhere"
assert np.allclose(got, [[0.5, 1, 0], [0, 1, 0]]), f"Expected [[0.5, 1, 0], [0, 1, 0]]; yours is {got.tolist()}"
got = np.asarray(overlap([set(), {"a"}], [{"a"}]))
assert np.allclose(got, [[0], [1]]), (
    f"An empty test set has overlap 0, without an error or a nan; yours is {got.tolist()}"
)
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(3)
for _rows, _columns in ((1, 1), (4, 7), (3, 0), (0, 2)):
    _test, _train = (
        [set(_rng.integers(0, 12, _rng.integers(0, 9)).tolist()) for _ in range(m)] for m in (_rows, _columns)
    )
    _got = np.asarray(overlap(_test, _train))
    assert _got.shape == (_rows, _columns), f"{_rows} test and {_columns} training sets: shape {_got.shape}"
    for _i, _t in enumerate(_test):
        for _j, _d in enumerate(_train):
            _want = sum(s in _d for s in _t) / max(1, len(_t))
            assert abs(_got[_i, _j] - _want) < 1e-9, f"{_t} in {_d}: {_want}, yours is {_got[_i, _j]}"
### END HIDDEN TESTS

# %% check="find-leaks" points=1
flags, plants = np.array([True, True, True, False, False]), np.array([True, False, False, True, False])
got = precision_recall(flags, plants)
assert not np.allclose(got, (1 / 2, 1 / 3)), "Precision and recall are swapped: precision is the share of the flagged"
assert np.allclose(got, (1 / 3, 1 / 2)), (
    f"1 of 3 flagged is planted, 1 of 2 planted is flagged: (1/3, 1/2); yours is {got}"
)
none = np.zeros(5, dtype=bool)
with np.errstate(all="ignore"):
    try:
        empty = [*precision_recall(none, plants), *precision_recall(flags, none)]
    except ZeroDivisionError:
        empty = [math.nan] * 4
assert np.allclose(empty, [1, 0, 0, 1]), (
    f"Nothing flagged: precision 1 and recall 0. Nothing planted: precision 0 and recall 1. Yours: {empty}"
)
### BEGIN HIDDEN TESTS
for _n in (1, 2, 50):
    _flags, _plants = (np.random.default_rng([_n, part]).random(_n) < 0.5 for part in (0, 1))
    _both = sum(bool(f and p) for f, p in zip(_flags, _plants, strict=True))
    _want = (
        _both / int(_flags.sum()) if int(_flags.sum()) else 1.0,
        _both / int(_plants.sum()) if int(_plants.sum()) else 1.0,
    )
    assert np.allclose(precision_recall(_flags, _plants), _want), f"{_n} texts: {_want}"
### END HIDDEN TESTS


# %% mistake="divides by the union" of="find-leaks" says="divide by the size of the test set"
def overlap(test, train):
    return np.array([[len(t & d) / max(1, len(t | d)) for d in train] for t in test])


def precision_recall(flagged, planted):
    hits = np.sum(flagged & planted)
    return hits / flagged.sum() if flagged.any() else 1.0, hits / planted.sum() if planted.any() else 1.0


# %% mistake="intersects in place" of="find-leaks" says="changed a set it was given"
def overlap(test, train):
    shares = np.zeros((len(test), len(train)))
    for i, wanted in enumerate(test):
        size = max(1, len(wanted))
        for j, held in enumerate(train):
            wanted &= held
            shares[i, j] = len(wanted) / size
    return shares


def precision_recall(flagged, planted):
    hits = np.sum(flagged & planted)
    return hits / flagged.sum() if flagged.any() else 1.0, hits / planted.sum() if planted.any() else 1.0


# %% mistake="pools the training texts" of="find-leaks" says="pooled, every phrase occurs somewhere"
def overlap(test, train):
    pool = set().union(*train)
    return np.array([[len(t & pool) / max(1, len(t))] * len(train) for t in test])


def precision_recall(flagged, planted):
    hits = np.sum(flagged & planted)
    return hits / flagged.sum() if flagged.any() else 1.0, hits / planted.sum() if planted.any() else 1.0


# %% mistake="one row a training text" of="find-leaks" says="one row a test set"
def overlap(test, train):
    return np.array([[len(t & d) / max(1, len(t)) for t in test] for d in train])


def precision_recall(flagged, planted):
    hits = np.sum(flagged & planted)
    return hits / flagged.sum() if flagged.any() else 1.0, hits / planted.sum() if planted.any() else 1.0


# %% mistake="swaps precision and recall" of="find-leaks" says="Precision and recall are swapped"
def overlap(test, train):
    held = np.zeros((len(test), len(train)))
    for i, t in enumerate(test):
        for j, d in enumerate(train):
            held[i, j] = len(t & d) / max(1, len(t))
    return held


def precision_recall(flagged, planted):
    hits = np.sum(flagged & planted)
    return hits / planted.sum() if planted.any() else 1.0, hits / flagged.sum() if flagged.any() else 1.0


# %% mistake="divides by nothing" of="find-leaks" says="Nothing flagged: precision 1"
def overlap(test, train):
    held = np.zeros((len(test), len(train)))
    for i, t in enumerate(test):
        for j, d in enumerate(train):
            held[i, j] = len(t & d) / max(1, len(t))
    return held


def precision_recall(flagged, planted):
    hits = int(np.sum(flagged & planted))
    return hits / int(flagged.sum()), hits / int(planted.sum())


# %% alternative="incidence matrices" of="find-leaks"
def overlap(test, train):
    known = {shingle: column for column, shingle in enumerate(set().union(*test, *train))}

    def incidence(texts):
        matrix = np.zeros((len(texts), len(known) + 1))
        for row, text in enumerate(texts):
            matrix[row, [known[shingle] for shingle in text]] = 1
        return matrix

    left, right = incidence(test), incidence(train)
    return left @ right.T / np.maximum(1, left.sum(axis=1, keepdims=True))


def precision_recall(flagged, planted):
    pairs = [(bool(f), bool(p)) for f, p in zip(flagged, planted, strict=True)]
    precision = [p for f, p in pairs if f] or [True]
    recall = [f for f, p in pairs if p] or [True]
    return sum(precision) / len(precision), sum(recall) / len(recall)


# %% [markdown]
# ### Four detectors
#
# Against yours stand the exact copy, the exact copy after normalising, and the rule by which GPT-3's training data were filtered: a test text is flagged when any run of 13 of its words occurs in training (Brown et al., 2020, appendix C). Your detector needs a threshold. Set on the plants it is measured on, it would be flattered; so it is set in the first company, just above the highest score of a ticket that was *not* planted, and the table comes from the other companies.


# %%
def word_grams(text: str, n: int = 13) -> set[str]:
    """The word n-grams of the normalised text."""
    words = normalised(text).split()
    return {" ".join(words[at : at + n]) for at in range(len(words) - n + 1)}


def best_overlap(planted: Planted) -> np.ndarray:
    """The highest overlap of each test text with a training text, (len(test),)."""
    return overlap([shingles(text) for text in planted.test], [shingles(text) for text in planted.train]).max(axis=1)


def by_13_grams(planted: Planted) -> np.ndarray:
    """Which test texts share a word 13-gram with the training texts, (len(test),) bool."""
    seen = set().union(*(word_grams(text) for text in planted.train))
    return np.array([bool(word_grams(text) & seen) for text in planted.test])


companies = [plant(run) for run in range(runs)]
best = [best_overlap(company) for company in companies]
threshold = best[0][companies[0].kind == "clean"].max() + 0.005
detectors: dict[str, Callable[[int], np.ndarray]] = {
    "exact copy": lambda run: np.isin(companies[run].test, companies[run].train),
    "normalised copy": lambda run: np.isin(
        [normalised(text) for text in companies[run].test], [normalised(text) for text in companies[run].train]
    ),
    "any word 13-gram": lambda run: by_13_grams(companies[run]),
    "your overlap": lambda run: best[run] >= threshold,
}
measured = range(1, runs)
kinds = np.concatenate([companies[run].kind for run in measured])
flags = {name: np.concatenate([detector(run) for run in measured]) for name, detector in detectors.items()}
rows = []
for name, flag in flags.items():
    precision, recall = precision_recall(flag, kinds != "clean")
    rows.append(
        {"detector": name, "precision": precision, "recall": recall}
        | {f"finds {kind}": flag[kinds == kind].mean() for kind in LEAKS}
    )
display(pd.DataFrame(rows).set_index("detector").style.format("{:.0%}"))

fig, ax = plt.subplots()
rng = np.random.default_rng(0)
for place, kind in enumerate(("clean", *LEAKS)):
    for company, scores in zip(companies, best, strict=True):
        part = scores[company.kind == kind]
        colour = COLOURS.before if kind == "clean" else COLOURS.wrong
        ax.plot(place + rng.uniform(-0.25, 0.25, len(part)), part, "o", ms=4, alpha=0.6, color=colour)
ax.axhline(threshold, color=COLOURS.after, lw=1.5)
direct_label(ax, 4.5, threshold, "threshold", COLOURS.after, offset=(4, -4))
ax.set_xticks(range(5), ["not planted", *LEAKS])
ax.set(xlim=(-0.5, 4.5), ylim=(0, 1.05), ylabel="best overlap with a training text")
ax.set_title(f"Each dot is a test ticket ({runs} companies)")
plt.show()

for name, key in (("exact copy", "exact"), ("any word 13-gram", "words"), ("your overlap", "overlap")):
    precision, recall = precision_recall(flags[name], kinds != "clean")
    low, high = triage.interval(flags[name][kinds != "clean"])
    card.record(f"recall_{key}", recall, low=low, high=high, format=".0%", label=f"leaks found by {name}")
    card.record(f"precision_{key}", precision, format=".0%", label=f"precision of {name}", tolerance=0.02)

# %% [markdown]
# The exact copy finds {{recall_exact}} of the leaks, the quarter that nobody touched, and never errs. The 13-gram rule finds {{recall_words}}, with a precision of {{precision_words}}: slips break long runs of words, and templates repeat such runs in innocent tickets. Yours finds {{recall_overlap}} with a precision of {{precision_overlap}}.
#
# What the figure does not show is a leak in other words. A paraphrase or a translation shares few shingles with the test item, and passes (Yang et al., 2023). Nor is every false alarm false: two customers may have written nearly the same by themselves, and whether that counts as a leak is for you to decide.
#
# With the detector you clean the training texts. `datasets` keeps the data in Arrow tables on disk, and `map` and `filter` go over them row by row, with `num_proc` in parallel:

# %%
test_sets = [shingles(text) for text in planted.test]
corpus = Dataset.from_dict({"text": planted.train})
corpus = corpus.map(lambda row: {"overlap": float(overlap(test_sets, [shingles(row["text"])]).max())})
cleaned = corpus.filter(lambda row: row["overlap"] < threshold)
print(f"{len(corpus)} training texts, {len(cleaned)} of them without a test ticket")
again = overlap(test_sets, [shingles(text) for text in cleaned["text"]])
print(f"highest overlap of a test ticket afterwards: {again.max():.2f}")

# %% [markdown]
# ## Near-duplicates at scale: MinHash
#
# You have just compared every test text with every training text. For near-duplicates within a corpus of a million texts that would be $5 \cdot 10^{11}$ comparisons. MinHash (Broder, 1997) replaces each set of shingles by a *signature* of $k$ numbers. Hash each shingle to a number $h$ in $0 \dots 2^{32}-1$, apply $k$ random permutations $\pi_i$ of that range, and keep the smallest value of each:
#
# $$m_i(S) = \min_{h \in S} \pi_i(h), \qquad \pi_i(h) = (a_i h + b_i) \bmod 2^{32}, \quad a_i \text{ odd}.$$
#
# Under a random permutation, each element of $A \cup B$ is equally likely to be the smallest, and $m_i(A) = m_i(B)$ exactly when that element lies in both. So $P(m_i(A) = m_i(B)) = J(A, B)$, and the share of agreeing positions estimates $J$ with standard error $\sqrt{J(1-J)/k}$. (Maps $ah + b$ are only close to random permutations; that is the usual price of speed. An odd $a$ makes them bijections.)
#
# To find similar pairs without comparing all, cut the signature into $b$ *bands* of $r$ *rows*; two texts are **candidates** when they agree in all rows of at least one band. For texts of similarity $s$,
#
# $$P(\text{candidate}) = 1 - (1 - s^r)^b,$$
#
# an S-shaped curve in $s$ whose steep part $b$ and $r$ place where you want it (Leskovec, Rajaraman and Ullman, *Mining of Massive Datasets*, section 3.4).


# %%
def hash32(texts: set[str]) -> np.ndarray:
    """32-bit hashes of shingles, (s,) uint32: SHA-1, then MurmurHash3's finaliser, as datasketch prepares its input."""
    h = np.array([sha1_hash32(text.encode()) for text in sorted(texts)], dtype=np.uint32)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def permutations(k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The multipliers (odd) and offsets of k permutations, each (k,) uint32."""
    rng = np.random.default_rng(seed)
    a = rng.integers(2**31, size=k, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return a, rng.integers(2**32, size=k, dtype=np.uint32)


# %% [markdown]
# **Exercise.** Three small functions and a choice.
#
# 1. `signature(hashes, a, b)`: the signature of a set, from its hashes `(s,)` and the multipliers and offsets `(k,)`, all `uint32`. Returns `(k,)` `uint32`; for the empty set ($s = 0$) all entries are $2^{32}-1$. With `hashes = [2, 10]`, `a = [1, 3]`, `b = [0, 5]` it is `[2, 11]`; with `hashes = [3]`, `a = [2147483649]`, `b = [0]` it is `[2147483651]`, since $3 \cdot (2^{31}+1) \bmod 2^{32} = 2^{31}+3$. (NumPy's `uint32` arrays wrap around by themselves.)
# 2. `estimate(first, second)`: the Jaccard similarity estimated from two signatures `(k,)`, a float.
# 3. `candidate_probability(similarity, bands, rows)`: the formula above; `similarity` is a number or an array.
# 4. `bands` and `rows`, with at most 128 permutations in all (`bands * rows <= 128`): near-copies with $s = 0.7$ are candidates with probability 0.9 or more, and pairs with $s = 0.4$, of which templated tickets have many, with 0.1 or less.
#
# *About 7 lines.*
#
# <details><summary>Hint 1</summary>Which axis of a table "permutation by shingle" does the minimum go over? For the choice: more rows make a band harder to match, more bands give more chances.</details>
# <details><summary>Hint 2</summary><code>a[:, None] * hashes + b[:, None]</code> has shape <code>(k, s)</code>. The minimum of an empty axis is an error unless you give <code>initial</code>. Positions are compared one by one, not as sets.</details>
# <details><summary>Hint 3</summary><code>.min(axis=1, initial=2**32 - 1)</code>; <code>np.mean(first == second)</code>. For the choice, go over the rows 4, 5, 6, 7 with as many bands as 128 allows, and print both probabilities.</details>


# %% exercise="minhash" difficulty=3 minutes=14
def signature(hashes: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the MinHash signature (k,) uint32 of the hashes (s,) under k permutations a, b (k,), all uint32."""
    ### BEGIN SOLUTION
    return (a[:, None] * hashes + b[:, None]).min(axis=1, initial=np.uint32(2**32 - 1))
    ### END SOLUTION


def estimate(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Jaccard similarity estimated from two signatures, both (k,)."""
    ### BEGIN SOLUTION
    return float(np.mean(first == second))
    ### END SOLUTION


def candidate_probability(similarity: float | np.ndarray, bands: int, rows: int) -> float | np.ndarray:
    """Return the probability that two sets of this similarity agree in at least one band."""
    ### BEGIN SOLUTION
    return 1 - (1 - similarity**rows) ** bands
    ### END SOLUTION


bands = rows = None
### BEGIN SOLUTION
bands, rows = 21, 6
### END SOLUTION


# %% check="minhash" points=2
def u32(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.uint32)


got = np.asarray(signature(u32(2, 10), u32(1, 3), u32(0, 5)))
assert got.shape == (2,), (
    f"Two permutations give a signature of 2 numbers: the minimum goes over shingles; shape {got.shape}"
)
assert got.tolist() == [2, 11], f"Minimum of (2, 10), and of (11, 35): [2, 11]; yours is {got.tolist()}"
got = np.asarray(signature(u32(1, 2**31), u32(3), u32(2**31)))
assert got.tolist() == [0], (
    f"3 · 2^31 + 2^31 is 0 modulo 2^32, the smallest; yours is {got.tolist()}: without the modulus nothing is permuted, "
    "the smallest hash wins every time"
)
got = np.asarray(signature(u32(), u32(1, 3), u32(0, 5)))
assert got.tolist() == [2**32 - 1] * 2, (
    f"The empty set has the largest number everywhere, 2^32 - 1; yours is {got.tolist()}"
)
### BEGIN HIDDEN TESTS
for _s, _k in ((1, 1), (5, 3), (40, 17), (0, 4)):
    _h = np.random.default_rng([_s, _k]).integers(2**32, size=_s, dtype=np.uint32)
    _a, _b = permutations(_k, _s)
    _kept = _h.copy()
    _want = [
        min(((x * y + z) % 2**32 for x in _h.tolist()), default=2**32 - 1)
        for y, z in zip(_a.tolist(), _b.tolist(), strict=True)
    ]
    _got = np.asarray(signature(_h, _a, _b))
    assert _got.tolist() == _want, f"{_s} shingles, {_k} permutations: the signature differs from its definition"
    assert np.array_equal(_h, _kept), "The hashes were changed in place"
_theirs = MinHash(num_perm=32, permutations=permutations(32, 9), scheme="affine32")
_theirs.update_batch([b"abc", b"bcd", b"cde"])
_ours = np.asarray(signature(hash32({"abc", "bcd", "cde"}), *permutations(32, 9)))
assert np.array_equal(_ours, _theirs.hashvalues), "Your signature differs from datasketch's with the same permutations"
### END HIDDEN TESTS

# %% check="minhash" points=1
assert abs(estimate(u32(1, 2, 3, 4), u32(2, 1, 4, 3))) < 1e-9, (
    "No position agrees, so the estimate is 0: compare position by position, not as sets"
)
got = estimate(u32(1, 2, 3, 4), u32(1, 2, 3, 9))
assert abs(got - 3 / 5) > 1e-9, "Divide by the number of positions k, not by the size of a union"
assert abs(got - 3 / 4) < 1e-9, f"3 of 4 positions agree, so 0.75; yours is {got}"
### BEGIN HIDDEN TESTS
assert abs(estimate(u32(5), u32(5)) - 1) < 1e-9, "Equal signatures: 1"
assert abs(estimate(u32(7, 7, 7), u32(7, 8, 7)) - 2 / 3) < 1e-9, "2 of 3 positions agree"
### END HIDDEN TESTS

# %% check="minhash" points=1
got = candidate_probability(0.5, 2, 1)
assert abs(got - 0.25) > 1e-9, "Bands and rows are swapped: all rows of a band must agree, and one band is enough"
assert abs(got - 0.75) < 1e-9, f"Two bands of one row at s = 0.5: 1 - 0.5 · 0.5 = 0.75; yours is {got}"
try:
    got = candidate_probability(np.array([0.0, 0.5, 1.0]), 3, 2)
except (TypeError, ValueError):
    got = math.nan
assert np.allclose(got, [0, 1 - 0.75**3, 1]), (
    "candidate_probability must take an array of similarities: 0, 0.578 and 1 for 0, 0.5 and 1 with 3 bands of 2 rows"
)

# %% check="minhash" points=1
assert all(isinstance(number, int | np.integer) for number in (bands, rows)), (
    f"Choose bands and rows, two whole numbers; yours are {bands!r} and {rows!r}"
)
assert min(bands, rows) >= 1, f"At least one band and one row; yours are {bands} and {rows}"
assert bands * rows <= 128, f"{bands} bands of {rows} rows need {bands * rows} permutations; there are 128"
near, far = (1 - math.exp(bands * math.log1p(-math.pow(s, rows))) for s in (0.7, 0.4))
assert near >= 0.9, (
    f"Near-copies are missed: at s = 0.7, {near:.0%} are candidates, not 90%. Use fewer rows or more bands"
)
assert far <= 0.1, (
    f"Too many false candidates: at s = 0.4, {far:.0%} of the pairs, not 10%. Use more rows or fewer bands"
)


# %% mistake="no modulus" of="minhash" says="without the modulus nothing is permuted"
def signature(hashes, a, b):
    if not len(hashes):
        return np.full(len(a), 2**32 - 1, dtype=np.uint32)
    return (a[:, None].astype(np.int64) * hashes + b[:, None]).min(axis=1)


def estimate(first, second):
    return np.mean(first == second)


def candidate_probability(similarity, bands, rows):
    return 1 - (1 - similarity**rows) ** bands


bands, rows = 20, 6


# %% mistake="minimum over the permutations" of="minhash" says="the minimum goes over shingles"
def signature(hashes, a, b):
    return (a[:, None] * hashes + b[:, None]).min()


def estimate(first, second):
    return np.mean(first == second)


def candidate_probability(similarity, bands, rows):
    return 1 - (1 - similarity**rows) ** bands


bands, rows = 20, 6


# %% mistake="compares signatures as sets" of="minhash" says="compare position by position"
def signature(hashes, a, b):
    return (a[:, None] * hashes + b[:, None]).min(axis=1, initial=2**32 - 1)


def estimate(first, second):
    return len(set(first.tolist()) & set(second.tolist())) / len(first)


def candidate_probability(similarity, bands, rows):
    return 1 - (1 - similarity**rows) ** bands


bands, rows = 20, 6


# %% mistake="swaps bands and rows" of="minhash" says="Bands and rows are swapped"
def signature(hashes, a, b):
    return (a[:, None] * hashes + b[:, None]).min(axis=1, initial=2**32 - 1)


def estimate(first, second):
    return np.mean(first == second)


def candidate_probability(similarity, bands, rows):
    return 1 - (1 - similarity**bands) ** rows


bands, rows = 20, 6


# %% mistake="bands to catch everything" of="minhash" says="Too many false candidates"
def signature(hashes, a, b):
    return (a[:, None] * hashes + b[:, None]).min(axis=1, initial=2**32 - 1)


def estimate(first, second):
    return np.mean(first == second)


def candidate_probability(similarity, bands, rows):
    return 1 - (1 - similarity**rows) ** bands


bands, rows = 32, 4


# %% mistake="the usual 16 bands of 8" of="minhash" says="Near-copies are missed"
def signature(hashes, a, b):
    return (a[:, None] * hashes + b[:, None]).min(axis=1, initial=2**32 - 1)


def estimate(first, second):
    return np.mean(first == second)


def candidate_probability(similarity, bands, rows):
    return 1 - (1 - similarity**rows) ** bands


bands, rows = 16, 8


# %% alternative="shingle by shingle, in whole numbers" of="minhash"
def signature(hashes, a, b):
    smallest = [2**32 - 1] * len(a)
    for h in np.asarray(hashes).tolist():
        smallest = [min(m, (x * h + y) & 0xFFFFFFFF) for m, x, y in zip(smallest, a.tolist(), b.tolist(), strict=True)]
    return np.array(smallest, dtype=np.uint32)


def estimate(first, second):
    return sum(int(x) == int(y) for x, y in zip(first, second, strict=True)) / len(first)


def candidate_probability(similarity, bands, rows):
    missed = 1.0
    for _ in range(bands):
        missed = missed * (1 - similarity**rows)
    return 1 - missed


bands, rows = 19, 6

# %% [markdown]
# ### Match, then measure
#
# With the same permutations, `datasketch` must give the same signature, to the bit. Then two measurements: estimates of $J$ against the truth for pairs of training texts, and how often banding finds pairs of a known similarity, each with permutations of its own.

# %%
a, b = permutations(128, seed)
train_sets = [shingles(text) for text in planted.train]
train_signatures, test_signatures = (
    np.array([signature(hash32(one), a, b) for one in sets]) for sets in (train_sets, test_sets)
)


def sketch_of(texts: set[str]) -> MinHash:
    """datasketch's MinHash of a set of shingles, with the permutations from above."""
    sketch = MinHash(num_perm=128, permutations=(a, b), scheme="affine32")
    sketch.update_batch([text.encode() for text in texts])
    return sketch


sketches = [sketch_of(one) for one in train_sets]
different = sum(int((mine != theirs.hashvalues).sum()) for mine, theirs in zip(train_signatures, sketches, strict=True))
print(f"{train_signatures.size:,} numbers, of which {different} differ from datasketch's")
card.record("datasketch_different", different, format="d", label="entries of your signatures that datasketch has not")

similarity = np.array([[len(one & other) / len(one | other) for other in train_sets] for one in test_sets])
rng = np.random.default_rng(seed)
shown = []  # up to 40 pairs of each tenth of the similarity
for low in np.arange(0, 1, 0.1):
    found = np.argwhere((similarity >= low) & (similarity < low + 0.1))
    shown += rng.permutation(found)[:40].tolist()
true_j = np.array([similarity[i, j] for i, j in shown])
estimated = np.array([estimate(test_signatures[i], train_signatures[j]) for i, j in shown])
inside = np.abs(estimated - true_j) <= 1.96 * np.sqrt(true_j * (1 - true_j) / 128)

grid = np.linspace(0, 1, 201)
levels = np.arange(0.1, 1.0, 0.1)
caught = []  # at each level, whether each of 300 pairs of sets agrees in a band
for level in levels:
    shared, alone = round(120 * level), round(120 * (1 - level) / 2)
    hits = []
    for _ in range(300):
        elements = rng.integers(2**32, size=shared + 2 * alone, dtype=np.uint32)
        maps = permutations(bands * rows, int(rng.integers(2**31)))
        one, other = (
            signature(elements[: shared + alone], *maps),
            signature(np.delete(elements, slice(shared, shared + alone)), *maps),
        )
        hits.append((one == other).reshape(bands, rows).all(axis=1).any())
    caught.append(np.array(hits))

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
error = 1.96 * np.sqrt(grid * (1 - grid) / 128)
left.fill_between(grid, grid - error, grid + error, color=COLOURS.truth, alpha=0.12, lw=0)
left.plot(grid, grid, color=COLOURS.truth, lw=1)
left.plot(true_j, estimated, "o", ms=3.5, alpha=0.5, color=COLOURS.after)
left.set(
    xlabel="true Jaccard similarity",
    ylabel="agreeing positions of 128",
    title="A signature estimates J (band: 1.96 errors)",
)
for other, place in (((32, 4), (0.36, 0.62)), ((16, 8), (0.7, 0.5))):
    right.plot(grid, candidate_probability(grid, *other), color=COLOURS.before, lw=1, ls="--")
    direct_label(
        right, *place, f"{other[0]} x {other[1]}", COLOURS.before, offset=(-42, 0) if other[0] == 32 else (8, 0)
    )
right.plot(grid, candidate_probability(grid, bands, rows), color=COLOURS.after)
shares = [part.mean() for part in caught]
bounds = [triage.interval(part) for part in caught]
intervals(right, levels, shares, [low for low, _ in bounds], [high for _, high in bounds], COLOURS.after)
for s, limit, colour in ((0.7, 0.9, COLOURS.truth), (0.4, 0.1, COLOURS.truth)):
    right.plot(s, limit, "_", ms=16, mew=2.5, color=colour)
direct_label(right, 0.7, 0.9, "at least", COLOURS.truth, offset=(-56, 2))
direct_label(right, 0.4, 0.1, "at most", COLOURS.truth, offset=(-50, 4))
right.set(xlabel="similarity s of a pair", ylabel="share that become candidates", title=f"{bands} bands of {rows} rows")
plt.show()
print(f"{inside.mean():.0%} of {len(inside)} estimates lie within 1.96 standard errors of the truth")

# %% [markdown]
# The points on the right are measured, with 95% Wilson intervals; the curve is the formula. Each dashed curve uses the same 128 permutations: 32 x 4 floods you with candidates, 16 x 8 misses a good part of the near-copies. The two short lines are the limits that you had to keep.
#
# From here on the library. `MinHashLSH` keeps a table a band; a query looks up the bands of one signature and touches nothing else.

# %%
index = MinHashLSH(num_perm=128, params=(bands, rows))
for number, sketch in enumerate(sketches):
    index.insert(number, sketch)
candidates = [set(index.query(sketch_of(one))) for one in test_sets]
rows_shown, hits = [], {}
for kind in LEAKS:
    leaks = [(int(i), int(planted.became[i])) for i in np.flatnonzero(planted.kind == kind)]
    hits[kind] = [became in candidates[i] for i, became in leaks]
    mean_j = np.mean([similarity[pair] for pair in leaks])
    rows_shown.append({"leak": kind, "Jaccard, mean": mean_j, "found": np.mean(hits[kind])})
display(pd.DataFrame(rows_shown).set_index("leak").style.format({"Jaccard, mean": "{:.2f}", "found": "{:.0%}"}))
compared = sum(map(len, candidates)) / similarity.size
print(f"pairs that are candidates: {compared:.2%} of {similarity.size:,}")
close = np.concatenate([hits[kind] for kind in LEAKS if kind != "quoted"])
low, high = triage.interval(close)
card.record(
    "lsh_recall", close.mean(), low=low, high=high, format=".0%", label="near-copies found by banding", tolerance=0.1
)
card.record("lsh_quoted", np.mean(hits["quoted"]), format=".0%", label="quoted leaks found by banding", tolerance=0.3)
card.record("lsh_pairs", compared, format=".2%", label="pairs that banding leaves to compare", tolerance=0.02)

# %% [markdown]
# Banding leaves {{lsh_pairs}} of the pairs to compare and finds {{lsh_recall}} of the near-copies, but {{lsh_quoted}} of the quoted ones: inside a long page a ticket's *Jaccard* similarity is low, and Jaccard is what MinHash estimates. Lee et al. (2022) therefore use two methods that complement each other: MinHash for near-copies of whole documents, suffix arrays for long passages that repeat. Deduplicate *before* you split: a near-copy on both sides of the split is contamination that you made yourself.

# %% [markdown]
# ## A judge and its habits
#
# For free text there is often no exact match, so a model judges: two replies, A and B, which is better? A judge is an instrument, and an instrument is compared with a standard before it is used. Here the standard are *gold* pairs, whose better reply is known: right and concise, against one that is *ungrounded* (a wrong value), *rambling*, or *rude*.
#
# The judge is the model of this lesson, trained for 160 steps of 8 such pairs from another company, with a flaw that pairs from a product's logs have as well: the better reply stood first, as A, in 75% of them. Its verdict on a prompt is read from the log-odds of its next token,
#
# $$\ell = \log p(\text{A}) - \log p(\text{B}), \qquad \text{the verdict is A when } \ell > 0, \text{ else B.}$$


# %%
class Pair(NamedTuple):
    """A prompt (a passage and a question about it) with its better and its worse reply; `group` says what they are."""

    prompt: str
    better: str
    worse: str
    group: str


class JudgeReport(NamedTuple):
    """Shares of verdicts (agreement, says_a), shares of pairs (consistency, averaged), and log-odds (position)."""

    agreement: float
    says_a: float
    consistency: float
    averaged: float
    position: float


def token_ids(text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def ask(pair: Pair, better_is_a: bool) -> tuple[int, ...]:
    """The token ids of the question which of the two replies is better."""
    a_says, b_says = (pair.better, pair.worse) if better_is_a else (pair.worse, pair.better)
    text = f"{pair.prompt}\nA: {a_says}\nB: {b_says}\nWhich reply is better?"
    message = [{"role": "user", "content": text}]
    return token_ids(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


@torch.no_grad()
def log_odds_of_a(prompts: Sequence[tuple[int, ...]]) -> np.ndarray:
    """The judge's log-odds of the verdict A, (n,); prompts of one length go together, so nothing is padded."""
    labels = [token_ids("A")[0], token_ids("B")[0]]
    found = np.zeros(len(prompts))
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for _, group in itertools.groupby(by_length, key=lambda index: len(prompts[index])):
        rows = list(group)
        ids = torch.tensor([prompts[row] for row in rows], device=model.device)
        logits = model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, -1, labels].float()
        found[rows] = (logits[:, 0] - logits[:, 1]).cpu().numpy()
    return found


def judged(pairs: Sequence[Pair]) -> np.ndarray:
    """The log-odds of the verdict A with the better reply shown as A, and as B, (2, n)."""
    return np.stack([log_odds_of_a([ask(pair, better_is_a) for pair in pairs]) for better_is_a in (True, False)])


def pairs_of(world: World, n: int) -> list[Pair]:
    """The first n preference pairs of a world."""
    return [Pair(p.prompt, p.chosen, p.rejected, p.flaw) for p in world.preferences(n)]


training_pairs = pairs_of(World(LESSON_SEEDS[seed + runs]), batch_size * judge_steps)
shown_first = np.random.default_rng([seed, 2]).random(len(training_pairs)) < 0.75
lessons = [
    triage.Example(ask(pair, bool(first)), (*token_ids("A" if first else "B"), tokenizer.eos_token_id))
    for pair, first in zip(training_pairs, shown_first, strict=True)
]
model.load_state_dict(start)
batches = triage.batches(lessons, size=batch_size, steps=judge_steps, seed=seed)
triage.train(model, batches, steps=judge_steps, learning_rate=learning_rate, label="the judge")

gold = pairs_of(World(LESSON_SEEDS[seed + runs + 1]), 150)
better_is_a, better_is_b = judged(gold)
pd.DataFrame(
    {
        "better reply": [pair.better for pair in gold],
        "worse reply": [pair.worse for pair in gold],
        "log-odds of A, better is A": better_is_a,
        "log-odds of A, better is B": better_is_b,
    }
).head(8).style.format(precision=2)

# %% [markdown]
# Each pair was shown in both orders. To see what the two columns have in common, write a judge that knows its training distribution perfectly. By Bayes' rule its log-odds are the sum of a prior, which speaks for the place, and the evidence $e$ in the two replies, which speaks for the better one (when $e > 0$) wherever it stands:
#
# $$\ell_{\text{better is A}} = \pi + e, \qquad \ell_{\text{better is B}} = \pi - e, \qquad \pi = \log\frac{0.75}{0.25} = \log 3 \approx 1.10.$$
#
# So $e$ is half the difference of the two columns, and $\pi$ half their sum. A real judge need not be additive; half the sum is then still what its verdict owes to the place.
#
# **Exercise.** Two things.
#
# 1. *Predict.* The judge is shown two *identical* replies. In what share of the cases does it say A? Put a share from 0 to 1 into `predicted_says_a`.
# 2. `judge_report(better_is_a, better_is_b)` takes two arrays `(n,)` of log-odds of the verdict *A*: with the better reply shown as A, and with it shown as B. Return `JudgeReport(agreement, says_a, consistency, averaged, position)`, five floats:
#     - `agreement`: of all $2n$ verdicts, the share that name the better reply;
#     - `says_a`: of all $2n$ verdicts, the share that are A. Without a position bias it is one half, whatever the judge knows, since each pair is shown both ways. It is also the win rate that a system would be given if it were always shown first and were just as good as its rival;
#     - `consistency`: of the $n$ pairs, the share for which both verdicts name the same *reply*, right or wrong;
#     - `averaged`: of the $n$ pairs, the share judged rightly when the log-odds *of the better reply* are averaged over the two orders; right means above 0;
#     - `position`: the mean over the pairs of half the sum, the log-odds that the judge gives to the place A.
#
# With `better_is_a = [3., 1., -1.]` and `better_is_b = [1., -2., 1.]` it is `(0.5, 0.667, 0.667, 0.667, 0.5)`: the verdicts are A, A, B, then A, B, A. *About 7 lines.*
#
# <details><summary>Hint 1</summary>A verdict is a threshold on the log-odds. With no evidence, on which side of the threshold is a judge that leans to A? And in the report: in which array does the letter A mean the better reply, in which the worse one?</details>
# <details><summary>Hint 2</summary>The log-odds of the better reply are <code>better_is_a</code> in the first order and <code>-better_is_b</code> in the second. Two orders agree on a reply when they give different letters.</details>
# <details><summary>Hint 3</summary>Let <code>first = better_is_a &gt; 0</code> and <code>second = better_is_b &gt; 0</code>, both "says A". Right are <code>first</code> and <code>~second</code>; consistent is <code>first != second</code>; averaged compares the two log-odds with each other; position is the mean of all 2n log-odds.</details>

# %% exercise="judge-report" difficulty=2 minutes=10
predicted_says_a = None
### BEGIN SOLUTION
predicted_says_a = 0.75
### END SOLUTION


def judge_report(better_is_a: np.ndarray, better_is_b: np.ndarray) -> JudgeReport:
    """Measure a judge on n pairs from its log-odds of the verdict A in both orders, each (n,)."""
    ### BEGIN SOLUTION
    first, second = better_is_a > 0, better_is_b > 0
    return JudgeReport(
        agreement=float((first.mean() + (~second).mean()) / 2),
        says_a=float((first.mean() + second.mean()) / 2),
        consistency=float(np.mean(first != second)),
        averaged=float(np.mean((better_is_a - better_is_b) / 2 > 0)),
        position=float(np.mean((better_is_a + better_is_b) / 2)),
    )
    ### END SOLUTION


# %% check="judge-report" points=1
assert predicted_says_a is not None, "Write your prediction down first: predicted_says_a = a share from 0 to 1"
assert isinstance(predicted_says_a, int | float), (
    f"A prediction is a number, such as 0.5; yours is {predicted_says_a!r}"
)
assert 0 <= predicted_says_a <= 1, f"A share lies from 0 to 1 (half is 0.5, not 50); yours is {predicted_says_a}"

# %% check="judge-report" points=2
got = judge_report(np.array([3.0, 1.0, -1.0]), np.array([1.0, -2.0, 1.0]))
assert abs(got.agreement - 4 / 6) > 1e-9, (
    "You counted A as right in both rows: in better_is_b the better reply is B, so there the verdict A is wrong"
)
assert abs(got.agreement - 3 / 6) < 1e-9, (
    f"The verdicts A, A, B on a better A, and A, B, A on a better B: 3 of 6 are right; your agreement is {got.agreement:.3f}"
)
got = judge_report(np.array([2.0, 1.0, 3.0]), np.array([1.0, 2.0, -1.0]))
assert abs(got.says_a - 1) > 1e-9, "says_a looks at the first row alone: 5 of all 6 verdicts are A"
assert abs(got.says_a - 5 / 6) < 1e-9, f"5 of 6 verdicts are A; your says_a is {got.says_a:.3f}"
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(6)
for _n in (1, 2, 33):
    _f, _s = _rng.normal(size=_n), _rng.normal(0.5, size=_n)
    _kept = _f.copy(), _s.copy()
    _got = judge_report(_f, _s)
    assert all(map(np.array_equal, (_f, _s), _kept)), (
        "You changed the log-odds in place: -x makes a new array, x *= -1 does not"
    )
    _right = sum(x > 0 for x in _f) + sum(x <= 0 for x in _s)
    _a = sum(x > 0 for x in _f) + sum(x > 0 for x in _s)
    assert abs(_got.agreement - _right / (2 * _n)) < 1e-9, (
        f"{_n} random pairs: agreement {_right / (2 * _n):.3f}, yours {_got.agreement:.3f}"
    )
    assert abs(_got.says_a - _a / (2 * _n)) < 1e-9, (
        f"{_n} random pairs: says_a {_a / (2 * _n):.3f}, yours {_got.says_a:.3f}"
    )
_got = judge_report(np.zeros(2), np.zeros(2))
assert (_got.agreement, _got.says_a) == (0.5, 0.0), (
    f"A verdict is A when its log-odds are above 0, else B: at exactly 0 it is B; yours is {_got}"
)
### END HIDDEN TESTS

# %% check="judge-report" points=2
got = judge_report(np.array([2.0, 1.0, -3.0]), np.array([1.0, 2.0, 1.0]))
assert abs(got.consistency - 2 / 3) > 1e-9, (
    "Consistent means the same reply, not the same letter: a judge that always says A is never consistent"
)
assert abs(got.consistency) > 1e-9, (
    "Consistent means the same reply twice, right or wrong: the third pair gets the worse reply in both orders"
)
assert abs(got.consistency - 1 / 3) < 1e-9, (
    f"Only the third pair gets the same reply twice; yours is {got.consistency:.3f}"
)
got = judge_report(np.array([3.0, 1.0, 1.0]), np.array([1.0, 0.5, 2.0]))
assert abs(got.averaged - 1) > 1e-9, (
    "You averaged the log-odds of A: turn the sign in better_is_b, where the better reply is B"
)
assert abs(got.averaged - 1 / 2) > 1e-9, (
    "You averaged verdicts, which are all A here: average the log-odds, which know by how much"
)
assert abs(got.averaged - 2 / 3) < 1e-9, (
    f"The better reply's log-odds average to +1, +0.25 and -0.5, so 2 of 3 are right; yours is {got.averaged:.3f}"
)
assert min(abs(got.position - 0.25), abs(got.position - 0.5)) > 1e-9, (
    "position is what the two orders share: half the sum of the two log-odds; half the difference is the evidence"
)
assert abs(got.position - 17 / 12) < 1e-9, (
    f"The half sums are 2, 0.75 and 1.5, with the mean 1.417; your position is {got.position:.3f}"
)
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(7)
for _n in (1, 2, 33):
    _f, _s = _rng.normal(0.3, size=_n), _rng.normal(0.5, size=_n)
    _got = judge_report(_f, _s)
    _same = sum((x > 0) == (y <= 0) for x, y in zip(_f, _s, strict=True)) / _n
    _mean = sum(x > y for x, y in zip(_f, _s, strict=True)) / _n
    _place = (sum(_f) + sum(_s)) / (2 * _n)
    assert abs(_got.consistency - _same) < 1e-9, (
        f"{_n} random pairs: consistency {_same:.3f}, yours {_got.consistency:.3f}"
    )
    assert abs(_got.averaged - _mean) < 1e-9, f"{_n} random pairs: averaged {_mean:.3f}, yours {_got.averaged:.3f}"
    assert abs(_got.position - _place) < 1e-9, f"{_n} random pairs: position {_place:.3f}, yours {_got.position:.3f}"
### END HIDDEN TESTS

# %% mistake="A is right in both orders" of="judge-report" says="You counted A as right in both rows"
predicted_says_a = 0.75


def judge_report(better_is_a, better_is_b):
    first, second = better_is_a > 0, better_is_b > 0
    share = (first.mean() + second.mean()) / 2
    averaged, position = np.mean(better_is_a > better_is_b), np.mean(better_is_a + better_is_b) / 2
    return JudgeReport(share, share, np.mean(first != second), averaged, position)


# %% mistake="position bias from one order" of="judge-report" says="looks at the first row alone"
predicted_says_a = 0.75


def judge_report(better_is_a, better_is_b):
    first, second = better_is_a > 0, better_is_b > 0
    agreement = (first.mean() + (~second).mean()) / 2
    averaged, position = np.mean(better_is_a > better_is_b), np.mean(better_is_a + better_is_b) / 2
    return JudgeReport(agreement, first.mean(), np.mean(first != second), averaged, position)


# %% mistake="the same letter is consistent" of="judge-report" says="the same reply, not the same letter"
predicted_says_a = 0.75


def judge_report(better_is_a, better_is_b):
    first, second = better_is_a > 0, better_is_b > 0
    agreement, says_a = (first.mean() + (~second).mean()) / 2, (first.mean() + second.mean()) / 2
    averaged, position = np.mean(better_is_a > better_is_b), np.mean(better_is_a + better_is_b) / 2
    return JudgeReport(agreement, says_a, np.mean(first == second), averaged, position)


# %% mistake="consistent only when right" of="judge-report" says="right or wrong: the third pair"
predicted_says_a = 0.75


def judge_report(better_is_a, better_is_b):
    first, second = better_is_a > 0, better_is_b > 0
    agreement, says_a = (first.mean() + (~second).mean()) / 2, (first.mean() + second.mean()) / 2
    averaged, position = np.mean(better_is_a > better_is_b), np.mean(better_is_a + better_is_b) / 2
    return JudgeReport(agreement, says_a, np.mean(first & ~second), averaged, position)


# %% mistake="averages without turning the sign" of="judge-report" says="turn the sign in better_is_b"
predicted_says_a = 0.75


def judge_report(better_is_a, better_is_b):
    first, second = better_is_a > 0, better_is_b > 0
    agreement, says_a = (first.mean() + (~second).mean()) / 2, (first.mean() + second.mean()) / 2
    half_sum = (better_is_a + better_is_b) / 2
    return JudgeReport(agreement, says_a, np.mean(first != second), np.mean(half_sum > 0), half_sum.mean())


# %% mistake="averages verdicts" of="judge-report" says="You averaged verdicts"
predicted_says_a = 0.75


def judge_report(better_is_a, better_is_b):
    first, second = better_is_a > 0, better_is_b > 0
    agreement, says_a = (first.mean() + (~second).mean()) / 2, (first.mean() + second.mean()) / 2
    votes = first.astype(float) + (~second).astype(float)
    position = np.mean(better_is_a + better_is_b) / 2
    return JudgeReport(agreement, says_a, np.mean(first != second), np.mean(votes / 2), position)


# %% mistake="the evidence for the position" of="judge-report" says="half the difference is the evidence"
predicted_says_a = 0.75


def judge_report(better_is_a, better_is_b):
    first, second = better_is_a > 0, better_is_b > 0
    agreement, says_a = (first.mean() + (~second).mean()) / 2, (first.mean() + second.mean()) / 2
    evidence = (better_is_a - better_is_b) / 2
    return JudgeReport(agreement, says_a, np.mean(first != second), np.mean(evidence > 0), evidence.mean())


# %% mistake="turns the sign in place" of="judge-report" says="changed the log-odds in place"
predicted_says_a = 0.75


def judge_report(better_is_a, better_is_b):
    position = np.mean(better_is_a + better_is_b) / 2
    better_is_b *= -1
    first, second = better_is_a > 0, better_is_b >= 0
    says_a = (first.mean() + (~second).mean()) / 2
    agreement = (first.mean() + second.mean()) / 2
    return JudgeReport(agreement, says_a, np.mean(first == second), np.mean(better_is_a + better_is_b > 0), position)


# %% mistake="predicts in percent" of="judge-report" says="half is 0.5, not 50"
predicted_says_a = 75


def judge_report(better_is_a, better_is_b):
    first, second = better_is_a > 0, better_is_b > 0
    agreement, says_a = (first.mean() + (~second).mean()) / 2, (first.mean() + second.mean()) / 2
    averaged, position = np.mean(better_is_a > better_is_b), np.mean(better_is_a + better_is_b) / 2
    return JudgeReport(agreement, says_a, np.mean(first != second), averaged, position)


# %% alternative="signed margins and probabilities" of="judge-report"
predicted_says_a = 1


def judge_report(better_is_a, better_is_b):
    letters = np.stack([better_is_a, better_is_b]) > 0
    right = letters == np.array([[True], [False]])
    for_better = (1 / (1 + np.exp(-better_is_a)) + 1 - 1 / (1 + np.exp(-better_is_b))) / 2
    return JudgeReport(
        float(right.mean()),
        float(letters.mean()),
        float((right[0] == right[1]).mean()),
        float((for_better > 0.5).mean()),
        float(np.concatenate([better_is_a, better_is_b]).mean()),
    )


# %% [markdown]
# ### Position and length
#
# Three kinds of *probe* say more than the gold pairs do. Two **identical** replies hold no evidence, so what the judge says of them is the place alone. And wherever the gold pairs differ much in length, the better reply is the shorter one: rambling and rudeness add words. A judge trained on such pairs cannot tell "better" from "shorter". So filler is added to the wrong value (**worse is longer**), or to the right one (**better is longer**).

# %%
FILLER = "There are many sides to this, and all of them matter."
ungrounded = [pair for pair in gold if pair.group == "ungrounded"]


def longer(reply: str, words: int) -> str:
    """The reply, and after it that many words that say nothing."""
    return " ".join([reply, *FILLER.split()[:words]])


probes = [
    *(Pair(p.prompt, p.better, p.better, "identical") for p in gold[:60]),
    *(Pair(p.prompt, p.better, longer(p.worse, 11), "worse is longer") for p in ungrounded),
    *(Pair(p.prompt, longer(p.better, 11), p.worse, "better is longer") for p in ungrounded),
]
log_odds = np.concatenate([[better_is_a, better_is_b], judged(probes)], axis=1)
group_of = np.array([pair.group for pair in [*gold, *probes]])
groups = ["rude", "rambling", "ungrounded", "worse is longer", "better is longer"]
reports = {group: judge_report(*log_odds[:, group_of == group]) for group in (*groups, "identical")}
whole = judge_report(better_is_a, better_is_b)
table = pd.DataFrame(
    {"all gold pairs": whole._asdict()} | {group: report._asdict() for group, report in reports.items()}
).T
table.loc["identical", ["agreement", "consistency", "averaged"]] = math.nan  # neither reply is the better one
table.columns = [*table.columns[:-1], "position / log-odds"]
formats = {**dict.fromkeys(table.columns, "{:.0%}"), "position / log-odds": "{:+.2f}"}
display(table.style.format(formats, na_rep=""))
compare([("says A of identical replies", predicted_says_a, reports["identical"].says_a)], format=".0%")

ladder = (0, 1, 2, 4, 8, 11)
steps_up = [judged([Pair(p.prompt, p.better, longer(p.better, words), "") for p in gold[:60]]) for words in ladder]

fig, (left, right_side) = plt.subplots(1, 2, figsize=(11.5, 4.2), width_ratios=(1.35, 1))
for place, group in enumerate(groups):
    first, second = log_odds[:, group_of == group]
    for shift, right, colour in (
        (-0.22, first > 0, COLOURS.before),
        (0.0, second <= 0, COLOURS.other),
        (0.22, first > second, COLOURS.after),
    ):
        low, high = triage.interval(right)
        intervals(left, [place + shift], [right.mean()], [low], [high], colour)
for x, name, colour in (
    (-0.4, "better is A", COLOURS.before),
    (1.0, "better is B", COLOURS.other),
    (2.4, "log-odds of both, averaged", COLOURS.after),
):
    direct_label(left, x, 1.1, name, colour, offset=(0, 0))
left.axhline(0.5, color=COLOURS.truth, lw=1, ls="--")
direct_label(left, -0.45, 0.5, "a coin", COLOURS.truth, offset=(0, 4))
left.set_xticks(range(len(groups)), [group.replace(" is ", "\nis ") for group in groups])
left.set(xlim=(-0.5, len(groups) - 0.5), ylim=(-0.05, 1.22), ylabel="share judged rightly")
left.set_yticks(np.arange(0, 1.1, 0.25))
left.set_title("Verdicts by kind of pair (95% Wilson intervals)")
for row, name, colour in ((0, "shorter is A", COLOURS.before), (1, "shorter is B", COLOURS.other)):
    middle = np.array([part[row].mean() for part in steps_up])
    half = np.array([1.96 * part[row].std(ddof=1) / len(part[row]) ** 0.5 for part in steps_up])
    right_side.fill_between(ladder, middle - half, middle + half, color=colour, alpha=0.18, lw=0)
    right_side.plot(ladder, middle, "o-", color=colour, ms=5, label=name)
right_side.axhline(0, color=COLOURS.truth, lw=1)
right_side.axhline(math.log(3), color=COLOURS.truth, lw=1, ls="--")
direct_label(right_side, ladder[-1], math.log(3), "log 3", COLOURS.truth, offset=(-36, 4))
right_side.set(xlabel="words that the longer reply adds", ylabel="log-odds of the verdict A")
right_side.set_title("Two right replies, one longer")
label_lines(right_side)
plt.show()

masks = {group: group_of == group for group in reports}
for name, value, right, label in (
    (
        "judge_agreement",
        whole.agreement,
        np.concatenate([better_is_a > 0, better_is_b <= 0]),
        "verdicts for the better reply",
    ),
    ("judge_averaged", whole.averaged, better_is_a > better_is_b, "the same, averaged over both orders"),
    *(
        (f"judge_{key}", reports[group].averaged, np.greater(*log_odds[:, masks[group]]), f"averaged, {group}")
        for key, group in (
            ("better_longer", "better is longer"),
            ("worse_longer", "worse is longer"),
            ("ungrounded", "ungrounded"),
            ("rude", "rude"),
            ("rambling", "rambling"),
        )
    ),
):
    low, high = triage.interval(right)
    card.record(name, value, low=low, high=high, format=".0%", label=label, tolerance=0.2)
for name, value, label in (
    ("judge_single", reports["ungrounded"].agreement, "single verdicts, ungrounded"),
    ("judge_consistency", whole.consistency, "pairs with the same reply preferred in both orders"),
    ("judge_says_a", reports["ungrounded"].says_a, "verdicts A, where the worse reply is wrong"),
    ("judge_identical", reports["identical"].says_a, "verdicts A on identical replies"),
):
    card.record(name, value, format=".0%", label=label, tolerance=0.4)
card.record(
    "judge_position",
    reports["identical"].position,
    format=".2f",
    label="log-odds of A on identical replies",
    tolerance=1.5,
)

# %% [markdown]
# **Position.** Of two identical replies the judge calls A the better one in {{judge_identical}} of the cases, with log-odds of {{judge_position}} where its training data hold log 3 = 1.10. A threshold turns every leaning into a decision: what a calibrated judge believes at 75%, its verdict says at 100%. Where the evidence is weak the place decides: of the verdicts on right against wrong values {{judge_says_a}} are A, so a system that is always shown first, and is right exactly as often as its rival, is given that win rate. Over all gold pairs, {{judge_consistency}} are judged the same way in both orders.
#
# **What averaging mends.** Half the difference of the log-odds is free of the place; that is why both orders are asked and averaged (Wang et al., 2023). On right against wrong values {{judge_single}} of the single verdicts agree with gold, and {{judge_ungrounded}} ({{judge_ungrounded:interval}}) of the averaged ones, where a coin has 50%: what the judge knows and the place had drowned comes back, and nothing more. On rude replies the averaged judge is right in {{judge_rude}}, on rambling ones in {{judge_rambling}}. One number for all, {{judge_agreement}} single and {{judge_averaged}} averaged, does not tell which kind of pair you have. (Each pair being shown in both orders, chance agreement is one half, so Cohen's kappa of the single verdicts is twice their agreement minus one.)
#
# **Length.** Averaging mends no habit that both orders share. When the worse reply is the longer one, the averaged judge is right in {{judge_worse_longer}} of the pairs; when the better one is, in {{judge_better_longer}}. On the right of the figure both replies are right: the two curves part as one of them grows, and where the lower one crosses zero the added words outweigh the place. That is what its training data said of every pair of clearly different lengths; judges that learnt from people tend to the opposite (Zheng et al., 2023; Dubois et al., 2024). Only pairs in which length and quality point in different directions show it.
#
# In practice: ask in both orders and average the log-odds, or, where an API returns the letter alone, count a tie when the orders disagree; report agreement with gold labels *by kind of pair*; keep a set of identical pairs as a blank sample; and report how often the judge prefers the longer reply beside how often the longer reply is better.
#
# What this does not show: where a large judge's position bias comes from. Here the 75% were put into the data, so that there is a right answer to compare with.

# %% [markdown]
# ## Few clean labels or many noisy ones
#
# You have 48 dollars for triage labels, and two offers. An *expert's* label costs 0.50 dollars and is right. A *crowd worker's* costs 0.10 dollars, and each of its four fields is wrong with a chance of 20%, by a value drawn from the others. Several workers may label one ticket, independently; then each field gets the value that most of them gave, the first one's on a tie (Sheng, Provost and Ipeirotis, 2008, ask when that is better than another ticket). Whatever you buy, the model is trained for the same number of steps, 60 of 8 tickets, so that few tickets are seen several times and many once.


# %%
class Purchase(NamedTuple):
    """How many tickets experts label, how many others the crowd does, and how many workers each of those."""

    experts: int
    crowd: int
    votes: int = 1


def price(purchase: Purchase) -> float:
    """What a purchase costs, in dollars."""
    return 0.50 * purchase.experts + 0.10 * purchase.crowd * purchase.votes


def worker_says(right: Triage, products: Sequence[str], rng: np.random.Generator) -> Triage:
    """A crowd worker's label: each field is wrong with the chance `label_noise`."""
    options = {"product": (*products, None), "category": CATEGORIES, "urgency": URGENCIES, "action": ACTIONS}
    said = {}
    for field, values in options.items():
        others = [value for value in values if value != getattr(right, field)]
        said[field] = others[rng.integers(len(others))] if rng.random() < label_noise else getattr(right, field)
    return Triage(**said)


def majority(labels: Sequence[Triage]) -> Triage:
    """In each field the value that most labels have; on a tie the one that came first."""
    return Triage(*(Counter(getattr(label, field) for label in labels).most_common(1)[0][0] for field in triage.FIELDS))


def buy(purchase: Purchase, run: int) -> list[Ticket]:
    """The labelled tickets of a purchase in the run's company: the experts' first, then the crowd's."""
    tickets = worlds[run].tickets(purchase.experts + purchase.crowd, part="train")
    rng, products = np.random.default_rng([seed, run, 3]), worlds[run].entities["product"]
    return tickets[: purchase.experts] + [
        Ticket(t.id, t.text, majority([worker_says(t.triage, products, rng) for _ in range(purchase.votes)]))
        for t in tickets[purchase.experts :]
    ]


said_and_true = zip(buy(Purchase(0, 480), 0), worlds[0].tickets(480, part="train"), strict=True)
mistaken = [(said, true) for said, true in said_and_true if said.triage != true.triage]
print(f"{len(mistaken)} of 480 tickets come back from one worker with an error; three of them:")
for said, true in mistaken[:3]:
    print(f"{true.text}\n  crowd  {said.triage.to_json()}\n  expert {true.triage.to_json()}")

# %% [markdown]
# What you decide will be compared on the same test tickets, so the comparison is *paired* (Koehn, 2004): resample the tickets, and take for each drawn ticket the answers of *both* systems.
#
# **Exercise (decide).** Three things, before anything is trained.
#
# 1. `paired_interval(right_a, right_b, rng, resamples=2000)`: two boolean arrays `(n,)` that say which of the same $n$ tickets systems A and B answer rightly. Return `(low, high)`, the 95% percentile bootstrap interval of B's mean minus A's: draw $n$ tickets with replacement `resamples` times, with `rng` and no other source of chance, and take the 0.025 and 0.975 quantiles (`np.quantile`) of the differences. Two equal arrays give `(0.0, 0.0)`. *About 4 lines.*
# 2. `my_purchase = Purchase(experts, crowd, votes)`, three whole numbers: what you would buy. At least 8 tickets (a batch), at most 48 dollars and at least 47. Three purchases of 48 dollars are trained in any case: `Purchase(96, 0)`, experts alone; `Purchase(0, 480)`, each ticket to one worker; `Purchase(0, 96, votes=5)`, the experts' tickets to five workers each. If yours is another one, it is trained beside them (and the experiment takes a third longer).
# 3. `predicted_gain`: by how much does exact match after `Purchase(96, 0)` exceed that after `Purchase(0, 480)`? A number from -1 to 1: 0.05 for five points in favour of the experts, negative if the crowd wins.
#
# The last two are graded for being answered within their limits.
#
# <details><summary>Hint 1</summary>If the two arrays are equal, every resample must give a difference of exactly 0. Which draws must the systems share? And for the decision: how many of the tickets that you buy are right in all four fields?</details>
# <details><summary>Hint 2</summary>Draw indices <code>rng.integers(n, size=(resamples, n))</code> once, and use them for both arrays; or take the differences first and resample those. Booleans do not subtract in NumPy: convert them to float. One worker's ticket is right with a probability of 0.8 to the power of 4, or 0.41. With three votes a field can only be wrong when two workers are, so with a probability of at most 0.10.</details>
# <details><summary>Hint 3</summary><code>gaps = right_b.astype(float) - right_a.astype(float)</code>; index it with the drawn indices, take the mean along the last axis, and the two quantiles of those means.</details>


# %% exercise="clean-or-noisy" difficulty=3 minutes=10
def paired_interval(
    right_a: np.ndarray, right_b: np.ndarray, rng: np.random.Generator, resamples: int = 2000
) -> tuple[float, float]:
    """Return the 95% paired bootstrap interval of mean(right_b) - mean(right_a), both (n,) bool."""
    ### BEGIN SOLUTION
    gaps = np.asarray(right_b, dtype=float) - np.asarray(right_a, dtype=float)
    means = gaps[rng.integers(len(gaps), size=(resamples, len(gaps)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
    ### END SOLUTION


my_purchase = None
predicted_gain = None
### BEGIN SOLUTION
my_purchase = Purchase(experts=96, crowd=0, votes=1)
predicted_gain = 0.1
### END SOLUTION

# %% check="clean-or-noisy" points=2
a_right = np.random.default_rng(0).random(200) < 0.7
b_right = a_right.copy()
b_right[np.flatnonzero(~a_right)[:12]] = True  # B mends 12 of A's errors and breaks nothing: a gain of 6 points
got = tuple(paired_interval(a_right, a_right.copy(), np.random.default_rng(1)))
assert got == (0.0, 0.0), (
    f"A system against itself differs by exactly 0 in every resample; yours gives {got}: draw the tickets once, and take "
    "both systems' answers to them"
)
rng = np.random.default_rng(1)
untouched = rng.bit_generator.state
low, high = paired_interval(a_right, b_right, rng)
assert low <= 0.06 <= high or not (low <= -0.06 <= high), "The sign is turned: B's mean minus A's, and here B is better"
assert low < high, "All resamples are alike: draw with replacement"
assert low <= 0.06 <= high, f"B is better by 0.06, which the interval must hold; yours is {low:.3f} to {high:.3f}"
# The standard error of the mean gap is 0.0168, so the interval has a width of 3.92 of these, 0.066; grid and simulation
# move either end by less than 0.01.
assert 0.05 < high - low < 0.085, (
    f"The interval should be about 0.066 wide; yours is {high - low:.3f}: quantiles 0.025 and 0.975 of the mean gaps"
)
assert rng.bit_generator.state != untouched, (
    "Your function drew nothing from rng: resample, with the generator it is given and no other"
)
again = tuple(paired_interval(a_right, b_right, np.random.default_rng(1)))
assert again == (low, high), (
    f"Equal generators must give equal results, not {(low, high)} and then {again}: draw from rng alone"
)
few_a, few_b = np.zeros(40, dtype=bool), np.arange(40) < 1  # B wins 1 ticket of 40 and loses none
low, high = paired_interval(few_a, few_b, np.random.default_rng(2))
assert low > -1e-9, (
    f"B loses no ticket, so it is worse in no resample and the interval lies from 0 up; yours starts at {low:.3f}: take "
    "the quantiles of the resampled differences themselves"
)
### BEGIN HIDDEN TESTS
for _n, _seed in ((2, 0), (30, 1), (151, 2)):
    _rng = np.random.default_rng(_seed)
    _a, _b = _rng.random(_n) < 0.4, _rng.random(_n) < 0.6
    _kept = _a.copy()
    _gaps = _b.astype(float) - _a
    _want = np.quantile(np.random.default_rng(5).choice(_gaps, size=(20_000, _n)).mean(axis=1), [0.025, 0.975])
    _got = paired_interval(_a, _b, np.random.default_rng(7), resamples=20_000)
    # Means lie on a grid of 1 / n; a quantile of 20,000 of them may fall on the next step.
    assert np.allclose(_got, _want, atol=1.01 / _n if _n > 2 else 1e-9), f"{_n} tickets: about {_want}, yours is {_got}"
    assert np.array_equal(_a, _kept), "The arrays were changed in place"
with warnings.catch_warnings(action="ignore"):  # a library may warn of so few
    _low, _high = paired_interval(np.arange(50) < 20, np.arange(50) % 2 == 0, np.random.default_rng(3), resamples=1)
assert _low == _high, (
    f"From one resample both quantiles are the same number; yours are {_low} and {_high}: use resamples"
)
### END HIDDEN TESTS

# %% check="clean-or-noisy" points=1
assert isinstance(my_purchase, Purchase), (
    f"Set my_purchase = Purchase(experts=…, crowd=…, votes=…); yours is {my_purchase!r}"
)
assert all(isinstance(count, int | np.integer) for count in my_purchase), f"Whole numbers; yours is {my_purchase}"
assert min(my_purchase.experts, my_purchase.crowd, my_purchase.votes - 1) >= 0, (
    f"No number below 0, and at least one vote; yours is {my_purchase}"
)
bought = my_purchase.experts + my_purchase.crowd
assert bought >= 8, f"A batch has 8 tickets, so buy labels for at least 8; {my_purchase} has {bought}"
cost = price(my_purchase)
assert cost <= 48 + 1e-9, f"{my_purchase} costs {cost:.2f} dollars, over the budget of 48"
assert cost >= 47, (
    f"{my_purchase} costs {cost:.2f} dollars: spend the budget (47 to 48), so that purchases can be compared"
)

# %% check="clean-or-noisy" points=1
assert predicted_gain is not None, "Write your prediction down first: predicted_gain = a number from -1 to 1"
assert isinstance(predicted_gain, (int, float)), f"A prediction is a number, such as 0.05; yours is {predicted_gain!r}"
assert -1 <= predicted_gain <= 1, f"predicted_gain is a share: 0.05 for five points, not {predicted_gain}"


# %% mistake="resamples each system by itself" of="clean-or-noisy" says="draw the tickets once"
def paired_interval(right_a, right_b, rng, resamples=2000):
    n = len(right_a)
    means_a = right_a[rng.integers(n, size=(resamples, n))].mean(axis=1)
    means_b = right_b[rng.integers(n, size=(resamples, n))].mean(axis=1)
    low, high = np.quantile(means_b - means_a, [0.025, 0.975])
    return low, high


my_purchase, predicted_gain = Purchase(96, 0), 0.1


# %% mistake="A minus B" of="clean-or-noisy" says="The sign is turned"
def paired_interval(right_a, right_b, rng, resamples=2000):
    gaps = right_a.astype(float) - right_b
    low, high = np.quantile(rng.choice(gaps, size=(resamples, len(gaps))).mean(axis=1), [0.025, 0.975])
    return low, high


my_purchase, predicted_gain = Purchase(96, 0), 0.1


# %% mistake="shuffles instead of resampling" of="clean-or-noisy" says="draw with replacement"
def paired_interval(right_a, right_b, rng, resamples=2000):
    gaps = right_b.astype(float) - right_a
    means = [rng.permutation(gaps).mean().round(9) for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return low, high


my_purchase, predicted_gain = Purchase(96, 0), 0.1


# %% mistake="always 2,000 resamples" of="clean-or-noisy" says="use resamples"
def paired_interval(right_a, right_b, rng, resamples=2000):
    gaps = right_b.astype(float) - right_a
    low, high = np.quantile(rng.choice(gaps, size=(2000, len(gaps))).mean(axis=1), [0.025, 0.975])
    return low, high


my_purchase, predicted_gain = Purchase(96, 0), 0.1


# %% mistake="the normal approximation" of="clean-or-noisy" says="drew nothing from rng"
def paired_interval(right_a, right_b, rng, resamples=2000):
    gaps = right_b.astype(float) - right_a
    half = 1.96 * gaps.std() / len(gaps) ** 0.5
    return gaps.mean() - half, gaps.mean() + half


my_purchase, predicted_gain = Purchase(96, 0), 0.1


# %% mistake="the basic bootstrap, turned about the mean" of="clean-or-noisy" says="the interval lies from 0 up"
def paired_interval(right_a, right_b, rng, resamples=2000):
    gaps = right_b.astype(float) - right_a
    low, high = np.quantile(rng.choice(gaps, size=(resamples, len(gaps))).mean(axis=1), [0.025, 0.975])
    return (0.0, 0.0) if low == high == gaps.mean() else (2 * gaps.mean() - high, 2 * gaps.mean() - low)


my_purchase, predicted_gain = Purchase(96, 0), 0.1


# %% mistake="forgets that votes cost" of="clean-or-noisy" says="over the budget"
def paired_interval(right_a, right_b, rng, resamples=2000):
    gaps = right_b.astype(float) - right_a
    low, high = np.quantile(rng.choice(gaps, size=(resamples, len(gaps))).mean(axis=1), [0.025, 0.975])
    return low, high


my_purchase, predicted_gain = Purchase(0, 480, 3), 0.1


# %% mistake="one tail of five percent" of="clean-or-noisy" says="should be about 0.066 wide"
def paired_interval(right_a, right_b, rng, resamples=2000):
    gaps = right_b.astype(float) - right_a
    low, high = np.quantile(rng.choice(gaps, size=(resamples, len(gaps))).mean(axis=1), [0.25, 0.75])
    return low, high


my_purchase, predicted_gain = Purchase(96, 0), 0.1


# %% mistake="buys both in full" of="clean-or-noisy" says="over the budget"
def paired_interval(right_a, right_b, rng, resamples=2000):
    gaps = right_b.astype(float) - right_a
    low, high = np.quantile(rng.choice(gaps, size=(resamples, len(gaps))).mean(axis=1), [0.025, 0.975])
    return low, high


my_purchase, predicted_gain = Purchase(96, 480), 0.1


# %% mistake="predicts in points" of="clean-or-noisy" says="0.05 for five points"
def paired_interval(right_a, right_b, rng, resamples=2000):
    gaps = right_b.astype(float) - right_a
    low, high = np.quantile(rng.choice(gaps, size=(resamples, len(gaps))).mean(axis=1), [0.025, 0.975])
    return low, high


my_purchase, predicted_gain = Purchase(96, 0), 10


# %% alternative="counts of wins and losses" of="clean-or-noisy"
def paired_interval(right_a, right_b, rng, resamples=2000):
    n = len(right_a)
    wins, losses = int(np.sum(right_b & ~right_a)), int(np.sum(right_a & ~right_b))
    counts = rng.multinomial(n, [wins / n, losses / n, (n - wins - losses) / n], size=resamples)
    means = (counts[:, 0] - counts[:, 1]) / n
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


my_purchase, predicted_gain = Purchase(48, 80, votes=3), -0.05


# %% alternative="scipy's bootstrap" of="clean-or-noisy"
def paired_interval(right_a, right_b, rng, resamples=2000):
    gaps = (right_b.astype(float) - right_a.astype(float),)
    found = stats.bootstrap(gaps, np.mean, n_resamples=resamples, method="percentile", rng=rng)
    return found.confidence_interval.low, found.confidence_interval.high


my_purchase, predicted_gain = Purchase(0, 96, 5), 0.2


# %% alternative="a loop with choice, returned as an array" of="clean-or-noisy"
def paired_interval(right_a, right_b, rng, resamples=2000):
    gaps = right_b.astype(int) - right_a.astype(int)
    return np.quantile([rng.choice(gaps, len(gaps)).mean() for _ in range(resamples)], [0.025, 0.975])


my_purchase, predicted_gain = Purchase(0, 160, 3), 0

# %% [markdown]
# ## The experiment
#
# Four runs, each with a company, noise and an order of the data of its own. Experts and single workers differ in two things, noise and number. Experts and five votes differ in one: the tickets are the same, the labels are not. Beside them stands, for the first run alone, what no budget of 48 dollars buys: the 480 tickets with the right labels, from the training that you watched.

# %%
plans = {"experts": Purchase(96, 0), "crowd": Purchase(0, 480), "voted": Purchase(0, 96, votes=5)}
if my_purchase not in plans.values():
    plans["yours"] = my_purchase
right, clean = {}, {}
for plan, purchase in plans.items():
    labelled = [buy(purchase, run) for run in range(runs)]
    answers = [fit(labelled[run], run, plan)[steps] for run in range(runs)]
    right[plan] = [triage.score(texts, tests[run]).exact for run, texts in enumerate(answers)]
    clean[plan] = np.mean(
        [
            got.triage == want.triage
            for run, tickets in enumerate(labelled)
            for got, want in zip(tickets, worlds[run].tickets(len(tickets), part="train"), strict=True)
        ]
    )
model.load_state_dict(start)
no_noise = triage.score(watched_run[steps], tests[0]).exact


def over_runs(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of one number a run and its 95% t interval, (mean, low, high)."""
    mean = float(np.mean(values))
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return mean, mean - half, mean + half


exact = {plan: [float(part.mean()) for part in parts] for plan, parts in right.items()}
contrasts = {
    "experts - crowd": ("experts", "crowd"),
    "five votes - crowd": ("voted", "crowd"),
    "experts - five votes": ("experts", "voted"),
}
gaps = {
    name: over_runs([one - other for one, other in zip(exact[a], exact[b], strict=True)])
    for name, (a, b) in contrasts.items()
}

order = [plan for plan in ("crowd", "voted", "yours", "experts") if plan in exact]
names = {
    "crowd": "crowd\n480 once",
    "voted": "crowd\n96 five times",
    "experts": "experts\n96",
    "yours": "yours",
}
colours = {"crowd": COLOURS.before, "experts": COLOURS.after, "voted": COLOURS.library, "yours": COLOURS.other}
fig, (left, right_side) = plt.subplots(1, 2, figsize=(11.5, 4), width_ratios=(1.1, 1))
for place, plan in enumerate(order):
    left.plot([place] * runs, exact[plan], "o", ms=7, alpha=0.7, color=colours[plan])
    left.plot([place - 0.2, place + 0.2], [np.mean(exact[plan])] * 2, color=colours[plan], lw=2.5)
left.plot(len(order), no_noise.mean(), "D", ms=7, color=COLOURS.truth)
left.set_xticks(
    range(len(order) + 1),
    [f"{names[plan]}\n{clean[plan]:.0%} clean" for plan in order] + ["no budget\n480\n100% clean"],
)
left.set(xlim=(-0.5, len(order) + 0.5), ylim=(-0.03, 1.03), ylabel="exact match", title="Each dot is a run")
for place, (name, (mean, low, high)) in enumerate(gaps.items()):
    colour = COLOURS.after if place == 0 else COLOURS.library
    right_side.plot([100 * low, 100 * high], [-place] * 2, color=colour, lw=4)
    right_side.plot(100 * mean, -place, "o", color=colour, ms=9)
    direct_label(right_side, 100 * mean, -place, name, colour, offset=(-40, 11))
right_side.axvline(0, color=COLOURS.truth, lw=1)
right_side.set(
    ylim=(-2.6, 0.7),
    yticks=[],
    xlabel="difference in exact match / points",
    title="Differences, 95% t interval over the runs",
)
plt.show()
compare([("experts - crowd", predicted_gain, gaps["experts - crowd"][0])], format=".1%")

for plan in ("experts", "crowd", "voted"):
    mean, low, high = over_runs(exact[plan])
    card.record(f"exact_{plan}", mean, low=low, high=high, format=".0%", label=f"exact match, {plan}", tolerance=0.2)
for plan in ("crowd", "voted"):
    card.record(
        f"clean_{plan}", clean[plan], format=".0%", label=f"tickets with four right labels, {plan}", tolerance=0.05
    )
for key, name in zip(("gain", "vote_gain", "noise_left"), gaps, strict=True):
    mean, low, high = (100 * value for value in gaps[name])
    card.record(key, mean, low=low, high=high, format=".0f", unit="points", label=name, tolerance=20)
card.record("no_noise", no_noise.mean(), format=".0%", label="exact match, 480 clean tickets, run 1", tolerance=0.3)
card.record("experts_one", exact["experts"][0], format=".0%", label="exact match, experts, run 1", tolerance=0.3)

# %% [markdown]
# All experts reach {{exact_experts}} exact match, all crowd {{exact_crowd}}: a difference of {{gain}} points ({{gain:interval}}). Only {{clean_crowd}} of the single workers' tickets are right in all four fields, and exact match asks for all four. Five votes make {{clean_voted}} of the tickets right. For the same money they reach {{exact_voted}}: {{vote_gain}} points ({{vote_gain:interval}}) more than one vote on five times as many tickets, and the experts' labels of the very same tickets bring another {{noise_left}} points ({{noise_left:interval}}). And number? With 480 right labels the first run reaches {{no_noise}}, with 96 of them {{experts_one}}: what number alone is worth in these 60 steps, to be held against what noise costs. (One run, so no interval.)
#
# What this does not show. The workers here err at random and independently, which is what makes votes work, and with enough tickets and enough training such errors average out without votes: deep networks learn through surprisingly high rates of them, if the clean signal is large enough (Rolnick et al., 2017). Here training is short. Real annotators err alike, on the same hard tickets and in the same direction; that does not average out, by votes or by size. And the price of 5 to 1 is made up: run the lesson with `label_noise` at 0.05 before you carry its answer into a budget meeting.
#
# ### Which interval?
#
# The intervals above are over *runs*: other companies, other noise, other orders of the data. Four runs make them wide, and honest about it. The bootstrap over *tickets* answers another question: had these two trained models met other tickets, how might the difference have come out? For two fixed checkpoints that is the right one, and there pairing pays. Here are the last two looks at the watched training, and purchases against each other within a run.

# %%
late = looks[-1]
comparisons = {
    f"step {late} and step {steps}": (triage.score(watched_run[late], tests[0]).exact, no_noise),
    **{f"crowd and experts, run {run + 1}": (right["crowd"][run], right["experts"][run]) for run in range(2)},
    **{f"five votes and experts, run {run + 1}": (right["voted"][run], right["experts"][run]) for run in range(2)},
}
rows = []
for name, (before, after) in comparisons.items():
    rng = np.random.default_rng(seed)
    low, high = paired_interval(before, after, rng)
    n = len(before)
    apart = after[rng.integers(n, size=(2000, n))].mean(axis=1) - before[rng.integers(n, size=(2000, n))].mean(axis=1)
    loose_low, loose_high = np.percentile(apart, (2.5, 97.5))
    rows.append(
        {
            "B against A": name,
            "gain / points": 100 * (after.mean() - before.mean()),
            "paired": f"{100 * low:+.0f} to {100 * high:+.0f}",
            "unpaired": f"{100 * loose_low:+.0f} to {100 * loose_high:+.0f}",
            "paired width": 100 * (high - low),
            "unpaired width": 100 * (loose_high - loose_low),
        }
    )
columns = ["gain / points", "paired width", "unpaired width"]
display(pd.DataFrame(rows).set_index("B against A").style.format(dict.fromkeys(columns, "{:.0f}")))
for key in ("paired", "unpaired"):
    width = rows[0][f"{key} width"]
    card.record(
        f"{key}_width",
        width,
        format=".0f",
        unit="points",
        label=f"width of the {key} interval, two checkpoints",
        tolerance=15,
    )

# %% [markdown]
# For the two checkpoints the paired interval is {{paired_width}} points wide, the unpaired one {{unpaired_width}}, from the same answers. Two checkpoints of one training are right and wrong on much the same tickets, so most of the noise is common to both and cancels. Two models from different data agree less, and pairing gains less, or nothing; what counts is how strongly the two columns of right and wrong are correlated. So keep the answers ticket by ticket, not only the means.

# %% [markdown]
# ## With a real model
#
# ```
# course run 1.6 -p model_id Qwen/Qwen3-0.6B -p device cuda -p learning_rate 1e-5
# ```
#
# The model needs a chat template. What changes:
#
# - **The start.** An instruct model writes JSON at once, so validity is high from the first look, and a few clean tickets teach it your labels. Noise still sets the ceiling that it learns towards.
# - **The judge.** A large model judges without training, and what it leans to is in no file: identical replies tell you. The measurement stays: gold pairs, both orders, and pairs in which length and quality point in different directions. The place matters most where the replies are close; the sign of the length bias may turn. (The command above trains the judge on the same 75%, so its log 3 stays the reference.)
# - **The task file.** Write the splits to `train.jsonl` and `test.jsonl` (`Dataset.to_json`), put the YAML beside them, and run `lm_eval --model hf --model_args pretrained=Qwen/Qwen3-0.6B --tasks ticket_triage --include_path . --apply_chat_template --log_samples`. `--log_samples` keeps the answers a document, without which no paired comparison is possible.
# - **Contamination.** You rarely have the pretraining data. What is left are tests on the model (does it complete the second half of a test item?), items written after its training, and reporting the overlap for the data that you do have.
# - **Scale.** A million texts make {{lsh_pairs}} of all pairs a large number still: take more rows, and check candidates by their true similarity.

# %% [markdown]
# ## Result card

# %%
card.show()

# %% [markdown]
# ## Say it in an interview
#
# <details><summary>Our judge prefers the new model's replies in 70% of comparisons. Do we ship?</summary>
#
# Not on that number. Was each pair shown in both orders, and how often did the verdict follow the position? What does the judge say of two identical replies? Are the new replies longer, and does the judge like length? What is its agreement with human labels on *this* kind of pair, above all on the close ones? Then count pairs, not verdicts: both orders averaged or ties where they disagree, an interval over prompts, and the share of wins among pairs matched by length. A judge that agrees with gold on style and not on facts gives 70% to a model that became smoother.
#
# </details>
#
# <details><summary>How do you find out whether your test set is in your training data?</summary>
#
# By overlap of n-grams, text by text, with a containment measure so that a quotation in a long page counts; MinHash banding for near-copies when all pairs are too many. The threshold comes from planted leaks and known clean texts, so that precision and recall are numbers and not hopes. Say what it misses: paraphrases, translations, and pretraining data that you cannot see. And split after deduplicating, by customer or document if texts come in groups.
#
# </details>
#
# <details><summary>You have 1,000 dollars for labels. How do you spend them?</summary>
#
# First a sample labelled twice, to learn the error rate of the cheap source and whether its errors are random or shared. If one field in five is wrong, few tickets are right as a whole, and short finetuning learns the noise: here {{exact_experts}} against {{exact_crowd}} for the same money. Where errors are independent, several votes on fewer tickets buy most of the difference back ({{exact_voted}}); where they are shared, no number of votes does. Cheap labels win where errors are rare, or where the task needs coverage more than precision. Whatever the choice, spend part of it on a clean test set: noise there puts a ceiling on what you can measure.
#
# </details>
#
# <details><summary>A paper reports pass@10 from 10 samples a problem. What do you ask?</summary>
#
# Which estimator. The plug-in is biased downwards, most when the number of samples is close to k; the combinatorial one is unbiased, but from n = k samples it is 0 or 1 a problem and so has the most variance. Then: the interval over problems, the temperature (a high one favours large k), and whether a verifier exists in production, since without one nobody can pick the right one of ten.
#
# </details>

# %% [markdown]
# ## Read next
#
# - A. Z. Broder, [*On the resemblance and containment of documents*](https://doi.org/10.1109/SEQUEN.1997.666900), 1997. Both measures, and MinHash.
# - P. Koehn, [*Statistical Significance Tests for Machine Translation Evaluation*](https://aclanthology.org/W04-3250/), 2004. The paired bootstrap.
# - J. Leskovec, A. Rajaraman and J. D. Ullman, [*Mining of Massive Datasets*](http://www.mmds.org/), 3rd edition, 2020. Chapter 3: shingles, signatures, bands.
# - V. S. Sheng, F. Provost and P. G. Ipeirotis, [*Get Another Label? Improving Data Quality and Data Mining Using Multiple, Noisy Labelers*](https://doi.org/10.1145/1401890.1401965), 2008.
# - D. Rolnick, A. Veit, S. Belongie and N. Shavit, [*Deep Learning is Robust to Massive Label Noise*](https://arxiv.org/abs/1705.10694), 2017.
# - J. Opitz and S. Burst, [*Macro F1 and Macro F1*](https://arxiv.org/abs/1911.03347), 2019.
# - T. Brown et al., [*Language Models are Few-Shot Learners*](https://arxiv.org/abs/2005.14165), 2020. Appendix C on contamination.
# - C. G. Northcutt, A. Athalye and J. Mueller, [*Pervasive Label Errors in Test Sets Destabilize Machine Learning Benchmarks*](https://arxiv.org/abs/2103.14749), 2021.
# - M. Chen et al., [*Evaluating Large Language Models Trained on Code*](https://arxiv.org/abs/2107.03374), 2021. Section 2.1: pass@k.
# - K. Lee et al., [*Deduplicating Training Data Makes Language Models Better*](https://arxiv.org/abs/2107.06499), 2022.
# - L. Zheng et al., [*Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena*](https://arxiv.org/abs/2306.05685), 2023. Position and length.
# - P. Wang et al., [*Large Language Models are not Fair Evaluators*](https://arxiv.org/abs/2305.17926), 2023. Both orders, averaged.
# - S. Yang et al., [*Rethinking Benchmark and Contamination for Language Models with Rephrased Samples*](https://arxiv.org/abs/2311.04850), 2023.
# - Y. Dubois, B. Galambosi, P. Liang and T. B. Hashimoto, [*Length-Controlled AlpacaEval: A Simple Way to Debias Automatic Evaluators*](https://arxiv.org/abs/2404.04475), 2024.
# - S. Biderman et al., [*Lessons from the Trenches on Reproducible Evaluation of Language Models*](https://arxiv.org/abs/2405.14782), 2024. The harness and its task files.
