import json
import re

import pytest

from labkit import base_model
from labkit.base_model.card import TARGETS, written
from labkit.base_model.evaluate import Quantity, exact, quantity, reading_pairs
from labkit.base_model.finetune import Pair, encode, plain_prompt
from labkit.base_model.probe import IGNORED, copying, reading_prompt, validation
from labkit.world import World
from labkit.world.domains import DOMAINS
from labkit.world.draw import Draw

MODEL, TOKENIZER = base_model.load("shipped")


def test_an_interval_is_students_t() -> None:
    q = quantity("x", [1.0, 2.0, 3.0])
    assert q.mean == 2
    assert q.high - q.mean == pytest.approx(4.303 / 3**0.5)
    assert q.mean - q.low == pytest.approx(q.high - q.mean)


def test_one_seed_has_no_interval() -> None:
    assert quantity("x", [0.5]) == Quantity("x", (0.5,), 0.5, None, None)


def test_exact_match_forgives_a_full_stop_and_nothing_else() -> None:
    assert exact(["Fernstoke.", " 66 kg"], ["Fernstoke", "66 kg"]) == 1
    assert exact(["fernstoke", "66kg"], ["Fernstoke", "66 kg"]) == 0


@pytest.mark.parametrize("passages", [1, 4])
def test_a_reading_prompt_holds_its_answer_once_in_the_gold_passage(passages: int) -> None:
    pairs = reading_pairs([1, 2], passages, 40)
    assert len(pairs) == 40
    for pair in pairs:
        assert len(pair.prompt.split("\n")) == passages + 1
        assert pair.reply in pair.prompt
        assert len(TOKENIZER(pair.prompt)["input_ids"]) <= 512
    texts = {p.text for p in World(1).passages()} | {p.text for p in World(2).passages()}
    assert sum(line in texts for line in pairs[0].prompt.split("\n")) in (0, passages)


@pytest.mark.parametrize(("domain", "other"), [("company", "port"), ("port", "company")])
def test_a_reading_prompt_keeps_to_the_domain_it_was_asked_for(domain: str, other: str) -> None:
    def nouns(key: str) -> set[str]:
        return {kind.key for kind in DOMAINS[key].kinds}

    prompts = [reading_prompt(Draw("domains", i), 1, domain)[0] for i in range(40)]
    words = {word for prompt in prompts for word in re.findall("[a-z]+", prompt.lower())}
    assert words & (nouns(domain) - nouns(other))
    assert not words & (nouns(other) - nouns(domain))


def test_the_prompt_is_no_label() -> None:
    ids, labels = encode(TOKENIZER, Pair("Where?", "Here"))
    answer = [i for i, y in zip(ids, labels, strict=True) if y != IGNORED]
    assert TOKENIZER.decode(answer) == "Here<|end|>"
    assert ids[: len(ids) - len(answer)] == TOKENIZER("<|user|>Where?<|end|><|assistant|>")["input_ids"]


def test_a_pair_in_plain_text_is_its_lines() -> None:
    ids, labels = encode(TOKENIZER, Pair("Where?", "Here"), plain_prompt)
    assert TOKENIZER.decode(ids) == "<|start|>Where?\nHere<|end|>"
    assert sum(y != IGNORED for y in labels) < len(ids)


def test_the_shipped_model_reads_and_knows_its_language() -> None:
    """The levels that the model card reports with intervals; here only that these are the weights it is about."""
    assert copying(MODEL, TOKENIZER, 1, questions=64) > 0.6
    assert validation(MODEL, TOKENIZER, 64).excess < 0.3


def test_the_model_card_says_what_was_measured() -> None:
    card = (base_model.SHIPPED / "README.md").read_text()
    found = [
        Quantity(**(q | {"values": tuple(q["values"])}))
        for q in json.loads((base_model.SHIPPED / "evaluation.json").read_text())
    ]
    assert set(TARGETS) <= {q.name for q in found}
    for q in found:
        assert f"| {q.name} | {written(q.name, q.mean)} |" in card
        assert (q.low is None) == (len(q.values) == 1)
    last = json.loads((base_model.SHIPPED / "history.json").read_text())[-1]
    assert re.search(rf"{last['tokens']:,} tokens", card)
