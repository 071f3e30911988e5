"""What this machine offers the course, as plain facts for `autograde.doctor` to judge."""

import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from autograde import sandbox
from autograde.course import Course, number
from autograde.errors import CourseError
from autograde.execute import GradeLimits, execute

_PROJECT = "llm-engineering-path"
_SERVER_EXTENSIONS = ("nbgrader.server_extensions.validate_assignment", "nbgrader.server_extensions.formgrader")
_SERVER_FILE = "etc/jupyter/jupyter_server_config.d/nbgrader.json"
_LAB_FILE = "share/jupyter/labextensions/@jupyter/nbgrader/package.json"


@dataclass(frozen=True)
class Facts:
    """What was found on the machine. Versions are by canonical package name; `direct` are those the project names."""

    python: tuple[int, int, int]
    executable: str
    pinned: Mapping[str, str]
    installed: Mapping[str, str]
    direct: frozenset[str]
    kernel_python: str | None
    kernel_error: str
    lab_extension: bool
    server_extensions: Mapping[str, bool]
    sandbox_note: str
    programs: Mapping[str, str | None]
    free_gib: float
    lessons: tuple[str, ...]
    notebook_problems: Mapping[str, str] = field(default_factory=dict)


def public_version(version: str) -> str:
    """`2.13.0` of `2.13.0+cpu`."""
    return version.split("+")[0]


def gather(course: Course) -> Facts:
    """Look at this machine. Starts one kernel; changes nothing."""
    pins = course.root / "constraints.txt"
    prefix = Path(sys.prefix)
    server = json.loads(_read_if_there(prefix / _SERVER_FILE) or "{}").get("ServerApp", {})
    return Facts(
        python=sys.version_info[:3],
        executable=sys.executable,
        pinned=parse_pins(_read_if_there(pins)),
        installed=_installed(),
        direct=_direct(),
        kernel_python=_kernel_python(),
        kernel_error=_kernel_error(),
        lab_extension=(prefix / _LAB_FILE).is_file(),
        server_extensions={name: bool(server.get("jpserver_extensions", {}).get(name)) for name in _SERVER_EXTENSIONS},
        sandbox_note=sandbox.find().note,
        programs={
            "g++": shutil.which("g++"),
            "promtool": shutil.which("promtool"),
            "amtool": shutil.which("amtool"),
            "chromium": shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome"),
        },
        free_gib=shutil.disk_usage(course.root).free / 2**30,
        lessons=tuple(number(source) for source in course.sources()),
        notebook_problems=_notebook_problems(course),
    )


def _installed() -> dict[str, str]:
    """The version of each package that an import would find: of two copies (setuptools brings some) the first."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        found.setdefault(canonicalize_name(distribution.name), distribution.version)
    return found


def parse_pins(text: str) -> dict[str, str]:
    """`name==version` lines of a constraints file; comments and anything else are passed over."""
    lines = (line.split("#")[0].strip().partition("==") for line in text.splitlines())
    return {canonicalize_name(name): version for name, _, version in lines if version}


def _read_if_there(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _direct() -> frozenset[str]:
    try:
        named = importlib.metadata.requires(_PROJECT) or []
    except importlib.metadata.PackageNotFoundError:
        return frozenset({_PROJECT})
    wanted = (Requirement(line) for line in named)
    return frozenset(canonicalize_name(r.name) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""}))


def _kernel_python() -> str | None:
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # as `course lab` and the grader do
    try:
        return str(KernelSpecManager().get_kernel_spec("python3").argv[0])
    except NoSuchKernel:
        return None


def _kernel_error() -> str:
    """Why a kernel cannot run one cell in the sandbox; empty when it can."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print('here')")])
    try:
        outputs = execute(notebook, GradeLimits(cell_seconds=60, run_seconds=120)).cells[0].outputs
    except CourseError as error:
        return str(error).splitlines()[0]
    return "" if [output.get("text") for output in outputs] == ["here\n"] else str(outputs)


def _notebook_problems(course: Course) -> dict[str, str]:
    problems = {}
    for source in course.sources():
        path = course.notebook(source)
        if not path.exists():
            problems[number(source)] = "has no notebook"
        else:
            try:
                nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
            except (ValueError, AttributeError, nbformat.ValidationError):
                problems[number(source)] = "cannot be read"
    return problems
