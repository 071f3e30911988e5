"""`course lab`: JupyterLab on the path's first page."""

import os
import sys
from pathlib import Path

import typer

import autograde
from autograde.course import START_PAGE, find
from autograde.errors import CourseError


def lab(context: typer.Context) -> None:
    """Open JupyterLab at the path's first page. Further arguments go to `jupyter lab`, such as --no-browser."""
    course = find()
    page = course.notebooks / f"{START_PAGE}.ipynb"
    if not page.exists():
        raise CourseError(f"{page} is missing: `course build` makes it")
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={course.root}", *context.args]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # in a container root is the only user, and Jupyter would refuse to start
    if "--no-browser" not in context.args:
        command.append(str(page))
    os.chdir(course.root)
    sys.stdout.flush()
    os.execve(sys.executable, command, environment(dict(os.environ)))


def environment(inherited: dict[str, str]) -> dict[str, str]:
    """The variables JupyterLab runs with: this installation first on PATH, and the course's Lab settings."""
    settings = Path(autograde.__file__).parent / "jupyter"
    return {
        # As in `course run`: the same digits as in the prose, and no thread that waits busily beside the browser.
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        **inherited,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)]),
        "JUPYTER_CONFIG_PATH": os.pathsep.join([str(settings), *filter(None, [inherited.get("JUPYTER_CONFIG_PATH")])]),
        # A kernel of the same name in the user's home must not take the place of this environment's.
        "JUPYTER_PREFER_ENV_PATH": "1",
    }
