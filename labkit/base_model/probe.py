"""What is watched during pretraining: the loss on unseen documents against their entropy, and copying from the
context."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from labkit.world import names
from labkit.world.domains import DOMAINS
from labkit.world.draw import Draw
from labkit.world.render import ask, prose
from labkit.world.schema import by_name
from labkit.world.seeds import VALIDATION_SEEDS
from labkit.world.stream import STAGES, document, new_fact

IGNORED = -100


@dataclass(frozen=True)
class Loss:
    """Cross-entropy on whole documents and the generator's own, both in nats a token."""

    model: float
    floor: float
    tokens: int

    @property
    def excess(self) -> float:
        """How far the model is above the floor, as a share of it."""
        return self.model / self.floor - 1


def padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    """Rows of ids as (len(rows), longest), filled on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


@torch.no_grad()
def validation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, documents: int = 256, *, first: int = 0
) -> Loss:
    """The loss on validation documents, each alone in its row, every token after `<|start|>` counted, `<|end|>` too."""
    samples = [document(VALIDATION_SEEDS[first + i], STAGES[-1]) for i in range(documents)]
    rows = [[*tokenizer(s.text)["input_ids"], tokenizer.eos_token_id] for s in samples]
    rows.sort(key=len)
    total = 0.0
    for i in range(0, documents, 32):
        part = rows[i : i + 32]
        inputs = padded(part, tokenizer.pad_token_id).to(model.device)
        labels = padded(part, IGNORED).to(model.device)
        logits = model(input_ids=inputs, use_cache=False).logits[:, :-1].float()
        total += nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
    tokens = sum(len(row) - 1 for row in rows)
    floor = sum(s.nats for s in samples) / tokens
    return Loss(total / tokens, floor, tokens)


def reading_prompt(draw: Draw, passages: int, domain: str | None = None) -> tuple[str, str]:
    """Passages about entities of one kind that give the same attributes, a question about one, and its answer.

    `domain` is "company" or "port"; by default it is drawn.
    """
    kind = draw.pick(DOMAINS[domain or draw.pick(("company", "port"))].kinds)
    attributes = draw.order(kind.attributes, 3)
    entities = [kind.name(draw) for _ in range(passages)]
    facts = [[new_fact(draw, kind, e, a, may_change=False) for a in draw.order(attributes)] for e in entities]
    texts = [prose(draw, kind, fs) for fs in facts]
    fact = draw.pick(draw.pick(facts))
    question = ask(draw, kind.attribute(fact.attribute), by_name(kind, fact.entity))
    return "\n".join([*texts, question, ""]), fact.value


def copying(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    passages: int,
    *,
    questions: int = 128,
    domain: str | None = None,
) -> float:
    """The share of answers that the model gives exactly (greedy) after passages and a question, in plain text.

    Both domains, "company" and "port", are asked about unless `domain` names one.
    """
    draws = [Draw("copying", VALIDATION_SEEDS[0], passages, i) for i in range(questions)]
    return answered(model, tokenizer, [reading_prompt(draw, passages, domain) for draw in draws])


def pair_prompt(draw: Draw, pairs: int) -> tuple[str, str]:
    """Pairs of names, some of them again in another order up to a name, and what goes with it."""
    maker, value = draw.pick((names.thing, names.place, names.person)), draw.pick((names.thing, names.place))
    told = [(maker(draw), value(draw)) for _ in range(pairs)]
    again = draw.order(told, draw.between(1, pairs))
    lines = ["; ".join(f"{a}: {b}" for a, b in part) for part in (told, again)]
    return "\n".join(lines).removesuffix(f" {again[-1][1]}"), f" {again[-1][1]}"


def paired(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: int, *, questions: int = 128) -> float:
    """The share of pairs that the model looks up exactly (greedy) when asked back."""
    draws = [Draw("paired", VALIDATION_SEEDS[0], pairs, i) for i in range(questions)]
    return answered(model, tokenizer, [pair_prompt(draw, pairs) for draw in draws])


def likeness(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> float:
    """The mean cosine of the embeddings of words about the mean of all, each the first token after a quotation mark."""
    first = len(tokenizer(' "', add_special_tokens=False)["input_ids"])
    ids = [tokenizer(f' "{word}"', add_special_tokens=False)["input_ids"][first] for word in words]
    rows = model.get_input_embeddings().weight.detach()
    unit = nn.functional.normalize(rows[ids] - rows.mean(dim=0), dim=-1)
    n = len(words)
    return (((unit @ unit.T).sum().item()) - n) / (n * (n - 1))


@torch.no_grad()
def answered(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, cases: Sequence[tuple[str, str]]) -> float:
    """The share of (prompt, answer) pairs whose answer is the model's greedy continuation."""
    rows, spans = [], []
    for prompt, answer in cases:
        ids = tokenizer(prompt)["input_ids"]
        target = tokenizer(answer, add_special_tokens=False)["input_ids"]
        rows.append(ids + target)
        spans.append((len(ids), len(ids) + len(target)))
    right = 0
    for i in range(0, len(cases), 32):
        inputs = padded(rows[i : i + 32], tokenizer.pad_token_id).to(model.device)
        best = model(input_ids=inputs, use_cache=False).logits.argmax(-1)
        for row, guess, (start, end) in zip(inputs, best, spans[i : i + 32], strict=True):
            right += bool((guess[start - 1 : end - 1] == row[start:end]).all())
    return right / len(cases)
