"""The pretraining stream: short documents that state facts and then state them again, each with its surprisal.

Eleven sorts of documents: `drill` (a list and the same list again), `pairs` (names and what goes with them, four
times), `register` (rolls read twice, pairs asked back in another order), `lookup` (pairs in many layouts, asked back
twice), `notices` (words and where they stand, asked back both ways), `quiz` (the same facts of several entities, every
one of them asked for), `reading` (passages, then questions and answers about them in prose), `restate` (the same facts
in another layout), `record` (facts in prose and as one line of JSON), `signs` (words on signs, asked back) and
`complaint` (a message and what the clerks did about it). Names and values are new in every document, so nothing can be
learnt by heart: a model gets better only by learning the language and by reading its context. No chat format and no
triage is in it: no record has a triage's keys, and the words of its labels stand on signs and notices only.

A document's `nats` are the surprisal of its derivation (see `draw.Draw`). In the mean over documents they are an
upper bound of the surprisal of the text, tight up to rare ambiguities (two names that coincide, two slips that spell
alike). Documents are independent, so the mean of `nats` over the mean number of tokens is an upper bound of the
cross-entropy of an ideal model on whole documents. A model of the stream can be below it only by as much as the bound
is loose.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from . import complaints, names
from .domains import DOMAINS, Domain
from .draw import Draw
from .recall import VALUES, lookup, notices, pairs
from .render import Fact, as_list, ask, passage, prose, sentence
from .schema import (
    COMPARISONS,
    MONTHS,
    NOT_STATED,
    QUESTIONS_NOW,
    QUESTIONS_THEN,
    Attribute,
    Kind,
    Reference,
    by_name,
    capital,
    fill,
)


@dataclass(frozen=True)
class Stage:
    """A mix of documents: weights of the sorts and the most passages in a reading."""

    name: str
    mix: tuple[tuple[str, float], ...]
    most_passages: int


STAGES = (
    Stage("drill", (("pairs", 0.7), ("drill", 0.3)), 1),
    Stage(
        "lookup",
        (
            ("lookup", 0.43),
            ("notices", 0.10),
            ("quiz", 0.25),
            ("reading", 0.10),
            ("restate", 0.05),
            ("complaint", 0.07),
        ),
        2,
    ),
    Stage(
        "quiz",
        (
            ("lookup", 0.09),
            ("notices", 0.06),
            ("quiz", 0.50),
            ("reading", 0.20),
            ("restate", 0.02),
            ("record", 0.03),
            ("complaint", 0.10),
        ),
        4,
    ),
    Stage(
        "full",
        (
            ("register", 0.04),
            ("reading", 0.55),
            ("restate", 0.08),
            ("record", 0.07),
            ("signs", 0.03),
            ("complaint", 0.23),
        ),
        4,
    ),
)


# The words that a triage will need, among others; here they mean nothing, but their tokens get trained.
SIGNS = (
    "product", "category", "urgency", "action", "null", "billing", "delivery", "defect", "account", "setup",
    "low", "normal", "high", "refund", "replace", "repair", "explain", "call", "open", "shut", "left",
    "right", "stop", "go", "push", "pull", "hot", "cold", "slow", "fast", "up", "down", "wet", "dry",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A document of the stream, its sort, and the surprisal of its derivation in nats."""

    text: str
    sort: str
    nats: float


@dataclass(frozen=True)
class Question:
    """A question that a reading can answer, with the bare answer and, where there is one, the sentence that says it."""

    text: str
    answer: str
    preposition: str = ""
    restate: Callable[[], str] | None = None


# What is not asked must not be drawn, or its surprisal would loosen the bound: so words are chosen when asking.
Asking = Callable[[], Question]
Groups = list[tuple[Kind, list[Fact]]]


def document(seed: int, stage: Stage = STAGES[-1]) -> Sample:
    """The document that a seed stands for."""
    draw = Draw("stream", stage.name, seed)
    sort = draw.weighted(stage.mix)
    text = reading(draw, stage.most_passages) if sort == "reading" else MAKERS[sort](draw)
    return Sample(text, sort, draw.nats)


def pick_domain(draw: Draw) -> Domain:
    """Two documents in three are about the company."""
    return DOMAINS[draw.weighted((("company", 2.0), ("port", 1.0)))]


def drill(draw: Draw) -> str:
    """A list of names of one sort and the same list again, starting elsewhere."""
    maker = draw.pick((names.thing, names.place, names.person, lambda d: str(d.between(10, 99))))
    roll = [maker(draw) for _ in range(draw.between(2, 8))]
    turn = draw.below(len(roll))
    return ", ".join(roll) + ", " + ", ".join(roll[turn:] + roll[:turn])


def register(draw: Draw) -> str:
    """A roll of names read twice, or pairs asked back in another order."""
    maker = draw.pick((names.thing, names.place, names.person))
    if draw.chance(0.4):
        roll = [maker(draw) for _ in range(draw.between(3, 8))]
        first, again = draw.pick(
            (("On the list: ", "Once more: "), ("The roll: ", "Read again: "), ("Today: ", "I repeat: "))
        )
        copies = [f"{first}{', '.join(roll)}.", f"{again}{', '.join(roll)}."]
        if draw.chance(0.5):
            copies.append("\n".join(f'"{name}"' for name in roll))
        return "\n".join(copies)
    value = draw.pick(VALUES)
    pairs = [(maker(draw), value(draw)) for _ in range(draw.between(2, 6))]
    joint = draw.pick((": ", " goes with ", " has ", " - "))
    end = draw.pick(("\n", "; ", ". "))
    lines = [
        end.join(f"{a}{joint}{b}" for a, b in pairs),
        end.join(f"{a}{joint}{b}" for a, b in draw.order(pairs)),
    ]
    return "\n".join(lines)


def quiz(draw: Draw) -> str:
    """The same one to three facts of two to five entities as prose or lists, and every one of them asked for, with a
    bare answer."""
    kind = draw.pick(pick_domain(draw).kinds)
    attributes = draw.order(kind.attributes, draw.between(1, 3))
    entities = [kind.name(draw) for _ in range(draw.between(2, 5))]
    groups = [[new_fact(draw, kind, e, a, may_change=False) for a in draw.order(attributes)] for e in entities]
    way = draw.weighted((("list", 0.25), ("named", 0.35), ("prose", 0.40)))
    if way == "list":
        texts = [as_list(kind, facts) for facts in groups]
    elif way == "named":
        texts = [" ".join(sentence(draw, kind, fact) for fact in facts) for facts in groups]
    else:
        texts = [prose(draw, kind, facts) for facts in groups]
    asked = [question(draw, kind, fact) for fact in draw.order([fact for facts in groups for fact in facts])]
    return "\n".join([*texts, *(f"{q.text}\n{q.answer}" for q in asked)])


def new_fact(draw: Draw, kind: Kind, entity: str, attribute: Attribute, *, may_change: bool = True) -> Fact:
    """A fact with a fresh value; one in twelve has changed."""
    value = attribute.value.draw(draw)
    if may_change and draw.chance(1 / 12):
        since = f"{draw.pick(MONTHS)} {draw.between(2011, 2048)}"
        return Fact("", kind.key, entity, attribute.key, value, since, attribute.value.draw(draw))
    return Fact("", kind.key, entity, attribute.key, value)


def restate(draw: Draw) -> str:
    """Facts of one entity as text, then as a list or text again."""
    kind = draw.pick(pick_domain(draw).kinds)
    name = kind.name(draw)
    attributes = draw.order(kind.attributes, draw.between(2, 4))
    facts = [new_fact(draw, kind, name, a, may_change=False) for a in attributes]
    shapes = draw.pick((("prose", "list"), ("list", "prose"), ("prose", "prose")))
    texts = [as_list(kind, fs) if shape == "list" else prose(draw, kind, fs)
             for shape, fs in zip(shapes, (facts, draw.order(facts)), strict=True)]  # fmt: skip
    return f"{texts[0]}\n{draw.pick(('In other words:', 'Once more:', 'Put differently:'))}\n{texts[1]}"


def record(draw: Draw) -> str:
    """Facts of one entity as prose and as one line of JSON, either first."""
    kind = draw.pick(pick_domain(draw).kinds)
    name = kind.name(draw)
    attributes = draw.order(kind.attributes, draw.between(1, 3))
    facts = [new_fact(draw, kind, name, a, may_change=False) for a in attributes]
    line = json.dumps({kind.key: name} | {f.attribute: f.value for f in draw.order(facts)})
    text = prose(draw, kind, facts)
    return f"{text}\n{line}" if draw.chance(0.7) else f"{line}\n{text}"


def signs(draw: Draw) -> str:
    """Words that stand on signs in towns, and questions about them: everyday words in no role but this one."""
    towns = [names.place(draw) for _ in range(draw.between(2, 4))]
    says = [(town, draw.pick(SIGNS)) for town in towns]
    told = draw.pick(
        ('The sign in {t} says "{w}".', 'In {t} somebody wrote "{w}" on a wall.', "In {t} the sign reads {w}.")
    )
    asked = draw.pick(('What does the sign in {t} say? "{w}".', "Which word is it in {t}?\n{w}"))
    lines = [told.format(t=t, w=w) for t, w in says]
    return "\n".join([*lines, *(asked.format(t=t, w=w) for t, w in draw.order(says))])


def complaint(draw: Draw) -> str:
    """A message from a customer and what the clerks did about it."""
    letter = complaints.complaint(draw, None)
    return f"{letter.text}\n{complaints.handling(draw, letter)}"


def reading(draw: Draw, most_passages: int) -> str:
    """Passages about entities of one kind (or two linked ones), then questions and answers about them."""
    dom = pick_domain(draw)
    if most_passages > 1 and draw.chance(0.15):
        groups, likely, extras = linked(draw, dom)
    else:
        groups, likely, extras = unlinked(draw, dom, draw.between(1, most_passages))
    blocks = []
    for kind, facts in groups:
        heading = f"{facts[0].entity}\n" if draw.chance(0.15) else ""
        blocks.append(heading + passage(draw, kind, facts))
    asked = draw.order(likely, draw.between(min(2, len(likely)), min(6, len(likely))))
    for extra in extras:
        if draw.chance(0.2):
            asked.insert(draw.below(len(asked) + 1), extra)
    return "\n".join(blocks + answers(draw, asked))


def answers(draw: Draw, asked: list[Asking]) -> list[str]:
    """Questions with their answers: bare values on lines of their own, or inline sentences; one way per document."""
    alone = draw.chance(0.45)
    lines = []
    for ask_it in asked:
        q = ask_it()
        if alone:
            lines.append(f"{q.text}\n{q.answer}")
            continue
        ways = [("bare", 0.7)]
        if q.preposition:
            ways.append(("phrase", 0.3))
        if q.restate:
            ways.append(("sentence", 0.15))
        way = draw.weighted(ways)
        if way == "sentence" and q.restate:
            reply = q.restate()
        else:
            reply = f"{q.preposition} {q.answer}." if way == "phrase" else f"{capital(q.answer)}."
        lines.append(f"{q.text} {reply}")
    return lines


def unlinked(draw: Draw, dom: Domain, k: int) -> tuple[Groups, list[Asking], list[Asking]]:
    """k entities of one kind, what can be asked of each fact, and what else can be asked."""
    kind = draw.pick(dom.kinds)
    size = draw.between(2, 4) if k < 3 else draw.between(1, 4)
    first = draw.order(kind.attributes, size)
    same = k > 1 and draw.chance(0.6)
    groups: Groups = []
    for i in range(k):
        name = kind.name(draw)
        attributes = first if i == 0 else draw.order(first if same else kind.attributes, size)
        groups.append((kind, [new_fact(draw, kind, name, a) for a in attributes]))
    likely: list[Asking] = [partial(question, draw, kind, fact) for _, facts in groups for fact in facts]
    extras: list[Asking] = []
    if size < len(kind.attributes):
        extras.append(partial(absent, draw, groups))
    if same and any(comparable(kind, groups)):
        extras.append(partial(comparison, draw, kind, groups))
    return groups, likely, extras


def absent(draw: Draw, groups: Groups) -> Question:
    """A question that no passage answers."""
    kind, facts = draw.pick(groups)
    told = {f.attribute for f in facts}
    attribute = draw.pick([a for a in kind.attributes if a.key not in told])
    return Question(ask(draw, attribute, by_name(kind, facts[0].entity)), NOT_STATED)


def comparable(kind: Kind, groups: Groups) -> list[tuple[Fact, Fact]]:
    """The ordered pairs of facts whose numbers can be compared."""
    facts = [f for _, fs in groups for f in fs if kind.attribute(f.attribute).more and not f.since]
    return [(a, b) for a in facts for b in facts if a.attribute == b.attribute and a.value != b.value]


def comparison(draw: Draw, kind: Kind, groups: Groups) -> Question:
    """The question which of two entities has more of a number they both give."""
    first, second = draw.pick(comparable(kind, groups))
    more = kind.attribute(first.attribute).more
    text = draw.pick(COMPARISONS).format(more=more, a=by_name(kind, first.entity).o, b=by_name(kind, second.entity).o)
    larger = max(first, second, key=lambda f: int(f.value.split()[0]))
    return Question(text, larger.entity)


def question(draw: Draw, kind: Kind, fact: Fact) -> Question:
    """A question that the fact answers; of a changed fact, about now or then."""
    attribute = kind.attribute(fact.attribute)
    reference = by_name(kind, fact.entity)
    if fact.since and fact.before:
        now = draw.chance(0.5)
        text = fill(draw.pick(QUESTIONS_NOW if now else QUESTIONS_THEN), attribute, reference, d=fact.since)
        return Question(text, fact.value if now else fact.before)
    text = ask(draw, attribute, reference)
    return Question(text, fact.value, attribute.value.preposition, partial(sentence, draw, kind, fact))


def linked(draw: Draw, dom: Domain) -> tuple[Groups, list[Asking], list[Asking]]:
    """Two entities, the second being a value of the first, and questions that need both."""
    source, key, target = draw.pick(dom.links)
    kind, other = dom.kind(source), dom.kind(target)
    link = kind.attribute(key)
    name = kind.name(draw)
    rest = draw.order([a for a in kind.attributes if a is not link], draw.between(0, 2))
    facts = [new_fact(draw, kind, name, a) for a in rest]
    bridge = Fact("", kind.key, name, link.key, link.value.draw(draw))
    facts.insert(draw.below(len(facts) + 1), bridge)
    theirs = [new_fact(draw, other, bridge.value, a, may_change=False)
              for a in draw.order(other.attributes, draw.between(1, 3))]  # fmt: skip
    likely: list[Asking] = [partial(question, draw, kind, fact) for fact in facts]
    likely += [partial(over_two, draw, other, fact, hop(link, by_name(kind, name))) for fact in theirs]
    return draw.order([(kind, facts), (other, theirs)]), likely, []


def over_two(draw: Draw, kind: Kind, fact: Fact, reference: Reference) -> Question:
    """A question for a fact of an entity that is named only by way of another."""
    attribute = kind.attribute(fact.attribute)
    return Question(ask(draw, attribute, reference, own=True), fact.value, attribute.value.preposition)


def hop(link: Attribute, reference: Reference) -> Reference:
    """A reference to the value of a link by way of the entity that has it: "the plant where the Velmora is made"."""
    via = (link.via or "").format(o=reference.o)
    return Reference(capital(via), via, via)


MAKERS: dict[str, Callable[[Draw], str]] = {
    "drill": drill,
    "register": register,
    "pairs": pairs,
    "lookup": lookup,
    "quiz": quiz,
    "restate": restate,
    "record": record,
    "signs": signs,
    "notices": partial(notices, words=SIGNS),
    "complaint": complaint,
}
