from dataclasses import replace

import pytest
import torch
from tiny_models import random_ids, tiny_model

from labutils.course.bench import llama_server
from labutils.course.bench.decoding_batches import RememberingPaged, race_batches
from labutils.course.bench.decoding_rows import DraftRow, as_table, judge
from labutils.course.bench.decoding_ways import (
    Remembering,
    Settings,
    draft_way,
    near_tie,
    plain_way,
    predicted_at,
    step_curve,
)
from labutils.decoding.proposers import ModelDraft, NoDraft, PromptLookup
from labutils.generation.decode import generate_cached
from labutils.generation.fast_llama import FastLlama
from labutils.serving.paged import PagedLlama
from labutils.serving.speculate import generate_speculative_batch


def decoder(model=None):
    return Remembering(FastLlama(model or tiny_model("llama-gqa-tied"), max_length=64, matvec="numpy"))


def test_remembering_decoder_puts_back_what_it_read():
    plain, remembering, ids = (
        FastLlama(tiny_model("llama-gqa-tied"), max_length=64, matvec="numpy"),
        decoder(),
        random_ids(9),
    )
    for _ in range(2):
        plain.truncate(0)
        remembering.truncate(0)
        expected, got = plain.prefill(ids).clone(), remembering.prefill(ids).clone()
        assert torch.equal(got, expected) and remembering.length == 9
        assert torch.equal(remembering.extend([3, 4]).clone(), plain.extend([3, 4]))
        assert (remembering.hidden == plain.hidden).all()
    assert len(remembering.known) == 1


def test_ways_write_the_models_text_and_count_its_tokens():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(9)
    settings, text = Settings(new_tokens=12), generate_cached(model, ids, 12)[0].tolist()
    plain = plain_way("plain float32", decoder(model), settings, stop=())
    drafts = draft_way("drafts", decoder(model), ModelDraft(decoder(model).decoder), settings, (), plain.plain)
    copies = draft_way("copies", decoder(model), PromptLookup(), settings, (), plain.plain)
    for way in (plain, drafts, copies):
        made, tokens, seconds, _ = way.run("qa", 0, ids)
        assert (made, tokens) == (text, 11) and seconds > 0
    assert drafts.run("qa", 0, ids)[3].acceptance == 1


def test_near_tie_looks_at_the_first_difference_only():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(9)
    text = generate_cached(model, ids, 5)[0].tolist()
    other = [*text[:11], (text[11] + 1) % 97, *text[12:]]
    assert not near_tie({"float32": decoder(model)}, "plain float32", other, text)
    twins = tiny_model("llama-gqa-tied")
    with torch.no_grad():
        twins.lm_head.weight[:] = twins.lm_head.weight[:1]  # all tokens alike
    assert near_tie({"float32": decoder(twins)}, "plain float32", other, text)


def test_predicted_at_reads_the_curve_at_all_streams_rows():
    assert predicted_at(1, 1.0, 3, [1.0, 1.0, 1.0, 2.0], 0.0) == 2.0  # 4 tokens for a step of twice the time
    assert predicted_at(2, 0.0, 1, [1.0, 2.0, 3.0, 4.0], 1.0) == pytest.approx(2 / (4 + 2))


def test_step_curve_covers_every_row_that_is_asked_for():
    curve = step_curve(
        Remembering(FastLlama(tiny_model("llama-gqa-tied", max_position_embeddings=512), max_length=400))
    )
    assert len(curve) == 8 * 17 and min(curve) > 0


def test_batches_are_raced_with_the_texts_of_plain_decoding():
    model, draft = tiny_model("llama-gqa-tied", max_position_embeddings=64), tiny_model("llama-gqa-tied")
    prompts = {kind: [random_ids(6 + i, seed=i)[0].tolist() for i in range(8)] for kind in ("qa", "code")}
    makers = {"copies": PromptLookup, "drafts": lambda: ModelDraft(FastLlama(draft, max_length=64, matvec="numpy"))}
    lengths = {name: {"qa": 2, "code": 3} for name in makers}
    found = race_batches(model, makers, lengths, prompts, Settings(new_tokens=6), stop=())
    assert set(found) == {(name, kind) for name in makers for kind in ("qa", "code")}
    assert all(
        set(gains) == {4, 8} and all(f"same text {n}/{n}" in gain for n, gain in gains.items())
        for gains in found.values()
    )


def test_remembered_prompts_of_a_paged_decoder_are_put_back():
    plain, ids = (
        PagedLlama(FastLlama(tiny_model("llama-gqa-tied"), max_length=64, matvec="numpy"), block_size=4),
        [3, 1, 4],
    )
    remembering, texts = RememberingPaged(plain), []
    for other in ([9] * 11, [7] * 5):
        for prompts in ([ids], [other, ids]):
            made = generate_speculative_batch(remembering, [NoDraft()] * len(prompts), prompts, 5, draft_tokens=0)
            texts.append(made.new_ids[-1])
    assert texts == [generate_speculative_batch(plain, [NoDraft()], [ids], 5, draft_tokens=0).new_ids[0]] * 4
    assert len(remembering.known) == 3


def row(technique, kind, speed, **more):
    return DraftRow(technique=technique, model="m", kind=kind, threads=1, samples=(speed,) * 5, speedup="1x", **more)


def test_judge_takes_the_best_of_each_side():
    drafted = {"predicted": {1: 2.0, 4: 1.0, 8: 0.5}, "acceptance": (0.5, 0.4, 0.6), "tokens_per_step": 2.0}
    rows = [row("plain int8", kind, 100.0) for kind in ("qa", "code")]
    rows += [row("a", "qa", 150.0, **drafted), row("b", "qa", 190.0, **drafted), row("a", "code", 120.0, **drafted)]
    rows += [
        row("llama.cpp", "qa", 500.0),
        row("llama.cpp, n-gram", "qa", 180.0),
        row("llama.cpp, n-gram", "code", 50.0),
    ]
    bars = judge(rows)
    assert [bar.holds for bar in bars] == [True, False, False, True]
    assert "b at least 1.8 times plain int8" in str(bars[0]) and "1.06x" in bars[1].measured
    profiled = replace(rows[3], shares=(0.1, 0.6, 0.3))
    profile = "2.00 tokens a step; time: 10% drafting, 60% rows, 30% verifier and Python"
    assert judge([*rows[:3], profiled, *rows[4:]])[0].measured.endswith(profile)
    whole_text = DraftRow(technique="all at once", model="m", kind="qa", threads=1, note="nothing to time")
    assert as_table([whole_text]).endswith("nothing to time") and judge([*rows, whole_text])[0].holds
    assert "0.50 [0.40, 0.60]" in as_table(rows) and "2.00x, 1.00x, 0.50x" in as_table(rows)


def test_missing_wheel_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(llama_server.importlib.util, "find_spec", lambda name: None)
    assert llama_server.why_missing() == "not installed: pip install xllamacpp==2026.10.11549"
