"""The architecture: a small stock Llama."""

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Four layers of width 128, four heads over two key-value heads, tied embeddings, 1,024 positions."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh model; set torch's seed before.

    Embeddings start at norm 1 rather than at the library's 0.02 a coordinate. Tokens that share their contexts, such as
    the syllables of names, drift together while the grammar is learnt; what tells them apart must be large enough to
    survive the norm of the first layer, or nothing can be copied.
    """
    model = LlamaForCausalLM(config(tokenizer))
    nn.init.normal_(model.get_input_embeddings().weight, std=model.config.hidden_size**-0.5)
    return model
