"""Streaming: whole characters only, text that joins to the tokenizer's, times kept apart."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import unchecked
from tiny_models import random_ids, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from labutils.generation import stream as stream_module
from labutils.generation.decode import generate_cached
from labutils.generation.fast_llama import FastLlama
from labutils.generation.stream import CachedDecoder, StreamedToken, StreamTimes, TextPieces, stream


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: every non-ASCII character is torn over several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZER = byte_tokenizer()


def pieces_of(ids: list[int]) -> list[str]:
    pieces = TextPieces(TOKENIZER.decode)
    return [pieces.push(i) for i in ids] + [pieces.flush()]


def test_a_torn_character_waits_for_its_last_byte():
    assert pieces_of(TOKENIZER.encode("aä🙂b")) == ["a", "", "ä", "", "", "", "🙂", "b", ""]


@settings(deadline=None)
@given(st.text())
def test_pieces_join_to_the_text_and_none_is_torn(text):
    pieces = pieces_of(TOKENIZER.encode(text))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(deadline=None)
@given(st.lists(st.integers(0, 255), max_size=30))
def test_pieces_of_any_bytes_join_to_the_tokenizers_decoding(ids):
    assert "".join(pieces_of(ids)) == TOKENIZER.decode(ids)


def test_pieces_keep_the_spaces_of_a_tokenizer_that_drops_the_first_one():
    words = ["\u2581a", "\u2581b", "c", "\u2581d"]

    def decode(ids):
        return "".join(words[i] for i in ids).replace("\u2581", " ").removeprefix(" ")

    pieces = TextPieces(decode)
    assert [pieces.push(i) for i in range(4)] == ["a", " b", "c", " d"] and decode([0, 1, 2, 3]) == "a bc d"


def test_flush_shows_an_unfinished_character_as_the_tokenizer_does():
    ids = TOKENIZER.encode("ok🙂")[:-1]
    assert "".join(pieces_of(ids)) == TOKENIZER.decode(ids) == "ok\ufffd"


@pytest.mark.parametrize("make", [CachedDecoder, lambda m: FastLlama(m, max_length=64)])
def test_stream_yields_the_tokens_of_generate_and_their_text(make):
    model, ids = tiny_model("llama-gqa-tied"), random_ids(6)
    expected = generate_cached(model, ids, 15)[0, 6:].tolist()
    streamed = list(stream(make(model), TOKENIZER, ids, 15))
    assert [t.token_id for t in streamed] == expected
    assert "".join(t.text for t in streamed) == TOKENIZER.decode(expected)
    assert all(t.seconds > 0 for t in streamed)


def test_stream_stops_after_a_stop_token():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(6)
    free = [t.token_id for t in stream(CachedDecoder(model), TOKENIZER, ids, 15)]
    stopped = [t.token_id for t in stream(CachedDecoder(model), TOKENIZER, ids, 15, stop=[free[4]])]
    assert stopped == free[: free.index(free[4]) + 1]


def test_times_of_the_first_token_and_of_the_others_are_kept_apart(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stream_module.time, "perf_counter", lambda: now[0])

    class Slow:
        def prefill(self, token_ids):
            now[0] += 5.0
            return torch.zeros(1, 97)

        def decode_one_token(self, next_ids):
            now[0] += 0.5
            return torch.zeros(1, 97)

    tokens = []
    for token in stream(Slow(), TOKENIZER, random_ids(3), 4):
        now[0] += 100.0  # a slow reader must not slow the model
        tokens.append(token)
    times = StreamTimes.of(tokens)
    assert times.time_to_first_token_s == 5.0
    assert times.seconds_per_token == (0.5, 0.5, 0.5)
    assert (times.time_per_output_token_s, times.tokens_per_s) == (0.5, 2.0)


def test_times_of_a_single_token_have_no_decoding_speed():
    times = StreamTimes.of([StreamedToken(1, "a", 2.0)])
    assert (times.time_to_first_token_s, times.time_per_output_token_s, times.tokens_per_s) == (2.0, None, None)


def test_stream_bad_input_states_the_rule():
    with pytest.raises(ValueError, match=r"at least 1 new token; got \(1, 3\), 0"):
        stream(None, TOKENIZER, random_ids(3), 0)
    with unchecked(), pytest.raises(ValueError, match="one prompt"):
        stream(None, TOKENIZER, random_ids(3, batch=2), 1)
    with pytest.raises(ValueError, match="at least one token; got none"):
        StreamTimes.of([])
