"""How much of this machine's matrix products does pretraining reach? `python benchmarks/training_throughput.py`

In one run, on the same threads: the speed of the matrix products of the model's own shapes, the speed of whole
training steps, and the speed at which one process makes data. The first two give a ratio that does not depend on the
machine's clock.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from labkit import base_model
from labkit.base_model.data import PHASES, shard
from labkit.base_model.model import new
from labkit.base_model.optimizer import optimizers
from labkit.base_model.train import ADAM_RATE, MUON_RATE, train_step


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """The median time of the work, after one round that does not count."""
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    """Print the three speeds and the ratio."""
    parser = argparse.ArgumentParser(description="Training speed as a share of the matrix products of the same shapes.")
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    _, tokenizer = base_model.load("shipped")
    torch.manual_seed(0)
    model = new(tokenizer)
    opts = optimizers(model, MUON_RATE, ADAM_RATE)

    started = time.perf_counter()
    batches = shard(tokenizer, PHASES[-1], 0)
    made = sum(b.size for b in batches) / (time.perf_counter() - started)
    batch = sorted(batches, key=lambda b: b.size)[len(batches) // 2]
    tokens = batch.size

    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim == 2]
    inputs = {n: torch.randn(tokens, n) for n in {s[1] for s in shapes} | {s[0] for s in shapes}}
    weights = [torch.randn(s) for s in shapes]

    def products() -> None:
        """The forward product of every matrix and the two of its backward pass."""
        for weight in weights:
            x, y = inputs[weight.shape[1]], inputs[weight.shape[0]]
            _ = x @ weight.T, y @ weight, y.T @ x

    def step() -> None:
        train_step(model, batch, tokenizer.pad_token_id, bf16=False)
        for opt in opts:
            opt.step()
            opt.zero_grad()

    bound, whole = median_seconds(products, repeats), median_seconds(step, repeats)
    flops = 6 * tokens * sum(a * b for a, b in shapes)
    print(f"threads                          {torch.get_num_threads()}")
    print(f"matrix products of these shapes  {flops / bound / 1e9:8.1f} GFLOP/s")
    print(f"training step, all of it         {flops / whole / 1e9:8.1f} GFLOP/s")
    print(f"share reached                    {bound / whole:8.1%}")
    print(f"training                         {tokens / whole:8.0f} tokens/s")
    print(f"making data, one process         {made:8.0f} tokens/s")


if __name__ == "__main__":
    main()
