"""Cells that loop, die, flood or eat memory cost themselves and nothing else. Real kernels, short limits."""

import os
import pwd
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat import NotebookNode

from autograde import sandbox
from autograde.errors import CourseError
from autograde.execute import STOPPED, GradeLimits, ScoreByErrorsAlone, execute
from autograde.sandbox import Sandbox
from tests.autograde.grading import SHORT

LOOP = "while True:\n    pass"
STUBBORN = "while True:\n    try:\n        while True:\n            pass\n    except KeyboardInterrupt:\n        pass"


def run(*sources: str, limits: GradeLimits = SHORT, hidden: list[Path] | None = None) -> list[NotebookNode]:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    return list(execute(notebook, limits, hidden).cells)


def text(cell: NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def stopped(cell: NotebookNode) -> str:
    (output,) = [output for output in cell.outputs if output.output_type == "error"]
    assert output.ename == STOPPED
    return str(output.evalue)


def test_outputs_and_state_survive_loops_whether_or_not_they_can_be_interrupted() -> None:
    cells = run(
        "import sys\nkept = 41",
        LOOP,
        STUBBORN,
        "kept + 1",
        "print('careful', file=sys.stderr)",
        "1 / 0",
        "",
    )
    assert stopped(cells[1]) == "it ran longer than its limit of 2 s"
    assert stopped(cells[2]) == "it ran longer than its limit of 2 s and did not stop when it was interrupted"
    assert cells[3].outputs[0].data["text/plain"] == "42"
    assert (cells[4].outputs[0].name, cells[4].outputs[0].text) == ("stderr", "careful\n")
    assert cells[5].outputs[0].ename == "ZeroDivisionError"
    assert [cell.execution_count for cell in cells] == [1, 2, None, 3, 4, 5, None]


def test_endless_printing_is_stopped_early_and_kept_short() -> None:
    # Memory to spare: what waits to be read grows on a busy machine, and here the printing is to be what stops it.
    limits = replace(SHORT, cell_seconds=100, grace_seconds=20, mebibytes=8192)
    cells = run("print('start')\nwhile True:\n    print('y' * 10_000)", "print('next')", limits=limits)
    assert stopped(cells[0]) == "it printed without end"
    assert text(cells[0]).startswith("start\n")
    assert "is left out" in text(cells[0])
    assert len(text(cells[0])) < 1_100_000
    assert text(cells[1]) == "next\n"


def test_cells_that_end_the_kernel_are_taken_out_and_the_others_run_without_them() -> None:
    cells = run(
        "import os, signal\nkept = 41",
        "os._exit(0)",
        "exit()",
        "print(kept + 1)",
        "os.kill(os.getppid(), signal.SIGKILL)",  # whoever runs the kernel
        "print(kept + 2)",
    )
    assert [stopped(cells[i]) for i in (1, 2)] == ["it ended the kernel"] * 2
    assert stopped(cells[4]) == "it ended the process that ran it"
    assert (text(cells[3]), text(cells[5])) == ("42\n", "43\n")


@pytest.mark.parametrize("readable", [True, False])
def test_a_cell_that_eats_the_memory_is_taken_out(readable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not readable:  # a system on which the details of a sandboxed process are not ours to read

        def refuse(process: psutil.Process) -> None:
            raise psutil.AccessDenied(process.pid)

        monkeypatch.setattr(psutil.Process, "memory_full_info", refuse)
    hungry = "blocks = []\nwhile True:\n    blocks.append(bytearray(b'x' * 2**24))"
    cells = run("kept = 41", hungry, "print(kept + 1)", limits=replace(SHORT, cell_seconds=30, mebibytes=400))
    assert stopped(cells[1]) == "it used more than its limit of 400 MiB of memory"
    assert text(cells[2]) == "42\n"


def test_when_the_whole_time_is_up_what_ran_is_kept() -> None:
    cells = run("print('first')", LOOP, "print('last')", limits=replace(SHORT, cell_seconds=60, run_seconds=8))
    assert text(cells[0]) == "first\n"
    assert stopped(cells[1]) == "the notebook ran longer than its limit of 8 s"
    assert stopped(cells[2]).startswith("it was not run: the notebook ran longer")


def test_displays_are_updated_and_cleared_as_in_jupyter() -> None:
    cells = run(
        "from IPython.display import clear_output\nhandle = display('old', display_id=True)\nhandle.update('new')",
        "print('gone')\nclear_output()\nprint('stays')",
        "print('gone')\nclear_output(wait=True)\nprint('stays')",
    )
    assert [output.data["text/plain"] for output in cells[0].outputs] == ["'new'"]
    assert (text(cells[1]), text(cells[2])) == ("stays\n", "stays\n")


def test_a_notebook_sees_no_secret_of_the_grader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADER_TOKEN", "hush")
    (cell,) = run("import os\nprint(os.environ.get('GRADER_TOKEN'), os.environ['HF_HUB_OFFLINE'], os.environ['HOME'])")
    token, offline, home = text(cell).split()
    assert (token, offline) == ("None", "1")
    assert home != os.environ.get("HOME")


def test_the_sandbox_confines(tmp_path: Path) -> None:
    if not sandbox.find().program:
        pytest.skip(sandbox.find().note)
    other = Path(sandbox.__file__).parent.parent / "solutions"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        cells = run(
            f"import os, pathlib, socket\nsocket.create_connection(('127.0.0.1', {port}), 2)",
            f"pathlib.Path({str(tmp_path / 'escaped')!r}).write_text('x')",
            f"pathlib.Path({str(other / 'escaped.py')!r}).parent.parent.joinpath('escaped').write_text('x')",
            f"print(os.listdir({str(other)!r}))",
            "pathlib.Path('here').write_text('x')",
            "print(len([name for name in os.listdir('/proc') if name.isdigit()]) < 10)",
            hidden=[tmp_path],
        )
    assert cells[0].outputs[0].ename in ("ConnectionRefusedError", "OSError")
    assert cells[2].outputs[0].evalue.startswith("[Errno 30] Read-only file system")
    assert text(cells[3]) == "[]\n"
    assert cells[4].outputs[0].data["text/plain"] == "1"
    assert text(cells[5]) == "True\n"
    assert not (tmp_path / "escaped").exists()


def test_the_sandbox_works_for_a_user_who_is_not_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner is not root. (When these tests do not run as root either, the one above has already shown it.)"""
    if os.getuid() != 0 or not sandbox.find().program:
        pytest.skip(sandbox.find().note or "the tests already run as a user")
    for owner, name in ((sys, "base_prefix"), (sys, "prefix"), (sandbox, "_INSTALLATION")):  # root's may be closed
        monkeypatch.setattr(owner, name, "/usr" if owner is sys else Path("/usr"))
    nobody = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        script = "id -u; touch here; touch /etc/escaped 2>/dev/null || echo confined; ls /proc | grep -c '^[0-9]'"
        done = subprocess.run(
            sandbox.find().command(["/bin/sh", "-c", script], folder), cwd=folder, capture_output=True, text=True,
            user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[], check=False,
        )  # fmt: skip
        assert (folder / "here").exists(), done.stderr
    user, confined, processes = done.stdout.split()
    assert (user, confined) == (str(nobody.pw_uid), "confined")
    assert int(processes) < 10


def test_without_bubblewrap_it_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "find", lambda: Sandbox("", sandbox.NO_BUBBLEWRAP))
    cells = run("kept = 41", "import os; os._exit(1)", "print(kept + 1)")
    assert stopped(cells[1]) == "it ended the kernel"
    assert text(cells[2]) == "42\n"


def test_bubblewrap_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert sandbox.find.__wrapped__() == Sandbox("", "no sandbox: install bubblewrap")


def test_bubblewrap_may_not_work_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = sandbox.find.__wrapped__()
    assert found.program == ""
    assert "cannot work here (bwrap: No permissions to create new namespace)" in found.note


def test_no_kernel_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "find", lambda: Sandbox(""))
    monkeypatch.setattr(sys, "executable", "/usr/bin/false")
    with pytest.raises(CourseError, match="course doctor"):
        run("1")


def test_only_errors_score() -> None:
    outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="a warning"),
        nbformat.v4.new_output("execute_result", data={"text/plain": "0.5"}, execution_count=3),
    ]
    check = nbformat.v4.new_code_cell("", outputs=outputs)
    check.metadata.nbgrader = {"grade": True, "points": 2}
    cell, _ = ScoreByErrorsAlone().preprocess_cell(check, {}, 0)
    assert [output.get("name", output.output_type) for output in cell.outputs] == ["stdout", "display_data"]
    nbformat.validate(cell, ref="code_cell", version=4)
