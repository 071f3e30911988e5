"""labkit.reference: no document twice, and for each question one place in the whole corpus that answers it."""

import re
from collections import Counter

import pytest

from labkit.reference import OVERLAP, Question, documents, holds, questions

SHARE = 0.4
"""The least share of the questions that a split holds."""

COPIED = 6
"""A question that shares so many words in a row with its document is copied from it."""


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Each document with single spaces, as evidence is compared."""
    return {document.id: " ".join(document.text.split()) for document in documents()}


@pytest.fixture(scope="module")
def every() -> list[Question]:
    return questions()


def runs(words: list[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def spoken(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def test_documents_have_a_text_and_an_id_of_their_own() -> None:
    found = documents()
    assert all(document.text.strip() for document in found)
    assert [name for name, count in Counter(document.id for document in found).items() if count > 1] == []
    families = Counter(re.split(r"[./]", document.id)[0] for document in found)
    assert set(families) == {"python", "torch", "transformers", "peft"}


def test_no_topic_repeats_another(texts: dict[str, str]) -> None:
    topics = {name: text for name, text in texts.items() if name.startswith("python/")}
    parts = {name: runs(text.split(), 12) for name, text in topics.items()}
    repeated = [
        (name, other)
        for name in topics
        for other in topics
        if len(topics[other]) > len(topics[name])
        and (topics[name] in topics[other] or len(parts[name] & parts[other]) >= OVERLAP * max(1, len(parts[name])))
    ]
    assert repeated == []


def test_there_are_enough_questions(every: list[Question]) -> None:
    assert len(every) >= 120


def test_questions_have_an_id_and_a_text_of_their_own(every: list[Question]) -> None:
    for key in (lambda q: q.id, lambda q: " ".join(spoken(q.text))):
        assert [value for value, count in Counter(map(key, every)).items() if count > 1] == []
    assert [question.id for question in every if not question.text.strip()] == []


def test_evidence_stands_in_its_document_and_nowhere_else(every: list[Question], texts: dict[str, str]) -> None:
    assert [q.id for q in every if not holds(texts.get(q.document, ""), q.evidence)] == []
    places = {q.id: sum(text.count(" ".join(q.evidence.split())) for text in texts.values()) for q in every}
    assert {name: count for name, count in places.items() if count != 1} == {}


def test_evidence_is_a_few_words_and_no_title(every: list[Question]) -> None:
    assert [q.id for q in every if not 1 <= len(q.evidence.split()) <= 5] == []
    titles = {document.id: document.text.splitlines()[0] for document in documents()}
    assert [q.id for q in every if q.document.startswith("python/") and holds(titles[q.document], q.evidence)] == []


def test_a_question_is_not_copied_from_its_document(every: list[Question], texts: dict[str, str]) -> None:
    copied = [q.id for q in every if runs(spoken(q.text), COPIED) & runs(spoken(texts[q.document]), COPIED)]
    assert copied == []


def test_the_splits_share_no_document_and_are_of_like_size(every: list[Question]) -> None:
    development, test = questions("development"), questions("test")
    assert sorted([*development, *test], key=lambda q: q.id) == sorted(every, key=lambda q: q.id)
    assert {q.document for q in development} & {q.document for q in test} == set()
    assert min(len(development), len(test)) >= SHARE * len(every)


def test_evidence_is_found_over_a_line_break_and_is_not_guessed() -> None:
    assert holds("one two\n   three", "two three")
    assert not holds("one two\n   three", "two four")


def test_an_unknown_split_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="development or test"):
        questions("train")
