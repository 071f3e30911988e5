# %% [markdown]
# # 1.2 Anatomy of a Llama
#
# You will be able to write every part of a Llama by hand, prove each equal to the library's, account for its parameters, FLOPs and cache bytes, and find the heads that copy.
#
# **You will measure.** Your parts differ from `transformers`' by at most {{parity_error}} of the largest value. One wrong convention in RoPE raises no error and moves the loss from {{loss_right}} to {{loss_wrong_rope}} nats a token. A KV cache saves {{cache_saving}} of the FLOPs of writing 96 tokens after 32. The best copying head puts {{induction_score}} of its attention (95 % interval {{induction_score:interval}}) on the one token that comes next, where an even spread gives {{induction_even}}.
#
# **You need.** PyTorch; self-attention as in *Attention Is All You Need*. Lesson 1.1 helps with intervals.
#
# **Time.** About 70 minutes; the solution runs in {{run:seconds}} s on one CPU core.

# %% [markdown]
# ## Why it matters at work
#
# Whoever serves, finetunes or debugs a model has to say what it holds and what a token costs: how many parameters, how many bytes of cache a conversation, how many FLOPs a reply. The parts are few, yet each has a convention that can be got wrong *quietly*: a checkpoint converted with the wrong rotation, a mask that is off by one, positions that count padding, a loss without its shift. Nothing fails: the shapes fit, the model runs, and it is worse for no visible reason. Interviewers ask you to write grouped-query attention on a whiteboard, and then why the cache is what limits the batch.

# %% [markdown]
# Parameters of the run. With another `model_id` the whole lesson runs on that model.

# %% tags=["parameters"]
model_id = "shipped"  # "shipped", the id of a causal language model on the Hub, or a local folder
device = "cpu"  # "cpu", "cuda" or "mps"
runs = 5  # worlds that everything random is measured on, at least 3; quick: 3
longest = 200  # tokens of a page; longer ones are cut
seed = 0

# %%
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import display
from scipy import stats
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AttentionInterface,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
)
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.pytorch_utils import Conv1D

from labkit import base_model
from labkit.adapters import is_attention
from labkit.plots import COLOURS, direct_label, intervals, label_lines, use_house_style
from labkit.predict import compare
from labkit.results import ResultCard
from labkit.world import LESSON_SEEDS, World

use_house_style()
card = ResultCard("1_2_anatomy_of_a_llama")

# %% [markdown]
# ## What it is made of
#
# A Llama turns token ids $(b, t)$ into logits $(b, t, V)$: $b$ texts, $t$ tokens, a vocabulary of $V$ tokens. Each id selects a row of the embedding table, a vector of width $d$. Then come $L$ equal layers, each of which adds to that vector twice:
#
# $$x \leftarrow x + \mathrm{attention}(\mathrm{norm}(x)), \qquad x \leftarrow x + \mathrm{feedforward}(\mathrm{norm}(x)) .$$
#
# A last norm and the head, a matrix $(V, d)$, give the logits. There are no biases.
#
# | part | weights, (out, in) or (size,) |
# |---|---|
# | embedding | $(V, d)$ |
# | attention of a layer, $h$ query heads and $h_{kv}$ key-value heads of width $d_h$ | q $(h\,d_h, d)$, k and v $(h_{kv}\,d_h, d)$ each, o $(d, h\,d_h)$ |
# | feed-forward of a layer, width $f$ | gate and up $(f, d)$ each, down $(d, f)$ |
# | norms | $(d,)$ before each attention, before each feed-forward, and once before the head |
# | head | $(V, d)$, or *tied*: the embedding itself, one tensor in two places |


# %%
def as_llama(config: PretrainedConfig) -> LlamaConfig:
    """The config of a plain Llama with the sizes of this model; a plain Llama's own comes back as it is."""
    if is_plain_llama(config):
        return config
    heads = config.num_attention_heads
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )


def is_plain_llama(config: PretrainedConfig) -> bool:
    """Whether this is a Llama with RoPE as published, without biases (Llama 3.1 stretches RoPE; Qwen adds norms)."""
    return (
        isinstance(config, LlamaConfig)
        and config.model_type == "llama"
        and config.rope_parameters["rope_type"] == "default"
        and not (config.attention_bias or config.mlp_bias)
        and config.hidden_act == "silu"
    )


model, tokenizer = base_model.load(model_id, device=device)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
model.set_attn_implementation("eager")  # plain matrix products: they can be counted, and their weights looked at
config = as_llama(model.config)
symbols = {
    "V": "vocab_size",
    "d": "hidden_size",
    "L": "num_hidden_layers",
    "h": "num_attention_heads",
    "h_kv": "num_key_value_heads",
    "d_h": "head_dim",
    "f": "intermediate_size",
    "tied": "tie_word_embeddings",
}
print(type(model).__name__)
pd.DataFrame(
    [(symbol, name, str(getattr(config, name))) for symbol, name in symbols.items()],
    columns=["symbol", "in the config", "value"],
).style.hide(axis="index")

# %% [markdown]
# **Exercise.** Two things.
#
# 1. *Predict* from the table, in your head: how many parameters has this model? `predicted_parameters` is a whole number; it is graded for being one (ten thousand to a trillion), not for being right.
# 2. `count_parameters(config)` returns `{"embeddings": …, "attention": …, "feed-forward": …, "norms": …}` for a `LlamaConfig`, each an `int`: the numbers that are *stored*, over all layers. The head belongs to `"embeddings"`; when `config.tie_word_embeddings` is true it is not stored a second time. The other names are those of the table above. Do not assume that $h\,d_h = d$. With $V = 10$, $d = 8$, $L = 3$, $h = 4$, $h_{kv} = 2$, $d_h = 4$, $f = 12$, tied, it is `{"embeddings": 80, "attention": 1152, "feed-forward": 864, "norms": 56}`. *About 10 lines.*
#
# <details><summary>Hint 1</summary>Go through the table row by row, multiply each shape, and ask of each row: how often does it occur?</details>
# <details><summary>Hint 2</summary>Queries and the output have h d_h numbers a token, keys and values h_kv d_h. The feed-forward has three matrices. How many norms does a layer have, and how many the model?</details>
# <details><summary>Hint 3</summary>A layer's attention has d times (2 h d_h + 2 h_kv d_h) weights, its feed-forward 3 d f; the norms are (2 L + 1) vectors of width d; the table counts once when tied, else twice.</details>

# %% exercise="count-parameters" difficulty=2 minutes=7
predicted_parameters = None
### BEGIN SOLUTION
predicted_parameters = 1_000_000
### END SOLUTION


def count_parameters(config: LlamaConfig) -> dict[str, int]:
    """Return how many parameters a Llama stores in its embeddings, attention, feed-forward layers and norms."""
    ### BEGIN SOLUTION
    d, layers = config.hidden_size, config.num_hidden_layers
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    tables = 1 if config.tie_word_embeddings else 2
    return {
        "embeddings": tables * config.vocab_size * d,
        "attention": layers * d * 2 * (queries + keys),
        "feed-forward": layers * 3 * d * config.intermediate_size,
        "norms": (2 * layers + 1) * d,
    }
    ### END SOLUTION


# %% check="count-parameters" points=1
assert isinstance(predicted_parameters, (int, float, np.number)), (
    f"Predict with a number: predicted_parameters is {predicted_parameters!r}"
)
assert 1e4 <= predicted_parameters <= 1e12, (
    f"A count of parameters lies between ten thousand and a trillion; yours is {predicted_parameters}"
)


# %% check="count-parameters" points=1
def llama_of(tied: bool = True, **sizes: int) -> LlamaConfig:
    names = {"V": "vocab_size", "d": "hidden_size", "L": "num_hidden_layers", "f": "intermediate_size"}
    names |= {"h": "num_attention_heads", "h_kv": "num_key_value_heads", "d_h": "head_dim"}
    return LlamaConfig(**{names[key]: size for key, size in sizes.items()}, tie_word_embeddings=tied)


counted = count_parameters(llama_of(V=10, d=8, L=3, h=4, h_kv=2, d_h=4, f=12))
assert set(counted) == {"embeddings", "attention", "feed-forward", "norms"}, (
    f"The keys are embeddings, attention, feed-forward and norms; yours: {counted}"
)
assert all(isinstance(count, (int, np.integer)) for count in counted.values()), (
    f"Counts are whole numbers of type int (divide with //, not with /); yours: {counted}"
)
assert counted["embeddings"] != 160, "Tied, the head is the embedding: one tensor, stored once, so 80 and not 160"
assert counted["embeddings"] == 80, f"The table is (V, d) = (10, 8), 80 numbers; you count {counted['embeddings']}"
untied = count_parameters(llama_of(V=10, d=8, L=3, h=4, h_kv=2, d_h=4, f=12, tied=False))
assert untied["embeddings"] == 160, (
    f"Untied, the head is a second (V, d): 160 numbers here; you count {untied['embeddings']}"
)
assert counted["norms"] != 48, "The norm before the head is missing: a layer has two norms, and the model one more"
assert counted["norms"] == 56, (
    "Each of the 3 layers has two norms, before attention and before the feed-forward part, and the model one more: "
    f"7 of 8 numbers are 56; you count {counted['norms']}"
)
### BEGIN HIDDEN TESTS
for _v, _d, _l, _tied in [(3, 4, 1, True), (100, 12, 7, False), (5, 2, 3, True)]:
    _got = count_parameters(llama_of(V=_v, d=_d, L=_l, h=2, h_kv=1, d_h=2, f=5, tied=_tied))
    assert _got["embeddings"] == _v * _d * (2 - _tied), f"V={_v}, d={_d}, tied={_tied}: wrong number of embeddings"
    assert _got["norms"] == sum([2 * _d] * _l, _d), f"d={_d}, L={_l}: wrong number of norm weights"
### END HIDDEN TESTS

# %% check="count-parameters" points=2
counted = count_parameters(llama_of(V=10, d=8, L=3, h=4, h_kv=2, d_h=4, f=12))
assert (counted["attention"], counted["feed-forward"]) not in ((384, 288), (384, 864), (1152, 288)), (
    "That is one layer's share: count the attention and the feed-forward part of all L layers, here 3"
)
assert counted["attention"] != 1536, "Keys and values have h_kv heads, not h: that is what grouping them saves"
assert counted["attention"] not in (576, 768), (
    "Heads are d_h wide, and h times d_h need not be d: read config.head_dim (here 4 heads of 4, and d = 8)"
)
assert counted["attention"] == 1152, (
    f"q and o have 16 x 8 weights, k and v 8 x 8, in 3 layers: 1152; you count {counted['attention']}"
)
assert counted["feed-forward"] != 576, "Count three matrices: gate, up and down; a classic feed-forward part has two"
assert counted["feed-forward"] == 864, (
    f"Three matrices of 8 x 12 in 3 layers are 864; you count {counted['feed-forward']}"
)
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(3)
for _case in range(6):
    _h_kv, _group, _d_h = (int(n) for n in _rng.integers(1, 4, size=3))
    _sizes = {"V": 7, "d": _h_kv * _group * int(_rng.integers(1, 4)), "L": int(_rng.integers(1, 4))}
    _config = llama_of(
        **_sizes, h=_h_kv * _group, h_kv=_h_kv, d_h=2 * _d_h, f=int(_rng.integers(1, 30)), tied=bool(_case % 2)
    )
    with torch.device("meta"):
        _stored = sum(p.numel() for p in LlamaForCausalLM(_config).parameters())
    _got = sum(count_parameters(_config).values())
    assert _got == _stored, f"A Llama with {_sizes}, h={_h_kv * _group}, h_kv={_h_kv}, d_h={2 * _d_h} has {_stored}"
### END HIDDEN TESTS


# %% mistake="stores the tied head twice" of="count-parameters" says="stored once"
predicted_parameters = 1_300_000


def count_parameters(config):
    d, n = config.hidden_size, config.num_hidden_layers
    q, k = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "embeddings": 2 * config.vocab_size * d,
        "attention": n * d * (2 * q + 2 * k),
        "feed-forward": n * 3 * d * config.intermediate_size,
        "norms": (2 * n + 1) * d,
    }


# %% mistake="a key-value head for each query head" of="count-parameters" says="Keys and values have h_kv heads"
predicted_parameters = 1_000_000


def count_parameters(config):
    d, n = config.hidden_size, config.num_hidden_layers
    return {
        "embeddings": (2 - config.tie_word_embeddings) * config.vocab_size * d,
        "attention": n * d * 4 * config.num_attention_heads * config.head_dim,
        "feed-forward": n * 3 * d * config.intermediate_size,
        "norms": (2 * n + 1) * d,
    }


# %% mistake="two matrices in the feed-forward part" of="count-parameters" says="Count three matrices"
predicted_parameters = 1_000_000


def count_parameters(config):
    d, n = config.hidden_size, config.num_hidden_layers
    q, k = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "embeddings": (2 - config.tie_word_embeddings) * config.vocab_size * d,
        "attention": n * d * (2 * q + 2 * k),
        "feed-forward": n * 2 * d * config.intermediate_size,
        "norms": (2 * n + 1) * d,
    }


# %% mistake="forgets the last norm" of="count-parameters" says="The norm before the head is missing"
predicted_parameters = 1_000_000


def count_parameters(config):
    d, n = config.hidden_size, config.num_hidden_layers
    q, k = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "embeddings": (2 - config.tie_word_embeddings) * config.vocab_size * d,
        "attention": n * d * (2 * q + 2 * k),
        "feed-forward": n * 3 * d * config.intermediate_size,
        "norms": 2 * n * d,
    }


# %% mistake="takes the heads to be as wide as the model" of="count-parameters" says="read config.head_dim"
predicted_parameters = 1_000_000


def count_parameters(config):
    d, n = config.hidden_size, config.num_hidden_layers
    k = d * config.num_key_value_heads // config.num_attention_heads
    return {
        "embeddings": (2 - config.tie_word_embeddings) * config.vocab_size * d,
        "attention": n * d * (2 * d + 2 * k),
        "feed-forward": n * 3 * d * config.intermediate_size,
        "norms": (2 * n + 1) * d,
    }


# %% mistake="one layer's attention" of="count-parameters" says="That is one layer's share"
predicted_parameters = 1_000_000


def count_parameters(config):
    d, n = config.hidden_size, config.num_hidden_layers
    q, k = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "embeddings": (2 - config.tie_word_embeddings) * config.vocab_size * d,
        "attention": d * (2 * q + 2 * k),
        "feed-forward": n * 3 * d * config.intermediate_size,
        "norms": (2 * n + 1) * d,
    }


# %% mistake="counts with a division" of="count-parameters" says="whole numbers of type int"
predicted_parameters = 1_000_000


def count_parameters(config):
    d, n = config.hidden_size, config.num_hidden_layers
    q = config.num_attention_heads * config.head_dim
    k = q / (config.num_attention_heads / config.num_key_value_heads)
    return {
        "embeddings": (2 - config.tie_word_embeddings) * config.vocab_size * d,
        "attention": n * d * (2 * q + 2 * k),
        "feed-forward": n * 3 * d * config.intermediate_size,
        "norms": (2 * n + 1) * d,
    }


# %% mistake="predicts in millions" of="count-parameters" says="between ten thousand and a trillion"
predicted_parameters = 1.05


def count_parameters(config):
    d, n = config.hidden_size, config.num_hidden_layers
    q, k = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "embeddings": (2 - config.tie_word_embeddings) * config.vocab_size * d,
        "attention": n * d * (2 * q + 2 * k),
        "feed-forward": n * 3 * d * config.intermediate_size,
        "norms": (2 * n + 1) * d,
    }


# %% alternative="builds the model without memory and looks" of="count-parameters"
predicted_parameters = 2**20


def count_parameters(config):
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    found = {"embeddings": 0, "attention": 0, "feed-forward": 0, "norms": 0}
    for name, parameter in skeleton.named_parameters():
        if "norm" in name:
            found["norms"] += parameter.numel()
        elif "self_attn" in name:
            found["attention"] += parameter.numel()
        elif "mlp" in name:
            found["feed-forward"] += parameter.numel()
        else:
            found["embeddings"] += parameter.numel()
    return found


# %% [markdown]
# Your formula beside the tensors of the model. (With another architecture the two columns differ by what it has more, or less, than a Llama of its sizes.)


# %%
def stored_parameters(model: nn.Module) -> dict[str, int]:
    """The parameters of any causal language model by part; a tensor in two places counts once."""
    found = dict.fromkeys(("embeddings", "attention", "feed-forward", "norms"), 0)
    seen = set()
    for path, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            if weight in seen:
                continue
            seen.add(weight)
            if isinstance(module, nn.Embedding) or module is model.get_output_embeddings():
                found["embeddings"] += weight.numel()
            elif weight.dim() == 1:
                found["norms"] += weight.numel()  # and biases, where a model has them
            else:
                found["attention" if is_attention(path) else "feed-forward"] += weight.numel()
    return found


formula, stored = count_parameters(config), stored_parameters(model)
total = sum(stored.values())
compare([("parameters", predicted_parameters, total)], format=",.0f")
rows = [(part, formula[part], stored[part], stored[part] / total) for part in stored]
rows.append(("all", sum(formula.values()), total, 1.0))
table = pd.DataFrame(rows, columns=["part", "your formula", "the model", "share"])
display(table.style.format({"your formula": "{:,d}", "the model": "{:,d}", "share": "{:.1%}"}).hide(axis="index"))
card.record("parameters", total, format=",d", label="parameters of the model")

# %% [markdown]
# ### Parameters are not work
#
# A matrix of $P$ weights costs $2P$ FLOPs a token: $P$ multiplications and $P$ additions. The embedding *lookup* costs none, the head does. And attention has work without weights: in a text of $n$ tokens each token compares its query with $n$ keys and mixes $n$ values, $4\,h\,d_h\,n$ FLOPs a layer.
#
# `FlopCounterMode` counts them while the model runs, from the shapes of the operators it sees. It counts shapes, not seconds, so the numbers are the same on every machine. It also has a table of the operators it knows, and what is not in the table counts as nothing, without a warning:


# %%
@torch.no_grad()
def flops_by_part(tokens: int) -> dict[str, int]:
    """FLOPs of reading a text of random tokens, by part; keys as in `stored_parameters`, and the attention scores."""
    ids = torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids.to(device), use_cache=False)
    counts = counter.get_flop_counts()
    found = dict.fromkeys(("embeddings", "attention", "feed-forward"), 0)
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):  # GPT-2 has its own linear layer
            part = "attention" if is_attention(path) else "feed-forward"
            part = "embeddings" if module is model.get_output_embeddings() else part
            found[part] += sum(counts.get(f"{type(model).__name__}.{path}", {}).values())
    return found | {"scores": counter.get_total_flops() - sum(found.values())}


for implementation in ("sdpa", "eager"):
    model.set_attn_implementation(implementation)
    counted_flops = flops_by_part(64)
    print(
        f"{implementation:>5}: {sum(counted_flops.values()):,d} FLOPs, {counted_flops['scores']:,d} of them in scores"
    )

# %% [markdown]
# Same model, same text, same logits. On a CPU, `"sdpa"` calls a fused kernel that the counter of the pinned PyTorch does not know, so its scores and mixing are missing from the first line. Check a counter against a formula before you quote it; this lesson counts with `"eager"`.

# %%
short, long = 32, min(512, model.config.max_position_embeddings)
flops = {tokens: flops_by_part(tokens) for tokens in (short, long)}
by_formula = config.num_hidden_layers * 4 * short**2 * config.num_attention_heads * config.head_dim
print(f"scores and mixing, {short} tokens: {by_formula:,d} by the formula, {flops[short]['scores']:,d} by the counter")
names = {
    "embeddings": "embedding and head",
    "attention": "attention: its matrices",
    "scores": "attention: scores and mixing",
    "feed-forward": "feed-forward",
    "norms": "norms",
}
series = [
    ("of the parameters", {part: count / total for part, count in stored.items()}, COLOURS.before),
    *(
        (f"of the FLOPs, {tokens} tokens", {p: n / sum(found.values()) for p, n in found.items()}, colour)
        for (tokens, found), colour in zip(flops.items(), (COLOURS.after, COLOURS.other), strict=True)
    ),
]
fig, ax = plt.subplots(figsize=(8.5, 4.6))
for offset, (what, shares, colour) in zip((-0.27, 0, 0.27), series, strict=True):
    for place, part in enumerate(names):
        share = 100 * shares.get(part, 0)
        ax.barh(place + offset, share, 0.25, color=colour)
        text = f"{share:.0f} % {what}" if place == 0 else f"{share:.1f} %" if 0 < share < 1 else f"{share:.0f} %"
        ax.text(share + 0.8, place + offset, text, color=colour, va="center", fontsize=9, fontweight="bold")
ax.set_yticks(range(len(names)), names.values())
ax.invert_yaxis()
ax.grid(axis="y", visible=False)
ax.set(xlabel="share / %", xlim=(0, 75), title="Where the parameters are, and where the work is")
plt.show()
scores_share = flops[long]["scores"] / sum(flops[long].values())
card.record("embedding_share", stored["embeddings"] / total, format=".0%", label="share of parameters in embeddings")
card.record("scores_share", scores_share, format=".0%", label=f"share of FLOPs in attention scores, {long} tokens")

# %% [markdown]
# Of the {{parameters}} parameters {{embedding_share}} are the embedding. Attention's scores have no parameter at all, and take {{scores_share}} of the FLOPs when the text is 512 tokens long. Their share grows with the text, so "two FLOPs a parameter and token" (Kaplan et al., 2020) holds for short texts only, or for models that are wide compared with their text. Counted are matrix products; norms, softmax and activations are left out, as is usual. The scores are counted for all pairs, also for those that the causal mask throws away.

# %% [markdown]
# ## Norm and gate
#
# **RMSNorm** (Zhang and Sennrich, 2019) divides a vector by its root mean square and scales each coordinate by a learned weight $g \in \mathbb{R}^d$. Nothing is subtracted:
#
# $$\mathrm{rmsnorm}(x)_i = g_i\, \frac{x_i}{\sqrt{\frac{1}{d}\sum_j x_j^2 + \varepsilon}}$$
#
# **SwiGLU** (Shazeer, 2020) is a feed-forward part whose hidden units are gated, $\odot$ being the product of coordinates and $\mathrm{silu}(z) = z\,\sigma(z)$ with the logistic function $\sigma$:
#
# $$\mathrm{swiglu}(x) = W_{down}\,\bigl(\mathrm{silu}(W_{gate}\,x) \odot W_{up}\,x\bigr)$$
#
# **Exercise.** Write both. `x` is `(…, d)`, with any number of axes before the last, and so are the results; `x` itself stays as it is.
#
# 1. `rms_norm(x, weight, eps)` with `weight` `(d,)`. Squares, mean, root and quotient are taken in float32, whatever the dtype of `x`: 300 squared is more than float16 can hold. The quotient is rounded to the dtype of `x` first and multiplied by `weight` then, as in `LlamaRMSNorm`; in bfloat16 the order shows. With `x = [3., 4.]`, `weight = [1., 2.]`, `eps = 0` it is `[0.8485, 2.2627]`. *About 3 lines.*
# 2. `swiglu(x, gate, up, down)` with the weights of the table: `gate` and `up` `(f, d)`, `down` `(d, f)`. With `x = [1., 2.]`, `gate = [[1., 1.]]`, `up = [[2., 0.]]`, `down = [[1.], [-1.]]` it is `[5.7155, -5.7155]`. *About 1 line.*
#
# <details><summary>Hint 1</summary>Over which axis is the mean, and what must its shape be so that it divides x? Which of the two matrices goes through the silu?</details>
# <details><summary>Hint 2</summary><code>x.float()</code>, <code>mean(dim=-1, keepdim=True)</code>, <code>torch.rsqrt</code>, <code>.to(x.dtype)</code>; <code>nn.functional.silu</code>. A weight (out, in) is applied to rows as <code>x @ weight.T</code>.</details>
# <details><summary>Hint 3</summary>Norm: wide = x in float32; wide times the reciprocal root of (mean of wide squared, plus eps); back to x.dtype; times weight. Gate: multiply silu of x @ gate.T by x @ up.T, then by down transposed.</details>


# %% exercise="norm-and-gate" difficulty=1 minutes=7
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale vectors to root mean square 1, then by a weight: (..., d), (d,) -> (..., d). Zhang and Sennrich, 2019."""
    ### BEGIN SOLUTION
    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * unit.to(x.dtype)
    ### END SOLUTION


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The gated feed-forward part: (..., d), (f, d), (f, d), (d, f) -> (..., d). Shazeer, 2020."""
    ### BEGIN SOLUTION
    return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    ### END SOLUTION


# %% check="norm-and-gate" points=2
got = rms_norm(torch.tensor([[3.0, 4.0], [30.0, 40.0]]), torch.tensor([1.0, 2.0]), 0.0)
assert got.shape == (2, 2), f"The result has the shape of x, (2, 2); yours is {tuple(got.shape)}"
assert not torch.allclose(got[0], torch.tensor([-1.0, 2.0]), atol=1e-3), (
    "That is LayerNorm: RMSNorm subtracts no mean, it divides by the root mean square only"
)
assert not torch.allclose(got[0], torch.tensor([0.6, 1.6]), atol=1e-3), (
    "You divide by the length of the vector: take the mean of the squares, not their sum"
)
assert torch.allclose(got[0], got[1], atol=1e-5), (
    "Ten times a vector must give the same result: each vector has its own mean, over the last axis"
)
assert torch.allclose(got[0], torch.tensor([0.8485, 2.2627]), atol=1e-4), (
    f"[3, 4] with weight [1, 2] gives [0.8485, 2.2627]; yours is {got[0].tolist()}"
)
small = rms_norm(torch.tensor([0.01, 0.01]), torch.ones(2), 0.0003)
assert torch.allclose(small, torch.tensor([0.5, 0.5]), atol=1e-5), (
    f"eps belongs under the root: 0.01 / sqrt(0.0001 + 0.0003) is 0.5; yours is {small[0].item():.4f}"
)
half = rms_norm(torch.full((4,), 300.0, dtype=torch.float16), torch.ones(4, dtype=torch.float16), 1e-5)
assert half.dtype == torch.float16, f"Return the dtype of x, float16; yours is {half.dtype}"
assert torch.allclose(half.float(), torch.ones(4), atol=2e-3), (
    f"Square in float32: 300 squared overflows float16, and your result is {half[0].item():g} in place of 1"
)
torch.manual_seed(0)
theirs = LlamaRMSNorm(256, eps=1e-5).bfloat16()
theirs.weight.data.normal_()
x = torch.randn(4, 256).bfloat16()
other_values = (rms_norm(x, theirs.weight.data, 1e-5) != theirs(x).detach()).float().mean().item()
# Sums in another order move a value to its neighbour now and then; another order of rounding does so in a third of all.
assert other_values < 0.05, (
    f"{other_values:.0%} of the values are not LlamaRMSNorm's in bfloat16: round to the dtype of x first, then multiply by "
    "the weight"
)
given = torch.tensor([3.0, 4.0])
rms_norm(given, torch.ones(2), 0.0)
assert given.tolist() == [3.0, 4.0], (
    "Your function changes its input: x.float() of a float32 tensor is x itself, so do not work in place on it"
)
### BEGIN HIDDEN TESTS
for _shape, _eps, _dtype in [
    ((5,), 1e-6, torch.float32),
    ((2, 3, 7), 1e-5, torch.float32),
    ((4, 1), 0.1, torch.float32),
    ((3, 64), 1e-5, torch.bfloat16),
]:
    torch.manual_seed(len(_shape))
    _reference = LlamaRMSNorm(_shape[-1], eps=_eps).to(_dtype)
    _reference.weight.data.normal_()
    _x = torch.randn(_shape).to(_dtype)
    _got, _want = rms_norm(_x, _reference.weight.data, _eps), _reference(_x).detach()
    assert _got.dtype == _dtype, f"x in {_dtype} must give {_dtype}, not {_got.dtype}"
    # A few roundings of the dtype: sums may be taken in another order.
    _allowed = 1e-6 if _dtype == torch.float32 else 2**-7
    assert ((_got - _want).abs() <= _allowed * _want.abs().clamp_min(1)).all(), (
        f"x of shape {_shape} in {_dtype}, eps {_eps}: differs from LlamaRMSNorm"
    )
### END HIDDEN TESTS

# %% check="norm-and-gate" points=1
x, gate = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 1.0]])
up, down = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0], [-1.0]])
got = swiglu(x, gate, up, down)
assert got.shape == (2,), f"The result has the shape of x, (2,); yours is {tuple(got.shape)}"
assert not torch.allclose(got, torch.tensor([5.2848, -5.2848]), atol=1e-3), (
    "The silu is on the wrong branch: it goes around the gate, and up stays linear"
)
assert not torch.allclose(got, torch.tensor([1.9051, -1.9051]), atol=1e-3), (
    "You gate with the sigmoid (that is GLU): silu(z) is z times sigmoid(z)"
)
assert torch.allclose(got, torch.tensor([5.7155, -5.7155]), atol=1e-3), (
    f"The example gives [5.7155, -5.7155]; yours is {got.tolist()}"
)
square = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
rows = swiglu(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), square, square, square)
assert torch.allclose(rows, torch.tensor([[9.3044, 8.5733], [0.0, 0.0]]), atol=1e-3), (
    "Each row of x is one vector, and x may have any number of axes: multiply from the right, x @ weight.T"
)
### BEGIN HIDDEN TESTS
for _d, _f, _shape in [(3, 5, (2, 4)), (8, 1, ()), (1, 6, (3,)), (16, 40, (1, 1, 2))]:
    torch.manual_seed(_d)
    _mlp = LlamaMLP(LlamaConfig(hidden_size=_d, intermediate_size=_f, num_attention_heads=1))
    _x = torch.randn(*_shape, _d)
    _want = _mlp(_x).detach()
    _got = swiglu(_x, _mlp.gate_proj.weight.data, _mlp.up_proj.weight.data, _mlp.down_proj.weight.data)
    assert _got.shape == _want.shape, f"x {tuple(_x.shape)} must give the same shape, not {tuple(_got.shape)}"
    assert torch.allclose(_got, _want, atol=1e-6, rtol=1e-5), f"d {_d}, f {_f}: differs from LlamaMLP"
### END HIDDEN TESTS


# %% mistake="LayerNorm" of="norm-and-gate" says="RMSNorm subtracts no mean"
def rms_norm(x, weight, eps):
    wide = x.float() - x.float().mean(-1, keepdim=True)
    return weight * (wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)


def swiglu(x, gate, up, down):
    return nn.functional.linear(nn.functional.silu(x @ gate.T) * (x @ up.T), down)


# %% mistake="divides by the length" of="norm-and-gate" says="the mean of the squares, not their sum"
def rms_norm(x, weight, eps):
    wide = x.float()
    return weight * (wide / (wide.pow(2).sum(-1, keepdim=True) + eps).sqrt()).to(x.dtype)


def swiglu(x, gate, up, down):
    return nn.functional.linear(nn.functional.silu(x @ gate.T) * (x @ up.T), down)


# %% mistake="one mean for the whole batch" of="norm-and-gate" says="each vector has its own mean"
def rms_norm(x, weight, eps):
    wide = x.float()
    return weight * (wide / (wide.pow(2).mean() + eps).sqrt()).to(x.dtype)


def swiglu(x, gate, up, down):
    return nn.functional.linear(nn.functional.silu(x @ gate.T) * (x @ up.T), down)


# %% mistake="eps outside the root" of="norm-and-gate" says="eps belongs under the root"
def rms_norm(x, weight, eps):
    wide = x.float()
    return weight * (wide / (wide.pow(2).mean(-1, keepdim=True).sqrt() + eps)).to(x.dtype)


def swiglu(x, gate, up, down):
    return nn.functional.linear(nn.functional.silu(x @ gate.T) * (x @ up.T), down)


# %% mistake="squares in half precision" of="norm-and-gate" says="Square in float32"
def rms_norm(x, weight, eps):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def swiglu(x, gate, up, down):
    return nn.functional.linear(nn.functional.silu(x @ gate.T) * (x @ up.T), down)


# %% mistake="multiplies before it rounds" of="norm-and-gate" says="round to the dtype of x first"
def rms_norm(x, weight, eps):
    wide = x.float()
    return (weight.float() * wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)


def swiglu(x, gate, up, down):
    return nn.functional.linear(nn.functional.silu(x @ gate.T) * (x @ up.T), down)


# %% mistake="works in place" of="norm-and-gate" says="Your function changes its input"
def rms_norm(x, weight, eps):
    dtype, x = x.dtype, x.float()
    x *= torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return weight * x.to(dtype)


def swiglu(x, gate, up, down):
    return nn.functional.linear(nn.functional.silu(x @ gate.T) * (x @ up.T), down)


# %% mistake="multiplies from the left" of="norm-and-gate" says="multiply from the right"
def rms_norm(x, weight, eps):
    wide = x.float()
    return weight * (wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)


def swiglu(x, gate, up, down):
    return down @ (nn.functional.silu(gate @ x) * (up @ x))


# %% mistake="the silu on the wrong branch" of="norm-and-gate" says="The silu is on the wrong branch"
def rms_norm(x, weight, eps):
    wide = x.float()
    return weight * (wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)


def swiglu(x, gate, up, down):
    return nn.functional.linear((x @ gate.T) * nn.functional.silu(x @ up.T), down)


# %% mistake="gates with the sigmoid" of="norm-and-gate" says="You gate with the sigmoid"
def rms_norm(x, weight, eps):
    wide = x.float()
    return weight * (wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)


def swiglu(x, gate, up, down):
    return nn.functional.linear(torch.sigmoid(x @ gate.T) * (x @ up.T), down)


# %% alternative="norms and sums of outer products" of="norm-and-gate"
def rms_norm(x, weight, eps):
    length = torch.linalg.vector_norm(x.to(torch.float64), dim=-1, keepdim=True)
    root = torch.hypot(length / x.shape[-1] ** 0.5, torch.tensor(eps, dtype=torch.float64).sqrt())
    return (x.to(torch.float64) / root).to(x.dtype) * weight


def swiglu(x, gate, up, down):
    opened, value = torch.einsum("...d,fd->...f", x, gate), torch.einsum("...d,fd->...f", x, up)
    return torch.einsum("...f,df->...d", opened / (1 + torch.exp(-opened)) * value, down)


# %% [markdown]
# ## Positions: one rotation, two conventions
#
# A score $q \cdot k$ alone does not say where the two tokens stand. Rotary embeddings (Su et al., 2021) turn pairs of coordinates of each query and key by an angle that is proportional to the position $m$: with the base $\theta$, pair $i$ of $d_h / 2$ turns by $m\,\omega_i$, where $\omega_i = \theta^{-2i/d_h}$ for $i = 0, \dots, d_h/2 - 1$. Turning both vectors by the same angle changes no scalar product, so for given $q$ and $k$ the score depends on the *difference* of the two positions alone.
#
# The paper pairs neighbours, $(x_0, x_1), (x_2, x_3), \dots$: the **interleaved** convention. Meta's release of Llama has it too (`apply_rotary_emb` in `llama/model.py`). Here it is, with pairs as complex numbers:


# %%
def rope_interleaved(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """Turn the pairs (x0, x1), (x2, x3), … by position: (…, t, d_h), (t,) -> (…, t, d_h). Su et al., 2021, section 3.2."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    speeds = torch.logspace(0, -1, pairs.shape[-1] + 1, base=theta, device=x.device)[:-1]
    turns = torch.polar(torch.ones_like(speeds), positions[:, None] * speeds)
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


one = torch.tensor([1.0, 0.0, 0.0, 0.0])
print(rope_interleaved(one.expand(3, 4), torch.arange(3), theta=100.0))

# %% [markdown]
# `transformers` pairs each coordinate of the first half of a head with one of the second half, $(x_i, x_{i + d_h/2})$: the **half-split** convention, as in GPT-NeoX. Pair $i$ becomes
#
# $$x_i \leftarrow x_i \cos m\omega_i - x_{i+d_h/2} \sin m\omega_i, \qquad x_{i+d_h/2} \leftarrow x_{i+d_h/2} \cos m\omega_i + x_i \sin m\omega_i .$$
#
# Neither is better: they differ by an order of the coordinates of a head. But weights are trained for one of them, so a checkpoint that moves from one code to the other must have the *rows* of its q and k matrices reordered.
#
# **Exercise.** Two things.
#
# 1. `rope(x, positions, theta)` rotates in the half-split convention: `x` is `(b, h, t, d_h)` with $d_h$ even, `positions` `(t,)` holds whole numbers (any, not always 0, 1, 2, …), the result has the shape and dtype of `x`, which itself stays as it is. Compute the angles in float32 also when `x` is bfloat16, which cannot tell position 1001 from 1000. With `theta = 100` and position 1, `[1, 0, 0, 0]` becomes `[cos 1, 0, sin 1, 0]` and `[0, 1, 0, 0]` becomes `[0, cos 0.1, 0, sin 0.1]`. *About 6 lines.*
# 2. `to_half_split(weight, heads)` converts a q or k matrix `(heads * d_h, d_in)` that was trained with interleaved pairs, so that with half-split rotation all scores stay what they were. It reorders rows and returns a new tensor of the same shape. For `heads = 1` and $d_h = 4$, the rows 0, 1, 2, 3 come in the order 0, 2, 1, 3. *About 2 lines.*
#
# <details><summary>Hint 1</summary>A head falls into two halves; each is multiplied by the cosines and gets the other one, with a sign, times the sines. For the conversion: where does the first number of each pair have to go?</details>
# <details><summary>Hint 2</summary>Angles are the outer product of positions and ω, (t, d_h / 2); <code>x.chunk(2, dim=-1)</code> halves x, <code>torch.cat</code> puts halves together. For the conversion, look at the rows of a matrix as (heads, pairs, 2).</details>
# <details><summary>Hint 3</summary>With first and second half, cos and sin (t, d_h / 2): concatenate first·cos − second·sin and second·cos + first·sin. Conversion: view the rows as (heads, d_h / 2, 2, d_in), swap axes 1 and 2, reshape back.</details>


# %% exercise="rope" difficulty=3 minutes=12
def rope(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """Turn the pairs (x_i, x_(i + d_h/2)) by position, as transformers does: (b, h, t, d_h), (t,) -> (b, h, t, d_h)."""
    ### BEGIN SOLUTION
    d_h = x.shape[-1]
    speeds = 1.0 / theta ** (torch.arange(0, d_h, 2, device=x.device) / d_h)
    angles = positions[:, None].to(x.device) * speeds
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    ### END SOLUTION


def to_half_split(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a q or k matrix (heads * d_h, d_in) from interleaved to half-split pairs."""
    ### BEGIN SOLUTION
    d_out, d_in = weight.shape
    return weight.reshape(heads, d_out // heads // 2, 2, d_in).transpose(1, 2).reshape(d_out, d_in)
    ### END SOLUTION


# %% check="rope" points=2
at_one = rope(torch.eye(4)[None, :, None, :], torch.tensor([1]), theta=100.0)[0, :, 0]  # a unit vector a head
assert at_one.shape == (4, 4), "The result must have the shape of x, (b, h, t, d_h)"
assert not torch.allclose(at_one, torch.eye(4), atol=1e-3), (
    "The token stands at position 1 and nothing turned: use the positions you are given, not 0, 1, 2, …"
)
assert not torch.allclose(at_one[0, :2], torch.tensor([0.5403, 0.8415]), atol=1e-3), (
    "You turn neighbours, (x0, x1): that is the interleaved convention; half-split pairs x_i with x_(i + d_h/2)"
)
assert not torch.allclose(at_one[0, 2], torch.tensor(-0.8415), atol=1e-3), (
    "You turn the other way round: the first half gets minus the second times sin, the second plus the first times sin"
)
assert torch.allclose(at_one[0], torch.tensor([0.5403, 0.0, 0.8415, 0.0]), atol=1e-3), (
    f"[1, 0, 0, 0] at position 1 becomes [cos 1, 0, sin 1, 0]; yours is {at_one[0].tolist()}"
)
assert not torch.allclose(at_one[1, 3], torch.tensor(0.0100), atol=1e-3), (
    "Pair 1 turns by 0.01 a position, as with theta = 10,000: use the theta you are given, here 100"
)
assert torch.allclose(at_one[1], torch.tensor([0.0, 0.9950, 0.0, 0.0998]), atol=1e-3), (
    f"Pair 1 of 2 turns by theta ** (-2 / 4) = 0.1 a position (the exponent is -2i / d_h): [0, 1, 0, 0] becomes "
    f"[0, cos 0.1, 0, sin 0.1]; yours is {[round(value, 4) for value in at_one[1].tolist()]}"
)
moved = rope(torch.ones(1, 1, 2, 4), torch.tensor([7, 3]), theta=100.0)[0, 0]
assert torch.allclose(moved[1], rope(torch.ones(1, 1, 1, 4), torch.tensor([3]), theta=100.0)[0, 0, 0], atol=1e-5), (
    "Use the positions you are given: a token at position 3 is turned by 3, wherever it stands in the tensor"
)
far = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
coarse = rope(far.bfloat16(), torch.tensor([1001]))
assert coarse.dtype == torch.bfloat16, f"The result has the dtype of x, bfloat16; yours is {coarse.dtype}"
# bfloat16 rounds by up to 2 ** -9 of a number: cosines, products and the sum, of numbers below 4, give less than 0.05.
assert torch.allclose(coarse.float(), rope(far, torch.tensor([1001])), atol=0.05), (
    "In bfloat16 position 1001 is 1000, a whole radian off: compute the angles in float32, whatever the dtype of x"
)
given = torch.ones(1, 1, 2, 4)
rope(given, torch.tensor([1, 2]))
assert torch.equal(given, torch.ones(1, 1, 2, 4)), "Your function changes its input: return a new tensor"
### BEGIN HIDDEN TESTS
for _b, _h, _t, _d_h, _theta in [(2, 3, 5, 8, 10_000.0), (1, 1, 1, 2, 500.0), (1, 4, 9, 6, 1e6)]:
    torch.manual_seed(_d_h)
    _config = LlamaConfig(
        hidden_size=_h * _d_h,
        num_attention_heads=_h,
        head_dim=_d_h,
        rope_parameters={"rope_type": "default", "rope_theta": _theta},
    )
    _q, _k = torch.randn(2, _b, _h, _t, _d_h)
    _positions = torch.randint(0, 30, (_t,))
    _want, _ = apply_rotary_pos_emb(_q, _k, *LlamaRotaryEmbedding(_config)(_q, _positions[None]))
    # Angles up to 30 in float32 carry an error of up to 2e-6 when the speeds are rounded in another way.
    assert torch.allclose(rope(_q, _positions, _theta), _want, atol=2e-5), (
        f"d_h {_d_h}, theta {_theta:g}: differs from apply_rotary_pos_emb"
    )
for _dtype in (torch.float16, torch.float64):
    assert rope(torch.ones(1, 1, 2, 4, dtype=_dtype), torch.arange(2)).dtype == _dtype, f"x in {_dtype}: another dtype"
### END HIDDEN TESTS


# %% check="rope" points=2
def half_split_scores(q: Tensor, k: Tensor) -> Tensor:
    """Scores with transformers' own rotation: (1, h, t, d_h) twice -> (1, h, t, t)."""
    heads, tokens, width = q.shape[1:]
    llama_config = LlamaConfig(hidden_size=heads * width, num_attention_heads=heads, head_dim=width)
    tables = LlamaRotaryEmbedding(llama_config)(q, torch.arange(tokens)[None])
    turned_q, turned_k = apply_rotary_pos_emb(q, k, *tables)
    return turned_q @ turned_k.mT


def score_errors(heads: int, width: int, d_in: int, tokens: int = 6) -> tuple[float, float]:
    """How far the scores move when q and k are converted, and when they are not, for random weights."""
    generator = torch.Generator().manual_seed(heads + width)
    x = torch.randn(tokens, d_in, generator=generator)
    weights = torch.randn(2, heads * width, d_in, generator=generator) / d_in**0.5
    split = lambda weight: (x @ weight.T).reshape(1, tokens, heads, width).transpose(1, 2)
    q, k = (rope_interleaved(split(weight), torch.arange(tokens)) for weight in weights)
    want = q @ k.mT
    converted = half_split_scores(*(split(to_half_split(weight, heads)) for weight in weights))
    as_it_was = half_split_scores(*(split(weight) for weight in weights))
    return (converted - want).abs().max().item(), (as_it_was - want).abs().max().item()


four_rows = to_half_split(torch.arange(4.0)[:, None], heads=1)
assert four_rows.shape == (4, 1), f"The shape stays (4, 1); yours is {tuple(four_rows.shape)}"
assert four_rows[:, 0].tolist() == [0, 2, 1, 3], (
    f"With one head of width 4 the rows come in the order 0, 2, 1, 3; yours is {four_rows[:, 0].int().tolist()}"
)
eight_rows = to_half_split(torch.arange(8.0)[:, None], heads=2)[:, 0].int().tolist()
assert set(eight_rows[:4]) == {0, 1, 2, 3}, (
    f"Rows must stay in their head: head 0 of 2 has the rows 0 to 3, yours gets {eight_rows[:4]}"
)
six_rows = to_half_split(torch.arange(6.0)[:, None], heads=1)[:, 0].int().tolist()
assert six_rows != [0, 3, 1, 4, 2, 5], (
    "That is the way back, from half-split to interleaved: first the first number of each pair, then the second ones"
)
error, _ = score_errors(heads=2, width=8, d_in=5)
assert error < 1e-3, f"After the conversion the scores must stay what they were; yours move by {error:.2g}"
### BEGIN HIDDEN TESTS
for _heads, _width, _d_in in [(1, 2, 3), (3, 4, 2), (2, 16, 7), (5, 6, 1)]:
    _error, _ = score_errors(_heads, _width, _d_in)
    assert _error < 1e-3, f"{_heads} heads of width {_width}: the scores move by {_error:.2g}"
_kept = torch.arange(12.0).reshape(6, 2)
_copy = _kept.clone()
to_half_split(_kept, 1).add_(1)
assert torch.equal(_kept, _copy), "Return a new tensor: the weight you are given must not change"
### END HIDDEN TESTS


# %% mistake="turns neighbours" of="rope" says="that is the interleaved convention"
def rope(x, positions, theta=10_000.0):
    return rope_interleaved(x, positions, theta)


def to_half_split(weight, heads):
    order = torch.arange(weight.shape[0] // heads).reshape(-1, 2).T.flatten()
    return torch.cat([head[order] for head in weight.chunk(heads)])


# %% mistake="turns the other way round" of="rope" says="You turn the other way round"
def rope(x, positions, theta=10_000.0):
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], -1).to(x.dtype)


def to_half_split(weight, heads):
    order = torch.arange(weight.shape[0] // heads).reshape(-1, 2).T.flatten()
    return torch.cat([head[order] for head in weight.chunk(heads)])


# %% mistake="halves the exponent" of="rope" says="the exponent is -2i / d_h"
def rope(x, positions, theta=10_000.0):
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-torch.arange(half) / (2 * half))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).to(x.dtype)


def to_half_split(weight, heads):
    order = torch.arange(weight.shape[0] // heads).reshape(-1, 2).T.flatten()
    return torch.cat([head[order] for head in weight.chunk(heads)])


# %% mistake="counts positions from zero" of="rope" says="Use the positions you are given"
def rope(x, positions, theta=10_000.0):
    half = x.shape[-1] // 2
    start = positions[0] if len(positions) else 0
    angle = (start + torch.arange(x.shape[2]))[:, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).to(x.dtype)


def to_half_split(weight, heads):
    order = torch.arange(weight.shape[0] // heads).reshape(-1, 2).T.flatten()
    return torch.cat([head[order] for head in weight.chunk(heads)])


# %% mistake="numbers the tokens" of="rope" says="nothing turned: use the positions you are given"
def rope(x, positions, theta=10_000.0):
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).to(x.dtype)


def to_half_split(weight, heads):
    order = torch.arange(weight.shape[0] // heads).reshape(-1, 2).T.flatten()
    return torch.cat([head[order] for head in weight.chunk(heads)])


# %% mistake="a fixed theta" of="rope" says="use the theta you are given"
def rope(x, positions, theta=10_000.0):
    half = x.shape[-1] // 2
    angle = positions[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).to(x.dtype)


def to_half_split(weight, heads):
    order = torch.arange(weight.shape[0] // heads).reshape(-1, 2).T.flatten()
    return torch.cat([head[order] for head in weight.chunk(heads)])


# %% mistake="angles in the dtype of x" of="rope" says="compute the angles in float32"
def rope(x, positions, theta=10_000.0):
    half = x.shape[-1] // 2
    angle = positions.to(x.dtype)[:, None] * (theta ** (-torch.arange(half) / half)).to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def to_half_split(weight, heads):
    order = torch.arange(weight.shape[0] // heads).reshape(-1, 2).T.flatten()
    return torch.cat([head[order] for head in weight.chunk(heads)])


# %% mistake="writes into x" of="rope" says="Your function changes its input"
def rope(x, positions, theta=10_000.0):
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half].clone(), x[..., half:].clone()
    x[..., :half] = a * angle.cos() - b * angle.sin()
    x[..., half:] = b * angle.cos() + a * angle.sin()
    return x


def to_half_split(weight, heads):
    order = torch.arange(weight.shape[0] // heads).reshape(-1, 2).T.flatten()
    return torch.cat([head[order] for head in weight.chunk(heads)])


# %% mistake="reorders across heads" of="rope" says="Rows must stay in their head"
def rope(x, positions, theta=10_000.0):
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).to(x.dtype)


def to_half_split(weight, heads):
    return torch.cat([weight[0::2], weight[1::2]])


# %% mistake="converts in the wrong direction" of="rope" says="That is the way back"
def rope(x, positions, theta=10_000.0):
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).to(x.dtype)


def to_half_split(weight, heads):
    order = torch.arange(weight.shape[0] // heads).reshape(2, -1).T.flatten()
    return torch.cat([head[order] for head in weight.chunk(heads)])


# %% alternative="complex numbers and an order of rows" of="rope"
def rope(x, positions, theta=10_000.0):
    half = x.shape[-1] // 2
    turns = torch.exp(1j * torch.outer(positions.double(), theta ** -(torch.arange(half, dtype=torch.float64) / half)))
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turns
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def to_half_split(weight, heads):
    order = torch.arange(weight.shape[0] // heads).reshape(-1, 2).T.flatten()
    return torch.cat([head[order] for head in weight.chunk(heads)])


# %% [markdown]
# Two demonstrations. The same query and key have the same score at the same distance, wherever they stand. And a checkpoint that is not converted gives other scores, one that is converted the same. (Your conversion is what `permute` does in `convert_llama_weights_to_hf.py`, the script in the repository of `transformers` that reads Meta's checkpoints.)

# %%
generator = torch.Generator().manual_seed(seed)
query, key = torch.randn(2, 1, 1, 1, config.head_dim, generator=generator)
rows = []
for m, n in ((5, 2), (105, 102), (5, 4), (105, 104)):
    score = rope(query, torch.tensor([m])) @ rope(key, torch.tensor([n])).mT
    rows.append((m, n, m - n, score.item()))
table = pd.DataFrame(rows, columns=["position of the query", "of the key", "distance", "score"])
display(table.style.format({"score": "{:.4f}"}).hide(axis="index"))
converted_error, unconverted_error = score_errors(config.num_attention_heads, config.head_dim, config.hidden_size)
print(
    f"scores move by at most {converted_error:.0e} with converted rows, by {unconverted_error:.1f} with rows as they were"
)

# %% [markdown]
# ## Attention with grouped heads
#
# Each of the $h$ query heads compares its query with the keys of one key-value head, and mixes that head's values:
#
# $$\mathrm{out}_i = \sum_{j \le i} p_{ij}\, v_j, \qquad p_{i\cdot} = \mathrm{softmax}_j\!\left(\frac{q_i \cdot k_j}{\sqrt{d_h}}\right) \text{ over } j \le i .$$
#
# With **grouped-query attention** (Ainslie et al., 2023) there are fewer key-value heads than query heads: $h / h_{kv}$ *neighbouring* query heads share one. Query head $a$ reads key-value head $\lfloor a\, h_{kv} / h \rfloor$. The weights shrink a little, the cache by the factor $h / h_{kv}$.
#
# A model that writes token by token has *one* new query and many keys from before. So the queries are in general the **last** $t$ of $s \ge t$ positions, and the mask must be aligned to the end: query $i$ of $0, \dots, t-1$ stands at position $s - t + i$ and sees the keys $0, \dots, s - t + i$.
#
# **Exercise.** Two things.
#
# 1. `attend(q, k, v)` with `q` `(b, h, t, d_h)` and `k`, `v` `(b, h_kv, s, d_h)` returns `(b, h, t, d_h)`; q and k are rotated already, and none of the three is changed. With one head, $d_h = 1$, `q = [0, 0]`, `k = [0, 0]`, `v = [1, 3]` (one number a position) the result is `[1, 2]`. *About 6 lines.*
# 2. *Write the test that catches the bug.* `looks_ahead(attend)` takes such a function and returns `True` when an output depends on a token after it, `False` when none does. You choose the inputs (one text, one head and equally many queries and keys will do; make them random). It must catch an attention that looks one token ahead, one that leaks at a single place (the second token sees the third, and nothing else is wrong), and one that masks *after* the softmax, so that later keys leak through the sum it divides by. It must not accuse an attention that sees less than it may, such as a window over the last two tokens. *About 5 lines.*
#
# <details><summary>Hint 1</summary>Repeat the key-value heads first; everything after that is attention as you know it. For the test: what must not happen to the first outputs when the text is cut off after them?</details>
# <details><summary>Hint 2</summary><code>repeat_interleave</code> repeats neighbours (0, 0, 1, 1); <code>repeat</code> gives 0, 1, 0, 1. Compare key positions 0 … s−1, as a row, with query positions s−t … s−1, as a column; <code>masked_fill</code> with minus infinity, then softmax over the last axis.</details>
# <details><summary>Hint 3</summary>Test: attend once to 6 random tokens; then, for each n from 1 to 5, attend to the first n alone and compare with the first n outputs of the whole (<code>torch.allclose</code>, to 1e-5). Any difference means that something came from later.</details>


# %% exercise="attention" difficulty=3 minutes=13
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal grouped-query attention of the last t of s positions: (b, h, t, d_h), (b, h_kv, s, d_h) twice."""
    ### BEGIN SOLUTION
    h, t, d_h = q.shape[1:]
    h_kv, s = k.shape[1:3]
    k, v = (x.repeat_interleave(h // h_kv, dim=1) for x in (k, v))
    scores = q @ k.mT / d_h**0.5
    places = torch.arange(s, device=q.device)
    later = places > places[s - t :, None]
    return scores.masked_fill(later, float("-inf")).softmax(dim=-1) @ v
    ### END SOLUTION


def looks_ahead(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> bool:
    """Return whether an output of this attention depends on a later token."""
    ### BEGIN SOLUTION
    q, k, v = torch.randn(3, 1, 1, 6, 4, generator=torch.Generator().manual_seed(0))
    whole = attend(q, k, v)
    alone = [attend(q[:, :, :n], k[:, :, :n], v[:, :, :n]) for n in range(1, 6)]
    return not all(torch.allclose(part, whole[:, :, : part.shape[2]], atol=1e-5) for part in alone)
    ### END SOLUTION


# %% check="attention" points=2
torch.manual_seed(0)
got = attend(torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8))
assert got.shape == (2, 4, 3, 8), f"The result has the shape of q, (2, 4, 3, 8); yours is {tuple(got.shape)}"
got = attend(torch.randn(1, 2, 3, 4), torch.randn(1, 1, 3, 4), torch.ones(1, 1, 3, 4))
assert not got[0, 0, 0].isnan().any(), "The first token sees no key at all: a token sees itself, so j = i is allowed"
assert torch.allclose(got, torch.ones(1, 2, 3, 4), atol=1e-5), (
    "A query's weights over its keys must sum to 1: mask the scores with -inf, then softmax over the last axis (the keys)"
)
order = torch.tensor([1.0, 3.0, 8.0]).reshape(1, 1, 3, 1)
got = attend(torch.zeros(1, 1, 3, 1), torch.zeros(1, 1, 3, 1), order)[0, 0, :, 0]
assert not torch.allclose(got, torch.full((3,), 4.0), atol=1e-4), (
    "Every position sees the whole text: query i may see the keys 0 to i and none after (a score of 0 hides nothing)"
)
assert torch.allclose(got, torch.tensor([1.0, 2.0, 4.0]), atol=1e-4), (
    f"With equal scores position i gets the mean of the values 0 to i: [1, 2, 4] here; yours is {got.tolist()}"
)
of_head = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1).expand(1, 2, 3, 1)
got = attend(torch.randn(1, 4, 3, 1), torch.randn(1, 2, 3, 1), of_head)[0, :, 0, 0].round(decimals=3).tolist()
assert got != [0, 1, 0, 1], (
    "Neighbouring query heads share a key-value head: 0, 0, 1, 1 and not 0, 1, 0, 1 (repeat_interleave, not repeat)"
)
assert got == [0, 0, 1, 1], f"Query heads 0 to 3 read the key-value heads 0, 0, 1, 1; yours read {got}"
keys = torch.tensor([[0.0, 0, 0, 0], [1.0, 1, 1, 1]]).reshape(1, 1, 2, 4)
got = attend(torch.ones(1, 4, 2, 4), keys, keys)[0, 0, 1, 0].item()
assert abs(got - 0.9820) > 1e-3, "Divide the scores by sqrt(d_h): with d_h = 4 a product of 4 becomes a score of 2"
assert abs(got - 0.7311) > 1e-3, (
    "You divide a product of 4 by 4: the divisor is sqrt(d_h), here 2, the root of the width of one head, not of the model"
)
assert abs(got - 0.8808) < 1e-3, f"Scores 0 and 2 give the second key the weight 0.8808; yours is {got:.4f}"
given = torch.ones(1, 1, 2, 4), keys.clone(), keys.clone()
attend(*given)
assert all(
    torch.equal(after, before) for after, before in zip(given, (torch.ones(1, 1, 2, 4), keys, keys), strict=True)
), "Your function changes its input: q is divided in place, say; return a new tensor"
### BEGIN HIDDEN TESTS
for _b, _h, _h_kv, _t, _d_h in [(2, 6, 2, 5, 4), (1, 3, 3, 1, 2), (1, 4, 1, 7, 16), (3, 2, 1, 2, 1)]:
    torch.manual_seed(_t)
    _q, _k, _v = torch.randn(_b, _h, _t, _d_h), *torch.randn(2, _b, _h_kv, _t, _d_h)
    _want = nn.functional.scaled_dot_product_attention(_q, _k, _v, is_causal=True, enable_gqa=True)
    assert torch.allclose(attend(_q, _k, _v), _want, atol=1e-6, rtol=1e-5), (
        f"{_h} heads over {_h_kv}, {_t} tokens, d_h {_d_h}: differs from PyTorch's own attention"
    )
### END HIDDEN TESTS

# %% check="attention" points=1
values = torch.tensor([1.0, 3.0, 8.0]).reshape(1, 1, 3, 1)
got = attend(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 3, 1), values)[0, 0, 0, 0].item()
assert abs(got - 1.0) > 1e-4, (
    "One query beside three keys is the newest token and sees all three: align the mask to the end, at s - t + i"
)
assert abs(got - 4.0) < 1e-4, f"One query, three equal keys, values 1, 3, 8: the mean is 4; yours is {got:.4f}"
### BEGIN HIDDEN TESTS
for _h, _h_kv, _t, _s in [(2, 2, 1, 6), (4, 2, 3, 5), (2, 1, 4, 4), (6, 3, 2, 9)]:
    torch.manual_seed(_s)
    _q, _k, _v = torch.randn(1, _h, _s, 4), *torch.randn(2, 1, _h_kv, _s, 4)
    _want = nn.functional.scaled_dot_product_attention(_q, _k, _v, is_causal=True, enable_gqa=True)[:, :, -_t:]
    assert torch.allclose(attend(_q[:, :, -_t:], _k, _v), _want, atol=1e-6, rtol=1e-5), (
        f"The last {_t} of {_s} positions must give what they give in the whole text"
    )
### END HIDDEN TESTS


# %% check="attention" points=2
def suspect(seen: Callable[[int], Tensor], after_softmax: bool = False, extra: float = 0.0) -> Callable:
    """An attention for one head, honest or not: the query at i sees the keys j where `seen(s)[i, j]` is true."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        allowed = seen(k.shape[2])[-q.shape[2] :]
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / 2
        total = torch.where(allowed | after_softmax, scores, -torch.inf).logsumexp(dim=-1, keepdim=True)
        weights = torch.where(allowed, (scores - total).exp(), 0.0)
        return torch.einsum("bhij,bhjd->bhid", weights, v) + extra * v.mean(2, keepdim=True)

    return attention


def up_to(ahead: int) -> Callable[[int], Tensor]:
    return lambda s: torch.ones(s, s).tril(ahead).bool()


def second_sees_third(s: int) -> Tensor:
    return up_to(0)(s) | (torch.arange(s) == 2) & (torch.arange(s) == 1)[:, None]


assert not looks_ahead(suspect(up_to(0))), (
    "Your test accuses an honest attention: the output at i may depend on the tokens 0 to i, its own included"
)
assert not looks_ahead(suspect(lambda s: up_to(0)(s) & ~up_to(-2)(s))), (
    "Your test accuses an attention over the last two tokens: seeing less is not looking ahead; compare it with itself"
)
assert looks_ahead(suspect(up_to(10))), "Your test misses an attention that sees the whole text"
assert looks_ahead(suspect(up_to(1))), (
    "Your test misses an attention that looks one token ahead: look at every output, not at the first or last alone"
)
assert looks_ahead(suspect(up_to(0), after_softmax=True)), (
    "Your test misses a mask after the softmax: later keys leak through the sum, so later keys must change too"
)
assert looks_ahead(suspect(second_sees_third)), (
    "Your test misses a leak at one place, from the third token to the second: cut the text off after every token in turn"
)
### BEGIN HIDDEN TESTS
assert looks_ahead(suspect(up_to(0), extra=0.01)), "Your test misses a leak of one percent through the values"
assert looks_ahead(suspect(up_to(2))), "Your test misses an attention that looks two tokens ahead"
assert not looks_ahead(suspect(lambda s: torch.eye(s).bool())), "Seeing only oneself is not looking ahead"
### END HIDDEN TESTS


# %% mistake="no mask" of="attention" says="Every position sees the whole text"
def attend(q, k, v):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def looks_ahead(attend):
    q, k, v = torch.randn(3, 1, 1, 5, 4)
    return any(
        not torch.allclose(attend(q, k, v)[:, :, :n], attend(q[:, :, :n], k[:, :, :n], v[:, :, :n]), atol=1e-5)
        for n in range(1, 5)
    )


# %% mistake="aligns the mask to the start" of="attention" says="align the mask to the end"
def attend(q, k, v):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def looks_ahead(attend):
    q, k, v = torch.randn(3, 1, 1, 5, 4)
    return any(
        not torch.allclose(attend(q, k, v)[:, :, :n], attend(q[:, :, :n], k[:, :, :n], v[:, :, :n]), atol=1e-5)
        for n in range(1, 5)
    )


# %% mistake="tiles the key-value heads" of="attention" says="Neighbouring query heads share a key-value head"
def attend(q, k, v):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def looks_ahead(attend):
    q, k, v = torch.randn(3, 1, 1, 5, 4)
    return any(
        not torch.allclose(attend(q, k, v)[:, :, :n], attend(q[:, :, :n], k[:, :, :n], v[:, :, :n]), atol=1e-5)
        for n in range(1, 5)
    )


# %% mistake="forgets the scale" of="attention" says="Divide the scores by sqrt(d_h)"
def attend(q, k, v):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2)
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def looks_ahead(attend):
    q, k, v = torch.randn(3, 1, 1, 5, 4)
    return any(
        not torch.allclose(attend(q, k, v)[:, :, :n], attend(q[:, :, :n], k[:, :, :n], v[:, :, :n]), atol=1e-5)
        for n in range(1, 5)
    )


# %% mistake="the width of the model" of="attention" says="the root of the width of one head"
def attend(q, k, v):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / (q.shape[1] * q.shape[-1]) ** 0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def looks_ahead(attend):
    q, k, v = torch.randn(3, 1, 1, 5, 4)
    return any(
        not torch.allclose(attend(q, k, v)[:, :, :n], attend(q[:, :, :n], k[:, :, :n], v[:, :, :n]), atol=1e-5)
        for n in range(1, 5)
    )


# %% mistake="hides the token itself" of="attention" says="a token sees itself"
def attend(q, k, v):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2] - 1)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def looks_ahead(attend):
    q, k, v = torch.randn(3, 1, 1, 5, 4)
    return any(
        not torch.allclose(attend(q, k, v)[:, :, :n], attend(q[:, :, :n], k[:, :, :n], v[:, :, :n]), atol=1e-5)
        for n in range(1, 5)
    )


# %% mistake="a score of zero as a mask" of="attention" says="a score of 0 hides nothing"
def attend(q, k, v):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.tril(k.shape[2] - q.shape[2]).softmax(-1) @ v


def looks_ahead(attend):
    q, k, v = torch.randn(3, 1, 1, 5, 4)
    return any(
        not torch.allclose(attend(q, k, v)[:, :, :n], attend(q[:, :, :n], k[:, :, :n], v[:, :, :n]), atol=1e-5)
        for n in range(1, 5)
    )


# %% mistake="scales the queries in place" of="attention" says="Your function changes its input"
def attend(q, k, v):
    q /= q.shape[-1] ** 0.5
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return (q @ k.transpose(-1, -2)).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def looks_ahead(attend):
    q, k, v = torch.randn(3, 1, 1, 5, 4)
    return any(
        not torch.allclose(attend(q, k, v)[:, :, :n], attend(q[:, :, :n], k[:, :, :n], v[:, :, :n]), atol=1e-5)
        for n in range(1, 5)
    )


# %% mistake="masks after the softmax" of="attention" says="weights over its keys must sum to 1"
def attend(q, k, v):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return weights.tril(k.shape[2] - q.shape[2]) @ v


def looks_ahead(attend):
    q, k, v = torch.randn(3, 1, 1, 5, 4)
    return any(
        not torch.allclose(attend(q, k, v)[:, :, :n], attend(q[:, :, :n], k[:, :, :n], v[:, :, :n]), atol=1e-5)
        for n in range(1, 5)
    )


# %% mistake="softmax over the queries" of="attention" says="weights over its keys must sum to 1"
def attend(q, k, v):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return scores.masked_fill(~mask, -torch.inf).softmax(-2) @ v


def looks_ahead(attend):
    q, k, v = torch.randn(3, 1, 1, 5, 4)
    return any(
        not torch.allclose(attend(q, k, v)[:, :, :n], attend(q[:, :, :n], k[:, :, :n], v[:, :, :n]), atol=1e-5)
        for n in range(1, 5)
    )


# %% mistake="changes the last token and looks at every output" of="attention" says="Your test accuses an honest attention"
def attend(q, k, v):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return nn.functional.scaled_dot_product_attention(q, k, v, mask)


def looks_ahead(attend):
    q, k, v = torch.randn(3, 1, 1, 5, 4)
    changed = v.clone()
    changed[:, :, -1] += 1
    return not torch.allclose(attend(q, k, v), attend(q, k, changed))


# %% mistake="changes the last token and looks at the first output" of="attention" says="looks one token ahead"
def attend(q, k, v):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return nn.functional.scaled_dot_product_attention(q, k, v, mask)


def looks_ahead(attend):
    q, k, v = torch.randn(3, 1, 1, 5, 4)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, :, -1] += 1
    changed_v[:, :, -1] += 1
    return not torch.allclose(attend(q, k, v)[:, :, 0], attend(q, changed_k, changed_v)[:, :, 0], atol=1e-5)


# %% mistake="changes values alone" of="attention" says="Your test misses a mask after the softmax"
def attend(q, k, v):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return nn.functional.scaled_dot_product_attention(q, k, v, mask)


def looks_ahead(attend):
    q, k, v = torch.randn(3, 1, 1, 5, 4)
    changed = v.clone()
    changed[:, :, -1] += 1
    return not torch.allclose(attend(q, k, v)[:, :, :-1], attend(q, k, changed)[:, :, :-1], atol=1e-5)


# %% mistake="cuts the text off in the middle only" of="attention" says="Your test misses a leak at one place"
def attend(q, k, v):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return nn.functional.scaled_dot_product_attention(q, k, v, mask)


def looks_ahead(attend):
    q, k, v = torch.randn(3, 1, 1, 6, 4)
    return not torch.allclose(attend(q, k, v)[:, :, :3], attend(q[:, :, :3], k[:, :, :3], v[:, :, :3]), atol=1e-5)


# %% alternative="a loop over heads and queries, and a future that is far away" of="attention"
def attend(q, k, v):
    _, h, t, d = q.shape
    s, out = k.shape[2], torch.empty_like(q)
    for head in range(h):
        shared = head * k.shape[1] // h
        for i in range(t):
            reach = s - t + i + 1
            scores = torch.einsum("bd,bsd->bs", q[:, head, i], k[:, shared, :reach]) / d**0.5
            out[:, head, i] = torch.einsum("bs,bsd->bd", scores.softmax(-1), v[:, shared, :reach])
    return out


def looks_ahead(attend):
    q, k, v = torch.randn(3, 1, 1, 6, 4)
    whole = attend(q, k, v)
    for n in range(1, 6):
        other = [x.clone() for x in (q, k, v)]
        for x in other:
            x[:, :, n:] += 100
        if not torch.allclose(attend(*other)[:, :, :n], whole[:, :, :n], atol=1e-5):
            return True
    return False


# %% alternative="groups as an axis, and a test that changes the future" of="attention"
def attend(q, k, v):
    b, h, t, d = q.shape
    s = k.shape[2]
    grouped = q.reshape(b, k.shape[1], -1, t, d)
    scores = torch.einsum("bgatd,bgsd->bgats", grouped, k) * d**-0.5
    hidden = torch.full((t, s), -torch.inf, device=q.device).triu(s - t + 1)
    return torch.einsum("bgats,bgsd->bgatd", torch.softmax(scores + hidden, -1), v).reshape(b, h, t, d)


def looks_ahead(attend):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 1, 7, 4, requires_grad=True) for _ in range(3))
    for i in range(6):
        out = attend(q, k, v)[:, :, i].sum()
        for gradient in torch.autograd.grad(out, (k, v)):
            if gradient[:, :, i + 1 :].abs().max() > 1e-6:
                return True
    return False


# %% [markdown]
# ### Match: your Llama against the library's
#
# Now the parts go together. `llama` is the model itself where it is a plain Llama, else a Llama of its sizes with random weights. Each of its modules reads what it reads in a real text, and your function gets the same input and weights.


# %%
llama = model
if not is_plain_llama(model.config):
    torch.manual_seed(seed)
    llama = LlamaForCausalLM(config).to(device).eval()
theta = config.rope_parameters["rope_theta"]


def read(text: str) -> Tensor:
    """The ids of a text, (1, t), at most `longest` of them."""
    return tokenizer(text, return_tensors="pt").input_ids[:, :longest].to(device)


def heads_of(x: Tensor, projection: nn.Linear) -> Tensor:
    """Project and split into heads: (b, t, d) -> (b, heads, t, d_h)."""
    return projection(x).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)


def my_attention(x: Tensor, block: nn.Module, rotate: Callable[[Tensor, Tensor, float], Tensor] = rope) -> Tensor:
    """An attention block from your parts and its weights: (b, t, d) -> (b, t, d)."""
    positions = torch.arange(x.shape[1], device=x.device)
    q, k, v = (heads_of(x, projection) for projection in (block.q_proj, block.k_proj, block.v_proj))
    mixed = attend(rotate(q, positions, theta), rotate(k, positions, theta), v)
    return block.o_proj(mixed.transpose(1, 2).flatten(2))


def my_mlp(x: Tensor, block: nn.Module) -> Tensor:
    """A feed-forward block from your parts and its weights: (b, t, d) -> (b, t, d)."""
    return swiglu(x, block.gate_proj.weight, block.up_proj.weight, block.down_proj.weight)


@torch.no_grad()
def my_llama(ids: Tensor, rotate: Callable[[Tensor, Tensor, float], Tensor] = rope) -> Tensor:
    """The whole model from your parts: (b, t) -> (b, t, V)."""
    norm = lambda x, module: rms_norm(x, module.weight, config.rms_norm_eps)
    x = llama.model.embed_tokens(ids)
    for layer in llama.model.layers:
        x = x + my_attention(norm(x, layer.input_layernorm), layer.self_attn, rotate)
        x = x + my_mlp(norm(x, layer.post_attention_layernorm), layer.mlp)
    return llama.lm_head(norm(x, llama.model.norm))


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return ((got - want).abs().max() / want.abs().max()).item()


@torch.no_grad()
def parity(text: str) -> dict[str, float]:
    """The largest relative error over all layers of each of your parts."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        seen[module] = (args or tuple(kwargs.values()))[0], output[0] if isinstance(output, tuple) else output

    watched = [m for layer in llama.model.layers for m in (layer.input_layernorm, layer.self_attn, layer.mlp)]
    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in watched]
    ids = read(text)
    logits = llama(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    errors: dict[str, list[float]] = {"RMSNorm": [], "RoPE": [], "attention": [], "SwiGLU": []}
    positions = torch.arange(ids.shape[1], device=ids.device)
    for layer in llama.model.layers:
        x, want = seen[layer.input_layernorm]
        errors["RMSNorm"].append(relative_error(rms_norm(x, layer.input_layernorm.weight, config.rms_norm_eps), want))
        x, want = seen[layer.self_attn]
        errors["attention"].append(relative_error(my_attention(x, layer.self_attn), want))
        q, k = heads_of(x, layer.self_attn.q_proj), heads_of(x, layer.self_attn.k_proj)
        for mine, theirs in zip(
            (q, k), apply_rotary_pos_emb(q, k, *llama.model.rotary_emb(q, positions[None])), strict=True
        ):
            errors["RoPE"].append(relative_error(rope(mine, positions, theta), theirs))
        x, want = seen[layer.mlp]
        errors["SwiGLU"].append(relative_error(my_mlp(x, layer.mlp), want))
    return {part: max(found) for part, found in errors.items()} | {"logits": relative_error(my_llama(ids), logits)}


def page(world: World, place: int) -> str:
    """Three passages of the world, six questions that they answer, and the answers."""
    passages = world.passages()[3 * place : 3 * place + 3]
    shown = {passage.id for passage in passages}
    asked = [question for question in world.questions("single") if question.gold[0] in shown]
    order = np.random.default_rng([seed, world.seed, place]).permutation(len(asked))[:6]
    answered = [f"{asked[i].text}\n{asked[i].answer}" for i in order]
    return "\n".join([*(passage.text for passage in passages), *answered])


worlds = [World(LESSON_SEEDS[seed + run]) for run in range(runs)]
pages = [[page(world, place) for place in range(0, 20, 4)] for world in worlds]
print(pages[0][0])
matched = parity(pages[0][0])
table = pd.DataFrame(matched.items(), columns=["your part", "largest difference, as a share of the largest value"])
display(table.style.format({table.columns[1]: "{:.0e}"}).hide(axis="index"))
logit_error = matched.pop("logits")
label = "your parts against transformers' modules, largest relative difference"
card.record("parity_error", max(matched.values()), format=".0e", label=label, tolerance=1e-6)
card.record("logit_error", logit_error, format=".0e", label="your whole Llama's logits, the same", tolerance=1e-5)

# %% [markdown]
# The parts agree to {{parity_error}}, the logits of the whole model to {{logit_error}}. That is rounding: float32 keeps 24 bits, an error of up to 6e-8 of a number, and sums are taken in another order. Your RoPE may be a digit worse and still right: a speed that is computed in another way is rounded in another way, and a position of 200 multiplies the difference. From here on the lesson uses the library.

# %% [markdown]
# ## The loss, and its shift
#
# The logits at position $i$ are a guess of the token at $i + 1$. The labels that a training loop passes are the ids themselves, *not* shifted; `transformers` shifts them inside its loss. Positions that do not count (padding, a prompt) carry the label −100. The loss is the mean of $-\log p$ over **all** targets of the batch that count.
#
# The function below has two bugs, both common. Look at what they do to the number:


# %%
def broken_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Do not use: has two bugs."""
    log_p = logits.float().log_softmax(dim=-1)
    counted = labels != -100
    picked = log_p.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    per_text = (picked * counted).sum(dim=1) / counted.sum(dim=1)
    return -per_text.mean()


@torch.no_grad()
def two_texts(first: str, second: str) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of two texts of unequal length in one batch, their labels, and the model's own loss."""
    batch = tokenizer([first, second], return_tensors="pt", padding=True, padding_side="right").to(device)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels)
    return out.logits, labels, out.loss


batch_logits, batch_labels, library_loss = two_texts(pages[0][0], worlds[0].passages()[20].text)
print(f"the model's own loss {library_loss:.4f}, the broken one {broken_loss(batch_logits, batch_labels):.4f} nats")
print(f"an even guess over the {config.vocab_size:,d} tokens costs {np.log(config.vocab_size):.4f} nats")

# %% [markdown]
# A pretrained model whose loss is above $\log V$, the price of an even guess, is rarely facing a hard text: look at the labels first.
#
# **Exercise (find and fix).** Write `next_token_loss(logits, labels)`: `logits` `(b, t, V)`, `labels` `(b, t)`, unshifted, −100 where a target does not count. It returns a tensor of shape `()` in float32, in nats, equal to the loss of `transformers` and differentiable as it is; the labels stay as they are. Logits in half precision are turned into float32 first. At least one target counts. With `logits = [[[0., log 3], [5., 0.]]]` and `labels = [[0, 1]]` it is $-\log \frac{3}{4} = 0.2877$: one target, the token 1, guessed at position 0. *About 3 lines.*
#
# <details><summary>Hint 1</summary>A text of t tokens has t − 1 targets. Which logits have no target, and which label is never guessed? And: is a token of a short text worth more than one of a long text?</details>
# <details><summary>Hint 2</summary>Drop the last position of the logits and the first of the labels. Then one mean over everything that counts, rather than a mean of means. <code>nn.functional.cross_entropy</code> has <code>ignore_index</code>.</details>
# <details><summary>Hint 3</summary>Flatten <code>logits[:, :-1]</code> in float32 to (b (t − 1), V) and <code>labels[:, 1:]</code> to (b (t − 1),), and pass both to cross_entropy, whose default ignores −100 and averages over the rest.</details>


# %% exercise="next-token-loss" difficulty=2 minutes=7
def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the next token in nats: (b, t, V), (b, t) -> (). Labels of -100 do not count."""
    ### BEGIN SOLUTION
    guesses, targets = logits[:, :-1].float(), labels[:, 1:]
    return nn.functional.cross_entropy(guesses.flatten(0, 1), targets.flatten(), ignore_index=-100)
    ### END SOLUTION


# %% check="next-token-loss" points=2
certain = torch.full((1, 4, 5), -20.0)
certain[0, [0, 1, 2], [3, 1, 4]] = 20.0  # sure of the tokens 3, 1, 4 as the next ones; the last guess is of no use
certain[0, 3, 0] = 20.0
got = next_token_loss(certain, torch.tensor([[2, 3, 1, 4]]))
assert isinstance(got, Tensor), f"Return a tensor, which can be differentiated; yours is a {type(got).__name__}"
assert next_token_loss(certain.clone().requires_grad_(), torch.tensor([[2, 3, 1, 4]])).requires_grad, (
    "No gradient comes back: a loss is trained on, so neither detach nor no_grad"
)
assert got.shape == (), f"The loss is one number, a tensor of shape (); yours is {tuple(got.shape)}"
assert next_token_loss(certain, torch.tensor([[3, 1, 4, 0]])) > 1, (
    "Your loss is zero for a model that repeats the token it has just read: shift, so that position i guesses i + 1"
)
assert next_token_loss(certain, torch.tensor([[1, 4, 0, 2]])) > 1, (
    "You shift in the wrong direction: the logits at i belong to the label at i + 1, not at i - 1"
)
assert got < 1e-3, f"This model guesses each next token with certainty, so the loss is 0; yours is {got:.3f}"
got = next_token_loss(torch.tensor([[[0.0, np.log(3.0)], [5.0, 0.0]]]), torch.tensor([[0, 1]]))
assert abs(got.item() - 0.2877) < 1e-3, f"The example gives 0.2877; yours is {got:.4f}"
### BEGIN HIDDEN TESTS
for _b, _t, _v in [(1, 2, 3), (3, 7, 11), (2, 5, 40)]:
    torch.manual_seed(_t)
    _logits, _labels = 3 * torch.randn(_b, _t, _v), torch.randint(_v, (_b, _t))
    _want = model.loss_function(logits=_logits, labels=_labels, vocab_size=_v)
    assert torch.allclose(next_token_loss(_logits, _labels), _want, atol=1e-5), (
        f"{(_b, _t, _v)}: not transformers' loss"
    )
### END HIDDEN TESTS

# %% check="next-token-loss" points=2
torch.manual_seed(1)
logits, labels = 2 * torch.randn(2, 6, 9), torch.randint(9, (2, 6))
labels[1, 2:] = -100  # a short second text: 5 targets in the first, 1 in the second
each = torch.stack([-logits[b, :-1].log_softmax(-1)[range(5), labels[b, 1:].clamp_min(0)] for b in (0, 1)])
got, want = next_token_loss(logits, labels), (each[0].sum() + each[1, 0]) / 6
assert not torch.allclose(got, (each[0].mean() + each[1, 0]) / 2, atol=1e-4), (
    "You average the texts' means: the one target of the short text counts five times; take one mean over all targets"
)
assert not torch.allclose(got, (each[0].sum() + each[1, 0]) / 10, atol=1e-4), (
    "You divide by all positions: targets of -100 must be missing in the denominator too; 6 count here"
)
across = -logits[0, 5].log_softmax(-1)[labels[1, 0]]  # the last guess of the first text for the second text's start
assert not torch.allclose(got, (6 * want + across) / 7, atol=1e-4), (
    "You shift after flattening: the last position of a text must not guess the first token of the next; shift each row"
)
assert not torch.allclose(got, each.mean(), atol=1e-4), "A label of -100 is not the token 0: leave these positions out"
assert torch.allclose(got, want, atol=1e-4), f"Six targets count, their mean is {want:.4f}; your loss is {got:.4f}"
coarse = logits.bfloat16()
got, want = next_token_loss(coarse, labels), next_token_loss(coarse.float(), labels)
assert got.dtype == torch.float32, f"Turn the logits into float32 first: your loss is {got.dtype}"
assert torch.allclose(got, want, atol=1e-4), (
    f"Turn the logits into float32 first: a logarithm of bfloat16 has three digits, and {got:.4f} should be {want:.4f}"
)
### BEGIN HIDDEN TESTS
for _seed in range(4):
    torch.manual_seed(_seed)
    _logits, _labels = 3 * torch.randn(4, 8, 6), torch.randint(6, (4, 8))
    _labels[torch.rand(4, 8) < 0.5] = -100
    _labels[0, 3] = 0  # the token 0 counts like any other
    _kept = _labels.clone()
    _want = model.loss_function(logits=_logits, labels=_labels, vocab_size=6)
    assert torch.allclose(next_token_loss(_logits, _labels), _want, atol=1e-5), (
        "Half of the targets ignored: wrong mean"
    )
    assert torch.equal(_labels, _kept), "Do not change the labels you are given"
### END HIDDEN TESTS


# %% mistake="no shift" of="next-token-loss" says="shift, so that position i guesses i + 1"
def next_token_loss(logits, labels):
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


# %% mistake="shifts the wrong way" of="next-token-loss" says="You shift in the wrong direction"
def next_token_loss(logits, labels):
    return nn.functional.cross_entropy(logits[:, 1:].float().flatten(0, 1), labels[:, :-1].flatten())


# %% mistake="a mean of means" of="next-token-loss" says="take one mean over all targets"
def next_token_loss(logits, labels):
    rows = zip(logits[:, :-1].float(), labels[:, 1:], strict=True)
    return torch.stack([nn.functional.cross_entropy(row, target) for row, target in rows]).mean()


# %% mistake="divides by all positions" of="next-token-loss" says="must be missing in the denominator too"
def next_token_loss(logits, labels):
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    ).mean()


# %% mistake="reads -100 as the token 0" of="next-token-loss" says="is not the token 0"
def next_token_loss(logits, labels):
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].clamp_min(0).flatten())


# %% mistake="stays in half precision" of="next-token-loss" says="Turn the logits into float32 first"
def next_token_loss(logits, labels):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# %% mistake="turns the result into float32" of="next-token-loss" says="Turn the logits into float32 first"
def next_token_loss(logits, labels):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).float()


# %% mistake="shifts after flattening" of="next-token-loss" says="You shift after flattening"
def next_token_loss(logits, labels):
    return nn.functional.cross_entropy(logits.float().flatten(0, 1)[:-1], labels.flatten()[1:])


# %% mistake="overwrites the labels" of="next-token-loss" says="Do not change the labels"
def next_token_loss(logits, labels):
    targets = labels[:, 1:]
    counts = targets != -100
    targets[~counts] = 0
    log_p = logits[:, :-1].float().log_softmax(-1)
    return -log_p.gather(-1, targets[..., None])[..., 0][counts].mean()


# %% mistake="detaches the logits" of="next-token-loss" says="No gradient comes back"
def next_token_loss(logits, labels):
    return nn.functional.cross_entropy(logits.detach()[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


# %% mistake="returns a Python number" of="next-token-loss" says="Return a tensor"
def next_token_loss(logits, labels):
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()).item()


# %% alternative="picks the targets that count" of="next-token-loss"
def next_token_loss(logits, labels):
    places = (labels != -100).nonzero().tolist()
    log_p = torch.log_softmax(logits.to(torch.float32), -1)
    losses = [log_p[row, place - 1, labels[row, place]] for row, place in places if place > 0]
    return -torch.stack(losses).mean()


# %% [markdown]
# Your loss beside the model's; and with it, what the other convention of RoPE costs. `my_llama` takes the rotation as an argument, so one word makes it turn neighbours with weights that were trained for halves. Nothing fails.


# %%
def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of a measurement in several worlds (n,), with Student's 95 % interval over the worlds."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values)), float(np.mean(values) - half), float(np.mean(values) + half)


loss_error = (next_token_loss(batch_logits, batch_labels) - library_loss).abs().item()
print(f"your loss differs from the model's by {loss_error:.0e} nats")
rotations = {"loss_right": ("half-split, as trained", rope), "loss_wrong_rope": ("neighbours", rope_interleaved)}
rows = []
for name, (what, rotation) in rotations.items():
    in_worlds = []
    for part in pages:
        ids = [read(text) for text in part]
        found = [next_token_loss(my_llama(one, rotation), one).item() for one in ids]
        in_worlds.append(np.average(found, weights=[one.shape[1] - 1 for one in ids]))  # each token counts once
    value, low, high = mean_interval(np.array(in_worlds))
    rows.append((what, value, low, high))
    label = f"loss on pages of the worlds, rotation {what}"
    card.record(name, value, low=low, high=high, format=".2f", unit="nats", label=label, tolerance=0.3)
table = pd.DataFrame(rows, columns=["RoPE turns", "loss (nats a token)", "low", "high"])
display(table.style.format(precision=2).hide(axis="index"))

# %% [markdown]
# With the wrong pairs the scores between different positions are wrong, and the loss goes from {{loss_right}} nats ({{loss_right:interval}}) to {{loss_wrong_rope}} ({{loss_wrong_rope:interval}}). No shape is wrong, no number is NaN. After a conversion of weights compare logits with the original's: they must agree to rounding, while a few answers can look right with a smaller fault.
#
# The mean of means comes back when gradients are accumulated: averaging the losses of small batches gives the tokens of a batch with few targets more weight. Sum first, and divide by the number of targets of all of them. (`Trainer` does so: it passes `num_items_in_batch` to the loss.)

# %% [markdown]
# ## Which heads copy?
#
# A model that reads a list twice can say, the second time, what comes next: look where the present token stood before, and copy what followed it there. Heads whose attention does that are **induction heads** (Olsson et al., 2022). You find them by measurement: a list of sixteen names from a world, then the same list. Take every pair of neighbours that both occur exactly twice, such as the two halves of a name. How much attention does a head put, at the second occurrence of the first of the two, on *the token that followed it before*? The mean over these pairs is the head's score. (Olsson et al. repeat random tokens; this model has read names and sentences, so it is asked with names. Commas occur often, so they and what follows them are left out, and the score says nothing about them.)
#
# A copying head needs help from a layer below: position $j$ must know that its *predecessor* is the token in question. So a second score is the attention on the token one back.


# %%
class Repeated(NamedTuple):
    """A list read twice, ids (1, t); for each pair of neighbours in it both places of its first token, (n,) each."""

    ids: Tensor
    first: Tensor
    second: Tensor


def list_twice(world: World, names: int = 16) -> Repeated:
    """Names of the world in random order, and again, with the pairs of neighbours that occur exactly twice."""
    everything = sorted(name for kind in world.entities.values() for name in kind)
    drawn = np.random.default_rng([seed, world.seed]).choice(everything, size=names, replace=False)
    ids = read(f"{', '.join(drawn)}, {', '.join(drawn)}")
    tokens = ids[0].tolist()
    count = Counter(tokens)
    first, second = [], []
    for place, (token, follower) in enumerate(pairwise(tokens)):
        again = len(tokens) - 1 - tokens[::-1].index(token)  # the last place of the token
        if count[token] == count[follower] == 2 and again > place and tokens[again + 1 : again + 2] == [follower]:
            first.append(place)
            second.append(again)
    return Repeated(ids, torch.tensor(first), torch.tensor(second))


@torch.no_grad()
def attention_maps(ids: Tensor) -> Tensor:
    """What each head looks at in a text: (1, t) -> (layers, heads, t, t), queries in rows."""
    return torch.cat(model(input_ids=ids, output_attentions=True, use_cache=False).attentions).cpu()


lists = [list_twice(world) for world in worlds]
copy_scores, back_scores, even = [], [], []
for sample in lists:
    maps = attention_maps(sample.ids)
    copy_scores.append(maps[:, :, sample.second, sample.first + 1].mean(dim=-1).numpy())
    back_scores.append(maps.diagonal(-1, dim1=-2, dim2=-1).mean(dim=-1).numpy())
    even.append((1 / (sample.second + 1.0)).mean().item())

# The head is chosen in one world and measured in the others: the best of many is flattered by the data it was chosen on.
best = np.unravel_index(copy_scores[0].argmax(), copy_scores[0].shape)
back = np.unravel_index(back_scores[0].argmax(), back_scores[0].shape)
copying = [(int(i), int(j)) for i, j in zip(*np.nonzero(copy_scores[0] >= copy_scores[0].max() / 2), strict=True)]
score, low, high = mean_interval(np.array([scores[best] for scores in copy_scores[1:]]))
low, high = max(low, 0.0), min(high, 1.0)  # Student's interval does not know that a share ends at 1
label = "attention of the best copying head on the token to copy"
card.record("induction_score", score, low=low, high=high, format=".0%", label=label, tolerance=0.2)
card.record(
    "induction_even", np.mean(even[1:]), format=".1%", label="the same, attention spread evenly", tolerance=0.01
)
card.record("copying_heads", len(copying), format="d", label="heads with at least half of the best score", tolerance=4)
print(
    f"best copying head: layer {best[0]}, head {best[1]}; it scores {score:.1%} where an even spread gives {np.mean(even[1:]):.1%}"
)

# %%
fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.8))
panels = (("on what came next before", copy_scores, copying), ("on the token one back", back_scores, [back]))
for ax, (what, scores, marked) in zip(axes, panels, strict=True):
    shown = 100 * np.mean(scores, axis=0)
    ax.imshow(shown, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    if shown.size <= 64:
        for (row, column), value in np.ndenumerate(shown):
            colour = "white" if value > 55 else COLOURS.truth
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour)
    for layer, head in marked:
        ax.add_patch(plt.Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, ec=COLOURS.wrong, lw=2))
    ax.set(xlabel="head", ylabel="layer", title=f"Attention {what} / %")
    ax.grid(visible=False)
    ax.set_xticks(range(shown.shape[1])[:: max(1, shown.shape[1] // 8)])
    ax.set_yticks(range(shown.shape[0])[:: max(1, shown.shape[0] // 8)])
plt.show()

# %% [markdown]
# Each cell is a head, each number a mean over all worlds; framed are the heads with at least half of the best copying score in the *first* world, and the best one-back head there. The score on the result card is that of the best copying head in the *other* worlds, {{induction_score}} ({{induction_score:interval}}). The figure shows where heads look. It does not show what they are needed for: that takes an intervention, below.
#
# Here is the best copying head at work, on six names. The circles are the places where an induction head has to look.

# %%
sample = list_twice(worlds[0], names=6)
seen_by_best = attention_maps(sample.ids)[best]
words = [tokenizer.decode([token]).replace("\n", "\\n") for token in sample.ids[0].tolist()]
fig, ax = plt.subplots(figsize=(7.2, 6.2))
ax.imshow(seen_by_best, cmap="Blues", vmin=0, vmax=1)
ax.plot(sample.first + 1, sample.second, "o", ms=9, mfc="none", mec=COLOURS.wrong, mew=1.5)
ax.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
ax.set_yticks(range(len(words)), words, fontsize=8)
ax.grid(visible=False)
ax.set(
    xlabel="token that is looked at", ylabel="token that looks", title=f"Attention of head {best[1]} in layer {best[0]}"
)
plt.show()

# %% [markdown]
# ### Are these heads what copies?
#
# Silence a head, so that its output is zero, and measure the loss on the second token of each pair: at its second occurrence, where it can be copied, and at its first, where it cannot. `transformers` lets you replace the attention function of any model by name, which is how it is done here.


# %%
@contextmanager
def using(attention: Callable) -> Iterator[None]:
    """Let the model compute with this attention function, then with the usual one again."""
    AttentionInterface.register("lesson", attention)
    model.set_attn_implementation("lesson")
    try:
        yield
    finally:
        model.set_attn_implementation("eager")


def without(silent: list[tuple[int, int]]) -> Callable:
    """An attention in which these heads, (layer, head), give zero."""

    def attention(module, query, key, value, attention_mask, scaling=None, **ignored):
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        ).transpose(1, 2)
        for layer, head in silent:
            if layer == module.layer_idx:
                mixed[:, :, head] = 0
        return mixed, None

    return attention


@torch.no_grad()
def losses_of(sample: Repeated) -> tuple[float, float]:
    """The loss of the second token of each pair, at its first and at its second occurrence, in nats."""
    log_p = model(input_ids=sample.ids, use_cache=False).logits[0].log_softmax(dim=-1).cpu()
    tokens = sample.ids[0].cpu()
    return tuple(-log_p[places, tokens[places + 1]].mean().item() for places in (sample.first, sample.second))


def losses_without(heads: list[tuple[int, int]]) -> np.ndarray:
    """The losses of `losses_of` without these heads, in all worlds but the first: (worlds, 2)."""
    with using(without(heads)):
        return np.array([losses_of(sample) for sample in lists[1:]])


whole = losses_without([])
back_head = (int(back[0]), int(back[1]))
singles = [(i, j) for i in range(config.num_hidden_layers) for j in range(config.num_attention_heads)]
alone = {head: losses_without([head]) - whole for head in singles}
others = [head for head in singles if head not in copying and head != back_head] or singles
draw = np.random.default_rng(seed)
control = [
    [others[i] for i in draw.choice(len(others), size=min(len(copying), len(others)), replace=False)] for _ in range(8)
]
groups = {
    "copying": ([copying], f"the copying heads ({len(copying)})", COLOURS.after),
    "back": ([[back_head]], f"head {back_head[1]} of layer {back_head[0]}, which looks one back", COLOURS.other),
    "control": (control, f"{len(control[0])} others, mean of {len(control)} draws", COLOURS.before),
}
fig, ax = plt.subplots(figsize=(8, 4.4))
for head in singles:
    ax.plot(*alone[head].mean(axis=0), "o", ms=6, color=COLOURS.after if head in copying else COLOURS.before, alpha=0.7)
costly = max(others, key=lambda head: alone[head][:, 1].mean())
direct_label(ax, *alone[costly].mean(axis=0), f"head {costly[1]} of layer {costly[0]}", COLOURS.before, offset=(8, -4))
rows = []
for short_name, (draws, name, colour) in groups.items():
    rise = np.mean([losses_without(heads) for heads in draws], axis=0) - whole
    ax.plot(*rise.mean(axis=0), "D", ms=10, color=colour)
    direct_label(ax, *rise.mean(axis=0), name, colour, offset=(10, -4))
    (once, *_), (again, low, high) = (mean_interval(part) for part in rise.T)
    rows.append((name, once, again, low, high))
    label = f"rise of the loss on repeated tokens without {name}"
    card.record(
        f"silenced_{short_name}", again, low=low, high=high, format=".1f", unit="nats", label=label, tolerance=1.5
    )
    if short_name == "copying":
        label = "the same, on the first occurrence of these tokens"
        card.record("silenced_copying_first", once, format=".1f", unit="nats", label=label, tolerance=1.5)
ax.axline((0, 0), slope=1, color=COLOURS.truth, lw=1, ls="--")
ax.axhline(0, color=COLOURS.truth, lw=0.8)
ax.margins(x=0.35)
ax.set(xlabel="rise of the loss at the first occurrence / nats", ylabel="rise of the loss at the second / nats")
ax.set_title("What silence costs (dot: one head, diamond: in the table)")
plt.show()
columns = ["silenced", "first occurrence (nats)", "second occurrence (nats)", "low", "high"]
display(pd.DataFrame(rows, columns=columns).style.format(precision=2).hide(axis="index"))

# %% [markdown]
# Without the copying heads (there are {{copying_heads}}) the loss changes by {{silenced_copying}} nats ({{silenced_copying:interval}}, over the other worlds) where a token can be copied, and by {{silenced_copying_first}} nats where it cannot. As many other heads, the mean of eight random draws, change it by {{silenced_control}} nats where it can be copied. Compare the three: the wider these gaps, the stronger the evidence that the heads copy; a map alone is none. (A change below zero is no contradiction: a head that copies also votes where nothing repeats.)
#
# The head that looks one back has another job (the left map above has its copying score), and its silence costs {{silenced_back}} nats at the second occurrence: in the account of Olsson et al. it writes into each position what came before it, which is what a copying head searches for. As far as single copying heads (blue dots) cost less than all of them (blue diamond), they stand in for each other. The grey dot with a label is the costliest of the remaining heads: draws that hold it may make up most of the mean of the draws. Look it up in both maps. If they show nothing, it does something here that neither score asks about, and a search by score would have missed it.
#
# So a map of attention says where a head looks, and an intervention what it is needed for. All this holds for lists of names in this model; and zero is not the only way to silence a head, a mean over other texts is another.

# %% [markdown]
# ## Writing with a cache
#
# To write token $n + 1$ the model needs the keys and values of all tokens before, and these never change: with a causal mask no earlier position sees the new one. So they are kept. Reading the prompt fills the cache in one pass; after that each pass gets *one* token a text.
#
# Texts of unequal length are padded on the **left**, so that all rows write at the same column. Two things must then be told to the model, since it cannot see them in the ids:
#
# - the **attention mask**, 1 for tokens and 0 for padding, over all columns so far: those in the cache, and those that go in now;
# - the **position** of each token: the number of *real* tokens before it. In a row `[pad, pad, A, B]` the positions of A and B are 0 and 1, and the next token stands at 2. (Padding is masked; give it position 0.)
#
# A model with RoPE hides a mistake in the second: scores depend on differences, so a row whose positions are all shifted by its padding gives the same logits up to rounding. A model with learned positions, such as GPT-2, does not.
#
# **Exercise.** Two things.
#
# 1. *Predict:* the model reads 32 tokens and writes 96. Which share of the FLOPs does the cache save, compared with reading the whole text again for each new token? `predicted_saving` is a share from 0 to 1.
# 2. `greedy(model, input_ids, attention_mask, new_tokens)` writes the most likely token `new_tokens` (at least 1) times and returns the new tokens alone, `(b, new_tokens)`. `input_ids` and `attention_mask` are `(b, t)`, padded on the left. It does not stop at an end token. Write the loop yourself, without `generate`; it works for every causal model of `transformers`: call `model(input_ids=…, attention_mask=…, position_ids=…, past_key_values=cache, use_cache=True)` with `cache = DynamicCache(config=model.config)`, which the model fills; the logits are in `.logits`. After the prompt, each call gets one token a row. The result equals `model.generate`'s. *About 12 lines.*
#
# <details><summary>Hint 1</summary>What changes from one pass to the next: which ids go in, how long is the mask, where does the new token stand?</details>
# <details><summary>Hint 2</summary>Positions of the prompt: the cumulative sum of the mask along the row, minus 1, not below 0. The next one is the last one plus 1. The mask grows by a column of ones. The next token is the argmax of <code>logits[:, -1:]</code>, (b, 1), which is also the next input.</details>
# <details><summary>Hint 3</summary>Start with step = input_ids, mask = attention_mask, positions from the mask. In the loop: call the model with these and the cache; step = argmax over the vocabulary at the last position; keep step; mask with one more column of ones; positions = last column plus 1. Concatenate what you kept along dim 1.</details>

# %% exercise="cached-decoding" difficulty=3 minutes=12
predicted_saving = None
### BEGIN SOLUTION
predicted_saving = 0.9
### END SOLUTION


@torch.no_grad()
def greedy(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, new_tokens: int) -> Tensor:
    """Write the most likely tokens with a key-value cache: (b, t), (b, t) padded on the left -> (b, new_tokens)."""
    ### BEGIN SOLUTION
    cache = DynamicCache(config=model.config)
    step, mask = input_ids, attention_mask
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    written = []
    for _ in range(new_tokens):
        out = model(input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        step = out.logits[:, -1:].argmax(dim=-1)
        written.append(step)
        mask = nn.functional.pad(mask, (0, 1), value=1)
        positions = positions[:, -1:] + 1
    return torch.cat(written, dim=1)
    ### END SOLUTION


# %% check="cached-decoding" points=1
assert isinstance(predicted_saving, (int, float, np.number)), (
    f"Predict with a number: predicted_saving is {predicted_saving!r}"
)
assert 0 <= predicted_saving <= 1, f"A share lies from 0 to 1 (a half is 0.5, not 50); yours is {predicted_saving}"


# %% check="cached-decoding" points=2
def tiny(kind: str, seed: int) -> nn.Module:
    """A Llama or a GPT-2 of random weights, large enough that no two tokens are equally likely."""
    torch.manual_seed(seed)
    common = {"vocab_size": 40, "initializer_range": 0.4, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **common)).eval()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, **common)).eval()


def watched_greedy(model: nn.Module, ids: Tensor, mask: Tensor, new_tokens: int) -> tuple[Tensor, int]:
    """What greedy writes, and how many tokens it passed through the model to write it."""
    passed = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda module, args: passed.append(args[0].numel()))
    try:
        return greedy(model, ids, mask, new_tokens), sum(passed)
    finally:
        hook.remove()


def no_generate(*args: Any, **kwargs: Any) -> Tensor:
    raise AssertionError("Write the loop yourself: your function calls generate, which it is to be compared with")


for rows_of_text, prompt_length, to_write in ((1, 5, 6), (3, 4, 5)):
    small_model = tiny("llama", rows_of_text)
    prompt = torch.randint(1, 40, (rows_of_text, prompt_length))
    want = small_model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=to_write, do_sample=False
    )
    small_model.config.eos_token_id = small_model.generation_config.eos_token_id = int(want[0, prompt_length])
    small_model.generate = no_generate
    got, tokens_passed = watched_greedy(small_model, prompt, torch.ones_like(prompt), to_write)
    assert got.shape == (rows_of_text, to_write), (
        f"Return the new tokens alone, (b, new_tokens) = {(rows_of_text, to_write)}, and do not stop at an end token; "
        f"yours is {tuple(got.shape)}"
    )
    needed = rows_of_text * (prompt_length + to_write)
    assert tokens_passed <= needed, (
        f"You passed {tokens_passed} tokens through the model where {needed} are enough: after the prompt, "
        "each call gets the new token alone; the cache knows the rest"
    )
    assert torch.equal(got, want[:, prompt_length:]), (
        "Your tokens differ from generate's: take the argmax at the last position, feed it back, "
        "and let its position be one more than the last one's"
    )
### BEGIN HIDDEN TESTS
for _kind, _b, _t, _new in [("llama", 2, 1, 4), ("gpt2", 1, 7, 1), ("gpt2", 4, 3, 9), ("llama", 1, 12, 8)]:
    _model = tiny(_kind, _t)
    _prompt = torch.randint(1, 40, (_b, _t))
    _got, _passed = watched_greedy(_model, _prompt, torch.ones_like(_prompt), _new)
    _want = _model.generate(_prompt, attention_mask=torch.ones_like(_prompt), max_new_tokens=_new, do_sample=False)
    assert torch.equal(_got, _want[:, _t:]), f"{_kind}, {_b} texts of {_t}, {_new} new: differs from generate"
    assert _passed <= _b * (_t + _new), f"{_kind}, {_b} texts of {_t}, {_new} new: {_passed} tokens passed"
### END HIDDEN TESTS


# %% check="cached-decoding" points=2
def padded_batch(seed: int, padding: list[int], length: int) -> tuple[Tensor, Tensor]:
    """Random prompts with so much padding on the left of each row, and their mask."""
    mask = (torch.arange(length) >= torch.tensor(padding)[:, None]).long()
    return torch.randint(1, 40, mask.shape, generator=torch.Generator().manual_seed(seed)) * mask, mask


for kind, message in (
    (
        "llama",
        "The rows with padding differ from generate's: pass the mask in every call, one column of ones longer each, and "
        "let each row's positions go on from its own last one",
    ),
    (
        "gpt2",
        "Right for RoPE, wrong for learned positions: count real tokens, (cumulative sum of the mask) - 1, go on from "
        "there, and pass position_ids in every call",
    ),
):
    for case in range(3):
        small_model = tiny(kind, case)
        prompt, prompt_mask = padded_batch(case, [0, 3, 6], 7)
        want = small_model.generate(prompt, attention_mask=prompt_mask, max_new_tokens=6, do_sample=False)
        assert torch.equal(greedy(small_model, prompt, prompt_mask, 6), want[:, 7:]), message
### BEGIN HIDDEN TESTS
for _kind, _padding, _length in [("gpt2", [2], 4), ("llama", [9, 0], 10), ("gpt2", [5, 1, 0, 4], 6)]:
    _model = tiny(_kind, _length)
    _prompt, _mask = padded_batch(_length, _padding, _length)
    _kept = _mask.clone()
    _want = _model.generate(_prompt, attention_mask=_mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(greedy(_model, _prompt, _mask, 5), _want[:, _length:]), f"{_kind}, padding {_padding}: differs"
    assert torch.equal(_mask, _kept), "Do not change the mask you are given"
### END HIDDEN TESTS


# %% mistake="reads the whole text again each time" of="cached-decoding" says="the cache knows the rest"
predicted_saving = 0.9


@torch.no_grad()
def greedy(model, input_ids, attention_mask, new_tokens):
    ids, mask = input_ids, attention_mask
    for _ in range(new_tokens):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids[:, input_ids.shape[1] :]


# %% mistake="returns the prompt as well" of="cached-decoding" says="Return the new tokens alone"
predicted_saving = 0.9


@torch.no_grad()
def greedy(model, input_ids, attention_mask, new_tokens):
    cache, step, mask, written = DynamicCache(config=model.config), input_ids, attention_mask, [input_ids]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for _ in range(new_tokens):
        logits = model(input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        step = logits[:, -1:].argmax(-1)
        written.append(step)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = positions[:, -1:] + 1
    return torch.cat(written, 1)


# %% mistake="calls generate" of="cached-decoding" says="Write the loop yourself"
predicted_saving = 0.9


def greedy(model, input_ids, attention_mask, new_tokens):
    written = model.generate(input_ids, attention_mask=attention_mask, max_new_tokens=new_tokens, do_sample=False)
    return written[:, input_ids.shape[1] :]


# %% mistake="stops at an end token" of="cached-decoding" says="do not stop at an end token"
predicted_saving = 0.9


@torch.no_grad()
def greedy(model, input_ids, attention_mask, new_tokens):
    cache, step, mask, written = DynamicCache(config=model.config), input_ids, attention_mask, []
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for _ in range(new_tokens):
        logits = model(input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        step = logits[:, -1:].argmax(-1)
        written.append(step)
        if step[0].item() == model.config.eos_token_id:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = positions[:, -1:] + 1
    return torch.cat(written, 1)


# %% mistake="positions from the length of the mask" of="cached-decoding" says="go on from its own last one"
predicted_saving = 0.9


@torch.no_grad()
def greedy(model, input_ids, attention_mask, new_tokens):
    cache, step, mask, written = DynamicCache(config=model.config), input_ids, attention_mask, []
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for _ in range(new_tokens):
        logits = model(input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        step = logits[:, -1:].argmax(-1)
        written.append(step)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = torch.full_like(step, mask.shape[1] - 1)
    return torch.cat(written, 1)


# %% mistake="the position stands still" of="cached-decoding" says="let its position be one more"
predicted_saving = 0.9


@torch.no_grad()
def greedy(model, input_ids, attention_mask, new_tokens):
    cache, step, mask, written = DynamicCache(config=model.config), input_ids, attention_mask, []
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for _ in range(new_tokens):
        logits = model(input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        step = logits[:, -1:].argmax(-1)
        written.append(step)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = positions[:, -1:]
    return torch.cat(written, 1)


# %% mistake="takes the first position's logits" of="cached-decoding" says="take the argmax at the last position"
predicted_saving = 0.9


@torch.no_grad()
def greedy(model, input_ids, attention_mask, new_tokens):
    cache, step, mask, written = DynamicCache(config=model.config), input_ids, attention_mask, []
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for _ in range(new_tokens):
        logits = model(input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        step = logits[:, :1].argmax(-1)
        written.append(step)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = positions[:, -1:] + 1
    return torch.cat(written, 1)


# %% mistake="ignores the mask" of="cached-decoding" says="pass the mask in every call"
predicted_saving = 0.9


@torch.no_grad()
def greedy(model, input_ids, attention_mask, new_tokens):
    cache, step, written = DynamicCache(config=model.config), input_ids, []
    for _ in range(new_tokens):
        step = model(input_ids=step, past_key_values=cache).logits[:, -1:].argmax(-1)
        written.append(step)
    return torch.cat(written, 1)


# %% mistake="lets positions count padding" of="cached-decoding" says="Right for RoPE, wrong for learned positions"
predicted_saving = 0.9


@torch.no_grad()
def greedy(model, input_ids, attention_mask, new_tokens):
    cache, step, mask, written = DynamicCache(config=model.config), input_ids, attention_mask, []
    for _ in range(new_tokens):
        step = model(input_ids=step, attention_mask=mask, past_key_values=cache).logits[:, -1:].argmax(-1)
        written.append(step)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.cat(written, 1)


# %% mistake="predicts in percent" of="cached-decoding" says="A share lies from 0 to 1"
predicted_saving = 90


@torch.no_grad()
def greedy(model, input_ids, attention_mask, new_tokens):
    cache, step, mask, written = DynamicCache(config=model.config), input_ids, attention_mask, []
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for _ in range(new_tokens):
        logits = model(input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        step = logits[:, -1:].argmax(-1)
        written.append(step)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = positions[:, -1:] + 1
    return torch.cat(written, 1)


# %% alternative="row by row, without padding" of="cached-decoding"
predicted_saving = 0.5


@torch.no_grad()
def greedy(model, input_ids, attention_mask, new_tokens):
    rows = []
    for ids, keep in zip(input_ids, attention_mask.bool(), strict=True):
        memory, following = DynamicCache(config=model.config), ids[keep][None]
        tokens = []
        while len(tokens) < new_tokens:
            following = model(following, past_key_values=memory, use_cache=True).logits[0, -1].argmax().reshape(1, 1)
            tokens.append(following.item())
        rows.append(tokens)
    return torch.tensor(rows)


# %% [markdown]
# The match, on prompts of unequal length from three worlds; then the count. Both rows below are the library's own `generate`, with and without a cache.

# %%
prompts = [world.passages()[3 * place].text for place, world in enumerate(worlds[:3])]
batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(device)
never_stop = {"do_sample": False, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
theirs = model.generate(**batch, max_new_tokens=24, **never_stop)[:, batch.input_ids.shape[1] :]
mine = greedy(model, batch.input_ids, batch.attention_mask, 24)
agreement = (mine == theirs).float().mean().item()
print(
    f"{agreement:.0%} of {mine.numel()} tokens are the same; the first text goes on with\n{tokenizer.decode(mine[0])!r}"
)
card.record("agreement", agreement, format=".0%", label="greedy tokens equal to generate's", tolerance=0.05)

prompt, written_tokens = read("\n".join(passage.text for passage in worlds[0].passages()[:8]))[:, :32], 96
rows = []
for name, cached in (("reads everything again", False), ("with a cache", True)):
    with FlopCounterMode(display=False) as counter:
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            use_cache=cached,
            max_new_tokens=written_tokens,
            **never_stop,
        )
    rows.append((name, counter.get_total_flops() / 1e9, out[0, prompt.shape[1] :]))
saving = 1 - rows[1][1] / rows[0][1]
same_text = (rows[0][2] == rows[1][2]).float().mean().item()
table = pd.DataFrame([row[:2] for row in rows], columns=["generate", "GFLOPs"])
display(table.style.format({"GFLOPs": "{:.3f}"}).hide(axis="index"))
print(f"{same_text:.0%} of the {written_tokens} tokens are the same with and without the cache")
compare([("share of the FLOPs that the cache saves", predicted_saving, saving)], format=".1%")
card.record("cache_saving", saving, format=".1%", label="share of FLOPs saved by the cache, 96 tokens after 32")


# %%
@torch.no_grad()
def next_token_flops(tokens: int, cached: bool) -> int:
    """FLOPs of guessing the token after a text of this length."""
    ids = torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed)).to(device)
    memory = DynamicCache(config=model.config) if cached else None
    if cached:
        model(input_ids=ids[:, :-1], past_key_values=memory)  # paid when these tokens were read or written
        ids = ids[:, -1:]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, past_key_values=memory, use_cache=cached, logits_to_keep=1)
    return counter.get_total_flops()


lengths = np.unique(np.geomspace(4, long, 9).astype(int))
costs = {cached: np.array([next_token_flops(int(n), cached) for n in lengths]) for cached in (False, True)}
scores_part = config.num_hidden_layers * 4 * config.num_attention_heads * config.head_dim * lengths / costs[True]
saved_part = 1 - costs[True] / costs[False]
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9))
for cached, name, colour in ((False, "reads all again", COLOURS.before), (True, "with a cache", COLOURS.after)):
    left.plot(lengths, costs[cached] / 1e6, "o-", ms=4, color=colour, label=name)
left.set(xscale="log", yscale="log", xlabel="tokens so far", ylabel="MFLOPs for the next token")
left.set_title("What the next token costs")
label_lines(left)
right.plot(lengths, 100 * saved_part, "o-", ms=4, color=COLOURS.after, label="saved by the cache")
right.plot(lengths, 100 * scores_part, "o-", ms=4, color=COLOURS.other, label="scores, of a cached step")
right.set(xlabel="tokens so far", ylabel="share of the FLOPs / %", title="What is saved, and what is left")
right.set_ylim(0, 104)
label_lines(right)
ticks = [n for n in (4, 16, 64, 256, long) if n <= long]
left.set_xticks(ticks, [str(n) for n in ticks])
left.minorticks_off()
plt.show()

# %% [markdown]
# Your tokens agree with `generate`'s in {{agreement}} of the places. Without a cache the next token costs as much as reading the whole text; with one it costs a pass of one token, plus scores over all tokens so far. Over 96 tokens after 32 that saves {{cache_saving}} of the FLOPs, and the share saved grows with the text, as does the part of a cached step that goes into scores.
#
# FLOPs are not seconds. A cached step of one text reads every weight for 2 FLOPs each, in 16 bits 1 FLOP a byte, where accelerators do hundreds of FLOPs in the time of reading a byte. So it waits for memory, and the *bytes* of the cache come next.

# %% [markdown]
# ## Decide under a budget
#
# The cache holds two vectors, key and value, of width $d_h$ for each layer, key-value head and token. With many users it outgrows the weights, and something has to give. Three ways out, none of which trains the model again:
#
# | what gives | in the plan | how |
# |---|---|---|
# | heads | `kv_heads` | neighbouring key-value heads are averaged into fewer |
# | bits | `bits`: 32, 16, 8, 4 or 2 | 16 is bfloat16; below that each vector is rounded to whole multiples of its own scale |
# | context | `window` | a token sees the last `window` tokens, itself included; older ones are dropped |


# %%
class Plan(NamedTuple):
    """What a cache keeps: key-value heads, bits a number, and the last tokens."""

    kv_heads: int
    bits: int
    window: int


full = Plan(kv_heads=config.num_key_value_heads, bits=32, window=longest)


def kept(x: Tensor, plan: Plan) -> Tensor:
    """What is left of keys or values in a cache built to the plan: (b, h_kv, s, d_h), the same shape."""
    share = x.shape[1] // plan.kv_heads
    x = x.unflatten(1, (plan.kv_heads, share)).mean(dim=2).repeat_interleave(share, dim=1)
    if plan.bits == 16:
        return x.bfloat16().to(x.dtype)
    if plan.bits < 16:
        steps = 2 ** (plan.bits - 1) - 1
        scale = (x.abs().amax(dim=-1, keepdim=True) / steps).clamp_min(1e-8).bfloat16().to(x.dtype)
        return (x / scale).round().clamp(-steps, steps) * scale
    return x


def with_plan(plan: Plan) -> Callable:
    """An attention whose keys and values went through a cache built to the plan."""

    def attention(module, query, key, value, attention_mask, scaling=None, **ignored):
        back_from = torch.arange(key.shape[2], device=key.device)
        distance = back_from[:, None] - back_from
        visible = (distance >= 0) & (distance < plan.window)
        mixed = nn.functional.scaled_dot_product_attention(
            query, kept(key, plan), kept(value, plan), attn_mask=visible, scale=scaling, enable_gqa=True
        )
        return mixed.transpose(1, 2), None

    return attention


@torch.no_grad()
def page_losses(plan: Plan) -> np.ndarray:
    """The model's loss on the pages of each world with a cache built to the plan, (worlds,), nats a token."""

    def mean_over_tokens(part: list[Tensor]) -> float:
        counts = [ids.shape[1] - 1 for ids in part]
        found = [model(input_ids=ids, labels=ids, use_cache=False).loss.item() for ids in part]
        return float(np.average(found, weights=counts))

    with using(with_plan(plan)):
        return np.array([mean_over_tokens([read(text) for text in part]) for part in pages])


full_losses = page_losses(full)


def loss_increase(plan: Plan) -> np.ndarray:
    """By how much the loss rises with a cache built to the plan, in each world, (worlds,), nats a token."""
    return page_losses(plan) - full_losses


print(f"with the full cache, {full}: {full_losses.mean():.3f} nats a token")

# %% [markdown]
# **Exercise (decide).** Two things.
#
# 1. `cache_bytes(config, plan, tokens)` returns the bytes of the cache of *one* text of `tokens` tokens under the plan, an `int`. The number of layers and the head width come from `config`, the number of heads from the plan. Below 16 bits each vector (of one key or one value) stores a scale of 16 bits as well. With 3 layers, head width 4 and `Plan(kv_heads=2, bits=16, window=10)`, 3 tokens take 288 bytes and 50 tokens 960; with `bits=8`, 3 tokens take 216. *About 4 lines.*
# 2. Choose `plan`, a `Plan` for texts of `longest` = 200 tokens, whose cache takes at most **30 %** of the bytes of `full`, and with which the loss rises by at most **0.02 nats** a token in the mean over the worlds. `kv_heads` must divide `full.kv_heads`, `bits` is one of 32, 16, 8, 4, 2, `window` lies from 1 to `longest`. Say to yourself first which of the three should give; then measure with `loss_increase(plan).mean()` and your `cache_bytes`. Fewer bytes within the limit are better and earn no more points. *1 line.*
#
# <details><summary>Hint 1</summary>Which of the three is information that the model reads again, and which is precision beyond what it needs? A trained model has never seen averaged heads.</details>
# <details><summary>Hint 2</summary>Bytes: 2 vectors times layers times heads times kept tokens, each vector head_dim times bits / 8 bytes, plus 2 for the scale. Kept tokens: the smaller of the text and the window.</details>
# <details><summary>Hint 3</summary>30 % of 32 bits are 9.6 bits a number, scale included. Try <code>full._replace(…)</code> with one thing changed, and look at <code>loss_increase(…).mean()</code>.</details>


# %% exercise="cache-budget" difficulty=3 minutes=11
def cache_bytes(config: LlamaConfig, plan: Plan, tokens: int) -> int:
    """Return the bytes of the key-value cache of one text under the plan."""
    ### BEGIN SOLUTION
    vectors = 2 * config.num_hidden_layers * plan.kv_heads * min(tokens, plan.window)
    bits_a_vector = config.head_dim * plan.bits + (16 if plan.bits < 16 else 0)
    return vectors * bits_a_vector // 8
    ### END SOLUTION


plan = None
### BEGIN SOLUTION
plan = full._replace(bits=8)
### END SOLUTION

# %% check="cache-budget" points=2
four_heads = LlamaConfig(
    vocab_size=9,
    hidden_size=12,
    intermediate_size=8,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)
got = cache_bytes(four_heads, Plan(kv_heads=2, bits=16, window=10), 3)
assert isinstance(got, (int, np.integer)), f"Return whole bytes, an int; yours is {got!r}"
assert got != 96, "That is one layer: each of the config's layers, here 3, has keys and values of its own"
assert got != 144, "Keys and values: two vectors for each token, head and layer"
assert got != 576, "The cache holds key-value heads, not query heads: plan.kv_heads, here 2 of 4"
assert got != 216, "A vector is config.head_dim wide, here 4, which need not be hidden_size / heads"
assert got != 2304, "bits are not bytes: divide by 8"
assert got == 288, f"2 x 3 layers x 2 heads x 3 tokens x 4 numbers x 2 bytes are 288; yours is {got}"
got = cache_bytes(four_heads, Plan(1, 16, 10), 3)
assert got == 144, f"The number of heads is the plan's: half as many as the config's are 144 bytes; yours is {got}"
got = cache_bytes(four_heads, Plan(2, 16, 10), 50)
assert got != 4800, "A window drops what is older: of 50 tokens the last 10 are kept"
assert got == 960, f"10 tokens of the 50 are kept, 960 bytes; yours is {got}"
got = cache_bytes(four_heads, Plan(2, 8, 10), 3)
assert got != 144, "The scales are missing: below 16 bits each vector stores one of 2 bytes, which makes 216, not 144"
assert got == 216, f"36 vectors of 4 bytes with a scale of 2 bytes each are 216; yours is {got}"
cache = DynamicCache(config=four_heads)
LlamaForCausalLM(four_heads)(input_ids=torch.tensor([[1, 2, 3, 4, 5]]), past_key_values=cache)
real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
got = cache_bytes(four_heads, Plan(2, 32, 10), 5)
assert got == real, f"A real DynamicCache of 5 tokens in float32 holds {real} bytes; you count {got}"
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(5)
for _ in range(12):
    _layers, _kv, _tokens, _window = (int(n) for n in _rng.integers(1, 12, size=4))
    _d_h, _bits = 8 * int(_rng.integers(1, 17)), int(_rng.choice([32, 16, 8, 4, 2]))
    _config = LlamaConfig(hidden_size=_d_h, num_attention_heads=1, head_dim=_d_h, num_hidden_layers=_layers)
    _one = len(bytes(_d_h * _bits // 8)) + 2 * (_bits < 16)
    _want = sum(_one for _ in range(2) for _ in range(_layers) for _ in range(_kv) for _ in range(_tokens)[:_window])
    _got = cache_bytes(_config, Plan(_kv, _bits, _window), _tokens)
    assert _got == _want, f"{_layers} layers, d_h {_d_h}, {Plan(_kv, _bits, _window)}, {_tokens} tokens: {_want} bytes"
### END HIDDEN TESTS

# %% check="cache-budget" points=2
assert isinstance(plan, Plan), f"Set plan = Plan(kv_heads=…, bits=…, window=…); yours is {plan!r}"
assert plan.kv_heads in [n for n in range(1, full.kv_heads + 1) if full.kv_heads % n == 0], (
    f"kv_heads must divide {full.kv_heads}; yours is {plan.kv_heads}"
)
assert plan.bits in (32, 16, 8, 4, 2), f"bits is one of 32, 16, 8, 4, 2; yours is {plan.bits}"
assert plan.window in range(1, longest + 1), f"window is a whole number from 1 to {longest}; yours is {plan.window}"
kept_share = plan.kv_heads / full.kv_heads * plan.window / longest
kept_share *= (plan.bits + (16 / config.head_dim) * (plan.bits < 16)) / 32
assert kept_share <= 0.3, (
    f"The plan keeps {kept_share:.0%} of the bytes, over the budget of 30 %: something more must give"
)
rise = float(loss_increase(plan).mean())
assert rise <= 0.02, (
    f"The plan fits, but the loss rises by {rise:.3f} nats a token, over the limit of 0.02: let something else give"
)


# %% mistake="merges the heads" of="cache-budget" says="let something else give"
def cache_bytes(config, plan, tokens):
    bits = plan.bits + 16 / config.head_dim * (plan.bits < 16)
    return int(2 * config.num_hidden_layers * plan.kv_heads * config.head_dim * min(tokens, plan.window) * bits / 8)


plan = Plan(kv_heads=1, bits=16, window=longest)


# %% mistake="forgets the older three quarters" of="cache-budget" says="let something else give"
def cache_bytes(config, plan, tokens):
    bits = plan.bits + 16 / config.head_dim * (plan.bits < 16)
    return int(2 * config.num_hidden_layers * plan.kv_heads * config.head_dim * min(tokens, plan.window) * bits / 8)


plan = full._replace(window=longest // 4)


# %% mistake="as few bits as there are" of="cache-budget" says="let something else give"
def cache_bytes(config, plan, tokens):
    bits = plan.bits + 16 / config.head_dim * (plan.bits < 16)
    return int(2 * config.num_hidden_layers * plan.kv_heads * config.head_dim * min(tokens, plan.window) * bits / 8)


plan = full._replace(bits=2)


# %% mistake="half of everything is little enough" of="cache-budget" says="over the budget of 30 %"
def cache_bytes(config, plan, tokens):
    bits = plan.bits + 16 / config.head_dim * (plan.bits < 16)
    return int(2 * config.num_hidden_layers * plan.kv_heads * config.head_dim * min(tokens, plan.window) * bits / 8)


plan = full._replace(bits=16)


# %% mistake="counts query heads" of="cache-budget" says="The cache holds key-value heads"
def cache_bytes(config, plan, tokens):
    bits = plan.bits + 16 / config.head_dim * (plan.bits < 16)
    return int(
        2
        * config.num_hidden_layers
        * config.num_attention_heads
        * config.head_dim
        * min(tokens, plan.window)
        * bits
        / 8
    )


plan = full._replace(bits=8)


# %% mistake="one layer" of="cache-budget" says="each of the config's layers"
def cache_bytes(config, plan, tokens):
    bits = plan.bits + 16 / config.head_dim * (plan.bits < 16)
    return int(2 * plan.kv_heads * config.head_dim * min(tokens, plan.window) * bits / 8)


plan = full._replace(bits=8)


# %% mistake="divides the width of the model" of="cache-budget" says="A vector is config.head_dim wide"
def cache_bytes(config, plan, tokens):
    d_h = config.hidden_size // config.num_attention_heads
    bits = plan.bits + 16 / d_h * (plan.bits < 16)
    return int(2 * config.num_hidden_layers * plan.kv_heads * d_h * min(tokens, plan.window) * bits / 8)


plan = full._replace(bits=8)


# %% mistake="the config's heads" of="cache-budget" says="The number of heads is the plan's"
def cache_bytes(config, plan, tokens):
    bits = plan.bits + 16 / config.head_dim * (plan.bits < 16)
    heads = config.num_key_value_heads
    return int(2 * config.num_hidden_layers * heads * config.head_dim * min(tokens, plan.window) * bits / 8)


plan = full._replace(bits=8)


# %% mistake="keys without values" of="cache-budget" says="Keys and values"
def cache_bytes(config, plan, tokens):
    bits = plan.bits + 16 / config.head_dim * (plan.bits < 16)
    return int(config.num_hidden_layers * plan.kv_heads * config.head_dim * min(tokens, plan.window) * bits / 8)


plan = full._replace(bits=8)


# %% mistake="overlooks the scales" of="cache-budget" says="The scales are missing"
def cache_bytes(config, plan, tokens):
    return 2 * config.num_hidden_layers * plan.kv_heads * config.head_dim * min(tokens, plan.window) * plan.bits // 8


plan = full._replace(bits=8)


# %% alternative="tries every plan, and counts a token at a time" of="cache-budget"
def cache_bytes(config, plan, tokens):
    total = 0
    for place in range(tokens):
        if place < plan.window:
            number = plan.bits / 8
            total += (
                (number * config.head_dim + (2 if number < 2 else 0)) * plan.kv_heads * config.num_hidden_layers * 2
            )
    return int(total)


fitting = [
    Plan(heads, bits, window)
    for heads in range(1, full.kv_heads + 1)
    if full.kv_heads % heads == 0
    for bits in (32, 16, 8)
    for window in (longest // 4, longest // 2, longest)
]
fitting = [p for p in fitting if cache_bytes(config, p, longest) <= 0.3 * cache_bytes(config, full, longest)]
plan = min(fitting, key=lambda p: loss_increase(p).mean())

# %% [markdown]
# ### What your decision is worth

# %%
families = {
    "fewer bits": ([full._replace(bits=bits) for bits in (16, 8, 4, 2)], COLOURS.other),
    "shorter window": (
        [full._replace(window=round(longest * part)) for part in (0.75, 0.5, 0.25, 0.125)],
        COLOURS.before,
    ),
    "fewer heads": (
        [full._replace(kv_heads=n) for n in range(full.kv_heads - 1, 0, -1) if full.kv_heads % n == 0],
        COLOURS.wrong,
    ),
}
full_bytes = cache_bytes(config, full, longest)
fig, ax = plt.subplots(figsize=(8, 4.4))
rises = {}
for name, (plans, colour) in families.items():
    shares = [100 * cache_bytes(config, one, longest) / full_bytes for one in plans]
    found = [loss_increase(one) for one in plans]
    rises |= dict(zip(plans, found, strict=True))
    values, lows, highs = np.array([mean_interval(part) for part in found]).reshape(-1, 3).T
    if plans:
        ax.plot(shares, values, color=colour, lw=1, alpha=0.6)
        intervals(ax, shares, values, lows, highs, colour)
        direct_label(ax, shares[-1], values[-1], name, colour, offset=(6, 9))
mine, place = loss_increase(plan).mean(), 100 * cache_bytes(config, plan, longest) / full_bytes
ax.plot(place, mine, "*", ms=17, color=COLOURS.after, mec=COLOURS.truth, zorder=5)
direct_label(ax, place, mine, "your plan", COLOURS.after, offset=(10, 8))
ax.axvline(30, color=COLOURS.truth, lw=1, ls="--")
ax.axhline(0.02, color=COLOURS.truth, lw=1, ls="--")
ax.set_yscale("symlog", linthresh=0.01)
ax.set_ylim(-0.01, 3 * max(rise.mean() for rise in rises.values()) + 0.1)
ax.set(xlabel="bytes of the cache / % of the full one", ylabel="rise of the loss / nats a token", xlim=(0, 100))
ax.set_title("The same bytes, saved in three ways (dashed: the limits)")
plt.show()

label = "change of the loss with 8 bits, the largest in a world"
card.record(
    "increase_bits",
    np.abs(rises[full._replace(bits=8)]).max(),
    format=".4f",
    unit="nats",
    label=label,
    tolerance=0.005,
)
value, low, high = mean_interval(rises[full._replace(window=round(longest * 0.25))])
label = "rise of the loss with a quarter of the window"
card.record("increase_window", value, low=low, high=high, format=".2f", unit="nats", label=label, tolerance=0.3)
if families["fewer heads"][0]:
    value, low, high = mean_interval(rises[families["fewer heads"][0][0]])
    label = "rise of the loss with half of the key-value heads, averaged"
    card.record("increase_heads", value, low=low, high=high, format=".1f", unit="nats", label=label, tolerance=3)

# %% [markdown]
# Eight bits change the loss by at most {{increase_bits}} nats in any of the worlds. A quarter of the window costs {{increase_window}} nats ({{increase_window:interval}}), half of the key-value heads {{increase_heads}} nats. (The vertical axis is linear up to 0.01 and logarithmic above; the bars are 95 % intervals over worlds.) Rounding errors are small and of either sign, so sums average them out. What lies beyond the window can be reached only through tokens that had seen it, one layer at a time: these pages ask for names that stood far above, and a text that never refers back loses less. Averaged heads mix what the model keeps apart.
#
# The last one is no verdict on grouped-query attention: models that are *trained* with few key-value heads do well, and one that was not needs further training after its heads are averaged (Ainslie et al., 2023, use 5 % of the original compute). Choose the number of heads before pretraining, bits and window when serving. Nor is the first one universal: large models have key channels of extreme size, which one scale a vector rounds badly, so that at few bits keys get a scale a channel (Liu et al., 2024).
#
# Your two formulas at the size of a model that is served, Llama 3 8B: a GPU of 80 GiB that holds its weights in 16 bits, and as many conversations of 8,192 tokens as fit beside them.

# %%
llama_3 = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
)
weights = sum(count_parameters(llama_3).values())
print(f"{weights:,d} parameters, {2 * weights / 2**30:.1f} GiB in 16 bits")
rows = []
for what, heads, bits in (
    ("a key-value head for each query head", 32, 16),
    ("grouped, as it is", 8, 16),
    ("grouped, 8 bits", 8, 8),
    ("one key-value head", 1, 16),
):
    one = cache_bytes(llama_3, Plan(heads, bits, 8192), 8192)
    rows.append((what, heads, bits, one / 2**30, (80 * 2**30 - 2 * weights) // one))
table = pd.DataFrame(rows, columns=["cache", "key-value heads", "bits", "GiB a conversation", "conversations that fit"])
table.style.format({"GiB a conversation": "{:.2f}"}).hide(axis="index")

# %% [markdown]
# So the cache, not the weights, sets the size of the batch. (Activations and the fragments of memory between the texts are left out.)

# %% [markdown]
# ## With a real model
#
# ```
# course run 1.2 -p model_id Qwen/Qwen3-0.6B -p device cuda
# ```
#
# The same values in the parameters cell do the same in JupyterLab. What changes:
#
# - **The parts.** A model that is not a plain Llama lends its sizes, and your parts are compared with a Llama of these sizes with random weights. Qwen3 adds a norm to each query and key, which the table of parameters shows; Llama 3.1 stretches the slow pairs of RoPE for long texts; GPT-2 has LayerNorm, learned positions and biases. Loss, FLOPs, heads, decoding and the budget are measured on the model itself.
# - **Sums.** On a GPU, batches and kernels change the order of additions: compare logits within a tolerance, and expect a greedy text to part from another one at a near tie.
# - **FLOPs.** The shares move: the wider a model, the less its embeddings and scores weigh in a text of the same length. On a GPU the fused kernels are in the counter's table.
# - **Heads.** Olsson et al. (2022) find copying heads in models of up to 13 billion parameters; their layers differ. An untrained model has none: then the scores are those of an even spread.
# - **The budget.** If 8 bits with a scale a vector break your model's limit, look at the largest key channels. A window can cost far more than here: large models put much of their attention on the very first tokens, and break when these are dropped (Xiao et al., 2023).

# %% [markdown]
# ## Result card

# %%
card.show()

# %% [markdown]
# ## Say it in an interview
#
# <details><summary>How many parameters has a Llama of width d with L layers, and where are they?</summary>
#
# A layer: attention 2 d h d_h + 2 d h_kv d_h, feed-forward 3 d f, two norms of d. L of these, one norm, and the embedding V d, once when tied, else twice. With h d_h = d, few key-value heads and f about 3.5 d (Llama 3 8B), most of a layer is feed-forward. In a small model with a large vocabulary the embedding is a large share. FLOPs are something else: two a parameter and token (the lookup is free, the head is not), plus 4 h d_h n a layer and token for n tokens of context, which no parameter shows.
#
# </details>
#
# <details><summary>You converted a checkpoint. It loads, all shapes fit, it writes fluent nonsense. What do you suspect?</summary>
#
# The order of the rows in q and k: interleaved pairs read as halves, or converted twice, or across heads. Then the key-value heads (repeat in place of repeat_interleave), the base θ of RoPE, eps of the norm, tied against untied head. I would not read texts: I compare hidden states with the original's, layer by layer, on one prompt. A fault in the rotation shows in layer 0 and not at position 0, where nothing is turned.
#
# </details>
#
# <details><summary>What does a KV cache save, what does it cost, and why does it limit the batch?</summary>
#
# It saves reading the text again for each token: here {{cache_saving}} of the FLOPs of 96 tokens after 32. It costs 2 L h_kv d_h numbers a token and text: 128 KiB for Llama 3 8B in 16 bits, so 1 GiB for 8,192 tokens, and it grows with each user while the weights are shared. A cached step is limited by reading memory; batching shares the weights' bytes but not the cache's. So: few key-value heads (decided before training), 8 bits or fewer, pages in place of reserved maximum lengths, a window where the task allows it.
#
# </details>

# %% [markdown]
# ## Read next
#
# - Hugo Touvron et al., [LLaMA: Open and Efficient Foundation Language Models](https://arxiv.org/abs/2302.13971), 2023; Aaron Grattafiori et al., [The Llama 3 Herd of Models](https://arxiv.org/abs/2407.21783), 2024.
# - Biao Zhang, Rico Sennrich, [Root Mean Square Layer Normalization](https://arxiv.org/abs/1910.07467), 2019.
# - Noam Shazeer, [GLU Variants Improve Transformer](https://arxiv.org/abs/2002.05202), 2020; [Fast Transformer Decoding: One Write-Head is All You Need](https://arxiv.org/abs/1911.02150), 2019.
# - Jianlin Su et al., [RoFormer: Enhanced Transformer with Rotary Position Embedding](https://arxiv.org/abs/2104.09864), 2021. Section 3.2 has the rotation.
# - Joshua Ainslie et al., [GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints](https://arxiv.org/abs/2305.13245), 2023.
# - Catherine Olsson et al., [In-context Learning and Induction Heads](https://arxiv.org/abs/2209.11895), 2022.
# - Jared Kaplan et al., [Scaling Laws for Neural Language Models](https://arxiv.org/abs/2001.08361), 2020. Table 1 counts parameters and FLOPs.
# - Zirui Liu et al., [KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache](https://arxiv.org/abs/2402.02750), 2024.
# - Guangxuan Xiao et al., [Efficient Streaming Language Models with Attention Sinks](https://arxiv.org/abs/2309.17453), 2023.
# - Reiner Pope et al., [Efficiently Scaling Transformer Inference](https://arxiv.org/abs/2211.05102), 2022. What decoding waits for.
