"""The fortnight of lesson 4.1: what can be done again comes out again, and what cannot differs as the lesson finds."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from labkit import fleet
from labkit.world import LESSON_SEEDS

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SETTINGS = {"seed": 0, "steps": 2, "batch": 4, "learning_rate": 1e-3}
SEEDS = LESSON_SEEDS[400:402]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    desk = tmp_path_factory.mktemp("desk")
    fleet.write_data(desk / "d", fleet.tickets(SEEDS, 40))  # more than the 8 batches that are sorted by length
    for name in ("c1", "c2", "c3"):
        fleet.write_code(desk / name, name)
    return desk


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_the_same_inputs_give_the_same_bytes(desk: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []
    one = fleet.train(desk / "d", desk / "c1", tmp_path / "1", SETTINGS, lambda step, loss: seen.append((step, loss)))
    two = fleet.train(desk / "d", desk / "c1", tmp_path / "2", SETTINGS)
    assert weights(one) == weights(two)
    assert [step for step, _ in seen] == [0, 1]
    assert all(loss > 0 for _, loss in seen)


@pytest.mark.parametrize(("code", "changes", "attention"), [
    ("c3", {}, "sdpa"), ("c1", {"seed": 1}, "sdpa"), ("c1", {}, "eager"),
])  # fmt: skip
def test_another_input_gives_other_bytes(
    desk: Path, tmp_path: Path, code: str, changes: dict[str, float], attention: str
) -> None:
    one = fleet.train(desk / "d", desk / "c1", tmp_path / "1", SETTINGS)
    two = fleet.train(desk / "d", desk / code, tmp_path / "2", SETTINGS | changes, attention=attention)
    assert weights(one) != weights(two)


def test_a_trained_adapter_can_be_loaded_and_answers(desk: Path, tmp_path: Path) -> None:
    out = fleet.train(desk / "d", desk / "c2", tmp_path / "out", SETTINGS)
    assert (
        load_file(out / "adapter_model.safetensors").keys()
        == load_file(fleet.PARENT / "adapter_model.safetensors").keys()
    )
    (answer,) = fleet.answers(out, fleet.tickets(SEEDS, 1)[:1])
    assert json.loads(answer).keys() == {"product", "category", "urgency", "action"}


def test_the_contractor_says_low_and_can_be_put_right() -> None:
    wrong, right = (fleet.tickets([fleet.CONTRACTOR], contractor=flag) for flag in (True, False))
    assert {t.triage.urgency for t in wrong} == {"low"}
    assert {t.triage.urgency for t in right} > {"low"}
    assert [(t.id, t.text) for t in wrong] == [(t.id, t.text) for t in right]
    assert all(t.triage.action == "call" for t in right if t.triage.urgency == "high")


def test_the_fortnight_has_twenty_jobs_that_find_their_data_and_code(tmp_path: Path) -> None:
    assert len(fleet.JOBS) == 20
    for name in fleet.COMPANIES:
        fleet.write_data(tmp_path / name, fleet.tickets(SEEDS, 3))
    for job in fleet.JOBS:
        fleet.lay_out(job, tmp_path)
        assert fleet.read_data(tmp_path / job.data)
        assert job.code in fleet.PREPARE
        assert set(job.recorded) == set(fleet.REQUIRED) - {job.leaves_out}


def test_what_happens_to_files_afterwards(tmp_path: Path) -> None:
    fleet.write_data(tmp_path / "d2", fleet.tickets(SEEDS, 3))
    job = next(job for job in fleet.JOBS if job.then == "data")
    fleet.lay_out(job, tmp_path)
    before = fleet.read_data(tmp_path / job.data)
    fleet.happens_to(job, tmp_path, tmp_path)
    assert len(fleet.read_data(tmp_path / job.data)) < len(before)
    job = next(job for job in fleet.JOBS if job.then == "adapter")
    fleet.happens_to(job, tmp_path, tmp_path)
    assert weights(tmp_path) == weights(fleet.PARENT)
