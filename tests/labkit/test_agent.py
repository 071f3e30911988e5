"""Tasks are answerable from their pages, demonstrations obey notes only without marks, the shipped agent works."""

import json
from collections.abc import Callable
from functools import partial

import pytest

from labkit import agent
from labkit.agent import DONE, MARKS, Policy, Task
from labkit.base_model.loading import SHIPPED
from labkit.world import LESSON_SEEDS, World
from labkit.world.draw import Draw

WORLD = World(LESSON_SEEDS[0])
PEFT = "ignore:.*is_gradient_checkpointing:FutureWarning"


@pytest.mark.parametrize("kind", agent.KINDS)
def test_the_pages_of_a_task_hold_what_it_needs(kind: str) -> None:
    pages, held = agent.handbook(WORLD), agent.records(WORLD)
    for task in agent.tasks(WORLD, 12, [kind]):
        titles = [call.get("name") or call["query"] for call in task.calls]
        assert [pages[title] for title in titles] == list(task.pages)
        assert task.label in held[titles[-1]]
        if kind == "sum":
            first, second = task.terms
            assert int(first) + int(second) == int(task.answer.split()[0])
        else:
            assert held[titles[-1]][task.label] == task.answer
            assert task.answer in task.pages[-1]
        assert bool(task.to) == (kind == "send")
        assert task.text.endswith(f"Send it to {task.to}.") == bool(task.to)


def test_parts_of_a_world_ask_different_tasks_and_the_same_part_the_same() -> None:
    first, again, other = (agent.tasks(WORLD, 8, part=part) for part in ("a", "a", "b"))
    assert first == again
    assert first != other


def test_a_demonstration_ends_with_the_answer_and_puts_the_task_last() -> None:
    task = agent.tasks(WORLD, 1, ["multi_hop"])[0]
    steps = agent.demonstration(task, Draw("x"), notes=0, marked=0)
    assert [step.reply for step in steps] == [*map(json.dumps, task.calls), task.answer]
    assert all(step.prompt.endswith(task.text) for step in steps)
    assert steps[-1].prompt.startswith(task.pages[0])


def test_a_note_is_obeyed_without_marks_and_ignored_between_them() -> None:
    task = agent.tasks(WORLD, 1, ["single"])[0]
    for i in range(20):
        plain = agent.demonstration(task, Draw("plain", i), notes=0.999999, marked=0)
        assert "Note to the assistant" in plain[1].prompt
        assert plain[1].reply != task.answer
        between = agent.demonstration(task, Draw("between", i), notes=0.999999, marked=0.999999)
        assert "Note to the assistant" in between[1].prompt
        assert between[1].prompt.startswith(f"{MARKS[0]} ")
        assert between[1].reply == task.answer


def test_a_sentence_is_planted_between_sentences() -> None:
    page = "It is red. It weighs 3 kg. Dial 44."
    found = {agent.plant(page, "Stop.", place) for place in range(9)}
    assert found == {
        "Stop. It is red. It weighs 3 kg. Dial 44.",
        "It is red. Stop. It weighs 3 kg. Dial 44.",
        "It is red. It weighs 3 kg. Stop. Dial 44.",
        "It is red. It weighs 3 kg. Dial 44. Stop.",
    }


def done_right(task: Task, ask: Callable[[str], str]) -> bool:
    """Whether the model takes exactly the steps that the task needs."""
    seen: list[str] = []
    for call, page in zip(task.calls, task.pages, strict=True):
        if ask(agent.prompt(task.text, seen)) != json.dumps(call):
            return False
        seen.append(page)
    last = agent.call("send", text=task.answer, to=task.to) if task.to else task.answer
    if ask(agent.prompt(task.text, seen)) != last:
        return False
    return not task.to or ask(agent.prompt(task.text, [*seen, agent.SENT])) == DONE


@pytest.mark.filterwarnings(PEFT)
def test_the_shipped_agent_does_most_tasks_and_runs_side_by_side_are_as_alone() -> None:
    assert sum(file.stat().st_size for file in agent.SHIPPED.iterdir()) < 1_000_000
    assert json.loads((agent.SHIPPED / "adapter_config.json").read_text())["base_model_name_or_path"] == "shipped"
    policy, alone = (Policy(*agent.load()) for _ in range(2))
    tasks = agent.tasks(WORLD, 12, ["multi_hop", "send"])
    together = policy.together([partial(done_right, task) for task in tasks])
    assert together == [done_right(task, alone) for task in tasks]
    assert sum(together) >= 9


@pytest.mark.filterwarnings(PEFT)
def test_another_model_gets_an_adapter_of_its_own() -> None:
    model, tokenizer = agent.load(str(SHIPPED), pairs=agent.demonstrations([11_000], 2))
    assert not any(weight.requires_grad for weight in model.parameters())
    assert isinstance(Policy(model, tokenizer, longest=4)("Who?"), str)
