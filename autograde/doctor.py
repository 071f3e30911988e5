"""What a machine lacks for the course, and the command that mends it: pure functions of `autograde.machine.Facts`."""

import re
from dataclasses import dataclass
from typing import Literal

from autograde import sandbox
from autograde.machine import Facts, public_version

_LEAST_GIB, _COMFORTABLE_GIB = 0.5, 3.0


@dataclass(frozen=True)
class Finding:
    """One check: "ok", "optional" (something useful is missing) or "missing" (the course does not work without it)."""

    name: str
    state: Literal["ok", "optional", "missing"]
    found: str
    mend: str = ""


def examine(facts: Facts) -> list[Finding]:
    """Every check, in the order in which to mend them."""
    return [check(facts) for check in (python, packages, torch, kernel, kernel_runs, lab_extension, server_extensions,
                                       notebooks, disk, bubblewrap, compiler, browser, prometheus,
                                       alertmanager)]  # fmt: skip


def python(facts: Facts) -> Finding:
    """Python 3.11, for which the versions are pinned."""
    version = ".".join(map(str, facts.python))
    if facts.python[:2] == (3, 11):
        return Finding("Python", "ok", version)
    state: Literal["optional", "missing"] = "optional" if facts.python > (3, 11, 0) else "missing"
    return Finding("Python", state, f"{version}; the versions are pinned for 3.11", "make clean lab PYTHON=python3.11")


def packages(facts: Facts) -> Finding:
    """Everything the project needs is there, and what is pinned has its pinned version."""
    absent = sorted(facts.direct - facts.installed.keys())
    if absent:
        return Finding("packages", "missing", f"not installed: {', '.join(absent)}", "make lab")
    other = sorted(
        f"{name} {facts.installed[name]} (pinned: {version})"
        for name, version in facts.pinned.items()
        if name != "torch" and name in facts.installed and public_version(facts.installed[name]) != version
    )
    if other:
        return Finding("packages", "optional", f"other versions than pinned: {', '.join(other)}", "make lab")
    return Finding("packages", "ok", f"{len(facts.installed)} installed, as pinned")


def torch(facts: Facts) -> Finding:
    """The pinned torch, in its CPU build; another build of the same version works, a large download later."""
    mend = ".venv/bin/python -m pip install --force-reinstall --constraint constraints.txt torch"
    there, wanted = facts.installed.get("torch"), facts.pinned.get("torch")
    if there is None:
        return Finding("torch", "missing", "not installed", "make lab")
    if wanted is not None and public_version(there) != wanted:
        return Finding("torch", "missing", f"{there}; the pinned version is {wanted}", mend)
    if "+" in there and not there.endswith("+cpu"):
        return Finding("torch", "optional", f"{there}, a build for a GPU: results are pinned for the CPU build", mend)
    return Finding("torch", "ok", there)


def kernel(facts: Facts) -> Finding:
    """The kernel named python3, which every notebook asks for, is this Python."""
    mend = f"{facts.executable} -m ipykernel install --sys-prefix --name python3"
    if facts.kernel_python is None:
        return Finding("kernel", "missing", "no kernel named python3", mend)
    # Jupyter replaces a bare name by the Python that runs it.
    if facts.kernel_python == facts.executable or re.fullmatch(r"python(3(\.\d+)?)?", facts.kernel_python):
        return Finding("kernel", "ok", f"python3 is {facts.executable}")
    return Finding("kernel", "missing", f"python3 is another Python, {facts.kernel_python}", mend)


def kernel_runs(facts: Facts) -> Finding:
    """A kernel starts where notebooks are graded, and runs a cell."""
    if facts.kernel_error:
        return Finding("grading", "missing", f"no cell could be run: {facts.kernel_error}", "make clean lab")
    return Finding("grading", "ok", "a kernel starts and runs a cell")


def lab_extension(facts: Facts) -> Finding:
    """nbgrader's part of JupyterLab: the Validate button."""
    if facts.lab_extension:
        return Finding("nbgrader in JupyterLab", "ok", "installed")
    mend = ".venv/bin/python -m pip install --force-reinstall --constraint constraints.txt nbgrader"
    return Finding("nbgrader in JupyterLab", "missing", "its extension is not installed", mend)


def server_extensions(facts: Facts) -> Finding:
    """nbgrader's part of the server: validation and the form grader."""
    off = sorted(name for name, on in facts.server_extensions.items() if not on)
    if not off:
        return Finding("nbgrader on the server", "ok", "enabled")
    mend = f".venv/bin/jupyter server extension enable --sys-prefix {' '.join(off)}"
    return Finding("nbgrader on the server", "missing", f"not enabled: {', '.join(off)}", mend)


def notebooks(facts: Facts) -> Finding:
    """Every lesson has its notebook, and it can be read."""
    if not facts.lessons:
        return Finding(
            "notebooks", "missing", "there is no lesson in solutions/", "git checkout -- solutions notebooks"
        )
    if facts.notebook_problems:
        told = "; ".join(f"{lesson} {problem}" for lesson, problem in facts.notebook_problems.items())
        mend = "; ".join(f"course reset {lesson}" for lesson in facts.notebook_problems)
        return Finding("notebooks", "missing", told, mend)
    return Finding("notebooks", "ok", f"{len(facts.lessons)} lessons")


def disk(facts: Facts) -> Finding:
    """Room for scratch folders and saved adapters."""
    found = f"{facts.free_gib:.1f} GiB free"
    if facts.free_gib >= _COMFORTABLE_GIB:
        return Finding("disk", "ok", found)
    return Finding("disk", "missing" if facts.free_gib < _LEAST_GIB else "optional", found, "rm -rf ~/.cache/pip")


def bubblewrap(facts: Facts) -> Finding:
    """The sandbox for graded notebooks."""
    if not facts.sandbox_note:
        return Finding("sandbox", "ok", "bubblewrap")
    if facts.sandbox_note == sandbox.NO_BUBBLEWRAP:
        return Finding("sandbox", "optional", facts.sandbox_note, "sudo apt-get install bubblewrap")
    return Finding(
        "sandbox", "optional", facts.sandbox_note, "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
    )


def compiler(facts: Facts) -> Finding:
    """A C++ compiler, which `torch.compile` calls."""
    return _program(facts, "g++", "C++ compiler", "sudo apt-get install g++")


def browser(facts: Facts) -> Finding:
    """Chromium, which only the tests use."""
    return _program(facts, "chromium", "browser for the tests", "sudo apt-get install chromium")


def prometheus(facts: Facts) -> Finding:
    """Prometheus with promtool, for lesson 4.5 and the tests of docs/production."""
    return _program(facts, "promtool", "Prometheus for 4.5 and the tests", "sudo apt-get install prometheus")


def alertmanager(facts: Facts) -> Finding:
    """Alertmanager's amtool, which only the tests use."""
    mend = "sudo apt-get install prometheus-alertmanager"
    return _program(facts, "amtool", "Alertmanager for the tests", mend)


def _program(facts: Facts, program: str, name: str, mend: str) -> Finding:
    path = facts.programs.get(program)
    return Finding(name, "ok", path) if path else Finding(name, "optional", f"{program} is not on the PATH", mend)
