import json
import math
import re
from collections import Counter

import pytest

from labkit.world import ACTIONS, CATEGORIES, URGENCIES, VALIDATION_SEEDS, complaints, names
from labkit.world.card import CARD, card, coverage, diversity, words
from labkit.world.draw import Draw
from labkit.world.recall import lookup, notices, pairs
from labkit.world.stream import SIGNS, STAGES, Stage, document, quiz, register


def test_surprisal_is_the_log_of_the_probability() -> None:
    draw = Draw("x")
    draw.below(8)
    draw.pick("abcd")
    draw.order(range(4))
    assert draw.nats == pytest.approx(math.log(8 * 4 * 24))
    before = draw.nats
    hit = draw.chance(0.25)
    assert draw.nats - before == pytest.approx(-math.log(0.25 if hit else 0.75))
    before = draw.nats
    option = draw.weighted((("a", 1.0), ("b", 3.0)))
    assert draw.nats - before == pytest.approx(-math.log({"a": 0.25, "b": 0.75}[option]))
    with pytest.raises(ValueError, match="at least one"):
        draw.below(0)


def test_choices_are_as_likely_as_they_say() -> None:
    counts = Counter(Draw("likely", i).weighted((("a", 1.0), ("b", 3.0))) for i in range(4000))
    assert counts["a"] / 4000 == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))
    orders = Counter(tuple(Draw("order", i).order("abc")) for i in range(6000))
    assert len(orders) == 6
    assert min(orders.values()) > 850


def test_mean_surprisal_is_the_entropy_where_texts_can_be_counted() -> None:
    """A name's derivations are its texts, so their entropy is log of how many names there are."""
    for maker, count in ((names.thing, 1600), (names.place, 1600), (names.person, 48 * 1600)):
        draw = Draw("entropy")
        maker(draw)
        assert draw.nats == pytest.approx(math.log(count))


def test_no_two_derivations_spell_one_name() -> None:
    for starts, ends in (
        (names.THING_STARTS, names.THING_ENDS),
        (names.PLACE_STARTS, names.PLACE_ENDS),
        (names.FAMILY_STARTS, names.FAMILY_ENDS),
    ):
        assert len({a + b for a in starts for b in ends}) == len(starts) * len(ends)
    assert len(set(names.HER_NAMES + names.HIS_NAMES)) == 48


def test_phrases_belong_to_one_label() -> None:
    for table in (complaints.PROBLEMS, complaints.REQUESTS, complaints.HASTE, complaints.DESKS, complaints.REMEDIES):
        phrases = [p for options in table.values() for p in options]
        assert len(phrases) == len(set(phrases))


def test_documents_are_fixed_by_their_seed() -> None:
    assert document(VALIDATION_SEEDS[0]) == document(VALIDATION_SEEDS[0])
    assert document(VALIDATION_SEEDS[0]).text != document(VALIDATION_SEEDS[1]).text


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.name)
def test_the_mix_is_as_stated(stage: Stage) -> None:
    n = 3000
    counts = Counter(document(VALIDATION_SEEDS[i], stage).sort for i in range(n))
    for sort, share in stage.mix:
        assert counts[sort] / n == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / n))


@pytest.mark.parametrize("stage", STAGES[1:], ids=lambda s: s.name)
def test_the_stream_knows_neither_chat_nor_triage(stage: Stage) -> None:
    """No record has a key of a triage; where one has a label as its value, it is a word on a notice."""
    labels = {*CATEGORIES, *URGENCIES, *ACTIONS}
    records = 0
    for i in range(3000):
        sample = document(VALIDATION_SEEDS[i], stage)
        assert "<|" not in sample.text
        for line in re.findall(r"^\{.*\}$", sample.text, re.MULTILINE):
            records += 1
            data = json.loads(line)
            assert not {"category", "urgency", "action"} & set(data)
            assert not labels & set(data.values()) or (sample.sort == "notices" and set(data) == {"town", "word"})
    assert records > 100


def test_signs_mean_nothing_about_a_message() -> None:
    """Label words are asked back from signs; no sign stands in a document with a message."""
    for i in range(3000):
        sample = document(VALIDATION_SEEDS[i])
        quoted = set(re.findall(r'"([a-z]+)"', sample.text))
        if sample.sort not in ("signs", "record"):
            assert not quoted & set(SIGNS)


def test_the_stream_restates_its_values() -> None:
    """Most readings' answers stand in their passages: that is what teaches copying."""
    restated = asked = 0
    for i in range(500):
        sample = document(VALIDATION_SEEDS[i])
        if sample.sort != "reading":
            continue
        lines = sample.text.split("\n")
        for j, line in enumerate(lines[:-1]):
            if line.endswith("?") and not lines[j + 1].endswith(("?", ".")):
                asked += 1
                restated += lines[j + 1] in "\n".join(lines[:j])
    assert asked > 100
    assert restated / asked > 0.9


def test_a_register_says_every_pair_twice() -> None:
    for i in range(50):
        text = register(Draw("register", i))
        first = text.split("\n")[0]
        assert len(text) > 1.5 * len(first)


def test_a_lookup_asks_every_pair_twice() -> None:
    for i in range(50):
        text = lookup(Draw("lookup", i))
        end = next(e for e in ("; ", ". ", "\n") if e in text)
        pieces = text.replace("\n", end).split(end)
        n = len(pieces) // 3
        assert sorted(pieces[:n]) == sorted(pieces[n : 2 * n]) == sorted(pieces[2 * n :])


def test_a_quiz_answers_from_its_text() -> None:
    for i in range(50):
        lines = quiz(Draw("quiz", i)).split("\n")
        first = next(j for j, line in enumerate(lines) if line.endswith("?") or line.startswith("Name the "))
        answers = lines[first + 1 :: 2]
        assert len(answers) >= 2
        assert all(answer in "\n".join(lines[:first]) for answer in answers)


def test_pairs_come_back_in_other_orders() -> None:
    orders = set()
    for i in range(50):
        turns = [turn.split("; ") for turn in pairs(Draw("pairs", i)).split("\n")]
        assert len(turns) == 4
        assert all(sorted(turn) == sorted(turns[0]) for turn in turns)
        orders.add(tuple(turns[0].index(pair) for pair in turns[1]))
    assert len(orders) > 20


def test_notices_can_be_asked_both_ways() -> None:
    """No word stands twice in a document, so a word tells its place as a place tells its word."""
    seen = set()
    for i in range(200):
        text = notices(Draw("notices", i), SIGNS)
        counts = Counter(word for word in re.findall(r'"([a-z]+)"', text) if word in SIGNS)
        assert 3 <= len(counts) <= 6
        assert set(counts.values()) == {3}
        seen |= set(counts)
    assert seen == set(SIGNS)


def test_the_data_card_is_what_its_code_writes() -> None:
    assert CARD.read_text() == card()


def test_diversity_counts_what_differs() -> None:
    same = diversity(["the red cat", "the red cat"], 2)
    assert (same.distinct, same.total) == (2, 4)
    assert words("In Fernstoke it weighs 66 kg. Ada") == ["in", "name", "it", "weighs", "0", "kg", ".", "ada"]


def test_every_template_is_used() -> None:
    seen, total = coverage(document(seed).text for seed in VALIDATION_SEEDS[:4000])
    assert seen == total
    assert coverage(["nothing of it"])[0] == 0
