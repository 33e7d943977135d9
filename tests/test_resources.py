"""Resources: real allocations seen, bytes counted by hand."""

import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from labutils.measurement import resources
from labutils.measurement.resources import (
    kv_bytes_per_position,
    kv_cache_bytes,
    peak_memory,
    weight_bytes_read,
)

LLAMA = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**changes) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, "num_key_value_heads": 2, **changes}))


MODEL = llama()


def test_weight_bytes_of_a_llama_by_hand():
    layer = 8 * 8 + 2 * 4 * 8 + 8 * 8 + 3 * 8 * 16 + 2 * 8  # q, k and v, o, MLP, two norms
    rest = 8 + 10 * 8  # the last norm and the output layer
    assert weight_bytes_read(llama(tie_word_embeddings=True)) == 4 * (2 * layer + rest)
    assert weight_bytes_read(llama(tie_word_embeddings=False)) == 4 * (2 * layer + rest + 8)  # and one row of the table


def test_weight_bytes_of_gpt2_count_one_row_of_the_position_table():
    config = GPT2Config(vocab_size=10, n_positions=32, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    all_bytes = sum(p.numel() for p in model.parameters()) * 4
    assert weight_bytes_read(model) == all_bytes - 4 * (31 * 8)


def test_weight_bytes_follow_the_dtype():
    assert weight_bytes_read(llama().to(torch.bfloat16)) * 2 == weight_bytes_read(llama())


def test_kv_bytes_know_grouped_query_attention():
    shared, full = llama(num_key_value_heads=2).config, llama(num_key_value_heads=4).config
    assert kv_bytes_per_position(shared) == 2 * 2 * 2 * 2 * 4  # K and V, layers, KV heads, head size, bytes
    assert kv_bytes_per_position(full) == 2 * kv_bytes_per_position(shared)
    assert kv_bytes_per_position(GPT2Config(n_embd=8, n_layer=1, n_head=2), element_bytes=2) == 2 * 8 * 2


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 5000))
def test_cache_grows_linearly_with_the_context(context):
    assert kv_cache_bytes(MODEL.config, context) == 64 * context


def test_peak_memory_sees_an_allocation_that_is_gone_again():
    with peak_memory() as idle:
        pass
    if idle.host_bytes is None:
        pytest.skip("no resettable high-water mark on this system")
    with peak_memory() as busy, mmap.mmap(-1, 80_000_000) as pages:  # new pages; a tensor may get freed ones again
        for start in range(0, 80_000_000, mmap.PAGESIZE):
            pages[start] = 1
    assert 70e6 < busy.host_bytes - idle.host_bytes < 120e6
    assert "MB" in str(busy)


def test_peak_memory_says_not_measured_where_no_mark_can_be_reset(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "_rusage_peak_bytes", lambda: 1000)
    with peak_memory(proc=tmp_path / "absent") as peak:
        pass
    assert peak.host_bytes is None
    assert "not measured" in str(peak)


def test_resources_bad_input_states_the_rule():
    with pytest.raises(ValueError, match="must not be negative; got -1"):
        kv_cache_bytes(llama().config, -1)
