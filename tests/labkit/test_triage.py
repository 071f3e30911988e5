"""labkit.triage: what the loss sees, what the loop trains, and how answers are scored."""

import json
from itertools import chain

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from labkit import triage
from labkit.world import LESSON_SEEDS, Triage, World

TICKETS = World(LESSON_SEEDS[0]).tickets(12, part="train")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and two special ones."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|end|>", pad_token="<|pad|>")
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return made


def new_model(tokenizer: PreTrainedTokenizerFast, *, width: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)).eval()


def test_an_example_is_the_template_then_the_json_then_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    ticket = TICKETS[0]
    example = triage.encode(tokenizer, [ticket])[0]
    assert tokenizer.decode(example.prompt) == f"user: {ticket.text}\nassistant: "
    assert tokenizer.decode(example.answer) == ticket.triage.to_json() + "<|end|>"


def test_a_tokenizer_that_lacks_what_is_needed_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="has no chat template"):
        triage.encode(bare, TICKETS)
    bare.chat_template = tokenizer.chat_template
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        triage.encode(bare, TICKETS)


def test_labels_are_the_answer_and_nothing_else() -> None:
    short, long = triage.Example((5, 6), (7, 8)), triage.Example((1, 2, 3), (4, 9, 2))
    batch = triage.collate([short, long], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 0, 0], [1, 2, 3, 4, 9, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert batch.labels.tolist() == [[-100, -100, 7, 8, -100, -100], [-100, -100, -100, 4, 9, 2]]


def test_what_stands_in_the_padding_changes_no_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    model, examples = new_model(tokenizer), triage.encode(tokenizer, TICKETS[:3])
    with torch.no_grad():
        together = triage.loss(model, triage.collate(examples, pad_id=3))
        other_pad = triage.loss(model, triage.collate(examples, pad_id=9))
        alone = [triage.loss(model, triage.collate([example])).item() for example in examples]
    tokens = [len(example.answer) for example in examples]
    assert together.item() == other_pad.item()
    assert together.item() == pytest.approx(float(np.average(alone, weights=tokens)), rel=1e-5)


def test_an_epoch_shows_each_example_once_and_the_seed_decides_the_order() -> None:
    examples = [triage.Example((index,), (index,)) for index in range(6)]

    def rows(seed: int) -> list[list[int]]:
        return [batch.input_ids[:, 0].tolist() for batch in triage.batches(examples, size=2, steps=6, seed=seed)]

    first = rows(1)
    assert len(first) == 6
    assert sorted(chain(*first[:3])) == sorted(chain(*first[3:])) == list(range(6))
    assert first[:3] != first[3:]
    assert rows(1) == first != rows(2)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 3 needs 1 to 2 examples"):
        next(triage.batches([triage.Example((1,), (1,))] * 2, size=3, steps=1, seed=0))


def test_training_changes_what_requires_a_gradient_and_lowers_the_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    model, examples = new_model(tokenizer), triage.encode(tokenizer, TICKETS)
    model.requires_grad_(False)
    trained = model.model.layers[0].mlp.down_proj.weight.requires_grad_()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    data = list(triage.batches(examples, size=4, steps=12, seed=0))
    losses = triage.train(model, data, steps=12, learning_rate=1e-2)
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"model.layers.0.mlp.down_proj.weight"}
    assert not model.training
    assert trained.requires_grad


def test_training_twice_gives_the_same_losses(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = triage.encode(tokenizer, TICKETS)

    def losses() -> list[float]:
        data = triage.batches(examples, size=4, steps=4, seed=3)
        return triage.train(new_model(tokenizer), data, steps=4, learning_rate=1e-2)

    assert losses() == losses()


def test_training_nothing_or_into_infinity_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    model, examples = new_model(tokenizer), triage.encode(tokenizer, TICKETS[:2])
    data = [triage.collate(examples)]
    with pytest.raises(ValueError, match="attach an adapter"):
        triage.train(model.requires_grad_(False), data, steps=1, learning_rate=1e-3)
    model.requires_grad_(True).get_input_embeddings().weight.data.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        triage.train(model, data, steps=1, learning_rate=1e-3)


def test_a_batch_of_answers_equals_answers_one_by_one(tokenizer: PreTrainedTokenizerFast) -> None:
    model = new_model(tokenizer)
    together = triage.answers(model, tokenizer, TICKETS[:4])
    assert together == triage.answers(model, tokenizer, TICKETS[:4], batch_size=1)
    assert together == triage.answers(model, tokenizer, TICKETS[:4], batch_size=3)


def test_a_model_that_learns_a_ticket_by_heart_answers_it_exactly(tokenizer: PreTrainedTokenizerFast) -> None:
    model, ticket = new_model(tokenizer, width=64), TICKETS[0]
    data = [triage.collate(triage.encode(tokenizer, [ticket]))] * 60
    triage.train(model, data, steps=60, learning_rate=1e-2)
    assert triage.answers(model, tokenizer, [ticket]) == [ticket.triage.to_json()]


def test_the_score_counts_each_field_and_all_of_them() -> None:
    tickets = TICKETS[:4]
    right = tickets[0].triage
    wrong_urgency = Triage(
        tickets[1].triage.product,
        tickets[1].triage.category,
        "low" if tickets[1].triage.urgency != "low" else "high",
        tickets[1].triage.action,
    )
    spaced = json.dumps(json.loads(tickets[3].triage.to_json()), indent=1)
    score = triage.score([right.to_json(), wrong_urgency.to_json(), "no JSON", spaced], tickets)
    assert score.exact.tolist() == [True, False, False, True]
    assert score.fields["urgency"].tolist() == [True, False, False, True]
    assert score.fields["product"].tolist() == [True, True, False, True]
    assert set(score.fields) == set(triage.FIELDS)


def test_scores_need_an_answer_a_ticket() -> None:
    with pytest.raises(ValueError, match="longer"):
        triage.score(["x"], TICKETS[:2])
    assert triage.score([], []).exact.shape == (0,)


def test_the_interval_is_wilsons_and_never_of_width_zero() -> None:
    assert triage.interval(np.array([True] * 9 + [False])) == pytest.approx((0.5958, 0.9821), abs=1e-3)
    low, high = triage.interval(np.ones((3, 20), dtype=bool))
    assert low < 0.95
    assert high == 1.0
