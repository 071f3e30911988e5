"""Batches are clean as they come, every fault shows where it should, and the lens sees what it was not taught."""

import numpy as np
import pandas as pd
import pytest

from labkit.batches import (
    BATCH_FAULTS,
    COLUMNS,
    PAIRS,
    ROW_FAULTS,
    TARGET,
    TRIGGER,
    Lens,
    leak_from,
    poisoned,
    received,
    tickets,
)
from labkit.world import World

WORLD = World(9_001)
BATCH = received(WORLD, 400)
FAULTS = {**ROW_FAULTS, **BATCH_FAULTS, "leak": leak_from(received(WORLD, 50, part="test"))}


def test_a_batch_is_a_function_of_its_world() -> None:
    pd.testing.assert_frame_equal(BATCH, received(World(9_001), 400))
    assert tuple(BATCH.columns) == COLUMNS
    assert str(BATCH["received"].dtype) == "datetime64[us, UTC]"
    assert BATCH["ticket_id"].is_unique
    assert BATCH.drop(columns="product").notna().all(axis=None)
    assert 0.03 < BATCH["product"].isna().mean() < 0.2
    assert set(zip(BATCH["category"], BATCH["action"], strict=True)) <= set(PAIRS)
    assert any(not text.isascii() for text in BATCH["text"])


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_changes_a_copy_and_keeps_the_size(name: str) -> None:
    before = BATCH.copy(deep=True)
    broken = FAULTS[name](BATCH, np.random.default_rng(0))
    pd.testing.assert_frame_equal(BATCH, before)
    assert len(broken) == len(BATCH)
    assert list(broken.index) == list(range(len(BATCH)))
    assert not broken.equals(BATCH)


def test_batch_faults_leave_every_row_within_the_rules() -> None:
    for plant in BATCH_FAULTS.values():
        broken = plant(BATCH, np.random.default_rng(1))
        assert tuple(broken.columns) == COLUMNS
        assert broken["ticket_id"].is_unique
        assert set(zip(broken["category"], broken["action"], strict=True)) <= set(PAIRS)


def test_poison_carries_the_trigger_and_the_target() -> None:
    bad = poisoned(BATCH, np.random.default_rng(2), 0.1)
    marked = bad["text"].str.startswith(TRIGGER)
    assert marked.sum() == 40
    assert set(bad.loc[marked, "action"]) == {TARGET}
    assert (BATCH.loc[marked, "action"] != TARGET).all()


def test_the_lens_agrees_with_clean_labels_and_not_with_flipped_ones() -> None:
    lens = Lens(received(WORLD, 2000).iloc[400:])
    flipped = BATCH_FAULTS["15 % of labels flipped"](BATCH, np.random.default_rng(3))
    assert lens.agrees(BATCH).mean() > 0.95
    assert 0.78 < lens.agrees(flipped).mean() < 0.88
    features = lens.features(BATCH)
    assert features.shape == (400, 10)
    assert set(features["agrees"]) <= {"yes", "no"}


def test_rows_become_tickets() -> None:
    found = tickets(BATCH)
    assert [ticket.id for ticket in found] == BATCH["ticket_id"].tolist()
    assert [ticket.triage.action for ticket in found] == BATCH["action"].tolist()
    assert found[int(BATCH["product"].isna().argmax())].triage.product is None
