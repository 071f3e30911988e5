"""Load the shipped model, a local folder or a model of the Hub, with an error that says what to do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

SHIPPED = Path(__file__).parent / "shipped"


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers, which for a small model are noise."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load(
    model_id: str | Path = "shipped", *, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return (model in eval mode and float32, tokenizer) of "shipped", a local folder, or an id of the Hub.

    Raises OSError when there is no such model here and the Hub can't be asked or has none; the message says what to do.
    """
    source = SHIPPED if str(model_id) == "shipped" else model_id
    if not Path(source).is_dir() and (isinstance(source, Path) or str(source).startswith((".", "/", "~"))):
        raise OSError(f'there is no folder {str(source)!r}; give a folder that holds config.json, or "shipped"')
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise OSError(_advice(str(source))) from error
    return model.to(device).eval(), tokenizer


def _advice(source: str) -> str:
    """What to do when a model can't be loaded."""
    if Path(source).is_dir():
        return (
            f"the folder {source!r} holds no model that transformers can load; "
            "it needs config.json, model.safetensors and tokenizer.json"
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    why = (
        "HF_HUB_OFFLINE is set, so only models already downloaded can be used"
        if offline
        else ("the Hub has no such model, it needs a login, or there is no network")
    )
    return (
        f"cannot load the model {source!r}: {why}. "
        f'Use "shipped" for the model that comes with this course; give the path of a local folder; '
        f"or, with a network, run `hf download {source}` first"
    )
