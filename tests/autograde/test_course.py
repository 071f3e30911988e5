"""Names of lessons and the places they mean."""

from pathlib import Path

import pytest

from autograde import course as course_module
from autograde.course import Course, number
from autograde.errors import CourseError


@pytest.fixture
def tree(tmp_path: Path) -> Course:
    for name in ("1_foundations/1_1_bench", "2_peft/2_1_lora", "2_peft/2_2_sweep", "10_more/10_1_last"):
        path = tmp_path / "solutions" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "solutions" / "start_here.py").touch()
    (tmp_path / "pyproject.toml").touch()
    return Course(tmp_path)


def _stems(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def test_selection_by_lesson_module_and_everything(tree: Course) -> None:
    everything = ["1_1_bench", "2_1_lora", "2_2_sweep", "10_1_last"]
    assert _stems(tree.select([])) == everything
    assert _stems(tree.select(["2"])) == ["2_1_lora", "2_2_sweep"]
    assert _stems(tree.select(["10.1", "2.1", "2.1"])) == ["2_1_lora", "10_1_last"]
    assert _stems(tree.select(["2_2_sweep"])) == ["2_2_sweep"]


def test_an_unknown_name_lists_the_known(tree: Course) -> None:
    with pytest.raises(CourseError, match=r"no lesson or module '9.9'; there are: 1.1, 2.1, 2.2, 10.1"):
        tree.select(["9.9"])


def test_one_lesson_is_asked_for_and_a_module_named(tree: Course) -> None:
    with pytest.raises(CourseError, match=r"name one: 2\.1, 2\.2"):
        tree.select_one("2")
    assert tree.select_one("2.2").stem == "2_2_sweep"


def test_places(tree: Course) -> None:
    source = tree.select_one("2.1")
    assert tree.notebook(source) == tree.root / "notebooks" / "2_peft" / "2_1_lora.ipynb"
    assert tree.result_file(source) == tree.root / "results" / "2_1_lora.json"
    assert number(source) == "2.1"


def test_find_from_below_and_from_outside(tree: Course, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert course_module.find(tree.solutions / "2_peft") == tree
    with pytest.raises(CourseError, match="not inside the course"):
        course_module.find(tmp_path_factory.mktemp("elsewhere"))
