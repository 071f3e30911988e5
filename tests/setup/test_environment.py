"""The conda environment's pip section, installed for real into an empty virtual environment."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import yaml
from packaging.utils import canonicalize_name
from packaging.version import Version

from autograde.course import Course


def _pins(course: Course) -> dict[str, str]:
    lines = (course.root / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): pin for name, pin in pairs}


def test_pip_section_installs_exactly_the_pins(course_copy: Course, tmp_path: Path) -> None:
    environment = yaml.safe_load((course_copy.root / "environment.yml").read_text())
    (pip_lines,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    # conda hands the section to pip as a requirements file that stands beside environment.yml
    requirements = course_copy.root / "conda-pip-section.txt"
    requirements.write_text("\n".join(pip_lines) + "\n")

    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement", requirements],
        cwd=course_copy.root,
        env={**os.environ, "PIP_NO_COMPILE": "1"},  # nothing runs there but `course --help`
        check=True,
    )
    listing = subprocess.run(
        [python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"],
        check=True,
        capture_output=True,
        text=True,
    )
    installed = {canonicalize_name(row["name"]): row["version"] for row in json.loads(listing.stdout)}
    ours = installed.pop("llm-engineering-path")
    assert ours == version("llm-engineering-path")
    for tool in ("pip", "setuptools"):
        installed.pop(tool, None)

    # torch's CPU build carries a local version label (2.13.0+cpu); the pin names the release.
    found = {name: Version(number).public for name, number in installed.items()}
    pins = _pins(course_copy)
    assert {name: number for name, number in found.items() if pins.get(name) != number} == {}, (
        "installed but not pinned"
    )
    assert pins.keys() - found.keys() == set(), "pinned but no longer installed by anything"
    subprocess.run([python, "-m", "pip", "check"], check=True)
    subprocess.run([venv / "bin" / "course", "--help"], check=True, capture_output=True)


def test_conda_section_gives_python_pip_and_a_compiler(course: Course) -> None:
    environment = yaml.safe_load((course.root / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    assert conda == ["python=3.11", "pip", "cxx-compiler"]
