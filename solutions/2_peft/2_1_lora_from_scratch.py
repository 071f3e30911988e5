# %% [markdown]
# # 2.1 LoRA from scratch
#
# You will be able to adapt a language model by training {{trained_share}} of its weights, prove that your adapter computes what `peft`'s does, and size, store and merge it without surprises.
#
# **You will measure.** Exact match on ticket triage: {{exact_match_before}} before, {{exact_match_after}} after (95 % interval {{exact_match_after:interval}}), with an adapter of {{adapter_kib}} KiB, which is {{adapter_share}} of the model's bytes. With the same factors, the largest difference between your logits and `peft`'s is {{parity_error}}.
#
# **You need.** Lesson 1.1 (seeds, intervals); PyTorch modules and autograd; which linear layers a transformer block has.
#
# **Time.** About 70 minutes, 52 of them for the exercises. The solution runs in {{run:seconds}} s on two CPU cores.

# %% [markdown]
# ## Why it matters at work
#
# A team that serves forty customers from one base model can keep forty adapters of a few megabytes instead of forty copies of the weights. Whoever proposes that is asked what an adapter costs, how it was verified, and whether it may be merged.
#
# Getting it wrong is quiet. A scale of alpha instead of alpha / r, an adapter merged twice, a second customer served with the first one's weights: the model still answers, a little worse, and nothing raises an error.
#
# In interviews you write the layer on a whiteboard, with shapes and initialisation. Then comes the follow-up: "Why is B zero and not A? And what would happen if both were?"

# %% tags=["parameters"]
model_id = "shipped"  # "shipped", the id of a causal language model on the Hub, or a local folder
device = "cpu"  # "cpu", "cuda" or "mps"
rank = 3
alpha = 6  # the update is scaled by alpha / rank
learning_rate = 1e-2  # right for the shipped model of about a million weights; 1e-4 to 3e-4 for a real one
steps = 160  # quick: 3
batch_size = 8
train_tickets = 1024
test_tickets = 64  # of each run; quick: 8
runs = 3  # each with a company, a start and an order of the data of its own; quick: 2
seed = 0

# %%
import copy
import json
import tempfile
import warnings
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import display
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from labkit import adapters, base_model, triage
from labkit.plots import COLOURS, direct_label, intervals, label_lines, use_house_style
from labkit.predict import compare
from labkit.results import ResultCard
from labkit.world import LESSON_SEEDS, World

# peft asks transformers for a property under its old name; the warning says nothing about your code.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
use_house_style()
card = ResultCard("2_1_lora_from_scratch")

# %% [markdown]
# ## The task and the model
#
# A support desk turns each ticket into one line of JSON: product, category, urgency, action. The company is synthetic and new in every run, so no model can have seen it. This is one ticket with its answer.

# %%
model, tokenizer = base_model.load(model_id, device=device)  # in eval mode: no dropout, so runs can be compared exactly
adapters.use_linear_layers(model)  # GPT-2 keeps its weights transposed (Conv1D); any other model stays as it is
worlds = [World(LESSON_SEEDS[seed + run]) for run in range(runs)]
ticket = worlds[0].tickets(1, part="train")[0]
print(ticket.text, "\n\n", ticket.triage.to_json())

# %% [markdown]
# An adapter can sit on any linear layer. Which ones a model has depends on its architecture, so you read them from the model and never hard-code `q_proj`. The output head is left out: in many models, this one included, it *is* the embedding (tied weights). An adapter on it would act on the head alone until you merge it, and on both from then on.

# %%
layers = adapters.linear_layers(model)  # full name -> nn.Linear, without the head
shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}  # (d_out, d_in)
model_parameters = sum(parameter.numel() for parameter in model.parameters())  # tied weights count once
model_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

overview = pd.DataFrame(
    [(name.rpartition(".")[2], f"{d_out} x {d_in}", d_out * d_in) for name, (d_out, d_in) in shapes.items()],
    columns=["layer", "d_out x d_in", "weights"],
)
overview = overview.groupby(["layer", "d_out x d_in"], sort=False)["weights"].agg(["count", "sum"]).reset_index()
display(overview.rename(columns={"sum": "weights in all"}).style.format({"weights in all": "{:,d}"}).hide(axis="index"))
print(f"{type(model).__name__}: {model_parameters:,d} parameters, {model_bytes / 2**20:.1f} MiB")

# %% [markdown]
# ## Count before you build
#
# A frozen weight $W \in \mathbb{R}^{d_{out} \times d_{in}}$ gets a learned update of rank $r$,
#
# $$W' = W + \frac{\alpha}{r} B A, \qquad A \in \mathbb{R}^{r \times d_{in}},\; B \in \mathbb{R}^{d_{out} \times r}$$
#
# (Hu et al., 2021, section 4.1). Only $A$ and $B$ are trained.
#
# **Exercise.** Two things.
#
# 1. *Predict*, before you compute anything: with adapters of rank 3 on all the layers of the table, which share of the model's parameters is trained? `predicted_share` is a fraction: 0.25 means a quarter. It is graded for being a share, not for being right.
# 2. `lora_parameters(shapes, rank)` returns how many numbers the adapters train, as an `int`. `shapes` is a list of `(d_out, d_in)`. `lora_parameters([(6, 4)], 2)` is 20; an empty list gives 0. *About 1 line.*
#
# <details><summary>Hint 1</summary>The update has as many numbers as W, but it is never stored. Count what is stored.</details>
# <details><summary>Hint 2</summary>A has r rows of length d_in; B has d_out rows of length r.</details>
# <details><summary>Hint 3</summary>Sum rank times (d_out + d_in) over the shapes.</details>

# %% exercise="count-parameters" difficulty=1 minutes=4
predicted_share = None
### BEGIN SOLUTION
predicted_share = 0.05
### END SOLUTION


def lora_parameters(shapes: list[tuple[int, int]], rank: int) -> int:
    """Return how many numbers rank-`rank` adapters on weights of these (d_out, d_in) shapes train."""
    ### BEGIN SOLUTION
    return sum(rank * (d_out + d_in) for d_out, d_in in shapes)
    ### END SOLUTION


# %% check="count-parameters" points=1
assert isinstance(predicted_share, (int, float, np.number)), (
    f"Predict with a number: set predicted_share, now {predicted_share!r}"
)
assert 0 < predicted_share < 1, (
    f"predicted_share is a share between 0 and 1 (0.03 for 3 %), not {predicted_share}: neither a percentage nor a count"
)

# %% check="count-parameters" points=1
got = lora_parameters([(6, 4)], 2)
assert got != 48, "48 is rank times d_out times d_in: the update is a product that is never stored; count A and B"
assert got != 24, "24 is the size of W: count the entries of A and B, which do not depend on W's area"
assert got not in (8, 12), f"{got} counts one of the two factors: A is (r, d_in) and B is (d_out, r), both are trained"
assert got == 20, f"A is (2, 4) and B is (6, 2): together 20 numbers, you count {got}"
got = lora_parameters([(6, 4), (4, 4)], 1)
assert got == 18, f"Add up all layers: (6, 4) gives 10 and (4, 4) gives 8 at rank 1, so 18; you count {got}"
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(11)
for _case in range(5):
    _shapes = [(int(o), int(i)) for o, i in _rng.integers(1, 50, size=(_case + 1, 2))]
    _r = int(_rng.integers(1, 9))
    _want = sum(torch.empty(_r, i).numel() + torch.empty(o, _r).numel() for o, i in _shapes)
    assert lora_parameters(_shapes, _r) == _want, f"rank {_r} on {_shapes}: A and B together have {_want} numbers"
assert lora_parameters([], 4) == 0, "No layers, no parameters: an empty list gives 0"
assert lora_parameters([(1, 1)], 1) == 2, "The smallest adapter has one number in A and one in B"
### END HIDDEN TESTS

# %% mistake="a percentage instead of a share" of="count-parameters" says="share between 0 and 1"
predicted_share = 5


def lora_parameters(shapes, rank):
    return sum(rank * (d_out + d_in) for d_out, d_in in shapes)


# %% mistake="counts the update, not its factors" of="count-parameters" says="never stored"
predicted_share = 0.05


def lora_parameters(shapes, rank):
    return sum(rank * d_out * d_in for d_out, d_in in shapes)


# %% mistake="counts A alone" of="count-parameters" says="one of the two factors"
predicted_share = 0.05


def lora_parameters(shapes, rank):
    return sum(rank * d_in for _, d_in in shapes)


# %% mistake="counts the first layer alone" of="count-parameters" says="Add up all layers"
predicted_share = 0.05


def lora_parameters(shapes, rank):
    return rank * sum(shapes[0])


# %% alternative="by building the tensors" of="count-parameters"
predicted_share = 0.001


def lora_parameters(shapes, rank):
    pairs = [(torch.empty(rank, d_in), torch.empty(d_out, rank)) for d_out, d_in in shapes]
    return sum(tensor.numel() for pair in pairs for tensor in pair)


# %% [markdown]
# What you predicted, and what it is:

# %%
card.record("trained_steps", steps, format="d", label="training steps")
trained = lora_parameters(list(shapes.values()), rank)
compare([(f"share of the weights that rank {rank} trains", predicted_share, trained / model_parameters)], format=".2%")
card.record("trained_share", trained / model_parameters, format=".1%", label="share of the parameters trained")

# %% [markdown]
# The share falls with the width $d$ of the model. Of a square layer it is $2r/d$, of an oblong one less, and less again once the embedding counts as well. Rank 3 is {{trained_share}} of this model, and 0.15 % of a square layer with $d = 4096$. Compare adapters by bytes, not by the percentages in a blog post.

# %% [markdown]
# ## The update
#
# **Exercise.** `lora_delta(a, b, alpha)` returns the update $\frac{\alpha}{r} B A$. `a` is `(r, d_in)`, `b` is `(d_out, r)`, the result `(d_out, d_in)` in their dtype; the rank is read from the shapes. With `a = [[1., 2.]]`, `b = [[3.]]` and `alpha = 2` it is `[[6., 12.]]`. *About 1 line.*
#
# <details><summary>Hint 1</summary>Which product of the two has the shape of W?</details>
# <details><summary>Hint 2</summary>The rank is the inner dimension: the number of rows of a.</details>
# <details><summary>Hint 3</summary>Multiply b by a, then by alpha over the rank.</details>


# %% exercise="lora-delta" difficulty=1 minutes=4
def lora_delta(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Return the rank-r update of a weight: (r, d_in), (d_out, r) -> (d_out, d_in)."""
    ### BEGIN SOLUTION
    return alpha / a.shape[0] * (b @ a)
    ### END SOLUTION


# %% check="lora-delta" points=2
got = lora_delta(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]]), alpha=2)
want = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
assert not torch.equal(got, want.T), "Your update is transposed: it must have the shape of W, (d_out, d_in)"
assert not torch.equal(got, torch.tensor([[0.0, 1.0], [0.0, 3.0]])), "The product is the other way round: B times A"
assert torch.equal(got, want) or torch.equal(got, 2 * want), (
    f"With alpha = r = 2 the update is [[3, 4], [0, 0]]; yours is {got.tolist()}"
)
assert torch.equal(got, want), "Scale by alpha / r: with alpha = 2 and r = 2 the factor is 1, not 2"
got = lora_delta(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), alpha=2)
assert got.shape == (1, 2), f"The update has the shape of W, (d_out, d_in) = (1, 2); yours is {tuple(got.shape)}"
assert torch.equal(got, torch.tensor([[6.0, 12.0]])), (
    f"Scale by alpha / r: alpha = 2, r = 1 gives [[6, 12]]; yours is {got.tolist()}"
)
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(5)
for _r, _out, _in, _alpha, _dtype in [
    (1, 3, 5, 4.0, torch.float32),
    (4, 7, 2, 1.0, torch.float64),
    (3, 1, 9, 0.5, torch.float64),
    (5, 5, 5, 10, torch.float32),
]:
    _a = torch.randn(_r, _in, generator=_generator, dtype=_dtype)
    _b = torch.randn(_out, _r, generator=_generator, dtype=_dtype)
    _kept = torch.cat([_a.flatten(), _b.flatten()])
    _got = lora_delta(_a, _b, _alpha)
    assert _got.shape == (_out, _in), f"rank {_r}: the update must be {(_out, _in)}, yours is {tuple(_got.shape)}"
    assert _got.dtype == _dtype, f"Keep the dtype of the factors, {_dtype}; yours is {_got.dtype}"
    _want = torch.einsum("or,ri->oi", _b, _a) * (_alpha / _r)
    assert torch.allclose(_got, _want, rtol=1e-5, atol=1e-6), f"rank {_r}, alpha {_alpha}: scale by alpha / r"
    assert torch.equal(torch.cat([_a.flatten(), _b.flatten()]), _kept), "Do not change the factors: return a new tensor"
### END HIDDEN TESTS


# %% mistake="forgets the scale" of="lora-delta" says="Scale by alpha / r"
def lora_delta(a, b, alpha):
    return b @ a


# %% mistake="scales by alpha" of="lora-delta" says="Scale by alpha / r"
def lora_delta(a, b, alpha):
    return alpha * (b @ a)


# %% mistake="multiplies the wrong way round" of="lora-delta" says="the other way round"
def lora_delta(a, b, alpha):
    return alpha / a.shape[0] * (a @ b)


# %% mistake="returns the transpose" of="lora-delta" says="transposed"
def lora_delta(a, b, alpha):
    return alpha / a.shape[0] * (b @ a).T


# %% mistake="divides by the wrong dimension" of="lora-delta" says="Scale by alpha / r"
def lora_delta(a, b, alpha):
    return alpha / a.shape[1] * (b @ a)


# %% alternative="a sum of outer products" of="lora-delta"
def lora_delta(a, b, alpha):
    rank = len(a)
    delta = torch.zeros(b.shape[0], a.shape[1], dtype=a.dtype)
    for row, column in zip(a, b.T, strict=True):
        delta += torch.outer(column, row)
    return delta * alpha / rank


# %% [markdown]
# Why divide by r? $BA$ is a sum of $r$ terms, so its size grows with $r$; dividing keeps a tuned learning rate roughly usable when you change the rank. rsLoRA divides by $\sqrt r$ instead (Kalajdzievski, 2023), since at $1/r$ the update shrinks for large ranks and the extra rank goes unused; `use_rslora` in a configuration file therefore changes the function the same two tensors compute.

# %% [markdown]
# ## The layer
#
# The layer never builds the update. It keeps the base layer and adds a detour through r dimensions:
#
# $$y = \mathrm{base}(x) + \frac{\alpha}{r}\, (x A^\top) B^\top .$$
#
# A fresh adapter must change *nothing*: $B = 0$, and $A$ is random. Not "almost nothing": adding an exact zero changes no float, so you test with equality, and a bug of size 1e-7 has nowhere to hide.
#
# **Exercise.** Write `LoRALinear(base, rank, alpha, generator=None)`, an `nn.Module` with
#
# | attribute | what |
# |---|---|
# | `base` | the `nn.Linear` you were given, the same object; its weight, and its bias if it has one, no longer require gradients |
# | `a` | trainable `nn.Parameter` `(rank, d_in)`, uniform on ±1/√d_in, which is the Kaiming-uniform start with slope √5 of `nn.Linear` and `peft`; drawn from `generator` |
# | `b` | trainable `nn.Parameter` `(d_out, rank)`, zero |
# | `scale` | the float alpha / rank |
#
# `a` and `b` have dtype and device of the base weight. `forward(x)` takes `(…, d_in)` and returns `(…, d_out)`; gradients reach `a`, `b` and `x`, through which the layers below learn. For a base with `d_in = 4`, `d_out = 6`, rank 2 and alpha 8: `a` is `(2, 4)`, `b` is `(6, 2)`, `scale` is 4.0. *About 8 lines.*
#
# <details><summary>Hint 1</summary>What must be true of B so that the first forward pass is the base layer's? What must be true of A so that B can learn?</details>
# <details><summary>Hint 2</summary><code>nn.init.kaiming_uniform_</code> takes the slope as <code>a</code> and a generator, and fills a tensor in place; <code>requires_grad_(False)</code> on a module returns the module; <code>tensor.to(other)</code> takes dtype and device from another tensor.</details>
# <details><summary>Hint 3</summary>In <code>__init__</code>: freeze and keep the base; a = Parameter(kaiming(empty(rank, d_in))), b = Parameter(zeros(d_out, rank)), both <code>.to(base.weight)</code> before they become parameters. In <code>forward</code>: multiply x by a transposed, then by b transposed, then scale, then add to the base's output.</details>


# %% exercise="lora-linear" difficulty=3 minutes=12
class LoRALinear(nn.Module):
    """A frozen linear layer and its low-rank update: (..., d_in) -> (..., d_out)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        ### BEGIN SOLUTION
        self.base = base.requires_grad_(False)
        start = nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=5**0.5, generator=generator)
        self.a = nn.Parameter(start.to(base.weight))
        self.b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.scale = alpha / rank
        ### END SOLUTION

    def forward(self, x: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        return self.base(x) + self.scale * (x @ self.a.T @ self.b.T)
        ### END SOLUTION


# %% check="lora-linear" points=2
torch.manual_seed(1)
base = nn.Linear(4, 6)
layer = LoRALinear(base, 2, 8)
x = torch.randn(3, 5, 4)
assert layer(x).shape == (3, 5, 6), f"(3, 5, 4) must become (3, 5, 6); yours is {tuple(layer(x).shape)}"
assert torch.equal(layer(x), base(x)), (
    "A fresh adapter must give exactly the base layer's output, bit for bit: start B at zero, and add to base(x)"
)
### BEGIN HIDDEN TESTS
for _d_in, _d_out, _r, _bias, _dtype in [
    (7, 3, 1, False, torch.float32),
    (3, 11, 4, True, torch.float64),
    (1, 1, 1, True, torch.float32),
]:
    torch.manual_seed(_d_in)
    _base = nn.Linear(_d_in, _d_out, bias=_bias, dtype=_dtype)
    _x = torch.randn(5, _d_in, dtype=_dtype)
    _out = LoRALinear(_base, _r, 3.0)(_x)
    assert _out.dtype == _dtype, f"a and b take the dtype of the base weight: {_dtype} in, {_out.dtype} out"
    assert torch.equal(_out, _base(_x)), (
        f"rank {_r}, d_in {_d_in}: a fresh adapter must give exactly the base layer's output"
    )
torch.manual_seed(3)
_model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
).eval()
_ids = torch.randint(0, 50, (2, 9))
with torch.no_grad():
    _before = _model(_ids).logits
    for _name, _linear in adapters.linear_layers(_model).items():
        _model.set_submodule(_name, LoRALinear(_linear, 2, 4))
    assert torch.equal(_model(_ids).logits, _before), "In a whole Llama the logits must stay the same, bit for bit"
### END HIDDEN TESTS

# %% check="lora-linear" points=2
base = nn.Linear(400, 6)
layer = LoRALinear(base, 2, 8, torch.Generator().manual_seed(0))
assert layer.base is base, (
    "Keep the layer you were given as self.base: a copy costs memory, and the model's other users lose it"
)
trained_names = {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad}
assert "base.weight" not in trained_names, (
    "Freeze the base: its weight must not require a gradient, or you fine-tune everything"
)
assert set(trained_names) == {"a", "b"}, (
    f"Exactly a and b are trained (nn.Parameter, requires_grad); yours are {sorted(trained_names)}"
)
assert trained_names == {"a": (2, 400), "b": (6, 2)}, (
    f"a is (rank, d_in) = (2, 400), b is (d_out, rank) = (6, 2); yours: {trained_names}"
)
assert layer.a.any(), "Start A at random values: with both zero, both gradients are zero and nothing is ever learned"
widest = layer.a.abs().max().item() * 400**0.5
assert 0.9 < widest <= 1.0, f"A is uniform on ±1/sqrt(d_in) = ±0.05 here; your largest entry is {widest:.2f} times that"
again = LoRALinear(nn.Linear(400, 6), 2, 8, torch.Generator().manual_seed(0))
assert torch.equal(layer.a, again.a), "Draw A from the generator: the same generator state must give the same A"
double = LoRALinear(nn.Linear(4, 2, bias=False, dtype=torch.float64), 1, 1)
assert double.a.dtype == double.b.dtype == torch.float64, (
    f"a and b take the dtype of the base weight, float64 here; yours are {double.a.dtype} and {double.b.dtype}"
)
### BEGIN HIDDEN TESTS
_layer = LoRALinear(nn.Linear(900, 3, bias=False, dtype=torch.float64), 3, 1.0, torch.Generator().manual_seed(2))
_spread = _layer.a.std().item() * 900**0.5
assert abs(_spread - 3**-0.5) < 0.03, (
    f"A is uniform on ±1/sqrt(d_in), so its deviation is 0.577/sqrt(d_in); yours {_spread:.3f}/sqrt(d_in)"
)
assert _layer.a.dtype == _layer.b.dtype == torch.float64, "a and b take the dtype of the base weight"
_biased = LoRALinear(nn.Linear(3, 3), 1, 1.0)
assert not any(p.requires_grad for p in _biased.base.parameters()), "Freeze the base's bias as well as its weight"
### END HIDDEN TESTS


# %% check="lora-linear" points=2
def compare_with_peft(d_in: int, d_out: int, rank: int, alpha: float, dtype: torch.dtype) -> None:
    """Put the same random factors into your layer and into peft's; compare their outputs and gradients."""
    generator = torch.Generator().manual_seed(d_in)
    base = nn.Linear(d_in, d_out, dtype=dtype)
    theirs = get_peft_model(
        nn.Sequential(copy.deepcopy(base)), LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"])
    )
    theirs = theirs.base_model.model[0].to(dtype)
    mine = LoRALinear(base, rank, alpha)
    for my_factor, their_factor in ((mine.a, theirs.lora_A["default"]), (mine.b, theirs.lora_B["default"])):
        my_factor.data = torch.randn(my_factor.shape, generator=generator, dtype=dtype)
        their_factor.weight.data = my_factor.data.clone()
    x = torch.randn(3, 2, d_in, generator=generator, dtype=dtype)
    assert mine.scale == theirs.scaling["default"], (
        f"The scale is alpha / rank = {alpha} / {rank}; yours is {mine.scale}"
    )
    difference = (mine(x) - theirs(x)).abs().max().item()
    assert difference < 1e-12, (
        f"With the same factors your output differs from peft's by {difference:.1e} (d_in {d_in}, d_out {d_out}, rank "
        f"{rank}): add scale times the detour through A, then B"
    )
    pull = torch.randn(3, 2, d_out, generator=generator, dtype=dtype)
    x_of_mine, x_of_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    mine(x_of_mine).backward(pull)
    theirs(x_of_theirs).backward(pull)
    for name, here, there in (
        ("a", mine.a, theirs.lora_A["default"].weight),
        ("b", mine.b, theirs.lora_B["default"].weight),
        ("x", x_of_mine, x_of_theirs),
    ):
        same = here.grad is not None and torch.allclose(here.grad, there.grad, rtol=1e-9)
        assert same, (
            f"The gradient that reaches {name} is not that of peft's layer: compute with self.a and self.b themselves (no "
            ".data, no detach()), and call the base outside of torch.no_grad()"
        )


compare_with_peft(4, 6, 2, 8, torch.float64)
### BEGIN HIDDEN TESTS
for _d_in, _d_out, _r, _alpha in [(5, 3, 1, 1), (2, 9, 3, 6), (1, 1, 2, 4), (8, 8, 5, 2)]:
    compare_with_peft(_d_in, _d_out, _r, _alpha, torch.float64)
### END HIDDEN TESTS


# %% mistake="starts B at random values" of="lora-linear" says="start B at zero"
class LoRALinear(nn.Module):
    def __init__(self, base, rank, alpha, generator=None):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(
            nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=5**0.5, generator=generator).to(base.weight)
        )
        self.b = nn.Parameter(
            nn.init.kaiming_uniform_(torch.empty(base.out_features, rank), a=5**0.5, generator=generator).to(
                base.weight
            )
        )
        self.scale = alpha / rank

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.a.T @ self.b.T)


# %% mistake="starts both factors at zero" of="lora-linear" says="nothing is ever learned"
class LoRALinear(nn.Module):
    def __init__(self, base, rank, alpha, generator=None):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(base.weight.new_zeros(rank, base.in_features))
        self.b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.a.T @ self.b.T)


# %% mistake="leaves the base trainable" of="lora-linear" says="Freeze the base"
class LoRALinear(nn.Module):
    def __init__(self, base, rank, alpha, generator=None):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(
            nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=5**0.5, generator=generator).to(base.weight)
        )
        self.b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.a.T @ self.b.T)


# %% mistake="keeps the factors as plain tensors" of="lora-linear" says="Exactly a and b are trained"
class LoRALinear(nn.Module):
    def __init__(self, base, rank, alpha, generator=None):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=5**0.5, generator=generator).to(
            base.weight
        )
        self.b = base.weight.new_zeros(base.out_features, rank)
        self.scale = alpha / rank

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.a.T @ self.b.T)


# %% mistake="scales by alpha alone" of="lora-linear" says="The scale is alpha / rank"
class LoRALinear(nn.Module):
    def __init__(self, base, rank, alpha, generator=None):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(
            nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=5**0.5, generator=generator).to(base.weight)
        )
        self.b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.scale = alpha

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.a.T @ self.b.T)


# %% mistake="draws A from a standard normal" of="lora-linear" says="A is uniform on"
class LoRALinear(nn.Module):
    def __init__(self, base, rank, alpha, generator=None):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features, generator=generator).to(base.weight))
        self.b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.a.T @ self.b.T)


# %% mistake="computes with the data of the factors" of="lora-linear" says="no .data"
class LoRALinear(nn.Module):
    def __init__(self, base, rank, alpha, generator=None):
        super().__init__()
        self.base = base.requires_grad_(False)
        start = nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=5**0.5, generator=generator)
        self.a = nn.Parameter(start.to(base.weight))
        self.b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.a.data.T @ self.b.data.T)


# %% mistake="takes frozen for no_grad" of="lora-linear" says="call the base outside of torch.no_grad()"
class LoRALinear(nn.Module):
    def __init__(self, base, rank, alpha, generator=None):
        super().__init__()
        self.base = base.requires_grad_(False)
        start = nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=5**0.5, generator=generator)
        self.a = nn.Parameter(start.to(base.weight))
        self.b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x):
        with torch.no_grad():
            frozen = self.base(x)
        return frozen + self.scale * (x @ self.a.T @ self.b.T)


# %% mistake="keeps the factors in float32" of="lora-linear" says="take the dtype of the base weight"
class LoRALinear(nn.Module):
    def __init__(self, base, rank, alpha, generator=None):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(
            nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=5**0.5, generator=generator)
        )
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.a.T @ self.b.T)


# %% alternative="one product with the updated weight" of="lora-linear"
class LoRALinear(nn.Module):
    def __init__(self, base, rank, alpha, generator=None):
        super().__init__()
        for parameter in base.parameters():
            parameter.requires_grad = False
        self.base = base
        bound = base.in_features**-0.5
        a = (2 * torch.rand(rank, base.in_features, generator=generator) - 1) * bound
        self.register_parameter("a", nn.Parameter(a.to(base.weight.device, base.weight.dtype)))
        self.register_parameter("b", nn.Parameter(torch.zeros_like(base.weight[:, :1]).repeat(1, rank)))
        self.scale = alpha / rank

    def forward(self, x):
        weight = self.base.weight + self.scale * torch.einsum("or,ri->oi", self.b, self.a)
        return nn.functional.linear(x, weight, self.base.bias)


# %% [markdown]
# Put one around every linear layer of the model and compare the logits on real tickets. The difference is not small, it is zero.


# %%
def restore() -> None:
    """Take every adapter off the model: put the original layers back."""
    for name, layer in layers.items():
        model.set_submodule(name, layer)


def attach(names: list[str], rank: int, alpha: float, start_seed: int) -> dict[str, LoRALinear]:
    """Put a fresh LoRALinear around each named layer of the model and freeze everything else."""
    restore()
    model.requires_grad_(False)  # embeddings and norms too
    generator = torch.Generator().manual_seed(start_seed)
    mine = {name: LoRALinear(layers[name], rank, alpha, generator) for name in names}
    for name, layer in mine.items():
        model.set_submodule(name, layer)
    return mine


probe = triage.collate(triage.encode(tokenizer, worlds[0].tickets(8, part="test"))).to(device)


@torch.no_grad()
def probe_logits() -> Tensor:
    """The model's logits on eight tickets with their answers, (8, t, vocabulary)."""
    return model(input_ids=probe.input_ids, attention_mask=probe.attention_mask).logits


restore()
base_logits = probe_logits()
attach(list(layers), rank, alpha, seed)
start_difference = (probe_logits() - base_logits).abs().max().item()
restore()
print(f"largest difference of {base_logits.numel():,d} logits: {start_difference}")
card.record("start_difference", start_difference, format=".1g", label="difference of the logits at the start")

# %% [markdown]
# ## Which factor moves first
#
# With $G = \partial L / \partial y \in \mathbb{R}^{n \times d_{out}}$, the gradient that arrives from above for $n$ positions, and $s = \alpha / r$, the layer's output is $y = x W^\top + s\, x A^\top B^\top$. Both gradients follow in one line each, and they explain the initialisation.
#
# **Exercise.** Two things.
#
# 1. `lora_gradients(x, upstream, a, b, scale)` returns `(∂L/∂A, ∂L/∂B)`, shaped like `a` and `b`. `x` is `(n, d_in)`, `upstream` is $G$ `(n, d_out)`. With `x = [[1., 2.]]`, `upstream = [[3.]]`, `a = [[1., 1.]]`, `b = [[1.]]`, `scale = 2` they are `[[6., 12.]]` and `[[18.]]`. By hand or by autograd. *About 3 lines.*
# 2. `vanishing` says, for three ways to start, whose gradient is exactly zero at step 0: a value of the dictionary is one of `"a"`, `"b"`, `"both"`, `"neither"`. Assume random `x` and `upstream`.
#
# <details><summary>Hint 1</summary>Treat x Aᵀ as a hidden layer h of width r. What is the gradient of h?</details>
# <details><summary>Hint 2</summary>For z = h Bᵀ with upstream G: the gradient of B is Gᵀ h and the gradient of h is G B. Everything carries the factor s.</details>
# <details><summary>Hint 3</summary>∂L/∂B = s Gᵀ (x Aᵀ) and ∂L/∂A = s (G B)ᵀ x. Set A or B to zero in each and read off which vanishes.</details>


# %% exercise="first-gradient" difficulty=3 minutes=8
def lora_gradients(x: Tensor, upstream: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of the loss with respect to a and b, shaped like them."""
    ### BEGIN SOLUTION
    grad_a = scale * (upstream @ b).T @ x
    grad_b = scale * upstream.T @ (x @ a.T)
    return grad_a, grad_b
    ### END SOLUTION


vanishing = {"A random, B zero": None, "A zero, B random": None, "both zero": None}
### BEGIN SOLUTION
vanishing = {"A random, B zero": "a", "A zero, B random": "b", "both zero": "both"}
### END SOLUTION

# %% check="first-gradient" points=2
got_a, got_b = lora_gradients(
    torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0]]), 2.0
)
assert (*got_a.shape, *got_b.shape) == (1, 2, 1, 1), (
    f"Return (gradient of a, gradient of b), shaped like a (1, 2) and b (1, 1); yours are {tuple(got_a.shape)}, {tuple(got_b.shape)}"
)
assert not torch.equal(got_b, torch.tensor([[9.0]])), "The scale multiplies the detour, so it multiplies both gradients"
assert torch.equal(got_a, torch.tensor([[6.0, 12.0]])), (
    f"The gradient of a is [[6, 12]] in the example; yours is {got_a.tolist()}"
)
assert torch.equal(got_b, torch.tensor([[18.0]])), (
    f"The gradient of b is [[18]] in the example; yours is {got_b.tolist()}"
)
rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
got_a, got_b = lora_gradients(rows, torch.ones(3, 1), torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0]]), 1.0)
assert not torch.allclose(got_b, torch.ones(1, 1)), (
    "Sum over the n positions, do not average: upstream already carries the loss's mean"
)
assert torch.allclose(got_b, torch.full((1, 1), 3.0)), (
    f"Three equal positions triple the gradient of b to [[3]]; yours is {got_b.tolist()}"
)
assert torch.allclose(got_a, torch.tensor([[6.0, 0.0]])), (
    f"The gradient of a passes through b: [[6, 0]] here; yours is {got_a.tolist()}"
)
### BEGIN HIDDEN TESTS
for _n, _d_in, _d_out, _r in [(1, 3, 2, 1), (6, 4, 7, 3), (5, 1, 1, 2), (2, 8, 3, 5)]:
    _generator = torch.Generator().manual_seed(_n)
    _x, _g, _a, _b = (
        torch.randn(*s, generator=_generator, dtype=torch.float64)
        for s in [(_n, _d_in), (_n, _d_out), (_r, _d_in), (_d_out, _r)]
    )
    _leaf_a, _leaf_b = _a.clone().requires_grad_(), _b.clone().requires_grad_()
    (1.7 * _x @ _leaf_a.T @ _leaf_b.T).backward(_g)
    _got_a, _got_b = lora_gradients(_x, _g, _a, _b, 1.7)
    for _factor, _got, _want in (("a", _got_a, _leaf_a.grad), ("b", _got_b, _leaf_b.grad)):
        assert _got.shape == _want.shape, (
            f"The gradient of {_factor} has its shape, {tuple(_want.shape)}; yours is {tuple(_got.shape)}"
        )
        assert torch.allclose(_got, _want), f"n {_n}, rank {_r}: the gradient of {_factor} differs from autograd's"
### END HIDDEN TESTS

# %% check="first-gradient" points=2
assert set(vanishing) == {"A random, B zero", "A zero, B random", "both zero"}, (
    f"Keep the three keys; yours are {sorted(vanishing)}"
)
for start, answer in vanishing.items():
    assert answer in ("a", "b", "both", "neither"), (
        f'"{start}" needs one of "a", "b", "both", "neither"; it is {answer!r}'
    )
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(0)
for _start, _answer in vanishing.items():
    _x, _g = torch.randn(6, 5, generator=_generator), torch.randn(6, 4, generator=_generator)
    _a, _b = torch.randn(2, 5, generator=_generator), torch.randn(4, 2, generator=_generator)
    _a = (_a * (0 if "A zero" in _start or "both" in _start else 1)).requires_grad_()
    _b = (_b * (0 if "B zero" in _start or "both" in _start else 1)).requires_grad_()
    (_x @ _a.T @ _b.T).backward(_g)
    _zero = [_name for _name, _factor in (("a", _a), ("b", _b)) if not _factor.grad.any()]
    _want = "both" if len(_zero) == 2 else _zero[0]
    assert _answer == _want, (
        f'"{_start}": put the start into your own formula and see which gradient vanishes; it is not "{_answer}"'
    )
### END HIDDEN TESTS


# %% mistake="forgets the scale in B's gradient" of="first-gradient" says="it multiplies both gradients"
def lora_gradients(x, upstream, a, b, scale):
    return scale * (upstream @ b).T @ x, upstream.T @ (x @ a.T)


vanishing = {"A random, B zero": "a", "A zero, B random": "b", "both zero": "both"}


# %% mistake="averages over positions" of="first-gradient" says="do not average"
def lora_gradients(x, upstream, a, b, scale):
    return scale * (upstream @ b).T @ x / len(x), scale * upstream.T @ (x @ a.T) / len(x)


vanishing = {"A random, B zero": "a", "A zero, B random": "b", "both zero": "both"}


# %% mistake="returns them in the wrong order" of="first-gradient" says="shaped like a"
def lora_gradients(x, upstream, a, b, scale):
    return scale * upstream.T @ (x @ a.T), scale * (upstream @ b).T @ x


vanishing = {"A random, B zero": "a", "A zero, B random": "b", "both zero": "both"}


# %% mistake="thinks that the zero factor has the zero gradient" of="first-gradient" says="see which gradient vanishes"
def lora_gradients(x, upstream, a, b, scale):
    return scale * (upstream @ b).T @ x, scale * upstream.T @ (x @ a.T)


vanishing = {"A random, B zero": "b", "A zero, B random": "a", "both zero": "both"}


# %% mistake="thinks that zero factors still learn" of="first-gradient" says="see which gradient vanishes"
def lora_gradients(x, upstream, a, b, scale):
    return scale * (upstream @ b).T @ x, scale * upstream.T @ (x @ a.T)


vanishing = {"A random, B zero": "a", "A zero, B random": "b", "both zero": "neither"}


# %% alternative="autograd" of="first-gradient"
def lora_gradients(x, upstream, a, b, scale):
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    y = scale * nn.functional.linear(nn.functional.linear(x, a), b)
    return torch.autograd.grad(y, (a, b), upstream)


vanishing = dict(zip(("A random, B zero", "A zero, B random", "both zero"), ("a", "b", "both"), strict=True))

# %% [markdown]
# Now on the model: twelve steps on one batch of tickets, and the norm of each factor's gradient over all layers at every step.

# %%
first_steps = 12
one_batch = triage.collate(triage.encode(tokenizer, worlds[0].tickets(batch_size, part="train")))
mine = attach(list(layers), rank, alpha, seed)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0)
norms: dict[str, list[float]] = {"A": [], "B": []}
for _ in range(first_steps):
    optimizer.zero_grad()
    triage.loss(model, one_batch).backward()
    norms["A"].append(torch.stack([layer.a.grad.norm() for layer in mine.values()]).norm().item())
    norms["B"].append(torch.stack([layer.b.grad.norm() for layer in mine.values()]).norm().item())
    optimizer.step()
restore()

fig, ax = plt.subplots()
ax.plot(range(first_steps), norms["B"], "o-", color=COLOURS.after, label="B")
ax.plot(range(1, first_steps), norms["A"][1:], "o-", color=COLOURS.other, label="A")
ax.set_yscale("log")
floor = ax.get_ylim()[0]
ax.plot(0, floor, "v", color=COLOURS.other, clip_on=False, ms=9)
direct_label(ax, 0, floor, f"A at step 0: exactly {norms['A'][0]:g}", COLOURS.other, offset=(10, 4))
ax.set(xlabel="optimizer step", ylabel="gradient norm (nats)", title="B learns first, A waits one step for it")
label_lines(ax)
plt.show()
print(f"gradient norm at step 0: A {norms['A'][0]:g}, B {norms['B'][0]:.3f}; at step 1: A {norms['A'][1]:.3f}")
card.record("gradient_a_at_start", norms["A"][0], format=".1g", label="norm of A's gradient at step 0")

# %% [markdown]
# A's gradient is $s\,(G B)^\top x$: zero as long as B is zero, and alive as soon as B has taken one step. So one zero factor costs one step, and two cost everything: both gradients stay zero for ever.
#
# Zero A with random B would also be a no-op with a live gradient. The two starts are not equal: with A random, larger learning rates stay stable (Hayou et al., 2024). The choice is older than this reason: Hu et al. (2021) drew A from a Gaussian, `peft` draws it Kaiming-uniform.

# %% [markdown]
# ## Merge and unmerge
#
# For serving, the update can be added into the weight: no extra product, no extra latency. It can also go wrong in four ways. The class below has all four bugs, and runs without an error.


# %%
class BrokenWeight:
    """A weight and its adapter, merged into it or not. Do not use: it has four bugs."""

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        self.weight = weight
        self.update = torch.einsum("or,ri->oi", b, a) * scale
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + x @ self.update.T

    def merge(self) -> None:
        self.weight += self.update
        self.merged = True

    def unmerge(self) -> None:
        self.weight -= self.update
        self.merged = False


torch.manual_seed(2)
weight, a, b, x = torch.randn(32, 48), torch.randn(4, 48), torch.randn(32, 4), torch.randn(5, 48)
caller = weight.clone()
broken = BrokenWeight(caller, a, b, 0.5)
before_merge = broken.forward(x)
broken.merge()
print(f"output changed by merging       {(broken.forward(x) - before_merge).abs().max():.2e}")
broken.merge()
print(f"... by merging a second time    {(broken.forward(x) - before_merge).abs().max():.2e}")
broken.unmerge()
broken.unmerge()
print(f"weight after two unmerges       {(broken.weight - weight).abs().max():.2e} from the original")
print(f"the caller's tensor was changed {not torch.equal(caller, weight)}")

# %% [markdown]
# **Exercise.** Find the bugs and write `AdaptedWeight` with the same interface, so that
#
# - `forward(x)`, `(n, d_in)` → `(n, d_out)`, computes the same function merged or not (to a relative 1e-5 in float32: the sums are rounded in another order);
# - `merge()` and `unmerge()` may be called any number of times in any order: a second `merge` changes nothing, nor does `unmerge` without a `merge`;
# - after `unmerge()`, `weight` equals the original *bit for bit* (in floating point, `w + d - d` is not `w`);
# - the tensor that was passed in is never changed: thirty-nine other adapters share it.
#
# `weight` is the matrix `(d_out, d_in)` that `forward` multiplies by, so it is the merged one while `merged` is true. *About 10 lines.*
#
# <details><summary>Hint 1</summary>Which operator changes a tensor in place? What does forward do when the update is already in the weight?</details>
# <details><summary>Hint 2</summary>Keep a reference to the original. Unmerging is then going back to it, not a subtraction.</details>
# <details><summary>Hint 3</summary>merge: if not merged, self.weight = self.original + update (a new tensor), merged = True. unmerge: self.weight = self.original, merged = False. forward: leave the detour out when merged.</details>


# %% exercise="merge" difficulty=3 minutes=9
class AdaptedWeight:
    """A weight (d_out, d_in) and its adapter, merged into it or not."""

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        ### BEGIN SOLUTION
        self.weight = self.original = weight
        self.a, self.b, self.scale = a, b, scale
        self.merged = False
        ### END SOLUTION

    def forward(self, x: Tensor) -> Tensor:
        """Apply the adapted weight: (n, d_in) -> (n, d_out)."""
        ### BEGIN SOLUTION
        y = x @ self.weight.T
        return y if self.merged else y + self.scale * (x @ self.a.T @ self.b.T)
        ### END SOLUTION

    def merge(self) -> None:
        """Add the update into the weight, once."""
        ### BEGIN SOLUTION
        if not self.merged:
            self.weight = self.original + self.scale * (self.b @ self.a)
            self.merged = True
        ### END SOLUTION

    def unmerge(self) -> None:
        """Go back to the original weight, exactly."""
        ### BEGIN SOLUTION
        self.weight = self.original
        self.merged = False
        ### END SOLUTION


# %% check="merge" points=2
def relative_change(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return ((got - want).abs().max() / want.abs().max()).item()


torch.manual_seed(4)
weight, a, b, x = torch.randn(16, 24), torch.randn(2, 24), torch.randn(16, 2), torch.randn(5, 24)
adapted = AdaptedWeight(weight.clone(), a, b, 0.5)
unmerged = adapted.forward(x)
assert unmerged.shape == (5, 16), f"(5, 24) must become (5, 16); yours is {tuple(unmerged.shape)}"
assert relative_change(unmerged, x @ weight.T) > 0.1, "Before merging, forward must add the detour through a and b"
adapted.merge()
assert adapted.merged is True, "merge() sets merged to True"
assert relative_change(adapted.weight, weight) > 0.1, "After merge(), weight must hold the update"
change = relative_change(adapted.forward(x), unmerged)
assert change < 1e-5, (
    f"Merging changed the output by {change:.0%}: once the update is in the weight, forward must not add it again"
)
### BEGIN HIDDEN TESTS
for _out, _in, _r, _dtype, _tolerance in [
    (1, 7, 1, torch.float32, 1e-5),
    (9, 2, 3, torch.float64, 1e-13),
    (64, 65, 8, torch.float32, 1e-5),
]:
    torch.manual_seed(_out)
    _weight, _a, _b, _x = (torch.randn(*s, dtype=_dtype) for s in [(_out, _in), (_r, _in), (_out, _r), (4, _in)])
    _adapted = AdaptedWeight(_weight, _a, _b, 0.25)
    _want = _x @ (_weight + 0.25 * torch.einsum("or,ri->oi", _b, _a)).T
    assert relative_change(_adapted.forward(_x), _want) < _tolerance, f"rank {_r}: wrong output before merging"
    _adapted.merge()
    assert relative_change(_adapted.forward(_x), _want) < _tolerance, f"rank {_r}: merging changed the output"
### END HIDDEN TESTS

# %% check="merge" points=1
torch.manual_seed(5)
weight, a, b, x = torch.randn(16, 24), torch.randn(2, 24), torch.randn(16, 2), torch.randn(5, 24)
adapted = AdaptedWeight(weight.clone(), a, b, 0.5)
adapted.merge()
once = adapted.weight.clone()
adapted.merge()
assert torch.equal(adapted.weight, once), (
    "Merging twice added the update twice: merge() must do nothing when it is merged already"
)
### BEGIN HIDDEN TESTS
for _ in range(3):
    adapted.unmerge()
    adapted.merge()
    adapted.merge()
assert torch.equal(adapted.weight, once), (
    "After several rounds of unmerge and merge, the merged weight must be the same again"
)
### END HIDDEN TESTS

# %% check="merge" points=2
torch.manual_seed(6)
weight, a, b = torch.randn(16, 24), torch.randn(2, 24), torch.randn(16, 2)
shared = weight.clone()
adapted = AdaptedWeight(shared, a, b, 0.5)
adapted.merge()
assert torch.equal(shared, weight), (
    "merge() changed the tensor that was passed in: others share it, so add out of place"
)
adapted.unmerge()
assert adapted.merged is False, "unmerge() sets merged to False"
assert torch.equal(adapted.weight, weight), (
    f"After unmerge() the weight is {(adapted.weight - weight).abs().max():.0e} off: w + d - d is not w in floating point; keep the original"
)
### BEGIN HIDDEN TESTS
_adapted = AdaptedWeight(shared, a, b, 0.5)
_adapted.unmerge()
assert torch.equal(_adapted.weight, weight), "unmerge() without a merge must change nothing"
_adapted.merge()
_adapted.unmerge()
_adapted.unmerge()
assert torch.equal(_adapted.weight, weight), "A second unmerge() must change nothing"
assert torch.equal(shared, weight), "No call may change the tensor that was passed in"
_adapted.merge()
assert torch.allclose(_adapted.weight, weight + 0.5 * b @ a, atol=1e-5), "merge() must work again after unmerge()"
### END HIDDEN TESTS


# %% mistake="adds the update twice after merging" of="merge" says="forward must not add it again"
class AdaptedWeight:
    def __init__(self, weight, a, b, scale):
        self.weight = self.original = weight
        self.a, self.b, self.scale, self.merged = a, b, scale, False

    def forward(self, x):
        return x @ self.weight.T + self.scale * (x @ self.a.T @ self.b.T)

    def merge(self):
        if not self.merged:
            self.weight, self.merged = self.original + self.scale * (self.b @ self.a), True

    def unmerge(self):
        self.weight, self.merged = self.original, False


# %% mistake="merges a second time" of="merge" says="Merging twice"
class AdaptedWeight:
    def __init__(self, weight, a, b, scale):
        self.weight = self.original = weight
        self.a, self.b, self.scale, self.merged = a, b, scale, False

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.merged else y + self.scale * (x @ self.a.T @ self.b.T)

    def merge(self):
        self.weight, self.merged = self.weight + self.scale * (self.b @ self.a), True

    def unmerge(self):
        self.weight, self.merged = self.original, False


# %% mistake="changes the caller's tensor" of="merge" says="add out of place"
class AdaptedWeight:
    def __init__(self, weight, a, b, scale):
        self.weight, self.kept = weight, weight.clone()
        self.a, self.b, self.scale, self.merged = a, b, scale, False

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.merged else y + self.scale * (x @ self.a.T @ self.b.T)

    def merge(self):
        if not self.merged:
            self.weight += self.scale * (self.b @ self.a)
            self.merged = True

    def unmerge(self):
        self.weight, self.merged = self.kept, False


# %% mistake="unmerges by subtraction" of="merge" says="keep the original"
class AdaptedWeight:
    def __init__(self, weight, a, b, scale):
        self.weight, self.a, self.b, self.scale, self.merged = weight, a, b, scale, False

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.merged else y + self.scale * (x @ self.a.T @ self.b.T)

    def merge(self):
        if not self.merged:
            self.weight, self.merged = self.weight + self.scale * (self.b @ self.a), True

    def unmerge(self):
        if self.merged:
            self.weight, self.merged = self.weight - self.scale * (self.b @ self.a), False


# %% mistake="merges without the scale" of="merge" says="Merging changed the output"
class AdaptedWeight:
    def __init__(self, weight, a, b, scale):
        self.weight = self.original = weight
        self.a, self.b, self.scale, self.merged = a, b, scale, False

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.merged else y + self.scale * (x @ self.a.T @ self.b.T)

    def merge(self):
        if not self.merged:
            self.weight, self.merged = self.original + self.b @ self.a, True

    def unmerge(self):
        self.weight, self.merged = self.original, False


# %% alternative="the flag decides which weight is shown" of="merge"
class AdaptedWeight:
    def __init__(self, weight, a, b, scale):
        self._base, self._a, self._b, self._scale = weight, a, b, scale
        self.merged = False

    @property
    def weight(self):
        return torch.addmm(self._base, self._b, self._a, alpha=self._scale) if self.merged else self._base

    def forward(self, x):
        y = nn.functional.linear(x, self.weight)
        if self.merged:
            return y
        return y + nn.functional.linear(nn.functional.linear(x, self._a), self._b) * self._scale

    def merge(self):
        self.merged = True

    def unmerge(self):
        self.merged = False


# %% [markdown]
# ## The file that travels
#
# What `peft` saves is two files: `adapter_config.json` and `adapter_model.safetensors`. Nothing else is needed, and nothing else is known: the scale is *not* stored with the tensors, it follows from the configuration.


# %%
def random_adapter(
    language_model: nn.Module, names: list[str], folder: str, start_seed: int, **config: object
) -> nn.Module:
    """Put a peft adapter with random factors on the model, save it into the folder, and return peft's model."""
    theirs = get_peft_model(language_model, LoraConfig(target_modules=names, **config)).eval()
    generator = torch.Generator().manual_seed(start_seed)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:  # B too: a fresh B is zero, and zeros prove nothing
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    theirs.save_pretrained(folder)
    return theirs


def tiny_llama(start_seed: int) -> LlamaForCausalLM:
    """A Llama of random weights with two layers of width 24."""
    torch.manual_seed(start_seed)
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


with tempfile.TemporaryDirectory() as folder:
    random_adapter(tiny_llama(0), ["model.layers.0.self_attn.q_proj"], folder, 0, r=2, lora_alpha=8)
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    print({key: config[key] for key in ("peft_type", "r", "lora_alpha", "use_rslora", "target_modules")})
    for key, tensor in load_file(Path(folder, "adapter_model.safetensors")).items():
        print(key, tuple(tensor.shape))

# %% [markdown]
# **Exercise.** `read_adapter(folder)` returns `{layer name: (a, b, scale)}` for the adapter that `peft` saved there. The names are those of the *base* model's layers, such as `model.layers.0.self_attn.q_proj`; `a` is `(r, d_in)`, `b` is `(d_out, r)`, as stored; `scale` is the float that `peft` multiplies the update by: $\alpha / r$, or $\alpha / \sqrt r$ where `use_rslora` is true. For the folder above, the scale is 4.0. Raise `ValueError` when `peft_type` is not `"LORA"`. *About 10 lines.*
#
# <details><summary>Hint 1</summary>Each key is a prefix, the layer's name and a suffix. Cut both off.</details>
# <details><summary>Hint 2</summary><code>str.removeprefix</code> and <code>str.removesuffix</code>; <code>load_file</code> gives the tensors by key, <code>json.loads</code> the configuration.</details>
# <details><summary>Hint 3</summary>Go over the keys that end in .lora_A.weight; the name is what is left without "base_model.model." and that suffix; B has the same key with lora_B. The scale is lora_alpha over r, or over r ** 0.5 with use_rslora.</details>


# %% exercise="read-adapter" difficulty=3 minutes=8
def read_adapter(folder: str | Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return a, b and the scale of every layer that a saved peft adapter changes, by the base model's layer names."""
    ### BEGIN SOLUTION
    config = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
    if config["peft_type"] != "LORA":
        raise ValueError(f"{folder} holds an adapter of type {config['peft_type']}, not LORA")
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    suffix = ".lora_A.weight"
    return {
        key.removesuffix(suffix).removeprefix("base_model.model."): (a, tensors[key.replace("lora_A", "lora_B")], scale)
        for key, a in tensors.items()
        if key.endswith(suffix)
    }
    ### END SOLUTION


# %% check="read-adapter" points=2
def check_names_and_tensors(names: list[str], start_seed: int, **config: object) -> None:
    """Save an adapter with peft, read it with read_adapter, and compare names and tensors."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = random_adapter(tiny_llama(start_seed), names, folder, start_seed, **config)
        found = read_adapter(folder)
    assert not any(name.startswith("base_model") for name in found), (
        "Cut off the prefix base_model.model.: it belongs to peft's wrapper"
    )
    assert not any("lora_" in name for name in found), (
        "Cut off .lora_A.weight and .lora_B.weight: the names are the base model's layers"
    )
    assert set(found) == set(names), f"Expected the layers {sorted(names)}; yours are {sorted(found)}"
    for name, (a, b, _) in found.items():
        layer = theirs.get_base_model().get_submodule(name)
        assert a.shape == layer.lora_A["default"].weight.shape, (
            f"a comes first, (r, d_in); yours is {tuple(a.shape)}: A and B are swapped"
        )
        assert torch.equal(a, layer.lora_A["default"].weight), f"The a of {name} differs from what peft saved"
        assert torch.equal(b, layer.lora_B["default"].weight), (
            f"The b of {name} differs from what peft saved: return it as stored, without the scale"
        )


check_names_and_tensors(["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"], 1, r=3, lora_alpha=6)
### BEGIN HIDDEN TESTS
check_names_and_tensors(["model.layers.1.self_attn.v_proj"], 2, r=1, lora_alpha=1)
check_names_and_tensors(list(adapters.linear_layers(tiny_llama(3))), 3, r=5, lora_alpha=10, use_rslora=True)
### END HIDDEN TESTS


# %% check="read-adapter" points=2
def check_scale(start_seed: int, **config: object) -> None:
    """Save an adapter with peft, read it with read_adapter, and compare the scale."""
    name = "model.layers.0.mlp.up_proj"
    with tempfile.TemporaryDirectory() as folder:
        theirs = random_adapter(tiny_llama(start_seed), [name], folder, start_seed, **config)
        (_, _, scale), *_ = read_adapter(folder).values()
    want = theirs.get_base_model().get_submodule(name).scaling["default"]
    assert scale != config["lora_alpha"] or want == scale, (
        f"The scale is not alpha = {scale}: divide it by the rank (or its root)"
    )
    look = "look at use_rslora" if config.get("use_rslora") else "divide alpha by the rank"
    assert abs(scale - want) < 1e-9, f"{config}: peft multiplies by {want:.4f}, your scale is {scale:.4f}; {look}"


check_scale(4, r=4, lora_alpha=8)
check_scale(5, r=4, lora_alpha=8, use_rslora=True)
with tempfile.TemporaryDirectory() as folder:
    random_adapter(tiny_llama(6), ["model.layers.0.self_attn.q_proj"], folder, 6, r=2, lora_alpha=8)
    Path(folder, "adapter_config.json").write_text(
        Path(folder, "adapter_config.json").read_text().replace('"peft_type": "LORA"', '"peft_type": "IA3"')
    )
    try:
        read_adapter(folder)
        raised = None
    except Exception as error:
        raised = error
assert isinstance(raised, ValueError), (
    f"An adapter of another type (IA3 here) must raise ValueError, and yours raises {type(raised).__name__ if raised else 'nothing'}: "
    "its tensors mean something else"
)
### BEGIN HIDDEN TESTS
check_scale(7, r=1, lora_alpha=3)
check_scale(8, r=7, lora_alpha=2, use_rslora=True)
check_scale(9, r=16, lora_alpha=1)
### END HIDDEN TESTS


# %% mistake="keeps the wrapper's prefix" of="read-adapter" says="Cut off the prefix"
def read_adapter(folder):
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    if config["peft_type"] != "LORA":
        raise ValueError("not LoRA")
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    return {
        k.removesuffix(".lora_A.weight"): (t, tensors[k.replace("lora_A", "lora_B")], scale)
        for k, t in tensors.items()
        if "lora_A" in k
    }


# %% mistake="takes alpha for the scale" of="read-adapter" says="The scale is not alpha"
def read_adapter(folder):
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    if config["peft_type"] != "LORA":
        raise ValueError("not LoRA")
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    strip = lambda key: key.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
    return {
        strip(k): (t, tensors[k.replace("lora_A", "lora_B")], float(config["lora_alpha"]))
        for k, t in tensors.items()
        if "lora_A" in k
    }


# %% mistake="overlooks rsLoRA" of="read-adapter" says="look at use_rslora"
def read_adapter(folder):
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    if config["peft_type"] != "LORA":
        raise ValueError("not LoRA")
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    strip = lambda key: key.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
    scale = config["lora_alpha"] / config["r"]
    return {strip(k): (t, tensors[k.replace("lora_A", "lora_B")], scale) for k, t in tensors.items() if "lora_A" in k}


# %% mistake="swaps A and B" of="read-adapter" says="A and B are swapped"
def read_adapter(folder):
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    if config["peft_type"] != "LORA":
        raise ValueError("not LoRA")
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    strip = lambda key: key.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
    return {strip(k): (tensors[k.replace("lora_A", "lora_B")], t, scale) for k, t in tensors.items() if "lora_A" in k}


# %% mistake="reads any adapter as LoRA" of="read-adapter" says="must raise ValueError"
def read_adapter(folder):
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    strip = lambda key: key.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
    return {strip(k): (t, tensors[k.replace("lora_A", "lora_B")], scale) for k, t in tensors.items() if "lora_A" in k}


# %% mistake="multiplies B by the scale and returns both" of="read-adapter" says="return it as stored"
def read_adapter(folder):
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    if config["peft_type"] != "LORA":
        raise ValueError("not LoRA")
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    strip = lambda key: key.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
    return {
        strip(k): (t, scale * tensors[k.replace("lora_A", "lora_B")], scale)
        for k, t in tensors.items()
        if "lora_A" in k
    }


# %% alternative="through peft's own configuration class" of="read-adapter"
def read_adapter(folder):
    from peft import PeftConfig
    from safetensors import safe_open

    config = PeftConfig.from_pretrained(str(folder))
    if config.peft_type.value != "LORA":
        raise ValueError(f"this is {config.peft_type.value}")
    scale = config.lora_alpha / (np.sqrt(config.r) if config.use_rslora else config.r)
    factors: dict[str, dict[str, Tensor]] = {}
    with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dictionary)
            *name, factor, _ = key.split(".")[2:]
            factors.setdefault(".".join(name), {})[factor] = file.get_tensor(key)
    return {name: (pair["lora_A"], pair["lora_B"], float(scale)) for name, pair in factors.items()}


# %% [markdown]
# The match: `peft` puts random factors on all layers of the model and saves them; you read the folder into your own layers. Same tickets, same model, two implementations.

# %%
restore()
with tempfile.TemporaryDirectory() as folder:
    theirs = random_adapter(model, list(layers), folder, seed, r=rank, lora_alpha=alpha)
    their_logits = probe_logits()
    theirs.unload()
    file_bytes = Path(folder, "adapter_model.safetensors").stat().st_size
    saved = read_adapter(folder)
mine = attach(list(layers), rank, alpha, seed)
for name, (saved_a, saved_b, scale) in saved.items():
    mine[name].a.data.copy_(saved_a)
    mine[name].b.data.copy_(saved_b)
    mine[name].scale = scale
parity_error = (probe_logits() - their_logits).abs().max().item()
restore()
print(f"the adapter moved the logits by up to {(their_logits - base_logits).abs().max():.2f}")
print(f"yours and peft's differ by at most   {parity_error:.1e}")
card.record("parity_error", parity_error, format=".1g", label="largest difference to peft's logits", tolerance=1e-6)

head = model.get_input_embeddings().weight
files = pd.DataFrame(
    [
        ("the whole model", model_bytes),
        (f"adapter of rank {rank} on all linear layers", file_bytes),
        ('the same and modules_to_save=["embed_tokens"] (computed)', file_bytes + head.numel() * head.element_size()),
    ],
    columns=["file", "bytes"],
)
files["share of the model"] = files["bytes"] / model_bytes
display(files.style.format({"bytes": "{:,d}", "share of the model": "{:.1%}"}).hide(axis="index"))
card.record("adapter_kib", file_bytes / 1024, format=".0f", label="adapter file", unit="KiB")
card.record("adapter_share", file_bytes / model_bytes, format=".1%", label="adapter's bytes, as a share of the model's")

# %% [markdown]
# The last line is a trap. New tokens need trained embeddings, and `modules_to_save` stores a *full copy* of each module it names: the adapter then carries the embedding of the base model. With tied weights it is worse: naming the embedding alone leaves the head on the old copy. Add tokens only when you must, and check what the file weighs.

# %% [markdown]
# ## Decide under a budget
#
# A device has room for one adapter, as large as the one you have just read: the rank of the parameters cell on every layer. Two plans may spend these bytes, and alpha is set so that both have the scale alpha / r of the parameters cell:
#
# | plan | layers | so the rank is |
# |---|---|---|
# | `"attention"` | the projections of the attention blocks | high |
# | `"all"` | those and the feed-forward layers | low |
#
# **Exercise.** Decide before you train.
#
# 1. `largest_rank(shapes, budget_bytes, bytes_per_number=4)` returns the largest rank whose adapters fit: tensors only, no file header. `shapes` is a list of `(d_out, d_in)`. `largest_rank([(6, 4)], 100)` is 2 (80 bytes; rank 3 needs 120); 0 when not even rank 1 fits. *About 2 lines.* With it you can ask what rank each plan buys: the attention layers are the names for which `adapters.is_attention(name)` is true.
# 2. `my_plan` is the plan that you would ship, and `predicted_exact_match` (0 to 1) the share of tickets whose four fields it gets all right after training. Both are graded for being answered; below you see what your decision is worth.
#
# <details><summary>Hint 1</summary>What does one unit of rank cost in all the layers together?</details>
# <details><summary>Hint 2</summary>Bytes grow linearly in the rank. A rank is whole, and the budget may not be exceeded.</details>
# <details><summary>Hint 3</summary>Floor-divide the budget by bytes_per_number times the sum of (d_out + d_in).</details>


# %% exercise="budget" difficulty=4 minutes=7
def largest_rank(shapes: list[tuple[int, int]], budget_bytes: int, bytes_per_number: int = 4) -> int:
    """Return the largest rank whose adapters on all these (d_out, d_in) weights fit into the budget."""
    ### BEGIN SOLUTION
    bytes_per_rank = bytes_per_number * sum(d_out + d_in for d_out, d_in in shapes)
    return budget_bytes // bytes_per_rank
    ### END SOLUTION


my_plan, predicted_exact_match = None, None
### BEGIN SOLUTION
my_plan = "all"
predicted_exact_match = 0.9
### END SOLUTION

# %% check="budget" points=2
got = largest_rank([(6, 4)], 100)
assert got != 10, "10 numbers per rank at 4 bytes each: a rank costs 40 bytes, not 10; count bytes"
assert got != 3, "Rank 3 needs 120 bytes: never round up, a budget may not be exceeded"
assert got == 2, f"Rank 2 needs 80 of 100 bytes, rank 3 needs 120: the answer is 2; yours is {got}"
assert largest_rank([(6, 4)], 80) == 2, f"80 bytes are exactly enough for rank 2; yours is {largest_rank([(6, 4)], 80)}"
got = largest_rank([(6, 4), (6, 4)], 100)
assert got == 1, (
    f"All layers share one budget: two layers of (6, 4) need 80 bytes a rank, so rank 1 fits; yours is {got}"
)
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(8)
for _ in range(20):
    _shapes = [(int(o), int(i)) for o, i in _rng.integers(1, 60, size=(int(_rng.integers(1, 6)), 2))]
    _budget, _size = int(_rng.integers(0, 20_000)), int(_rng.choice([1, 2, 4]))
    _got = largest_rank(_shapes, _budget, _size)
    _cost, _next = (sum(_size * r * (o + i) for o, i in _shapes) for r in (_got, _got + 1))
    assert _cost <= _budget < _next, (
        f"{_shapes}, {_budget} bytes of {_size} a number: rank {_got} is not the largest that fits"
    )
assert largest_rank([(500, 500)], 100) == 0, "When not even rank 1 fits, the answer is 0"
### END HIDDEN TESTS

# %% check="budget" points=1
assert my_plan in ("attention", "all"), f'my_plan is "attention" or "all", not {my_plan!r}'
assert isinstance(predicted_exact_match, (int, float, np.number)), (
    f"Predict with a number, not {predicted_exact_match!r}"
)
assert 0 <= predicted_exact_match <= 1, f"predicted_exact_match is a share from 0 to 1, not {predicted_exact_match!r}"


# %% mistake="counts numbers, not bytes" of="budget" says="count bytes"
def largest_rank(shapes, budget_bytes, bytes_per_number=4):
    return budget_bytes // sum(map(sum, shapes))


my_plan, predicted_exact_match = "all", 0.9


# %% mistake="rounds up" of="budget" says="may not be exceeded"
def largest_rank(shapes, budget_bytes, bytes_per_number=4):
    return int(np.ceil(budget_bytes / bytes_per_number / sum(map(sum, shapes))))


my_plan, predicted_exact_match = "all", 0.9


# %% mistake="gives each layer the whole budget" of="budget" says="share one budget"
def largest_rank(shapes, budget_bytes, bytes_per_number=4):
    return min(budget_bytes // (bytes_per_number * sum(shape)) for shape in shapes)


my_plan, predicted_exact_match = "all", 0.9


# %% mistake="leaves the last byte unused" of="budget" says="exactly enough"
def largest_rank(shapes, budget_bytes, bytes_per_number=4):
    return (budget_bytes - 1) // (bytes_per_number * sum(map(sum, shapes)))


my_plan, predicted_exact_match = "all", 0.9


# %% mistake="predicts in percent" of="budget" says="a share from 0 to 1"
def largest_rank(shapes, budget_bytes, bytes_per_number=4):
    return budget_bytes // (bytes_per_number * sum(map(sum, shapes)))


my_plan, predicted_exact_match = "all", 90


# %% alternative="tries one rank after the other" of="budget"
def largest_rank(shapes, budget_bytes, bytes_per_number=4):
    rank = 0
    while bytes_per_number * sum((rank + 1) * (d_out + d_in) for d_out, d_in in shapes) <= budget_bytes:
        rank += 1
    return rank


my_plan, predicted_exact_match = "attention", 0.5

# %% [markdown]
# ## The experiment
#
# Three runs, each with a company, a random start and an order of the data of its own. In each run you measure the base model, then your adapter under both plans. `peft` trains on the layers of plan `"all"` from the same start on the same batches for the first sixth of the way: if the two did not compute the same update, their losses would part within a few steps. Test tickets are never training tickets.

# %%
groups = {
    "attention": [name for name in layers if adapters.is_attention(name)],
    "all": list(layers),
}
number_bytes = model_bytes // model_parameters
budget_bytes = number_bytes * lora_parameters(list(shapes.values()), rank)
ranks = {
    plan: largest_rank([shapes[name] for name in names], budget_bytes, number_bytes) for plan, names in groups.items()
}
data = [
    (triage.encode(tokenizer, world.tickets(train_tickets, part="train")), world.tickets(test_tickets, part="test"))
    for world in worlds
]


def fit(run: int, label: str, until: int = steps) -> list[float]:
    """Train what is trainable in the model on the run's batches, up to step `until` of the schedule."""
    batches = triage.batches(data[run][0], size=batch_size, steps=steps, seed=seed + run)
    label = f"{label}, run {run + 1} of {runs}"
    return triage.train(model, islice(batches, until), steps=steps, learning_rate=learning_rate, label=label)


def answer(run: int) -> list[str]:
    """What the model, as it stands, answers to the run's test tickets."""
    return triage.answers(model, tokenizer, data[run][1])


restore()
texts = {"before": [answer(run) for run in range(runs)]}
losses: dict[str, list[list[float]]] = {}
kept: dict[str, tuple[Tensor, Tensor]] = {}  # your trained factors of the first run, plan "all"
for plan, names in groups.items():
    losses[plan], texts[plan] = [], []
    for run in range(runs):
        mine = attach(names, ranks[plan], alpha / rank * ranks[plan], seed + run)
        losses[plan].append(fit(run, plan))
        texts[plan].append(answer(run))
        if plan == "all" and run == 0:
            kept = {name: (layer.a.detach().clone(), layer.b.detach().clone()) for name, layer in mine.items()}

losses["peft"] = []
for run in range(runs):
    starts = {name: layer.a.detach().clone() for name, layer in attach(list(layers), rank, alpha, seed + run).items()}
    restore()
    # No dropout in the adapter (peft's default, stated because parity depends on it).
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(layers))
    theirs = get_peft_model(model, config).eval()
    for name, start in starts.items():
        model.get_submodule(name).lora_A["default"].weight.data.copy_(start)
    losses["peft"].append(fit(run, "peft", until=max(2, steps // 6)))
    theirs.unload()
restore()
scores = {who: [triage.score(part, data[run][1]) for run, part in enumerate(parts)] for who, parts in texts.items()}

# %% [markdown]
# First, the two implementations. Same start, same batches: the curves should lie on each other. Any gap is the rounding of sums in another order, which training amplifies.

# %%
gap = max(
    abs(yours - peft)
    for mine, theirs in zip(losses["all"], losses["peft"], strict=True)
    for yours, peft in zip(mine, theirs, strict=False)
)
shown = len(losses["peft"][0])
fig, ax = plt.subplots()
for run in range(runs):
    ax.plot(losses["peft"][run], color=COLOURS.library, lw=5, alpha=0.4, label="peft" if run == 0 else None)
    ax.plot(losses["all"][run][:shown], color=COLOURS.after, lw=1.2, label="yours" if run == 0 else None)
ax.set(xlabel="step", ylabel="loss of the answer (nats a token)", title="Your adapter and peft's train alike")
ax.set_ylim(bottom=0)
label_lines(ax)
plt.show()
print(f"largest difference of the losses, {runs} runs of {shown} steps: {gap:.1g} nats")
card.record(
    "loss_gap", gap, format=".1g", label="largest loss difference to peft in training", unit="nats", tolerance=0.05
)

# %% [markdown]
# Then, what the training bought.


# %%
def pooled(parts: list[triage.Score], field: str | None = None) -> np.ndarray:
    """Which answers are right over all runs, (runs * test tickets,)."""
    return np.concatenate([part.exact if field is None else part.fields[field] for part in parts])


columns = [*triage.FIELDS, "all four"]
fig, ax = plt.subplots()
for offset, who, label, colour in [(-0.1, "before", "base", COLOURS.before), (0.1, "all", "adapted", COLOURS.after)]:
    right = [pooled(scores[who], field) for field in triage.FIELDS] + [pooled(scores[who])]
    bounds = [triage.interval(part) for part in right]
    place, values = np.arange(len(columns)) + offset, [part.mean() for part in right]
    intervals(ax, place, values, [low for low, _ in bounds], [high for _, high in bounds], colour)
    direct_label(ax, place[-1], values[-1], label, colour, offset=(8, -4))
ax.set_xticks(range(len(columns)), columns)
ax.set(xlim=(-0.5, len(columns) - 0.3), ylim=(-0.03, 1.05), ylabel="share of tickets right (95 % interval)")
ax.set_title(f"{steps} steps on adapters of rank {rank}")
plt.show()
for name, label, who in [
    ("exact_match_before", "exact match of the base model", "before"),
    ("exact_match_after", "exact match with your adapter", "all"),
]:
    low, high = triage.interval(pooled(scores[who]))
    card.record(name, pooled(scores[who]).mean(), format=".1%", low=low, high=high, label=label, tolerance=0.1)
each_run = [part.exact.mean() for part in scores["all"]]
card.record("lowest_run", min(each_run), format=".0%", label="exact match of the lowest run", tolerance=0.15)
card.record("highest_run", max(each_run), format=".0%", label="exact match of the highest run", tolerance=0.15)
compare([(f"exact match of plan {my_plan!r}", predicted_exact_match, pooled(scores[my_plan]).mean())], format=".1%")

# %% [markdown]
# An answer counts only when it is JSON with exactly the four keys, so the base model scores nothing anywhere: it has never seen the format. The bars are 95 % Wilson intervals over all tickets of all runs. They say what another set of tickets could have given, and nothing about another start or company: single runs range from {{lowest_run}} to {{highest_run}}. A part of that range is again the draw of tickets, since each run has only a share of them. When the range is wider than that explains, it is the run that decides; then more test tickets do not make the number safer, more runs do.
#
# ### What your decision is worth

# %%
fig, ax = plt.subplots()
rows = []
for place, plan in enumerate(groups):
    low, high = triage.interval(pooled(scores[plan]))
    colour = COLOURS.after if plan == my_plan else COLOURS.before
    intervals(ax, [place], [pooled(scores[plan]).mean()], [low], [high], colour)
    ax.plot([place + 0.12] * runs, [part.exact.mean() for part in scores[plan]], "_", ms=14, mew=2, color=colour)
    late = np.mean([curve[-10:] for curve in losses[plan]])
    size = number_bytes * lora_parameters([shapes[name] for name in groups[plan]], ranks[plan])
    rows.append((plan, ranks[plan], size, late, pooled(scores[plan]).mean()))
    if plan != "all":
        label = f"exact match of plan {plan}, equal bytes"
        card.record(f"exact_match_{plan}", rows[-1][-1], format=".1%", low=low, high=high, label=label, tolerance=0.1)
ticks = [f"{plan}\nrank {ranks[plan]}" + ("\n(your plan)" if plan == my_plan else "") for plan in groups]
ax.set_xticks(range(len(groups)), ticks)
ax.set(xlim=(-0.5, len(groups) - 0.3), ylim=(-0.03, 1.05), ylabel="exact match")
ax.set_title(f"{budget_bytes / 1024:.0f} KiB, spent in two ways (bars: 95 %, dashes: runs)")
plt.show()
columns = ["plan", "rank", "bytes", "loss of the last 10 steps (nats)", "exact match"]
formats = {"bytes": "{:,d}", "loss of the last 10 steps (nats)": "{:.3f}", "exact match": "{:.1%}"}
display(pd.DataFrame(rows, columns=columns).style.format(formats).hide(axis="index"))
pairs = zip(scores["all"], scores["attention"], strict=True)
points = [f"{100 * (both.exact.mean() - attention.exact.mean()):+.1f}" for both, attention in pairs]
print(f"'all' minus 'attention', run by run, in points of exact match: {', '.join(points)}")

# %% [markdown]
# ## Merge what you trained
#
# Merged in float32, the model is the same function up to rounding. Serving weights, though, are usually stored in bfloat16, with 8 bits of precision: an entry of the update that is smaller than about 1/256 of the weight beneath it is rounded away or rounded up. You measure both, on the adapter of the first run.

# %%
mine = attach(list(layers), rank, alpha, seed)
for name, (kept_a, kept_b) in kept.items():
    mine[name].a.data.copy_(kept_a)
    mine[name].b.data.copy_(kept_b)
unmerged_logits = probe_logits()
restore()


def rounded(tensor: Tensor) -> Tensor:
    """What is left of a tensor after it was stored in bfloat16."""
    return tensor.to(torch.bfloat16).to(tensor.dtype)


def with_weights(weights: dict[str, Tensor]) -> Tensor:
    """The probe's logits with these weights in the adapted layers; the model's own are put back."""
    originals = {name: layers[name].weight.data for name in weights}
    for name, weight in weights.items():
        layers[name].weight.data = weight
    logits = probe_logits()
    for name, weight in originals.items():
        layers[name].weight.data = weight
    return logits


merged = {}
for name, (kept_a, kept_b) in kept.items():
    adapted = AdaptedWeight(layers[name].weight.data, kept_a, kept_b, alpha / rank)
    adapted.merge()
    merged[name] = adapted.weight
merge_error = (with_weights(merged) - unmerged_logits).abs().max().item()
stored_error = (
    (with_weights({name: rounded(weight) for name, weight in merged.items()}) - unmerged_logits).abs().max().item()
)
lost = {}
for name in merged:
    update = merged[name] - layers[name].weight.data
    survived = rounded(merged[name]) - rounded(layers[name].weight.data)
    lost[name] = ((survived - update).norm() / update.norm()).item()
moved = (unmerged_logits - base_logits).abs().max().item()

table = pd.DataFrame(
    [
        ("training moved the logits by", moved),
        ("merged in float32, they change by", merge_error),
        ("merged and stored in bfloat16, by", stored_error),
    ],
    columns=["", "at most"],
)
display(table.style.format({"at most": "{:.1e}"}).hide(axis="index"))
print(
    f"rounding error of the stored update, relative to the update: {np.mean(list(lost.values())):.1%} (mean of the layers)"
)
card.record(
    "merge_error", merge_error, format=".0e", label="merging in float32 changes the logits by at most", tolerance=1e-4
)
card.record(
    "stored_error", stored_error, format=".2f", label="merged and stored in bfloat16, by at most", tolerance=0.5
)
card.record(
    "update_lost",
    np.mean(list(lost.values())),
    format=".1%",
    label="rounding error of the update in bfloat16",
    tolerance=0.05,
)

# %% [markdown]
# Rounding in float32 moves a logit by {{merge_error}} at most, storage in bfloat16 by {{stored_error}}. So evaluate the model that you serve. An adapter that was evaluated unmerged and shipped merged in bfloat16, or merged into 4-bit weights, is another model. Keep the adapter file even when you merge; from merged weights alone, the base does not come back.

# %% [markdown]
# ## With a real model
#
# Everything above read its layer names, its chat template and its sizes from the model, so the whole lesson runs on any causal language model of the Hub with a chat template:
#
# ```
# course run 2.1 -p model_id Qwen/Qwen3-0.6B -p device cuda -p learning_rate 2e-4 -p rank 16 -p alpha 32 -p steps 200
# ```
#
# The same values in the parameters cell do the same in JupyterLab. What changes:
#
# - **The learning rate.** 1e-4 to 3e-4 instead of the one used here; small models tolerate, and need, larger steps.
# - **Time.** The adapter trains for {{trained_steps}} steps so that the lesson stays short on two cores; the loss is still falling when it stops. With more steps the score rises, here and on a GPU.
# - **The base.** An instruct model writes JSON already, so the score before is higher, and what the adapter teaches is your labels.
# - **Memory.** Weights and activations dominate, optimizer states do not: AdamW keeps two numbers for each *trained* one. In bfloat16, weights take 2 bytes a parameter; full fine-tuning in mixed precision takes about 16.
# - **Names.** GPT-2 stores weights transposed in `Conv1D`; the lesson converts them first, `peft` uses `fan_in_fan_out`. Some models fuse q, k and v into one layer: one adapter then serves all three.
# - **Modes.** `peft`'s default is no adapter dropout, but a model with dropout of its own must be in `eval()` whenever you compare two things.

# %% [markdown]
# ## Result card

# %%
card.show()

# %% [markdown]
# ## Say it in an interview
#
# <details><summary>Why is B zero and A random, and not the other way round, and not both zero?</summary>
#
# One factor must be zero so that the first forward pass is the base model's, exactly. The gradient of each factor carries the other as a factor: with B zero, A's gradient is zero for one step, while B moves at once. With both zero, both gradients are zero for ever. Zero A with random B would also start as a no-op; A random is the better of the two since it stays stable at larger learning rates.
# </details>
#
# <details><summary>A customer's adapter scored well in evaluation and does worse in production. What do you check first?</summary>
#
# Whether the same function is being served: the scale (alpha / r or alpha / √r), the adapter merged twice or merged and still attached, the base weights' revision, the dtype that it was merged in, the chat template, and modules that were trained but not saved (a new token's embedding). Each is checked by comparing logits on a few fixed prompts with those from the evaluation; equality up to rounding settles it.
# </details>
#
# <details><summary>You have a fixed number of bytes for an adapter. Where do you put them?</summary>
#
# Start from all linear layers at a low rank, and let a measurement on the task move you from there. Literature since QLoRA (Dettmers et al., 2023) finds that attention alone, at whatever rank, tends to fall behind. The measurement here, at equal bytes and {{trained_steps}} steps: {{exact_match_after}} exact match on all layers, {{exact_match_attention}} on attention alone at a higher rank. Then say what would make you doubt it: the interval, the spread between runs, and a learning rate that was tuned for one of the plans.
# </details>

# %% [markdown]
# ## Read next
#
# - Edward J. Hu et al., [LoRA: Low-Rank Adaptation of Large Language Models](https://arxiv.org/abs/2106.09685), 2021. Sections 4.1 and 7.
# - Armen Aghajanyan, Luke Zettlemoyer, Sonal Gupta, [Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning](https://arxiv.org/abs/2012.13255), 2020. Why so few directions can be enough.
# - Tim Dettmers, Artidoro Pagnoni, Ari Holtzman, Luke Zettlemoyer, [QLoRA: Efficient Finetuning of Quantized LLMs](https://arxiv.org/abs/2305.14314), 2023. Section 4 on which layers to adapt.
# - Damjan Kalajdzievski, [A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA](https://arxiv.org/abs/2312.03732), 2023.
# - Soufiane Hayou, Nikhil Ghosh, Bin Yu, [The Impact of Initialization on LoRA Finetuning Dynamics](https://arxiv.org/abs/2406.08447), 2024. A random against B random.
# - Dan Biderman et al., [LoRA Learns Less and Forgets Less](https://arxiv.org/abs/2405.09673), 2024. What the low rank costs, and what it protects.
# - Reece Shuttleworth, Jacob Andreas, Antonio Torralba, Pratyusha Sharma, [LoRA vs Full Fine-tuning: An Illusion of Equivalence](https://arxiv.org/abs/2410.21228), 2024.
# - John Schulman and Thinking Machines Lab, [LoRA Without Regret](https://thinkingmachines.ai/blog/lora/), 2025. Which layers, which rank, which learning rate.
