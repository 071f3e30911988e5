"""Short supervised finetuning on chat pairs, and greedy answers: what the evaluations of the base model need."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from labkit.world.draw import Draw

from .probe import IGNORED, padded


@dataclass(frozen=True)
class Pair:
    """A user's turn and the assistant's reply."""

    prompt: str
    reply: str


def chat_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The chat template's text up to where the assistant's reply starts."""
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return str(rendered)


Layout = Callable[[PreTrainedTokenizerBase, str], str]
"""From a prompt to the full text before the reply, special tokens included."""


def plain_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text on lines of its own, as in the pretraining stream, where an answer follows its question."""
    return f"{tokenizer.bos_token or ''}{text}\n"


def encode(tokenizer: PreTrainedTokenizerBase, pair: Pair, layout: Layout = chat_prompt) -> tuple[list[int], list[int]]:
    """Token ids of a pair and its labels, which ignore the prompt."""
    prompt = tokenizer(layout(tokenizer, pair.prompt), add_special_tokens=False)["input_ids"]
    reply = [*tokenizer(pair.reply, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return [*prompt, *reply], [*[IGNORED] * len(prompt), *reply]


def finetune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    rate: float,
    batch: int = 16,
    seed: int = 0,
    layout: Layout = chat_prompt,
) -> float:
    """Train what requires a gradient once through the pairs, in a seeded order, with AdamW; returns the seconds taken.

    The rate warms up over ten steps and falls linearly to 0.
    """
    encoded = [encode(tokenizer, pair, layout) for pair in pairs]
    order = Draw("finetune", seed).order(range(len(encoded)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
    device = next(model.parameters()).device
    model.train()
    started = time.perf_counter()
    steps = len(order) // batch
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - step / steps)
        part = [encoded[i] for i in order[step * batch : (step + 1) * batch]]
        inputs = padded([x for x, _ in part], tokenizer.pad_token_id).to(device)
        labels = padded([y for _, y in part], IGNORED).to(device)
        logits = model(input_ids=inputs, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return time.perf_counter() - started


@torch.no_grad()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str], *, longest: int
) -> list[str]:
    """The greedy continuation of each prompt (full text, `<|start|>` included), up to `<|end|>` or `longest` tokens."""
    texts = list(prompts)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    replies = [""] * len(ids)
    for at in range(0, len(ids), 64):
        part = by_length[at : at + 64]
        width = max(len(ids[i]) for i in part)
        inputs = torch.tensor([[tokenizer.pad_token_id] * (width - len(ids[i])) + ids[i] for i in part])
        mask = (torch.arange(width) >= torch.tensor([[width - len(ids[i])] for i in part])).long()
        out = model.generate(
            input_ids=inputs.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=longest,
            do_sample=False,
        )
        for i, row in zip(part, out[:, width:].tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            replies[i] = tokenizer.decode(row[:end])
    return replies


def replies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str], *, longest: int = 48
) -> list[str]:
    """The greedy replies to chat prompts."""
    return complete(model, tokenizer, [chat_prompt(tokenizer, p) for p in prompts], longest=longest)
