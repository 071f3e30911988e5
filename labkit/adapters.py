"""Where a low-rank adapter can go in any causal language model: its linear layers, found in the model, not by name."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every `nn.Linear` of the model by its full name, in order, without the output head.

    The head is left out because it is often the embedding itself (tied weights): an update to one would be an update to
    both. `peft`'s `target_modules="all-linear"` makes the same choice.

    Raises `ValueError` when there is none, and when the model has GPT-2's `Conv1D` (call `use_linear_layers` first).
    """
    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise ValueError(
            "the model stores weights as (d_in, d_out) in Conv1D layers; call use_linear_layers(model) first, "
            "which turns each into an equal nn.Linear"
        )
    head = model.get_output_embeddings()
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no nn.Linear besides its head; there is nothing to adapt")
    return layers


def use_linear_layers(model: PreTrainedModel) -> PreTrainedModel:
    """Replace, in place, every GPT-2 `Conv1D` by the `nn.Linear` that computes the same; other models stay as they are.

    `Conv1D` is a linear layer whose weight is stored transposed, (d_in, d_out); `peft` has `fan_in_fan_out` for it.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            d_in, d_out = module.weight.shape
            linear = nn.Linear(d_in, d_out, device=module.weight.device, dtype=module.weight.dtype)
            linear.weight.data.copy_(module.weight.data.T)
            linear.bias.data.copy_(module.bias.data)
            model.set_submodule(name, linear)
    return model


def is_attention(name: str) -> bool:
    """Whether a layer's full name places it in an attention block (`…self_attn.q_proj`), not in a feed-forward one."""
    return any("attn" in part or "attention" in part for part in name.split("."))


@contextmanager
def merged(policy: PeftModel) -> Iterator[None]:
    """Within the block the adapter is part of the weights: the same function up to rounding, for fewer products.

    Afterwards the weights are what they were, bit for bit: `peft`'s `unmerge_adapter` alone subtracts what it added,
    and the rounding of many rounds would add up in the model underneath. Do not disable the adapter within the block.
    """
    layers = [module.get_base_layer() for module in policy.modules() if isinstance(module, BaseTunerLayer)]
    kept = [layer.weight.detach().clone() for layer in layers]
    policy.merge_adapter()
    try:
        yield
    finally:
        policy.unmerge_adapter()
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight.data.copy_(weight)
