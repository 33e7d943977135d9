"""Students that inherit: a smaller vocabulary is a prefix, and weights are LabLM's own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from labutils.capstone.inherit import (
    Shape,
    answer_bits,
    inherit,
    keep_vocabulary,
    recover_,
    shape_of,
    smaller_tokenizer,
)
from labutils.lab.data import service
from labutils.lab.models.load import load_model
from labutils.lab.models.tokenizer import SPECIAL_TOKENS, chat_ids, text_ids

LABLM = load_model("lablm")
SMALLER = {size: smaller_tokenizer(LABLM.tokenizer, size) for size in (262, 1024, 4095, 4096)}


@given(st.text(), st.sampled_from(sorted(SMALLER)))
@settings(deadline=None, max_examples=100)
def test_every_text_round_trips_in_ids_below_the_size(text, size):
    ids = text_ids(SMALLER[size], text)
    assert SMALLER[size].decode(ids) == LABLM.tokenizer.decode(text_ids(LABLM.tokenizer, text)) == text
    assert all(len(SPECIAL_TOKENS) <= i < size for i in ids)


def test_ids_keep_their_meaning_and_the_whole_size_changes_nothing():
    chat = service.evaluation_set("answer", "test", 5, seed=0)[3].messages
    assert chat_ids(SMALLER[4096], chat) == chat_ids(LABLM.tokenizer, chat)
    assert len(chat_ids(SMALLER[1024], chat)) > len(chat_ids(LABLM.tokenizer, chat))
    for token, number in SMALLER[1024].get_vocab().items():
        assert LABLM.tokenizer.get_vocab()[token] == number
    assert [SMALLER[262].convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(6))
    assert SMALLER[262]("aé<|end|>")["input_ids"][-1] == LABLM.tokenizer.eos_token_id
    assert len(text_ids(SMALLER[262], "aé")) == 3  # bytes


@pytest.mark.parametrize("size", [0, 261, 4097])
def test_a_size_that_cuts_off_a_byte_or_is_too_large_is_refused(size):
    with pytest.raises(ValueError, match="size must lie in 262"):
        smaller_tokenizer(LABLM.tokenizer, size)


@pytest.mark.parametrize(
    "vocabulary, merges, special, rule",
    [
        ({"a": 0, "b": 1, "ab": 2, "ba": 3}, [("b", "a"), ("a", "b")], [], "order of its merges"),
        ({"a": 0, "b": 1, "ab": 2}, [("a", "b")], ["<|x|>"], "special tokens must stand before"),
    ],
)
def test_another_tokenizer_is_refused(vocabulary, merges, special, rule):
    other = Tokenizer(models.BPE(vocabulary, merges))
    other.add_special_tokens(special)
    with pytest.raises(ValueError, match=rule):
        smaller_tokenizer(PreTrainedTokenizerFast(tokenizer_object=other), 3)


def test_kept_tokens_have_the_logits_that_they_had():
    ids = torch.tensor([[3, 80, 90, 100, 261]])
    smaller = keep_vocabulary(LABLM, 1024)
    with torch.no_grad():
        ours, theirs = smaller.model(ids).logits, LABLM.model(ids).logits
    torch.testing.assert_close(ours, theirs[..., :1024])
    assert smaller.model.config.vocab_size == 1024 == len(smaller.tokenizer)
    assert smaller.model.lm_head.weight.data_ptr() == smaller.model.model.embed_tokens.weight.data_ptr()  # still tied


def test_inheriting_everything_gives_the_model_itself():
    ids = torch.tensor([[3, 80, 90, 100, 700]])
    with torch.no_grad():
        torch.testing.assert_close(
            inherit(shape_of("lablm")).model(ids).logits, LABLM.model(ids).logits, rtol=1e-3, atol=1e-3
        )


def test_a_student_has_the_sizes_asked_for():
    loaded = inherit(Shape(2, 128, 256, 1, 1024))
    config = loaded.model.config
    sizes = (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_key_value_heads)
    assert (*sizes, config.vocab_size, config.num_attention_heads) == (2, 128, 256, 1, 1024, 2)
    # embedding, per layer attention (q 2 heads, k, v, o) and MLP and 2 gains, final gain
    layer = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 256 + 2 * 128
    assert loaded.model.num_parameters() == 1024 * 128 + 2 * layer + 128


@pytest.mark.parametrize("shape", [Shape(7, 256, 256, 2, 4096), Shape(1, 0, 256, 2, 4096), Shape(1, 1, 1, 3, 262)])
def test_a_size_that_lablm_does_not_have_is_refused(shape):
    with pytest.raises(ValueError, match="a student's sizes must lie in 1 to LabLM's"):
        inherit(shape)


def test_bits_of_a_model_that_knows_nothing():
    loaded = keep_vocabulary(load_model("lablm-small"), 1024)
    loaded.model.get_input_embeddings().weight.data.zero_()  # all logits are 0: each token costs log2 1024 = 10 bits
    items = service.evaluation_set("answer", "validation", 3, seed=1)
    for (bits, size), item in zip(answer_bits(loaded, items), items, strict=True):
        answer = item.messages[-1]["content"]
        assert bits == pytest.approx(10 * (len(text_ids(loaded.tokenizer, answer)) + 1), rel=1e-5)  # and the end
        assert size == len(answer.encode())


def test_recovery_lowers_the_bits_of_new_answers():
    items = service.evaluation_set("answer", "validation", 8, seed=2)
    loaded = inherit(Shape(1, 128, 128, 1, 4096))
    before = sum(bits for bits, _ in answer_bits(loaded, items))
    recover_(loaded, steps=8, batch=4)
    after = sum(bits for bits, _ in answer_bits(loaded, items))
    assert math.isfinite(after) and after < 0.8 * before
