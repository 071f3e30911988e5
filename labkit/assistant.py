"""The service of module 4: one base model with an adapter that triages tickets and one that answers from the handbook.

Both adapters speak the chat template. The user's message is a ticket, and the reply its triage as one line of JSON; or
it is a passage of the handbook with a question below it, and the reply the value that was asked for, or "Not stated.".

`python -m labkit.assistant` trains the shipped adapters again.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from labkit import base_model
from labkit.adapters import adapt, save_half, teach, use_linear_layers
from labkit.base_model.finetune import Pair
from labkit.world import NOT_STATED, VALIDATION_SEEDS, World
from labkit.world.draw import Draw

SHIPPED = Path(__file__).parent / "assistant_adapters"
TASKS = ("triage", "handbook")
RANK = 16
TAUGHT = VALIDATION_SEEDS[2000:3000]
"""The companies that the shipped adapters learnt from. No lesson uses them."""


def triage_pairs(seeds: Sequence[int], each: int) -> list[Pair]:
    """`each` tickets of each company with their triage."""
    return [Pair(t.text, t.triage.to_json()) for seed in seeds for t in World(seed).tickets(each)]


def handbook_prompt(passage: str, question: str) -> str:
    """A passage of the handbook, and below it the question."""
    return f"{passage}\n{question}"


def handbook_pairs(seeds: Sequence[int], each: int, *, unanswerable: float = 0.3) -> list[Pair]:
    """`each` questions on each company, with the passage that answers or, for a share, one that does not.

    Such a passage is of the same entity, where there is one, and states nothing of the kind that is asked for. The
    reply is the answer and a full stop, or "Not stated.".
    """
    found: list[Pair] = []
    for seed in seeds:
        world = World(seed)
        draw = Draw("assistant", seed)
        facts = {fact.id: fact for fact in world.facts}
        passages = {passage.id: passage for passage in world.passages()}
        asked = world.questions("single") + world.questions("paraphrase")
        for question in draw.order(asked, min(each, len(asked))):
            gold = passages[question.gold[0]]
            entity = facts[gold.fact_ids[0]].entity
            wanted = {facts[i].attribute for i in question.fact_ids}
            silent = [
                passage for passage in passages.values() if not wanted & {facts[i].attribute for i in passage.fact_ids}
            ]
            own = [passage for passage in silent if facts[passage.fact_ids[0]].entity == entity]
            if draw.chance(unanswerable):
                found.append(Pair(handbook_prompt(draw.pick(own or silent).text, question.text), f"{NOT_STATED}."))
            else:
                found.append(Pair(handbook_prompt(gold.text, question.text), f"{question.answer}."))
    return found


def load(
    model_id: str = "shipped", *, device: str = "cpu", companies: int = 4, each: int = 16, rate: float = 1e-3
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base model in eval mode with the adapters "triage" and "handbook" (`set_adapter` chooses), and its tokenizer.

    For "shipped" the adapters come with the course. Any other model gets fresh ones, taught now at this rate on `each`
    examples of so many `companies`.
    """
    model, tokenizer = base_model.load(model_id, device=device)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model_id == "shipped":
        policy = PeftModel.from_pretrained(model, str(SHIPPED / TASKS[0]), adapter_name=TASKS[0])
        for task in TASKS[1:]:
            policy.load_adapter(str(SHIPPED / task), task)
        policy.set_adapter(TASKS[0])
    else:
        policy = _taught(use_linear_layers(model), tokenizer, TAUGHT[:companies], each, rate)
    return policy.eval().requires_grad_(False), tokenizer


def _taught(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seeds: Sequence[int], each: int, rate: float
) -> PeftModel:
    """Fresh adapters for both tasks, each taught on its examples of these companies."""
    policy: PeftModel | None = None
    for task in TASKS:
        if policy is None:
            policy = adapt(model, RANK, name=task)
        else:
            policy.add_adapter(task, policy.peft_config[TASKS[0]])
            policy.set_adapter(task)
        pairs = triage_pairs(seeds, each) if task == "triage" else handbook_pairs(seeds, each)
        teach(policy, tokenizer, pairs, rate=rate)
    assert policy is not None
    policy.set_adapter(TASKS[0])
    return policy


def main() -> None:
    """Train the shipped adapters and write them to their folders."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model, tokenizer = base_model.load()
    policy = _taught(model, tokenizer, TAUGHT[:500], 16, rate=3e-3)
    for task in TASKS:
        policy.set_adapter(task)
        save_half(policy, SHIPPED / task)


if __name__ == "__main__":
    main()
