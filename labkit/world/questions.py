"""Questions about a world, with their answers and the passages that hold them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .domains import Domain
from .draw import Draw
from .render import Fact, ask
from .schema import COMPARISONS, GENERIC_QUESTIONS, NOT_STATED, QUESTIONS_NOW, QUESTIONS_THEN, by_name, fill
from .stream import hop

KINDS = ("single", "paraphrase", "multi_hop", "comparison", "unanswerable", "changed")


@dataclass(frozen=True)
class Question:
    """A question, its exact answer, the ids of the passages needed to answer it (none if unanswerable), and its
    facts."""

    id: str
    text: str
    answer: str
    gold: tuple[str, ...]
    kind: str
    fact_ids: tuple[str, ...]


def questions(
    draw: Draw,
    domain: Domain,
    entities: Mapping[str, Sequence[str]],
    facts: Sequence[Fact],
    where: Mapping[str, str],
) -> Iterator[Question]:
    """Every question of every kind; `where` maps a fact's id to the passage that states it."""
    made = (
        *_direct(draw, domain, facts),
        *_multi_hop(draw, domain, facts),
        *_comparisons(draw, domain, facts),
        *_unanswerable(draw, domain, entities, facts),
        *_changed(draw, domain, facts),
    )
    for i, (kind, text, answer, needed) in enumerate(made):
        ids = tuple(f.id for f in needed)
        yield Question(f"q{i:04d}", text, answer, tuple(dict.fromkeys(where[f] for f in ids)), kind, ids)


Made = tuple[str, str, str, tuple[Fact, ...]]


def _direct(draw: Draw, domain: Domain, facts: Sequence[Fact]) -> Iterator[Made]:
    """Each unchanged fact twice: by its label or its first idiom, and in another idiom."""
    for f in facts:
        if f.since:
            continue
        kind = domain.kind(f.kind)
        attribute = kind.attribute(f.attribute)
        reference = by_name(kind, f.entity)
        plain = (*GENERIC_QUESTIONS, attribute.questions[0])
        yield "single", fill(draw.pick(plain), attribute, reference), f.value, (f,)
        yield "paraphrase", fill(draw.pick(attribute.questions[1:]), attribute, reference), f.value, (f,)


def _multi_hop(draw: Draw, domain: Domain, facts: Sequence[Fact]) -> Iterator[Made]:
    """What a link leads to: a fact of the entity that is the value of another fact."""
    for source, key, target in domain.links:
        kind, other = domain.kind(source), domain.kind(target)
        link = kind.attribute(key)
        for f in facts:
            if (f.kind, f.attribute) != (source, key) or f.since:
                continue
            for g in facts:
                if (g.kind, g.entity) == (target, f.value) and not g.since:
                    text = ask(draw, other.attribute(g.attribute), hop(link, by_name(kind, f.entity)), own=True)
                    yield "multi_hop", text, g.value, (f, g)


def _comparisons(draw: Draw, domain: Domain, facts: Sequence[Fact]) -> Iterator[Made]:
    """Each number against the next entity's number of the same attribute, where they differ."""
    for kind in domain.kinds:
        for attribute in kind.attributes:
            if not attribute.more:
                continue
            same = [f for f in facts if (f.kind, f.attribute) == (kind.key, attribute.key) and not f.since]
            for f, g in pairwise(same):
                numbers = [int(x.value.split()[0]) for x in (f, g)]
                if numbers[0] == numbers[1]:
                    continue
                a, b = draw.order((f, g))
                text = draw.pick(COMPARISONS).format(
                    more=attribute.more, a=by_name(kind, a.entity).o, b=by_name(kind, b.entity).o
                )
                yield "comparison", text, (f if numbers[0] > numbers[1] else g).entity, (f, g)


def _unanswerable(
    draw: Draw, domain: Domain, entities: Mapping[str, Sequence[str]], facts: Sequence[Fact]
) -> Iterator[Made]:
    """What no fact says, of entities that exist."""
    told = {(f.kind, f.entity, f.attribute) for f in facts}
    for kind in domain.kinds:
        for entity in entities[kind.key]:
            for attribute in kind.attributes:
                if (kind.key, entity, attribute.key) not in told:
                    yield "unanswerable", ask(draw, attribute, by_name(kind, entity)), NOT_STATED, ()


def _changed(draw: Draw, domain: Domain, facts: Sequence[Fact]) -> Iterator[Made]:
    """What is so now and what was so before, of the facts that changed."""
    for f in facts:
        if not (f.since and f.before):
            continue
        kind = domain.kind(f.kind)
        attribute, reference = kind.attribute(f.attribute), by_name(kind, f.entity)
        for templates, answer in ((QUESTIONS_NOW, f.value), (QUESTIONS_THEN, f.before)):
            yield "changed", fill(draw.pick(templates), attribute, reference, d=f.since), answer, (f,)
