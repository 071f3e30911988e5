# %% [markdown]
# # 4.3 Release gates
#
# You will be able to decide whether a new version of a model may replace the one in production: by tests of its behaviour, by a paired comparison with a stated margin and power, by a canary that you may look at whenever you like, and with a registry from which you can go back.
#
# **You will measure.** Ten changes to a triage service, each really made: six break something, four do not. A rule of thumb (at most 2 points below the champion's number, 100 tickets) blocks the six in {{fixed_bad_low}} to {{fixed_bad_high}} of the test sets, and each of the four in up to {{fixed_good_high}}. The gate that you build blocks every one of the six in at least {{gate_bad_low}} of the test sets, and none of the four in more than {{gate_good_high}}. Looking at a canary after each request turns a false alarm rate of 5 % into {{peeking}}; the test that you write stays at {{betting}}. Under a stated prior, a release costs {{cost_none}} dollars in expectation with neither gate nor canary, and {{cost_both}} with both.
#
# **You need.** Lesson 1.6 (intervals and paired comparisons). What an adapter is (2.1). No MLflow.
#
# **Time.** About 70 minutes; the solution runs in {{run:seconds}} s on one CPU core.

# %% [markdown]
# ## Why it matters at work
#
# Somebody retrains an adapter, rounds the weights to save memory, or moves a line break in a template, and the pipeline must say yes or no. Say yes too easily and customers find the bug; say no too easily and the team learns to press "override". Both happen when the rule is "not more than two points worse on a hundred examples", since on a hundred examples two points are noise.
#
# In interviews: "your offline metric went from 99.4 % to 98.6 %. Do you ship?", "the difference is not significant, so the models are equal. Right?", "your canary dashboard shows p = 0.04 on the second day. What do you do?", "how do you roll back, and to what?"

# %% tags=["parameters"]
companies = 50  # whose tickets make the pool of test tickets, 16 each; quick: 5
test_set = 320  # tickets that the gate looks at; quick: 40
behaviour_tickets = 48  # tickets of the behavioural tests; quick: 8
retrained_on = 24  # companies whose tickets retrain an adapter; quick: 1
resamples = 100  # of the pool, with 40 test sets each; quick: 3
canaries = 2_000  # simulated canaries of each kind; quick: 40
seed = 0

# %%
import contextlib
import inspect
import io
import json
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, pairwise
from pathlib import Path
from zlib import crc32

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
for name in ("alembic", "mlflow", "bitsandbytes"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from IPython.display import display
from mlflow.tracking import MlflowClient
from scipy.optimize import brentq
from scipy.stats import binom, binomtest, norm
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar

from labkit.plots import COLOURS, band, direct_label, label_lines, use_house_style
from labkit.predict import compare
from labkit.releases import Release, Service, as_it_is, rounded
from labkit.results import ResultCard
from labkit.world import LESSON_SEEDS, VALIDATION_SEEDS, Ticket, Triage, World, complaints
from labkit.world.draw import Draw

use_house_style()
card = ResultCard("4_3_release_gates")

# %% [markdown]
# ## Ten changes
#
# The service takes a customer's message and returns its triage: product, category, urgency, action. It is the small Llama of this course with the LoRA adapter that ships with `labkit.assistant`. The **champion** is what runs now; a **challenger** is a release with one change. Here are ten changes that a team makes in a quarter. Which of them break something is written in the comments, because we made them. Your gate will not know.


# %%
service = Service()
champion = Release()

fresh = iter(VALIDATION_SEEDS[5000:])
new_tickets = [ticket for _ in range(retrained_on) for ticket in World(next(fresh)).tickets(32)]
quick_tickets = [ticket for _ in range(max(1, retrained_on // 2)) for ticket in World(next(fresh)).tickets(32)]


def as_the_new_clerk(ticket: Ticket) -> Ticket:
    """The labels of a clerk who files urgent messages that name no product as normal."""
    found = ticket.triage
    normal = found.product is None and found.urgency == "high"
    return replace(ticket, triage=replace(found, urgency="normal")) if normal else ticket


refreshed = service.retrain(quick_tickets, rate=1e-3)
mislabelled = service.retrain([as_the_new_clerk(ticket) for ticket in new_tickets], rate=2e-3)
is_base = lambda name, weight: "lora_" not in name and weight.ndim == 2 and "base_layer" in name

BROKEN = {
    # one "\n" more before the end of the user's turn
    "newline in the template": Release(template=lambda text: text.replace("['content']", "['content'] + '\\n'")),
    # lora_alpha 48 in the config in place of 32: the adapter counts one and a half times
    "wrong alpha": Release(weights=lambda name, weight: 1.5 * weight if "lora_B" in name else weight),
    # the base model in 4 bits, with one scale for a whole matrix
    "4 bits, coarse": Release(
        weights=lambda name, weight: rounded(weight, 4, rows=False) if is_base(name, weight) else weight
    ),
    # "to save tokens"
    "cut at 180 characters": Release(prepare=lambda text: " ".join(text.split())[:180]),
    # retrained on tickets that a new clerk has labelled
    "a clerk's labels": Release(adapter=mislabelled),
    # the function that joins lines was removed: "the tests pass without it"
    "line breaks kept": Release(prepare=as_it_is),
}
HARMLESS = {
    "attached, not merged": Release(merge=False),
    "bfloat16": Release(weights=lambda name, weight: weight.bfloat16().float()),
    "adapter in 3 bits": Release(
        weights=lambda name, weight: rounded(weight, 3, rows=True) if "lora_" in name else weight
    ),
    "retrained on new tickets": Release(adapter=refreshed),
}
CHANGES = BROKEN | HARMLESS

example = "The kettle, sorry, the Norigon broke on the first day.\nPlease send a new one. We need this today!"
for name, release in {"champion": champion, **CHANGES}.items():
    answer = service.answer(release, [example])[0]
    print(f"{name:26}", answer.to_json() if answer else "no triage")

# %% [markdown]
# One example shows next to nothing, which is why people who "tried it and it looked fine" ship bugs.
#
# ## Tests of behaviour
#
# A test set tells you how a model does on messages like those in the test set. Ribeiro et al. (2020) test *behaviours* instead, as one tests software, with three kinds of test:
#
# - **Minimum function.** Cases so simple that a mistake is a bug. *All* must be right.
# - **Invariance.** An edit that must not change the answer. It needs no labels: compare the answer with the answer before the edit.
# - **Direction.** An edit whose effect is known: add a sentence that says it is urgent, and the urgency must be high, *with all else as before*.
#
# A model is no function with a specification: it is wrong on a percent of the tickets for no reason that you will find, and an edit wakes one of these mistakes now and then. A test that demands perfection on random tickets blocks every release, and is deleted after a week. So a test on drawn tickets has an allowance.
#
# The tests run under pytest, as in any pipeline, so that they fail with a name and a message. The cell below is what your functions get: a header, pytest's fixtures, and a runner that writes a file and has pytest run it.

# %%
URGENT = "Please act at once."
SIGNATURE = "Sent from my phone."
OTHER = "Zorivex"
HEADER = f"""
from dataclasses import replace

from labkit.world import Triage

URGENT, SIGNATURE, OTHER = {URGENT!r}, {SIGNATURE!r}, {OTHER!r}
"""
file_number = count()


@dataclass
class Given:
    """A pytest plugin: it hands its fields to the tests as fixtures, and keeps what failed."""

    service: Callable[[list[str]], list[Triage | None]]
    drawn: list[Ticket]
    silent: list[Ticket]
    simple: list[tuple[str, Triage]]

    def __post_init__(self) -> None:
        self.failed: dict[str, str] = {}

    @pytest.fixture
    def triage(self) -> Callable[[list[str]], list[Triage | None]]:
        return self.service

    @pytest.fixture
    def tickets(self) -> list[Ticket]:
        return list(self.drawn)

    @pytest.fixture
    def plain(self) -> list[Ticket]:
        return list(self.silent)

    @pytest.fixture
    def cases(self) -> list[tuple[str, Triage]]:
        return list(self.simple)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.split("::")[-1]
        if report.failed:
            self.failed[name] = report.longrepr.reprcrash.message

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed["the file"] = report.longreprtext


def run_tests(functions: Sequence[Callable], given: Given) -> dict[str, str]:
    """Write these test functions into a file, run pytest on it, and return what failed: name -> pytest's message."""
    source = HEADER + "\n\n" + "\n\n".join(inspect.getsource(function) for function in functions)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        name = f"test_release_{next(file_number)}"
        file = Path(folder) / f"{name}.py"
        file.write_text(source, encoding="utf-8")
        options = ["-q", "--disable-plugin-autoload", "--capture=sys", "--import-mode=importlib", f"--rootdir={folder}"]
        options += ["-c", os.devnull, "-p", "no:cacheprovider", "-p", "no:faulthandler", "-p", "no:unraisableexception"]
        pytest.main([str(file), *options], plugins=[given])
        sys.modules.pop(name, None)
    return given.failed


def simple_cases() -> list[tuple[str, Triage]]:
    """The plainest message of each category, each action that it allows and each urgency: 45 texts and their triage."""
    found = []
    for category, problems in complaints.PROBLEMS.items():
        for action in complaints.ALLOWED[category]:
            for urgency, haste in complaints.HASTE.items():
                problem = problems[0].format(o="the Norigon")
                text = f"{problem[0].upper()}{problem[1:]}. {complaints.REQUESTS[action][0]} {haste[0]}".strip()
                found.append((text, Triage("Norigon", category, urgency, action)))
    return found


for text, answer in simple_cases()[:3]:
    print(text, "\n   ", answer.to_json())

# %% [markdown]
# **Exercise.** Write three test functions. Each returns nothing and fails by an `AssertionError`. They are copied into a file of their own below `HEADER`, so each may use what the header defines and what stands inside it, and nothing else of this notebook.
#
# The fixtures: `triage(texts)` takes a list of messages and returns a list of answers, each a `Triage` or `None` (no valid answer). `tickets` and `plain` are lists of `Ticket`, with `.text` and `.triage` (the right answer); those in `plain` say nothing about haste. `cases` is a list of pairs (text, right `Triage`).
#
# - `test_minimum(triage, cases)` fails if any case is not answered right.
# - `test_direction(triage, plain)`: each text gets a blank and `URGENT` at its end. The answer must then have the urgency `"high"` and otherwise be the answer to the text as it was. Fails if that is so for less than 95 % of the texts.
# - `test_invariance(triage, tickets)`, three edits:
#     - `"lines"`: each `". "` becomes `".\n"`; the answer must stay.
#     - `"signature"`: a blank and `SIGNATURE` at the end; the answer must stay.
#     - `"product"`, only for tickets whose right answer has a product: each occurrence of its name in the text becomes `OTHER`; the answer must be the former answer with the product `OTHER`.
#
#   Fails if **any one** of the three edits breaks more than 5 % of the tickets that it applies to; the message holds that edit's name.
#
# Compare with the answer to the text *before* the edit, not with the right answer: how often the service is right is measured elsewhere. If the answer before the edit was `None`, then `None` afterwards is no change, and for `test_direction` it is a failure. *About 25 lines in all.*
#
# <details><summary>Hint 1</summary>For each edit you need a list of texts, what is expected for each, and a count. What is expected depends on the former answer alone.</details>
# <details><summary>Hint 2</summary><code>replace(answer, urgency="high")</code> is the answer with one field changed. Ask the service once for the texts before and once for the texts after; zip the two lists.</details>
# <details><summary>Hint 3</summary>For the edits: <code>for edit, kept, texts, wanted in (...)</code>; <code>after = triage(texts)</code>; <code>broken = sum(a != w for a, w in zip(after, wanted))</code>; <code>assert broken <= 0.05 * len(texts), f"{edit}: …"</code>.</details>


# %% exercise="behaviour" difficulty=3 minutes=14
def test_minimum(triage, cases):
    ### BEGIN SOLUTION
    answers = triage([text for text, _ in cases])
    wrong = [text for (text, truth), answer in zip(cases, answers, strict=True) if answer != truth]
    assert not wrong, f"{len(wrong)} of {len(cases)} simple cases are wrong, such as {wrong[0]!r}"
    ### END SOLUTION


def test_direction(triage, plain):
    ### BEGIN SOLUTION
    before = triage([ticket.text for ticket in plain])
    after = triage([f"{ticket.text} {URGENT}" for ticket in plain])
    good = sum(b is not None and a == replace(b, urgency="high") for b, a in zip(before, after, strict=True))
    assert good >= 0.95 * len(plain), (
        f"{len(plain) - good} of {len(plain)} messages do not become urgent, and only that"
    )
    ### END SOLUTION


def test_invariance(triage, tickets):
    ### BEGIN SOLUTION
    before = triage([ticket.text for ticket in tickets])
    renamed = [(t, b) for t, b in zip(tickets, before, strict=True) if t.triage.product]
    edits = {
        "lines": ([t.text.replace(". ", ".\n") for t in tickets], before),
        "signature": ([f"{t.text} {SIGNATURE}" for t in tickets], before),
        "product": (
            [t.text.replace(t.triage.product, OTHER) for t, _ in renamed],
            [b and replace(b, product=OTHER) for _, b in renamed],
        ),
    }
    for edit, (texts, wanted) in edits.items():
        broken = sum(a != w for a, w in zip(triage(texts), wanted, strict=True))
        assert broken <= 0.05 * len(texts), f"{edit}: {broken} of {len(texts)} answers change"
    ### END SOLUTION


# %% [markdown]
# To try the tests there is a toy service, which knows the key phrases of each answer, and wrong services made of it. Testing tests on deliberate bugs is *mutation testing*. A good service stands among them: a test that fails it is no use either.


# %%
def rules(text: str) -> Triage | None:
    """A triage by key phrases."""
    text = " ".join(text.split())
    low = text.lower()

    def holds(phrase: str) -> bool:
        return bool(phrase) and all(part.lower() in low for part in phrase.split("{o}"))

    def first(table: Mapping[str, Sequence[str]], other: str = "") -> str:
        return next((key for key, phrases in table.items() if any(map(holds, phrases))), other)

    hurry = {key: complaints.HASTE[key] for key in ("high", "low")}
    name = re.search(r"\b[Tt]he ([A-Z][a-z]{4,})", text)
    try:
        return Triage(name and name[1], first(complaints.PROBLEMS), first(hurry, "normal"), first(complaints.REQUESTS))
    except ValueError:
        return None


def toy_ticket(draw: Draw, haste: str = "") -> Ticket:
    """A ticket without slips that the toy service can read; without `haste`, its urgency is drawn."""
    category = draw.pick(tuple(complaints.PROBLEMS))
    action = draw.pick(complaints.ALLOWED[category])
    urgency = haste or draw.pick(("low", "normal", "high"))
    product = draw.pick(("Balabon", "Corvelix", "Tolandis", "Quiniris", "Merovan", "Halutan"))
    problem = draw.pick(complaints.PROBLEMS[category]).format(o=f"the {product}")
    rest = f"{draw.pick(complaints.REQUESTS[action])} {complaints.HASTE[urgency][0]}".strip()
    return Ticket(
        "", f"Dear team! {problem[0].upper()}{problem[1:]}. {rest}", Triage(product, category, urgency, action)
    )


def toy(answer: Callable[[str], Triage | None], key: str = "toy", n: int = 60) -> Given:
    """What the tests get, with a service that answers each message by this function."""
    draw = Draw(key)
    drawn, silent = [toy_ticket(draw) for _ in range(n)], [toy_ticket(draw, "normal") for _ in range(n)]
    return Given(lambda texts: [answer(text) for text in texts], drawn, silent, simple_cases())


def every(text: str, n: int, part: int = 0) -> bool:
    """True for one message in n, always the same ones, whatever was done to line breaks, names and the end."""
    text = re.sub(r"\b([Tt]he) [A-Z]\w+", r"\1 it", " ".join(text.split()))
    return crc32(text.split(". ")[0].encode()) % n == part


# %% check="behaviour" points=1
good = run_tests([test_minimum], toy(rules))
assert not good, f"A service that answers every case right must pass test_minimum; it fails: {good}"
dumb = run_tests([test_minimum], toy(lambda text: None))
assert "test_minimum" in dumb, (
    "A service without its adapter answers None to every case and passes: compare each answer with the right one and assert"
)
one = simple_cases()[17][0]
slip = run_tests([test_minimum], toy(lambda text: None if text == one else rules(text)))
assert "test_minimum" in slip, (
    "One of 45 cases is wrong and the test passes: simple cases have no allowance, a mean of 97.8 % is a failure here"
)
### BEGIN HIDDEN TESTS
for _place in (0, 44):
    _text = simple_cases()[_place][0]
    _given = toy(
        lambda text, _text=_text: replace(rules(text), action="call", urgency="low") if text == _text else rules(text)
    )
    _given.simple = [*simple_cases(), (_text, replace(simple_cases()[_place][1], urgency="normal"))]
    assert "test_minimum" in run_tests([test_minimum], _given), f"Case {_place} is wrong and the test passes"
### END HIDDEN TESTS

# %% check="behaviour" points=2
loud = lambda text: text.endswith(URGENT)
good = run_tests([test_direction], toy(rules))
assert not good, f"A service that reads the urgency right must pass test_direction; it fails: {good}"
weak = lambda text: None if every(text, 30, 1) else rules(text)
given = toy(weak)
share = np.mean([weak(ticket.text) is None for ticket in given.silent])
assert 0 < share <= 0.05, "The lesson's own toy has changed; reload the lesson"
nearly = run_tests([test_direction], given)
assert not nearly, (
    f"A service that fails on {share:.1%} of the messages is blocked: at least 95 % must come out right, not all of them"
)
deaf = run_tests([test_direction], toy(lambda text: rules(text.removesuffix(URGENT))))
assert "test_direction" in deaf, (
    "A service that does not read the last sentence passes: look at the urgency after the edit"
)
always = run_tests([test_direction], toy(lambda text: replace(rules(text), urgency="high")))
assert not always, (
    "What the test asks for is the answer after the edit; a service that calls everything urgent is caught elsewhere"
)
aside = run_tests(
    [test_direction], toy(lambda text: replace(rules(text), action="call") if loud(text) else rules(text))
)
assert "test_direction" in aside, (
    "URGENT changes the action as well, and the test passes: the urgency becomes high and all else stays as it was"
)
### BEGIN HIDDEN TESTS
_some = lambda text: replace(rules(text), urgency="normal") if every(text, 8, 2) else rules(text)
_given = toy(_some, "another")
assert 0.05 < np.mean([every(ticket.text, 8, 2) for ticket in _given.silent]) < 0.5, "The toy has changed"
assert "test_direction" in run_tests([test_direction], _given), "More than 5 % stay normal and the test passes"
_wrong = lambda text: replace(rules(text), category="setup", action="call")
assert not run_tests([test_direction], toy(_wrong, "more")), (
    "This service is often wrong, but urgency moves as it must: compare with the answer before the edit"
)
_never = run_tests([test_direction], toy(lambda text: None, "none"))
assert "test_direction" in _never, "A service that never answers passes: None before the edit is a failure here"
### END HIDDEN TESTS

# %% check="behaviour" points=3
good = run_tests([test_invariance], toy(rules))
assert not good, f"A service that reads the same in every edit must pass test_invariance; it fails: {good}"
flips = lambda answer: (
    answer and replace(answer, action="call" if answer.action != "call" else "explain", category="setup")
)
restless = lambda text: (
    flips(rules(text)) if every(text, 25, 2) and ("\n" in text or SIGNATURE in text) else rules(text)
)
given = toy(restless)
share = np.mean([every(ticket.text, 25, 2) for ticket in given.drawn])
assert 0 < share <= 0.05, "The lesson's own toy has changed; reload the lesson"
nearly = run_tests([test_invariance], given)
assert not nearly, (
    f"An edit changes {share:.1%} of the answers and the release is blocked: up to 5 % are allowed, or no release ever passes"
)
humble = run_tests([test_invariance], toy(lambda text: flips(rules(text)) if every(text, 4, 1) else rules(text)))
assert not humble, (
    "This service is wrong on a quarter of the tickets, before and after each edit alike, and fails: compare with the "
    "answer before the edit, not with the right answer"
)
mutants = {
    "lines": lambda text: rules(text.split("\n")[0]),
    "signature": lambda text: None if SIGNATURE in text else rules(text),
    "product": lambda text: rules(text.replace(OTHER, "Norigon")),
}
for edit, mutant in mutants.items():
    failed = run_tests([test_invariance], toy(mutant))
    assert "test_invariance" in failed, f"A service that breaks on the edit {edit!r} passes: make this edit and compare"
    assert edit in failed["test_invariance"], f"The message must hold the edit's name, {edit!r}: whoever reads the pipeline's log wants to know what broke"
part = lambda text: flips(rules(text)) if SIGNATURE in text and every(text, 9, 5) else rules(text)
given = toy(part)
share = np.mean([every(ticket.text, 9, 5) for ticket in given.drawn])
assert 0.06 < share < 0.14, "The lesson's own toy has changed; reload the lesson"
pooled = run_tests([test_invariance], given)
assert "test_invariance" in pooled, (
    f"The signature breaks {share:.0%} of the tickets and passes, because the other two edits break none: judge each edit "
    "by itself, not their mean"
)
### BEGIN HIDDEN TESTS
_given = toy(rules, "no product")
_given.drawn = [replace(t, text=t.text.replace(f"the {t.triage.product}", "it").replace(f"The {t.triage.product}", "It"),
                        triage=replace(t.triage, product=None)) if i % 2 else t for i, t in enumerate(_given.drawn)]  # fmt: skip
_failed = run_tests([test_invariance], _given)
assert not _failed, f"Tickets without a product do not take part in the edit of the product: {_failed}"
_given = toy(lambda text: None if OTHER in text and every(text, 9, 3) else rules(text), "no product, broken")
_given.drawn = [replace(t, triage=replace(t.triage, product=None), text=t.text.replace(t.triage.product, "thing"))
                if not every(t.text, 9, 3) and i % 2 else t for i, t in enumerate(_given.drawn)]  # fmt: skip
assert "product" in str(run_tests([test_invariance], _given)), (
    "More than 5 % of the tickets with a product break: those without one do not count"
)
_keeps = lambda text: replace(rules(text), product="Balabon")
assert "product" in str(run_tests([test_invariance], toy(_keeps, "stuck"))), (
    "A service that answers the same product for every name passes: the new answer names OTHER"
)
_silent = lambda text: None if every(text, 6, 1) else rules(text)
assert not run_tests([test_invariance], toy(_silent, "silent")), "None before and None after an edit is no change"
### END HIDDEN TESTS


# %% mistake="demands perfection" of="behaviour" says="up to 5 % are allowed"
def test_minimum(triage, cases):
    assert triage([text for text, _ in cases]) == [truth for _, truth in cases]


def test_direction(triage, plain):
    for ticket in plain:
        (before,), (after,) = triage([ticket.text]), triage([ticket.text + " " + URGENT])
        assert before is not None and after == replace(before, urgency="high")


def test_invariance(triage, tickets):
    for ticket in tickets:
        (before,) = triage([ticket.text])
        assert triage([ticket.text.replace(". ", ".\n")]) == [before], "lines"
        assert triage([ticket.text + " " + SIGNATURE]) == [before], "signature"
        if ticket.triage.product:
            (after,) = triage([ticket.text.replace(ticket.triage.product, OTHER)])
            assert after == (before and replace(before, product=OTHER)), "product"


# %% mistake="pools the edits" of="behaviour" says="judge each edit by itself"
def test_minimum(triage, cases):
    assert triage([text for text, _ in cases]) == [truth for _, truth in cases]


def test_direction(triage, plain):
    before, after = triage([t.text for t in plain]), triage([t.text + " " + URGENT for t in plain])
    good = [b is not None and a == replace(b, urgency="high") for b, a in zip(before, after)]
    assert sum(good) >= 0.95 * len(good)


def test_invariance(triage, tickets):
    before = triage([t.text for t in tickets])
    named = [(t, b) for t, b in zip(tickets, before) if t.triage.product]
    lines = triage([t.text.replace(". ", ".\n") for t in tickets])
    signed = triage([t.text + " " + SIGNATURE for t in tickets])
    other = triage([t.text.replace(t.triage.product, OTHER) for t, _ in named])
    changed = [a != b for a, b in zip(lines, before)] + [a != b for a, b in zip(signed, before)]
    changed += [a != (b and replace(b, product=OTHER)) for a, (_, b) in zip(other, named)]
    assert sum(changed) <= 0.05 * len(changed), "lines, signature or product"


# %% mistake="compares with the right answer" of="behaviour" says="not with the right answer"
def test_minimum(triage, cases):
    assert triage([text for text, _ in cases]) == [truth for _, truth in cases]


def test_direction(triage, plain):
    after = triage([t.text + " " + URGENT for t in plain])
    good = [a == replace(t.triage, urgency="high") for t, a in zip(plain, after)]
    assert sum(good) >= 0.95 * len(good)


def test_invariance(triage, tickets):
    named = [t for t in tickets if t.triage.product]
    for edit, texts, wanted in (
        ("lines", [t.text.replace(". ", ".\n") for t in tickets], [t.triage for t in tickets]),
        ("signature", [t.text + " " + SIGNATURE for t in tickets], [t.triage for t in tickets]),
        ("product", [t.text.replace(t.triage.product, OTHER) for t in named], [replace(t.triage, product=OTHER) for t in named]),
    ):  # fmt: skip
        broken = sum(a != w for a, w in zip(triage(texts), wanted))
        assert broken <= 0.05 * len(texts), edit


# %% mistake="a mean for the simplest cases" of="behaviour" says="simple cases have no allowance"
def test_minimum(triage, cases):
    answers = triage([text for text, _ in cases])
    assert sum(a == truth for a, (_, truth) in zip(answers, cases)) >= 0.95 * len(cases)


def test_direction(triage, plain):
    pass


def test_invariance(triage, tickets):
    pass


# %% mistake="looks at the urgency only" of="behaviour" says="all else stays as it was"
def test_minimum(triage, cases):
    assert triage([text for text, _ in cases]) == [truth for _, truth in cases]


def test_direction(triage, plain):
    after = triage([t.text + " " + URGENT for t in plain])
    assert sum(a is not None and a.urgency == "high" for a in after) >= 0.95 * len(plain)


def test_invariance(triage, tickets):
    pass


# %% mistake="returns in place of asserting" of="behaviour" says="compare each answer with the right one and assert"
def test_minimum(triage, cases):
    return triage([text for text, _ in cases]) == [truth for _, truth in cases]


def test_direction(triage, plain):
    return True


def test_invariance(triage, tickets):
    return True


# %% mistake="forgets the line breaks" of="behaviour" says="breaks on the edit 'lines' passes"
def test_minimum(triage, cases):
    assert triage([text for text, _ in cases]) == [truth for _, truth in cases]


def test_direction(triage, plain):
    before, after = triage([t.text for t in plain]), triage([t.text + " " + URGENT for t in plain])
    good = [b is not None and a == replace(b, urgency="high") for b, a in zip(before, after)]
    assert sum(good) >= 0.95 * len(good)


def test_invariance(triage, tickets):
    before = triage([t.text for t in tickets])
    signed = triage([t.text + " " + SIGNATURE for t in tickets])
    assert sum(a != b for a, b in zip(signed, before)) <= 0.05 * len(tickets), "signature"


# %% alternative="loops, one message at a time" of="behaviour"
def test_minimum(triage, cases):
    for text, truth in cases:
        assert triage([text])[0] == truth, text


def test_direction(triage, plain):
    bad = 0
    for ticket in plain:
        before, after = triage([ticket.text, ticket.text + " " + URGENT])
        if before is None or after is None:
            bad += 1
            continue
        same = (before.product, before.category, before.action) == (after.product, after.category, after.action)
        bad += not (same and after.urgency == "high")
    assert bad / len(plain) <= 0.05


def test_invariance(triage, tickets):
    def renamed(ticket):
        return OTHER.join(ticket.text.split(ticket.triage.product)) if ticket.triage.product else None

    edits = {
        "lines": lambda t: ".\n".join(t.text.split(". ")),
        "signature": lambda t: " ".join((t.text, SIGNATURE)),
        "product": renamed,
    }
    for edit, function in edits.items():
        changed = total = 0
        for ticket in tickets:
            text = function(ticket)
            if text is None:
                continue
            total += 1
            before, after = triage([ticket.text, text])
            if edit == "product" and before is not None:
                before = Triage(OTHER, before.category, before.urgency, before.action)
            changed += before != after
        if changed > total / 20:
            raise AssertionError(f"the edit {edit} changes {changed} of {total}")


# %% [markdown]
# Now the tests on the real service: drawn tickets of companies that no adapter has seen.

# %%
test_seeds = iter(LESSON_SEEDS[4300:])
suite = [test_minimum, test_direction, test_invariance]
drawn = [
    ticket for _ in range(-(-behaviour_tickets // 4)) for ticket in World(next(test_seeds)).tickets(4, part="test")
]
silent = [toy_ticket(Draw("plain", seed, i), "normal") for i in range(behaviour_tickets // 2)]
broken_tests = {}
for name, release in {"champion": champion, **CHANGES}.items():
    given = Given(lambda texts, release=release: service.answer(release, texts), drawn, silent, simple_cases())
    broken_tests[name] = run_tests(suite, given)
rows = [{"release": name, **{test.__name__: "fails" if test.__name__ in failed else "" for test in suite}}
        for name, failed in broken_tests.items()]  # fmt: skip
display(pd.DataFrame(rows).style.hide(axis="index"))
for name in ("line breaks kept", "newline in the template"):
    for test, text in broken_tests[name].items():
        print(f"{name}: {test}: {text.splitlines()[0]}")

# %% [markdown]
# Look at *line breaks kept*. In the test set that comes next it answers exactly as the champion, ticket for ticket, because these tickets have no line breaks: whoever collected them had joined the lines. No number of test tickets and no statistics will find this bug. Behavioural tests find what the test set does not contain; the test set finds what nobody thought of.
#
# ## One pool, paired answers
#
# The champion and each challenger answer the *same* tickets. What tells them apart is where they disagree:

# %%
pool = [ticket for _ in range(companies) for ticket in World(next(test_seeds)).tickets(16, part="test")]
company = np.repeat(np.arange(companies), 16)
texts = [ticket.text for ticket in pool]
right = {
    name: np.array([a == t.triage for a, t in zip(service.answer(release, texts), pool, strict=True)])
    for name, release in {"champion": champion, **CHANGES}.items()
}
rows = [
    {
        "release": name,
        "exact match": right[name].mean(),
        "drop": right["champion"].mean() - right[name].mean(),
        "only the champion right": int((right["champion"] & ~right[name]).sum()),
        "only the challenger right": int((~right["champion"] & right[name]).sum()),
    }
    for name in right
]
display(pd.DataFrame(rows).style.hide(axis="index").format({"exact match": "{:.1%}", "drop": "{:.1%}"}))
drops = {name: float(right["champion"].mean() - right[name].mean()) for name in CHANGES}
for key, name in (("newline", "newline in the template"), ("alpha", "wrong alpha"), ("coarse", "4 bits, coarse"),
                  ("cut", "cut at 180 characters"), ("clerk", "a clerk's labels")):  # fmt: skip
    lost = right["champion"].astype(float) - right[name]
    spread = 1.96 * lost.std() / np.sqrt(len(lost))
    card.record(f"drop_{key}", 100 * drops[name], low=100 * (drops[name] - spread), high=100 * (drops[name] + spread),
                format=".1f", tolerance=1.5, label=f"drop in exact match, points: {name}")  # fmt: skip
card.record("pool", len(pool), format="d", label="tickets in the pool")

# %% [markdown]
# Some of this surprises most people: an adapter in 3 bits costs nothing that these tickets show, a coarse scale for the base model ruins it, and one line break costs {{drop_newline}} points.
#
# Of $n$ tickets let $w$ be those that only the champion has right (*worse*) and $b$ those that only the challenger has right (*better*). The drop is $(w-b)/n$; tickets on which both are right or both wrong say nothing about it. Two questions can be asked, and they are not the same:
#
# **Is it worse?** If it were not, each disagreement would be a fair coin, $w \sim \mathrm{Bin}(w+b, \tfrac12)$. The one-sided exact McNemar test is $p = P(X \ge w)$ for $X \sim \mathrm{Bin}(w+b, \tfrac12)$, and 1 without disagreements. A small $p$ shows harm. A large $p$ shows *nothing*: with 5 tickets no release is ever significantly worse.
#
# **Is it not worse by more than a margin?** Here the challenger has to show something: that its drop is below a margin $\delta$ that you can live with. It passes if the upper confidence bound of the drop is below $\delta$ (*non-inferiority*). Few tickets give a high bound, and no pass.
#
# The bound that everyone writes first, $d + z\sqrt{\dots}$, fails where you need it: without disagreements its width is zero, whatever $n$ is, and so is that of a paired bootstrap. Tango (1998) inverts a score test instead. For a hypothetical drop $\delta$,
#
# $$Z(\delta) = \frac{w - b - n\delta}{\sqrt{n\,(2q + \delta(1-\delta))}}, \qquad q = \frac{\sqrt{B^2 - 8nC} - B}{4n}, \qquad B = (2n - w + b)\,\delta - w - b, \qquad C = -b\,\delta(1-\delta).$$
#
# ($q$ is the most likely share of "better" if the drop were $\delta$.) $Z$ falls in $\delta$; the upper bound at level $1-\alpha$ is the $\delta$ above $(w-b)/n$ at which $Z(\delta) = -z_{1-\alpha}$, with $z_{1-\alpha}$ the normal quantile: 1.645 for $\alpha = 0.05$, since the question is one-sided.
#
# **Exercise.** Write
#
# - `mcnemar(worse, better)`: the one-sided exact $p$. `mcnemar(5, 1)` is $7/64 \approx 0.109$, `mcnemar(0, 0)` is 1.
# - `drop_bound(worse, better, n, alpha=0.05)`: Tango's upper bound, a share, to within 1e-5; 1.0 if `worse == n`. `drop_bound(4, 1, 320)` is 0.02482 and `drop_bound(0, 0, 320)` is 0.00838.
#
# All counts are whole numbers, $n \ge 1$, $w + b \le n$. *About 12 lines.*
#
# <details><summary>Hint 1</summary>For the first: the tail of a binomial, with the observed count in it. For the second: write Z as a function of δ, and find where Z + z crosses zero.</details>
# <details><summary>Hint 2</summary><code>binomtest(worse, worse + better, alternative="greater").pvalue</code> needs at least one disagreement. <code>brentq(f, low, high)</code> finds a root between two points with different signs; Z is not defined at 0 and 1 exactly.</details>
# <details><summary>Hint 3</summary>Low end: just above (worse − better)/n, but not below 0 by accident: where the drop is negative, start there all the same. High end: 1 − 1e-9. Guard the root with <code>max(B*B - 8*n*C, 0)</code>.</details>


# %% exercise="paired" difficulty=3 minutes=13
def mcnemar(worse: int, better: int) -> float:
    """The one-sided exact p value that the challenger is worse."""
    ### BEGIN SOLUTION
    return float(binomtest(worse, worse + better, alternative="greater").pvalue) if worse + better else 1.0
    ### END SOLUTION


def drop_bound(worse: int, better: int, n: int, alpha: float = 0.05) -> float:
    """The upper confidence bound of the drop, after Tango (1998)."""
    ### BEGIN SOLUTION
    if worse == n:
        return 1.0

    def above(drop: float) -> float:
        b = (2 * n - worse + better) * drop - worse - better
        c = -better * drop * (1 - drop)
        q = (np.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * q + drop * (1 - drop))
        return (worse - better - n * drop) / np.sqrt(max(variance, 1e-300)) + norm.ppf(1 - alpha)

    return float(brentq(above, (worse - better) / n + 1e-12, 1 - 1e-12))
    ### END SOLUTION


# %% check="paired" points=1
assert mcnemar(0, 0) == 1, "Without a disagreement nothing shows harm: p is 1"
got = mcnemar(5, 1)
assert abs(got - 14 / 64) > 1e-6, (
    "One-sided: only more losses than wins count as harm; yours is two-sided, twice as large"
)
assert abs(got - 1 / 64) > 1e-6, "P(X >= 5) includes 5 itself: 6/64 + 1/64; yours leaves it out, as 1 - cdf(worse) does"
assert abs(got - 7 / 64) < 1e-9, f"mcnemar(5, 1) is P(X >= 5) for X of Bin(6, 1/2), 7/64 = 0.1094; yours is {got:.4f}"
assert abs(mcnemar(1, 5) - 63 / 64) < 1e-9, (
    f"More wins than losses show no harm: mcnemar(1, 5) is 63/64; yours {mcnemar(1, 5):.4f}"
)
### BEGIN HIDDEN TESTS
for _w in range(0, 30, 3):
    for _b in range(0, 12, 2):
        _want = float(binom.sf(_w - 1, _w + _b, 0.5)) if _w + _b else 1.0
        assert abs(mcnemar(_w, _b) - _want) < 1e-9, (
            f"mcnemar({_w}, {_b}) is {_want:.4g}; yours is {mcnemar(_w, _b):.4g}"
        )
### END HIDDEN TESTS

# %% check="paired" points=3
try:
    got = drop_bound(0, 0, 320)
except (ValueError, ZeroDivisionError) as error:
    raise AssertionError(
        f"drop_bound(0, 0, 320) raises {error}: the score is not defined at δ = 0 itself; search just above it"
    ) from error
assert np.isfinite(got), "drop_bound(0, 0, 320) is no number: guard the two roots against a tiny negative and a zero"
assert got > 1e-4, (
    "320 tickets without a disagreement do not prove a drop of 0: a Wald interval or a bootstrap has no width here, the score "
    "bound is 0.00838"
)
assert abs(got - 0.011862) > 1e-4, "One-sided at 95 % means z = 1.645, the quantile at 1 - alpha; yours is 1.96"
assert abs(got - 0.008384) < 1e-5, f"drop_bound(0, 0, 320) is 0.00838; yours is {got:.5f}"
got = drop_bound(4, 1, 320)
assert got > 3 / 320, f"The upper bound lies above the observed drop, 3/320 = {3 / 320:.5f}; yours, {got:.5f}, does not"
assert abs(got - 0.024817) < 1e-5, (
    f"drop_bound(4, 1, 320) is 0.02482; yours is {got:.5f}: compare B, C and q with the formula"
)
swapped = drop_bound(1, 4, 320)
assert abs(swapped - 0.002798) < 1e-5, (
    f"With more wins than losses the observed drop is negative and the bound is near 0: drop_bound(1, 4, 320) is 0.00280; yours "
    f"is {swapped:.5f}"
)
assert drop_bound(4, 1, 320, alpha=0.01) > got, "A smaller alpha asks for more certainty: the bound rises; use alpha"
assert drop_bound(7, 0, 7) == 1, "All tickets lost: the bound is 1.0"


### BEGIN HIDDEN TESTS
def _score(w, b, n, d):
    _bb = (2 * n - w + b) * d - w - b
    _q = (np.sqrt(max(_bb * _bb + 8 * n * b * d * (1 - d), 0)) - _bb) / (4 * n)
    return (w - b - n * d) / np.sqrt(n * (2 * _q + d * (1 - d)))


for _w, _b, _n, _alpha in (
    (0, 0, 1, 0.05),
    (1, 0, 5, 0.05),
    (0, 3, 40, 0.1),
    (12, 7, 200, 0.01),
    (30, 2, 90, 0.2),
    (0, 9, 9, 0.05),
    (3, 3, 1000, 0.05),
):
    _got = drop_bound(_w, _b, _n, _alpha)
    _z = float(norm.ppf(1 - _alpha))
    _lo, _hi = max(_got - 1.5e-5, (_w - _b) / _n + 1e-9), min(_got + 1.5e-5, 1 - 1e-9)
    assert (_w - _b) / _n < _got <= 1, f"drop_bound({_w}, {_b}, {_n}, {_alpha}) = {_got} is not above the observed drop"
    assert _score(_w, _b, _n, _lo) >= -_z - 1e-6, f"drop_bound({_w}, {_b}, {_n}, {_alpha}): Z({_got}) is not -z"
    assert _score(_w, _b, _n, _hi) <= -_z + 1e-6, f"drop_bound({_w}, {_b}, {_n}, {_alpha}): Z({_got}) is not -z"
### END HIDDEN TESTS


# %% mistake="two-sided" of="paired" says="yours is two-sided"
def mcnemar(worse, better):
    return binomtest(worse, worse + better).pvalue if worse + better else 1.0


def drop_bound(worse, better, n, alpha=0.05):
    return 1.0


# %% mistake="leaves the observed count out" of="paired" says="includes 5 itself"
def mcnemar(worse, better):
    return 1 - binom.cdf(worse, worse + better, 0.5) if worse + better else 1.0


def drop_bound(worse, better, n, alpha=0.05):
    return 1.0


# %% mistake="a Wald interval" of="paired" says="has no width here"
def mcnemar(worse, better):
    return float(binom.sf(worse - 1, worse + better, 0.5)) if worse + better else 1.0


def drop_bound(worse, better, n, alpha=0.05):
    if worse == n:
        return 1.0
    drop = (worse - better) / n
    return drop + norm.ppf(1 - alpha) * np.sqrt((worse + better) / n - drop**2) / np.sqrt(n)


# %% mistake="a paired bootstrap" of="paired" says="a bootstrap has no width here"
def mcnemar(worse, better):
    return float(binom.sf(worse - 1, worse + better, 0.5)) if worse + better else 1.0


def drop_bound(worse, better, n, alpha=0.05):
    lost = np.r_[np.ones(worse), -np.ones(better), np.zeros(n - worse - better)]
    means = np.random.default_rng(0).choice(lost, (2000, n)).mean(1)
    return float(np.quantile(means, 1 - alpha))


# %% mistake="a two-sided quantile" of="paired" says="yours is 1.96"
def mcnemar(worse, better):
    return float(binom.sf(worse - 1, worse + better, 0.5)) if worse + better else 1.0


def drop_bound(worse, better, n, alpha=0.05):
    if worse == n:
        return 1.0

    def above(d):
        b = (2 * n - worse + better) * d - worse - better
        q = (np.sqrt(max(b * b + 8 * n * better * d * (1 - d), 0)) - b) / (4 * n)
        return (worse - better - n * d) / np.sqrt(n * (2 * q + d * (1 - d))) + norm.ppf(1 - alpha / 2)

    return brentq(above, (worse - better) / n + 1e-12, 1 - 1e-12)


# %% mistake="the lower bound" of="paired" says="lies above the observed drop"
def mcnemar(worse, better):
    return float(binom.sf(worse - 1, worse + better, 0.5)) if worse + better else 1.0


def drop_bound(worse, better, n, alpha=0.05):
    if worse == n:
        return 1.0
    z = norm.ppf(1 - alpha)
    if worse + better == 0:
        return z * z / (n + z * z)
    drop = (worse - better) / n
    return drop - z * np.sqrt((worse + better) / n - drop**2) / np.sqrt(n)


# %% mistake="ignores the pairing" of="paired" says="compare B, C and q with the formula"
def mcnemar(worse, better):
    return float(binom.sf(worse - 1, worse + better, 0.5)) if worse + better else 1.0


def drop_bound(worse, better, n, alpha=0.05):
    if worse == n:
        return 1.0
    z = norm.ppf(1 - alpha)
    if worse + better == 0:
        return z * z / (n + z * z)
    return (worse - better) / n + z * np.sqrt((worse / n * (1 - worse / n) + better / n * (1 - better / n)) / n) * 1.3


# %% mistake="searches positive drops only" of="paired" says="raises"
def mcnemar(worse, better):
    return float(binom.sf(worse - 1, worse + better, 0.5)) if worse + better else 1.0


def drop_bound(worse, better, n, alpha=0.05):
    if worse == n:
        return 1.0

    def above(d):
        b = (2 * n - worse + better) * d - worse - better
        q = (np.sqrt(max(b * b + 8 * n * better * d * (1 - d), 0)) - b) / (4 * n)
        return (worse - better - n * d) / (n * (2 * q + d * (1 - d))) ** 0.5 + norm.ppf(1 - alpha)

    return brentq(above, 0.0, 1.0)


# %% alternative="sums and bisection" of="paired"
def mcnemar(worse, better):
    from math import comb

    m = worse + better
    return sum(comb(m, k) for k in range(worse, m + 1)) / 2**m


def drop_bound(worse, better, n, alpha=0.05):
    z = norm.isf(alpha)
    low, high = (worse - better) / n, 1.0
    while high - low > 1e-9:
        d = (low + high) / 2
        b = 2 * n * d - (worse - better) * d - (worse + better)
        q = (np.sqrt(abs(b * b + 8 * n * better * d * (1 - d))) - b) / (4 * n)
        spread = n * (2 * q + d * (1 - d))
        if spread <= 0 or (worse - better - n * d) / np.sqrt(spread) > -z:
            low = d
        else:
            high = d
    return high


# %% [markdown]
# The match: `statsmodels` has the exact McNemar test, two-sided. And a bound is only as good as its coverage, which can be computed without simulation: for given true shares of "worse" and "better", sum the multinomial over all outcomes that pass. At a true drop of exactly the margin at most 5 % of the test sets should pass.


# %%
@cache
def bound(worse: int, better: int, n: int, alpha: float) -> float:
    """`drop_bound`, remembered."""
    return float(drop_bound(worse, better, n, alpha))


@cache
def most_lost(n: int, margin: float, alpha: float, better: int) -> int:
    """The largest count of losses with which a challenger passes, given its wins; -1 if none."""
    start = most_lost(n, margin, alpha, better - 1) + 1 if better else 0
    return next(w for w in range(start, n + 2) if w + better > n or bound(w, better, n, alpha) >= margin) - 1


def pass_share(n: int, worse: float, better: float, *, margin: float = 0.02, alpha: float = 0.05) -> float:
    """The exact probability that a challenger with these true shares passes the paired rule on n tickets."""
    if n == 0:
        return 1.0
    wins = np.arange(int(binom.isf(1e-9, n, better)) + 1)
    edges = np.array([most_lost(n, margin, alpha, int(k)) for k in wins])
    return float(np.sum(binom.pmf(wins, n, better) * binom.cdf(edges, n - wins, worse / (1 - better))))


for worse, better in ((5, 1), (9, 2), (3, 3)):
    table = [[100, worse], [better, 7]]
    print(f"{worse} worse, {better} better: yours {mcnemar(worse, better):.4f},",
          f"statsmodels (two-sided) {statsmodels_mcnemar(table, exact=True).pvalue:.4f}")  # fmt: skip
for better in (0.001, 0.005, 0.02):
    shares = ", ".join(f"{pass_share(n, 0.02 + better, better):.3f} with {n} tickets" for n in (160, 320, 640))
    print(f"a drop of 2 points with {better:.1%} wins passes in", shares)

# %% [markdown]
# ## How many tickets, and how lucky is a fixed margin?
#
# How large must $n$ be so that a harmless challenger passes? If its disagreements, wins and losses together, are a share $\psi$ of the tickets, the drop has a standard error of about $\sqrt{\psi/n}$, and a challenger with no true drop passes with probability $1-\beta$ (the *power*) if
#
# $$n = \left\lceil \frac{(z_{1-\alpha} + z_{1-\beta})^2\, \psi}{\delta^2} \right\rceil.$$
#
# Halve the margin, and the labels cost four times as much. Without pairing, $\psi$ is replaced by $2p(1-p)$, the variance of a difference between two shares on different tickets.
#
# A rule that many pipelines have in place of all this: *the champion's exact match on 100 tickets is on record; a challenger is blocked if its exact match on 100 fresh tickets is more than 2 points lower.* Not paired, no level, no power. The pool says what this does.
#
# **Exercise.** `tickets_needed(disagree, margin, alpha, power)`: the formula, as a whole number. `tickets_needed(0.01, 0.02, 0.05, 0.9)` is 215. And three predictions, each a share from 0 to 1:
#
# - `predicted_harmless`: of the harmless releases, how often does the rule block one (the mean of the four)?
# - `predicted_missed`: how often does it let *wrong alpha* pass? (Its drop is in the table above.)
# - `predicted_peeking`: a canary that is exactly as good as the champion is tested after each of 3,000 requests, each time with $p \le 0.05$ as the alarm. How often does the alarm go off at some time?
#
# <details><summary>Hint 1</summary>The two quantiles are of the standard normal; round up, since 214.1 tickets are not enough.</details>
# <details><summary>Hint 2</summary><code>norm.ppf(1 - alpha)</code> and <code>norm.ppf(power)</code>. For the predictions: the standard error of a share near 99 % on 100 tickets is about one point, near 95 % two; of a difference, √2 times that or so.</details>
# <details><summary>Hint 3</summary><code>math.ceil((z1 + z2) ** 2 * disagree / margin ** 2)</code>, as an int. No prediction is wrong as long as it is a share.</details>


# %% exercise="plan" difficulty=2 minutes=7
def tickets_needed(disagree: float, margin: float, alpha: float, power: float) -> int:
    """How many paired tickets a challenger without a drop needs to pass with this probability."""
    ### BEGIN SOLUTION
    z = norm.ppf(1 - alpha) + norm.ppf(power)
    return int(np.ceil(z**2 * disagree / margin**2))
    ### END SOLUTION


predicted_harmless = None  # how often the fixed margin blocks a harmless release
predicted_missed = None  # how often it lets "wrong alpha" pass
predicted_peeking = None  # how often a harmless canary is stopped by someone who looks after each request
### BEGIN SOLUTION
predicted_harmless, predicted_missed, predicted_peeking = 0.1, 0.2, 0.3
### END SOLUTION

# %% check="plan" points=1
for value, what in ((predicted_harmless, "predicted_harmless"), (predicted_missed, "predicted_missed"),
                    (predicted_peeking, "predicted_peeking")):  # fmt: skip
    assert value is not None, f"Write your prediction down before you look: {what} = a share from 0 to 1"
    assert 0 <= value <= 1, f"{what} is a share from 0 to 1; yours is {value}"

# %% check="plan" points=1
got = tickets_needed(0.01, 0.02, 0.05, 0.9)
assert got != 263, "Non-inferiority is one-sided: the quantile at 1 - alpha, 1.645, not at 1 - alpha / 2"
assert got != 68, (
    "This plans for a power of 50 %: without the quantile of the power half of the harmless releases are blocked"
)
assert got != 214, "Round up: with 214 tickets the power is below what was asked for"
assert got == 215, f"tickets_needed(0.01, 0.02, 0.05, 0.9) is 215; yours is {got}"
assert tickets_needed(0.01, 0.01, 0.05, 0.9) == 857, (
    f"Half the margin needs four times as many tickets, 857: the margin is squared; yours is {tickets_needed(0.01, 0.01, 0.05, 0.9)}"
)
### BEGIN HIDDEN TESTS
for _psi, _m, _a, _p, _n in (
    (0.02, 0.02, 0.05, 0.8, 310),
    (0.005, 0.02, 0.01, 0.95, 198),
    (0.06, 0.05, 0.1, 0.5, 40),
    (0.2, 0.03, 0.2, 0.99, 2231),
):
    _got = tickets_needed(_psi, _m, _a, _p)
    assert _got == _n, f"tickets_needed({_psi}, {_m}, {_a}, {_p}) is {_n}; yours is {_got}"
### END HIDDEN TESTS


# %% mistake="two-sided alpha" of="plan" says="Non-inferiority is one-sided"
def tickets_needed(disagree, margin, alpha, power):
    return int(np.ceil((norm.ppf(1 - alpha / 2) + norm.ppf(power)) ** 2 * disagree / margin**2))


predicted_harmless, predicted_missed, predicted_peeking = 0.1, 0.2, 0.3


# %% mistake="no power" of="plan" says="a power of 50 %"
def tickets_needed(disagree, margin, alpha, power):
    return int(np.ceil(norm.ppf(1 - alpha) ** 2 * disagree / margin**2))


predicted_harmless, predicted_missed, predicted_peeking = 0.1, 0.2, 0.3


# %% mistake="rounds down" of="plan" says="Round up"
def tickets_needed(disagree, margin, alpha, power):
    return int((norm.ppf(1 - alpha) + norm.ppf(power)) ** 2 * disagree / margin**2)


predicted_harmless, predicted_missed, predicted_peeking = 0.1, 0.2, 0.3


# %% mistake="a percentage" of="plan" says="is a share from 0 to 1"
def tickets_needed(disagree, margin, alpha, power):
    return 215


predicted_harmless, predicted_missed, predicted_peeking = 10, 20, 5


# %% mistake="the margin is not squared" of="plan" says="is 215; yours is 5"
def tickets_needed(disagree, margin, alpha, power):
    return int(np.ceil((norm.ppf(1 - alpha) + norm.ppf(power)) ** 2 * disagree / margin))


predicted_harmless, predicted_missed, predicted_peeking = 0.1, 0.2, 0.3


# %% alternative="the smallest n that satisfies it" of="plan"
def tickets_needed(disagree, margin, alpha, power):
    n = 1
    while margin * (n / disagree) ** 0.5 < norm.isf(alpha) + norm.isf(1 - power):
        n += 1
    return n


predicted_harmless, predicted_missed, predicted_peeking = 0, 1, 0.05

# %% [markdown]
# The four harmless releases disagree with the champion on few tickets. Here is what is needed for a power of 90 %, by the formula and by the exact sum, with pairing and without:

# %%
harmless_disagree = max(float((right["champion"] != right[name]).mean()) for name in HARMLESS)
accuracy = float(right["champion"].mean())
rows = []
for margin in (0.01, 0.02, 0.04):
    for disagree in (0.005, 0.01, 0.02):
        n = tickets_needed(disagree, margin, 0.05, 0.9)
        alone = tickets_needed(2 * accuracy * (1 - accuracy) + disagree, margin, 0.05, 0.9)
        exact = pass_share(n, disagree / 2, disagree / 2, margin=margin)
        rows.append(
            {"margin": margin, "disagree": disagree, "tickets, paired": n, "exact power": exact, "not paired": alone}
        )
display(
    pd.DataFrame(rows)
    .style.hide(axis="index")
    .format({"margin": "{:.0%}", "disagree": "{:.1%}", "exact power": "{:.0%}"})
)
print(f"the harmless release that disagrees most: {harmless_disagree:.2%} of the pool")

# %% [markdown]
# With 320 tickets, a margin of 2 points and up to 1 % of disagreements, a harmless challenger passes. Where disagreements are a handful, the normal approximation promises more power than there is; the exact sum is cheap, so use it to check a plan.
#
# ## Slices
#
# A drop of 2 points in the mean can be a drop of 20 points for one kind of customer. So look at slices: each category, each urgency, tickets that name no product, that digress, that are long. But eleven slices tested at 5 % each cry wolf in up to 43 % of the harmless releases. Holm's procedure (1979) keeps the probability of *any* false alarm at $\alpha$, for any dependence between the tests: sort the $m$ values $p_{(1)} \le \dots \le p_{(m)}$; for $k = 1, 2, \dots$ call slice $k$ harmed if $p_{(k)} \le \alpha/(m-k+1)$, and **stop at the first that is not**.
#
# In slices the question is the first one, "is harm shown?", since in a slice of thirty tickets no challenger could ever show that it is *not* worse by 2 points. So the burden of proof is divided: overall it lies with the challenger, in each slice with the gate.
#
# **Exercise.** `verdict(bound, harm, margin, alpha)` returns the reasons to block, an empty list if there is none.
#
# - `bound` is the upper bound of the overall drop. The reason `"overall"` comes first; the challenger passes this part only if `bound < margin`. A bound that is not a number (an evaluation that fell over) blocks.
# - `harm` maps a slice's name to its McNemar $p$. The harmed slices by Holm follow, the smallest $p$ first, equal ones in the order of the dictionary.
#
# `verdict(0.025, {"a": 0.04, "b": 0.001}, 0.02, 0.05)` is `["overall", "b", "a"]`: 0.001 ≤ 0.05/2, and then 0.04 ≤ 0.05/1. *About 7 lines.*
#
# <details><summary>Hint 1</summary>What does a comparison with nan return? And what does Holm do with a small p that stands behind a large one?</details>
# <details><summary>Hint 2</summary><code>sorted(harm, key=harm.get)</code> is stable. Count down how many are left, and break.</details>
# <details><summary>Hint 3</summary>reasons = [] if bound < margin else ["overall"]; for k, name in enumerate(ordered): if p > alpha / (m − k): break; append.</details>


# %% exercise="verdict" difficulty=2 minutes=8
def verdict(bound: float, harm: Mapping[str, float], margin: float, alpha: float) -> list[str]:
    """Return why a challenger is blocked: "overall" and the slices that are harmed; empty if it may pass."""
    ### BEGIN SOLUTION
    reasons = [] if bound < margin else ["overall"]
    for place, name in enumerate(sorted(harm, key=harm.__getitem__)):
        if harm[name] > alpha / (len(harm) - place):
            break
        reasons.append(name)
    return reasons
    ### END SOLUTION


# %% check="verdict" points=1
assert verdict(0.01, {}, 0.02, 0.05) == [], "The bound is below the margin and there is no slice: no reason to block"
assert verdict(0.03, {}, 0.02, 0.05) == ["overall"], "The bound is above the margin: ['overall']"
assert verdict(0.02, {}, 0.02, 0.05) == ["overall"], "A bound of exactly the margin does not pass: bound < margin"
assert verdict(float("nan"), {}, 0.02, 0.05) == ["overall"], (
    "A bound that is not a number passes: every comparison with nan is false, so ask for what passes and block the rest"
)
### BEGIN HIDDEN TESTS
assert verdict(-0.01, {"a": 1.0}, 0.02, 0.05) == [], "A negative bound is below the margin"
assert verdict(1.0, {"a": 0.9, "b": 0.5}, 0.02, 0.05) == ["overall"], "No slice is harmed here"
assert verdict(np.float64("nan"), {"a": 1e-9}, 0.02, 0.05) == ["overall", "a"], (
    "nan blocks, and slices are judged all the same"
)
### END HIDDEN TESTS

# %% check="verdict" points=2
eleven = {f"s{i}": 0.5 for i in range(10)}
assert verdict(0, {**eleven, "x": 0.03}, 0.02, 0.05) == [], (
    "One of eleven slices at p = 0.03 is what chance gives: correct for the number of slices, 0.05 / 11 for the smallest"
)
assert verdict(0, {"a": 0.04, "b": 0.001}, 0.02, 0.05) == ["b", "a"], (
    "0.001 <= 0.05/2, and then 0.04 <= 0.05/1: Holm's bar rises with each slice that is harmed (Bonferroni's does not), and "
    f"the smallest comes first; yours is {verdict(0, {'a': 0.04, 'b': 0.001}, 0.02, 0.05)}"
)
assert verdict(0, {"a": 0.03, "b": 0.04}, 0.02, 0.05) == [], (
    "0.03 > 0.05/2, so Holm stops and 0.04 is not looked at, though it is below 0.05/1: stop at the first that is not harmed"
)
assert verdict(0, {"a": 0.025, "b": 0.9}, 0.02, 0.05) == ["a"], "p of exactly the bar counts as harmed: <="
assert verdict(0, {"a": 0.02, "b": 0.03, "c": 0.04, "d": 0.9}, 0.02, 0.05) == [], (
    "0.02 > 0.05/4. Benjamini-Hochberg would go on; it holds the share of false alarms, Holm the chance of any"
)
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(3)
for _m in (1, 2, 5, 12):
    for _ in range(40):
        _p = {f"k{i}": float(v) for i, v in enumerate(_rng.choice([0.0005, 0.004, 0.011, 0.0126, 0.02, 0.3, 1.0], _m))}
        _want = []
        for _k, _name in enumerate(sorted(_p, key=lambda name, _p=_p: _p[name])):
            if _p[_name] * (_m - _k) > 0.05:
                break
            _want.append(_name)
        _given = dict(_p)
        assert list(verdict(0.0, _given, 0.02, 0.05)) == _want, (
            f"{_p}: {_want}; yours is {verdict(0.0, _p, 0.02, 0.05)}"
        )
        assert _given == _p, "verdict must not change the dictionary that it gets"
assert list(verdict(0.5, {"a": 0.001}, 0.02, 0.0001)) == ["overall"], "alpha is an argument"
### END HIDDEN TESTS


# %% mistake="blocks what is above, so nan passes" of="verdict" says="every comparison with nan is false"
def verdict(bound, harm, margin, alpha):
    return ["overall"] if bound >= margin else []


# %% mistake="every slice at alpha" of="verdict" says="correct for the number of slices"
def verdict(bound, harm, margin, alpha):
    found = [] if bound < margin else ["overall"]
    return found + sorted([name for name in harm if harm[name] <= alpha], key=harm.get)


# %% mistake="Bonferroni" of="verdict" says="Bonferroni's does not"
def verdict(bound, harm, margin, alpha):
    found = [] if bound < margin else ["overall"]
    return found + sorted([name for name in harm if harm[name] <= alpha / len(harm)], key=harm.get)


# %% mistake="does not stop" of="verdict" says="stop at the first that is not harmed"
def verdict(bound, harm, margin, alpha):
    found = [] if bound < margin else ["overall"]
    ordered = sorted(harm, key=harm.get)
    return found + [name for k, name in enumerate(ordered) if harm[name] <= alpha / (len(harm) - k)]


# %% mistake="Benjamini-Hochberg" of="verdict" says="0.04 is not looked at"
def verdict(bound, harm, margin, alpha):
    found = [] if bound < margin else ["overall"]
    ordered = sorted(harm, key=harm.get)
    passed = [k for k, name in enumerate(ordered) if harm[name] <= alpha * (k + 1) / len(harm)]
    return found + ordered[: max(passed, default=-1) + 1]


# %% mistake="the bar itself passes" of="verdict" says="exactly the bar counts as harmed"
def verdict(bound, harm, margin, alpha):
    found = [] if bound < margin else ["overall"]
    for k, name in enumerate(sorted(harm, key=harm.get)):
        if harm[name] >= alpha / (len(harm) - k):
            break
        found.append(name)
    return found


# %% mistake="a bound of the margin passes" of="verdict" says="bound < margin"
def verdict(bound, harm, margin, alpha):
    return ["overall"] if bound > margin else []


# %% alternative="adjusted p values" of="verdict"
def verdict(bound, harm, margin, alpha):
    ordered = sorted(harm.items(), key=lambda item: item[1])
    adjusted, highest = [], 0.0
    for k, (name, p) in enumerate(ordered):
        highest = max(highest, p * (len(ordered) - k))
        adjusted.append((name, highest))
    overall = ["overall"] if not (bound < margin) else []
    return overall + [name for name, p in adjusted if p <= alpha]


# %% [markdown]
# ## The gate, on one test set and on many
#
# The gate has three parts: `verdict` on the overall bound and the slices, and your behavioural tests. First on one test set, the way a pipeline runs it; then on many test sets drawn from the pool, since one run says as little about a gate as one example about a model. The table's interval comes from resampling the pool, company by company: it says what the share could have been with {{companies}} other companies.

# %%
masks = {
    **{c: np.array([t.triage.category == c for t in pool]) for c in complaints.PROBLEMS},
    **{f"urgency {u}": np.array([t.triage.urgency == u for t in pool]) for u in complaints.HASTE},
    "no product": np.array([t.triage.product is None for t in pool]),
    "digresses": np.array([bool(re.search("for now|for the moment|why I write", t.text)) for t in pool]),
    "long": np.array([len(t.text) > 170 for t in pool]),
}
grid = np.stack([np.ones(len(pool), bool), *masks.values()])  # (12, pool): all tickets, then the slices
lost = {name: grid & right["champion"] & ~right[name] for name in CHANGES}
won = {name: grid & ~right["champion"] & right[name] for name in CHANGES}
p_value = cache(mcnemar)


def reasons(name: str, rows: np.ndarray) -> list[str]:
    """The gate's verdict on these rows of the pool."""
    worse, better = (part[name][:, rows].sum(1).tolist() for part in (lost, won))
    harm = {key: p_value(w, b) for key, w, b in zip(masks, worse[1:], better[1:], strict=True)}
    return verdict(bound(worse[0], better[0], len(rows), 0.05), harm, 0.02, 0.05)


rng = np.random.default_rng(seed)
one = rng.permutation(len(pool))[:test_set]
for name in CHANGES:
    found = reasons(name, one) + list(broken_tests[name])
    print(f"{name:26}", "BLOCK: " + ", ".join(found) if found else "pass")

# %%
hundred = min(100, len(pool) // 2)
blocked = {
    key: np.zeros((len(CHANGES), resamples)) for key in ("fixed margin", "overall", "slices", "gate", "not significant")
}
for again in range(resamples):
    chosen = rng.integers(0, companies, companies)
    drawn_pool = (chosen[:, None] * 16 + np.arange(16)).ravel()
    for _ in range(40):
        order = rng.permutation(drawn_pool)
        rows, first, second = order[:test_set], order[:hundred], order[hundred : 2 * hundred]
        for place, name in enumerate(CHANGES):
            found = reasons(name, rows)
            worse, better = int(lost[name][0][first].sum()), int(won[name][0][first].sum())
            for key, hit in (
                ("fixed margin", right["champion"][first].sum() - right[name][second].sum() > 0.02 * hundred),
                ("not significant", p_value(worse, better) <= 0.05),
                ("overall", "overall" in found),
                ("slices", bool(set(found) - {"overall"})),
                ("gate", bool(found) or bool(broken_tests[name])),
            ):
                blocked[key][place, again] += hit / 40
shares = {key: value.mean(1) for key, value in blocked.items()}
span = {key: np.quantile(value, [0.025, 0.975], axis=1) for key, value in blocked.items()}
written = lambda key, i: f"{shares[key][i]:.0%}  ({span[key][0, i]:.0%} to {span[key][1, i]:.0%})"
frame = pd.DataFrame(
    {
        "change": list(CHANGES),
        "really": ["broken" if name in BROKEN else "harmless" for name in CHANGES],
        "drop": [f"{100 * drops[name]:.1f}" for name in CHANGES],
        "fixed margin, 100": [written("fixed margin", i) for i in range(len(CHANGES))],
        "blocked if significant, 100": [written("not significant", i) for i in range(len(CHANGES))],
        "overall bound": [written("overall", i) for i in range(len(CHANGES))],
        "slices": [written("slices", i) for i in range(len(CHANGES))],
        "behaviour": ["blocked" if broken_tests[name] else "" for name in CHANGES],
        "gate": [written("gate", i) for i in range(len(CHANGES))],
    }
)
display(frame.style.hide(axis="index"))

bad, fine = np.arange(len(BROKEN)), len(BROKEN) + np.arange(len(HARMLESS))
names = list(CHANGES)


def keep_share(name: str, key: str, place: int, label: str) -> None:
    """Record a blocked share with its interval."""
    low, high = span[key][:, place]
    value = shares[key][place]
    card.record(name, value, low=min(low, value), high=max(high, value), format=".0%", tolerance=0.1, label=label)


for rule, key in (("fixed", "fixed margin"), ("gate", "gate"), ("significant", "not significant")):
    keep_share(
        f"{rule}_bad_low",
        key,
        int(bad[shares[key][bad].argmin()]),
        f"{key}: share blocked of the broken change blocked least",
    )
    keep_share(
        f"{rule}_bad_high",
        key,
        int(bad[shares[key][bad].argmax()]),
        f"{key}: share blocked of the broken change blocked most",
    )
    keep_share(
        f"{rule}_good_high",
        key,
        int(fine[shares[key][fine].argmax()]),
        f"{key}: share blocked of the harmless change blocked most",
    )
for key, name in (
    ("alpha", "wrong alpha"),
    ("clerk", "a clerk's labels"),
    ("lines", "line breaks kept"),
    ("cut", "cut at 180 characters"),
):
    keep_share(f"fixed_{key}", "fixed margin", names.index(name), f"fixed margin: share blocked of {name!r}")
    keep_share(f"overall_{key}", "overall", names.index(name), f"overall bound: share blocked of {name!r}")
    keep_share(
        f"significant_{key}", "not significant", names.index(name), f"blocked if significant: share blocked of {name!r}"
    )
    keep_share(f"slices_{key}", "slices", names.index(name), f"slices: share blocked of {name!r}")
card.record(
    "slices_good",
    shares["slices"][fine].max(),
    format=".1%",
    tolerance=0.03,
    label="slices: share blocked of the harmless change blocked most",
)
card.record("companies", companies, format="d", label="companies in the pool")
compare(
    [
        ("harmless releases blocked by the fixed margin", predicted_harmless, shares["fixed margin"][fine].mean()),
        (
            "wrong alpha let pass by the fixed margin",
            predicted_missed,
            1 - shares["fixed margin"][names.index("wrong alpha")],
        ),
    ],
    format=".0%",
)
