"""Arithmetic for docs/production.md: what one replica holds, and how many replicas a load needs. Nothing is measured.

`python docs/production/sizing.py` prints the table's numbers.
"""

import math
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Model:
    """The public configuration of a decoder-only model with grouped-query attention and a gated MLP."""

    vocabulary: int
    width: int
    mlp_width: int
    layers: int
    query_heads: int
    kv_heads: int
    head_width: int
    bytes_per_number: int = 2

    def linear_shapes(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one block."""
        query, kv = self.query_heads * self.head_width, self.kv_heads * self.head_width
        attention = [(self.width, query), (self.width, kv), (self.width, kv), (query, self.width)]
        return [*attention, (self.width, self.mlp_width), (self.width, self.mlp_width), (self.mlp_width, self.width)]

    def block_parameters(self) -> int:
        """Weights of all blocks: linear layers, two norms, and the norms of queries and keys."""
        linear = sum(inputs * outputs for inputs, outputs in self.linear_shapes())
        return self.layers * (linear + 2 * self.width + 2 * self.head_width)

    def parameters(self) -> int:
        """All weights; the output head is the embedding."""
        return self.block_parameters() + self.width + self.vocabulary * self.width

    def adapter_parameters(self, rank: int) -> int:
        """LoRA on every linear layer of every block: rank x (inputs + outputs) each."""
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in self.linear_shapes())

    def kv_bytes(self) -> int:
        """Bytes of the KV cache for one token: a key and a value, for each layer and KV head."""
        return 2 * self.layers * self.kv_heads * self.head_width * self.bytes_per_number


@dataclass(frozen=True)
class Card:
    """What the arithmetic needs of a GPU."""

    usable_gib: float
    bandwidth: float
    """Bytes a second."""
    flops: float
    """Dense 16-bit operations a second."""


@dataclass(frozen=True)
class Load:
    """Requests at the peak."""

    rate: float
    """Requests a second."""
    prompt: int
    answer: int
    """Tokens."""


QWEN3_06B = Model(151_936, 1_024, 3_072, 28, 16, 8, 128)
L4 = Card(usable_gib=22.0, bandwidth=300e9, flops=121e12)
PEAK = Load(rate=40, prompt=500, answer=60)
RANK, ADAPTERS, SEQUENCES = 16, 2, 64
SHARE, OVERHEAD_GIB = 0.90, 1.5
"""What vLLM may take, and an assumption for activations and CUDA graphs: read the real one off its log."""
BUSY, EFFICIENCY = 0.7, 0.4
"""Assumptions: how full a replica may be on average, and which share of the card's peak prefill reaches."""


def sizing() -> dict[str, float]:
    """Every number of the table, by name."""
    model, card, load = QWEN3_06B, L4, PEAK
    weights = model.parameters() * model.bytes_per_number
    adapter = model.adapter_parameters(RANK) * model.bytes_per_number
    cache = SHARE * card.usable_gib * GIB - weights - ADAPTERS * adapter - OVERHEAD_GIB * GIB
    tokens = cache / model.kv_bytes()
    length = load.prompt + load.answer
    step = (weights + SEQUENCES * length * model.kv_bytes()) / card.bandwidth
    prefill = 2 * model.block_parameters() * load.prompt / (EFFICIENCY * card.flops)
    work = prefill + load.answer * step / SEQUENCES
    busy = math.ceil(load.rate * work / BUSY)
    rate = load.rate / busy
    seconds = prefill + load.answer * step / (1 - rate * prefill)
    return {
        "parameters": model.parameters(),
        "weights_gib": weights / GIB,
        "adapter_parameters": model.adapter_parameters(RANK),
        "adapter_mib": adapter / 2**20,
        "kv_bytes": model.kv_bytes(),
        "cache_gib": cache / GIB,
        "cache_tokens": tokens,
        "cache_requests": tokens / length,
        "step_ms": 1e3 * step,
        "tokens_per_s": SEQUENCES / step,
        "prefill_ms": 1e3 * prefill,
        "work_ms": 1e3 * work,
        "requests_per_s": 1 / work,
        "busy_replicas": busy,
        "replicas": busy + 1,
        "seconds": seconds,
        "in_flight": rate * seconds,
    }


if __name__ == "__main__":
    for name, value in sizing().items():
        print(f"{name:20} {value:,.4g}" if value < 1e4 else f"{name:20} {value:,.0f}")
