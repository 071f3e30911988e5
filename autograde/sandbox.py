"""Where a learner's code runs when it is graded: under bubblewrap, without network, home, sources or others' work.

What this protects from, and what not, is the trust model in `docs/instructor.md`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

NO_BUBBLEWRAP = "no sandbox: install bubblewrap"

_INSTALLATION = Path(__file__).resolve().parents[1]
# The grader needs the installed packages; answers, history and the learner's state are none of the notebook's business.
_PRIVATE = ("solutions", "tests", ".git", ".course")
_HIDDEN_SYSTEM = ("/tmp", "/var/tmp", "/run", "/home", "/root", "/mnt", "/media", "/srv")
_CONFINED = ("--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--ro-bind", "/", "/",
             "--dev", "/dev", "--proc", "/proc")  # fmt: skip


@dataclass(frozen=True)
class Sandbox:
    """How to confine a command here. `program` is empty, and `note` says why, when that is impossible."""

    program: str
    note: str = ""

    def command(self, inner: Sequence[str], writable: Path, hidden: Sequence[Path] = ()) -> list[str]:
        """`inner`, confined: everything read-only but `writable`; home, temporary and `hidden` folders empty."""
        if not self.program:
            return list(inner)
        masked = [Path(name) for name in _HIDDEN_SYSTEM if Path(name).is_dir()]
        home = Path.home()
        if home.is_dir() and not any(home.is_relative_to(folder) for folder in masked):
            masked.append(home)
        parts = [self.program, *_CONFINED]
        for folder in masked:
            parts += ["--tmpfs", str(folder)]
        for needed in (Path(sys.base_prefix), Path(sys.prefix), _INSTALLATION):
            if any(needed.is_relative_to(folder) for folder in masked):
                parts += ["--ro-bind", str(needed), str(needed)]
        for secret in (*(_INSTALLATION / name for name in _PRIVATE), *hidden):
            if secret.is_dir():
                parts += ["--tmpfs", str(secret)]
            elif secret.exists():
                parts += ["--ro-bind", os.devnull, str(secret)]
        return [*parts, "--bind", str(writable), str(writable), "--chdir", str(writable), *inner]


@cache
def find() -> Sandbox:
    """The sandbox of this machine, tried once: bubblewrap may be installed and yet not be allowed to work."""
    program = shutil.which("bwrap")
    if program is None:
        return Sandbox("", NO_BUBBLEWRAP)
    with tempfile.TemporaryDirectory() as folder:
        trial = Sandbox(program).command(["true"], Path(folder))
        outcome = subprocess.run(trial, capture_output=True, text=True, timeout=30, check=False)
    if outcome.returncode != 0:
        reason = outcome.stderr.strip().splitlines()[-1:] or [f"exit code {outcome.returncode}"]
        return Sandbox("", f"no sandbox: bubblewrap is installed but cannot work here ({reason[0]})")
    return Sandbox(program)


def environment(folder: Path) -> dict[str, str]:
    """The variables a graded notebook runs with: of the grader's only PATH and locale; every cache is in `folder`."""
    kept = {name: os.environ[name] for name in ("LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH") if name in os.environ}
    return {
        **kept,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "COURSE_RESULTS": str(folder / "results"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "IPYTHONDIR": str(folder / "ipython"),
        "NBGRADER_EXECUTION": "autograde",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        # As in `course run`; waiting threads would otherwise occupy cores that other work needs.
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
