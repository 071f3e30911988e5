"""Low-rank adapters for any causal language model: where they go, how one is taught from chat pairs, how it is kept.

The linear layers are found in the model, not by name.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from labkit.base_model.finetune import Pair, encode
from labkit.base_model.probe import IGNORED, padded
from labkit.world.draw import Draw

log = logging.getLogger(__name__)


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


def adapt(model: PreTrainedModel, rank: int = 40, *, name: str = "default") -> PeftModel:
    """The model with a fresh LoRA adapter on all linear layers."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config, adapter_name=name)


def teach(
    policy: PeftModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], *, rate: float, batch: int = 16
) -> list[float]:
    """Train an adapter once through the pairs, in batches of similar length; the loss of each step, in nats a token.

    Padding stands on the right, where causal attention does not see it; logits are computed where a label counts.
    """
    rows = [encode(tokenizer, pair) for pair in pairs]
    draw = Draw("teach", len(rows))
    order, size = draw.order(range(len(rows))), min(batch, len(rows))
    pools = [sorted(order[i : i + 8 * size], key=lambda row: len(rows[row][0])) for i in range(0, len(order), 8 * size)]
    parts = draw.order([pool[i : i + size] for pool in pools for i in range(0, len(pool), size)])
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, rate, weight_decay=0.0)
    model = policy.get_base_model()
    losses = []
    for step, part in enumerate(parts):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 50) * (1 - step / len(parts))
        inputs = padded([rows[i][0] for i in part], tokenizer.pad_token_id).to(model.device)
        labels = padded([rows[i][1] for i in part], IGNORED).to(model.device)[:, 1:]
        hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state[:, :-1]
        counted = labels != IGNORED
        loss = cross_entropy(model.get_output_embeddings()(hidden[counted]).float(), labels[counted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 99:
            log.info("step %d of %d, loss %.3f", step + 1, len(parts), fmean(losses[-100:]))
    return losses


def save_half(policy: PeftModel, folder: Path) -> None:
    """Write the active adapter in half precision, for the shipped base model, wherever that lies on a machine."""
    folder.mkdir(parents=True, exist_ok=True)
    name = policy.active_adapter
    config = policy.peft_config[name]
    config.base_model_name_or_path = "shipped"
    config.inference_mode = True
    config.save_pretrained(str(folder))
    state = get_peft_model_state_dict(policy, adapter_name=name)
    weights = {key: weight.half().contiguous() for key, weight in state.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
