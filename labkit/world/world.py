"""A world: everything that is so in one company or one port, drawn from a seed, and what people write and ask about
it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from zlib import crc32

from . import complaints, schema
from .dialogue import Message, Preference, conversation, preference
from .domains import domain as find_domain
from .draw import Draw
from .questions import KINDS, Question, questions
from .render import Fact, as_list, as_table, prose
from .schema import MONTHS, Attribute, Kind
from .triage import Triage

MISSING = 0.12
CHANGED = 0.10


@dataclass(frozen=True)
class Passage:
    """A retrieval-sized text about one entity; `fact_ids` are the facts that it states."""

    id: str
    text: str
    fact_ids: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A page of the handbook or an overview; `fact_ids` are the facts that it states."""

    id: str
    title: str
    text: str
    fact_ids: tuple[str, ...]


@dataclass(frozen=True)
class Ticket:
    """A customer's message and its triage."""

    id: str
    text: str
    triage: Triage


class World:
    """A world is fixed by its seed and its domain ("company" or "port"): the same two give the same bytes on any
    machine."""

    def __init__(self, seed: int, domain: str = "company") -> None:
        self.seed = seed
        self.domain = find_domain(domain)

    def __repr__(self) -> str:
        return f"World(seed={self.seed}, domain={self.domain.key!r})"

    def _draw(self, *key: int | str) -> Draw:
        return Draw("world", self.seed, self.domain.key, *key)

    @cached_property
    def entities(self) -> dict[str, tuple[str, ...]]:
        """The names of all entities by kind; no two in the world are alike."""
        taken: set[str] = set()
        found = {}
        for kind in self.domain.kinds:
            draw = self._draw("names", kind.key)
            names: list[str] = []
            while len(names) < kind.count:
                name = kind.name(draw)
                if name not in taken:
                    taken.add(name)
                    names.append(name)
            found[kind.key] = tuple(names)
        return found

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        """Everything that is so; about one fact in eight that could be is left out, so that it can be asked in vain."""
        found: list[Fact] = []
        for kind in self.domain.kinds:
            for entity in self.entities[kind.key]:
                draw = self._draw("facts", kind.key, entity)
                told = [a for a in kind.attributes if not draw.chance(MISSING)] or list(kind.attributes[:1])
                for attribute in told:
                    value = self._value(draw, attribute)
                    since = before = None
                    if draw.chance(CHANGED):
                        since = f"{draw.pick(MONTHS)} {draw.between(2011, 2048)}"
                        before = value
                        while before == value:
                            before = self._value(draw, attribute)
                    found.append(Fact(f"f{len(found):03d}", kind.key, entity, attribute.key, value, since, before))
        return tuple(found)

    def _value(self, draw: Draw, attribute: Attribute) -> str:
        """A value: a name from the world's own people and places where the attribute asks for one, else a fresh
        draw."""
        if attribute.value.pool:
            return draw.pick(self.entities[self.domain.pool(attribute.value.pool)])
        return attribute.value.draw(draw)

    def _groups(self) -> Iterator[tuple[Kind, list[Fact]]]:
        """The facts of one entity after the other."""
        for kind in self.domain.kinds:
            for entity in self.entities[kind.key]:
                yield kind, [f for f in self.facts if f.kind == kind.key and f.entity == entity]

    @cached_property
    def _passages(self) -> tuple[Passage, ...]:
        found: list[Passage] = []
        for kind, facts in self._groups():
            draw = self._draw("passage", kind.key, facts[0].entity)
            shuffled = draw.order(facts)
            halves = -(-len(shuffled) // 4)
            for i in range(halves):
                part = shuffled[i::halves]
                text = prose(draw, kind, part)
                found.append(Passage(f"p{len(found):03d}", text, tuple(f.id for f in part)))
        return tuple(found)

    def passages(self) -> list[Passage]:
        """Texts of one to four facts about one entity; together they state every fact exactly once."""
        return list(self._passages)

    def documents(self) -> list[Document]:
        """A handbook page an entity (prose, then a list that says it again) and an overview table a kind."""
        found: list[Document] = []
        for kind, facts in self._groups():
            name = facts[0].entity
            draw = self._draw("document", kind.key, name)
            shuffled = draw.order(facts)
            half = -(-len(shuffled) // 2)
            parts = [prose(draw, kind, part) for part in (shuffled[:half], shuffled[half:]) if part]
            now = as_list(kind, draw.order(facts))
            title = f"Handbook: {schema.by_name(kind, name).o}"
            text = "\n\n".join([*parts, f"At a glance\n\n{now}"])
            found.append(Document(f"d{len(found):03d}", title, text, tuple(f.id for f in facts)))
        for kind in self.domain.kinds:
            found += self._overviews(kind, len(found))
        return found

    def _overviews(self, kind: Kind, count: int) -> list[Document]:
        """The table of a kind: the two attributes that most of its entities have."""
        told = {
            e: {f.attribute: f for f in self.facts if f.kind == kind.key and f.entity == e}
            for e in self.entities[kind.key]
        }
        keys = sorted((a.key for a in kind.attributes), key=lambda k: -sum(k in facts for facts in told.values()))[:2]
        rows = [[facts[k] for k in keys] for facts in told.values() if all(k in facts for k in keys)]
        if not rows:
            return []
        ids = tuple(f.id for row in rows for f in row)
        return [Document(f"d{count:03d}", f"Overview: {kind.plural}", as_table(kind, rows), ids)]

    def questions(self, kind: str | None = None) -> list[Question]:
        """All questions, or those of one kind; ValueError names the kinds there are."""
        if kind is not None and kind not in KINDS:
            raise ValueError(f"unknown kind of question {kind!r}; choose one of {', '.join(KINDS)}")
        return [q for q in self._questions if kind in (None, q.kind)]

    @cached_property
    def _questions(self) -> tuple[Question, ...]:
        where = {fact: p.id for p in self._passages for fact in p.fact_ids}
        return tuple(questions(self._draw("questions"), self.domain, self.entities, self.facts, where))

    def tickets(self, n: int, *, part: str = "train") -> list[Ticket]:
        """The first n tickets of the part "train" or "test"; no message of one part occurs in the other."""
        if part not in ("train", "test"):
            raise ValueError(f"unknown part {part!r}; choose train or test")
        return [ticket for ticket, _ in zip(self._tickets(part), range(n), strict=False)]

    def _tickets(self, part: str) -> Iterator[Ticket]:
        products = self.entities[self.domain.kinds[0].key]
        i = 0
        while True:
            letter = complaints.complaint(self._draw("ticket", i), products)
            # The text itself decides its part, so that no text can be in both.
            if (crc32(letter.text.encode()) % 2 == 0) == (part == "train"):
                triage = Triage(letter.product, letter.category, letter.urgency, letter.action)
                yield Ticket(f"t{i:05d}", letter.text, triage)
            i += 1

    def preferences(self, n: int) -> list[Preference]:
        """The first n pairs of a grounded, concise reply and a worse one to the same prompt."""
        return [
            preference(self._draw("preference", i), self._answerable(), self._values(), self._texts()) for i in range(n)
        ]

    def conversations(self, n: int) -> list[list[Message]]:
        """The first n conversations in chat format: a few questions about one passage, and their answers."""
        return [conversation(self._draw("conversation", i), self._answerable(), self._texts()) for i in range(n)]

    def _answerable(self) -> list[Question]:
        return [q for q in self._questions if q.kind in ("single", "paraphrase")]

    def _values(self) -> dict[str, str]:
        """Another value of the same attribute for each fact: what a careless reply would say."""
        by_attribute: dict[tuple[str, str], list[str]] = {}
        for f in self.facts:
            by_attribute.setdefault((f.kind, f.attribute), []).append(f.value)
        wrong = {}
        for f in self.facts:
            others = [v for v in by_attribute[f.kind, f.attribute] if v != f.value]
            draw = self._draw("wrong", f.id)
            wrong[f.id] = draw.pick(others) if others else self._other(draw, f)
        return wrong

    def _other(self, draw: Draw, fact: Fact) -> str:
        attribute = self.domain.kind(fact.kind).attribute(fact.attribute)
        while (value := attribute.value.draw(draw)) == fact.value:
            pass
        return value

    def _texts(self) -> dict[str, str]:
        return {p.id: p.text for p in self._passages}
