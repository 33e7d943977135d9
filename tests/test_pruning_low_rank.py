"""Low rank against numpy's best, with activations; SliceGPT's rotation keeps the function."""

import pytest
import torch
from tiny_models import LLAMAS, random_ids, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from labutils.lab.layers.calibration import layer_error
from labutils.pruning.low_rank import low_rank, principal_axes, rank_for, rotated
from labutils.pruning.structured import keep_channels

MAKE = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(12, 20, generator=MAKE)
X = torch.randn(300, 20, generator=MAKE) @ torch.randn(20, 20, generator=MAKE)


def test_low_rank_is_the_best_of_its_rank():
    left, right = low_rank(WEIGHT, 4)
    singular = torch.linalg.svdvals(WEIGHT)
    assert (left.shape, right.shape) == ((12, 4), (4, 20))
    assert (WEIGHT - left @ right).square().sum().item() == pytest.approx(singular[4:].square().sum().item(), rel=1e-4)


def test_activation_aware_is_the_best_on_the_activations():
    gram = X.T @ X
    left, right = low_rank(WEIGHT, 4, gram=gram, damping=0.0)
    plain_left, plain_right = low_rank(WEIGHT, 4)
    best = torch.linalg.svdvals(WEIGHT @ X.T)[4:].square().sum() / (WEIGHT @ X.T).square().sum()
    error = layer_error(WEIGHT, left @ right, gram)
    assert error == pytest.approx(best.item(), rel=1e-2)
    assert error < layer_error(WEIGHT, plain_left @ plain_right, gram)


def test_full_rank_is_exact_and_dead_inputs_are_borne():
    gram = X.T @ X
    gram[3], gram[:, 3] = 0, 0
    left, right = low_rank(WEIGHT, 12, gram=gram)
    assert torch.allclose(left @ right, WEIGHT, atol=1e-2)
    with pytest.raises(ValueError, match="1 to 12; got 13"):
        low_rank(WEIGHT, 13)


@pytest.mark.parametrize("kept", [0.25, 0.5, 0.9])
def test_rank_for_stays_within_the_budget(kept):
    rank = rank_for(kept, out_features=12, in_features=20)
    assert rank * 32 <= kept * 240 < (rank + 1) * 32


@pytest.mark.parametrize("name", [*LLAMAS, "qwen2", "qwen3"])
def test_rotation_changes_no_logits(name):
    model, ids = tiny_model(name), random_ids(24)
    turned = rotated(model, principal_axes(model, [random_ids(40)]))
    with torch.no_grad():
        assert torch.allclose(turned(ids).logits, model(ids).logits, atol=1e-4)


def test_principal_axes_are_orthogonal_and_strongest_first():
    model = tiny_model("llama-gqa-tied")
    axes = principal_axes(model, [random_ids(40)])
    assert torch.allclose(axes.T @ axes, torch.eye(32), atol=1e-5)
    embedded = nn.functional.normalize(model.model.embed_tokens(random_ids(40))[0], dim=-1)
    powers = (embedded @ axes).square().sum(dim=0)
    assert powers[:8].sum() > powers[-8:].sum()


def test_slicing_keeps_more_than_dropping_channels_of_a_redundant_stream(tmp_path):
    model, ids = tiny_model("llama-gqa-tied"), random_ids(24)
    narrow = torch.linalg.qr(torch.randn(32, 16, generator=torch.Generator().manual_seed(3)))[0]
    with torch.no_grad():  # a stream that lives in 16 of 32 dimensions, though in no 16 channels
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ narrow @ narrow.T)
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(narrow @ narrow.T @ writer.weight)
    sliced = keep_channels(rotated(model, principal_axes(model, [random_ids(60)])), torch.arange(16))
    with torch.no_grad():
        assert torch.allclose(sliced(ids).logits, model(ids).logits, atol=1e-3)
    sliced.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.hidden_size == 16
