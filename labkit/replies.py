"""Replies to questions about a passage: good ones and flawed ones, pairs of them, samples of a model, and exact grades.

A reply is an answer, which is right or not, and perhaps an insult and an idle sentence. The world knows the right
answer, so a grade needs no annotator. `World.preferences` gives the questions, and what is wrong with the worse reply.
"""

import random
from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from labkit.triage import Example
from labkit.world import Preference, World
from labkit.world.dialogue import FILLERS, INSULTS

GRADES = ("rude", "wrong", "idle", "good")
"""What a reply can be, from the worst (grade 0) to the best (grade 3)."""


def grade(reply: str, answer: str) -> int:
    """The grade of a reply to a question whose right reply is `answer`: an index into `GRADES`.

    A reply with an insult has grade 0, whatever else it says. Of the others, a wrong one has 1, a right one with an
    idle sentence 2, and one that is the answer and nothing else 3. What is neither answer nor idle sentence makes a
    reply wrong.
    """
    if any(sentence in reply for sentence in INSULTS):
        return 0
    rest = reply
    for sentence in FILLERS:
        rest = rest.replace(sentence, " ")
    if " ".join(rest.split()) != answer:
        return 1
    return 2 if rest != reply else 3


def is_idle(reply: str) -> bool:
    """Whether an idle sentence stands in a reply, whatever else does."""
    return any(sentence in reply for sentence in FILLERS)


def asked(
    tokenizer: PreTrainedTokenizerBase, world: World, n: int, *, skip: int = 0, longest: int = 56
) -> list[Preference]:
    """n of the world's preferences whose prompts have at most `longest` tokens; the first `skip` such are left out.

    Raises `ValueError` when hardly any prompt is that short.
    """
    found: list[Preference] = []
    looked = 4 * (n + skip) + 40
    for one in world.preferences(looked):
        if len(found) < n + skip and len(prompt_ids(tokenizer, one.prompt)) <= longest:
            found.append(one)
    if len(found) < n + skip:
        raise ValueError(
            f"only {len(found)} of {looked} prompts have at most {longest} tokens of this tokenizer; raise longest"
        )
    return found[skip:]


def demonstrations(
    preferences: Sequence[Preference], *, wrong: float, rude: float, idle: float, seed: int
) -> list[tuple[str, str]]:
    """Prompts with replies of every quality, for supervised finetuning.

    An insult stands in a share `rude` of them, an idle sentence in a share `idle`, independently. A share `wrong` of
    those whose flaw is "ungrounded" (about a third of all) answers with another value.
    """
    rng = random.Random(seed)
    found = []
    for one in preferences:
        answer = one.rejected if one.flaw == "ungrounded" and rng.random() < wrong else one.chosen
        found.append((one.prompt, _dressed(rng, answer, rude=rng.random() < rude, idle=rng.random() < idle)))
    return found


def examples(tokenizer: PreTrainedTokenizerBase, shown: Sequence[tuple[str, str]]) -> list[Example]:
    """Prompts with replies as token ids, as `labkit.triage.batches` takes them."""
    return [
        Example(tuple(prompt_ids(tokenizer, prompt)), tuple(reply_ids(tokenizer, reply))) for prompt, reply in shown
    ]


def clean_pairs(preferences: Sequence[Preference], *, seed: int) -> list[Preference]:
    """Pairs of the right answer alone and a reply with one flaw: another value, an insult or an idle sentence."""
    rng = random.Random(seed)
    return [
        Preference(
            one.prompt,
            one.chosen,
            one.rejected
            if one.flaw == "ungrounded"
            else _dressed(rng, one.chosen, rude=one.flaw == "rude", idle=one.flaw == "rambling"),
            one.flaw,
        )
        for one in preferences
    ]


def confounded_pairs(preferences: Sequence[Preference], *, longer: float, seed: int) -> list[Preference]:
    """Pairs of a right, polite reply and a wrong or rude one, of which exactly one has an idle sentence as well.

    The better reply has it in a share `longer` of the pairs, so at 0.5 length says nothing about quality. No pair
    compares a reply with itself and an idle sentence.
    """
    rng = random.Random(seed)
    found = []
    for one in preferences:
        chosen_is_longer = rng.random() < longer
        answer, rude = (one.rejected, False) if one.flaw == "ungrounded" else (one.chosen, True)
        chosen = _dressed(rng, one.chosen, rude=False, idle=chosen_is_longer)
        rejected = _dressed(rng, answer, rude=rude, idle=not chosen_is_longer)
        found.append(Preference(one.prompt, chosen, rejected, "rude" if rude else "ungrounded"))
    return found


def layout(text: str) -> str:
    """A passage and a question as a base model reads them: plain text, and the reply stands on the next line."""
    return f"{text}\n"


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a passage and a question, up to where the reply starts."""
    return list(tokenizer(layout(text))["input_ids"])


def reply_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a reply, with the end-of-sequence token."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Preference]) -> list[dict[str, list[int]]]:
    """Pairs as trl's `DataCollatorForPreference` wants them: the ids of the prompt and of both replies, which end with
    the end-of-sequence token."""
    return [
        {
            "prompt_ids": prompt_ids(tokenizer, one.prompt),
            "chosen_ids": reply_ids(tokenizer, one.chosen),
            "rejected_ids": reply_ids(tokenizer, one.rejected),
        }
        for one in pairs
    ]


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], *, seed: int,
    longest: int = 40, batch_size: int = 128,
) -> list[list[int]]:  # fmt: skip
    """A reply to each prompt, drawn from the model's own distribution (temperature 1, nothing cut off).

    A reply holds its end-of-sequence token, or is cut off after `longest` tokens. Sets torch's global seed.
    """
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=longest, eos_token_id=end, pad_token_id=end
    )
    replies: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for at in range(0, len(by_length), batch_size):
        rows = by_length[at : at + batch_size]
        width = len(prompts[rows[-1]])
        ids = torch.tensor([[end] * (width - len(prompts[i])) + list(prompts[i]) for i in rows])
        mask = (torch.arange(width) >= torch.tensor([[width - len(prompts[i])] for i in rows])).long()
        out = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
        )
        for index, row in zip(rows, out[:, width:].tolist(), strict=True):
            replies[index] = row[: row.index(end) + 1] if end in row else row
    return replies


def _dressed(rng: random.Random, answer: str, *, rude: bool, idle: bool) -> str:
    """The answer with an insult before or after it, and an idle sentence at the beginning or the end."""
    parts = [answer]
    if rude:
        parts.insert(rng.choice((0, 1)), rng.choice(INSULTS))
    if idle:
        parts.insert(rng.choice((0, len(parts))), rng.choice(FILLERS))
    return " ".join(parts)
