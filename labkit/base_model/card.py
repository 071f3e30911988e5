"""The model card and the curve of a run: `python -m labkit.base_model.card` evaluates the shipped model and writes
both.

What it writes comes from measurements only: `history.json` and `run.json` of the training run, `evaluation.json` of the
evaluations.
"""

import json
import platform
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from transformers import PreTrainedModel

from .data import PHASES, SHARD_DOCUMENTS
from .evaluate import QUESTIONS, SEEDS, Quantity, evaluate
from .loading import SHIPPED, load
from .train import ADAM_RATE, MUON_RATE

TARGETS = {
    "loss above the floor": ("at most", 0.05),
    "closed-book exact match": ("at most", 0.05),
    "one gold passage after SFT": ("at least", 0.97),
    "gold among four after SFT": ("at least", 0.90),
    "triage of the base": ("at most", 0.05),
    "triage after LoRA": ("at least", 0.95),
    "share of parameters trained": ("at most", 0.03),
    "tokens a second, one core": ("at least", 150.0),
}
SHARES = ("loss above", "closed", "passage", "among", "triage", "share of")


def is_share(name: str) -> bool:
    """Whether the quantity is written in per cent."""
    return any(s in name for s in SHARES)


def written(name: str, value: float) -> str:
    """A number with the digits it deserves."""
    if name.startswith("tokens a second") or name.startswith("seconds"):
        return f"{value:.0f}"
    return f"{value:.1%}" if is_share(name) else f"{value:.4f}"


def interval_of(quantity: Quantity) -> str:
    """The interval as the card writes it; of a share, what of it lies between 0 and 1."""
    if quantity.low is None or quantity.high is None:
        return "one seed only"
    low, high = quantity.low, quantity.high
    if is_share(quantity.name):
        low, high = max(0.0, low), min(1.0, high)
    return f"{written(quantity.name, low)} to {written(quantity.name, high)}"


def verdict(quantity: Quantity) -> str:
    """Whether the mean over the seeds meets its target, and the target."""
    if quantity.name not in TARGETS:
        return "|"
    sense, bound = TARGETS[quantity.name]
    met = quantity.mean <= bound if sense == "at most" else quantity.mean >= bound
    return f"{sense} {written(quantity.name, bound)} | {'yes' if met else '**no**'}"


def draw_curve(history: list[dict[str, Any]], path: Path) -> None:
    """Two panels over tokens: the validation loss with the floor, and copying."""
    tokens = [row["tokens"] / 1e6 for row in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(tokens, [row["validation"] for row in history], color="#0067c2")
    left.axhline(history[-1]["floor"], color="#555555", linestyle="--")
    left.annotate("entropy of the generator", (tokens[-1], history[-1]["floor"]), ha="right", va="bottom")
    left.set(xlabel="training tokens (millions)", ylabel="validation loss (nats a token)", yscale="log")
    for passages, colour in ((1, "#0067c2"), (2, "#b85c00"), (4, "#4b7f1f")):
        right.plot(tokens, [row[f"copying_{passages}"] for row in history], color=colour, label=f"{passages}")
    right.legend(title="passages in context", frameon=False)
    right.set(xlabel="training tokens (millions)", ylabel="answers read exactly, no finetuning", ylim=(0, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def card(found: list[Quantity], run: dict[str, Any], model: PreTrainedModel, size: int) -> str:
    """The model card's text; `run` is run.json, `size` that of model.safetensors in bytes."""
    config = model.config
    rows = []
    for q in found:
        seeds = ", ".join(written(q.name, v) for v in q.values)
        rows.append(f"| {q.name} | {written(q.name, q.mean)} | {interval_of(q)} | {seeds} | {verdict(q)} |")
    phases = "; ".join(
        f"{p.stage.name} mix, batches of {p.tokens:,} tokens, "
        + ("to the end" if p.shards is None else f"{p.shards * SHARD_DOCUMENTS:,} documents")
        for p in PHASES
    )
    return "\n".join(
        [
            "---",
            "license: bsd-3-clause",
            "library_name: transformers",
            "---",
            "# The base model of the laboratory",
            "",
            "A small Llama that has read only a synthetic world: fluent in its language, able to read values from its",
            "context, ignorant of every lesson's facts and of the triage format. `labkit.base_model.load()` loads it.",
            "Written by `python -m labkit.base_model.card`; docs/laboratory.md says why, and what does not transfer.",
            "",
            f"- Architecture: {config.num_hidden_layers} layers of width {config.hidden_size}, "
            f"{config.num_attention_heads} heads over {config.num_key_value_heads} key-value heads, feed-forward "
            f"{config.intermediate_size}, vocabulary {config.vocab_size}, tied embeddings: "
            f"{model.num_parameters():,} parameters, {size / 1e6:.1f} MB.",
            f"- Data: {run['tokens']:,} tokens of the stream, no document twice: {phases}.",
            f"- Optimiser: Muon (rate {MUON_RATE}) and AdamW (rate {ADAM_RATE}), {run['step']:,} steps; over the last "
            f"{run['fall']:,} the rates fall linearly to 0.",
            f"- Machine: {', then '.join(run['machines'])}, shared with other work or not: {run['seconds'] / 60:.0f} "
            f"minutes in all ({run['tokens'] / run['seconds']:,.0f} tokens a second).",
            f"- Evaluated with torch {torch.__version__} on {platform.machine()}, {torch.get_num_threads()} threads.",
            "",
            "## Measured",
            "",
            f"Worlds {', '.join(map(str, SEEDS))}; at most {QUESTIONS} questions or tickets each; 95 % intervals of",
            "Student's t over the seeds. A target is met when the mean is.",
            "",
            "| quantity | mean | interval | each seed | target | met |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "![validation loss and copying over training](curve.png)",
            "",
            "## Limits",
            "",
            "It knows a grammar of templates, not English. It was trained once, from one seed. Its scores are no",
            "evidence about any other model; only comparisons made with it are of interest.",
            "",
        ]
    )


def main() -> None:
    """Evaluate the shipped model; write evaluation.json, curve.png and README.md beside it."""
    model, tokenizer = load("shipped")
    history = json.loads((SHIPPED / "history.json").read_text())
    found = []
    for q in evaluate(model, tokenizer):
        found.append(q)
        print(f"{q.name:36} {written(q.name, q.mean):>9}   {[written(q.name, v) for v in q.values]}", flush=True)
    (SHIPPED / "evaluation.json").write_text(json.dumps([vars(q) for q in found], indent=1) + "\n")
    draw_curve(history, SHIPPED / "curve.png")
    size = (SHIPPED / "model.safetensors").stat().st_size
    run = json.loads((SHIPPED / "run.json").read_text())
    (SHIPPED / "README.md").write_text(card(found, run, model, size))


if __name__ == "__main__":
    main()
