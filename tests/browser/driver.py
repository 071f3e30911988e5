"""What a learner does in JupyterLab, as functions of a Playwright page."""

import json
import re
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
from nbformat import NotebookNode
from playwright.sync_api import Locator, Page, expect

RUN_TIMEOUT = 900_000  # ms; validating runs a whole lesson, which trains for minutes on a busy machine


def open_notebook(page: Page, address: str) -> None:
    page.goto(address)
    wait_for_kernel(page, urlsplit(address).path.removeprefix("/lab/tree/"))


def wait_for_kernel(page: Page, path: str) -> None:
    """Wait until that notebook is in front, and stays there: JupyterLab may restore others before it."""
    page.wait_for_function("window.jupyterapp?.restored.then(() => true)")
    page.wait_for_function(
        """(path) => {
            const context = window.jupyterapp.shell.currentWidget?.context;
            return context?.path === path && context.isReady && context.sessionContext.isReady
                && context.sessionContext.session?.kernel?.status === 'idle';
        }""",
        arg=path,
        timeout=240_000,
    )


def notebook(page: Page) -> Locator:
    """The notebook in front."""
    return page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def position(path: Path, grade_id: str) -> int:
    """The index of the nbgrader cell of that id."""
    for index, cell in enumerate(read(path).cells):
        if cell.metadata.get("nbgrader", {}).get("grade_id") == grade_id:
            return index
    raise LookupError(f"{path} has no cell {grade_id}")


def cell(page: Page, index: int) -> Locator:
    return notebook(page).locator(f".jp-Cell[data-windowed-list-index='{index}']")


def select(page: Page, index: int) -> Locator:
    """Scroll the cell into view and make it the active one. JupyterLab renders only what is near the view."""
    page.evaluate(
        """async (index) => {
            const panel = window.jupyterapp.shell.currentWidget;
            panel.content.activeCellIndex = index;
            await panel.content.scrollToItem(index, 'center');
        }""",
        index,
    )
    target = cell(page, index)
    expect(target).to_be_visible()
    return target


def run(page: Page, index: int) -> Locator:
    """Run one cell with the keyboard and wait for its end."""
    target = select(page, index)
    prompt = target.locator(".jp-InputArea-prompt")
    before = prompt.inner_text()
    for _ in range(3):  # a key pressed while the page is still moving may reach nothing: a learner presses it again
        target.locator(".jp-InputPrompt, .jp-InputArea").first.click(position={"x": 5, "y": 5})
        page.keyboard.press("Escape")
        page.keyboard.press("Control+Enter")
        try:
            expect(prompt).not_to_have_text(before, timeout=20_000)
            break
        except AssertionError:
            continue
    expect(prompt).to_have_text(re.compile(r"\[\d+\]:"), timeout=RUN_TIMEOUT)
    return target


def write(page: Page, index: int, source: str) -> None:
    """Replace a cell's text as a paste would."""
    target = select(page, index)
    target.locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(source)


def outputs(target: Locator) -> str:
    return "\n".join(target.locator(".jp-OutputArea-output").all_inner_texts())


def save(page: Page) -> None:
    page.keyboard.press("Control+s")
    page.wait_for_function("!window.jupyterapp.shell.currentWidget.context.model.dirty")


def active_path(page: Page) -> str:
    """The path of the document in front."""
    return str(json.loads(page.evaluate("JSON.stringify(window.jupyterapp.shell.currentWidget.context.path)")))
