"""labkit.adapters: which layers an adapter can sit on, in models of several families."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from labkit import adapters


def llama(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    config = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied, **sizes)
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_every_linear_layer_but_the_head(tied: bool) -> None:
    names = list(adapters.linear_layers(llama(tied=tied)))
    assert len(names) == 14
    assert names[0] == "model.layers.0.self_attn.q_proj"
    assert "lm_head" not in names


def test_conv1d_must_be_converted_first() -> None:
    with pytest.raises(ValueError, match="call use_linear_layers"):
        adapters.linear_layers(gpt2())


def test_the_converted_model_computes_the_same() -> None:
    model, ids = gpt2(), torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        want = model(ids).logits
        converted = adapters.use_linear_layers(model)
        torch.testing.assert_close(converted(ids).logits, want, rtol=1e-5, atol=1e-6)
    layers = adapters.linear_layers(converted)
    assert layers["transformer.h.0.attn.c_attn"].weight.shape == (24, 8)
    assert len(layers) == 8


def test_other_models_stay_as_they_are() -> None:
    model = llama(tied=True)
    before = list(model.modules())
    assert adapters.use_linear_layers(model) is model
    assert all(now is then for now, then in zip(model.modules(), before, strict=True))


def test_attention_is_told_from_the_rest() -> None:
    for model, inside in ((llama(tied=True), 8), (adapters.use_linear_layers(gpt2()), 4)):
        found = [name for name in adapters.linear_layers(model) if adapters.is_attention(name)]
        assert len(found) == inside
        assert all("attn" in name for name in found)


def test_a_model_without_linear_layers_is_an_error() -> None:
    class HeadOnly(PreTrainedModel):
        config_class = LlamaConfig

        def __init__(self) -> None:
            super().__init__(LlamaConfig())
            self.head = nn.Linear(2, 2)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    with pytest.raises(ValueError, match="HeadOnly has no nn"):
        adapters.linear_layers(HeadOnly())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_merged_adapter_computes_the_same_and_leaves_no_trace() -> None:
    model, ids = llama(tied=True), torch.tensor([[1, 2, 3, 4]])
    names = list(adapters.linear_layers(model))
    policy = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=names, init_lora_weights=False)).eval()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    with torch.no_grad():
        want = policy(ids).logits
        with policy.disable_adapter():
            without = policy(ids).logits
        with adapters.merged(policy):
            got = policy(ids).logits
            changed = policy.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
            assert not torch.equal(
                changed, before["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"]
            )
    assert not torch.allclose(got, without, atol=1e-4)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    after = policy.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with pytest.raises(RuntimeError, match="stop"), adapters.merged(policy):
        raise RuntimeError("stop")
    assert all(torch.equal(policy.state_dict()[name], value) for name, value in before.items())
