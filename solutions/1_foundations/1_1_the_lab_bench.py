# %% [markdown]
# # 1.1 The lab bench
#
# After this lesson you make a run repeatable to the bit, refuse a bad configuration before it costs anything, put an interval on a metric that holds what it promises, and say how many questions an evaluation needs.
#
# **You will measure.** Two runs with one seed end in the same hash ({{same_hash}}: 1 is equal, 0 is not). A nominal 95% bootstrap interval holds the truth in {{coverage}} of evaluations with 200 questions of which the system gets 80% right, but only in {{coverage_small}} of those with 20 questions and 90% right. To see a gain from 80% to 85% with a power of 80%, two systems need {{questions_unpaired}} questions each, or {{questions_paired}} if they answer the same ones.
#
# **You need.** PyTorch, NumPy, and the idea of a sampling distribution. No earlier lesson.
#
# **Time.** About 70 minutes, 50 of them for the exercises; the solution runs in {{run:seconds}} s on one CPU core.

# %% [markdown]
# ## Why it matters at work
#
# "Is the new model better, or is that noise?" is asked after every change of a prompt, a model or an index, and somebody ships on the answer. A wrong yes ships a regression; a run that cannot be repeated turns the search for its cause into guesswork, at the price of another GPU day each time. Interviewers ask it as "B scores 84% and A 82% on our 200 questions: what do you say?"; at the end of this lesson you have a measured answer.

# %% [markdown]
# ## How this path works
#
# You read, run and edit notebooks like this one. Cells come in four sorts:
#
# | you see | you do |
# |---|---|
# | a **demo** | run it; it sets a question or answers one |
# | **Predict** | write a number down *before* the cell that measures it; any sensible number earns the point |
# | an **exercise**: `# YOUR CODE HERE` and `raise NotImplementedError()` | replace both lines; the text above is the whole specification, and three hints are folded below it |
# | a **check**: a cell of `assert`s | run it; a message says what is wrong and what to do; you cannot edit it |
#
# The check you see is a part of the test. `course check 1.1` in a terminal grades the notebook with further cases that you do not see, prints your points and the next hint, and leaves your work as it is; the *Validate* button runs the visible checks alone. `course progress` shows the whole path. `course reset 1.1` gives you a fresh notebook and keeps yours in a dated backup.
#
# Each lesson builds a mechanism by hand, matches it against the library that practitioners use, measures an effect with intervals, and then uses it. Near its end stands a result card with the numbers of *your* run. Every measured number in the prose comes from a run of this notebook.

# %% [markdown]
# Parameters come first in every notebook: [papermill](https://papermill.readthedocs.io) can replace them without touching the rest (`course run 1.1 -p seed 7`).

# %% tags=["parameters"]
seed = 0
simulations = 1000  # simulated evaluations per point of a coverage curve; quick: 50
resamples = 500  # bootstrap resamples per interval
scores_a = ""  # per-question scores of two systems (see "With a real model"); empty: simulated ones
scores_b = ""
metric = "acc"

# %%
import difflib
import functools
import hashlib
import itertools
import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from labkit.plots import COLOURS, direct_label, intervals, label_lines, use_house_style
from labkit.predict import compare
from labkit.results import ResultCard

use_house_style()
card = ResultCard("1_1_the_lab_bench")

# %% [markdown]
# ## One seed, one hash
#
# Two runs are the same when their weights are the same *bits*. A hash over the bytes shows that in eight characters. The run below trains a small network and draws from three sources of randomness: Python's `random` (the order of examples), NumPy's global generator (the data) and PyTorch's default generator (initial weights, dropout).


# %%
def fingerprint(tensors: list[Tensor]) -> str:
    """Return the first eight hexadecimal digits of a SHA-256 over the tensors' bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def noisy_run() -> str:
    """Train for 16 steps with three sources of randomness; return the fingerprint of the weights."""
    x = torch.tensor(np.random.standard_normal((64, 8)), dtype=torch.float32)
    order = random.sample(range(64), k=64)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.1), torch.nn.Linear(16, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for start in range(0, 64, 4):
        batch = x[order[start : start + 4]]
        loss = (net(batch) - batch.sum(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return fingerprint(list(net.parameters()))


print("two runs, two results:", noisy_run(), noisy_run())

# %% [markdown]
# **Exercise.** Write `seed_everything(seed)`. It
#
# - puts Python's `random`, NumPy's global generator (`np.random.random()` and its kin) and PyTorch's default generator into a state that depends on `seed` alone;
# - returns a **new** `torch.Generator` on the CPU, seeded with `seed`: for code that should not touch global state. Drawing from it must leave PyTorch's default generator where it was, and two calls return two objects;
# - raises `ValueError` for a seed outside $0 \dots 2^{32}-1$. (Python's `random.seed(-1)` and `random.seed(1)` give one stream; so do `torch.manual_seed(2**32)` and `torch.manual_seed(0)`, because PyTorch's CPU generator reads only the lowest 32 bits. Nobody expects either.)
#
# After `seed_everything(0)`, `random.random()` is `0.8444…`, `np.random.random()` is `0.5488…`, `torch.rand(())` is `0.4962…`, and `torch.rand((), generator=g)` with the returned `g` is `0.4962…` as well: two generators with one seed have one stream, which the next exercise turns into a trap. About 4 lines.
#
# <details><summary>Hint 1</summary>Three libraries, three global states: none of them seeds another. Which of the three refuses a negative seed by itself?</details>
# <details><summary>Hint 2</summary>Each library has a function with <code>seed</code> in its name. <code>np.random.default_rng(seed)</code> is not the one: it makes a new generator and leaves the global one alone. <code>torch.manual_seed</code> returns a generator: which?</details>
# <details><summary>Hint 3</summary>Call <code>random.seed</code>, <code>np.random.seed</code> and <code>torch.manual_seed</code>; then make a <code>torch.Generator()</code> and call its own <code>manual_seed</code>.</details>


# %% exercise="seed-everything" difficulty=1 minutes=5
def seed_everything(seed: int) -> torch.Generator:
    """Seed Python, NumPy and PyTorch; return a new CPU generator with the same seed."""
    ### BEGIN SOLUTION
    np.random.seed(seed)  # first: it raises ValueError outside 0 … 2**32 - 1, before anything has changed
    random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)
    ### END SOLUTION


# %% check="seed-everything" points=2
def three_draws() -> dict[str, float]:
    return {
        "Python's random": random.random(),
        "NumPy's global generator": float(np.random.random()),
        "PyTorch's default generator": torch.rand(()).item(),
    }


seed_everything(7)
first_draws = three_draws()
three_draws()
seed_everything(7)
second_draws = three_draws()
for source, value in first_draws.items():
    assert second_draws[source] == value, f"{source} does not repeat after seed_everything(7): seed it as well"
seed_everything(8)
for source, value in three_draws().items():
    assert value != first_draws[source], (
        f"{source} gives the same numbers for seeds 7 and 8: use the seed you are given"
    )
### BEGIN HIDDEN TESTS
for hidden_seed in (0, 1, 12345, 2**32 - 1):
    draws = []
    for _ in range(2):
        seed_everything(hidden_seed)
        draws.append(
            (
                random.gauss(0, 1),
                np.random.standard_normal(3).tolist(),
                torch.randn(5).tolist(),
                *three_draws().values(),
            )
        )
        random.gauss(0, 1), np.random.standard_normal(), torch.randn(3)  # leave half-used pairs of normals behind
    assert draws[0] == draws[1], (
        f"seed_everything({hidden_seed}) does not put every generator into the same state twice"
    )
### END HIDDEN TESTS

# %% check="seed-everything" points=1
own = seed_everything(3)
assert isinstance(own, torch.Generator), f"Return a torch.Generator; you return {type(own).__name__}"
assert own is not torch.default_generator, (
    "You return PyTorch's default generator, the global one: return a new torch.Generator"
)
assert seed_everything(3) is not own, "Two calls must return two generators: make a new torch.Generator in each call"
global_state = torch.get_rng_state()
own_draws = torch.rand(4, generator=own)
assert torch.equal(torch.get_rng_state(), global_state), "Drawing from your generator moved PyTorch's default generator"
assert torch.equal(torch.rand(4, generator=seed_everything(3)), own_draws), (
    "The returned generator does not repeat for the same seed"
)
assert not torch.equal(torch.rand(4, generator=seed_everything(4)), own_draws), (
    "The returned generator is the same for seeds 3 and 4: seed it with the seed you are given"
)
### BEGIN HIDDEN TESTS
for hidden_seed in (0, 99, 2**32 - 1):
    reference = torch.rand(5, generator=torch.Generator().manual_seed(hidden_seed))
    got = torch.rand(5, generator=seed_everything(hidden_seed))
    assert torch.equal(got, reference), (
        f"seed_everything({hidden_seed}) must return a generator seeded with exactly that number"
    )
### END HIDDEN TESTS


# %% check="seed-everything" points=1
def raised_by(candidate: int) -> Exception | None:
    try:
        seed_everything(candidate)
    except Exception as error:
        return error
    return None


for bad_seed in (-1, 2**32):
    raised = raised_by(bad_seed)
    assert isinstance(raised, ValueError), (
        f"seed_everything({bad_seed}) must raise ValueError, and yours raises {type(raised).__name__ if raised else 'nothing'}: "
        "a seed lies in 0 … 2**32 - 1, and wrapping it round would make two seeds one"
    )
for good_seed in (0, 2**32 - 1):
    assert raised_by(good_seed) is None, (
        f"{good_seed} is a valid seed and raises {raised_by(good_seed)!r}: both ends count"
    )


# %% mistake="forgets NumPy" of="seed-everything" says="NumPy's global generator does not repeat"
def seed_everything(seed):
    random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


# %% mistake="a new NumPy generator instead of the global one" of="seed-everything" says="NumPy's global generator does not repeat"
def seed_everything(seed):
    random.seed(seed)
    np.random.default_rng(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


# %% mistake="returns what torch.manual_seed returns" of="seed-everything" says="the global one"
def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    return torch.manual_seed(seed)


# %% mistake="the returned generator is never seeded" of="seed-everything" says="the same for seeds 3 and 4"
def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator()


# %% mistake="a constant seed" of="seed-everything" says="use the seed you are given"
def seed_everything(seed):
    random.seed(42)
    np.random.seed(42)
    torch.manual_seed(42)
    return torch.Generator().manual_seed(42)


# %% mistake="wraps a bad seed round" of="seed-everything" says="must raise ValueError"
def seed_everything(seed):
    seed = seed % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


# %% mistake="asserts what it should raise" of="seed-everything" says="yours raises AssertionError"
def seed_everything(seed):
    assert 0 <= seed < 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


# %% mistake="takes the largest seed for too large" of="seed-everything" says="both ends count"
def seed_everything(seed):
    if not 0 <= seed < 2**32 - 1:
        raise ValueError(f"bad seed {seed}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


# %% alternative="sets states instead of seeds" of="seed-everything"
def seed_everything(seed):
    if not 0 <= seed < 2**32:
        raise ValueError(f"a seed lies in 0 … 2**32 - 1, not {seed}")
    random.setstate(random.Random(seed).getstate())
    np.random.set_state(np.random.RandomState(seed).get_state())
    generator = torch.Generator()
    generator.manual_seed(seed)
    torch.set_rng_state(generator.get_state())
    return generator


# %%
seed_everything(seed)
first_hash = noisy_run()
seed_everything(seed)
second_hash = noisy_run()
seed_everything(seed + 1)
print("same seed:", first_hash, second_hash, "   next seed:", noisy_run())
card.record("same_hash", int(first_hash == second_hash), format="d", label="same seed, same hash (1 = equal)")

# %% [markdown]
# A seed fixes the numbers that are *drawn*. It does not fix the order in which floats are *added*, and addition of floats is not associative:

# %%
addends = torch.randn(100_000, generator=torch.Generator().manual_seed(seed))
print(
    f"the same 100,000 float32 numbers, summed as they are: {addends.sum().item()!r},",
    f"and in reverse: {addends.flip(0).sum().item()!r}",
)

# %% [markdown]
# So the same seed may give other bits on another number of threads, another GPU or another version of a kernel. On CUDA, ask for `torch.use_deterministic_algorithms(True)` and set `CUBLAS_WORKSPACE_CONFIG=:4096:8`; PyTorch then raises an error where it has no deterministic kernel, and promises equal bits on the same machine and version only ([PyTorch, *Reproducibility*](https://docs.pytorch.org/docs/stable/notes/randomness.html)). "Reproducible" is a claim about a seed *and* an environment: record both.

# %% [markdown]
# ## One generator, two users
#
# A single seed does not protect you from your own code. Below, the training data and the evaluation data come from the same generator. Nothing about the evaluation feeds back into training, and yet:


# %%
class Run(NamedTuple):
    """What a run returns: the last weight (4,), and the batches, each (8, 4), it trained and was evaluated on."""

    weight: Tensor
    trained_on: list[Tensor]
    evaluated_on: list[Tensor]


def train_shared(seed: int, evaluate_every: int, steps: int = 20) -> Run:
    """Fit y = x.sum() by SGD on fresh random batches; evaluate each `evaluate_every` steps (0: never)."""
    generator = torch.Generator().manual_seed(seed)
    weight, trained_on, evaluated_on = torch.zeros(4), [], []
    for step in range(steps):
        if evaluate_every and step % evaluate_every == 0:
            evaluated_on.append(torch.randn(8, 4, generator=generator))
        batch = torch.randn(8, 4, generator=generator)
        trained_on.append(batch)
        error = batch @ weight - batch.sum(dim=1)
        weight = weight - 0.05 * batch.T @ error / len(batch)
    return Run(weight, trained_on, evaluated_on)


pd.DataFrame(
    [
        {"evaluate every": every or "never", "hash of the weights": fingerprint([train_shared(seed, every).weight])}
        for every in (0, 10, 5)
    ]
).style.hide(axis="index")

# %% [markdown]
# Looking at the model changes the model. In a real project this appears as "the bug vanishes when I log more often", or as two colleagues with equal seeds and unequal curves. It is also how a change of the evaluation set moves the *training* result, so that you compare two things at once.
#
# **Exercise (find and fix).** Write `train`, with the signature and the loop of `train_shared`, such that
#
# - evaluating leaves no trace: `weight` and `trained_on` are bit for bit those of `train_shared(seed, evaluate_every=0)`, whatever `evaluate_every` is;
# - evaluation still happens in the same steps on `(8, 4)` batches of normal draws, and repeats for the same seed;
# - no row in `evaluated_on` is a row that a run with *any* seed from 0 to 20 trains on, in whatever number of steps. A test set that is the next seed's training set is still a leak, once you average over seeds.
#
# About 10 lines, of which 2 are new. (Copy the function above and change what is wrong.)
#
# <details><summary>Hint 1</summary>Give evaluation a generator of its own. Then ask which seed it may have: what does another run do with <code>seed</code>, or with <code>seed + 1</code>?</details>
# <details><summary>Hint 2</summary>You want a seed that depends on <code>seed</code> and on the purpose, and that is not a small whole number: hash both together. (A large constant is no way out by itself: only its lowest 32 bits count, so 2**40 is 0 again.) <code>hashlib.sha256</code> is the same in every process; Python's <code>hash</code> of a string is not.</details>
# <details><summary>Hint 3</summary>Take the first 8 bytes of <code>hashlib.sha256(f"evaluation {seed}".encode()).digest()</code> as a whole number (<code>int.from_bytes</code>), seed a second <code>torch.Generator</code> with it, and draw the evaluation batches from that one.</details>


# %% exercise="shared-generator" difficulty=2 minutes=7
def train(seed: int, evaluate_every: int, steps: int = 20) -> Run:
    """Fit y = x.sum() by SGD on fresh random batches; evaluating leaves no trace in the run."""
    ### BEGIN SOLUTION
    digest = hashlib.sha256(f"{seed}: rows to evaluate on".encode()).digest()
    for_training = torch.Generator().manual_seed(seed)
    for_evaluation = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    weight, trained_on, evaluated_on = torch.zeros(4), [], []
    for step in range(steps):
        if evaluate_every and step % evaluate_every == 0:
            evaluated_on.append(torch.randn(8, 4, generator=for_evaluation))
        batch = torch.randn(8, 4, generator=for_training)
        trained_on.append(batch)
        error = batch @ weight - batch.sum(dim=1)
        weight = weight - 0.05 * batch.T @ error / len(batch)
    return Run(weight, trained_on, evaluated_on)
    ### END SOLUTION


# %% check="shared-generator" points=2
unwatched = train_shared(5, evaluate_every=0)
alone, watched = train(5, evaluate_every=0), train(5, evaluate_every=4)
assert torch.equal(alone.weight, unwatched.weight), (
    "Without evaluation the run must stay what it was, to the bit: keep the training generator's seed and draws"
)
assert len(watched.evaluated_on) == 5, (
    f"evaluate_every=4 over 20 steps is 5 evaluations; you made {len(watched.evaluated_on)}: evaluating "
    "must still happen"
)
assert torch.equal(watched.weight, unwatched.weight), (
    "Evaluating still changes the weights: draw the evaluation batches from a generator that training does not use"
)
assert all(
    torch.equal(one, two)
    for one, two in zip(train(5, evaluate_every=4).evaluated_on, watched.evaluated_on, strict=True)
), "The evaluation batches do not repeat for the same seed"
### BEGIN HIDDEN TESTS
for hidden_seed, hidden_every, hidden_steps in ((0, 1, 7), (3, 2, 1), (11, 50, 20), (20, 7, 33)):
    expected = train_shared(hidden_seed, 0, hidden_steps)
    got = train(hidden_seed, hidden_every, hidden_steps)
    case = f"seed={hidden_seed}, evaluate_every={hidden_every}, steps={hidden_steps}"
    assert torch.equal(got.weight, expected.weight), f"Evaluating changes the weights with {case}"
    assert len(got.trained_on) == hidden_steps, f"{len(got.trained_on)} training batches with {case}"
    assert torch.equal(torch.stack(got.trained_on), torch.stack(expected.trained_on)), (
        f"trained_on is not that of a run without evaluation with {case}"
    )
    assert len(got.evaluated_on) == -(-hidden_steps // hidden_every), f"{len(got.evaluated_on)} evaluations with {case}"
    assert all(batch.shape == (8, 4) for batch in got.evaluated_on), f"Each evaluation batch must be (8, 4) with {case}"
    # Of 32 normal numbers, all are positive with probability 2**-32, and all below 1 in size with probability 5e-6.
    assert all(batch.min() < 0 and batch.abs().max() > 1 for batch in got.evaluated_on), (
        f"Evaluation batches hold normal draws (torch.randn), as those of train_shared do; with {case} they do not"
    )
### END HIDDEN TESTS


# %% check="shared-generator" points=2
def rows_of(batches: list[Tensor]) -> set[bytes]:
    return {row.numpy().tobytes() for batch in batches for row in batch}


evaluated = rows_of(train(5, evaluate_every=1).evaluated_on)
assert len(evaluated) > 0, "Nothing was evaluated with evaluate_every=1: evaluating must still happen"
assert not evaluated & rows_of(train_shared(5, 0).trained_on), (
    "The run is evaluated on rows it trains on: both generators have the same stream, so the score measures memory"
)
assert not evaluated & rows_of(train_shared(6, 0).trained_on), (
    "Seed 5 is evaluated on the rows that seed 6 trains on: a neighbouring seed is another run's seed"
)
### BEGIN HIDDEN TESTS
every_training_row = set().union(*(rows_of(train_shared(other, 0, 40).trained_on) for other in range(21)))
for hidden_seed in (0, 1, 13, 20):
    overlap = rows_of(train(hidden_seed, evaluate_every=1).evaluated_on) & every_training_row
    assert not overlap, (
        f"With seed {hidden_seed}, {len(overlap)} evaluated rows are training rows of a run with a seed from 0 to 20: "
        "remember that only the lowest 32 bits of a seed count, and that another run may train for more steps"
    )
### END HIDDEN TESTS


# %% mistake="the same seed for both generators" of="shared-generator" says="evaluated on rows it trains on"
def train(seed, evaluate_every, steps=20):
    run = train_shared(seed, 0, steps)
    second = torch.Generator().manual_seed(seed)
    count = len(range(0, steps, evaluate_every)) if evaluate_every else 0
    return Run(run.weight, run.trained_on, [torch.randn(8, 4, generator=second) for _ in range(count)])


# %% mistake="the next seed for evaluation" of="shared-generator" says="a neighbouring seed is another run's seed"
def train(seed, evaluate_every, steps=20):
    run = train_shared(seed, 0, steps)
    second = torch.Generator().manual_seed(seed + 1)
    count = len(range(0, steps, evaluate_every)) if evaluate_every else 0
    return Run(run.weight, run.trained_on, [torch.randn(8, 4, generator=second) for _ in range(count)])


# %% mistake="no evaluation any more" of="shared-generator" says="evaluating must still happen"
def train(seed, evaluate_every, steps=20):
    return train_shared(seed, 0, steps)


# %% mistake="saves and restores the state of the shared generator" of="shared-generator" says="evaluated on rows it trains on"
def train(seed, evaluate_every, steps=20):
    generator = torch.Generator().manual_seed(seed)
    weight, trained_on, evaluated_on = torch.zeros(4), [], []
    for step in range(steps):
        if evaluate_every and step % evaluate_every == 0:
            state = generator.get_state()
            evaluated_on.append(torch.randn(8, 4, generator=generator))
            generator.set_state(state)
        batch = torch.randn(8, 4, generator=generator)
        trained_on.append(batch)
        weight = weight - 0.05 * batch.T @ (batch @ weight - batch.sum(dim=1)) / len(batch)
    return Run(weight, trained_on, evaluated_on)


# %% mistake="seeds the shared generator again after each evaluation" of="shared-generator" says="Evaluating still changes the weights"
def train(seed, evaluate_every, steps=20):
    generator = torch.Generator().manual_seed(seed)
    weight, trained_on, evaluated_on = torch.zeros(4), [], []
    for step in range(steps):
        if evaluate_every and step % evaluate_every == 0:
            evaluated_on.append(torch.randn(8, 4, generator=generator))
            generator.manual_seed(seed)
        batch = torch.randn(8, 4, generator=generator)
        trained_on.append(batch)
        weight = weight - 0.05 * batch.T @ (batch @ weight - batch.sum(dim=1)) / len(batch)
    return Run(weight, trained_on, evaluated_on)


# %% mistake="a large constant as the seed" of="shared-generator" says="only the lowest 32 bits of a seed count"
def train(seed, evaluate_every, steps=20):
    run = train_shared(seed, 0, steps)
    second = torch.Generator().manual_seed(2**50)
    count = len(range(0, steps, evaluate_every)) if evaluate_every else 0
    return Run(run.weight, run.trained_on, [torch.randn(8, 4, generator=second) for _ in range(count)])


# %% mistake="evaluates on what is left of the training stream" of="shared-generator" says="may train for more steps"
def train(seed, evaluate_every, steps=20):
    run = train_shared(seed, 0, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        torch.randn(8, 4, generator=generator)
    count = len(range(0, steps, evaluate_every)) if evaluate_every else 0
    return Run(run.weight, run.trained_on, [torch.randn(8, 4, generator=generator) for _ in range(count)])


# %% alternative="all training batches first, a spawned NumPy seed for evaluation" of="shared-generator"
def train(seed, evaluate_every, steps=20):
    generator = torch.Generator().manual_seed(seed)
    trained_on = [torch.randn(8, 4, generator=generator) for _ in range(steps)]
    second = np.random.default_rng(np.random.SeedSequence(seed).spawn(2)[1])
    weight = torch.zeros(4)
    for batch in trained_on:
        error = batch @ weight - batch.sum(dim=1)
        weight = weight - 0.05 * batch.T @ error / len(batch)
    count = len(range(0, steps, evaluate_every)) if evaluate_every else 0
    evaluated_on = [torch.tensor(second.standard_normal((8, 4)), dtype=torch.float32) for _ in range(count)]
    return Run(weight, trained_on, evaluated_on)


# %%
pd.DataFrame(
    [
        {
            "evaluate every": every or "never",
            "one shared generator": fingerprint([train_shared(seed, every).weight]),
            "your two": fingerprint([train(seed, every).weight]),
        }
        for every in (0, 10, 5)
    ]
).style.hide(axis="index")

# %% [markdown]
# The rule for the rest of this path: **one generator a purpose, its seed derived from the run's seed and the purpose's name.** `np.random.SeedSequence(seed).spawn(n)` is the same idea in NumPy, and `jax.random.split` in JAX. There a draw never moves a key, so the mistake to look for is the opposite one: a key used twice.

# %% [markdown]
# ## A configuration that refuses
#
# A run starts from parameters that somebody typed: on a command line, in a scheduler's form, in YAML. All of these hand you values that look right and are not:

# %%
typed_by_hand = """
steps: 200
lr: 1e-3      # YAML 1.1 wants 1.0e-3: without the dot this is a string
seed: 010     # and a leading zero makes this octal
model_id: no  # Norway's problem
"""
pd.DataFrame(
    [
        {"name": name, "value": repr(value), "type": type(value).__name__}
        for name, value in yaml.safe_load(typed_by_hand).items()
    ]
).style.hide(axis="index")

# %% [markdown]
# None of these four lines is an error to YAML, and a misspelt `step: 10` is not an error to papermill: it logs a warning, sets a variable that nobody reads, and goes on for the default number of steps. A configuration *class* turns most of these into an error in the first second of the run. The checks below ask your class through this function:


# %%
def refusal(**parameters: object) -> str:
    """The text of the ValueError that these parameters raise; empty when they are accepted."""
    try:
        RunConfig(**parameters)
    except ValueError as error:
        return str(error)
    except TypeError as error:
        raise AssertionError(f"{parameters} must raise ValueError; yours raises TypeError: {error}") from None
    return ""


# %% [markdown]
# **Exercise.** Write `RunConfig`, an immutable class with four parameters, all with defaults, passed by name:
#
# | name | type | valid | default |
# |---|---|---|---|
# | `model_id` | `str` | not empty | `"shipped"` |
# | `steps` | `int` | 1 or more | `200` |
# | `seed` | `int` | 0 to $2^{32}-1$ | `0` |
# | `lr` | `float` | above 0, at most 1; no NaN | `1e-3` |
#
# - A wrong type is refused, never converted: `steps="10"`, `steps=10.0`, `steps=True` and `lr="1e-3"` each raise `ValueError` (pydantic's `ValidationError` is one), and its text names the parameter. Whether `lr` takes the whole number `1` is up to you.
# - An unknown name raises `ValueError` too. The text names the nearest known one if `difflib.get_close_matches` finds any: for `RunConfig(step=10)` it contains `steps`. Otherwise it lists all four: `RunConfig(dropout=0.1)`.
# - `config.steps = 5` raises: a configuration that changes during the run describes no run.
#
# About 14 lines with pydantic, which is what most services use; any class that keeps this contract passes.
#
# <details><summary>Hint 1</summary>Three settings of a pydantic model do most of it: one stops conversions, one forbids assignment, one forbids unknown names. What is left is ranges, and the nearest name.</details>
# <details><summary>Hint 2</summary><code>ConfigDict(strict=…, frozen=…, extra=…)</code> for the three, <code>Field(default, ge=…, gt=…, le=…, min_length=…)</code> for ranges. A <code>model_validator(mode="before")</code> class method sees the raw dictionary first: raise <code>ValueError</code> there.</details>
# <details><summary>Hint 3</summary>In the validator: <code>for name in data</code>, if <code>name not in cls.model_fields</code>, take <code>difflib.get_close_matches(name, cls.model_fields)</code>; raise with its first entry, or with all of <code>cls.model_fields</code> when it is empty. At the end, return <code>data</code>.</details>


# %% exercise="run-config" difficulty=2 minutes=10
class RunConfig(BaseModel):
    """The parameters of one run; refuses what is mistyped, out of range or unknown."""

    ### BEGIN SOLUTION
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    model_id: str = Field("shipped", min_length=1)
    steps: int = Field(200, ge=1)
    seed: int = Field(0, ge=0, lt=2**32)
    lr: float = Field(1e-3, gt=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def refuse_unknown_names(cls, parameters: dict[str, object]) -> dict[str, object]:
        for unknown in parameters.keys() - cls.model_fields.keys():
            nearest = difflib.get_close_matches(unknown, cls.model_fields, n=1)
            advice = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(cls.model_fields)}"
            raise ValueError(f"there is no parameter {unknown!r}; {advice}")
        return parameters

    ### END SOLUTION


# %% check="run-config" points=1
default = RunConfig()
assert (default.model_id, default.steps, default.seed, default.lr) == ("shipped", 200, 0, 1e-3), (
    f"The defaults are shipped, 200, 0 and 0.001; yours are {default!r}"
)
given = RunConfig(model_id="other", steps=1, seed=2**32 - 1, lr=1.0)
assert (given.model_id, given.steps, given.seed, given.lr) == ("other", 1, 2**32 - 1, 1.0), (
    f"Valid parameters must be kept as they are given; you made {given!r}"
)
try:
    given.steps = 5
    assigned = True
except (AttributeError, TypeError, ValueError):
    assigned = False
assert not assigned, "config.steps = 5 must raise: make the configuration immutable (frozen)"


# %% check="run-config" points=2
for name, wrong in (("steps", "10"), ("steps", 10.0), ("lr", "1e-3"), ("model_id", False)):
    assert refusal(**{name: wrong}), (
        f"{name}={wrong!r} was accepted: refuse a wrong type instead of converting it (strict)"
    )
assert refusal(steps=True), "steps=True was accepted: a bool is an int to isinstance, so refuse it by its own type"
for name, wrong in (
    ("steps", 0),
    ("steps", -5),
    ("lr", 0.0),
    ("lr", 1.5),
    ("lr", float("nan")),
    ("seed", -1),
    ("seed", 2**32),
    ("model_id", ""),
):
    assert refusal(**{name: wrong}), f"{name}={wrong!r} was accepted: it is outside the range in the table"
    assert name in refusal(**{name: wrong}), (
        f"The error for {name}={wrong!r} does not name the parameter: {refusal(**{name: wrong})!r}"
    )
### BEGIN HIDDEN TESTS
for name, wrong in (
    ("seed", False),
    ("steps", None),
    ("seed", "0"),
    ("seed", 1.0),
    ("lr", None),
    ("lr", float("inf")),
    ("lr", -1e-9),
    ("model_id", 3),
    ("steps", [10]),
):
    assert name in refusal(**{name: wrong}), (
        f"{name}={wrong!r} must raise a ValueError that names {name}; yours: {refusal(**{name: wrong})!r}"
    )
assert refusal(steps=10, lr=2.0), "One good parameter must not excuse a bad one: steps=10, lr=2.0 was accepted"
for good in ({"steps": 10**6}, {"lr": 1e-9}, {"seed": 17, "model_id": "org/name"}):
    assert not refusal(**good), f"{good} is valid and was refused: {refusal(**good)!r}"
### END HIDDEN TESTS

# %% check="run-config" points=1
assert refusal(step=10), "step=10 was accepted and would be ignored: forbid unknown names"
assert "steps" in refusal(step=10), (
    f"The error for step=10 must offer the nearest known name, steps; yours: {refusal(step=10)!r}"
)
assert all(known in refusal(dropout=0.1) for known in ("model_id", "steps", "seed", "lr")), (
    f"Nothing is near dropout, so the error must list all four known names; yours: {refusal(dropout=0.1)!r}"
)
### BEGIN HIDDEN TESTS
for typed, meant in (
    ("seeds", "seed"),
    ("model", "model_id"),
    ("modelid", "model_id"),
    ("Steps", "steps"),
    ("lrr", "lr"),
):
    assert meant in refusal(**{typed: 1}), (
        f"The error for {typed}=1 must offer {meant}; yours: {refusal(**{typed: 1})!r}"
    )
assert refusal(steps=10, warmup=3), "A known name must not excuse an unknown one: steps=10, warmup=3 was accepted"
### END HIDDEN TESTS


# %% mistake="lets pydantic convert" of="run-config" says="instead of converting it (strict)"
class RunConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    model_id: str = Field("shipped", min_length=1)
    steps: int = Field(200, ge=1)
    seed: int = Field(0, ge=0, lt=2**32)
    lr: float = Field(1e-3, gt=0, le=1)


# %% mistake="ignores unknown names" of="run-config" says="forbid unknown names"
class RunConfig(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)
    model_id: str = Field("shipped", min_length=1)
    steps: int = Field(200, ge=1)
    seed: int = Field(0, ge=0, lt=2**32)
    lr: float = Field(1e-3, gt=0, le=1)


# %% mistake="refuses unknown names without advice" of="run-config" says="must offer the nearest known name, steps"
class RunConfig(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    model_id: str = Field("shipped", min_length=1)
    steps: int = Field(200, ge=1)
    seed: int = Field(0, ge=0, lt=2**32)
    lr: float = Field(1e-3, gt=0, le=1)


# %% mistake="types without ranges" of="run-config" says="outside the range in the table"
class RunConfig(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    model_id: str = "shipped"
    steps: int = 200
    seed: int = 0
    lr: float = 1e-3


# %% mistake="takes True for a number of steps" of="run-config" says="a bool is an int to isinstance"
class RunConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    model_id: str = Field("shipped", min_length=1)
    steps: int = Field(200, ge=1)
    seed: int = Field(0, ge=0, lt=2**32)
    lr: float = Field(1e-3, gt=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def refuse_strings(cls, parameters):
        for name, kind in (("steps", int), ("seed", int), ("lr", (int, float))):
            if name in parameters and not isinstance(parameters[name], kind):
                raise ValueError(f"{name} has the wrong type")
        return parameters


# %% mistake="a frozen dataclass, whose unknown names are TypeErrors" of="run-config" says="yours raises TypeError"
@dataclass(frozen=True, kw_only=True)
class RunConfig:
    model_id: str = "shipped"
    steps: int = 200
    seed: int = 0
    lr: float = 1e-3

    def __post_init__(self):
        for name, kind in (("model_id", str), ("steps", int), ("seed", int), ("lr", float)):
            if type(getattr(self, name)) is not kind:
                raise ValueError(f"{name} must be of type {kind.__name__}")
        for name, valid in (
            ("model_id", self.model_id != ""),
            ("steps", self.steps >= 1),
            ("seed", 0 <= self.seed < 2**32),
            ("lr", 0 < self.lr <= 1),
        ):
            if not valid:
                raise ValueError(f"{name} is out of range")


# %% mistake="can be changed afterwards" of="run-config" says="make the configuration immutable (frozen)"
class RunConfig(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    model_id: str = Field("shipped", min_length=1)
    steps: int = Field(200, ge=1)
    seed: int = Field(0, ge=0, lt=2**32)
    lr: float = Field(1e-3, gt=0, le=1)


# %% alternative="no pydantic: a class that checks a table" of="run-config"
class RunConfig:
    TABLE = {  # noqa: RUF012
        "model_id": (str, "shipped", lambda v: v != ""),
        "steps": (int, 200, lambda v: v >= 1),
        "seed": (int, 0, lambda v: 0 <= v < 2**32),
        "lr": (float, 1e-3, lambda v: 0 < v <= 1),
    }

    def __init__(self, **parameters):
        for name in parameters:
            if name not in self.TABLE:
                near = difflib.get_close_matches(name, self.TABLE)
                raise ValueError(f"unknown {name}: {near[0] if near else list(self.TABLE)}")
        for name, (kind, fallback, valid) in self.TABLE.items():
            value = parameters.get(name, fallback)
            if type(value) is not kind or not valid(value):
                raise ValueError(f"{name} cannot be {value!r}")
            object.__setattr__(self, name, value)

    def __setattr__(self, name, value):
        raise AttributeError(f"{name} is fixed")


# %%
try:
    RunConfig(**yaml.safe_load(typed_by_hand))
except ValueError as refused:
    print(refused)
try:
    RunConfig(step=10)
except ValueError as refused:
    print(refused)

# %% [markdown]
# Pydantic reports all wrong parameters in one go, each with the value that was read. What even a strict type cannot catch is missing from its report: `seed: 010` was read as 8, a valid seed, only not the one that was typed. So a run also *prints* its configuration and stores it beside its results.

# %% [markdown]
# ## An interval that holds what it promises
#
# An evaluation draws $n$ questions from all the questions your users might ask, and reports the mean score $\bar s$. Another draw gives another mean. A 95% interval is a *procedure*: over many evaluations, its result should contain the true mean in 95% of them. That share is its **coverage**, and it can be measured wherever the truth is known.
#
# The percentile bootstrap (Efron, 1979) needs no formula: treat the sample as the population, draw $n$ scores from it *with replacement*, take their mean; repeat $R$ times; the middle 95% of those $R$ means is the interval.
#
# **Predict.** A system answers 90% of all questions correctly. You evaluate it on 20 questions, scored 0 or 1, and compute a nominal 95% percentile bootstrap interval of its accuracy. In what share of such evaluations does the interval contain 0.9? Put a share from 0 to 1 in `predicted_coverage`: for 95%, write `0.95`. 1 line.
#
# <details><summary>Hint 1</summary>Which samples of 20 make the bootstrap fail outright?</details>
# <details><summary>Hint 2</summary>What does the interval look like when all 20 answers are right? How often is that?</details>
# <details><summary>Hint 3</summary>All right has probability 0.9 to the power of 20, about 0.12; every resample of such a sample is perfect as well. Any number from 0 to 1 earns the point.</details>

# %% exercise="predict-coverage" difficulty=1 minutes=3
predicted_coverage = None
### BEGIN SOLUTION
predicted_coverage = 0.95  # what the name "95% interval" promises
### END SOLUTION

# %% check="predict-coverage" points=1
assert predicted_coverage is not None, "Write your prediction down first: predicted_coverage = a share from 0 to 1"
assert isinstance(predicted_coverage, (int, float, np.number)), (
    f"A prediction is a number, such as 0.5; yours is {predicted_coverage!r}"
)
assert 0 <= predicted_coverage <= 1, (
    f"A share lies from 0 to 1 (half of them is 0.5, not 50); yours is {predicted_coverage}"
)

# %% mistake="in percent" of="predict-coverage" says="A share lies from 0 to 1"
predicted_coverage = 95

# %% mistake="left open" of="predict-coverage" says="Write your prediction down first"
predicted_coverage = None

# %% mistake="in words" of="predict-coverage" says="A prediction is a number"
predicted_coverage = "95%"

# %% alternative="below the name" of="predict-coverage"
predicted_coverage = 1 - 0.9**20

# %% alternative="computed, so a number of NumPy's" of="predict-coverage"
predicted_coverage = stats.binom.cdf(19, 20, 0.9)

# %% [markdown]
# **Exercise.** Write `bootstrap_interval(scores, rng, level=0.95, resamples=1000)`. `scores` is an array `(n,)`, $n \ge 1$. Draw `resamples` samples of $n$ scores each, with replacement, using `rng` (a `np.random.Generator`) and no other source of randomness; take the mean of each; return the pair `(low, high)` of their quantiles at `(1 - level) / 2` and `(1 + level) / 2` (`np.quantile`, its default method). `scores` is not changed. No scores at all: `ValueError`.
#
# For `scores = np.array([0.0, 1.0])` the means are 0, ½ and 1 with probabilities ¼, ½, ¼; so `level=0.6` gives `(0, 1)` and `level=0.4` gives `(0.5, 0.5)`. About 5 lines; without a Python loop over resamples the experiments below stay quick.
#
# <details><summary>Hint 1</summary>One array of shape <code>(resamples, n)</code> holds all resamples. Over which axis is the mean?</details>
# <details><summary>Hint 2</summary><code>rng.integers(n, size=(resamples, n))</code> are indices with replacement; indexing an array with an array of indices gives an array of that shape.</details>
# <details><summary>Hint 3</summary>Index <code>scores</code> with them, take the mean along the last axis, pass those means and the list of the two levels to <code>np.quantile</code>, and unpack.</details>


# %% exercise="bootstrap-interval" difficulty=2 minutes=8
def bootstrap_interval(
    scores: np.ndarray, rng: np.random.Generator, level: float = 0.95, resamples: int = 1000
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of `scores`, (n,)."""
    ### BEGIN SOLUTION
    n = len(scores)
    if n == 0:
        raise ValueError("an interval needs at least one score")
    means = np.asarray(scores)[rng.integers(n, size=(resamples, n))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
    ### END SOLUTION


# %% check="bootstrap-interval" points=2
def interval_of(values: list[float], level: float, seed: int = 0) -> tuple[float, float]:
    low, high = bootstrap_interval(np.array(values), np.random.default_rng(seed), level=level, resamples=4000)
    return float(low), float(high)


assert interval_of([0.25], 0.95) == (0.25, 0.25), (
    f"One score of 0.25 has only one resample, itself: (0.25, 0.25); yours is {interval_of([0.25], 0.95)}"
)
assert interval_of([0.0, 1.0], 0.95) != (0.5, 0.5), "Every resample has the same mean: draw with replacement"
assert interval_of([0.0, 1.0], 0.95) != (0.0, 0.0), (
    "Both bounds are the lowest mean: np.quantile counts from 0 to 1, np.percentile from 0 to 100"
)
assert interval_of([0.0, 0.0, 1.0], 0.95)[0] >= -1e-12, (
    "A mean of resampled scores never leaves the range of the scores: take quantiles of the means, not a "
    "normal approximation, and do not mirror them at the mean of the sample"
)
ten = [float(score) for score in range(10)]
assert interval_of(ten, 0.4) != interval_of(ten, 0.95), (
    "The intervals at level 0.4 and at level 0.95 are the same: use the level you are given"
)
assert interval_of([0.0, 1.0], 0.4) == (0.5, 0.5), (
    "For scores 0, 1 and level 0.4 the interval is (0.5, 0.5): take quantiles of the resampled means, "
    f"not of the scores; yours is {interval_of([0.0, 1.0], 0.4)}"
)
assert interval_of([0.0, 1.0], 0.6) == (0.0, 1.0), (
    "For scores 0, 1 and level 0.6 the interval is (0, 1): leave (1 - level) / 2 in each tail; yours is "
    f"{interval_of([0.0, 1.0], 0.6)}"
)
### BEGIN HIDDEN TESTS
for hidden_values in ([3.0, 3.0, 3.0], [-1.5], [1, 1]):
    assert interval_of(hidden_values, 0.9) == (hidden_values[0], hidden_values[0]), (
        f"Equal scores {hidden_values} have one possible mean, so the interval is that mean twice"
    )
# Means of three scores 0, 0, 3 are 0, 1, 2, 3 with probabilities 8, 12, 6, 1 of 27: the 0.1 and 0.9 quantiles are 0 and 2.
assert interval_of([0.0, 0.0, 3.0], 0.8) == (0.0, 2.0), (
    f"For scores 0, 0, 3 and level 0.8 the interval is (0, 2); yours is {interval_of([0.0, 0.0, 3.0], 0.8)}"
)
### END HIDDEN TESTS

# %% check="bootstrap-interval" points=1
sample = np.random.default_rng(1).normal(size=31)
kept = sample.copy()
np.random.seed(0)
once = bootstrap_interval(sample, np.random.default_rng(5), resamples=200)
np.random.seed(1)
again = bootstrap_interval(sample, np.random.default_rng(5), resamples=200)
assert tuple(once) == tuple(again), "The interval must repeat for equal generators: draw from rng only"
assert tuple(once) != tuple(bootstrap_interval(sample, np.random.default_rng(6), resamples=200)), (
    "Another generator must give other resamples: draw from rng, do not seed inside"
)
assert np.array_equal(sample, kept), "The scores were changed in place: resample a copy"
# Of two means np.quantile takes points between them, so an interval from 0 to 1 is out of reach.
of_two = bootstrap_interval(np.array([0.0, 1.0]), np.random.default_rng(5), level=0.9, resamples=2)
assert tuple(of_two) != (0.0, 1.0), (
    "With resamples=2 the interval lies between two means, and yours is as wide as that of many: draw as many resamples "
    "as you are told"
)
try:
    bootstrap_interval(np.array([]), np.random.default_rng(0))
    refused_empty = False
except ValueError:
    refused_empty = True
assert refused_empty, "An empty array of scores must raise ValueError"

# %% check="bootstrap-interval" points=2
# 1,000 evaluations of 200 normal scores. The true coverage of this procedure is near 94.5%, and the simulation's own
# standard error is 0.7 points, so a right answer lies from 92% to 97% but for one seed in some thousands.
population = np.random.default_rng(11).normal(loc=2.0, size=(1000, 200))
spread = np.random.default_rng(12)
bounds = np.array([bootstrap_interval(row, spread, resamples=300) for row in population])
held = np.mean((bounds[:, 0] <= 2.0) & (bounds[:, 1] >= 2.0))
assert held >= 0.92, (
    f"Coverage {held:.1%}, promised 95%: your interval is too narrow. Each resample has as many scores "
    "as the sample, and the mean goes over the scores of one resample"
)
assert held <= 0.97, (
    f"Coverage {held:.1%}, promised 95%: your interval is too wide. It is an interval of the mean, not of single scores"
)
### BEGIN HIDDEN TESTS
for hidden_size, hidden_level in ((7, 0.9), (40, 0.95), (101, 0.5)):
    values = np.random.default_rng(hidden_size).gamma(2.0, size=hidden_size)
    reference = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=20_000,
        confidence_level=hidden_level,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    got = bootstrap_interval(values, np.random.default_rng(1), level=hidden_level, resamples=20_000)
    # A quantile of 20,000 means has a standard error below 0.03 of their standard deviation; five times that are allowed.
    allowed = 0.15 * values.std() / hidden_size**0.5
    assert np.allclose(got, (reference.low, reference.high), rtol=0, atol=allowed), (
        f"scipy's percentile interval of {hidden_size} scores at level {hidden_level} is {reference}; yours is {got}"
    )
### END HIDDEN TESTS


# %% mistake="resamples without replacement" of="bootstrap-interval" says="draw with replacement"
def bootstrap_interval(scores, rng, level=0.95, resamples=1000):
    if len(scores) == 0:
        raise ValueError("no scores")
    means = rng.permuted(np.tile(scores, (resamples, 1)), axis=1).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return low, high


# %% mistake="the whole error in each tail" of="bootstrap-interval" says="leave (1 - level) / 2 in each tail"
def bootstrap_interval(scores, rng, level=0.95, resamples=1000):
    if len(scores) == 0:
        raise ValueError("no scores")
    means = rng.choice(scores, size=(resamples, len(scores))).mean(axis=1)
    low, high = np.quantile(means, [1 - level, level])
    return min(low, high), max(low, high)


# %% mistake="quantiles of the scores" of="bootstrap-interval" says="not of the scores"
def bootstrap_interval(scores, rng, level=0.95, resamples=1000):
    if len(scores) == 0:
        raise ValueError("no scores")
    low, high = np.quantile(rng.choice(scores, size=(resamples, len(scores))), [(1 - level) / 2, (1 + level) / 2])
    return low, high


# %% mistake="the mean over the wrong axis" of="bootstrap-interval" says="your interval is too narrow"
def bootstrap_interval(scores, rng, level=0.95, resamples=1000):
    if len(scores) == 0:
        raise ValueError("no scores")
    means = rng.choice(scores, size=(resamples, len(scores))).mean(axis=0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return low, high


# %% mistake="the global generator" of="bootstrap-interval" says="draw from rng only"
def bootstrap_interval(scores, rng, level=0.95, resamples=1000):
    if len(scores) == 0:
        raise ValueError("no scores")
    means = np.random.choice(scores, size=(resamples, len(scores))).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return low, high


# %% mistake="mean plus and minus two standard errors" of="bootstrap-interval" says="not a normal approximation"
def bootstrap_interval(scores, rng, level=0.95, resamples=1000):
    if len(scores) == 0:
        raise ValueError("no scores")
    means = rng.choice(scores, size=(resamples, len(scores))).mean(axis=1)
    half = stats.norm.ppf((1 + level) / 2) * means.std()
    return np.mean(scores) - half, np.mean(scores) + half


# %% mistake="mirrors the quantiles, as the basic bootstrap does" of="bootstrap-interval" says="do not mirror them"
def bootstrap_interval(scores, rng, level=0.95, resamples=1000):
    if len(scores) == 0:
        raise ValueError("no scores")
    means = rng.choice(scores, size=(resamples, len(scores))).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return 2 * np.mean(scores) - high, 2 * np.mean(scores) - low


# %% mistake="percentiles in place of quantiles" of="bootstrap-interval" says="np.percentile from 0 to 100"
def bootstrap_interval(scores, rng, level=0.95, resamples=1000):
    if len(scores) == 0:
        raise ValueError("no scores")
    means = rng.choice(scores, size=(resamples, len(scores))).mean(axis=1)
    low, high = np.percentile(means, [(1 - level) / 2, (1 + level) / 2])
    return low, high


# %% mistake="95% whatever the level" of="bootstrap-interval" says="use the level you are given"
def bootstrap_interval(scores, rng, level=0.95, resamples=1000):
    if len(scores) == 0:
        raise ValueError("no scores")
    means = rng.choice(scores, size=(resamples, len(scores))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return low, high


# %% mistake="a thousand resamples, whatever was asked" of="bootstrap-interval" says="as many resamples as you are told"
def bootstrap_interval(scores, rng, level=0.95, resamples=1000):
    if len(scores) == 0:
        raise ValueError("no scores")
    means = rng.choice(scores, size=(1000, len(scores))).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return low, high


# %% alternative="counts instead of indices" of="bootstrap-interval"
def bootstrap_interval(scores, rng, level=0.95, resamples=1000):
    scores = np.asarray(scores, dtype=float)
    if scores.size == 0:
        raise ValueError("no scores")
    counts = rng.multinomial(scores.size, np.full(scores.size, 1 / scores.size), size=resamples)
    means = np.sort((counts * scores).sum(axis=1) / scores.size)
    tail = 50 * (1 - level)
    return float(np.percentile(means, tail)), float(np.percentile(means, 100 - tail))


# %% [markdown]
# ### A hundred evaluations
#
# Your interval, on 100 evaluations of 20 questions each, sorted by accuracy. The true accuracy is 0.9.

# %%
truth = 0.9
rng = np.random.default_rng(seed)
evaluations = (rng.random((100, 20)) < truth).astype(float)
evaluations = evaluations[np.argsort(evaluations.mean(axis=1), kind="stable")]
bounds = np.array([bootstrap_interval(row, rng, resamples=resamples) for row in evaluations]).round(9)
misses = (truth < bounds[:, 0]) | (bounds[:, 1] < truth)

fig, ax = plt.subplots(figsize=(8, 3.8))
for missed, colour in ((False, COLOURS.after), (True, COLOURS.wrong)):
    places = np.flatnonzero(misses == missed)
    ax.vlines(places, *bounds[places].T, color=colour, lw=2)
    ax.plot(places, evaluations[places].mean(axis=1), "o", ms=3.5, color=colour)
ax.axhline(truth, color=COLOURS.truth, lw=1)
direct_label(ax, 101, truth, "true accuracy", COLOURS.truth, offset=(6, -4))
direct_label(ax, 99, 1.0, f"{misses.sum()} of 100 miss the truth", COLOURS.wrong, offset=(-150, 6))
ax.set(xlim=(-2, 101), ylim=(0.45, 1.08), xlabel="evaluation, sorted by accuracy", ylabel="accuracy")
ax.set_title("A nominal 95% interval from 20 questions")
plt.show()

# %% [markdown]
# The misses are not spread evenly over both sides. Most have no length at all: all 20 answers were right, every resample is perfect, and the interval says "100%, no doubt". A resampling method cannot show values that the sample does not contain.

# %% [markdown]
# ### Match
#
# scipy has this interval. From the same generator it draws the same resamples in the same order if you drew indices with `rng.integers`; if you drew otherwise, the two differ by the error of the simulation, which shrinks as $1/\sqrt{R}$.

# %%
latencies = np.random.default_rng(seed).lognormal(sigma=0.5, size=60)
yours = bootstrap_interval(latencies, np.random.default_rng(seed), resamples=5000)
scipys = stats.bootstrap(
    (latencies,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(seed)
).confidence_interval
pd.DataFrame([("yours", *yours), ("scipy", *scipys)], columns=["by", "low", "high"]).style.hide(axis="index")

# %% [markdown]
# ### Coverage against the number of questions
#
# From here on you use the library, here for its speed: it takes many evaluations at once, one a row. Two populations that you will meet: exact match (0 or 1, true mean 0.9), and cost per request, which is skewed (log-normal). Beside the percentile bootstrap stand the *t* interval $\bar s \pm t\, \hat\sigma / \sqrt n$ and what practitioners take instead: Wilson's interval (1927) for shares, and the BCa bootstrap (Efron, 1987), which corrects for bias and skew.


# %%
SIZES = (10, 20, 50, 100, 200)


def bootstrap_intervals(samples: np.ndarray, method: str) -> tuple[np.ndarray, np.ndarray]:
    """scipy's 95% bootstrap interval of each row's mean: samples (m, n) -> two arrays (m,)."""
    generator, found = np.random.default_rng(seed), []
    for rows in np.array_split(samples, 20):  # scipy uses the same resamples for all rows of a call
        found.append(
            stats.bootstrap(
                (rows,), np.mean, axis=-1, n_resamples=resamples, batch=100, method=method, rng=generator
            ).confidence_interval
        )
    return np.concatenate([ci.low for ci in found]), np.concatenate([ci.high for ci in found])


percentile_intervals = functools.partial(bootstrap_intervals, method="percentile")
bca_intervals = functools.partial(bootstrap_intervals, method="BCa")


def t_intervals(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95% t interval of each row's mean."""
    n = samples.shape[1]
    half = stats.t.ppf(0.975, n - 1) * samples.std(axis=1, ddof=1) / n**0.5
    return samples.mean(axis=1) - half, samples.mean(axis=1) + half


def wilson_intervals(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95% interval of each row's share of ones."""
    n = samples.shape[1]
    of_count = [stats.binomtest(k, n).proportion_ci(method="wilson") for k in range(n + 1)]
    chosen = [of_count[k] for k in samples.sum(axis=1).astype(int)]
    return np.array([ci.low for ci in chosen]), np.array([ci.high for ci in chosen])


def coverage(interval_of_rows, samples: np.ndarray, truth: float) -> tuple[float, float, float]:
    """Share of rows whose interval holds the truth, and that share's own 95% Wilson interval."""
    low, high = interval_of_rows(samples)
    # The slack is for a bound that equals the truth up to a rounding error.
    hits = int(((low <= truth + 1e-9) & (truth - 1e-9 <= high)).sum())
    own = stats.binomtest(hits, len(samples)).proportion_ci(method="wilson")
    return hits / len(samples), own.low, own.high


rng = np.random.default_rng(seed)
exact_match = {n: (rng.random((simulations, n)) < 0.9).astype(float) for n in SIZES}
cost = {n: rng.lognormal(sigma=1.0, size=(simulations, n)) for n in SIZES}
panels = {
    "Exact match, true mean 0.9": (
        exact_match,
        0.9,
        {"percentile bootstrap": percentile_intervals, "t": t_intervals, "Wilson": wilson_intervals},
    ),
    "Cost per request, skewed": (
        cost,
        float(np.exp(0.5)),
        {"percentile bootstrap": percentile_intervals, "t": t_intervals, "BCa bootstrap": bca_intervals},
    ),
}
jobs = [(title, method, n) for title, (_, _, methods) in panels.items() for method in methods for n in SIZES]
measured = {}
for title, method, n in tqdm(jobs, desc="coverage"):
    samples, mean, methods = panels[title]
    measured[title, method, n] = coverage(methods[method], samples[n], mean)

# %%
METHOD_COLOURS = {
    "percentile bootstrap": COLOURS.after,
    "t": COLOURS.before,
    "Wilson": COLOURS.library,
    "BCa bootstrap": COLOURS.library,
}
fig, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
for ax, (title, (_, _, methods)) in zip(axes, panels.items(), strict=True):
    for shift, method in zip((0.96, 1.0, 1.04), methods, strict=True):
        value, low, high = np.array([measured[title, method, n] for n in SIZES]).T
        x = np.array(SIZES) * shift  # side by side, so that the bars can be told apart
        ax.plot(x, value, color=METHOD_COLOURS[method], label=method)
        intervals(ax, x, value, low, high, METHOD_COLOURS[method])
    ax.axhline(0.95, color=COLOURS.truth, lw=1, ls="--")
    ax.set(xscale="log", xlabel="questions", title=title)
    ax.set_xticks(SIZES, [str(n) for n in SIZES])
    ax.minorticks_off()
    label_lines(ax)
axes[0].set_ylabel("coverage of a nominal 95% interval")
direct_label(axes[1], 10, 0.95, "promised", COLOURS.truth)
plt.show()

pd.DataFrame(
    [
        {"population": title, "method": method, "questions": n, "coverage": measured[title, method, n][0]}
        for title, method, n in measured
    ]
).pivot(index=["population", "method"], columns="questions", values="coverage").style.format("{:.1%}")

# %% [markdown]
# On shares near 1, neither the bootstrap nor the *t* interval holds its promise for 10 or 20 questions: with 10, the bootstrap holds the truth in {{coverage_ten}} of evaluations. Wilson's interval stays close ({{coverage_wilson}} with 20), because it asks which true shares could have produced the sample rather than what the sample itself contains. The curves on the left are not smooth, and that is no noise: $n$ questions have only $n + 1$ outcomes (Brown, Cai & DasGupta, 2001). For the skewed cost all three fall short at every size shown, BCa included: the rare expensive request that moves the mean is mostly not in the sample. What the figure does not show is questions that come in groups (several about one document): then the *group* is what you resample, and $n$ counts groups.

# %%
small = measured["Exact match, true mean 0.9", "percentile bootstrap", 20]
compare([("coverage, 20 questions, 90% right", predicted_coverage, small[0])], format=".1%")


def your_intervals(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Your `bootstrap_interval` of each row."""
    generator = np.random.default_rng(seed)
    pairs = np.array([bootstrap_interval(row, generator, resamples=400) for row in samples])
    return pairs[:, 0], pairs[:, 1]


many = (np.random.default_rng(seed + 1).random((2 * simulations, 200)) < 0.8).astype(float)
large = coverage(your_intervals, many, 0.8)
ten = measured["Exact match, true mean 0.9", "percentile bootstrap", 10]
wilson = measured["Exact match, true mean 0.9", "Wilson", 20]
for name, (value, low, high), label in (
    ("coverage", large, "coverage of your 95% interval: 200 questions, 80% right"),
    ("coverage_small", small, "coverage of the percentile bootstrap: 20 questions, 90% right"),
    ("coverage_ten", ten, "coverage of the percentile bootstrap: 10 questions, 90% right"),
    ("coverage_wilson", wilson, "coverage of Wilson's interval: 20 questions, 90% right"),
):
    card.record(name, value, low=low, high=high, format=".1%", label=label)

# %% [markdown]
# ## Two systems, the same questions
#
# Now compare two systems, A and B. If both answer the *same* $n$ questions, you have pairs $(a_i, b_i)$ and the differences $d_i = b_i - a_i$. Some questions are hard for everybody; in the difference that cancels: $\operatorname{Var}(\bar b - \bar a) = \frac 1n (\sigma_a^2 + \sigma_b^2 - 2\sigma_{ab})$. Whoever computes an interval for A, another for B, and looks whether they overlap throws the covariance $\sigma_{ab}$ away.
#
# The next cell reads per-question scores in the format that [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness) logs: JSON lines with `doc_id` and the metric. By default it first writes two such files, for two simulated systems that agree on most questions.


# %%
def read_scores(path: str | Path, metric: str) -> pd.Series:
    """Per-question scores, indexed by question, of a `samples_*.jsonl` file."""
    rows = pd.DataFrame([json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()])
    if "doc_id" not in rows or metric not in rows:
        raise ValueError(
            f"{path} has no doc_id or no {metric!r}; it has: {', '.join(rows)} (choose with -p metric NAME)"
        )
    if rows["doc_id"].duplicated().any():
        raise ValueError(f"{path} holds a question more than once (several filters?): keep the lines of one filter")
    return rows.set_index("doc_id")[metric].astype(float)


def write_simulated(folder: Path, rng: np.random.Generator, questions: int = 300) -> list[Path]:
    """Two systems: both right on 76% of questions, only A on 4%, only B on 9%, neither on 11%."""
    outcome = rng.choice(4, size=questions, p=[0.76, 0.04, 0.09, 0.11])
    paths = [folder / "a.jsonl", folder / "b.jsonl"]
    for path, right in zip(paths, ((0, 1), (0, 2)), strict=True):
        lines = [json.dumps({"doc_id": i, "acc": float(kind in right)}) for i, kind in enumerate(outcome.tolist())]
        path.write_text("\n".join(lines), encoding="utf-8")
    return paths


def load_pair(file_a: str, file_b: str, metric: str) -> pd.DataFrame:
    """The scores of two systems on the same questions: a row a question, columns a and b."""
    if bool(file_a) != bool(file_b):
        raise ValueError("pass both scores_a and scores_b, or neither")
    with tempfile.TemporaryDirectory() as folder:
        files = (file_a, file_b) if file_a else write_simulated(Path(folder), np.random.default_rng(seed))
        a, b = (read_scores(file, metric) for file in files)
    if set(a.index) != set(b.index):
        raise ValueError(
            f"the files share {len(a.index.intersection(b.index))} of {len(a)} and {len(b)} questions: a pair needs the same ones"
        )
    if (a == b).all():
        raise ValueError("the two files agree on every question: there is no difference to compare")
    return pd.DataFrame({"a": a, "b": b})


pair = load_pair(scores_a, scores_b, metric)
a, b = pair["a"].to_numpy(), pair["b"].to_numpy()
print(f"{len(pair)} questions: A {a.mean():.1%}, B {b.mean():.1%}, difference {100 * (b - a).mean():+.1f} points")
pd.crosstab(
    pair["a"].gt(0.5).map({True: "A right", False: "A wrong"}),
    pair["b"].gt(0.5).map({True: "B right", False: "B wrong"}),
    rownames=[""],
    colnames=[""],
)

# %% [markdown]
# Suppose it made no difference which system gave which of the two answers. (For scores of 0 and 1 this says no more than that A and B are equally accurate.) Then each difference $d_i$ could as well have been $-d_i$: swap the two answers and nobody could tell. So flip a fair coin for **every question**, and see how often the mean of the flipped differences is at least as far from 0 as the one you measured. That share is the p-value of the paired permutation test.
#
# **Exercise.** Write `paired_p_value(a, b, rng, permutations=2000)`. `a` and `b` are `(n,)`, scores of the same questions. With $s_{ji} \in \{-1, +1\}$ drawn by `rng`, one for each of the `permutations` rows $j$ and each question $i$, return
#
# $$p = \frac{1 + \#\{j : |\frac1n \sum_i s_{ji} d_i| \ge |\bar d| - 10^{-12}\}}{1 + \text{permutations}} .$$
#
# The two 1s count the observed data as one of the permutations, so $p$ is never 0 (Phipson & Smyth, 2010); the $10^{-12}$ keeps ties that differ by rounding. Equal systems, `a == b`, give exactly 1. `a = [0, 0, 0, 0]`, `b = [1, 1, 1, 1]` gives about $2/16 = 0.125$. About 5 lines.
#
# <details><summary>Hint 1</summary>How many coins do you need in all, and in which shape? "At least as far from 0" looks in both directions.</details>
# <details><summary>Hint 2</summary><code>rng.choice([-1, 1], size=…)</code> or <code>2 * rng.integers(2, size=…) - 1</code>; a matrix product with the differences gives every sum at once.</details>
# <details><summary>Hint 3</summary>With signs of shape <code>(permutations, n)</code>: <code>flipped = signs @ d / n</code>. Count where <code>abs(flipped)</code> is at least <code>abs(d.mean()) - 1e-12</code>, then add 1 above and below.</details>


# %% exercise="paired-test" difficulty=3 minutes=9
def paired_p_value(a: np.ndarray, b: np.ndarray, rng: np.random.Generator, permutations: int = 2000) -> float:
    """Return the two-sided p-value of the paired permutation test for equal means; a and b are (n,)."""
    ### BEGIN SOLUTION
    difference = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    coins = 2.0 * rng.integers(2, size=(permutations, difference.size)) - 1.0
    extreme = np.abs(coins @ difference / difference.size) >= abs(difference.mean()) - 1e-12
    return float((1 + extreme.sum()) / (1 + permutations))
    ### END SOLUTION


# %% check="paired-test" points=1
equal = paired_p_value(np.ones(40), np.ones(40), np.random.default_rng(0))
assert equal <= 1, (
    f"Equal systems give p = 1, and yours is {equal}: 1 is added above and below, and the absolute value looks in both "
    "directions already, so nothing is doubled"
)
assert equal == 1, (
    f"Equal systems give p = 1, and yours is {equal}: count ties, permutations at least as far from 0 (>=)"
)
tiny = paired_p_value(np.zeros(40), np.ones(40), np.random.default_rng(0), permutations=999)
assert tiny > 0, "p can never be 0: the observed data count as one of the permutations, so add 1 above and below"
assert abs(tiny - 1 / 1000) < 1e-9, (
    "40 wins in 40 questions are more extreme than any of 999 permutations, so p = 1/1000; yours is "
    f"{tiny}: flip one coin per question"
)
### BEGIN HIDDEN TESTS
assert paired_p_value(np.array([0.3]), np.array([0.9]), np.random.default_rng(3)) == 1, (
    "With a single question both flips are as extreme as the data: p = 1"
)
assert paired_p_value(np.zeros(3), np.zeros(3), np.random.default_rng(3), permutations=1) == 1, (
    "Equal systems give p = 1 with one permutation too"
)
### END HIDDEN TESTS


# %% check="paired-test" points=2
# The exact p-value goes through all 2**n flips. With 6,000 permutations the standard error is at most 0.0065; allowed is 0.03.
def exact_p_value(d: np.ndarray) -> float:
    flips = np.array(list(itertools.product((-1, 1), repeat=len(d))))
    return float(np.mean(np.abs(flips @ d) >= abs(d.sum()) - 1e-9))


hard = np.array([0.0, 0.1, 0.2, 0.5, 0.6, 0.7, 0.8, 0.9])
steady = paired_p_value(hard, hard + 0.05, np.random.default_rng(2), permutations=6000)
assert abs(steady - exact_p_value(np.full(8, 0.05))) < 0.03, (
    f"B is 0.05 better on each of 8 questions, so p = 2/256; yours is {steady:.3f}: keep each question's "
    "two scores together as a pair"
)
assert paired_p_value(hard + 0.05, hard, np.random.default_rng(2), permutations=6000) < 0.04, (
    "Swapping A and B must not change the verdict: make the test two-sided"
)
four = paired_p_value(np.zeros(4), np.ones(4), np.random.default_rng(1), permutations=6000)
assert abs(four - 0.125) < 0.03, (
    f"Four wins in four questions give p = 2/16; yours is {four:.3f}: a sign is -1 or +1 (not 0 or 1), each as likely, and "
    "it multiplies the difference as it was measured, not a centred one"
)
# Each of these p-values is (1 + k) / 51 with k binomial; two are equal with probability 0.12, all eight by chance never.
several = {paired_p_value(np.zeros(4), np.ones(4), np.random.default_rng(n), permutations=50) for n in range(8)}
assert len(several) > 1, "Eight generators give one p-value: draw the signs from rng, do not seed inside"
### BEGIN HIDDEN TESTS
for hidden_seed, hidden_n in ((1, 2), (2, 5), (3, 9), (4, 12)):
    source = np.random.default_rng(hidden_seed)
    one, two = source.normal(size=hidden_n), source.normal(loc=0.5, size=hidden_n)
    binary_one, binary_two = (
        (source.random(hidden_n) < 0.4).astype(float),
        (source.random(hidden_n) < 0.8).astype(float),
    )
    for left, right in ((one, two), (binary_one, binary_two)):
        kept = left.copy(), right.copy()
        got, reference = (
            paired_p_value(left, right, np.random.default_rng(hidden_seed), permutations=6000),
            exact_p_value(right - left),
        )
        assert abs(got - reference) < 0.03, (
            f"The exact p-value of {hidden_n} pairs is {reference:.3f}; yours is {got:.3f}"
        )
        assert np.array_equal([left, right], kept), "The scores were changed in place"
# These differences tie where 0.1 + 0.2 meets 0.3, which floats get wrong: without the 1e-12, p is 0.5 in place of 0.625.
rounded = paired_p_value(np.zeros(4), np.array([0.1, 0.2, -0.3, 0.6]), np.random.default_rng(6), permutations=6000)
assert abs(rounded - 0.625) < 0.03, (
    f"The exact p-value of the differences 0.1, 0.2, -0.3, 0.6 is 0.625; yours is {rounded:.3f}: ties that differ by rounding "
    "count, so allow 1e-12"
)
assert paired_p_value(one, two, np.random.default_rng(5), 50) == paired_p_value(
    one, two, np.random.default_rng(5), 50
), "Equal generators must give equal p-values: draw from rng only"
### END HIDDEN TESTS


# %% mistake="shuffles both systems' scores together" of="paired-test" says="keep each question's two scores together as a pair"
def paired_p_value(a, b, rng, permutations=2000):
    pooled, n = np.concatenate([a, b]), len(a)
    observed, count = abs(np.mean(b) - np.mean(a)), 0
    for _ in range(permutations):
        rng.shuffle(pooled)
        count += abs(pooled[n:].mean() - pooled[:n].mean()) >= observed - 1e-12
    return (1 + count) / (1 + permutations)


# %% mistake="one-sided" of="paired-test" says="make the test two-sided"
def paired_p_value(a, b, rng, permutations=2000):
    d = b - a
    flipped = rng.choice([-1, 1], size=(permutations, len(d))) @ d / len(d)
    return (1 + np.sum(flipped >= d.mean() - 1e-12)) / (1 + permutations)


# %% mistake="a p-value of zero" of="paired-test" says="p can never be 0"
def paired_p_value(a, b, rng, permutations=2000):
    d = b - a
    flipped = rng.choice([-1, 1], size=(permutations, len(d))) @ d / len(d)
    return np.mean(np.abs(flipped) >= abs(d.mean()) - 1e-12)


# %% mistake="does not count ties" of="paired-test" says="count ties"
def paired_p_value(a, b, rng, permutations=2000):
    d = b - a
    flipped = rng.choice([-1, 1], size=(permutations, len(d))) @ d / len(d)
    return (1 + np.sum(np.abs(flipped) > abs(d.mean()) + 1e-12)) / (1 + permutations)


# %% mistake="one coin for all questions" of="paired-test" says="flip one coin per question"
def paired_p_value(a, b, rng, permutations=2000):
    d = b - a
    flipped = (rng.choice([-1, 1], size=(permutations, 1)) * d).mean(axis=1)
    return (1 + np.sum(np.abs(flipped) >= abs(d.mean()) - 1e-12)) / (1 + permutations)


# %% mistake="signs 0 and 1" of="paired-test" says="a sign is -1 or +1 (not 0 or 1)"
def paired_p_value(a, b, rng, permutations=2000):
    d = b - a
    flipped = rng.integers(2, size=(permutations, len(d))) @ d / len(d)
    return (1 + np.sum(np.abs(flipped) >= abs(d.mean()) - 1e-12)) / (1 + permutations)


# %% mistake="doubles one side" of="paired-test" says="nothing is doubled"
def paired_p_value(a, b, rng, permutations=2000):
    d = b - a
    flipped = rng.choice([-1, 1], size=(permutations, len(d))) @ d / len(d)
    return 2 * (1 + np.sum(flipped >= d.mean() - 1e-12)) / (1 + permutations)


# %% mistake="a generator of its own" of="paired-test" says="do not seed inside"
def paired_p_value(a, b, rng, permutations=2000):
    d = b - a
    flipped = np.random.default_rng(0).choice([-1, 1], size=(permutations, len(d))) @ d / len(d)
    return (1 + np.sum(np.abs(flipped) >= abs(d.mean()) - 1e-12)) / (1 + permutations)


# %% mistake="no slack for rounding" of="paired-test" says="ties that differ by rounding count"
def paired_p_value(a, b, rng, permutations=2000):
    d = b - a
    flipped = rng.choice([-1, 1], size=(permutations, len(d))) @ d / len(d)
    return (1 + np.sum(np.abs(flipped) >= abs(d.mean()))) / (1 + permutations)


# %% alternative="swaps the two answers within each pair" of="paired-test"
def paired_p_value(a, b, rng, permutations=2000):
    answers = np.stack([a, b])
    observed, count = abs(answers[1].mean() - answers[0].mean()), 1
    for _ in range(permutations):
        first, second = rng.permuted(answers, axis=0)
        count += bool(abs(second.mean() - first.mean()) >= observed - 1e-12)
    return count / (permutations + 1)


# %% [markdown]
# **Match.** scipy has this test and the unpaired one, and the bootstrap for both designs. With `permutation_type="samples"` it flips within pairs, as you do; with `"independent"` it forgets which two scores belong to one question. For 0/1 scores the paired test is McNemar's (1947): only the questions on which the systems *disagree* count, and each is a coin flip.


# %%
def mean_difference(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean(y, axis=axis) - np.mean(x, axis=axis)


rng = np.random.default_rng(seed)
# The differences are one sample, so your interval applies as it is.
paired_interval = bootstrap_interval(b - a, rng, resamples=10_000)
unpaired = stats.bootstrap(
    (a, b), mean_difference, paired=False, n_resamples=4000, batch=200, method="percentile", rng=rng
).confidence_interval
unpaired_interval = (float(unpaired.low), float(unpaired.high))
your_p = paired_p_value(a, b, rng, permutations=3999)
library_p = {
    kind: stats.permutation_test(
        (a, b), mean_difference, permutation_type=kind, n_resamples=3999, batch=200, rng=rng
    ).pvalue
    for kind in ("samples", "independent")
}
only_a, only_b = int(((a > 0.5) & (b <= 0.5)).sum()), int(((a <= 0.5) & (b > 0.5)).sum())
pd.DataFrame(
    [
        ("paired", "yours", your_p, paired_interval),
        ("paired", "library: scipy, samples", library_p["samples"], None),
        ("paired", "library: McNemar, exact", stats.binomtest(only_b, max(only_a + only_b, 1)).pvalue, None),
        ("unpaired", "library: scipy, independent", library_p["independent"], unpaired_interval),
    ],
    columns=["design", "by", "p-value", "95% interval of the difference"],
).style.format(
    {
        "p-value": "{:.4f}",
        "95% interval of the difference": lambda ci: f"{100 * ci[0]:+.1f} to {100 * ci[1]:+.1f} points" if ci else "",
    }
).hide(axis="index")

# %%
pairing_gain = (unpaired_interval[1] - unpaired_interval[0]) / (paired_interval[1] - paired_interval[0])
card.record(
    "pairing_gain",
    pairing_gain,
    format=".2f",
    tolerance=0.1,
    label="width of the interval of the difference, unpaired ÷ paired",
)
print(
    f"the unpaired interval is {pairing_gain:.2f} times as wide; to match the paired one it needs {pairing_gain**2:.1f} times the questions"
)

# %% [markdown]
# ## How many questions?
#
# **Power** is the probability that the test finds a difference that is there. For 0/1 scores it depends on three shares: both right, only A right ($p_{10}$), only B right ($p_{01}$). The function below simulates evaluations from such shares and counts those with $p < 0.05$: McNemar's exact test for the paired design, the two-sample z test for the unpaired one, in which each system gets $n$ questions of its own.


# %%
class Shares(NamedTuple):
    """What share of all questions both systems, only A, and only B answer correctly."""

    both: float
    only_a: float
    only_b: float


def simulate(
    shares: Shares, paired: bool, questions: int, rng: np.random.Generator, evaluations: int
) -> tuple[np.ndarray, np.ndarray]:
    """Simulate evaluations; return each one's measured gain of B over A, and its p-value: two arrays (evaluations,)."""
    neither = 1 - sum(shares)
    if paired:
        _, a_wins, b_wins, _ = rng.multinomial(questions, [*shares, neither], size=evaluations).T
        p = np.minimum(1, 2 * stats.binom.cdf(np.minimum(a_wins, b_wins), a_wins + b_wins, 0.5))
        return (b_wins - a_wins) / questions, p
    right_a = rng.binomial(questions, shares.both + shares.only_a, size=evaluations) / questions
    right_b = rng.binomial(questions, shares.both + shares.only_b, size=evaluations) / questions
    pooled = (right_a + right_b) / 2
    error = np.sqrt(np.maximum(2 * pooled * (1 - pooled) / questions, 1e-12))
    return right_b - right_a, 2 * stats.norm.sf(np.abs(right_b - right_a) / error)


def power(shares: Shares, paired: bool, questions: int, rng: np.random.Generator, evaluations: int = 20_000) -> float:
    """The share of simulated evaluations that find the difference at the 5% level."""
    return float(np.mean(simulate(shares, paired, questions, rng, evaluations)[1] < 0.05))


five_points = Shares(both=0.76, only_a=0.04, only_b=0.09)
rng = np.random.default_rng(seed)
grid = np.unique(np.geomspace(50, 2000, 40).astype(int))
curves = {paired: np.array([power(five_points, paired, n, rng) for n in grid]) for paired in (True, False)}
# Where a curve first stays above 80%: the last grid point below it, and the next, joined by a straight line.
needed = {}
for paired, curve in curves.items():
    last = int(np.flatnonzero(curve < 0.8)[-1])
    needed[paired] = round(float(np.interp(0.8, curve[last : last + 2], grid[last : last + 2])))

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(1, 2))
for place, ((low, high), colour, name) in enumerate(
    ((unpaired_interval, COLOURS.before, "unpaired"), (paired_interval, COLOURS.after, "paired"))
):
    left.plot([100 * low, 100 * high], [place, place], color=colour, lw=5)
    left.plot(100 * (b - a).mean(), place, "o", color=colour, ms=9)
    direct_label(left, 100 * low, place, name, colour, offset=(0, 10))
left.axvline(0, color=COLOURS.truth, lw=1)
left.set(
    ylim=(-0.6, 1.7), yticks=[], xlabel="gain of B over A / points", title=f"One evaluation, {len(pair)} questions"
)
for paired, colour, name in ((True, COLOURS.after, "paired"), (False, COLOURS.before, "unpaired")):
    right.plot(grid, curves[paired], color=colour, label=name)
    right.plot([needed[paired]] * 2, [0, 0.8], color=colour, lw=1, ls=":")
    direct_label(right, needed[paired], 0.03, f"{needed[paired]:,}", colour, offset=(4, 0))
right.axhline(0.8, color=COLOURS.truth, lw=1, ls="--")
right.set(
    xscale="log",
    ylim=(0, 1.02),
    xlabel="questions a system answers",
    ylabel="power",
    title="Finding a gain of 5 points, 80% against 85%",
)
right.set_xticks([50, 100, 200, 500, 1000, 2000], ["50", "100", "200", "500", "1,000", "2,000"])
right.minorticks_off()
label_lines(right)
plt.show()

card.record(
    "questions_paired",
    needed[True],
    format=",d",
    tolerance=20,
    label="questions for 80% power to see 5 points, paired",
)
card.record(
    "questions_unpaired",
    needed[False],
    format=",d",
    tolerance=40,
    label="questions a system for 80% power to see 5 points, unpaired",
)

# %% [markdown]
# Paired, {{questions_paired}} questions find a 5-point gain in four evaluations of five; unpaired, each system needs {{questions_unpaired}}. The paired number follows from how often the systems *disagree*, not from how good they are: with $\delta = p_{01} - p_{10}$,
#
# $$n_{\text{paired}} \approx (z_{0.975} + z_{0.8})^2\; \frac{p_{01} + p_{10} - \delta^2}{\delta^2}, \qquad (z_{0.975} + z_{0.8})^2 \approx 7.85 .$$
#
# For these shares that is 400; McNemar's exact test needs a little more, since it keeps its promise by being cautious where few questions disagree. (For the same reason the paired curve starts as the lower one.)
#
# Two checkpoints of one model disagree on few questions; two unrelated models on many. The figure holds for independent questions and for these shares; it does not show what a noisy judge adds. (Each point is a share of 20,000 simulated evaluations; its error is less than the width of the line.)


# %%
class Plan(NamedTuple):
    """A plan for an evaluation: the design, and how many questions each system answers."""

    paired: bool
    questions: int


def price(plan: Plan) -> float:
    """What a plan costs in dollars: two answers a question, and one label (paired) or two (unpaired)."""
    return plan.questions * (2 * 0.05 + (1 if plan.paired else 2) * 0.40)


pilot = Shares(both=0.755, only_a=0.045, only_b=0.075)

# %% [markdown]
# **Exercise (decide).** Your team wants to replace A by B and must know whether B gains **3 points**. A pilot suggests the shares `Shares(both=0.755, only_a=0.045, only_b=0.075)`. An answer of one system costs 0.05 dollars; the reference label of a question, written by an expert, costs 0.40 dollars. Choose `plan = Plan(paired=…, questions=…)`, where `questions` is how many *each* system answers:
#
# - it finds the gain with a power of at least 80% at the 5% level (a simulated power of 79.5% passes, to allow for the simulation's error);
# - it costs at most **600 dollars**. Unpaired, the two systems need different questions, hence twice the labels.
#
# `power` and `price` above are yours to use. 1 line.
#
# <details><summary>Hint 1</summary>What does one more question cost in each design? How many does the budget buy?</details>
# <details><summary>Hint 2</summary>Put the pilot's shares in the formula above for a first number; the exact test needs a little more.</details>
# <details><summary>Hint 3</summary>A paired question costs 0.50 dollars, so 600 buy 1,200. Try <code>power(pilot, True, n, np.random.default_rng(0))</code> for n from 1,000 to 1,200.</details>

# %% exercise="plan-an-evaluation" difficulty=2 minutes=8
plan = None
### BEGIN SOLUTION
plan = Plan(paired=True, questions=1150)
### END SOLUTION

# %% check="plan-an-evaluation" points=2
assert isinstance(plan, Plan), f"Set plan = Plan(paired=True or False, questions=a whole number); yours is {plan!r}"
assert isinstance(plan.paired, (bool, np.bool_)), f"paired is True or False; yours is {plan.paired!r}"
assert isinstance(plan.questions, (int, np.integer)), f"questions is a whole number; yours is {plan.questions!r}"
assert plan.questions > 0, f"An evaluation needs questions; yours has {plan.questions}"
plan_price = plan.questions * (0.5 if plan.paired else 0.9)
assert plan_price <= 600, (
    f"The plan costs {plan_price:,.0f} dollars, over the budget of 600: compare what a question costs in each design"
)
plan_power = power(
    Shares(0.755, 0.045, 0.075), plan.paired, plan.questions, np.random.default_rng(7), evaluations=50_000
)
assert plan_power >= 0.795, (
    f"The plan finds the gain in {plan_power:.1%} of evaluations, not in 80%: it has too little power. (If your own "
    "simulation said more: its power has an error too, and the largest of many tries flatters. Leave a margin)"
)
### BEGIN HIDDEN TESTS
hidden_power = np.mean(
    [
        power(Shares(0.755, 0.045, 0.075), plan.paired, plan.questions, np.random.default_rng(hidden))
        for hidden in range(5)
    ]
)
assert hidden_power >= 0.795, f"The plan finds the gain in {hidden_power:.1%} of evaluations, not in 80%"
### END HIDDEN TESTS

# %% mistake="a large unpaired evaluation" of="plan-an-evaluation" says="over the budget"
plan = Plan(paired=False, questions=2700)

# %% mistake="the whole budget, unpaired" of="plan-an-evaluation" says="too little power"
plan = Plan(paired=False, questions=660)

# %% mistake="the number of questions for a gain of 5 points" of="plan-an-evaluation" says="too little power"
plan = Plan(paired=True, questions=430)

# %% mistake="half the detectable gain is enough" of="plan-an-evaluation" says="too little power"
plan = Plan(paired=True, questions=600)

# %% alternative="what the budget buys" of="plan-an-evaluation"
plan = Plan(True, int(600 / price(Plan(True, 1))))

# %% alternative="the middle of a NumPy range" of="plan-an-evaluation"
plan = Plan(True, np.arange(1100, 1201)[50])

# %% [markdown]
# ### What an underpowered evaluation does to you
#
# Here is your plan beside a quick look at 100 questions, and beside an unpaired evaluation of the same price. Look at the last column: among the evaluations that *did* find a difference, by how much does the measured gain exceed the true 3 points?

# %%
rows = []
for name, candidate in (
    ("your plan", plan),
    ("a quick look", Plan(True, 100)),
    ("same budget, unpaired", Plan(False, 666)),
):
    gain, p = simulate(pilot, candidate.paired, candidate.questions, np.random.default_rng(seed), evaluations=50_000)
    found = (p < 0.05) & (gain > 0)
    rows.append(
        {
            "": name,
            "questions": candidate.questions,
            "price / dollars": price(candidate),
            "finds the gain": found.mean(),
            "says A is better": ((p < 0.05) & (gain < 0)).mean(),
            "measured ÷ true gain, when found": gain[found].mean() / (pilot.only_b - pilot.only_a),
        }
    )
consequences = pd.DataFrame(rows)
exaggeration = rows[1]["measured ÷ true gain, when found"]
card.record(
    "exaggeration",
    exaggeration,
    format=".1f",
    tolerance=0.1,
    label="measured ÷ true gain when 100 paired questions find it",
)
consequences.style.format(
    {
        "questions": "{:,}",
        "price / dollars": "{:,.0f}",
        "finds the gain": "{:.1%}",
        "says A is better": "{:.2%}",
        "measured ÷ true gain, when found": "{:.2f}",
    }
).hide(axis="index")

# %% [markdown]
# A quick look at 100 questions rarely finds the gain, and when it does, the gain it reports is {{exaggeration}} times the true one: only lucky draws pass the threshold. This is the *exaggeration* of Gelman and Carlin (2014), and it is why improvements shrink when somebody measures them again.

# %% [markdown]
# ## With a real model
#
# Nothing above depends on who produced the scores. Log per-question scores of any two Hub models on one task with lm-evaluation-harness (on a GPU; `--batch_size auto` fills it):
#
# ```
# lm_eval --model hf --model_args pretrained=Qwen/Qwen2.5-0.5B --tasks arc_easy --batch_size auto --output_path runs/a --log_samples
# lm_eval --model hf --model_args pretrained=Qwen/Qwen2.5-1.5B --tasks arc_easy --batch_size auto --output_path runs/b --log_samples
# course run 1.1 -p scores_a "$(ls $PWD/runs/a/*/samples_*.jsonl)" -p scores_b "$(ls $PWD/runs/b/*/samples_*.jsonl)" -p metric acc
# ```
#
# The section *Two systems, the same questions* then runs on those scores: the same code, `read_scores`, has just read the two simulated files. Expect three changes. Real questions come in groups (topics, documents): resample groups. Generated answers vary between runs even at temperature 0 on a GPU, because batches change the order of additions: repeat and treat the repetition as part of the noise. And a graded metric in place of 0 and 1 keeps the permutation test as it is, but not McNemar's: that row of the table, and the crosstab, then count a score above 0.5 as right. Lesson 2.1 uses these tools on a model that you finetune, the shipped one or a Hub id.

# %% [markdown]
# ## Result card

# %%
card.show()

# %% [markdown]
# ## Say it in an interview
#
# <details><summary>B scores 84% and A 82% on the same 200 questions. Is B better?</summary>
#
# The means alone do not say. Ask on how many questions they disagree. If on 10 (7 for B, 3 for A), McNemar's exact test gives p = 0.34; if on 4, all won by B, p = 0.125. 4 against 0 is the clearest result that a net gain of 4 questions can be, so no 2-point gain on 200 questions reaches 5%. Then name the number of questions that would settle it, from the rate of disagreement.
#
# </details>
#
# <details><summary>You set all seeds, and two runs still differ. Where do you look?</summary>
#
# First find out whether they differ from the first step or later: hash the initial weights, the first batch, the first loss. From the start: a generator that is not seeded (a library's own, a data-loader worker) or one whose users changed, such as an evaluation that draws from the training stream. Later: the order of additions, so nondeterministic kernels, atomics, the number of threads, another GPU; turn on deterministic algorithms and see what raises. Equal seeds promise equal draws, not equal sums.
#
# </details>
#
# <details><summary>When does a 95% bootstrap interval not hold the truth 95% of the time?</summary>
#
# When the sample lacks what matters in the population: few questions, a share near 0 or 1 (all right gives an interval of length zero), rare large values such as cost or latency, and questions that come in groups but are resampled one by one. Take Wilson's interval for shares, resample groups, and for heavy tails get more data or report a quantile. Measure the coverage by simulation when in doubt; it takes seconds.
#
# </details>

# %% [markdown]
# ## Read next
#
# - E. B. Wilson, [*Probable Inference, the Law of Succession, and Statistical Inference*](https://doi.org/10.1080/01621459.1927.10502953), 1927.
# - Q. McNemar, [*Note on the sampling error of the difference between correlated proportions or percentages*](https://doi.org/10.1007/BF02295996), 1947.
# - B. Efron, [*Bootstrap Methods: Another Look at the Jackknife*](https://doi.org/10.1214/aos/1176344552), 1979; and [*Better Bootstrap Confidence Intervals*](https://doi.org/10.1080/01621459.1987.10478410), 1987.
# - L. D. Brown, T. T. Cai and A. DasGupta, [*Interval Estimation for a Binomial Proportion*](https://doi.org/10.1214/ss/1009213286), 2001.
# - B. Phipson and G. K. Smyth, [*Permutation P-values Should Never Be Zero*](https://doi.org/10.2202/1544-6115.1585), 2010.
# - A. Gelman and J. Carlin, [*Beyond Power Calculations: Assessing Type S (Sign) and Type M (Magnitude) Errors*](https://doi.org/10.1177/1745691614551642), 2014.
# - D. Card et al., [*With Little Power Comes Great Responsibility*](https://aclanthology.org/2020.emnlp-main.745/), 2020.
# - E. Miller, [*Adding Error Bars to Evals: A Statistical Approach to Language Model Evaluations*](https://arxiv.org/abs/2411.00640), 2024.
