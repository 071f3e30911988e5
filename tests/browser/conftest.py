"""A real JupyterLab server and a real browser."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from autograde.course import Course

TOKEN = "learner"
START_SECONDS = 120


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab on a private copy of the course."""

    course: Course
    url: str

    def address(self, path: str) -> str:
        return f"{self.url}/lab/tree/{path}?token={TOKEN}"


@pytest.fixture(scope="module")
def lab(course_copy: Course, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """`course lab` as `make lab` starts it, less the browser window."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path_factory.mktemp("home")
    log = home / "lab.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [
                Path(sys.executable).with_name("course"),
                "lab",
                "--no-browser",
                f"--ServerApp.port={port}",
                "--ServerApp.port_retries=0",
                "--LabApp.expose_app_in_browser=True",
                f"--IdentityProvider.token={TOKEN}",
            ],
            cwd=course_copy.root,
            env={**os.environ, "HOME": str(home), "HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_up(server, f"{url}/api/status?token={TOKEN}", log)
        yield Lab(course_copy, url)
    finally:
        os.killpg(server.pid, signal.SIGINT)
        try:
            server.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait_until_up(server: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, f"JupyterLab ended at once:\n{log.read_text()}"
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not answer within {START_SECONDS} s:\n{log.read_text()}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "the browser tests need Chromium: `apt-get install chromium`"
    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(
            executable_path=chromium,
            # In a container Chromium runs as root, where its own sandbox cannot; the pages are ours.
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"],
        )
        yield instance
        instance.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(60_000)
    yield page
    context.close()


@pytest.fixture(scope="module")
def screenshots(course: Course) -> Path:
    """Where the pictures go; CI keeps them as artefacts."""
    folder = course.state / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
