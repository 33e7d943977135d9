"""A loaded model as chapter 11 serves it: its decoder over paged memory, and its tokenizer's part of the server."""

from labutils.lab.models.load import LanguageModel
from labutils.lab.models.quantized import fast_llama
from labutils.lab.models.tokenizer import chat_ids, text_ids
from labutils.serving.paged import PagedLlama
from labutils.serving.server import Served


def paged_llama(model, *, positions: int, block_size: int = 16) -> PagedLlama:
    """A Llama or Qwen2 model, float or packed, with memory for so many positions of all requests together.

    Raises:
        ValueError: For an architecture that `FastLlama` does not know, or no room for a block.
        KernelError: For packed weights without the C kernels.
    """
    return PagedLlama(fast_llama(model, max_length=positions), block_size=block_size)


def served_model(loaded: LanguageModel, name: str) -> Served:
    """How the server reads prompts for a model; what users write never becomes a control token."""
    model, tokenizer = loaded
    ends = model.generation_config.eos_token_id if model.generation_config else None
    stop = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def encode_chat(messages: list[dict]) -> list[int]:
        return chat_ids(tokenizer, messages, add_generation_prompt=True)

    def encode_text(text: str) -> list[int]:
        return text_ids(tokenizer, text)

    return Served(name, model.config.vocab_size, encode_chat, encode_text, frozenset(stop))
