"""Pretrain the base model: `python -m labkit.base_model.train`.

The learning rate warms up and falls linearly to zero. With `--fall` it stays until the last steps (warm-up, stable,
decay: Hu et al., MiniCPM, 2024, section 4), so that a longer run repeats a shorter one until that decays: the
checkpoint `plateau.pt`, kept when the fall begins, continues with a larger `--steps`. A run can be killed at any time
and started again; it goes on from the last checkpoint and ends with the same weights as a run that was never killed.
"""

import argparse
import json
import os
import platform
import time
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from labkit.world.triage import ACTIONS, CATEGORIES, URGENCIES

from .data import PHASES, Cursor, Phase, batches
from .model import new
from .optimizer import optimizers
from .probe import IGNORED, copying, likeness, paired, validation
from .shipping import redraw_rare, ship
from .tokenizer import train_tokenizer

LABELS = (*CATEGORIES, *URGENCIES, *ACTIONS)
WARM_UP = 100
MUON_RATE, ADAM_RATE = 0.005, 1e-3
ROWS, APART = 256, 0.01


def rate(step: int, steps: int, fall: int) -> float:
    """The learning rate's factor at a step: linear warm-up, constant, linear fall to 0 over the last `fall` steps."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / fall)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def train_step(model: LlamaForCausalLM, batch: np.ndarray, pad: int, *, bf16: bool) -> float:
    """One forward and backward pass; returns the mean loss in nats a token."""
    inputs = torch.from_numpy(batch.astype(np.int64)).to(model.device)
    labels = inputs.masked_fill(inputs == pad, IGNORED)[:, 1:]
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
    loss.backward()
    return loss.item()


def keep_apart(embedding: nn.Parameter, step: int) -> None:
    """Add to the gradient what pushes some rows of the embedding, drawn by the step, away from each other.

    What all rows share does not count. The penalty is the sum of a row's squared cosines with the others, in the mean
    over the rows (Gao et al., Representation degeneration problem in training natural language generation models,
    2019, section 5).
    """
    drawn = torch.randperm(len(embedding), generator=torch.Generator().manual_seed(step))[:ROWS]
    unit = nn.functional.normalize(embedding[drawn] - embedding.mean(dim=0), dim=-1)
    (APART * (unit @ unit.T).square().sum() / len(unit)).backward()


def machine(device: str) -> str:
    """What the run computes on, for the model card."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, bfloat16"
    return f"{torch.get_num_threads()} threads of an {platform.machine()} CPU, float32"


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """The watched quantities."""
    model.eval()
    loss = validation(model, tokenizer, 128)
    seen = {"validation": loss.model, "floor": loss.floor, "excess": loss.excess}
    seen |= {f"copying_{k}": copying(model, tokenizer, k, questions=64) for k in (1, 2, 4)}
    seen |= {"pairs": paired(model, tokenizer, 4, questions=64), "labels": likeness(model, tokenizer, LABELS)}
    model.train()
    return seen


def train(
    folder: Path,
    *,
    steps: int,
    fall: int,
    device: str,
    every: int,
    workers: int,
    phases: tuple[Phase, ...] = PHASES,
) -> dict[str, Any]:
    """Train to `steps` steps, or go on from the folder's checkpoint; returns the final checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").exists():
        train_tokenizer().save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    torch.manual_seed(0)
    model = new(tokenizer).to(device)
    opts = optimizers(model, MUON_RATE, ADAM_RATE)
    peaks = [opt.param_groups[0]["lr"] for opt in opts]
    state: dict[str, Any] = {
        "step": 0,
        "tokens": 0,
        "seconds": 0.0,
        "history": [],
        "cursor": (0, 0, 0),
        "counts": torch.zeros(len(tokenizer)),
        "machines": [],
    }
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        state |= torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
    if machine(device) not in state["machines"]:
        state["machines"].append(machine(device))
    state["fall"] = fall
    started = time.perf_counter() - state["seconds"]

    def snapshot() -> dict[str, Any]:
        return state | {
            "model": model.state_dict(),
            "optimizers": [opt.state_dict() for opt in opts],
            "seconds": time.perf_counter() - started,
        }

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    losses: list[float] = []
    data = batches(tokenizer, Cursor(*state["cursor"]), phases, workers=workers)
    with Progress(*columns) as progress:
        task = progress.add_task("pretraining", total=steps, completed=state["step"])
        for step in range(state["step"], steps):
            if step == steps - fall:
                save(folder / "plateau.pt", snapshot())
            factor = rate(step, steps, fall)
            for opt, peak in zip(opts, peaks, strict=True):
                for group in opt.param_groups:
                    group["lr"] = peak * factor
            batch, cursor = next(data)
            if cursor.phase != state["cursor"][0]:
                redraw_rare(model.get_input_embeddings().weight.data, state["counts"])
            losses.append(train_step(model, batch, tokenizer.pad_token_id, bf16=device.startswith("cuda")))
            keep_apart(model.get_input_embeddings().weight, step)
            for opt in opts:
                opt.step()
                opt.zero_grad()
            met = batch[batch != tokenizer.pad_token_id]
            state["counts"] += torch.from_numpy(np.bincount(met, minlength=len(tokenizer)))
            state["tokens"] += met.size
            state["step"], state["cursor"] = step + 1, astuple(cursor)
            progress.update(task, completed=step + 1, description=f"loss {losses[-1]:.3f}")
            if (step + 1) % every == 0 or step + 1 == steps:
                seconds = time.perf_counter() - started
                row = {
                    "step": step + 1,
                    "tokens": state["tokens"],
                    "seconds": seconds,
                    "loss": sum(losses) / len(losses),
                }
                state["history"].append(row | measure(model, tokenizer))
                losses = []
                save(checkpoint, snapshot())
                (folder / "history.json").write_text(json.dumps(state["history"], indent=1))
    data.close()
    return snapshot()


def main() -> None:
    """Train, then write the model where --ship says."""
    parser = argparse.ArgumentParser(description="Pretrain the base model; run again to go on after an interruption.")
    parser.add_argument("--folder", type=Path, default=Path(".course/pretraining"), help="checkpoints and history")
    parser.add_argument("--steps", type=int, default=31_000, help="optimiser steps")
    parser.add_argument("--fall", type=int, help="last steps, over which the rate falls to 0 (default: all of them)")
    parser.add_argument("--every", type=int, default=250, help="steps between measurements and checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that make data ahead; 8 or more for a GPU")
    parser.add_argument(
        "--ship", type=Path, help="write the final model to this folder (the card: python -m labkit.base_model.card)"
    )
    options = parser.parse_args()
    fall = options.steps if options.fall is None else options.fall
    state = train(
        options.folder,
        steps=options.steps,
        fall=fall,
        device=options.device,
        every=options.every,
        workers=options.workers,
    )
    if options.ship:
        ship(state, PreTrainedTokenizerFast.from_pretrained(options.folder), options.ship)


if __name__ == "__main__":
    main()
