# %% [markdown]
# # 4.1 Tracking and lineage
#
# You will be able to say, for one answer of a service, which prompt, adapter, run, code and tickets it came from, prove that the run can be done again, and keep the record when the server that holds it dies.
#
# **You will measure.** Of twenty recorded training runs {{unreproducible}} cannot be done again from what was recorded. The database alone names {{flagged}} suspects, at the price of a query, and a rerun clears {{cleared}} of them; {{hidden}} more look perfect until they are run again. One of these differs in the last bits only: {{agree_eager}} of its answers are the same, where another seed leaves {{agree_seed}} ({{agree_seed:interval}}). By lineage a contractor's labels can have touched {{touched}} of {{answered}} answers; with the labels put right {{changed}} ({{changed:interval}}) of those change. And when the tracking server dies for a third of a run, three ways to log lose {{lost_direct}}, {{lost_swallow}} and {{lost_outbox}} of 60 losses.
#
# **You need.** Lesson 2.1 (adapters). Files, dictionaries, exceptions and context managers in Python; no MLflow.
#
# **Time.** About 90 minutes, 70 of them for the exercises; the solution runs in {{run:seconds}} s on one CPU core.

# %% [markdown]
# ## Why it matters at work
#
# A customer was told to wait, who should have been called. The question that reaches you is: which model said that, what was it trained on, who else got such answers, and can you build it again without the bad labels? With records this is two queries and a training run. Without, it is a week of asking around, and the honest answer stays "probably".
#
# Tracking tools record what you pass to them. They do not know what you forgot, whether the file is still what it was, and whether the code was committed. A record that nobody ever checked against a rerun is a diary, not evidence.
#
# In interviews: "how do you know which data a model in production was trained on?", "a run cannot be reproduced; how do you find out why?", "how do you version prompts?"

# %% tags=["parameters"]
longest = 10  # steps of the long runs, the short ones take half of them; quick: 2
test_companies = 8  # with eight test tickets each; quick: 1
served_each = 48  # answers that each released adapter gives; quick: 4
seed = 7  # of the other order of the tickets, to which the contractor is compared

# %%
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from unittest import mock

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # what the default does is measured below
os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of a faster kernel that is not installed
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)

import matplotlib.pyplot as plt
import mlflow
import numpy as np
import pandas as pd
from IPython.display import display
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunData, RunInfo, RunTag
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file
from urllib3 import Retry

from labkit import fleet, triage
from labkit.plots import COLOURS, direct_label, use_house_style
from labkit.predict import compare
from labkit.results import ResultCard
from labkit.servers import free_port, process
from labkit.world import LESSON_SEEDS, Ticket

use_house_style()
for name in ("mlflow", "alembic"):
    logging.getLogger(name).setLevel(logging.ERROR)
card = ResultCard("4_1_tracking_and_lineage")

scratch = tempfile.TemporaryDirectory(prefix="lineage-")
root = Path(scratch.name)
MlflowClient(f"sqlite:///{root}/empty.db").search_experiments()  # creates the tables, which takes a second or two


@contextmanager
def fresh_store() -> Iterator[tuple[MlflowClient, str]]:
    """An MLflow store of its own for as long as the block, and an experiment in it."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        shutil.copy(root / "empty.db", folder)
        own = MlflowClient(f"sqlite:///{folder}/empty.db")
        yield own, own.create_experiment("check", artifact_location=f"{folder}/artifacts")


# %% [markdown]
# MLflow keeps its records in a database and its files in a folder or a bucket. The database can be SQLite in this process, as now, or a server that everybody shares, as in the last section; the client's calls are the same.
#
# ## A name for bytes
#
# "Trained on `tickets_v2`" says which folder was *meant*. Names that people give are moved, copied over and corrected in place. A *fingerprint* is a name made of the content: equal content, equal name, on any machine and for ever; one byte more, another name.
#
# For one file that is `hashlib.sha256`. For a folder it takes some care. The order in which a file system lists files, the dates and the place of the folder must not matter. What the files are called must. And the borders must be part of what is hashed: a file `ab` with the content `c`, and a file `a` with the content `bc`, are the same bytes one after the other.
#
# **Exercise.** Write `fingerprint(folder)`: a SHA-256 as 64 lower-case hexadecimal digits.
#
# - It depends on the files in the folder and in its subfolders, at any depth: on each one's path relative to `folder`, written with `/`, and on its bytes. Hidden and empty files are files. Subfolders without a file do not count.
# - It depends on nothing else: not on the order of listing, on dates or permissions, on where the folder lies or what it is called.
# - Folders that differ in a path or in a byte differ in their fingerprint, wherever the borders are. Files may hold any bytes, also `\0` and line breaks, and need not be text.
#
# There are no links. Any construction with these properties is right. *About 6 lines.*
#
# <details><summary>Hint 1</summary>What would an attacker do to a separator? Something that has a fixed length needs none.</details>
# <details><summary>Hint 2</summary>Hash each file first: the SHA-256 of its bytes has a fixed length. Then sort by path and hash the list of pairs, in a form that can be read back, such as JSON. This is what DVC and git do.</details>
# <details><summary>Hint 3</summary><code>folder.rglob("*")</code>, those with <code>is_file()</code>; <code>path.relative_to(folder).as_posix()</code>; a sorted list of [path, digest]; <code>json.dumps(…).encode()</code> into a last sha256.</details>


# %% exercise="fingerprint" difficulty=2 minutes=9
def fingerprint(folder: Path) -> str:
    """Return the SHA-256 of a folder's content: of the relative paths and the bytes of its files."""
    ### BEGIN SOLUTION
    files = [path for path in folder.rglob("*") if path.is_file()]
    pairs = [(path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return hashlib.sha256(json.dumps(sorted(pairs)).encode()).hexdigest()
    ### END SOLUTION


# %% check="fingerprint" points=2
def laid_out(where: Path, files: Mapping[str, bytes]) -> Path:
    """A folder with these files, written in this order."""
    for name, content in files.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_bytes(content)
    return where


with tempfile.TemporaryDirectory(dir=root) as place:
    two = {"a.txt": b"one", "sub/b.txt": b"two"}
    first = laid_out(Path(place) / "first", two)
    got = fingerprint(first)
    assert isinstance(got, str) and re.fullmatch("[0-9a-f]{64}", got), (  # noqa: PT018
        f"A fingerprint is 64 lower-case hexadecimal digits, hashlib.sha256(…).hexdigest(); yours is {got!r}"
    )
    assert fingerprint(first) == got, "The same folder twice must give the same fingerprint"
    copy = laid_out(Path(place) / "elsewhere" / "second", two)
    os.utime(copy / "a.txt", (1, 1))
    (copy / "a.txt").chmod(0o600)
    assert fingerprint(copy) == got, (
        "A copy in another place, of another date and other permissions has the same content and the same fingerprint: use "
        "paths relative to the folder, and no dates"
    )

    class Backwards:
        """What os.scandir gives, the other way round."""

        def __init__(self, found: list) -> None:
            self.found = found

        def __enter__(self) -> Iterator:
            return iter(self.found)

        def __exit__(self, *_: object) -> None:
            pass

        def __iter__(self) -> Iterator:
            return iter(self.found)

        def __next__(self) -> object:
            return self.found.pop(0) if self.found else next(iter(()))

        def close(self) -> None:
            pass

    several = laid_out(Path(place) / "several", {"a": b"1", "b": b"2", "s/a": b"3", "t/a": b"4"})
    listing, scanning = os.listdir, os.scandir
    given = []
    for sign in (False, True):
        with (
            mock.patch("os.listdir", lambda *a, s=sign: sorted(listing(*a), reverse=s)),
            mock.patch(
                "os.scandir", lambda *a, s=sign: Backwards(sorted(scanning(*a), key=lambda e: e.name, reverse=s))
            ),
        ):
            given.append(fingerprint(several))
    assert given[0] == given[1], (
        "Another file system lists files in another order: sort by path before you hash, the whole path and not its last part"
    )
    before = fingerprint(several)
    with mock.patch("builtins.hash", lambda value, own_hash=hash: own_hash(value) ^ 12345):  # as in another process
        later = fingerprint(several)
    assert later == before, "Python's hash() of a text is another one in each process: use hashlib.sha256"
    changed = laid_out(Path(place) / "c1", {**two, "sub/b.txt": b"twO"})
    assert fingerprint(changed) != got, "A byte of a file in a subfolder has changed: go down into subfolders"
    renamed = laid_out(Path(place) / "c2", {"b.txt": b"one", "sub/b.txt": b"two"})
    assert fingerprint(renamed) != got, "a.txt is now called b.txt: the paths are part of the content"
    swapped = laid_out(Path(place) / "c3", {"a.txt": b"two", "sub/b.txt": b"one"})
    assert fingerprint(swapped) != got, "Two files have changed places: each content belongs to its path"
    moved = laid_out(Path(place) / "c4", {"a.txt": b"one", "b.txt": b"two"})
    assert fingerprint(moved) != got, "b.txt has moved out of sub: it is the path that counts, not the file's last name"
    (copy / "a.txt").write_bytes(b"onE")
    assert fingerprint(copy) != got, "A file was changed in place: read the folder in each call and remember nothing"
    ### BEGIN HIDDEN TESTS
    _more = laid_out(Path(place) / "c5", {**two, ".hidden": b"x"})
    assert fingerprint(_more) != got, "A hidden file is a file"
    _empty = laid_out(Path(place) / "c6", {**two, "empty": b""})
    assert fingerprint(_empty) != got, "An empty file is a file: its path is content, too"
    (first / "nothing").mkdir()
    assert fingerprint(first) == got, "A subfolder without a file does not count"
    _bare = Path(place) / "c7"
    _bare.mkdir()
    assert len(fingerprint(_bare)) == 64, "An empty folder has a fingerprint as well"
    for _left, _right, _what in (
        ({"a": b"x" * 3_000_000 + b"1"}, {"a": b"x" * 3_000_000 + b"2"}, "the last byte of a large file"),
        ({"\u00e4": b"x"}, {"\u00f6": b"x"}, "a letter of a path that is not ASCII"),
        ({"Readme": b"x"}, {"README": b"x"}, "capitals in a path"),
        ({"a": b"x \n"}, {"a": b"x"}, "blanks at the end of a file"),
    ):
        _names = [
            fingerprint(laid_out(Path(place) / f"{side}{len(_what)}", files))
            for side, files in (("l", _left), ("r", _right))
        ]
        assert _names[0] != _names[1], f"The same fingerprint for two folders that differ in {_what}"
    _deep = laid_out(Path(place) / "c8", {"x/y/z/deep": b"1"})
    assert fingerprint(_deep) != fingerprint(laid_out(Path(place) / "c9", {"x/y/z/deep": b"2"})), "Go down to any depth"
    ### END HIDDEN TESTS

# %% check="fingerprint" points=1
pairs = (
    ({"ab": b"c"}, {"a": b"bc"}, "a path and the content after it"),
    ({"a": b"1b2"}, {"a": b"1", "b": b"2"}, "one file that holds what another has as a second file"),
    ({"a": b"x\n", "b": b"y"}, {"a": b"x", "b": b"\ny"}, "the content of two neighbours"),
    ({"a": b"x\r\n"}, {"a": b"x\n"}, "the two kinds of line break (read bytes, not text)"),
    ({"a": b"\xff\xfe"}, {"a": b"\xff\xff"}, "bytes that are no text (read bytes, not text)"),
    ({"a": b"x\0b\0y"}, {"a": b"x", "b": b"y"}, "a zero byte in a file, and a border between two (a separator can occur)"),
    ({"a": b"x\nb\ny"}, {"a": b"x", "b": b"y"}, "a line break in a file, and a border between two (a separator can occur)"),
    ({"a": b"xb8yyyyyyyy"}, {"a1": b"x", "b": b"yyyyyyyy"}, "a path with the length after it (lengths in digits need a border, too)"),
    ({"a": b"x", "b": b"x"}, {"a": b"y", "b": b"y"}, "two equal files and two other equal files (they must not cancel)"),
    ({"a": b"x", "b": b"x"}, {"a": b"x"}, "two equal files and one of them (a dictionary keeps one value of a key)"),
    ({"a": b"x", "b": b"x"}, {"b": b"x"}, "two equal files and one of them (a dictionary keeps one value of a key)"),
)  # fmt: skip
with tempfile.TemporaryDirectory(dir=root) as place:
    for number, (left, right, what) in enumerate(pairs):
        folders = [laid_out(Path(place) / f"{side}{number}", files) for side, files in (("l", left), ("r", right))]
        try:
            differ = fingerprint(folders[0]) != fingerprint(folders[1])
        except ValueError as error:
            raise AssertionError(f"A file need not be text: read bytes; yours raised {type(error).__name__}") from error
        assert differ, f"The same fingerprint for {left} and {right}: it does not tell apart {what}"
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(3)
with tempfile.TemporaryDirectory(dir=root) as _place:
    _stream = b"abcab\0ab\nba"
    _seen = {}
    for _n in range(60):
        _cuts = sorted(_rng.choice(np.arange(1, len(_stream)), 3, replace=False))
        _name, _one, _other = (_stream[i:j] for i, j in zip(_cuts, [*_cuts[1:], len(_stream)], strict=True))
        _files = {_one.replace(b"\0", b"0").replace(b"\n", b"n").decode(): _name, f"z{len(_one)}": _other}
        _got = fingerprint(laid_out(Path(_place) / f"f{_n}", _files))
        assert _seen.setdefault(_got, _files) == _files, f"{_files} and {_seen[_got]} have one fingerprint"
### END HIDDEN TESTS


# %% mistake="no borders" of="fingerprint" says="it does not tell apart a path and the content"
def fingerprint(folder):
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


# %% mistake="a separator" of="fingerprint" says="a separator can occur"
def fingerprint(folder):
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


# %% mistake="as the file system lists them" of="fingerprint" says="sort by path before you hash"
def fingerprint(folder):
    pairs = [(p.relative_to(folder).as_posix(), p.read_bytes().hex()) for p in folder.rglob("*") if p.is_file()]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


# %% mistake="absolute paths" of="fingerprint" says="paths relative to the folder"
def fingerprint(folder):
    pairs = sorted((str(p), p.read_bytes().hex()) for p in folder.rglob("*") if p.is_file())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


# %% mistake="the contents only" of="fingerprint" says="the paths are part of the content"
def fingerprint(folder):
    found = sorted(hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file())
    return hashlib.sha256("".join(found).encode()).hexdigest()


# %% mistake="the top level only" of="fingerprint" says="go down into subfolders"
def fingerprint(folder):
    pairs = sorted((p.name, p.read_bytes().hex()) for p in folder.iterdir() if p.is_file())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


# %% mistake="the last part of the path" of="fingerprint" says="it is the path that counts"
def fingerprint(folder):
    pairs = sorted((p.name, p.read_bytes().hex()) for p in folder.rglob("*") if p.is_file())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


# %% mistake="reads text" of="fingerprint" says="read bytes"
def fingerprint(folder):
    pairs = sorted((p.relative_to(folder).as_posix(), p.read_text()) for p in folder.rglob("*") if p.is_file())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


# %% mistake="names and dates, as make does" of="fingerprint" says="no dates"
def fingerprint(folder):
    pairs = sorted(
        (p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime)
        for p in folder.rglob("*")
        if p.is_file()
    )
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


# %% mistake="Python's own hash" of="fingerprint" says="is another one in each process"
def fingerprint(folder):
    pairs = sorted((p.relative_to(folder).as_posix(), p.read_bytes().hex()) for p in folder.rglob("*") if p.is_file())
    return f"{hash(json.dumps(pairs)) % 2**64:064x}"


# %% mistake="sorted by the last part" of="fingerprint" says="the whole path and not its last part"
def fingerprint(folder):
    files = [p for p in sorted(folder.rglob("*"), key=lambda p: p.name) if p.is_file()]
    pairs = [(p.relative_to(folder).as_posix(), p.read_bytes().hex()) for p in files]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


# %% mistake="remembers what it has seen" of="fingerprint" says="remember nothing"
@cache
def fingerprint(folder):
    pairs = sorted((p.relative_to(folder).as_posix(), p.read_bytes().hex()) for p in folder.rglob("*") if p.is_file())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


# %% mistake="lengths in digits" of="fingerprint" says="need a border, too"
def fingerprint(folder):
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()}{len(content)}".encode() + content)
    return digest.hexdigest()


# %% mistake="a dictionary by content" of="fingerprint" says="a dictionary keeps one value of a key"
def fingerprint(folder):
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    found = {p.read_bytes().hex(): p.relative_to(folder).as_posix() for p in paths}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


# %% mistake="the first megabyte" of="fingerprint" says="the last byte of a large file"
def fingerprint(folder):
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as content:
                found.append((path.relative_to(folder).as_posix(), content.read(2**20).hex()))
    return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()


# %% alternative="a tree, as git keeps it" of="fingerprint"
def fingerprint(folder):
    def tree(where):
        found = {}
        for entry in os.scandir(where):
            part = tree(entry.path) if entry.is_dir() else hashlib.sha256(Path(entry.path).read_bytes()).hexdigest()
            if part:
                found[entry.name] = part
        return found

    return hashlib.sha256(json.dumps(tree(folder), sort_keys=True).encode()).hexdigest()


# %% alternative="lengths before the parts" of="fingerprint"
def fingerprint(folder):
    digest = hashlib.sha256()
    found = []
    for where, _, names in os.walk(folder):
        found += [os.path.relpath(os.path.join(where, name), folder).replace(os.sep, "/") for name in names]
    for name in sorted(found):
        for part in (name.encode(), (Path(folder) / name).read_bytes()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


# %% alternative="a dictionary with sorted keys" of="fingerprint"
def fingerprint(folder):
    content = {
        str(p.relative_to(folder).as_posix()): p.read_bytes().hex() for p in Path(folder).glob("**/*") if p.is_file()
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# %% [markdown]
# MLflow has a fingerprint of its own: a data set that is logged as an input gets a *digest*. Put both to the test, with a training file of 12,000 tickets and six things that happen to training files. Four of them change the content.

# %%
flat = [{"id": t.id, "text": t.text, **json.loads(t.triage.to_json())} for t in fleet.tickets(LESSON_SEEDS[400:412])]
many = [{**flat[i % len(flat)], "id": f"t{i}"} for i in range(12_000)]


def names_of(content: list[dict], where: Path) -> tuple[str, str]:
    """MLflow's digest and your fingerprint of a training file."""
    where.mkdir()
    (where / "tickets.jsonl").write_text("\n".join(map(json.dumps, content)), encoding="utf-8")
    frame = pd.read_json(where / "tickets.jsonl", lines=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how MLflow guesses a schema
        return mlflow.data.from_pandas(frame.astype(object).where(frame.notna(), None)).digest, fingerprint(where)


def edited(place: int, **values: object) -> list[dict]:
    return [{**row, **values} if i == place else row for i, row in enumerate(many)]


happened = {
    "copied to another folder": (many, False),
    "saved again, unchanged": (list(many), False),
    "ticket 5: another category": (edited(5, category="setup" if many[5]["category"] != "setup" else "billing"), True),
    "tickets 1 and 2 change places": ([many[0], many[2], many[1], *many[3:]], True),
    "ticket 5: another product": (edited(5, product="Nobody's lamp"), True),
    "ticket 11,000: another category": (edited(11_000, category="setup" if many[11_000]["category"] != "setup" else "billing"), True),
}  # fmt: skip
with tempfile.TemporaryDirectory(dir=root) as place:
    before = names_of(many, Path(place) / "before")
    table = []
    for number, (what, (content, differs)) in enumerate(happened.items()):
        after = names_of(content, Path(place) / f"{number}")
        table.append((what, differs, *(a != b for a, b in zip(after, before, strict=True))))
table = pd.DataFrame(table, columns=["what happened", "content differs", "MLflow's digest differs", "yours differs"])
display(table.style.hide(axis="index").format({name: lambda v: "yes" if v else "no" for name in table.columns[1:]}))
missed = int((table["content differs"] & ~table["MLflow's digest differs"]).sum())
card.record("digest_missed", missed, format="d", label="of four changes to a training file, those that MLflow's digest does not see")  # fmt: skip

# %% [markdown]
# MLflow's digest does not see {{digest_missed}} of the four. Its source says why (`mlflow/data/digest_utils.py`): it reads the first 10,000 rows, and only columns that are numbers or text throughout. Tickets without a product have `null` there, so the column of products, a label that you train on, is not part of the digest. It is eight hexadecimal digits long, too. None of this is a bug: it is a quick label for a table in a user interface, and people take it for evidence.
#
# So here every input of a run lies in a *content store*: a folder `store/<fingerprint>/`, written once and never changed. git, DVC and container registries work like this.


# %%
store = root / "store"


def put(folder: Path) -> str:
    """Copy a folder into the content store, and return its fingerprint."""
    found = fingerprint(folder)
    if not (store / found).exists():
        shutil.copytree(folder, store / found)
    return found


desk = root / "shared"  # the folders that the three share, with names that people gave
for name, companies in fleet.COMPANIES.items():
    fleet.write_data(desk / name, fleet.tickets([LESSON_SEEDS[i] for i in companies]))
for name in fleet.PREPARE:
    fleet.write_code(desk / name, name)
stored = {name: put(desk / name) for name in [*fleet.COMPANIES, "c1", "c2", "c3"]}
print(pd.Series(stored).str[:12].to_string())
print()
print((desk / "c3" / "prepare.py").read_text())

# %% [markdown]
# One warning before you fingerprint adapters. `peft` keeps the names of the adapted layers as a Python *set*, and writes it to `adapter_config.json` in the order of the set; together with the absolute path of the base model. The order depends on the hash of strings, which Python draws anew for each process:

# %%
program = "print(*{'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'})"
orders = {
    subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={**os.environ, "PYTHONHASHSEED": str(number)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for number in range(1, 11)
}
print(f"ten processes write one set of seven names in {len(orders)} orders")

# %% [markdown]
# So the same training twice can give folders of different bytes whose weights are equal. Decide what the content *is*. Here it is the weights: a run's output folder holds them beside a copy of the parent's configuration, which does not vary.
#
# ## What a run must leave behind
#
# Our scene: three people, Ana, Ben and Chi, train adapters for a fortnight. Each run starts from the triage adapter of the assistant and teaches a new rule of the desk (an urgent ticket is called back) from a folder of tickets, with a folder of code that prepares them and four settings. Twenty runs, a second each.
#
# A run in MLflow has *parameters* (text, written once), *metrics* (numbers with a step and a time), *tags* (text that may be changed), *artefacts* (files) and a *status*. The client has `create_run(experiment_id)`, whose result's `info.run_id` is the name of the run, and then `log_param(run_id, key, value)`, `log_metric(run_id, key, value, step=…)`, `set_tag(run_id, key, value)`, `log_artifacts(run_id, folder, "where")`, `set_terminated(run_id, status)`.
#
# When you write what matters as much as what. Whatever a run was given is recorded *before* it starts: a run that crashes is the one that you want to read about, and a file may be written over while you train.
#
# **Exercise.** Write `record(client, experiment_id, params, inputs, train, name)`, which does a run and returns its run id.
#
# - First it creates the run, logs each of `params` (a mapping), and sets for each of `inputs` (a mapping from a key to a folder) the tag of that key to `name(folder)`; `name` is a fingerprint.
# - Then it calls `train(log)` once. `train` calls `log(step, loss)` as it goes along: record the metric `"loss"` of that step at once. It returns a folder.
# - Then it logs all files of that folder as artefacts under the path `"adapter"`, sets the tag `"adapter"` to `name` of the folder, and ends the run with the status `"FINISHED"`.
# - If `train` raises anything, `KeyboardInterrupt` included, the run ends with the status `"FAILED"` and a tag `"error"` with the name of the exception's class, and the exception goes on to the caller.
#
# *About 15 lines.*
#
# <details><summary>Hint 1</summary>Which of your lines have run when train crashes in its third step? Which line must run in any case, and what must it not keep from the caller?</details>
# <details><summary>Hint 2</summary>KeyboardInterrupt is a BaseException and no Exception. A bare <code>raise</code> in the except block hands on what was caught.</details>
# <details><summary>Hint 3</summary>create_run; two loops; <code>try: folder = train(lambda step, loss: client.log_metric(run_id, "loss", loss, step=step))</code>; <code>except BaseException as error:</code> set_tag, set_terminated(run_id, "FAILED"), raise; then log_artifacts, set_tag, set_terminated(run_id, "FINISHED").</details>


# %% exercise="record" difficulty=2 minutes=9
def record(
    client: MlflowClient,
    experiment_id: str,
    params: Mapping[str, object],
    inputs: Mapping[str, Path],
    train: Callable[[Callable[[int, float], object]], Path],
    name: Callable[[Path], str],
) -> str:
    """Do a training run under MLflow's eyes and return its run id."""
    ### BEGIN SOLUTION
    run_id = client.create_run(experiment_id).info.run_id
    for key, value in params.items():
        client.log_param(run_id, key, value)
    for key, folder in inputs.items():
        client.set_tag(run_id, key, name(folder))
    try:
        out = train(lambda step, loss: client.log_metric(run_id, "loss", loss, step=step))
    except BaseException as error:
        client.set_tag(run_id, "error", type(error).__name__)
        client.set_terminated(run_id, "FAILED")
        raise
    client.log_artifacts(run_id, str(out), "adapter")
    client.set_tag(run_id, "adapter", name(out))
    client.set_terminated(run_id, "FINISHED")
    return run_id
    ### END SOLUTION


# %% check="record" points=2
plain_name = lambda folder: "+".join(f"{p.name}:{p.read_text()}" for p in sorted(folder.iterdir()))
with fresh_store() as (own, experiment), tempfile.TemporaryDirectory(dir=root) as place:
    data = laid_out(Path(place) / "data", {"t": b"old"})
    code = laid_out(Path(place) / "code", {"p": b"x"})
    during: list[dict] = []

    def train(log: Callable[[int, float], object]) -> Path:
        (data / "t").write_text("new")  # somebody writes over the file while the run goes on
        for step, loss in ((0, 2.0), (1, 1.5), (2, 1.75)):
            log(step, loss)
            there = own.search_runs([experiment])
            assert len(there) == 1, (
                f"While training goes on, the experiment has {len(there)} runs: create one, by create_run(experiment_id), "
                "before you train"
            )
            (run,) = there
            during.append({"params": run.data.params, "loss": run.data.metrics.get("loss")})
        return laid_out(Path(place) / "out", {"w": b"weights", "c": b"config"})

    got = record(own, experiment, {"seed": 0, "rate": 1e-3}, {"data": data, "code": code}, train, plain_name)
    runs = own.search_runs([experiment])
    assert len(runs) == 1, f"One call is one run; there are {len(runs)}"
    (run,) = runs
    assert got == run.info.run_id, f"Return the run id, run.info.run_id; yours is {got!r}"
    assert run.data.params == {"seed": "0", "rate": "0.001"}, f"Log each of params; there is {run.data.params}"
    assert run.info.status == "FINISHED", f"The status at the end is FINISHED; yours is {run.info.status}"
    assert during[0]["params"], (
        "No parameter was recorded when training began: log what a run was given before it starts"
    )
    assert during[0]["loss"] == 2.0, (
        "The first loss was not in the store after its step: record it at once, not at the end"
    )
    history = [(m.step, m.value) for m in own.get_metric_history(got, "loss")]
    assert history == [(0, 2.0), (1, 1.5), (2, 1.75)], (
        f"A loss belongs to its step: pass step=step; yours are {history}"
    )
    assert run.data.tags.get("data") == "t:old", (
        f"The tag data names what the run was given, 't:old', and not what lies there after it: take the names before "
        f"training; yours is {run.data.tags.get('data')!r}"
    )
    assert run.data.tags.get("code") == "p:x", (
        f"The tag code is name(folder), 'p:x'; yours is {run.data.tags.get('code')!r}"
    )
    assert run.data.tags.get("adapter") == "c:config+w:weights", (
        f"The tag adapter is the name of the folder that train returned; yours is {run.data.tags.get('adapter')!r}"
    )
    kept = sorted(file.path for file in own.list_artifacts(got, "adapter"))
    assert kept == ["adapter/c", "adapter/w"], f"All files of the folder lie under 'adapter'; there is {kept}"
    ### BEGIN HIDDEN TESTS
    _calls = []

    def _train(log: Callable[[int, float], object]) -> Path:
        _calls.append(1)
        log(5, 0.25)
        return laid_out(Path(place) / "out2", {"only": b"1", "below/deep": b"2"})

    def _name(folder: Path) -> str:
        if folder.name == "out2":
            _statuses.extend(run.info.status for run in own.search_runs([experiment], max_results=1))
        return f"the {folder.name}"

    _statuses = []
    _got = record(own, experiment, {}, {"parent": code}, _train, _name)
    _run = own.get_run(_got)
    assert (len(_calls), _run.data.params, _run.data.tags.get("parent")) == (1, {}, "the code"), (
        "Any keys, no parameters"
    )
    assert _run.data.tags.get("adapter") == "the out2", "The adapter's name is name(folder), whatever name is"
    assert {file.path for file in own.list_artifacts(_got, "adapter/below")} == {"adapter/below/deep"}, (
        "All files of the folder are logged, those in subfolders as well: log_artifacts"
    )
    assert set(_statuses) == {"RUNNING"}, "A run ends when all of it is recorded, and not before"
    assert [(m.step, m.value) for m in own.get_metric_history(_got, "loss")] == [(5, 0.25)], (
        "The step is what log is told"
    )
    ### END HIDDEN TESTS

# %% check="record" points=2
with fresh_store() as (own, experiment), tempfile.TemporaryDirectory(dir=root) as place:
    data = laid_out(Path(place) / "data", {"t": b"old"})
    for error in (ZeroDivisionError("of the loss"), KeyboardInterrupt()):

        def broken(log: Callable[[int, float], object], error: BaseException = error) -> Path:
            log(0, 2.0)
            raise error

        try:
            record(own, experiment, {"seed": 3}, {"data": data}, broken, plain_name)
            passed_on = False
        except type(error):
            passed_on = True
        except BaseException as other:
            raise AssertionError(f"train raised {type(error).__name__}; yours raised {type(other).__name__}") from other
        word = type(error).__name__
        assert passed_on, f"{word} must go on to the caller, who would take the run for a good one: raise it again"
        run = own.search_runs([experiment], max_results=1)[0]
        assert run.info.status != "RUNNING", (
            f"{word} in training leaves a run that is RUNNING for ever: end it as FAILED, also when somebody interrupts it "
            "(catch BaseException)"
        )
        assert run.info.status == "FAILED", f"A run that raised is FAILED; yours is {run.info.status}"
        assert run.data.tags.get("error") == word, f"The tag error is {word!r}; yours is {run.data.tags.get('error')!r}"
        left = (run.data.params, run.data.tags.get("data"), run.data.metrics)
        assert left == ({"seed": "3"}, "t:old", {"loss": 2.0}), (
            f"A crash must not cost what came before it; left is {left}"
        )
        assert "adapter" not in run.data.tags, "A failed run has no adapter"
### BEGIN HIDDEN TESTS
with fresh_store() as (_own, _experiment):

    def _at_once(log: Callable[[int, float], object]) -> Path:
        raise SystemExit(2)

    with suppress(SystemExit):
        record(_own, _experiment, {"a": 1}, {}, _at_once, plain_name)
    _run = _own.search_runs([_experiment])[0]
    assert (_run.info.status, _run.data.tags.get("error")) == ("FAILED", "SystemExit"), "Whatever train raises"
### END HIDDEN TESTS


# %% mistake="a crash leaves it running" of="record" says="leaves a run that is RUNNING for ever"
def record(client, experiment_id, params, inputs, train, name):
    run_id = client.create_run(experiment_id).info.run_id
    for key, value in params.items():
        client.log_param(run_id, key, value)
    for key, folder in inputs.items():
        client.set_tag(run_id, key, name(folder))
    out = train(lambda step, loss: client.log_metric(run_id, "loss", loss, step=step))
    client.log_artifacts(run_id, str(out), "adapter")
    client.set_tag(run_id, "adapter", name(out))
    client.set_terminated(run_id, "FINISHED")
    return run_id


# %% mistake="an interrupt leaves it running" of="record" says="also when somebody interrupts it"
def record(client, experiment_id, params, inputs, train, name):
    run_id = client.create_run(experiment_id).info.run_id
    for key, value in params.items():
        client.log_param(run_id, key, value)
    for key, folder in inputs.items():
        client.set_tag(run_id, key, name(folder))
    try:
        out = train(lambda step, loss: client.log_metric(run_id, "loss", loss, step=step))
    except Exception as error:
        client.set_tag(run_id, "error", type(error).__name__)
        client.set_terminated(run_id, "FAILED")
        raise
    client.log_artifacts(run_id, str(out), "adapter")
    client.set_tag(run_id, "adapter", name(out))
    client.set_terminated(run_id)
    return run_id


# %% mistake="keeps the error to itself" of="record" says="must go on to the caller"
def record(client, experiment_id, params, inputs, train, name):
    run_id = client.create_run(experiment_id).info.run_id
    for key, value in params.items():
        client.log_param(run_id, key, value)
    for key, folder in inputs.items():
        client.set_tag(run_id, key, name(folder))
    try:
        out = train(lambda step, loss: client.log_metric(run_id, "loss", loss, step=step))
        client.log_artifacts(run_id, str(out), "adapter")
        client.set_tag(run_id, "adapter", name(out))
        client.set_terminated(run_id, "FINISHED")
    except BaseException as error:
        client.set_tag(run_id, "error", type(error).__name__)
        client.set_terminated(run_id, "FAILED")
    return run_id


# %% mistake="writes everything at the end" of="record" says="log what a run was given before it starts"
def record(client, experiment_id, params, inputs, train, name):
    losses = []
    names = {key: name(folder) for key, folder in inputs.items()}
    run_id = client.create_run(experiment_id).info.run_id
    try:
        out = train(lambda step, loss: losses.append((step, loss)))
    except BaseException as error:
        client.set_tag(run_id, "error", type(error).__name__)
        client.set_terminated(run_id, "FAILED")
        raise
    for key, value in params.items():
        client.log_param(run_id, key, value)
    for key, value in names.items():
        client.set_tag(run_id, key, value)
    for step, loss in losses:
        client.log_metric(run_id, "loss", loss, step=step)
    client.log_artifacts(run_id, str(out), "adapter")
    client.set_tag(run_id, "adapter", name(out))
    client.set_terminated(run_id, "FINISHED")
    return run_id


# %% mistake="names the inputs after training" of="record" says="take the names before training"
def record(client, experiment_id, params, inputs, train, name):
    run_id = client.create_run(experiment_id).info.run_id
    for key, value in params.items():
        client.log_param(run_id, key, value)
    try:
        out = train(lambda step, loss: client.log_metric(run_id, "loss", loss, step=step))
    except BaseException as error:
        client.set_tag(run_id, "error", type(error).__name__)
        client.set_terminated(run_id, "FAILED")
        raise
    for key, folder in {**inputs, "adapter": out}.items():
        client.set_tag(run_id, key, name(folder))
    client.log_artifacts(run_id, str(out), "adapter")
    client.set_terminated(run_id, "FINISHED")
    return run_id


# %% mistake="all losses at step 0" of="record" says="pass step=step"
def record(client, experiment_id, params, inputs, train, name):
    run_id = client.create_run(experiment_id).info.run_id
    for key, value in params.items():
        client.log_param(run_id, key, value)
    for key, folder in inputs.items():
        client.set_tag(run_id, key, name(folder))
    try:
        out = train(lambda step, loss: client.log_metric(run_id, "loss", loss))
    except BaseException as error:
        client.set_tag(run_id, "error", type(error).__name__)
        client.set_terminated(run_id, "FAILED")
        raise
    client.log_artifacts(run_id, str(out), "adapter")
    client.set_tag(run_id, "adapter", name(out))
    client.set_terminated(run_id, "FINISHED")
    return run_id


# %% mistake="ends every run as finished" of="record" says="A run that raised is FAILED"
def record(client, experiment_id, params, inputs, train, name):
    run_id = client.create_run(experiment_id).info.run_id
    for key, value in params.items():
        client.log_param(run_id, key, value)
    for key, folder in inputs.items():
        client.set_tag(run_id, key, name(folder))
    try:
        out = train(lambda step, loss: client.log_metric(run_id, "loss", loss, step=step))
        client.log_artifacts(run_id, str(out), "adapter")
        client.set_tag(run_id, "adapter", name(out))
    finally:
        client.set_terminated(run_id, "FINISHED")
    return run_id


# %% mistake="creates the run after training" of="record" says="before you train"
def record(client, experiment_id, params, inputs, train, name):
    losses = []
    names = {key: name(folder) for key, folder in inputs.items()}
    folder = train(lambda step, loss: losses.append((step, loss)))
    run_id = client.create_run(experiment_id, tags=names).info.run_id
    for key, value in params.items():
        client.log_param(run_id, key, value)
    for step, loss in losses:
        client.log_metric(run_id, "loss", loss, step=step)
    client.log_artifacts(run_id, str(folder), "adapter")
    client.set_tag(run_id, "adapter", name(folder))
    client.set_terminated(run_id, "FINISHED")
    return run_id


# %% mistake="file by file, the top level only" of="record" says="those in subfolders as well"
def record(client, experiment_id, params, inputs, train, name):
    run_id = client.create_run(experiment_id, tags={key: name(folder) for key, folder in inputs.items()}).info.run_id
    for key, value in params.items():
        client.log_param(run_id, key, value)
    try:
        folder = train(lambda step, loss: client.log_metric(run_id, "loss", loss, step=step))
    except BaseException as error:
        client.set_tag(run_id, "error", type(error).__name__)
        client.set_terminated(run_id, "FAILED")
        raise
    for file in folder.iterdir():
        if file.is_file():
            client.log_artifact(run_id, str(file), "adapter")
    client.set_tag(run_id, "adapter", name(folder))
    client.set_terminated(run_id, "FINISHED")
    return run_id


# %% mistake="finished before its adapter is there" of="record" says="A run ends when all of it is recorded"
def record(client, experiment_id, params, inputs, train, name):
    run_id = client.create_run(experiment_id, tags={key: name(folder) for key, folder in inputs.items()}).info.run_id
    for key, value in params.items():
        client.log_param(run_id, key, value)
    status = "FAILED"
    try:
        folder = train(lambda step, loss: client.log_metric(run_id, "loss", loss, step=step))
        status = "FINISHED"
    except BaseException as error:
        client.set_tag(run_id, "error", type(error).__name__)
        raise
    finally:
        client.set_terminated(run_id, status)
    client.log_artifacts(run_id, str(folder), "adapter")
    client.set_tag(run_id, "adapter", name(folder))
    return run_id


# %% alternative="batches, and a finally" of="record"
def record(client, experiment_id, params, inputs, train, name):
    run = client.create_run(experiment_id, tags={key: name(folder) for key, folder in inputs.items()})
    own = run.info.run_id
    client.log_batch(own, params=[Param(key, str(value)) for key, value in params.items()])
    status = "FAILED"
    try:
        out = train(lambda step, loss: client.log_batch(own, [Metric("loss", loss, int(time.time() * 1000), step)]))
        for file in out.iterdir():
            client.log_artifact(own, str(file), "adapter")
        client.set_tag(own, "adapter", name(out))
        status = "FINISHED"
    except BaseException as error:
        client.set_tag(own, "error", type(error).__name__)
        raise
    finally:
        client.set_terminated(own, status)
    return own


# %% [markdown]
# Now the fortnight, with your `record`. What each author passed to it is what you have to go by. What they did not pass, and what happened to their files afterwards, happens here out of your sight (it stands in `labkit/fleet.py`; look when you are through). Each adapter is scored on the same test tickets.

# %%
tracking = MlflowClient(f"sqlite:///{shutil.copy(root / 'empty.db', root / 'tracking.db')}")
fortnight = tracking.create_experiment("fortnight", artifact_location=str(root / "artifacts"))
test = fleet.tickets([LESSON_SEEDS[430 + i] for i in range(test_companies)], 8)
replies: dict[str, list[str]] = {}  # of each run's adapter, to the test tickets


def scaled(settings: Mapping[str, float]) -> dict[str, float]:
    """The settings with the number of steps that this notebook's parameter asks for."""
    return {key: max(1, round(value * longest / 16)) if key == "steps" else value for key, value in settings.items()}


def adapter_of(run_id: str) -> Path:
    """Where a run's adapter lies."""
    return Path(tracking.get_run(run_id).info.artifact_uri.removeprefix("file://")) / "adapter"


def exact(texts: Sequence[str]) -> np.ndarray:
    return triage.score(texts, test).exact


for number, job in enumerate(fleet.JOBS):
    fleet.lay_out(job, desk)
    inputs = {"data": desk / job.data, "code": desk / job.code}
    work = partial(
        fleet.train, *inputs.values(), root / "out" / f"{number}", scaled(job.settings), attention=job.attention
    )
    run_id = record(tracking, fortnight, scaled(job.recorded), inputs, work, fingerprint)
    tracking.set_tag(run_id, "mlflow.user", job.author)
    tracking.set_tag(run_id, "mlflow.runName", f"run {number:02d}")
    replies[run_id] = fleet.answers(adapter_of(run_id), test)
    tracking.log_metric(run_id, "exact", float(exact(replies[run_id]).mean()))
    fleet.happens_to(job, desk, adapter_of(run_id))

runs = tracking.search_runs([fortnight], order_by=["attributes.start_time"])
mlflow.set_tracking_uri(f"sqlite:///{root}/tracking.db")
page = mlflow.search_runs([fortnight], order_by=["attributes.start_time"])
columns = {
    "tags.mlflow.runName": "run",
    "tags.mlflow.user": "author",
    "tags.data": "data",
    "tags.code": "code",
    **{f"params.{key}": key for key in fleet.REQUIRED},
    "metrics.loss": "loss",
    "metrics.exact": "exact match",
    "tags.adapter": "adapter",
}
shown = page[list(columns)].rename(columns=columns)
for key in ("data", "code", "adapter"):
    shown[key] = shown[key].str[:8]
display(shown.style.hide(axis="index").format({"loss": "{:.3f}", "exact match": "{:.0%}"}, na_rep="-"))

# %% [markdown]
# This is `mlflow.search_runs`, the same table that MLflow's web page shows. Two habits for reading it. Parameters are *text*: a filter on them knows `=` and `LIKE`, not `<`, and sorting by `steps` puts 10 before 5. And the one value of a metric that stands in the table is the one of the largest step, whenever it was written; it is neither the best nor the last that you logged.
#
# "Which data and code made this adapter?" An adapter is found on a machine somewhere, under a name that says nothing. Its bytes are its name:

# %%
found = root / "out" / "14"  # somebody's folder final_v2_really
(maker,) = tracking.search_runs([fortnight], filter_string=f"tags.adapter = '{fingerprint(found)}'")
print("made by", maker.data.tags["mlflow.user"], "in", maker.info.run_name, "with", maker.data.params)
for key in ("data", "code"):
    known = [name for name, held in stored.items() if held == maker.data.tags[key]]
    print(key, maker.data.tags[key][:12], "which people call", *known)

# %% [markdown]
# ## Which of these runs can be done again?
#
# A run is *reproducible* if its recorded inputs, run again, give its recorded output. Fingerprints make that a comparison of two strings. A rerun costs what the run did, so first ask what the database gives away for nothing:
#
# - What was never recorded, or is not in the content store, cannot be used again.
# - An adapter whose bytes are not those that its run recorded is somebody else's.
# - Two runs with the same inputs are a rerun that somebody has already paid for. If their outputs differ, something that nobody recorded differs: at most one of the outputs is what these inputs give.
#
# **Exercise.** Write `audit(runs, held, actual, required)`, which returns a dictionary from each run's id to a verdict.
#
# - `runs` is a list of MLflow's `Run`: `run.info.run_id`, `run.info.status`, and the dictionaries `run.data.params` (text to text) and `run.data.tags`. `held` is the set of fingerprints in the content store; `actual` maps a run's id to the fingerprint of the adapter that lies there now; `required` are the parameters that a run needs.
#
# The verdict is the first that applies:
#
# | verdict | the run |
# |---|---|
# | `"unfinished"` | does not have the status `"FINISHED"` |
# | `"incomplete"` | lacks a required parameter, or one of the tags `"data"`, `"code"`, `"adapter"` |
# | `"lost"` | has data or code whose fingerprint is not held |
# | `"changed"` | has an adapter that is not the recorded one, or none (its id is not in `actual`) |
# | `"contradicted"` | has a twin that recorded another adapter |
# | `"replicated"` | has a twin (and all recorded the same adapter) |
# | `"untested"` | is left |
#
# Twins are runs that pass the first four lines and agree in data, code and all *required* parameters; parameters that are not required play no part. Parameters are text, and `"0.001"`, `"1e-3"` and `"1E-03"` are one learning rate: two values that both read as a `float` are compared as numbers. If one of three twins contradicts the other two, all three are contradicted: the database does not know who is right.
#
# *About 20 lines.*
#
# <details><summary>Hint 1</summary>Two passes: one that looks at each run alone, one that groups what is left by its inputs.</details>
# <details><summary>Hint 2</summary>A key for the groups: (data, code, *(number(params[name]) for name in required)), with a function number that tries float and falls back to the text. For each key collect the set of adapters and count the runs.</details>
# <details><summary>Hint 3</summary>len(adapters) &gt; 1 is "contradicted"; otherwise two or more runs are "replicated", one is "untested".</details>


# %% exercise="audit" difficulty=3 minutes=13
def audit(runs: Sequence[Run], held: set[str], actual: Mapping[str, str], required: Sequence[str]) -> dict[str, str]:
    """Return what the records alone say about each run."""

    ### BEGIN SOLUTION
    def number(text: str) -> float | str:
        try:
            return float(text)
        except ValueError:
            return text

    verdicts: dict[str, str] = {}
    twins: dict[tuple, list[Run]] = {}
    for run in runs:
        tags, params = run.data.tags, run.data.params
        if run.info.status != "FINISHED":
            verdict = "unfinished"
        elif not (set(required) <= set(params) and {"data", "code", "adapter"} <= set(tags)):
            verdict = "incomplete"
        elif not {tags["data"], tags["code"]} <= held:
            verdict = "lost"
        elif actual.get(run.info.run_id) != tags["adapter"]:
            verdict = "changed"
        else:
            verdict = "untested"
            key = (tags["data"], tags["code"], *(number(params[name]) for name in required))
            twins.setdefault(key, []).append(run)
        verdicts[run.info.run_id] = verdict
    for group in twins.values():
        if len(group) > 1:
            same = len({run.data.tags["adapter"] for run in group}) == 1
            verdicts.update({run.info.run_id: "replicated" if same else "contradicted" for run in group})
    return verdicts
    ### END SOLUTION


# %% check="audit" points=2
def logged(key: str, adapter: str | None = "A", status: str = "FINISHED", data: str | None = "D", code: str | None = "C", **params: str) -> Run:  # fmt: skip
    """A run as the client would return it, with the parameters a and b unless they are given (None leaves one out)."""
    tags = {"data": data, "code": code, "adapter": adapter}
    params = {"a": "1", "b": "x", **params}
    return Run(
        RunInfo(key, "0", "ana", status, 0, 1, "active"),
        RunData(
            params=[Param(k, v) for k, v in params.items() if v is not None],
            tags=[RunTag(k, v) for k, v in tags.items() if v is not None],
        ),
    )


def verdict_of(*given: Run, actual: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """The learner's audit; every adapter is what was recorded unless `actual` says otherwise (None: there is none)."""
    lies = {run.info.run_id: run.data.tags.get("adapter", "") for run in given} | dict(actual or {})
    lies = {key: adapter for key, adapter in lies.items() if adapter is not None}
    try:
        got = audit(list(given), {"D", "C", "D2"}, lies, ("a", "b"))
    except KeyError as error:
        raise AssertionError(
            f"A run may lack any parameter, tag or adapter: look before you take; yours raised KeyError: {error}"
        ) from error
    assert isinstance(got, dict), f"Return a dictionary from run id to verdict; yours is a {type(got).__name__}"
    assert set(got) == {run.info.run_id for run in given}, (
        f"Every run gets a verdict; yours has {sorted(got)} of {sorted(run.info.run_id for run in given)}"
    )
    return got


got = verdict_of(
    logged("good"),
    logged("crashed", None, "FAILED"),
    logged("killed", "B", "KILLED"),
    logged("running", "B", "RUNNING"),
    logged("seedless", a=None),
)
assert got["crashed"] == "unfinished", (
    f"A failed run promised nothing: it is unfinished, before all else; yours is {got['crashed']!r}"
)
for status in ("killed", "running"):
    assert got[status] == "unfinished", (
        f"Every status but FINISHED is unfinished; yours for {status.upper()} is {got[status]!r}"
    )
assert got["seedless"] == "incomplete", f"Parameter a was never recorded: incomplete; yours is {got['seedless']!r}"
assert got["good"] == "untested", (
    f"'good' agrees with no other run that passes: a run that crashed or lacks a parameter is no twin; yours is {got['good']!r}"
)
got = verdict_of(logged("no data", data=None), logged("no adapter", None), logged("ok", b="y"))
assert got["no data"] == "incomplete", f"A run without the tag data is incomplete; yours is {got['no data']!r}"
assert got["no adapter"] == "incomplete", (
    f"A finished run without the tag adapter is incomplete; yours is {got['no adapter']!r}"
)
got = verdict_of(logged("moved", data="gone"), logged("dirty", code="edited"), logged("ok"))
assert got["moved"] == "lost", f"Its data is not in the content store: lost; yours is {got['moved']!r}"
assert got["dirty"] == "lost", (
    f"Its code is not in the content store, it was never put there: lost; yours is {got['dirty']!r}"
)
got = verdict_of(logged("one", data="gone"), logged("two", "B", data="gone"))
assert got == {"one": "lost", "two": "lost"}, f"Both have lost their data, and a lost run is no twin; yours are {got}"
got = verdict_of(logged("over"), logged("fine", b="y"), logged("gone", b="z"), actual={"over": "B", "gone": None})
assert got["over"] == "changed", f"Its adapter is now B, and A was recorded: changed; yours is {got['over']!r}"
assert got["gone"] == "changed", (
    f"No adapter lies there, its id is not in actual, and A was recorded: changed; yours is {got['gone']!r}"
)
assert got["fine"] == "untested", f"Nothing speaks for or against this run: untested; yours is {got['fine']!r}"
### BEGIN HIDDEN TESTS
assert audit([], {"D"}, {}, ("a",)) == {}, "No runs, no verdicts"
assert audit([logged("r", a=None)], {"D", "C"}, {"r": "A"}, ("b",)) == {"r": "untested"}, (
    "Only required parameters count"
)
assert audit([logged("r", a=None, data="gone")], {"C"}, {"r": "Z"}, ("a",)) == {"r": "incomplete"}, (
    "The first that applies"
)
assert audit([logged("r", data="gone")], {"C"}, {"r": "Z"}, ("a",)) == {"r": "lost"}, "The first that applies"
assert audit([logged("r", a="", b="")], {"C", "D"}, {"r": "A"}, ("a", "b")) == {"r": "untested"}, (
    "An empty text is a value"
)
### END HIDDEN TESTS

# %% check="audit" points=2
got = verdict_of(logged("one"), logged("two"), logged("other", b="y"))
assert (got["one"], got["two"]) == ("replicated", "replicated"), (
    f"Same inputs and same adapter, twice: both are replicated; yours are {got['one']!r} and {got['two']!r}"
)
assert got["other"] == "untested", f"Another b is another input: 'other' has no twin; yours is {got['other']!r}"
got = verdict_of(logged("one", "A"), logged("two", "B"))
assert set(got.values()) == {"contradicted"}, f"Same inputs, two adapters: both are contradicted; yours are {got}"
got = verdict_of(logged("one", "A"), logged("two", "A"), logged("three", "B"))
assert set(got.values()) == {"contradicted"}, (
    f"Two against one proves nothing, all three are contradicted: the two may share the same mistake; yours are {got}"
)
got = verdict_of(logged("long", "A", a="0.001"), logged("short", "B", a="1e-3"), logged("text", "C", b="1e-3x"))
assert (got["long"], got["short"]) == ("contradicted", "contradicted"), (
    "Parameters are text: '0.001' and '1e-3' are one number, so these two are twins; compare what reads as a float as a "
    f"number; yours are {got['long']!r} and {got['short']!r}"
)
got = verdict_of(logged("one", "A", host="ana's"), logged("two", "B", host="ben's"))
assert set(got.values()) == {"contradicted"}, (
    f"host is not required: it must not keep twins apart, or no two runs of two people are ever compared; yours are {got}"
)
got = verdict_of(logged("one", "A", a="1", b="2"), logged("two", "B", a="2", b="1"))
assert set(got.values()) == {"untested"}, (
    f"a = 1 and b = 2 are other inputs than a = 2 and b = 1: each value belongs to its parameter; yours are {got}"
)
got = verdict_of(logged("one", "A"), logged("two", "A", data="D2"))
assert set(got.values()) == {"untested"}, f"Other data, the same adapter: they are no twins; yours are {got}"
got = verdict_of(logged("one", "A"), logged("two", "B"), actual={"two": "A"})
assert got == {"one": "untested", "two": "changed"}, (
    f"A run whose adapter was changed is no twin of anybody: compare only what passed the first four lines; yours are {got}"
)
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(4)
for _ in range(40):
    _given = [
        logged(
            f"r{i}",
            str(_rng.choice(["A", "B"], p=[0.8, 0.2])),
            a=str(_rng.choice(["2", "2.0", "3"])),
            b=str(_rng.choice(["x", "y"])),
            code=str(_rng.choice(["C", "D2"])),
        )
        for i in range(8)
    ]
    _key = lambda r: (float(r.data.params["a"]), r.data.params["b"], r.data.tags["code"])
    _got = verdict_of(*_given)
    for _run in _given:
        _group = [r for r in _given if _key(r) == _key(_run)]
        _want = "untested" if len(_group) == 1 else "replicated" if len({r.data.tags["adapter"] for r in _group}) == 1 else "contradicted"  # fmt: skip
        assert _got[_run.info.run_id] == _want, (
            f"{_run.data.params}, {_run.data.tags}: {_want} among its {len(_group)} twins"
        )
_got = verdict_of(
    logged("p", "A", a="0.0001"),
    logged("q", "B", a="0.0004"),
    logged("r", "A", a="1e-7"),
    logged("s", "B", a="2e-7"),
    logged("t", "A", a="123456"),
    logged("u", "B", a="123457"),
    logged("v", "A", b="X"),
    logged("w", "B", b="x"),
)
assert set(_got.values()) == {"untested"}, (
    f"0.0001 and 0.0004 are two numbers, 1e-7 and 2e-7 and 123456 and 123457 as well: compare them, do not round them; 'x' and "
    f"'X' are two texts; yours are {_got}"
)
_got = verdict_of(logged("p", "A", a=".5"), logged("q", "A", a="0.50"))
assert set(_got.values()) == {"replicated"}, f"'.5' and '0.50' read as one float; yours are {_got}"
_got = verdict_of(logged("p", "A", a="x1"), logged("q", "B", a="x1"), logged("r", "A", a="nine"))
assert _got == {"p": "contradicted", "q": "contradicted", "r": "untested"}, "Text that is no number is compared as text"
### END HIDDEN TESTS


# %% mistake="compares text" of="audit" says="compare what reads as a float as a number"
def audit(runs, held, actual, required):
    verdicts, groups = {}, {}
    for run in runs:
        tags, params, own = run.data.tags, run.data.params, run.info.run_id
        if run.info.status != "FINISHED":
            verdicts[own] = "unfinished"
        elif any(name not in params for name in required) or any(k not in tags for k in ("data", "code", "adapter")):
            verdicts[own] = "incomplete"
        elif tags["data"] not in held or tags["code"] not in held:
            verdicts[own] = "lost"
        elif actual.get(own) != tags["adapter"]:
            verdicts[own] = "changed"
        else:
            groups.setdefault((tags["data"], tags["code"], *(params[n] for n in required)), []).append(run)
    for group in groups.values():
        outputs = {run.data.tags["adapter"] for run in group}
        word = "untested" if len(group) == 1 else "replicated" if len(outputs) == 1 else "contradicted"
        verdicts.update({run.info.run_id: word for run in group})
    return verdicts


# %% mistake="the majority is right" of="audit" says="Two against one proves nothing"
def audit(runs, held, actual, required):
    number = lambda t: float(t) if re.fullmatch(r"[-+.\deE]*\d", t) else t
    verdicts, groups = {}, {}
    for run in runs:
        tags, params, own = run.data.tags, run.data.params, run.info.run_id
        if run.info.status != "FINISHED":
            verdicts[own] = "unfinished"
        elif any(name not in params for name in required) or any(k not in tags for k in ("data", "code", "adapter")):
            verdicts[own] = "incomplete"
        elif tags["data"] not in held or tags["code"] not in held:
            verdicts[own] = "lost"
        elif actual.get(own) != tags["adapter"]:
            verdicts[own] = "changed"
        else:
            groups.setdefault((tags["data"], tags["code"], *(number(params[n]) for n in required)), []).append(run)
    for group in groups.values():
        outputs = Counter(run.data.tags["adapter"] for run in group)
        for run in group:
            often = outputs[run.data.tags["adapter"]]
            verdicts[run.info.run_id] = "untested" if len(group) == 1 else "replicated" if often > 1 else "contradicted"
    return verdicts


# %% mistake="every parameter keeps twins apart" of="audit" says="it must not keep twins apart"
def audit(runs, held, actual, required):
    def number(text):
        try:
            return float(text)
        except ValueError:
            return text

    verdicts, groups = {}, {}
    for run in runs:
        tags, params, own = run.data.tags, run.data.params, run.info.run_id
        if run.info.status != "FINISHED":
            verdicts[own] = "unfinished"
        elif any(name not in params for name in required) or any(k not in tags for k in ("data", "code", "adapter")):
            verdicts[own] = "incomplete"
        elif tags["data"] not in held or tags["code"] not in held:
            verdicts[own] = "lost"
        elif actual.get(own) != tags["adapter"]:
            verdicts[own] = "changed"
        else:
            key = (tags["data"], tags["code"], *sorted((k, str(number(v))) for k, v in params.items()))
            groups.setdefault(key, []).append(run)
    for group in groups.values():
        outputs = {run.data.tags["adapter"] for run in group}
        word = "untested" if len(group) == 1 else "replicated" if len(outputs) == 1 else "contradicted"
        verdicts.update({run.info.run_id: word for run in group})
    return verdicts


# %% mistake="what is missing is equal" of="audit" says="Parameter a was never recorded"
def audit(runs, held, actual, required):
    verdicts, groups = {}, {}
    for run in runs:
        tags, params, own = run.data.tags, run.data.params, run.info.run_id
        if run.info.status != "FINISHED":
            verdicts[own] = "unfinished"
        elif tags.get("data") not in held or tags.get("code") not in held:
            verdicts[own] = "lost"
        elif actual.get(own) != tags.get("adapter"):
            verdicts[own] = "changed"
        else:
            groups.setdefault((tags["data"], tags["code"], *(params.get(n) for n in required)), []).append(run)
    for group in groups.values():
        outputs = {run.data.tags["adapter"] for run in group}
        word = "untested" if len(group) == 1 else "replicated" if len(outputs) == 1 else "contradicted"
        verdicts.update({run.info.run_id: word for run in group})
    return verdicts


# %% mistake="crashed runs as twins" of="audit" says="a run that crashed or lacks a parameter is no twin"
def audit(runs, held, actual, required):
    key = lambda run: (
        run.data.tags.get("data"),
        run.data.tags.get("code"),
        *(run.data.params.get(n) for n in required),
    )
    verdicts = {}
    for run in runs:
        tags, params, own = run.data.tags, run.data.params, run.info.run_id
        outputs = [other.data.tags.get("adapter") for other in runs if key(other) == key(run)]
        if run.info.status != "FINISHED":
            verdicts[own] = "unfinished"
        elif any(name not in params for name in required) or any(k not in tags for k in ("data", "code", "adapter")):
            verdicts[own] = "incomplete"
        elif tags["data"] not in held or tags["code"] not in held:
            verdicts[own] = "lost"
        elif actual.get(own) != tags["adapter"]:
            verdicts[own] = "changed"
        else:
            verdicts[own] = (
                "untested" if len(outputs) == 1 else "replicated" if len(set(outputs)) == 1 else "contradicted"
            )
    return verdicts


# %% mistake="looks for lost data, not for lost code" of="audit" says="Its code is not in the content store"
def audit(runs, held, actual, required):
    verdicts, groups = {}, {}
    for run in runs:
        tags, params, own = run.data.tags, run.data.params, run.info.run_id
        if run.info.status != "FINISHED":
            verdicts[own] = "unfinished"
        elif any(name not in params for name in required) or any(k not in tags for k in ("data", "code", "adapter")):
            verdicts[own] = "incomplete"
        elif tags["data"] not in held:
            verdicts[own] = "lost"
        elif actual.get(own) != tags["adapter"]:
            verdicts[own] = "changed"
        else:
            groups.setdefault((tags["data"], tags["code"], *(params[n] for n in required)), []).append(run)
    for group in groups.values():
        outputs = {run.data.tags["adapter"] for run in group}
        word = "untested" if len(group) == 1 else "replicated" if len(outputs) == 1 else "contradicted"
        verdicts.update({run.info.run_id: word for run in group})
    return verdicts


# %% mistake="a changed adapter as a twin" of="audit" says="A run whose adapter was changed is no twin"
def audit(runs, held, actual, required):
    def number(text):
        try:
            return float(text)
        except ValueError:
            return text

    verdicts, groups = {}, {}
    for run in runs:
        tags, params, own = run.data.tags, run.data.params, run.info.run_id
        if run.info.status != "FINISHED":
            verdicts[own] = "unfinished"
        elif any(name not in params for name in required) or any(k not in tags for k in ("data", "code", "adapter")):
            verdicts[own] = "incomplete"
        elif tags["data"] not in held or tags["code"] not in held:
            verdicts[own] = "lost"
        else:
            groups.setdefault((tags["data"], tags["code"], *(number(params[n]) for n in required)), []).append(run)
    for group in groups.values():
        outputs = {run.data.tags["adapter"] for run in group}
        word = "untested" if len(group) == 1 else "replicated" if len(outputs) == 1 else "contradicted"
        verdicts.update({run.info.run_id: word for run in group})
    for run in runs:
        own = run.info.run_id
        if verdicts[own] in ("untested", "replicated", "contradicted") and actual.get(own) != run.data.tags["adapter"]:
            verdicts[own] = "changed"
    return verdicts


# %% mistake="a set of values" of="audit" says="each value belongs to its parameter"
def audit(runs, held, actual, required):
    def number(text):
        try:
            return float(text)
        except ValueError:
            return text

    verdicts, groups = {}, {}
    for run in runs:
        tags, params, own = run.data.tags, run.data.params, run.info.run_id
        if run.info.status != "FINISHED":
            verdicts[own] = "unfinished"
        elif any(name not in params for name in required) or any(k not in tags for k in ("data", "code", "adapter")):
            verdicts[own] = "incomplete"
        elif tags["data"] not in held or tags["code"] not in held:
            verdicts[own] = "lost"
        elif actual.get(own) != tags["adapter"]:
            verdicts[own] = "changed"
        else:
            groups.setdefault((tags["data"], tags["code"], frozenset(number(params[n]) for n in required)), []).append(
                run
            )
    for group in groups.values():
        outputs = {run.data.tags["adapter"] for run in group}
        word = "untested" if len(group) == 1 else "replicated" if len(outputs) == 1 else "contradicted"
        verdicts.update({run.info.run_id: word for run in group})
    return verdicts


# %% mistake="rounds" of="audit" says="do not round them"
def audit(runs, held, actual, required):
    def number(text):
        try:
            return round(float(text), 6)
        except ValueError:
            return text

    verdicts, groups = {}, {}
    for run in runs:
        own, params, tags = run.info.run_id, run.data.params, run.data.tags
        if run.info.status != "FINISHED":
            verdicts[own] = "unfinished"
        elif not {*required} <= {*params} or not {"data", "code", "adapter"} <= {*tags}:
            verdicts[own] = "incomplete"
        elif not {tags["data"], tags["code"]} <= held:
            verdicts[own] = "lost"
        elif actual.get(own) != tags["adapter"]:
            verdicts[own] = "changed"
        else:
            groups.setdefault((tags["data"], tags["code"], *(number(params[k]) for k in required)), []).append(run)
    for twins in groups.values():
        word = "untested" if len(twins) == 1 else "replicated"
        word = "contradicted" if len({run.data.tags["adapter"] for run in twins}) > 1 else word
        verdicts |= {run.info.run_id: word for run in twins}
    return verdicts


# %% mistake="a run that goes on is finished" of="audit" says="yours for RUNNING is"
def audit(runs, held, actual, required):
    def number(text):
        try:
            return float(text)
        except ValueError:
            return text

    verdicts, groups = {}, {}
    for run in runs:
        own, params, tags = run.info.run_id, run.data.params, run.data.tags
        if run.info.status in ("FAILED", "KILLED"):
            verdicts[own] = "unfinished"
        elif not {*required} <= {*params} or not {"data", "code", "adapter"} <= {*tags}:
            verdicts[own] = "incomplete"
        elif not {tags["data"], tags["code"]} <= held:
            verdicts[own] = "lost"
        elif actual.get(own) != tags["adapter"]:
            verdicts[own] = "changed"
        else:
            groups.setdefault((tags["data"], tags["code"], *(number(params[k]) for k in required)), []).append(run)
    for twins in groups.values():
        word = "untested" if len(twins) == 1 else "replicated"
        word = "contradicted" if len({run.data.tags["adapter"] for run in twins}) > 1 else word
        verdicts |= {run.info.run_id: word for run in twins}
    return verdicts


# %% alternative="each run against all others" of="audit"
def audit(runs, held, actual, required):
    def alone(run):
        tags = run.data.tags
        if run.info.status != "FINISHED":
            return "unfinished"
        if None in [run.data.params.get(n) for n in required] + [tags.get(k) for k in ("data", "code", "adapter")]:
            return "incomplete"
        if tags["data"] not in held or tags["code"] not in held:
            return "lost"
        return "" if actual.get(run.info.run_id, "") == tags["adapter"] else "changed"

    def equal(x, y):
        try:
            return float(x) == float(y)
        except ValueError:
            return x == y

    def twins(x, y):
        same = all(x.data.tags[k] == y.data.tags[k] for k in ("data", "code"))
        return same and all(equal(x.data.params[n], y.data.params[n]) for n in required)

    passed = [run for run in runs if not alone(run)]
    found = {}
    for run in runs:
        word = alone(run)
        if not word:
            others = [o.data.tags["adapter"] for o in passed if o is not run and twins(run, o)]
            word = (
                "untested"
                if not others
                else "replicated"
                if set(others) == {run.data.tags["adapter"]}
                else "contradicted"
            )
        found[run.info.run_id] = word
    return found


# %%
held = {folder.name for folder in store.iterdir()}
actual = {run.info.run_id: fingerprint(adapter_of(run.info.run_id)) for run in runs}
verdicts = audit(runs, held, actual, fleet.REQUIRED)
named = {run.info.run_id: run.info.run_name for run in runs}
for verdict in dict.fromkeys(sorted(verdicts.values())):
    print(f"{verdict:13}", ", ".join(named[own] for own, word in verdicts.items() if word == verdict))

# %% [markdown]
# The price so far: one query and a few hashes. What remains needs reruns. The replicated ones have had theirs; lost and incomplete ones cannot be had. Left are the untested, the contradicted (one rerun says which of the twins is right) and the changed (if the recorded adapter comes out again, the rerun also repairs the damage).
#
# **Exercise.** Predict, before you run it. In what follows each untested run is done again from the content store and its recorded parameters.
#
# - `predicted_failures`: how many of the untested runs do not give the recorded bytes again, 0 to 20.
# - `predicted_agreement`: take one of these, in which nothing but the last bits of the weights differ. Of which share of the test tickets do run and rerun give the same answer, 0 to 1?
#
# <details><summary>Hint 1</summary>Three people on one machine, one library version, one thread, seeds recorded. What else decides the bits?</details>
# <details><summary>Hint 2</summary>Read the code c1, c2 and c3 above as somebody who wants to run it twice.</details>
# <details><summary>Hint 3</summary>An answer is a dozen greedy choices, each of the largest of a few hundred numbers. How close must the first two be for the last bits to matter?</details>

# %% exercise="predict-reruns" difficulty=1 minutes=4
predicted_failures = None
predicted_agreement = None
### BEGIN SOLUTION
predicted_failures, predicted_agreement = 2, 0.98
### END SOLUTION

# %% check="predict-reruns" points=1
for value, what, most in (
    (predicted_failures, "predicted_failures", 20),
    (predicted_agreement, "predicted_agreement", 1),
):
    assert value is not None, f"Write your prediction down before you look: {what} = a number from 0 to {most}"
    assert 0 <= value <= most, f"{what} is a number from 0 to {most}; yours is {value}"

# %% mistake="a percentage" of="predict-reruns" says="predicted_agreement is a number from 0 to 1"
predicted_failures, predicted_agreement = 3, 98

# %% mistake="one of two" of="predict-reruns" says="Write your prediction down"
predicted_failures = 3
predicted_agreement = None

# %% mistake="more than there are" of="predict-reruns" says="predicted_failures is a number from 0 to 20"
predicted_failures, predicted_agreement = 40, 0.5

# %% alternative="none" of="predict-reruns"
predicted_failures, predicted_agreement = 0, 1.0


# %%
def again(run: Run, where: str, **switches: str) -> Path:
    """Do a run again from the content store and what it recorded."""
    inputs = [store / run.data.tags[key] for key in ("data", "code")]
    return fleet.train(*inputs, root / "again" / where, {k: float(v) for k, v in run.data.params.items()}, **switches)


def distance(left: Path, right: Path) -> float:
    """The largest difference between two adapters' weights."""
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (left, right))
    return max(float((one[key] - two[key]).abs().max()) for key in one)


@dataclass(frozen=True)
class Rerun:
    """A run, and what came of doing it again."""

    run: Run
    same: bool
    apart: float
    agreement: np.ndarray
    folder: Path


reruns: dict[str, Rerun] = {}
for run in runs:
    own = run.info.run_id
    if verdicts[own] in ("untested", "contradicted", "changed"):
        folder = again(run, own)
        same = fingerprint(folder) == run.data.tags["adapter"]
        now = replies[own] if same else fleet.answers(folder, test)
        was = root / "out" / str(runs.index(run))  # the author's own copy
        agreement = np.array([a == b for a, b in zip(replies[own], now, strict=True)])
        reruns[own] = Rerun(run, same, distance(folder, was), agreement, folder)

frame = pd.DataFrame(
    [
        {
            "run": r.run.info.run_name,
            "author": r.run.data.tags["mlflow.user"],
            "code": next(name for name, held_ in stored.items() if held_ == r.run.data.tags["code"]),
            "by the records": verdicts[own],
            "same bytes": "yes" if r.same else "no",
            "largest difference": r.apart,
            "same answers": r.agreement.mean(),
        }
        for own, r in reruns.items()
    ]
)
display(
    frame.style.hide(axis="index")
    .format({"largest difference": "{:.1e}", "same answers": "{:.0%}"})
    .apply(lambda row: ["font-weight: bold" if row["same bytes"] == "no" else ""] * len(row), axis=1)
)
failed = {own: r for own, r in reruns.items() if not r.same}
gone = [own for own, word in verdicts.items() if word in ("incomplete", "lost")]
hidden = [own for own in failed if verdicts[own] == "untested"]
steps_of = lambda own: next(scaled(job.settings)["steps"] for run, job in zip(runs, fleet.JOBS, strict=True) if run.info.run_id == own)  # fmt: skip
card.record("unreproducible", len(gone) + len(failed), format="d", label="runs of twenty that cannot be done again")
card.record("hidden", len(hidden), format="d", label="of these, runs in whose records nothing is wrong")
card.record("flagged", sum(w not in ("untested", "replicated") for w in verdicts.values()), format="d", label="suspects that the records alone give away")  # fmt: skip
card.record("cleared", sum(r.same for own, r in reruns.items() if verdicts[own] != "untested"), format="d", label="suspects whose rerun gives the recorded bytes")  # fmt: skip
card.record("rerun_steps", sum(map(steps_of, reruns)) / sum(map(steps_of, verdicts)), format=".0%", label="training steps that the reruns cost, of those of all runs")  # fmt: skip

# %% [markdown]
# {{hidden}} runs whose records are perfect do not come out again, and {{rerun_steps}} of all training steps were needed to know. Now diagnose, by asking what the failures have in common that the successes do not have:

# %%
display(pd.crosstab(frame["code"], frame["same bytes"]))
suspect = next(own for own in hidden if tracking.get_run(own).data.tags["code"] != stored["c3"])
for attention in ("sdpa", "eager"):
    tried = reruns[suspect].folder  # done above, at the default
    if attention != "sdpa":
        tried = again(tracking.get_run(suspect), f"{suspect}-{attention}", attention=attention)
    same = fingerprint(tried) == tracking.get_run(suspect).data.tags["adapter"]
    print(f"{named[suspect]} with attention = {attention!r}: {'the recorded bytes' if same else 'other bytes'}")

other = {**tracking.get_run(suspect).data.params, "seed": str(seed)}
tags = tracking.get_run(suspect).data.tags
elsewhere = fleet.train(
    *(store / tags[key] for key in ("data", "code")), root / "again" / "seed", {k: float(v) for k, v in other.items()}
)
by_seed = np.array([a == b for a, b in zip(replies[suspect], fleet.answers(elsewhere, test), strict=True)])
compare([("untested runs that do not come out again", predicted_failures, len(hidden))], format=",d")
compare([("same answers, last bits differ", predicted_agreement, reruns[suspect].agreement.mean())], format=".0%")
for key, right, what in (("eager", reruns[suspect].agreement, "another attention"), ("seed", by_seed, "another seed")):
    low, high = triage.interval(right)
    card.record(f"agree_{key}", right.mean(), low=low, high=high, format=".0%", tolerance=0.05, label=f"answers that stay the same, {what}")  # fmt: skip

# %%
good = lambda own: own not in gone and own not in failed
axes_of = {
    "data": [next((n for n, h in stored.items() if h == r.data.tags["data"]), "lost") for r in runs],
    "code": [next((n for n, h in stored.items() if h == r.data.tags["code"]), "lost") for r in runs],
    "seed": [r.data.params.get("seed", "?") for r in runs],
    "steps": [r.data.params["steps"].removesuffix(".0") for r in runs],
    "learning rate": [f"{float(r.data.params['learning_rate']):g}" for r in runs],
}
fig, (left, right) = plt.subplots(1, 2, figsize=(12.5, 4.4), width_ratios=[3, 2])
jitter = np.linspace(-0.03, 0.03, len(runs))
heights = []
for place, values in enumerate(axes_of.values()):
    levels = sorted(set(values), key=lambda v: (v in ("lost", "?"), len(v), v))
    at = {v: (i + 0.5) / len(levels) for i, v in enumerate(levels)}
    heights.append([at[v] for v in values])
    left.axvline(place, color="#8c8c8c", lw=0.8)
    for value, height in at.items():
        left.annotate(value, (place, height), xytext=(5, 6), textcoords="offset points", fontsize=9, color="#4a4a4a")
scores = np.array([r.data.metrics["exact"] for r in runs])
span = np.ptp(scores) or 1.0
heights.append(list(0.05 + 0.9 * (scores - scores.min()) / span))
left.axvline(len(axes_of), color="#8c8c8c", lw=0.8)
for value in (scores.min(), scores.max()):
    left.annotate(f"{value:.0%}", (len(axes_of), 0.05 + 0.9 * (value - scores.min()) / span), xytext=(5, 0), textcoords="offset points", fontsize=9, color="#4a4a4a")  # fmt: skip
for number, run in enumerate(runs):
    fine = good(run.info.run_id)
    left.plot(range(len(heights)), np.array(heights)[:, number] + jitter[number], color=COLOURS.after if fine else COLOURS.wrong, lw=1.4, alpha=0.75 if fine else 0.9, ls="-" if fine else (0, (4, 2)))  # fmt: skip
left.set_xticks(range(len(heights)), [*axes_of, "exact match"])
left.set(yticks=[], title="Twenty runs: reproducible (solid) and not (dashed)", ylim=(-0.05, 1.08))
left.grid(visible=False)
left.spines["left"].set_visible(False)

floor = 1e-9  # where "no difference" is drawn
by_code = lambda r: "c3" if r.run.data.tags["code"] == stored["c3"] else "attention"
seed_apart = distance(elsewhere, root / "out" / str([run.info.run_id for run in runs].index(suspect)))
spots = [(max(r.apart, floor), r.agreement, COLOURS.after if r.same else COLOURS.wrong, "o") for r in reruns.values()]
for x, agreed, colour, marker in [*spots, (seed_apart, by_seed, COLOURS.before, "D")]:
    low, high = triage.interval(agreed)
    right.plot([x, x], [low, high], color=colour, lw=1.4)
    right.plot(x, agreed.mean(), marker, ms=8, color=colour)
right.set(xscale="log", xlim=(3e-10, 40), ylim=(0, 1.1), xlabel="largest difference between two weights")
right.set(ylabel="test tickets with the same answer", title="What 'not reproducible' amounts to")
right.set_xticks([floor, 1e-7, 1e-5, 1e-3, 1e-1], ["none", *(f"$10^{{{power}}}$" for power in (-7, -5, -3, -1))])
right.minorticks_off()
right.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
direct_label(
    right, floor, 1, f"{sum(r.same for r in reruns.values())} reruns: same bytes", COLOURS.after, offset=(-6, 8)
)
for kind, offset in (("attention", (-24, -34)), ("c3", (10, -12))):
    own_spots = [r for r in failed.values() if by_code(r) == kind]
    if own_spots:
        last = max(own_spots, key=lambda r: r.apart)
        name = "code c3" if kind == "c3" else kind
        direct_label(right, last.apart, last.agreement.mean(), name, COLOURS.wrong, offset=offset)
direct_label(right, seed_apart, by_seed.mean(), "another seed", COLOURS.before, offset=(6, 10))
plt.show()

# %% [markdown]
# Left is the page on which people choose their best run: it shows every recorded setting and the score, and nothing on it says which dashed lines to distrust. Right is what a failed rerun means, in two very different sizes.
#
# **Code c3** shuffles by Python's global `random`, which nobody seeds: the recorded seed decides another generator. The code is in the store, its fingerprint is right, and it does something else each time. Records name inputs; they do not make a program a function of them. Its reruns give other answers, not only other bits.
#
# **Attention.** The run of the other failure used `attn_implementation="eager"`, another order of the same sums. It was a default of somebody's configuration file, so nobody thought of it as an input; trying the switches that could matter found it in one more rerun, since a fingerprint says yes or no. Its answers are the same for {{agree_eager}} ({{agree_eager:interval}}) of the test tickets. Decide which reproducibility you promise. Equal bytes prove most and are cheap to compare, and hold on one machine with one set of library versions; on another processor the same code may round otherwise. Equal answers, or a score within its interval, is what you can promise across machines.
#
# Of the contradicted pair, one rerun came out and one did not: the same switch. And the run whose adapter was written over comes out bit for bit, so its adapter is found again. A reproducible run is a backup.
#
# ## A prompt is released, too
#
# A prompt changes answers as much as an adapter does, and is changed more easily: by an edit, by somebody who is no engineer, on a Friday. A *prompt registry* keeps every version of a template under a name, unchangeable and counted from 1, and lets *aliases* such as `live` point to one of them. Releasing is moving an alias; rolling back is moving it back. MLflow writes a variable as its name between double braces, and so do the templates below.
#
# Three things go wrong here, and each makes the log say something else than what happened.
#
# - **The alias is logged.** `live` means something else tomorrow. Log the number.
# - **The alias is looked up more than once**, or from a cache. It may move between the two looks.
# - **A value is read as a template.** A ticket is text that strangers write. If it holds a variable, in braces, it must reach the model as it stands.

# %%
ticket_text = "My {{products}} is broken."
danger = tracking.create_prompt("danger") and tracking.create_prompt_version(
    "danger", "Products: {{products}}\n{{ticket}}"
)
print(danger.format(ticket=ticket_text, products="the Norix, the Vela"))

# %% [markdown]
# That is MLflow's own `format`: it replaces one variable after the other, in the order of its arguments, and so also looks into what it has just inserted. The customer now reads our list of products; with a variable that holds a secret, it would be that.
#
# **Exercise.** Write two functions.
#
# `render(template, values)` replaces every variable of the template by its value.
#
# - A variable is two opening braces, a name of letters, digits and `_`, and two closing braces, with white space allowed beside the name. Everything else in the template stays as it is.
# - What a value holds is data: braces, names of variables and backslashes in it appear as they are.
# - A variable without a value raises `KeyError` with its name. Values that the template does not use are ignored.
#
# `serve(client, prompt, alias, requests, generate)` answers requests with the prompt that the alias points to.
#
# - It asks the registry once, and not a cache: `client.get_prompt_version_by_alias(prompt, alias)`, whose result has `version` (an `int`) and `template`.
# - `requests` is a list of mappings from variable to value. `generate` is called once, with the list of rendered texts, and returns the list of replies.
# - It returns a list of dictionaries, one for each request in order, with the keys `"prompt"` (the name), `"version"`, `"text"` (as rendered) and `"reply"`.
#
# *About 10 lines.*
#
# <details><summary>Hint 1</summary>How often does your code look at a character of the template, and how often at one of a value?</details>
# <details><summary>Hint 2</summary><code>re.sub</code> takes a function as its replacement: it gets the match, and what it returns is neither searched again nor read for backslashes.</details>
# <details><summary>Hint 3</summary><code>re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: values[found[1]], template)</code>. In serve: one call for the version, one list of texts, one call of generate, then zip.</details>


# %% exercise="prompts" difficulty=2 minutes=9
def render(template: str, values: Mapping[str, str]) -> str:
    """Return the template with its variables replaced; what values hold is data."""
    ### BEGIN SOLUTION
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: values[found[1]], template)
    ### END SOLUTION


def serve(
    client: MlflowClient,
    prompt: str,
    alias: str,
    requests: Sequence[Mapping[str, str]],
    generate: Callable[[list[str]], list[str]],
) -> list[dict]:
    """Answer requests with the prompt that an alias points to now, and say which version that was."""
    ### BEGIN SOLUTION
    chosen = client.get_prompt_version_by_alias(prompt, alias)
    texts = [render(chosen.template, values) for values in requests]
    return [
        {"prompt": prompt, "version": chosen.version, "text": text, "reply": reply}
        for text, reply in zip(texts, generate(texts), strict=True)
    ]
    ### END SOLUTION


# %% check="prompts" points=2
var = lambda name: "{{" + name + "}}"


def rendered(template: str, values: Mapping[str, str], why: str) -> str:
    """What the learner's render makes of it."""
    try:
        return render(template, values)
    except Exception as error:
        raise AssertionError(
            f"{template!r} with {values}: {why}; yours raised {type(error).__name__}: {error}"
        ) from error


for template, values, wanted, why in (
    ("Hi.", {}, "Hi.", "a template without a variable stays as it is"),
    (f"Triage: {var('ticket')}", {"ticket": "It broke."}, "Triage: It broke.", "the variable becomes its value"),
    (var(" ticket ") + var("ticket"), {"ticket": "x"}, "xx", "white space beside the name is allowed, and a variable may occur twice"),
    (f"{var('a')}|{var('b')}", {"a": var("b"), "b": "B"}, var("b") + "|B", "a value that looks like a variable is data: replace in one pass"),
    (f"{var('a')}|{var('b')}", {"b": var("a"), "a": "A"}, "A|" + var("a"), "a value that looks like a variable is data: replace in one pass"),
    (var("a"), {"a": r"\1 \n \g<0>"}, r"\1 \n \g<0>", "backslashes of a value are data: give re.sub a function"),
    ('{"k": 1} ' + var("a") + " {a} {", {"a": "x"}, '{"k": 1} x {a} {', "single braces belong to the text: str.format is another language"),
    ("{# no #} {% raw %} " + var("a") + "\n", {"a": "x"}, "{# no #} {% raw %} x\n", "all else stays as it is: this is not Jinja"),
    (var("a"), {"a": "x", "unused": "y"}, "x", "a value that is not used is ignored"),
):  # fmt: skip
    got = rendered(template, values, why)
    assert got == wanted, f"{template!r} with {values} gives {wanted!r}: {why}; yours is {got!r}"
try:
    got = render(var("ticket") + var("name"), {"ticket": "x"})
except KeyError as error:
    said = str(error)
else:
    raise AssertionError(f"A variable without a value must raise KeyError, not reach the model; yours gives {got!r}")
assert "name" in said, f"The KeyError has the name of the variable; yours says {said}"
### BEGIN HIDDEN TESTS
for _value in ("", "$&", "<b>&", "{{", "}}", "{{ a }}", "a{{b}}c", "%s", "\\", "\n"):
    _got = rendered(f"<{var('a')}-{var('b')}>", {"a": _value, "b": _value}, "whatever a value holds is data")
    assert _got == f"<{_value}-{_value}>", f"The value {_value!r} is data; yours is {_got!r}"
for _template, _values, _wanted, _why in (
    (var("x_1"), {"x_1": "v"}, "v", "names have letters, digits and _"),
    (var("\tx_1 "), {"x_1": "v"}, "v", "white space beside the name, a tab as well, belongs to the variable"),
    ("{{}} {{ }} {{a b}}", {"a": "x"}, "{{}} {{ }} {{a b}}", "what is no variable stays"),
):
    _got = rendered(_template, _values, _why)
    assert _got == _wanted, f"{_template!r} with {_values} gives {_wanted!r}: {_why}; yours is {_got!r}"
### END HIDDEN TESTS

# %% check="prompts" points=2
with fresh_store() as (own, _):
    database = own.tracking_uri.removeprefix("sqlite:///")
    own.create_prompt("p")
    for template in (f"one {var('t')}", f"two {var('t')}"):
        own.create_prompt_version("p", template)
    own.set_prompt_alias("p", "live", 1)

    def moved_to(version: int) -> None:
        """Somebody else moves the alias, in another process: this one's caches do not hear of it."""
        with sqlite3.connect(database) as other:
            other.execute("UPDATE registered_model_aliases SET version = ? WHERE name = 'p'", (version,))
        other.close()

    calls: list[list[str]] = []

    def shout(texts: list[str]) -> list[str]:
        assert isinstance(texts, list), f"generate gets the list of texts; yours gave it a {type(texts).__name__}"
        calls.append(list(texts))
        return [text.upper() for text in texts]

    looked_up: list[str] = []
    ask = own.get_prompt_version_by_alias
    asked = mock.patch.object(own, "get_prompt_version_by_alias", lambda *a, **k: looked_up.append("") or ask(*a, **k))
    with asked:
        got = serve(own, "p", "live", [{"t": "b"}, {"t": "a"}, {"t": "b"}], shout)
    assert calls == [["one b", "one a", "one b"]], (
        f"generate is called once, with the rendered texts of all requests, in order; yours called {calls}"
    )
    assert [sorted(entry) for entry in got] == [["prompt", "reply", "text", "version"]] * 3, (
        f"An entry for each request, with the keys prompt, version, text and reply; yours: {got}"
    )
    assert isinstance(got[0]["prompt"], str), (
        f"prompt is the name, a text; yours is a {type(got[0]['prompt']).__name__}"
    )
    assert got[0]["version"] != "live", "The alias is no version: it will point elsewhere tomorrow. Log chosen.version"
    assert got == [
        {"prompt": "p", "version": 1, "text": f"one {t}", "reply": f"ONE {t.upper()}"} for t in ("b", "a", "b")
    ], f"The live version was 1, and each reply stands beside its own text; yours: {got}"
    assert len(looked_up) <= 1, (
        f"You asked for the alias {len(looked_up)} times, and it may move in between: look it up once"
    )
    moved_to(2)
    got = serve(own, "p", "live", [{"t": "a"}], shout)
    assert (got[0]["version"], got[0]["text"]) == (2, "two a"), (
        "Another process has moved the alias to version 2, and you served a copy from a cache (load_prompt keeps an alias "
        f"for 60 seconds): ask the registry, get_prompt_version_by_alias; yours: {got}"
    )

    def slow(texts: list[str]) -> list[str]:
        moved_to(1)  # a roll-back while the model is at work
        return shout(texts)

    got = serve(own, "p", "live", [{"t": "a"}], slow)
    assert (got[0]["version"], got[0]["text"]) == (2, "two a"), (
        f"The alias moved during generation; the log must name the version that made the text: look it up once; yours: {got}"
    )
    ### BEGIN HIDDEN TESTS
    assert serve(own, "p", "live", [], lambda texts: []) == [], "No requests, no entries"
    own.create_prompt("q.x")
    own.create_prompt_version("q.x", f"{var('u')} and {var('t')}")
    own.set_prompt_alias("q.x", "beta", 1)
    _got = serve(own, "q.x", "beta", [{"u": var("t"), "t": "T"}], shout)
    assert _got == [{"prompt": "q.x", "version": 1, "text": var("t") + " and T", "reply": "{{T}} AND T"}], f"Another name and alias; yours: {_got}"  # fmt: skip
    ### END HIDDEN TESTS


# %% mistake="one variable after the other" of="prompts" says="replace in one pass"
def render(template, values):
    for name in re.findall(r"\{\{\s*(\w+)\s*\}\}", template):
        value = values[name]
        template = re.sub(r"\{\{\s*" + name + r"\s*\}\}", lambda _, value=value: value, template)
    return template


def serve(client, prompt, alias, requests, generate):
    found = client.get_prompt_version_by_alias(prompt, alias)
    texts = [render(found.template, r) for r in requests]
    return [
        {"prompt": prompt, "version": found.version, "text": t, "reply": r}
        for t, r in zip(texts, generate(texts), strict=True)
    ]


# %% mistake="single braces are variables" of="prompts" says="str.format is another language"
def render(template, values):
    known = re.sub(r"\{\{\s*(\w+)\s*\}\}", r"{\1}", template)
    return known.format(**values)


def serve(client, prompt, alias, requests, generate):
    found = client.get_prompt_version_by_alias(prompt, alias)
    texts = [render(found.template, r) for r in requests]
    return [
        {"prompt": prompt, "version": found.version, "text": t, "reply": r}
        for t, r in zip(texts, generate(texts), strict=True)
    ]


# %% mistake="a missing value is empty" of="prompts" says="must raise KeyError"
def render(template, values):
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: values.get(found[1], ""), template)


def serve(client, prompt, alias, requests, generate):
    found = client.get_prompt_version_by_alias(prompt, alias)
    texts = [render(found.template, r) for r in requests]
    return [
        {"prompt": prompt, "version": found.version, "text": t, "reply": r}
        for t, r in zip(texts, generate(texts), strict=True)
    ]


# %% mistake="logs the alias" of="prompts" says="The alias is no version"
def render(template, values):
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: values[found[1]], template)


def serve(client, prompt, alias, requests, generate):
    found = client.get_prompt_version_by_alias(prompt, alias)
    texts = [render(found.template, r) for r in requests]
    return [
        {"prompt": prompt, "version": alias, "text": t, "reply": r} for t, r in zip(texts, generate(texts), strict=True)
    ]


# %% mistake="asks a cache" of="prompts" says="you served a copy from a cache"
def render(template, values):
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: values[found[1]], template)


def serve(client, prompt, alias, requests, generate):
    found = client.load_prompt(f"prompts:/{prompt}@{alias}")
    texts = [render(found.template, r) for r in requests]
    return [
        {"prompt": prompt, "version": found.version, "text": t, "reply": r}
        for t, r in zip(texts, generate(texts), strict=True)
    ]


# %% mistake="looks it up again for the log" of="prompts" says="look it up once"
def render(template, values):
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: values[found[1]], template)


def serve(client, prompt, alias, requests, generate):
    texts = [render(client.get_prompt_version_by_alias(prompt, alias).template, r) for r in requests]
    replies = generate(texts)
    version = client.get_prompt_version_by_alias(prompt, alias).version
    return [{"prompt": prompt, "version": version, "text": t, "reply": r} for t, r in zip(texts, replies, strict=True)]


# %% mistake="one call for each request" of="prompts" says="generate is called once"
def render(template, values):
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: values[found[1]], template)


def serve(client, prompt, alias, requests, generate):
    found = client.get_prompt_version_by_alias(prompt, alias)
    texts = [render(found.template, r) for r in requests]
    return [{"prompt": prompt, "version": found.version, "text": t, "reply": generate([t])[0]} for t in texts]


# %% mistake="looks it up for each request" of="prompts" says="it may move in between: look it up once"
def render(template, values):
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: values[found[1]], template)


def serve(client, prompt, alias, requests, generate):
    found = [client.get_prompt_version_by_alias(prompt, alias) for _ in requests]
    texts = [render(chosen.template, r) for chosen, r in zip(found, requests, strict=True)]
    return [
        {"prompt": prompt, "version": chosen.version, "text": t, "reply": r}
        for chosen, t, r in zip(found, texts, generate(texts), strict=True)
    ]


# %% mistake="each text once" of="prompts" says="the rendered texts of all requests"
def render(template, values):
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: values[found[1]], template)


def serve(client, prompt, alias, requests, generate):
    found = client.get_prompt_version_by_alias(prompt, alias)
    texts = list(dict.fromkeys(render(found.template, r) for r in requests))
    reply_to = dict(zip(texts, generate(texts), strict=True))
    rendered = [render(found.template, r) for r in requests]
    return [{"prompt": prompt, "version": found.version, "text": t, "reply": reply_to[t]} for t in rendered]


# %% alternative="splits the template, and loads with a cache of no time" of="prompts"
def render(template, values):
    parts = re.split(r"\{\{[ \t\n]*([A-Za-z0-9_]+)[ \t\n]*\}\}", template)
    return "".join(values[part] if place % 2 else part for place, part in enumerate(parts))


def serve(client, prompt, alias, requests, generate):
    found = client.get_prompt_version(prompt, client.get_prompt_version_by_alias(prompt, alias).version)
    entries = [{"prompt": prompt, "version": int(found.version), "text": render(found.template, r)} for r in requests]
    for entry, reply in zip(entries, generate([e["text"] for e in entries]), strict=True):
        entry["reply"] = reply
    return entries


# %% [markdown]
# Three versions of the triage prompt. The first is what the adapter was trained with, the ticket alone. The second is polite. The third tells the model which products there are, which must help, as whoever wrote it is sure. You would gate such a change on a measurement: the same adapter, the same tickets, three times as many as above.

# %%
templates = ["{{ticket}}", "Please triage this ticket.\n{{ticket}}", "{{ticket}}\nOur products: {{products}}"]
tracking.create_prompt("triage-prompt")
for template in templates:
    tracking.create_prompt_version("triage-prompt", template)
products = ", ".join(sorted({t.triage.product for t in test if t.triage.product})[:6])


def generator(folder: Path) -> Callable[[list[str]], list[str]]:
    """Generation with the adapter in a folder: texts to replies."""
    asked = lambda texts: [Ticket(f"q{i}", text, test[0].triage) for i, text in enumerate(texts)]
    return lambda texts: fleet.answers(folder, asked(texts))


more = fleet.tickets([LESSON_SEEDS[470 + i] for i in range(3 * test_companies)], 8)
requests = [{"ticket": t.text, "products": products} for t in more]
newest = runs[19].info.run_id
measured = {}
for version in (1, 2, 3):
    tracking.set_prompt_alias("triage-prompt", "candidate", version)
    entries = serve(tracking, "triage-prompt", "candidate", requests, generator(adapter_of(newest)))
    assert {entry["version"] for entry in entries} == {version}
    measured[version] = triage.score([entry["reply"] for entry in entries], more).exact

card.record("prompt_tickets", len(more), format="d", label="tickets on which the prompts are compared")
rng = np.random.default_rng(0)
draws = rng.integers(0, len(more), (2_000, len(more)))
for version, right in measured.items():
    low, high = triage.interval(right)
    gain = right.astype(float) - measured[1]
    bounds = np.quantile(gain[draws].mean(axis=1), [0.025, 0.975])
    print(f"version {version}: exact match {right.mean():.0%} ({low:.0%} to {high:.0%}), against version 1 {gain.mean():+.0%} ({bounds[0]:+.0%} to {bounds[1]:+.0%})")  # fmt: skip
    card.record(f"prompt_{version}", right.mean(), low=low, high=high, format=".0%", tolerance=0.03, label=f"exact match with version {version} of the prompt")  # fmt: skip
    if version > 1:
        card.record(f"gain_{version}", 100 * gain.mean(), low=100 * bounds[0], high=100 * bounds[1], format="+.0f", unit="points", tolerance=3, label=f"exact match of version {version} less that of version 1")  # fmt: skip

# %% [markdown]
# A polite line changes exact match by {{gain_2}} points ({{gain_2:interval}}, on {{prompt_tickets}} tickets), and the list of products, which had to help, by {{gain_3}} ({{gain_3:interval}}). The adapter saw neither in training. An adapter is trained for a prompt, so the two are released together, after a measurement. How much a large instruct model minds is a number that you get in the same way.
#
# ## The lineage of an answer
#
# Now four weeks of service. Each week another adapter goes live, as a version in MLflow's *model registry*, which points to the run that made it; in the third week somebody also releases version 2 of the prompt, which nobody has measured for that adapter. Each answer leaves one line in a log: what was asked, the prompt's version, the model's version, the fingerprint of the adapter that the service had loaded, and the reply.

# %%
tracking.create_registered_model("triage-adapter")
released = [runs[number].info.run_id for number in (2, 6, 14, 19)]
log: list[dict] = []
for week, run_id in enumerate(released):
    version = tracking.create_model_version("triage-adapter", str(adapter_of(run_id)), run_id=run_id).version
    tracking.set_registered_model_alias("triage-adapter", "live", version)
    tracking.set_prompt_alias("triage-prompt", "live", 1 if week < 2 else 2)
    live = tracking.get_model_version_by_alias("triage-adapter", "live")
    folder = adapter_of(live.run_id)
    arrived = [t.text for t in fleet.tickets([LESSON_SEEDS[450 + week]], served_each)]
    served = serve(tracking, "triage-prompt", "live", [{"ticket": text} for text in arrived], generator(folder))
    for text, entry in zip(arrived, served, strict=True):
        line = {"id": f"a{len(log):03d}", "ticket": text, "prompt": entry["prompt"], "prompt_version": entry["version"]}
        line |= {"model": "triage-adapter", "model_version": int(live.version), "adapter": fingerprint(folder)}
        log.append(line | {"reply": entry["reply"]})
for entry in (log[0], log[-1]):
    print(json.dumps({**entry, "adapter": entry["adapter"][:12] + "…"}, indent=1, ensure_ascii=False))


# %%
@dataclass(frozen=True)
class Lineage:
    """Where an answer comes from."""

    answer: str
    template: str
    run_id: str
    params: Mapping[str, str]
    data: str
    code: str
    tickets: tuple[str, ...]


class BrokenLinkError(LookupError):
    """A link of a lineage that is missing or wrong: "prompt", "model", "run", "adapter", "data" or "code"."""

    def __init__(self, link: str, why: str) -> None:
        super().__init__(f"{link}: {why}")
        self.link = link


# %% [markdown]
# **Exercise.** Write the walk from an answer to its tickets, and the way back.
#
# `trace(entry, client, store, name)` returns the `Lineage` of a line of the log (`answer` is its id). The links, in this order; the first that is broken raises `BrokenLinkError(link, why)` with any text as `why`:
#
# 1. `"prompt"`: `client.get_prompt_version(entry["prompt"], entry["prompt_version"])` gives the version, whose `template` goes into the result. A version that does not exist comes back as `None` or as an `MlflowException`.
# 2. `"model"`: `client.get_model_version(entry["model"], str(entry["model_version"]))`. What is not there raises `MlflowException`; a version whose `run_id` is empty is broken, too.
# 3. `"run"`: `client.get_run(run_id)`, for the model version's run. What is not there raises `MlflowException`. A deleted run is returned all the same, with `run.info.lifecycle_stage == "deleted"`: broken.
# 4. `"adapter"`: the run's tag `adapter` must equal the line's. Otherwise the service answered with other bytes than the registry says.
# 5. `"data"`, then `"code"`: the run's tags of these names. `store` is the content store, with a folder for each fingerprint. Broken if the tag is missing, if there is no such folder, or if the folder's fingerprint, `name(folder)`, is not what the folder is called: somebody edited what is never edited.
#
# `params` are the run's; `tickets` are the ids in the data folder, in their order; `fleet.read_data(folder)` gives its rows.
#
# `affected(ids, log, lineage_of)` returns two lists of answer ids, in the order of the log: the answers in whose lineage at least one of the tickets `ids` occurs, and those of which nobody can say, because `lineage_of(entry)` raised `BrokenLinkError`. `lineage_of` is called once for each line.
#
# *About 30 lines.*
#
# <details><summary>Hint 1</summary>A model version is a number in the log. What would you get if you asked the registry for its alias instead? And what is a broken link evidence of, in an investigation?</details>
# <details><summary>Hint 2</summary>The registry's and the tracker's calls stand in try blocks of their own, each raising BrokenLinkError from the MlflowException. Data and code are one loop over two keys.</details>
# <details><summary>Hint 3</summary>For key in ("data", "code"): found = run.data.tags.get(key); broken unless found and (store / found).is_dir() and name(store / found) == found. In affected: two lists, try / except BrokenLinkError / else with <code>set(ids) &amp; set(lineage.tickets)</code>.</details>


# %% exercise="lineage" difficulty=3 minutes=14
def trace(entry: Mapping[str, object], client: MlflowClient, store: Path, name: Callable[[Path], str]) -> Lineage:
    """Return where an answer comes from; BrokenLinkError names the first link that does not hold."""

    ### BEGIN SOLUTION
    def asked_for(link: str, call: Callable, *arguments: object) -> object:
        try:
            found = call(*arguments)
        except MlflowException as error:
            raise BrokenLinkError(link, str(error)) from error
        if found is None:
            raise BrokenLinkError(link, f"there is no {arguments}")
        return found

    prompt = asked_for("prompt", client.get_prompt_version, entry["prompt"], entry["prompt_version"])
    model = asked_for("model", client.get_model_version, entry["model"], str(entry["model_version"]))
    if not model.run_id:
        raise BrokenLinkError("model", "the version names no run")
    run = asked_for("run", client.get_run, model.run_id)
    if run.info.lifecycle_stage == "deleted":
        raise BrokenLinkError("run", f"{model.run_id} is deleted")
    tags = run.data.tags
    if tags.get("adapter") != entry["adapter"]:
        raise BrokenLinkError("adapter", "the service had loaded another one than the run made")
    for key in ("data", "code"):
        held = tags.get(key)
        if not held or not (store / held).is_dir():
            raise BrokenLinkError(key, f"{held} is not in the content store")
        if name(store / held) != held:
            raise BrokenLinkError(key, f"the content of {held} was changed")
    tickets = tuple(row["id"] for row in fleet.read_data(store / tags["data"]))
    return Lineage(entry["id"], prompt.template, model.run_id, run.data.params, tags["data"], tags["code"], tickets)
    ### END SOLUTION


def affected(
    ids: Sequence[str], log: Sequence[Mapping[str, object]], lineage_of: Callable[[Mapping[str, object]], Lineage]
) -> tuple[list[str], list[str]]:
    """Return the answers that these tickets may have touched, and those of which nobody can say."""
    ### BEGIN SOLUTION
    touched, unknown = [], []
    for entry in log:
        try:
            lineage = lineage_of(entry)
        except BrokenLinkError:
            unknown.append(entry["id"])
        else:
            if set(ids) & set(lineage.tickets):
                touched.append(entry["id"])
    return touched, unknown
    ### END SOLUTION


# %% check="lineage" points=3
quick_name = lambda folder: f"{zlib.crc32(b'|'.join(file.read_bytes() for file in sorted(folder.iterdir()))):08x}"


def held_in(where: Path, files: Mapping[str, bytes]) -> str:
    """Put files into a content store whose names are made by quick_name."""
    new = laid_out(where / "new", files)
    own_name = quick_name(new)
    new.rename(where / own_name)
    return own_name


def small_service(client: MlflowClient, experiment: str, where: Path) -> tuple[dict, list[str]]:
    """A prompt and a model of two versions each, made by two runs; a log line of the first, and the run ids."""
    made = []
    client.create_prompt("p")
    client.create_registered_model("m")
    for number in (1, 2):
        data = held_in(where, {"tickets.jsonl": b'{"id": "t%d0"}\n{"id": "t%d"}\n' % (number, number)})
        code = held_in(where, {"prepare.py": b"# %d" % number})
        client.create_prompt_version("p", f"template {number}")
        run_id = client.create_run(experiment, tags={"data": data, "code": code, "adapter": f"A{number}"}).info.run_id
        client.log_param(run_id, "seed", number)
        client.create_model_version("m", str(where), run_id=run_id)
        for kind in (client.set_prompt_alias, client.set_registered_model_alias):
            kind("p" if kind == client.set_prompt_alias else "m", "live", number)
        made.append(run_id)
    line = {
        "id": "a1",
        "prompt": "p",
        "prompt_version": 1,
        "model": "m",
        "model_version": 1,
        "adapter": "A1",
        "reply": "{}",
    }
    return line, made


def broken_at(line: Mapping, client: MlflowClient, where: Path, what: str) -> str:
    """The link at which the learner's trace finds the lineage broken."""
    try:
        got = trace(line, client, where, quick_name)
    except BrokenLinkError as error:
        return error.link
    except Exception as error:
        raise AssertionError(
            f"{what}: raise BrokenLinkError, which says which link it was; yours raised {type(error).__name__}: {str(error)[:200]}"
        ) from error
    raise AssertionError(f"{what}: raise BrokenLinkError and guess nothing; yours returned {got}")


with fresh_store() as (own, experiment), tempfile.TemporaryDirectory(dir=root) as place:
    where = Path(place)
    line, (first_run, second_run) = small_service(own, experiment, where)
    try:
        got = trace(line, own, where, quick_name)
    except BrokenLinkError as error:
        raise AssertionError(
            f"Every link of this line holds, for version 1 of both; yours found one broken ({error}). Follow the versions "
            "in the line, not the aliases, which point to version 2 now"
        ) from error
    assert isinstance(got, Lineage), f"Return a Lineage; yours is a {type(got).__name__}"
    assert got.run_id == first_run, (
        "Version 1 was made by the first run: follow the version in the line, not what is live now"
    )
    assert got.template == "template 1", f"The line says version 1 of the prompt; yours is {got.template!r}"
    assert tuple(got.tickets) == ("t10", "t1"), (
        f"The tickets are the ids in the run's data, in order; yours: {got.tickets}"
    )
    assert (got.answer, dict(got.params)) == ("a1", {"seed": "1"}), (
        f"The answer's id and the run's params; yours: {got}"
    )
    kept = own.get_run(first_run).data.tags
    assert (got.data, got.code) == (kept["data"], kept["code"]), f"data and code are the run's tags; yours: {got}"
    assert broken_at({**line, "prompt_version": 9}, own, where, "There is no version 9 of the prompt") == "prompt", (
        "The link is 'prompt'"
    )
    assert broken_at({**line, "model_version": 9}, own, where, "There is no version 9 of the model") == "model", (
        "The link is 'model'"
    )
    assert (
        broken_at({**line, "adapter": "A2"}, own, where, "The service had loaded A2, the run made A1") == "adapter"
    ), "The link is 'adapter'"
    (where / kept["data"] / "tickets.jsonl").write_text('{"id": "t9"}\n')
    assert (
        broken_at(line, own, where, "A folder in the store was edited, it no longer has its fingerprint") == "data"
    ), "The link is 'data'"
    own.delete_run(first_run)
    assert (
        broken_at(line, own, where, "The run is deleted (MLflow returns it, with lifecycle_stage 'deleted')") == "run"
    ), "The link is 'run', which comes before the data"
    ### BEGIN HIDDEN TESTS
    assert broken_at({**line, "adapter": "A2"}, own, where, "The run is deleted, and the adapter another") == "run", (
        "The first broken link counts: 'run' stands before 'adapter'"
    )
    _second = {**line, "id": "a2", "prompt_version": 2, "model_version": 2, "adapter": "A2"}
    _got = trace(_second, own, where, quick_name)
    assert (_got.run_id, tuple(_got.tickets), _got.template) == (second_run, ("t20", "t2"), "template 2"), (
        f"Version 2; yours: {_got}"
    )
    _kept = own.get_run(second_run).data.tags
    (where / _kept["code"] / "prepare.py").write_text("# other")
    assert broken_at(_second, own, where, "The code in the store was edited") == "code", "The link is 'code'"
    shutil.rmtree(where / _kept["code"])
    assert broken_at(_second, own, where, "The code is not in the store") == "code", "The link is 'code'"
    own.delete_tag(second_run, "data")
    assert broken_at(_second, own, where, "The run has no tag data") == "data", "The link is 'data'"
    own.delete_tag(second_run, "adapter")
    assert broken_at(_second, own, where, "The run has no tag adapter") == "adapter", "The link is 'adapter'"
    own.create_model_version("m", str(where), run_id="f" * 32)
    assert broken_at({**_second, "model_version": 3}, own, where, "There is no run of the version's run_id") == "run", (
        "The link is 'run'"
    )
    own.create_model_version("m", str(where))
    assert broken_at({**_second, "model_version": 4}, own, where, "The version names no run") == "model", (
        "The link is 'model'"
    )
    assert broken_at({**_second, "prompt": "none"}, own, where, "There is no such prompt") == "prompt", (
        "The link is 'prompt'"
    )
    with mock.patch.object(own, "get_prompt_version", return_value=None):
        assert broken_at(line, own, where, "The registry gave None for the prompt's version") == "prompt", (
            "The link is 'prompt': the registry may give None in place of an exception"
        )
    with mock.patch.object(own, "get_model_version", return_value=mock.Mock(run_id="")):
        assert broken_at(line, own, where, "The version's run_id is empty") == "model", (
            "The link is 'model': a run_id may be empty text as well as None"
        )
    ### END HIDDEN TESTS

# %% check="lineage" points=2
walks: list[str] = []


def walk(entry: Mapping) -> Lineage:
    """Answers a, b, c and d: from tickets 1 to 3, from 10 to 13, unknown, from 3."""
    walks.append(entry["id"])
    if entry["id"].startswith("c"):
        raise BrokenLinkError("run", "deleted")
    found = {"a": ("t1", "t2", "t3"), "b": ("t10", "t11", "t13"), "d": ("t3",)}[entry["id"][0]]
    return Lineage(entry["id"], "", "", {}, "D", "C", found)


lines = [{"id": name} for name in ("d1", "a1", "c1", "b1", "a2", "c2")]
try:
    got = affected(["t1"], lines, walk)
except BrokenLinkError as error:
    raise AssertionError("One broken lineage must not end the search: its answer goes into the second list") from error
assert isinstance(got, tuple | list) and len(got) == 2, f"Return two lists; yours is {got!r}"  # noqa: PT018
touched, unknown = got
assert "b1" not in touched, "t1 is no part of t10: compare whole ids, not text within text"
assert list(touched) == ["a1", "a2"], (
    f"Ticket t1 is in the lineage of a1 and a2, in the order of the log; yours: {touched}"
)
assert list(unknown) != [], (
    "Whose lineage is broken cannot be cleared: c1 and c2 belong into the second list, not under the carpet"
)
assert list(unknown) == ["c1", "c2"], f"The second list is c1 and c2, in the order of the log; yours: {unknown}"
assert len(walks) == len(lines), (
    f"lineage_of is called once for each of {len(lines)} lines; yours called it {len(walks)} times"
)
touched, _ = affected(["t2", "t13"], lines, walk)
assert list(touched) == ["a1", "b1", "a2"], (
    f"At least one of the tickets, not all of them: a1, b1 and a2; yours: {touched}"
)
### BEGIN HIDDEN TESTS
assert tuple(map(list, affected([], lines, walk))) == ([], ["c1", "c2"]), "No tickets touch nothing"
assert tuple(map(list, affected(["t1"], [], walk))) == ([], []), "An empty log"
assert list(affected(["t3"], lines, walk)[0]) == ["d1", "a1", "a2"], "In the order of the log"


def _odd(entry: Mapping) -> Lineage:
    return {}["a fault of the program"]


try:
    affected(["t1"], lines, _odd)
    _quiet = True
except KeyError:
    _quiet = False
assert not _quiet, "Only BrokenLinkError means that nobody can say; any other exception is a fault of the program"
### END HIDDEN TESTS


# %% mistake="what is live now" of="lineage" says="Follow the versions in the line"
def trace(entry, client, store, name):
    prompt = client.get_prompt_version_by_alias(entry["prompt"], "live")
    model = client.get_model_version_by_alias(entry["model"], "live")
    run = client.get_run(model.run_id)
    if run.data.tags.get("adapter") != entry["adapter"]:
        raise BrokenLinkError("adapter", "other bytes")
    tags = run.data.tags
    ids = tuple(row["id"] for row in fleet.read_data(store / tags["data"]))
    return Lineage(entry["id"], prompt.template, model.run_id, run.data.params, tags["data"], tags["code"], ids)


def affected(ids, log, lineage_of):
    return [e["id"] for e in log if set(ids) & set(lineage_of(e).tickets)], []


# %% mistake="lets the registry's errors out" of="lineage" says="raise BrokenLinkError, which says which link"
def trace(entry, client, store, name):
    prompt = client.get_prompt_version(entry["prompt"], entry["prompt_version"])
    model = client.get_model_version(entry["model"], str(entry["model_version"]))
    run = client.get_run(model.run_id)
    tags = run.data.tags
    ids = tuple(row["id"] for row in fleet.read_data(store / tags["data"]))
    return Lineage(entry["id"], prompt.template, model.run_id, run.data.params, tags["data"], tags["code"], ids)


def affected(ids, log, lineage_of):
    return [], []


# %% mistake="believes the registry about the bytes" of="lineage" says="The service had loaded A2"
def trace(entry, client, store, name):
    prompt = None
    with suppress(MlflowException):
        prompt = client.get_prompt_version(entry["prompt"], entry["prompt_version"])
    if prompt is None:
        raise BrokenLinkError("prompt", "none")
    try:
        model = client.get_model_version(entry["model"], str(entry["model_version"]))
    except MlflowException as error:
        raise BrokenLinkError("model", "none") from error
    run = client.get_run(model.run_id)
    tags = run.data.tags
    for key in ("data", "code"):
        if not (store / tags[key]).is_dir() or name(store / tags[key]) != tags[key]:
            raise BrokenLinkError(key, "gone")
    ids = tuple(row["id"] for row in fleet.read_data(store / tags["data"]))
    return Lineage(entry["id"], prompt.template, model.run_id, run.data.params, tags["data"], tags["code"], ids)


def affected(ids, log, lineage_of):
    return [], []


# %% mistake="does not check the store" of="lineage" says="it no longer has its fingerprint"
def trace(entry, client, store, name):
    prompt = None
    with suppress(MlflowException):
        prompt = client.get_prompt_version(entry["prompt"], entry["prompt_version"])
    if prompt is None:
        raise BrokenLinkError("prompt", "none")
    try:
        model = client.get_model_version(entry["model"], str(entry["model_version"]))
    except MlflowException as error:
        raise BrokenLinkError("model", "none") from error
    run = client.get_run(model.run_id)
    tags = run.data.tags
    if tags.get("adapter") != entry["adapter"]:
        raise BrokenLinkError("adapter", "other bytes")
    for key in ("data", "code"):
        if key not in tags or not (store / tags[key]).is_dir():
            raise BrokenLinkError(key, "gone")
    ids = tuple(row["id"] for row in fleet.read_data(store / tags["data"]))
    return Lineage(entry["id"], prompt.template, model.run_id, run.data.params, tags["data"], tags["code"], ids)


def affected(ids, log, lineage_of):
    return [], []


# %% mistake="a deleted run will do" of="lineage" says="The run is deleted"
def trace(entry, client, store, name):
    prompt = None
    with suppress(MlflowException):
        prompt = client.get_prompt_version(entry["prompt"], entry["prompt_version"])
    if prompt is None:
        raise BrokenLinkError("prompt", "none")
    try:
        model = client.get_model_version(entry["model"], str(entry["model_version"]))
    except MlflowException as error:
        raise BrokenLinkError("model", "none") from error
    run = client.get_run(model.run_id)
    tags = run.data.tags
    if tags.get("adapter") != entry["adapter"]:
        raise BrokenLinkError("adapter", "other bytes")
    for key in ("data", "code"):
        if key not in tags or not (store / tags[key]).is_dir() or name(store / tags[key]) != tags[key]:
            if run.info.lifecycle_stage == "deleted":
                break
            raise BrokenLinkError(key, "gone")
    ids = tuple(row["id"] for row in fleet.read_data(store / tags["data"]))
    return Lineage(entry["id"], prompt.template, model.run_id, run.data.params, tags["data"], tags["code"], ids)


def affected(ids, log, lineage_of):
    return [], []


# %% mistake="expects an exception only" of="lineage" says="the registry may give None"
def trace(entry, client, store, name):
    try:
        prompt = client.get_prompt_version(entry["prompt"], entry["prompt_version"])
    except MlflowException as error:
        raise BrokenLinkError("prompt", "none") from error
    try:
        model = client.get_model_version(entry["model"], str(entry["model_version"]))
    except MlflowException as error:
        raise BrokenLinkError("model", "none") from error
    if not model.run_id:
        raise BrokenLinkError("model", "made by no run")
    try:
        run = client.get_run(model.run_id)
    except MlflowException as error:
        raise BrokenLinkError("run", "none") from error
    if run.info.lifecycle_stage == "deleted":
        raise BrokenLinkError("run", "deleted")
    tags = run.data.tags
    if tags.get("adapter") != entry["adapter"]:
        raise BrokenLinkError("adapter", "other bytes")
    for key in ("data", "code"):
        if key not in tags or not (store / tags[key]).is_dir() or name(store / tags[key]) != tags[key]:
            raise BrokenLinkError(key, "gone")
    ids = tuple(row["id"] for row in fleet.read_data(store / tags["data"]))
    return Lineage(entry["id"], prompt.template, model.run_id, run.data.params, tags["data"], tags["code"], ids)


def affected(ids, log, lineage_of):
    return [], []


# %% mistake="None only" of="lineage" says="a run_id may be empty text"
def trace(entry, client, store, name):
    try:
        prompt = client.get_prompt_version(entry["prompt"], entry["prompt_version"])
    except MlflowException as error:
        raise BrokenLinkError("prompt", "none") from error
    if prompt is None:
        raise BrokenLinkError("prompt", "none")
    try:
        model = client.get_model_version(entry["model"], str(entry["model_version"]))
    except MlflowException as error:
        raise BrokenLinkError("model", "none") from error
    if model.run_id is None:
        raise BrokenLinkError("model", "made by no run")
    try:
        run = client.get_run(model.run_id)
    except MlflowException as error:
        raise BrokenLinkError("run", "none") from error
    if run.info.lifecycle_stage == "deleted":
        raise BrokenLinkError("run", "deleted")
    tags = run.data.tags
    if tags.get("adapter") != entry["adapter"]:
        raise BrokenLinkError("adapter", "other bytes")
    for key in ("data", "code"):
        if key not in tags or not (store / tags[key]).is_dir() or name(store / tags[key]) != tags[key]:
            raise BrokenLinkError(key, "gone")
    ids = tuple(row["id"] for row in fleet.read_data(store / tags["data"]))
    return Lineage(entry["id"], prompt.template, model.run_id, run.data.params, tags["data"], tags["code"], ids)


def affected(ids, log, lineage_of):
    return [], []


# %% mistake="any error means unknown" of="lineage" says="a fault of the program"
def affected(ids, log, lineage_of):
    touched, unknown = [], []
    for entry in log:
        try:
            if set(ids) & set(lineage_of(entry).tickets):
                touched.append(entry["id"])
        except LookupError:
            unknown.append(entry["id"])
    return touched, unknown


# %% mistake="text within text" of="lineage" says="compare whole ids"
def affected(ids, log, lineage_of):
    touched, unknown = [], []
    for entry in log:
        try:
            text = json.dumps(lineage_of(entry).tickets).replace('"', "")
        except BrokenLinkError:
            unknown.append(entry["id"])
            continue
        if any(own in text for own in ids):
            touched.append(entry["id"])
    return touched, unknown


# %% mistake="a broken lineage ends the search" of="lineage" says="One broken lineage must not end the search"
def affected(ids, log, lineage_of):
    return [e["id"] for e in log if set(ids) & set(lineage_of(e).tickets)], []


# %% mistake="what cannot be traced is clean" of="lineage" says="cannot be cleared"
def affected(ids, log, lineage_of):
    touched = []
    for entry in log:
        try:
            if set(ids) & set(lineage_of(entry).tickets):
                touched.append(entry["id"])
        except BrokenLinkError:
            pass
    return touched, []


# %% mistake="all of the tickets" of="lineage" says="At least one of the tickets"
def affected(ids, log, lineage_of):
    touched, unknown = [], []
    for entry in log:
        try:
            if set(ids) <= set(lineage_of(entry).tickets):
                touched.append(entry["id"])
        except BrokenLinkError:
            unknown.append(entry["id"])
    return touched, unknown


# %% alternative="a chain of steps" of="lineage"
def trace(entry, client, store, name):
    @contextmanager
    def link(which):
        try:
            yield
        except (MlflowException, AssertionError, KeyError, OSError) as error:
            raise BrokenLinkError(which, repr(error)) from error

    with link("prompt"):
        prompt = client.get_prompt_version(entry["prompt"], str(entry["prompt_version"]))
        assert prompt is not None
    with link("model"):
        run_id = client.get_model_version(entry["model"], str(entry["model_version"])).run_id
        assert run_id
    with link("run"):
        run = client.get_run(run_id)
        assert run.info.lifecycle_stage == "active"
    tags = run.data.tags
    with link("adapter"):
        assert tags["adapter"] == entry["adapter"]
    for key in ("data", "code"):
        with link(key):
            assert name(store / tags[key]) == tags[key]
            assert (store / tags[key]).exists()
    ids = [row["id"] for row in fleet.read_data(store / tags["data"])]
    return Lineage(entry["id"], prompt.template, run_id, dict(run.data.params), tags["data"], tags["code"], tuple(ids))


def affected(ids, log, lineage_of):
    wanted, found = frozenset(ids), {True: [], None: [], False: []}
    for entry in log:
        try:
            found[not wanted.isdisjoint(lineage_of(entry).tickets)].append(entry["id"])
        except BrokenLinkError:
            found[None].append(entry["id"])
    return found[True], found[None]


# %%
known = {held_: name for name, held_ in stored.items()}
entry = log[-1]
lineage = trace(entry, tracking, store, fingerprint)
source = {row["id"]: row for row in fleet.read_data(store / lineage.data)}
boxes = [
    ("answer", 0, 1.5, f"{entry['id']}\n{entry['reply'][:30]}…"),
    ("prompt", 1, 2.6, f"{entry['prompt']} {entry['prompt_version']}\n{lineage.template.splitlines()[0][:24]}…"),
    ("model version", 1, 0.4, f"{entry['model']} {entry['model_version']}\nadapter {entry['adapter'][:8]}"),
    (
        "run",
        2,
        0.4,
        f"{tracking.get_run(lineage.run_id).info.run_name}, {tracking.get_run(lineage.run_id).data.tags['mlflow.user']}\nseed {lineage.params['seed']}, rate {lineage.params['learning_rate']}",
    ),
    ("data", 3, 1.4, f"{lineage.data[:8]}\n(people say {known[lineage.data]})"),
    ("code", 3, -0.6, f"{lineage.code[:8]}\n(people say {known[lineage.code]})"),
    ("tickets", 4, 1.4, f"{len(lineage.tickets)} of them\n{lineage.tickets[0]} …"),
]
fig, ax = plt.subplots(figsize=(12.5, 3.6))
spot = {kind: (x, y) for kind, x, y, _ in boxes}
for start, end in (("answer", "prompt"), ("answer", "model version"), ("model version", "run"), ("run", "data"), ("run", "code"), ("data", "tickets")):  # fmt: skip
    ax.annotate("", spot[end], spot[start], arrowprops={"arrowstyle": "-|>", "color": "#8c8c8c", "shrinkA": 62, "shrinkB": 62, "lw": 1.4})  # fmt: skip
for kind, x, y, text in boxes:
    colour = COLOURS.library if kind in ("prompt", "model version", "run") else COLOURS.after
    ax.text(x, y, text, ha="center", va="center", fontsize=8.5, color=COLOURS.truth, bbox={"boxstyle": "round,pad=0.5", "fc": "white", "ec": colour, "lw": 1.8})  # fmt: skip
    ax.text(x, y + 0.62, kind, ha="center", va="bottom", fontsize=9.5, fontweight="bold", color=colour)
ax.set(xlim=(-0.5, 4.5), ylim=(-1.2, 3.7), title="The lineage of the last answer: found in MLflow (purple), by fingerprint in files (blue)")  # fmt: skip
ax.axis("off")
plt.show()

# %% [markdown]
# Every arrow is one lookup that either succeeds or says why not. Purple boxes are rows in MLflow's database; blue ones are bytes, checked by their fingerprint each time they are used. Nothing in the chain is a name that somebody could give to something else.
#
# ## Which answers did the contractor touch?
#
# In the second week a contractor labelled the tickets of one company, twelve of a hundred and forty-four, and set every urgency to low. The labels are wrong, and the question is who was answered by an adapter that learnt from them. The walk gives the answers that *can* be touched. Which ones *are*, only training tells: put the labels right, do the runs again from what they recorded, and ask again. As a yardstick, the same with the wrong labels and another seed, which is what you would get by training again for no reason.

# %%
contractor = [t.id for t in fleet.tickets([fleet.CONTRACTOR])]
walk_once = cache(lambda version, prompt: trace(next(e for e in log if (e["model_version"], e["prompt_version"]) == (version, prompt)), tracking, store, fingerprint))  # fmt: skip
touched, unknown = affected(contractor, log, lambda entry: walk_once(entry["model_version"], entry["prompt_version"]))

right_labels = {t.id: t for t in fleet.tickets([fleet.CONTRACTOR], contractor=False)}


def put_right(data: str) -> Path:
    """A data folder of the store with the contractor's labels corrected."""
    rows = [
        row | {"triage": json.loads(right_labels[row["id"]].triage.to_json())} if row["id"] in right_labels else row
        for row in fleet.read_data(store / data)
    ]
    (root / "right").mkdir(exist_ok=True)
    (root / "right" / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root / "right"


changed: dict[str, list[bool]] = {"labels put right": [], "another seed": []}
for version in sorted({entry["model_version"] for entry in log if entry["id"] in touched}):
    lines = [entry for entry in log if entry["model_version"] == version]
    own = trace(lines[0], tracking, store, fingerprint)
    settings = {key: float(value) for key, value in own.params.items()}
    for what, data, chosen in (
        ("labels put right", put_right(own.data), settings),
        ("another seed", store / own.data, settings | {"seed": seed}),
    ):
        folder = fleet.train(data, store / own.code, root / "what if" / f"{version} {what}", chosen)
        texts = [render(own.template, {"ticket": entry["ticket"]}) for entry in lines]
        changed[what] += [now != entry["reply"] for now, entry in zip(generator(folder)(texts), lines, strict=True)]

shares = {what: np.array(found) for what, found in changed.items()}
card.record("answered", len(log), format="d", label="answers in the log")
card.record("touched", len(touched), format="d", label="answers with the contractor's tickets in their lineage")
for key, what in (("changed", "labels put right"), ("reseeded", "another seed")):
    low, high = triage.interval(shares[what])
    card.record(key, shares[what].mean(), low=low, high=high, format=".0%", tolerance=0.05, label=f"of these, answers that change, {what}")  # fmt: skip

fig, ax = plt.subplots(figsize=(9, 2.6))
bars = [
    ("in the log", len(log), None, COLOURS.before),
    ("contractor in the lineage", len(touched), None, COLOURS.library),
    (
        "change with the labels put right",
        int(shares["labels put right"].sum()),
        shares["labels put right"],
        COLOURS.wrong,
    ),
    ("change with another seed", int(shares["another seed"].sum()), shares["another seed"], COLOURS.other),
]
for place, (_, height, found, colour) in enumerate(bars):
    ax.barh(-place, height, color=colour, height=0.62)
    if found is not None:
        low, high = (bound * len(found) for bound in triage.interval(found))
        ax.plot([low, high], [-place, -place], color=COLOURS.truth, lw=1.6)
    ax.text(height + len(log) * 0.07 if found is not None else height + 2, -place, f"{height}", va="center", color=colour, fontweight="bold")  # fmt: skip
ax.set_yticks([0, -1, -2, -3], [what for what, *_ in bars])
ax.set(xlabel="answers", xlim=(0, len(log) * 1.1), title="What lineage says, and what training says")
ax.grid(visible=False, axis="y")
plt.show()

# %% [markdown]
# Lineage names {{touched}} of {{answered}} answers. With the labels put right {{changed}} ({{changed:interval}}) of these change, and with another seed, labels as they were, {{reseeded}} ({{reseeded:interval}}). So lineage is a bound, and a safe one: nobody outside it needs to be told. It is a loose one, too. And that an answer changes does not show that the labels had spoilt it: another seed, which spoils nothing, changes more of them. For the customers look at what the answers say (urgency low, where the message is urgent), within the list that lineage gives.
#
# ## When the tracking server dies
#
# In a team the records lie on a server. Then your training has a network in it. MLflow's client waits and tries again when it gets no answer, seven times by default; this is how long it waits for *one* loss before it raises, according to the library that counts:

# %%
waiting, retry = 0.0, Retry(total=7, backoff_factor=2)  # MLflow's defaults, without their random part
for _ in range(7):
    retry = retry.increment("POST", "/api/2.0/mlflow/runs/log-metric", error=ConnectionError())
    waiting += retry.get_backoff_time()
print(f"{waiting:.0f} s of waiting, and then an exception in the training loop")
card.record(
    "stall", waiting, format=".0f", unit="s", label="that one logged number waits for a dead server, by default"
)

# %% [markdown]
# So a server that is down for an hour stops every training in the house, and those whose authors have not caught the exception end there. The usual answer is a `try` around every call that logs. Then trainings live and numbers are lost, without a word.
#
# The better answer is old: an *outbox*. Logging means appending to a local file, which does not fail with the network. Sending is another matter: whatever is in the file is sent, and crossed out when the server has said that it has it. It may be sent twice, since a reply can get lost after the work was done. That is harmless if the server can recognise it. MLflow's does: in its table of metrics key, step, *timestamp* and value are the primary key, so the same number sent again is the same row, if the timestamp was taken when it was logged.
#
# **Exercise.** Write the class `Outbox(file, client)` with two methods. `file` is a `Path`; the file need not exist yet, and its folder does.
#
# - `log(run_id, key, value, step)` keeps the metric (`value` is a number, or NaN when a training diverges): when it returns, the metric is in the file, safe from the end of this process, with the time of now in milliseconds. It never talks to the server.
# - `flush()` sends what the file holds, oldest first, by `client.log_batch(run_id, metrics=[Metric(key, value, timestamp, step), …])`: at most 1,000 metrics a call (MLflow refuses more), and a call is for one run. What was acknowledged (the call returned) leaves the file. If a call raises an `Exception`, `flush` stops, keeps in the file what was not acknowledged, and does not raise. It returns how many metrics are still in the file.
#
# Another `Outbox` on the same file, perhaps in another process after a crash, goes on where the first ended. Only one is used at a time, and what counts is the file: an `Outbox` remembers nothing from one call to the next. *About 25 lines.*
#
# <details><summary>Hint 1</summary>At which two moments can the process end, and what is lost or doubled then? In which order do you send and cross out?</details>
# <details><summary>Hint 2</summary>One JSON list a line, opened, appended and closed in log. In flush read all lines, and as long as there are any take up to 1,000 of the first run from the front, send, then write back the rest.</details>
# <details><summary>Hint 3</summary>Write the rest to a file beside it and <code>os.replace</code> it over the old one: a crash in between leaves the old or the new file, never half of one. Timestamp: <code>int(time.time() * 1000)</code> in log.</details>


# %% exercise="outbox" difficulty=3 minutes=12
class Outbox:
    """Metrics on their way to a server that may be down: kept in a file until they have arrived."""

    ### BEGIN SOLUTION
    def __init__(self, file: Path, client: MlflowClient) -> None:
        self.file, self.client = file, client

    def log(self, run_id: str, key: str, value: float, step: int) -> None:
        """Keep a metric with the time of now."""
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps([run_id, key, float(value), int(time.time() * 1000), step]) + "\n")

    def flush(self) -> int:
        """Send what is kept; return how much is left."""
        kept = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        while kept:
            rows = [json.loads(line) for line in kept[:1000]]
            part = list(takewhile(lambda row, first=rows[0][0]: row[0] == first, rows))
            try:
                self.client.log_batch(rows[0][0], metrics=[Metric(*row[1:]) for row in part])
            except Exception:
                break
            kept = kept[len(part) :]
            beside = self.file.with_suffix(".new")
            beside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            os.replace(beside, self.file)
        return len(kept)

    ### END SOLUTION


# %% check="outbox" points=2
class Unsteady:
    """A client of a real store, over a line that fails in some calls: before they arrive, or after, when the reply is lost."""

    def __init__(self, client: MlflowClient, *faults: str) -> None:
        self.client, self.faults, self.sizes, self.sent = client, list(faults), [], []

    def log_batch(self, run_id: str, metrics: Sequence[Metric] = (), **rest: object) -> None:
        time.sleep(0.003)  # time passes on a network
        fault = self.faults.pop(0) if self.faults else ""
        self.sizes.append(len(metrics))
        self.sent += metrics
        if fault == "before":
            raise ConnectionError("no route to the server")
        if fault == "stopped":
            raise KeyboardInterrupt
        if fault == "odd":
            raise RuntimeError("a proxy answered")
        self.client.log_batch(run_id, metrics=metrics, **rest)
        if fault == "after":
            raise MlflowException("the reply was lost")

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"flush uses client.log_batch, and log does not use the client at all; yours calls {name}")


def arrived(client: MlflowClient, run_id: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(run_id, "loss"))


with fresh_store() as (own, experiment), tempfile.TemporaryDirectory(dir=root) as place:
    file = Path(place) / "outbox"
    run_id = own.create_run(experiment).info.run_id
    line = Unsteady(own, "before")
    outbox = Outbox(file, line)
    try:
        left = outbox.flush()
    except FileNotFoundError as error:
        raise AssertionError("There is no file before the first log: nothing is kept, and flush returns 0") from error
    assert left == 0, f"Nothing was logged: flush returns 0, also when there is no file yet; yours returned {left}"
    outbox.log(run_id, "loss", 2.0, 0)
    outbox.log(run_id, "loss", 1.5, 1)
    assert line.sizes == [], "log must not talk to the server: that is what flush is for"
    try:
        left = outbox.flush()
    except (MlflowException, OSError) as error:
        raise AssertionError(
            "A dead server must not end a training: flush keeps what was not sent and does not raise"
        ) from error
    assert left == 2, f"Nothing arrived, two metrics are still kept: flush returns 2; yours returned {left}"
    outbox.log(run_id, "loss", 1.25, 2)
    left = outbox.flush()
    assert arrived(own, run_id) == [(0, 2.0), (1, 1.5), (2, 1.25)], (
        "The first attempt failed before anything arrived, the second went through, and the store holds "
        f"{arrived(own, run_id)}: cross out only what the server has acknowledged"
    )
    times = [m.timestamp for m in own.get_metric_history(run_id, "loss")]
    assert max(abs(t - 1000 * time.time()) for t in times) < 600_000, (
        f"The time is that of now in milliseconds since 1970, int(time.time() * 1000); yours are {times}"
    )
    assert not any(isinstance(metric.timestamp, float) for metric in line.sent), (
        "MLflow's protocol knows whole milliseconds, and over HTTP a fraction raises TypeError: int(time.time() * 1000)"
    )
    assert [metric.step for metric in line.sent[-3:]] == [0, 1, 2], (
        f"What was logged first is sent first; yours sent steps {[metric.step for metric in line.sent[-3:]]}"
    )
    assert left == 0, f"Everything has arrived: flush returns 0; yours returned {left}"
    sent = sum(line.sizes)
    outbox.flush()
    assert sum(line.sizes) == sent, "What was acknowledged leaves the file: your second flush sent it again"

    second = own.create_run(experiment).info.run_id
    outbox = Outbox(file, Unsteady(own, "after"))
    outbox.log(second, "loss", 3.0, 0)
    outbox.log(second, "loss", 2.5, 1)
    try:
        left = outbox.flush()
    except MlflowException as error:
        raise AssertionError(
            "MLflow's own exception (here: the reply was lost) must not end a training either: catch Exception"
        ) from error
    assert left == 2, (
        f"No acknowledgement came: for all you know nothing arrived, and 2 are still kept; yours returned {left}"
    )
    assert outbox.flush() == 0, "The second attempt goes through"
    assert arrived(own, second) == [(0, 3.0), (1, 2.5)], (
        "The reply was lost, so you sent twice, and MLflow took the two for different rows, since their times differ: take "
        f"the time in log, not in flush; the store holds {arrived(own, second)}"
    )
    ### BEGIN HIDDEN TESTS
    _run = own.create_run(experiment).info.run_id
    _line = Unsteady(own, "after", "before", "after")
    _box = Outbox(file, _line)
    for _step in range(7):
        _box.log(_run, "loss", 1.0 / (_step + 1), _step)
        _box.flush()
    assert _box.flush() == 0, "A steady line delivers all that is left"
    assert arrived(own, _run) == [(s, 1.0 / (s + 1)) for s in range(7)], f"Each once; there is {arrived(own, _run)}"
    _box.log(_run, "last", 4.0, 0)
    _line.faults = ["odd"]
    try:
        _left = _box.flush()
    except RuntimeError as error:
        raise AssertionError("Whatever Exception a call raises, flush keeps the metric and does not raise") from error
    assert _left == 1, f"Whatever Exception a call raises, the metric is kept; yours says that {_left} are"
    _line.faults = ["stopped"]
    try:
        _box.flush()
        _stopped = False
    except KeyboardInterrupt:
        _stopped = True
    assert _stopped, "Catch Exception and no more: whoever interrupts a flush (KeyboardInterrupt) wants it to stop"
    assert _box.flush() == 0, "After an interrupt nothing is lost"
    assert [m.value for m in own.get_metric_history(_run, "last")] == [4.0], "After an interrupt nothing is lost"
    _box.log(_run, "loss", float("nan"), 7)
    _box.log(_run, "other", 1, 0)
    assert _box.flush() == 0, "NaN is a value, and a whole number as well"
    assert np.isnan(own.get_metric_history(_run, "loss")[-1].value), "A loss of NaN arrives as NaN"
    assert [m.value for m in own.get_metric_history(_run, "other")] == [1.0], "Other keys arrive under their names"
    _box.log(_run, "eval loss/all", 0.5, 0)
    _box.log(_run, "twice", 1.0, 0)
    _box.log(_run, "twice", 2.0, 0)
    assert _box.flush() == 0, "A steady line delivers all that is left"
    assert [m.value for m in own.get_metric_history(_run, "eval loss/all")] == [0.5], "A key may hold blanks"
    assert sorted(m.value for m in own.get_metric_history(_run, "twice")) == [1.0, 2.0], (
        "Two values of a step are two metrics"
    )
    _other = Outbox(file, own)
    _other.log(_run, "turn", 2.0, 0)
    assert _box.flush() == 0, "What another Outbox has left in the file is sent, also by one that was made before"
    assert [m.value for m in own.get_metric_history(_run, "turn")] == [2.0], (
        "The file is what counts: read it in each flush, since another Outbox may have written to it"
    )
    ### END HIDDEN TESTS

# %% check="outbox" points=2
with fresh_store() as (own, experiment), tempfile.TemporaryDirectory(dir=root) as place:
    file = Path(place) / "outbox"
    one, two = (own.create_run(experiment).info.run_id for _ in range(2))
    before = Outbox(file, Unsteady(own, "before"))
    before.log(one, "loss", 2.0, 0)
    before.flush()
    before.log(one, "loss", 1.5, 1)
    steady = Unsteady(own)
    after = Outbox(file, steady)  # the process of the first has ended, with nothing said
    assert after.flush() == 0, "A new Outbox on the same file sends what the first has left there"
    assert arrived(own, one) == [(0, 2.0), (1, 1.5)], (
        "The process ended after log had returned, and another Outbox on the same file must send what it left: write the "
        f"metric to the file and close it in log; the store holds {arrived(own, one)}"
    )
    for step in range(3):
        after.log(one, "loss", step, 10 + step)
        after.log(two, "loss", -step, step)
    steady.sizes.clear()
    steady.faults = ["before"]
    left = after.flush()
    assert (len(steady.sizes), left) == (1, 6), (
        "The first call failed, so flush stops, with 6 metrics kept, and does not try the other run on a dead line; yours "
        f"made {len(steady.sizes)} calls and returned {left}"
    )
    assert after.flush() == 0, "Two runs may share an outbox: a call of log_batch for each"
    assert arrived(own, two) == [(0, 0.0), (1, -1.0), (2, -2.0)], (
        f"Each metric belongs to its own run; the second run has {arrived(own, two)}"
    )
    for step in range(1203):
        after.log(two, "many", step / 7, step)
    steady.sizes.clear()
    steady.faults = ["", "before"]
    left = after.flush()
    assert left > 0 or max(steady.sizes) <= 1000, (
        "MLflow refuses more than 1,000 metrics in one call: send them in parts"
    )
    assert max(steady.sizes) <= 1000, f"At most 1,000 metrics a call; yours sent {max(steady.sizes)}"
    count_now = len(own.get_metric_history(two, "many"))
    assert left == 1203 - count_now, (
        f"{count_now} of 1,203 arrived before the line broke, so {1203 - count_now} are left; yours returned {left}"
    )
    assert steady.sizes[0] + left == 1203, "The first part was acknowledged and leaves the file, the second stays"
    assert after.flush() == 0, "The rest goes with the next flush"
    assert sum(steady.sizes[2:]) == left, (
        f"The first part was acknowledged and must have left the file, though the second failed: {left} were to be sent, yours "
        f"sent {sum(steady.sizes[2:])}"
    )
    history = own.get_metric_history(two, "many")
    assert sorted(m.step for m in history) == list(range(1203)), "Every metric arrives once"
### BEGIN HIDDEN TESTS
with fresh_store() as (_own, _experiment), tempfile.TemporaryDirectory(dir=root) as _place:
    _runs = [_own.create_run(_experiment).info.run_id for _ in range(2)]
    _rng = np.random.default_rng(2)
    _want = {r: set() for r in _runs}
    for _step in range(60):
        _box = Outbox(Path(_place) / "box", Unsteady(_own, *_rng.choice(["", "before", "after"], 3)))
        _run = _runs[int(_rng.integers(2))]
        _box.log(_run, "loss", _step / 3, _step)
        _want[_run].add((_step, _step / 3))
        if _rng.random() < 0.4:
            _box.flush()
    assert Outbox(Path(_place) / "box", _own).flush() == 0, "A steady line delivers all that is left"
    for _run in _runs:
        assert arrived(_own, _run) == sorted(_want[_run]), "Each metric of each run arrives once"
### END HIDDEN TESTS


# %% mistake="the time of sending" of="outbox" says="take the time in log, not in flush"
class Outbox:
    def __init__(self, file, client):
        self.file, self.client = file, client

    def log(self, run_id, key, value, step):
        with self.file.open("a") as lines:
            lines.write(json.dumps([run_id, key, value, step]) + "\n")

    def flush(self):
        kept = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        while kept:
            run_id, key, value, step = kept[0]
            try:
                self.client.log_batch(run_id, metrics=[Metric(key, value, int(time.time() * 1000), step)])
            except Exception:
                break
            kept = kept[1:]
            self.file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        return len(kept)


# %% mistake="crosses out before it sends" of="outbox" says="cross out only what the server has acknowledged"
class Outbox:
    def __init__(self, file, client):
        self.file, self.client = file, client

    def log(self, run_id, key, value, step):
        with self.file.open("a") as lines:
            lines.write(json.dumps([run_id, key, value, int(time.time() * 1000), step]) + "\n")

    def flush(self):
        kept = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        self.file.write_text("")
        for place, (run_id, *metric) in enumerate(kept):
            try:
                self.client.log_batch(run_id, metrics=[Metric(*metric)])
            except Exception:
                return len(kept) - place
        return 0


# %% mistake="raises when the server is down" of="outbox" says="A dead server must not end a training"
class Outbox:
    def __init__(self, file, client):
        self.file, self.client = file, client

    def log(self, run_id, key, value, step):
        with self.file.open("a") as lines:
            lines.write(json.dumps([run_id, key, value, int(time.time() * 1000), step]) + "\n")

    def flush(self):
        kept = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        for run_id, *metric in kept:
            self.client.log_batch(run_id, metrics=[Metric(*metric)])
        self.file.write_text("")
        return 0


# %% mistake="in memory" of="outbox" says="must send what it left"
class Outbox:
    def __init__(self, file, client):
        self.kept, self.client = [], client

    def log(self, run_id, key, value, step):
        self.kept.append((run_id, Metric(key, value, int(time.time() * 1000), step)))

    def flush(self):
        while self.kept:
            run_id, metric = self.kept[0]
            try:
                self.client.log_batch(run_id, metrics=[metric])
            except Exception:
                break
            self.kept.pop(0)
        return len(self.kept)


# %% mistake="keeps the file open" of="outbox" says="close it in log"
class Outbox:
    def __init__(self, file, client):
        self.file, self.client, self.lines = file, client, file.open("a")

    def log(self, run_id, key, value, step):
        self.lines.write(json.dumps([run_id, key, value, int(time.time() * 1000), step]) + "\n")

    def flush(self):
        self.lines.flush()
        kept = [json.loads(line) for line in self.file.read_text().splitlines()]
        while kept:
            run_id, *metric = kept[0]
            try:
                self.client.log_batch(run_id, metrics=[Metric(*metric)])
            except Exception:
                break
            kept = kept[1:]
        self.lines.close()
        self.file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.lines = self.file.open("a")
        return len(kept)


# %% mistake="sends while logging" of="outbox" says="log must not talk to the server"
class Outbox:
    def __init__(self, file, client):
        self.file, self.client = file, client

    def log(self, run_id, key, value, step):
        with self.file.open("a") as lines:
            lines.write(json.dumps([run_id, key, value, int(time.time() * 1000), step]) + "\n")
        self.flush()

    def flush(self):
        kept = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        while kept:
            run_id, *metric = kept[0]
            try:
                self.client.log_batch(run_id, metrics=[Metric(*metric)])
            except Exception:
                break
            kept = kept[1:]
            self.file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        return len(kept)


# %% mistake="everything in one call" of="outbox" says="MLflow refuses more than 1,000"
class Outbox:
    def __init__(self, file, client):
        self.file, self.client = file, client

    def log(self, run_id, key, value, step):
        with self.file.open("a") as lines:
            lines.write(json.dumps([run_id, key, value, int(time.time() * 1000), step]) + "\n")

    def flush(self):
        kept = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        for run_id in dict.fromkeys(row[0] for row in kept):
            try:
                self.client.log_batch(run_id, metrics=[Metric(*row[1:]) for row in kept if row[0] == run_id])
            except Exception:
                break
            kept = [row for row in kept if row[0] != run_id]
            self.file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        return len(kept)


# %% mistake="never crosses out" of="outbox" says="What was acknowledged leaves the file"
class Outbox:
    def __init__(self, file, client):
        self.file, self.client = file, client

    def log(self, run_id, key, value, step):
        with self.file.open("a") as lines:
            lines.write(json.dumps([run_id, key, value, int(time.time() * 1000), step]) + "\n")

    def flush(self):
        kept = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        for place, (run_id, *metric) in enumerate(kept):
            try:
                self.client.log_batch(run_id, metrics=[Metric(*metric)])
            except Exception:
                return len(kept) - place
        return 0


# %% mistake="cannot be interrupted" of="outbox" says="Catch Exception and no more"
class Outbox:
    def __init__(self, file, client):
        self.file, self.client = file, client

    def log(self, run_id, key, value, step):
        with self.file.open("a") as lines:
            lines.write(json.dumps([run_id, key, value, int(time.time() * 1000), step]) + "\n")

    def flush(self):
        kept = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        while kept:
            run_id, *metric = kept[0]
            try:
                self.client.log_batch(run_id, metrics=[Metric(*metric)])
            except:  # noqa: E722
                break
            kept = kept[1:]
            self.file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        return len(kept)


# %% mistake="seconds" of="outbox" says="in milliseconds since 1970"
class Outbox:
    def __init__(self, file, client):
        self.file, self.client = file, client

    def log(self, run_id, key, value, step):
        with self.file.open("a") as lines:
            lines.write(json.dumps([run_id, key, value, int(time.time()), step]) + "\n")

    def flush(self):
        kept = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        while kept:
            run_id, *metric = kept[0]
            try:
                self.client.log_batch(run_id, metrics=[Metric(*metric)])
            except Exception:
                break
            kept = kept[1:]
            self.file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        return len(kept)


# %% mistake="catches what it expects" of="outbox" says="Whatever Exception a call raises"
class Outbox:
    def __init__(self, file, client):
        self.file, self.client = file, client

    def log(self, run_id, key, value, step):
        with self.file.open("a") as lines:
            lines.write(json.dumps([run_id, key, value, int(time.time() * 1000), step]) + "\n")

    def flush(self):
        kept = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        while kept:
            run_id, *metric = kept[0]
            try:
                self.client.log_batch(run_id, metrics=[Metric(*metric)])
            except (OSError, MlflowException):
                break
            kept = kept[1:]
            self.file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        return len(kept)


# %% mistake="fractions of milliseconds" of="outbox" says="knows whole milliseconds"
class Outbox:
    def __init__(self, file, client):
        self.file, self.client = file, client

    def log(self, run_id, key, value, step):
        with self.file.open("a") as lines:
            lines.write(json.dumps([run_id, key, value, time.time() * 1000, step]) + "\n")

    def flush(self):
        kept = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        while kept:
            run_id, *metric = kept[0]
            try:
                self.client.log_batch(run_id, metrics=[Metric(*metric)])
            except Exception:
                break
            kept = kept[1:]
            self.file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        return len(kept)


# %% mistake="the newest first" of="outbox" says="What was logged first is sent first"
class Outbox:
    def __init__(self, file, client):
        self.file, self.client = file, client

    def log(self, run_id, key, value, step):
        with self.file.open("a") as lines:
            lines.write(json.dumps([run_id, key, value, int(time.time() * 1000), step]) + "\n")

    def flush(self):
        kept = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        while kept:
            run_id, *metric = kept[-1]
            try:
                self.client.log_batch(run_id, metrics=[Metric(*metric)])
            except Exception:
                break
            kept.pop()
            self.file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        return len(kept)


# %% mistake="goes on with the next run" of="outbox" says="does not try the other run on a dead line"
class Outbox:
    def __init__(self, file, client):
        self.file, self.client = file, client

    def log(self, run_id, key, value, step):
        with self.file.open("a") as lines:
            lines.write(json.dumps([run_id, key, value, int(time.time() * 1000), step]) + "\n")

    def flush(self):
        kept = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        for run_id in dict.fromkeys(row[0] for row in kept):
            part = [row for row in kept if row[0] == run_id][:1000]
            with suppress(Exception):
                self.client.log_batch(run_id, metrics=[Metric(*row[1:]) for row in part])
                kept = [row for row in kept if row not in part]
        self.file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        return len(kept)


# %% mistake="crosses out all or nothing" of="outbox" says="must have left the file, though the second failed"
class Outbox:
    def __init__(self, file, client):
        self.file, self.client = file, client

    def log(self, run_id, key, value, step):
        with self.file.open("a") as lines:
            lines.write(json.dumps([run_id, key, value, int(time.time() * 1000), step]) + "\n")

    def flush(self):
        kept = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        while kept:
            part = list(takewhile(lambda row, first=kept[0][0]: row[0] == first, kept[:1000]))
            try:
                self.client.log_batch(kept[0][0], metrics=[Metric(*row[1:]) for row in part])
            except Exception:
                return len(kept)
            kept = kept[len(part) :]
        self.file.write_text("")
        return 0


# %% mistake="reads the file once" of="outbox" says="The file is what counts"
class Outbox:
    def __init__(self, file, client):
        self.file, self.client = file, client
        self.kept = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def log(self, run_id, key, value, step):
        self.kept.append([run_id, key, value, int(time.time() * 1000), step])
        with self.file.open("a") as lines:
            lines.write(json.dumps(self.kept[-1]) + "\n")

    def flush(self):
        while self.kept:
            part = list(takewhile(lambda row: row[0] == self.kept[0][0], self.kept[:1000]))
            try:
                self.client.log_batch(part[0][0], metrics=[Metric(*row[1:]) for row in part])
            except Exception:
                break
            self.kept = self.kept[len(part) :]
            self.file.write_text("".join(json.dumps(row) + "\n" for row in self.kept))
        return len(self.kept)


# %% mistake="blanks between the fields" of="outbox" says="A key may hold blanks"
class Outbox:
    def __init__(self, file, client):
        self.file, self.client = file, client

    def log(self, run_id, key, value, step):
        with self.file.open("a") as lines:
            lines.write(f"{run_id} {key} {float(value)!r} {int(time.time() * 1000)} {step}\n")

    def flush(self):
        kept = self.file.read_text().splitlines() if self.file.exists() else []
        while kept:
            fields = kept[0].split()
            run_id, key, value, moment, step = fields[0], fields[1], *fields[-3:]
            try:
                self.client.log_batch(run_id, metrics=[Metric(key, float(value), int(moment), int(step))])
            except Exception:
                break
            kept = kept[1:]
            self.file.write_text("".join(line + "\n" for line in kept))
        return len(kept)


# %% alternative="a database as the file" of="outbox"
class Outbox:
    def __init__(self, file, client):
        self.file, self.client = file, client
        self._do("CREATE TABLE IF NOT EXISTS m (id INTEGER PRIMARY KEY, run, key, value, time, step)")

    def _do(self, statement, *values):
        base = sqlite3.connect(self.file)
        try:
            with base:
                return base.execute(statement, values).fetchall()
        finally:
            base.close()

    def log(self, run_id, key, value, step):
        now = time.time_ns() // 1_000_000
        text = repr(float(value))
        self._do("INSERT INTO m (run, key, value, time, step) VALUES (?, ?, ?, ?, ?)", run_id, key, text, now, step)

    def flush(self):
        while first := self._do("SELECT run FROM m ORDER BY id LIMIT 1"):
            rows = self._do(
                "SELECT id, key, value, time, step FROM m WHERE run = ? ORDER BY id LIMIT 1000", first[0][0]
            )
            metrics = [Metric(key, float(value), moment, step) for _, key, value, moment, step in rows]
            try:
                self.client.log_batch(first[0][0], metrics=metrics)
            except Exception:
                break
            self._do("DELETE FROM m WHERE run = ? AND id <= ?", first[0][0], rows[-1][0])
        return self._do("SELECT count(*) FROM m")[0][0]


# %% [markdown]
# Now in earnest: MLflow's server in a process of its own, with its own database, and three trainings of 60 steps that log to it over HTTP (only the logging is real: the losses come from a formula). After step 20 the server is killed, as the kernel would kill it when memory runs out; before step 40 somebody has started it again. One training logs directly, one wraps each call in a `try`, one uses your outbox. The client's retries are switched off here, so that nothing waits. In the end the adapter goes up as well, through the server, which hands files on to the store behind it.


# %%
# What `mlflow server --backend-store-uri … --artifacts-destination … --workers 1` starts, without the process that waits
# for it: so the signal below ends the server itself.
command = ["python", "-m", "uvicorn", "mlflow.server.fastapi_app:app", "--host", "127.0.0.1", "--log-level", "warning"]
environment = {
    "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{root}/server.db",
    "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
    "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(root / "behind"),
    "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
shutil.copy(root / "empty.db", root / "server.db")
port = free_port()
address = f"http://127.0.0.1:{port}"
remote = MlflowClient(address)
wanted = [1 / (step + 1) for step in range(60)]
ended: dict[str, int] = {}
outbox = Outbox(root / "outbox", remote)


def directly(run_id: str, step: int) -> None:
    remote.log_metric(run_id, "loss", wanted[step], step=step)


def swallowed(run_id: str, step: int) -> None:
    with suppress(MlflowException):  # "the training must go on"
        directly(run_id, step)


def by_outbox(run_id: str, step: int) -> None:
    outbox.log(run_id, "loss", wanted[step], step)
    if step % 5 == 4:
        outbox.flush()


ways = {"direct": directly, "try … except": swallowed, "outbox": by_outbox}


def steps_from(first: int, last: int) -> None:
    """Each training that still lives does these steps."""
    for way, log_one in ways.items():
        for step in range(first, last):
            if way not in ended:
                try:
                    log_one(remote_runs[way], step)
                except MlflowException:
                    ended[way] = step


with process([*command, "--port", str(port)], ready=f"{address}/health", env=environment, seconds=120) as running:
    experiment = remote.create_experiment("over HTTP")
    remote_runs = {way: remote.create_run(experiment, run_name=way).info.run_id for way in ways}
    print("files go to", remote.get_run(remote_runs["outbox"]).info.artifact_uri.partition("/")[0])
    steps_from(0, 20)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
steps_from(20, 40)
with process([*command, "--port", str(port)], ready=f"{address}/health", env=environment, seconds=120):
    steps_from(40, 60)
    print("left in the outbox:", outbox.flush())
    there = {
        way: sorted(m.step for m in remote.get_metric_history(run_id, "loss")) for way, run_id in remote_runs.items()
    }
    remote.log_artifacts(remote_runs["outbox"], str(adapter_of(newest)), "adapter")
    back = Path(remote.download_artifacts(remote_runs["outbox"], "adapter", str(root)))
    print("the adapter that comes back is the one that went:", fingerprint(back) == fingerprint(adapter_of(newest)))

lost = {way: 60 - len(set(steps)) for way, steps in there.items()}
for way, key in (("direct", "direct"), ("try … except", "swallow"), ("outbox", "outbox")):
    card.record(f"lost_{key}", lost[way], format="d", label=f"losses of 60 that are not on the server: {way}")
card.record("doubled", sum(len(steps) - len(set(steps)) for steps in there.values()), format="d", label="losses that are there twice")  # fmt: skip

fig, ax = plt.subplots(figsize=(9, 2.7))
ax.axvspan(19.5, 39.5, color=COLOURS.wrong, alpha=0.12, lw=0)
ax.text(29.5, 0.62, "the server is down", ha="center", color=COLOURS.wrong, fontweight="bold", fontsize=10)
for place, (way, steps) in enumerate(there.items()):
    missing = sorted(set(range(60)) - set(steps))
    ax.plot(steps, [-place] * len(steps), "|", ms=15, mew=2, color=COLOURS.after)
    ax.plot(missing, [-place] * len(missing), "x", ms=5, color=COLOURS.wrong)
    ax.text(61, -place, f"{lost[way]} lost" + (", training ended" if way in ended else ""), va="center", color=COLOURS.wrong if lost[way] else COLOURS.after, fontweight="bold")  # fmt: skip
ax.set_yticks([0, -1, -2], list(there))
ax.set(
    xlabel="step",
    xticks=range(0, 61, 10),
    xlim=(-1, 84),
    ylim=(-2.6, 0.95),
    title="Which losses the server holds in the end",
)
ax.grid(visible=False)
plt.show()

# %% [markdown]
# Logging directly, the training ends with its first unheard loss: {{lost_direct}} of 60 are missing. With a `try` it lives and {{lost_swallow}} are missing, which shows in the curve only as a straight piece that looks like any other. The outbox has lost {{lost_outbox}}, and {{doubled}} are there twice. At the defaults the first of them would not even have failed at once: {{stall}} s of waiting come first.
#
# MLflow's own `log_metric(…, synchronous=False)` sends from a thread in the background. That takes the waiting out of the loop. It is a queue in memory, though: what has not been sent when the process ends is gone.
#
# What this does not show: a server that is slow rather than dead, many writers at once (SQLite lets one write at a time, so use PostgreSQL for a team), a disk that fills up on your side, and a metric that the server refuses for good, of a run that was deleted, say: this outbox would send it again for ever, and what stands behind it waits. In production such a row goes to a file of its own, with an alarm.
#
# ## With a real model
#
# Nothing above depends on the size of the model. A run of days differs from a run of a second in what it costs to do again. The same cells with longer runs, or another order for the yardstick:
#
# ```
# course run 4.1 -p longest 64
# course run 4.1 -p seed 11
# ```
#
# What changes at work:
#
# - **The code** is a git commit and the assertion that the working tree is clean: `git status --porcelain` is empty, or the run does not start. A commit names what was committed and not what ran. Add the lock file of your environment, the container's digest, and the names of GPU and driver.
# - **The parent** is an input as well. Here all runs start from one base model and one adapter, which lie in the repository, so nobody recorded them; at work their hashes are two more tags.
# - **The data** is too large to hash at each run. DVC, or a table format with snapshots (Delta, Iceberg), hashes when it is written, and you record the version. Lesson 4.2 is about that.
# - **Equal bytes** are out of reach across GPUs, and on one GPU cost speed (`torch.use_deterministic_algorithms(True)`, `CUBLAS_WORKSPACE_CONFIG`). Rerun and compare answers, or scores with their intervals.
# - **Erasure.** When a person's tickets must go, the way back from a ticket is what tells you which adapters to retire.
# - **Reruns on a budget.** Rerun what serves most answers first, and one run of each week as a matter of routine: it costs a few per cent and finds a hidden input in the week in which it appears.
#
# ## Result card

# %%
card.show()

# %% [markdown]
# ## Say it in an interview
#
# <details><summary>How do you know which data and which code made the model in production?</summary>
#
# By content, not by name. Every input of a run is in a store under its hash, the run records the hashes before it starts and the hash of what it made, the registry's version points to the run, and each logged answer names the versions and the hash that was loaded. Then it is a walk of six lookups, each of which fails loudly. I would add a check of the hashes at load time, since the last link, what the service has in memory, is the one that a registry does not know.
#
# </details>
#
# <details><summary>A run cannot be reproduced. How do you find out why?</summary>
#
# First from the records: is a seed missing, is the data still what it was, was the code committed, are there twins with other results? In my measurement this named {{flagged}} of twenty, of which {{cleared}} could be done again after all. Then rerun, and ask what failures share: here a version of the code that drew from an unseeded generator. For what is left, try the switches that nobody records (attention implementation, threads, precision, library versions); a hash tells at once which it was. And say how far off the rerun is: last bits with the same answers ({{agree_eager}}) is another matter than another seed ({{agree_seed}}).
#
# </details>
#
# <details><summary>How do you version prompts?</summary>
#
# In a registry with numbered, unchangeable versions; services ask for an alias and log the number. A change is gated like a model: one polite line changed exact match by {{gain_2}} points ({{gain_2:interval}}), a list of products, added to help, by {{gain_3}}. Mind three traps: logging the alias, caching it (MLflow's client keeps an alias for a minute, so two replicas can disagree that long), and templates that expand what users write.
#
# </details>
#
# ## Read next
#
# - D. Sculley et al., [*Hidden Technical Debt in Machine Learning Systems*](https://papers.nips.cc/paper/5656-hidden-technical-debt-in-machine-learning-systems), 2015. Why inputs that nobody declared are the expensive ones.
# - M. Zaharia et al., *Accelerating the Machine Learning Lifecycle with MLflow*, IEEE Data Engineering Bulletin 41(4), 2018.
# - J. Pineau et al., [*Improving Reproducibility in Machine Learning Research*](https://arxiv.org/abs/2003.12206), 2020.
# - P. Henderson et al., [*Deep Reinforcement Learning that Matters*](https://arxiv.org/abs/1709.06560), 2017. What a seed alone does.
# - L. Moreau et al., [*PROV-DM: The PROV Data Model*](https://www.w3.org/TR/prov-dm/), W3C, 2013. Lineage as a graph, in general.
# - P. Helland, [*Life beyond Distributed Transactions: an Apostate's Opinion*](https://www.cidrdb.org/cidr2007/papers/cidr07p15.pdf), 2007. Messages that arrive at least once, and what makes that harmless.
# - [PyTorch's notes on reproducibility](https://docs.pytorch.org/docs/stable/notes/randomness.html).
