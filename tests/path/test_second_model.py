"""`model_id` is real: lessons run on another architecture than the shipped one, from a local folder as from the Hub."""

import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from autograde.course import Course, number
from labkit import base_model

from .conftest import course_command

SOURCES = Course(Path(__file__).resolve().parents[2]).sources()
PARAMETERS = {
    source: re.search(r'^# %% tags=\["parameters"\]\n(.*?)^# %%', source.read_text(), re.M | re.S) for source in SOURCES
}
LESSONS = [source for source, cell in PARAMETERS.items() if cell and "model_id =" in cell[1]]


@pytest.fixture(scope="session")
def second_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Qwen3 of two layers with the shipped tokenizer, saved as a Hub snapshot would lie on disk."""
    _, tokenizer = base_model.load("shipped")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen3"
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_there_is_a_lesson_to_try() -> None:
    assert LESSONS


@pytest.mark.parametrize("source", LESSONS, ids=lambda source: source.stem)
def test_lesson_runs_on_a_second_architecture(course_copy: Course, second_model: Path, source: Path) -> None:
    done = course_command(course_copy, "run", number(source), "--quick", "-p", "model_id", str(second_model))
    assert done.returncode == 0, done.stdout + done.stderr
