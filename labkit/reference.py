"""A real corpus that every learner already has: the Python language reference inside CPython, and docstrings of torch,
transformers and peft. Read at run time from what is installed; none of it is stored here."""

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pydoc_data.topics import topics

OBJECTS = {
    "torch": "Tensor.backward Tensor.detach Tensor.view Tensor.contiguous Tensor.expand Tensor.scatter_"
    " Tensor.masked_fill_ arange bmm cat compile einsum gather from_numpy load logsumexp manual_seed"
    " matmul multinomial no_grad inference_mode quantile save stack topk where",
    "torch.autograd": "backward grad Function",
    "torch.nn": "Module.register_buffer Module.register_forward_hook Module.load_state_dict Module.train Module.to"
    " AdaptiveAvgPool2d BatchNorm1d BCEWithLogitsLoss Conv2d CrossEntropyLoss Dropout Embedding GELU KLDivLoss"
    " LayerNorm Linear LSTM MultiheadAttention ParameterList RMSNorm TransformerEncoderLayer",
    "torch.nn.functional": "cross_entropy gumbel_softmax one_hot pad scaled_dot_product_attention softmax",
    "torch.nn.utils": "clip_grad_norm_ parametrize.register_parametrization rnn.pack_padded_sequence",
    "torch.optim": "AdamW",
    "torch.optim.lr_scheduler": "CosineAnnealingLR LambdaLR OneCycleLR ReduceLROnPlateau",
    "torch.utils.checkpoint": "checkpoint",
    "torch.utils.data": "DataLoader IterableDataset WeightedRandomSampler random_split",
    "transformers": "DataCollatorForLanguageModeling DynamicCache"
    " GenerationConfig PreTrainedModel.resize_token_embeddings PreTrainedModel.save_pretrained"
    " PreTrainedTokenizerBase.apply_chat_template Trainer Trainer.compute_loss TrainingArguments TextIteratorStreamer",
    "peft": "LoraConfig IA3Config PrefixTuningConfig PromptTuningConfig VeraConfig AdaLoraConfig get_peft_model"
    " prepare_model_for_kbit_training PeftModel.from_pretrained PeftModel.save_pretrained PeftModel.disable_adapter"
    " PeftModel.load_adapter LoraModel.merge_and_unload LoraModel.add_weighted_adapter",
}
"""The objects whose docstrings are in the corpus, by module."""

OVERLAP = 0.9
_WORDS = 12


@dataclass(frozen=True)
class Document:
    """One topic of the language reference (`python/with`) or one docstring (`torch.nn.Linear`)."""

    id: str
    text: str


@dataclass(frozen=True)
class Question:
    """A question as a user asks it. The passage that answers it is the one of `document` that holds `evidence`, a few
    words that occur in the whole corpus once (white space aside). `split` is "development" or "test"; all questions
    on one document are in one of them."""

    id: str
    text: str
    document: str
    evidence: str
    split: str


@cache
def documents() -> tuple[Document, ...]:
    """The corpus, the same on each machine with the same versions of Python and of the libraries.

    Topics of the language reference that another topic repeats are left out: at least nine tenths of their runs of
    twelve words occur in it.
    """
    return (*_topics(), *_docstrings())


def _topics() -> Iterator[Document]:
    runs = {key: _runs(text) for key, text in topics.items()}
    for key, text in topics.items():
        longer = (other for other in topics if len(topics[other]) > len(text))
        if not any(len(runs[key] & runs[other]) >= OVERLAP * len(runs[key]) for other in longer):
            yield Document(f"python/{key}", text.strip())


def _runs(text: str) -> set[tuple[str, ...]]:
    words = re.sub(r"\A.*\n\*+\n", "", text).split()  # the heading is the topic's own
    return {tuple(words[i : i + _WORDS]) for i in range(max(1, len(words) - _WORDS + 1))}


def _docstrings() -> Iterator[Document]:
    for module, names in OBJECTS.items():
        for name in names.split():
            found = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
            text = inspect.getdoc(found)
            if not text:
                raise LookupError(f"{module}.{name} has no docstring in the installed version; take it out of OBJECTS")
            yield Document(f"{module}.{name}", text)


def questions(split: str | None = None) -> list[Question]:
    """All questions, or those of one split; `ValueError` names the splits there are."""
    if split not in (None, "development", "test"):
        raise ValueError(f"unknown split {split!r}; choose development or test")
    lines = files("labkit").joinpath("questions.jsonl").read_text("utf-8").splitlines()
    every = [Question(**json.loads(line)) for line in lines]
    return [question for question in every if split in (None, question.split)]


def holds(text: str, evidence: str) -> bool:
    """Whether a text holds the words of an evidence, however its lines are broken."""
    return " ".join(evidence.split()) in " ".join(text.split())
