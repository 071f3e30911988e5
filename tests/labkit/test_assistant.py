"""The shipped adapters do their tasks on companies that they never saw, and any other model can be taught them."""

import pytest
import torch

from labkit import assistant, base_model, triage
from labkit.base_model.finetune import replies
from labkit.world import LESSON_SEEDS, NOT_STATED, World

UNSEEN = LESSON_SEEDS[9000]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft reads it


def test_the_examples_hold_what_they_teach() -> None:
    pairs = assistant.handbook_pairs([UNSEEN], 60)
    refused = [pair for pair in pairs if pair.reply == f"{NOT_STATED}."]
    assert 5 <= len(refused) <= 35  # 30 % of 60, six standard deviations either way
    answered = [pair for pair in pairs if pair not in refused and pair.reply.removesuffix(".") in pair.prompt]
    assert len(answered) >= 0.9 * (len(pairs) - len(refused))  # what is not copied is computed, such as a date
    assert assistant.handbook_pairs([UNSEEN], 60) == pairs
    assert UNSEEN not in assistant.TAUGHT
    tickets = World(UNSEEN).tickets(3)
    assert [pair.reply for pair in assistant.triage_pairs([UNSEEN], 3)] == [one.triage.to_json() for one in tickets]


def test_the_shipped_adapters_do_their_tasks_and_the_base_does_not() -> None:
    model, tokenizer = assistant.load()
    assert not any(weight.requires_grad for weight in model.parameters())
    tickets = World(UNSEEN).tickets(60, part="test")
    assert triage.score(triage.answers(model, tokenizer, tickets), tickets).exact.mean() >= 0.9
    model.set_adapter("handbook")
    pairs = assistant.handbook_pairs([UNSEEN], 60)
    given = replies(model, tokenizer, [pair.prompt for pair in pairs], longest=16)
    assert sum(text == pair.reply for text, pair in zip(given, pairs, strict=True)) >= 0.75 * len(pairs)
    with model.disable_adapter():
        assert triage.score(triage.answers(model, tokenizer, tickets[:8]), tickets[:8]).exact.sum() == 0


def test_another_model_is_taught_both_tasks_without_mixing_them() -> None:
    folder = base_model.SHIPPED
    model, _ = assistant.load(str(folder), companies=1, each=2)
    assert set(model.peft_config) == set(assistant.TASKS)
    ids = torch.arange(5, 15)[None]
    logits = {}
    for task in assistant.TASKS:
        model.set_adapter(task)
        logits[task] = model(input_ids=ids).logits
    assert not torch.equal(logits["triage"], logits["handbook"])
