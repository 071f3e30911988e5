"""The pretraining batches: one document a row, documents of like length together.

A row is `<|start|>`, a document, `<|end|>`, and padding. Documents are not packed: a name that occurs once in the
context is easy to copy, one among the names of unrelated documents is not, and copying is what has to be learnt.
Batches come in shards, each a pure function of (phase, shard number), so a run can resume anywhere and any two
machines train on the same batches in the same order. Shards are made ahead of time in worker processes.
"""

from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from labkit.world.draw import Draw
from labkit.world.seeds import TRAIN_SEEDS
from labkit.world.stream import STAGES, Stage, document

SHARD_DOCUMENTS = 8192
WINDOW = 256


@dataclass(frozen=True)
class Phase:
    """A stretch of training: the mix of documents, the most tokens in a batch, its shards (None: to the end)."""

    stage: Stage
    tokens: int
    shards: int | None


@dataclass(frozen=True)
class Cursor:
    """Where in the data a run stands: the next batch is number `batch` of shard `shard` of phase `phase`."""

    phase: int = 0
    shard: int = 0
    batch: int = 0


PHASES = (
    Phase(STAGES[0], 1024, 3),
    Phase(STAGES[1], 1024, 6),
    Phase(STAGES[2], 2048, 10),
    Phase(STAGES[3], 2048, None),
)


def batch_up(rows: list[list[int]], tokens: int, pad: int) -> list[np.ndarray]:
    """Group rows of ids, in order of length, into batches (n, longest) of uint16 with at most `tokens` tokens each.

    A row longer than `tokens` is a batch of its own.
    """
    batches: list[np.ndarray] = []
    waiting: list[list[int]] = []

    def close() -> None:
        out = np.full((len(waiting), len(waiting[-1])), pad, dtype=np.uint16)
        for line, ids in zip(out, waiting, strict=True):
            line[: len(ids)] = ids
        batches.append(out)
        waiting.clear()

    for ids in sorted(rows, key=len):
        if waiting and len(ids) * (len(waiting) + 1) > tokens:
            close()
        waiting.append(ids)
    if waiting:
        close()
    return batches


def shard(tokenizer: PreTrainedTokenizerFast, phase: Phase, number: int) -> list[np.ndarray]:
    """The batches of shard `number` of a phase, in a shuffled order. Likes are grouped within `WINDOW` documents
    only."""
    seeds = TRAIN_SEEDS[number * SHARD_DOCUMENTS : (number + 1) * SHARD_DOCUMENTS]
    texts = [document(seed, phase.stage).text for seed in seeds]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = [[start, *ids, end] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    batches = []
    for i in range(0, len(rows), WINDOW):
        batches += batch_up(rows[i : i + WINDOW], phase.tokens, tokenizer.pad_token_id)
    return Draw("batches", phase.stage.name, number).order(batches)


def batches(
    tokenizer: PreTrainedTokenizerFast, cursor: Cursor, phases: tuple[Phase, ...] = PHASES, *, workers: int = 1
) -> Generator[tuple[np.ndarray, Cursor], None, None]:
    """Endless batches (rows, length) from a cursor on, each with the cursor that follows it."""
    if phases[-1].shards is not None:
        raise ValueError("the last phase must have no end (shards=None)")

    def shards() -> Iterator[tuple[int, int]]:
        p, s = cursor.phase, cursor.shard
        while True:
            yield p, s
            s += 1
            if s == phases[p].shards:
                p, s = p + 1, 0

    with ProcessPoolExecutor(workers) as pool:
        ahead: list[tuple[int, int, Future[list[np.ndarray]]]] = []
        skip = cursor.batch
        for p, s in shards():
            ahead.append((p, s, pool.submit(shard, tokenizer, phases[p], s)))
            if len(ahead) <= workers:
                continue
            p, s, future = ahead.pop(0)
            made = future.result()
            for i in range(skip, len(made)):
                yield made[i], Cursor(p, s, i + 1)
            skip = 0
