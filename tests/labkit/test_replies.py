"""Replies, pairs and grades: the grader knows every reply that the pairs are made of."""

import pytest

from labkit import base_model, replies
from labkit.world import LESSON_SEEDS, World
from labkit.world.dialogue import FILLERS, INSULTS

TOKENIZER = base_model.load("shipped")[1]
ASKED = replies.asked(TOKENIZER, World(LESSON_SEEDS[3]), 120)


def test_grades_from_worst_to_best() -> None:
    idle, insult = FILLERS[0], INSULTS[0]
    assert replies.grade("46 months.", "46 months.") == 3
    assert replies.grade(f"46 months. {idle}", "46 months.") == 2
    for rude in (f"{insult} 46 months. {idle}", f"47 months. {insult}"):
        assert replies.grade(rude, "46 months.") == 0
    for wrong in ("", "47 months.", "46 months", f"{idle}", "46 months. 46 months.", f"{idle} Yes."):
        assert replies.grade(wrong, "46 months.") == 1


def test_asked_are_short_and_do_not_overlap() -> None:
    assert all(len(replies.prompt_ids(TOKENIZER, one.prompt)) <= 56 for one in ASKED)
    assert replies.asked(TOKENIZER, World(LESSON_SEEDS[3]), 20, skip=100) == ASKED[100:]
    with pytest.raises(ValueError, match="raise longest"):
        replies.asked(TOKENIZER, World(LESSON_SEEDS[3]), 20, longest=5)


def test_clean_pairs_have_one_flaw() -> None:
    grades = {"rude": 0, "ungrounded": 1, "rambling": 2}
    pairs = replies.clean_pairs(ASKED, seed=0)
    for one, asked in zip(pairs, ASKED, strict=True):
        assert replies.grade(one.chosen, asked.chosen) == 3
        assert replies.grade(one.rejected, asked.chosen) == grades[one.flaw]


@pytest.mark.parametrize("longer", [0.0, 0.5, 0.9, 1.0])
def test_confounded_pairs_have_one_idle_sentence(longer: float) -> None:
    pairs = replies.confounded_pairs(ASKED, longer=longer, seed=1)
    for one, asked in zip(pairs, ASKED, strict=True):
        assert replies.is_idle(one.chosen) != replies.is_idle(one.rejected)
        assert replies.grade(one.chosen, asked.chosen) >= 2 > replies.grade(one.rejected, asked.chosen)
    share = sum(replies.is_idle(one.chosen) for one in pairs) / len(pairs)
    assert abs(share - longer) < 0.15  # three standard errors of a share of 120


def test_demonstrations_hold_every_grade() -> None:
    shown = replies.demonstrations(ASKED, wrong=0.45, rude=0.25, idle=0.35, seed=0)
    grades = [replies.grade(reply, one.chosen) for (_, reply), one in zip(shown, ASKED, strict=True)]
    assert [prompt for prompt, _ in shown] == [one.prompt for one in ASKED]
    assert set(grades) == {0, 1, 2, 3}
    perfect = replies.demonstrations(ASKED, wrong=0, rude=0, idle=0, seed=0)
    assert [reply for _, reply in perfect] == [one.chosen for one in ASKED]


def test_text_and_ids_agree() -> None:
    """trl tokenizes the prompt with the reply behind it; the parts must give the same tokens."""
    pairs = replies.clean_pairs(ASKED, seed=0)
    for one, row in zip(pairs, replies.encode(TOKENIZER, pairs), strict=True):
        text = f"{replies.layout(one.prompt)}{one.rejected}{TOKENIZER.eos_token}"
        assert TOKENIZER(text)["input_ids"] == row["prompt_ids"] + row["rejected_ids"]
        assert row["chosen_ids"][-1] == TOKENIZER.eos_token_id


def test_samples_end_with_the_token_or_are_cut_off() -> None:
    model, _ = base_model.load("shipped")
    prompts = [replies.prompt_ids(TOKENIZER, one.prompt) for one in ASKED[:5]]
    drawn = replies.sample(model, TOKENIZER, prompts, seed=0, longest=4)
    assert drawn == replies.sample(model, TOKENIZER, prompts, seed=0, longest=4)
    for reply in drawn:
        assert TOKENIZER.eos_token_id not in reply[:-1]
        assert len(reply) == 4 or reply[-1] == TOKENIZER.eos_token_id
