"""LabLM and LabLM-small: the two shapes that this course trains and ships."""

from dataclasses import dataclass

from transformers import LlamaConfig, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-architecture decoder; every in_features is a multiple of 256, as grouped formats need."""

    layers: int
    hidden_size: int = 256
    intermediate_size: int = 768
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vocab_size: int = 4096
    max_positions: int = 1024


SHAPES = {
    "lablm": Shape(layers=6),
    "lablm-small": Shape(layers=3, intermediate_size=256),
}


def llama_config(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Hugging Face configuration of a shape, with the token ids of its tokenizer."""
    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
