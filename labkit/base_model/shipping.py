"""From a checkpoint to the shipped folder: the stock files of transformers, and the history of the run."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .loading import quiet
from .model import new

RARE = 1e-5


def redraw_rare(embedding: Tensor, counts: Tensor) -> None:
    """Redraw, in place, the rows (v, d) of tokens that training met (counts (v,)) less than once in 100,000 tokens.

    Most of them are inner steps of BPE merges. Tied embeddings push a token that hardly ever occurs away from every
    context: all such tokens to one point, where finetuning could not tell them apart. They get fresh draws from the
    normal distribution with the mean and covariance of the other rows (Hewitt, Initializing new word embeddings for
    pretrained language models, 2021).
    """
    rare = counts.to(embedding.device) < RARE * counts.sum().item()
    common = embedding[~rare].double()
    mean, spread = common.mean(0), torch.cov(common.T)
    root = torch.linalg.cholesky(spread + 1e-6 * torch.eye(len(spread), dtype=spread.dtype, device=spread.device))
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = mean + noise.to(root.device) @ root.T
    embedding[rare] = drawn[rare].to(embedding.dtype)


def ship(state: dict[str, Any], tokenizer: PreTrainedTokenizerFast, folder: Path) -> LlamaForCausalLM:
    """Write config.json, model.safetensors, the tokenizer's files, history.json and run.json into the folder; returns
    the model."""
    model = new(tokenizer)
    model.load_state_dict(state["model"])
    redraw_rare(model.get_input_embeddings().weight.data, state["counts"])
    if not math.isfinite(sum(p.sum().item() for p in model.parameters())):
        raise ValueError("the checkpoint holds numbers that are not finite; train again with a lower rate")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "history.json").write_text(json.dumps(state["history"], indent=1) + "\n")
    run = {name: state[name] for name in ("step", "fall", "tokens", "seconds", "machines")}
    (folder / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    return model.eval()
