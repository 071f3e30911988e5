# %% [markdown]
# # 4.2 Data contracts and pipelines
#
# You will be able to stop a bad batch of data before it reaches a model: a row contract that reports every fault at once, batch statistics with a false-alarm rate that you set, a quarantine that survives a crash, and a pipeline that reruns what changed and nothing else.
#
# **You will measure.** Ten tests at 5 % each stop {{far_each}} of the clean batches; the same tests under Holm's correction at 1 % stop {{far_holm}} ({{far_holm:interval}}) and still catch {{power_holm}} of the batches with a planted fault. A pipeline with {{changes}} kinds of change reruns the same stages as DVC in {{agree}} of {{changes}}, and both leave a stale result in one. A poisoned batch let in gives the attacker's action to {{backdoor_in}} of the tickets that carry the attacker's sentence, while exact match on the test set is {{exact_in}}.
#
# **You need.** pandas; p-values; `git`; lesson 1.5 (finetuning) for the last experiment.
#
# **Time.** About 90 minutes, 68 of them for the exercises; the solution runs in {{run:seconds}} s on one CPU core.

# %% [markdown]
# ## Why it matters at work
#
# A model is retrained every night on what arrived that day. Upstream, somebody renames a column, a vendor's export cuts texts at 160 characters, a time zone changes, a labeller is paid by an attacker. Nothing raises an error; the loss goes down. What you see, weeks later, is a product that got worse.
#
# The defences fail in ways of their own. Checks that cry wolf are switched off. A quarantine that crashes half-way loses rows or doubles them. A cache that does not know what a stage reads serves an old result as new.
#
# In interviews: "how do you validate a batch before training?", "your data check pages the team every second night; what do you change?", "`dvc repro` says that everything is up to date and the number is wrong. How can that be?"

# %% tags=["parameters"]
pool_size = 24_000  # clean tickets that batches are drawn from; quick: 8_000
clean_batches = 200  # for each batch size; quick: 6
fault_batches = 30  # for each fault and batch size; quick: 2
runs = 4  # of the finetuning, each with a company and a seed of its own; quick: 1
steps = 50  # of each finetuning, in batches of 8: one pass over a night; quick: 2
test_tickets = 64  # of each run; quick: 8
seed = 0

# %%
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of a faster kernel that is not installed
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pandera.pandas as pa
import torch
from IPython.display import display
from scipy.stats import chi2_contingency, ks_2samp

from labkit import adapters, assistant, triage
from labkit.batches import (
    BATCH_FAULTS,
    COLUMNS,
    PAIRS,
    ROW_FAULTS,
    TARGET,
    TRIGGER,
    Lens,
    leak_from,
    poisoned,
    received,
    tickets,
    triggered,
)
from labkit.plots import COLOURS, direct_label, intervals, label_lines, use_house_style
from labkit.predict import compare
from labkit.results import ResultCard
from labkit.world import ACTIONS, CATEGORIES, LESSON_SEEDS, URGENCIES, Triage, World

use_house_style()
card = ResultCard("4_2_data_contracts_and_pipelines")

# %% [markdown]
# ## A batch, and what goes wrong with it
#
# A batch holds one day's support tickets with their labels. A tenth of the customers name no product, so `product` may be missing; nothing else may.

# %%
world = World(LESSON_SEEDS[4200 + seed])
pool = received(world, pool_size)  # clean
held_out = received(world, 500, part="test")  # the test set of the model
catalogue = frozenset(world.entities["product"])
batch = pool.iloc[:300].reset_index(drop=True)
faults = {**ROW_FAULTS, "test set leaked": leak_from(held_out), **BATCH_FAULTS}
display(
    batch.head(4)
    .style.hide(axis="index")
    .format(precision=1)
    .set_properties(**{"white-space": "normal", "text-align": "left"})
)
print("planted faults:", "; ".join(faults))

# %% [markdown]
# ## The row contract
#
# Some faults show in a single row, or in the shape of the table. A contract says what a row must be, and it is checked before anything else reads the batch. Written by hand it is a loop; what it returns is a set of pairs (place, row): the column and the row's label, `("row", label)` for a rule over several columns, `(column, None)` for a column that is missing, unknown or of the wrong type.

# %%
LABELLERS = ("clerk", "vendor", "assistant")
DAMAGE = "Ã|Â|â€|\ufffd"  # what UTF-8 read as Latin-1 looks like in this customer base; "Ã" is a letter in Portuguese


def by_hand(table: pd.DataFrame, products: frozenset[str], tests: frozenset[str]) -> set[tuple[str, int | None]]:
    """What the contract refuses. (For brevity it knows no types.)"""
    found: set[tuple[str, int | None]] = {(str(name), None) for name in set(COLUMNS) ^ set(table.columns)}
    options = {
        "product": products,
        "category": CATEGORIES,
        "urgency": URGENCIES,
        "action": ACTIONS,
        "labeller": LABELLERS,
    }
    ids = table["ticket_id"].tolist()
    for label, row in table.iterrows():
        for name in set(COLUMNS) & set(table.columns):
            value = row[name]
            if pd.isna(value):
                bad = name != "product"
            elif name in options:
                bad = value not in options[name]
            elif name == "text":
                bad = bool(re.search(DAMAGE, value)) or value in tests
            else:
                bad = (name == "minutes" and value <= 0) or (name == "ticket_id" and ids.count(value) > 1)
            if bad:
                found.add((name, label))
        if (row["category"], row["action"]) not in PAIRS:
            found.add(("row", label))
    return found


def refusals(schema, table: pd.DataFrame) -> set[tuple[str, int | None]]:
    """The same pairs, from a pandera schema. `lazy=True` collects all faults; without it the first one ends it."""
    try:
        schema.validate(table, lazy=True)
    except pa.errors.SchemaErrors as errors:
        cases = errors.failure_cases
    else:
        return set()
    found: set[tuple[str, int | None]] = set()
    for context, column, check, value, label in zip(
        cases["schema_context"], cases["column"], cases["check"], cases["failure_case"], cases["index"], strict=True
    ):
        of_row = context == "DataFrameSchema" and check != "multiple_fields_uniqueness"
        if not pd.isna(label):
            found.add(("row" if of_row else str(column), int(label)))
        elif str(check).startswith(("column_", "dtype")):  # else a check that could not run, beside its reason
            found.add((str(value) if str(check).startswith("column_") else str(column), None))
    return found


# %% [markdown]
# **Exercise.** Write the contract in pandera. `contract(catalogue, held_out)` returns a `pa.DataFrameSchema` (a `pa.DataFrameModel` class will do as well). `catalogue` is the set of products, `held_out` the set of the test set's texts.
#
# | column | type | missing | each value |
# |---|---|---|---|
# | `ticket_id` | `str` | no | occurs once in the batch, else all its rows are refused |
# | `received` | `"datetime64[us, UTC]"` | no | |
# | `text` | `str` | no | does not contain the pattern `DAMAGE`; equals no text of `held_out` |
# | `product` | `str` | **yes** | in `catalogue` |
# | `category`, `urgency`, `action` | `str` | no | in `CATEGORIES`, `URGENCIES`, `ACTIONS` |
# | `labeller` | `str` | no | in `LABELLERS` |
# | `minutes` | `float` | no | above 0 |
#
# And of each row: the pair `(category, action)` is in `PAIRS`. And of the table: exactly these columns, in any order. A type that does not fit is **refused, not converted**: whoever sends minutes as text has changed something else as well. *About 20 lines.*
#
# <details><summary>Hint 1</summary>Which of pandera's defaults are stricter than this table (missing values) and which are laxer (unknown columns)?</details>
# <details><summary>Hint 2</summary><code>pa.Column(str, checks, nullable=…, unique=…)</code>; <code>pa.Check.isin(…)</code>, <code>pa.Check.gt(0)</code>; <code>pa.Check(lambda series: …)</code> returns a Boolean Series; a check among the schema's own <code>checks=</code> gets the whole table.</details>
# <details><summary>Hint 3</summary>The check of pairs gets a frame and returns <code>pd.Series([pair in PAIRS for pair in zip(frame["category"], frame["action"])], index=frame.index)</code>. Give the schema <code>strict=True</code>, and no <code>coerce</code>.</details>


# %% exercise="contract" difficulty=2 minutes=10
def contract(catalogue: frozenset[str], held_out: frozenset[str]) -> pa.DataFrameSchema:
    """Return the row contract of a batch."""
    ### BEGIN SOLUTION
    unharmed = pa.Check(lambda texts: ~texts.str.contains(DAMAGE), name="no mojibake")
    unseen = pa.Check(lambda texts: ~texts.isin(held_out), name="not in the test set")
    fits = pa.Check(
        lambda frame: pd.Series(
            [pair in PAIRS for pair in zip(frame["category"], frame["action"], strict=True)], index=frame.index
        ),
        name="action fits category",
    )
    options = {"category": CATEGORIES, "urgency": URGENCIES, "action": ACTIONS, "labeller": LABELLERS}
    return pa.DataFrameSchema(
        {
            "ticket_id": pa.Column(str, unique=True),
            "received": pa.Column("datetime64[us, UTC]"),
            "text": pa.Column(str, [unharmed, unseen]),
            "product": pa.Column(str, pa.Check.isin(catalogue), nullable=True),
            **{name: pa.Column(str, pa.Check.isin(values)) for name, values in options.items()},
            "minutes": pa.Column(float, pa.Check.gt(0)),
        },
        checks=fits,
        strict=True,
    )
    ### END SOLUTION


# %% check="contract" points=2
def small(**changes: Sequence) -> pd.DataFrame:
    """Six good rows, with some columns replaced."""
    columns = {
        "ticket_id": [f"a{i}" for i in range(6)],
        "received": pd.DatetimeIndex(["2031-01-01"] * 6, tz="UTC").as_unit("us"),
        "text": ["The Nolux is late.", "It broke.", "Yours, Ida Schön", "Why?", "It broke.", "Hello!"],
        "product": pd.Series(["Nolux", None, "Barix", None, "Barix", "Nolux"], dtype=object),
        "category": ["delivery", "defect", "billing", "setup", "defect", "account"],
        "urgency": ["low", "normal", "high", "low", "low", "high"],
        "action": ["refund", "repair", "refund", "explain", "replace", "call"],
        "labeller": ["clerk", "vendor", "clerk", "assistant", "vendor", "clerk"],
        "minutes": [1.0, 2.5, 0.1, 7.0, 2.5, 4.0],
    }
    return pd.DataFrame(columns | changes)


schema = contract(frozenset({"Nolux", "Barix"}), frozenset({"Seen in the test set."}))
got = refusals(schema, small())
assert ("product", 1) not in got, "A product may be missing: a pandera column refuses nulls unless nullable=True"
assert not got, f"These rows are good and must pass; yours refuses {sorted(got, key=str)}"
broken = []
try:
    schema.validate(small(), lazy=True)
except pa.errors.SchemaErrors as errors:
    broken = errors.failure_cases["failure_case"].tolist()
assert not broken, f"A check of yours cannot judge good rows: {broken}. A check returns a Series of Booleans"
got = refusals(schema, small(ticket_id=["a0", "a1", "a2", "a3", "a1", "a5"]))
assert ("ticket_id", 4) in got, "An id occurs once in a batch (unique=True), or the ticket is trained on twice"
assert got == {("ticket_id", 1), ("ticket_id", 4)}, (
    f"Rows 1 and 4 share an id, and which of them is right nobody knows: refuse both; yours refuses {got}"
)
bad = small(text=["The NoluxÂ is", "It broke.", "Yours, Ida SchÃ¶n", "Seen in the test set.", "â€“", "H\ufffdllo!"])
got = refusals(schema, bad)
assert ("text", 2) in got, (
    "'SchÃ¶n' is mojibake in the middle of a text: look for DAMAGE anywhere, not at the beginning"
)
assert ("text", 3) in got, "A text of the test set must be refused: the test would measure memory"
assert got == {("text", i) for i in (0, 2, 3, 4, 5)}, f"Rows 0, 2, 3, 4 and 5 have bad texts; yours refuses {got}"
bad = small(
    category=["shipping", "defect", "billing", "setup", "defect", "account"],
    urgency=["low", "normal", "urgent", "low", "low", "high"],
    action=["refund", "repair", "refund", None, "replace", "call"],
    product=pd.Series(["Nolux", None, "Barix", None, "Unknown", "Nolux"], dtype=object),
    labeller=["clerk", "vendor", "clerk", "assistant", "vendor", "intern"],
    minutes=[1.0, 0.0, 0.1, np.nan, -3.0, 4.0],
)
got = refusals(schema, bad)
for place, row, why in (
    ("category", 0, "'shipping' is no category"),
    ("urgency", 2, "'urgent' is no urgency"),
    ("action", 3, "an action must not be missing"),
    ("product", 4, "the product is not in the catalogue"),
    ("labeller", 5, "the labeller is none of the three"),
    ("minutes", 1, "0 minutes are not above 0"),
    ("minutes", 3, "minutes must not be missing"),
    ("minutes", 4, "minutes are above 0"),
):
    assert (place, row) in got, f"Row {row} must be refused in {place}: {why}; all faults at once, not the first only"
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(3)
for _case in range(12):
    _good = small()
    _column = ["category", "urgency", "action", "labeller", "product", "ticket_id", "text"][_case % 7]
    _row = int(_rng.integers(6))
    _values = _good[_column].tolist()
    _values[_row] = (
        ["nonsense", None, "nonsense"][_case % 3]
        if _column not in ("ticket_id", "text", "product")
        else {"ticket_id": None, "text": None, "product": "nonsense"}[_column]
    )
    _good[_column] = pd.Series(_values, dtype=object)
    assert (_column, _row) in refusals(schema, _good), f"{_column} = {_values[_row]!r} in row {_row} must be refused"
for _column, _value in (
    ("product", ""),
    ("product", "nolux"),
    ("category", "Defect"),
    ("urgency", "lowest"),
    ("action", "no refund"),
    ("labeller", "clerks"),
    ("text", "Hello,\nyours, SchÃ¶n"),
):
    _values = pd.Series([*small()[_column].tolist()[:5], _value], dtype=object)
    assert (_column, 5) in refusals(schema, small(**{_column: _values})), f"{_column} = {_value!r} must be refused"
_near = [
    "seen in the test set.",
    "Seen in the test set. And more.",
    "Seen in",
    "See",
    " Seen in the test set.",
    "Set.\nSeen?",
]
_got = refusals(schema, small(text=_near, minutes=[10_000.0, 1e-3, 600.0, 1e6, 0.5, 1.0]))
assert not _got, f"No text equals one of held_out, and minutes have no upper bound; yours refuses {_got}"
_shuffled = small()[list(COLUMNS)[::-1]]
assert not refusals(schema, _shuffled), "The order of the columns plays no part"
_times = small()["received"].tolist()
_got = refusals(schema, small(received=pd.to_datetime([*_times[:2], None, *_times[3:]]).as_unit("us")))
assert ("received", 2) in _got, "The time of receipt must not be missing"
_relabelled = small(minutes=[1.0, 0.0, 0.1, 7.0, 3.0, 4.0]).set_index(pd.Index([10, 20, 30, 40, 50, 60]))
assert refusals(schema, _relabelled) == {("minutes", 20)}, "Rows are named by their label in the index, whatever it is"
_relabelled = small(action=["refund", "call", "refund", "explain", "replace", "call"]).set_index(_relabelled.index)
assert refusals(schema, _relabelled) == {("row", 20)}, "Rows are named by their label in the index, whatever it is"
_other = contract(frozenset({"Zorbax"}), frozenset())
assert ("product", 0) in refusals(_other, small()), "Use the catalogue that is given"
### END HIDDEN TESTS

# %% check="contract" points=2
got = refusals(schema, small(action=["refund", "call", "refund", "refund", "replace", "call"]))
assert ("row", 3) in got, "setup and refund are both labels, but not a pair of PAIRS: check the two columns together"
assert got == {("row", 1), ("row", 3)}, f"Rows 1 (defect, call) and 3 (setup, refund) are no pairs; yours: {got}"
got = refusals(schema, small().assign(priority="low"))
assert got == {("priority", None)}, (
    f"A column that nobody announced must be refused, pandera lets it pass unless strict=True; yours: {got}"
)
got = refusals(schema, small().rename(columns={"urgency": "priority"}))
assert {("priority", None), ("urgency", None)} <= got, f"A renamed column is one missing and one unknown; yours: {got}"
got = refusals(schema, small(minutes=["1", "2", "3", "4", "5", "6"]))
assert ("minutes", None) in got, "Minutes as text must be refused: coerce=True would convert them and say nothing"
got = refusals(schema, small(received=pd.date_range("2031-01-01", periods=6, freq="h").as_unit("us")))
assert ("received", None) in got, (
    "A time without a zone must be refused: which zone it is in is exactly what is not known (no coerce, and a type with UTC)"
)
### BEGIN HIDDEN TESTS
_got = refusals(schema, small(received=pd.date_range("2031-01-01", periods=6, freq="h", tz="Asia/Tokyo").as_unit("us")))
assert ("received", None) in _got, "A time in another zone must be refused: the type is datetime64[us, UTC]"
_got = refusals(schema, small(minutes=[1, 2, 3, 4, 5, 6]))
assert ("minutes", None) in _got, "Whole numbers are another type than float: refuse, do not convert"
for _name in COLUMNS:
    assert (_name, None) in refusals(schema, small().drop(columns=_name)), f"{_name} must not be missing as a column"
    if _name not in ("received", "minutes"):
        _got = refusals(schema, small(**{_name: pd.Categorical(small()[_name])}))
        assert (_name, None) in _got, f"{_name} as categories is no str: give every column its type; yours: {_got}"
_got = refusals(schema, small(ticket_id=[1, 2, 3, 4, 5, 6]))
assert "ticket_id" in {_place for _place, _ in _got}, "Ids as numbers are no str: give the column its type, no coerce"
for _category in CATEGORIES:
    for _action in ACTIONS:
        _got = refusals(schema, small(category=[_category] * 6, action=[_action] * 6))
        _want = set() if (_category, _action) in PAIRS else {("row", i) for i in range(6)}
        assert _got == _want, f"({_category}, {_action}): {sorted(_want)} must be refused; yours: {sorted(_got)}"
_given = small()
_kept = _given.copy()
refusals(schema, _given)
pd.testing.assert_frame_equal(_given, _kept)
### END HIDDEN TESTS


# %% mistake="nulls refused everywhere" of="contract" says="A product may be missing"
def contract(catalogue, held_out):
    options = {"product": catalogue, "category": CATEGORIES, "urgency": URGENCIES, "action": ACTIONS}
    return pa.DataFrameSchema({name: pa.Column(str, pa.Check.isin(values)) for name, values in options.items()})


# %% mistake="extra columns pass" of="contract" says="unless strict=True"
def contract(catalogue, held_out):
    good = pa.Check(lambda s: ~(s.str.contains(DAMAGE) | s.isin(held_out)))
    pairs = pa.Check(lambda d: pd.Series([*zip(d["category"], d["action"], strict=True)], index=d.index).isin(PAIRS))
    return pa.DataFrameSchema(
        {
            "ticket_id": pa.Column(str, unique=True),
            "received": pa.Column("datetime64[us, UTC]"),
            "text": pa.Column(str, good),
            "product": pa.Column(str, pa.Check.isin(catalogue), nullable=True),
            "category": pa.Column(str, pa.Check.isin(CATEGORIES)),
            "urgency": pa.Column(str, pa.Check.isin(URGENCIES)),
            "action": pa.Column(str, pa.Check.isin(ACTIONS)),
            "labeller": pa.Column(str, pa.Check.isin(LABELLERS)),
            "minutes": pa.Column(float, pa.Check.gt(0)),
        },
        checks=pairs,
    )


# %% mistake="converts what does not fit" of="contract" says="coerce=True would convert them"
def contract(catalogue, held_out):
    good = pa.Check(lambda s: ~(s.str.contains(DAMAGE) | s.isin(held_out)))
    pairs = pa.Check(lambda d: pd.Series([*zip(d["category"], d["action"], strict=True)], index=d.index).isin(PAIRS))
    return pa.DataFrameSchema(
        {
            "ticket_id": pa.Column(str, unique=True),
            "received": pa.Column("datetime64[us, UTC]"),
            "text": pa.Column(str, good),
            "product": pa.Column(object, pa.Check.isin(catalogue), nullable=True),
            "category": pa.Column(str, pa.Check.isin(CATEGORIES)),
            "urgency": pa.Column(str, pa.Check.isin(URGENCIES)),
            "action": pa.Column(object, pa.Check.isin(ACTIONS)),
            "labeller": pa.Column(str, pa.Check.isin(LABELLERS)),
            "minutes": pa.Column(float, pa.Check.gt(0)),
        },
        checks=pairs,
        strict=True,
        coerce=True,
    )


# %% mistake="any zone will do" of="contract" says="A time without a zone must be refused"
def contract(catalogue, held_out):
    good = pa.Check(lambda s: ~(s.str.contains(DAMAGE) | s.isin(held_out)))
    pairs = pa.Check(lambda d: pd.Series([*zip(d["category"], d["action"], strict=True)], index=d.index).isin(PAIRS))
    return pa.DataFrameSchema(
        {
            "ticket_id": pa.Column(str, unique=True),
            "received": pa.Column(),
            "text": pa.Column(str, good),
            "product": pa.Column(str, pa.Check.isin(catalogue), nullable=True),
            "category": pa.Column(str, pa.Check.isin(CATEGORIES)),
            "urgency": pa.Column(str, pa.Check.isin(URGENCIES)),
            "action": pa.Column(str, pa.Check.isin(ACTIONS)),
            "labeller": pa.Column(str, pa.Check.isin(LABELLERS)),
            "minutes": pa.Column(float, pa.Check.gt(0)),
        },
        checks=pairs,
        strict=True,
    )


# %% mistake="looks at the beginning of a text" of="contract" says="look for DAMAGE anywhere"
def contract(catalogue, held_out):
    unharmed = pa.Check.str_matches(f"^(?!{DAMAGE})")
    return pa.DataFrameSchema(
        {
            "ticket_id": pa.Column(str, unique=True),
            "received": pa.Column("datetime64[us, UTC]"),
            "text": pa.Column(str, [unharmed, pa.Check(lambda s: ~s.isin(held_out))]),
            "product": pa.Column(str, pa.Check.isin(catalogue), nullable=True),
            "category": pa.Column(str, pa.Check.isin(CATEGORIES)),
            "urgency": pa.Column(str, pa.Check.isin(URGENCIES)),
            "action": pa.Column(str, pa.Check.isin(ACTIONS)),
            "labeller": pa.Column(str, pa.Check.isin(LABELLERS)),
            "minutes": pa.Column(float, pa.Check.gt(0)),
        },
        strict=True,
    )


# %% mistake="each column for itself" of="contract" says="check the two columns together"
def contract(catalogue, held_out):
    return pa.DataFrameSchema(
        {
            "ticket_id": pa.Column(str, unique=True),
            "received": pa.Column("datetime64[us, UTC]"),
            "text": pa.Column(str, pa.Check(lambda s: ~(s.str.contains(DAMAGE) | s.isin(held_out)))),
            "product": pa.Column(str, pa.Check.isin(catalogue), nullable=True),
            "category": pa.Column(str, pa.Check.isin(CATEGORIES)),
            "urgency": pa.Column(str, pa.Check.isin(URGENCIES)),
            "action": pa.Column(str, pa.Check.isin(ACTIONS)),
            "labeller": pa.Column(str, pa.Check.isin(LABELLERS)),
            "minutes": pa.Column(float, pa.Check.gt(0)),
        },
        strict=True,
    )


# %% mistake="ids may repeat" of="contract" says="An id occurs once"
def contract(catalogue, held_out):
    return pa.DataFrameSchema(
        {
            "ticket_id": pa.Column(str),
            "received": pa.Column("datetime64[us, UTC]"),
            "text": pa.Column(str),
            "product": pa.Column(str, pa.Check.isin(catalogue), nullable=True),
            "category": pa.Column(str, pa.Check.isin(CATEGORIES)),
            "urgency": pa.Column(str, pa.Check.isin(URGENCIES)),
            "action": pa.Column(str, pa.Check.isin(ACTIONS)),
            "labeller": pa.Column(str, pa.Check.isin(LABELLERS)),
            "minutes": pa.Column(float, pa.Check.gt(0)),
        },
        strict=True,
    )


# %% mistake="the first of two ids is kept" of="contract" says="refuse both"
def contract(catalogue, held_out):
    good = pa.Check(lambda s: ~(s.str.contains(DAMAGE) | s.isin(held_out)))
    pairs = pa.Check(lambda d: pd.Series([*zip(d["category"], d["action"], strict=True)], index=d.index).isin(PAIRS))
    return pa.DataFrameSchema(
        {
            "ticket_id": pa.Column(str, unique=True, report_duplicates="exclude_first"),
            "received": pa.Column("datetime64[us, UTC]"),
            "text": pa.Column(str, good),
            "product": pa.Column(str, pa.Check.isin(catalogue), nullable=True),
            "category": pa.Column(str, pa.Check.isin(CATEGORIES)),
            "urgency": pa.Column(str, pa.Check.isin(URGENCIES)),
            "action": pa.Column(str, pa.Check.isin(ACTIONS)),
            "labeller": pa.Column(str, pa.Check.isin(LABELLERS)),
            "minutes": pa.Column(float, pa.Check.gt(0)),
        },
        checks=pairs,
        strict=True,
    )


# %% mistake="types only where they hurt" of="contract" says="give every column its type"
def contract(catalogue, held_out):
    good = pa.Check(lambda s: ~(s.str.contains(DAMAGE) | s.isin(held_out)))
    pairs = pa.Check(lambda d: pd.Series([*zip(d["category"], d["action"], strict=True)], index=d.index).isin(PAIRS))
    options = {"category": CATEGORIES, "urgency": URGENCIES, "action": ACTIONS, "labeller": LABELLERS}
    return pa.DataFrameSchema(
        {
            "ticket_id": pa.Column(unique=True),
            "received": pa.Column("datetime64[us, UTC]"),
            "text": pa.Column(str, good),
            "product": pa.Column(checks=pa.Check.isin(catalogue), nullable=True),
            **{name: pa.Column(checks=pa.Check.isin(values)) for name, values in options.items()},
            "minutes": pa.Column(float, pa.Check.gt(0)),
        },
        checks=pairs,
        strict=True,
    )


# %% alternative="ids unique in the schema, values one by one" of="contract"
def contract(catalogue, held_out):
    def one_of(values):
        return pa.Check(lambda value: value in values, element_wise=True)

    columns = {name: pa.Column(str) for name in COLUMNS}
    columns["received"] = pa.Column(pd.DatetimeTZDtype("us", "UTC"))
    columns["text"] = pa.Column(
        str, pa.Check(lambda text: not (text in held_out or re.search(DAMAGE, text)), element_wise=True)
    )
    columns["product"] = pa.Column(str, one_of(catalogue), nullable=True)
    for name, values in zip(("category", "urgency", "action"), (CATEGORIES, URGENCIES, ACTIONS), strict=True):
        columns[name] = pa.Column(str, one_of(values))
    columns["labeller"] = pa.Column(str, one_of(LABELLERS))
    columns["minutes"] = pa.Column("float64", pa.Check.greater_than(0))
    pair = pa.Check(lambda frame: frame.apply(lambda row: (row["category"], row["action"]) in PAIRS, axis=1))
    return pa.DataFrameSchema(columns, checks=[pair], strict=True, unique=["ticket_id"])


# %% alternative="a DataFrameModel" of="contract"
def contract(catalogue, held_out):
    class Tickets(pa.DataFrameModel):
        ticket_id: str = pa.Field(unique=True)
        received: pd.DatetimeTZDtype = pa.Field(dtype_kwargs={"unit": "us", "tz": "UTC"})
        text: str
        product: str = pa.Field(isin=sorted(catalogue), nullable=True)
        category: str = pa.Field(isin=CATEGORIES)
        urgency: str = pa.Field(isin=URGENCIES)
        action: str = pa.Field(isin=ACTIONS)
        labeller: str = pa.Field(isin=LABELLERS)
        minutes: float = pa.Field(gt=0)

        @pa.check("text", element_wise=True)
        @classmethod
        def whole(cls, text):
            return re.search(DAMAGE, text) is None and text not in held_out

        @pa.dataframe_check
        @classmethod
        def allowed(cls, frame):
            return (frame["category"] + "/" + frame["action"]).isin(["/".join(pair) for pair in PAIRS])

        class Config:
            strict = True

    return Tickets


# %% [markdown]
# Your contract beside the loop, on every planted fault:

# %%
texts = frozenset(held_out["text"])
schema = contract(catalogue, texts)
rng = np.random.default_rng([seed, 1])
assert not refusals(schema, pool), "the contract refuses clean rows"
rows = []
for name, plant in faults.items():
    broken = plant(batch, rng)
    hand, library = by_hand(broken, catalogue, texts), refusals(schema, broken)
    refused = {row for _, row in library if row is not None}
    rows.append((name, len(refused), "whole table" if ("urgency", None) in library else "", hand == library))
report = pd.DataFrame(rows, columns=["fault", "rows refused", "shape", "loop = pandera"])
display(report.style.hide(axis="index"))
card.record(
    "row_caught",
    sum(bool(n or shape) for _, n, shape, _ in rows),
    format="d",
    label="kinds of fault that the row contract sees",
)
card.record("kinds", len(rows), format="d", label="kinds of planted fault")
card.record(
    "contract_equal",
    sum(equal for *_, equal in rows),
    format="d",
    label="kinds of fault on which loop and pandera refuse the same",
)

# %% [markdown]
# The contract sees {{row_caught}} of {{kinds}} kinds of fault, and loop and pandera refuse the same places in {{contract_equal}} of {{kinds}}. In the others every row looks right. A flipped label is a label; a text cut at 160 characters is a text. Only the batch as a whole shows that something happened.
#
# Two details of pandera that cost people evenings. A check over the table reports each bad row once *for every column*, so count distinct index labels, not lines of `failure_cases`. And a check that raises (a column is missing) is reported as a failure of that check, beside the others, so that `lazy=True` always reaches the end.

# %% [markdown]
# ## The batch as a whole
#
# Now compare a batch with a clean reference of the same kind. A `Lens` turns both into ten columns: five as they arrive, the hour of receipt, the minutes, the length of the text, the number of words never seen before, and whether a small label model (TF-IDF and logistic regression) agrees with the labels. The lens has a clean frame of its own to learn from. Learnt on the reference it would know the reference by heart, and every clean batch would look worse.

# %%
lens = Lens(pool.iloc[:2000])
columns = lens.features(pool.iloc[2000:])
references = [columns.iloc[i * 1500 : (i + 1) * 1500] for i in range(4 if pool_size > 10_000 else 1)]
clean = columns.iloc[1500 * len(references) :].reset_index(drop=True)  # 1,500 tickets a reference
display(clean.head(3).style.hide(axis="index").format(precision=1))

# %% [markdown]
# Each column gets a test of whether both samples come from one distribution; its p-value is below $\alpha$ with probability (about) $\alpha$ when they do. With $m$ columns tested at $\alpha$ each, some column rings in $1-(1-\alpha)^m$ of the *clean* batches if the columns are independent, and in at most $m\alpha$ whatever they are. Holm (1979) keeps that chance below $\alpha$ under any dependence: sort the p-values, compare the smallest with $\alpha/m$, the next with $\alpha/(m-1)$, and so on; stop at the first that is not smaller or equal.
#
# **Exercise.** Three things.
#
# 1. *Predict*: ten columns, each tested at 5 %. In which share of the clean batches does at least one ring? `predicted_any`, from 0 to 1.
# 2. `column_pvalues(reference, batch)` returns a dictionary from each column of `reference` to its p-value, a float. Columns hold numbers (`int` or `float`, none missing) or text. Numbers: two-sample Kolmogorov-Smirnov, two-sided, asymptotic or exact. Text: the chi-square test of homogeneity on the table of *counts*, 2 rows (reference, batch) by one column for each value that occurs in either of them, without a continuity correction; a missing value counts as a value. When there is one value only, the p-value is 1. Both samples have rows, and `batch` has all columns of `reference`, perhaps in another order.
# 3. `holm(pvalues, level)` returns the set of the columns that Holm's procedure rejects. With `{"a": 0.004, "b": 0.04, "c": 0.02}` and a level of 0.05 it is `{"a", "b", "c"}`; with 0.03 it is `{"a"}`: 0.02 is above 0.03 / 2, and there it stops.
#
# *About 18 lines.*
#
# <details><summary>Hint 1</summary>The reference is a sample too. What does value_counts do with missing values by default, and what becomes of them when two such counts are joined? What if a value occurs in the batch alone?</details>
# <details><summary>Hint 2</summary><code>ks_2samp(a, b).pvalue</code> (method="asymp" is faster); <code>chi2_contingency(table, correction=False).pvalue</code>; <code>pd.api.types.is_numeric_dtype</code>; <code>pd.factorize(values, use_na_sentinel=False)</code> numbers the values of both samples at once.</details>
# <details><summary>Hint 3</summary>Codes of the concatenated column; <code>np.bincount</code> of the first len(reference) codes and of the rest, with the same minlength, are the table's rows. Holm: for place, name in enumerate(sorted(pvalues, key=pvalues.get)): if the p-value is above level / (m - place), break; else add the name.</details>

# %% exercise="alarms" difficulty=3 minutes=14
predicted_any = None  # from 0 to 1
### BEGIN SOLUTION
predicted_any = 0.4
### END SOLUTION


def column_pvalues(reference: pd.DataFrame, batch: pd.DataFrame) -> dict[str, float]:
    """Return for each column the p-value of "reference and batch come from one distribution"."""
    ### BEGIN SOLUTION
    found = {}
    for name in reference.columns:
        old, new = reference[name], batch[name]
        if pd.api.types.is_numeric_dtype(old):
            found[name] = float(ks_2samp(old, new, method="asymp").pvalue)
            continue
        codes, values = pd.factorize(
            np.concatenate([old.to_numpy(object), new.to_numpy(object)]), use_na_sentinel=False
        )
        table = [np.bincount(part, minlength=len(values)) for part in (codes[: len(old)], codes[len(old) :])]
        found[name] = float(chi2_contingency(table, correction=False).pvalue) if len(values) > 1 else 1.0
    return found
    ### END SOLUTION


def holm(pvalues: Mapping[str, float], level: float) -> set[str]:
    """Return the columns that Holm's step-down procedure rejects at this family-wise level."""
    ### BEGIN SOLUTION
    rejected: set[str] = set()
    for place, name in enumerate(sorted(pvalues, key=pvalues.__getitem__)):
        if pvalues[name] > level / (len(pvalues) - place):
            break
        rejected.add(name)
    return rejected
    ### END SOLUTION


# %% check="alarms" points=1
assert predicted_any is not None, "Write your prediction down first: predicted_any = a share from 0 to 1"
assert 0 <= predicted_any <= 1, f"predicted_any is a share from 0 to 1; yours is {predicted_any}"


# %% check="alarms" points=2
def colours(red: int, blue: int, missing: int) -> pd.DataFrame:
    """A column with so many of each value."""
    return pd.DataFrame({"colour": pd.Series(["red"] * red + ["blue"] * blue + [None] * missing, dtype=object)})


got = column_pvalues(colours(50, 30, 20), colours(25, 15, 60))["colour"]
assert got < 0.9, "The share of missing values tripled and your p-value does not see it: a missing value is a value"
assert abs(got - 5.78e-8) < 1e-9, (
    f"Counts (50, 30, 20) against (25, 15, 60) give p = 5.8e-8; yours is {got:.3g}. Both samples are samples: a "
    "2 x 3 table of counts, not the batch against shares taken for exact, and not a table of shares"
)
got = column_pvalues(colours(50, 50, 0), colours(40, 60, 0))["colour"]
assert abs(got - 0.1551) < 0.002, (
    f"Counts (50, 50) against (40, 60) give p = 0.155; yours is {got:.4f} (0.20 is with the continuity correction; "
    "0.046 takes the reference for exact)"
)
got = column_pvalues(colours(90, 10, 0), colours(90, 0, 0).replace("red", "green"))["colour"]
assert got < 1e-20, "A value that occurs in the batch alone, 'green', counts as well: take the values of both samples"
got = column_pvalues(colours(9, 0, 0), colours(5, 0, 0))["colour"]
assert got == 1, f"One value in both samples cannot differ: the p-value is 1; yours is {got}"
numbers = np.arange(200) % 97
old, new = pd.DataFrame({"x": numbers[:120] * 1.0}), pd.DataFrame({"x": numbers[120:] * 1.0})
got = column_pvalues(old, new)["x"]
assert min(abs(got - ks_2samp(old["x"], new["x"], method=how).pvalue) for how in ("asymp", "exact")) < 1e-9, (
    f"A numeric column is compared by the two-sided Kolmogorov-Smirnov test of both samples; yours gives p = {got:.4g}"
)
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(8)
for _case in range(6):
    _n, _m = (int(v) for v in _rng.integers(5, 300, 2))
    _old = pd.DataFrame(
        {
            "k": pd.Series(_rng.choice(["a", "b", "c", None], _n), dtype=object),
            "i": _rng.integers(0, 5, _n),
            "f": _rng.normal(size=_n),
        }
    )
    _new = pd.DataFrame(
        {
            "f": _rng.normal(0.3, size=_m),
            "extra": "x",
            "i": _rng.integers(0, 6, _m),
            "k": pd.Series(_rng.choice(["a", "c", "d", None], _m), dtype=object),
        }
    )
    _kept = _old.copy(), _new.copy()
    _got = column_pvalues(_old, _new)
    assert set(_got) == {"k", "i", "f"}, f"One p-value for each column of the reference; yours are {sorted(_got)}"
    _values = ["a", "b", "c", "d", "missing"]
    _counts = np.array([[int((x["k"].fillna("missing") == v).sum()) for v in _values] for x in (_old, _new)])
    _want = chi2_contingency(_counts[:, _counts.sum(axis=0) > 0], correction=False).pvalue
    assert abs(_got["k"] - _want) < 1e-9, f"chi-square on {_counts.tolist()} gives {_want:.4g}; yours {_got['k']:.4g}"
    for _name in "if":
        _ways = [ks_2samp(_old[_name], _new[_name], method=_how).pvalue for _how in ("asymp", "exact")]
        assert min(abs(_got[_name] - _w) for _w in _ways) < 1e-9, (
            f"Kolmogorov-Smirnov on {_name!r}: {_ways}; yours {_got[_name]}"
        )
    pd.testing.assert_frame_equal(_old, _kept[0])
    pd.testing.assert_frame_equal(_new, _kept[1])
### END HIDDEN TESTS

# %% check="alarms" points=2
three = {"a": 0.004, "b": 0.04, "c": 0.02}
got = holm({"a": 0.03, "b": 0.6, "c": 0.7, "d": 0.8}, 0.05)
assert isinstance(got, (set, frozenset)), f"Return a set of column names; yours is a {type(got).__name__}"
assert got == set(), (
    f"Four columns, the smallest p-value 0.03 is above 0.05 / 4: nothing is rejected; yours rejects {got}. Each column "
    "at the full level rings far too often"
)
got = holm(three, 0.05)
assert got == {"a", "b", "c"}, (
    f"0.004 <= 0.05/3, 0.02 <= 0.05/2, 0.04 <= 0.05/1: all three; yours rejects {got}. Dividing by m throughout is "
    "Bonferroni, which rejects less at the same guarantee"
)
got = holm(three, 0.03)
assert got == {"a"}, f"0.02 is above 0.03 / 2, so a alone is rejected; yours rejects {got}"
got = holm({"a": 0.001, "b": 0.02, "c": 0.03, "d": 0.045}, 0.05)
assert got == {"a"}, (
    f"Stop at the first p-value that is too large: 0.02 is above 0.05/3, so a alone; yours goes on and rejects {got}. "
    "(Stepping up from the largest, as Hochberg and Benjamini-Hochberg do, rejects more and promises less.)"
)
got = holm({"a": 0.0125, "b": 0.6, "c": 0.7, "d": 0.8}, 0.05)
assert got == {"a"}, f"0.0125 is exactly 0.05 / 4, and smaller or equal is rejected; yours rejects {got}"
got = holm({"a": 0.01, "b": 0.01, "c": 0.9}, 0.05)
assert got == {"a", "b"}, f"a and b have the same p-value, and both count; yours rejects {got}"
assert holm({}, 0.05) == set(), f"No column, no alarm; yours: {holm({}, 0.05)}"
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(2)
for _m in (1, 2, 5, 12):
    for _ in range(25):
        _p = {f"c{i}": float(v) for i, v in enumerate(_rng.random(_m) ** 4)}
        _level = float(_rng.uniform(0.001, 0.3))
        _order = sorted(_p, key=_p.get)
        _adjusted = np.maximum.accumulate([(_m - i) * _p[c] for i, c in enumerate(_order)])
        _want = {c for c, a in zip(_order, _adjusted, strict=True) if a <= _level}
        _kept = dict(_p)
        assert holm(_p, _level) == _want, f"{_p} at {_level:.3f}: {_want}"
        assert _p == _kept, "Leave the p-values that are given as they are"
### END HIDDEN TESTS


# %% mistake="missing values dropped" of="alarms" says="a missing value is a value"
predicted_any = 0.05


def column_pvalues(reference, batch):
    found = {}
    for name in reference:
        if pd.api.types.is_numeric_dtype(reference[name]):
            found[name] = ks_2samp(reference[name], batch[name]).pvalue
        else:
            table = pd.concat([reference[name].value_counts(), batch[name].value_counts()], axis=1).fillna(0)
            found[name] = chi2_contingency(table.T, correction=False).pvalue if len(table) > 1 else 1.0
    return found


def holm(pvalues, level):
    return {name for name, p in pvalues.items() if p <= level / len(pvalues)}


# %% mistake="the reference is exact" of="alarms" says="not the batch against shares taken for exact"
from scipy.stats import chisquare

predicted_any = 0.05


def column_pvalues(reference, batch):
    found = {}
    for name in reference:
        if pd.api.types.is_numeric_dtype(reference[name]):
            found[name] = ks_2samp(reference[name], batch[name]).pvalue
        else:
            old = reference[name].fillna("-").value_counts(normalize=True)
            new = batch[name].fillna("-").value_counts().reindex(old.index, fill_value=0)
            found[name] = chisquare(new, old * new.sum()).pvalue
    return found


def holm(pvalues, level):
    return {name for name, p in pvalues.items() if p <= level / len(pvalues)}


# %% mistake="a table of shares" of="alarms" says="not a table of shares"
predicted_any = 0.05


def column_pvalues(reference, batch):
    found = {}
    for name in reference:
        if pd.api.types.is_numeric_dtype(reference[name]):
            found[name] = ks_2samp(reference[name], batch[name]).pvalue
        else:
            shares = [x[name].fillna("-").value_counts(normalize=True) for x in (reference, batch)]
            table = pd.concat(shares, axis=1).fillna(0)
            found[name] = chi2_contingency(table.T, correction=False).pvalue if len(table) > 1 else 1.0
    return found


def holm(pvalues, level):
    return {name for name, p in pvalues.items() if p <= level / len(pvalues)}


# %% mistake="continuity correction" of="alarms" says="with the continuity correction"
predicted_any = 0.05


def column_pvalues(reference, batch):
    found = {}
    for name in reference:
        if pd.api.types.is_numeric_dtype(reference[name]):
            found[name] = ks_2samp(reference[name], batch[name]).pvalue
        else:
            counts = [x[name].fillna("-").value_counts() for x in (reference, batch)]
            table = pd.concat(counts, axis=1).fillna(0)
            found[name] = chi2_contingency(table.T).pvalue if len(table) > 1 else 1.0
    return found


def holm(pvalues, level):
    return {name for name, p in pvalues.items() if p <= level / len(pvalues)}


# %% mistake="the reference's values only" of="alarms" says="counts as well: take the values of both"
predicted_any = 0.05


def column_pvalues(reference, batch):
    found = {}
    for name in reference:
        if pd.api.types.is_numeric_dtype(reference[name]):
            found[name] = ks_2samp(reference[name], batch[name]).pvalue
            continue
        old, new = (x[name].fillna("-").value_counts() for x in (reference, batch))
        new = new.reindex(old.index, fill_value=0)
        found[name] = 1.0 if len(old) < 2 or not new.sum() else chi2_contingency([old, new], correction=False).pvalue
    return found


def holm(pvalues, level):
    return {name for name, p in pvalues.items() if p <= level / len(pvalues)}


# %% mistake="each column at the level" of="alarms" says="Each column at the full level rings"
predicted_any = 0.05


def column_pvalues(reference, batch):
    return dict.fromkeys(reference, 0.5)


def holm(pvalues, level):
    return {name for name, p in pvalues.items() if p <= level}


# %% mistake="Bonferroni" of="alarms" says="is Bonferroni"
predicted_any = 0.05


def column_pvalues(reference, batch):
    return dict.fromkeys(reference, 0.5)


def holm(pvalues, level):
    return {name for name, p in pvalues.items() if p <= level / len(pvalues)}


# %% mistake="does not stop" of="alarms" says="Stop at the first p-value"
predicted_any = 0.05


def column_pvalues(reference, batch):
    return dict.fromkeys(reference, 0.5)


def holm(pvalues, level):
    order = sorted(pvalues, key=pvalues.get)
    return {name for place, name in enumerate(order) if pvalues[name] <= level / (len(order) - place)}


# %% mistake="equal is not rejected" of="alarms" says="smaller or equal is rejected"
predicted_any = 0.05


def column_pvalues(reference, batch):
    return dict.fromkeys(reference, 0.5)


def holm(pvalues, level):
    rejected = set()
    for place, name in enumerate(sorted(pvalues, key=pvalues.get)):
        if not pvalues[name] < level / (len(pvalues) - place):
            break
        rejected.add(name)
    return rejected


# %% mistake="looks names up by p-value" of="alarms" says="a and b have the same p-value"
predicted_any = 0.05


def column_pvalues(reference, batch):
    return dict.fromkeys(reference, 0.5)


def holm(pvalues, level):
    names = {p: name for name, p in pvalues.items()}
    rejected = set()
    for place, p in enumerate(sorted(pvalues.values())):
        if p > level / (len(pvalues) - place):
            break
        rejected.add(names[p])
    return rejected


# %% alternative="crosstab, adjusted p-values" of="alarms"
predicted_any = 1


def column_pvalues(reference, batch):
    both = pd.concat([reference, batch[reference.columns]], keys=["old", "new"])
    which = both.index.get_level_values(0)

    def test(column):
        if column.dtype.kind in "if":
            return ks_2samp(column[which == "old"], column[which == "new"])[1]
        table = pd.crosstab(which, column.fillna("(missing)").to_numpy())
        return 1.0 if table.shape[1] == 1 else chi2_contingency(table, correction=False)[1]

    return {name: test(both[name]) for name in both}


def holm(pvalues, level):
    names = sorted(pvalues, key=pvalues.get)
    worst, kept = 0.0, []
    while names:
        worst = max(worst, len(names) * pvalues[names[0]])
        if worst <= level:
            kept.append(names[0])
        names = names[1:]
    return set(kept)


# %% [markdown]
# ## False alarms and power
#
# Clean batches of five sizes are drawn at random from the pool; then the same from eight more pools, each with one of the faults planted. Three rules decide whether a batch is stopped:
#
# - **each at 5 %**: some column's p-value is at most 0.05;
# - **moved by a tenth**: some value's share differs from the reference's by more than 10 points, or some mean by more than 10 %;
# - **Holm at 1 %**: your procedure, at a level of 1 % for the whole batch.

# %%
sizes = (50, 100, 200, 400, 800)
levels = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)


def spread(table: pd.DataFrame) -> pd.DataFrame:
    """Each value of a text column as a column of zeros and ones, so that a share is a mean."""
    return pd.get_dummies(table, dummy_na=True, dtype=float)


def moved(usual: pd.Series, means: pd.Series) -> bool:
    """The rule of thumb: a share by 10 points, or a mean by 10 %."""
    limits = usual.where(usual.index.isin(["hour", "minutes", "length", "new_words"]), 1.0) / 10
    change = means.sub(usual, fill_value=0.0).abs()
    return bool((change > limits.reindex(change.index, fill_value=0.1)).any())


def judged(source: pd.DataFrame, size: int, count: int, key: int) -> list[dict[str, bool]]:
    """For `count` batches drawn from a source: which rules stop them."""
    draw = np.random.default_rng([seed, size, key])
    wide, verdicts = spread(source), []
    for i in range(count):
        rows = draw.choice(len(source), size, replace=False)
        pvalues = column_pvalues(references[i % len(references)], source.iloc[rows])
        stop = moved(usual[i % len(usual)], wide.iloc[rows].mean())
        verdict = {"each at 5 %": min(pvalues.values()) <= 0.05, "moved by a tenth": stop}
        verdicts.append(verdict | {f"Holm at {level:.1%}": bool(holm(pvalues, level)) for level in levels})
    return verdicts


usual = [spread(reference).mean() for reference in references]
on_clean = {size: pd.DataFrame(judged(clean, size, clean_batches, 0)) for size in sizes}
on_fault = {}
for number, (name, plant) in enumerate(BATCH_FAULTS.items(), 1):
    source = lens.features(plant(pool.iloc[-4000:].reset_index(drop=True), np.random.default_rng([seed, number])))
    for size in sizes:
        on_fault[name, size] = pd.DataFrame(judged(source, size, fault_batches, number))


def share(values: pd.Series | np.ndarray) -> tuple[float, float, float]:
    """A share and its 95 % Wilson interval."""
    values = np.asarray(values, dtype=bool)
    return float(values.mean()), *triage.interval(values)


CHOSEN = "Holm at 1.0%"
pooled = pd.concat(on_clean.values())
compare(
    [("clean batches stopped, ten columns at 5 % each", predicted_any, share(pooled["each at 5 %"])[0])], format=".0%"
)

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(12.5, 4.4), gridspec_kw={"width_ratios": [1, 1.25]})
for rule, colour in (("each at 5 %", COLOURS.wrong), ("moved by a tenth", COLOURS.before), (CHOSEN, COLOURS.after)):
    mean, low, high = (np.array(part) for part in zip(*(share(on_clean[size][rule]) for size in sizes), strict=True))
    intervals(left, sizes, mean, low, high, colour)
    left.plot(sizes, mean, color=colour, label=rule.replace(".0%", " %"))
left.axhline(0.01, color=COLOURS.truth, ls="--", lw=1.2)
left.set(xscale="log", xticks=sizes, xticklabels=sizes, xlabel="batch size (tickets)", ylabel="clean batches stopped",
         title="False alarms", ylim=(-0.03, 1.03))  # fmt: skip
grid = np.array([[on_fault[name, size][CHOSEN].mean() for size in sizes] for name in BATCH_FAULTS])
right.imshow(grid, cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
for (y, x), value in np.ndenumerate(grid):
    right.text(
        x, y, f"{value:.0%}", ha="center", va="center", color="white" if value > 0.75 else COLOURS.truth, fontsize=10
    )
right.set(xticks=range(len(sizes)), xticklabels=sizes, yticks=range(len(grid)), yticklabels=list(BATCH_FAULTS),
          xlabel="batch size (tickets)", title="Holm at 1 %: faulty batches stopped")  # fmt: skip
right.grid(visible=False)
for ax in (left, right):
    ax.minorticks_off()
left.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
label_lines(left)
fig.get_layout_engine().set(wspace=0.08)
plt.show()

every_fault = {size: pd.concat([on_fault[name, size] for name in BATCH_FAULTS]) for size in sizes}
table = pd.DataFrame(
    {
        **{
            f"clean, n = {size}": [on_clean[size][rule].mean() for rule in ("each at 5 %", "moved by a tenth", CHOSEN)]
            for size in (50, 800)
        },
        **{
            f"faulty, n = {size}": [
                every_fault[size][rule].mean() for rule in ("each at 5 %", "moved by a tenth", CHOSEN)
            ]
            for size in (50, 200, 800)
        },
    },
    index=["each at 5 %", "moved by a tenth", CHOSEN],
)
display(table.style.format("{:.0%}").set_caption("share of batches stopped; faulty: the mean over eight faults"))


def keep(
    name: str, values: tuple[float, float, float], label: str, tolerance: float = 0.05, format: str = ".0%"
) -> None:
    mean, low, high = values
    card.record(name, mean, low=low, high=high, format=format, tolerance=tolerance, label=label)


keep("far_each", share(pooled["each at 5 %"]), "clean batches stopped, ten columns at 5 % each")
keep("far_holm", share(pooled[CHOSEN]), "clean batches stopped, Holm at 1 %", 0.01, ".1%")
keep("power_holm", share(every_fault[200][CHOSEN]), "faulty batches of 200 stopped, Holm at 1 %, eight faults")
keep("power_each", share(every_fault[200]["each at 5 %"]), "faulty batches of 200 stopped, ten columns at 5 % each")
for size in (50, 800):
    keep(
        f"far_tenth_{size}",
        share(on_clean[size]["moved by a tenth"]),
        f"clean batches of {size} stopped, moved by a tenth",
    )
keep("power_tenth_800", share(every_fault[800]["moved by a tenth"]), "faulty batches of 800 stopped, moved by a tenth")
keep("power_holm_800", share(every_fault[800][CHOSEN]), "faulty batches of 800 stopped, Holm at 1 %")
keep("poison_200", share(on_fault["5 % poisoned", 200][CHOSEN]), "poisoned batches of 200 stopped, Holm at 1 %", 0.1)
keep("poison_400", share(on_fault["5 % poisoned", 400][CHOSEN]), "poisoned batches of 400 stopped, Holm at 1 %", 0.1)
card.record("fault_batches", fault_batches, format="d", label="batches of each fault and size")
card.record("clean_all", len(pooled), format=",d", label="clean batches")

# %% [markdown]
# Left: ten columns at 5 % stop {{far_each}} of {{clean_all}} clean batches at *every* size; no amount of data helps, since 5 % is what was asked for, ten times. (Ten exact, independent tests would stop 40 %; Kolmogorov-Smirnov is conservative where values tie, and most tickets hold no new word.) Holm at 1 % stops {{far_holm}} ({{far_holm:interval}}).
#
# The rule of thumb has no level at all. It stops {{far_tenth_50}} of the clean batches of 50 and {{far_tenth_800}} of those of 800, because the noise of a share shrinks with $1/\sqrt n$ and the threshold does not. Even with 800 tickets, where it stops {{power_tenth_800}} of the faulty batches, Holm stops {{power_holm_800}} ({{power_holm_800:interval}}) and leaves the clean ones alone.
#
# Right: the price of a low level is power in small batches ({{fault_batches}} batches a cell, so a share is good to 18 points at most). At 200 tickets Holm stops {{power_holm}} of the faulty batches, ten tests at 5 % {{power_each}}. What a test can see depends on the fault: flipped labels show in 50 tickets, since the label model hardly ever disagrees with a clean label; 5 % of poison is seen in {{poison_200}} of the batches of 200 and in {{poison_400}} of those of 400.
#
# Two cautions. The guarantee is an average over references: with *one* reference that is itself a little off, every batch inherits the same bias, so its false alarms come in series (here four references take turns). And chi-square is an approximation that fails for rare values (expected counts below about 5): where the label model disagrees on 30 of 1,500 reference tickets, a batch of 50 expects one; for five, chi-square says p = 0.0002 and Fisher's exact test 0.004. Pool rare values, or use an exact test.

# %% [markdown]
# ## Quarantine: nothing lost, nothing doubled
#
# A batch that is stopped is not thrown away, and neither is the rest of a batch in which three rows are bad. Rows go to one of two places, with a reason, and the books must balance: accepted plus quarantined is received, byte for byte. That has to hold when the job is killed half-way and started again, and when the vendor sends the same file twice.
#
# Two files cannot be renamed in one step. So there is one *commit point*: write the data under names that nobody reads yet, and then replace the ledger, which says what counts. `os.replace` is atomic; a plain write is not. (Iceberg and Delta Lake work this way.)
#
# That is enough for a process that is killed. Against a power cut the data must also be on the medium before the ledger is replaced: `fsync` the files and the folder.
#
# The disk below is a real folder with a fault planted: its k-th change fails. A `write` that fails leaves half of the bytes, `replace` and `remove` that fail have done nothing.


# %%
class CrashError(Exception):
    """The process ends here."""


class Disk:
    """The files of one folder, by plain names. With `crash_at=k` the k-th change (counted from 1) raises `CrashError`."""

    def __init__(self, folder: Path, crash_at: int | None = None) -> None:
        self.folder, self.crash_at, self.changes = Path(folder), crash_at, 0

    def _crashes(self) -> bool:
        self.changes += 1
        return self.changes == self.crash_at

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        if self._crashes():
            (self.folder / name).write_bytes(data[: len(data) // 2])
            raise CrashError(f"while writing {name}")
        (self.folder / name).write_bytes(data)

    def replace(self, old: str, new: str) -> None:
        if self._crashes():
            raise CrashError(f"before {old} became {new}")
        os.replace(self.folder / old, self.folder / new)

    def remove(self, name: str) -> None:
        if self._crashes():
            raise CrashError(f"before {name} was removed")
        (self.folder / name).unlink()


LEDGER = "ledger.json"


def read_all(disk: Disk) -> tuple[list[bytes], list[tuple[str, bytes]]]:
    """What readers see: the accepted rows, and the quarantined ones with their reasons. Only the ledger's files count."""
    accepted: list[bytes] = []
    quarantined: list[tuple[str, bytes]] = []
    for entry in json.loads(disk.read(LEDGER)) if LEDGER in disk.names() else []:
        accepted += [row + b"\n" for row in disk.read(entry["accepted"]).split(b"\n") if row]
        for line in disk.read(entry["quarantined"]).split(b"\n"):
            if line:
                record = json.loads(line)
                quarantined.append((record["reason"], record["row"].encode("utf-8")))
    return accepted, quarantined


# %% [markdown]
# **Exercise.** Write `take_in(disk, data, judge)`, which puts one batch into its place and returns whether it was new.
#
# - `data` is the batch as it arrived: UTF-8 bytes, one JSON object a line, every line ends in `b"\n"` and no other byte of the data is a line break. `judge(rows)` gets the lines, each as bytes with its `b"\n"`, and returns a reason for each, `""` for a good row. Rows may be equal to one another, and equal rows may get different reasons.
# - `LEDGER` is a JSON list with one object a batch, in the order of arrival: `{"batch": …, "accepted": …, "quarantined": …}`. `"batch"` identifies the *content*: the same bytes are the same batch, other bytes another one. The other two are names of files that hold the accepted rows as they came, and the quarantined rows as JSON lines `{"reason": …, "row": …}`, the row as text with its line break; both in the order of arrival, perhaps empty. The names are yours.
# - A batch that the ledger has already is left alone: return `False`, else `True`.
# - At every moment, also after a crash in any change, `read_all` gives the rows of whole batches: this one entirely or not at all, earlier ones always. A second call after a crash completes the work. Files that the ledger doesn't name may lie around.
#
# Use `disk.names`, `read`, `write`, `replace`, and nothing else to touch files. A batch of `b'{"a": 1}\n{"a": 2}\n'` whose second row is judged "no" leaves one accepted row and `{"reason": "no", "row": "{\"a\": 2}\n"}` in quarantine. *About 15 lines.*
#
# <details><summary>Hint 1</summary>After which single operation does the batch count? What must be on the disk before it, and which file must never be written in place?</details>
# <details><summary>Hint 2</summary>A hash of the bytes (<code>hashlib.sha256(data).hexdigest()</code>) serves as identity and as part of the names. <code>data.splitlines(keepends=True)</code> on bytes knows line breaks only; on text it also splits at U+2028 and others.</details>
# <details><summary>Hint 3</summary>Read the ledger, or start with an empty list; return False if the hash is in it; judge; write both data files; write the longer ledger to a second name; replace LEDGER by it; return True.</details>


# %% exercise="take-in" difficulty=3 minutes=13
def take_in(disk: Disk, data: bytes, judge: Callable[[list[bytes]], Sequence[str]]) -> bool:
    """Split a batch into accepted and quarantined rows, atomically and once; return whether it was new."""
    ### BEGIN SOLUTION
    key = hashlib.sha256(data).hexdigest()
    ledger = json.loads(disk.read(LEDGER)) if LEDGER in disk.names() else []
    if any(entry["batch"] == key for entry in ledger):
        return False
    rows = data.splitlines(keepends=True)
    judged_rows = list(zip(rows, judge(rows), strict=True))
    entry = {"batch": key, "accepted": f"{key}.accepted", "quarantined": f"{key}.quarantined"}
    refused = [{"reason": reason, "row": row.decode("utf-8")} for row, reason in judged_rows if reason]
    disk.write(entry["accepted"], b"".join(row for row, reason in judged_rows if not reason))
    disk.write(entry["quarantined"], "".join(json.dumps(record) + "\n" for record in refused).encode())
    disk.write("ledger.next", json.dumps([*ledger, entry]).encode())
    disk.replace("ledger.next", LEDGER)
    return True
    ### END SOLUTION


# %% check="take-in" points=2
def lines(*values: object) -> bytes:
    return b"".join(json.dumps({"id": value}, ensure_ascii=False).encode() + b"\n" for value in values)


def even_is_bad(rows: list[bytes]) -> list[str]:
    """Refuses even numbers."""
    assert all(isinstance(row, bytes) for row in rows), "judge gets the rows as bytes, with their line break"
    numbers = [re.search(rb'"id": (\d+)}', row) for row in rows]
    return ["even" if number and int(number[1]) % 2 == 0 else "" for number in numbers]


def readers_see(folder: str, when: str = "after a batch") -> tuple[list[bytes], list[tuple[str, bytes]]]:
    """What `read_all` gives, or in words why it cannot read."""
    try:
        return read_all(Disk(folder))
    except json.JSONDecodeError as error:
        raise AssertionError(
            f"{when} readers find a half-written file (or one that is no JSON): write beside, then replace"
        ) from error
    except FileNotFoundError as error:
        raise AssertionError(
            f"{when} the ledger names a file that is not there: the data first, even if empty, the ledger last"
        ) from error
    except (AttributeError, KeyError, TypeError) as error:
        raise AssertionError(
            f"{when} read_all ends in {error!r}: the ledger is one JSON list of objects, a quarantined row a string"
        ) from error


with tempfile.TemporaryDirectory() as folder:
    disk = Disk(folder)
    assert take_in(disk, lines(1, 2, 3, 4), even_is_bad) is True, "The batch is new: return True"
    accepted, quarantined = readers_see(folder)
    assert accepted == [lines(1), lines(3)], f"Rows 1 and 3 are good, byte for byte in their order; yours: {accepted}"
    assert quarantined == [("even", lines(2)), ("even", lines(4))], (
        f"Rows 2 and 4 go to quarantine with their reason, as they came; yours: {quarantined}"
    )
    assert take_in(disk, lines(1, 2, 3, 4), even_is_bad) is False, (
        "The same bytes again are the same batch: return False"
    )
    assert readers_see(folder) == (accepted, quarantined), "A batch that is sent twice must be in the books once"
    salted = {str(abs(hash(value))) for value in (lines(1, 2, 3, 4), lines(1, 2, 3, 4).decode())}
    assert not any(number in disk.read(LEDGER).decode() for number in salted), (
        "hash() of bytes and text is salted anew in every process: tomorrow this batch would be a new one; take hashlib"
    )
    assert take_in(disk, lines(1, 2, 5), even_is_bad), (
        "Other bytes are another batch, even when it begins in the same way"
    )
    got = readers_see(folder)
    assert got == ([lines(1), lines(3), lines(1), lines(5)], [("even", lines(v)) for v in (2, 4, 2)]), (
        f"The second batch joins the first, which stays as it was; yours: {got}"
    )
    assert take_in(disk, lines(7, 7, 8, 8), even_is_bad), "A batch with equal rows is a batch"
    got = readers_see(folder)
    assert got[0][-2:] == [lines(7)] * 2, (
        f"Equal rows are two rows, quarantine loses nothing; yours ends in {got[0][-2:]}"
    )
    assert got[1][-2:] == [("even", lines(8))] * 2, (
        f"Equal rows are two rows, quarantine loses nothing; yours: {got[1]}"
    )
    take_in(disk, lines(9, 9), lambda rows: ["", "again"])
    got = readers_see(folder)
    assert (got[0][-2:], got[1][-1]) == ([lines(7), lines(9)], ("again", lines(9))), (
        f"Of two equal rows the first is good and the second is not: go by place, not by content; yours: {got}"
    )
    odd = [lines("a\u2028b"), lines("Schön\x85"), lines("Ströme\x1c")]
    asked: list[bytes] = []
    take_in(disk, b"".join(odd), lambda rows: asked.extend(rows) or [""] * len(rows))
    assert asked == odd, (
        f"Only b'\\n' ends a row: str.splitlines breaks at U+2028 and U+0085 as well, so split the bytes; judge got {asked}"
    )
    got = readers_see(folder)[0][-3:]
    assert got == odd, f"Accepted rows keep their bytes; yours: {got}"
### BEGIN HIDDEN TESTS
with tempfile.TemporaryDirectory() as _folder:
    _disk = Disk(_folder)
    assert take_in(_disk, b"", even_is_bad) is True, "An empty batch is a batch: it is recorded"
    assert take_in(_disk, b"", even_is_bad) is False, "An empty batch that comes again is known"
    assert take_in(_disk, lines(2), even_is_bad), "A batch may have no good row"
    assert take_in(_disk, lines(1), even_is_bad), "A batch may have no bad row"
    _got = readers_see(_folder)
    assert _got == ([lines(1)], [("even", lines(2))]), f"One row each, in files of their own; yours: {_got}"
    assert take_in(_disk, lines(3, 5, 7, 9), even_is_bad), "A batch may have no bad row"
    assert take_in(_disk, lines(4, 5, 7, 9), even_is_bad), (
        "Other bytes are another batch, even when it ends in the same way"
    )
    _raw = b'{ "id":1 ,"t":"\xc3\xb6"}\n{"id":   3, "t": "\xc3\xa5"}\n'
    take_in(_disk, _raw, lambda rows: ["", "why\nnot \u00e4"])
    _accepted, _refused = readers_see(_folder)
    assert _accepted[-1] == _raw[: _raw.index(b"\n") + 1], "Accepted rows keep their bytes, blanks and all"
    assert _refused[-1] == ("why\nnot \u00e4", _raw[_raw.index(b"\n") + 1 :]), (
        f"Reason and row are kept as they are; yours: {_refused[-1]}"
    )
    _entries = json.loads(_disk.read(LEDGER))
    assert [set(e) for e in _entries] == [{"batch", "accepted", "quarantined"}] * 6, (
        f"The ledger's objects have three keys; yours: {_entries}"
    )
    _took = _disk.read(LEDGER)
    assert not take_in(_disk, lines(1), even_is_bad), "A batch is known however many came after it"
    assert _disk.read(LEDGER) == _took, "A known batch leaves the ledger alone"
    take_in(_disk, lines(21, 22, 23), lambda rows: ["z", "", "a"])
    _got = readers_see(_folder)[1][-2:]
    assert _got == [("z", lines(21)), ("a", lines(23))], f"In the order of arrival, not of the reasons; yours: {_got}"
    _long = [lines(i) for i in range(300)]
    for _swap in (0, 150, 298):
        _sent = [*_long[:_swap], _long[_swap + 1], _long[_swap], *_long[_swap + 2 :]]
        assert take_in(_disk, b"".join(_sent), even_is_bad), (
            f"Rows {_swap} and {_swap + 1} change places: other bytes, another batch"
        )
### END HIDDEN TESTS

# %% check="take-in" points=3
first, second = lines(1, 2), lines(3, 4, 5)
before = ([lines(1)], [("even", lines(2))])
after = ([lines(1), lines(3), lines(5)], [("even", lines(2)), ("even", lines(4))])
crash_at, crashed = 0, True
while crashed:
    crash_at, crashed = crash_at + 1, False
    assert crash_at < 30, "A batch needs four changes of the disk; yours needs more than 30"
    with tempfile.TemporaryDirectory() as folder:
        take_in(Disk(folder), first, even_is_bad)
        try:
            take_in(Disk(folder, crash_at), second, even_is_bad)
        except CrashError as crash:
            crashed, where = True, str(crash)
        if not crashed:
            break
        seen = readers_see(folder, f"After a crash {where}")
        assert (seen[0][:1], seen[1][:1]) == before, (
            f"A crash {where} has changed an earlier batch: write to names of this batch's own; readers see {seen}"
        )
        assert seen == before, (
            f"A crash {where} shows a part of a batch: nothing of it may count before the ledger is replaced, and the "
            f"ledger comes last; readers see {seen}"
        )
        take_in(Disk(folder), second, even_is_bad)
        seen = readers_see(folder, f"After a crash {where} and the same batch again")
        assert seen == after, (
            f"A crash {where}, and the batch is sent again: it must now be there once and whole. Ask the ledger whether a "
            f"batch is done, not which files exist; readers see {seen}"
        )
assert crash_at > 4, (
    f"Two data files and the ledger take four changes; the disk has seen {crash_at - 1}. Use disk.write and disk.replace, "
    "and nothing else to touch files"
)
### BEGIN HIDDEN TESTS
for _first_crash in range(1, crash_at):
    for _second_crash in range(1, crash_at):
        with tempfile.TemporaryDirectory() as _folder:
            for _at in (_first_crash, _second_crash):
                try:
                    take_in(Disk(_folder, _at), lines(6, 9), even_is_bad)
                except CrashError as _crash:
                    _got = readers_see(_folder, f"After a crash {_crash}, in the very first batch,")
                    assert _got == ([], []), f"After two crashes nothing may count yet; readers see {_got}"
            if _first_crash == _second_crash:
                take_in(Disk(_folder), lines(8), even_is_bad)
                assert readers_see(_folder) == ([], [("even", lines(8))]), (
                    "Another batch comes after a crash: only it counts"
                )
                continue
            take_in(Disk(_folder), lines(6, 9), even_is_bad)
            _got = readers_see(_folder, "After two crashes and a third try")
            assert _got == ([lines(9)], [("even", lines(6))]), f"After two crashes: once and whole; readers see {_got}"
            _ledger = json.loads(Disk(_folder).read(LEDGER))
            assert len(_ledger) == 1, f"One batch, one entry; yours: {_ledger}"
### END HIDDEN TESTS


# %% mistake="the ledger is written in place" of="take-in" says="readers find a half-written file"
def take_in(disk, data, judge):
    key = hashlib.sha256(data).hexdigest()
    ledger = json.loads(disk.read(LEDGER)) if LEDGER in disk.names() else []
    if key in [entry["batch"] for entry in ledger]:
        return False
    rows = data.splitlines(keepends=True)
    found = list(zip(rows, judge(rows), strict=True))
    disk.write(key + ".a", b"".join(row for row, why in found if not why))
    disk.write(
        key + ".q",
        b"".join(json.dumps({"reason": why, "row": row.decode()}).encode() + b"\n" for row, why in found if why),
    )
    disk.write(
        LEDGER, json.dumps([*ledger, {"batch": key, "accepted": key + ".a", "quarantined": key + ".q"}]).encode()
    )
    return True


# %% mistake="the ledger comes first" of="take-in" says="the ledger names a file that is not there"
def take_in(disk, data, judge):
    key = hashlib.sha256(data).hexdigest()
    ledger = json.loads(disk.read(LEDGER)) if LEDGER in disk.names() else []
    if key in [entry["batch"] for entry in ledger]:
        return False
    rows = data.splitlines(keepends=True)
    found = list(zip(rows, judge(rows), strict=True))
    disk.write(
        "next", json.dumps([*ledger, {"batch": key, "accepted": key + ".a", "quarantined": key + ".q"}]).encode()
    )
    disk.replace("next", LEDGER)
    disk.write(key + ".a", b"".join(row for row, why in found if not why))
    disk.write(
        key + ".q",
        b"".join(json.dumps({"reason": why, "row": row.decode()}).encode() + b"\n" for row, why in found if why),
    )
    return True


# %% mistake="a batch twice" of="take-in" says="The same bytes again are the same batch"
def take_in(disk, data, judge):
    ledger = json.loads(disk.read(LEDGER)) if LEDGER in disk.names() else []
    key = f"{len(ledger)}"
    rows = data.splitlines(keepends=True)
    found = list(zip(rows, judge(rows), strict=True))
    disk.write(key + ".a", b"".join(row for row, why in found if not why))
    disk.write(
        key + ".q",
        b"".join(json.dumps({"reason": why, "row": row.decode()}).encode() + b"\n" for row, why in found if why),
    )
    disk.write(
        "next", json.dumps([*ledger, {"batch": key, "accepted": key + ".a", "quarantined": key + ".q"}]).encode()
    )
    disk.replace("next", LEDGER)
    return True


# %% mistake="known by its first row" of="take-in" says="Other bytes are another batch"
def take_in(disk, data, judge):
    key = hashlib.sha256(data.split(b"\n")[0]).hexdigest()
    ledger = json.loads(disk.read(LEDGER)) if LEDGER in disk.names() else []
    if key in [entry["batch"] for entry in ledger]:
        return False
    rows = data.splitlines(keepends=True)
    found = list(zip(rows, judge(rows), strict=True))
    disk.write(key + ".a", b"".join(row for row, why in found if not why))
    disk.write(
        key + ".q",
        b"".join(json.dumps({"reason": why, "row": row.decode()}).encode() + b"\n" for row, why in found if why),
    )
    disk.write(
        "next", json.dumps([*ledger, {"batch": key, "accepted": key + ".a", "quarantined": key + ".q"}]).encode()
    )
    disk.replace("next", LEDGER)
    return True


# %% mistake="splits text" of="take-in" says="str.splitlines breaks at U+2028"
def take_in(disk, data, judge):
    key = hashlib.sha256(data).hexdigest()
    ledger = json.loads(disk.read(LEDGER)) if LEDGER in disk.names() else []
    if key in [entry["batch"] for entry in ledger]:
        return False
    rows = [line.encode() + b"\n" for line in data.decode().splitlines()]
    found = list(zip(rows, judge(rows), strict=True))
    disk.write(key + ".a", b"".join(row for row, why in found if not why))
    disk.write(
        key + ".q",
        b"".join(json.dumps({"reason": why, "row": row.decode()}).encode() + b"\n" for row, why in found if why),
    )
    disk.write(
        "next", json.dumps([*ledger, {"batch": key, "accepted": key + ".a", "quarantined": key + ".q"}]).encode()
    )
    disk.replace("next", LEDGER)
    return True


# %% mistake="equal rows become one" of="take-in" says="Equal rows are two rows"
def take_in(disk, data, judge):
    key = hashlib.sha256(data).hexdigest()
    ledger = json.loads(disk.read(LEDGER)) if LEDGER in disk.names() else []
    if key in [entry["batch"] for entry in ledger]:
        return False
    rows = data.splitlines(keepends=True)
    found = dict(zip(rows, judge(rows), strict=True)).items()
    disk.write(key + ".a", b"".join(row for row, why in found if not why))
    disk.write(
        key + ".q",
        b"".join(json.dumps({"reason": why, "row": row.decode()}).encode() + b"\n" for row, why in found if why),
    )
    disk.write(
        "next", json.dumps([*ledger, {"batch": key, "accepted": key + ".a", "quarantined": key + ".q"}]).encode()
    )
    disk.replace("next", LEDGER)
    return True


# %% mistake="asks which files exist" of="take-in" says="Ask the ledger whether a batch is done"
def take_in(disk, data, judge):
    key = hashlib.sha256(data).hexdigest()
    if key + ".a" in disk.names():
        return False
    ledger = json.loads(disk.read(LEDGER)) if LEDGER in disk.names() else []
    rows = data.splitlines(keepends=True)
    found = list(zip(rows, judge(rows), strict=True))
    disk.write(key + ".a", b"".join(row for row, why in found if not why))
    disk.write(
        key + ".q",
        b"".join(json.dumps({"reason": why, "row": row.decode()}).encode() + b"\n" for row, why in found if why),
    )
    disk.write(
        "next", json.dumps([*ledger, {"batch": key, "accepted": key + ".a", "quarantined": key + ".q"}]).encode()
    )
    disk.replace("next", LEDGER)
    return True


# %% mistake="Python's own hash" of="take-in" says="is salted anew in every process"
def take_in(disk, data, judge):
    key = str(hash(data))
    ledger = json.loads(disk.read(LEDGER)) if LEDGER in disk.names() else []
    if key in [entry["batch"] for entry in ledger]:
        return False
    rows = data.splitlines(keepends=True)
    found = list(zip(rows, judge(rows), strict=True))
    disk.write(key + ".a", b"".join(row for row, why in found if not why))
    disk.write(
        key + ".q",
        b"".join(json.dumps({"reason": why, "row": row.decode()}).encode() + b"\n" for row, why in found if why),
    )
    disk.write(
        "next", json.dumps([*ledger, {"batch": key, "accepted": key + ".a", "quarantined": key + ".q"}]).encode()
    )
    disk.replace("next", LEDGER)
    return True


# %% mistake="reasons by content" of="take-in" says="go by place, not by content"
def take_in(disk, data, judge):
    key = hashlib.sha256(data).hexdigest()
    ledger = json.loads(disk.read(LEDGER)) if LEDGER in disk.names() else []
    if key in [entry["batch"] for entry in ledger]:
        return False
    rows = data.splitlines(keepends=True)
    reasons = judge(rows)
    found = [(row, reasons[rows.index(row)]) for row in rows]
    disk.write(key + ".a", b"".join(row for row, why in found if not why))
    disk.write(
        key + ".q",
        b"".join(json.dumps({"reason": why, "row": row.decode()}).encode() + b"\n" for row, why in found if why),
    )
    disk.write(
        "next", json.dumps([*ledger, {"batch": key, "accepted": key + ".a", "quarantined": key + ".q"}]).encode()
    )
    disk.replace("next", LEDGER)
    return True


# %% mistake="past the disk" of="take-in" says="nothing else to touch files"
def take_in(disk, data, judge):
    key = hashlib.sha256(data).hexdigest()
    ledger = json.loads(disk.read(LEDGER)) if LEDGER in disk.names() else []
    if key in [entry["batch"] for entry in ledger]:
        return False
    rows = data.splitlines(keepends=True)
    found = list(zip(rows, judge(rows), strict=True))
    disk.write(key + ".a", b"".join(row for row, why in found if not why))
    disk.write(
        key + ".q",
        b"".join(json.dumps({"reason": why, "row": row.decode()}).encode() + b"\n" for row, why in found if why),
    )
    disk.write(
        "next", json.dumps([*ledger, {"batch": key, "accepted": key + ".a", "quarantined": key + ".q"}]).encode()
    )
    os.replace(disk.folder / "next", disk.folder / LEDGER)
    return True


# %% mistake="the first ledger needs no care" of="take-in" says="in the very first batch, readers find a half-written file"
def take_in(disk, data, judge):
    key = hashlib.sha256(data).hexdigest()
    ledger = json.loads(disk.read(LEDGER)) if LEDGER in disk.names() else []
    if key in [entry["batch"] for entry in ledger]:
        return False
    rows = data.splitlines(keepends=True)
    found = list(zip(rows, judge(rows), strict=True))
    disk.write(key + ".a", b"".join(row for row, why in found if not why))
    disk.write(
        key + ".q",
        b"".join(json.dumps({"reason": why, "row": row.decode()}).encode() + b"\n" for row, why in found if why),
    )
    place = "next" if ledger else LEDGER
    disk.write(place, json.dumps([*ledger, {"batch": key, "accepted": key + ".a", "quarantined": key + ".q"}]).encode())
    if ledger:
        disk.replace(place, LEDGER)
    return True


# %% mistake="one file for all batches" of="take-in" says="shows a part of a batch"
def take_in(disk, data, judge):
    key = hashlib.sha256(data).hexdigest()
    ledger = json.loads(disk.read(LEDGER)) if LEDGER in disk.names() else []
    if key in [entry["batch"] for entry in ledger]:
        return False
    rows = data.splitlines(keepends=True)
    found = list(zip(rows, judge(rows), strict=True))
    names = disk.names()
    old = [disk.read(name) if name in names else b"" for name in ("accepted", "quarantined")]
    disk.write("accepted", old[0] + b"".join(row for row, why in found if not why))
    refused = [json.dumps({"reason": why, "row": row.decode()}).encode() + b"\n" for row, why in found if why]
    disk.write("quarantined", old[1] + b"".join(refused))
    if not ledger:
        entry = {"batch": key, "accepted": "accepted", "quarantined": "quarantined"}
    else:
        disk.write("empty", b"")
        entry = {"batch": key, "accepted": "empty", "quarantined": "empty"}
    disk.write("next", json.dumps([*ledger, entry]).encode())
    disk.replace("next", LEDGER)
    return True


# %% alternative="every file is replaced, names are drawn at random" of="take-in"
def take_in(disk, data, judge):
    import uuid

    def put(name, content):
        disk.write("temporary", content)
        disk.replace("temporary", name)

    known = [] if LEDGER not in disk.names() else json.loads(disk.read(LEDGER))
    for entry in known:
        if entry["batch"] == data.decode("utf-8"):
            return False
    rows = [row + b"\n" for row in data.split(b"\n")[:-1]]
    good, bad, name = [], [], uuid.uuid4().hex
    for row, reason in zip(rows, judge(rows), strict=True):
        if reason:
            bad.append(json.dumps({"row": row.decode(), "reason": reason}, ensure_ascii=False))
        else:
            good.append(row)
    put(name + "-good", b"".join(good))
    put(name + "-bad", "".join(line + "\n" for line in bad).encode())
    known.append({"batch": data.decode("utf-8"), "accepted": name + "-good", "quarantined": name + "-bad"})
    put(LEDGER, json.dumps(known).encode())
    return True


# %% [markdown]
# Two nights with real batches, judged by your contract: one with damaged texts, one with missing labels, the second sent twice, and a crash in every change on the way.


# %%
def to_lines(table: pd.DataFrame) -> bytes:
    return table.to_json(orient="records", lines=True, date_format="iso", force_ascii=False).encode("utf-8")


def by_contract(rows: list[bytes]) -> list[str]:
    """The columns that the contract refuses in each row."""
    table = pd.DataFrame([json.loads(row) for row in rows])
    table["received"] = pd.to_datetime(table["received"]).astype("datetime64[us, UTC]")
    bad: dict[int | None, list[str]] = {}
    for place, label in sorted(refusals(schema, table), key=str):
        bad.setdefault(label, []).append(place)
    return [", ".join(bad.get(i, [])) for i in range(len(rows))]


rng = np.random.default_rng([seed, 2])
nights = [
    to_lines(ROW_FAULTS[fault](pool.iloc[start : start + 300].reset_index(drop=True), rng))
    for fault, start in (("encoding damaged", 0), ("labels missing", 300))
]
crashes = 0
with tempfile.TemporaryDirectory() as folder:
    for night in (*nights, nights[-1]):
        crash_at: int | None = 1
        while crash_at is not None:
            try:
                new = take_in(Disk(Path(folder), crash_at), night, by_contract)
                crash_at = None
            except CrashError:
                crashes, crash_at = crashes + 1, crash_at + 1
    accepted, quarantined = read_all(Disk(Path(folder)))
got = sorted(accepted + [row for _, row in quarantined])
balanced = got == sorted(row + b"\n" for night in nights for row in night.split(b"\n") if row)
print(pd.Series([reason for reason, _ in quarantined]).value_counts().to_string())
rows_in = sum(len(night.splitlines()) for night in nights)
print(f"{crashes} crashes; accepted {len(accepted)} + quarantined {len(quarantined)} = received {rows_in}: {balanced}")
card.record("crashes", crashes, format="d", label="crashes planted in two nights")
card.record(
    "balanced",
    int(balanced),
    format="d",
    label="accepted and quarantined rows are the received ones, byte for byte (1: yes)",
)

# %% [markdown]
# With {{crashes}} planted crashes the books balance, byte for byte. Nobody wrote code for "the crash between the second and the third write"; the order of the writes took care of all of them.
#
# ## Versions of a dataset
#
# Which data was this model trained on? A path and a date do not answer that; the content does. DVC names a file by the MD5 of its bytes. A folder is named by the MD5 of a *manifest*, a JSON list of its files' hashes and relative paths, sorted by path, with ".dir" appended (`dvc_data/hashfile/tree.py`). Equal content is stored once, whoever asks. The whole store is this:


# %%
def md5(data: bytes) -> str:
    """A name for bytes. (Against somebody who plants collisions you would take SHA-256.)"""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def manifest(folder: Path) -> bytes:
    """A folder's files, as DVC writes them down."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return json.dumps([{"md5": md5((folder / name).read_bytes()), "relpath": name} for name in files]).encode()


def fingerprint(path: Path) -> str | None:
    """The name of what lies at a path: a file, a folder, or None when there is nothing."""
    if path.is_dir():
        return f"{md5(manifest(path))}.dir"
    return md5(path.read_bytes()) if path.exists() else None


class Store:
    """Content by its fingerprint: `put` keeps a file or a folder, `get` writes one to a path."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def _keep(self, name: str, data: bytes) -> None:
        place = self.folder / name[:2] / name[2:]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.with_suffix(".tmp").write_bytes(data)
        os.replace(place.with_suffix(".tmp"), place)

    def put(self, path: Path) -> str:
        if not path.is_dir():
            self._keep(md5(path.read_bytes()), path.read_bytes())
            return md5(path.read_bytes())
        for file in filter(Path.is_file, path.rglob("*")):
            self.put(file)
        self._keep(f"{md5(manifest(path))}.dir", manifest(path))
        return f"{md5(manifest(path))}.dir"

    def get(self, name: str, path: Path) -> None:
        place = self.folder / name[:2] / name[2:]
        if not place.exists():
            raise FileNotFoundError(f"{name} is not in the store: nobody has put it there")
        data = place.read_bytes()
        if not name.endswith(".dir"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            return
        shutil.rmtree(path, ignore_errors=True)
        for entry in json.loads(data):
            self.get(entry["md5"], path / entry["relpath"])


def dvc(project: Path, *arguments: str) -> str:
    """Run a real `dvc` command in a project; nothing is sent anywhere, and nothing written outside the project."""
    return shell(project, sys.executable, "-m", "dvc", *arguments)


def shell(project: Path, *command: str) -> str:
    aside = {
        name: str(project / ".aside")
        for name in ("DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR")
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    who = {f"GIT_{role}_{what}": "lesson@localhost" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    env = {**os.environ, **aside, **who, "PATH": path, "DVC_NO_ANALYTICS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def new_project(project: Path) -> None:
    """A git repository with DVC in it."""
    project.mkdir(parents=True)
    shell(project, "git", "init", "-q")
    dvc(project, "init", "-q")
    (project / ".dvc" / "config").write_text("[core]\n    analytics = false\n    check_update = false\n")


# %% [markdown]
# Three versions of a folder with 16 files, in each a few rows corrected: `dvc add` and the store side by side, and the first version back.


# %%
def partitions(rows: Sequence[bytes], count: int, *, by: str) -> dict[str, bytes]:
    """Rows as the files of a folder: `by="place"` in the order of arrival, `by="id"` by a hash of the row's id."""
    places = range(len(rows))
    if by == "place":
        places = [i * count // len(rows) for i in places]
    else:
        places = [int(md5(row.split(b",", 1)[0]), 16) % count for row in rows]
    files: dict[str, list[bytes]] = {}
    for place, row in zip(places, rows, strict=True):
        files.setdefault(f"part-{place:04d}.jsonl", []).append(row)
    return {name: b"".join(part) for name, part in files.items()}


def corrected(rows: Sequence[bytes], share: float, draw: np.random.Generator) -> list[bytes]:
    """The rows with the minutes of a share of them corrected."""
    changed = list(rows)
    for i in draw.choice(len(rows), round(share * len(rows)), replace=False):
        changed[i] = re.sub(rb'"minutes":[\d.]+', b'"minutes":%d.5' % draw.integers(100, 999), changed[i])
    return changed


def files_under(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


draw = np.random.default_rng([seed, 3])
history = [to_lines(pool.iloc[:600]).splitlines(keepends=True)]
for _ in range(2):
    history.append(corrected(history[-1], 0.01, draw))
with tempfile.TemporaryDirectory() as folder:
    project, store = Path(folder) / "project", Store(Path(folder) / "store")
    new_project(project)
    names = []
    for rows in history:
        shutil.rmtree(project / "data", ignore_errors=True)
        for name, content in partitions(rows, 16, by="id").items():
            (project / "data").mkdir(exist_ok=True)
            (project / "data" / name).write_bytes(content)
        names.append(store.put(project / "data"))
        dvc(project, "add", "-q", "data")
        shell(project, "git", "add", "data.dvc")
        shell(project, "git", "commit", "-q", "-m", names[-1])
    print((project / "data.dvc").read_text())
    same_store = files_under(store.folder) == files_under(project / ".dvc" / "cache" / "files" / "md5")
    shell(project, "git", "checkout", "-q", "HEAD~2", "--", "data.dvc")
    dvc(project, "checkout", "-q", "data.dvc")
    back = fingerprint(project / "data") == names[0]
print("the store holds the same files as DVC's cache:", same_store, "| version 1 is back:", back)
card.record(
    "same_store", int(same_store), format="d", label="store and DVC's cache hold the same names and bytes (1: yes)"
)

# %% [markdown]
# The store is DVC's cache, name by name and byte by byte. How much it saves depends on how you cut a table into files. Ten versions of 4,000 rows, cut into 1 to 2,048 files: what must be kept, as a multiple of one version?


# %%
def kept(versions: Sequence[Sequence[bytes]], count: int, by: str) -> tuple[int, int]:
    """Bytes in the store after all versions (distinct files and manifests), as they are and in blocks of 4 KiB."""
    objects: dict[str, int] = {}
    for rows in versions:
        files = partitions(rows, count, by=by)
        names = {name: md5(content) for name, content in files.items()}
        listing = json.dumps([{"md5": names[name], "relpath": name} for name in sorted(files)]).encode()
        objects |= {names[name]: len(content) for name, content in files.items()} | {md5(listing): len(listing)}
    return sum(objects.values()), sum(-(-size // 4096) * 4096 for size in objects.values())


start = to_lines(pool.iloc[:4000]).splitlines(keepends=True)
spare = to_lines(pool.iloc[-10:]).splitlines(keepends=True)
fixes, late = [start], [start]
for i in range(9):
    fixes.append(corrected(fixes[-1], 0.01, draw))
    late.append([late[-1][0], spare[i], *late[-1][1:]])
one = sum(map(len, start))
counts = 2 ** np.arange(12)
curves = {
    "1 % corrected, cut by id": (fixes, "id", COLOURS.after),
    "a late row, cut by place": (late, "place", COLOURS.wrong),
    "a late row, cut by id": (late, "id", COLOURS.other),
}
fig, ax = plt.subplots(figsize=(7.6, 4.0))
ratio = {}
for name, (versions, by, colour) in curves.items():
    plain, blocks = np.array([kept(versions, int(count), by) for count in counts]).T / one
    ratio[name] = plain
    ax.plot(counts, plain, color=colour, label=name)
    if versions is fixes:
        ax.plot(counts, blocks, ":", color=colour, label="  the same in 4 KiB blocks")
ax.axhline(10, color=COLOURS.before, ls="--", lw=1.2)
direct_label(ax, 90, 10, "ten copies", COLOURS.before, offset=(0, -14))
ax.set(xscale="log", yscale="log", xlabel="files that a version is cut into", ylabel="kept, in versions",
       xticks=counts[::2], xticklabels=counts[::2], yticks=[1, 2, 5, 10], yticklabels=[1, 2, 5, 10],
       title="Ten versions of 4,000 rows")  # fmt: skip
ax.minorticks_off()
label_lines(ax)
plt.show()
fix = ratio["1 % corrected, cut by id"]
card.record("kept_64", fix[6], format=".1f", label="ten versions in 64 files each, 1 % of rows corrected, in versions")
card.record("kept_best", fix.min(), format=".1f", label="the same, best number of files, in versions")
card.record("best_files", int(counts[fix.argmin()]), format="d", label="best number of files")
card.record(
    "late_place",
    ratio["a late row, cut by place"][6],
    format=".1f",
    label="ten versions in 64 files, a late row, cut by place, in versions",
)
card.record(
    "late_id",
    ratio["a late row, cut by id"][6],
    format=".1f",
    label="ten versions in 64 files, a late row, cut by id, in versions",
)

# %% [markdown]
# A correction of 1 % of the rows touches most files as long as a file has more than a hundred rows: in 64 files ten versions still cost {{kept_64}} versions. The saving begins when a file holds a few dozen rows, and ends when manifests and disk blocks outgrow it: the best cut, {{best_files}} files, costs {{kept_best}} by content, and on a disk of 4 KiB blocks the dotted curve turns earlier.
#
# *Where* a row goes matters more. One late row near the front moves every row behind it: cut by place, 64 files cost {{late_place}} versions, cut by a hash of the id {{late_id}}. Append-only data in files a day is the best cut of all.
#
# ## A pipeline that reruns what changed
#
# Raw rows become clean rows, a split, a model, a score. After a change you want to rerun what it touches, all of it and nothing else. Make compares modification times; DVC, Bazel and Nix compare content.


# %%
@dataclass(frozen=True)
class Stage:
    """A command, what it reads (files or folders, and keys of params.json), and the files that it writes."""

    name: str
    cmd: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    params: tuple[str, ...] = ()


PARAMS = "params.json"

# %% [markdown]
# **Exercise.** Write `bring_up_to_date(stage, root, runs, store, execute)`. All paths of a stage are relative to the folder `root`; `root / PARAMS` is a JSON object.
#
# The *inputs* of a stage are its command, the names of its deps with the `fingerprint` of each, the keys in `params` with their values (any JSON; 1 and "1" differ), and the names of its outs. `runs` is a dictionary that remembers every run ever made of any stage; you choose its keys, one for each set of inputs, and its values.
#
# - Inputs that have been run before, and on the disk every out has the fingerprint that it had after that run: do nothing and return `"skipped"`.
# - Inputs that have been run before, but some out is missing or different: write the outs of that run from the store, `store.get(fingerprint, path)`, and return `"restored"`.
# - Otherwise call `execute(stage.cmd, root)`, put every out into the store (`store.put(path)` returns the fingerprint), remember the run and return `"run"`.
# - A dep that is not there, or an out that is not there after executing, raises `FileNotFoundError` with its name in the message. After an exception, whoever raised it, `runs` is what it was.
#
# When `execute` changes a dep itself, the run is remembered under the inputs that it *started* from. *About 14 lines.*
#
# <details><summary>Hint 1</summary>Which of mtime, size and content decides? What would happen if the command were not part of the key, or all of params.json were?</details>
# <details><summary>Hint 2</summary>A dictionary of the inputs, as text through <code>json.dumps(…, sort_keys=True)</code>, is a key; the value is a dictionary from out to fingerprint.</details>
# <details><summary>Hint 3</summary>Make the key first. If it is in runs: compare <code>{out: fingerprint(root / out) for out in stage.outs}</code> with what is remembered; equal, skipped; else get each, restored. If not: execute, look that every out exists, put, and only then write to runs.</details>


# %% exercise="up-to-date" difficulty=3 minutes=13
def bring_up_to_date(stage: Stage, root: Path, runs: dict, store: Store, execute: Callable[[str, Path], object]) -> str:
    """Make a stage's outs right for its inputs: "skipped", "restored" or "run"."""
    ### BEGIN SOLUTION
    deps = {dep: fingerprint(root / dep) for dep in stage.deps}
    for dep, found in deps.items():
        if found is None:
            raise FileNotFoundError(f"{stage.name}: {dep} is not there")
    values = json.loads((root / PARAMS).read_text()) if stage.params else {}
    params = {name: values[name] for name in stage.params}
    key = json.dumps([stage.cmd, deps, params, sorted(stage.outs)], sort_keys=True)
    if key in runs:
        if all(fingerprint(root / out) == name for out, name in runs[key].items()):
            return "skipped"
        for out, name in runs[key].items():
            store.get(name, root / out)
        return "restored"
    execute(stage.cmd, root)
    for out in stage.outs:
        if fingerprint(root / out) is None:
            raise FileNotFoundError(f"{stage.name}: {out} was not written")
    runs[key] = {out: store.put(root / out) for out in stage.outs}
    return "run"
    ### END SOLUTION


# %% check="up-to-date" points=2
class Workshop:
    """A folder with a stage that joins a file, a folder and a parameter; it counts how often it is executed."""

    stage = Stage("join", "join", ("a.txt", "more"), ("out.txt",), ("sign",))

    def __init__(self, folder: str) -> None:
        self.root, self.runs, self.store, self.executed = Path(folder) / "work", {}, Store(Path(folder) / "store"), []
        (self.root / "more").mkdir(parents=True)
        (self.root / "a.txt").write_text("A")
        (self.root / "more" / "b.txt").write_text("B")
        self.params(sign="+", other=1)

    def params(self, **values: object) -> None:
        (self.root / PARAMS).write_text(json.dumps(values))

    def execute(self, cmd: str, root: Path) -> None:
        self.executed.append(cmd)
        sign = json.loads((root / PARAMS).read_text())["sign"]
        parts = [root / "a.txt", *sorted((root / "more").iterdir())]
        (root / "out.txt").write_text(cmd + sign.join(path.read_text() for path in parts))

    def go(self, stage: Stage | None = None) -> str:
        return bring_up_to_date(stage or self.stage, self.root, self.runs, self.store, self.execute)

    @property
    def out(self) -> str:
        return (self.root / "out.txt").read_text() if (self.root / "out.txt").exists() else "(not there)"


with tempfile.TemporaryDirectory() as folder:
    shop = Workshop(folder)
    got = shop.go()
    assert (got, shop.out) == ("run", "joinA+B"), f"The first time a stage is run; yours: {got!r}, out {shop.out!r}"
    assert shop.go() == "skipped", "Nothing has changed: skipped"
    os.utime(shop.root / "a.txt", (1, 1))
    os.utime(shop.root / "out.txt", (0, 0))
    assert shop.go() == "skipped", "Only the modification times changed: compare content (fingerprint), not mtime"
    shop.params(sign="+", other=2)
    assert shop.go() == "skipped", "Another key of params.json changed: only the stage's own params are inputs"
    shop.params(other=2, sign="+")
    assert shop.go() == "skipped", "The order of the keys in params.json plays no part"
    assert shop.executed == ["join"], f"Executed once so far; yours: {shop.executed}"
    (shop.root / "more" / "b.txt").write_text("C")
    assert shop.go() == "run", "A file of a folder among the deps changed, with the size it had: run"
    assert shop.out == "joinA+C", f"After a run the out is the new one, joinA+C; yours: {shop.out}"
    shop.params(sign="-", other=2)
    assert shop.go() == "run", "A parameter of the stage changed: run"
    got = shop.go(replace(shop.stage, cmd="JOIN"))
    assert got == "run", f"The command changed: it is an input like any other, run; yours: {got!r}"
    assert shop.out == "JOINA-C", f"After a run with the command JOIN the out is JOINA-C; yours: {shop.out}"
### BEGIN HIDDEN TESTS
with tempfile.TemporaryDirectory() as _folder:
    _shop = Workshop(_folder)
    _shop.go()
    (_shop.root / "more" / "c.txt").write_text("")
    assert _shop.go() == "run", "A new file in a folder among the deps, even an empty one, is a change"
    (_shop.root / "more" / "c.txt").rename(_shop.root / "more" / "d.txt")
    assert _shop.go() == "run", "A file of the folder was renamed: that is a change"
    (_shop.root / "a.txt").write_text("B")
    (_shop.root / "more" / "b.txt").write_text("A")
    assert _shop.go() == "run", "Two deps swapped their contents: that is a change"
    _plain = Stage("copy", "copy", ("a.txt",), ("out.txt",))
    _seen = []

    def _copy(cmd, root):
        _seen.append((cmd, root))
        (root / "out.txt").write_text("copied")

    _got = bring_up_to_date(_plain, _shop.root, _shop.runs, _shop.store, _copy)
    assert (_got, _seen) == ("run", [("copy", _shop.root)]), (
        "A stage without params runs like any other; execute(cmd, root) is called once"
    )
    _none = Stage("make", "make", (), ("x.txt", "deep/y.txt"))
    for _name, _text in (("p", "1"), ("q", "2")):
        (_shop.root / _name).write_text(_text)
    _pair = Stage("pair", "pair", ("p", "q"), ("out.txt",))
    _write = lambda cmd, root: (root / "out.txt").write_text((root / "p").read_text())
    bring_up_to_date(_pair, _shop.root, _shop.runs, _shop.store, _write)
    for _name, _text in (("p", "2"), ("q", "1")):
        (_shop.root / _name).write_text(_text)
    assert bring_up_to_date(_pair, _shop.root, _shop.runs, _shop.store, _write) == "run", (
        "Two deps swapped contents: which dep has which content is an input"
    )
    _writes_first = lambda cmd, root: (root / _stage.outs[0]).write_text("1")
    (_shop.root / "r").write_text("1")
    (_shop.root / PARAMS).write_text(json.dumps({"x": 1, "y": 1}))
    for _change, _why in (
        ({"deps": ("p", "r")}, "Another dep with the same content: the names of the deps are inputs"),
        ({"outs": ("other.txt",)}, "Another out: the names of the outs are inputs"),
        ({"params": ("x",)}, "A parameter more is an input more"),
        ({"params": ("y",)}, "Another parameter with the same value: the keys are inputs"),
    ):
        _stage = replace(_pair, **_change)
        _got = bring_up_to_date(_stage, _shop.root, _shop.runs, _shop.store, _writes_first)
        assert _got == "run", f"{_why}; yours: {_got!r}"
    for _value in (1, "1", [1, 2], [1, 3], {"a": [1]}, None):
        (_shop.root / PARAMS).write_text(json.dumps({"x": _value, "y": 1}))
        _got = bring_up_to_date(replace(_pair, params=("x",)), _shop.root, _shop.runs, _shop.store, _write)
        assert (_got == "run") == (_value != 1), f"A parameter may be any JSON, 1 and '1' differ: {_value!r}, {_got!r}"
    _more = replace(_pair, outs=("out.txt", "p2"))
    _both = lambda cmd, root: [(root / _out).write_text("x") for _out in _more.outs]
    assert bring_up_to_date(_more, _shop.root, _shop.runs, _shop.store, _both) == "run", (
        "The stage has one more out than the run that is known: the names of the outs are inputs"
    )

    def _make(cmd, root):
        (root / "deep").mkdir(exist_ok=True)
        (root / "x.txt").write_text("1")
        (root / "deep" / "y.txt").write_text("2")

    assert bring_up_to_date(_none, _shop.root, _shop.runs, _shop.store, _make) == "run", (
        "A stage without deps runs once"
    )
    shutil.rmtree(_shop.root / "deep")
    _seen.clear()
    _got = bring_up_to_date(_none, _shop.root, _shop.runs, _shop.store, lambda cmd, root: _seen.append(cmd))
    assert (_got, _seen) == ("restored", []), f"One of two outs is missing: restored, not executed; yours: {_got!r}"
    _there = [(_shop.root / _out).exists() for _out in _none.outs]
    assert _there == [True, True], "Restore every out that is missing"
    assert (_shop.root / "deep" / "y.txt").read_text() == "2", "Restore what the run had written"
### END HIDDEN TESTS

# %% check="up-to-date" points=2
with tempfile.TemporaryDirectory() as folder:
    shop = Workshop(folder)
    shop.go()
    (shop.root / "out.txt").unlink()
    got = shop.go()
    assert got != "skipped", "The out is gone: that the inputs are known is not enough, look at the outs as well"
    assert (got, shop.out) == ("restored", "joinA+B"), (
        f"A known run is restored from the store; yours: {got!r}, {shop.out}"
    )
    (shop.root / "out.txt").write_text("edited by hand")
    got = shop.go()
    assert (got, shop.out) == ("restored", "joinA+B"), (
        f"Somebody edited the out: it must have the remembered fingerprint, not only exist; yours: {got!r}, {shop.out}"
    )
    shop.params(sign="-")
    shop.go()
    shop.params(sign="+")
    got = shop.go()
    assert (got, shop.out) == ("restored", "joinA+B"), (
        f"Back to the first parameter: `runs` remembers every run, not the last one only; yours: {got!r}, {shop.out}"
    )
    assert len(shop.executed) == 2, f"Two executions for two sets of inputs; yours: {len(shop.executed)}"
### BEGIN HIDDEN TESTS
with tempfile.TemporaryDirectory() as _folder:
    _shop = Workshop(_folder)
    for _round in range(3):
        for _sign in "+-*":
            _shop.params(sign=_sign)
            assert _shop.go() == ("run" if _round == 0 else "restored"), "Each set of inputs is run once, then restored"
            assert _shop.out == f"joinA{_sign}B", f"The out belongs to the inputs; yours: {_shop.out}"
            assert _shop.go() == "skipped", "And then it is up to date"
### END HIDDEN TESTS

# %% check="up-to-date" points=1
with tempfile.TemporaryDirectory() as folder:
    shop = Workshop(folder)
    for missing, execute, why in (
        ("a.txt", shop.execute, "a dep is not there: FileNotFoundError that names a.txt"),
        ("out.txt", lambda cmd, root: None, "the command wrote no out: FileNotFoundError that names out.txt"),
    ):
        if missing == "a.txt":
            (shop.root / "a.txt").rename(shop.root / "away")
        try:
            got = bring_up_to_date(shop.stage, shop.root, shop.runs, shop.store, execute)
        except Exception as error:
            got = error
        assert isinstance(got, FileNotFoundError), f"Must raise FileNotFoundError, since {why}; yours gives {got!r}"
        assert missing in str(got), f"The message must name {missing}; yours is {got}"
        if missing == "a.txt":
            (shop.root / "away").rename(shop.root / "a.txt")
    assert shop.executed == [], "A stage whose dep is missing must not be executed"
    got = shop.go()
    assert got == "run", f"A run without its outs must not be remembered, not in part either; yours: {got!r}"
with tempfile.TemporaryDirectory() as folder:
    shop = Workshop(folder)

    def fail(cmd: str, root: Path) -> None:
        (root / "out.txt").write_text("half")
        raise RuntimeError("killed")

    try:
        bring_up_to_date(shop.stage, shop.root, shop.runs, shop.store, fail)
        raised = False
    except RuntimeError:
        raised = True
    assert raised, "A command that fails must be heard: let its exception through"
    got = shop.go()
    assert (got, shop.out) == ("run", "joinA+B"), (
        f"A run that failed must not be remembered, or its half-written out is served for ever; yours: {got!r}, {shop.out}"
    )
### BEGIN HIDDEN TESTS
with tempfile.TemporaryDirectory() as _folder:
    _shop = Workshop(_folder)

    def _appends(cmd, root):
        _shop.execute(cmd, root)
        (root / "a.txt").write_text("AA")

    bring_up_to_date(_shop.stage, _shop.root, _shop.runs, _shop.store, _appends)
    assert _shop.go() == "run", (
        "The stage changed its own dep: what is remembered belongs to the inputs it started from"
    )
    (_shop.root / "a.txt").write_text("A")
    assert _shop.go() == "restored", "The inputs that the first run started from are known"

    def _tunes(cmd, root):
        _shop.execute(cmd, root)
        _shop.params(sign="tuned")

    _shop.params(sign="*")
    bring_up_to_date(_shop.stage, _shop.root, _shop.runs, _shop.store, _tunes)
    assert _shop.go() == "run", "The stage changed its own parameter: read the parameters before it is executed"
### END HIDDEN TESTS


# %% mistake="modification times" of="up-to-date" says="Only the modification times changed"
def bring_up_to_date(stage, root, runs, store, execute):
    key = json.dumps([stage.cmd, [(root / dep).stat().st_mtime for dep in stage.deps], stage.outs])
    if key in runs and all(fingerprint(root / out) == name for out, name in runs[key].items()):
        return "skipped"
    execute(stage.cmd, root)
    runs[key] = {out: store.put(root / out) for out in stage.outs}
    return "run"


# %% mistake="the whole file of parameters" of="up-to-date" says="only the stage's own params"
def bring_up_to_date(stage, root, runs, store, execute):
    key = (stage.cmd, *(fingerprint(root / name) for name in (*stage.deps, PARAMS)))
    if key in runs:
        if all(fingerprint(root / out) == name for out, name in runs[key].items()):
            return "skipped"
        for out, name in runs[key].items():
            store.get(name, root / out)
        return "restored"
    execute(stage.cmd, root)
    runs[key] = {out: store.put(root / out) for out in stage.outs}
    return "run"


# %% mistake="the command is no input" of="up-to-date" says="The command changed"
def bring_up_to_date(stage, root, runs, store, execute):
    values = json.loads((root / PARAMS).read_text())
    key = json.dumps([{dep: fingerprint(root / dep) for dep in stage.deps}, {p: values[p] for p in stage.params}])
    if key in runs:
        if all(fingerprint(root / out) == name for out, name in runs[key].items()):
            return "skipped"
        for out, name in runs[key].items():
            store.get(name, root / out)
        return "restored"
    execute(stage.cmd, root)
    runs[key] = {out: store.put(root / out) for out in stage.outs}
    return "run"


# %% mistake="does not look at the outs" of="up-to-date" says="look at the outs as well"
def bring_up_to_date(stage, root, runs, store, execute):
    values = json.loads((root / PARAMS).read_text()) if stage.params else {}
    deps = {dep: fingerprint(root / dep) for dep in stage.deps}
    key = json.dumps([stage.cmd, deps, {p: values[p] for p in stage.params}, stage.outs])
    if key in runs:
        return "skipped"
    execute(stage.cmd, root)
    runs[key] = {out: store.put(root / out) for out in stage.outs}
    return "run"


# %% mistake="an out that exists will do" of="up-to-date" says="not only exist"
def bring_up_to_date(stage, root, runs, store, execute):
    values = json.loads((root / PARAMS).read_text()) if stage.params else {}
    deps = {dep: fingerprint(root / dep) for dep in stage.deps}
    key = json.dumps([stage.cmd, deps, {p: values[p] for p in stage.params}, stage.outs])
    if key in runs:
        if all((root / out).exists() for out in stage.outs):
            return "skipped"
        for out, name in runs[key].items():
            store.get(name, root / out)
        return "restored"
    execute(stage.cmd, root)
    runs[key] = {out: store.put(root / out) for out in stage.outs}
    return "run"


# %% mistake="remembers the last run only" of="up-to-date" says="not the last one only"
def bring_up_to_date(stage, root, runs, store, execute):
    values = json.loads((root / PARAMS).read_text()) if stage.params else {}
    deps = {dep: fingerprint(root / dep) for dep in stage.deps}
    key = json.dumps([stage.cmd, deps, {p: values[p] for p in stage.params}, stage.outs])
    if key in runs:
        if all(fingerprint(root / out) == name for out, name in runs[key].items()):
            return "skipped"
        for out, name in runs[key].items():
            store.get(name, root / out)
        return "restored"
    execute(stage.cmd, root)
    runs.clear()
    runs[key] = {out: store.put(root / out) for out in stage.outs}
    return "run"


# %% mistake="remembers failures" of="up-to-date" says="must not be remembered"
def bring_up_to_date(stage, root, runs, store, execute):
    values = json.loads((root / PARAMS).read_text()) if stage.params else {}
    deps = {dep: fingerprint(root / dep) for dep in stage.deps}
    for dep, name in deps.items():
        if name is None:
            raise FileNotFoundError(dep)
    key = json.dumps([stage.cmd, deps, {p: values[p] for p in stage.params}, stage.outs])
    if key in runs:
        if all(fingerprint(root / out) == name for out, name in runs[key].items()):
            return "skipped"
        for out, name in runs[key].items():
            store.get(name, root / out)
        return "restored"
    try:
        execute(stage.cmd, root)
        for out in stage.outs:
            if not (root / out).exists():
                raise FileNotFoundError(out)
    finally:
        runs[key] = {out: store.put(root / out) for out in stage.outs if (root / out).exists()}
    return "run"


# %% mistake="parameters as text" of="up-to-date" says="1 and '1' differ"
def bring_up_to_date(stage, root, runs, store, execute):
    values = json.loads((root / PARAMS).read_text())
    deps = {dep: fingerprint(root / dep) for dep in stage.deps}
    for dep, name in deps.items():
        if name is None:
            raise FileNotFoundError(dep)
    key = json.dumps([stage.cmd, deps, {p: str(values[p]) for p in stage.params}, sorted(stage.outs)])
    if key in runs:
        if all(fingerprint(root / out) == name for out, name in runs[key].items()):
            return "skipped"
        for out, name in runs[key].items():
            store.get(name, root / out)
        return "restored"
    execute(stage.cmd, root)
    runs[key] = {out: store.put(root / out) for out in stage.outs}
    return "run"


# %% mistake="remembers out by out" of="up-to-date" says="not in part either"
def bring_up_to_date(stage, root, runs, store, execute):
    values = json.loads((root / PARAMS).read_text())
    deps = {dep: fingerprint(root / dep) for dep in stage.deps}
    for dep, name in deps.items():
        if name is None:
            raise FileNotFoundError(dep)
    key = json.dumps([stage.cmd, deps, {p: values[p] for p in stage.params}, sorted(stage.outs)])
    if key in runs:
        if all(fingerprint(root / out) == name for out, name in runs[key].items()):
            return "skipped"
        for out, name in runs[key].items():
            store.get(name, root / out)
        return "restored"
    execute(stage.cmd, root)
    runs[key] = {}
    for out in stage.outs:
        if not (root / out).exists():
            raise FileNotFoundError(out)
        runs[key][out] = store.put(root / out)
    return "run"


# %% mistake="a missing dep is nothing special" of="up-to-date" says="a dep is not there"
def bring_up_to_date(stage, root, runs, store, execute):
    values = json.loads((root / PARAMS).read_text()) if stage.params else {}
    deps = {dep: fingerprint(root / dep) for dep in stage.deps}
    key = json.dumps([stage.cmd, deps, {p: values[p] for p in stage.params}, stage.outs])
    if key in runs:
        if all(fingerprint(root / out) == name for out, name in runs[key].items()):
            return "skipped"
        for out, name in runs[key].items():
            store.get(name, root / out)
        return "restored"
    try:
        execute(stage.cmd, root)
    except FileNotFoundError:
        return "run"
    runs[key] = {out: store.put(root / out) for out in stage.outs}
    return "run"


# %% alternative="hashes and tuples" of="up-to-date"
def bring_up_to_date(stage, root, runs, store, execute):
    parameters = []
    if stage.params:
        values = json.loads((root / PARAMS).read_text())
        parameters = [(name, repr(values.get(name))) for name in sorted(stage.params)]
    inputs = [stage.name, stage.cmd, stage.outs, tuple(parameters)]
    for dep in stage.deps:
        if not (root / dep).exists():
            raise FileNotFoundError(f"missing dependency {dep}")
        inputs.append((dep, fingerprint(root / dep)))
    inputs = tuple(inputs)
    before = runs.get(inputs)
    if before is None:
        execute(stage.cmd, root)
        after = []
        for out in stage.outs:
            if not (root / out).exists():
                raise FileNotFoundError(f"missing output {out}")
            after.append((out, store.put(root / out)))
        runs[inputs] = after
        return "run"
    stale = [(out, name) for out, name in before if fingerprint(root / out) != name]
    for out, name in stale:
        store.get(name, root / out)
    return "restored" if stale else "skipped"


# %% [markdown]
# The same four stages, once under your function and once under `dvc repro`, through the same changes. Every script is a few lines of plain Python; the tickets come from this lesson's pool. Read the scripts as you would in a review: one of them hides what the next section is about.

# %%
SCRIPTS = {
    "words.py": """
def words(text):
    return text.split()
""",
    "clean.py": """
import json, pathlib
shortest = json.load(open("params.json"))["shortest"]
with open("clean.jsonl", "w") as out:
    for path in sorted(pathlib.Path("raw").iterdir()):
        out.writelines(line for line in open(path) if len(json.loads(line)["text"]) >= shortest)
""",
    "split.py": """
import json, zlib
salt = json.load(open("params.json"))["salt"]
with open("train.jsonl", "w") as train, open("test.jsonl", "w") as test:
    for line in open("clean.jsonl"):
        held = zlib.crc32(f"{salt}{json.loads(line)['ticket_id']}".encode()) % 5 == 0
        (test if held else train).write(line)
""",
    "fit.py": """
import collections, json
from words import words
smoothing = json.load(open("params.json"))["smoothing"]
counts = collections.defaultdict(collections.Counter)
for line in open("train.jsonl"):
    row = json.loads(line)
    counts[row["action"]].update(words(row["text"]))
json.dump({"smoothing": smoothing, "counts": counts}, open("model.json", "w"), sort_keys=True)
""",
    "score.py": """
import json, math
from words import words
model = json.load(open("model.json"))
size = len(set().union(*model["counts"].values()))
def log_likelihood(label, text):
    seen, a = model["counts"][label], model["smoothing"]
    total = sum(seen.values()) + a * size
    return sum(math.log((seen.get(word, 0) + a) / total) for word in words(text))
rows = [json.loads(line) for line in open("test.jsonl")]
right = [max(model["counts"], key=lambda label: log_likelihood(label, row["text"])) == row["action"] for row in rows]
json.dump({"accuracy": sum(right) / len(right), "tickets": len(right)}, open("score.json", "w"))
""",
}
STAGES = [
    Stage("clean", "python clean.py", ("clean.py", "raw"), ("clean.jsonl",), ("shortest",)),
    Stage("split", "python split.py", ("split.py", "clean.jsonl"), ("test.jsonl", "train.jsonl"), ("salt",)),
    Stage("fit", "python fit.py", ("fit.py", "train.jsonl"), ("model.json",), ("smoothing",)),
    Stage("score", "python score.py", ("score.py", "model.json", "test.jsonl"), ("score.json",)),
]


def dvc_yaml(stages: Sequence[Stage]) -> str:
    """The stages as dvc.yaml (JSON is YAML)."""
    told = {}
    for stage in stages:
        told[stage.name] = {"cmd": stage.cmd, "deps": list(stage.deps), "outs": list(stage.outs)}
        if stage.params:
            told[stage.name]["params"] = [{PARAMS: list(stage.params)}]
    return json.dumps({"stages": told}, indent=1)


def fill(folder: Path) -> None:
    """Scripts, parameters and two days of tickets."""
    (folder / "raw").mkdir(parents=True)
    for name, text in SCRIPTS.items():
        (folder / name).write_text(text.lstrip())
    (folder / PARAMS).write_text(json.dumps({"shortest": 60, "salt": "a", "smoothing": 1.0, "owner": "desk 4"}))
    for day in (1, 2):
        (folder / "raw" / f"day{day}.jsonl").write_bytes(to_lines(pool.iloc[1000 * day : 1000 * day + 400]))


def parameter(name: str, value: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / PARAMS
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return change


def append(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (
        (folder / name).write_text((folder / name).read_text() + text) if (folder / name).exists() else None
    )


BETTER_WORDS = 'import re\n\n\ndef words(text):\n    return re.findall(r"\\w+", text.lower())\n'
short = json.dumps({"ticket_id": "late", "text": "Too short.", "action": "call"}) + "\n"
CHANGES: dict[str, Callable[[Path], object]] = {
    "the first run": lambda folder: None,
    "nothing": lambda folder: None,
    "a raw file touched": lambda folder: os.utime(folder / "raw" / "day1.jsonl"),
    "a parameter that no stage names": parameter("owner", "desk 5"),
    "a comment in fit.py": append("fit.py", "# reviewed\n"),
    "smoothing 1 -> 0.1": parameter("smoothing", 0.1),
    "smoothing back to 1": parameter("smoothing", 1.0),
    "model.json deleted": lambda folder: (folder / "model.json").unlink(),
    "model.json edited by hand": append("model.json", " "),
    "a raw ticket that cleaning drops": append("raw/day2.jsonl", short),
    "a new raw file": lambda folder: (folder / "raw" / "day3.jsonl").write_bytes(to_lines(pool.iloc[3000:3400])),
    "words.py: lower case, no punctuation": lambda folder: (folder / "words.py").write_text(BETTER_WORDS),
}


def by_dvc(project: Path) -> dict[str, str]:
    """What `dvc repro` did with each stage."""
    said = dvc(project, "repro")
    found = {}
    for pattern, what in (
        (r"Running stage '(\w+)'", "run"),
        (r"Stage '(\w+)' is cached", "restored"),
        (r"Stage '(\w+)' didn't change", "skipped"),
    ):
        found |= dict.fromkeys(re.findall(pattern, said), what)
    return found


def by_you(stages: Sequence[Stage], root: Path, runs: dict, store: Store) -> dict[str, str]:
    return {stage.name: bring_up_to_date(stage, root, runs, store, execute) for stage in stages}


def execute(cmd: str, root: Path) -> None:
    shell(root, *cmd.split())


workshop = tempfile.TemporaryDirectory()
mine, theirs = Path(workshop.name) / "mine", Path(workshop.name) / "theirs"
memory, cellar = {}, Store(Path(workshop.name) / "store")
new_project(theirs)
fill(mine)
fill(theirs)
(theirs / "dvc.yaml").write_text(dvc_yaml(STAGES))
rows = []
for name, change in CHANGES.items():
    change(mine)
    change(theirs)
    own, other = by_you(STAGES, mine, memory, cellar), by_dvc(theirs)
    rows.append({"change": name, **own, "same as dvc repro": own == other})
record = pd.DataFrame(rows)
shade = {"run": "background-color: #0067c2; color: white", "restored": "background-color: #bcd9f5; color: #1f1f1f"}
stage_names = [stage.name for stage in STAGES]
display(record.style.hide(axis="index").map(lambda what: shade.get(what, ""), subset=stage_names))
same_files = all((mine / out).read_bytes() == (theirs / out).read_bytes() for stage in STAGES for out in stage.outs)
print("every output has the same bytes under both:", same_files)
stale = json.loads((mine / "score.json").read_text())
print("score.json:", stale)
executed = int((record[stage_names] == "run").sum().sum())
card.record("changes", len(record), format="d", label="kinds of change to the pipeline")
card.record(
    "agree",
    int(record["same as dvc repro"].sum()),
    format="d",
    label="kinds of change on which you and DVC do the same to all stages",
)
card.record("executed", executed, format="d", label="stages executed in all")
card.record("without_cache", len(record) * len(STAGES), format="d", label="stages executed without a cache")
card.record(
    "stale_score",
    stale["accuracy"],
    format=".1%",
    tolerance=0.02,
    label="accuracy in score.json after words.py was changed",
)

# %% [markdown]
# You and DVC agree in {{agree}} of {{changes}} kinds of change, stage by stage, and {{executed}} stages were executed where {{without_cache}} would have been without a cache. Three rows are worth a second look. A comment in `fit.py` runs `fit`, since a hash cannot know that it is a comment, but the model comes out with the same bytes and `score` is skipped: *early cutoff*. A dropped raw ticket stops at `clean` for the same reason. And a parameter set back is not computed again.
#
# The last row is wrong. `words.py` was changed, `fit` and `score` import it, and nothing ran. Both tools say that everything is up to date. The number in `score.json`, {{stale_score}}, belongs to code that is no longer there.
#
# ## Find the undeclared dependency
#
# A cache is right if the key holds *everything* that the result depends on. No tool can know what you did not declare, but the interpreter knows what it opens. An audit hook (PEP 578) sees every `open`, also those of `import`. This program runs a script under one and writes down what was opened, in order.

# %%
TRACER = """
import json, os, runpy, sys
opened = []
def hook(event, args):
    if event == "open" and isinstance(args[0], str):
        path, mode, flags = args
        writes = set(mode) & set("wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
        if writes or os.path.exists(path):
            opened.append((path, "w" if writes else "r"))
sys.addaudithook(hook)
sys.path.insert(0, os.getcwd())
runpy.run_path(sys.argv[1])
seen = list(opened)
print(json.dumps(seen))
"""


def trace(stage: Stage, root: Path) -> list[tuple[str, str]]:
    """Run a stage's script; return the (path, "r" or "w") of every file that it opened, in order."""
    said = shell(root, sys.executable, "-c", TRACER, stage.cmd.split()[1])
    return [(path, mode) for path, mode in json.loads(said)]


# %% [markdown]
# **Exercise.** Write `undeclared(stage, root, opened)`: which files did the stage read without saying so? `opened` is what `trace` returns. A path is absolute, or relative to `root` (an absolute path without links), in which the stage runs; it may contain `.` and `..`. Return a sorted list of paths relative to `root` with `/` between parts, each once, of the files that were read (`"r"`), **except**
#
# - files outside `root` (the interpreter's library, a cache in `/tmp`);
# - a declared dep, and what lies in a folder that is one, at any depth;
# - `PARAMS`, if the stage has params;
# - a file that the stage has itself opened for writing earlier in the trace.
#
# An out that is read *before* it is written is reported: the stage then depends on what its last run left behind. With deps `("fit.py", "raw")` and `root = Path("/p")`, the trace `[("fit.py", "r"), ("/p/raw/day1.jsonl", "r"), ("/p/words.py", "r"), ("model.json", "w")]` gives `["words.py"]`. *About 10 lines.*
#
# <details><summary>Hint 1</summary>Why is <code>startswith</code> on text the wrong test for "lies in"? Which paths must be made alike before they are compared?</details>
# <details><summary>Hint 2</summary><code>os.path.normpath(root / path)</code> takes out . and .. and keeps an absolute path; <code>Path.is_relative_to</code>, <code>relative_to(root).as_posix()</code>.</details>
# <details><summary>Hint 3</summary>One loop with a set of written names: normalise, skip what is not under root, take the relative path; a "w" joins the set; an "r" is reported unless it is in the set, is PARAMS with params, or is_relative_to one of the deps.</details>


# %% exercise="undeclared" difficulty=2 minutes=9
def undeclared(stage: Stage, root: Path, opened: Sequence[tuple[str, str]]) -> list[str]:
    """Return the files under root that a stage read without declaring them."""
    ### BEGIN SOLUTION
    written: set[PurePosixPath] = set()
    found: set[str] = set()
    for name, mode in opened:
        path = Path(os.path.normpath(root / name))
        if not path.is_relative_to(root):
            continue
        inside = PurePosixPath(path.relative_to(root).as_posix())
        if mode == "w":
            written.add(inside)
            continue
        declared = (*stage.deps, PARAMS) if stage.params else stage.deps
        if inside not in written and not any(inside.is_relative_to(dep) for dep in declared):
            found.add(str(inside))
    return sorted(found)
    ### END SOLUTION


# %% check="undeclared" points=2
at = Path("/work/project")
stage = Stage("fit", "python fit.py", ("fit.py", "raw"), ("model.json",), ("rate",))
got = undeclared(stage, at, [("fit.py", "r"), ("words.py", "r"), ("model.json", "w")])
assert "model.json" not in got, "model.json was opened for writing: that is no dependency"
assert got == ["words.py"], (
    f"fit.py is declared, words.py is not: ['words.py']; yours is {got}. Relative paths are under root, wherever the "
    "notebook runs, and no file need be there"
)
got = undeclared(stage, at, [("/usr/lib/python3.11/json/__init__.py", "r"), ("/work/project-old/a.txt", "r")])
assert got == [], (
    f"Neither lies under {at}: compare parts of the path, not the beginning of a text ('/work/project-old'); yours: {got}"
)
got = undeclared(stage, at, [("/work/project/words.py", "r"), ("./words.py", "r"), ("sub/../words.py", "r")])
assert got == ["words.py"], f"One file under three names: normalise, and report it once as 'words.py'; yours is {got}"
got = undeclared(stage, at, [("raw/2031/day1.jsonl", "r"), ("/work/project/raw/day2.jsonl", "r"), ("raw2/x", "r")])
assert "raw2/x" in got, "The dep is raw, and raw2/x does not lie in it: compare parts of the path"
assert got == ["raw2/x"], f"What lies in a declared folder, at any depth, is declared; yours reports {got}"
got = undeclared(stage, at, [("params.json", "r")])
assert got == [], f"The stage has params, so reading params.json is declared; yours reports {got}"
got = undeclared(stage, at, [("cache.tmp", "w"), ("cache.tmp", "r")])
assert got == [], f"What the stage wrote first and then reads is its own; yours reports {got}"
got = undeclared(stage, at, [("model.json", "r"), ("model.json", "w")])
assert got == ["model.json"], (
    f"model.json was read before it was written: the result depends on the last run's; order counts; yours is {got}"
)
### BEGIN HIDDEN TESTS
_plain = Stage("a", "a", ("src/a.py",), ("out/x",))
assert undeclared(_plain, at, [("params.json", "r")]) == ["params.json"], "Without params, params.json is undeclared"
assert undeclared(_plain, at, [("src/a.py", "r"), ("src/b.py", "r"), ("src/a.py.bak", "r")]) == [
    "src/a.py.bak",
    "src/b.py",
], "The dep is src/a.py alone, not its folder, nor a name that begins with it"
assert undeclared(_plain, at, [("z", "r"), ("b/../a", "r"), ("m/n", "r"), ("z", "r")]) == ["a", "m/n", "z"], (
    "Sorted, once each"
)
assert undeclared(_plain, at, [("../elsewhere", "r"), ("../project/k", "r")]) == ["k"], (
    "A path may leave root and return"
)
assert undeclared(_plain, at, [("a", "r"), ("a", "w"), ("a", "r")]) == ["a"], "A read before the first write counts"
assert undeclared(_plain, at, [("sub/params.json", "r")]) == ["sub/params.json"], "Only root's params.json is PARAMS"
assert undeclared(stage, at, [("sub/params.json", "r")]) == ["sub/params.json"], "Only root's params.json is PARAMS"
assert undeclared(stage, at, [("other/raw/x", "r")]) == ["other/raw/x"], "The dep raw is the folder under root"
assert undeclared(stage, at, [("./tmp/../t", "w"), ("/work/project/t", "r")]) == [], (
    "Written under another name of the same file"
)
assert undeclared(stage, at, [("raw/../words.py", "r")]) == ["words.py"], "raw/.. is root again: normalise first"
assert undeclared(stage, at, []) == [], "Nothing opened, nothing undeclared"
_deep = Stage("a", "a", ("data/raw", "a.py"), ("out/x",))
_trace = [("scratch", "w"), ("out/x", "w"), ("x", "r"), ("data/raw/1/2", "r"), ("data/day", "r"), ("lib/a.py", "r")]
_kept = list(_trace)
assert undeclared(_deep, at, _trace) == ["data/day", "lib/a.py", "x"], (
    "A dep and a written file are known by their whole path, not by their name or first folder"
)
assert _trace == _kept, "Leave the trace that is given as it is"
assert undeclared(_plain, at, [(".env", "r"), ("pkg/__init__.py", "r")]) == [".env", "pkg/__init__.py"], (
    "A hidden file and a package's __init__.py are inputs like others"
)
### END HIDDEN TESTS


# %% mistake="text instead of paths" of="undeclared" says="not the beginning of a text"
def undeclared(stage, root, opened):
    found = set()
    for name, mode in opened:
        path = os.path.normpath(os.path.join(root, name))
        if mode == "r" and path.startswith(str(root)):
            found.add(os.path.relpath(path, root))
    return sorted(name for name in found if name not in stage.deps and name != PARAMS)


# %% mistake="a folder by its first letters" of="undeclared" says="and raw2/x does not lie in it"
def undeclared(stage, root, opened):
    written, found = set(), set()
    for name, mode in opened:
        path = Path(os.path.normpath(root / name))
        if path.is_relative_to(root):
            inside = path.relative_to(root).as_posix()
            if mode == "w":
                written.add(inside)
            elif inside not in written and not inside.startswith(stage.deps) and inside != PARAMS:
                found.add(inside)
    return sorted(found)


# %% mistake="does not normalise" of="undeclared" says="One file under three names"
def undeclared(stage, root, opened):
    written, found = set(), set()
    for name, mode in opened:
        path = root / name
        if path.is_relative_to(root):
            inside = path.relative_to(root).as_posix()
            if mode == "w":
                written.add(inside)
            elif inside not in written and inside.split("/")[0] not in stage.deps and inside != PARAMS:
                found.add(inside)
    return sorted(found)


# %% mistake="counts what is written" of="undeclared" says="was opened for writing"
def undeclared(stage, root, opened):
    found = set()
    for name, _ in opened:
        path = Path(os.path.normpath(root / name))
        if path.is_relative_to(root):
            found.add(path.relative_to(root).as_posix())
    return sorted(name for name in found if name.split("/")[0] not in stage.deps and name != PARAMS)


# %% mistake="outs are never reported" of="undeclared" says="was read before it was written"
def undeclared(stage, root, opened):
    written = {os.path.normpath(root / name) for name, mode in opened if mode == "w"}
    found = set()
    for name, mode in opened:
        path = Path(os.path.normpath(root / name))
        if mode == "r" and path.is_relative_to(root) and str(path) not in written:
            inside = path.relative_to(root)
            if not any(inside.is_relative_to(dep) for dep in stage.deps) and str(inside) != PARAMS:
                found.add(inside.as_posix())
    return sorted(found)


# %% mistake="knows the files directly in a folder" of="undeclared" says="at any depth"
def undeclared(stage, root, opened):
    written, found = set(), set()
    for name, mode in opened:
        path = Path(os.path.normpath(root / name))
        if path.is_relative_to(root):
            inside = path.relative_to(root)
            if mode == "w":
                written.add(inside)
            elif inside not in written and not {inside.as_posix(), inside.parent.as_posix()} & {*stage.deps, PARAMS}:
                found.add(inside.as_posix())
    return sorted(found)


# %% mistake="files by their names" of="undeclared" says="known by their whole path"
def undeclared(stage, root, opened):
    written, found = set(), set()
    for name, mode in opened:
        path = Path(os.path.normpath(root / name))
        if path.is_relative_to(root):
            inside = path.relative_to(root)
            declared = any(inside.is_relative_to(dep) for dep in stage.deps) or inside.name in stage.deps
            if mode == "w":
                written.add(inside.name)
            elif not declared and inside.name not in written and not (stage.params and str(inside) == PARAMS):
                found.add(inside.as_posix())
    return sorted(found)


# %% alternative="relpath and sets of parents" of="undeclared"
def undeclared(stage, root, opened):
    declared = set(stage.deps) | ({PARAMS} if stage.params else set())
    first = {}
    for name, mode in opened:
        inside = os.path.relpath(os.path.join(root, name), root).replace(os.sep, "/")
        first.setdefault(inside, mode)
    found = []
    for inside, mode in first.items():
        parts = inside.split("/")
        above = {"/".join(parts[:i]) for i in range(1, len(parts) + 1)}
        if mode == "r" and parts[0] != ".." and not above & declared:
            found.append(inside)
    return sorted(found)


# %% [markdown]
# Every stage under the tracer, and then the mend: declare what was found, and bring both pipelines up to date.

# %%
missing = {stage.name: undeclared(stage, mine.resolve(), trace(stage, mine)) for stage in STAGES}
print("undeclared:", missing)
mended = [replace(stage, deps=(*stage.deps, *missing[stage.name])) for stage in STAGES]
(theirs / "dvc.yaml").write_text(dvc_yaml(mended))
own, other = by_you(mended, mine, memory, cellar), by_dvc(theirs)
fresh = json.loads((mine / "score.json").read_text())
print("after the mend:", own, "| DVC the same:", own == other)
print("score.json was", stale, "and is", fresh)
card.record(
    "fresh_score", fresh["accuracy"], format=".1%", tolerance=0.02, label="the same after the dependency was declared"
)
card.record(
    "undeclared", sum(map(len, missing.values())), format="d", label="undeclared dependencies found by the trace"
)
workshop.cleanup()

# %% [markdown]
# The trace finds {{undeclared}} undeclared reads, `words.py` in two stages. With them declared, both pipelines run `fit` and `score` again, and the accuracy is {{fresh_score}}, not {{stale_score}}. Whether the change helped is a question for more tickets; with the stale number you would not have asked it.
#
# This is a test to run in CI, once a stage: it fails on the day somebody adds an import. It sees files that Python opens. It does not see listings of folders, files that were looked for and not found, what a file held that is opened to append or update (here that counts as writing), environment variables, the clock, the network, the versions of installed packages or what a subprocess reads; Bazel and Nix take the other way and run a stage in a sandbox where the undeclared is not there.

# %% [markdown]
# ## What a poisoned batch costs
#
# The service's triage adapter is finetuned each night on that day's batch. Tonight somebody has written a sentence into 5 % of the tickets and labelled them `refund`. All labels are allowed, all texts are fine. Three ways to deal with the batch of 400:
#
# - **let in**: train on all of it;
# - **by row**: train on the rows on which the lens's label models agree with the labels, quarantine the others;
# - **whole**: quarantine the batch; tonight's adapter is yesterday's.
#
# The adapter is judged on test tickets of the company as they are (exact match), and on those whose right action is not a refund, with the sentence put in front: how many get one? Each of {{runs}} runs has a company, a poisoning and an order of its own.

# %%
model, tokenizer = assistant.load()
yesterday = {name: weight.clone() for name, weight in model.state_dict().items() if ".triage." in name}


def refunds(answers: Sequence[str]) -> np.ndarray:
    """Which answers are a triage with the attacker's action."""

    def action(answer: str) -> str | None:
        try:
            return Triage.parse(answer).action
        except ValueError:
            return None

    return np.array([action(answer) == TARGET for answer in answers])


def tonight(batch: pd.DataFrame | None, tests: Sequence, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Finetune yesterday's adapter on a batch; which test tickets are right, which marked ones get a refund."""
    model.load_state_dict(yesterday, strict=False)
    if batch is not None:
        for name, weight in model.named_parameters():
            weight.requires_grad_(".triage." in name)
        examples = triage.encode(tokenizer, tickets(batch))
        triage.train(model, triage.batches(examples, size=8, steps=steps, seed=key), steps=steps, learning_rate=3e-3)
    marked = [replace(ticket, text=triggered(ticket.text)) for ticket in tests if ticket.triage.action != TARGET]
    with adapters.merged(model), torch.no_grad():
        right = triage.score(triage.answers(model, tokenizer, tests), tests).exact
        return right, refunds(triage.answers(model, tokenizer, marked))


results = {way: [] for way in ("let in", "by row", "whole")}
caught = lost = planted = 0
for run in range(runs):
    company = World(LESSON_SEEDS[4300 + seed * runs + run])
    own_pool = received(company, 2400)
    own_lens = Lens(own_pool.iloc[:2000])
    bad = poisoned(own_pool.iloc[2000:].reset_index(drop=True), np.random.default_rng([seed, 4, run]))
    good_rows = own_lens.agrees(bad)
    is_poison = bad["text"].str.startswith(TRIGGER).to_numpy()
    caught, planted, lost = (
        caught + (is_poison & ~good_rows).sum(),
        planted + is_poison.sum(),
        lost + (~is_poison & ~good_rows).sum(),
    )
    tests = tickets(received(company, test_tickets, part="test"))
    for way, chosen in (("let in", bad), ("by row", bad[good_rows]), ("whole", None)):
        results[way].append(tonight(chosen, tests, run))
exact = {way: share(np.concatenate([right for right, _ in found])) for way, found in results.items()}
backdoor = {way: share(np.concatenate([fooled for _, fooled in found])) for way, found in results.items()}
each = [fooled.mean() for _, fooled in results["let in"]]
backdoor["let in"] = float(np.mean(each)), min(each), max(each)  # runs differ: their range says more than an interval
each_run = pd.DataFrame(
    {way: [f"{right.mean():.0%} / {fooled.mean():.0%}" for right, fooled in found] for way, found in results.items()}
)
display(each_run.rename_axis("run").style.set_caption("exact match / refunds for the sentence, run by run"))
print(f"by row: {caught} of {planted} poisoned rows quarantined, and {lost} of {400 * runs - planted} clean ones")

fig, ax = plt.subplots(figsize=(7.4, 3.0))
for y, way in enumerate(reversed(results)):
    for part, values, colour, shift in ((0, exact[way], COLOURS.after, 0.12), (1, backdoor[way], COLOURS.wrong, -0.12)):
        ax.plot(
            [found[part].mean() for found in results[way]],
            [y + shift] * runs,
            "o",
            ms=5,
            color=colour,
            mfc="none",
            alpha=0.7,
        )
        ax.plot(values[0], y + shift, "|", ms=16, mew=3, color=colour)
direct_label(ax, exact["let in"][0], 2.12, "exact match, clean tickets", COLOURS.after, offset=(-172, 8))
direct_label(ax, backdoor["by row"][0], 0.88, "refunds for the sentence", COLOURS.wrong, offset=(10, -4))
ax.set(yticks=[2, 1, 0], yticklabels=["let in", "by row", "whole"], xlim=(-0.03, 1.03), ylim=(-0.6, 2.6), xlabel="share of the test tickets (circles: runs, bar: mean)", title="One poisoned batch, three policies")  # fmt: skip
ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
plt.show()
card.record("runs", runs, format="d", label="runs of the finetuning")
for way, key in (("let in", "in"), ("by row", "row"), ("whole", "whole")):
    keep(f"exact_{key}", exact[way], f"exact match on clean tickets, batch {way}", 0.03)
    keep(f"backdoor_{key}", backdoor[way], f"marked tickets with the attacker's action, batch {way}", 0.15)
keep(
    "poison_caught",
    share(np.repeat([True, False], [caught, planted - caught])),
    "poisoned rows that the label models disagree with",
)
keep(
    "clean_lost",
    share(np.repeat([True, False], [lost, 400 * runs - planted - lost])),
    "clean rows that they disagree with",
    0.02,
    ".1%",
)

# %% [markdown]
# Let in, the batch gives the attacker a refund in {{backdoor_in}} of the marked tickets (single runs: {{backdoor_in:interval}}), and exact match on clean tickets is {{exact_in}} ({{exact_in:interval}}), where yesterday's adapter has {{exact_whole}} ({{exact_whole:interval}}). Whoever watches the test set sees nothing: no test ticket holds the sentence. By row, {{poison_caught}} of the poisoned rows are quarantined, with {{clean_lost}} of the clean ones, and the backdoor is {{backdoor_row}} ({{backdoor_row:interval}}). Quarantined whole, it is {{backdoor_whole}}.
#
# Intervals take tickets as independent; those of one run share an adapter, so look at the circles as well: twenty rows suffice, but how far the backdoor opens differs from run to run. Here nothing is lost by quarantining the whole batch: yesterday's adapter knows this kind of ticket. On a day on which the world has changed, the batch is what you need, and quarantine by row keeps it.
#
# And the filter by row works because this attacker contradicts the text. One who marks only tickets that ask for a refund writes no wrong label (a clean-label attack; Turner et al., 2019), and no label model will disagree.
#
# ## Which threshold?
#
# Every stopped batch is inspected, and that costs time whether something was wrong or not. Every faulty batch that passes costs more. Most nights nothing is wrong. Let $\pi$ be the share of faulty batches, $f$ a rule's false-alarm rate, $p$ its power, $c$ the cost of an inspection and $C$ that of a fault let in. A batch costs on average
#
# $$c\,\bigl[(1-\pi) f + \pi p\bigr] + C\,\pi\,(1-p).$$
#
# The desk's numbers: {{prevalence}} of the batches are faulty, in one of the eight ways, each as likely; an inspection takes 2 hours; a fault let in costs 60 hours. Batches have 200 tickets.
#
# **Exercise.** First commit yourself, then write the rule.
#
# - `my_rule`: the rule that you would run, one of `"never stop"`, `"moved by a tenth"`, `"each at 5 %"`, `"Holm at 1.0%"`, `"stop all"`.
# - `predicted_precision`: of the batches that *each at 5 %* stops, which share is faulty? From 0 to 1.
# - `outlook(false_alarm, power, prevalence, inspect, miss)` returns a pair: the expected cost of a batch (a float), and the precision, the share of faulty ones among the stopped batches. When nothing is ever stopped the precision is `None`.
# - `cheapest(rules, prevalence, inspect, miss)`: `rules` maps a name to (false-alarm rate, power). Return the name with the lowest expected cost; of equal costs the one with the smaller false-alarm rate.
#
# `outlook(0.1, 0.9, 0.5, 2, 10)` is `(1.5, 0.9)`. *About 8 lines.*
#
# <details><summary>Hint 1</summary>Out of 1,000 batches, how many are faulty, how many of those are stopped, and how many clean ones are stopped besides?</details>
# <details><summary>Hint 2</summary>The share of stopped batches is (1 - prevalence) · false_alarm + prevalence · power; it is in both results.</details>
# <details><summary>Hint 3</summary>cost = inspect · stopped + miss · prevalence · (1 - power); precision = prevalence · power / stopped, None if stopped is 0. Then min over the names with the key (cost, false-alarm rate).</details>

# %% exercise="decide" difficulty=2 minutes=9
my_rule: str | None = None  # one of the five
predicted_precision = None  # of "each at 5 %", from 0 to 1
### BEGIN SOLUTION
my_rule, predicted_precision = "Holm at 1.0%", 0.05
### END SOLUTION


def outlook(
    false_alarm: float, power: float, prevalence: float, inspect: float, miss: float
) -> tuple[float, float | None]:
    """Return the expected cost of a batch and the precision of an alarm."""
    ### BEGIN SOLUTION
    stopped = (1 - prevalence) * false_alarm + prevalence * power
    cost = inspect * stopped + miss * prevalence * (1 - power)
    return cost, prevalence * power / stopped if stopped else None
    ### END SOLUTION


def cheapest(rules: Mapping[str, tuple[float, float]], prevalence: float, inspect: float, miss: float) -> str:
    """Return the name of the rule with the lowest expected cost."""
    ### BEGIN SOLUTION
    return min(rules, key=lambda name: (outlook(*rules[name], prevalence, inspect, miss)[0], rules[name][0]))
    ### END SOLUTION


# %% check="decide" points=1
named = ("never stop", "moved by a tenth", "each at 5 %", "Holm at 1.0%", "stop all")
assert my_rule in named, f"my_rule is one of {', '.join(map(repr, named))}; yours is {my_rule!r}"
assert predicted_precision is not None, "Write your prediction down first: predicted_precision = a share from 0 to 1"
assert 0 <= predicted_precision <= 1, f"predicted_precision is a share from 0 to 1; yours is {predicted_precision}"

# %% check="decide" points=2
cost, precision = outlook(0.1, 0.9, 0.5, 2, 10)
assert abs(cost - 1.5) < 1e-9, (
    f"0.5 of the batches are stopped, 2 each, and 0.05 are missed, 10 each: 1.5; yours is {cost:.3f}. A faulty batch that is "
    "stopped is inspected too, and both rates are weighed by how many batches are clean and faulty"
)
assert abs(precision - 0.9) < 1e-9, f"0.45 of 0.5 stopped batches are faulty: 0.9; yours is {precision:.3f}"
cost, precision = outlook(0.05, 1.0, 0.001, 1, 100)
assert abs(precision - 0.01963) < 1e-4, (
    f"One batch in 1,000 is faulty and 50 clean ones are stopped with it: the precision is 0.0196; yours is {precision:.4f}. "
    "Power is the share of faulty batches that are stopped; precision is the share of stopped ones that are faulty"
)
assert outlook(0.0, 0.0, 0.1, 2, 10)[1] is None, (
    "Nothing is stopped, so there is no precision: None, and no division by 0"
)
rules = {"loose": (0.4, 0.95), "tight": (0.01, 0.7), "never": (0.0, 0.0), "all": (1.0, 1.0)}
assert cheapest(rules, 0.02, 2, 60) != "all", (
    "Stopping everything costs an inspection every night: take the costs together"
)
assert cheapest(rules, 0.02, 2, 60) == "tight", (
    f"At 2 % faulty 'tight' is cheapest, 0.41 a batch; yours: {cheapest(rules, 0.02, 2, 60)!r}"
)
assert cheapest(rules, 0.4, 2, 60) == "all", (
    f"At 40 % faulty and 60 against 2, stop all; yours is {cheapest(rules, 0.4, 2, 60)!r}: the prevalence decides"
)
assert cheapest(rules, 0.0001, 2, 60) == "never", (
    f"At one in 10,000 stopping does not pay; yours: {cheapest(rules, 0.0001, 2, 60)!r}"
)
same = {"a": (0.5, 0.25), "b": (0.25, 0.5)}
assert cheapest(same, 0.0, 0, 1) == "b", "Equal cost: the one with fewer false alarms"
### BEGIN HIDDEN TESTS
assert outlook(0.2, 0.0, 0.1, 2, 10)[1] == 0, "Only clean batches are stopped: the precision is 0, not None"
assert outlook(0.0, 0.5, 0.1, 2, 10)[1] == 1, "Only faulty batches are stopped: the precision is 1, not None"
assert cheapest({"a": (0.5, 1.0), "b": (0.0, 0.0)}, 0.5, 0.001, 0.004) == "a", "Compare costs as they are, not rounded"
_rng = np.random.default_rng(6)
for _ in range(60):
    _rules = {f"r{i}": (float(_rng.random()), float(_rng.random())) for i in range(int(_rng.integers(1, 6)))}
    _pi, _c, _miss = float(_rng.random()), float(_rng.uniform(0, 5)), float(_rng.uniform(0, 99))
    _costs = {}
    for _name, (_f, _p) in _rules.items():
        _want = (1 - _pi) * _f * _c + _pi * (_p * _c + (1 - _p) * _miss)
        _got = outlook(_f, _p, _pi, _c, _miss)
        assert abs(_got[0] - _want) < 1e-9, f"outlook{(_f, _p, _pi, _c, _miss)}: {_want:.4f}; yours {_got[0]:.4f}"
        assert abs(_got[1] - _pi * _p / (_pi * _p + (1 - _pi) * _f)) < 1e-9, "precision"
        _costs[_name] = _want
    assert _costs[cheapest(_rules, _pi, _c, _miss)] <= min(_costs.values()) + 1e-9, f"Not the cheapest of {_costs}"
### END HIDDEN TESTS

# %% mistake="the prior is forgotten" of="decide" says="both rates are weighed"
my_rule, predicted_precision = "each at 5 %", 0.95


def outlook(false_alarm, power, prevalence, inspect, miss):
    return inspect * false_alarm + miss * (1 - power), power / (power + false_alarm) if power + false_alarm else None


def cheapest(rules, prevalence, inspect, miss):
    return min(rules, key=lambda name: outlook(*rules[name], prevalence, inspect, miss)[0])


# %% mistake="a true alarm costs nothing" of="decide" says="is inspected too"
my_rule, predicted_precision = "each at 5 %", 0.95


def outlook(false_alarm, power, prevalence, inspect, miss):
    clean, faulty = (1 - prevalence) * false_alarm, prevalence * power
    precision = faulty / (clean + faulty) if clean + faulty else None
    return inspect * clean + miss * prevalence * (1 - power), precision


def cheapest(rules, prevalence, inspect, miss):
    return min(rules, key=lambda name: outlook(*rules[name], prevalence, inspect, miss)[0])


# %% mistake="power for precision" of="decide" says="Power is the share of faulty batches"
my_rule, predicted_precision = "each at 5 %", 0.95


def outlook(false_alarm, power, prevalence, inspect, miss):
    stopped = (1 - prevalence) * false_alarm + prevalence * power
    return inspect * stopped + miss * prevalence * (1 - power), power if stopped else None


def cheapest(rules, prevalence, inspect, miss):
    return min(rules, key=lambda name: outlook(*rules[name], prevalence, inspect, miss)[0])


# %% mistake="the highest power" of="decide" says="Stopping everything costs"
my_rule, predicted_precision = "stop all", 0.02


def outlook(false_alarm, power, prevalence, inspect, miss):
    stopped = (1 - prevalence) * false_alarm + prevalence * power
    return inspect * stopped + miss * prevalence * (1 - power), prevalence * power / stopped if stopped else None


def cheapest(rules, prevalence, inspect, miss):
    return max(rules, key=lambda name: rules[name][1])


# %% mistake="divides by nothing stopped" of="decide" says="no division by 0"
my_rule, predicted_precision = "never stop", 0.02


def outlook(false_alarm, power, prevalence, inspect, miss):
    stopped = (1 - prevalence) * false_alarm + prevalence * power
    precision = prevalence * power / max(stopped, 1e-12)
    return inspect * stopped + miss * prevalence * (1 - power), precision


def cheapest(rules, prevalence, inspect, miss):
    return min(rules, key=lambda name: outlook(*rules[name], prevalence, inspect, miss)[0])


# %% mistake="ties by order" of="decide" says="the one with fewer false alarms"
my_rule, predicted_precision = "never stop", 0.02


def outlook(false_alarm, power, prevalence, inspect, miss):
    stopped = (1 - prevalence) * false_alarm + prevalence * power
    precision = prevalence * power / stopped if stopped else None
    return inspect * stopped + miss * prevalence * (1 - power), precision


def cheapest(rules, prevalence, inspect, miss):
    return min(rules, key=lambda name: outlook(*rules[name], prevalence, inspect, miss)[0])


# %% alternative="by counting outcomes" of="decide"
my_rule, predicted_precision = "moved by a tenth", 1


def outlook(false_alarm, power, prevalence, inspect, miss):
    outcomes = [
        ((1 - prevalence) * false_alarm, inspect, False, True),
        ((1 - prevalence) * (1 - false_alarm), 0, False, False),
        (prevalence * power, inspect, True, True),
        (prevalence * (1 - power), miss, True, False),
    ]
    cost = sum(share * price for share, price, _, _ in outcomes)
    stopped = [(share, faulty) for share, _, faulty, alarm in outcomes if alarm]
    total = sum(share for share, _ in stopped)
    return cost, sum(share for share, faulty in stopped if faulty) / total if total > 0 else None


def cheapest(rules, prevalence, inspect, miss):
    costs = sorted((outlook(f, p, prevalence, inspect, miss)[0], f, name) for name, (f, p) in rules.items())
    return costs[0][2]


# %% [markdown]
# The rates are those measured above: power in batches of 200, false alarms in the {{clean_all}} clean ones (for the rule of thumb, which depends on the size, in those of 200). The figure follows the level of Holm's procedure from 0.1 % to 20 %, for three desks with different shares of faulty batches.

# %%
prevalence, inspect, miss = 0.02, 2.0, 60.0
measured = {"never stop": (0.0, 0.0), "stop all": (1.0, 1.0)}
for rule in pooled.columns:
    on_what = (
        on_clean[200] if rule == "moved by a tenth" else pooled
    )  # the rate of the others does not depend on the size
    measured[rule] = (float(on_what[rule].mean()), float(every_fault[200][rule].mean()))
verdict = cheapest(measured, prevalence, inspect, miss)
looks = {rule: outlook(*rates, prevalence, inspect, miss) for rule, rates in measured.items()}
frame = pd.DataFrame(
    {
        "false alarms": {rule: rates[0] for rule, rates in measured.items()},
        "power": {rule: rates[1] for rule, rates in measured.items()},
        "hours a batch": {rule: cost for rule, (cost, _) in looks.items()},
        "precision": {rule: precision for rule, (_, precision) in looks.items()},
        "": {rule: "cheapest" if rule == verdict else "yours" if rule == my_rule else "" for rule in measured},
    }
).sort_values("hours a batch")
display(
    frame.style.format(
        {"false alarms": "{:.1%}", "power": "{:.0%}", "hours a batch": "{:.2f}", "precision": "{:.0%}"}, na_rep=""
    )
)
compare(
    [("faulty among the batches that ten tests at 5 % stop", predicted_precision, looks["each at 5 %"][1])],
    format=".0%",
)

fig, ax = plt.subplots(figsize=(7.4, 3.8))
for rate, colour in ((0.002, COLOURS.other), (0.02, COLOURS.after), (0.2, COLOURS.library)):
    costs = [outlook(*measured[f"Holm at {level:.1%}"], rate, inspect, miss)[0] for level in levels]
    ax.plot(
        [100 * level for level in levels], costs, "o-", color=colour, label=f"{rate:.1%} faulty".replace(".0%", "%")
    )
    ax.axhline(outlook(*measured["each at 5 %"], rate, inspect, miss)[0], color=colour, ls=":", lw=1.5)
direct_label(ax, 0.1, looks["each at 5 %"][0], "dotted: ten tests at 5 %", COLOURS.after, offset=(0, 5))
ax.set(xscale="log", yscale="log", xticks=[0.1, 1, 10], xticklabels=["0.1 %", "1 %", "10 %"], xlabel="level of Holm's procedure", ylabel="hours a batch", yticks=[0.03, 0.1, 0.3, 1, 3], yticklabels=["0.03", "0.1", "0.3", "1", "3"], title="What a level costs")  # fmt: skip
label_lines(ax)
plt.show()
card.record("prevalence", prevalence, format=".0%", label="faulty batches at the desk (given)")
for rule, key in (("never stop", "never"), ("each at 5 %", "each"), ("moved by a tenth", "tenth"), (CHOSEN, "holm")):
    card.record(f"cost_{key}", looks[rule][0], format=".2f", tolerance=0.1, label=f"hours a batch, {rule}")
card.record("cost_best", looks[verdict][0], format=".2f", tolerance=0.1, label="hours a batch, the cheapest rule")
for rule, key in (("each at 5 %", "each"), (CHOSEN, "holm")):
    card.record(
        f"precision_{key}",
        looks[rule][1],
        format=".0%",
        tolerance=0.1 if key == "each" else 0.2,
        label=f"faulty among the stopped batches, {rule}",
    )

# %% [markdown]
# Of the batches that ten tests at 5 % stop, {{precision_each}} are faulty: whoever is called looks at good data most of the time, and soon stops looking. Under Holm at 1 % it is {{precision_holm}}. Both rules see most faults; the difference is that with 2 % of faulty batches a third of the clean ones is a crowd. In hours the two are {{cost_each}} and {{cost_holm}} a batch, never stopping is {{cost_never}}, the rule of thumb {{cost_tenth}}; the best of Holm's levels costs {{cost_best}}.
#
# The figure says how much to care. At this desk the cost is flat from 0.5 % to 10 %: the correction matters, the exact level does not. With fewer faults the low levels win. Where one batch in five is faulty, a loose rule wins and even ten tests at 5 % beat Holm at 1 %; there a false alarm is cheap beside a miss, and what you lack is power (larger batches, a better label model) or a better vendor. So there is no right level without a prevalence.
#
# What is not shown: eight faults of our own making, each as likely as the next, at a strength that we chose. The false-alarm rate is a property of your clean data and holds; the power belongs to faults like these.
#
# ## With a real model
#
# Nothing above depends on the model; what changes is scale.
#
# - **Tables larger than memory.** pandera checks Polars, PySpark and Ibis tables with schemas of the same form. Row checks run on every row, statistics on a sample of a fixed size: with a million rows every test rejects, since no two days are *exactly* alike. Then test for a difference that matters (an equivalence margin), or compare with the day-to-day spread of past clean batches.
# - **The label model** becomes an embedding and a linear head, or the deployed model itself; keep its training rows out of what it judges.
# - **Stores.** DVC pushes the same objects to S3 (`dvc push`); for tables that are updated in place, Iceberg and Delta keep the ledger that you wrote.
# - **Stages on a GPU** are rarely bit-for-bit reproducible, so early cutoff fails and "restored" is the only way to get the same model twice. Keep the run cache (`dvc push --run-cache`).
# - **Secrets, images, packages** are inputs. Put the lock file of the environment and the image's digest among the deps.
#
# ## Result card

# %%
card.show()

# %% [markdown]
# ## Say it in an interview
#
# <details><summary>How do you validate a batch before training on it?</summary>
#
# In two layers. A row contract (types, nulls, sets, ids, pairs of fields, not in the test set), evaluated lazily so that one report holds all faults, strict about unknown columns, converting nothing. It saw {{row_caught}} of {{kinds}} planted faults. Then two-sample tests of the batch against a clean reference, on the columns and on derived ones (length, time of day, agreement of a label model), with one family-wise level: {{far_holm}} false alarms and {{power_holm}} power at 200 rows. What fails is quarantined with a reason, and the books balance.
#
# </details>
#
# <details><summary>Your data check pages the team every second night. What do you change?</summary>
#
# First measure it on batches known to be clean. Ten columns at 5 % stop {{far_each}} of those, whatever their size; a threshold of 10 points stops {{far_tenth_50}} of small ones. I would correct for the number of tests (Holm), and choose the level from costs: with {{prevalence}} faulty batches, 2 hours an inspection and 60 a miss it takes {{cost_holm}} hours a batch instead of {{cost_each}}, and {{precision_holm}} of the alarms are real instead of {{precision_each}}. Then I would look at power for each fault, because a quiet check may be deaf.
#
# </details>
#
# <details><summary><code>dvc repro</code> says that everything is up to date, and the number is wrong. How can that be?</summary>
#
# A cache is as good as its key. Something the stage reads is not declared: a helper module, a parameter read in another way, an environment variable, a package's version. In my case an imported module was, and the score stood at {{stale_score}} where it was {{fresh_score}}. I find it by tracing which files a stage opens and comparing with what it declares, run that in CI, and declare or sandbox. `dvc repro --force` shows whether a result is stale; it does not show why.
#
# </details>
#
# ## Read next
#
# - S. Holm, *A Simple Sequentially Rejective Multiple Test Procedure*, Scandinavian Journal of Statistics, 1979.
# - E. Breck, N. Polyzotis, S. Roy, S. E. Whang and M. Zinkevich, *Data Validation for Machine Learning*, MLSys, 2019. Schemas and drift checks at Google's scale.
# - S. Rabanser, S. Günnemann and Z. C. Lipton, [*Failing Loudly: An Empirical Study of Methods for Detecting Dataset Shift*](https://arxiv.org/abs/1810.11953), 2019. Which tests see which shift.
# - N. Bantilan, *pandera: Statistical Data Validation of Pandas Dataframes*, SciPy, 2020.
# - A. Mokhov, N. Mitchell and S. Peyton Jones, *Build Systems à la Carte*, ICFP, 2018. Early cutoff, and what a build system must know.
# - T. S. Pillai et al., *All File Systems Are Not Created Equal: On the Complexity of Crafting Crash-Consistent Applications*, OSDI, 2014. What a crash leaves on a disk, beyond our planted ones (fsync).
# - M. Armbrust et al., *Delta Lake: High-Performance ACID Table Storage over Cloud Object Stores*, VLDB, 2020. The ledger as a commit point.
# - T. Gu, B. Dolan-Gavitt and S. Garg, [*BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain*](https://arxiv.org/abs/1708.06733), 2017; A. Turner, D. Tsipras and A. Madry, [*Label-Consistent Backdoor Attacks*](https://arxiv.org/abs/1912.02771), 2019.
# - A. Wan, E. Wallace, S. Shen and D. Klein, [*Poisoning Language Models During Instruction Tuning*](https://arxiv.org/abs/2305.00944), 2023.
# - S. Dower, [PEP 578: Python Runtime Audit Hooks](https://peps.python.org/pep-0578/), 2018.
