"""Models over ranks equal the single process: by hand and by library."""

import random
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_models import IDS, MODELS, expert_weights, groups_of_prompts, piped_model
from tiny_models import random_ids, tiny_model
from torch.nn.functional import scaled_dot_product_attention

from labutils.distributed import collectives
from labutils.distributed.collectives import Link, all_reduce_bytes, checksum
from labutils.distributed.disaggregation import break_even_bytes_per_s
from labutils.distributed.launch import launch
from labutils.distributed.pipeline import bubble, measured_bubble, stage_layers
from labutils.distributed.ring_attention import merge_attention, partial_attention
from labutils.distributed.tensor_parallel import VocabParallelEmbedding, heads_of, span
from labutils.lab.layers.architecture import Architecture

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="tried on POSIX only")
LATER = pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[2, *LATER], ids="{} ranks".format)
def found(request):
    """What each rank brought back: one launch for all tests of a size."""
    return launch("rank_models:everything", request.param, timeout_s=400)


@pytest.mark.parametrize("name", MODELS)
def test_tensor_parallel_logits_equal_the_single_process(found, name):
    model, ids = tiny_model(name), random_ids(**IDS)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        after = model(input_ids=torch.cat([ids, ids[:, :1]], dim=1), use_cache=False).logits[:, -1:]
    for rank in found:
        logits, step, eager, *_ = rank["tensor"][name]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(eager, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(step, after, atol=1e-4, rtol=0)


@pytest.mark.parametrize("token_id", [-1, 5, 6])
def test_a_cut_embedding_refuses_an_id_that_is_no_token_s(token_id):
    """Every rank refuses it, so that none waits for the others; unchecked, their sum would be a row of zeros."""
    alone = SimpleNamespace(all_reduce_=lambda rows: rows)
    first, second = (VocabParallelEmbedding(torch.ones(len(m), 2), m, 5, alone) for m in (range(3), range(3, 5)))
    assert (first(torch.tensor([[0, 4]])) + second(torch.tensor([[0, 4]])) == 1).all()
    for rank in (first, second):
        with pytest.raises(IndexError, match=f"^token ids must be 0 to 4; got {token_id}$"):
            rank(torch.tensor([[0, token_id]]))


@pytest.mark.parametrize("name", MODELS)
def test_the_meter_s_calls_and_bytes_follow_the_formulas(found, name):
    """Megatron: two all-reduces a layer, 2(p-1)/p * b*s*h * 4 bytes each; ours has one more for the embedding."""
    config, ranks = tiny_model(name).config, len(found)
    payload = IDS["batch"] * IDS["count"] * config.hidden_size * 4
    reductions = 2 * config.num_hidden_layers + 1
    for rank in found:
        *_, calls, sent = rank["tensor"][name]
        assert calls == {"all_reduce": reductions, "all_gather": 1}
        assert sent["all_reduce"] == pytest.approx(reductions * 2 * (ranks - 1) / ranks * payload, rel=1e-3)
        gathered = (ranks - 1) / ranks * IDS["batch"] * IDS["count"] * config.vocab_size * 4
        assert sent["all_gather"] == pytest.approx(gathered, rel=0.1)  # the parts are padded to the widest


def test_pipeline_tokens_equal_the_single_process(found):
    texts, _, _ = found[-1]["pipeline"]
    model = piped_model()
    for text, prompt in zip(texts, groups_of_prompts(), strict=True):
        expected = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(text, expected)
    assert all(rank["pipeline"][0] == [] for rank in found[:-1])


def test_gpipe_logits_equal_the_single_process(found):
    model = piped_model()
    with torch.no_grad():
        expected = model(input_ids=random_ids(**IDS), use_cache=False).logits
    torch.testing.assert_close(torch.cat(found[-1]["pipeline"][1]), expected, atol=1e-4, rtol=0)


def test_a_pipeline_sends_hidden_states_on_and_tokens_back(found):
    model = piped_model()
    prompts, hidden = groups_of_prompts(), model.config.hidden_size
    positions = sum(p.shape[0] * (p.shape[1] + 4) for p in prompts)  # prompts, then four single tokens
    forward = {"send": 5 * len(prompts)}, {"send": positions * hidden * 4}
    back = {"send": 4 * len(prompts)}, {"send": 4 * sum(p.shape[0] for p in prompts) * 8}
    for index, rank in enumerate(found):
        expected = forward if index < len(found) - 1 else back if index else ({}, {})
        assert rank["pipeline"][2] == expected


def test_one_rank_reads_the_prompt_and_another_writes_the_answer(found):
    if len(found) != 2:
        said = f"2 ranks and at least 1 new token are needed; got {len(found)} and 5"
        assert [rank["disaggregated"] for rank in found] == [said] * len(found)
        return
    for name in MODELS:
        model, ids = tiny_model(name), random_ids(7, seed=3)
        expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
        (nothing, calls, sent), (text, *unsent) = (rank["disaggregated"][name] for rank in found)
        assert nothing is None and torch.equal(text, expected) and unsent == [{}, {}]
        known = Architecture.of(model.config)  # keys and values of 7 positions in float32, and one token as int64
        numbers = known.layers * 2 * known.kv_heads * 7 * known.head_dim
        assert calls == {"send": 2} and sent == {"send": 4 * numbers + 8}


def test_break_even_bandwidth():
    assert break_even_bytes_per_s(1000, 0.5) == 2000
    link = Link(latency_s=0.1, bytes_per_s=break_even_bytes_per_s(1000, 0.5, latency_s=0.1))
    assert link.send_s(1000) == pytest.approx(0.5)
    assert break_even_bytes_per_s(1000, 0.1, latency_s=0.1) == float("inf")


def test_ring_attention_equals_attention_over_the_whole_text(found):
    q, k, v = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1)).unbind()
    expected = scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    joined = torch.cat([rank["ring"][0] for rank in found], dim=1)
    torch.testing.assert_close(joined, expected, atol=1e-5, rtol=0)
    assert all(rank["ring"][1].get("send", 0) == len(found) - 1 for rank in found)


def test_each_token_meets_its_own_experts(found):
    weights, ranks = expert_weights(2 * len(found)), len(found)
    for index, rank in enumerate(found):
        x, ids, gates, y, sent = rank["experts"]
        torch.testing.assert_close(y, torch.einsum("tk,ti,tkij->tj", gates, x, weights[ids]), atol=1e-5, rtol=0)
        elsewhere = int((ids // 2 != index).sum())  # choices of this rank's tokens that live on another rank
        here = sum(int((other["experts"][1] // 2 == index).sum()) for other in found) - (ids.numel() - elsewhere)
        row = x.shape[1] * 4
        assert sent["dispatch"] == elsewhere * row and sent["combine"] == here * row
        assert sent["expert ids"] == elsewhere * 8 and sent["counts"] == (ranks - 1) * 8


def test_broadcast_gives_all_ranks_the_source_s_weights(found):
    befores = [rank["weights"][0] for rank in found]
    assert len(set(befores)) == len(found)
    assert all(rank["weights"][1:] == (befores[0], befores[0]) for rank in found)


@pytest.mark.slow
def test_torch_s_and_transformers_own_parallelism_give_the_same(library_aside, tmp_path):
    library_aside("accelerate")  # transformers asks for it as soon as a model goes to several devices
    model, ids = tiny_model("llama-gqa-tied"), random_ids(**IDS)
    model.save_pretrained(tmp_path)
    arguments = {"folder": str(tmp_path), "name": "llama-gqa-tied"}
    first, second = launch("rank_models:libraries", 2, arguments, timeout_s=400)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    for rank in (first, second):
        torch.testing.assert_close(rank["torch"], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(rank["transformers"], expected, atol=1e-4, rtol=0)
        assert rank["torch calls"] == 2 * 3 + 1 + 1
        assert torch.equal(rank["pipeline"], model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))


def test_a_mesh_of_tensor_and_pipeline_equals_the_single_process(found):
    if len(found) < 4:
        assert found[0]["mesh"] is None
        return
    ids = random_ids(**IDS)
    expected = tiny_model("llama-gqa-tied").generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    # ranks 0 and 1 are the first stage's two slices, 2 and 3 the last one's
    assert found[0]["mesh"] == found[1]["mesh"] == []
    assert torch.equal(found[2]["mesh"][0], expected) and torch.equal(found[3]["mesh"][0], expected)


def test_more_ranks_than_layers_is_one_clear_sentence(found):
    words = "a pipeline needs between 1 and num_hidden_layers=3 stages; got 4" if len(found) == 4 else None
    assert [rank["refusal"] for rank in found] == [words] * len(found)


@pytest.mark.slow
def test_the_kernel_counts_the_bytes_that_the_ring_formula_says():
    counted, predicted = launch("labutils.course.bench.ranks:loopback_bytes", 2, {"megabytes": 32, "rounds": 4})[0]
    assert 1.0 <= counted / predicted < 1.1  # headers, and whatever else uses the loopback meanwhile


@given(st.integers(0, 300), st.integers(1, 9))
def test_span_covers_everything_once_and_evenly(size, ranks):
    parts = [span(size, rank, ranks) for rank in range(ranks)]
    assert [i for part in parts for i in part] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]))
def test_heads_of_keeps_every_query_with_its_key(groups, kv_heads, ranks):
    heads = groups * kv_heads
    if heads % ranks:
        return
    seen = []
    for rank in range(ranks):
        queries, keys = heads_of(rank, ranks, heads=heads, kv_heads=kv_heads)
        seen += queries
        assert {q // groups for q in queries} == set(keys)
        assert len(queries) % len(keys) == 0
    assert seen == list(range(heads))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "words"),
    [
        (4, 2, 3, "must divide num_attention_heads=4; got 3"),
        (12, 3, 2, "must divide num_key_value_heads=3 or be its multiple; got 2"),
    ],
)
def test_heads_of_refuses_to_cut_a_head(heads, kv_heads, ranks, words):
    with pytest.raises(ValueError, match=words):
        heads_of(0, ranks, heads=heads, kv_heads=kv_heads)


def test_stage_layers_by_hand_and_bad_input():
    assert stage_layers(6, 4) == [range(0, 2), range(2, 4), range(4, 5), range(5, 6)]
    with pytest.raises(ValueError, match="between 1 and num_hidden_layers=3 stages; got 4"):
        stage_layers(3, 4)


@given(st.integers(1, 6), st.integers(1, 9))
def test_bubble_is_what_a_perfect_schedule_leaves(stages, micro_batches):
    times = [[(float(s + m), float(s + m + 1)) for m in range(micro_batches)] for s in range(stages)]
    assert measured_bubble(times) == pytest.approx(bubble(stages, micro_batches))


def test_link_times_by_hand():
    link = Link(latency_s=0.5, bytes_per_s=100)
    assert link.send_s(50) == 1.0
    assert link.all_reduce_s(400, ranks=4) == pytest.approx(6 * 1.5)  # 2(p-1) steps of 100 bytes
    assert link.all_gather_s(400, ranks=4) == pytest.approx(3 * 1.5)
    assert link.all_reduce_s(400, ranks=4, one_shot=True) == 12.5  # one latency, and 3 times 400 bytes
    assert link.all_reduce_s(400, ranks=1, one_shot=True) == 0
    assert Link().all_reduce_s(1e9, ranks=8) == 0 and all_reduce_bytes(400, 1) == 0


def test_a_simulated_wait_counts_how_late_the_sleeper_was_woken(monkeypatch):
    """The clock is ours: a sleep takes 10 ms more than asked, of which the last two milliseconds' look absorbs two."""
    now = [0.0]
    monkeypatch.setattr(collectives.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(collectives.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds + 0.010))
    comm = SimpleNamespace(late_s=0.0)
    collectives.Comm.wait(comm, 0.050)
    assert now[0] == pytest.approx(0.058) and comm.late_s == pytest.approx(0.008)
    collectives.Comm.wait(comm, -1.0)
    assert comm.late_s == pytest.approx(0.008)  # a message that is there already waits for nothing


def test_merge_attention_joins_any_cut_of_the_keys():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 10, 4, generator=generator).unbind()
    whole, log_sum = partial_attention(q, k, v, offset=0)
    torch.testing.assert_close(whole, scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0])
    for cut in random.Random(0).sample(range(1, 10), 4):
        first = partial_attention(q, k[:, :cut], v[:, :cut], offset=0)
        second = partial_attention(q, k[:, cut:], v[:, cut:], offset=-cut)
        joined, joined_sum = merge_attention(*first, *second)
        torch.testing.assert_close(joined, whole, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(joined_sum, log_sum)


def test_checksum_sees_a_single_bit():
    model = tiny_model("llama-gqa-tied")
    before = checksum(model)
    weight = next(model.parameters()).data.view(-1)
    weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))
    assert checksum(model) != before
