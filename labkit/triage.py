"""Ticket triage as a fine-tuning task: tickets → tensors, a short training loop, greedy answers, and their score.

The prompt is the chat template with the ticket as the user's message; the answer is the triage as one line of JSON and
the end-of-sequence token. Works with any causal language model whose tokenizer has a chat template.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from labkit.world import Ticket, Triage

IGNORED = -100
"""The label of a position that the loss leaves out (torch's default `ignore_index`)."""

FIELDS = ("product", "category", "urgency", "action")


@dataclass(frozen=True)
class Example:
    """One ticket as token ids; the answer ends with the end-of-sequence token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Batch:
    """Right-padded tensors, all (n, t) int64; `labels` is -100 on the prompt and the padding."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Score:
    """Which answers are right: `exact` is (n,) bool, `fields[name]` (n,) bool for each of `FIELDS`."""

    exact: NDArray[np.bool_]
    fields: dict[str, NDArray[np.bool_]]


def encode(tokenizer: PreTrainedTokenizerBase, tickets: Iterable[Ticket]) -> list[Example]:
    """Tickets as token ids. Prompt and answer are tokenised apart, so a prompt is the same in training and in use.

    Raises `ValueError` for a tokenizer without a chat template or an end-of-sequence token.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "this tokenizer has no chat template, so nothing says where the user's message ends: take a model that has "
            "one (an instruct model), or set tokenizer.chat_template"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "this tokenizer has no end-of-sequence token, so an answer could not end: set tokenizer.eos_token"
        )
    return [
        Example(_prompt(tokenizer, ticket.text), (*_ids(tokenizer, ticket.triage.to_json()), tokenizer.eos_token_id))
        for ticket in tickets
    ]


def collate(examples: Sequence[Example], pad_id: int = 0) -> Batch:
    """Examples as right-padded tensors (n, longest). Any `pad_id` will do: the padding is masked."""
    longest = max(map(len, examples))
    ids = torch.full((len(examples), longest), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        length, start = len(example), len(example.prompt)
        ids[row, :length] = torch.tensor(example.prompt + example.answer)
        mask[row, :length] = 1
        labels[row, start:length] = torch.tensor(example.answer)
    return Batch(ids, mask, labels)


def batches(examples: Sequence[Example], *, size: int, steps: int, seed: int) -> Iterator[Batch]:
    """`steps` batches of `size` examples in an order that the seed decides; each epoch is a new shuffle, no repeats.

    Within a pool of eight batches, examples of similar length go together, which saves most of the padding.
    """
    if not 1 <= size <= len(examples):
        raise ValueError(f"a batch of {size} needs 1 to {len(examples)} examples; lower the batch size or add tickets")
    order = np.random.default_rng(seed)
    ready: list[list[int]] = []
    for _ in range(steps):
        if not ready:
            ready = _epoch(order, [len(example) for example in examples], size)
        yield collate([examples[index] for index in ready.pop()])


def loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean cross-entropy of the answer tokens, in nats a token (a scalar with its graph)."""
    batch = batch.to(model.device)
    first = int((batch.labels != IGNORED).any(dim=0).int().argmax())  # no logits are needed before the first answer
    kept = batch.labels.shape[1] - first + 1
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=kept, use_cache=False)
    logits = output.logits[:, -kept:-1].flatten(0, 1).float()
    return cross_entropy(logits, batch.labels[:, first:].flatten(), ignore_index=IGNORED)


def train(
    model: PreTrainedModel, data: Iterable[Batch], *, steps: int, learning_rate: float, label: str = "training"
) -> list[float]:
    """Train the parameters that require a gradient, in place; return the loss of each step, in nats a token.

    AdamW without weight decay, gradients clipped at norm 1; the learning rate rises over the first tenth of `steps` and
    then falls linearly to zero. `data` may be shorter than `steps`: training then stops on the way. The model stays in
    the mode it is in: in `eval()`, where `base_model.load` leaves it, dropout is off, so two runs on the same data can
    be compared step by step.

    Raises `ValueError` when no parameter requires a gradient, and `FloatingPointError` when the loss is not finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("no parameter requires a gradient: attach an adapter, or call model.requires_grad_()")
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    losses: list[float] = []
    for batch in tqdm(data, total=steps, desc=label, leave=False):
        value = loss(model, batch)
        losses.append(value.item())
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {len(losses)}: lower the learning rate")
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return losses


@torch.no_grad()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tickets: Sequence[Ticket], *, batch_size: int = 64
) -> list[str]:
    """The model's greedy answer to each ticket, as text without special tokens.

    Prompts of similar length go together, padded on the left. An answer stops at the end-of-sequence token, or a few
    tokens after the longest right answer: what is longer is wrong in any case.
    """
    examples = encode(tokenizer, tickets)
    config = GenerationConfig(
        do_sample=False, temperature=1.0, top_p=1.0, top_k=50,  # a model's own sampling settings would only warn
        max_new_tokens=max(len(example.answer) for example in examples) + 4,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    by_length = sorted(range(len(examples)), key=lambda index: len(examples[index].prompt))
    texts = [""] * len(examples)
    for start in range(0, len(by_length), batch_size):
        rows = by_length[start : start + batch_size]
        longest = len(examples[rows[-1]].prompt)
        ids = torch.full((len(rows), longest), tokenizer.eos_token_id)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(rows):
            prompt = examples[index].prompt
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        out = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
        )
        for index, new in zip(rows, out[:, longest:], strict=True):
            texts[index] = tokenizer.decode(new, skip_special_tokens=True)
    return texts


def score(texts: Sequence[str], tickets: Sequence[Ticket]) -> Score:
    """Compare answers with the tickets' triage. An answer that `Triage.parse` refuses has no right field."""
    right = np.array(
        [_right_fields(text, ticket.triage) for text, ticket in zip(texts, tickets, strict=True)], dtype=bool
    )
    right = right.reshape(-1, len(FIELDS))
    return Score(np.all(right, axis=1), {name: right[:, column] for column, name in enumerate(FIELDS)})


def interval(right: NDArray[np.bool_]) -> tuple[float, float]:
    """The 95 % Wilson interval of a share of right answers (any shape); it stays honest at 0 and at 1."""
    found = binomtest(int(right.sum()), right.size).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def _epoch(order: np.random.Generator, lengths: Sequence[int], size: int) -> list[list[int]]:
    """One epoch as whole batches of indices, in random order."""
    shuffled = order.permutation(len(lengths)).tolist()
    pools = [sorted(shuffled[at : at + 8 * size], key=lengths.__getitem__) for at in range(0, len(shuffled), 8 * size)]
    rows = [pool[at : at + size] for pool in pools for at in range(0, len(pool), size)]
    whole = [row for row in rows if len(row) == size]
    return [whole[index] for index in order.permutation(len(whole))]


def _right_fields(text: str, truth: Triage) -> list[bool]:
    try:
        answer = Triage.parse(text)
    except ValueError:
        return [False] * len(FIELDS)
    return [getattr(answer, name) == getattr(truth, name) for name in FIELDS]


def _prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    messages = [{"role": "user", "content": text}]
    return _ids(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
