"""Samples for reinforcement learning: groups of answers to each prompt, and the log-probabilities of their tokens.

Row i of everything belongs to prompt i // group: the answers to one prompt stand together, as in trl's `GRPOTrainer`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rollouts:
    """n sampled answers. All tensors are int64: prompts are padded on the left, completions on the right.

    `completion_mask` is 1 on the tokens of an answer, its end-of-sequence token included, and 0 behind it. `group` rows
    in a row have the same prompt.
    """

    prompt_ids: Tensor  # (n, p)
    prompt_mask: Tensor  # (n, p)
    completion_ids: Tensor  # (n, t)
    completion_mask: Tensor  # (n, t)
    group: int = 1

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def groups(self, kept: Tensor) -> "Rollouts":
        """The groups that `kept` names, (n / group,) bool, without columns that are padding in all of them."""
        index = kept.repeat_interleave(self.group)
        prompt_mask, completion_mask = self.prompt_mask[index], self.completion_mask[index]
        first = int(prompt_mask.sum(dim=1).max()) if len(prompt_mask) else 0
        last = int(completion_mask.sum(dim=1).max()) if len(completion_mask) else 0
        cut = self.prompt_ids.shape[1] - first
        return Rollouts(
            self.prompt_ids[index][:, cut:], prompt_mask[:, cut:],
            self.completion_ids[index][:, :last], completion_mask[:, :last], self.group,
        )  # fmt: skip

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The answers as text, without special tokens."""
        lengths = self.completion_mask.sum(dim=1).tolist()
        ids = [row[:length] for row, length in zip(self.completion_ids.tolist(), lengths, strict=True)]
        return [tokenizer.decode(row, skip_special_tokens=True) for row in ids]


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], *,
    group: int, longest: int, seed: int,
) -> Rollouts:  # fmt: skip
    """`group` answers to each prompt, drawn from the model's own distribution (temperature 1, nothing cut off).

    Each prompt is read once and its keys and values are repeated. An answer ends with the end-of-sequence token or
    after `longest` tokens.
    """
    end = tokenizer.eos_token_id
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), end)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    generator = torch.Generator().manual_seed(seed)
    cache = DynamicCache(config=model.config)
    logits = _forward(model, ids, mask, cache)
    cache.batch_repeat_interleave(group)
    logits, mask = logits.repeat_interleave(group, dim=0), mask.repeat_interleave(group, dim=0)
    prompt_ids, prompt_mask = ids.repeat_interleave(group, dim=0), mask
    alive = torch.ones(len(prompt_ids), dtype=torch.bool)
    tokens, masks = [], []
    for _ in range(longest):
        drawn = _draw(logits, generator)
        drawn = torch.where(alive, drawn, end)
        tokens.append(drawn)
        masks.append(alive.long())
        alive = alive & (drawn != end)
        if not alive.any() or len(tokens) == longest:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = _forward(model, drawn[:, None].to(model.device), mask, cache)
    return Rollouts(
        prompt_ids, prompt_mask,
        torch.stack(tokens, dim=1).to(model.device), torch.stack(masks, dim=1).to(model.device), group,
    )  # fmt: skip


def logps(model: PreTrainedModel, rollouts: Rollouts) -> Tensor:
    """The log-probability of each token of the answers, (n, t) in nats, with its graph; padding holds noise.

    Each prompt is read once for its whole group: its keys and values are repeated, and the gradient flows through them.
    """
    ids, mask = rollouts.prompt_ids[:: rollouts.group], rollouts.prompt_mask[:: rollouts.group]
    cache = DynamicCache(config=model.config)
    first = _forward(model, ids, mask, cache).repeat_interleave(rollouts.group, dim=0)
    cache.batch_repeat_interleave(rollouts.group)
    seen = torch.cat([rollouts.prompt_mask, rollouts.completion_mask[:, :-1]], dim=1)
    later = first.new_empty(len(rollouts), 0, first.shape[-1])
    if rollouts.completion_ids.shape[1] > 1:
        later = _forward(model, rollouts.completion_ids[:, :-1], seen, cache, every=True)
    logits = torch.cat([first[:, None], later], dim=1).float()
    targets = rollouts.completion_ids
    return -cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row, (n, v) -> (n,), by inverting the cumulative distribution: a random number a row is enough."""
    cumulative = logits.double().cpu().softmax(dim=-1).cumsum(dim=-1)
    at = torch.rand(len(cumulative), 1, generator=generator, dtype=torch.float64) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True)[:, 0].clamp(max=cumulative.shape[1] - 1)


def _forward(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache, *, every: bool = False) -> Tensor:
    """The logits after the last token, (n, v), or after `every` one, (n, t, v); the cache grows by the tokens given."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    output = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
        logits_to_keep=0 if every else 1,
    )  # fmt: skip
    return output.logits if every else output.logits[:, -1]
