"""Random choices that know how surprising they were.

A `Draw` makes every choice of a derivation and adds up its surprisal, `-log p(choice | earlier choices)`, in nats.
The sum over one document is the exact negative log-probability of its *derivation*. Its mean is the entropy of
derivations, H(D). A text is a function of its derivation, so H(text) = H(D) - H(D | text) <= H(D): the number is the
exact entropy of the derivations and an upper bound of the entropy of the texts, tight where a text has one derivation
only (Cover and Thomas, Elements of Information Theory, 2006, chapter 2).

Only `random.Random.random` is used, whose sequence Python promises to keep for a given seed; seeds are strings.
"""

import math
import random
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """A seeded source of choices; `nats` is the surprisal of all choices so far."""

    def __init__(self, *key: int | str) -> None:
        self._random = random.Random("/".join(str(part) for part in key)).random
        self.nats = 0.0

    def below(self, n: int) -> int:
        """A uniform integer in [0, n); costs log(n) nats."""
        if n < 1:
            raise ValueError(f"cannot draw from {n} options; give at least one")
        self.nats += math.log(n)
        return int(self._random() * n)

    def between(self, low: int, high: int) -> int:
        """A uniform integer in [low, high]."""
        return low + self.below(high - low + 1)

    def chance(self, p: float) -> bool:
        """True with probability p (0 < p < 1)."""
        hit = self._random() < p
        self.nats -= math.log(p if hit else 1 - p)
        return hit

    def pick(self, options: Sequence[T]) -> T:
        """One option, all equally likely."""
        return options[self.below(len(options))]

    def weighted(self, options: Sequence[tuple[T, float]]) -> T:
        """One option of (option, weight) pairs, likely in proportion to its weight."""
        total = sum(weight for _, weight in options)
        point = self._random() * total
        bounds = accumulate(weight for _, weight in options)
        i = next((i for i, bound in enumerate(bounds) if point < bound), len(options) - 1)
        option, weight = options[i]
        self.nats -= math.log(weight / total)
        return option

    def order(self, options: Sequence[T], k: int | None = None) -> list[T]:
        """k of the options in random order, without replacement; all of them by default."""
        rest = list(options)
        return [rest.pop(self.below(len(rest))) for _ in range(len(rest) if k is None else k)]
