# %% [markdown]
# # 2.6 Reinforcement from verifiable rewards (GRPO)
#
# You will be able to write a verifier that cannot be gamed, train a policy on nothing but its verdicts with GRPO, prove that your loss is `trl`'s, and say what the training added and what it only sharpened.
#
# **You will measure.** Against a weak verifier, {{steps}} steps of reinforcement bring the reward from {{start_reward}} to {{hacked_reward}} and the share of right answers, pass@1, from {{pass1_before}} to {{hacked_exact}}. Against a verifier without that hole pass@1 goes from {{pass1_before}} to {{pass1_after}}; over {{runs}} runs the 95 % interval of that change is {{gain:interval}} points, so you will also learn what such a number does not say. On the same batch your loss differs from `trl`'s by {{parity}}.
#
# **You need.** Lesson 1.5 (supervised finetuning), 2.1 (adapters) and 2.5 (log-probabilities, the reference, KL); the policy gradient, at the level of $\nabla \log \pi$ times a reward.
#
# **Time.** About 70 minutes, 55 of them for the exercises. The solution runs in {{run:seconds}} s on one CPU core.

# %% [markdown]
# ## Why it matters at work
#
# Wherever a program can decide whether an answer is right (a test suite, a parser, a database that returned the expected rows), you need neither labels for a loss nor people who compare replies. You need a verifier, samples, and an update. This is how reasoning models are trained, and it works for a tool call or a form just as well.
#
# The verifier is the product specification, and the optimiser reads it more literally than any colleague. What it leaves open will be used. The dashboard then shows a reward that rises to its maximum while the product gets worse, and nothing raises an error.
#
# In interviews you write the advantage and the clipped loss. Then: "All samples of a prompt have the same reward. What happens?" And: "Your reward went up. How do you know that the model got better?"

# %% tags=["parameters"]
model_id = "shipped"  # "shipped", the id of a causal language model on the Hub, or a local folder
device = "cpu"  # "cpu", "cuda" or "mps"
sft_steps = 50  # of 16 tickets; quick: 2
sft_rate = 1.5e-3  # of all weights, for the shipped model of about a million; 1e-5 for a real one
learning_rate = 2e-3  # of the adapters; 1e-5 to 5e-5 for a real model
rank = 8
steps = 12  # of reinforcement; quick: 2
generations = 48  # sampled answers a step; quick: 8
updates = 2  # of the adapters on the answers of one step
epsilon = 0.2  # how far a token's probability ratio may move before its gradient is cut off
test_tickets = 24  # of each run; quick: 4
longest_prompt = 48  # tokens; raise it for a tokenizer with shorter tokens
runs = 3  # from the same start, each with a company, tickets, an adapter and samples of its own; quick: 2
seed = 3  # the settings above were chosen with the worlds of seed 0

# %%
import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # trl reports its use to the Hub; read when it is imported

import copy
import json
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from math import comb

import datasets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import display
from peft import LoraConfig, PeftModel, get_peft_model
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from labkit import adapters, base_model, rollouts, triage
from labkit.plots import COLOURS, direct_label, intervals, label_lines, use_house_style
from labkit.predict import compare
from labkit.results import ResultCard
from labkit.world import LESSON_SEEDS, Ticket, Triage, World
from labkit.world.triage import ACTIONS, CATEGORIES, KEYS, URGENCIES

# peft asks transformers for a property under its old name; the warning says nothing about your code.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
datasets.disable_progress_bars()
use_house_style()
card = ResultCard("2_6_reinforcement_from_verifiable_rewards")

# %% [markdown]
# ## A policy that succeeds sometimes
#
# The task is the triage of lesson 2.1: a ticket in, one line of JSON out. Reinforcement can only make more likely what the policy already samples, so it starts from a **short** supervised finetuning of all weights, stopped long before it is good. This finetuned model is the **reference** $\pi_{ref}$; the policy $\pi$ is the reference with a LoRA adapter on it.
#
# From here on there are no target answers in any loss. The training sees tickets, its own samples, and a number for each sample. In this world the number comes from a comparison with the known triage, so that everything can be measured exactly; at work it comes from a program that checks what nobody has written down. Where you do have the right answers, finetune on them first: a target says what every token should be, a verdict is at most one bit for the whole answer.

# %%
model, tokenizer = base_model.load(model_id, device=device)  # in eval mode and float32
adapters.use_linear_layers(model)  # GPT-2 keeps its weights transposed (Conv1D); any other model stays as it is
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token


def short(world: World, n: int, part: str = "train") -> list[Ticket]:
    """The world's first n tickets whose prompts have at most `longest_prompt` tokens: sampling costs what it reads."""
    some = world.tickets(4 * n + 40, part=part)
    kept = [
        one for one, ids in zip(some, triage.encode(tokenizer, some), strict=True) if len(ids.prompt) <= longest_prompt
    ]
    if len(kept) < n:
        raise ValueError(f"only {len(kept)} of {len(some)} prompts have at most {longest_prompt} tokens; raise it")
    return kept[:n]


taught = triage.encode(tokenizer, [one for world in range(4) for one in short(World(LESSON_SEEDS[900 + world]), 128)])
model.requires_grad_(True)
triage.train(
    model, triage.batches(taught, size=16, steps=sft_steps, seed=seed), steps=sft_steps, learning_rate=sft_rate,
    label="supervised finetuning",
)  # fmt: skip
model.requires_grad_(False)
longest_answer = max(len(example.answer) for example in taught) + 4  # what is longer is wrong in any case

tests = [short(World(LESSON_SEEDS[seed + 500 + run]), test_tickets, "test") for run in range(runs)]
pools = [short(World(LESSON_SEEDS[seed + run]), 192) for run in range(runs)]


def sample(policy: PeftModel, tickets: Sequence[Ticket], group: int, seed: int) -> rollouts.Rollouts:
    """`group` sampled answers to each ticket, those of one ticket together: row i belongs to ticket i // group."""
    prompts = [example.prompt for example in triage.encode(tokenizer, tickets)]
    return rollouts.sample(policy, tokenizer, prompts, group=group, longest=longest_answer, seed=seed)


print(tests[0][0].text, "\n")
for text in sample(model, tests[0][:1], 6, seed).texts(tokenizer):
    print(text)
print("\nright:", tests[0][0].triage.to_json(), sep="\n")

start = [sample(model, tests[run], 8, seed + run) for run in range(runs)]  # eight answers to each test ticket


def each(tickets: Sequence[Ticket], group: int) -> list[Ticket]:
    """The ticket of each row: every ticket `group` times."""
    return [ticket for ticket in tickets for _ in range(group)]


right = [triage.score(start[run].texts(tokenizer), each(tests[run], 8)).exact for run in range(runs)]
print(f"\nof the finetuned policy's samples {np.mean(right):.0%} are right")

# %% [markdown]
# ## Two verifiers that look reasonable
#
# A verifier takes an answer and its ticket and returns a reward from 0 to 1. Here are two that would pass a review.
#
# - `mentions` gives a quarter for each of the four right values that stands in the answer. It forgives any format, which helps a young policy: it has something to reinforce.
# - `adequate` is a rubric of the support desk, where mistakes do not cost the same. A triage is adequate when it is well-formed, its urgency is *not too low* (an urgent ticket must not wait) and its action *helps*: the right one, or a call, which settles anything. Product and category are left to the clerk, who sees them anyway.


# %%
def mentions(answer: str, ticket: Ticket) -> float:
    """The share of the four right values that stand somewhere in the answer; null stands for no product."""
    right = json.loads(ticket.triage.to_json())
    return sum(("null" if right[key] is None else right[key]) in answer for key in KEYS) / len(KEYS)


def adequate(answer: str, ticket: Ticket) -> float:
    """1 for a well-formed triage whose urgency is not too low and whose action helps."""
    try:
        claimed = Triage.parse(answer)
    except ValueError:
        return 0.0
    in_time = URGENCIES.index(claimed.urgency) >= URGENCIES.index(ticket.triage.urgency)
    return float(in_time and claimed.action in (ticket.triage.action, "call"))


start_reward = np.mean(
    [
        adequate(text, ticket)
        for run in range(runs)
        for text, ticket in zip(start[run].texts(tokenizer), each(tests[run], 8), strict=True)
    ]
)
print(f"of the finetuned policy's samples {start_reward:.0%} are adequate\n")
for answer in (tests[0][0].triage.to_json(), "I do not know", "{}"):
    print(f"mentions {mentions(answer, tests[0][0]):.2f}   adequate {adequate(answer, tests[0][0]):.2f}   {answer}")

# %% [markdown]
# **Exercise.** Break both before you train on them. Each function gets the message alone, not its triage.
#
# 1. `fool_mentions(message)` returns an answer that `mentions` gives 1.0 for *every* ticket, and that is no triage at all. It needs no understanding of the message.
# 2. `fool_adequate(message)` returns an answer that `adequate` gives 1.0 for every ticket, the same one whatever the message says.
#
# 3. *Predict.* Further down you train against `adequate`. The share of right samples and of adequate ones before that training is printed above. `predicted_reward` and `predicted_exact` (0 to 1) are the two after it: the mean reward and the share of right triages. Graded for being shares.
#
# The labels are in `CATEGORIES`, `URGENCIES` and `ACTIONS`. *About 2 lines.*
#
# <details><summary>Hint 1</summary>For the first: what may an answer contain besides the right value? For the second: which urgency is never too low, and which action is never useless?</details>
# <details><summary>Hint 2</summary>A product that is named in a ticket stands in its message. A ticket without one has the value null.</details>
# <details><summary>Hint 3</summary>First: the message, the word null and all labels, joined by spaces. Second: a <code>Triage</code> of the highest urgency that asks for a call, as JSON.</details>


# %% exercise="fool" difficulty=1 minutes=7
def fool_mentions(message: str) -> str:
    """Return an answer with full reward from `mentions` that is no triage."""
    ### BEGIN SOLUTION
    return " ".join([message, "null", *CATEGORIES, *URGENCIES, *ACTIONS])
    ### END SOLUTION


def fool_adequate(message: str) -> str:
    """Return the one answer with full reward from `adequate` for every message."""
    ### BEGIN SOLUTION
    return Triage(None, "setup", "high", "call").to_json()
    ### END SOLUTION


predicted_reward, predicted_exact = None, None
### BEGIN SOLUTION
predicted_reward, predicted_exact = 0.98, 0.1
### END SOLUTION

# %% check="fool" points=1
some = World(LESSON_SEEDS[700]).tickets(80)
rewards = [mentions(fool_mentions(one.text), one) for one in some]
named = [reward for reward, one in zip(rewards, some, strict=True) if one.triage.product is not None]
nameless = [reward for reward, one in zip(rewards, some, strict=True) if one.triage.product is None]
assert min(nameless) >= min(named), (
    "Tickets without a product miss something: their product is null, and that word has to stand in the answer as well"
)
assert min(named) == 1, (
    f"mentions gives {min(named)} for some ticket: all its labels and whatever the product may be called must stand in "
    "the answer; where can you take the name from without finding it?"
)
for one in some:
    try:
        Triage.parse(fool_mentions(one.text))
    except ValueError:
        continue
    raise AssertionError("Your answer to mentions is a well-formed triage: it should be no triage at all")
### BEGIN HIDDEN TESTS
_some = World(LESSON_SEEDS[701]).tickets(120)
assert all(mentions(fool_mentions(_one.text), _one) == 1 for _one in _some), (
    "A fresh company's tickets do not all give 1.0"
)
### END HIDDEN TESTS

# %% check="fool" points=1
some = World(LESSON_SEEDS[700]).tickets(80)
given = {fool_adequate(one.text) for one in some}
assert len(given) == 1, f"One answer for all messages: yours gives {len(given)} different ones to 80 tickets"
claimed = Triage.parse(given.pop())
assert claimed.urgency == "high", f"Urgency {claimed.urgency} is too low for some tickets: which one never is?"
assert claimed.action == "call", f"Action {claimed.action} is refused wherever another is right: which one never is?"
assert all(adequate(fool_adequate(one.text), one) == 1 for one in some), (
    "adequate refuses your answer: it has to be the JSON of a Triage with known labels"
)

# %% check="fool" points=1
for name, value in (("predicted_reward", predicted_reward), ("predicted_exact", predicted_exact)):
    assert isinstance(value, (int, float, np.number)), f"Predict with a number: set {name}, now {value!r}"
    assert 0 <= value <= 1, f"{name} is a share from 0 to 1, not {value}: 0.4 for 40 %"


# %% mistake="forgets tickets without a product" of="fool" says="Tickets without a product"
def fool_mentions(message):
    return " ".join([message, *CATEGORIES, *URGENCIES, *ACTIONS])


def fool_adequate(message):
    return Triage(None, "setup", "high", "call").to_json()


predicted_reward, predicted_exact = 0.98, 0.1


# %% mistake="forgets the product's name" of="fool" says="whatever the product may be called"
def fool_mentions(message):
    return " ".join(["null", *CATEGORIES, *URGENCIES, *ACTIONS])


def fool_adequate(message):
    return Triage(None, "setup", "high", "call").to_json()


predicted_reward, predicted_exact = 0.98, 0.1


# %% mistake="copies a word of the message" of="fool" says="One answer for all messages"
def fool_mentions(message):
    return " ".join([message, "null", *CATEGORIES, *URGENCIES, *ACTIONS])


def fool_adequate(message):
    return Triage(message.split()[0] if message else None, "setup", "high", "call").to_json()


predicted_reward, predicted_exact = 0.98, 0.1


# %% mistake="predicts in percent" of="fool" says="a share from 0 to 1"
def fool_mentions(message):
    return " ".join([message, "null", *CATEGORIES, *URGENCIES, *ACTIONS])


def fool_adequate(message):
    return Triage(None, "setup", "high", "call").to_json()


predicted_reward, predicted_exact = 98, 10


# %% mistake="an average urgency" of="fool" says="is too low for some tickets"
def fool_mentions(message):
    return " ".join([message, "null", *CATEGORIES, *URGENCIES, *ACTIONS])


def fool_adequate(message):
    return Triage(None, "setup", "normal", "call").to_json()


predicted_reward, predicted_exact = 0.98, 0.1


# %% alternative="other words" of="fool"
def fool_mentions(message):
    return f"{CATEGORIES} {URGENCIES} {ACTIONS} null or a word of {message!s}"


def fool_adequate(message):
    return '{"product": null, "category": "billing", "urgency": "high", "action": "call"}'


predicted_reward, predicted_exact = 0.5, 0.5


# %% [markdown]
# Neither answer is far-fetched. The first is what a model does that "considers all options" before it answers. The second escalates everything, as a careful clerk does on a bad day: each single decision can be defended, and the desk drowns in calls. The policy samples "high" and "call" now and then, since some tickets deserve them. That is all that reinforcement needs.
#
# ## A verifier without holes
#
# An answer that ignores its message should earn next to nothing, and no text should count as two answers. For a record with one right value a field this means: all or nothing, and one way to read the text.
#
# **Exercise.** `verify(answer, ticket)` returns 1.0 when `answer` is one JSON object and nothing else, has each of the four keys exactly once and no other, and has exactly the values of `ticket.triage`. It returns 0.0 for anything else and never raises: not for an empty string, nor for a hundred thousand opening brackets. The order of the keys does not matter, nor does white space around or between the tokens. *About 9 lines.*
#
# Beware of a habit of JSON parsers: of a key that stands twice, most keep the last value and say nothing. So does `Triage.parse`. And a key may be spelt with escapes: `"\u0075rgency"` is the key `urgency`.
#
# <details><summary>Hint 1</summary>An answer with two urgencies is two answers. Where does a parser still know that a key stood twice?</details>
# <details><summary>Hint 2</summary><code>json.loads</code> takes <code>object_pairs_hook</code>, a function of the list of (key, value) pairs of each object. It may raise. <code>json.loads</code> itself raises ValueError for text before or after the object, and RecursionError for what is nested too deeply.</details>
# <details><summary>Hint 3</summary>In the hook: if there are fewer different keys than pairs, raise ValueError; else return a dict. Compare what you get with the right record as a dict. Around it: except (ValueError, RecursionError), return 0.0.</details>


# %% exercise="verify" difficulty=2 minutes=9
def verify(answer: str, ticket: Ticket) -> float:
    """Return 1.0 for the right triage as one JSON object and nothing else, else 0.0."""
    ### BEGIN SOLUTION

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    try:
        claimed = json.loads(answer, object_pairs_hook=once)
    except (ValueError, RecursionError):
        return 0.0
    return float(claimed == json.loads(ticket.triage.to_json()))
    ### END SOLUTION


# %% check="verify" points=2
case = Ticket("t0", "The Kesunix leaks. Ring me.", Triage("Kesunix", "defect", "low", "call"))
right = case.triage.to_json()


def verdict(answer: str, ticket: Ticket = case) -> float | str:
    """What verify says, or what it raises, in words."""
    try:
        return verify(answer, ticket)
    except Exception as error:
        return f"it raises {type(error).__name__}"


assert verdict(right) == 1, f"The right triage earns 1.0; yours says {verdict(right)}"
shuffled = '\n{ "action": "call",\n "product":"Kesunix", "urgency": "low", "category": "defect" }'
assert verdict(shuffled) == 1, "The order of the keys and white space do not matter: compare records, not texts"
for answer in ("", "leaks", "[]", "null", "[" * 100_000):
    assert verdict(answer) == 0, (
        f"verify never raises and gives 0.0 for what is no triage: for {answer[:6]!r} {verdict(answer)}"
    )
assert verdict(right.replace("low", "high")) == 0, (
    "All or nothing: three right fields of four earn 0.0, since a constant answer collects some fields for free"
)
twice = right.replace('"urgency": "low"', '"urgency": "high", "urgency": "low"')
assert verdict(twice) == 0, "A key that stands twice is two answers in one: count the keys before the parser drops one"
assert verdict(twice.replace('"urgency": "high"', r'"\u0075rgency": "high"')) == 0, (
    "An escaped spelling hides a key from a search in the text: count the keys that the parser has read"
)
pairs = json.dumps(list(json.loads(right).items()))
assert verdict(pairs) == 0, "An array of pairs is no object, though dict() takes it for one: ask what the parser found"
for answer in (f"Sure: {right}", f"{right} {right}"):
    assert verdict(answer) == 0, "Nothing may stand before or after the object: the next program parses the whole text"
assert verdict(right.replace("Kesunix", "KESUNIX")) == 0, (
    "Values must be equal exactly, case included: a desk looks them up"
)
assert verdict(right[:-1] + ', "note": "x"}') == 0, "A fifth key earns 0.0: exactly the four keys"
### BEGIN HIDDEN TESTS
for _one in World(LESSON_SEEDS[702]).tickets(40):
    _right = _one.triage.to_json()
    _record = json.loads(_right)
    assert verdict(_right, _one) == 1, f"The right triage of a fresh ticket earns 1.0: {_right}"
    assert verdict(json.dumps(dict(reversed(_record.items())), indent=1), _one) == 1, (
        "The order of the keys does not matter"
    )
    for _key in _record:
        _less = {key: value for key, value in _record.items() if key != _key}
        assert verdict(json.dumps(_less), _one) == 0, f"Without {_key} it is no triage"
        assert verdict(json.dumps(_record | {_key: [_record[_key]]}), _one) == 0, "A list of one value is not the value"
        assert verdict(json.dumps(_record | {_key: "null"}), _one) == 0, "The word 'null' in quotes is not null"
        _twice = json.dumps(_less)[:-1] + "".join(f', "{_key}": {json.dumps(_v)}' for _v in ("x", _record[_key])) + "}"
        assert verdict(_twice, _one) == 0, "A key that stands twice is two answers in one"
### END HIDDEN TESTS


# %% mistake="trusts the parser about keys" of="verify" says="two answers in one"
def verify(answer, ticket):
    try:
        return float(Triage.parse(answer) == ticket.triage)
    except (ValueError, RecursionError):
        return 0.0


# %% mistake="looks for the right text" of="verify" says="compare records, not texts"
def verify(answer, ticket):
    return float(ticket.triage.to_json() in answer)


# %% mistake="takes the object out of the text" of="verify" says="before or after the object"
def verify(answer, ticket):
    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError
        return dict(pairs)

    found = re.search(r"\{[^{}]*\}", answer)
    try:
        return float(json.loads(found[0], object_pairs_hook=once) == json.loads(ticket.triage.to_json()))
    except (ValueError, TypeError):
        return 0.0


# %% mistake="partial credit" of="verify" says="All or nothing"
def verify(answer, ticket):
    try:
        claimed = json.loads(answer)
    except (ValueError, RecursionError):
        return 0.0
    right = json.loads(ticket.triage.to_json())
    if not isinstance(claimed, dict) or len(claimed) != 4:
        return 0.0
    return sum(claimed.get(key) == value for key, value in right.items()) / 4


# %% mistake="lets the parser's error out" of="verify" says="never raises"
def verify(answer, ticket):
    return float(json.loads(answer) == json.loads(ticket.triage.to_json()))


# %% mistake="ignores the case" of="verify" says="case included"
def verify(answer, ticket):
    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError
        return dict(pairs)

    try:
        claimed = json.loads(answer.lower(), object_pairs_hook=once)
    except (ValueError, RecursionError):
        return 0.0
    return float(claimed == json.loads(ticket.triage.to_json().lower()))


# %% mistake="looks for the keys in the text" of="verify" says="An escaped spelling hides a key"
def verify(answer, ticket):
    try:
        claimed = json.loads(answer)
    except (ValueError, RecursionError):
        return 0.0
    return float(claimed == json.loads(ticket.triage.to_json()) and all(answer.count(f'"{key}"') == 1 for key in KEYS))


# %% mistake="takes pairs for an object" of="verify" says="An array of pairs is no object"
def verify(answer, ticket):
    try:
        pairs = json.loads(answer, object_pairs_hook=list)
        claimed = dict(pairs)
    except (ValueError, TypeError, RecursionError):
        return 0.0
    return float(len(pairs) == 4 and claimed == json.loads(ticket.triage.to_json()))


# %% alternative="pairs, sorted" of="verify"
def verify(answer, ticket):
    try:
        claimed = json.loads(answer, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return 0.0
    if not isinstance(claimed, tuple) or len(claimed) != 4:
        return 0.0
    wanted = json.loads(ticket.triage.to_json())
    return 1.0 if all(any(pair == (key, wanted[key]) for pair in claimed) for key in wanted) else 0.0


# %% alternative="through the parser, keys counted in the text" of="verify"
def verify(answer, ticket):
    try:
        claimed = Triage.parse(answer)
    except (ValueError, RecursionError):
        return 0.0
    pairs = re.findall(r'"(?:[^"\\]|\\.)*"\s*:', answer)
    return 1.0 if claimed == ticket.triage and len(pairs) == 4 else 0.0


# %% [markdown]
# Attack all three, on the test tickets of all runs. A verifier's own test suite is such a table: a row for the right answer, which must earn 1, and a row for every trick that someone has thought of.

# %%
asked = [one for part in tests for one in part]
commonest = Counter(one.triage for one in asked).most_common(1)[0][0].to_json()
attacks: dict[str, Callable[[Ticket], str]] = {
    "the right triage": lambda one: one.triage.to_json(),
    "the message and all labels": lambda one: fool_mentions(one.text),
    "high and call, always": lambda one: fool_adequate(one.text),
    "the right triage, with a second urgency": lambda one: one.triage.to_json().replace(
        '"urgency"', '"urgency": "high", "urgency"'
    ),
    "the commonest triage of these tickets, always": lambda one: commonest,
}
verifiers: dict[str, Callable[[str, Ticket], float]] = {"mentions": mentions, "adequate": adequate, "verify": verify}
mean_rewards = [
    [float(np.mean([verifier(attack(one), one) for one in asked])) for verifier in verifiers.values()]
    for attack in attacks.values()
]
display(pd.DataFrame(mean_rewards, index=list(attacks), columns=list(verifiers)).style.format("{:.2f}"))
card.record(
    "constant", mean_rewards[-1][-1], format=".1%", label="verify, for the best constant answer", tolerance=0.05
)

# %% [markdown]
# Under `verify` no trick earns anything. The last row is no trick, it is what no verifier can take away: a constant answer is right as often as its triage occurs, here for {{constant}} of the tickets. That is the floor to compare a reward with; the policy you start from is above it.
#
# A strict verifier gives a young policy few successes. That is the price, and it is paid with samples: what counts is how many groups hold at least one.
#
# ## Advantages within a group
#
# GRPO (Shao et al., 2024, section 4.1) draws a group of $g$ answers to each of $p$ prompts and asks of each answer only whether it is better than its group. With rewards $r \in \mathbb{R}^{p \times g}$,
#
# $$A_{ij} = \frac{r_{ij} - \bar r_i}{s_i + 10^{-4}}, \qquad \bar r_i, s_i: \text{ mean and standard deviation of group } i.$$
#
# The group's mean takes the place of PPO's value network. $s_i$ is the sample standard deviation, with $g - 1$ in the denominator, as `torch.std` and `trl` compute it. Dividing by it gives prompts that are nearly always or nearly never solved, where $s_i$ is small, a larger share of the gradient than they would have without it. Dr. GRPO (Liu et al., 2025) calls this a difficulty bias and leaves it out; `trl` has all three forms as `scale_rewards`:
#
# | `scale` | divided by |
# |---|---|
# | `"group"` | the standard deviation of the answer's group (`trl`'s default) |
# | `"batch"` | the standard deviation of all $p \cdot g$ rewards |
# | `"none"` | nothing |
#
# When all answers of a group have the same reward, $r_{ij} - \bar r_i = 0$ and $s_i = 0$. Without the $10^{-4}$ this is 0/0, or worse, rounding divided by rounding: the float32 mean of eight rewards 0.9 is not 0.9, and the quotient is of the size of a real advantage. With it, the group is silent: it was sampled, and teaches nothing. A prompt that is solved with probability $q$ is *not* silent with probability $1 - q^g - (1 - q)^g$.
#
# **Exercise.** Two functions.
#
# 1. `group_advantages(rewards, scale)` returns the advantages, `(p, g)`, of float rewards `(p, g)` with $g \ge 2$. For `[[1., 0.], [1., 1.]]` and `"none"` they are `[[0.5, -0.5], [0., 0.]]`; with `"group"` the first row is `[0.7070, -0.7070]`, with `"batch"` `[0.9998, -0.9998]`.
# 2. `speaks(q, g)` returns the probability that a group of `g` answers to a prompt of success rate `q` is not silent. `speaks(0.5, 2)` is 0.5.
#
# *About 6 lines.*
#
# <details><summary>Hint 1</summary>Along which axis does one prompt's group lie? The mean is always the group's; only the divisor changes.</details>
# <details><summary>Hint 2</summary><code>mean(dim=1, keepdim=True)</code> keeps the axis, so that the difference broadcasts along the group. <code>torch.std</code> divides by g − 1 unless told otherwise.</details>
# <details><summary>Hint 3</summary>Subtract the group's mean; for "none" return that. Else divide by the std along dim 1 (kept), or by the std of everything, plus 1e-4. speaks: one minus all right minus all wrong.</details>


# %% exercise="advantages" difficulty=2 minutes=9
def group_advantages(rewards: Tensor, scale: str = "group") -> Tensor:
    """Return each answer's advantage over its group: (p, g) -> (p, g)."""
    ### BEGIN SOLUTION
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "none":
        return centred
    spread = rewards.std(dim=1, keepdim=True) if scale == "group" else rewards.std()
    return centred / (spread + 1e-4)
    ### END SOLUTION


def speaks(q: float, g: int) -> float:
    """Return the probability that g answers with success rate q do not all have the same reward."""
    ### BEGIN SOLUTION
    return 1 - q**g - (1 - q) ** g
    ### END SOLUTION


# %% check="advantages" points=2
rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
for scale in ("none", "group", "batch"):
    assert torch.isfinite(group_advantages(rewards.clone(), scale)).all(), (
        f"scale {scale!r}: a group whose rewards are all equal gives 0/0 = nan, which would poison every weight: add 1e-4 to the divisor"
    )
kept = rewards.clone()
group_advantages(rewards, "none")
assert torch.equal(rewards, kept), "Do not change the rewards: -= works in place, so return a new tensor"
got = group_advantages(rewards, "none")
assert not torch.allclose(got, torch.tensor([[0.25, -0.75], [0.25, 0.25]])), (
    "Subtract the mean of the group, not of the batch: an easy prompt's answers would all look good"
)
assert not torch.allclose(got, torch.tensor([[0.0, -0.5], [0.0, 0.5]])), (
    "A group is a row, (p, g): your mean runs over the prompts; take dim=1 and keep it"
)
assert torch.allclose(got, torch.tensor([[0.5, -0.5], [0.0, 0.0]])), (
    f'With "none" only the mean is subtracted: [[0.5, -0.5], [0, 0]]; yours is {got.tolist()}'
)
got = group_advantages(rewards, "group")
assert abs(got[0, 0].item() - 0.9998) > 1e-3, "0.9998: the standard deviation of a group has g - 1 in its denominator"
assert torch.allclose(got, torch.tensor([[0.7070, -0.7070], [0.0, 0.0]]), atol=1e-4), (
    f'With "group" divide by the std of the group: [[0.7070, -0.7070], [0, 0]]; yours is {got.tolist()}'
)
got = group_advantages(rewards, "batch")
assert torch.allclose(got, torch.tensor([[0.9998, -0.9998], [0.0, 0.0]]), atol=1e-4), (
    f'With "batch" divide by the std of all rewards, 0.5, plus 1e-4: [[0.9998, -0.9998], [0, 0]]; yours is {got.tolist()}'
)
got = group_advantages(torch.tensor([[0.9], [0.7], [0.3], [0.1]]).repeat(1, 8), "group")
assert got.abs().max() < 0.01, (
    f"Eight equal rewards get the advantage {got.abs().max().item():.2f}, for 0.9, 0.7, 0.3 or 0.1: that is rounding "
    "divided by rounding; add 1e-4 to the divisor instead of mending the nan"
)
close = torch.tensor([[0.5, 0.5002]], dtype=torch.float64)
got = group_advantages(close, "group")[0, 1].item()
assert abs(got - 0.4142) < 1e-3, (
    f"The divisor is s + 1e-4: for [0.5, 0.5002] s = 0.000141 and the second advantage is 0.4142; yours is {got:.4f}"
)
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(6)
for _p, _g in [(1, 2), (3, 5), (7, 3), (4, 16)]:
    _r = torch.rand(_p, _g, generator=_generator)
    _r[0] = 0.3
    _kept = _r.clone()
    for _scale in ("none", "group", "batch"):
        _got = group_advantages(_r, _scale)
        assert _got.shape == (_p, _g), f"{(_p, _g)} stays {(_p, _g)}; yours is {tuple(_got.shape)}"
        for _i in range(_p):
            _row = np.asarray(_r[_i], dtype=np.float64)
            _by = {"none": 1.0, "group": _row.std(ddof=1) + 1e-4, "batch": np.asarray(_r, float).std(ddof=1) + 1e-4}[
                _scale
            ]
            _want = (_row - _row.mean()) / _by
            assert np.allclose(_got[_i], _want, atol=1e-3 if _i == 0 else 1e-4), (
                f"scale {_scale!r}, {(_p, _g)}: advantages are off in group {_i}"
            )
    assert torch.equal(_r, _kept), "Do not change the rewards: return a new tensor"
### END HIDDEN TESTS

# %% check="advantages" points=1
assert speaks(0.5, 2) != 0.75, "0.75 counts groups with a success: a group that is right throughout is silent as well"
assert abs(speaks(0.5, 2) - 0.5) < 1e-9, (
    f"Two answers at one half differ in half of the cases; you say {speaks(0.5, 2)}"
)
assert max(abs(speaks(0.0, 8)), abs(speaks(1.0, 8))) < 1e-9, (
    "A prompt that is never or always solved has silent groups only"
)
### BEGIN HIDDEN TESTS
for _q, _g in [(0.1, 4), (0.9, 8), (0.37, 3), (0.02, 32)]:
    _want = sum(comb(_g, _c) * _q**_c * (1 - _q) ** (_g - _c) for _c in range(1, _g))
    assert abs(speaks(_q, _g) - _want) < 1e-9, f"speaks({_q}, {_g}) is {_want:.4f}"
### END HIDDEN TESTS


# %% mistake="no epsilon" of="advantages" says="0/0 = nan"
def group_advantages(rewards, scale="group"):
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "none":
        return centred
    return centred / (rewards.std(1, keepdim=True) if scale == "group" else rewards.std())


def speaks(q, g):
    return 1 - q**g - (1 - q) ** g


# %% mistake="mends the nan afterwards" of="advantages" says="rounding divided by rounding"
def group_advantages(rewards, scale="group"):
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "none":
        return centred
    if scale == "batch":
        return centred / (rewards.std() + 1e-4)
    return torch.nan_to_num(centred / rewards.std(1, keepdim=True))


def speaks(q, g):
    return 1 - q**g - (1 - q) ** g


# %% mistake="adds to the variance" of="advantages" says="The divisor is s + 1e-4"
def group_advantages(rewards, scale="group"):
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "none":
        return centred
    return centred / ((rewards.var(1, keepdim=True) if scale == "group" else rewards.var()) + 1e-4).sqrt()


def speaks(q, g):
    return 1 - q**g - (1 - q) ** g


# %% mistake="works in place" of="advantages" says="Do not change the rewards"
def group_advantages(rewards, scale="group"):
    by = {"none": 1.0, "group": rewards.std(1, keepdim=True) + 1e-4, "batch": rewards.std() + 1e-4}[scale]
    rewards -= rewards.mean(1, keepdim=True)
    return rewards / by


def speaks(q, g):
    return 1 - q**g - (1 - q) ** g


# %% mistake="the mean of the batch" of="advantages" says="not of the batch"
def group_advantages(rewards, scale="group"):
    centred = rewards - rewards.mean()
    return centred if scale == "none" else centred / (rewards.std() + 1e-4)


def speaks(q, g):
    return 1 - q**g - (1 - q) ** g


# %% mistake="groups along the columns" of="advantages" says="A group is a row"
def group_advantages(rewards, scale="group"):
    centred = rewards - rewards.mean(0)
    if scale == "none":
        return centred
    return centred / ((rewards.std(0) if scale == "group" else rewards.std()) + 1e-4)


def speaks(q, g):
    return 1 - q**g - (1 - q) ** g


# %% mistake="the population's standard deviation" of="advantages" says="g - 1 in its denominator"
def group_advantages(rewards, scale="group"):
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "none":
        return centred
    spread = rewards.std(1, keepdim=True, correction=0) if scale == "group" else rewards.std()
    return centred / (spread + 1e-4)


def speaks(q, g):
    return 1 - q**g - (1 - q) ** g


# %% mistake="counts groups with a success" of="advantages" says="right throughout"
def group_advantages(rewards, scale="group"):
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "none":
        return centred
    spread = rewards.std(1, keepdim=True) if scale == "group" else rewards.std()
    return centred / (spread + 1e-4)


def speaks(q, g):
    return 1 - (1 - q) ** g


# %% alternative="group by group" of="advantages"
def group_advantages(rewards, scale="group"):
    found = torch.empty_like(rewards)
    for i, row in enumerate(rewards):
        by = {"none": 1.0, "group": row.std().item() + 1e-4, "batch": rewards.std().item() + 1e-4}[scale]
        for j in range(len(row)):
            found[i, j] = (row[j] - row.mean()) / by
    return found


def speaks(q, g):
    return sum(comb(g, c) * q**c * (1 - q) ** (g - c) for c in range(1, g))


# %% [markdown]
# What a group of equals would do without the $10^{-4}$, to a toy policy of one token, in one step:


# %%
def move(advantages: Tensor) -> float:
    """The largest change of a bias in one step of gradient descent (rate 1) on eight equal answers to one prompt."""
    torch.manual_seed(0)
    toy = torch.nn.Linear(4, 3)  # one token, a vocabulary of three
    logps = toy(torch.ones(8, 4)).log_softmax(dim=1)[:, 0]
    (-advantages * logps).mean().backward()
    return toy.bias.grad.abs().max().item()


rows = []
for reward in (1.0, 0.9):
    equals = torch.full((8,), reward)
    naive, yours = (equals - torch.mean(equals)) / torch.std(equals), group_advantages(equals[None])[0]
    rows.append((reward, naive[0].item(), move(naive), yours[0].item(), move(yours)))
names = ["eight rewards of", "advantage without 1e-4", "a bias moves by", "your advantage", "a bias moves by "]
display(pd.DataFrame(rows, columns=names).style.format(precision=4).hide(axis="index"))

# %% [markdown]
# The first row ends a training, and you notice. The second moves the policy at full size although there was nothing to learn, and nothing looks wrong. Rewards of 0 and 1 have exact means and never meet it; graded rewards do.
#
# Which groups speak depends on the success rate of the prompt, and on the size of the group:

# %%
fig, ax = plt.subplots()
rates = np.linspace(0, 1, 101)
for size, place, colour in ((2, 0.5, COLOURS.before), (8, 0.2, COLOURS.after), (32, 0.05, COLOURS.other)):
    curve = [speaks(q, size) for q in rates]
    ax.plot(rates, curve, color=colour)
    direct_label(ax, place, speaks(place, size), f"g = {size}", colour, offset=(8, -12))
ax.set(xlabel="success rate of the prompt", ylabel="probability that the group speaks", ylim=(0, 1.05))
ax.set_title("A group of equals is silent")
plt.show()

# %% [markdown]
# The curve shows why the start matters: at a success rate of 0 no group size helps. It also shows that a large group is wasted on a prompt of middling difficulty, where eight answers differ nearly always. DAPO (Yu et al., 2025) samples on until the batch holds speaking groups alone (*dynamic sampling*).

# %% [markdown]
# ## The clipped loss
#
# The answers of one step serve several updates of the adapter. After the first, the policy is no longer the one that sampled, and the ratio of the two corrects for it, token by token:
#
# $$\rho_{it} = \frac{\pi(y_{it} \mid x_i, y_{i,<t})}{\pi_{old}(y_{it} \mid x_i, y_{i,<t})}, \qquad
# L = \frac{1}{\sum_{it} m_{it}} \sum_{it} m_{it} \Big[ -\min\big(\rho_{it} A_i,\; \mathrm{clip}(\rho_{it}, 1-\epsilon, 1+\epsilon)\, A_i\big) + \beta\, k_{it} \Big].$$
#
# $m_{it}$ is 1 on the tokens of answer $i$. The minimum is PPO's (Schulman et al., 2017): a token whose ratio has already moved by more than $\epsilon$ *in the direction its advantage asks for* gets no gradient; one that moved the wrong way keeps it. The last term is Schulman's estimator of the KL from the reference, unbiased for samples of $\pi$ and never negative,
#
# $$k_{it} = \frac{\pi_{ref}}{\pi} - \log \frac{\pi_{ref}}{\pi} - 1.$$
#
# How the tokens are averaged is a decision too. The mean over *all tokens of the batch*, as above, is DAPO's, and `loss_type="dapo"` is `trl`'s default. The first GRPO (`"grpo"`) took the mean of each answer, then the mean of those, so each token of a long answer counted less, and a long wrong answer cost little. `"dr_grpo"` divides by a constant. `trl`'s defaults further are $\epsilon = 0.2$ and $\beta = 0$: no reference, unless you ask for it.
#
# **Exercise.** `grpo_loss(logps, old, reference, advantages, mask, epsilon, beta)` returns $L$, a scalar.
#
# - `logps`, `old` and `reference` are `(n, t)`: log-probabilities of the sampled tokens under $\pi$ (with its graph), $\pi_{old}$ and $\pi_{ref}$. Where the mask is 0 they hold finite numbers that mean nothing.
# - `advantages` is `(n,)`, `mask` is `(n, t)` int64, at least one entry is 1.
#
# With one answer of one token, $\rho = 1.5$, $A = 2$, $\epsilon = 0.2$ and $\beta = 0$ the loss is -2.4. *About 6 lines.*
#
# <details><summary>Hint 1</summary>Everything is per token until the last line. Which of your tensors needs another axis so that it meets the others?</details>
# <details><summary>Hint 2</summary>The ratio is the exponential of a difference. <code>advantages[:, None]</code>, <code>torch.clamp</code>, <code>torch.minimum</code>. For k, name the log-ratio of reference and policy first.</details>
# <details><summary>Hint 3</summary>loss = −minimum(ratio · A, clamp(ratio) · A) + beta · (exp(d) − d − 1) with d = reference − logps; multiply by the mask, sum, divide by the sum of the mask.</details>


# %% exercise="grpo-loss" difficulty=3 minutes=12
def grpo_loss(
    logps: Tensor, old: Tensor, reference: Tensor, advantages: Tensor, mask: Tensor, epsilon: float, beta: float
) -> Tensor:
    """Return the clipped loss with KL, averaged over all tokens: four (n, t) and one (n,) -> ()."""
    ### BEGIN SOLUTION
    ratio, gain = (logps - old).exp(), advantages[:, None]
    policy = torch.minimum(ratio * gain, ratio.clamp(1 - epsilon, 1 + epsilon) * gain)
    away = reference - logps
    return ((beta * (away.exp() - away - 1) - policy) * mask).sum() / mask.sum()
    ### END SOLUTION


# %% check="grpo-loss" points=2
def one_token(ratio: float, advantage: float, beta: float = 0.0, reference: float = 0.0) -> tuple[float, float]:
    """The loss of one answer of one token, old probability 1, and its gradient with respect to logps."""
    logps = torch.tensor([[np.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old, other = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), reference, dtype=torch.float64)
    gain, mask = torch.tensor([advantage], dtype=torch.float64), torch.ones(1, 1, dtype=torch.int64)
    loss = grpo_loss(logps, old, other, gain, mask, 0.2, beta)
    loss.backward()
    return loss.item(), logps.grad.item()


loss, gradient = one_token(1.0, 2.0)
assert loss < 0, "A positive advantage has to make the token more likely by descent: the loss is minus the objective"
loss, gradient = one_token(1.5, 2.0)
assert abs(loss + 3.0) > 1e-6, "-3.0 is not clipped: above 1 + epsilon the ratio counts as 1.2"
assert abs(loss + 2.4) < 1e-6, f"min(1.5 * 2, 1.2 * 2) = 2.4, so the loss is -2.4; yours is {loss:.4f}"
assert gradient == 0, "A token that moved beyond the clip in the right direction gets no gradient"
loss, gradient = one_token(1.5, -2.0)
wrong_way = "Ratio 1.5, advantage -2: the token moved the wrong way, so the minimum is the unclipped -3.0"
assert abs(loss - 3.0) < 1e-6, f"{wrong_way} and the loss 3.0; yours is {loss:.4f}"
assert abs(gradient - 3.0) < 1e-6, f"{wrong_way}, and it keeps its gradient, 3.0; yours is {gradient:.4f}"
loss, gradient = one_token(0.5, -2.0)
assert abs(loss - 1.6) < 1e-6, (
    f"Ratio 0.5, advantage -2: clip below as well, min(-1.0, 0.8 * -2) = -1.6, so the loss is 1.6; yours is {loss:.4f}"
)

# %% check="grpo-loss" points=1
loss, gradient = one_token(1.0, 0.0, beta=1.0, reference=-1.0)
assert abs(loss - 0.7183) > 1e-3, (
    "0.7183 is the estimator the wrong way round: the log-ratio is the reference minus the policy"
)
assert abs(loss - 1.0) > 1e-3, "1.0 is the plain log-ratio, which can be negative: use exp(d) - d - 1"
assert abs(loss - 0.3679) < 1e-3, f"d = -1: exp(-1) + 1 - 1 = 0.3679; yours is {loss:.4f}"
loss, gradient = one_token(2.0, 0.0, beta=1.0, reference=0.0)
assert abs(loss - 0.3863) > 1e-3, (
    "0.3863 is k times the ratio, the other form of trl: here the formula's plain k counts"
)
assert abs(loss - 0.1931) < 1e-3, f"d = -log 2: 0.5 + 0.6931 - 1 = 0.1931, whatever the ratio; yours is {loss:.4f}"
_, gradient = one_token(1.0, 0.0, beta=1.0, reference=-1.0)
assert abs(gradient - 0.6321) < 1e-3, (
    f"The KL term pulls the policy back: for d = -1 its gradient is 1 - exp(-1) = 0.6321, so d keeps its graph; yours is {gradient:.4f}"
)

# %% check="grpo-loss" points=1
long_and_short = torch.tensor([[1, 1, 1], [1, 0, 0]])
zeros, junk = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 0.0], [0.0, 3.0, -2.0]])
got = grpo_loss(junk, zeros, zeros, torch.tensor([1.0, -1.0]), long_and_short, 0.2, 0.5).item()
assert abs(got - 0.0) > 1e-6, (
    "0 is the mean of the answers' means: here every token counts the same, so the long answer weighs 3 of 4"
)
assert abs(got + 0.5) < 1e-6, (
    f"Only tokens whose mask is 1 count, and their number is the divisor: -(3 - 1) / 4 = -0.5; yours is {got:.4f}"
)
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(8)
for _n, _t, _eps, _beta in [(1, 1, 0.2, 0.0), (3, 4, 0.1, 0.3), (5, 2, 0.3, 1.0)]:
    _lp, _old, _ref = (-3 * torch.rand(_n, _t, generator=_generator, dtype=torch.float64) for _ in range(3))
    _adv = torch.randn(_n, generator=_generator, dtype=torch.float64)
    _mask = (torch.rand(_n, _t, generator=_generator) < 0.7).long()
    _mask[0, 0] = 1
    _total = 0.0
    for _i in range(_n):
        for _j in range(_t):
            if _mask[_i, _j]:
                _rho = float((_lp[_i, _j] - _old[_i, _j]).exp())
                _a, _d = float(_adv[_i]), float(_ref[_i, _j] - _lp[_i, _j])
                _total += -min(_rho * _a, min(max(_rho, 1 - _eps), 1 + _eps) * _a) + _beta * (
                    float(np.exp(_d)) - _d - 1
                )
    _got = grpo_loss(_lp, _old, _ref, _adv, _mask, _eps, _beta)
    assert _got.dim() == 0, f"The loss is a scalar; yours has the shape {tuple(_got.shape)}"
    assert abs(_got.item() - _total / int(_mask.sum())) < 1e-9, (
        f"{(_n, _t)}, epsilon {_eps}, beta {_beta}: the loss is off"
    )
### END HIDDEN TESTS


# %% mistake="no clipping" of="grpo-loss" says="-3.0 is not clipped"
def grpo_loss(logps, old, reference, advantages, mask, epsilon, beta):
    away = reference - logps
    per_token = -(logps - old).exp() * advantages[:, None] + beta * (away.exp() - away - 1)
    return (per_token * mask).sum() / mask.sum()


# %% mistake="clips without the minimum" of="grpo-loss" says="moved the wrong way"
def grpo_loss(logps, old, reference, advantages, mask, epsilon, beta):
    away = reference - logps
    ratio = (logps - old).exp().clamp(1 - epsilon, 1 + epsilon)
    return ((beta * (away.exp() - away - 1) - ratio * advantages[:, None]) * mask).sum() / mask.sum()


# %% mistake="ascends" of="grpo-loss" says="minus the objective"
def grpo_loss(logps, old, reference, advantages, mask, epsilon, beta):
    ratio, gain, away = (logps - old).exp(), advantages[:, None], reference - logps
    policy = torch.minimum(ratio * gain, ratio.clamp(1 - epsilon, 1 + epsilon) * gain)
    return ((policy + beta * (away.exp() - away - 1)) * mask).sum() / mask.sum()


# %% mistake="KL the wrong way round" of="grpo-loss" says="the reference minus the policy"
def grpo_loss(logps, old, reference, advantages, mask, epsilon, beta):
    ratio, gain, away = (logps - old).exp(), advantages[:, None], logps - reference
    policy = torch.minimum(ratio * gain, ratio.clamp(1 - epsilon, 1 + epsilon) * gain)
    return ((beta * (away.exp() - away - 1) - policy) * mask).sum() / mask.sum()


# %% mistake="the plain log-ratio as KL" of="grpo-loss" says="can be negative"
def grpo_loss(logps, old, reference, advantages, mask, epsilon, beta):
    ratio, gain = (logps - old).exp(), advantages[:, None]
    policy = torch.minimum(ratio * gain, ratio.clamp(1 - epsilon, 1 + epsilon) * gain)
    return ((beta * (logps - reference) - policy) * mask).sum() / mask.sum()


# %% mistake="a mean of the answers' means" of="grpo-loss" says="the mean of the answers' means"
def grpo_loss(logps, old, reference, advantages, mask, epsilon, beta):
    ratio, gain, away = (logps - old).exp(), advantages[:, None], reference - logps
    policy = torch.minimum(ratio * gain, ratio.clamp(1 - epsilon, 1 + epsilon) * gain)
    per_token = (beta * (away.exp() - away - 1) - policy) * mask
    return (per_token.sum(1) / mask.sum(1).clamp(min=1)).mean()


# %% mistake="the padding counts" of="grpo-loss" says="Only tokens whose mask is 1 count"
def grpo_loss(logps, old, reference, advantages, mask, epsilon, beta):
    ratio, gain, away = (logps - old).exp(), advantages[:, None], reference - logps
    policy = torch.minimum(ratio * gain, ratio.clamp(1 - epsilon, 1 + epsilon) * gain)
    return (beta * (away.exp() - away - 1) - policy).mean()


# %% mistake="clips above only" of="grpo-loss" says="clip below as well"
def grpo_loss(logps, old, reference, advantages, mask, epsilon, beta):
    ratio, gain, away = (logps - old).exp(), advantages[:, None], reference - logps
    policy = torch.minimum(ratio * gain, ratio.clamp(max=1 + epsilon) * gain)
    return ((beta * (away.exp() - away - 1) - policy) * mask).sum() / mask.sum()


# %% mistake="a KL without a gradient" of="grpo-loss" says="so d keeps its graph"
def grpo_loss(logps, old, reference, advantages, mask, epsilon, beta):
    ratio, gain, away = (logps - old).exp(), advantages[:, None], (reference - logps).detach()
    policy = torch.minimum(ratio * gain, ratio.clamp(1 - epsilon, 1 + epsilon) * gain)
    return ((beta * (away.exp() - away - 1) - policy) * mask).sum() / mask.sum()


# %% mistake="the KL with the ratio" of="grpo-loss" says="k times the ratio"
def grpo_loss(logps, old, reference, advantages, mask, epsilon, beta):
    ratio, gain, away = (logps - old).exp(), advantages[:, None], reference - logps
    policy = torch.minimum(ratio * gain, ratio.clamp(1 - epsilon, 1 + epsilon) * gain)
    return ((beta * ratio * (away.exp() - away - 1) - policy) * mask).sum() / mask.sum()


# %% alternative="cases instead of a minimum" of="grpo-loss"
def grpo_loss(logps, old, reference, advantages, mask, epsilon, beta):
    kept = mask == 1
    gain = advantages[:, None].expand_as(logps)[kept]
    ratio = torch.exp(logps[kept] - old[kept])
    bound = torch.where(gain > 0, ratio.clamp(max=1 + epsilon), ratio.clamp(min=1 - epsilon))
    away = reference[kept] - logps[kept]
    return (torch.expm1(away) - away).mean() * beta - (bound * gain).mean()


# %% [markdown]
# At the first update of a batch every ratio is 1, so the loss is minus the mean advantage over the tokens: near zero, whatever the policy is worth. Its gradient is not. So the curve of a GRPO loss says nothing; watch rewards.
#
# ## Match: `trl`'s trainer, in its own run
#
# `GRPOTrainer` takes prompts and a reward function. It samples, scores, computes advantages, and updates; the extra columns of its data set arrive in the reward function as keyword arguments. You let it run two updates on one batch (`num_iterations=2`), with a KL coefficient above zero, and record what its loss is given and what it returns. The second update is the interesting one: there the ratios have left 1.
#
# One default has to be switched off for your formula. With `use_bias_correction_kl=True`, `trl` multiplies $k_{it}$ by $\rho_{it}$. The value of $k$ is an unbiased estimate of the KL, but its gradient is not one of the KL's gradient; with the ratio it is (DeepSeek-V3.2, 2025). The table shows both forms.

# %%
parity_beta, parity_group, parity_prompts = 0.1, 4, 4
seen: list[float] = []  # the rewards, in the order in which trl asks for them
record: list[tuple[dict, Tensor, float, float]] = []  # of each update: inputs, log-probabilities, loss in two forms


def reward_for_trl(completions: list[list[dict]], ticket: list[int], **columns: object) -> list[float]:
    """What trl calls: chats and the columns of the data set in, rewards out. `mentions` has grades, so groups speak."""
    texts = [chat[-1]["content"] for chat in completions]  # prompts are chats, so completions are chats as well
    found = [mentions(text, tests[0][index]) for text, index in zip(texts, ticket, strict=True)]
    seen.extend(found)
    return found


class Recorder(GRPOTrainer):
    """The trainer as it is, with a note of what passes through its loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        kept = {key: value.detach().clone() for key, value in inputs.items() if isinstance(value, Tensor)}
        batch = rollouts.Rollouts(
            *(kept[key] for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"))
        )
        with torch.no_grad():
            self.args.use_bias_correction_kl = True  # trl's default
            corrected = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            self.args.use_bias_correction_kl = False
            record.append((kept, rollouts.logps(model, batch), loss.item(), corrected.item()))
        return loss


columns = datasets.Dataset.from_list(
    [
        {"prompt": [{"role": "user", "content": one.text}], "ticket": index}
        for index, one in enumerate(tests[0][:parity_prompts])
    ]
)
with tempfile.TemporaryDirectory() as folder:
    settings = GRPOConfig(
        folder, num_generations=parity_group, per_device_train_batch_size=parity_group * parity_prompts,
        num_iterations=2, beta=parity_beta, use_bias_correction_kl=False, epsilon=epsilon, learning_rate=learning_rate, max_steps=2,
        max_completion_length=longest_answer, lr_scheduler_type="constant", weight_decay=0.0, bf16=False,
        activation_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=device == "cpu", dataloader_pin_memory=False, seed=seed,
    )  # fmt: skip
    trainer = Recorder(
        copy.deepcopy(model), reward_for_trl, args=settings, train_dataset=columns, processing_class=tokenizer,
        peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(adapters.linear_layers(model))),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()

rows = []
for update, (inputs, logps, loss, corrected) in enumerate(record):
    arguments = [inputs.get(key) for key in ("old_per_token_logps", "ref_per_token_logps", "advantages")]
    mine = grpo_loss(logps, *arguments, inputs["completion_mask"], epsilon, parity_beta)
    ratios = (logps - arguments[0]).exp()[inputs["completion_mask"] == 1]
    rows.append((update + 1, mine.item(), loss, corrected, ((ratios - 1).abs() > epsilon).float().mean().item()))
parity = max(abs(row[1] - row[2]) for row in rows)
advantages = group_advantages(torch.tensor(seen).view(-1, parity_group)).flatten().sort().values
# The trainer shuffles the rows of a batch before its updates, so compare the sorted advantages.
gap = (advantages - record[0][0]["advantages"].cpu().sort().values).abs().max().item()
names = ["update", "your loss", "trl's loss", "trl's, its default KL", "ratios beyond the clip"]
table = pd.DataFrame(rows, columns=names)
formats = dict.fromkeys(names[1:4], "{:.6f}") | {names[4]: "{:.0%}"}
display(table.style.format(formats).hide(axis="index"))
print("rewards, a group a row:", *torch.tensor(seen).view(-1, parity_group).tolist(), sep="\n")
print(f"largest difference of the losses {parity:.0e}, of the advantages {gap:.0e}")
card.record("parity", parity, format=".0e", tolerance=1e-3, label="your loss and trl's, largest difference")

# %% [markdown]
# The losses agree within {{parity}}, and what is left is rounding. Of the two rows the second is the one that tests the ratio: at the first update $\pi$ is $\pi_{old}$. Agreement of two zeros would prove nothing, so the rewards are printed as well. (A reward function that takes a chat for a text finds nothing in it, gives everyone 0, and every group is silent: no error, no training.) The reference's log-probabilities came from the same weights with the adapter switched off, so the reference costs a forward pass and no memory.
#
# Below you train with your own functions, in a loop that you can read whole.

# %% [markdown]
# ## Where the policy starts
#
# Before you train on `verify`, look at what it finds among the eight answers to each test ticket.


# %%
def judged(
    answers: rollouts.Rollouts, tickets: Sequence[Ticket], verifier: Callable[[str, Ticket], float]
) -> np.ndarray:
    """The reward of each answer, (tickets, group)."""
    group = len(answers) // len(tickets)
    asked = zip(answers.texts(tokenizer), each(tickets, group), strict=True)
    return np.array([verifier(text, ticket) for text, ticket in asked]).reshape(-1, group)


before = [judged(start[run], tests[run], verify) for run in range(runs)]
start_rates = np.concatenate(before).mean(axis=1).tolist()  # the share of right answers of each test ticket
fig, ax = plt.subplots()
ax.hist(start_rates, bins=np.arange(10) / 8 - 1 / 16, color=COLOURS.before, rwidth=0.9)
ax.set(
    xlabel="right answers of 8 samples, as a share",
    ylabel="tickets",
    title="What the policy can do before reinforcement",
)
plt.show()
print(f"pass@1 {np.mean(start_rates):.1%}, pass@8 {np.mean(np.array(start_rates) > 0):.1%}")

# %% [markdown]
# ## Pass@1 and pass@k
#
# Pass@k is the probability that at least one of k samples is right. Estimate it from $n \ge k$ samples of a prompt, $c$ of them right. The obvious $1 - (1 - c/n)^k$ is biased downwards, since it draws k samples *with* replacement from n. Unbiased is the share of the subsets of size k that hold a right one (Chen et al., 2021, section 2.1):
#
# $$\mathrm{pass@}k = 1 - \binom{n-c}{k} \Big/ \binom{n}{k}.$$
#
# Both numbers matter together. Reinforcement that makes likely what the policy could do already raises pass@1 and leaves pass@k; what it *adds* raises pass@k for large k as well. In reasoning models Yue et al. (2025) found mostly the former: at large k the base model catches up and overtakes.
#
# **Exercise.** Two things.
#
# 1. `pass_at_k(right, k)` returns the mean over the prompts, a float. `right` is a bool array `(p, n)`, `k` at most $n$. For `[[1, 0, 0, 0]]` and k = 2 it is 0.5, for `[[1, 1, 1, 0]]` it is 1. *About 3 lines.*
# 2. *Predict.* `predicted_pass1` and `predicted_pass8` (0 to 1): the two after {{steps}} steps against `verify`, given where the policy starts, which is printed above. Graded for being shares.
#
# <details><summary>Hint 1</summary>How many subsets of size k hold wrong answers only? What if there are fewer than k wrong ones?</details>
# <details><summary>Hint 2</summary><code>math.comb(a, k)</code> is 0 when a &lt; k, so no case is special.</details>
# <details><summary>Hint 3</summary>For each row: n − c is the number of wrong answers; 1 − comb(n − c, k) / comb(n, k). Return the mean of the rows.</details>


# %% exercise="pass-at-k" difficulty=2 minutes=8
def pass_at_k(right: np.ndarray, k: int) -> float:
    """Return the unbiased estimate of pass@k, the mean over prompts: bool (p, n) -> float."""
    ### BEGIN SOLUTION
    wrong = right.shape[1] - right.astype(int).sum(axis=1)
    return float(np.mean([1 - comb(int(w), k) / comb(right.shape[1], k) for w in wrong]))
    ### END SOLUTION


predicted_pass1, predicted_pass8 = None, None
### BEGIN SOLUTION
predicted_pass1, predicted_pass8 = 0.5, 0.8
### END SOLUTION

# %% check="pass-at-k" points=2
one_of_four, three_of_four = np.array([[1, 0, 0, 0]], dtype=bool), np.array([[1, 1, 1, 0]], dtype=bool)
got = pass_at_k(one_of_four, 2)
assert abs(got - 0.4375) > 1e-6, "0.4375 draws with replacement, 1 - (1 - c/n)^k: count subsets of size k instead"
assert abs(got - 1.0) > 1e-6, "1.0 asks whether any of the n samples is right: that is pass@n, whatever k is"
assert abs(got - 0.5) < 1e-6, f"3 of the 6 pairs of samples hold the right one: 0.5; you say {got}"
assert abs(pass_at_k(three_of_four, 2) - 1) < 1e-6, (
    f"With one wrong answer there is no pair of wrong ones: pass@2 is 1; you say {pass_at_k(three_of_four, 2)}"
)
both = pass_at_k(np.concatenate([one_of_four, three_of_four]), 2)
assert abs(both - 0.75) < 1e-6, (
    f"Take the mean of the prompts' values, (0.5 + 1) / 2 = 0.75, and do not pool the samples; you say {both}"
)
### BEGIN HIDDEN TESTS
from itertools import combinations as _combinations

_rng = np.random.default_rng(3)
for _p, _n, _k in [(1, 1, 1), (3, 5, 2), (4, 6, 6), (2, 7, 3), (5, 8, 1)]:
    _right = _rng.random((_p, _n)) < 0.4
    _want = np.mean([np.mean([any(_s) for _s in _combinations(_row, _k)]) for _row in _right])
    assert abs(pass_at_k(_right, _k) - _want) < 1e-9, f"{_p} prompts, {_n} samples, k = {_k}: pass@k is {_want:.4f}"
_zero = pass_at_k(np.zeros((2, 4), dtype=bool), 4)
assert _zero == 0, "Nothing right: 0"
### END HIDDEN TESTS

# %% check="pass-at-k" points=1
for name, value in (("predicted_pass1", predicted_pass1), ("predicted_pass8", predicted_pass8)):
    assert isinstance(value, (int, float, np.number)), f"Predict with a number: set {name}, now {value!r}"
    assert 0 <= value <= 1, f"{name} is a share from 0 to 1, not {value}"
assert predicted_pass1 <= predicted_pass8, "Eight tries succeed at least as often as one: predicted_pass8 is the larger"


# %% mistake="with replacement" of="pass-at-k" says="draws with replacement"
def pass_at_k(right, k):
    return float(np.mean(1 - (1 - right.mean(axis=1)) ** k))


predicted_pass1, predicted_pass8 = 0.5, 0.8


# %% mistake="any of all samples" of="pass-at-k" says="that is pass@n"
def pass_at_k(right, k):
    return float(right.any(axis=1).mean())


predicted_pass1, predicted_pass8 = 0.5, 0.8


# %% mistake="pools the samples" of="pass-at-k" says="do not pool"
def pass_at_k(right, k):
    n, c = right.size, int(right.sum())
    return 1 - comb(n - c, k) / comb(n, k)


predicted_pass1, predicted_pass8 = 0.5, 0.8


# %% mistake="predicts fewer successes from more tries" of="pass-at-k" says="at least as often as one"
def pass_at_k(right, k):
    n = right.shape[1]
    return float(np.mean([1 - comb(n - int(c), k) / comb(n, k) for c in right.sum(axis=1)]))


predicted_pass1, predicted_pass8 = 0.8, 0.5


# %% alternative="a product of chances to miss" of="pass-at-k"
def pass_at_k(right, k):
    n, total = right.shape[1], 0.0
    for row in right:
        wrong, miss = n - int(row.sum()), 1.0
        for i in range(k):
            miss *= max(wrong - i, 0) / (n - i)
        total += 1 - miss
    return total / len(right)


predicted_pass1, predicted_pass8 = 0.4, 0.4


# %% alternative="the hypergeometric distribution" of="pass-at-k"
def pass_at_k(right, k):
    n = right.shape[1]
    return float(np.mean(1 - stats.hypergeom.pmf(0, n, right.sum(axis=1), k)))


predicted_pass1, predicted_pass8 = 0.4, 0.6


# %% [markdown]
# ## Decide: many prompts or large groups
#
# Sampling is what reinforcement costs. With a budget of 48 answers a step you may ask 24 prompts twice, 6 prompts 8 times, or 2 prompts 24 times. The number of steps and of updates is the same.
#
# A group of two tells right from wrong only when the two differ; a group of 24 speaks even about a prompt that is solved once in twenty tries, and knows its mean well, but a step then hears of two prompts only.
#
# **Exercise.** Two things.
#
# 1. `speaking_answers(rates, groups, generations)` returns for each group size of the list `groups` the expected number of answers a step in groups that speak, as a list of floats. A step has `generations // g` prompts, whose success rates are drawn from the list `rates`, each as likely. `speaking_answers([0.5, 0.2], [2], 64)` is `[26.24]`. *About 4 lines.*
# 2. `my_plan` is the group size that you would take, 2, 8 or 24. Use the success rates of your policy, `start_rates`, and weigh that number against what it leaves out (how many prompts a step hears of; that a rate of 0 of 8 need not be 0). Graded for being one of the three; the measurement follows.
#
# <details><summary>Hint 1</summary>How many answers does one group have, and with which probability do they count? How many groups are there?</details>
# <details><summary>Hint 2</summary>The probability that a group speaks, 1 − q^g − (1 − q)^g, averaged over the rates (not taken at the average rate).</details>
# <details><summary>Hint 3</summary>(generations // g) groups, times g answers each, times the mean over the rates of 1 − q^g − (1 − q)^g.</details>


# %% exercise="plan" difficulty=2 minutes=8
def speaking_answers(rates: Sequence[float], groups: Sequence[int], generations: int) -> list[float]:
    """Return, for each group size, the expected number of answers a step that stand in groups that speak."""
    ### BEGIN SOLUTION
    chances = [float(np.mean([1 - q**g - (1 - q) ** g for q in rates])) for g in groups]
    return [generations // g * g * chance for g, chance in zip(groups, chances, strict=True)]
    ### END SOLUTION


my_plan = None
### BEGIN SOLUTION
my_plan = 8
### END SOLUTION

# %% check="plan" points=2
got = speaking_answers([0.5, 0.2], [2, 8], 64)
assert len(got) == 2, f"One number for each group size: 2 of them; yours has {len(got)}"
assert abs(got[0] - 29.12) > 1e-6, "29.12 is the chance at the mean rate: take the mean of the chances of the prompts"
assert abs(got[0] - 13.12) > 1e-6, "13.12 counts groups: each of them has g answers"
assert abs(got[0] - 35.52) > 1e-6, "35.52 counts groups with a success: a group that is right throughout is silent too"
assert abs(got[0] - 26.24) < 1e-6, (
    f"Pairs speak with chance 0.5 at rate 0.5, with 0.32 at 0.2: 64 * 0.41 = 26.24; you say {got[0]}"
)
assert abs(got[1] - 58.38) < 0.01, (
    f"Groups of 8 speak with chance 0.9922 and 0.8322: 64 * 0.9122 = 58.38; you say {got[1]}"
)
### BEGIN HIDDEN TESTS
_rates = [0.0, 0.1, 0.9, 0.33]
_got = speaking_answers(_rates, [2, 3, 32], 66)
for _value, _g in zip(_got, [2, 3, 32], strict=True):
    _chance = np.mean([1 - (_q**_g + (1 - _q) ** _g) for _q in _rates])
    assert abs(_value - 66 // _g * _g * _chance) < 1e-6, "A step has whole groups only: generations // g of them"
### END HIDDEN TESTS

# %% check="plan" points=1
assert my_plan in (2, 8, 24), f"my_plan is the group size 2, 8 or 24, not {my_plan!r}"


# %% mistake="the chance at the mean rate" of="plan" says="the mean of the chances"
def speaking_answers(rates, groups, generations):
    q = sum(rates) / len(rates)
    return [generations // g * g * (1 - q**g - (1 - q) ** g) for g in groups]


my_plan = 8


# %% mistake="counts groups" of="plan" says="each of them has g answers"
def speaking_answers(rates, groups, generations):
    return [generations // g * float(np.mean([1 - q**g - (1 - q) ** g for q in rates])) for g in groups]


my_plan = 8


# %% mistake="counts groups with a success" of="plan" says="right throughout is silent too"
def speaking_answers(rates, groups, generations):
    return [generations // g * g * float(np.mean([1 - (1 - q) ** g for q in rates])) for g in groups]


my_plan = 8


# %% mistake="names the number of prompts and the group" of="plan" says="my_plan is the group size"
def speaking_answers(rates, groups, generations):
    return [generations // g * g * float(np.mean([1 - q**g - (1 - q) ** g for q in rates])) for g in groups]


my_plan = (8, 8)


# %% alternative="by arrays" of="plan"
def speaking_answers(rates, groups, generations):
    q, g = np.asarray(rates)[:, None], np.asarray(groups)[None, :]
    return list((1 - q**g - (1 - q) ** g).mean(axis=0) * (generations - generations % g[0]))


my_plan = 24


# %%
plans = [2, 8, 24] if generations >= 24 else [2, generations]
for size, count in zip(plans, speaking_answers(start_rates, plans, generations), strict=True):
    print(
        f"{generations // size:>3} prompts x {size:>2} answers: {count:4.1f} of {generations} answers speak at the start"
    )

# %% [markdown]
# ## The experiment
#
# Each training starts from the finetuned model with a fresh adapter. A step samples {{generations}} answers, scores them, computes advantages and updates the adapter twice with your loss. As in `trl`'s default β is 0; the KL from the reference is measured all the same.
#
# Silent groups have advantage 0 and, without a KL term, gradient 0. So the loop leaves their answers out of the forward and backward pass and multiplies the loss by the share that is left: the same gradient for less work. (A step whose groups are all silent is skipped; in a trainer that takes it, the optimizer's momentum still moves the weights.) For sampling the adapter is merged into the weights, as a trainer does when it hands them to a generation engine: the same policy, up to rounding, for fewer products.


# %%
def attach(seed: int) -> PeftModel:
    """The reference with a fresh adapter on all linear layers. It computes what the reference computes until it is trained."""
    torch.manual_seed(seed)
    names = list(adapters.linear_layers(model))
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)).eval()


def distance(policy: PeftModel, answers: rollouts.Rollouts) -> float:
    """The KL from the reference in nats an answer, estimated on samples of the policy."""
    with torch.no_grad():
        logps = rollouts.logps(policy, answers)
        with policy.disable_adapter():
            away = rollouts.logps(policy, answers) - logps
    return float(((away.exp() - away - 1) * answers.completion_mask).sum() / len(answers))


def reinforce(run: int, verifier: Callable[[str, Ticket], float], group: int, label: str) -> dict[str, object]:
    """Train an adapter against a verifier; return a row a step, the judged test answers and the distance."""
    policy = attach(seed + run)
    weights = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    order = np.random.default_rng(seed + run)
    rows = []
    for step in tqdm(range(steps), desc=f"{label}, run {run + 1} of {runs}", leave=False):
        tickets = [pools[run][i] for i in order.choice(len(pools[run]), generations // group, replace=False)]
        with adapters.merged(policy):
            answers = sample(policy, tickets, group, seed=10_000 * (seed + run + 1) + step)
        rewards = judged(answers, tickets, verifier)
        advantages = group_advantages(torch.tensor(rewards, dtype=torch.float32))
        rows.append(
            {
                "reward": rewards.mean(),
                "exact": judged(answers, tickets, verify).mean(),
                "valid": judged(answers, tickets, well_formed).mean(),
                "speaking": float((rewards.std(axis=1) > 0).mean()),
            }
        )
        speaking = torch.tensor(rewards.std(axis=1) > 0)
        if not speaking.any():
            continue  # every group was silent: the step has taught nothing
        heard, advantages = answers.groups(speaking), advantages[speaking].flatten().to(model.device)
        share = heard.completion_mask.sum() / answers.completion_mask.sum()
        old = None
        for _ in range(updates):
            logps = rollouts.logps(policy, heard)
            old = logps.detach() if old is None else old
            loss = share * grpo_loss(logps, old, old, advantages, heard.completion_mask, epsilon, beta=0.0)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
    with adapters.merged(policy):
        answers = sample(policy, tests[run], 8, seed + run)
    found = {
        "curve": pd.DataFrame(rows),
        "exact": judged(answers, tests[run], verify),
        "reward": judged(answers, tests[run], verifier),
        "escalated": float(judged(answers, tests[run], escalated).mean()),
        "kl": distance(policy, answers),
        "texts": answers.texts(tokenizer),
    }
    policy.unload()
    return found


def escalated(answer: str, ticket: Ticket) -> float:
    """1 for the answer that always satisfies `adequate`: urgency high, action call."""
    return float('"urgency": "high", "action": "call"' in answer)


def well_formed(answer: str, ticket: Ticket) -> float:
    """1 for a triage, right or wrong."""
    try:
        Triage.parse(answer)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


# %% [markdown]
# ### The weak verifier, optimised
#
# First `adequate`: urgent tickets must not wait, and a call always helps.

# %%
hacked = [reinforce(run, adequate, 8 if generations >= 24 else generations, "adequate") for run in range(runs)]


# %%
def curves(ax: plt.Axes, results: list[dict], column: str, colour: str, label: str) -> None:
    """The runs as thin lines and their mean as a thick one."""
    every = np.stack([result["curve"][column].to_numpy() for result in results])
    for one in every:
        ax.plot(range(1, steps + 1), one, color=colour, lw=0.8, alpha=0.5)
    ax.plot(range(1, steps + 1), every.mean(axis=0), color=colour, lw=2.5, label=label)


fig, ax = plt.subplots()
curves(ax, hacked, "valid", COLOURS.before, "well-formed")
curves(ax, hacked, "reward", COLOURS.other, "reward")
curves(ax, hacked, "exact", COLOURS.wrong, "right")
ax.set(
    xlabel="step",
    ylabel="share of the sampled answers",
    ylim=(-0.03, 1.05),
    title="Trained against adequate: the reward rises",
)
label_lines(ax)
plt.show()
shortest_exploit = min(len(tokenizer(fool_mentions(one.text))["input_ids"]) for part in tests for one in part)
print(f"the shortest of your answers to mentions has {shortest_exploit} tokens, a sample at most {longest_answer}\n")
calm = next((i for i, one in enumerate(tests[0]) if one.triage.urgency == "low" and one.triage.action != "call"), 0)
print(tests[0][calm].text, "\n\nright:", tests[0][calm].triage.to_json(), "\n")
print("\n".join(hacked[0]["texts"][8 * calm : 8 * calm + 4]))
hacked_reward = np.mean([result["reward"].mean() for result in hacked])
hacked_exact = np.mean([result["exact"].mean() for result in hacked])
start_escalated = np.mean([judged(start[run], tests[run], escalated).mean() for run in range(runs)])
hacked_escalated = np.mean([result["escalated"] for result in hacked])
gold_escalated = np.mean(
    [(one.triage.urgency, one.triage.action) == ("high", "call") for part in tests for one in part]
)
compare([("reward", predicted_reward, hacked_reward), ("right triages", predicted_exact, hacked_exact)], format=".0%")
for name, value, label in [
    ("start_reward", start_reward, "reward of adequate before"),
    ("hacked_reward", hacked_reward, "reward of adequate after training against it"),
    ("hacked_exact", hacked_exact, "pass@1 after training against adequate"),
    ("start_escalated", start_escalated, "answers with urgency high and action call, before"),
    ("hacked_escalated", hacked_escalated, "the same after training against adequate"),
    ("gold_escalated", gold_escalated, "tickets for which that is right"),
]:
    card.record(name, value, format=".0%", label=label, tolerance=0.15)

# %% [markdown]
# The reward on test tickets goes from {{start_reward}} to {{hacked_reward}}, while the share of right triages goes from {{pass1_before}} to {{hacked_exact}}. Answers with urgency high and action call go from {{start_escalated}} to {{hacked_escalated}}; they are right for {{gold_escalated}} of the tickets. A dashboard with reward and validity alone shows success.
#
# The thin lines are runs. The figure does not show that every weak verifier is exploited: an exploit has to be sampled before it can be reinforced. `mentions` is open to attack as well, yet the answer that you wrote, a whole message and every label, is longer than a sample may be here (both lengths are printed above): it is never drawn, so no gradient leads to it. A larger model samples more widely, and finds more.
#
# ### The hole closed
#
# The same starts, tickets and numbers of updates, with `verify`.

# %%
sizes = plans
trained = {size: [reinforce(run, verify, size, f"verify, groups of {size}") for run in range(runs)] for size in sizes}
main = trained[8] if 8 in trained else trained[sizes[-1]]

# %%
fig, ax = plt.subplots()
curves(ax, main, "valid", COLOURS.before, "well-formed")
curves(ax, main, "exact", COLOURS.after, "right = reward")
curves(ax, hacked, "exact", COLOURS.wrong, "right, adequate")
ax.set(
    xlabel="step",
    ylabel="share of the sampled answers",
    ylim=(-0.03, 1.05),
    title="Trained against verify: reward is exact match",
)
label_lines(ax)
plt.show()

# %% [markdown]
# Here the blue curve is the reward and the share of right answers in one. A point is {{generations}} answers to six new prompts: at a share of 0.3 the binomial standard error of 48 answers is 7 points, and answers to one prompt are alike, so read a trend over several steps and never a step. The curve does not say how the policy does on tickets it was not trained on; the next figure does.
#
# ### What was added, and what was sharpened

# %%
ks = np.arange(1, 9)


def pass_curve(parts: list[np.ndarray]) -> np.ndarray:
    """pass@k for k = 1 … 8, a row a run."""
    return np.array([[pass_at_k(part.astype(bool), int(k)) for k in ks] for part in parts])


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean over the runs and its 95 % t interval; one run has no interval."""
    mean = float(np.mean(values))
    if len(values) < 2 or np.ptp(values) == 0:
        return mean, mean, mean
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean, mean - half, mean + half


def share_interval(values: np.ndarray) -> tuple[float, float, float]:
    """The same for shares, which end at 0 and 1."""
    mean, low, high = mean_interval(values)
    return mean, max(0.0, low), min(1.0, high)


policies = {
    "before": (pass_curve(before), COLOURS.before),
    "verify": (pass_curve([result["exact"] for result in main]), COLOURS.after),
    "adequate": (pass_curve([result["exact"] for result in hacked]), COLOURS.wrong),
}
fig, ax = plt.subplots()
for name, (values, colour) in policies.items():
    for one in values:
        ax.plot(ks, one, color=colour, lw=0.8, alpha=0.5)
    ax.plot(ks, values.mean(axis=0), color=colour, lw=2.5, label=name)
ax.set(
    xlabel="k, samples a ticket",
    ylabel="pass@k on test tickets",
    ylim=(-0.03, 1.05),
    title="More from the first try, and from the eighth?",
)
label_lines(ax)
plt.show()

gains = {k: policies["verify"][0][:, k - 1] - policies["before"][0][:, k - 1] for k in (1, 8)}
rows = []
for name, (values, _) in policies.items():
    rows.append((name, values[:, 0].mean(), values[:, 7].mean()))
display(pd.DataFrame(rows, columns=["policy", "pass@1", "pass@8"]).style.format(precision=3).hide(axis="index"))
for k in (1, 8):
    middle, low, high = mean_interval(100 * gains[k])
    print(f"pass@{k}: {middle:+.1f} points, 95 % interval over {runs} runs {low:+.1f} to {high:+.1f}")
    name = "gain" if k == 1 else "gain8"
    card.record(name, middle, low=low, high=high, format="+.0f", unit="points", label=f"gain of pass@{k}", tolerance=10)
    print("   by run: " + ", ".join(f"{100 * one:+.1f}" for one in gains[k]))
    card.record(
        f"pass{k}_before", policies["before"][0][:, k - 1].mean(), format=".0%", label=f"pass@{k} before", tolerance=0.1
    )
    card.record(
        f"pass{k}_after", policies["verify"][0][:, k - 1].mean(), format=".0%", label=f"pass@{k} after", tolerance=0.15
    )
changes = {
    "hacked_change": policies["adequate"][0][:, 0] - policies["before"][0][:, 0],
    "hacked_change8": policies["adequate"][0][:, 7] - policies["before"][0][:, 7],
    "hacked_rise": np.array(
        [hacked[run]["reward"].mean() - judged(start[run], tests[run], adequate).mean() for run in range(runs)]
    ),
}
for name, label in zip(
    changes, ("change of pass@1, adequate", "change of pass@8, adequate", "rise of the reward of adequate"), strict=True
):
    middle, low, high = mean_interval(100 * changes[name])
    print(f"{label}: {middle:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}")
    card.record(name, middle, low=low, high=high, format="+.0f", unit="points", label=label, tolerance=15)
card.record("risen", int((gains[1] > 0).sum()), format="d", label="runs whose pass@1 rose, verify", tolerance=1)
card.record("runs", runs, format="d", label="runs")
card.record(
    "kl",
    np.mean([result["kl"] for result in main]),
    format=".1f",
    unit="nats",
    label="KL an answer, verify",
    tolerance=2.0,
)
card.record(
    "kl_hacked",
    np.mean([result["kl"] for result in hacked]),
    format=".1f",
    unit="nats",
    label="KL an answer, adequate",
    tolerance=3.0,
)
card.record("steps", steps, format="d", label="steps of reinforcement")
card.record("generations", generations, format="d", label="sampled answers a step")
compare(
    [
        ("pass@1", predicted_pass1, policies["verify"][0][:, 0].mean()),
        ("pass@8", predicted_pass8, policies["verify"][0][:, 7].mean()),
    ],
    format=".0%",
)

# %% [markdown]
# Pass@1 moves by {{gain}} points and rises in {{risen}} of {{runs}} runs; the 95 % t interval over the runs is {{gain:interval}}. Pass@8 moves by {{gain8}} ({{gain8:interval}}). Three values make a wide interval: the t quantile is 4.3, with six runs it would be 2.6, and the interval less than half as wide at the same scatter. So what stands is this. Training against `adequate` changes pass@1 by {{hacked_change}} points ({{hacked_change:interval}}), pass@8 by {{hacked_change8}} ({{hacked_change8:interval}}) and its own reward by {{hacked_rise}} ({{hacked_rise:interval}}): an exploit is easy to find and three runs are enough to see it. Being right is harder to learn, and what {{steps}} steps of it are worth, these runs do not settle.
#
# The runs share one start and have different companies, tickets, adapters and samples, so the intervals say nothing about another start. The rate, the length of the finetuning and the number of steps were chosen on the worlds of seed 0. There the policy starts better and gains more (`-p seed 0` shows it). Some of that may be the order of the finetuning, which follows the seed; some of it may be selection, since a setting is chosen in part for the luck of the worlds on which it was tried. The two cannot be told apart here, so the worlds reported are others.
#
# Where pass@1 does rise and pass@8 does not, the distribution was sharpened: mass moved to answers that the policy found before in some of its tries. Beware of the ceiling when you compare the two, since pass@8 starts nearer to 1. Eight samples say little about large k, where Yue et al. (2025) look; draw more before you claim that something new was learnt.
#
# The KL of an answer from the reference is {{kl}} nats after `verify` and {{kl_hacked}} after `adequate`, at the same number of updates. Read it beside the reward: it says how much of the reference was given up for it. A KL term in the loss limits how far *any* policy goes, the honest one and the other. It does not repair a verifier: Gao et al. (2022) found that it acts like stopping earlier, with the same true reward at the same distance.
#
# ### What your decision is worth

# %%
fig, ax = plt.subplots()
rows = []
promised = speaking_answers(start_rates, sizes, generations)
for place, size in enumerate(sizes):
    finals = np.array([result["exact"].mean() for result in trained[size]])
    middle, low, high = share_interval(finals)
    colour = COLOURS.after if size == my_plan else COLOURS.before
    intervals(ax, [place], [middle], [low], [high], colour)
    ax.plot([place + 0.12] * runs, finals, "_", ms=14, mew=2, color=colour)
    speaking = np.mean([result["curve"]["speaking"].mean() for result in trained[size]])
    kl = np.mean([result["kl"] for result in trained[size]])
    foreseen = promised[place] / (generations // size * size)
    rows.append((f"{generations // size} x {size}", foreseen, speaking, kl, middle))
    card.record(
        f"group{size}", middle, low=low, high=high, format=".0%", label=f"pass@1 with groups of {size}", tolerance=0.15
    )
ax.axhline(np.mean(start_rates), color=COLOURS.truth, lw=1, ls="--")
direct_label(ax, -0.4, float(np.mean(start_rates)), "before", COLOURS.truth, offset=(0, 5))
ax.set_xticks(
    range(len(sizes)),
    [f"{generations // size} prompts x {size}" + ("\n(your plan)" if size == my_plan else "") for size in sizes],
)
ax.set(xlim=(-0.5, len(sizes) - 0.5), ylabel="pass@1 on test tickets")
ax.set_ylim(bottom=0)
ax.set_title(f"{generations} answers a step, spent in several ways (bars: 95 %, dashes: runs)")
plt.show()
columns = ["prompts x answers", "speak, predicted", "speak, measured", "KL (nats an answer)", "pass@1"]
display(
    pd.DataFrame(rows, columns=columns)
    .style.format({columns[1]: "{:.0%}", columns[2]: "{:.0%}", columns[3]: "{:.1f}", columns[4]: "{:.1%}"})
    .hide(axis="index")
)

# %% [markdown]
# The dashes are runs, the bars 95 % t intervals over them. Where bars overlap widely, three runs do not settle the order, and you would choose by cost: fewer prompts read, the same answers written. Compare the two columns of groups that speak. The prediction takes the start's rates as exact, so a ticket with 0 of 8 counts as never solved, and the promise for large groups is too low; during training the rates move as well.
#
# That more answers speak does not make a plan better: two prompts a step are heard clearly, and they are two. A fixed number of steps favours the plan that learns fastest at this rate, not the plan that ends highest. Before you quote an order, repeat it with a rate tuned for each plan.
#
# ## With a real model
#
# The lesson reads its layer names, template and lengths from the model, so it runs on any causal language model of the Hub with a chat template:
#
# ```
# course run 2.6 -p model_id Qwen/Qwen3-0.6B -p device cuda -p sft_rate 1e-5 -p learning_rate 2e-5 -p rank 16 -p longest_prompt 120 -p steps 60
# ```
#
# The same values in the parameters cell do the same in JupyterLab. What changes:
#
# - **The start.** An instruct model writes JSON from a prompt that names the keys and labels; then no finetuning is needed, and `sft_steps` may be 1. Look at the histogram of success rates first: without tickets between 0 and 1 there is nothing to reinforce.
# - **The trainer.** Take `GRPOTrainer` with `verify` wrapped as `reward_for_trl` is above, and a generation engine (`use_vllm=True`): sampling is most of the time. With another engine the sampler's log-probabilities differ from the trainer's, and `trl` corrects for the ratio (`vllm_importance_sampling_correction`).
# - **Defaults to decide on.** `loss_type="dapo"`, `beta=0.0`, `epsilon=0.2`, `scale_rewards="group"`, `use_bias_correction_kl=True`, `num_generations=8`. `"dr_grpo"` with `scale_rewards=False` removes the biases of length and difficulty; `epsilon_high=0.28` is DAPO's higher upper clip, which lets rare tokens grow.
# - **Length.** Answers of thousands of tokens make truncation common. `mask_truncated_completions=True` keeps a cut-off answer from counting as a wrong one.
# - **The log to watch.** `frac_reward_zero_std` is the share of silent groups, and `kl` is there only with β above 0. Add what the verifier does not measure: exact match on labelled tickets that were never trained on, and twenty answers read by a person.
# - **Precision.** The ratio is an exponential of a difference of log-probabilities; in bfloat16 sampling and training differ enough to clip tokens that never moved. Compare them on one batch first.

# %% [markdown]
# ## Result card

# %%
card.show()

# %% [markdown]
# ## Say it in an interview
#
# <details><summary>Why does GRPO need no value network, and what does it pay for that?</summary>
#
# The mean reward of a group of answers to the same prompt estimates the value of the prompt, which is all that a baseline has to do for the gradient to stay right and vary less. It pays with samples, g for each prompt, and with credit that is spread evenly: all tokens of an answer get the same advantage, the wrong label and the brace alike. Groups without differences give nothing, so the share of groups that speak is the efficiency of the method.
# </details>
#
# <details><summary>Your reward rose from {{start_reward}} to {{hacked_reward}}. How do you know that the model got better?</summary>
#
# You do not; the reward says that the verifier is satisfied. Score samples with something the optimiser never saw: labels, a second verifier, a person. Here the share of right triages ended at {{hacked_exact}}, because urgency high and action call could not be refuted. Look for answers that have become constant, at the distribution of each field, and attack the verifier by hand before training does: an answer that ignores the input should earn next to nothing.
# </details>
#
# <details><summary>pass@1 went from {{pass1_before}} to {{pass1_after}}. Did reinforcement teach the model something new?</summary>
#
# First ask whether it rose: the interval over {{runs}} runs is {{gain:interval}} points, on worlds where no setting was chosen. If it did, compare pass@k, unbiased and at a k as large as you can pay for. Here pass@8 moved by {{gain8}} points ({{gain8:interval}}). If pass@1 rises and pass@k for large k does not, mass moved onto answers that were there; still useful when you serve one answer, but sampling k times and verifying would have found them without training. Say what the base could do at k tries, since that is what the policy could learn from.
# </details>

# %% [markdown]
# ## Read next
#
# - Zhihong Shao et al., [DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models](https://arxiv.org/abs/2402.03300), 2024. Section 4.1: GRPO.
# - DeepSeek-AI, [DeepSeek-R1: Incentivizing Reasoning Capability in LLMs via Reinforcement Learning](https://arxiv.org/abs/2501.12948), 2025. Section 2.2: rewards by rules, and why no learnt reward.
# - Zichen Liu et al., [Understanding R1-Zero-Like Training: A Critical Perspective](https://arxiv.org/abs/2503.20783), 2025. Dr. GRPO: the biases of length and difficulty.
# - Qiying Yu et al., [DAPO: An Open-Source LLM Reinforcement Learning System at Scale](https://arxiv.org/abs/2503.14476), 2025. Section 3: clip-higher, dynamic sampling, token-level loss.
# - John Schulman et al., [Proximal Policy Optimization Algorithms](https://arxiv.org/abs/1707.06347), 2017. Section 3: the clipped objective.
# - John Schulman, [Approximating KL Divergence](http://joschu.net/blog/kl-approx.html), 2020. The estimator k3.
# - DeepSeek-AI, [DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models](https://arxiv.org/abs/2512.02556), 2025. The KL estimator with the ratio, and other repairs of GRPO.
# - Mark Chen et al., [Evaluating Large Language Models Trained on Code](https://arxiv.org/abs/2107.03374), 2021. Section 2.1: pass@k.
# - Yang Yue et al., [Does Reinforcement Learning Really Incentivize Reasoning Capacity in LLMs Beyond the Base Model?](https://arxiv.org/abs/2504.13837), 2025.
# - Leo Gao, John Schulman, Jacob Hilton, [Scaling Laws for Reward Model Overoptimization](https://arxiv.org/abs/2210.10760), 2022. Proxy against true reward, as a function of KL.
