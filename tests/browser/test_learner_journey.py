"""A learner's whole way through lesson 2.1 in real JupyterLab, from the start page to the points on the map."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from autograde import build, lesson
from autograde.course import START_PAGE

from . import driver
from .conftest import Lab

pytestmark = pytest.mark.browser

LESSON = "2.1"


def test_lab_extensions_report_no_error() -> None:
    listing = subprocess.run(
        [sys.executable, "-m", "jupyter", "labextension", "list"], capture_output=True, text=True, check=True
    )
    shown = listing.stdout + listing.stderr
    assert "@jupyter/nbgrader" in shown
    assert "jupyterlab-jupytext" in shown
    for complaint in ("error", "incompatible", "not compatible", "X "):
        assert complaint not in shown.replace("Extension", ""), shown


def test_a_lesson_source_opens_as_a_notebook_on_double_click(lab: Lab, page: Page, screenshots: Path) -> None:
    source = lab.course.select_one(LESSON)
    folder = source.parent.relative_to(lab.course.root)
    page.goto(lab.address(str(folder)))
    page.locator(".jp-DirListing-item", has_text=source.name).dblclick()
    expect(driver.notebook(page).locator(".jp-Cell").first).to_be_visible()
    assert driver.active_path(page) == str(source.relative_to(lab.course.root))
    page.screenshot(path=screenshots / "7-source-as-notebook.png")


def test_from_start_page_to_points(lab: Lab, page: Page, screenshots: Path) -> None:
    course = lab.course
    source = course.select_one(LESSON)
    work = course.notebook(source)
    parsed = lesson.load(source)
    answers = {
        cell.metadata.nbgrader.grade_id: cell.source
        for cell in build.source_notebook(parsed).cells
        if cell.metadata.get("nbgrader", {}).get("solution")
    }
    # The first exercise whose wrong answer runs and is then caught by its visible check: what a learner meets first.
    exercise = parsed.exercises[0].name
    check = driver.position(work, f"check-{exercise}")
    mistake = next(cell for cell in parsed.of_kind("mistake") if cell.of == exercise)

    # The start page, and from its map to the lesson.
    driver.open_notebook(page, lab.address(f"notebooks/{START_PAGE}.ipynb"))
    page.screenshot(path=screenshots / "1-start-page.png")
    driver.notebook(page).get_by_role("link", name=parsed.title).click()
    expect(driver.notebook(page).get_by_role("heading", name=parsed.title, level=1)).to_be_visible()
    driver.wait_for_kernel(page, work.relative_to(course.root).as_posix())
    page.screenshot(path=screenshots / "2-lesson.png")

    # Everything before the first exercise runs as it stands.
    for index in range(driver.position(work, exercise)):
        if driver.read(work).cells[index].cell_type == "code":
            assert "Error" not in driver.outputs(driver.run(page, index))

    # Nothing written yet: the check fails. A wrong answer: it says what is wrong. The answer: it passes.
    driver.run(page, driver.position(work, exercise))
    assert "Error" in driver.outputs(driver.run(page, check))
    driver.write(page, driver.position(work, exercise), mistake.source)
    driver.run(page, driver.position(work, exercise))
    shown = driver.outputs(driver.run(page, check))
    assert "AssertionError" in shown
    page.screenshot(path=screenshots / "3-failing-check.png")
    driver.write(page, driver.position(work, exercise), answers[exercise])
    driver.run(page, driver.position(work, exercise))
    assert "Error" not in driver.outputs(driver.run(page, check))
    page.screenshot(path=screenshots / "4-passing-check.png")

    # The other exercises, then the Validate button of nbgrader.
    for name, answer in answers.items():
        driver.write(page, driver.position(work, name), answer)
    driver.save(page)
    saved = {cell.metadata.get("nbgrader", {}).get("grade_id"): cell.source for cell in driver.read(work).cells}
    assert {name: saved[name] for name in answers} == answers, "what was pasted is what was saved"
    driver.notebook(page).get_by_role("button", name="Validate").click()
    dialog = page.locator(".nbgrader-ValidateDialog, .jp-Dialog")
    expect(dialog).to_contain_text("Success", timeout=driver.RUN_TIMEOUT)
    page.screenshot(path=screenshots / "5-validated.png")
    page.keyboard.press("Escape")

    # Grading reads the notebook and changes nothing in it; the map then shows the points.
    before = work.read_bytes()
    graded = subprocess.run(
        [Path(sys.executable).with_name("course"), "check", LESSON, "--json"],
        cwd=course.root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert graded.returncode == 0, graded.stdout + graded.stderr
    (report,) = json.loads(graded.stdout)
    assert (report["points"], report["max_points"]) == (parsed.points, parsed.points)
    assert work.read_bytes() == before

    start = course.notebooks / f"{START_PAGE}.ipynb"
    progress = next(i for i, cell in enumerate(driver.read(start).cells) if cell.source == "!course progress")
    driver.open_notebook(page, lab.address(f"notebooks/{START_PAGE}.ipynb"))
    assert f"{parsed.points}/{parsed.points}" in driver.outputs(driver.run(page, progress)).replace(" ", "")
    page.screenshot(path=screenshots / "6-progress.png")
