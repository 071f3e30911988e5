"""Releases of the triage service: what may differ between two of them, and the service that answers with any.

A release is a message's preparation, the chat template, the weights and how they are put together. Everything that a
release changes is undone after it has answered, so one model in memory serves all of them.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit import assistant, triage
from labkit.adapters import merged, teach
from labkit.base_model.finetune import Pair
from labkit.world import Ticket, Triage

_LONGEST = Triage("Quinandisabonadix", "delivery", "normal", "replace")
"""An answer as long as any right one, which says where an endless answer is cut."""


def one_line(text: str) -> str:
    """The text with single blanks in place of line breaks, tabs and runs of blanks, as in all tickets of a world."""
    return " ".join(text.split())


def as_it_is(text: str) -> str:
    """The text itself."""
    return text


@dataclass(frozen=True)
class Release:
    """What the service answers with. The defaults are the champion: the shipped adapter, merged into the weights.

    `template` maps the chat template to the one in use; `adapter` holds weights of the adapter by name; `weights` maps
    a parameter's name and value to the value in use, for the adapter ("lora_" in the name) and the base model alike.
    """

    prepare: Callable[[str], str] = one_line
    template: Callable[[str], str] = as_it_is
    adapter: Mapping[str, Tensor] | None = None
    weights: Callable[[str, Tensor], Tensor] | None = None
    merge: bool = True


class Service:
    """The shipped assistant's triage, which answers with any release."""

    def __init__(self) -> None:
        self.policy, self.tokenizer = assistant.load()
        mine = {name: weight for name, weight in self.policy.named_parameters() if ".handbook." not in name}
        self._weights = mine
        self._shipped = {name: weight.detach().clone() for name, weight in mine.items()}

    def answer(self, release: Release, texts: Sequence[str]) -> list[Triage | None]:
        """The triage of each message; None where the model's answer is none."""
        tickets = [Ticket(str(place), release.prepare(text), _LONGEST) for place, text in enumerate(texts)]
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.chat_template = release.template(str(self.tokenizer.chat_template))
        with self._installed(release):
            replies = triage.answers(self.policy, tokenizer, tickets)
        return [_parsed(reply) for reply in replies]

    def retrain(self, tickets: Sequence[Ticket], *, rate: float) -> dict[str, Tensor]:
        """The shipped adapter's weights after one more pass over these tickets."""
        adapter = [name for name in self._weights if "lora_" in name]
        try:
            for name in adapter:
                self._weights[name].requires_grad_()
            pairs = [Pair(ticket.text, ticket.triage.to_json()) for ticket in tickets]
            teach(self.policy, self.tokenizer, pairs, rate=rate)
            return {name: self._weights[name].detach().clone() for name in adapter}
        finally:
            for name in adapter:
                self._weights[name].requires_grad_(False)
                self._weights[name].grad = None
            self._restore()

    @contextmanager
    def _installed(self, release: Release) -> Iterator[None]:
        changed = dict(self._shipped) | dict(release.adapter or {})
        if release.weights is not None:
            changed = {name: release.weights(name, weight) for name, weight in changed.items()}
        try:
            with torch.no_grad():
                for name, weight in changed.items():
                    self._weights[name].copy_(weight)
            with merged(self.policy) if release.merge else nullcontext():
                yield
        finally:
            self._restore()

    def _restore(self) -> None:
        with torch.no_grad():
            for name, weight in self._shipped.items():
                self._weights[name].copy_(weight)


def rounded(weight: Tensor, bits: int, *, rows: bool) -> Tensor:
    """The weight on a grid of 2**bits - 1 values, symmetric about 0: one scale a row, or one for the whole matrix."""
    most = 2 ** (bits - 1) - 1
    size = weight.abs().amax(-1, keepdim=True) if rows else weight.abs().max()
    scale = size.clamp_min(torch.finfo(weight.dtype).tiny) / most
    return (weight / scale).round() * scale


def _parsed(reply: str) -> Triage | None:
    try:
        return Triage.parse(reply)
    except ValueError:
        return None
