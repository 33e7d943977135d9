"""Every path's logits equal the naive path's, and its greedy tokens equal transformers' generate."""

import pytest
import torch
from shapes import unchecked
from tiny_models import CONFIGS, random_ids, tiny_model

from labutils.generation import decode
from labutils.generation.cache import CompiledKVCache, KVCache, StaticKVCache
from labutils.generation.decode import (
    decode_one_token,
    forward_logits,
    generate_batch,
    generate_cached,
    generate_compiled,
    generate_naive,
    generate_static,
    pad_left,
    prefill,
)
from labutils.generation.sampling import Sampler
from labutils.lab.layers.compile import KernelError, torch_compile_lack

NEW = 12


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama-gqa-tied")


def caches(model, batch: int = 1):
    settings = {"max_length": 40, "batch": batch}
    return [KVCache(), StaticKVCache(model.config, **settings), CompiledKVCache(model.config, **settings)]


def reference(model, ids, new=NEW, **settings):
    return model.generate(ids, max_new_tokens=new, do_sample=False, use_cache=True, **settings)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_prefill_and_decode_equal_the_naive_logits(model):
    ids = random_ids(15, batch=2)
    expected = forward_logits(model, ids)
    assert expected.std() > 0.3, "logits this flat would hide an error"
    for cache in caches(model, batch=2):
        assert_close(prefill(model, ids[:, :9], cache), expected[:, 8])
        for i in range(9, 15):
            assert_close(decode_one_token(model, ids[:, i], cache), expected[:, i])


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 100])
def test_chunked_prefill_equals_the_naive_logits(model, chunk_size):
    ids = random_ids(13)
    expected = forward_logits(model, ids)
    for cache in caches(model):
        assert_close(prefill(model, ids[:, :11], cache, chunk_size=chunk_size), expected[:, 10])
        assert_close(prefill(model, ids[:, 11:], cache), expected[:, 12])  # a second prompt behind the first


def test_rollback_equals_never_having_been_there(model):
    ids, wrong = random_ids(14), random_ids(5, seed=9)
    expected = forward_logits(model, ids)
    for cache in caches(model):
        prefill(model, ids[:, :8], cache)
        prefill(model, wrong, cache)
        cache.truncate(8)
        assert_close(decode_one_token(model, ids[:, 8], cache), expected[:, 8])
        cache.truncate(4)
        assert_close(prefill(model, ids[:, 4:], cache), expected[:, 13])


def test_left_padding_and_chunks_equal_each_prompt_alone(model):
    prompts = [random_ids(n, seed=n)[0].tolist() for n in (3, 11, 7)]
    ids, mask = pad_left(prompts, pad_token_id=0)
    follow = random_ids(3, seed=5)[0]
    alone = [forward_logits(model, torch.tensor([p + [int(f)]])) for p, f in zip(prompts, follow, strict=True)]
    for chunk_size in (None, 4):
        for cache in caches(model, batch=3):
            logits = prefill(model, ids, cache, attention_mask=mask, chunk_size=chunk_size)
            assert_close(logits, torch.stack([a[0, -2] for a in alone]))
            longer = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
            assert_close(decode_one_token(model, follow, cache, longer), torch.stack([a[0, -1] for a in alone]))


@pytest.mark.parametrize("generate", [generate_naive, generate_cached, generate_static])
def test_greedy_tokens_equal_transformers_generate(model, generate):
    for batch, length in ((1, 9), (3, 5), (1, 1)):
        ids = random_ids(length, batch=batch, seed=length)
        assert torch.equal(generate(model, ids, NEW), reference(model, ids))


def test_batched_greedy_tokens_equal_transformers_generate_and_each_prompt_alone(model):
    prompts = [random_ids(n, seed=n)[0].tolist() for n in (3, 11, 7)]
    ids, mask = pad_left(prompts, pad_token_id=0)
    ours = generate_batch(model, prompts, NEW, pad_token_id=0)
    assert torch.equal(ours, reference(model, ids, attention_mask=mask, pad_token_id=0))
    for row, prompt in zip(ours, prompts, strict=True):
        assert torch.equal(row[-NEW:], generate_naive(model, torch.tensor([prompt]), NEW)[0, -NEW:])


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt2"])
def test_compiled_path_is_one_graph_and_equals_transformers_generate(name):
    model, ids = tiny_model(name), random_ids(6)
    torch._dynamo.reset()
    with unchecked(), torch._dynamo.config.patch(error_on_recompile=True):
        tokens = generate_compiled(model, ids, NEW, backend="eager")
    assert torch.equal(tokens, reference(model, ids))


@pytest.mark.slow
@pytest.mark.skipif(bool(torch_compile_lack()), reason=torch_compile_lack())
def test_inductor_equals_transformers_generate(llama):
    ids = random_ids(6)
    with unchecked():  # the shape checker would be compiled too
        assert torch.equal(generate_compiled(llama, ids, NEW), reference(llama, ids))


def test_generate_compiled_says_first_what_the_machine_lacks(llama, monkeypatch):
    monkeypatch.setattr(decode, "torch_compile_lack", lambda: "no C compiler: install g++ or clang")
    with pytest.raises(KernelError, match="no C compiler: install"):
        generate_compiled(llama, random_ids(6), NEW)
    assert generate_compiled(llama, random_ids(6), 1, backend="eager").shape == (1, 7)


def test_stop_tokens_end_each_row_as_in_transformers(llama):
    ids = random_ids(5, batch=3, seed=2)
    free = generate_cached(llama, ids, NEW)
    stop = [int(free[0, 7]), int(free[1, 9])]
    expected = reference(llama, ids, eos_token_id=stop, pad_token_id=min(stop))
    for generate in (generate_naive, generate_cached, generate_static):
        assert torch.equal(generate(llama, ids, NEW, stop=stop), expected)
    assert torch.equal(
        generate_batch(llama, ids.tolist(), NEW, pad_token_id=0, stop=stop),
        reference(llama, ids, eos_token_id=stop, pad_token_id=0),
    )


def test_stop_token_ends_a_single_row_early(llama):
    ids = random_ids(5, seed=2)
    free = generate_cached(llama, ids, NEW)
    stopped = generate_cached(llama, ids, NEW, stop=[int(free[0, 8])])
    first = free[0, 5:].tolist().index(int(free[0, 8]))
    assert torch.equal(stopped, free[:, : 5 + first + 1])


def test_sampled_paths_draw_the_same_tokens_from_the_same_seed(llama):
    ids = random_ids(5, batch=2)

    def draw(generate):
        return generate(
            llama, ids, NEW, choose=Sampler(torch.Generator().manual_seed(3), temperature=0.8, top_k=20, top_p=0.9)
        )

    expected = draw(generate_naive)
    assert torch.equal(draw(generate_cached), expected)
    assert torch.equal(draw(generate_static), expected)
    assert not torch.equal(expected, generate_naive(llama, ids, NEW))


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda m: generate_cached(m, random_ids(3), 0), "max_new_tokens must be at least 1; got 0"),
        (lambda m: generate_cached(m, random_ids(3)[0], 2), r"\(batch, positions\) and a token; got \(3,\)"),
        (lambda m: prefill(m, random_ids(3), KVCache(), chunk_size=0), "chunk_size must be at least 1; got 0"),
        (lambda m: prefill(m, random_ids(3)[:, :0], KVCache()), "at least one token; got shape"),
        (lambda m: generate_batch(m, [[1], []], 2, pad_token_id=0), r"at least one token; got lengths \[1, 0\]"),
        (lambda m: generate_batch(m, [], 2, pad_token_id=0), r"got lengths \[\]"),
    ],
)
def test_decode_bad_input_states_the_rule(llama, call, rule):
    with unchecked(), pytest.raises(ValueError, match=rule):
        call(llama)
