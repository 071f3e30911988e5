"""What a base model is measured by; `labkit.base_model.card` runs it and writes it down.

Every quantity is measured for three or more seeds; a seed is a world (for facts, questions, tickets) and an order of
training.
"""

import copy
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from labkit.world import LESSON_SEEDS, VALIDATION_SEEDS, World
from labkit.world.draw import Draw

from .finetune import Pair, complete, finetune, replies
from .probe import validation

SEEDS = (LESSON_SEEDS[0], LESSON_SEEDS[1], LESSON_SEEDS[2])
QUESTIONS = 200
TICKETS = 4000
LORA_RATE, LORA_RANK = 1e-2, 3


@dataclass(frozen=True)
class Quantity:
    """A measured quantity over seeds: its mean with Student's 95 % interval over the values (None for one)."""

    name: str
    values: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None


T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


def quantity(name: str, values: Sequence[float]) -> Quantity:
    """Summarise a value a seed (1 to 8 of them)."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Quantity(name, tuple(values), mean, None, None)
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return Quantity(name, tuple(values), mean, mean - half, mean + half)


def reading_pairs(seeds: Sequence[int], passages: int, n: int) -> list[Pair]:
    """n questions on the worlds of these seeds: the gold passage among others of its kind, then the question."""
    pairs: list[Pair] = []
    share = -(-n // len(seeds))
    for seed in seeds:
        world = World(seed, "company" if seed % 3 else "port")
        texts = {p.id: p for p in world.passages()}
        kinds = {f.id: f.kind for f in world.facts}
        draw = Draw("reading", seed, passages)
        asked = world.questions("single") + world.questions("paraphrase")
        for q in draw.order(asked, min(share, len(asked))):
            gold = texts[q.gold[0]]
            same = [p for p in texts.values() if p is not gold and kinds[p.fact_ids[0]] == kinds[gold.fact_ids[0]]]
            shown = draw.order([gold, *draw.order(same, passages - 1)])
            pairs.append(Pair("\n".join([*(p.text for p in shown), q.text]), q.answer))
    return pairs[:n]


def exact(given: Sequence[str], wanted: Sequence[str]) -> float:
    """The share of replies equal to what was wanted, up to outer blanks and a final full stop."""
    return statistics.fmean(g.strip().removesuffix(".") == w for g, w in zip(given, wanted, strict=True))


def closed_book(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> float:
    """Exact match on questions about a world the model can't know, with no passage, in the stream's own layout."""
    world = World(seed)
    asked = Draw("closed", seed).order(world.questions("single"), min(QUESTIONS, len(world.questions("single"))))
    given = complete(model, tokenizer, [f"{tokenizer.bos_token}{q.text}\n" for q in asked], longest=12)
    return exact([g.split("\n")[0] for g in given], [q.answer for q in asked])


def reading(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[float, float, float, float]:
    """After a short SFT: exact match with one gold passage, with gold among four, with none; and the seconds of SFT."""
    tuned = copy.deepcopy(model)
    lessons = range(seed * 40, seed * 40 + 40)
    train_seeds = [VALIDATION_SEEDS[i] for i in lessons]
    pairs = reading_pairs(train_seeds, 1, 1000) + reading_pairs(train_seeds, 4, 1000)
    seconds = finetune(tuned, tokenizer, pairs, rate=1e-3, seed=seed)
    scores = []
    for passages in (1, 4):
        test = reading_pairs([seed], passages, QUESTIONS)
        scores.append(exact(replies(tuned, tokenizer, [p.prompt for p in test], longest=16), [p.reply for p in test]))
    world = World(seed)
    asked = world.questions("single")[:QUESTIONS]
    alone = exact(replies(tuned, tokenizer, [q.text for q in asked], longest=16), [q.answer for q in asked])
    return scores[0], scores[1], alone, seconds


def triage(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[float, float, float, float]:
    """Exact match on tickets before and after LoRA on all linear layers; also the share trained and the seconds."""
    world = World(seed)
    train = [Pair(t.text, t.triage.to_json()) for t in world.tickets(TICKETS)]
    test = [Pair(t.text, t.triage.to_json()) for t in world.tickets(QUESTIONS, part="test")]
    wanted = [p.reply for p in test]
    before = exact(replies(model, tokenizer, [p.prompt for p in test]), wanted)
    torch.manual_seed(seed)
    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(copy.deepcopy(model), config)
    trained, total = tuned.get_nb_trainable_parameters()
    seconds = finetune(tuned, tokenizer, train, rate=LORA_RATE, batch=8, seed=seed)
    after = exact(replies(tuned, tokenizer, [p.prompt for p in test]), wanted)
    return before, after, trained / (total - trained), seconds


def speed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """New tokens a processor second on one core: batch 1, 200 tokens after a passage, with a key-value cache.

    Processor time, so that other work on the machine does not count.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    prompt = tokenizer(World(SEEDS[0]).passages()[0].text, return_tensors="pt").to(model.device)
    started = time.process_time()
    model.generate(**prompt, min_new_tokens=200, max_new_tokens=200, do_sample=False)
    seconds = time.process_time() - started
    torch.set_num_threads(threads)
    return 200 / seconds


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seeds: Sequence[int] = SEEDS
) -> Iterator[Quantity]:
    """All quantities of the model card, each as soon as it is measured."""
    losses = [validation(model, tokenizer, 1000, first=1000 + 1000 * i) for i in range(len(seeds))]
    yield quantity("validation loss, nats a token", [x.model for x in losses])
    yield quantity("entropy floor, nats a token", [x.floor for x in losses])
    yield quantity("loss above the floor", [x.excess for x in losses])
    yield quantity("closed-book exact match", [closed_book(model, tokenizer, s) for s in seeds])
    tickets = [triage(model, tokenizer, s) for s in seeds]
    labels = ("triage of the base", "triage after LoRA", "share of parameters trained", "seconds of LoRA")
    for name, values in zip(labels, zip(*tickets, strict=True), strict=True):
        yield quantity(name, values)
    read = [reading(model, tokenizer, s) for s in seeds]
    labels = ("one gold passage after SFT", "gold among four after SFT", "closed book after SFT", "seconds of SFT")
    for name, values in zip(labels, zip(*read, strict=True), strict=True):
        yield quantity(name, values)
    yield quantity("tokens a second, one core", [speed(model, tokenizer) for _ in seeds])
