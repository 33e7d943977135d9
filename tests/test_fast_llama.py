"""The plain fast Llama: same logits, same tokens, same rollback as the model whose weights it took."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, LLAMAS, random_ids, tiny_model
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from labutils.generation.decode import forward_logits
from labutils.generation.fast_llama import FastLlama, check_supported, faster_matvec
from labutils.generation.llama_steps import rms_norm, rotate, softmax_, swiglu
from labutils.generation.sampling import Sampler
from labutils.measurement.resources import weight_bytes_read

seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module", params=[*LLAMAS, "qwen2"])
def model(request):
    return tiny_model(request.param)


@pytest.fixture(params=["numpy", "torch"])
def fast(request, model):
    return FastLlama(model, max_length=40, matvec=request.param)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_logits_equal_the_models_at_every_position(model, fast):
    ids = random_ids(20)
    expected = forward_logits(model, ids)
    assert_close(fast.prefill(ids[:, :7]), expected[:, 6])
    assert_close(fast.prefill(ids[:, 7:11]), expected[:, 10])  # a second chunk
    for i in range(11, 20):
        assert_close(fast.decode_one_token(ids[:, i]), expected[:, i])


def test_rollback_equals_never_having_been_there(model, fast):
    ids = random_ids(12)
    expected = forward_logits(model, ids)
    fast.prefill(ids[:, :8])
    fast.prefill(random_ids(6, seed=8))
    fast.truncate(8)
    assert_close(fast.decode_one_token(ids[:, 8]), expected[:, 8])
    fast.truncate(3)
    assert_close(fast.prefill(ids[:, 3:]), expected[:, 11])


def test_extend_gives_every_row_and_keeps_what_the_head_read(model, fast):
    ids = random_ids(14)
    expected = forward_logits(model, ids)[0]
    fast.prefill(ids[:, :8])
    assert_close(fast.extend(ids[0, 8:13].tolist()), expected[8:13])
    fast.rewind(2)
    head = model.get_output_embeddings()
    assert_close(head(torch.from_numpy(fast.hidden)), expected[8:11])
    assert_close(fast.extend(ids[0, 11:14].tolist()), expected[11:14])
    fast.rewind(6)
    assert fast.hidden.shape == (0, 32) and fast.length == 8
    with pytest.raises(ValueError, match=r"rewound by 0\.\.8 positions; got 9"):
        fast.rewind(9)


def test_greedy_tokens_equal_transformers_generate(model, fast):
    for length in (1, 9):
        ids = random_ids(length, seed=length)
        expected = model.generate(ids, max_new_tokens=20, do_sample=False)
        assert torch.equal(fast.generate(ids, 20), expected)
        assert torch.equal(fast.generate(ids, 20), expected)  # and again: generate starts afresh


def test_stop_and_sampling():
    model = tiny_model("llama-gqa-tied")
    fast, ids = FastLlama(model, max_length=40), random_ids(4)
    free = fast.generate(ids, 10)
    stop = int(free[0, 8])
    assert torch.equal(fast.generate(ids, 10, stop=[stop]), free[:, : 4 + free[0, 4:].tolist().index(stop) + 1])
    drawn = [
        fast.generate(ids, 10, choose=Sampler(torch.Generator().manual_seed(1), temperature=2.0)) for _ in range(2)
    ]
    assert torch.equal(*drawn) and not torch.equal(drawn[0], free)


def test_weight_bytes_equal_those_counted_on_the_model(model, fast):
    assert fast.weight_bytes == weight_bytes_read(model)


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_rms_norm_equals_transformers(seed):
    norm = LlamaRMSNorm(8, eps=1e-5)
    norm.weight.data = random(8, seed=seed + 1)
    x = random(3, 8, seed=seed)
    actual = rms_norm(x.numpy(), norm.weight.detach().numpy(), np.float32(1e-5))
    torch.testing.assert_close(torch.from_numpy(actual), norm(x).detach(), atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_rotate_equals_transformers_and_keeps_lengths(seed):
    angles = random(1, 5, 4, seed=seed).repeat(1, 1, 2)
    x = random(1, 2, 5, 8, seed=seed + 1)
    expected, _ = apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())
    actual = torch.from_numpy(rotate(x.numpy(), angles.cos().numpy(), angles.sin().numpy()))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.norm(dim=-1), x.norm(dim=-1), atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(0.1, 60))
def test_swiglu_and_softmax_equal_torch(seed, spread):
    x = spread * random(2, 8, seed=seed)
    expected = torch.nn.functional.silu(x[:, :4]) * x[:, 4:]
    with np.errstate(over="ignore"):
        torch.testing.assert_close(torch.from_numpy(swiglu(x.numpy())), expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(torch.from_numpy(softmax_(x.numpy().copy())), x.softmax(-1))


def test_faster_matvec_picks_by_the_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("labutils.generation.fast_llama.time.perf_counter", lambda: now[0])

    class Matrix:
        array = np.zeros((2, 3))

        def __call__(self, x, matvec):
            assert x.shape == (1, 3)
            now[0] += {"numpy": 2.0, "torch": 1.0}[matvec]

    assert faster_matvec([Matrix()]) == "torch"


@pytest.mark.parametrize(
    ("config", "settings", "rule"),
    [
        (CONFIGS["gpt2"](), {}, "model_type must be one of .* got gpt2"),
        (CONFIGS["qwen3"](), {}, "got qwen3"),
        (LlamaConfig(hidden_act="gelu"), {}, "hidden_act must be silu; got gelu"),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), {}, "got dynamic"),
        (LlamaConfig(), {"max_length": 0}, "max_length must be at least 1; got 0"),
        (LlamaConfig(), {"matvec": "abacus"}, "got abacus"),
    ],
)
def test_unsupported_models_are_refused_with_the_rule(config, settings, rule):
    with pytest.raises(ValueError, match=rule):
        check_supported(config, **({"max_length": 8, "matvec": "auto"} | settings))


def test_fast_llama_bad_input_states_the_rule():
    fast = FastLlama(tiny_model("llama-gqa-tied"), max_length=4)
    with pytest.raises(ValueError, match="max_length=4 positions; got 0 to 5"):
        fast.prefill(random_ids(5))
    with pytest.raises(ValueError, match=r"0\.\.0 positions; got 1"):
        fast.truncate(1)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        fast.generate(random_ids(2), 0)


def test_hidden_is_what_the_head_read_of_the_rows_that_still_stand():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(6)
    fast = FastLlama(model, max_length=16, matvec="numpy")
    with torch.no_grad():
        states = model.model(torch.cat([ids, torch.tensor([[1, 2, 3]])], dim=1)).last_hidden_state[0]
    fast.prefill(ids)
    torch.testing.assert_close(torch.from_numpy(fast.hidden), states[5:6], rtol=1e-4, atol=1e-5)
    fast.extend([1, 2, 3])
    fast.rewind(2)
    torch.testing.assert_close(torch.from_numpy(fast.hidden), states[6:7], rtol=1e-4, atol=1e-5)
    fast.rewind(3)
    assert len(fast.hidden) == 0
