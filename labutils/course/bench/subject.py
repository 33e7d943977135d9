"""What a benchmark runs on: LabLM with real text, and a random model large enough for claims about bandwidth."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from labutils.lab.data.corpus import Document, stdlib_documents
from labutils.lab.models.evaluate_text import bits_per_byte
from labutils.lab.models.load import load_model
from labutils.measurement.resources import weight_bytes_read

QUALITY_BYTES = 2000  # of each held-out module: enough to see damage, short enough for a benchmark
SPEED_SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 15, "vocab_size": 32_000}
SIZES_8B = {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "vocab_size": 128_256}
SIZES_8B |= {"num_attention_heads": 32, "num_key_value_heads": 8}  # as Llama 3 8B, with one table for both ends


@dataclass(frozen=True)
class Subject:
    """A model, a prompt, and the model's quality where it has one."""

    name: str
    model: nn.Module
    tokenizer: object | None
    token_ids: Tensor
    bits_per_byte: float | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one decoding step reads."""
        return weight_bytes_read(self.model)


def trained_subject(name: str = "lablm", *, prompt_tokens: int = 16) -> Subject:
    """A trained model on held-out Python source: the prompt, and the bits per byte.

    Raises:
        LoadError: If the model cannot be loaded.
    """
    model, tokenizer = load_model(name)
    documents = [Document(d.name, d.text[:QUALITY_BYTES]) for d in stdlib_documents("validation")]
    ids = tokenizer(documents[0].text, return_tensors="pt").input_ids[:, :prompt_tokens]
    quality = bits_per_byte(model, tokenizer, documents, context=model.config.max_position_embeddings)
    return Subject(Path(name).name, model, tokenizer, ids, quality)


def speed_subject(*, prompt_tokens: int = 16, seed: int = 0, **sizes: int) -> Subject:
    """A random-weight Llama, 0.2B parameters by default: values do not change speed, and its name says so."""
    config = LlamaConfig(**(SPEED_SIZES | {"num_attention_heads": 16, "num_key_value_heads": 4} | sizes))
    config.tie_word_embeddings = True
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    count = sum(p.numel() for p in model.parameters())
    coin = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (1, prompt_tokens), generator=coin, device="cpu")
    return Subject(f"{count / 1e9:.2g}B Llama, random weights", model, None, ids)
