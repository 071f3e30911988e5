"""Runs the code cells of one notebook in a kernel, inside the sandbox, and tells its parent what each one showed.

`python -m autograde.kernel_worker JOB` reads the job (JSON) and writes one JSON object a line to stdout:
`{"started": i}`, then `{"ended": i, "outputs": […], "count": n}`, or, as the last line, `{"died": i, "reason": …}`;
`{"done": true}` after the last cell. It never decides what a death costs: that is `autograde.execute`, outside.
It imports neither nbformat nor nbgrader, so that it starts quickly.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import zmq
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

_POLL_MILLISECONDS = 100
_LOST_IDLE_SECONDS = 4.0  # a flood of output may drop the kernel's "idle"; after the reply it is missed this long
_KEPT_CHARACTERS = 1_000_000  # of one cell's output; the rest is counted, not kept
_RUNAWAY_CHARACTERS = 30_000_000  # a cell that printed this much prints without end


class _KernelDiedError(Exception):
    """The kernel is gone or must go; the message says why, for the learner."""


class _Outputs:
    """What one cell has shown so far, as nbformat outputs, bounded in memory."""

    def __init__(self) -> None:
        self.seen = 0
        self._items: list[dict[str, Any]] = []
        self._clear_next = False

    def add(self, kind: str, content: dict[str, Any]) -> None:
        """Take in one iopub message."""
        left = _KEPT_CHARACTERS - self.seen
        self.seen += len(content["text"]) if kind == "stream" else len(json.dumps(content))
        if kind == "stream":
            content = {"name": content["name"], "text": content["text"][: max(0, left)]}
        if kind == "clear_output":
            self._clear_next = bool(content.get("wait"))
            if not self._clear_next:
                self._items.clear()
        elif kind == "update_display_data":
            display = content.get("transient", {}).get("display_id")
            for item in self._items:
                if display is not None and item.get("display") == display:
                    item |= {"data": content["data"], "metadata": content["metadata"]}
        elif kind in ("stream", "display_data", "execute_result", "error") and left > 0:
            if self._clear_next:
                self._items.clear()
                self._clear_next = False
            self._append(kind, content)

    def _append(self, kind: str, content: dict[str, Any]) -> None:
        if kind == "stream":
            last = self._items[-1] if self._items else {}
            if last.get("name") == content["name"]:
                last["parts"].append(content["text"])
            else:
                self._items.append({"output_type": "stream", "name": content["name"], "parts": [content["text"]]})
        elif kind == "error":
            self._items.append(_error(content["ename"], content["evalue"], content["traceback"]))
        else:
            item = {"output_type": kind, "data": content["data"], "metadata": content["metadata"]}
            if kind == "execute_result":
                item["execution_count"] = content["execution_count"]
            self._items.append(item | {"display": content.get("transient", {}).get("display_id")})

    def finish(self, stopped: str, reply: dict[str, Any]) -> list[dict[str, Any]]:
        """The outputs, with the error of a cell that was `stopped`, or that failed without showing its error."""
        shown = [dict(item) for item in self._items]
        for item in shown:
            item.pop("display", None)
            if "parts" in item:
                item["text"] = "".join(item.pop("parts"))
        if self.seen > _KEPT_CHARACTERS:
            note = f"... the rest of {self.seen:,} characters of output is left out ..."
            shown.append({"output_type": "stream", "name": "stdout", "text": note})
        if stopped:
            shown = [item for item in shown if item["output_type"] != "error"]
            return [*shown, _error("Stopped", stopped, [])]
        if reply["status"] != "ok":
            name = reply.get("ename", "Aborted")
            if not any(item.get("ename") == name for item in shown):
                shown.append(_error(name, reply.get("evalue", ""), reply.get("traceback", [])))
        return shown


def _error(name: str, value: str, traceback: list[str]) -> dict[str, Any]:
    return {"output_type": "error", "ename": name, "evalue": value, "traceback": traceback or [f"{name}: {value}"]}


class _Kernel:
    """One kernel and the conversation with it. Sockets are files in `folder`: no ports, so no two runs can collide."""

    def __init__(self, folder: Path, cell_seconds: float, grace_seconds: float) -> None:
        self._cell_seconds, self._grace_seconds = cell_seconds, grace_seconds
        self._manager = KernelManager(kernel_name="python3", transport="ipc", ip=str(folder / "k"))
        self._manager.start_kernel(
            cwd=str(folder),
            extra_arguments=["--HistoryManager.hist_file=:memory:"],
            stdout=subprocess.DEVNULL,  # stdout is this process's line to its parent
            stderr=subprocess.DEVNULL,
        )
        self._client: BlockingKernelClient = self._manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=60)
        self._poller = zmq.Poller()
        for channel in (self._client.iopub_channel, self._client.shell_channel):
            self._poller.register(channel.socket, zmq.POLLIN)

    def close(self) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)

    def run(self, source: str) -> tuple[list[dict[str, Any]], int | None]:
        """Run one cell; return its outputs and its execution count.

        A cell over its time is interrupted, and so is one that prints without end; both end with an error output.
        Raises `_KernelDiedError` when the kernel died, or does not stop when interrupted.
        """
        outputs = _Outputs()
        identity = self._client.execute(source, stop_on_error=False, allow_stdin=False)
        deadline = time.monotonic() + self._cell_seconds
        stopped, reply, replied_at, idle = "", None, 0.0, False
        while reply is None or not idle:
            waiting = dict(self._poller.poll(_POLL_MILLISECONDS))
            now = time.monotonic()
            if self._client.iopub_channel.socket in waiting:
                message = self._client.get_iopub_msg(timeout=0)
                if message["parent_header"].get("msg_id") == identity:
                    if message["msg_type"] == "status":
                        idle = message["content"]["execution_state"] == "idle"
                    outputs.add(message["msg_type"], message["content"])
            elif reply is not None and now - replied_at > _LOST_IDLE_SECONDS:
                idle = True
            if self._client.shell_channel.socket in waiting:
                message = self._client.get_shell_msg(timeout=0)
                if message["parent_header"].get("msg_id") == identity:
                    reply, replied_at = message["content"], now
            if not waiting and not self._manager.is_alive():
                raise _KernelDiedError("it ended the kernel")
            if reply is None and not stopped:
                if now > deadline:
                    stopped = f"it ran longer than its limit of {self._cell_seconds:g} s"
                elif outputs.seen > _RUNAWAY_CHARACTERS:
                    stopped = "it printed without end"
                if stopped:
                    self._manager.interrupt_kernel()
                    deadline = now + self._grace_seconds
            elif reply is None and now > deadline:
                raise _KernelDiedError(f"{stopped} and did not stop when it was interrupted")
        if any(item.get("source") == "ask_exit" for item in reply.get("payload", ())):
            raise _KernelDiedError("it ended the kernel")
        return outputs.finish(stopped, reply), reply.get("execution_count")


def _tell(**message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main(job_path: Path) -> None:
    """Run the job's cells in order: `{"cells": [[index, source], …], "cell_seconds": …, "grace_seconds": …}`."""
    job = json.loads(job_path.read_text(encoding="utf-8"))
    kernel = _Kernel(job_path.parent, job["cell_seconds"], job["grace_seconds"])
    index = -1
    try:
        for index, source in job["cells"]:
            _tell(started=index)
            outputs, count = kernel.run(source)
            _tell(ended=index, outputs=outputs, count=count)
        _tell(done=True)
    except _KernelDiedError as death:
        _tell(died=index, reason=str(death))
    finally:
        kernel.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
