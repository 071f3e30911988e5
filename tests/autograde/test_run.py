"""Lessons through papermill: what fails is named while the others finish; parameters and results pass through."""

import fcntl
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import typer
from typer.testing import CliRunner

from autograde.commands.run import Command, join_pairs, run
from autograde.course import Course
from autograde.errors import CourseError
from autograde.limits import Limits
from autograde.run import LIMITS, LessonRun, parse_parameters, run_lessons, save
from tests.autograde.sources import CHECK, EXERCISE, course_of, line_of

GOOD = f"""# %% [markdown]
# # 1.1 Good

# %% tags=["parameters"]
steps = 3  # of training; quick: 1
rate = 0.5

# %%
import json
import os
from pathlib import Path

entry = {{"value": steps * rate, "format": ".1f", "label": "product", "threads": os.environ["OMP_NUM_THREADS"]}}
measured = {{"lesson": "1_1_good", "results": {{"product": entry}}}}
Path(os.environ["COURSE_RESULTS"], "1_1_good.json").write_text(json.dumps(measured))
print(type(rate).__name__, Path.cwd().name)

{EXERCISE}
{CHECK}"""
RAISES = f"""# %% [markdown]
# # 1.2 Raises

{EXERCISE}
{CHECK}
# %%
first = 1
raise ValueError("no such thing")

# %% check="total" points=5
assert total([1]) == 1, "never reached"
"""
DIES = """# %%
import os

# %%
os._exit(1)
"""
EATS = """# %%
import time
eaten = []
while True:
    eaten.append(bytearray(b"x" * 20_000_000))
    time.sleep(0.01)
"""
HANGS = """# %%
before = 1

# %%
while True:
    pass
"""
WARNS = f"""{EXERCISE}
# %% check="total" points=2
import sys
assert total([1]) == 1, "Add every number"
print("careful", file=sys.stderr)
"""


def _quiet(source: Path, cell: int, of: int) -> None:
    pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LessonRun]:
    """Every way to end, side by side, under one pair of limits."""
    lessons = {"_1_1_good": GOOD, "_1_2_raises": RAISES, "_1_3_dies": DIES, "_1_4_eats": EATS, "_1_6_warns": WARNS}
    course = course_of(tmp_path_factory.mktemp("runs"), **lessons)
    finished = run_lessons(course, course.sources(), {}, Limits(seconds=170, mebibytes=500), 2, _quiet)
    return {run.source.stem: run for run in finished}


def test_a_good_lesson_earns_its_points_and_leaves_its_notebook_and_results(runs: dict[str, LessonRun]) -> None:
    good = runs["1_1_good"]
    assert good.ok
    assert (good.earned, good.points) == (2, 2)
    assert good.seconds > 0
    assert good.peak_mebibytes > 10
    executed = nbformat.read(good.folder / "executed.ipynb", as_version=4)
    assert any(cell.get("outputs") for cell in executed.cells)
    product = json.loads(good.result_file.read_text())["results"]["product"]
    assert product["value"] == 1.5
    assert product["threads"] == "1"


def test_an_exception_is_named_with_its_line_and_the_points_before_it_count(runs: dict[str, LessonRun]) -> None:
    raises = runs["1_2_raises"]
    assert raises.problem is not None
    assert raises.problem.line == line_of(RAISES, "raise ValueError")
    assert raises.problem.message == "cell 4 of 5: ValueError: no such thing"
    assert (raises.earned, raises.points) == (2, 7)


def test_a_dead_kernel_is_named(runs: dict[str, LessonRun]) -> None:
    dies = runs["1_3_dies"]
    assert dies.problem is not None
    assert dies.problem.line == line_of(DIES, "os._exit(1)") - 1
    assert dies.problem.message == "cell 2 of 2: DeadKernelError: the kernel died while it ran this cell"


def test_a_hungry_lesson_is_stopped_and_named(runs: dict[str, LessonRun]) -> None:
    eats = runs["1_4_eats"]
    assert eats.problem is not None
    assert eats.problem.line == 1
    assert eats.problem.message.startswith("cell 1 of 1: stopped at ")
    assert eats.problem.message.endswith(" MiB, over its limit of 500 MiB")


def test_points_are_those_that_nbgrader_gives(runs: dict[str, LessonRun]) -> None:
    warns = runs["1_6_warns"]
    assert warns.problem is not None
    assert warns.problem.message == "the solution earns 0 of 2 points: `course prove` says why"


def test_a_hanging_lesson_is_stopped_and_named(tmp_path: Path) -> None:
    course = course_of(tmp_path, _1_5_hangs=HANGS)
    seen: list[tuple[int, int]] = []
    (hangs,) = run_lessons(
        course, course.sources(), {}, Limits(30, 500), 1, lambda _, cell, of: seen.append((cell, of))
    )
    assert hangs.problem is not None
    assert hangs.problem.line == line_of(HANGS, "while True") - 1
    assert hangs.problem.message == "cell 2 of 2: stopped after 30 s, its time limit"
    assert seen == [(1, 2), (2, 2)]


def test_parameters_pass_through_as_values(tmp_path: Path) -> None:
    course = course_of(tmp_path, _1_1_good=GOOD)
    (good,) = run_lessons(course, course.sources(), parse_parameters(["steps=4", "rate=1e-1"]), LIMITS, 1, _quiet)
    assert good.ok
    assert json.loads(good.result_file.read_text())["results"]["product"]["value"] == pytest.approx(0.4)
    assert "float 1_1_good" in (good.folder / "executed.ipynb").read_text()


def test_a_quick_run_has_the_small_values_and_still_takes_others(tmp_path: Path) -> None:
    course = course_of(tmp_path, _1_1_good=GOOD)
    for parameters, product in (({}, 0.5), ({"rate": 2.0}, 2.0), ({"steps": 5}, 2.5)):
        (quick,) = run_lessons(course, course.sources(), parameters, LIMITS, 1, _quiet, quick=True)
        assert quick.earned == quick.points
        assert json.loads(quick.result_file.read_text())["results"]["product"]["value"] == product


def test_an_unknown_parameter_lists_the_known_before_anything_runs(tmp_path: Path) -> None:
    course = course_of(tmp_path, _1_1_good=GOOD)
    with pytest.raises(CourseError, match=r"lesson 1\.1 has no parameter step; its parameters: steps = 3, rate = 0\.5"):
        run_lessons(course, course.sources(), {"step": 1}, LIMITS, 1, _quiet)
    assert not (course.state / "runs" / "1_1_good" / "executed.ipynb").exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10),
        ("1e-3", 1e-3),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ("shipped", "shipped"),
        ("org/name=v2", "org/name=v2"),
        ("", ""),
        ("'7'", "7"),
    ],
)
def test_values_are_yaml(text: str, value: object) -> None:
    parsed = parse_parameters([f"x={text}"])["x"]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", ["steps", "2x=1", "=1"])
def test_what_is_no_parameter_is_refused(text: str) -> None:
    with pytest.raises(CourseError, match="write -p NAME VALUE"):
        parse_parameters([text])


def test_a_broken_value_is_refused() -> None:
    with pytest.raises(CourseError, match="the value of -p x is no YAML"):
        parse_parameters(["x=[1"])


def test_an_option_of_two_words_is_joined() -> None:
    assert join_pairs(["2.1", "-p", "steps", "10", "-p", "x=1", "--save"]) == [
        "2.1",
        "-p",
        "steps=10",
        "-p",
        "x=1",
        "--save",
    ]
    assert join_pairs(["-p", "steps"]) == ["-p", "steps"]
    assert join_pairs(["-p"]) == ["-p"]
    assert join_pairs(["-p", "rate", "-0.5"]) == ["-p", "rate=-0.5"]


def _finished(course: Course, results: dict[str, object] | None) -> LessonRun:
    folder = course.state / "runs" / "1_1_good"
    folder.mkdir(parents=True)
    if results is not None:
        (folder / "1_1_good.json").write_text(json.dumps(results))
    return LessonRun(course.sources()[0], folder, 12.34, 345.6, 2.0, 2, None)


def test_saving_adds_time_and_memory_to_what_was_measured(tmp_path: Path) -> None:
    course = course_of(tmp_path, _1_1_good=GOOD)
    measured = {"lesson": "1_1_good", "results": {"product": {"value": 1.5}}}
    target = course.result_file(course.sources()[0])
    save(_finished(course, measured), target)
    assert json.loads(target.read_text()) == {**measured, "run": {"seconds": 12.3, "peak_mib": 346}}


def test_a_lesson_that_measured_nothing_still_has_its_time(tmp_path: Path) -> None:
    course = course_of(tmp_path, _1_1_good=GOOD)
    target = course.result_file(course.sources()[0])
    save(_finished(course, None), target)
    assert json.loads(target.read_text()) == {
        "lesson": "1_1_good",
        "results": {},
        "run": {"seconds": 12.3, "peak_mib": 346},
    }


def test_the_command_reports_saves_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    course = course_of(tmp_path, _1_1_good=GOOD, _1_2_raises=RAISES)
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command(cls=Command)(run)
    done = CliRunner().invoke(app, ["--save", "--json"])
    assert done.exit_code == 1
    assert [(one["lesson"], one["ok"]) for one in json.loads(done.stdout)] == [("1.1", True), ("1.2", False)]
    assert "1.2 failed, so its results were not saved" in done.stderr
    assert [path.name for path in course.results.iterdir()] == ["1_1_good.json"]


def test_saving_is_refused_with_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    course_of(tmp_path, _1_1_good=GOOD)
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command(cls=Command)(run)
    refused = CliRunner().invoke(app, ["1.1", "--quick", "--save"])
    assert "leave out -p" in str(refused.exception)
    refused = CliRunner().invoke(app, ["1.1", "-p", "steps", "1", "--save"])
    assert isinstance(refused.exception, CourseError)
    assert "leave out -p" in str(refused.exception)


def test_a_lesson_that_runs_already_is_left_alone(tmp_path: Path) -> None:
    course = course_of(tmp_path, _1_1_good=GOOD)
    folder = course.state / "runs" / "1_1_good"
    folder.mkdir(parents=True)
    (folder / "executed.ipynb").write_text("the other run's")
    with folder.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CourseError, match=r"^lesson 1\.1 is being run in this folder already"):
            run_lessons(course, course.sources(), {}, LIMITS, 1, _quiet)
    assert (folder / "executed.ipynb").read_text() == "the other run's"


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM], ids=lambda ending: ending.name)
def test_a_command_that_is_stopped_takes_its_kernels_along(tmp_path: Path, ending: signal.Signals) -> None:
    waits = (
        f"# %%\nfrom pathlib import Path\nimport time\n\nPath({str(tmp_path / 'begun')!r}).touch()\ntime.sleep(600)\n"
    )
    course = course_of(tmp_path, _1_1_waits=waits)
    command = subprocess.Popen(
        [Path(sys.executable).with_name("course"), "run"],
        cwd=course.root,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )
    while not (tmp_path / "begun").exists():
        assert command.poll() is None, "the command ended before its lesson began"
        time.sleep(0.1)
    started = psutil.Process(command.pid).children(recursive=True)
    assert any("ipykernel" in " ".join(process.cmdline()) for process in started)
    command.send_signal(ending)
    assert command.wait(timeout=60) != 0
    assert psutil.wait_procs(started, timeout=10)[1] == []
