# %% [markdown]
# # 2.2 LoRA with peft, swept with papermill
#
# You will be able to configure `peft` to a parameter budget, predict a training job's memory to the byte, run a sweep whose failures stay visible, choose from it by a rule that you fixed beforehand, and refuse to serve an adapter on the wrong base.
#
# **You will measure.** What a rank buys. With {{share_low}}, {{share_centre}} and {{share_high}} of the weights trained, {{exact_low}}, {{exact_centre}} and {{exact_high}} of the answers on unseen tickets are right in all four fields after {{steps_each}} steps of {{batch_each}} tickets, and {{fields_low}}, {{fields_centre}} and {{fields_high}} of the single fields. Training all weights holds {{memory_full}} MiB of weights, gradients and optimizer state, rank 4 {{memory_lora}} MiB, and your formula says so to the byte. An adapter with a loss of {{loss_own}} on its own base has {{loss_twice}} on one that holds it already, and nothing raises an error.
#
# **You need.** Lessons 1.1 (seeds, intervals, pairs) and 2.1 (what LoRA computes); what AdamW keeps for each weight.
#
# **Time.** About 70 minutes, 57 of them for the exercises. The solution runs in {{run:seconds}} s on one CPU core.

# %% [markdown]
# ## Why it matters at work
#
# "Which rank, which layers, which learning rate?" is answered with a sweep, and the sweep with a table. Whoever reads the table wants to know which runs are missing from it, whether its best row is best by more than luck, and whether the job fits the GPU that is free tonight.
#
# The expensive mistakes are quiet. A run that crashed is dropped by the script that collects results; the winner of twenty runs is reported with the score that made it win; an adapter is loaded on last month's base. Nothing of this raises an error.
#
# In interviews: "How much memory does LoRA save on an 8B model, and where does the rest go?" and "Your sweep says rank 16 beats rank 4 by 0.4 points. Do you ship it?"

# %% tags=["parameters"]
model_id = "shipped"  # "shipped", the id of a causal language model on the Hub, or a local folder
device = "cpu"  # "cpu", "cuda" or "mps"
rank = 4  # the middle of the sweep
scale = 8  # alpha / rank, what the update is multiplied by; 1 to 2 is usual for a real model
learning_rate = 2.5e-3  # right for the shipped model of about a million weights; 1e-4 to 3e-4 for a real one
steps = 160  # of a run of the rank curve; quick: 3
short_steps = 16  # where only losses are compared; quick: 3
batch_size = 2
train_tickets = 256
test_tickets = 24  # of each company; quick: 8
runs = 3  # each with a company, a start and an order of the data of its own; quick: 2
seed = 0

# %%
import copy
import hashlib
import inspect
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import papermill
import torch
from accelerate import init_empty_weights
from IPython.display import display
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from peft import LoraConfig, PeftModel, get_peft_model
from scipy import stats
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from labkit import adapters, base_model, triage
from labkit.plots import COLOURS, direct_label, intervals, label_lines, use_house_style
from labkit.predict import compare
from labkit.results import ResultCard
from labkit.world import LESSON_SEEDS, World

# peft asks transformers for a property under its old name; the warning says nothing about your code.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
use_house_style()
card = ResultCard("2_2_lora_with_peft_swept_with_papermill")
workplace = tempfile.TemporaryDirectory()  # adapters and executed notebooks go here; it goes when the kernel stops

# %% [markdown]
# ## Say where the adapter goes
#
# `LoraConfig(target_modules=…)` says which modules get an adapter. `peft` compares it with the *full* name of every module, and there are three rules:
#
# - **A list**: a module is reached if its full name is in the list, or ends in a dot and an entry of the list.
# - **A string**: a regular expression that must match the whole name, from first to last character.
# - **`"all-linear"`**: every `nn.Linear` except the output head.
#
# If nothing is reached, `peft` raises a `ValueError`. If *something* is reached, it is silent, whatever you had meant.


# %%
def tiny_llama(blocks: int = 2) -> LlamaForCausalLM:
    """A Llama of random weights, width 24."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": blocks}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


for name, module in tiny_llama(4).named_modules():
    if isinstance(module, nn.Linear) and (".layers." not in name or ".layers.0." in name):
        print(f"{name:<32} {tuple(module.weight.shape)}")

# %% [markdown]
# These are the linear layers of the first of four blocks, and the head. The other three blocks have the same layers.
#
# **Exercise.** How many modules of this Llama does each setting reach? Fill in `reached`, from the rules and without running `peft`; 0 where `peft` raises because nothing is reached.
#
# | key | `target_modules` |
# |---|---|
# | `"names"` | `["q_proj", "v_proj"]` |
# | `"ending"` | `["proj"]` |
# | `"dotted"` | `["mlp.down_proj"]` |
# | `"string"` | `"q_proj"` |
# | `"pattern"` | `r".*\.[02]\.mlp\..*_proj"` |
# | `"all"` | `"all-linear"` |
#
# <details><summary>Hint 1</summary>Write down one full name, <code>model.layers.0.self_attn.q_proj</code>, and apply the rule of the setting's type to it, character by character.</details>
# <details><summary>Hint 2</summary>In a list, an entry must be preceded by a dot: is there a dot before "proj" in "q_proj"? A string is not a list with one entry.</details>
# <details><summary>Hint 3</summary>Seven layers a block; [02] in a regular expression is the character 0 or the character 2; a pattern that starts in the middle of a name doesn't match the whole of it.</details>

# %% exercise="targets" difficulty=1 minutes=5
reached = {"names": None, "ending": None, "dotted": None, "string": None, "pattern": None, "all": None}
### BEGIN SOLUTION
reached = {"names": 8, "ending": 0, "dotted": 4, "string": 0, "pattern": 6, "all": 28}
### END SOLUTION

# %% check="targets" points=2
assert set(reached) == {"names", "ending", "dotted", "string", "pattern", "all"}, (
    f"Keep the six keys of the table; yours are {sorted(reached)}"
)
for key, count in reached.items():
    assert isinstance(count, (int, np.integer)), (
        f'"{key}" needs a whole number, how many modules get an adapter (0 if peft raises); it is {count!r}'
    )
    assert 0 <= count <= 29, f'"{key}": the model has 29 linear layers, 7 in each of 4 blocks and the head; not {count}'
### BEGIN HIDDEN TESTS
_settings = {
    "names": (["q_proj", "v_proj"], "two layers in each of the four blocks end in .q_proj or .v_proj"),
    "ending": (["proj"], "an entry of a list must be a whole part of the name, after a dot; no module is called proj"),
    "dotted": (["mlp.down_proj"], "an entry may hold dots: every name that ends in .mlp.down_proj is reached"),
    "string": ("q_proj", "a string is a regular expression that must match the whole name, not a name"),
    "pattern": (r".*\.[02]\.mlp\..*_proj", "[02] is the character 0 or 2, so two blocks, each with three mlp layers"),
    "all": ("all-linear", "every linear layer but the output head, which is often the embedding itself"),
}
for _key, (_targets, _why) in _settings.items():
    try:
        _model = get_peft_model(tiny_llama(4), LoraConfig(target_modules=_targets))
        _count = sum(hasattr(_module, "lora_A") for _module in _model.modules())
    except ValueError:
        _count = 0
    assert reached[_key] == _count, f'"{_key}" does not reach {reached[_key]} modules: {_why}'
### END HIDDEN TESTS

# %% mistake="takes an entry for an ending" of="targets" says="a whole part of the name"
reached = {"names": 8, "ending": 28, "dotted": 4, "string": 0, "pattern": 6, "all": 28}

# %% mistake="takes a string for a name" of="targets" says="a string is a regular expression"
reached = {"names": 8, "ending": 0, "dotted": 4, "string": 4, "pattern": 6, "all": 28}

# %% mistake="counts the head" of="targets" says="every linear layer but the output head"
reached = {"names": 8, "ending": 0, "dotted": 4, "string": 0, "pattern": 6, "all": 29}

# %% mistake="reads the class as a range" of="targets" says="so two blocks"
reached = {"names": 8, "ending": 0, "dotted": 4, "string": 0, "pattern": 9, "all": 28}

# %% mistake="counts one block" of="targets" says="each of the four blocks"
reached = {"names": 2, "ending": 0, "dotted": 1, "string": 0, "pattern": 3, "all": 7}


# %% alternative="asks peft" of="targets"
def count(targets):
    try:
        adapted = get_peft_model(tiny_llama(4), LoraConfig(target_modules=targets))
    except ValueError:
        return 0
    return len([name for name, _ in adapted.named_parameters() if "lora_A" in name])


reached = {
    "names": count(["q_proj", "v_proj"]),
    "ending": count(["proj"]),
    "dotted": count(["mlp.down_proj"]),
    "string": count("q_proj"),
    "pattern": count(r".*\.[02]\.mlp\..*_proj"),
    "all": count("all-linear"),
}

# %% [markdown]
# What `peft` says. After every `get_peft_model` in your own work, count the adapted modules in the same way, or call `print_trainable_parameters()`: a list that reached a third of what you meant trains without complaint and is a little worse.

# %%
settings_to_try: dict[str, list[str] | str] = {
    "names": ["q_proj", "v_proj"],
    "ending": ["proj"],
    "dotted": ["mlp.down_proj"],
    "string": "q_proj",
    "pattern": r".*\.[02]\.mlp\..*_proj",
    "all": "all-linear",
}
for key, targets in settings_to_try.items():
    try:
        found = get_peft_model(tiny_llama(4), LoraConfig(target_modules=targets)).targeted_module_names
        print(f"{key:<8} {len(found):>2}, you said {reached[key]:>2}; the first is {found[0]}")
    except ValueError as error:
        print(f"{key:<8}  0, you said {reached[key]:>2}; {str(error)[:80]}…")

# %% [markdown]
# ## Spend a budget to the last row
#
# One more unit of rank on a layer of shape $(d_{out}, d_{in})$ costs $d_{out} + d_{in}$ trained numbers. On all layers of a model that is a large step: a budget that falls between two ranks is left partly unspent, and a comparison "at equal budget" between attention layers and all layers then isn't one.
#
# `LoraConfig` has two fields for this. `rank_pattern` gives single layers another rank than `r`, `alpha_pattern` another alpha than `lora_alpha`. Both are dictionaries whose keys match names as the regular expression `(.*\.)?(key)$` does: a full name reaches that layer, `"q_proj"` reaches the layer of this name in every block. The two are independent, and the update of a layer is multiplied by *its* alpha over *its* rank.
#
# **Exercise.** `config_for_budget(shapes, budget, scale)` returns a `LoraConfig` with adapters on exactly the layers of `shapes`, a dictionary of full name → `(d_out, d_in)`, that train at most `budget` numbers together:
#
# 1. Every layer has the largest common rank that fits into the budget.
# 2. What is left goes to single layers: in the dictionary's order, a layer gets *one* more rank if that still fits; a layer that doesn't fit is skipped, and the next one is tried.
# 3. On every layer, alpha / rank equals `scale`.
#
# Raise `ValueError` if the budget is too small for rank 1 everywhere. With `{"a": (6, 4), "b": (2, 2)}`, a budget of 33 and scale 2: a common rank costs 14, so both get rank 2 (28 numbers); 5 are left; another rank costs 10 on `a`, skipped, and 4 on `b`. So `a` has rank 2 and alpha 4, `b` rank 3 and alpha 6, and 32 numbers are trained. *About 12 lines.*
#
# <details><summary>Hint 1</summary>Two passes: a whole-number division for the common rank, then a loop over the layers that keeps account of what is left.</details>
# <details><summary>Hint 2</summary>Layers with the common rank need no entry: they follow <code>r</code> and <code>lora_alpha</code>. Each of the others needs an entry in both patterns.</details>
# <details><summary>Hint 3</summary>cost = sum of d_out + d_in; common, left = divmod(budget, cost). In the loop: if d_out + d_in <= left, put common + 1 into rank_pattern, scale times that into alpha_pattern, and take the cost off left. Then LoraConfig(r=…, lora_alpha=…, target_modules=list(shapes), rank_pattern=…, alpha_pattern=…).</details>


# %% exercise="budget-config" difficulty=3 minutes=12
def config_for_budget(shapes: Mapping[str, tuple[int, int]], budget: int, scale: float) -> LoraConfig:
    """Return a configuration that trains at most `budget` numbers, on all these layers, each with alpha / r = scale."""
    ### BEGIN SOLUTION
    common, left = divmod(budget, sum(d_out + d_in for d_out, d_in in shapes.values()))
    if common < 1:
        raise ValueError(f"{budget} numbers are not enough for rank 1 on {len(shapes)} layers")
    raised = {}
    for name, (d_out, d_in) in shapes.items():
        if d_out + d_in <= left:
            raised[name] = common + 1
            left -= d_out + d_in
    return LoraConfig(
        r=common,
        lora_alpha=scale * common,
        target_modules=list(shapes),
        rank_pattern=raised,
        alpha_pattern={name: scale * higher for name, higher in raised.items()},
    )
    ### END SOLUTION


# %% check="budget-config" points=2
def adapted(
    shapes: Mapping[str, tuple[int, int]], config: LoraConfig, others: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """Give the configuration to peft, on a model with these linear layers and others; return the adapted ones by name."""
    model = nn.Module()
    for name, (d_out, d_in) in (dict(shapes) | dict.fromkeys(others, (2, 2))).items():
        *path, last = name.split(".")
        place = model
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.add_module(last, nn.Linear(d_in, d_out, bias=False))
    peft_model = get_peft_model(model, config)
    names = {name.removeprefix("base_model.model."): module for name, module in peft_model.named_modules()}
    return {name: module for name, module in names.items() if hasattr(module, "lora_A")}


def check_ranks(
    shapes: dict[str, tuple[int, int]], budget: int, want: dict[str, int], others: Sequence[str] = ()
) -> None:
    """Compare the ranks of the adapted layers with those wanted."""
    given = dict(shapes)
    config = config_for_budget(given, budget, 2)
    assert isinstance(config, LoraConfig), f"Return a LoraConfig; yours is a {type(config).__name__}"
    assert list(given.items()) == list(shapes.items()), (
        "You changed shapes, which belongs to the caller: keep your accounts in a dictionary of your own"
    )
    layers = adapted(shapes, config, others)
    assert set(layers) == set(shapes), (
        f"Adapt exactly the layers of shapes, {sorted(shapes)}; yours: {sorted(layers)}. The model may have others with the "
        "same last name: give target_modules the full names"
    )
    ranks = {name: layer.r["default"] for name, layer in layers.items()}
    spent = sum(ranks[name] * sum(shape) for name, shape in shapes.items())
    several = len({name.rpartition(".")[2] for name in shapes}) < len(shapes)
    reach = "; a key that is a layer's last name reaches that layer in every block: use full names" if several else ""
    assert spent <= budget, (
        f"The budget is {budget} numbers and you train {spent}: take off what each layer costs{reach}"
    )
    common = budget // sum(map(sum, shapes.values()))
    assert min(ranks.values()) >= common, f"The common rank is {common}; you give {ranks}"
    uniform = len(set(ranks.values())) == 1 and len(set(want.values())) > 1
    assert not uniform, (
        f"{budget - spent} of {budget} numbers are left unspent: raise single layers with rank_pattern, and where one "
        "doesn't fit, skip it and go on"
    )
    assert ranks == want, (
        f"Budget {budget} on {dict(shapes)}: the ranks are {want}, yours {ranks}. Go through the layers in order, one "
        "more rank at most; skip a layer that doesn't fit, and go on"
    )


check_ranks({"a": (6, 4), "b": (2, 2)}, 33, {"a": 2, "b": 3})
check_ranks({"a": (6, 4), "b": (2, 2)}, 28, {"a": 2, "b": 2})
check_ranks({"block.0.up": (5, 5), "block.0.down": (3, 3), "block.1.up": (5, 5)}, 41, {"block.0.up": 2, "block.0.down": 1, "block.1.up": 1})  # fmt: skip
check_ranks({"a": (8, 8), "b": (1, 1)}, 26, {"a": 1, "b": 2})
check_ranks({"a": (2, 2), "b": (6, 4)}, 24, {"a": 2, "b": 1})
check_ranks({"block.0.up": (3, 4), "block.0.down": (4, 3)}, 14, {"block.0.up": 1, "block.0.down": 1}, ["block.1.up"])
### BEGIN HIDDEN TESTS
check_ranks({"a": (1, 1)}, 5, {"a": 2})
check_ranks({"a": (6, 4), "b": (2, 2)}, 14, {"a": 1, "b": 1})
check_ranks({"a": (8, 8), "b": (1, 2), "c": (4, 5), "d": (1, 1)}, 30 + 14, {"a": 1, "b": 2, "c": 2, "d": 2})
check_ranks({"b.0.q": (3, 2), "b.0.v": (3, 1), "b.1.q": (3, 2), "b.1.v": (3, 1)}, 18 * 3 + 8, {"b.0.q": 4, "b.0.v": 3, "b.1.q": 3, "b.1.v": 3})  # fmt: skip
check_ranks({"x": (7, 2), "y": (2, 1)}, 24 + 4, {"x": 2, "y": 3})
### END HIDDEN TESTS


# %% check="budget-config" points=2
def check_scales(shapes: Mapping[str, tuple[int, int]], budget: int, scale: float) -> None:
    """Every adapted layer must multiply its update by the scale."""
    for name, layer in adapted(shapes, config_for_budget(dict(shapes), budget, scale)).items():
        got, own_rank = layer.scaling["default"], layer.r["default"]
        assert abs(got * own_rank - scale) > 1e-9 or own_rank == 1, (
            f"Layer {name!r} of rank {own_rank} has an alpha of {scale}: that is the scale; alpha is the scale times the rank"
        )
        assert abs(got - scale) < 1e-9, (
            f"Layer {name!r} of rank {own_rank} multiplies its update by {got:.3g}, not by {scale}: a layer with another "
            "rank needs another alpha too, in alpha_pattern"
        )


check_scales({"a": (6, 4), "b": (2, 2)}, 33, 2)
check_scales({"a": (6, 4), "b": (2, 2)}, 28, 0.5)
try:
    config_for_budget({"a": (6, 4), "b": (2, 2)}, 13, 2)
    raised_error = None
except Exception as error:
    raised_error = error
assert isinstance(raised_error, ValueError), (
    "13 numbers are not enough for rank 1 on both layers (14): raise ValueError, and do not adapt some of them in silence"
)
### BEGIN HIDDEN TESTS
check_scales({"p.q": (3, 2), "p.v": (3, 1), "r.q": (3, 2)}, 14 * 2 + 9, 1.5)
check_scales({"p.q": (3, 2), "p.v": (3, 1), "r.q": (3, 2)}, 14, 4)
### END HIDDEN TESTS


# %% mistake="leaves the remainder unspent" of="budget-config" says="left unspent"
def config_for_budget(shapes, budget, scale):
    common = budget // sum(map(sum, shapes.values()))
    if common == 0:
        raise ValueError("too small")
    return LoraConfig(r=common, lora_alpha=scale * common, target_modules=list(shapes))


# %% mistake="takes layers out of the caller's dictionary" of="budget-config" says="which belongs to the caller"
def config_for_budget(shapes, budget, scale):
    common, left = divmod(budget, sum(map(sum, shapes.values())))
    if common == 0:
        raise ValueError("too small")
    targets, ranks = list(shapes), {}
    while shapes:
        name = next(iter(shapes))
        cost = sum(shapes.pop(name))
        if cost <= left:
            ranks[name], left = common + 1, left - cost
    alphas = {name: scale * own for name, own in ranks.items()}
    return LoraConfig(
        r=common, lora_alpha=scale * common, target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas
    )


# %% mistake="forgets alpha" of="budget-config" says="in alpha_pattern"
def config_for_budget(shapes, budget, scale):
    common, left = divmod(budget, sum(map(sum, shapes.values())))
    if common == 0:
        raise ValueError("too small")
    pattern = {}
    for name, shape in shapes.items():
        if sum(shape) <= left:
            pattern[name], left = common + 1, left - sum(shape)
    return LoraConfig(r=common, lora_alpha=scale * common, target_modules=list(shapes), rank_pattern=pattern)


# %% mistake="stops at the first layer that does not fit" of="budget-config" says="skip it and go on"
def config_for_budget(shapes, budget, scale):
    common, left = divmod(budget, sum(map(sum, shapes.values())))
    if common == 0:
        raise ValueError("too small")
    ranks = {}
    for name, shape in shapes.items():
        if sum(shape) > left:
            break
        ranks[name], left = common + 1, left - sum(shape)
    alphas = {name: scale * own for name, own in ranks.items()}
    return LoraConfig(
        r=common, lora_alpha=scale * common, target_modules=list(shapes), rank_pattern=ranks, alpha_pattern=alphas
    )


# %% mistake="spends the remainder again and again" of="budget-config" says="take off what each layer costs"
def config_for_budget(shapes, budget, scale):
    common, left = divmod(budget, sum(map(sum, shapes.values())))
    if common == 0:
        raise ValueError("too small")
    ranks = {name: common + 1 for name, shape in shapes.items() if sum(shape) <= left}
    alphas = {name: scale * own for name, own in ranks.items()}
    return LoraConfig(
        r=common, lora_alpha=scale * common, target_modules=list(shapes), rank_pattern=ranks, alpha_pattern=alphas
    )


# %% mistake="uses last names as keys" of="budget-config" says="reaches that layer in every block"
def config_for_budget(shapes, budget, scale):
    common, left = divmod(budget, sum(map(sum, shapes.values())))
    if common == 0:
        raise ValueError("too small")
    ranks = {}
    for name, shape in shapes.items():
        if sum(shape) <= left:
            ranks[name.split(".")[-1]], left = common + 1, left - sum(shape)
    alphas = {name: scale * own for name, own in ranks.items()}
    return LoraConfig(
        r=common, lora_alpha=scale * common, target_modules=list(shapes), rank_pattern=ranks, alpha_pattern=alphas
    )


# %% mistake="takes rank 0 for the smallest" of="budget-config" says="raise ValueError"
def config_for_budget(shapes, budget, scale):
    common, left = divmod(budget, sum(map(sum, shapes.values())))
    ranks = {}
    for name, shape in shapes.items():
        if sum(shape) <= left:
            ranks[name], left = common + 1, left - sum(shape)
    alphas = {name: scale * own for name, own in ranks.items()}
    common = max(common, 1)
    return LoraConfig(
        r=common, lora_alpha=scale * common, target_modules=list(shapes), rank_pattern=ranks, alpha_pattern=alphas
    )


# %% mistake="begins with the largest layer" of="budget-config" says="Go through the layers in order"
def config_for_budget(shapes, budget, scale):
    common, left = divmod(budget, sum(map(sum, shapes.values())))
    if common == 0:
        raise ValueError("too small")
    ranks = {}
    for name in sorted(shapes, key=lambda name: -sum(shapes[name])):
        if sum(shapes[name]) <= left:
            ranks[name], left = common + 1, left - sum(shapes[name])
    alphas = {name: scale * own for name, own in ranks.items()}
    return LoraConfig(
        r=common, lora_alpha=scale * common, target_modules=list(shapes), rank_pattern=ranks, alpha_pattern=alphas
    )


# %% mistake="spends what is left on one layer" of="budget-config" says="one more rank at most"
def config_for_budget(shapes, budget, scale):
    common, left = divmod(budget, sum(map(sum, shapes.values())))
    if common == 0:
        raise ValueError("too small")
    ranks = {}
    for name, shape in shapes.items():
        more, left = divmod(left, sum(shape))
        if more:
            ranks[name] = common + more
    alphas = {name: scale * own for name, own in ranks.items()}
    return LoraConfig(
        r=common, lora_alpha=scale * common, target_modules=list(shapes), rank_pattern=ranks, alpha_pattern=alphas
    )


# %% mistake="targets last names" of="budget-config" says="give target_modules the full names"
def config_for_budget(shapes, budget, scale):
    common, left = divmod(budget, sum(map(sum, shapes.values())))
    if common == 0:
        raise ValueError("too small")
    ranks = {}
    for name, shape in shapes.items():
        if sum(shape) <= left:
            ranks[name], left = common + 1, left - sum(shape)
    alphas = {name: scale * own for name, own in ranks.items()}
    targets = sorted({name.split(".")[-1] for name in shapes})
    return LoraConfig(
        r=common, lora_alpha=scale * common, target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas
    )


# %% mistake="takes the scale for alpha" of="budget-config" says="alpha is the scale times the rank"
def config_for_budget(shapes, budget, scale):
    common, left = divmod(budget, sum(map(sum, shapes.values())))
    if common == 0:
        raise ValueError("too small")
    ranks = {}
    for name, shape in shapes.items():
        if sum(shape) <= left:
            ranks[name], left = common + 1, left - sum(shape)
    return LoraConfig(r=common, lora_alpha=scale, target_modules=list(shapes), rank_pattern=ranks)


# %% alternative="an entry for every layer" of="budget-config"
def config_for_budget(shapes, budget, scale):
    import re

    ranks, spent = dict.fromkeys(shapes, 0), 0
    while True:
        round_cost = sum(d_out + d_in for d_out, d_in in shapes.values())
        if spent + round_cost > budget:
            break
        ranks = {name: own + 1 for name, own in ranks.items()}
        spent += round_cost
    if not all(ranks.values()):
        raise ValueError("the budget does not pay for rank 1")
    for name, shape in shapes.items():
        if spent + shape[0] + shape[1] <= budget:
            ranks[name] += 1
            spent += shape[0] + shape[1]
    return LoraConfig(
        target_modules=set(shapes),
        rank_pattern={re.escape(name): own for name, own in ranks.items()},
        alpha_pattern={re.escape(name): own * scale for name, own in ranks.items()},
    )


# %% [markdown]
# Now the model of this lesson. Its layer names and shapes are read from it, so the same lines work for any other. The budget is what rank 4 on all layers trains; three plans spend it.

# %%
model, tokenizer = base_model.load(model_id, device=device)  # in eval mode and float32
adapters.use_linear_layers(model)  # GPT-2 keeps its weights transposed (Conv1D); any other model stays as it is
model_parameters = sum(parameter.numel() for parameter in model.parameters())  # tied weights count once
shapes = {name: tuple(layer.weight.shape) for name, layer in adapters.linear_layers(model).items()}
places = {
    "attention": {name: shape for name, shape in shapes.items() if adapters.is_attention(name)},
    "feed-forward": {name: shape for name, shape in shapes.items() if not adapters.is_attention(name)},
    "all": shapes,
}
budget = rank * sum(sum(shape) for shape in shapes.values())


def trained_numbers(peft_model: nn.Module) -> int:
    """How many numbers require a gradient."""
    return sum(parameter.numel() for parameter in peft_model.parameters() if parameter.requires_grad)


rows = []
for place, own_shapes in places.items():
    config = config_for_budget(own_shapes, budget, scale)
    trained = trained_numbers(get_peft_model(copy.deepcopy(model), config))
    uniform = config.r * sum(sum(shape) for shape in own_shapes.values())
    rows.append((place, len(own_shapes), config.r, len(config.rank_pattern), uniform / budget, trained / budget))
columns = ["plan", "layers", "rank", "layers with one more", "spent at the common rank", "spent"]
formats = {"spent at the common rank": "{:.1%}", "spent": "{:.1%}"}
display(pd.DataFrame(rows, columns=columns).style.format(formats).hide(axis="index"))
print(f"budget: {budget:,d} trained numbers, {budget / model_parameters:.1%} of the model's {model_parameters:,d}")

# %% [markdown]
# With the patterns, three plans of different shape cost the same to within a layer's row. Keep this in mind when you read that "attention only is enough": at equal *rank*, attention alone trains a fraction of the numbers, and at equal *budget*, it has the higher rank.
#
# ## Predict the memory
#
# A training step holds four kinds of tensors: the weights; a gradient for each *trained* weight; the optimizer's state for each trained weight; and what the forward pass keeps for the backward pass (activations). The first three follow from the model alone. AdamW keeps two moments, `exp_avg` and `exp_avg_sq`, each like the parameter in shape and dtype, and for each parameter *tensor* one `step`, a `float32` scalar.
#
# **Exercise.** Two things.
#
# 1. *Predict*, before you compute: LoRA of rank 4 trains {{share_centre}} of this model. The bytes of weights, gradients and AdamW state are then which share of those of full finetuning? `predicted_memory_share` is a fraction: 0.25 means a quarter. Activations aside. It is graded for being a share, not for being right.
# 2. `training_bytes(model)` returns `{"weights": …, "gradients": …, "optimizer": …}`, the bytes as `int`, when the parameters with `requires_grad` are trained with `torch.optim.AdamW` at its defaults and each of them gets a gradient. Every parameter counts with its own dtype, a tied one once. Allocate nothing: the model may lie on the `meta` device, where tensors have a shape and no data.
#
# For `nn.Linear(4, 6)` in float32 (24 + 6 numbers in two tensors) it is `{"weights": 120, "gradients": 120, "optimizer": 248}`; with its weight frozen `{"weights": 120, "gradients": 24, "optimizer": 52}`. *About 7 lines.*
#
# <details><summary>Hint 1</summary>Which of the three counts frozen parameters as well?</details>
# <details><summary>Hint 2</summary><code>model.parameters()</code> yields a shared parameter once, <code>state_dict()</code> lists it under each of its names. <code>numel()</code> and <code>element_size()</code> work on the meta device.</details>
# <details><summary>Hint 3</summary>With own the bytes of a trained parameter: its gradient is own, its state 2 · own + 4. Sum over the parameters that require a gradient.</details>

# %% exercise="training-bytes" difficulty=2 minutes=8
predicted_memory_share = None
### BEGIN SOLUTION
predicted_memory_share = 0.3
### END SOLUTION


def training_bytes(model: nn.Module) -> dict[str, int]:
    """Return the bytes of the weights, of the gradients, and of AdamW's state."""
    ### BEGIN SOLUTION
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    trained = [size for size, wanted in sizes if wanted]
    return {
        "weights": sum(size for size, _ in sizes),
        "gradients": sum(trained),
        "optimizer": sum(2 * size + 4 for size in trained),
    }
    ### END SOLUTION


# %% check="training-bytes" points=1
assert isinstance(predicted_memory_share, (int, float, np.number)), (
    f"Predict with a number: set predicted_memory_share, now {predicted_memory_share!r}"
)
assert 0 < predicted_memory_share < 1, (
    f"predicted_memory_share is a share between 0 and 1 (0.03 for 3 %), not {predicted_memory_share}"
)

# %% check="training-bytes" points=2
layer = nn.Linear(4, 6)
got = training_bytes(layer)
assert set(got) == {"weights", "gradients", "optimizer"}, (
    f'The keys are "weights", "gradients", "optimizer"; yours are {sorted(got)}'
)
assert got["weights"] == 120, f"30 numbers of 4 bytes are 120 bytes of weights; yours {got['weights']}"
assert got["gradients"] == 120, f"Each trained number has a gradient of its dtype: 120 bytes; yours {got['gradients']}"
assert got["optimizer"] != 120, "AdamW keeps two moments for each trained number, not one"
assert got["optimizer"] != 240, (
    "240 bytes are the two moments; AdamW also keeps a step counter, 4 bytes for each parameter tensor"
)
assert got["optimizer"] == 248, f"Two moments of 120 bytes and two counters of 4: 248; yours {got['optimizer']}"
layer.weight.requires_grad_(False)
got = training_bytes(layer)
assert got["weights"] == 120, f"A frozen weight still lies in memory: 120 bytes of weights, yours {got['weights']}"
assert (got["gradients"], got["optimizer"]) == (24, 52), (
    f"A frozen parameter has neither gradient nor optimizer state: with the bias alone trained they are 24 and 52 bytes; "
    f"yours {got['gradients']} and {got['optimizer']}"
)
### BEGIN HIDDEN TESTS
assert training_bytes(nn.Linear(3, 2).requires_grad_(False)) == {"weights": 32, "gradients": 0, "optimizer": 0}, (
    "With nothing trained, gradients and optimizer take 0 bytes"
)
### END HIDDEN TESTS

# %% check="training-bytes" points=2
half = nn.Linear(4, 6, dtype=torch.bfloat16)
assert training_bytes(half) == {"weights": 60, "gradients": 60, "optimizer": 128}, (
    f"A bfloat16 number takes 2 bytes, in the weight, the gradient and both moments: ask each parameter for its "
    f"element_size(); yours {training_bytes(half)}"
)
tied = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
tied[1].weight = tied[0].weight
assert training_bytes(tied)["weights"] == 100, (
    f"A tied weight lies in memory once: 100 bytes here, yours {training_bytes(tied)['weights']}; count parameters(), not "
    "state_dict()"
)
huge = nn.Linear(1_000_000, 1_000_000, bias=False, device="meta")
assert training_bytes(huge)["weights"] == 4 * 10**12, "A layer on the meta device has its size, and no data: 4e12 bytes"
both = nn.Sequential(nn.Linear(5, 5, bias=False, device="meta"), nn.Linear(5, 5, bias=False, device="meta"))
assert training_bytes(both)["weights"] == 200, (
    f"Two layers on the meta device, 200 bytes; yours {training_bytes(both)['weights']}. There, each tensor has the address "
    "0, so an address can't tell which are tied"
)
### BEGIN HIDDEN TESTS
for _dtype in (torch.float32, torch.bfloat16, torch.float64):
    _model = tiny_llama().requires_grad_(False).to(_dtype)
    _lora = get_peft_model(_model, LoraConfig(r=3, target_modules="all-linear"), autocast_adapter_dtype=False)
    _optimizer = torch.optim.AdamW([_p for _p in _lora.parameters() if _p.requires_grad])
    _lora(input_ids=torch.arange(6)[None]).logits.sum().backward()
    _optimizer.step()
    _true = {
        "weights": sum(_p.nbytes for _p in _lora.parameters()),
        "gradients": sum(_p.grad.nbytes for _p in _lora.parameters() if _p.grad is not None),
        "optimizer": sum(_t.nbytes for _state in _optimizer.state.values() for _t in _state.values()),
    }
    assert training_bytes(_lora) == _true, f"On a Llama with LoRA in {_dtype}: the tensors take {_true}"
### END HIDDEN TESTS

# %% mistake="predicts in percent" of="training-bytes" says="a share between 0 and 1"
predicted_memory_share = 30


def training_bytes(model):
    sizes = [(p.nbytes, p.requires_grad) for p in model.parameters()]
    trained = [size for size, wanted in sizes if wanted]
    return {
        "weights": sum(s for s, _ in sizes),
        "gradients": sum(trained),
        "optimizer": sum(2 * s + 4 for s in trained),
    }


# %% mistake="forgets the counters" of="training-bytes" says="a step counter"
predicted_memory_share = 0.3


def training_bytes(model):
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return {"weights": sum(p.nbytes for p in model.parameters()), "gradients": trained, "optimizer": 2 * trained}


# %% mistake="gives frozen weights a gradient" of="training-bytes" says="neither gradient nor optimizer state"
predicted_memory_share = 0.3


def training_bytes(model):
    total, tensors = sum(p.nbytes for p in model.parameters()), len(list(model.parameters()))
    return {"weights": total, "gradients": total, "optimizer": 2 * total + 4 * tensors}


# %% mistake="leaves the frozen weights out" of="training-bytes" says="still lies in memory"
predicted_memory_share = 0.05


def training_bytes(model):
    trained = [p.nbytes for p in model.parameters() if p.requires_grad]
    return {"weights": sum(trained), "gradients": sum(trained), "optimizer": sum(2 * size + 4 for size in trained)}


# %% mistake="four bytes for everything" of="training-bytes" says="ask each parameter"
predicted_memory_share = 0.3


def training_bytes(model):
    trained = [4 * p.numel() for p in model.parameters() if p.requires_grad]
    total = sum(4 * p.numel() for p in model.parameters())
    return {"weights": total, "gradients": sum(trained), "optimizer": sum(2 * size + 4 for size in trained)}


# %% mistake="counts the state dict" of="training-bytes" says="count parameters()"
predicted_memory_share = 0.3


def training_bytes(model):
    trained = [p.nbytes for p in model.parameters() if p.requires_grad]
    total = sum(t.nbytes for t in model.state_dict().values())
    return {"weights": total, "gradients": sum(trained), "optimizer": sum(2 * size + 4 for size in trained)}


# %% mistake="knows tied weights by their address" of="training-bytes" says="an address can't tell which are tied"
predicted_memory_share = 0.3


def training_bytes(model):
    stored = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    trained = [p.nbytes for p in model.parameters() if p.requires_grad]
    return {
        "weights": sum(stored.values()),
        "gradients": sum(trained),
        "optimizer": sum(2 * size + 4 for size in trained),
    }


# %% alternative="adds up in one loop" of="training-bytes"
predicted_memory_share = 0.26


def training_bytes(model):
    totals = {"weights": 0, "gradients": 0, "optimizer": 0}
    for _, parameter in model.named_parameters():
        totals["weights"] += parameter.nbytes
        if parameter.requires_grad:
            totals["gradients"] += parameter.nbytes
            totals["optimizer"] += parameter.nbytes * 2 + torch.tensor(0.0).element_size()
    return totals


# %% [markdown]
# Then measure: one real step of AdamW on eight tickets, and the bytes of the tensors that exist afterwards. `saved_tensors_hooks` shows each tensor that autograd keeps for the backward pass; weights among them aren't counted again.


# %%
def measured_bytes(trained_model: nn.Module, batch: triage.Batch) -> dict[str, int]:
    """The bytes that one training step really holds, by kind."""
    own = {parameter.untyped_storage().data_ptr() for parameter in trained_model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    optimizer = torch.optim.AdamW([p for p in trained_model.parameters() if p.requires_grad], lr=0.0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = triage.loss(trained_model, batch)
    loss.backward()
    optimizer.step()
    gradients = [p.grad for p in trained_model.parameters() if p.grad is not None]
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return {
        "weights": sum(tensor.nbytes for tensor in trained_model.parameters()),
        "gradients": sum(tensor.nbytes for tensor in gradients),
        "optimizer": sum(tensor.nbytes for tensor in states),
        "activations": sum(kept.values()),
    }


world = World(LESSON_SEEDS[seed])
eight = triage.collate(triage.encode(tokenizer, world.tickets(8, part="train")))
ranks = [max(1, rank // 4), rank, 4 * rank]
predicted: dict[str, dict[str, int]] = {}
measured: dict[str, dict[str, int]] = {}
for own_rank in (0, *ranks):
    job = f"rank {own_rank}" if own_rank else "all weights"
    trained_model = copy.deepcopy(model).requires_grad_(True)
    if own_rank:
        config = LoraConfig(r=own_rank, lora_alpha=scale * own_rank, target_modules="all-linear")
        trained_model = get_peft_model(trained_model, config)  # freezes everything but the adapters
    predicted[job] = training_bytes(trained_model)
    measured[job] = measured_bytes(trained_model, eight)
bytes_off = max(abs(predicted[job][kind] - measured[job][kind]) for job in predicted for kind in predicted[job])
table = pd.DataFrame(measured).T.assign(predicted=[sum(predicted[job].values()) for job in predicted])
table.insert(3, "these three", table[["weights", "gradients", "optimizer"]].sum(axis=1))
display((table[["weights", "gradients", "optimizer", "these three", "predicted", "activations"]]).style.format("{:,d}"))
print(f"largest difference between a predicted and a measured number: {bytes_off} bytes")

held = {job: sum(predicted[job].values()) for job in predicted}
memory_share = held[f"rank {rank}"] / held["all weights"]
compare([("bytes of LoRA, as a share of full finetuning's", predicted_memory_share, memory_share)], format=".1%")
card.record("bytes_off", bytes_off, format=",d", label="predicted and measured bytes differ by at most", unit="B")
for name, job in (("memory_full", "all weights"), ("memory_lora", f"rank {rank}")):
    card.record(name, held[job] / 2**20, format=".1f", label=f"weights, gradients, optimizer, {job}", unit="MiB")
    amount = measured[job]["activations"] / 2**20
    card.record(
        f"{name}_kept", amount, format=".1f", label=f"kept for the backward pass, {job}", unit="MiB", tolerance=2
    )
card.record("memory_share", memory_share, format=".1%", label="of these, LoRA's share of full finetuning's")
del trained_model

# %% [markdown]
# Prediction and measurement differ by {{bytes_off}} bytes. Rank 4 trains {{share_centre}} of the weights and needs {{memory_share}} of the bytes: the frozen weights are still there. In float32 they are a quarter of full finetuning's weights, gradients and two moments, so LoRA alone can never do better than 25 %. To go lower one must store the frozen weights in fewer bits, which is what QLoRA does.
#
# And the activations? Eight short tickets keep {{memory_full_kept}} MiB in full finetuning and {{memory_lora_kept}} MiB with LoRA. Freezing a layer saves them little: the gradient must still pass *through* every layer, and each factor $A$ needs its layer's input. They grow with batch size and length, and gradient checkpointing is the tool against them, with LoRA or without.
#
# Your function takes any model, also one that fits no memory. `accelerate`'s `init_empty_weights` builds it on the `meta` device: shapes without data.

# %%
GIB = 2**30
sizes_of_8b = {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
with init_empty_weights():
    big = LlamaForCausalLM(LlamaConfig(**sizes_of_8b, num_attention_heads=32, num_key_value_heads=8)).to(torch.bfloat16)
    big_jobs = {"all weights\nin bfloat16": training_bytes(big)}
    big_parameters = sum(parameter.numel() for parameter in big.parameters())
    big_lora = get_peft_model(big, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
big_jobs["rank 16"] = training_bytes(big_lora)
factor_dtype = next(p.dtype for p in big_lora.parameters() if p.requires_grad)
print(
    f"{big_parameters / 1e9:.2f}e9 parameters; rank 16 trains {trained_numbers(big_lora) / 1e6:.1f}e6 in {factor_dtype}"
)

kinds = {
    "weights": COLOURS.before,
    "gradients": COLOURS.other,
    "optimizer": COLOURS.after,
    "activations": COLOURS.library,
}
fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), width_ratios=[1.9, 1])
for ax, bars, unit in ((left, measured, 2**20), (right, big_jobs, GIB)):
    gap = 1 if ax is left else 0  # room for the names beside the first bar
    positions = [0, *(place + gap for place in range(1, len(bars)))]
    bottom = np.zeros(len(bars))
    for kind, colour in kinds.items():
        heights = np.array([parts.get(kind, 0) / unit for parts in bars.values()])
        ax.bar(positions, heights, bottom=bottom, color=colour, width=0.7)
        if ax is left:
            direct_label(ax, 0.35, bottom[0] + heights[0] / 2, kind, colour, offset=(5, -4))
        bottom += heights
    ax.set_xticks(positions, list(bars))
    ax.grid(axis="x", visible=False)
left.set(ylabel="MiB", title="This model, one step on eight tickets (measured)")
right.set(ylabel="GiB, without activations", title="An 8B model (computed)")
plt.show()
for name, job in (("big_full", "all weights\nin bfloat16"), ("big_lora", "rank 16")):
    label = f"8B parameters: weights, gradients, optimizer, {job.split(chr(10))[0]}"
    card.record(name, sum(big_jobs[job].values()) / GIB, format=".1f", label=label, unit="GiB")
del big, big_lora

# %% [markdown]
# The left panel is the measured step, the right one arithmetic: {{big_full}} GiB for all weights in bfloat16, {{big_lora}} GiB with rank 16. Nearly all of the second number is frozen weights; gradients and optimizer state can hardly be seen. Neither panel shows what the CUDA context, the allocator's fragments and temporary buffers add. And nobody trains 8B weights in pure bfloat16 without thinking about it twice: usual mixed precision keeps float32 weights as well and needs about 16 bytes a parameter (Rajbhandari et al., 2020, section 3.1). `peft`, you see above, keeps its factors in float32 even beside a bfloat16 base.

# %% [markdown]
# ## Train, save, load, merge
#
# One function trains one adapter for one company and says what it scores on the company's unseen tickets. It is written so that its *text* can be put into a notebook: it takes everything it uses as arguments. The losses are those of the answer, in nats a token; an answer counts as right (exact match) if all four fields of the triage are. The share of single fields that are right moves earlier, so it is kept too.


# %%
def evaluate(model: Any, tokenizer: Any, tickets: list, answer: bool = True) -> dict[str, float]:
    """The loss of the right answers (nats a token); with `answer` also how many answers and fields are right."""
    with torch.no_grad():
        loss = triage.loss(model, triage.collate(triage.encode(tokenizer, tickets))).item()
    if not answer:
        return {"loss": loss}
    score = triage.score(triage.answers(model, tokenizer, tickets), tickets)
    fields = sum(float(right.mean()) for right in score.fields.values()) / len(score.fields)
    return {"loss": loss, "right": int(score.exact.sum()), "of": len(tickets), "fields": fields}


def finetune(config: LoraConfig | None, company: int, settings: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """Train an adapter on a company's tickets, or none; return the model and its scores on unseen tickets."""
    model, tokenizer = base_model.load(settings["model_id"], device=settings["device"])
    adapters.use_linear_layers(model)
    world = World(LESSON_SEEDS[company])
    trained = 0
    if config is not None:
        torch.manual_seed(company)  # peft draws A from torch's generator
        model = get_peft_model(model, config).eval()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        examples = triage.encode(tokenizer, world.tickets(settings["train_tickets"], part="train"))
        steps = settings["steps"]
        batches = triage.batches(examples, size=settings["batch_size"], steps=steps, seed=company)
        triage.train(model, batches, steps=steps, learning_rate=settings["learning_rate"], label=f"company {company}")
    scores = evaluate(model, tokenizer, world.tickets(settings["test_tickets"], part="test"), settings["answer"])
    return model, {"company": company, "trained": trained, **scores}


def lora(own_rank: int, alpha: float) -> LoraConfig:
    """A configuration with one rank and one alpha on all linear layers."""
    return LoraConfig(task_type="CAUSAL_LM", r=own_rank, lora_alpha=alpha, target_modules="all-linear")


companies = [seed + run for run in range(runs)]
settings = {
    "model_id": str(model_id),
    "device": device,
    "learning_rate": learning_rate,
    "steps": steps,
    "batch_size": batch_size,
    "train_tickets": train_tickets,
    "test_tickets": test_tickets,
    "answer": True,
}
short = settings | {"steps": short_steps, "answer": False}  # a short training, and no answers are written
folders = [Path(workplace.name, name) for name in ("adapter", "adapter-of-another-team")]
first_model, in_process = finetune(lora(rank, scale * rank), companies[0], settings)
first_model.save_pretrained(str(folders[0]))
finetune(lora(rank, scale * rank), companies[0] + 1, short)[0].save_pretrained(str(folders[1]))
print(in_process)
saved = json.loads((folders[0] / "adapter_config.json").read_text())
for key in ("base_model_name_or_path", "revision", "r", "lora_alpha", "target_modules"):
    value = Path(saved[key]).name if key == "base_model_name_or_path" else saved[key]  # the last part of a local path
    print(f"{key:<24} {sorted(value) if isinstance(value, list) else value}")

# %% [markdown]
# `save_pretrained` wrote the factors and a configuration. What the configuration knows of the base is a *name*, and perhaps a revision: `peft` notes where the model was loaded from and, when you later load the adapter onto a model of your own, doesn't compare it with anything.
#
# Loading and merging must give the same function. You check both on logits:


# %%
def fresh_base() -> PreTrainedModel:
    """The base model as it was loaded at first."""
    base, _ = base_model.load(model_id, device=device)
    return adapters.use_linear_layers(base)


@torch.no_grad()
def logits_of(any_model: nn.Module) -> Tensor:
    """The logits on eight tickets with their answers, (8, t, vocabulary)."""
    batch = eight.to(device)
    return any_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


before, trained_logits = logits_of(model), logits_of(first_model)
loaded = PeftModel.from_pretrained(fresh_base(), str(folders[0])).eval()
reload_error = (logits_of(loaded) - trained_logits).abs().max().item()
merged = loaded.merge_and_unload()  # adds each update into its weight and takes the wrappers off
merge_error = (logits_of(merged) - trained_logits).abs().max().item()
moved = (trained_logits - before).abs().max().item()
print(f"training moved a logit by at most         {moved:.3g}")
print(f"saved and loaded, it differs by at most   {reload_error:.3g}")
print(f"merged in float32, by at most             {merge_error:.3g}")
card.record(
    "reload_error", reload_error, format=".1g", label="a loaded adapter's logits differ by at most", tolerance=1e-6
)
card.record("merge_error", merge_error, format=".0e", label="merged in float32, they differ by at most", tolerance=1e-3)

# %% [markdown]
# Loaded, the adapter's logits differ by {{reload_error}} from those it was saved with; merged, by {{merge_error}}, the rounding of sums in another order. A loaded adapter that differs by more than this is not the one you trained, or not on what you trained it on.
#
# ## The wrong base
#
# Now the bug. An adapter is a difference: $sBA$ was trained to be added to one particular $W$. Every weight of the same shape accepts it. Three ways to get there:
#
# - Somebody merged this adapter into the checkpoint, published it under the old name, and the server still loads the adapter: it is applied twice.
# - Another team merged *its* adapter into the shared checkpoint.
# - The name points to other weights of the same architecture: base instead of instruct, a newer revision, a training that was started anew. Here, the extreme: the architecture with fresh random weights.


# %%
def merged_into_base(folder: Path) -> nn.Module:
    """A base that already holds an adapter in its weights."""
    return PeftModel.from_pretrained(fresh_base(), str(folder)).merge_and_unload()


def other_weights() -> PreTrainedModel:
    """The same architecture with random weights."""
    torch.manual_seed(seed)
    other = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=torch.float32)
    return adapters.use_linear_layers(other.to(device).eval())


bases: dict[str, Callable[[], nn.Module]] = {
    "its own base": fresh_base,
    "this adapter merged already": lambda: merged_into_base(folders[0]),
    "another adapter merged": lambda: merged_into_base(folders[1]),
    "other weights, same shapes": other_weights,
}
test = World(LESSON_SEEDS[companies[0]]).tickets(test_tickets, part="test")
served: dict[str, dict[str, float]] = {}
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    for name, make in bases.items():
        server = PeftModel.from_pretrained(make(), str(folders[0])).eval()
        served[name] = evaluate(server, tokenizer, test)
about_the_base = [str(warning.message) for warning in heard if "base" in str(warning.message).lower()]
print(f"loaded on {len(served)} of {len(bases)} bases; warnings that speak of the base: {len(about_the_base)}")

fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6))
for place, scores in enumerate(served.values()):
    colour = COLOURS.after if place == 0 else COLOURS.wrong
    for ax, value, text in (
        (left, scores["fields"], f"{scores['fields']:.0%}"),
        (right, scores["loss"], f"{scores['loss']:.2f}"),
    ):
        ax.bar(place, value, width=0.5, color=colour)
        direct_label(ax, place, value, text, colour, offset=(-12, 4))
for ax in (left, right):
    ax.set_xticks(range(len(served)), ["its own\nbase", "its own,\nmerged", "another's\nmerge", "other\nweights"])
    ax.grid(axis="x", visible=False)
left.set(ylim=(0, 1.05), ylabel="single fields right (share)")
left.set_title("One adapter on four bases")
right.set(ylabel="loss (nats a token)", title="Each of them loads")
right.set_ylim(top=1.12 * max(scores["loss"] for scores in served.values()))
plt.show()
for key, name in zip(("own", "twice", "other", "untrained"), served, strict=True):
    label = f"single fields right with the adapter on: {name}"
    card.record(f"fields_{key}", served[name]["fields"], format=".0%", label=label, tolerance=0.15)
    card.record(
        f"loss_{key}", served[name]["loss"], format=".2f", label=f"loss on: {name}", unit="nats a token", tolerance=2
    )

# %% [markdown]
# On its own base the adapter gets {{fields_own}} of the single fields right (loss {{loss_own}}); applied twice {{fields_twice}} ({{loss_twice}}), on another team's merge {{fields_other}} ({{loss_other}}), on other weights {{fields_untrained}} ({{loss_untrained}}). Each of the four loads. The tickets are one company's and few; the point is not how large the damage is, but that nothing reports it. A small damage is the worst case, because a smoke test passes.
#
# So keep a **fingerprint** of the base's weights beside the adapter, and compare it before loading. The pieces that are not the point are given: which tensors of a model are the base's, and the saving.


# %%
def base_weights(any_model: nn.Module) -> dict[str, Tensor]:
    """The base's tensors by their names, whether or not peft has wrapped the model; adapters are left out."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in any_model.state_dict().items()
        if "lora_" not in name
    }


plain, wrapped = (
    base_weights(tiny_llama()),
    base_weights(get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear"))),
)
print(f"{len(plain)} tensors, the same names when wrapped: {plain.keys() == wrapped.keys()}; two of them:")
for name in list(plain)[:2]:
    print(f"  {name} {tuple(plain[name].shape)} {plain[name].dtype}")

# %% [markdown]
# **Exercise.** Two functions.
#
# 1. `fingerprint(weights)` returns a SHA-256 digest as 64 hexadecimal digits. `weights` is a dictionary of name → tensor of any dtype, also bfloat16, on any device. The digest is the same for the same names and tensors: in any order of the dictionary, in any process, and whether or not a tensor is contiguous in memory. It is another one as soon as a name, a shape, a dtype or one bit of one number differs.
# 2. `load_checked(base, folder)` returns the `PeftModel` of the adapter in `folder` (a `Path`) on `base`, in `eval` mode, if the text of `folder / "base.sha256"` is the fingerprint of `base_weights(base)`. Otherwise, and also if there is no such file, it raises `ValueError`, and **leaves `base` as it was**. (`PeftModel.from_pretrained` puts its wrappers *into* the model it is given.)
#
# To the bytes of a tensor `t`: `t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()`. NumPy alone knows no bfloat16. *About 6 lines and 5 lines.*
#
# <details><summary>Hint 1</summary>A hash object takes bytes piece by piece. What must you feed it besides the numbers, and in which order, so that the same weights always give the same stream?</details>
# <details><summary>Hint 2</summary><code>digest = hashlib.sha256()</code>, <code>digest.update(some_bytes)</code>, <code>digest.hexdigest()</code>. <code>str(tensor)</code> abbreviates large tensors, <code>hash()</code> of a string differs between processes, and <code>dict</code> keeps the order of insertion.</details>
# <details><summary>Hint 3</summary>For each name in sorted order: update with f"{name} {dtype} {tuple(shape)}\n".encode(), then with the tensor's bytes. In load_checked: read the file if it exists, compare, raise ValueError if they differ; only then call PeftModel.from_pretrained(base, str(folder)).eval().</details>


# %% exercise="fingerprint" difficulty=3 minutes=10
def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 digest of names, dtypes, shapes and numbers, as 64 hexadecimal digits."""
    ### BEGIN SOLUTION
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
    ### END SOLUTION


def load_checked(base: nn.Module, folder: Path) -> PeftModel:
    """Load the adapter onto the base it was trained on; raise ValueError for any other, and leave that one alone."""
    ### BEGIN SOLUTION
    note = folder / "base.sha256"
    if not note.is_file():
        raise ValueError(f"{note} is missing: nobody knows which base this adapter was trained on")
    if note.read_text().strip() != fingerprint(base_weights(base)):
        raise ValueError(f"the adapter in {folder} was trained on other weights than those of this base")
    return PeftModel.from_pretrained(base, str(folder)).eval()
    ### END SOLUTION


# %% check="fingerprint" points=2
generator = torch.Generator().manual_seed(3)
weights = {"b": torch.randn(40, 50, generator=generator), "a": torch.randn(7, generator=generator)}
got = fingerprint(weights)
assert isinstance(got, str), f"Return the digest as text, from hexdigest(); yours is a {type(got).__name__}"
assert (len(got), set(got) <= set("0123456789abcdef")) == (64, True), (
    f"Return the digest as 64 hexadecimal digits, from hexdigest(); yours is {got!r}"
)
assert fingerprint(dict(reversed(weights.items()))) == got, (
    "The same weights in another order of the dictionary must have the same fingerprint: go through the names sorted"
)
assert (
    fingerprint(
        {name: tensor.T.contiguous().T for name, tensor in weights.items() if tensor.ndim == 2} | {"a": weights["a"]}
    )
    == got
), (  # fmt: skip
    "A tensor that isn't contiguous holds the same numbers: call contiguous() before you take its bytes"
)
changed = {name: tensor.clone() for name, tensor in weights.items()}
changed["b"][20, 25] = torch.nextafter(changed["b"][20, 25], torch.tensor(9.0))
assert fingerprint(changed) != got, (
    "One number in the middle of a (40, 50) tensor changed by one bit, and your fingerprint did not: feed it all the bytes, "
    "not a sum, a norm or a printed tensor"
)
assert fingerprint({"a": weights["a"].flip(0), "b": weights["b"]}) != got, (
    "The same numbers at other places are another model: feed the bytes in order"
)
assert fingerprint({"a": weights["a"], "c": weights["b"]}) != got, (
    "A tensor with another name is another model: feed the names"
)
assert fingerprint({"b": weights["b"].reshape(50, 40), "a": weights["a"]}) != got, (
    "The same bytes in another shape are another model: feed the shapes too"
)
zeros = [fingerprint({"a": torch.zeros(4, dtype=dtype)}) for dtype in (torch.float32, torch.int32)]
assert zeros[0] != zeros[1], "Four zeros in float32 and in int32 have the same bytes: feed the dtype too"
fine = [fingerprint({"a": torch.tensor([value])}) for value in (2**53, 2**53 + 1)]
assert fine[0] != fine[1], (
    "Two int64 numbers that differ by 1 have one fingerprint: take each tensor's own bytes, unconverted"
)


class Renamed(str):
    """An equal string with another hash(), as it has in another process."""

    def __hash__(self) -> int:
        return 1 + super().__hash__()


assert fingerprint({Renamed(name): tensor for name, tensor in weights.items()}) == got, (
    "hash() of a string is another number in each process: feed the text of the name"
)
### BEGIN HIDDEN TESTS
_bf16 = {
    "w": torch.randn(5, 3, generator=generator).to(torch.bfloat16),
    "scalar": torch.tensor(2.0),
    "none": torch.zeros(0, 3),
}
_one = fingerprint(_bf16)
assert _one == fingerprint({_name: _tensor.clone() for _name, _tensor in _bf16.items()}), (
    "The same tensors, copied: the same"
)
assert _one != fingerprint(_bf16 | {"scalar": torch.tensor(3.0)}), "A tensor without dimensions counts as well"
assert _one != fingerprint({_name: _tensor.float() for _name, _tensor in _bf16.items()}), "bfloat16 is not float32"
_parameter = nn.Parameter(torch.ones(2, 2))
assert fingerprint({"p": _parameter}) == fingerprint({"p": torch.ones(2, 2)}), "A parameter is a tensor: detach() it"
assert fingerprint({"p": torch.full((2, 3), 1.0)}) != fingerprint({"p": torch.full((2, 3), -1.0)}), (
    "Other numbers: other"
)
assert fingerprint({"x": torch.arange(3), "y": torch.arange(4)}) != fingerprint(
    {"y": torch.arange(3), "x": torch.arange(4)}
), "Two tensors that changed their names are another model"
### END HIDDEN TESTS


# %% check="fingerprint" points=2
def saved_adapter(folder: Path) -> nn.Module:
    """Save an adapter for a tiny Llama, with the fingerprint of its base; return peft's model."""
    peft_model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).eval()
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    peft_model.save_pretrained(str(folder))
    (folder / "base.sha256").write_text(fingerprint(base_weights(peft_model)))
    return peft_model


def refused(base: nn.Module, folder: Path) -> Exception | None:
    """What load_checked raises, or None."""
    try:
        load_checked(base, folder)
    except Exception as error:
        return error
    return None


with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    want = saved_adapter(folder)
    loaded = load_checked(tiny_llama(), folder)
    assert isinstance(loaded, PeftModel), f"Return the PeftModel; yours is {type(loaded).__name__}"
    assert not loaded.training, "Return the model in eval mode: from_pretrained(...).eval()"
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(input_ids=ids).logits, want(input_ids=ids).logits), (
        "On the right base, the loaded adapter must give the logits it was saved with"
    )
    other = tiny_llama()
    other.model.layers[1].mlp.up_proj.weight.data[3, 4] += 0.01
    kept = copy.deepcopy(other.state_dict())
    error = refused(other, folder)
    assert isinstance(error, ValueError), (
        "One weight of this base differs from the one the adapter was trained on: raise ValueError, and yours "
        f"{'raises ' + type(error).__name__ if error else 'loads it'}"
    )
    assert other.state_dict().keys() == kept.keys(), (
        "You refuse this base after you put the adapter into it: compare the fingerprints before from_pretrained"
    )
    (folder / "base.sha256").unlink()
    error = refused(tiny_llama(), folder)
    assert isinstance(error, ValueError), (
        "Without base.sha256 nobody knows what the adapter was trained on: raise ValueError, and yours "
        f"{'raises ' + type(error).__name__ if error else 'loads it'}"
    )
### BEGIN HIDDEN TESTS
with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    want = saved_adapter(folder)
    _merged = PeftModel.from_pretrained(tiny_llama(), str(folder)).merge_and_unload()
    assert isinstance(refused(_merged, folder), ValueError), "A base that holds this adapter already must be refused"
    (folder / "base.sha256").write_text("0" * 64)
    assert isinstance(refused(tiny_llama(), folder), ValueError), "A file with another fingerprint must be refused"
### END HIDDEN TESTS


# %% mistake="hashes what print shows" of="fingerprint" says="not a sum, a norm or a printed tensor"
def fingerprint(weights):
    return hashlib.sha256(
        "".join(f"{name} {weights[name].contiguous()}" for name in sorted(weights)).encode()
    ).hexdigest()


def load_checked(base, folder):
    if (folder / "base.sha256").exists() and (folder / "base.sha256").read_text() == fingerprint(base_weights(base)):
        return PeftModel.from_pretrained(base, str(folder)).eval()
    raise ValueError("wrong base")


# %% mistake="hashes sums" of="fingerprint" says="feed the bytes in order"
def fingerprint(weights):
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(
            f"{name} {tensor.shape} {tensor.dtype} {tensor.double().sort().values.flatten().sort().values.tolist()}".encode()
        )
    return digest.hexdigest()


def load_checked(base, folder):
    if (folder / "base.sha256").exists() and (folder / "base.sha256").read_text() == fingerprint(base_weights(base)):
        return PeftModel.from_pretrained(base, str(folder)).eval()
    raise ValueError("wrong base")


# %% mistake="follows the order of the dictionary" of="fingerprint" says="go through the names sorted"
def fingerprint(weights):
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_checked(base, folder):
    if (folder / "base.sha256").exists() and (folder / "base.sha256").read_text() == fingerprint(base_weights(base)):
        return PeftModel.from_pretrained(base, str(folder)).eval()
    raise ValueError("wrong base")


# %% mistake="hashes the numbers alone" of="fingerprint" says="feed the names"
def fingerprint(weights):
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_checked(base, folder):
    if (folder / "base.sha256").exists() and (folder / "base.sha256").read_text() == fingerprint(base_weights(base)):
        return PeftModel.from_pretrained(base, str(folder)).eval()
    raise ValueError("wrong base")


# %% mistake="checks after loading" of="fingerprint" says="before from_pretrained"
def fingerprint(weights):
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {weights[name].dtype} {tuple(weights[name].shape)}".encode())
        digest.update(weights[name].detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_checked(base, folder):
    loaded = PeftModel.from_pretrained(base, str(folder)).eval()
    if not (folder / "base.sha256").exists() or (folder / "base.sha256").read_text() != fingerprint(
        base_weights(loaded)
    ):
        raise ValueError("wrong base")
    return loaded


# %% mistake="lets an adapter without a fingerprint pass" of="fingerprint" says="Without base.sha256"
def fingerprint(weights):
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {weights[name].dtype} {tuple(weights[name].shape)}".encode())
        digest.update(weights[name].detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_checked(base, folder):
    note = folder / "base.sha256"
    if note.exists() and note.read_text() != fingerprint(base_weights(base)):
        raise ValueError("wrong base")
    return PeftModel.from_pretrained(base, str(folder)).eval()


# %% mistake="compares the names that peft noted" of="fingerprint" says="One weight of this base differs"
def fingerprint(weights):
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {weights[name].dtype} {tuple(weights[name].shape)}".encode())
        digest.update(weights[name].detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_checked(base, folder):
    note = json.loads((folder / "adapter_config.json").read_text())
    if (note["base_model_name_or_path"] or "") != base.name_or_path or not (folder / "base.sha256").exists():
        raise ValueError("wrong base")
    return PeftModel.from_pretrained(base, str(folder)).eval()


# %% mistake="converts to one dtype" of="fingerprint" says="unconverted"
def fingerprint(weights):
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.double().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_checked(base, folder):
    stored = folder / "base.sha256"
    if not stored.exists() or stored.read_text() != fingerprint(base_weights(base)):
        raise ValueError("not the base that this adapter was trained on")
    return PeftModel.from_pretrained(base, str(folder)).eval()


# %% mistake="hashes with hash()" of="fingerprint" says="another number in each process"
def fingerprint(weights):
    parts = []
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        raw = tensor.flatten().view(torch.uint8).numpy().tobytes()
        parts.append(f"{hash(name)} {tensor.dtype} {tuple(tensor.shape)} {raw.hex()}")
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def load_checked(base, folder):
    stored = folder / "base.sha256"
    if not stored.exists() or stored.read_text() != fingerprint(base_weights(base)):
        raise ValueError("not the base that this adapter was trained on")
    return PeftModel.from_pretrained(base, str(folder)).eval()


# %% alternative="a digest of digests" of="fingerprint"
def fingerprint(weights):
    lines = []
    for name, tensor in weights.items():
        raw = bytes(
            tensor.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist()
        )
        lines.append(repr((name, str(tensor.dtype), list(tensor.shape), hashlib.sha256(raw).hexdigest())))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def load_checked(base, folder):
    try:
        noted = Path(folder, "base.sha256").read_text()
    except FileNotFoundError as error:
        raise ValueError("no fingerprint") from error
    if fingerprint(base_weights(base)) != noted:
        raise ValueError("another base")
    loaded = PeftModel.from_pretrained(base, folder)
    loaded.eval()
    return loaded


# %% [markdown]
# The four bases of the figure, once more:

# %%
(folders[0] / "base.sha256").write_text(fingerprint(base_weights(first_model)))
for name, make in bases.items():
    try:
        load_checked(make(), folders[0])
        print(f"{name:<30} loaded")
    except ValueError:
        print(f"{name:<30} refused")

# %% [markdown]
# It is strict: a base that was cast to bfloat16 is refused as well. That is a decision, and the right default: an adapter evaluated on float32 weights is another model on rounded ones (lesson 2.1 measures by how much). If your serving stack casts, store the fingerprint of what it serves, and evaluate that. For models on the Hub the cheap form of the same check is a pinned commit: load the base with `revision="<commit hash>"`, store it in `adapter_config.json`, and refuse a name without one.

# %% [markdown]
# ## A sweep is a notebook with parameters
#
# papermill runs a notebook like a function: it puts a cell with your values behind the one tagged `parameters` (one plain assignment a line there, so that it can warn of a name that isn't there), executes everything in a fresh kernel, and saves the executed notebook, with code, outputs, log and, if it comes to that, the traceback. One file a run, which a colleague can open. (`course run` does the same with this lesson.)
#
# The template below has four cells: default parameters, imports, the text of `evaluate` and `finetune`, and the run. The last one displays its result under a MIME type of its own, so that a program finds it among the outputs without parsing what is printed.

# %%
RESULT = "application/vnd.sweep.result+json"

PARAMETERS = """
rank = 4
alpha = 32
learning_rate = 2.5e-3
companies = [0]
steps = 8
batch_size = 2
train_tickets = 64
test_tickets = 8
model_id = "shipped"
device = "cpu"
answer = True
"""
IMPORTS = """
from typing import Any
import torch
from IPython.display import display
from peft import LoraConfig, get_peft_model
from labkit import adapters, base_model, triage
from labkit.world import LESSON_SEEDS, World
"""
RUN = """
settings = {"model_id": model_id, "device": device, "learning_rate": learning_rate, "steps": steps,
            "batch_size": batch_size, "train_tickets": train_tickets, "test_tickets": test_tickets, "answer": answer}
config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules="all-linear")
results = [finetune(config, company, settings)[1] for company in companies]
display({"RESULT": {"results": results}}, raw=True)
""".replace("RESULT", RESULT)


def template(run_cell: str) -> nbformat.NotebookNode:
    """The parameterised notebook."""
    functions = "\n\n".join(inspect.getsource(function) for function in (evaluate, finetune))
    cells = [new_code_cell(text.strip()) for text in (PARAMETERS, IMPORTS, functions, run_cell)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


sweep_folder = Path(workplace.name, "sweep")
sweep_folder.mkdir(exist_ok=True)
template_file = Path(workplace.name, "template.ipynb")
nbformat.write(template(RUN), template_file)


def shared(**own: Any) -> dict[str, Any]:
    """All parameters of a run: its own, and those that all runs have in common."""
    return settings | {"companies": companies} | own


low_rank, high_rank = max(1, rank // 4), 4 * rank
grid = {
    "rank-0": shared(rank=0, alpha=0),  # the baseline, somebody thought
    f"rank-{low_rank}": shared(rank=low_rank, alpha=scale * low_rank),
    f"rank-{rank}": shared(rank=rank, alpha=scale * rank),
}
display(pd.DataFrame(grid).T[["rank", "alpha", "learning_rate", "companies", "steps"]])

# %% [markdown]
# Three runs, each over the same companies: the differences between runs can be taken company by company. Start with the first and look at what papermill leaves behind.


# %%
def execute(name: str) -> None:
    """Execute one run of the grid. If a cell of it raises, the file it leaves says so; nothing is raised here."""
    try:
        papermill.execute_notebook(
            str(template_file),
            str(sweep_folder / f"{name}.ipynb"),
            grid[name],
            kernel_name="python3",
            progress_bar=False,
            extra_arguments=["--log-level=ERROR"],  # else each kernel warns that its local sockets aren't encrypted
        )
    except papermill.PapermillExecutionError as error:
        print(f"{name}: {error.ename}: {error.evalue}")


execute("rank-0")
left_behind = nbformat.read(sweep_folder / "rank-0.ipynb", as_version=4)
noted = left_behind.metadata.papermill
print(
    "exception:", noted.exception, "| parameters:", {key: noted.parameters[key] for key in ("rank", "alpha", "steps")}
)
for cell in left_behind.cells:
    if cell.cell_type == "code":
        kinds_of_output = [output.output_type for output in cell.outputs]
        print(f"{cell.source.splitlines()[0][:44]:<46} {cell.metadata.papermill.status:<10} {kinds_of_output}")

# %% [markdown]
# Rank 0 isn't an adapter, and `peft` says so. The run failed, the file is there. A script that collects "all results in the folder" would find one less and go on.
#
# **Exercise.** `read_run(path, asked)` reads one executed notebook. `path` is a `Path`, `asked` the dictionary of parameters that this run of the grid should have had (plain JSON values). It raises neither for a file that isn't there nor for one that is cut off; it returns a dictionary with `"status"`, `"error"` and `"results"`. The status is the *first* row that applies:
#
# | `"status"` | when |
# |---|---|
# | `"missing"` | there is no file |
# | `"unfinished"` | the file isn't a whole notebook: it is cut off (the job was killed while it wrote) |
# | `"stale"` | `metadata.papermill.parameters` differs from `asked`: the file is of an earlier grid |
# | `"failed"` | `metadata.papermill.exception` is true |
# | `"unfinished"` | no output carries a result: the job was killed between two cells |
# | `"done"` | otherwise |
#
# - `"error"` is `"ename: evalue"` of the notebook's first output of type `error` if the status is `"failed"` (`"failed"` with no such output: `""`), else `""`.
# - `"results"` is the list under `"results"` in the result's JSON if the status is `"done"`, else `None`. A run that displayed a result and *then* failed is failed, and has none.
#
# A result is an output of a code cell whose `data` has the key `RESULT`; if there are several, the last counts. `nbformat.read(path, as_version=4)` raises a `ValueError` for a file that is cut off. Notebook nodes are dictionaries: `output.get("data", {})`. *About 14 lines.*
#
# <details><summary>Hint 1</summary>Go down the table row by row and return at the first that applies. Which error does each reading step raise, and for which row?</details>
# <details><summary>Hint 2</summary><code>path.is_file()</code>; <code>try: nbformat.read(…) except ValueError</code>; <code>notebook.metadata.get("papermill", {})</code>; then one list of all outputs of all cells: <code>cell.get("outputs", [])</code>, since markdown cells have none.</details>
# <details><summary>Hint 3</summary>errors = the outputs whose output_type is "error"; found = [o["data"][RESULT] for o in outputs if RESULT in o.get("data", {})]. If exception is true: failed, with f'{ename}: {evalue}' of errors[0] if there is one. If found is empty: unfinished. Otherwise done, with found[-1]["results"].</details>


# %% exercise="read-run" difficulty=3 minutes=12
def read_run(path: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Return status, error and results of one executed notebook, whatever became of it."""
    ### BEGIN SOLUTION
    nothing = {"error": "", "results": None}
    if not path.is_file():
        return {"status": "missing", **nothing}
    try:
        notebook = nbformat.read(path, as_version=4)
    except ValueError:
        return {"status": "unfinished", **nothing}
    noted = notebook.metadata.get("papermill", {})
    if noted.get("parameters") != asked:
        return {"status": "stale", **nothing}
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    if noted.get("exception"):
        errors = [f"{output['ename']}: {output['evalue']}" for output in outputs if output["output_type"] == "error"]
        return {"status": "failed", **nothing, "error": errors[0] if errors else ""}
    found = [output["data"][RESULT] for output in outputs if RESULT in output.get("data", {})]
    if not found:
        return {"status": "unfinished", **nothing}
    return {"status": "done", "error": "", "results": found[-1]["results"]}
    ### END SOLUTION


# %% check="read-run" points=2
def executed(
    parameters: dict[str, Any],
    *,
    results: Sequence[list[dict[str, Any]]] = (),
    errors: Sequence[tuple[str, str]] = (),
    exception: bool | None = None,
) -> str:
    """The text of an executed notebook, as papermill would leave it."""
    outputs = [new_output("stream", name="stderr", text="training: 100%")]
    outputs += [new_output("display_data", data={RESULT: {"results": part}}) for part in results]
    outputs += [new_output("error", ename=name, evalue=value, traceback=[]) for name, value in errors]
    cells = [new_markdown_cell("# A run"), new_code_cell("run()", outputs=outputs), new_code_cell("report()")]
    metadata = {"papermill": {"parameters": parameters, "exception": exception}}
    return nbformat.writes(new_notebook(cells=cells, metadata=metadata))


def outcome(text: str | None, asked: dict[str, Any]) -> dict[str, Any]:
    """What read_run says of a file with this text; None: no file."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "run.ipynb")
        if text is not None:
            path.write_text(text)
        try:
            got = read_run(path, asked)
        except Exception as error:
            got = {"status": f"raised {type(error).__name__}"}
    assert isinstance(got, dict), (
        f"read_run returns a dictionary for every run, also for a bad one; yours returned {got!r}"
    )
    return got


asked = {"rank": 4, "companies": [0, 1]}
scores = [{"company": 0, "loss": 0.5}, {"company": 1, "loss": 0.25}]
got = outcome(executed(asked, results=[scores]), asked)
assert got.get("status") == "done", f'A run with a result and no exception is "done"; yours: {got.get("status")!r}'
assert got == {"status": "done", "error": "", "results": scores}, (
    f'A done run has error "" and the list of results; yours is {got}'
)
got = outcome(executed(asked, results=[[], scores]), asked)
assert got.get("results") == scores, (
    f"Several outputs carry a result: the last one counts; yours is {got.get('results')}"
)
got = outcome(None, asked)
assert got == {"status": "missing", "error": "", "results": None}, (
    f'No file: status "missing", error "", results None, so that the table has a row for it; yours: {got}'
)
got = outcome(executed(asked, results=[scores])[:300], asked)
assert got.get("status") == "unfinished", (
    f'A file that is cut off is "unfinished", and must not lose the rest of the table; yours: {got.get("status")}'
)
got = outcome(executed(asked), asked)
assert got.get("status") == "unfinished", (
    f'Neither an exception nor a result: the job was killed, it is "unfinished"; yours: {got.get("status")!r}'
)
### BEGIN HIDDEN TESTS
for _results in ([], [{"company": 3, "loss": 1.5}]):
    _got = outcome(executed({}, results=[_results]), {})
    assert _got == {"status": "done", "error": "", "results": _results}, (
        f"A done run with {len(_results)} results: {_got}"
    )
assert outcome("", asked).get("status") == "unfinished", "An empty file isn't a whole notebook: unfinished"
assert outcome(executed(asked), asked) == {"status": "unfinished", "error": "", "results": None}, (
    "Unfinished: no results"
)
### END HIDDEN TESTS

# %% check="read-run" points=2
crash = [("ValueError", "`r` should be a positive integer value but the value passed is 0")]
got = outcome(executed(asked, errors=crash, exception=True), asked)
assert got.get("status") == "failed", f'The notebook raised: it is "failed"; yours: {got.get("status")!r}'
assert got.get("error") == "ValueError: `r` should be a positive integer value but the value passed is 0", (
    f'error is "ename: evalue", so that the table says why; yours: {got.get("error")!r}'
)
got = outcome(executed(asked, results=[scores], errors=crash, exception=True), asked)
assert (got.get("status"), got.get("results")) == ("failed", None), (
    f"It displayed a result and failed afterwards: failed, with results None; yours: {got}"
)
got = outcome(executed({"rank": 8, "companies": [0, 1]}, results=[scores]), asked)
assert got.get("status") == "stale", (
    f'The file was run with rank 8 and rank 4 is asked for: "stale"; the parameters in the notebook count, not the name of '
    f"the file; yours: {got.get('status')!r}"
)
assert got.get("results") is None, "The results of a stale run are not those of this run: None"
### BEGIN HIDDEN TESTS
for _other in ({"rank": 4}, {"rank": 4, "companies": [0, 1], "steps": 9}, {"rank": 4, "companies": [1, 0]}):
    assert outcome(executed(_other, results=[scores]), asked).get("status") == "stale", (
        f"{_other} is not {asked}: stale"
    )
    _got = outcome(executed(_other, errors=crash, exception=True), asked)
    assert _got == {"status": "stale", "error": "", "results": None}, f"Stale comes before failed in the table: {_got}"
_two = [("KeyError", "'a'"), ("RuntimeError", "later")]
assert outcome(executed(asked, errors=_two, exception=True), asked).get("error") == "KeyError: 'a'", (
    "The first error counts"
)
_got = outcome(executed(asked, exception=True), asked)
assert _got == {"status": "failed", "error": "", "results": None}, (
    f"Failed without an error output: error is ''; {_got}"
)
_bare = nbformat.writes(new_notebook(cells=[new_code_cell("1")]))
assert outcome(_bare, asked).get("status") == "stale", "A notebook that papermill never ran has no parameters: stale"
### END HIDDEN TESTS


# %% mistake="takes a result for success" of="read-run" says="failed, with results None"
def read_run(path, asked):
    if not path.exists():
        return {"status": "missing", "error": "", "results": None}
    try:
        notebook = nbformat.read(path, as_version=4)
    except ValueError:
        return {"status": "unfinished", "error": "", "results": None}
    if notebook.metadata.get("papermill", {}).get("parameters") != asked:
        return {"status": "stale", "error": "", "results": None}
    status, error, results = "unfinished", "", None
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output["output_type"] == "error" and status != "done":
                status, error = "failed", f"{output['ename']}: {output['evalue']}"
            if RESULT in output.get("data", {}):
                status, results = "done", output["data"][RESULT]["results"]
    return {"status": status, "error": error, "results": results}


# %% mistake="trusts the name of the file" of="read-run" says="the parameters in the notebook count"
def read_run(path, asked):
    if not path.exists():
        return {"status": "missing", "error": "", "results": None}
    try:
        notebook = nbformat.read(path, as_version=4)
    except ValueError:
        return {"status": "unfinished", "error": "", "results": None}
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    if notebook.metadata.papermill.exception:
        errors = [f"{output.ename}: {output.evalue}" for output in outputs if output.output_type == "error"]
        return {"status": "failed", "error": (errors or [""])[0], "results": None}
    found = [output.data[RESULT] for output in outputs if RESULT in output.get("data", {})]
    if not found:
        return {"status": "unfinished", "error": "", "results": None}
    return {"status": "done", "error": "", "results": found[-1]["results"]}


# %% mistake="lets one broken file stop everything" of="read-run" says="must not lose the rest of the table"
def read_run(path, asked):
    if not path.exists():
        return {"status": "missing", "error": "", "results": None}
    notebook = nbformat.read(path, as_version=4)
    if notebook.metadata.get("papermill", {}).get("parameters") != asked:
        return {"status": "stale", "error": "", "results": None}
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    if notebook.metadata.papermill.exception:
        errors = [f"{output.ename}: {output.evalue}" for output in outputs if output.output_type == "error"]
        return {"status": "failed", "error": (errors or [""])[0], "results": None}
    found = [output.data[RESULT] for output in outputs if RESULT in output.get("data", {})]
    if not found:
        return {"status": "unfinished", "error": "", "results": None}
    return {"status": "done", "error": "", "results": found[-1]["results"]}


# %% mistake="drops what has no result" of="read-run" says="returns a dictionary for every run"
def read_run(path, asked):
    try:
        notebook = nbformat.read(path, as_version=4)
        found = [o.data[RESULT] for c in notebook.cells for o in c.get("outputs", []) if RESULT in o.get("data", {})]
        if notebook.metadata.papermill.parameters == asked and not notebook.metadata.papermill.exception:
            return {"status": "done", "error": "", "results": found[-1]["results"]}
    except (OSError, ValueError, IndexError):
        pass
    return None


# %% mistake="calls everything without a result failed" of="read-run" says="the job was killed"
def read_run(path, asked):
    if not path.exists():
        return {"status": "missing", "error": "", "results": None}
    try:
        notebook = nbformat.read(path, as_version=4)
    except ValueError:
        return {"status": "unfinished", "error": "", "results": None}
    if notebook.metadata.get("papermill", {}).get("parameters") != asked:
        return {"status": "stale", "error": "", "results": None}
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    found = [output.data[RESULT] for output in outputs if RESULT in output.get("data", {})]
    if notebook.metadata.papermill.exception or not found:
        errors = [f"{output.ename}: {output.evalue}" for output in outputs if output.output_type == "error"]
        return {"status": "failed", "error": (errors or [""])[0], "results": None}
    return {"status": "done", "error": "", "results": found[-1]["results"]}


# %% mistake="leaves the reason out" of="read-run" says="so that the table says why"
def read_run(path, asked):
    if not path.exists():
        return {"status": "missing", "error": "", "results": None}
    try:
        notebook = nbformat.read(path, as_version=4)
    except ValueError:
        return {"status": "unfinished", "error": "", "results": None}
    if notebook.metadata.get("papermill", {}).get("parameters") != asked:
        return {"status": "stale", "error": "", "results": None}
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    if notebook.metadata.papermill.exception:
        return {"status": "failed", "error": "failed", "results": None}
    found = [output.data[RESULT] for output in outputs if RESULT in output.get("data", {})]
    if not found:
        return {"status": "unfinished", "error": "", "results": None}
    return {"status": "done", "error": "", "results": found[-1]["results"]}


# %% alternative="reads the JSON itself" of="read-run"
def read_run(path, asked):
    run = {"status": "missing", "error": "", "results": None}
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return run
    except ValueError:
        return run | {"status": "unfinished"}
    log = content["metadata"].get("papermill") or {}
    if "parameters" not in log or log["parameters"] != asked:
        return run | {"status": "stale"}
    error, results, seen = "", None, False
    for cell in content["cells"]:
        for output in cell.get("outputs", ()):
            if output["output_type"] == "error":
                error = error or "{ename}: {evalue}".format(**output)
            elif RESULT in output.get("data", {}):
                results, seen = output["data"][RESULT]["results"], True
    if log.get("exception") is True:
        return run | {"status": "failed", "error": error}
    return run | ({"status": "done", "results": results} if seen else {"status": "unfinished"})


# %% [markdown]
# With it, gathering is a loop over the *grid*, not over the folder: what was asked for has a row, whatever became of it. And a sweep that stopped half-way goes on by running what isn't done.


# %%
def gather() -> pd.DataFrame:
    """One row for each run of the grid."""
    rows = []
    for name, asked_for in grid.items():
        own = {key: asked_for[key] for key in ("rank", "alpha", "learning_rate")}
        rows.append({"run": name, **own, **read_run(sweep_folder / f"{name}.ipynb", asked_for)})
    return pd.DataFrame(rows)


display(gather().drop(columns="results").style.hide(axis="index").format({"learning_rate": "{:g}"}))

# %% [markdown]
# ## Decide how you will choose
#
# The sweep will give each configuration three losses, one a company. Two things go wrong when you then take the best row.
#
# *It may be best by luck.* Its lead over a cheaper row may be smaller than the noise. The classic remedy is the **one-standard-error rule** (Breiman, Friedman, Olshen, Stone, 1984): take the simplest candidate whose loss is within one standard error of the best. Here all candidates met the same companies, so what counts is the standard error of the *differences*, company by company (lesson 1.1: pairs).
#
# *Its score is too good.* You chose it *because* its score was low; on new companies, the luck is not repeated. So the number you report comes from companies that had no part in the choice.
#
# Both are decided before you see the table. Afterwards every rule has a favourite.
#
# **Exercise.** Decide.
#
# 1. `choose(losses, trained, most_trained)` is the rule. `losses` is name → losses, one a company, in the same order for all; `trained` is name → how many numbers it trains. Only names with `trained` at most `most_trained` take part; `ValueError` if there is none. The *best* of them has the lowest mean loss. For each take the differences to the best, company by company: $d_i = \text{loss}_i - \text{best}_i$, mean $\bar d$ and standard error $s / \sqrt n$ with $s$ the standard deviation with $n - 1$ below. Of the names with $\bar d \le s/\sqrt n$ (the best itself is one of them), return the one that trains the fewest numbers; if several train equally few, the one of them with the lowest mean loss. There are at least two companies. *About 10 lines.*
# 2. `my_rule` is `"best"` (take the lowest mean) or `"one-se"` (the rule above): by which would you ship an adapter, when each of your forty customers has one? `predicted_exact_match` (0 to 1) is what your choice gets right on three companies it has never met. Both are graded for being answered; below you see what your decision is worth.
#
# ```text
# losses  = {"r1": [0.31, 0.41, 0.51], "r4": [0.30, 0.43, 0.48], "r16": [0.28, 0.38, 0.48]}
# trained = {"r1": 100, "r4": 400, "r16": 1600}
# ```
#
# With at most 2000, `"r16"` is best. `"r1"` is behind by 0.03 in *each* company: its differences have no spread, so it isn't within their standard error, though the companies themselves differ much more than that. `"r4"` is behind by 0.02, 0.05 and 0.00: mean 0.023, standard error 0.015. So `"r16"`. With at most 1000, `"r4"` is best, by 0.007 on average, with a standard error of 0.015: the rule takes `"r1"`.
#
# <details><summary>Hint 1</summary>Filter first, then find the best among what is left. Whose differences does the rule look at, and what is their standard error if they are all equal?</details>
# <details><summary>Hint 2</summary><code>d = np.subtract(losses[name], losses[best])</code>; <code>d.std(ddof=1) / len(d) ** 0.5</code>. A tolerance of 1e-12 keeps rounding out of the comparison.</details>
# <details><summary>Hint 3</summary>allowed: the names whose trained is at most most_trained; best: the min of allowed by mean loss; near = those with d.mean() <= standard error + 1e-12; return min(near, key=lambda n: (trained[n], mean loss of n)).</details>


# %% exercise="choose" difficulty=4 minutes=10
def choose(losses: Mapping[str, Sequence[float]], trained: Mapping[str, int], most_trained: int) -> str:
    """Return the smallest candidate within one standard error (of paired differences) of the best that fits."""
    ### BEGIN SOLUTION
    allowed = [name for name in losses if trained[name] <= most_trained]
    if not allowed:
        raise ValueError(f"no candidate trains at most {most_trained} numbers")
    mean = {name: float(np.mean(losses[name])) for name in allowed}
    best = min(allowed, key=mean.__getitem__)
    near = []
    for name in allowed:
        behind = np.subtract(losses[name], losses[best])
        if behind.mean() <= behind.std(ddof=1) / len(behind) ** 0.5 + 1e-12:
            near.append(name)
    return min(near, key=lambda name: (trained[name], mean[name]))
    ### END SOLUTION


my_rule, predicted_exact_match = None, None
### BEGIN SOLUTION
my_rule = "one-se"
predicted_exact_match = 0.5
### END SOLUTION

# %% check="choose" points=2
losses = {"r1": [0.31, 0.41, 0.51], "r4": [0.30, 0.43, 0.48], "r16": [0.28, 0.38, 0.48]}
trained = {"r1": 100, "r4": 400, "r16": 1600}
given = copy.deepcopy(losses), dict(trained)
try:
    got = choose(*given, 2000)
except ValueError as error:
    got = f"ValueError: {error}"
assert not got.startswith("ValueError"), (
    f"Three candidates fit, and yours raises {got!r}. The best is within its own standard error, 0 <= 0: compare with <="
)
assert given == (losses, trained), "You changed losses or trained, which belong to the caller: make your own list"
assert got != "r1", (
    "r1 is behind by 0.03 in every company: use the standard error of the paired differences, not of the losses"
)
assert got == "r16", (
    "With at most 2000, r4 is behind by 0.023 with a standard error of 0.015 (the deviation, 0.025, divided by the root of "
    f'n): it is not within it, and the rule takes "r16"; yours {got!r}'
)
given = copy.deepcopy(losses), dict(trained)
try:
    got = choose(*given, 1000)
except ValueError:
    got = None
assert given == (losses, trained), (
    "You took what does not fit out of the caller's losses or trained: make your own list of what takes part"
)
assert got != "r16", "r16 trains more than is allowed"
assert got == "r1", (
    f'With at most 1000, r4 is best, and r1 is behind by less than one standard error: take the smaller, "r1"; yours {got!r}. '
    "What is too large takes no part, not even as the best"
)
got = choose({"small": [0.530, 0.496], "large": [0.500, 0.500]}, {"small": 1, "large": 2}, 9)
assert got == "small", (
    "Differences 0.030 and -0.004: mean 0.013, standard error 0.017 with n - 1 below (ddof=1; with n it would be 0.012); "
    f"the smaller is within it; yours {got!r}"
)
### BEGIN HIDDEN TESTS
got = choose({"worse": [0.4, 0.9], "better": [0.4, 0.8], "big": [0.3, 0.85]}, {"worse": 5, "better": 5, "big": 9}, 9)
assert got == "better", f"Of equally small ones, the one with the lower mean loss; yours {got!r}"
assert choose({"only": [1.0, 2.0]}, {"only": 3}, 3) == "only", "A single candidate that just fits is chosen"
_rng = np.random.default_rng(5)
for _ in range(40):
    _n, _count = int(_rng.integers(2, 6)), int(_rng.integers(2, 6))
    _base = _rng.uniform(0.2, 2.0, _n)
    _losses = {f"c{i}": list(_base + _rng.normal(0.03 * i, 0.05, _n)) for i in range(_count)}
    _trained = {name: int(_rng.integers(1, 5)) * 100 for name in _losses}
    _most = int(_rng.integers(1, 5)) * 100
    _fit = {name: np.array(values) for name, values in _losses.items() if _trained[name] <= _most}
    if not _fit:
        continue
    _top = sorted(_fit, key=lambda name: _fit[name].mean())[0]
    _near = [n for n, v in _fit.items() if (v - _fit[_top]).mean() <= stats.sem(v - _fit[_top]) + 1e-12]
    _want = sorted(_near, key=lambda name: (_trained[name], _fit[name].mean()))[0]
    assert choose(_losses, _trained, _most) == _want, f"{_losses}, {_trained}, at most {_most}: the rule takes {_want}"
### END HIDDEN TESTS

# %% check="choose" points=1
try:
    choose({"r8": [0.1, 0.2]}, {"r8": 800}, 100)
    complaint = None
except Exception as error:
    complaint = error
assert isinstance(complaint, ValueError), (
    f"If nothing fits, raise ValueError; yours {'raises ' + type(complaint).__name__ if complaint else 'returns a name'}"
)
assert "min()" not in str(complaint), (
    "If nothing fits, raise ValueError with a message of your own that says what was asked for"
)
assert my_rule in ("best", "one-se"), f'my_rule is "best" or "one-se", not {my_rule!r}'
assert isinstance(predicted_exact_match, (int, float, np.number)), (
    f"Predict with a number, not {predicted_exact_match!r}"
)
assert 0 <= predicted_exact_match <= 1, f"predicted_exact_match is a share from 0 to 1, not {predicted_exact_match!r}"


# %% mistake="ignores the pairs" of="choose" says="not of the losses"
def choose(losses, trained, most_trained):
    allowed = [name for name in losses if trained[name] <= most_trained]
    if not allowed:
        raise ValueError("none fits")
    best = min(allowed, key=lambda name: np.mean(losses[name]))
    limit = np.mean(losses[best]) + stats.sem(losses[best])
    return min((n for n in allowed if np.mean(losses[n]) <= limit), key=lambda n: (trained[n], np.mean(losses[n])))


my_rule, predicted_exact_match = "one-se", 0.5


# %% mistake="leaves the best itself out" of="choose" says="The best is within its own standard error"
def choose(losses, trained, most_trained):
    allowed = [name for name in losses if trained[name] <= most_trained]
    if not allowed:
        raise ValueError("none fits")
    best = min(allowed, key=lambda name: np.mean(losses[name]))
    near = []
    for name in allowed:
        d = np.subtract(losses[name], losses[best])
        if d.mean() < stats.sem(d):
            near.append(name)
    return min(near, key=lambda name: (trained[name], np.mean(losses[name])))


my_rule, predicted_exact_match = "one-se", 0.5


# %% mistake="deletes what does not fit" of="choose" says="make your own list of what takes part"
def choose(losses, trained, most_trained):
    for name in list(losses):
        if trained[name] > most_trained:
            del losses[name]
    if not losses:
        raise ValueError("none fits")
    best = min(losses, key=lambda name: np.mean(losses[name]))
    near = []
    for name in losses:
        d = np.subtract(losses[name], losses[best])
        if d.mean() <= stats.sem(d) + 1e-12:
            near.append(name)
    return min(near, key=lambda name: (trained[name], np.mean(losses[name])))


my_rule, predicted_exact_match = "one-se", 0.5


# %% mistake="takes the best" of="choose" says="take the smaller"
def choose(losses, trained, most_trained):
    allowed = [name for name in losses if trained[name] <= most_trained]
    if not allowed:
        raise ValueError("none fits")
    return min(allowed, key=lambda name: np.mean(losses[name]))


my_rule, predicted_exact_match = "one-se", 0.5


# %% mistake="takes the deviation for the error" of="choose" says="divided by the root of n"
def choose(losses, trained, most_trained):
    allowed = [name for name in losses if trained[name] <= most_trained]
    if not allowed:
        raise ValueError("none fits")
    best = min(allowed, key=lambda name: np.mean(losses[name]))
    near = []
    for name in allowed:
        d = np.subtract(losses[name], losses[best])
        if d.mean() <= d.std(ddof=1) + 1e-12:
            near.append(name)
    return min(near, key=lambda name: (trained[name], np.mean(losses[name])))


my_rule, predicted_exact_match = "one-se", 0.5


# %% mistake="filters at the end" of="choose" says="takes no part, not even as the best"
def choose(losses, trained, most_trained):
    best = min(losses, key=lambda name: np.mean(losses[name]))
    near = []
    for name in losses:
        d = np.subtract(losses[name], losses[best])
        if d.mean() <= stats.sem(d) + 1e-12:
            near.append(name)
    near = [name for name in near if trained[name] <= most_trained]
    if not near:
        raise ValueError("none fits")
    return min(near, key=lambda name: (trained[name], np.mean(losses[name])))


my_rule, predicted_exact_match = "one-se", 0.5


# %% mistake="divides by n" of="choose" says="n - 1 below"
def choose(losses, trained, most_trained):
    allowed = [name for name in losses if trained[name] <= most_trained]
    if not allowed:
        raise ValueError("none fits")
    best = min(allowed, key=lambda name: np.mean(losses[name]))
    near = []
    for name in allowed:
        d = np.subtract(losses[name], losses[best])
        if d.mean() <= d.std() / len(d) ** 0.5 + 1e-12:
            near.append(name)
    return min(near, key=lambda name: (trained[name], np.mean(losses[name])))


my_rule, predicted_exact_match = "one-se", 0.5


# %% mistake="lets min complain" of="choose" says="a message of your own"
def choose(losses, trained, most_trained):
    allowed = [name for name in losses if trained[name] <= most_trained]
    best = min(allowed, key=lambda name: np.mean(losses[name]))
    near = []
    for name in allowed:
        d = np.subtract(losses[name], losses[best])
        if d.mean() <= stats.sem(d) + 1e-12:
            near.append(name)
    return min(near, key=lambda name: (trained[name], np.mean(losses[name])))


my_rule, predicted_exact_match = "one-se", 0.5


# %% alternative="with pandas" of="choose"
def choose(losses, trained, most_trained):
    table = pd.DataFrame(losses).loc[:, [trained[name] <= most_trained for name in losses]]
    if table.empty:
        raise ValueError(f"nothing trains at most {most_trained}")
    differences = table.sub(table[table.mean().idxmin()], axis=0)
    near = differences.columns[differences.mean() <= differences.sem() + 1e-12]
    order = pd.DataFrame({"trained": pd.Series(dict(trained)), "loss": table.mean()}).loc[near]
    return str(order.sort_values(["trained", "loss"], kind="stable").index[0])


my_rule, predicted_exact_match = "best", 0.7

# %% [markdown]
# ## The experiment
#
# First mend the baseline. Rank 0 means "no adapter", so the template must say that. Then run whatever of the grid isn't done, which is everything so far; had the sweep stopped half-way, it would be the rest. Each executed notebook keeps the code that it was run with, so a template may change between two passes and you can still see who ran what. But `read_run` compares parameters, not code: a run that was done with the old template stays "done". Where the template still changes, make its commit or the hash of its cells one of the parameters.

# %%
nbformat.write(
    template(RUN.replace("config = LoraConfig(", "config = None if rank == 0 else LoraConfig(")), template_file
)
todo = list(gather().query("status != 'done'")["run"])
for name in tqdm(todo, desc="papermill", leave=False):
    execute(name)
sweep = gather()
display(sweep.drop(columns="results").style.hide(axis="index").format({"learning_rate": "{:g}"}))
print(f"in this pass: {', '.join(todo)}; not done: {(sweep['status'] != 'done').sum()}")

measured_runs: dict[str, pd.DataFrame] = {
    name: pd.DataFrame(results) for name, results in zip(sweep["run"], sweep["results"], strict=True)
}
centre = f"rank-{rank}"
gap = abs(in_process["loss"] - measured_runs[centre]["loss"].iloc[0])
print(f"the same configuration, trained here and by papermill in another process: the losses differ by {gap:.1g} nats")
card.record(
    "process_gap", gap, format=".1g", label="loss trained here against in papermill", unit="nats", tolerance=1e-3
)

# %% [markdown]
# The last line is worth its seconds in every project: the function in your editor and the one in the sweep compute the same; the losses of one company differ by {{process_gap}} nats. A fresh kernel imports torch, transformers and peft before it trains. For an hour's run that is nothing; for runs of a few seconds it would be a large part of the cost. So the third rank and the short comparisons further down are trained in this kernel and stand beside the sweep's.

# %%
measured_runs[f"rank-{high_rank}"] = pd.DataFrame(
    [finetune(lora(high_rank, scale * high_rank), company, settings)[1] for company in companies]
)

# %% [markdown]
# ### Exact match against trained share


# %%
def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean over runs and its 95 % interval, by Student's t; a single run has an interval of no width."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean, mean
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean, mean - half, mean + half


def exact(name: str) -> tuple[float, float, float]:
    """The share of right answers over all companies, and its 95 % Wilson interval."""
    right, of = int(measured_runs[name]["right"].sum()), int(measured_runs[name]["of"].sum())
    return right / of, *triage.interval(np.arange(of) < right)


curve = [f"rank-{own_rank}" for own_rank in (low_rank, rank, high_rank)]
shares = [measured_runs[name]["trained"].iloc[0] / model_parameters for name in curve]


def fields(name: str) -> tuple[float, float, float]:
    """The share of single fields that are right, and its 95 % interval over companies."""
    value, bottom, top = mean_interval(measured_runs[name]["fields"])
    return value, max(0.0, bottom), min(1.0, top)


def loss_of(name: str) -> tuple[float, float, float]:
    """The mean loss over companies and its 95 % interval."""
    return mean_interval(measured_runs[name]["loss"])


fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
for ax, estimate, label, colour in (
    (left, exact, "exact match", COLOURS.after),
    (left, fields, "single fields", COLOURS.other),
    (right, loss_of, "loss", COLOURS.after),
):
    values, bottoms, tops = (list(column) for column in zip(*map(estimate, curve), strict=True))
    ax.plot(shares, values, color=colour, lw=1, label=label)
    intervals(ax, shares, values, bottoms, tops, colour)
for ax in (left, right):
    ax.set_xscale("log")
    places_on_x = zip(shares, (low_rank, rank, high_rank), strict=True)
    ax.set_xticks(shares, [f"{share:.2%}\nrank {own_rank}" for share, own_rank in places_on_x])
    ax.set_xticks([], minor=True)
    ax.set_xlabel("trained numbers, as a share of the model's")
left.axhline(exact("rank-0")[0], color=COLOURS.before, ls="--", lw=1.5)
direct_label(
    left, shares[1], exact("rank-0")[0], f"no adapter: {exact('rank-0')[0]:.0%}", COLOURS.before, offset=(12, 5)
)
left.set(ylim=(-0.03, 1.05), ylabel="share that is right", title="What it answers right")
label_lines(left)
for name, share in zip(curve, shares, strict=True):
    frame = measured_runs[name]
    left.plot([share * 0.88] * runs, frame["right"] / frame["of"], "_", ms=12, mew=2, color=COLOURS.after)
    right.plot([share * 1.12] * runs, frame["loss"], "_", ms=12, mew=2, color=COLOURS.after)
right.set(ylabel="loss on unseen tickets (nats a token)", title="And the loss (dashes: companies)")
plt.show()
for key, name in zip(("base", "low", "centre", "high"), ("rank-0", *curve), strict=True):
    value, bottom, top = exact(name)
    label = f"exact match, {'no adapter' if key == 'base' else name.replace('-', ' ')}"
    card.record(f"exact_{key}", value, format=".1%", low=bottom, high=top, label=label, tolerance=0.1)
    if key != "base":
        share = measured_runs[name]["trained"].iloc[0] / model_parameters
        card.record(f"share_{key}", share, format=".2%", label=f"trained, {name.replace('-', ' ')}")
        value, bottom, top = fields(name)
        label = f"single fields right, {name.replace('-', ' ')}"
        card.record(f"fields_{key}", value, format=".0%", low=bottom, high=top, label=label, tolerance=0.1)


def against(one: pd.DataFrame, other: pd.DataFrame) -> tuple[float, float, float]:
    """The mean difference of two configurations' losses, company by company, and its 95 % interval."""
    return mean_interval(np.subtract(one["loss"], other["loss"]))


for key, name in (("low", curve[0]), ("high", curve[2])):
    value, bottom, top = against(measured_runs[name], measured_runs[centre])
    label = f"loss, {name.replace('-', ' ')} minus rank {rank}"
    card.record(f"loss_gap_{key}", value, format="+.3f", low=bottom, high=top, label=label, unit="nats", tolerance=0.05)
    print(f"{label}: {value:+.3f} nats a token, 95 % interval {bottom:+.3f} to {top:+.3f}")

# %% [markdown]
# Without an adapter {{exact_base}} of the answers are right; with rank 1 {{exact_low}} ({{exact_low:interval}}), with rank 4 {{exact_centre}} ({{exact_centre:interval}}), with rank 16 {{exact_high}} ({{exact_high:interval}}). These intervals are over tickets (Wilson) and speak of these {{runs_each}} companies only; how much companies differ show the dashes. The intervals of fields and loss are over companies (Student's t, wide for so few). Of single fields, rank 1 gets {{fields_low}} right, rank 4 {{fields_centre}}, rank 16 {{fields_high}}. The fair comparison of the losses is paired: rank 1 minus rank 4 is {{loss_gap_low}} ({{loss_gap_low:interval}}), rank 16 minus rank 4 {{loss_gap_high}} ({{loss_gap_high:interval}}). An interval that holds zero is no finding, in either direction.
#
# Read the curve with its conditions. {{steps_each}} steps of {{batch_each}} tickets is far from the end of the training: lesson 2.1 shows what 160 steps of eight tickets are worth at rank 3, and `-p steps 160 -p batch_size 8` repeats this curve with them. An answer needs all four fields at once, so exact match comes late and in jumps, and the loss says more about the ranks, because every token of every answer counts in it. All ranks had one learning rate and one alpha / r, chosen at rank 4 on companies that are not reported; a rank that wants another looks worse than it is. And few steps favour what learns fast; whether a small rank has too little *room* shows only when it has been trained for long enough. These conditions belong in a sentence under every rank curve that you show.
#
# ### Scale and learning rate
#
# Is alpha a second learning rate? With $s = \alpha / r$ put $\tilde A = \sqrt s A$ and $\tilde B = \sqrt s B$: the update is $\tilde B \tilde A$, and a step of plain SGD of size $\eta$ on $A, B$ is, to the letter, a step of size $s \eta$ on $\tilde A, \tilde B$. So for SGD
#
# $$(s,\ \eta,\ A_0) \quad\text{and}\quad (1,\ s\eta,\ \sqrt s A_0)$$
#
# train the same model. Try it: five steps of SGD, twice. (When this page was measured, the losses differed by {{sgd_gap}} at most.)


# %%
def sgd_losses(own_scale: float, own_rate: float, factor: float) -> list[float]:
    """The losses of five SGD steps on one batch, with A's start multiplied by a factor."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=own_scale * rank, target_modules="all-linear")
    peft_model = get_peft_model(copy.deepcopy(model), config).eval()
    for name, parameter in peft_model.named_parameters():
        if "lora_A" in name:
            parameter.data.mul_(factor)
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=own_rate)
    found = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = triage.loss(peft_model, eight)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


one, two = sgd_losses(2.0, 0.05, 1.0), sgd_losses(1.0, 0.1, 2.0**0.5)
sgd_gap = max(abs(a - b) for a, b in zip(one, two, strict=True))
print(f"scale 2, rate 0.05:                {[round(value, 4) for value in one]}")
print(f"scale 1, rate 0.1, A times sqrt(2): {[round(value, 4) for value in two]}")
print(f"largest difference: {sgd_gap:.1g} nats")
card.record(
    "sgd_gap",
    sgd_gap,
    format=".0e",
    label="two parametrisations under SGD differ by at most",
    unit="nats",
    tolerance=1e-3,
)

# %% [markdown]
# Nobody trains LoRA with SGD. AdamW divides the gradient by its own size, so $B$ moves by about $\eta$ a step whatever $s$ is, and as long as $A$ has hardly moved, the update $s B A_0$ grows with the product $s\eta$: to first order, only the product matters. But $A$ moves by about $\eta$ a step too, from entries of at most $1/\sqrt{d_{in}}$; the larger $\eta$, the sooner that counts, and $s$ doesn't help there.
#
# So measure: three learning rates at one scale, and three pairs with one product. Only losses are compared, pair by pair, so {{short_each}} steps will do and no answers are written.

# %%
short_runs: dict[str, pd.DataFrame] = {}


def run_short(name: str, config: LoraConfig, own_rate: float) -> None:
    """Train a configuration for all companies, for few steps, and keep the losses."""
    own = short | {"learning_rate": own_rate}
    short_runs[name] = pd.DataFrame([finetune(copy.deepcopy(config), company, own)[1] for company in companies])


pairs = {
    "middle": (scale, learning_rate),
    "slow": (scale, learning_rate / 4),
    "fast": (scale, learning_rate * 4),
    "scale up": (scale * 4, learning_rate / 4),
    "scale down": (scale / 4, learning_rate * 4),
}
for name, (own_scale, own_rate) in pairs.items():
    run_short(name, lora(rank, own_scale * rank), own_rate)

fig, ax = plt.subplots()
lines = {
    "scale fixed": (COLOURS.before, ["slow", "middle", "fast"]),
    "product fixed": (COLOURS.after, ["scale up", "middle", "scale down"]),
}
rates = np.array([learning_rate / 4, learning_rate, learning_rate * 4])
for shift, (label, (colour, names)) in zip((0.97, 1.03), lines.items(), strict=True):
    ax.plot(rates * shift, [short_runs[name]["loss"].mean() for name in names], color=colour, lw=1.5, label=label)
    for own_rate, name in zip(rates, names, strict=True):
        ax.plot([own_rate * shift] * runs, short_runs[name]["loss"], "_", ms=12, mew=2, color=colour)
ax.set_xscale("log")
ax.set_xticks(rates, [f"{own_rate:g}" for own_rate in rates])
ax.set_xticks([], minor=True)
ax.set(xlabel="learning rate", ylabel="loss on unseen tickets (nats a token)")
ax.set_title(f"Rank {rank}: another rate, and another rate with the scale against it")
label_lines(ax)
plt.show()
rows = []
for key, name in (("slow", "slow"), ("fast", "fast"), ("up", "scale up"), ("down", "scale down")):
    value, bottom, top = against(short_runs[name], short_runs["middle"])
    own_scale, own_rate = pairs[name]
    rows.append((own_scale, own_rate, own_scale * own_rate, value, f"{bottom:+.3f} to {top:+.3f}"))
    label = f"loss, scale {own_scale:g} and rate {own_rate:g}, minus the middle"
    card.record(f"loss_gap_{key}", value, format="+.3f", low=bottom, high=top, label=label, unit="nats", tolerance=0.1)
columns = ["scale", "learning rate", "product", "loss minus that of the middle (nats)", "95 % interval (t, companies)"]
display(pd.DataFrame(rows, columns=columns).style.format(precision=4).hide(axis="index"))

# %% [markdown]
# The dashes are companies, the lines go through their means. At one scale, a quarter of the rate changes the loss by {{loss_gap_slow}} ({{loss_gap_slow:interval}}) and four times the rate by {{loss_gap_fast}} ({{loss_gap_fast:interval}}). With the product kept, the same two rates change it by {{loss_gap_up}} ({{loss_gap_up:interval}}) and {{loss_gap_down}} ({{loss_gap_down:interval}}). What is left of the second line's slope is what the product doesn't explain: $A$'s own movement, clipping, and AdamW's ε.
#
# A neighbour that is ahead after {{short_each}} steps need not be ahead after {{steps_each}}: few steps favour what learns fast. A short comparison says which settings are alike and which are hopeless; confirm the choice at full length, on companies that had no part in it.
#
# For a sweep it follows: don't span a full grid over alpha *and* the learning rate. Fix alpha / r and sweep the rate. And if a colleague's configuration has another alpha, compare products before you compare rates.
#
# ### Where the budget goes
#
# The three plans from above, each with the numbers that rank 4 trains on all layers, again for {{short_each}} steps.

# %%
for place in ("attention", "feed-forward"):
    run_short(place, config_for_budget(places[place], budget, scale), learning_rate)
plans = {"attention": "attention", "feed-forward": "feed-forward", "all": "middle"}
rows = []
fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6))
for run in range(runs):
    of_company = [short_runs[name]["loss"].iloc[run] for name in plans.values()]
    left.plot(range(3), of_company, "o-", color=COLOURS.before, lw=1, ms=4)
for position, (place, name) in enumerate(plans.items()):
    difference, bottom, top = against(short_runs[name], short_runs["middle"])
    intervals(right, [position], [difference], [bottom], [top], COLOURS.after)
    own_rank = config_for_budget(places[place], budget, scale).r
    frame = short_runs[name]
    bounds = f"{bottom:+.3f} to {top:+.3f}"
    rows.append((place, own_rank, frame["trained"].iloc[0], frame["loss"].mean(), difference, bounds))
    if name != "middle":
        key = f"gap_{place.replace('-', '_')}"
        label = f"loss, {place} minus all layers, equal budget"
        card.record(key, difference, format="+.3f", low=bottom, high=top, label=label, unit="nats", tolerance=0.1)
right.axhline(0, color=COLOURS.truth, lw=1)
for ax in (left, right):
    ax.set_xticks(range(3), [f"{row[0]}\nrank {row[1]}" for row in rows])
    ax.set_xlim(-0.4, 2.4)
    ax.grid(axis="x", visible=False)
left.set(ylabel="loss on unseen tickets (nats a token)", title=f"{budget:,d} numbers, in three places")
right.set(ylabel="minus all layers (nats a token)", title="The same, company by company")
plt.show()
columns = ["plan", "rank", "trained", "loss", "minus all", "95 % interval"]
formats = {"trained": "{:,d}", "loss": "{:.3f}", "minus all": "{:+.3f}"}
display(pd.DataFrame(rows, columns=columns).style.format(formats).hide(axis="index"))

# %% [markdown]
# On the left each line is a company; on the right are the means of the differences with their 95 % intervals (t over companies). Against all layers, attention alone differs by {{gap_attention}} ({{gap_attention:interval}}), the feed-forward layers alone by {{gap_feed_forward}} ({{gap_feed_forward:interval}}). It is one task, one model, and a few steps; what carries over is the comparison at equal budget and equal scale, which `config_for_budget` makes possible.
#
# ### Choose, then find out
#
# Both rules get the three ranks, under two limits: none, and at most half of what rank 16 trains. What they choose under the second limit is then trained for new companies, which had no part in anything above.

# %%
candidates = {name: list(measured_runs[name]["loss"]) for name in curve}
sizes = {name: int(measured_runs[name]["trained"].iloc[0]) for name in candidates}
largest = max(sizes.values())
choices: dict[str, dict[str, str]] = {}
for limit, most in (("no limit", largest), ("half of the largest", largest // 2)):
    fitting = sorted(name for name, size in sizes.items() if size <= most)
    best = min(fitting, key=lambda name: float(np.mean(candidates[name])))
    choices[limit] = {"best": best, "one-se": choose(candidates, sizes, most) if runs > 1 else best}
display(pd.DataFrame(choices).rename_axis("rule"))
picks = choices["half of the largest"]

new_companies = [company + 100 for company in companies]
fresh: dict[str, pd.DataFrame] = {}
for name in dict.fromkeys(picks.values()):
    own_rank = int(name.removeprefix("rank-"))
    config = lora(own_rank, scale * own_rank)
    fresh[name] = pd.DataFrame([finetune(copy.deepcopy(config), company, settings)[1] for company in new_companies])

rows = []
fig, ax = plt.subplots()
for position, (rule, name) in enumerate(picks.items()):
    for shift, frame, label, colour in ((-0.1, measured_runs[name], "in the sweep", COLOURS.before), (0.1, fresh[name], "new companies", COLOURS.after)):  # fmt: skip
        value, bottom, top = mean_interval(frame["loss"])
        intervals(ax, [position + shift], [value], [bottom], [top], colour)
        if position == 0:
            direct_label(ax, position + shift, value, label, colour, offset=(8 if shift > 0 else -84, 6))
    right, of = int(fresh[name]["right"].sum()), int(fresh[name]["of"].sum())
    rows.append((rule, name, sizes[name], np.mean(candidates[name]), fresh[name]["loss"].mean(), right / of))
ticks = [f"{rule}:\n{name}" + ("\n(your rule)" if rule == my_rule else "") for rule, name in picks.items()]
ax.set_xticks(range(len(picks)), ticks)
ax.grid(axis="x", visible=False)
ax.set(
    xlim=(-0.85, len(picks) - 0.5),
    ylabel="loss on unseen tickets (nats a token)",
    title="The choice, where it was made and where it is used",
)
plt.show()
columns = ["rule", "takes", "trained numbers", "loss in the sweep", "loss, new companies", "exact match, new companies"]
formats = {"trained numbers": "{:,d}", "loss in the sweep": "{:.3f}", "loss, new companies": "{:.3f}", "exact match, new companies": "{:.1%}"}  # fmt: skip
display(pd.DataFrame(rows, columns=columns).style.format(formats).hide(axis="index"))
mine = fresh[picks[my_rule]]
compare([("exact match on new companies", predicted_exact_match, mine["right"].sum() / mine["of"].sum())], format=".1%")

for rule, key in (("best", "best"), ("one-se", "one_se")):
    name = picks[rule]
    right, of = int(fresh[name]["right"].sum()), int(fresh[name]["of"].sum())
    bottom, top = triage.interval(np.arange(of) < right)
    label = f"exact match on new companies, chosen by {rule}"
    card.record(f"exact_{key}", right / of, format=".1%", low=bottom, high=top, label=label, tolerance=0.15)
    card.record(
        f"trained_{key}", sizes[name], format=",d", label=f"numbers trained, chosen by {rule}", tolerance=30_000
    )
for rule, key in (("best", "best"), ("one-se", "one_se")):
    size = sizes[choices["no limit"][rule]]
    label = f"numbers trained, chosen by {rule} without a limit"
    card.record(f"trained_free_{key}", size, format=",d", label=label, tolerance=200_000)
in_sweep, on_new = np.mean(candidates[picks["best"]]), fresh[picks["best"]]["loss"].mean()
card.record(
    "loss_in_sweep", in_sweep, format=".3f", label="loss of the best row, in the sweep", unit="nats", tolerance=0.1
)
card.record(
    "loss_on_new", on_new, format=".3f", label="loss of the best row, on new companies", unit="nats", tolerance=0.1
)
for key, value, label in (("runs_each", runs, "companies a configuration"), ("steps_each", steps, "training steps, rank curve"), ("short_each", short_steps, "training steps, other comparisons"), ("batch_each", batch_size, "tickets a step")):  # fmt: skip
    card.record(key, value, format="d", label=label)

# %% [markdown]
# Without a limit, the best row trains {{trained_free_best}} numbers and the one-standard-error rule's {{trained_free_one_se}}. The limit's price is the paired difference between rank 16 and rank 4 that you saw at the rank curve.
#
# The rule's price: within the limit, the best row trains {{trained_best}} numbers and the one-standard-error rule's {{trained_one_se}}; on new companies {{exact_best}} ({{exact_best:interval}}) and {{exact_one_se}} ({{exact_one_se:interval}}) of the answers are right. If the two rules took the same row, that is a result as well: nothing smaller was within the noise.
#
# Within the limit, the best row's loss was {{loss_in_sweep}} where it was chosen and is {{loss_on_new}} on new companies. The difference has two parts: the luck that was selected, which makes the first number too low, and other companies, which may be easier or harder. Three companies can't tell them apart; more companies in the confirmation can. Report the second number.
#
# With few companies a standard error is itself uncertain, so the rule can go wrong in both directions: a spread that is small by chance lets the largest row win. It is a default that somebody can object to *before* the table is there, and that is what it is for.

# %% [markdown]
# ## With a real model
#
# Layer names, chat template and sizes are read from the model, so the lesson runs on any causal language model of the Hub with a chat template:
#
# ```
# course run 2.2 -p model_id Qwen/Qwen3-0.6B -p device cuda -p learning_rate 2e-4 -p scale 2 -p rank 16 -p steps 200 -p batch_size 8
# ```
#
# What changes:
#
# - **The rate and the scale.** 1e-4 to 3e-4 at a scale of 1 or 2, and the sweep multiplies and divides both by four.
# - **The sweep.** Each run is a process of its own, so runs on several GPUs are several papermill calls with another `CUDA_VISIBLE_DEVICES`; the grid, the status table and "run what isn't done" stay as they are. On a cluster, a file on shared storage is the whole interface. Write to a temporary name and rename it when it is done, if others read while you write.
# - **Memory.** In bfloat16 the base takes 2 bytes a parameter, and activations are the largest part of what you can still influence: batch size, length, gradient checkpointing.
# - **Fingerprints.** Hashing 16 GB takes about a minute. Do it once when a checkpoint is published, and compare the stored digest, or the Hub's commit hash, when an adapter is loaded.
# - **Names.** `target_modules="all-linear"` also reaches vision towers and routers of models that have them. Count what was reached.

# %% [markdown]
# ## Result card

# %%
card.show()

# %% [markdown]
# ## Say it in an interview
#
# <details><summary>How much memory does LoRA save on an 8B model, and what doesn't it save?</summary>
#
# It removes the gradients and the optimizer state of the frozen weights. With all weights in bfloat16 that is from {{big_full}} GiB to {{big_lora}} GiB at rank 16; against mixed precision with float32 masters, about 16 bytes a parameter, it is more. What stays: the frozen weights, 2 bytes each (less if they are quantised), and the activations, which LoRA hardly changes, since the gradient still passes through every layer. On the small model here LoRA holds {{memory_share}} of full finetuning's bytes in float32, where a quarter is the floor.
# </details>
#
# <details><summary>Your sweep says rank 16 beats rank 4 by 0.4 points. Do you ship it?</summary>
#
# First: are all runs in the table, or only those that didn't crash? Then: 0.4 points against which spread? I take the differences run by run, on the same data and seeds, and their interval; if it holds zero I take the smaller rank, by a rule that was written down before. Was the learning rate tuned for one of them? At last I confirm on data that had no part in the choice, because the winner's score is too good. Then bytes and latency decide, not the fourth digit.
# </details>
#
# <details><summary>An adapter loads without an error and answers badly. What do you look at?</summary>
#
# Whether it stands on the base it was trained on. Shapes are all that loading compares, so another revision, a checkpoint with an adapter merged into it, or the base model instead of the instruct model pass. Here the loss is {{loss_own}} on the right base, {{loss_twice}} on one with the adapter already merged. I compare a fingerprint of the base's weights, or a pinned commit, with the one stored at training. Next: alpha / r, the dtype it was merged in, the chat template, and whether all modules were reached by `target_modules`.
# </details>

# %% [markdown]
# ## Read next
#
# - Edward J. Hu et al., [LoRA: Low-Rank Adaptation of Large Language Models](https://arxiv.org/abs/2106.09685), 2021. Section 7 on ranks and on which weights to adapt.
# - John Schulman and Thinking Machines Lab, [LoRA Without Regret](https://thinkingmachines.ai/blog/lora/), 2025. Which layers, which rank, and why the best learning rate hardly depends on the rank.
# - Dan Biderman et al., [LoRA Learns Less and Forgets Less](https://arxiv.org/abs/2405.09673), 2024. Sweeps of targets, ranks and rates at scale.
# - Soufiane Hayou, Nikhil Ghosh, Bin Yu, [LoRA+: Efficient Low Rank Adaptation of Large Models](https://arxiv.org/abs/2402.12354), 2024. Why A and B may want different learning rates.
# - Samyam Rajbhandari, Jeff Rasley, Olatunji Ruwase, Yuxiong He, [ZeRO: Memory Optimizations Toward Training Trillion Parameter Models](https://arxiv.org/abs/1910.02054), 2020. Section 3, where the memory goes.
# - Leo Breiman, Jerome Friedman, Richard Olshen, Charles Stone, *Classification and Regression Trees*, 1984. Section 3.4.3, the one-standard-error rule.
# - Gavin Cawley, Nicola Talbot, [On Over-fitting in Model Selection and Subsequent Selection Bias in Performance Evaluation](https://jmlr.org/papers/v11/cawley10a.html), 2010. What choosing does to the score of the chosen.
# - The documentation of [peft's LoraConfig](https://huggingface.co/docs/peft/package_reference/lora) and of [papermill](https://papermill.readthedocs.io).
