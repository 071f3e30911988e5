"""The tokenizer: byte-level BPE trained on the pretraining stream, with a chat template."""

from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from labkit.world.seeds import TRAIN_SEEDS
from labkit.world.stream import Stage, document

VOCABULARY = 2048
PAD, START, END, SYSTEM, USER, ASSISTANT = SPECIAL = (
    "<|pad|>",
    "<|start|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
# Words with their leading space, numbers in groups of two digits at most, runs of other signs, single line breaks.
PIECES = r" ?[A-Za-z]+| ?[0-9]{1,2}|'s| ?[^\sA-Za-z0-9]+|\s"
# The sorts of the stream in a mix of their own: names and words in JSON and in quotation marks are rare in the
# stream, and sequences are shorter where they are tokens.
READ_FIRST = Stage(
    "tokenizer",
    (
        ("drill", 0.20),
        ("register", 0.05),
        ("reading", 0.30),
        ("restate", 0.05),
        ("record", 0.20),
        ("signs", 0.10),
        ("complaint", 0.10),
    ),
    2,
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(documents: int = 40_000) -> PreTrainedTokenizerFast:
    """Train the tokenizer on documents of the stream's sorts. `<|start|>` opens every sequence; `<|end|>` closes
    documents and turns."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        _texts(documents),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    start = bpe.token_to_id(START)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A $B", special_tokens=[(START, start)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=1024,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _texts(documents: int) -> Iterator[str]:
    for i in range(documents):
        yield document(TRAIN_SEEDS[i], READ_FIRST).text
