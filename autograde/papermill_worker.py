"""The process that `course run` starts for one notebook: papermill, saying on stdout which cell it is at.

Events, one JSON object a line: `{"cell": id, "number": i, "of": n}` as a cell starts, and at most one
`{"error": class, "message": text, "line": line in the cell, 0 when unknown}` before exit code 1.
"""

import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any, ClassVar

import papermill
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines
from papermill.exceptions import PapermillExecutionError

_ENGINE = "announcing"


class _Events:
    """The process's real stdout; what a kernel or its crash prints goes to stderr, where it cannot be taken for one."""

    def __init__(self) -> None:
        self.stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def emit(self, event: dict[str, Any]) -> None:
        self.stream.write(json.dumps(event) + "\n")
        self.stream.flush()


class AnnouncingEngine(NBClientEngine):
    """papermill's own engine, which also says which cell starts."""

    events: ClassVar[_Events]

    @classmethod
    def execute_managed_notebook(cls, nb_man: NotebookExecutionManager, kernel_name: str, **kwargs: Any) -> None:
        start = nb_man.cell_start

        def announce(cell: NotebookNode, cell_index: int = 0, **more: Any) -> None:
            cls.events.emit({"cell": cell.id, "number": cell_index + 1, "of": len(nb_man.nb.cells)})
            start(cell, cell_index, **more)

        nb_man.cell_start = announce
        super().execute_managed_notebook(nb_man, kernel_name, **kwargs)


def _line_in_cell(error: PapermillExecutionError) -> int:
    """The line at which the cell itself failed or called what failed, read from IPython's traceback."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    match = re.search(rf"Cell In\[{error.exec_count}\], line (\d+)", text)
    return int(match[1]) if match else 0


def main(notebook: str, executed: str, parameters: str) -> int:
    """Execute `notebook` into `executed` with the JSON object `parameters`; return the exit code."""
    logging.getLogger("papermill").setLevel(logging.ERROR)
    events = AnnouncingEngine.events = _Events()
    papermill_engines.register(_ENGINE, AnnouncingEngine)
    folder = Path(executed).parent
    try:
        papermill.execute_notebook(
            notebook, executed, json.loads(parameters), engine_name=_ENGINE, progress_bar=False, cwd=folder
        )
    except PapermillExecutionError as error:
        events.emit({"error": error.ename, "message": error.evalue, "line": _line_in_cell(error)})
        return 1
    except DeadKernelError as error:
        events.emit({"error": type(error).__name__, "message": "the kernel died while it ran this cell", "line": 0})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
