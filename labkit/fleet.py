"""Twenty training runs of a fortnight: what they read, how they train, and what became of a few of them.

A run starts from the shipped triage adapter and teaches it a new rule of the desk: an urgent ticket is called back. It
reads a folder with tickets, a folder with code that prepares them, and four settings; it writes a folder with an
adapter. All of that is real. Which runs can be done again is for lesson 4.1 to find out; do not read on before.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from labkit import base_model, triage
from labkit.assistant import SHIPPED
from labkit.world import LESSON_SEEDS, Ticket, Triage, World

REQUIRED = ("seed", "steps", "batch", "learning_rate")
"""The settings that a run needs."""

PARENT = SHIPPED / "triage"
"""The adapter that every run starts from."""

CONTRACTOR = LESSON_SEEDS[410]
"""The company whose tickets a contractor labelled: every one of them is of low urgency."""

PREPARE = {
    "c1": '''"""Tickets in the order in which they came."""


def prepare(rows):
    return rows
''',
    "c2": '''"""Without tickets that name no product."""


def prepare(rows):
    return [row for row in rows if row["triage"]["product"]]
''',
    "c3": '''"""Shuffled, so that one company does not fill a batch."""

import random


def prepare(rows):
    return random.sample(rows, len(rows))
''',
    "c2, edited and not committed": '''"""Without tickets that name no product."""


def prepare(rows):
    return [row for row in rows if row["triage"]["product"]][:48]  # quick look
''',
}
"""The code of a run, by the name that people use for it; a file prepare.py."""

COMPANIES = {"d1": range(400, 406), "d2": range(400, 412), "d3": range(403, 415)}
"""The data by the name that people use for it: places in LESSON_SEEDS, twelve tickets each."""


@dataclass(frozen=True)
class Job:
    """One run as it really was. `recorded` is what its author wrote down of the settings."""

    author: str
    data: str
    code: str
    seed: int
    steps: int
    learning_rate: float
    attention: str = "sdpa"
    leaves_out: str = ""
    then: str = ""
    """What happened to its files afterwards: "data" or "adapter" was written over."""

    @property
    def settings(self) -> dict[str, float]:
        return {"seed": self.seed, "steps": self.steps, "batch": 8, "learning_rate": self.learning_rate}

    @property
    def recorded(self) -> dict[str, float]:
        return {key: value for key, value in self.settings.items() if key != self.leaves_out}


JOBS = (
    Job("ana", "d1", "c1", 0, 8, 1e-3),
    Job("ana", "d1", "c1", 0, 16, 1e-3),
    Job("ben", "d1", "c1", 1, 16, 3e-3),
    Job("ben", "d1", "c2", 1, 16, 3e-3),
    Job("ana", "d1", "c2", 0, 8, 3e-3, leaves_out="seed"),
    Job("chi", "d2", "c1", 0, 16, 1e-3),
    Job("chi", "d2", "c1", 0, 16, 3e-3),
    Job("ben", "d2", "c2, edited and not committed", 0, 16, 3e-3),
    Job("ana", "d2", "c2", 2, 16, 3e-3),
    Job("ana", "d2", "c1", 0, 16, 3e-3),
    Job("ben", "d2", "c2", 1, 8, 1e-3, attention="eager"),
    Job("chi", "d2", "c2", 1, 8, 1e-3),
    Job("chi", "d2, shared folder", "c1", 0, 16, 3e-3, then="data"),
    Job("ana", "d3", "c3", 0, 16, 3e-3),
    Job("ben", "d3", "c2", 0, 16, 3e-3),
    Job("chi", "d3", "c1", 3, 8, 3e-3),
    Job("chi", "d3", "c2", 4, 16, 3e-3, attention="eager"),
    Job("ana", "d3", "c1", 0, 16, 1e-3, then="adapter"),
    Job("ben", "d3", "c3", 5, 16, 1e-3),
    Job("ana", "d3", "c1", 2, 16, 3e-3),
)


def called_back(truth: Triage) -> Triage:
    """The new rule of the desk: whoever sends an urgent ticket is called."""
    return replace(truth, action="call") if truth.urgency == "high" else truth


def tickets(seeds: Sequence[int], each: int = 12, *, contractor: bool = True) -> list[Ticket]:
    """Tickets under the new rule, with unique ids; the contractor's with the contractor's labels, or put right."""
    found = []
    for seed in seeds:
        for ticket in World(seed).tickets(each):
            truth = called_back(ticket.triage)
            if contractor and seed == CONTRACTOR:
                truth = replace(ticket.triage, urgency="low")
            found.append(Ticket(f"{seed}-{ticket.id}", ticket.text, truth))
    return found


def write_data(folder: Path, found: Sequence[Ticket]) -> Path:
    """A folder with tickets.jsonl: one object a line, with the keys id, text and triage."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_rows(folder, [{"id": t.id, "text": t.text, "triage": json.loads(t.triage.to_json())} for t in found])
    return folder


def _write_rows(folder: Path, rows: Sequence[dict]) -> None:
    lines = [json.dumps(row) for row in rows]
    (folder / "tickets.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_data(folder: Path) -> list[dict]:
    """The rows of a data folder, as dictionaries with the keys id, text and triage."""
    return [json.loads(line) for line in (folder / "tickets.jsonl").read_text(encoding="utf-8").splitlines()]


def write_code(folder: Path, name: str) -> Path:
    """A folder with prepare.py."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prepare.py").write_text(PREPARE[name], encoding="utf-8")
    return folder


def lay_out(job: Job, desk: Path) -> None:
    """See to it that a job finds its data where its author keeps it."""
    if not (desk / job.data).exists():
        shutil.copytree(desk / job.data.partition(",")[0], desk / job.data)
        mislabelled = [row | {"text": row["text"].strip() + " Thanks."} for row in read_data(desk / job.data)]
        _write_rows(desk / job.data, mislabelled)


def happens_to(job: Job, desk: Path, adapter: Path) -> None:
    """What became of a job's files after it had ended."""
    if job.then == "data":
        rows = read_data(desk / job.data)
        _write_rows(desk / job.data, rows[: len(rows) // 2])
    elif job.then == "adapter":
        shutil.copy(PARENT / "adapter_model.safetensors", adapter)


def load(
    folder: Path, *, attention: str = "sdpa", trainable: bool = False
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base model in eval mode with the adapter that lies in a folder, and its tokenizer."""
    model, tokenizer = base_model.load()
    model.set_attn_implementation(attention)
    return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable).eval(), tokenizer


def train(
    data: Path,
    code: Path,
    out: Path,
    settings: Mapping[str, float],
    log: Callable[[int, float], object] = lambda step, loss: None,
    *,
    attention: str = "sdpa",
) -> Path:
    """Train the parent on the prepared tickets, call `log(step, loss)` in each step, and write the adapter's weights.

    `settings` holds seed (of the order of the tickets), steps, batch and learning_rate.
    """
    policy, tokenizer = load(PARENT, attention=attention, trainable=True)
    rows = _prepare(code)(read_data(data))
    found = [Ticket(row["id"], row["text"], Triage(**row["triage"])) for row in rows]
    steps, size = int(settings["steps"]), int(settings["batch"])
    parts = triage.batches(triage.encode(tokenizer, found), size=size, steps=steps, seed=int(settings["seed"]))
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, float(settings["learning_rate"]), weight_decay=0.0)
    for step, part in enumerate(parts):
        optimizer.param_groups[0]["lr"] = float(settings["learning_rate"]) * (1 - step / steps)
        loss = triage.loss(policy, part)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        log(step, loss.item())
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(PARENT / "adapter_config.json", out)
    state = {
        key: weight.contiguous()
        for key, weight in get_peft_model_state_dict(policy, save_embedding_layers=False).items()
    }
    save_file(state, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out


def answers(folder: Path, asked: Sequence[Ticket]) -> list[str]:
    """What the adapter in a folder answers."""
    policy, tokenizer = load(folder)
    return triage.answers(policy, tokenizer, asked)


def _prepare(code: Path) -> Callable[[list[dict]], list[dict]]:
    spec = importlib.util.spec_from_file_location("prepare", code / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.prepare
