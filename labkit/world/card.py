"""The data card: `python -m labkit.world.card` measures the world and the stream and writes `DATA_CARD.md` beside
this file."""

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import complaints
from .domains import DOMAINS
from .schema import CHANGES, COMPARISONS, GENERIC_QUESTIONS, GENERIC_STATEMENTS, QUESTIONS_NOW, QUESTIONS_THEN
from .seeds import LESSON_SEEDS, TRAIN_SEEDS, VALIDATION_SEEDS
from .stream import STAGES, Sample, document
from .world import World

CARD = Path(__file__).parent / "DATA_CARD.md"
DOCUMENTS = 4000


@dataclass(frozen=True)
class Diversity:
    """How many different n-grams of words a text has, of all it has; names and numbers count as one word each."""

    n: int
    distinct: int
    total: int


def words(text: str) -> list[str]:
    """Words and signs in lower case, with names as `name` and numbers as `0`: what is left is the language alone."""
    found = re.findall(r"[A-Za-z]+|\d+|[^\sA-Za-z\d]", text)
    masked = []
    for i, word in enumerate(found):
        if word.isdigit():
            masked.append("0")
        elif word[0].isupper() and i > 0 and found[i - 1] not in ".?!:-|":
            masked.append("name")
        else:
            masked.append(word.lower())
    return masked


def diversity(texts: Iterable[str], n: int) -> Diversity:
    """Distinct and total n-grams over the texts (distinct-n: Li et al., A diversity-promoting objective function,
    2016)."""
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        found = words(text)
        counts.update(zip(*(found[i:] for i in range(n)), strict=False))
    return Diversity(n, len(counts), counts.total())


def templates() -> Iterator[str]:
    """Every template of a sentence or question; slots in braces."""
    for domain in DOMAINS.values():
        for kind in domain.kinds:
            for attribute in kind.attributes:
                yield from attribute.statements
                yield from attribute.questions
    yield from (*GENERIC_STATEMENTS, *GENERIC_QUESTIONS, *CHANGES, *COMPARISONS, *QUESTIONS_NOW, *QUESTIONS_THEN)
    tables = (complaints.PROBLEMS, complaints.REQUESTS, complaints.HASTE, complaints.DESKS, complaints.PACES)
    for table in (*tables, complaints.REMEDIES):
        yield from (phrase for phrases in table.values() for phrase in phrases if phrase)


def coverage(texts: Iterable[str]) -> tuple[int, int]:
    """How many templates occur in the texts, and how many there are."""
    corpus = "\n".join(texts).lower()
    patterns = [re.sub(r"\\{\w+\\}", r"[^\\n?]{1,60}?", re.escape(t.lower())) for t in templates()]
    return sum(re.search(p, corpus) is not None for p in patterns), len(patterns)


def _world_rows() -> Iterator[str]:
    for key, domain in DOMAINS.items():
        worlds = [World(seed, key) for seed in LESSON_SEEDS[:10]]
        kinds = ", ".join(f"{k.count} {k.plural}" for k in domain.kinds)
        sizes = {
            "facts": [len(w.facts) for w in worlds],
            "passages": [len(w.passages()) for w in worlds],
            "documents": [len(w.documents()) for w in worlds],
            "questions": [len(w.questions()) for w in worlds],
        }
        told = ", ".join(f"{round(statistics.fmean(v))} {name}" for name, v in sizes.items())
        yield f"- **{key}**: {kinds}. A world of it has on average {told}."


def card() -> str:
    """The card's text, the same on every machine."""
    samples = [document(seed) for seed in VALIDATION_SEEDS[:DOCUMENTS]]
    texts = [s.text for s in samples]
    seen, total = coverage(texts)
    vocabulary = {w for text in texts for w in words(text)}
    lines = [
        "# Data card: the synthetic world and its pretraining stream",
        "",
        "Written by `python -m labkit.world.card`; every number is measured by that run.",
        "",
        "## Seeds",
        "",
        "| used for | seeds |",
        "|---|---|",
        *(
            f"| {name} | {r.start:,} to {r.stop - 1:,} |"
            for name, r in (("lessons", LESSON_SEEDS), ("validation", VALIDATION_SEEDS), ("pretraining", TRAIN_SEEDS))
        ),
        "",
        "## Worlds",
        "",
        *_world_rows(),
        "",
        "## The stream",
        "",
        f"Measured on the first {DOCUMENTS:,} validation documents of the full mix.",
        "",
        "| sort | documents | words a document | nats a document |",
        "|---|---|---|---|",
        *_sort_rows(samples),
        "",
        f"Different words, slips included (numbers masked, names too except where they open a sentence): "
        f"{len(vocabulary):,}. "
        f"Templates of sentences and questions: {total:,}, of which {seen:,} ({seen / total:.1%}) occur in the sample.",
        "",
        "| n | distinct n-grams | all n-grams | share |",
        "|---|---|---|---|",
    ]
    for n in (1, 2, 3, 4):
        d = diversity(texts, n)
        lines.append(f"| {n} | {d.distinct:,} | {d.total:,} | {d.distinct / d.total:.2%} |")
    lines += ["", "## Examples", ""]
    for sort, _ in STAGES[-1].mix:
        text = next(s.text for s in samples if s.sort == sort)
        lines += [f"A {sort}:", "", "```text", text, "```", ""]
    lines += ["## Known limits", "", *LIMITS, ""]
    return "\n".join(lines)


def _sort_rows(samples: list[Sample]) -> Iterator[str]:
    for sort, _ in STAGES[-1].mix:
        part = [s for s in samples if s.sort == sort]
        size = statistics.fmean(len(words(s.text)) for s in part)
        nats = statistics.fmean(s.nats for s in part)
        yield f"| {sort} | {len(part) / len(samples):.1%} | {size:.0f} | {nats:.1f} |"


LIMITS = [
    "- The language is a grammar of templates: a model that knows it knows no English.",
    "- Names have two syllables from fixed lists: 1,600 things, 1,600 towns, 76,800 people. A name can occur",
    "  in many worlds; what is new in each world is what is true of it.",
    "- Values are drawn independently and uniformly: nothing can be inferred from common sense, only read.",
    "- The slips of customers are single letters; no dialect, irony or second language.",
    "- Some idioms stretch English (`What does the text give as ...`); they are there to state one fact in many ways.",
]


if __name__ == "__main__":
    CARD.write_text(card())
    print(f"wrote {CARD}")
