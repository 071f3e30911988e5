# %% [markdown]
# # 4.3 Release gates
#
# You will be able to decide whether a new version of a model may replace the one in production: by tests of its behaviour, by a paired comparison with a stated margin and power, by a canary that you may look at whenever you like, and with a registry from which you can go back.
#
# **You will measure.** Ten changes to a triage service, each really made: six break something, four do not. A rule of thumb (at most 2 points below the champion's number on 100 tickets) blocks a drop of {{drop_cut}} points in {{fixed_cut}} of the test sets, and one of {{drop_clerk}} points in {{fixed_clerk}}. Of the six, the gate that you build blocks even the one hardest to see in {{gate_bad_low}} of the test sets; of the four, none in more than {{gate_good_high}} ({{gate_good_high:interval}}). Looking at a canary after each request makes of a test at 5 % one that stops {{peeking}} of the harmless canaries; the test that you write stops {{betting}}. Under a stated prior, a release costs {{cost_none}} dollars in expectation with nothing in its way, {{cost_gate}} behind the gate, and {{cost_canary}} behind a canary alone.
#
# **You need.** Lesson 1.6 (intervals and paired comparisons). What an adapter is (2.1). No MLflow.
#
# **Time.** About 70 minutes; the solution runs in {{run:seconds}} s on one CPU core.

# %% [markdown]
# ## Why it matters at work
#
# Somebody retrains an adapter, rounds the weights to save memory, or moves a line break in a template, and the pipeline must say yes or no. Say yes too easily and customers find the bug; say no too easily and the team learns to press "override". Both happen under the rule "not more than two points worse on a hundred examples", since there two points are noise.
#
# In interviews: "your offline metric went from 99.4 % to 98.6 %. Do you ship?", "the difference is not significant, so the models are equal. Right?", "your canary dashboard shows p = 0.04 on the second day. What do you do?", "how do you roll back, and to what?"

# %% tags=["parameters"]
companies = 36  # whose tickets make the pool of test tickets, 16 each; quick: 5
test_set = 320  # tickets that the gate looks at; quick: 40
behaviour_tickets = 40  # tickets of the behavioural tests; quick: 8
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
from itertools import count
from numbers import Real
from pathlib import Path
from zlib import crc32

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of a faster kernel that is not installed
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

from labkit.plots import COLOURS, direct_label, label_lines, use_house_style
from labkit.predict import compare
from labkit.releases import Release, Service, as_it_is, rounded
from labkit.results import ResultCard
from labkit.world import LESSON_SEEDS, VALIDATION_SEEDS, Ticket, Triage, World, complaints
from labkit.world.draw import Draw

for name in ("alembic", "mlflow"):
    logging.getLogger(name).setLevel(logging.ERROR)
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
quick_tickets = [ticket for _ in range(max(1, retrained_on // 3)) for ticket in World(next(fresh)).tickets(32)]


def as_the_new_clerk(ticket: Ticket) -> Ticket:
    """The labels of a clerk who sends a new parcel wherever a customer with a delivery problem asks for a call."""
    found = ticket.triage
    hasty = found.category == "delivery" and found.action == "call"
    return replace(ticket, triage=replace(found, action="replace")) if hasty else ticket


refreshed = service.retrain(quick_tickets, rate=1e-3)
mislabelled = service.retrain([as_the_new_clerk(ticket) for ticket in new_tickets], rate=3e-3)
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
    "cut at 185 characters": Release(prepare=lambda text: " ".join(text.split())[:185]),
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
# **Exercise.** Write three test functions. Each returns nothing, and fails by an exception, as an `assert` raises it. They are copied into a file of their own below `HEADER`, so each may use what the header defines and what stands inside it, and nothing else of this notebook.
#
# The fixtures: `triage(texts)` takes a list of messages and returns a list of answers, each a `Triage` or `None` (no valid answer). `tickets` and `plain` are lists of `Ticket`, with `.text` and `.triage` (the right answer); those in `plain` say nothing about haste. `cases` is a list of pairs (text, right `Triage`).
#
# - `test_minimum(triage, cases)` fails if any case is not answered right.
# - `test_direction(triage, plain)`: each text gets a blank and `URGENT` at its end. The answer must then have the urgency `"high"` and otherwise be the answer to the text as it was. Fails if that is so for less than 95 % of the texts.
# - `test_invariance(triage, tickets)`, three edits:
#     - `"lines"`: each `". "` in the text becomes `".\n"`; the answer must stay.
#     - `"signature"`: a blank and `SIGNATURE` at the end; the answer must stay.
#     - `"product"`, only for tickets whose right answer has a product: each occurrence of its name in the text becomes `OTHER`; the answer must be the former answer with the product `OTHER`.
#
#   Each edit is made to the text as it was. Fails if **any one** of the three breaks more than 5 % of its tickets (the first two apply to all tickets); the message names that edit and no other.
#
# Compare with the answer to the text *before* the edit, not with the right answer: how often the service is right is measured elsewhere. An answer is all four fields. If the answer before the edit was `None`, then `None` afterwards is no change and a triage is one; for `test_direction`, `None` before is a failure. *About 25 lines in all.*
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
for field, value in {"product": OTHER, "category": "account", "urgency": "low", "action": "call"}.items():
    failed = run_tests([test_minimum], toy(lambda text, new={field: value}: replace(rules(text), **new)))
    assert "test_minimum" in failed, f"A service with the wrong {field} passes: an answer is right in all four fields"
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
loud = lambda text: text.endswith(f" {URGENT}")
good = run_tests([test_direction], toy(rules))
assert not good, f"A service that reads the urgency right must pass test_direction; it fails: {good}"
weak = lambda text: None if every(text, 25, 1) else rules(text)
given = toy(weak)
share = np.mean([weak(ticket.text) is None for ticket in given.silent])
assert 0 < share <= 0.05, "The lesson's own toy has changed; reload the lesson"
nearly = run_tests([test_direction], given)
assert not nearly, (
    f"A service that fails on {share:.1%} of the messages is blocked: at least 95 % must come out right, not all of them"
)
deaf = run_tests([test_direction], toy(lambda text: rules(text.removesuffix(f" {URGENT}"))))
assert "test_direction" in deaf, (
    "A service that does not read the last sentence passes: look at the urgency after the edit"
)
always = run_tests([test_direction], toy(lambda text: replace(rules(text), urgency="high")))
assert not always, (
    "What the test asks for is the answer after the edit; a service that calls everything urgent is caught elsewhere"
)
for field, value in {"action": "call", "category": "account", "product": None}.items():
    moves = lambda text, new={field: value}: replace(rules(text), **new) if loud(text) else rules(text)
    assert "test_direction" in run_tests([test_direction], toy(moves)), (
        f"URGENT changes the {field} as well, and the test passes: the urgency becomes high and all else stays as it was"
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
_mute = toy(lambda text: None if every(text, 8, 2) else rules(text), "another")
assert "test_direction" in run_tests([test_direction], _mute), (
    "More than 5 % of the messages have no answer and the test passes: None before the edit is a failure, not left out"
)
### END HIDDEN TESTS

# %% check="behaviour" points=2
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
part = lambda text: flips(rules(text)) if SIGNATURE in text and every(text, 9, 5) else rules(text)
given = toy(part)
share = np.mean([every(ticket.text, 9, 5) for ticket in given.drawn])
assert 0.06 < share < 0.14, "The lesson's own toy has changed; reload the lesson"
pooled = run_tests([test_invariance], given)
assert "test_invariance" in pooled, (
    f"The signature breaks {share:.0%} of the tickets and passes, because the other two edits break none: judge each edit "
    "by itself, not their mean"
)
mutants = {
    "lines": lambda text: rules(text.split("\n")[0]),
    "signature": lambda text: None if text.endswith(f" {SIGNATURE}") else rules(text),
    "product": lambda text: rules(text.replace(OTHER, "Norigon")),
}
for edit, mutant in mutants.items():
    failed = run_tests([test_invariance], toy(mutant))
    assert "test_invariance" in failed, f"A service that breaks on the edit {edit!r} passes: make this edit and compare"
    said = failed["test_invariance"].split("\nassert ")[0]  # what stands below is pytest's
    assert edit in said, (
        f"The message must hold the edit's name, {edit!r}: whoever reads the pipeline's log wants to know what broke; yours "
        f"is {said!r}"
    )
    others = [other for other in mutants if other != edit and re.search(rf"\b{other}\b(?!['\"]?[:=])", said)]
    assert not others, (
        f"Only {edit!r} breaks here, but the message also names {others}: judge and report each edit by itself"
    )
for field, value in {"urgency": "low", "category": "account", "action": "call", "product": None}.items():
    moves = lambda text, new={field: value}: replace(rules(text), **new) if SIGNATURE in text else rules(text)
    assert "test_invariance" in run_tests([test_invariance], toy(moves)), (
        f"The signature changes the {field} and the test passes: the answer stays in all four fields"
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
_sentences = lambda text: None if re.search(r"[^.]\n", text) else rules(text)
assert not run_tests([test_invariance], toy(_sentences, "sentences")), (
    "The edit 'lines' breaks the text after a full stop and nowhere else: '. ' becomes '.' and a line break"
)
_confused = lambda text: None if OTHER in text and "Balabon" in text else rules(text)
_given = toy(_confused, "twice")
_given.drawn = [replace(t, text=f"{t.text} I mean the {t.triage.product}.") for t in _given.drawn]
assert not run_tests([test_invariance], _given), (
    "Each occurrence of the product's name is replaced, not the first alone"
)
_silent = lambda text: None if every(text, 6, 1) else rules(text)
assert not run_tests([test_invariance], toy(_silent, "silent")), "None before and None after an edit is no change"
_wakes = lambda text: None if SIGNATURE not in text and every(text, 6, 1) else rules(text)
assert "signature" in str(run_tests([test_invariance], toy(_wakes, "silent"))), (
    "None before the edit and a triage after it is a change, and it passes"
)
_both = lambda text: None if ("\n" in text) + (SIGNATURE in text) + (OTHER in text) > 1 else rules(text)
assert not run_tests([test_invariance], toy(_both, "both")), (
    "Each edit is made to the text as it was, not on top of another"
)
_half = lambda text: None if "\n" in text and ". " in text else rules(text)
assert not run_tests([test_invariance], toy(_half, "half")), (
    "Each '. ' becomes '.' and a line break, not the first alone"
)
_blind = lambda text: replace(rules(text), product=None)
assert "product" in str(run_tests([test_invariance], toy(_blind, "blind"))), (
    "A service that never names the product passes: the ticket's right answer says which name to replace, not the service's"
)
### END HIDDEN TESTS


# %% mistake="demands perfection" of="behaviour" says="up to 5 % are allowed"
def test_minimum(triage, cases):
    assert triage([text for text, _ in cases]) == [truth for _, truth in cases]


def test_direction(triage, plain):
    for ticket in plain:
        (before,), (after,) = triage([ticket.text]), triage([ticket.text + " " + URGENT])
        assert before is not None
        assert after == replace(before, urgency="high")


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
    good = [b is not None and a == replace(b, urgency="high") for b, a in zip(before, after, strict=False)]
    assert sum(good) >= 0.95 * len(good)


def test_invariance(triage, tickets):
    before = triage([t.text for t in tickets])
    named = [(t, b) for t, b in zip(tickets, before, strict=False) if t.triage.product]
    lines = triage([t.text.replace(". ", ".\n") for t in tickets])
    signed = triage([t.text + " " + SIGNATURE for t in tickets])
    other = triage([t.text.replace(t.triage.product, OTHER) for t, _ in named])
    changed = [a != b for a, b in zip(lines, before, strict=False)] + [
        a != b for a, b in zip(signed, before, strict=False)
    ]
    changed += [a != (b and replace(b, product=OTHER)) for a, (_, b) in zip(other, named, strict=False)]
    assert sum(changed) <= 0.05 * len(changed), "lines, signature or product"


# %% mistake="compares with the right answer" of="behaviour" says="not with the right answer"
def test_minimum(triage, cases):
    assert triage([text for text, _ in cases]) == [truth for _, truth in cases]


def test_direction(triage, plain):
    after = triage([t.text + " " + URGENT for t in plain])
    good = [a == replace(t.triage, urgency="high") for t, a in zip(plain, after, strict=False)]
    assert sum(good) >= 0.95 * len(good)


def test_invariance(triage, tickets):
    named = [t for t in tickets if t.triage.product]
    for edit, texts, wanted in (
        ("lines", [t.text.replace(". ", ".\n") for t in tickets], [t.triage for t in tickets]),
        ("signature", [t.text + " " + SIGNATURE for t in tickets], [t.triage for t in tickets]),
        ("product", [t.text.replace(t.triage.product, OTHER) for t in named], [replace(t.triage, product=OTHER) for t in named]),
    ):  # fmt: skip
        broken = sum(a != w for a, w in zip(triage(texts), wanted, strict=False))
        assert broken <= 0.05 * len(texts), edit


# %% mistake="a mean for the simplest cases" of="behaviour" says="simple cases have no allowance"
def test_minimum(triage, cases):
    answers = triage([text for text, _ in cases])
    assert sum(a == truth for a, (_, truth) in zip(answers, cases, strict=False)) >= 0.95 * len(cases)


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
    good = [b is not None and a == replace(b, urgency="high") for b, a in zip(before, after, strict=False)]
    assert sum(good) >= 0.95 * len(good)


def test_invariance(triage, tickets):
    before = triage([t.text for t in tickets])
    signed = triage([t.text + " " + SIGNATURE for t in tickets])
    assert sum(a != b for a, b in zip(signed, before, strict=False)) <= 0.05 * len(tickets), "signature"


# %% mistake="one message for all edits" of="behaviour" says="judge and report each edit by itself"
def test_minimum(triage, cases):
    assert triage([text for text, _ in cases]) == [truth for _, truth in cases]


def test_direction(triage, plain):
    before, after = triage([t.text for t in plain]), triage([t.text + " " + URGENT for t in plain])
    good = [b is not None and a == replace(b, urgency="high") for b, a in zip(before, after, strict=True)]
    assert sum(good) >= 0.95 * len(good)


def test_invariance(triage, tickets):
    before = triage([t.text for t in tickets])
    named = [(t, b) for t, b in zip(tickets, before, strict=True) if t.triage.product]
    lines = triage([t.text.replace(". ", ".\n") for t in tickets])
    signed = triage([t.text + " " + SIGNATURE for t in tickets])
    other = triage([t.text.replace(t.triage.product, OTHER) for t, _ in named])
    renamed = [b and replace(b, product=OTHER) for _, b in named]
    for after, wanted in ((lines, before), (signed, before), (other, renamed)):
        changed = sum(a != w for a, w in zip(after, wanted, strict=True))
        assert changed <= 0.05 * len(wanted), "lines, signature or product"


# %% mistake="compares category and action alone" of="behaviour" says="right in all four fields"
def test_minimum(triage, cases):
    answers = triage([text for text, _ in cases])
    pairs = [(a, truth) for a, (_, truth) in zip(answers, cases, strict=True)]
    assert all(a is not None and (a.category, a.action) == (t.category, t.action) for a, t in pairs)


def test_direction(triage, plain):
    pass


def test_invariance(triage, tickets):
    pass


# %% mistake="leaves out what has no answer" of="behaviour" says="None before the edit is a failure, not left out"
def test_minimum(triage, cases):
    assert triage([text for text, _ in cases]) == [truth for _, truth in cases]


def test_direction(triage, plain):
    before, after = triage([t.text for t in plain]), triage([t.text + " " + URGENT for t in plain])
    good = [a == replace(b, urgency="high") for b, a in zip(before, after, strict=True) if b is not None]
    assert good
    assert sum(good) >= 0.95 * len(good)


def test_invariance(triage, tickets):
    pass


# %% mistake="one edit on top of the other" of="behaviour" says="not on top of another"
def test_minimum(triage, cases):
    assert triage([text for text, _ in cases]) == [truth for _, truth in cases]


def test_direction(triage, plain):
    before, after = triage([t.text for t in plain]), triage([t.text + " " + URGENT for t in plain])
    good = [b is not None and a == replace(b, urgency="high") for b, a in zip(before, after, strict=True)]
    assert sum(good) >= 0.95 * len(good)


def test_invariance(triage, tickets):
    before = triage([t.text for t in tickets])
    texts, wanted = [t.text.replace(". ", ".\n") for t in tickets], before
    for edit in ("lines", "signature", "product"):
        if edit == "signature":
            texts = [text + " " + SIGNATURE for text in texts]
        if edit == "product":
            kept = [i for i, t in enumerate(tickets) if t.triage.product]
            texts = [texts[i].replace(tickets[i].triage.product, OTHER) for i in kept]
            wanted = [before[i] and replace(before[i], product=OTHER) for i in kept]
        broken = sum(a != w for a, w in zip(triage(texts), wanted, strict=True))
        assert broken <= 0.05 * len(texts), edit


# %% alternative="a message of several lines" of="behaviour"
def test_minimum(triage, cases):
    wrong = [text for text, truth in cases if triage([text]) != [truth]]
    assert wrong == []


def test_direction(triage, plain):
    def moves(ticket):
        before, after = triage([ticket.text, f"{ticket.text} {URGENT}"])
        return before is not None and after is not None and replace(before, urgency="high") == after

    assert sum(map(moves, plain)) / len(plain) > 0.9499


def test_invariance(triage, tickets):
    def share(subset, edit, new):
        old = [
            (new(answer), text)
            for answer, text in zip(triage([t.text for t in subset]), map(edit, subset), strict=True)
        ]
        return sum(triage([text]) != [wanted] for wanted, text in old) / max(1, len(subset))

    named = [t for t in tickets if t.triage.product is not None]
    shares = {
        "lines": share(tickets, lambda t: t.text.replace(". ", ".\n"), lambda a: a),
        "signature": share(tickets, lambda t: t.text + " " + SIGNATURE, lambda a: a),
        "product": share(
            named,
            lambda t: t.text.replace(t.triage.product, OTHER),
            lambda a: a if a is None else replace(a, product=OTHER),
        ),
    }
    found = [f"{edit}: {value:.0%}" for edit, value in shares.items() if value > 0.05]
    assert not found, "\n".join(["edits that change more than 5 % of the answers:", *found])


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
                  ("cut", "cut at 185 characters"), ("clerk", "a clerk's labels")):  # fmt: skip
    by_company = (right["champion"].astype(float) - right[name]).reshape(companies, 16).mean(1)
    spread = 1.96 * by_company.std(ddof=1) / np.sqrt(companies)
    card.record(f"drop_{key}", 100 * drops[name], low=100 * (drops[name] - spread), high=100 * (drops[name] + spread),
                format=".1f", tolerance=1.5, label=f"drop in exact match, points: {name}")  # fmt: skip
card.record("pool", len(pool), format="d", label="tickets in the pool")

# %% [markdown]
# Some of this surprises most people: an adapter in 3 bits costs nothing that these tickets show, a coarse scale for the base model ruins it, and one line break costs {{drop_newline}} points.
#
# Of $n$ tickets let $w$ be those that only the champion has right (*worse*) and $b$ those that only the challenger has right (*better*). The drop is $(w-b)/n$; tickets on which both are right or both wrong say nothing about it. Two questions can be asked, and they are not the same:
#
# **Is it worse?** If it were not, each disagreement would be a fair coin, $w \sim \mathrm{Bin}(w+b, \tfrac12)$. The one-sided exact McNemar test is $p = P(X \ge w)$ for $X \sim \mathrm{Bin}(w+b, \tfrac12)$, and 1 without disagreements. A small $p$ shows harm. A large $p$ shows *nothing*: with 4 tickets no release is ever significantly worse, even if it loses all four ($p = 1/16$).
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
# - `drop_bound(worse, better, n, alpha=0.05)`: Tango's upper bound, a share, to within 1e-5; 1.0 if `worse == n`. `drop_bound(4, 1, 320)` is 0.02482 and `drop_bound(0, 0, 320)` is 0.00838. After many wins it is negative: `drop_bound(0, 20, 320)` is -0.04370.
#
# All counts are whole numbers, $n \ge 1$, $w + b \le n$, and $0 < \alpha < 0.5$. *About 12 lines.*
#
# <details><summary>Hint 1</summary>For the first: the tail of a binomial, with the observed count in it. For the second: write Z as a function of δ, and find where Z + z crosses zero.</details>
# <details><summary>Hint 2</summary><code>binomtest(worse, worse + better, alternative="greater").pvalue</code> needs at least one disagreement. <code>brentq(f, low, high)</code> finds a root between two points with different signs; Z is not defined at 0 and 1 exactly.</details>
# <details><summary>Hint 3</summary>Low end: (worse − better)/n + 1e-9, also where that is negative. High end: 1 − 1e-9. Guard the root with <code>max(B*B - 8*n*C, 0)</code>.</details>


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
try:
    swapped = drop_bound(1, 4, 320)
except ValueError as error:
    raise AssertionError(
        f"drop_bound(1, 4, 320) raises {error}: with more wins than losses the observed drop is negative, and the search starts there"
    ) from error
assert abs(swapped - 0.002798) < 1e-5, (
    f"With more wins than losses the observed drop is negative and the bound is near 0: drop_bound(1, 4, 320) is 0.00280; yours "
    f"is {swapped:.5f}"
)
try:
    negative = drop_bound(0, 20, 320)
except ValueError as error:
    raise AssertionError(
        f"drop_bound(0, 20, 320) raises {error}: after many wins the bound itself is negative; search from (worse - better)/n on"
    ) from error
assert abs(negative + 0.043702) < 1e-5, (
    f"20 wins and no loss show a gain, and the bound is negative, -0.04370; yours is {negative:.5f}"
)
assert drop_bound(4, 1, 320, alpha=0.01) > got, "A smaller alpha asks for more certainty: the bound rises; use alpha"
try:
    got, most = drop_bound(7, 0, 7), drop_bound(6, 0, 7)
except (ValueError, ZeroDivisionError) as error:
    raise AssertionError(
        f"7 or 6 tickets of 7 lost raises {error}: with all lost there is no root, return 1.0; else search up to 1"
    ) from error
assert abs(got - 1) < 1e-5, f"All tickets lost: the bound is 1.0; yours is {got}"
assert abs(most - 0.967456) < 1e-5, f"drop_bound(6, 0, 7) is 0.96746; yours is {most:.5f}"


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


# %% mistake="no bound below zero" of="paired" says="the bound is negative, -0.04370"
def mcnemar(worse, better):
    return float(binom.sf(worse - 1, worse + better, 0.5)) if worse + better else 1.0


def drop_bound(worse, better, n, alpha=0.05):
    def above(d):
        b = (2 * n - worse + better) * d - worse - better
        q = (np.sqrt(max(b * b + 8 * n * better * d * (1 - d), 0)) - b) / (4 * n)
        return (worse - better - n * d) / (n * (2 * q + d * (1 - d))) ** 0.5 + norm.ppf(1 - alpha)

    low = max(0, (worse - better) / n) + 1e-9
    return 1.0 if worse == n else 0.0 if above(low) < 0 else brentq(above, low, 1 - 1e-9)


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
    assert isinstance(value, Real), f"{what} is a number, a share from 0 to 1; yours is {value!r}"
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
    for disagree in (0.0025, 0.005, 0.01):
        n = tickets_needed(disagree, margin, 0.05, 0.9)
        alone = tickets_needed(max(2 * accuracy * (1 - accuracy), 1e-4), margin, 0.05, 0.9)
        exact = pass_share(n, disagree / 2, disagree / 2, margin=margin)
        rows.append(
            {"margin": margin, "disagree": disagree, "tickets, paired": n, "exact power": exact, "not paired": alone}
        )
display(
    pd.DataFrame(rows)
    .style.hide(axis="index")
    .format({"margin": "{:.0%}", "disagree": "{:.2%}", "exact power": "{:.0%}"})
)
print(f"the harmless release that disagrees most: {harmless_disagree:.2%} of the pool")
card.record(
    "power",
    pass_share(320, 0.005, 0.005),
    format=".0%",
    label="exact power, 320 tickets, 1 % of disagreements, margin 2 points",
)

# %% [markdown]
# Where disagreements are a handful, the normal approximation promises more power than there is: plan with the formula, check with the exact sum. Pairing pays as long as both fail on the same tickets: the less they disagree, the fewer you label. (27 tickets for a margin of 4 points have no power at all, since even without a disagreement their bound is 9 points.) With 320 tickets, a margin of 2 points and 1 % of disagreements the exact power is {{power}}.
#
# ## Slices
#
# A drop of 2 points in the mean can be a drop of 20 points for one kind of customer. So look at slices: each category, each urgency, tickets that name no product, that digress, that are long. But eleven independent tests at 5 % each cry wolf in 43 % of the harmless releases. Holm's procedure (1979) keeps the probability of *any* false alarm at $\alpha$, for any dependence between the tests: sort the $m$ values $p_{(1)} \le \dots \le p_{(m)}$; for $k = 1, 2, \dots$ call slice $k$ harmed if $p_{(k)} \le \alpha/(m-k+1)$, and **stop at the first that is not**.
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
    "nan blocks: 'overall' first, and slices are judged all the same"
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
got = verdict(0.025, {"a": 0.04, "b": 0.001}, 0.02, 0.05)
assert got == ["overall", "b", "a"], f"The example of the statement gives ['overall', 'b', 'a']; yours is {got}"
assert verdict(0, {"a": 0.03, "b": 0.04}, 0.02, 0.05) == [], (
    "0.03 > 0.05/2, so Holm stops and 0.04 is not looked at, though it is below 0.05/1: stop at the first that is not harmed"
)
assert verdict(0, {"a": 0.025, "b": 0.9}, 0.02, 0.05) == ["a"], "p of exactly the bar counts as harmed: <="
assert verdict(0, {"a": 0.02, "b": 0.03, "c": 0.04, "d": 0.9}, 0.02, 0.05) == [], (
    "0.02 > 0.05/4. Benjamini-Hochberg would go on; it holds the share of false alarms, Holm the chance of any"
)
### BEGIN HIDDEN TESTS
assert verdict(0.03, {}, 0.05, 0.05) == [], "margin is an argument: 0.03 is below 0.05"
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
    key: np.zeros((len(CHANGES), resamples))
    for key in ("fixed margin", "overall", "slices", "slices alone", "gate", "significant")
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
                ("significant", p_value(worse, better) <= 0.05),
                ("overall", "overall" in found),
                ("slices", bool(set(found) - {"overall"})),
                ("slices alone", bool(found) and "overall" not in found),
                ("gate", bool(found) or bool(broken_tests[name])),
            ):
                blocked[key][place, again] += hit / 40
shares = {key: value.mean(1) for key, value in blocked.items()}
span = {key: np.quantile(value, [0.025, 0.975], axis=1) for key, value in blocked.items()}


def written(key: str, place: int) -> str:
    """A blocked share with its interval, where that is more than one number."""
    share, low, high = (f"{part:.0%}" for part in (shares[key][place], *span[key][:, place]))
    return share if low == high else f"{share} ({low} to {high})"


frame = pd.DataFrame(
    {
        "change": list(CHANGES),
        "really": ["broken" if name in BROKEN else "harmless" for name in CHANGES],
        "drop": [f"{100 * drops[name]:.1f}" for name in CHANGES],
        "fixed margin, 100": [written("fixed margin", i) for i in range(len(CHANGES))],
        "blocked if significant, 100": [written("significant", i) for i in range(len(CHANGES))],
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


keep_share(
    "gate_bad_low",
    "gate",
    int(bad[shares["gate"][bad].argmin()]),
    "gate: share blocked of the broken change blocked least",
)
keep_share(
    "gate_good_high",
    "gate",
    int(fine[shares["gate"][fine].argmax()]),
    "gate: share blocked of the harmless change blocked most",
)
keep_share(
    "slices_alone",
    "slices alone",
    int(shares["slices alone"].argmax()),
    "slices: share blocked by them and not by the overall bound, of the change where that is largest",
)
for rule, key in (
    ("fixed", "fixed margin"),
    ("significant", "significant"),
    ("overall", "overall"),
    ("slices", "slices"),
):
    for short, name in (("alpha", "wrong alpha"), ("clerk", "a clerk's labels"), ("cut", "cut at 185 characters")):
        keep_share(f"{rule}_{short}", key, names.index(name), f"{key}: share blocked of {name!r}")
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

# %% [markdown]
# Read the table by columns. **The fixed margin** blocks *wrong alpha* in {{fixed_alpha}} ({{fixed_alpha:interval}}) of the test sets and *cut at 185 characters* in {{fixed_cut}} ({{fixed_cut:interval}}): a coin decides. **Blocked if significant** is the rule of those who read "no significant difference" as "equal", with the paired test on 100 tickets: {{significant_alpha}} and {{significant_cut}}. **The overall bound** blocks them in {{overall_alpha}} and {{overall_cut}} of the cases, and *a clerk's labels* in {{overall_clerk}}. *Line breaks kept* is blocked by behaviour alone, and no number of tickets would change that. A harmless release is blocked in {{gate_good_high}} ({{gate_good_high:interval}}) at most: where *retrained on new tickets* loses three tickets and wins none, the bound is above 2 points.
#
# **The slices** find *a clerk's labels* in {{slices_clerk}} and *wrong alpha* in {{slices_alpha}} of the cases, but what the overall bound lets pass they block in {{slices_alone}} of the test sets. There is a reason: with eleven slices the smallest $p$ must be at most 0.0045, which takes eight losses without a win. Eight of 320 are 2.5 points in the mean, and the bound sees those first. Slices earn their place in two ways. They say *where* it is broken. And they see a loss that is hidden by gains elsewhere; a champion near 100 % leaves no room for such gains, so here are made-up counts:

# %%
hidden_bound = bound(10, 13, 320, 0.05)
hidden_slice = mcnemar(10, 0)
print(
    f"320 tickets, 10 lost in one slice, 13 won in others: bound {hidden_bound:.2%}, p of the slice {hidden_slice:.4f}"
)
print(
    "verdict:", verdict(hidden_bound, {"delivery": hidden_slice, **{f"other {i}": 1.0 for i in range(10)}}, 0.02, 0.05)
)

# %% [markdown]
# The operating characteristic says this for every drop at once: the probability that a rule blocks, against the true drop, computed and not simulated. Points are the ten changes as measured.

# %%
true_drop = np.linspace(0, 0.08, 33)
noise = 0.002  # wins of a challenger, as a share
fig, ax = plt.subplots(figsize=(9, 4.2))


def fixed_share(drop: float, champion: float, n: int = 100, margin: float = 0.02) -> float:
    """The exact probability that the fixed margin blocks a challenger with this drop."""
    first = np.arange(n + 1)
    beaten = binom.cdf(np.ceil(first - margin * n - 1e-9) - 1, n, champion - drop)
    return float(np.sum(binom.pmf(first, n, champion) * beaten))


@cache
def fewest_lost(n: int, wins: int) -> int:
    """The smallest count of losses that is significant at 5 %, given the wins."""
    return next(w for w in count() if w > n or p_value(w, wins) <= 0.05)


def significant_share(drop: float, better: float, n: int = 100) -> float:
    """The exact probability that the paired test finds harm."""
    wins = np.arange(12)
    edges = np.array([fewest_lost(n, int(k)) for k in wins])
    return float(np.sum(binom.pmf(wins, n, better) * binom.sf(edges - 1, n - wins, (drop + better) / (1 - better))))


for label, colour, values in (
    ("fixed margin, 100 tickets", COLOURS.before, [fixed_share(d, accuracy) for d in true_drop]),
    ("if significant, 100 tickets", COLOURS.other, [significant_share(d, noise) for d in true_drop]),
    (f"upper bound, {test_set} tickets", COLOURS.after, [1 - pass_share(test_set, d + noise, noise) for d in true_drop]),
):  # fmt: skip
    ax.plot(100 * true_drop, values, color=colour, label=label)
for place, name in enumerate(CHANGES):
    if drops[name] <= 0.08:
        for key, colour in (("fixed margin", COLOURS.before), ("overall", COLOURS.after)):
            ax.plot(100 * drops[name], shares[key][place], "o", ms=6, color=colour, mfc="white")
ax.axvline(2, color=COLOURS.wrong, lw=1, ls="--")
direct_label(ax, 2, 0.75, "margin", COLOURS.wrong)
ax.set(xlabel="true drop in exact match, points", ylabel="probability of a block", ylim=(-0.03, 1.05), xlim=(-0.3, 8))
ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
label_lines(ax)
plt.show()

# %% [markdown]
# A good rule's curve is low at 0, high from the margin on, and steep between. The blue one is at 95 % or a little more at the margin by construction; tickets buy a steeper rise on its left. The grey one passes most releases whose drop is the largest that you tolerate. The green one is low everywhere, which is what a test without power looks like, and it gets *laxer* the less you measure.
#
# What the figure does not show: a release with a true drop of 1 point. The margin says that you would live with it, the gate blocks it more often than not, and both are right: it has not been *shown* to be below 2. If that is too strict, buy tickets or move the margin, before you look at the release.
#
# ## A canary that you may look at
#
# What the gate passes gets a tenth of the traffic: a *canary*. A clerk corrects wrong triages, so each answer turns out right or wrong. Pair each request to the canary with one that the champion answered at the same time; the outcome $x_t$ is $+1$ if only the canary was wrong, $-1$ if only the champion was, 0 otherwise. The null hypothesis is that the canary is not worse: among the outcomes that are not 0, $+1$ is at most as likely as $-1$.
#
# A canary is watched. Whoever tests after each request and stops at the first $p \le 0.05$ does not have an error of 5 %, since there are thousands of chances to be unlucky. Here is a test that you may look at as often as you like. Bet against the null hypothesis: start with one dollar, and before each outcome stake a share $\lambda$ of what you have on "$+1$ comes". Your wealth is multiplied by $1 + \lambda x_t$. If the null hypothesis is true the game is fair at best, and Ville's inequality (1939) says that
#
# $$P\Big(\text{at any time } E_t \ge \tfrac1\alpha\Big) \le \alpha .$$
#
# Which $\lambda$ is best depends on how bad the canary is, which you don't know. So divide the dollar: an equal part is played with each of several $\lambda$, and $E_t$ is the mean of the wealths, $E_t = \frac1m \sum_{i=1}^m \prod_{s \le t} (1 + \lambda_i x_s)$. This is a mixture, as in the mixture SPRT (Robbins, 1970; Johari et al., 2017); Howard et al. (2021) have the general theory.
#
# **Exercise.** Write
#
# - `evidence(outcomes, bets)`: `outcomes` a sequence of $n$ values $+1$, $-1$, 0, `bets` one or more $\lambda$ with $0 < \lambda \le 1$. Returns an array (n,), the $E_t$ after each outcome.
# - `alarm(outcomes, bets, alpha)`: how many outcomes have been seen when $E_t$ first reaches $1/\alpha$ (at least), or `None` if it never does.
#
# `evidence([1, -1, 1], (0.2, 0.8))` is `[1.5, 0.66, 0.9]`; `alarm([1, 1, 1], (0.8,), 0.2)` is 3, since 1.8³ = 5.8 ≥ 5. An empty sequence gives an empty array, and `None`. *About 8 lines.*
#
# <details><summary>Hint 1</summary>Each bet has a wealth of its own, which is never mixed with another's; what is averaged is money, not stakes.</details>
# <details><summary>Hint 2</summary><code>np.cumprod</code> along the time, of an array (m, n); then the mean over the m rows.</details>
# <details><summary>Hint 3</summary><code>1 + np.outer(bets, outcomes)</code>, cumprod with axis=1, mean with axis=0. For the alarm: <code>np.flatnonzero(path &gt;= 1 / alpha)</code>, the first one plus 1.</details>


# %% exercise="canary" difficulty=2 minutes=9
def evidence(outcomes: Sequence[int], bets: Sequence[float]) -> np.ndarray:
    """The wealth after each outcome, the mean over the bets."""
    ### BEGIN SOLUTION
    return np.cumprod(1 + np.outer(bets, np.asarray(outcomes, float)), axis=1).mean(0)
    ### END SOLUTION


def alarm(outcomes: Sequence[int], bets: Sequence[float], alpha: float) -> int | None:
    """How many outcomes have been seen at the alarm, or None."""
    ### BEGIN SOLUTION
    reached = np.flatnonzero(evidence(outcomes, bets) >= 1 / alpha)
    return int(reached[0]) + 1 if len(reached) else None
    ### END SOLUTION


# %% check="canary" points=2
got = np.asarray(evidence([1, -1, 1], (0.5,)), float)
assert got.shape == (3,), (
    f"evidence returns the wealth after each outcome, here 3 numbers; yours has the shape {got.shape}"
)
assert not np.allclose(got, [0.5, 0.75, 0.375]), "The stake is on +1, the canary's own mistake: 1 + λx; yours is 1 - λx"
assert np.allclose(got, [1.5, 0.75, 1.125]), (
    f"One dollar at λ = 0.5 goes 1.5, 0.75, 1.125: multiply by 1 + λx each time; yours goes {got.tolist()}"
)
assert np.allclose(evidence([0, 1, 0, 0], (0.5,)), [1, 1.5, 1.5, 1.5]), "An outcome of 0 moves nothing: 1 + 0.5 * 0 = 1"
got = np.asarray(evidence([1, -1, 1], (0.2, 0.8)), float)
assert not np.allclose(got, [1.5, 0.75, 1.125]), (
    "You average the bets and play once with 0.5: each bet has its own wealth, and the mean is taken over the wealths"
)
assert not np.allclose(got, [1.8, 0.96, 1.152]), (
    "The best of several bets, chosen afterwards, is no fair game: the mean of the wealths, not their maximum"
)
assert not np.allclose(got, [3.0, 1.32, 1.8]), (
    "Divide the dollar among the bets: the mean of the wealths, not their sum"
)
assert np.allclose(got, [1.5, 0.66, 0.9]), (
    f"evidence([1, -1, 1], (0.2, 0.8)) is [1.5, 0.66, 0.9]; yours is {got.tolist()}"
)
assert len(evidence([], (0.2, 0.8))) == 0, "No outcome, no wealth to report: an empty array"
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(2)
for _bets in ((0.3,), (0.1, 0.5, 1.0)):
    _x = _rng.integers(-1, 2, 25)
    _quiet = np.errstate(divide="ignore")  # the logarithm of a wealth of 0 is no mistake
    _want, _parts = [], [1.0 for _ in _bets]
    for _step in _x:
        _parts = [_w * (1 + _b * _step) for _w, _b in zip(_parts, _bets, strict=True)]
        _want.append(sum(_parts) / len(_parts))
    with _quiet:
        _got, _again = evidence(_x, _bets), evidence(tuple(int(v) for v in _x), list(_bets))
    assert np.allclose(_got, _want), f"evidence is wrong for the bets {_bets} and the outcomes {_x.tolist()}"
    assert np.allclose(_again, _want), "Tuples and lists are sequences, too"
_all = np.array([[1 if k >> j & 1 else -1 for j in range(7)] for k in range(128)])
_ends = np.mean([np.asarray(evidence(row, (0.2, 0.8)))[-1] for row in _all])
assert abs(_ends - 1) < 1e-9, f"Over all equally likely sequences a fair game keeps a mean of 1; yours has {_ends:.3f}"
### END HIDDEN TESTS

# %% check="canary" points=1
got = alarm([1, 1, 1], (0.8,), 0.2)
assert got != 2, (
    "Count the outcomes that have been seen, not the index of the last one: 3, since the third brings 5.8 >= 5"
)
assert got == 3, f"1.8, 3.24, 5.83: the third outcome brings 1/0.2 = 5; yours is {got}"
assert alarm([1, 1, 1, -1, -1], (0.8,), 0.2) == 3, (
    "The alarm is the first time; that the wealth falls later undoes nothing"
)
assert alarm([1, 1], (1.0,), 0.26) == 2, "The wealth is 4, and 1/0.26 = 3.8: compare it with 1/alpha"
assert alarm([1, 1, 0], (1.0,), 0.25) == 2, "The wealth reaches 4 = 1/0.25 with the second outcome: >=, not >"
try:
    got = alarm([], (0.5,), 0.05)
except (ValueError, IndexError) as error:
    raise AssertionError(f"alarm([], (0.5,), 0.05) raises {error}: without outcomes there is no alarm, None") from error
assert got is None, f"Without outcomes there is no alarm, None; yours is {got!r}"
assert alarm([1, 1], (0.8,), 0.2) is None, f"3.24 is below 5: no alarm, None; yours is {alarm([1, 1], (0.8,), 0.2)!r}"
### BEGIN HIDDEN TESTS
assert alarm([0, 1, 0, 1, 0, 1, 1], (0.8,), 0.2) == 6, "Outcomes of 0 are counted as seen"
assert alarm([-1, 1, 1, 1, 1, 1, 1, 1], (0.2, 0.8), 0.2) == 8, (
    f"The mean of the two wealths reaches 5 after 8; yours {alarm([-1, 1, 1, 1, 1, 1, 1, 1], (0.2, 0.8), 0.2)}"
)
### END HIDDEN TESTS


# %% mistake="the best bet" of="canary" says="not their maximum"
def evidence(outcomes, bets):
    return np.cumprod(1 + np.outer(bets, outcomes), axis=1).max(0)


def alarm(outcomes, bets, alpha):
    reached = np.flatnonzero(evidence(outcomes, bets) >= 1 / alpha)
    return reached[0] + 1 if len(reached) else None


# %% mistake="the mean bet" of="canary" says="You average the bets"
def evidence(outcomes, bets):
    return np.cumprod(1 + np.mean(bets) * np.asarray(outcomes, float))


def alarm(outcomes, bets, alpha):
    reached = np.flatnonzero(evidence(outcomes, bets) >= 1 / alpha)
    return reached[0] + 1 if len(reached) else None


# %% mistake="the last value only" of="canary" says="the wealth after each outcome"
def evidence(outcomes, bets):
    return np.prod(1 + np.outer(bets, outcomes), axis=1).mean()


def alarm(outcomes, bets, alpha):
    return len(outcomes) if evidence(outcomes, bets) >= 1 / alpha else None


# %% mistake="bets on the champion's mistakes" of="canary" says="yours is 1 - λx"
def evidence(outcomes, bets):
    return np.cumprod(1 - np.outer(bets, outcomes), axis=1).mean(0)


def alarm(outcomes, bets, alpha):
    reached = np.flatnonzero(evidence(outcomes, bets) >= 1 / alpha)
    return reached[0] + 1 if len(reached) else None


# %% mistake="a sum in place of a mean" of="canary" says="Divide the dollar"
def evidence(outcomes, bets):
    return np.cumprod(1 + np.outer(bets, outcomes), axis=1).sum(0)


def alarm(outcomes, bets, alpha):
    reached = np.flatnonzero(evidence(outcomes, bets) >= 1 / alpha)
    return reached[0] + 1 if len(reached) else None


# %% mistake="the index of the alarm" of="canary" says="not the index"
def evidence(outcomes, bets):
    return np.cumprod(1 + np.outer(bets, outcomes), axis=1).mean(0)


def alarm(outcomes, bets, alpha):
    reached = np.flatnonzero(evidence(outcomes, bets) >= 1 / alpha)
    return reached[0] if len(reached) else None


# %% mistake="looks at the end" of="canary" says="The alarm is the first time"
def evidence(outcomes, bets):
    return np.cumprod(1 + np.outer(bets, outcomes), axis=1).mean(0)


def alarm(outcomes, bets, alpha):
    path = evidence(outcomes, bets)
    if len(path) == 0 or path[-1] < 1 / alpha:
        return None
    return int(np.flatnonzero(path >= 1 / alpha)[0]) + 1


# %% mistake="more than 1/alpha" of="canary" says=">=, not >"
def evidence(outcomes, bets):
    return np.cumprod(1 + np.outer(bets, outcomes), axis=1).mean(0)


def alarm(outcomes, bets, alpha):
    reached = np.flatnonzero(evidence(outcomes, bets) > 1 / alpha)
    return int(reached[0]) + 1 if len(reached) else None


# %% alternative="sums of logarithms" of="canary"
def evidence(outcomes, bets):
    steps = np.asarray(outcomes, float)
    return np.mean([np.exp(np.cumsum(np.log(1 + bet * steps))) for bet in bets], axis=0)


def alarm(outcomes, bets, alpha):
    return next((k for k, wealth in enumerate(evidence(outcomes, bets), 1) if wealth >= 1 / alpha), None)


# %% alternative="a loop over outcomes" of="canary"
def evidence(outcomes, bets):
    wealth, path = {bet: 1 / len(bets) for bet in bets}, []
    for outcome in outcomes:
        for bet in wealth:
            wealth[bet] *= 1 + bet * outcome
        path.append(sum(wealth.values()))
    return np.array(path)


def alarm(outcomes, bets, alpha):
    for seen, value in enumerate(evidence(outcomes, bets), 1):
        if value * alpha >= 1 - 1e-12:
            return seen
    return None


# %% [markdown]
# Now thousands of canaries. Live traffic differs from the pool in two ways that we set: one message in five has line breaks, and clerks also "correct" 3 % of the right answers. A canary gets up to 3,000 requests; without an alarm by then it is promoted. The rival is McNemar's test after each request, stopped at the first $p \le 0.05$.

# %%
BETS, LEVEL, REQUESTS, SLIP, BROKEN_LINES, WEEK = (0.2, 0.4, 0.6, 0.8), 0.05, 3_000, 0.03, 0.2, 20_000
some = pool[:: max(1, len(pool) // 160)]
broken_texts = [re.sub(r"\. ", ".\n", ticket.text) for ticket in some]
live = {name: float(1 - right[name].mean()) for name in right}  # share of wrong answers
lines = service.answer(CHANGES["line breaks kept"], broken_texts)
wrong_lines = np.mean([a != t.triage for a, t in zip(lines, some, strict=True)])
live["line breaks kept"] = float((1 - BROKEN_LINES) * live["line breaks kept"] + BROKEN_LINES * wrong_lines)


def watched(wrong_new: float, wrong_old: float, runs: int, key: int) -> dict[str, np.ndarray]:
    """When each of these canaries is stopped, by betting and by peeking: requests seen; one more than all if never."""
    rng = np.random.default_rng([seed, key])
    seen = lambda wrong: rng.random(REQUESTS) < wrong + (1 - wrong) * SLIP
    stops: dict[str, list[int]] = {"betting": [], "peeking": []}
    for _ in range(runs):
        outcomes = seen(wrong_new).astype(int) - seen(wrong_old)
        at = np.flatnonzero(outcomes)  # the others move neither test
        told = outcomes[at]
        rung = alarm(told[:1000], BETS, LEVEL)  # with more of them it has long rung; the wealth would overflow
        stops["betting"].append(at[rung - 1] + 1 if rung else REQUESTS + 1)
        p = binom.sf(np.cumsum(told == 1) - 1, np.arange(1, len(told) + 1), 0.5)
        low = np.flatnonzero(p <= LEVEL)
        stops["peeking"].append(at[low[0]] + 1 if len(low) else REQUESTS + 1)
    return {key: np.array(value) for key, value in stops.items()}


equal = watched(live["champion"], live["champion"], canaries, 0)
stopped = {name: watched(live[name], live["champion"], max(20, canaries // 4), 1 + i) for i, name in enumerate(CHANGES)}


def share(hits: np.ndarray) -> tuple[float, float, float]:
    """A share with its 95 % Wilson interval."""
    found = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return float(hits.mean()), float(found.low), float(found.high)


exposed, rows = {}, []
for name in CHANGES:
    stop = stopped[name]["betting"]
    missed = stop > REQUESTS
    exposed[name] = float(np.minimum(stop, REQUESTS).mean() + missed.mean() * WEEK)
    drop = live[name] - live["champion"]
    rows.append({"change": name, "live drop": drop, "rolled back": 1 - missed.mean(),
                 "median requests": np.median(stop) if missed.mean() < 0.5 else np.nan,
                 "more wrong answers, canary": max(0, drop) * exposed[name],
                 "without canary": max(0, drop) * WEEK})  # fmt: skip
served = pd.DataFrame(rows)
display(served.style.hide(axis="index").format(
    {"live drop": "{:.1%}", "rolled back": "{:.0%}", "median requests": "{:.0f}", "more wrong answers, canary": "{:.0f}",
     "without canary": "{:.0f}"}, na_rep="none"))  # fmt: skip
for key in ("peeking", "betting"):
    mean, low, high = share(equal[key] <= REQUESTS)
    card.record(key, mean, low=low, high=high, format=".0%" if key == "peeking" else ".1%", tolerance=0.02,
                label=f"{key}: canaries as good as the champion that are stopped")  # fmt: skip
compare(
    [("harmless canaries stopped by peeking", predicted_peeking, float((equal["peeking"] <= REQUESTS).mean()))],
    format=".0%",
)
for key, name in (("coarse", "4 bits, coarse"), ("alpha", "wrong alpha")):
    card.record(f"canary_{key}", np.median(stopped[name]["betting"]), format=",.0f", tolerance=250,
                label=f"requests until rollback, median: {name}")  # fmt: skip

# %%
fig, (left, right_ax) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=[1, 1.1])
when = np.arange(1, REQUESTS + 1, 20)
for key, colour in (("peeking", COLOURS.wrong), ("betting", COLOURS.after)):
    left.plot(when, [(equal[key] <= t).mean() for t in when], color=colour, label=key)
left.plot(when, np.full(len(when), LEVEL), color=COLOURS.truth, lw=1, ls="--", label="5 %")
left.set(
    title="A canary as good as the champion", xlabel="requests to the canary", ylabel="stopped so far", ylim=(0, None)
)
left.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
label_lines(left)
bad_rows = served[: len(BROKEN)].sort_values("live drop", ascending=False)
places = -np.arange(len(bad_rows))
right_ax.hlines(
    places, bad_rows["more wrong answers, canary"].clip(1), bad_rows["without canary"].clip(1), color="#c9c9c7", lw=2
)
for column, colour, label in (("more wrong answers, canary", COLOURS.after, "with canary"),
                              ("without canary", COLOURS.before, "without")):  # fmt: skip
    right_ax.plot(bad_rows[column].clip(1), places, "o", ms=8, color=colour)
    direct_label(right_ax, float(bad_rows[column].clip(1).iloc[0]), 0, label, colour, offset=(-20, 10))
right_ax.set_yticks(places, bad_rows["change"])
right_ax.set(xscale="log", title="A broken release", ylim=(places[-1] - 0.6, 0.9),
             xlabel="wrong answers that the champion would not have given")  # fmt: skip
plt.show()

# %% [markdown]
# On the left: peeking stops {{peeking}} ({{peeking:interval}}) of the canaries that are as good as the champion, and the curve has not ended; with enough requests it reaches any height. Betting stops {{betting}} ({{betting:interval}}), and never more than 5 %, however long you watch.
#
# On the right, each broken release is released without any gate, to see what the canary does alone; "without" is all traffic until the weekly audit, 20,000 requests. A ruined model is rolled back after {{canary_coarse}} requests in the median, *wrong alpha* after {{canary_alpha}}, and the canary sees the line breaks that no test set had. The smaller the drop, the longer it takes: noise from the clerks' slips of 3 % enters here, while the gate compares both on the same tickets.
#
# ## Who is champion, and who was before?
#
# A registry is a database of versions in which some have names. Serving loads `models:/triage@champion`, so a release is the move of an **alias**, one row in one transaction: a reader sees the old version or the new one, never half of each. MLflow's registry works on SQLite as on PostgreSQL, and needs no server for that.
#
# It has no memory for aliases, however: it knows who is champion, not who was. And an alias can be moved by anyone, on the strength of an old evaluation. Two releases are compared with champion 1 on Monday; the first is promoted on Tuesday; on Wednesday somebody promotes the second. It was never compared with what it replaces. Between *looking* who is champion and *moving* the alias another process may do the same, so both happen under a lock (at work: an advisory lock of the database, or a pipeline that runs one at a time).

# %%
NAME = "triage"


class StaleError(RuntimeError):
    """The evaluation was made against another champion than the present one."""


@cache
def empty_registry() -> bytes:
    """The file of an MLflow registry with one model and no version; making its tables takes a second or two."""
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/registry.db"
        MlflowClient(tracking_uri=uri, registry_uri=uri).create_registered_model(NAME)
        return (Path(folder) / "registry.db").read_bytes()


@contextlib.contextmanager
def registry(versions: int) -> Iterator[MlflowClient]:
    """A fresh MLflow registry in a temporary folder, with versions 1, 2, … of the model and no alias."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "registry.db").write_bytes(empty_registry())
        uri = f"sqlite:///{folder}/registry.db"
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        for version in range(1, versions + 1):
            client.create_model_version(NAME, source=f"release:{version}")
        yield client


def aliases(client: MlflowClient) -> dict[str, str]:
    """Alias -> version, as text."""
    return {alias: str(version) for alias, version in client.get_registered_model(NAME).aliases.items()}


def read_log(client: MlflowClient) -> list[dict]:
    """What happened to the champion, the oldest first: {"at": time, "event": "promote" or "rollback", "version": text}."""
    return json.loads(client.get_registered_model(NAME).tags.get("log", "[]"))


def write_log(client: MlflowClient, log: list[dict]) -> None:
    """Replace the log; it is kept as a tag of the registered model."""
    client.set_registered_model_tag(NAME, "log", json.dumps(log))


with registry(versions=2) as client:
    client.set_registered_model_alias(NAME, "challenger", "2")
    print(aliases(client), read_log(client))
    client.delete_registered_model_alias(NAME, "challenger")
    print(aliases(client))

# %% [markdown]
# **Exercise.** Write three functions. `client` is an `MlflowClient`; versions are text (`"3"`), times are numbers that never decrease; `lock` is a context manager. Use `aliases`, `read_log` and `write_log`, and the two methods of the client in the cell above.
#
# - `promote(client, version, against, at, lock)`: if the present champion (`None` if there is none) is not `against`, raise `StaleError` and change nothing. Otherwise the alias `"champion"` moves to `version`, the alias `"challenger"` is deleted *if it points to* `version`, and the log gets `{"at": at, "event": "promote", "version": version}`.
# - `rollback(client, at, lock)`: the champion *before* the present one becomes champion again; the log gets an event `"rollback"` with its version, which is returned. A second rollback goes one further back, not forth again: after promoting 1, 3, 4, two rollbacks lead to 3 and to 1. The alias `"challenger"` stays as it is. Raise `LookupError`, and change nothing, if there is none before.
# - `champion_at(log, at)`: the champion at that time (an event counts from its own time on), `None` before the first.
#
# The first two look, decide and write while they hold the lock. *About 25 lines.*
#
# <details><summary>Hint 1</summary>A version number says when something was registered, not whether it was ever champion. Replay the log: what does each event do to a stack of champions?</details>
# <details><summary>Hint 2</summary>A promotion pushes its version, a rollback pops one; the top is the champion. You need at least two to roll back.</details>
# <details><summary>Hint 3</summary><code>with lock:</code> first, then <code>if aliases(client).get("champion") != against: raise StaleError(...)</code>. champion_at: the version of the last event whose "at" is <= at.</details>


# %% exercise="registry" difficulty=3 minutes=12
def promote(client: MlflowClient, version: str, against: str | None, at: float, lock) -> None:
    """Make the version champion, if it was compared with the present champion."""
    ### BEGIN SOLUTION
    with lock:
        now = aliases(client)
        if now.get("champion") != against:
            raise StaleError(f"version {version} was compared with {against}; the champion is {now.get('champion')}")
        client.set_registered_model_alias(NAME, "champion", version)
        if now.get("challenger") == version:
            client.delete_registered_model_alias(NAME, "challenger")
        write_log(client, [*read_log(client), {"at": at, "event": "promote", "version": version}])
    ### END SOLUTION


def rollback(client: MlflowClient, at: float, lock) -> str:
    """Make the champion before the present one champion again, and return its version."""
    ### BEGIN SOLUTION
    with lock:
        log = read_log(client)
        stack: list[str] = []
        for event in log:
            if event["event"] == "promote":
                stack.append(event["version"])
            else:
                stack.pop()
        if len(stack) < 2:
            raise LookupError("there is no champion before the present one")
        version = stack[-2]
        client.set_registered_model_alias(NAME, "champion", version)
        write_log(client, [*log, {"at": at, "event": "rollback", "version": version}])
        return version
    ### END SOLUTION


def champion_at(log: Sequence[Mapping], at: float) -> str | None:
    """The version that was champion at this time."""
    ### BEGIN SOLUTION
    versions = [event["version"] for event in log if event["at"] <= at]
    return versions[-1] if versions else None
    ### END SOLUTION


# %% check="registry" points=2
class Lock:
    """A lock that notes what the registry looks like when it is let go, and lets others in before it is got."""

    def __init__(self, client: MlflowClient, before: Callable[[], object] = lambda: None) -> None:
        self.client, self.before, self.held, self.left = client, before, 0, []

    def __enter__(self) -> "Lock":
        self.before()  # whoever had the lock until now
        self.held += 1
        return self

    def __exit__(self, *error: object) -> None:
        self.held -= 1
        self.left.append((aliases(self.client), read_log(self.client)))


with registry(versions=4) as client:
    lock = Lock(client)
    promote(client, "1", None, 1.0, lock)
    got = aliases(client)
    assert got == {"champion": "1"}, (
        f"The first champion is promoted against None: the alias champion -> '1'; yours: {got}"
    )
    assert read_log(client) == [{"at": 1.0, "event": "promote", "version": "1"}], (
        f"A promotion is written into the log, else nobody knows who was champion; yours is {read_log(client)}"
    )
    client.set_registered_model_alias(NAME, "challenger", "3")
    promote(client, "3", "1", 2.0, lock)
    assert "challenger" not in aliases(client), "Version 3 is champion now: its alias challenger is to be deleted"
    client.set_registered_model_alias(NAME, "challenger", "4")
    try:
        promote(client, "2", "1", 3.0, lock)
    except StaleError:
        pass
    except Exception as error:
        raise AssertionError(f"A stale comparison raises StaleError; yours raised {type(error).__name__}") from error
    else:
        raise AssertionError(
            "Version 2 was compared with champion 1, and the champion is 3 by now: nobody knows whether 2 is better than 3. "
            "Raise StaleError"
        )
    assert aliases(client) == {"champion": "3", "challenger": "4"}, (
        f"A refused promotion changes nothing; {aliases(client)}"
    )
    assert len(read_log(client)) == 2, "A refused promotion is not in the log"
    promote(client, "2", "3", 4.0, lock)
    assert aliases(client) == {"champion": "2", "challenger": "4"}, (
        f"The alias challenger points to 4, which was not promoted: leave it; yours: {aliases(client)}"
    )
### BEGIN HIDDEN TESTS
with registry(versions=3) as _client:
    try:
        promote(_client, "2", "1", 1.0, Lock(_client))
        raise AssertionError("There is no champion, so a comparison with version 1 is stale")
    except StaleError:
        pass
    promote(_client, "2", None, 1.0, Lock(_client))
    try:
        promote(_client, "3", None, 2.0, Lock(_client))
        raise AssertionError("There is a champion: a promotion against None is stale")
    except StaleError:
        pass
    promote(_client, "2", "2", 2.0, Lock(_client))
    promote(_client, "1", "2", 2.0, Lock(_client))
    assert [e["version"] for e in read_log(_client)] == ["2", "2", "1"], (
        f"The log has each promotion; {read_log(_client)}"
    )
    assert aliases(_client) == {"champion": "1"}, "An older version may be promoted, too"
### END HIDDEN TESTS

# %% check="registry" points=1
with registry(versions=3) as client:
    promote(client, "1", None, 1.0, Lock(client))
    busy = Lock(client, before=lambda: client.set_registered_model_alias(NAME, "champion", "2"))
    try:
        promote(client, "3", "1", 2.0, busy)
    except StaleError:
        pass
    else:
        raise AssertionError(
            "While promote waited for the lock another process made 2 champion, and 3 was promoted over it: look who is "
            "champion after you have the lock, not before"
        )
    lock = Lock(client)
    promote(client, "3", "2", 3.0, lock)
    assert lock.left, "promote does not use the lock: with lock: …"
    assert lock.left[-1][0].get("champion") == "3", "The alias moves while the lock is held, not after it"
    assert lock.left[-1][1][-1:] == [{"at": 3.0, "event": "promote", "version": "3"}], (
        "The log is written while the lock is held, not after it"
    )
### BEGIN HIDDEN TESTS
with registry(versions=3) as _client:
    for _at, (_version, _against) in enumerate((("1", None), ("2", "1"))):
        promote(_client, _version, _against, float(_at), Lock(_client))
    _busy = Lock(_client, before=lambda: promote(_client, "3", "2", 5.0, Lock(_client)))
    _got = rollback(_client, 6.0, _busy)
    assert _busy.left, "rollback does not use the lock"
    assert _got == "2", f"While rollback waited, 3 became champion: the one before it is 2; yours is {_got}"
    assert _busy.left[-1][0].get("champion") == "2", "rollback moves the alias while it holds the lock"
    assert [e["event"] for e in _busy.left[-1][1][-1:]] == ["rollback"], (
        "rollback writes the log while it holds the lock"
    )
### END HIDDEN TESTS

# %% check="registry" points=2
with registry(versions=5) as client:
    lock = Lock(client)
    for at, (version, against) in enumerate((("1", None), ("3", "1"), ("4", "3"))):
        promote(client, version, against, float(at), lock)
    uses = len(lock.left)
    client.set_registered_model_alias(NAME, "challenger", "5")
    got = rollback(client, 3.0, lock)
    assert len(lock.left) > uses, "rollback does not use the lock: with lock: …"
    assert got == "3", f"The champion before 4 was 3; yours is {got!r}"
    assert aliases(client).get("champion") == "3", "rollback moves the alias champion"
    assert aliases(client).get("challenger") == "5", (
        f"rollback leaves the alias challenger, which points to 5, as it is; yours: {aliases(client)}"
    )
    assert read_log(client)[-1] == {"at": 3.0, "event": "rollback", "version": "3"}, (
        f"A rollback is an event like any other and belongs into the log; the last entry is {read_log(client)[-1]}"
    )
    got = rollback(client, 4.0, lock)
    assert got != "2", "Version 2 was never champion: go back to the champion before, not to the version number before"
    assert got != "4", "Two rollbacks lead from 4 to 3 to 1, not back to the broken 4: replay the log as a stack"
    assert got == "1", f"The second rollback goes one further back, to 1; yours is {got!r}"
    try:
        rollback(client, 5.0, lock)
    except LookupError:
        pass
    except Exception as error:
        raise AssertionError(f"Without a champion before, LookupError; yours raised {type(error).__name__}") from error
    else:
        raise AssertionError("There is no champion before 1: raise LookupError")
    log = read_log(client)
    assert len(log) == 5, f"A rollback that is refused is not in the log; yours has {len(log)} events in place of 5"
    try:
        found = [champion_at(log, at) for at in (-0.5, 0, 1.5, 2, 3.0, 9)]
    except (LookupError, TypeError, ValueError) as error:
        raise AssertionError(
            f"champion_at raises {error!r}: before the first event there is no champion, None"
        ) from error
    assert found == [None, "1", "3", "4", "3", "1"], (
        f"At -0.5, 0, 1.5, 2, 3, 9 the champion was None, 1, 3, 4, 3, 1 (an event counts from its own time on); yours: {found}"
    )
### BEGIN HIDDEN TESTS
with registry(versions=6) as _client:
    _lock = Lock(_client)
    for _at, _step in enumerate((("2", None), ("1", "2"), None, ("5", "2"), ("6", "5"), None, None)):
        if _step is None:
            _got = rollback(_client, float(_at), _lock)
        else:
            promote(_client, *_step, float(_at), _lock)
    assert _got == "2", f"2, 1, back to 2, 5, 6, back to 5, back to 2; yours ends at {_got!r}"
    assert [champion_at(read_log(_client), t) for t in range(7)] == ["2", "1", "2", "5", "6", "5", "2"], "champion_at"
    assert champion_at([], 3) is None, "Without events there was no champion"
    assert (
        champion_at([{"at": 1, "event": "promote", "version": "7"}, {"at": 1, "event": "rollback", "version": "6"}], 1)
        == "6"
    ), "Of two events at the same time the later entry counts"
with registry(versions=1) as _client:
    try:
        rollback(_client, 0.0, Lock(_client))
        raise AssertionError("An empty log has no champion to go back to: LookupError")
    except LookupError:
        pass
    assert aliases(_client) == {}, "A refused rollback changes nothing"
### END HIDDEN TESTS


# %% mistake="does not look who is champion" of="registry" says="nobody knows whether 2 is better than 3"
def promote(client, version, against, at, lock):
    with lock:
        client.set_registered_model_alias(NAME, "champion", version)
        if aliases(client).get("challenger") == version:
            client.delete_registered_model_alias(NAME, "challenger")
        write_log(client, [*read_log(client), {"at": at, "event": "promote", "version": version}])


def rollback(client, at, lock):
    return ""


def champion_at(log, at):
    return None


# %% mistake="looks before it has the lock" of="registry" says="look who is champion after you have the lock"
def promote(client, version, against, at, lock):
    now = aliases(client)
    if now.get("champion") != against:
        raise StaleError(version)
    with lock:
        client.set_registered_model_alias(NAME, "champion", version)
        if now.get("challenger") == version:
            client.delete_registered_model_alias(NAME, "challenger")
        write_log(client, [*read_log(client), {"at": at, "event": "promote", "version": version}])


def rollback(client, at, lock):
    return ""


def champion_at(log, at):
    return None


# %% mistake="writes after the lock" of="registry" says="The alias moves while the lock is held"
def promote(client, version, against, at, lock):
    with lock:
        now = aliases(client)
        if now.get("champion") != against:
            raise StaleError(version)
    client.set_registered_model_alias(NAME, "champion", version)
    if now.get("challenger") == version:
        client.delete_registered_model_alias(NAME, "challenger")
    write_log(client, [*read_log(client), {"at": at, "event": "promote", "version": version}])


def rollback(client, at, lock):
    return ""


def champion_at(log, at):
    return None


# %% mistake="the version number before" of="registry" says="not to the version number before"
def promote(client, version, against, at, lock):
    with lock:
        now = aliases(client)
        if now.get("champion") != against:
            raise StaleError(version)
        client.set_registered_model_alias(NAME, "champion", version)
        if now.get("challenger") == version:
            client.delete_registered_model_alias(NAME, "challenger")
        write_log(client, [*read_log(client), {"at": at, "event": "promote", "version": version}])


def rollback(client, at, lock):
    with lock:
        version = str(int(aliases(client)["champion"]) - 1)
        client.set_registered_model_alias(NAME, "champion", version)
        write_log(client, [*read_log(client), {"at": at, "event": "rollback", "version": version}])
    return version


def champion_at(log, at):
    return None


# %% mistake="back and forth" of="registry" says="not back to the broken 4"
def promote(client, version, against, at, lock):
    with lock:
        now = aliases(client)
        if now.get("champion") != against:
            raise StaleError(version)
        client.set_registered_model_alias(NAME, "champion", version)
        if now.get("challenger") == version:
            client.delete_registered_model_alias(NAME, "challenger")
        write_log(client, [*read_log(client), {"at": at, "event": "promote", "version": version}])


def rollback(client, at, lock):
    with lock:
        log = read_log(client)
        if len(log) < 2:
            raise LookupError
        version = log[-2]["version"]
        client.set_registered_model_alias(NAME, "champion", version)
        write_log(client, [*log, {"at": at, "event": "rollback", "version": version}])
    return version


def champion_at(log, at):
    return None


# %% mistake="removes what it rolls back from the log" of="registry" says="A rollback is an event like any other"
def promote(client, version, against, at, lock):
    with lock:
        now = aliases(client)
        if now.get("champion") != against:
            raise StaleError(version)
        client.set_registered_model_alias(NAME, "champion", version)
        if now.get("challenger") == version:
            client.delete_registered_model_alias(NAME, "challenger")
        write_log(client, [*read_log(client), {"at": at, "event": "promote", "version": version}])


def rollback(client, at, lock):
    with lock:
        *rest, _ = read_log(client)
        if not rest:
            raise LookupError
        client.set_registered_model_alias(NAME, "champion", rest[-1]["version"])
        write_log(client, rest)
    return rest[-1]["version"]


def champion_at(log, at):
    return None


# %% mistake="the rolled back version becomes challenger" of="registry" says="leaves the alias challenger"
def promote(client, version, against, at, lock):
    with lock:
        if aliases(client).get("champion") != against:
            raise StaleError(version)
        client.set_registered_model_alias(NAME, "champion", version)
        if aliases(client).get("challenger") == version:
            client.delete_registered_model_alias(NAME, "challenger")
        write_log(client, [*read_log(client), {"at": at, "event": "promote", "version": version}])


def rollback(client, at, lock):
    with lock:
        log, stack = read_log(client), []
        for event in log:
            stack = [*stack, event["version"]] if event["event"] == "promote" else stack[:-1]
        if len(stack) < 2:
            raise LookupError("none before")
        client.set_registered_model_alias(NAME, "champion", stack[-2])
        client.set_registered_model_alias(NAME, "challenger", stack[-1])
        write_log(client, [*log, {"at": at, "event": "rollback", "version": stack[-2]}])
        return stack[-2]


def champion_at(log, at):
    return next((event["version"] for event in reversed(log) if event["at"] <= at), None)


# %% mistake="deletes any challenger" of="registry" says="which was not promoted: leave it"
def promote(client, version, against, at, lock):
    with lock:
        if aliases(client).get("champion") != against:
            raise StaleError(version)
        client.set_registered_model_alias(NAME, "champion", version)
        client.delete_registered_model_alias(NAME, "challenger")
        write_log(client, [*read_log(client), {"at": at, "event": "promote", "version": version}])


def rollback(client, at, lock):
    return ""


def champion_at(log, at):
    return None


# %% mistake="an event counts after its time" of="registry" says="an event counts from its own time on"
def promote(client, version, against, at, lock):
    with lock:
        now = aliases(client)
        if now.get("champion") != against:
            raise StaleError(version)
        client.set_registered_model_alias(NAME, "champion", version)
        if now.get("challenger") == version:
            client.delete_registered_model_alias(NAME, "challenger")
        write_log(client, [*read_log(client), {"at": at, "event": "promote", "version": version}])


def rollback(client, at, lock):
    with lock:
        log, stack = read_log(client), []
        for event in log:
            stack = [*stack, event["version"]] if event["event"] == "promote" else stack[:-1]
        if len(stack) < 2:
            raise LookupError
        client.set_registered_model_alias(NAME, "champion", stack[-2])
        write_log(client, [*log, {"at": at, "event": "rollback", "version": stack[-2]}])
    return stack[-2]


def champion_at(log, at):
    found = None
    for event in log:
        if event["at"] < at:
            found = event["version"]
    return found


# %% alternative="the log read from its end" of="registry"
def promote(client, version, against, at, lock):
    with lock:
        found = client.get_registered_model(NAME).aliases
        champion = str(found["champion"]) if "champion" in found else None
        if champion != against:
            raise StaleError(f"{champion} is not {against}")
        log = read_log(client)
        log.append({"version": version, "at": at, "event": "promote"})
        write_log(client, log)
        client.set_registered_model_alias(NAME, "champion", int(version))
        if str(found.get("challenger")) == version:
            client.delete_registered_model_alias(NAME, "challenger")


def rollback(client, at, lock):
    with lock:
        log = read_log(client)
        skip, found = 0, []
        for event in reversed(log):
            if event["event"] == "rollback":
                skip += 1
            elif skip:
                skip -= 1
            else:
                found.append(event["version"])
        try:
            _, version, *_ = found
        except ValueError:
            raise LookupError("nothing to go back to") from None
        write_log(client, [*log, {"event": "rollback", "at": at, "version": version}])
        client.set_registered_model_alias(NAME, "champion", version)
        return version


def champion_at(log, at):
    for event in reversed(list(log)):
        if event["at"] <= at:
            return event["version"]
    return None


# %% [markdown]
# A quarter in the life of the service: the ten changes come one after another, each is registered and judged by your gate on the one test set above, compared with the champion of its day. (Each was made from the first champion, so a later one does not hold the earlier ones; a team that merges would evaluate anew.) At the end somebody promotes one of them once more, with its old paperwork.

# %%
gate_says = {name: reasons(name, one) + list(broken_tests[name]) for name in CHANGES}
with registry(versions=1 + len(CHANGES)) as client:
    lock = Lock(client)
    promote(client, "1", None, 0, lock)
    for day, name in enumerate(CHANGES, 1):
        version, against = str(day + 1), aliases(client)["champion"]
        client.set_registered_model_alias(NAME, "challenger", version)
        client.set_model_version_tag(NAME, version, "gate", ", ".join(gate_says[name]) or "passed")
        if not gate_says[name]:
            promote(client, version, against, day, lock)
    try:
        promote(client, "9", "1", 11, lock)
    except StaleError as error:
        print("refused:", error)
    print("aliases:", aliases(client))
    print("log:", [(event["at"], event["version"]) for event in read_log(client)])
    if len(read_log(client)) > 1:
        print("rolled back to", rollback(client, 12, lock))

# %% [markdown]
# The log and the alias are two writes. If the process dies between them they disagree; the alias is what serves, so a repair trusts the alias. With a database of your own, both would be one transaction.
#
# ## What does a wrong release cost?
#
# How many tickets should the gate look at, and how strict should it be? Neither 5 % nor 2 points are laws of nature. A release of drop $d_k$ comes with prior probability $\pi_k$. It passes the gate with probability $P_k$. Then it answers $N_k$ requests until somebody takes it back, and each answer that the champion would have got right costs. A release without harm ($d_k \le 0$) that is blocked costs the delay. Each ticket of the test set costs its label, whatever happens.


# %%
@dataclass(frozen=True)
class Change:
    """A kind of release: how often it comes, what it breaks, how often it passes, and how long it stays."""

    prior: float
    drop: float
    passes: float
    exposed: float


@dataclass(frozen=True)
class Costs:
    """Dollars for a labelled ticket, a wrong answer, and a harmless release that is blocked."""

    ticket: float
    wrong: float
    delay: float


PRIOR = {0.0: 0.70, 0.01: 0.08, 0.02: 0.07, 0.04: 0.07, 0.10: 0.05, 0.40: 0.03}  # drop -> probability
COSTS = Costs(ticket=0.5, wrong=5.0, delay=300.0)
CHOICES = (0, 80, 134, 200, 320, 500, 800, 1200, 2000)


# %% [markdown]
# **Exercise.** `expected_cost(tickets, changes, costs)`: the expected cost of a release in dollars. Each `Change` has `prior`, `drop`, `passes` ($P_k$) and `exposed` ($N_k$); priors sum to 1. `Costs` has `ticket` (dollars a label), `wrong` (a wrong answer) and `delay` (a blocked harmless release).
#
# - A change with `drop > 0` costs `wrong` for each of the `drop * exposed` wrong answers if it passes, and nothing if it is blocked.
# - A change with `drop <= 0` costs `delay` if it is blocked, and nothing (nor does it earn anything) if it passes.
#
# For 100 tickets, `Change(0.8, 0.0, 0.9, 1000)`, `Change(0.2, 0.05, 0.5, 1000)` and `Costs(1.0, 10.0, 400.0)` it is $100 + 0.8 \cdot 0.1 \cdot 400 + 0.2 \cdot 0.5 \cdot 0.05 \cdot 1000 \cdot 10 = 182$ dollars.
#
# Then two decisions before you look, each one of `CHOICES`: `my_tickets`, the number of tickets of the cheapest gate if all traffic moves at once, and `my_tickets_canary`, if a canary comes after the gate. The prior and the costs are in the cell above, the margin is 2 points and $\alpha$ is 0.05; with fewer than 133 tickets a challenger without a win cannot bring the bound below 2 points, and 0 means no gate. *About 6 lines.*
#
# <details><summary>Hint 1</summary>An expectation over changes: each term is prior times (probability times cost) of what can happen to it. What does not depend on the change stands outside.</details>
# <details><summary>Hint 2</summary>The two kinds of changes have different terms: one is paid when it passes, the other when it is blocked.</details>
# <details><summary>Hint 3</summary><code>tickets * costs.ticket + sum(c.prior * (c.passes * c.drop * c.exposed * costs.wrong if c.drop > 0 else …) for c in changes)</code></details>


# %% exercise="decide" difficulty=2 minutes=9
my_tickets = None  # one of CHOICES, without a canary
my_tickets_canary = None  # one of CHOICES, with a canary


def expected_cost(tickets: int, changes: Sequence[Change], costs: Costs) -> float:
    """The expected cost of a release, in dollars."""
    ### BEGIN SOLUTION
    total = tickets * costs.ticket
    for change in changes:
        if change.drop > 0:
            total += change.prior * change.passes * change.drop * change.exposed * costs.wrong
        else:
            total += change.prior * (1 - change.passes) * costs.delay
    return total
    ### END SOLUTION


### BEGIN SOLUTION
my_tickets, my_tickets_canary = 320, 200
### END SOLUTION

# %% check="decide" points=1
for value, what in ((my_tickets, "my_tickets"), (my_tickets_canary, "my_tickets_canary")):
    assert value is not None, f"Decide before you look: {what} = one of {CHOICES}"
    assert value in CHOICES, f"{what} is one of {CHOICES}; yours is {value}"

# %% check="decide" points=2
costs = Costs(1.0, 10.0, 400.0)
harmless, harmful = Change(0.8, 0.0, 0.9, 1000), Change(0.2, 0.05, 0.5, 1000)
got = expected_cost(100, [harmless], costs)
assert abs(got - 420) > 1e-6, "Each outcome counts with its probability: 0.8 * 0.1 of a delay, not 0.8 of it"
assert abs(got - 132) < 1e-6, f"100 labels and a delay with probability 0.8 * (1 - 0.9): 132 dollars; yours is {got}"
got = expected_cost(100, [harmful], costs)
assert abs(got - 350) > 1e-6, "Count a change with its prior: this one comes in a fifth of the cases"
assert abs(got - 190) > 1e-6, "A harmful change that is blocked costs nothing: that is what the gate is for; no delay"
assert abs(got - 5100) > 1e-6, "A drop is a share: 0.05 * 1000 answers are wrong, not 5 a request"
assert abs(got - 150) < 1e-6, f"100 + 0.2 * 0.5 * 0.05 * 1000 * 10 = 150 dollars; yours is {got}"
got = expected_cost(100, [harmless, harmful], costs)
assert abs(got - 282) > 1e-6, "The labels are paid once a release, not once a kind of change"
assert abs(got - 182) < 1e-6, f"The example of the statement costs 182 dollars; yours is {got}"
got = expected_cost(0, [Change(1.0, -0.02, 1.0, 1000)], costs)
assert abs(got) < 1e-9, f"An improvement that passes costs nothing and, by the statement, earns nothing; yours is {got}"
assert abs(expected_cost(0, [Change(1.0, -0.02, 0.25, 1000)], costs) - 300) < 1e-9, (
    "A blocked improvement is a delay, too"
)
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(9)
for _ in range(20):
    _priors = _rng.dirichlet(np.ones(5))
    _given = [Change(float(p), float(d), float(q), float(e)) for p, d, q, e in
              zip(_priors, _rng.choice([-0.01, 0.0, 0.02, 0.3], 5), _rng.random(5), _rng.integers(0, 9000, 5), strict=True)]  # fmt: skip
    _costs = Costs(*map(float, _rng.random(3) * 10))
    _want = 77 * _costs.ticket
    for _c in _given:
        _want += _c.prior * (
            _c.passes * _c.drop * _c.exposed * _costs.wrong if _c.drop > 0 else (1 - _c.passes) * _costs.delay
        )
    assert abs(expected_cost(77, _given, _costs) - _want) < 1e-6, f"expected_cost is {_want:.4f} for {_given}"
assert expected_cost(3, [], costs) == 3, "Without changes only the labels are paid"
### END HIDDEN TESTS


# %% mistake="every block is a delay" of="decide" says="that is what the gate is for"
my_tickets, my_tickets_canary = 320, 0


def expected_cost(tickets, changes, costs):
    total = tickets * costs.ticket
    for c in changes:
        total += c.prior * (c.passes * max(c.drop, 0) * c.exposed * costs.wrong + (1 - c.passes) * costs.delay)
    return total


# %% mistake="forgets the prior" of="decide" says="100 labels and a delay with probability"
my_tickets, my_tickets_canary = 320, 0


def expected_cost(tickets, changes, costs):
    total = tickets * costs.ticket
    for c in changes:
        total += c.passes * c.drop * c.exposed * costs.wrong if c.drop > 0 else (1 - c.passes) * costs.delay
    return total


# %% mistake="an improvement earns" of="decide" says="earns nothing"
my_tickets, my_tickets_canary = 320, 0


def expected_cost(tickets, changes, costs):
    total = tickets * costs.ticket
    for c in changes:
        total += c.prior * c.passes * c.drop * c.exposed * costs.wrong
        total += c.prior * (1 - c.passes) * costs.delay if c.drop <= 0 else 0
    return total


# %% mistake="pays the labels for each change" of="decide" says="once a release"
my_tickets, my_tickets_canary = 320, 0


def expected_cost(tickets, changes, costs):
    total = 0
    for c in changes:
        total += tickets * costs.ticket
        total += c.prior * (c.passes * c.drop * c.exposed * costs.wrong if c.drop > 0 else (1 - c.passes) * costs.delay)
    return total


# %% mistake="a drop in points" of="decide" says="A drop is a share"
my_tickets, my_tickets_canary = 320, 0


def expected_cost(tickets, changes, costs):
    total = tickets * costs.ticket
    for c in changes:
        points = 100 * c.drop
        total += c.prior * (c.passes * points * c.exposed * costs.wrong if points > 0 else (1 - c.passes) * costs.delay)
    return total


# %% mistake="no choice of the list" of="decide" says="is one of"
my_tickets, my_tickets_canary = 300, 100


def expected_cost(tickets, changes, costs):
    return 0.0


# %% alternative="vectors" of="decide"
my_tickets, my_tickets_canary = 134, 0


def expected_cost(tickets, changes, costs):
    if not changes:
        return costs.ticket * tickets
    prior, drop, passes, exposed = np.array([(c.prior, c.drop, c.passes, c.exposed) for c in changes]).T
    harm = np.clip(drop, 0, None) * exposed * costs.wrong * passes
    waiting = np.where(drop > 0, 0.0, costs.delay) * (1 - passes)
    return float(tickets * costs.ticket + prior @ (harm + waiting))


# %%
false_alarm = float((equal["betting"] <= REQUESTS).mean())  # a harmless release that the canary stops is delayed, too
with_canary = {}
for place, drop in enumerate(PRIOR):
    stop = watched(live["champion"] + drop, live["champion"], max(20, canaries // 4), 100 + place)["betting"]
    with_canary[drop] = float(np.minimum(stop, REQUESTS).mean() + (stop > REQUESTS).mean() * WEEK)
    if drop:
        print(f"a drop of {drop:.0%}: answers {with_canary[drop]:,.0f} requests with a canary, {WEEK:,} without")


def plan_cost(tickets: int, alpha: float, canary: bool, drops: Sequence[float] = tuple(PRIOR)) -> float:
    """The expected cost of a release under PRIOR and COSTS, for the overall bound at this level."""
    changes = [
        Change(
            prior=PRIOR[d],
            drop=d,
            passes=pass_share(tickets, d + noise, noise, alpha=alpha) * (1 - false_alarm if canary and d == 0 else 1),
            exposed=with_canary[d] if canary else WEEK,
        )
        for d in drops
    ]
    return expected_cost(tickets, changes, COSTS)


levels = (0.01, 0.05, 0.2)
table = {(canary, n, a): plan_cost(n, a, canary) for canary in (False, True) for n in CHOICES for a in levels}
best = {canary: min((key for key in table if key[0] == canary), key=table.get) for canary in (False, True)}
at_five = {canary: min(CHOICES, key=lambda n, canary=canary: table[canary, n, 0.05]) for canary in (False, True)}
fig, axes = plt.subplots(1, 2, figsize=(12, 4))
for ax, canary in zip(axes, (False, True), strict=True):
    for alpha, colour in zip(levels, (COLOURS.before, COLOURS.after, COLOURS.other), strict=True):
        ax.plot(
            range(len(CHOICES)),
            [table[canary, n, alpha] for n in CHOICES],
            "o-",
            ms=4,
            color=colour,
            label=f"α = {alpha:g}",
        )
    spot = best[canary]
    ax.plot(CHOICES.index(spot[1]), table[spot], "o", ms=12, mfc="none", color=COLOURS.truth)
    ax.set_xticks(range(len(CHOICES)), CHOICES)
    ax.set(title="gate, then a canary" if canary else "gate, then all traffic", xlabel="tickets of the gate (0: no gate)",
           ylabel="expected cost of a release, dollars", ylim=(0, 1.15 * max(v for k, v in table.items() if k[0] == canary)))  # fmt: skip
    label_lines(ax)
plt.show()
for canary, mine in ((False, my_tickets), (True, my_tickets_canary)):
    print(f"{'with' if canary else 'without'} a canary, α = 0.05: yours, {mine} tickets, costs {table[canary, mine, 0.05]:,.0f} dollars; "
          f"the cheapest, {at_five[canary]}, {table[canary, at_five[canary], 0.05]:,.0f}; at any α: {best[canary][1]} tickets, "
          f"α = {best[canary][2]:g}, {table[best[canary]]:,.0f}")  # fmt: skip

# %% [markdown]
# And the measured consequence: the same costs for the ten changes as they are, with the blocked shares of the table above (each broken one with a prior of 5 %, each harmless one of 17.5 %), so that slices and behavioural tests count, and the drop is the live one.


# %%
def policy_cost(rule: str, tickets: int, canary: bool, costs: Costs = COSTS) -> float:
    """The expected cost of a release that is one of the ten changes."""
    changes = [
        Change(
            prior=0.3 / len(BROKEN) if name in BROKEN else 0.7 / len(HARMLESS),
            drop=live[name] - live["champion"] if name in BROKEN else 0.0,
            passes=(1 - shares[rule][place] if rule in shares else 1.0)
            * (1 - false_alarm if canary and name in HARMLESS else 1),
            exposed=exposed[name] if canary else WEEK,
        )
        for place, name in enumerate(CHANGES)
    ]
    return expected_cost(tickets, changes, costs)


rules_tried = {"no gate": 0, "fixed margin": 100, "gate": test_set}
policies = {(rule, canary): policy_cost(rule, n, canary) for rule, n in rules_tried.items() for canary in (False, True)}
frame = pd.DataFrame(
    [
        {"gate": rule, "all traffic at once": policies[rule, False], "with a canary": policies[rule, True]}
        for rule in rules_tried
    ]
)
display(frame.style.hide(axis="index").format("{:,.0f} dollars", subset=["all traffic at once", "with a canary"]))
free, dear = replace(COSTS, wrong=0.0), replace(COSTS, wrong=100.0)
alone, both = (
    [policy_cost(rule, n, True, costs) for costs in (free, dear)] for rule, n in (("no gate", 0), ("gate", test_set))
)
break_even = 100 * (both[0] - alone[0]) / max(alone[1] - alone[0] - both[1] + both[0], 1e-9)
print(f"gate and canary cost as much as the canary alone when a wrong answer costs {break_even:.0f} dollars")
card.record(
    "break_even",
    break_even,
    format=".0f",
    tolerance=8,
    label="dollars a wrong answer at which the gate pays beside a canary",
)
for name, key in (("none", ("no gate", False)), ("fixed", ("fixed margin", False)), ("gate", ("gate", False)),
                  ("canary", ("no gate", True)), ("both", ("gate", True))):  # fmt: skip
    card.record(f"cost_{name}", policies[key], format=",.0f", tolerance=max(40, 0.15 * policies[key]),
                label=f"expected cost of a release, dollars: {key[0]}, {'canary' if key[1] else 'all traffic'}")  # fmt: skip
for canary, name in ((False, "alone"), (True, "canary")):
    card.record(
        f"tickets_{name}", best[canary][1], format=",d", tolerance=400, label=f"tickets of the cheapest gate, {name}"
    )
    card.record(
        f"best_{name}", table[best[canary]], format=",.0f", tolerance=60, label=f"its expected cost, dollars, {name}"
    )
    card.record(
        f"zero_{name}",
        table[canary, 0, 0.05],
        format=",.0f",
        tolerance=100,
        label=f"expected cost without a gate, dollars, {name}",
    )

# %% [markdown]
# **All traffic at once.** The curve falls steeply to the cheapest gate, {{tickets_alone}} tickets ({{best_alone}} dollars; {{zero_alone}} without a gate), and then rises with the price of labels. Twice the tickets cost little more than the labels; 80 at $\alpha = 0.05$ cost many delays, because without a win a bound below 2 points is out of reach: a gate that is too small blocks nearly everything.
#
# **With a canary** the best gate of the figure saves next to nothing: {{best_canary}} dollars against {{zero_canary}} without any. For the ten changes as measured it is {{cost_none}} dollars with nothing, {{cost_fixed}} with the fixed margin, {{cost_gate}} with the gate, {{cost_canary}} with the canary alone, and {{cost_both}} with both. If you predicted that two defences are cheaper than one, that is the point: once a broken release is found after some hundred requests, 320 labels are the larger bill. The gate pays beside the canary when a wrong answer costs more than about {{break_even}} dollars in place of 5.
#
# What is assumed, and decides: clerks tell you at once and for every request whether an answer was right. Where feedback takes weeks, or comes from those only who complain, or a wrong answer cannot be taken back, there is no canary, and the left figure is yours. The behavioural tests cost no label at all.
#
# ## With a real model
#
# Nothing above looks into the model: the gate takes two columns of right and wrong, the canary a stream of $+1$, $-1$ and 0. A larger service changes the sizes:
#
# ```
# course run 4.3 -p companies 200 -p test_set 1200
# ```
#
# - **Grades in place of exact match.** A score from 0 to 1 or a judge's grade is paired in the same way; the bound becomes a paired bootstrap or a t interval of the differences (they are rarely all zero), and the margin has the score's unit.
# - **Sampling.** With a temperature a model disagrees with itself. Compare the champion with the champion first: that share of disagreements is the $\psi$ that no challenger can fall below, and it sets $n$. Fixed prompts, temperature 0 and equal batch sizes make tests cheaper.
# - **A test set wears out.** Each release that is chosen by it fits it a little better. Draw fresh tickets from last week's traffic, keep one set that no developer sees, and refresh the behavioural tests from incidents: every incident becomes a test.
# - **Registry.** `mlflow server` with PostgreSQL, the same client; `models:/triage@champion` in the serving code. Store with a version what decided (counts, bound, slices, the commit of the tests), so that the verdict can be computed again.
#
# ## Result card

# %%
card.show()

# %% [markdown]
# ## Say it in an interview
#
# <details><summary>Exact match went from 99.2 % to 98.6 % on 320 tickets. Do you ship?</summary>
#
# I cannot tell from two shares. I have both answer the same tickets and count the disagreements: 4 lost and 2 won give a bound of 2.2 points, 2 lost and none won one of 1.9. I ship if the upper bound is below the margin that we wrote down before, no slice is harmed after Holm's correction, and the behavioural tests pass. Written rules of the form "at most 2 points worse on 100 tickets" blocked a real drop of {{drop_alpha}} points in {{fixed_alpha}} of my test sets.
#
# </details>
#
# <details><summary>The difference is not significant, so the models are equal. Right?</summary>
#
# No. A test of "is it worse" that finds nothing has found nothing; with few tickets it always does. On 100 tickets it let a drop of {{drop_cut}} points pass in all but {{significant_cut}} of the cases. To claim "not worse" I state a margin, choose n for a power at that margin, and ask whether the bound is below it. And I check that no disagreement at all on n tickets gives a bound of about 2.7/n, not of 0.
#
# </details>
#
# <details><summary>The canary's dashboard shows p = 0.04 on the second day. What do you do?</summary>
#
# Ask how often somebody looks. After each of 3,000 requests, a harmless canary gets below 0.05 at some time in {{peeking}} of the cases. I use evidence that is valid at any time: wealth in a bet against "not worse", alarm at 1/α, which stopped {{betting}} of the harmless ones and rolled back a drop of {{drop_alpha}} points after {{canary_alpha}} requests in the median. And I roll back at the alarm first, and argue afterwards.
#
# </details>
#
# <details><summary>How do you roll back, and to what?</summary>
#
# By moving an alias, one transaction, nothing is built or uploaded. To the previous *champion*, from a log, since the version number before was perhaps never live. Promotions are compare-and-set under a lock: a challenger that was compared with a former champion is refused and evaluated again. And rolling back is rehearsed, since a rollback that was never tried is a hope.
#
# </details>
#
# ## Read next
#
# - M. T. Ribeiro et al., [*Beyond Accuracy: Behavioral Testing of NLP Models with CheckList*](https://arxiv.org/abs/2005.04118), 2020. Minimum function, invariance, direction.
# - T. Tango, [*Equivalence test and confidence interval for the difference in proportions for the paired-sample design*](https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8%3C891::AID-SIM780%3E3.0.CO;2-B), 1998.
# - Q. McNemar, [*Note on the sampling error of the difference between correlated proportions or percentages*](https://doi.org/10.1007/BF02295996), 1947.
# - S. Holm, [*A simple sequentially rejective multiple test procedure*](https://www.jstor.org/stable/4615733), 1979.
# - D. Card et al., [*With Little Power Comes Great Responsibility*](https://arxiv.org/abs/2010.06595), 2020. The power of comparisons in NLP.
# - R. Johari et al., [*Always Valid Inference: Continuous Monitoring of A/B Tests*](https://arxiv.org/abs/1512.04922), 2017.
# - S. R. Howard et al., [*Time-uniform, nonparametric, nonasymptotic confidence sequences*](https://arxiv.org/abs/1810.08240), 2021; A. Ramdas et al., [*Game-Theoretic Statistics and Safe Anytime-Valid Inference*](https://arxiv.org/abs/2210.01948), 2023. Betting against a hypothesis.
# - H. Robbins, [*Statistical methods related to the law of the iterated logarithm*](https://doi.org/10.1214/aoms/1177696786), 1970. Where the mixture comes from.
# - The [MLflow documentation of the model registry](https://mlflow.org/docs/latest/ml/model-registry/), on aliases.
