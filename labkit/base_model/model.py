"""The architecture: a small stock Llama."""

import torch
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
    survive the norm of the first layer, or nothing can be copied. All rows get one more vector of norm 1 in common: a
    Llama has no biases, and a head that attends by position alone, such as to the token before, needs a direction that
    every token has. It adds the same to all logits, so the softmax does not see it.
    """
    model = LlamaForCausalLM(config(tokenizer))
    embedding = model.get_input_embeddings().weight
    nn.init.normal_(embedding, std=model.config.hidden_size**-0.5)
    shared = nn.functional.normalize(torch.randn(model.config.hidden_size), dim=0)
    with torch.no_grad():
        embedding.add_(shared)
    return model
