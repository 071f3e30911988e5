"""From facts to English: sentences, passages in four layouts, questions and replies."""

from collections.abc import Sequence
from dataclasses import dataclass

from .draw import Draw
from .schema import (
    CHANGES,
    GENERIC_QUESTIONS,
    Attribute,
    Kind,
    Reference,
    by_name,
    by_pronoun,
    fill,
    statement_options,
)


@dataclass(frozen=True)
class Fact:
    """One thing that is so: the `attribute` of the `entity` (of that `kind`) is `value`, since `since` and earlier
    `before`."""

    id: str
    kind: str
    entity: str
    attribute: str
    value: str
    since: str | None = None
    before: str | None = None


def sentence(draw: Draw, kind: Kind, fact: Fact, *, named: bool = True) -> str:
    """The fact in one sentence, by the entity's name or by a pronoun."""
    attribute = kind.attribute(fact.attribute)
    if fact.since and fact.before:
        reference = by_name(kind, fact.entity)
        return fill(draw.pick(CHANGES), attribute, reference, fact.value, d=fact.since, w=fact.before)
    if named:
        return fill(
            draw.pick(statement_options(attribute, named=True)),
            attribute,
            by_name(kind, fact.entity),
            fact.value,
        )
    options = [s for s in attribute.statements if s.startswith(("{s}", "{p}"))]
    return fill(draw.pick(options), attribute, by_pronoun(kind, fact.entity), fact.value)


def prose(draw: Draw, kind: Kind, facts: Sequence[Fact], *, pronouns: float = 0.5) -> str:
    """The facts of one entity as running text; the first sentence names it, later ones use a pronoun with that
    chance."""
    parts = []
    for i, fact in enumerate(facts):
        named = i == 0 or bool(fact.since) or not draw.chance(pronouns)
        parts.append(sentence(draw, kind, fact, named=named))
    return " ".join(parts)


def as_list(kind: Kind, facts: Sequence[Fact]) -> str:
    """The facts of one entity as a list under its name."""
    head = by_name(kind, facts[0].entity).s
    return "\n".join([f"{head}:", *(f"- {kind.attribute(f.attribute).label}: {f.value}" for f in facts)])


def as_table(kind: Kind, rows: Sequence[Sequence[Fact]]) -> str:
    """Several entities' facts as a table: one row an entity, one column an attribute."""
    head = " | ".join(["name", *(kind.attribute(f.attribute).label for f in rows[0])])
    lines = [" | ".join([row[0].entity, *(f.value for f in row)]) for row in rows]
    return "\n".join([f"| {line} |" for line in [head, *lines]])


def as_entry(kind: Kind, facts: Sequence[Fact]) -> str:
    """The facts of one entity in a terse entry that quotes its name."""
    body = "; ".join(f"{kind.attribute(f.attribute).label} {f.value}" for f in facts)
    return f'Entry "{facts[0].entity}": {body}.'


def passage(draw: Draw, kind: Kind, facts: Sequence[Fact]) -> str:
    """The facts of one entity in a drawn layout: prose, list or entry."""
    changed = any(f.since for f in facts)
    layout = "prose" if changed else draw.weighted((("prose", 0.7), ("list", 0.15), ("entry", 0.15)))
    if layout == "list":
        return as_list(kind, facts)
    if layout == "entry":
        return as_entry(kind, facts)
    return prose(draw, kind, facts)


def ask(draw: Draw, attribute: Attribute, reference: Reference, *, own: bool = False) -> str:
    """A question for the attribute; with `own`, only in its own idioms, for references that do not take 's."""
    options = attribute.questions + GENERIC_QUESTIONS
    if own:
        options = tuple(q for q in attribute.questions if "{o}" in q)
    return fill(draw.pick(options), attribute, reference)
