import hashlib
import json
import math
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.world import (
    ACTIONS,
    CATEGORIES,
    LESSON_SEEDS,
    NOT_STATED,
    TRAIN_SEEDS,
    URGENCIES,
    VALIDATION_SEEDS,
    Triage,
    World,
)
from labkit.world.questions import KINDS

DOMAINS = ("company", "port")


@pytest.fixture(scope="module", params=DOMAINS)
def world(request: pytest.FixtureRequest) -> World:
    return World(LESSON_SEEDS[0], request.param)


def digest(world: World) -> str:
    parts = [
        world.facts,
        world.passages(),
        world.documents(),
        world.questions(),
        world.tickets(20),
        world.tickets(20, part="test"),
        world.preferences(20),
        world.conversations(20),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def test_seeds_never_overlap() -> None:
    ranges = sorted((LESSON_SEEDS, VALIDATION_SEEDS, TRAIN_SEEDS), key=lambda r: r.start)
    assert all(a.stop <= b.start for a, b in pairwise(ranges))
    assert all(r.step == 1 and len(r) > 0 for r in ranges)


@pytest.mark.parametrize("domain", DOMAINS)
def test_same_seed_same_bytes_in_another_process_with_another_hash_seed(domain: str) -> None:
    code = f"""
import hashlib
from labkit.world import World
w = World(7, {domain!r})
parts = [w.facts, w.passages(), w.documents(), w.questions(), w.tickets(20), w.tickets(20, part="test"),
         w.preferences(20), w.conversations(20)]
print(hashlib.sha256(repr(parts).encode()).hexdigest())
"""
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": h}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for h in ("1", "2")
    }
    assert seen == {digest(World(7, domain))}


def test_other_seeds_have_other_facts_and_names() -> None:
    first, second = World(1), World(2)
    names = [{n for ns in w.entities.values() for n in ns} for w in (first, second)]
    assert len(names[0] & names[1]) <= 0.1 * len(names[0])
    assert digest(first) != digest(second)


def test_domains_share_no_entity_kind() -> None:
    kinds = [{k.key for k in World(1, d).domain.kinds} for d in DOMAINS]
    assert not kinds[0] & kinds[1]


def test_unknown_domain_says_which_there_are() -> None:
    with pytest.raises(ValueError, match="company"):
        World(1, "hospital")


def test_names_are_unique(world: World) -> None:
    names = [n for ns in world.entities.values() for n in ns]
    assert len(names) == len(set(names))


def test_every_fact_is_stated_in_exactly_one_passage(world: World) -> None:
    where = Counter(f for p in world.passages() for f in p.fact_ids)
    assert set(where) == {f.id for f in world.facts}
    assert set(where.values()) == {1}
    texts = {f: p.text for p in world.passages() for f in p.fact_ids}
    for fact in world.facts:
        assert fact.value in texts[fact.id]
        assert fact.before is None or fact.before in texts[fact.id]


def test_the_first_sentence_of_a_passage_names_its_entity(world: World) -> None:
    entity = {f.id: f.entity for f in world.facts}
    for p in world.passages():
        assert entity[p.fact_ids[0]] in p.text.split(". ")[0]


def test_documents_state_their_facts(world: World) -> None:
    facts = {f.id: f for f in world.facts}
    covered = set()
    for d in world.documents():
        for f in d.fact_ids:
            assert facts[f].value in d.text
            assert facts[f].entity in d.text
            covered.add(f)
    assert covered == set(facts)


def test_there_are_questions_of_every_kind(world: World) -> None:
    assert {q.kind for q in world.questions()} == set(KINDS)
    assert len({q.id for q in world.questions()}) == len(world.questions())
    for kind in KINDS:
        assert len(world.questions(kind)) >= 10
    with pytest.raises(ValueError, match="multi_hop"):
        world.questions("trivia")


def test_gold_passages_hold_the_answer(world: World) -> None:
    texts = {p.id: p.text for p in world.passages()}
    for q in world.questions():
        if q.kind == "unanswerable":
            assert q.gold == ()
            assert q.answer == NOT_STATED
        else:
            assert q.gold
            assert any(q.answer in texts[g] for g in q.gold), q


def test_the_answer_follows_from_the_facts(world: World) -> None:
    facts = {f.id: f for f in world.facts}
    for q in world.questions():
        known = [facts[f] for f in q.fact_ids]
        if q.kind in ("single", "paraphrase"):
            assert q.answer == known[0].value
            assert known[0].entity in q.text
        elif q.kind == "multi_hop":
            first, second = known
            assert first.value == second.entity
            assert q.answer == second.value
            assert first.entity in q.text
            assert second.entity not in q.text
        elif q.kind == "comparison":
            numbers = {f.entity: int(f.value.split()[0]) for f in known}
            assert q.answer == max(numbers, key=lambda e: numbers[e])
            assert len(set(numbers.values())) == 2
        elif q.kind == "changed":
            assert q.answer in (known[0].value, known[0].before)
            assert known[0].value != known[0].before


def test_unanswerable_questions_ask_what_no_fact_says(world: World) -> None:
    told = {(f.entity, f.attribute) for f in world.facts}
    asked = world.questions("unanswerable")
    possible = sum(len(k.attributes) * k.count for k in world.domain.kinds)
    assert len(asked) == possible - len(told)


def test_ticket_parts_are_disjoint_and_extend() -> None:
    world = World(3)
    train, test = world.tickets(600), world.tickets(300, part="test")
    assert not {t.text for t in train} & {t.text for t in test}
    assert world.tickets(50) == train[:50]
    with pytest.raises(ValueError, match="train or test"):
        world.tickets(1, part="dev")


def test_tickets_name_their_product_and_cover_every_label() -> None:
    tickets = World(4).tickets(800)
    products = set(World(4).entities["product"])
    for t in tickets:
        if t.triage.product is None:
            assert not any(p in t.text for p in products)
        else:
            assert t.triage.product in products
            assert t.triage.product in t.text
    assert {t.triage.category for t in tickets} == set(CATEGORIES)
    assert {t.triage.urgency for t in tickets} == set(URGENCIES)
    assert {t.triage.action for t in tickets} == set(ACTIONS)
    assert 0.05 < sum(t.triage.product is None for t in tickets) / len(tickets) < 0.15


def test_the_commonest_triage_is_rare() -> None:
    tickets = World(5).tickets(1000)
    most = Counter(t.triage.to_json() for t in tickets).most_common(1)[0][1]
    assert most / len(tickets) < 0.05


triages = st.builds(
    Triage,
    product=st.none() | st.text(min_size=1),
    category=st.sampled_from(CATEGORIES),
    urgency=st.sampled_from(URGENCIES),
    action=st.sampled_from(ACTIONS),
)


@given(triages)
def test_triage_survives_its_json(triage: Triage) -> None:
    text = triage.to_json()
    assert "\n" not in text
    assert list(json.loads(text)) == ["product", "category", "urgency", "action"]
    assert Triage.parse(text) == triage


GOOD = Triage("Velmora", "defect", "high", "repair").to_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        (GOOD[:-1], "not JSON"),
        ("[]", "JSON object"),
        ('{"product": "Velmora"}', "missing"),
        (GOOD[:-1] + ', "mood": "sour"}', "unexpected"),
        (GOOD.replace("high", "huge"), "urgency is 'huge'"),
        (GOOD.replace('"defect"', "3"), "category is 3"),
        (GOOD.replace('"Velmora"', "7"), "product is 7"),
        (GOOD.replace('"Velmora"', '""'), "null"),
        (GOOD.replace('"defect"', '["defect"]'), "category is"),
    ],
)
def test_parse_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Triage.parse(text)


def test_preferences_contrast_a_grounded_reply_with_a_flawed_one(world: World) -> None:
    pairs = world.preferences(200)
    assert {p.flaw for p in pairs} == {"ungrounded", "rambling", "rude"}
    for p in pairs:
        assert p.chosen != p.rejected
        value = p.chosen.removesuffix(".")
        assert value.lower() in p.prompt.lower()
        if p.flaw != "ungrounded":
            assert p.chosen in p.rejected
            assert len(p.rejected) > len(p.chosen)


def test_conversations_alternate_and_are_answered_by_their_passage(world: World) -> None:
    for messages in world.conversations(100):
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        for m in messages[1::2]:
            assert m["content"].removesuffix(".").lower() in messages[0]["content"].lower()


def test_the_world_needs_no_torch() -> None:
    code = "import sys, labkit.world as w; w.World(1).questions(); w.World(1).tickets(3); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


def test_a_ticket_is_as_long_as_a_short_message() -> None:
    lengths = [len(t.text) for t in World(6).tickets(200)]
    assert min(lengths) > 40
    assert max(lengths) < 400
    assert math.isfinite(sum(lengths))
