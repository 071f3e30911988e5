"""Every lesson runs offline within its budget, and a rerun measures what the prose says."""

import socket
import subprocess
import sys
from pathlib import Path

from autograde import results
from autograde.course import Course

from .conftest import Json, without_network

BUDGET_MIB = 3 * 1024


def test_the_network_is_really_refused() -> None:
    """The other tests prove nothing unless this one can tell: outside there is a way, inside there is none."""
    script = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))"
    assert subprocess.run(without_network([sys.executable, "-c", script]), capture_output=True).returncode == 1
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as loopback:  # kernels talk to Jupyter over the loopback
        loopback.bind(("127.0.0.1", 0))


def test_every_lesson_runs_to_its_end_and_earns_every_point(runs: list[Json], course: Course) -> None:
    assert [run["problem"] for run in runs] == [None] * len(course.sources())
    assert [run["earned"] for run in runs] == [run["points"] for run in runs]


def test_every_lesson_stays_within_its_memory(runs: list[Json]) -> None:
    assert {run["lesson"]: run["peak_mib"] for run in runs if run["peak_mib"] > BUDGET_MIB} == {}


def test_a_rerun_reproduces_the_committed_results(runs: list[Json], course: Course) -> None:
    differing = []
    for run in runs:
        source = Path(run["path"])
        committed = results.read(course.result_file(source)).numbers
        measured = results.read(Path(run["notebook"]).parent / f"{source.stem}.json").numbers
        assert committed, f"{source.stem} has no committed results: `course run {run['lesson']} --save`"
        assert measured.keys() == committed.keys()
        differing += [
            f"{source.stem}: {name} was {committed[name].value}, now {result.value}"
            for name, result in measured.items()
            if not committed[name].agrees(result.value)
        ]
    assert differing == []
