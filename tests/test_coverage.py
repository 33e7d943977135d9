"""What compresses a model sees all of its matrices or refuses; sizes count what is stored, however it is stored."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import random_ids, tiny_model
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ViTConfig,
    ViTModel,
)
from transformers.pytorch_utils import Conv1D

from labutils.distillation.hidden import hidden_loss
from labutils.distributed.tensor_parallel import RowParallelLinear
from labutils.lab.layers.calibration import input_statistics
from labutils.lab.layers.linears import change_weights_, linear_layers, matrices_outside_layers, set_weight_, weight_of
from labutils.lab.models.load import load_model
from labutils.measurement.resources import weight_bytes_read
from labutils.pruning.masks import apply_masks_, mask_model, mask_n_of_m, sparsity
from labutils.pruning.recovery import LoraLinear, add_lora_, merge_lora_
from labutils.pruning.scores import magnitude_scores
from labutils.pruning.sparse import Linear24, pack_linears_
from labutils.pruning.structured import block_influence
from labutils.quantization.affine import Scheme, fake_quantize
from labutils.quantization.integer_linear import use_integers_
from labutils.quantization.packed import pack_model_
from labutils.quantization.rotation import hadamard, rotated_inputs

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 128}


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def qwen3_moe():
    config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)
    return Qwen3MoeForCausalLM(config)


def gpt_oss():
    return GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16))


def deepseek_v3():
    latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    config = DeepseekV3Config(**(SIZES | {"num_key_value_heads": 4}), **latent, **experts, moe_intermediate_size=32)
    return DeepseekV3ForCausalLM(config)


WHOLE_MODEL = {
    "rounding": lambda m: change_weights_(m, lambda _, w: fake_quantize(w, Scheme(4))),
    "scores": magnitude_scores,
    "masks": lambda m: apply_masks_(m, {}),
    "sparsity": sparsity,
    "calibration": lambda m: input_statistics(m, [random_ids(4, vocab=64)]),
    "packing": lambda m: pack_model_(m, Scheme(8)),
    "integers": use_integers_,
    "2:4": pack_linears_,
    "LoRA": lambda m: add_lora_(m, {}, rank=1, generator=torch.Generator()),
}


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, gpt_oss, deepseek_v3])
def test_experts_in_one_parameter_are_named_and_nothing_is_changed(make):
    model = make()
    before, trained = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    names = matrices_outside_layers(model)
    assert "experts.gate_up_proj" in names[0] and "(4, " in names[0]
    for name, compress in WHOLE_MODEL.items():
        with pytest.raises(ValueError, match="every weight matrix must be in a linear layer; got .*experts"):
            compress(model)
        after = model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before), name
        assert [p.requires_grad for p in model.parameters()] == trained, name


def test_any_matrix_outside_a_layer_counts():
    attention = nn.MultiheadAttention(8, 2)
    assert matrices_outside_layers(attention) == ["in_proj_weight (24, 8)"]
    with pytest.raises(ValueError, match=r"in_proj_weight \(24, 8\)"):
        list(linear_layers(attention))


def test_a_row_parallel_layer_counts_and_lora_s_factors_do_not():
    layer = nn.Linear(8, 8)
    sharded = nn.Sequential(nn.Linear(8, 8), RowParallelLinear(layer, torch.arange(4), comm=None))
    with pytest.raises(ValueError, match=r"1\.weight \(8, 4\)"):
        sparsity(sharded)
    lora = LoraLinear(layer, torch.ones(8, 8), rank=2, generator=torch.Generator())
    assert [name for name, _ in linear_layers(nn.Sequential(lora))] == ["0.base"]


def test_tables_and_vectors_are_no_matrices():
    vit = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))
    for model in (vit, mamba):
        assert matrices_outside_layers(model) == []
        assert len(list(linear_layers(model))) > 3


@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-untied-bias", "qwen3", "gpt2"])
def test_dense_models_have_nothing_outside(name):
    assert matrices_outside_layers(tiny_model(name)) == []


def test_bytes_of_packed_models_count_their_buffers():
    small, _ = load_model("lablm-small")
    dense = weight_bytes_read(small)
    assert weight_bytes_read(pack_model_(copy.deepcopy(small), Scheme(8))) == 2_270_208
    body = sum(layer.weight.numel() for _, layer in linear_layers(small))
    rows = sum(layer.weight.shape[0] for _, layer in linear_layers(small))
    integers = weight_bytes_read(use_integers_(copy.deepcopy(small)))
    assert integers == dense - 4 * body + body + 4 * rows
    half = copy.deepcopy(small)
    apply_masks_(half, mask_model(magnitude_scores(half), (2, 4)))
    pack_linears_(half)
    assert weight_bytes_read(half) == dense - 4 * body + body * 17 // 8  # 8.5 of 16 bytes: 17/8 a weight
    assert "model.layers.0.mlp.up_proj.weights" in half.state_dict()


def test_sparsity_counts_packed_and_sparse_layers():
    small, _ = load_model("lablm-small")
    apply_masks_(small, mask_model(magnitude_scores(small), (2, 4)))
    assert sparsity(small) == 0.5
    packed = pack_model_(copy.deepcopy(small), Scheme(8))
    assert 0.5 <= sparsity(packed) < 0.6  # rounding adds some zeros
    pack_linears_(small)
    assert sparsity(small) == 0.5
    with pytest.raises(ValueError, match="Embedding has none"):
        sparsity(nn.Embedding(4, 2))


def test_packing_refuses_before_it_changes_anything():
    model = tiny_model("llama-gqa-tied")

    class Scaled(nn.Embedding):
        pass

    table = Scaled(97, 32)
    table.weight = model.model.embed_tokens.weight
    model.model.embed_tokens = table
    with pytest.raises(ValueError, match="plain nn.Embedding; got Scaled"):
        pack_model_(model, Scheme(8))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    with pytest.raises(ValueError, match="group_size"):
        pack_model_(tiny := tiny_model("llama-untied-bias"), Scheme(4, granularity="group", group_size=64))
    assert type(tiny.model.layers[0].mlp.down_proj) is nn.Linear


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda masks: masks | {"nope": next(iter(masks.values()))}, "the model has no 'nope'"),
        (lambda masks: masks | {list(masks)[-1]: masks[list(masks)[-1]][:1]}, r"weight's shape .*; got \(1, "),
        (lambda masks: masks | {list(masks)[-1]: masks[list(masks)[-1]].T}, "weight's shape"),
    ],
)
@pytest.mark.parametrize(
    "use", [apply_masks_, lambda m, masks: add_lora_(m, masks, rank=2, generator=torch.Generator())]
)
def test_masks_that_do_not_fit_change_nothing(spoil, words, use):
    model = tiny_model("gpt2")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        use(model, spoil(mask_model(magnitude_scores(model), 0.5)))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.requires_grad for p in model.parameters())


def test_2_4_layer_of_a_square_conv1d():
    layer = Conv1D(32, 32)
    nn.init.normal_(layer.weight)
    set_weight_(layer, weight_of(layer) * mask_n_of_m(weight_of(layer).abs(), 2, 4))
    x = torch.randn(3, 32)
    assert (Linear24(layer)(x) - layer(x)).abs().max() < 1e-4


@torch.no_grad()
def test_rotated_inputs_of_a_square_conv1d():
    layer = Conv1D(8, 8)
    nn.init.normal_(layer.weight)
    x = torch.randn(3, 8)
    y = layer(x)
    turned = rotated_inputs(layer, hadamard(8, generator=torch.Generator().manual_seed(0)))
    assert (turned(x) - y).abs().max() < 1e-5


def test_lora_on_conv1d_starts_at_the_layer_and_merges_into_it():
    model, ids = tiny_model("gpt2"), random_ids(5)
    before = model(ids).logits
    masks = mask_model(magnitude_scores(model), 0.5)
    add_lora_(model, masks, rank=2, generator=torch.Generator().manual_seed(0))
    assert (model(ids).logits - before).abs().max() < 1e-5
    loras = [module for module in model.modules() if isinstance(module, LoraLinear)]
    assert len(loras) == len(masks)
    for module in loras:
        nn.init.normal_(module.b, std=0.1)
    changed = model(ids).logits
    assert (changed - before).abs().max() > 1e-3
    merge_lora_(model)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert (model(ids).logits - changed).abs().max() < 1e-4


MANY_MODELS = """
import torch
from tiny_models import random_ids, tiny_model
from labutils.generation.decode import generate_cached, generate_compiled
for n in [{"num_hidden_layers": 2}] + [{"num_hidden_layers": 1, "intermediate_size": 32 * n} for n in range(1, 10)]:
    model, ids = tiny_model("llama-gqa-tied", **n), random_ids(4)
    assert torch.equal(generate_compiled(model, ids, 2, backend="eager"), generate_cached(model, ids, 2)), n
print("all models")
"""


@pytest.mark.slow
def test_each_model_has_its_own_limit_of_compilations():
    # In a process of its own: while tests run, every function is wrapped to check its shapes.
    folders = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "tests"))
    command, env = [sys.executable, "-c", MANY_MODELS], os.environ | {"PYTHONPATH": folders}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert result.stdout == "all models\n", result.stderr[-2000:]


def test_float16_states_do_not_overflow_a_loss_and_nan_is_named():
    big = torch.full((1, 2, 4), 300.0, dtype=torch.float16)
    loss = hidden_loss([big * 1.5], [big], torch.ones(1, 2, dtype=torch.bool))
    assert loss.item() == pytest.approx(0.25)
    model = tiny_model("llama-gqa-tied")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with torch.no_grad(), pytest.raises(ValueError, match="got nan in layer 1"):
        block_influence(model, [random_ids(4)])


def test_change_weights_refuses_codes_before_it_changes_anything():
    model = tiny_model("llama-gqa-tied")
    apply_masks_(model, mask_model(magnitude_scores(model), (2, 4)))
    pack_linears_(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"weights to be changed must be floats; got codes in model\.layers\.0"):
        change_weights_(model, lambda name, weight: weight * 0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
