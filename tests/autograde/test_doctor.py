"""Each thing a machine may lack is told by name, with the command that mends it."""

from dataclasses import replace

import pytest

from autograde import doctor, machine
from autograde.course import Course
from autograde.machine import Facts

SOUND = Facts(
    python=(3, 11, 9),
    executable="/course/.venv/bin/python",
    pinned={"torch": "2.13.0", "nbgrader": "0.9.6"},
    installed={"torch": "2.13.0+cpu", "nbgrader": "0.9.6", "extra": "1"},
    direct=frozenset({"torch", "nbgrader"}),
    kernel_python="python",
    kernel_error="",
    lab_extension=True,
    server_extensions={"validate": True},
    sandbox_note="",
    programs={name: f"/usr/bin/{name}" for name in ("g++", "chromium", "promtool", "amtool")},
    free_gib=40.0,
    lessons=("1.1", "2.1"),
)


def test_a_sound_machine_needs_nothing() -> None:
    assert {(finding.state, finding.mend) for finding in doctor.examine(SOUND)} == {("ok", "")}


@pytest.mark.parametrize(
    ("change", "name", "state", "found", "mend"),
    [
        ({"python": (3, 10, 2)}, "Python", "missing", "3.10.2", "PYTHON=python3.11"),
        ({"python": (3, 13, 0)}, "Python", "optional", "3.13.0", "PYTHON=python3.11"),
        ({"installed": {"torch": "2.13.0+cpu"}}, "packages", "missing", "not installed: nbgrader", "make lab"),
        (
            {"installed": SOUND.installed | {"nbgrader": "0.9.1"}},
            "packages",
            "optional",
            "nbgrader 0.9.1 (pinned: 0.9.6)",
            "make lab",
        ),
        ({"installed": {"nbgrader": "0.9.6"}}, "torch", "missing", "not installed", "make lab"),
        (
            {"installed": SOUND.installed | {"torch": "2.12.1"}},
            "torch",
            "missing",
            "2.12.1; the pinned version is 2.13.0",
            "--force-reinstall",
        ),
        ({"installed": SOUND.installed | {"torch": "2.13.0+cu130"}}, "torch", "optional", "GPU", "--force-reinstall"),
        ({"kernel_python": None}, "kernel", "missing", "no kernel named python3", "ipykernel install --sys-prefix"),
        ({"kernel_python": "/usr/bin/python3"}, "kernel", "missing", "another Python, /usr/bin/python3", "ipykernel"),
        ({"kernel_error": "boom"}, "grading", "missing", "boom", "make clean lab"),
        ({"lab_extension": False}, "nbgrader in JupyterLab", "missing", "not installed", "nbgrader"),
        (
            {"server_extensions": {"validate": False}},
            "nbgrader on the server",
            "missing",
            "not enabled: validate",
            "server extension enable --sys-prefix validate",
        ),
        ({"lessons": ()}, "notebooks", "missing", "no lesson", "git checkout"),
        ({"notebook_problems": {"2.1": "has no notebook"}}, "notebooks", "missing", "2.1 has no", "course reset 2.1"),
        ({"free_gib": 1.0}, "disk", "optional", "1.0 GiB", "rm -rf"),
        ({"free_gib": 0.1}, "disk", "missing", "0.1 GiB", "rm -rf"),
        (
            {"sandbox_note": "no sandbox: install bubblewrap"},
            "sandbox",
            "optional",
            "no sandbox: install bubblewrap",
            "apt-get install bubblewrap",
        ),
        ({"sandbox_note": "no sandbox: it cannot work"}, "sandbox", "optional", "cannot work", "userns=0"),
        ({"programs": {"chromium": "/c"}}, "C++ compiler", "optional", "g++", "apt-get install g++"),
        ({"programs": {"g++": "/g"}}, "browser for the tests", "optional", "chromium", "apt-get install chromium"),
        ({"programs": {}}, "Prometheus for 4.5 and the tests", "optional", "promtool", "apt-get install prometheus"),
        ({"programs": {}}, "Alertmanager for the tests", "optional", "amtool", "install prometheus-alertmanager"),
    ],
)
def test_what_is_missing_is_told(change: dict[str, object], name: str, state: str, found: str, mend: str) -> None:
    facts = replace(SOUND, **change)  # type: ignore[arg-type]
    findings = {finding.name: finding for finding in doctor.examine(facts)}
    assert findings[name].state == state
    assert found in findings[name].found
    assert mend in findings[name].mend


def test_pins_are_read_from_a_constraints_file() -> None:
    text = "# pins\ntorch==2.13.0\nRapid_Fuzz==3.1  # for nbgrader\n\nloose>=2\n"
    assert machine.parse_pins(text) == {"torch": "2.13.0", "rapid-fuzz": "3.1"}


def test_this_machine_can_be_looked_at(course: Course) -> None:
    facts = machine.gather(course)
    assert facts.kernel_error == ""
    assert facts.lab_extension
    assert all(facts.server_extensions.values())
    assert facts.installed["torch"].startswith(facts.pinned["torch"])
    assert doctor.kernel(facts).state == "ok"
