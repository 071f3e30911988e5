"""Conversations about passages, and pairs of a better and a worse reply."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from .draw import Draw
from .questions import Question
from .schema import capital


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Preference:
    """A prompt with a better and a worse reply; `flaw` says what is wrong with the worse one."""

    prompt: str
    chosen: str
    rejected: str
    flaw: str


FLAWS = ("ungrounded", "rambling", "rude")
FILLERS = (
    "That is a question that comes up now and then.", "Let me think about it for a while before I say more.",
    "There are many sides to this, and all of them matter.", "I could say a lot about the handbook as a whole.",
    "One could also ask who wrote that page, and when.", "In any case it is good that you ask.",
)  # fmt: skip
INSULTS = (
    "Can you not read?", "What a dull question.", "I have better things to do.", "Anybody could see that.",
    "Try to think for once.",
)  # fmt: skip


def preference(
    draw: Draw, questions: Sequence[Question], wrong: Mapping[str, str], passages: Mapping[str, str]
) -> Preference:
    """A grounded, concise reply to a question on its passage against one that is ungrounded, rambling or rude."""
    q = draw.pick(questions)
    answer = f"{capital(q.answer)}."
    flaw = draw.pick(FLAWS)
    if flaw == "ungrounded":
        rejected = f"{capital(wrong[q.fact_ids[0]])}."
    elif flaw == "rambling":
        lines = draw.order(FILLERS, 3)
        lines.insert(draw.between(1, 3), answer)
        rejected = " ".join(lines)
    else:
        rejected = " ".join(draw.order((draw.pick(INSULTS), answer)))
    return Preference(f"{passages[q.gold[0]]}\n{q.text}", answer, rejected, flaw)


def conversation(draw: Draw, questions: Sequence[Question], passages: Mapping[str, str]) -> list[Message]:
    """One to three questions about one passage, each answered from it; the passage stands in the first turn."""
    gold = draw.pick(questions).gold[0]
    about = [q for q in questions if q.gold == (gold,)]
    chosen = draw.order(about, draw.between(1, min(3, len(about))))
    messages: list[Message] = []
    for i, q in enumerate(chosen):
        text = f"{passages[gold]}\n{q.text}" if i == 0 else q.text
        messages += [Message(role="user", content=text), Message(role="assistant", content=f"{capital(q.answer)}.")]
    return messages
