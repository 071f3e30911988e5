"""labkit.retrieval: nothing is lost in chunks, metrics are the standard ones, intervals know what is independent."""

from itertools import groupby
from pathlib import Path

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import retrieval
from labkit.reference import Document, Question, documents
from labkit.retrieval import Chunk

LINES = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 30)).map(lambda pair: "  " * pair[0] + "w" * pair[1]), max_size=40
)


def depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def block_ends(lines: list[str]) -> list[int]:
    """For each line with words, where its block ends: after the last deeper line below it; blank lines are neither."""
    ends = []
    for at, line in enumerate(lines):
        end = at + 1
        for below in range(at + 1, len(lines)):
            if lines[below].strip():
                if depth(lines[below]) <= depth(line):
                    break
                end = below + 1
        ends.append(end)
    return ends


@given(LINES, st.integers(1, 200))
@settings(deadline=None, max_examples=200)
def test_chunks_are_the_text_and_split_no_block_that_fits(lines: list[str], size: int) -> None:
    text = "\n".join(lines)
    found = retrieval.chunks([Document("d", text)], size)
    assert "".join(chunk.text for chunk in found) == text
    assert all(text[chunk.start : chunk.start + len(chunk.text)] == chunk.text for chunk in found)
    longest = max((len(line) + 1 for line in lines), default=0)
    assert all(0 < len(chunk.text) <= max(size, longest) or not chunk.text.strip() for chunk in found)
    cuts = {chunk.start for chunk in found} - {0}
    starts = np.cumsum([0, *(len(line) + 1 for line in lines)])
    for at, end in enumerate(block_ends(lines)):
        # the blank lines below a block belong to it, so a block fits when they do as well
        while end < len(lines) and not lines[end].strip():
            end += 1
        if lines[at].strip() and starts[end] - starts[at] <= size:
            assert not any(starts[at] < cut < starts[end] for cut in cuts), (lines, at, end, cuts)


def test_code_below_its_sentence_stays_with_it() -> None:
    text = "First words.\n\nAn example:\n\n   def f():\n\n       return 1\n\nLast words.\n"
    found = retrieval.chunks([Document("d", text)], 45)
    assert [chunk.text for chunk in found] == [
        "First words.\n\n", "An example:\n\n   def f():\n\n       return 1\n\n", "Last words.\n",
    ]  # fmt: skip


def test_the_whole_corpus_is_in_its_chunks() -> None:
    found = retrieval.chunks(documents())
    together = {key: "".join(chunk.text for chunk in of) for key, of in groupby(found, key=lambda c: c.document)}
    assert together == {document.id: document.text for document in documents()}
    sizes = [len(chunk.text) for chunk in found]
    assert np.median(sizes) > 400
    assert np.mean(np.array(sizes) > retrieval.SIZE) < 0.01


def test_a_chunk_of_no_characters_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one character"):
        retrieval.chunks([], 0)


def test_relevance_needs_the_document_and_the_words() -> None:
    pool = [Chunk("a", 0, "the words\n   here"), Chunk("a", 9, "others"), Chunk("b", 0, "the words here")]
    asked = [Question("1", "?", "a", "words here", "test"), Question("2", "?", "b", "others", "test")]
    assert retrieval.relevance(pool, asked).tolist() == [[True, False, False], [False, False, False]]


def test_metrics_are_those_of_ir_measures() -> None:
    rng = np.random.default_rng(0)
    relevant = rng.random((50, 30)) < rng.choice([0.02, 0.1, 0.6], size=(50, 1))
    relevant[np.arange(50), rng.integers(30, size=50)] = True  # an evaluator leaves out questions without a judgement
    rankings = np.stack([rng.permutation(30) for _ in range(50)])
    qrels = {str(q): {str(c): int(relevant[q, c]) for c in range(30)} for q in range(50)}
    run = {str(q): {str(c): -float(rank) for rank, c in enumerate(row)} for q, row in enumerate(rankings)}
    for k in (1, 3, 10):
        ours = {
            ir_measures.R @ k: retrieval.recall(rankings, relevant, k),
            ir_measures.RR @ k: retrieval.reciprocal_rank(rankings, relevant, k),
            ir_measures.nDCG @ k: retrieval.ndcg(rankings, relevant, k),
        }
        for metric in ir_measures.iter_calc(list(ours), qrels, run):
            assert ours[metric.measure][int(metric.query_id)] == pytest.approx(metric.value), metric


def test_metrics_of_short_rankings_and_of_questions_without_relevant_chunks() -> None:
    relevant = np.array([[True, False], [False, False]])
    for metric in (retrieval.recall, retrieval.reciprocal_rank, retrieval.ndcg):
        assert metric([[1, 0], [0, 1]], relevant, 10).tolist() == pytest.approx(
            [{"recall": 1, "reciprocal_rank": 1 / 2, "ndcg": 1 / np.log2(3)}[metric.__name__], 0]
        )
        assert metric([[1], [0]], relevant, 1).tolist() == [0, 0]
        with pytest.raises(ValueError, match="at least 1"):
            metric([[0], [0]], relevant, 0)
        with pytest.raises(ValueError, match="do not fit"):
            metric([[0]], relevant, 1)


def test_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        found = retrieval.interval(rng.normal(size=60), draws=1000, seed=seed)
        covered += found.low <= 0 <= found.high
        assert found.low <= found.mean <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_groups_widen_the_interval_of_values_that_agree_within_them() -> None:
    level = np.repeat(np.random.default_rng(2).normal(size=20), 10)
    names = [f"document {at // 10}" for at in range(200)]
    alone, grouped = retrieval.interval(level), retrieval.interval(level, names)
    assert alone.mean == grouped.mean
    assert 2.2 < (grouped.high - grouped.low) / (alone.high - alone.low) < 4  # sqrt(10) in theory
    assert retrieval.interval(level, names, seed=3) == retrieval.interval(level, names, seed=3)


def test_a_paired_difference_takes_the_level_of_questions_out() -> None:
    rng = np.random.default_rng(3)
    level = rng.normal(size=100)
    better = level + 0.1 + 0.01 * rng.normal(size=100)
    found = retrieval.difference(better, level)
    assert found.low > 0.09
    assert found.mean == pytest.approx(0.1, abs=0.01)
    assert str(retrieval.interval([0.5])) == "0.500 [0.500, 0.500]"


def test_intervals_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="one value a question"):
        retrieval.interval([])
    with pytest.raises(ValueError, match="groups do not fit"):
        retrieval.interval([1.0], ["a", "b"])
    with pytest.raises(ValueError, match="the same questions"):
        retrieval.difference([1.0], [1.0, 2.0])


def test_embeddings_are_kept_and_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["How do I stop a gradient?", "detach() returns a new tensor without a graph.", "A cake needs flour."]
    found = retrieval.encode(texts, folder=tmp_path)
    assert found.shape == (3, 384)
    assert found.dtype == np.float32
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
    assert found[0] @ found[1] > found[0] @ found[2]
    monkeypatch.setattr(retrieval, "encoder", lambda: pytest.fail("computed again"))
    assert (retrieval.encode(texts, folder=tmp_path) == found).all()
    monkeypatch.setenv(retrieval.CACHE_VARIABLE, str(tmp_path))
    assert (retrieval.encode(texts) == found).all()
    assert retrieval.encode([], folder=tmp_path).shape == (0, 384)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "a file").touch()
    assert retrieval.encode(texts[:2], folder=tmp_path / "a file" / "below")[0] == pytest.approx(found[0], abs=1e-5)
    assert capfd.readouterr().err == ""


def test_the_key_of_texts_knows_where_they_end() -> None:
    assert retrieval._key(["ab", "c"]) != retrieval._key(["a", "bc"])
