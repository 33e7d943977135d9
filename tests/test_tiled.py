import pytest
import torch
from tiny_models import random_ids, tiny_model

from labutils.generation.fast_llama import FastLlama
from labutils.lab.models.tiled import shared_out, tiled_model


@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-untied-bias", "llama-head-dim", "qwen2"])
@pytest.mark.parametrize("width", [1, 3])
def test_tiled_model_computes_the_same_logits(name, width):
    model, ids = tiny_model(name), random_ids(17)
    tiled = tiled_model(model, width=width)
    with torch.no_grad():
        torch.testing.assert_close(tiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_tiled_model_grows_with_the_square_and_leaves_the_small_one_alone():
    model = tiny_model("llama-gqa-tied")
    before = [p.clone() for p in model.parameters()]
    tiled = tiled_model(model, width=3)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    larger = [p for p in tiled.model.layers.parameters() if p.ndim == 2]
    assert sum(p.numel() for p in larger) == 9 * sum(p.numel() for p in matrices)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert tiled.config.tie_word_embeddings and tiled.lm_head.weight is tiled.model.embed_tokens.weight


def test_tiled_model_has_unequal_copies():
    tiled = tiled_model(tiny_model("llama-gqa-tied"), width=2)
    up = tiled.model.layers[0].mlp.up_proj.weight  # 64 neurons and 32 inputs, twice
    assert not torch.equal(up[:64], up[64:]) and not torch.equal(up[:, :32], up[:, 32:])


def test_shared_out_adds_up_for_every_copy_of_an_output():
    weight = torch.tensor([[4.0, -2.0], [0.0, 1.0]])
    wide = shared_out(weight, width=3, spread=0.5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(wide.view(3, 2, 3, 2).sum(dim=2), weight.expand(3, 2, 2))


def test_tiled_model_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="model_type among .*; got gpt2 and 2"):
        tiled_model(tiny_model("gpt2"), width=2)
    with pytest.raises(ValueError, match="width of at least 1; got llama and 0"):
        tiled_model(tiny_model("llama-gqa-tied"), width=0)


def test_tiled_model_decodes_fast_as_well():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(9)
    fast = FastLlama(tiled_model(model, width=2), max_length=16, matvec="numpy")
    assert fast.keys.shape[1] == 4  # key-value heads: 2, twice
    with torch.no_grad():
        torch.testing.assert_close(fast.prefill(ids), model(ids).logits[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_tiled_lablm_writes_what_lablm_writes():
    from labutils.generation.decode import generate_static
    from labutils.lab.models.load import load_model

    model, tokenizer = load_model("lablm")
    tiled = tiled_model(model, width=3)
    ids = tokenizer("<|endoftext|>import os\n\n\ndef read_lines(path):\n", return_tensors="pt").input_ids
    assert torch.equal(generate_static(tiled, ids, 40), generate_static(model, ids, 40))
