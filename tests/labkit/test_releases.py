"""Releases answer as they say, and leave the service as it was."""

from dataclasses import replace

import pytest
import torch

from labkit.releases import Release, Service, one_line, rounded
from labkit.world import LESSON_SEEDS, World

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft reads it

TICKETS = World(LESSON_SEEDS[40]).tickets(24, part="test")
TEXTS = [ticket.text for ticket in TICKETS]
TRUTH = [ticket.triage for ticket in TICKETS]


@pytest.fixture(scope="module")
def service() -> Service:
    return Service()


def right(service: Service, release: Release, texts: list[str] = TEXTS) -> int:
    return sum(answer == truth for answer, truth in zip(service.answer(release, texts), TRUTH, strict=True))


def test_the_champion_answers_and_broken_releases_leave_no_trace(service: Service) -> None:
    before = {name: weight.clone() for name, weight in service.policy.named_parameters()}
    champion = service.answer(Release(), TEXTS)
    assert right(service, Release()) >= 22
    broken = Release(weights=lambda name, weight: weight * 2 if "lora_B" in name else weight)
    assert right(service, broken) < 15
    assert right(service, Release(template=lambda text: text.replace("'<|assistant|>'", "'<|assistant|>\\n'"))) == 0
    assert service.answer(Release(), TEXTS) == champion
    assert all(torch.equal(weight, before[name]) for name, weight in service.policy.named_parameters())


def test_attached_is_merged_up_to_rounding(service: Service) -> None:
    assert service.answer(Release(merge=False), TEXTS) == service.answer(Release(), TEXTS)


def test_line_breaks_are_the_preparation_s_business(service: Service) -> None:
    broken = [text.replace(". ", ".\n") for text in TEXTS]
    assert right(service, Release(), broken) == right(service, Release())
    assert right(service, Release(prepare=lambda text: text), broken) < right(service, Release())


def test_a_retrained_adapter_is_another_and_the_shipped_one_stays(service: Service) -> None:
    before = {name: weight.clone() for name, weight in service.policy.named_parameters()}
    wrong = [replace(t, triage=replace(t.triage, urgency="low")) for t in World(11_999).tickets(64)]
    adapter = service.retrain(wrong, rate=3e-3)
    assert all(torch.equal(weight, before[name]) for name, weight in service.policy.named_parameters())
    assert not any(weight.requires_grad for weight in service.policy.parameters())
    assert any(not torch.equal(weight, before[name]) for name, weight in adapter.items())
    away = Release(adapter={name: torch.zeros_like(weight) for name, weight in adapter.items()})
    assert right(service, away) == 0  # the release's adapter is what answers: without one the model knows no format


def test_one_line() -> None:
    assert one_line(" a\n\tb  c ") == "a b c"


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rounded_has_so_many_values_and_keeps_the_largest(bits: int) -> None:
    weight = torch.linspace(-1, 2, 60).reshape(3, 20)
    for rows in (True, False):
        found = rounded(weight, bits, rows=rows)
        assert torch.isclose(found.abs().max(), weight.abs().max())
        assert len(found[-1].unique()) <= 2**bits - 1
    assert torch.equal(rounded(torch.zeros(2, 2), bits, rows=True), torch.zeros(2, 2))
