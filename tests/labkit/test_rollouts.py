"""labkit.rollouts: sampled groups follow the model, and their log-probabilities are the model's."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from labkit import adapters, base_model, rollouts

PROMPTS = [[5, 6, 7, 8, 9], [11, 12]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return base_model.load("shipped")[1]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=24, num_key_value_heads=2, **sizes)).eval()


def draw(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, *, group: int, seed: int = 0
) -> rollouts.Rollouts:
    return rollouts.sample(model, tokenizer, PROMPTS, group=group, longest=6, seed=seed)


def test_groups_stand_together_and_end_at_the_end_token(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = draw(model, tokenizer, group=40)
    assert len(found) == 80
    assert found.prompt_ids[39].tolist() == PROMPTS[0]
    assert found.prompt_mask[40].tolist() == [0, 0, 0, 1, 1]
    assert found.prompt_ids[40, 3:].tolist() == PROMPTS[1]
    ended = 0
    for ids, mask in zip(found.completion_ids.tolist(), found.completion_mask.tolist(), strict=True):
        length = sum(mask)
        assert mask == [1] * length + [0] * (len(mask) - length)
        assert tokenizer.eos_token_id not in ids[: length - 1]
        assert length == 6 or ids[length - 1] == tokenizer.eos_token_id
        ended += length < 6
    assert ended, "no answer ended early: the test has lost its subject"


def test_a_seed_repeats_and_another_differs(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    first, again, other = (draw(model, tokenizer, group=8, seed=seed).completion_ids for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_first_tokens_follow_the_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """4,000 draws of the short, left-padded prompt against the distribution that the model has without any padding."""
    found = draw(model, tokenizer, group=4000).completion_ids[4000:, 0]
    share = torch.bincount(found, minlength=24) / 4000
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[1]])).logits[0, -1].softmax(dim=-1)
    standard_error = (expected * (1 - expected) / 4000).sqrt()
    assert ((share - expected).abs() < 5 * standard_error).all()


def test_log_probabilities_are_those_of_each_answer_alone(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = draw(model, tokenizer, group=6)
    got = rollouts.logps(model, found)
    for row in range(len(found)):
        prompt = PROMPTS[row // 6]
        length = int(found.completion_mask[row].sum())
        answer = found.completion_ids[row, :length]
        logits = model(torch.cat([torch.tensor(prompt), answer])[None]).logits[0]
        expected = logits[len(prompt) - 1 : -1].log_softmax(dim=-1).gather(1, answer[:, None])[:, 0]
        torch.testing.assert_close(got[row, :length], expected, atol=1e-5, rtol=1e-5)


def test_groups_lose_padding_and_keep_their_log_probabilities(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = draw(model, tokenizer, group=6)
    part = found.groups(torch.tensor([False, True]))
    assert part.prompt_ids.shape == (6, 2)
    kept = part.completion_mask == 1
    torch.testing.assert_close(
        rollouts.logps(model, part)[kept],
        rollouts.logps(model, found)[6:, : kept.shape[1]][kept],
        atol=1e-5,
        rtol=1e-5,
    )


def test_the_gradient_flows_through_the_shared_prompt(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Against one row at a time without a cache: the same sum of log-probabilities has the same gradient."""
    found = draw(model, tokenizer, group=3)
    weights = [model.model.layers[0].self_attn.k_proj.weight, model.model.layers[1].mlp.up_proj.weight]
    shared = torch.autograd.grad((rollouts.logps(model, found) * found.completion_mask).sum(), weights)
    total = torch.zeros(())
    for row in range(len(found)):
        prompt, length = PROMPTS[row // 3], int(found.completion_mask[row].sum())
        answer = found.completion_ids[row, :length]
        logits = model(torch.cat([torch.tensor(prompt), answer])[None]).logits[0, len(prompt) - 1 : -1]
        total = total + logits.log_softmax(dim=-1).gather(1, answer[:, None]).sum()
    for got, expected in zip(shared, torch.autograd.grad(total, weights), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapted_model_samples_from_what_it_computes(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=list(adapters.linear_layers(model)))).eval()
    found = draw(adapted, tokenizer, group=3)
    assert torch.equal(found.completion_ids, draw(adapted.unload(), tokenizer, group=3).completion_ids)
    assert len(found.texts(tokenizer)) == 6
