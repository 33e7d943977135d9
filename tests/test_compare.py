"""Paired quality: a difference on the same tokens, with an interval that the two models' own intervals cannot give."""

import pytest
import torch
from tiny_models import tiny_model

from labutils.lab.data.corpus import Document
from labutils.lab.models.compare import bits_by_document, held_out_dialogues, held_out_documents, paired_quality


class Bytes:
    """A tokenizer of bytes, folded into the tiny models' vocabulary."""

    bos_token_id, chat_template, added_tokens_decoder = 0, None, {}

    def __call__(self, text, add_special_tokens, split_special_tokens=False):
        return {"input_ids": [byte % 97 for byte in text.encode()]}


DOCUMENTS = [Document(f"{i}.py", f"def f{i}(x):\n    return x + {i}\n") for i in range(6)]


def test_paired_interval_is_narrower_than_the_documents_spread():
    baseline = [(100.0 * i, 80 * i) for i in range(1, 7)]
    baseline = [(bits * factor, size) for (bits, size), factor in zip(baseline, (1, 2, 1, 3, 1, 2), strict=True)]
    changed = [(bits + 0.1 * size, size) for bits, size in baseline]
    quality = paired_quality(changed, baseline)
    assert quality.difference == pytest.approx(0.1)
    assert quality.interval == pytest.approx((0.1, 0.1))


def test_paired_quality_refuses_other_documents():
    with pytest.raises(ValueError, match="same documents"):
        paired_quality([(1.0, 3)] * 5, [(1.0, 4)] * 5)


def test_bits_by_document_sees_a_damaged_model():
    model = tiny_model("llama-gqa-tied")
    baseline = bits_by_document(model, Bytes(), DOCUMENTS, context=16)
    assert paired_quality(bits_by_document(model, Bytes(), DOCUMENTS, context=16), baseline).difference == 0
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"got nan on 0\.py"):
        bits_by_document(model, Bytes(), DOCUMENTS, context=16)


def test_held_out_documents_are_cut_at_whole_characters():
    documents = held_out_documents(limit_bytes=700)
    assert len(documents) == 17 and all(600 < len(d.text.encode()) <= 700 for d in documents)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        held_out_documents(limit_bytes=0)


def test_held_out_dialogues_are_whole_chats_of_both_languages():
    dialogues = held_out_dialogues(bundles=6, each=2)
    assert len(dialogues) == 6 and len({d.text for d in dialogues}) == 6
    for d in dialogues:
        assert d.text.startswith("<|") and d.text.endswith("<|end|>") and d.text.count("<|user|>") >= 2
        assert d.is_chat
    text = "".join(d.text for d in dialogues)
    assert any("a" <= c <= "z" for c in text) and any("\u4e00" <= c <= "\u9fff" for c in text)
    with pytest.raises(ValueError, match="at least 1; got 0 and 3"):
        held_out_dialogues(bundles=0)
