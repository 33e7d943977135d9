"""Bits per byte: how well a language model predicts real text, comparable across tokenizers and with compressors."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from labutils.lab.data.corpus import Document
from labutils.lab.models.tokenizer import text_ids


@torch.no_grad()
def token_nats(
    model, token_ids: Int[Tensor, " n"], *, context: int, stride: int | None = None, batch: int = 4
) -> Float[Tensor, " n-1"]:
    """−ln p(token | what came before) of every token but the first, by windows that overlap.

    Each window of `context` tokens scores only its last `stride` tokens (the first window all of them), so that every
    token is scored once and, after the first window, sees at least context − stride tokens.

    Args:
        model: a Hugging Face causal LM.
        token_ids: ids of one document.
        context: tokens in a window.
        stride: tokens by which windows advance; by default half of `context`.
        batch: windows in one forward pass.

    Raises:
        ValueError: when stride is not in 1 … context − 1.
    """
    stride = context // 2 if stride is None else stride
    if not 1 <= stride < context:
        raise ValueError(f"stride must lie in 1 to context - 1 = {context - 1}; got {stride}")
    n = len(token_ids)
    starts = [0, *range(stride, max(n - context, 0) + stride, stride)] if n > context else [0]
    nats = torch.empty(n - 1)
    for i in range(0, len(starts), batch):
        windows = [(s, token_ids[s : s + context]) for s in starts[i : i + batch]]
        for start, window_nats in _score(model, windows):
            skip = 0 if start == 0 else context - stride - 1
            nats[start + skip : start + len(window_nats)] = window_nats[skip:]
    return nats


def _score(model, windows: list[tuple[int, Tensor]]):
    """Scores windows of one length together; the last one, which may be shorter, alone."""
    full = [w for w in windows if len(w[1]) == len(windows[0][1])]
    for group in (full, windows[len(full) :]):
        if not group:
            continue
        ids = torch.stack([ids for _, ids in group]).to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").cpu()
        yield from ((start, row) for (start, _), row in zip(group, nats, strict=True))


def document_bits(model, tokenizer, document: Document, *, context: int) -> tuple[float, int]:
    """Bits that the model needs for a document, and the document's size in UTF-8 bytes."""
    chat = tokenizer(document.text, add_special_tokens=False)["input_ids"] if document.is_chat else None
    prefixed = [tokenizer.bos_token_id, *(chat or text_ids(tokenizer, document.text))]
    nats = token_nats(model, torch.tensor(prefixed), context=context)
    return nats.sum().item() / math.log(2), len(document.text.encode())


def bits_per_byte(model, tokenizer, documents: list[Document], *, context: int) -> float:
    """Σ bits ÷ Σ bytes over documents.

    Raises:
        ValueError: when there is no text.
    """
    bits, sizes = zip(*(document_bits(model, tokenizer, d, context=context) for d in documents), strict=True)
    return sum(bits) / sum(sizes)
