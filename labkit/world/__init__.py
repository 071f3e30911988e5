"""A synthetic world drawn from a seed: documents, questions with gold passages, tickets, preferences, conversations.

Facts are new in each seed, so what a model can know, must retrieve or made up is controlled exactly. Pure standard
library.
"""

from .dialogue import Message, Preference
from .questions import Question
from .render import Fact
from .schema import NOT_STATED
from .seeds import LESSON_SEEDS, TRAIN_SEEDS, VALIDATION_SEEDS
from .triage import ACTIONS, CATEGORIES, URGENCIES, Triage
from .world import Document, Passage, Ticket, World

__all__ = [
    "ACTIONS",
    "CATEGORIES",
    "LESSON_SEEDS",
    "NOT_STATED",
    "TRAIN_SEEDS",
    "URGENCIES",
    "VALIDATION_SEEDS",
    "Document",
    "Fact",
    "Message",
    "Passage",
    "Preference",
    "Question",
    "Ticket",
    "Triage",
    "World",
]
