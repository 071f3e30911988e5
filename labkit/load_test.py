"""Load on a chat endpoint: open-loop requests at given times, and locust's closed loop as a process of its own."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from labkit.threads import in_thread

PATH = "/v1/chat/completions"

_LOCUSTFILE = """
import json, os
from locust import HttpUser, constant, task

ROWS = json.loads(os.environ["LOAD_ROWS"])


class Client(HttpUser):
    wait_time = constant(0)
    at = 0

    @task
    def ask(self):
        Client.at += 1
        self.client.post("%s", json=ROWS[Client.at %% len(ROWS)])
"""


class Sample(NamedTuple):
    """One request of a load test: when it was due, sent and answered, in seconds of one clock; `ok` for status 200."""

    due: float
    sent: float
    done: float
    ok: bool


def open_loop(url: str, bodies: Sequence[dict[str, Any]], due: Sequence[float]) -> list[Sample]:
    """POST each body to the chat endpoint at `url` when it is due (seconds from now), answered or not the others."""

    async def main() -> list[Sample]:
        everyone = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=120, limits=everyone) as http:
            began = time.perf_counter()

            async def one(body: dict[str, Any], at: float) -> Sample:
                await asyncio.sleep(max(0.0, at - (time.perf_counter() - began)))
                sent = time.perf_counter() - began
                try:
                    ok = (await http.post(PATH, json=body)).status_code == 200
                except httpx.TransportError:
                    ok = False
                return Sample(at, sent, time.perf_counter() - began, ok)

            return await asyncio.gather(*(one(body, at) for body, at in zip(bodies, due, strict=True)))

    return in_thread(lambda: asyncio.run(main()))


class LocustReport(NamedTuple):
    """What locust counted: `histogram` maps a response time in ms, rounded as locust does, to a number of requests."""

    requests: int
    failed: int
    seconds: float
    histogram: dict[int, int]

    def percentile(self, share: float) -> int:
        """The smallest response time (ms) that at least this share of the requests does not exceed."""
        seen = 0
        for milliseconds, count in sorted(self.histogram.items()):
            seen += count
            if seen >= share * self.requests:
                return milliseconds
        raise ValueError("locust has sent no request")


def locust(url: str, bodies: Sequence[dict[str, Any]], *, users: int, seconds: int) -> LocustReport:
    """Let locust ask with so many users, each one request after the other, and return what it reports of all.

    Raises `RuntimeError` with what it wrote when there is no report.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "locustfile.py").write_text(_LOCUSTFILE % PATH, encoding="utf-8")
        command = [sys.executable, "-m", "locust", "--headless", "--only-summary", "--host", url]
        command += ["-u", str(users), "-r", "100", "-t", f"{seconds}s", "--stop-timeout", "20", "--json-file", "report"]
        env = {**os.environ, "LOAD_ROWS": json.dumps(list(bodies)), "NO_PROXY": "*"}
        ran = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        report = Path(folder, "report.json")
        found = json.loads(report.read_text(encoding="utf-8")) if report.exists() else []
    if not found:
        raise RuntimeError(f"locust reports no request: {ran.stderr[-2000:]}")
    one = found[0]
    return LocustReport(
        one["num_requests"],
        one["num_failures"],
        one["last_request_timestamp"] - one["start_time"],
        {int(milliseconds): count for milliseconds, count in one["response_times"].items()},
    )
