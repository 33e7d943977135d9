"""Tiny random models whose every parameter matters: default initialisation hides bugs (norms of one, no biases)."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

LLAMA = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}

CONFIGS = {
    "llama-gqa-tied": lambda: LlamaConfig(**LLAMA, **HEADS, tie_word_embeddings=True),
    "llama-untied-bias": lambda: LlamaConfig(
        **LLAMA, **HEADS, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    ),
    "llama-head-dim": lambda: LlamaConfig(
        **LLAMA, **HEADS, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    ),
    "llama3-rope": lambda: LlamaConfig(
        **LLAMA, num_attention_heads=4, num_key_value_heads=4, rope_parameters=LLAMA3_ROPE
    ),
    "qwen2": lambda: Qwen2Config(**LLAMA, **HEADS),
    "qwen3": lambda: Qwen3Config(**LLAMA, **HEADS, head_dim=16),
    "gpt2": lambda: GPT2Config(vocab_size=97, n_positions=128, n_embd=32, n_layer=3, n_head=4),
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMAS = [name for name in CONFIGS if name.startswith("llama")]


def tiny_model(name: str, *, seed: int = 0, std: float = 0.08, **changes: int) -> nn.Module:
    """Returns a model with every parameter random: matrices and biases around 0, norm gains around 1."""
    config = CONFIGS[name]()
    config.update(changes)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_gain = parameter.ndim == 1 and parameter_name.endswith("weight")
            spread = 0.5 if is_gain else 3 * std if parameter.ndim == 2 and "embed" in parameter_name else std
            parameter.normal_(mean=1.0 if is_gain else 0.0, std=spread, generator=generator)
    return model


def random_ids(count: int, *, batch: int = 1, seed: int = 0, vocab: int = 97) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, count), generator=torch.Generator().manual_seed(seed))
