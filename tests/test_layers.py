"""A model's linear layers: found in every architecture, read as (out, in), replaced; and what flows into them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CONFIGS, random_ids, tiny_model
from torch import nn
from transformers import BertConfig, BertModel
from transformers.pytorch_utils import Conv1D

from labutils.lab.layers.calibration import InputStatistics, input_statistics, inverse_factor, layer_error
from labutils.lab.layers.linears import linear_layers, replace_module_, set_weight_, untie_head_, weight_of


@pytest.mark.parametrize("name", CONFIGS)
def test_linear_layers_are_all_but_the_head(name):
    model = tiny_model(name)
    per_layer = 4 if name == "gpt2" else 7
    names = [name for name, _ in linear_layers(model)]
    assert len(names) == 3 * per_layer and "lm_head" not in names
    assert [n for n, _ in linear_layers(model, with_head=True)] == [*names, "lm_head"]


def test_linear_layers_of_a_model_without_a_head():
    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    assert "pooler.dense" in [name for name, _ in linear_layers(bert, with_head=True)]


def test_untie_head_copies_what_is_shared_and_nothing_else():
    tied, untied = tiny_model("llama-gqa-tied"), tiny_model("llama-untied-bias")
    before, own = tied(random_ids(5)).logits, untied.lm_head.weight
    untie_head_(tied)
    untie_head_(untied)
    assert tied.lm_head.weight is not tied.model.embed_tokens.weight and not tied.config.tie_word_embeddings
    assert torch.equal(tied(random_ids(5)).logits, before) and untied.lm_head.weight is own
    with torch.no_grad():
        tied.lm_head.weight.zero_()
    assert tied.model.embed_tokens.weight.abs().sum() > 0
    with pytest.raises(ValueError, match="got BertModel"):
        untie_head_(BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)))


def test_weight_of_conv1d_is_out_by_in():
    layer = Conv1D(6, 4)  # out, in
    x = torch.randn(3, 4)
    assert weight_of(layer).shape == (6, 4)
    torch.testing.assert_close(x @ weight_of(layer).T + layer.bias, layer(x))
    set_weight_(layer, torch.ones(6, 4))
    assert layer.weight.shape == (4, 6) and (layer.weight == 1).all()


def test_set_weight_refuses_another_shape():
    with pytest.raises(ValueError, match=r"must keep its shape \(2, 3\); got \(3, 2\)"):
        set_weight_(nn.Linear(3, 2), torch.zeros(3, 2))


def test_replace_module_changes_the_output():
    model = tiny_model("llama-gqa-tied")
    ids, name = random_ids(5), "model.layers.1.mlp.down_proj"
    before = model(ids).logits
    replaced = nn.Linear(64, 32, bias=False)
    replace_module_(model, name, replaced)
    assert model.get_submodule(name) is replaced
    assert not torch.allclose(model(ids).logits, before)


def test_input_statistics_equal_the_inputs_themselves():
    model, name = tiny_model("gpt2"), "transformer.h.1.mlp.c_proj"
    batches, seen = [random_ids(7, seed=1), random_ids(4, batch=2, seed=2)], []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    found = input_statistics(model, batches, with_gram=True)[name]
    hook.remove()
    x = torch.cat(seen)
    assert found.rows == 15
    torch.testing.assert_close(found.gram, x.T @ x, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.absmax, x.abs().amax(0))
    torch.testing.assert_close(found.mean_abs, x.abs().mean(0))
    torch.testing.assert_close(found.norms, x.norm(dim=0))


def test_input_statistics_leaves_no_hook():
    model = tiny_model("qwen2")
    input_statistics(model, [random_ids(3)], only=lambda name: "mlp" in name)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_input_statistics_keeps_to_only_and_to_the_head_when_asked():
    model = tiny_model("llama-gqa-tied")
    assert list(input_statistics(model, [random_ids(3)], only=lambda n: "0.mlp.up" in n)) == [
        "model.layers.0.mlp.up_proj"
    ]
    assert "lm_head" in input_statistics(model, [random_ids(3)], with_head=True)


def test_input_statistics_refuses_no_text_and_infinite_inputs():
    model = tiny_model("llama-gqa-tied")
    with pytest.raises(ValueError, match="at least one batch"):
        input_statistics(model, [])
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = torch.inf
    with pytest.raises(ValueError, match="must be finite; got inf or nan in model.layers.0"):
        input_statistics(model, [torch.tensor([[5, 6]])])


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_layer_error_equals_the_output_error(out_features, in_features, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, changed = torch.randn(2, out_features, in_features, generator=generator)
    x = torch.randn(9, in_features, generator=generator)
    expected = ((x @ (weight - changed).T).norm() / (x @ weight.T).norm()) ** 2
    assert layer_error(weight, changed, x.T @ x) == pytest.approx(expected.item(), rel=1e-3)


def test_statistics_by_hand():
    statistics = InputStatistics.empty(nn.Linear(2, 1), with_gram=True)
    statistics.add_(torch.tensor([[3.0, -1.0], [-4.0, 0.0]]))
    assert statistics.absmax.tolist() == [4, 1] and statistics.mean_abs.tolist() == [3.5, 0.5]
    assert statistics.norms.tolist() == [5, 1] and statistics.gram.tolist() == [[25, -3], [-3, 1]]


def test_inverse_factor_is_the_cholesky_factor_of_the_inverse():
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    factor = inverse_factor(inputs.T @ inputs, damping=0.02)
    hessian = 2 * (inputs.T @ inputs).double()
    hessian += 0.02 * hessian.diagonal().mean() * torch.eye(6)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(hessian))
    assert torch.equal(factor, factor.triu())


def test_inverse_factor_refuses_what_has_no_inverse():
    ones = torch.ones(3, 3)
    assert inverse_factor(ones).isfinite().all()
    with pytest.raises(ValueError, match="needs more damping to have an inverse; got damping=0.0"):
        inverse_factor(ones, damping=0.0)
    with pytest.raises(ValueError, match="must be finite"):
        inverse_factor(ones * torch.inf)
