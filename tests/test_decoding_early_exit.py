"""Early exits: an ordinary model as a draft, tokens that leave when they may, and the heads that make both good."""

import pytest
import torch
from tiny_models import random_ids, tiny_model

from labutils.decoding import early_exit
from labutils.decoding.early_exit import AdaptiveDecoder, ExitHeads, adaptive_logits, exit_model
from labutils.decoding.proposers import ModelDraft
from labutils.decoding.speculate import generate_speculative
from labutils.generation.decode import generate_cached
from labutils.generation.fast_llama import FastLlama
from labutils.lab.models import training
from labutils.lab.models.draft_heads import HEADS, load_head, save_head, train_head
from labutils.lab.models.load import LoadError
from labutils.lab.training.loop import FitPlan, fit_

IDS = random_ids(12, batch=2)


def trained_heads(model, *, seed=0):
    """Heads whose every number matters."""
    heads, generator = ExitHeads(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return heads.requires_grad_(False)


def silent_above(model, layers):
    """The same model, whose later layers add nothing."""
    with torch.no_grad():
        for layer in model.model.layers[layers:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def test_an_untrained_exit_reads_the_hidden_state_as_the_last():
    model = tiny_model("llama-gqa-tied")
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
        for layers in (1, 2):
            wanted = model.lm_head(model.model.norm(states[layers]))
            torch.testing.assert_close(exit_model(model, layers=layers)(IDS).logits, wanted)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-head-dim"])
def test_an_exit_model_equals_its_head_and_shares_the_layers(name):
    model = tiny_model(name)
    heads = trained_heads(model)
    short = exit_model(model, layers=2, heads=heads)
    with torch.no_grad():
        state = model(IDS, output_hidden_states=True).hidden_states[2]
        wanted = model.lm_head(heads(state, 2))
        torch.testing.assert_close(short(IDS).logits, wanted, atol=1e-5, rtol=1e-4)
    assert short.model.layers[1].mlp.up_proj.weight is model.model.layers[1].mlp.up_proj.weight
    fast = FastLlama(short, max_length=12, matvec="numpy").extend(IDS[0].tolist())
    torch.testing.assert_close(fast, wanted[0], atol=1e-4, rtol=1e-4)


def test_an_exit_as_a_draft_changes_no_token():
    model = tiny_model("llama-gqa-tied")
    draft = ModelDraft(FastLlama(exit_model(model, layers=1), max_length=40, matvec="numpy"))
    target = FastLlama(model, max_length=40, matvec="numpy")
    found = generate_speculative(target, draft, IDS[:1], 20, draft_tokens=3)
    assert found.token_ids.tolist() == generate_cached(model, IDS[:1], 20).tolist()


def test_an_exit_is_always_right_where_the_later_layers_add_nothing():
    model = silent_above(tiny_model("llama-gqa-tied"), 1)
    draft = ModelDraft(FastLlama(exit_model(model, layers=1), max_length=40, matvec="numpy"))
    target = FastLlama(model, max_length=40, matvec="numpy")
    assert generate_speculative(target, draft, IDS[:1], 20, draft_tokens=3).acceptance == 1


@pytest.mark.parametrize("layers", [0, 3])
def test_exit_model_refuses_no_exit(layers):
    with pytest.raises(ValueError, match=f"after 1 to 2 of 3 layers; got {layers}"):
        exit_model(tiny_model("llama-gqa-tied"), layers=layers)


def test_tokens_that_never_leave_get_the_models_logits():
    model = tiny_model("llama-gqa-tied")
    logits, depths = adaptive_logits(model, trained_heads(model), IDS, early_exit.by_margin(model, 1.1))
    with torch.no_grad():
        torch.testing.assert_close(logits, model(IDS).logits)
    assert (depths == 3).all()


def test_tokens_that_all_leave_get_the_exits_logits():
    model = tiny_model("llama-gqa-tied")
    heads = trained_heads(model)
    logits, depths = adaptive_logits(model, heads, IDS, early_exit.by_depth(torch.full_like(IDS, 2)))
    with torch.no_grad():
        wanted = exit_model(model, layers=2, heads=heads)(IDS).logits
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)
    assert (depths == 2).all()


@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-head-dim"])
def test_adaptive_logits_equal_decoding_token_by_token(name):
    model = tiny_model(name)
    heads, ids = trained_heads(model), IDS[:1]
    with torch.no_grad():
        probs = torch.softmax(exit_model(model, layers=1, heads=heads)(ids).logits, dim=-1).topk(2).values
    leave = early_exit.by_margin(model, (probs[..., 0] - probs[..., 1]).median().item())
    logits, depths = adaptive_logits(model, heads, ids, leave)
    decoder = AdaptiveDecoder(model, heads, leave)
    rows = torch.cat([decoder.decode_one_token(token) for token in ids[0].split(1)])
    torch.testing.assert_close(rows, logits[0], atol=1e-5, rtol=1e-4)
    assert decoder.depths == depths[0].tolist() and len(set(decoder.depths)) > 1
    assert decoder.cache.get_seq_length() == ids.shape[1]


def test_a_decoder_goes_on_behind_a_prompt():
    model = tiny_model("llama-gqa-tied")
    decoder = AdaptiveDecoder(model, ExitHeads(model), early_exit.by_saturation(2.0))
    decoder.prefill(IDS[:1, :8])
    found = torch.cat([decoder.decode_one_token(token) for token in IDS[0, 8:].split(1)])
    with torch.no_grad():
        torch.testing.assert_close(found, model(IDS[:1]).logits[0, 8:], atol=1e-5, rtol=1e-4)


def test_saturation_compares_directions():
    before, after = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), torch.tensor([[[2.0, 0.0], [1.0, 1.0]]])
    assert early_exit.by_saturation(0.9)(1, before, after, after).tolist() == [[True, False]]


def test_exit_loss_is_zero_where_the_later_layers_add_nothing():
    model = silent_above(tiny_model("llama-gqa-tied"), 1).requires_grad_(False)
    assert early_exit.exit_loss(model, ExitHeads(model))(IDS, IDS).item() == pytest.approx(0, abs=1e-6)


def test_heads_learn_and_the_model_stays():
    model = tiny_model("llama-gqa-tied").requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    heads = ExitHeads(model)
    losses = fit_(heads, lambda step: [(IDS, IDS)], early_exit.exit_loss(model, heads), FitPlan(steps=20, lr=1e-2))
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_stored_head_comes_back(tmp_path, monkeypatch):
    model = tiny_model("llama-gqa-tied")
    heads = trained_heads(model)
    save_head(heads, "exit", tmp_path)
    loaded = load_head("exit", model, tmp_path)
    torch.testing.assert_close(loaded.maps, heads.maps.bfloat16().float(), atol=0, rtol=0)
    torch.testing.assert_close(loaded.gains, heads.gains.bfloat16().float(), atol=0, rtol=0)
    path = tmp_path / "exit.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(LoadError, match="must have SHA-256"):
        load_head("exit", model, tmp_path)


def test_load_head_refuses_an_unknown_name(tmp_path):
    with pytest.raises(LoadError, match=f"one of {', '.join(HEADS)} in .*; got 'none'"):
        load_head("none", tiny_model("llama-gqa-tied"), tmp_path)


@pytest.mark.slow
def test_train_head_takes_up_what_a_killed_run_saved(tmp_path, monkeypatch):
    code = {name: ["def add(a, b):\n    return a + b\n" * 200] for name in ("stdlib", "stdlib-tests", "packages")}
    texts = code | {"service": ["<|user|>Cancel order A1.<|end|><|assistant|>cancel_order<|end|>"] * 30}
    monkeypatch.setattr(training, "sources", lambda *, packages: texts)
    lines = []
    first = train_head("exit", steps=1, state_dir=tmp_path, log=lines.append)
    assert len(lines) == 1 and not torch.equal(first.maps[0], torch.eye(len(first.maps[0])))
    again = train_head("exit", steps=1, state_dir=tmp_path, log=lines.append)
    assert len(lines) == 1 and torch.equal(first.maps, again.maps)  # nothing was left to train
