"""Physical removal equals masking, keeps groups whole, and leaves an ordinary checkpoint."""

import copy

import pytest
import torch
from tiny_models import LLAMAS, random_ids, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from labutils.lab.layers.architecture import Architecture
from labutils.lab.layers.calibration import input_statistics
from labutils.lab.models.gguf import export_gguf
from labutils.pruning import structured

LLAMA_LIKE = [*LLAMAS, "qwen2", "qwen3"]
IDS = random_ids(24)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def picks(layers, of, count, seed=0):
    make = torch.Generator().manual_seed(seed)
    return [torch.randperm(of, generator=make)[:count].sort().values for _ in range(layers)]


def zero_(layer, *, rows=None, columns=None):
    with torch.no_grad():
        if rows is not None:
            layer.weight[rows] = 0
            if layer.bias is not None:
                layer.bias[rows] = 0
        if columns is not None:
            layer.weight[:, columns] = 0


def others(kept, of):
    return [i for i in range(of) if i not in kept.tolist()]


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_keep_neurons_equals_masking(name):
    model, kept = tiny_model(name), picks(3, 64, 20)
    masked = copy.deepcopy(model)
    for layer, neurons in zip(masked.model.layers, kept, strict=True):
        zero_(layer.mlp.down_proj, columns=others(neurons, 64))
    smaller = structured.keep_neurons(model, kept)
    assert smaller.config.intermediate_size == 20
    assert torch.allclose(logits(smaller), logits(masked), atol=1e-5)


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_keep_head_groups_equals_masking(name):
    model = tiny_model(name)
    groups, shared = model.config.num_key_value_heads, 4 // model.config.num_key_value_heads
    kept, masked = picks(3, groups, 1, seed=2), copy.deepcopy(model)
    width = Architecture.of(model.config).head_dim * shared
    for layer, chosen in zip(masked.model.layers, kept, strict=True):
        gone = [g * width + i for g in others(chosen, groups) for i in range(width)]
        zero_(layer.self_attn.o_proj, columns=gone)
    smaller = structured.keep_head_groups(model, kept)
    assert torch.allclose(logits(smaller), logits(masked), atol=1e-5)


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_keep_head_groups_never_breaks_a_group(name):
    model = tiny_model(name)
    before = model.config.num_attention_heads // model.config.num_key_value_heads
    config = structured.keep_head_groups(model, picks(3, model.config.num_key_value_heads, 1)).config
    assert config.num_attention_heads // config.num_key_value_heads == before
    assert config.num_attention_heads % config.num_key_value_heads == 0


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_keep_layers_equals_skipping(name):
    model = tiny_model(name)
    skipped = copy.deepcopy(model)
    zero_(skipped.model.layers[1].mlp.down_proj, rows=list(range(32)))
    zero_(skipped.model.layers[1].self_attn.o_proj, rows=list(range(32)))
    smaller = structured.keep_layers(model, [0, 2])
    assert smaller.config.num_hidden_layers == len(smaller.model.layers) == 2
    assert torch.allclose(logits(smaller), logits(skipped), atol=1e-5)


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_keep_channels_equals_masking(name):
    model, kept = tiny_model(name), picks(1, 32, 20)[0]
    masked, gone = copy.deepcopy(model), others(kept, 32)
    with torch.no_grad():
        masked.model.embed_tokens.weight[:, gone] = 0
    for layer in masked.model.layers:
        zero_(layer.self_attn.o_proj, rows=gone)
        zero_(layer.mlp.down_proj, rows=gone)
    smaller = structured.keep_channels(model, kept)
    assert smaller.config.hidden_size == 20
    assert torch.allclose(logits(smaller), logits(masked), atol=1e-5)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "qwen3"])
def test_everything_kept_is_the_same_model_and_the_old_one_stays(name):
    model = tiny_model(name)
    before = copy.deepcopy(model.state_dict())
    smaller = structured.keep_neurons(model, picks(3, 64, 64))
    smaller = structured.keep_head_groups(smaller, picks(3, 2, 2))
    smaller = structured.keep_layers(structured.keep_channels(smaller, torch.arange(32)), [0, 1, 2])
    assert torch.allclose(logits(smaller), logits(model), atol=1e-6)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_removal_leaves_an_ordinary_checkpoint(name, tmp_path):
    model = tiny_model(name)
    smaller = structured.keep_channels(model, picks(1, 32, 24)[0])
    smaller = structured.keep_head_groups(smaller, picks(3, model.config.num_key_value_heads, 1))
    smaller = structured.keep_layers(structured.keep_neurons(smaller, picks(3, 64, 32)), [0, 2])
    smaller.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(smaller))
    tied = model.config.tie_word_embeddings
    assert (loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()) == tied
    generated = loaded.generate(IDS, max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 27)


def test_gguf_export_accepts_a_smaller_model(tmp_path):
    model = structured.keep_neurons(tiny_model("llama-gqa-tied"), picks(3, 64, 32))
    export_gguf(model, None, tmp_path / "small.gguf", format="Q8_0")
    assert (tmp_path / "small.gguf").stat().st_size > 1000


def test_compensation_brings_the_outputs_nearer():
    model, kept = tiny_model("llama-gqa-tied"), picks(3, 64, 48)
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    statistics = input_statistics(model, [random_ids(100, batch=4, seed=1)], with_gram=True)
    grams = [statistics[name].gram for name in names]
    plain = logits(structured.keep_neurons(model, kept))
    helped = logits(structured.keep_neurons(model, kept, grams=grams))
    assert (helped - logits(model)).norm() < (plain - logits(model)).norm()


def test_scores_have_one_entry_for_each_part_and_see_dead_parts():
    model = tiny_model("llama-gqa-tied")
    zero_(model.model.layers[1].mlp.down_proj, columns=[5])
    zero_(model.model.layers[0].self_attn.o_proj, columns=list(range(16, 32)))
    statistics = input_statistics(model, [IDS])
    neurons, groups = structured.neuron_scores(model, statistics), structured.head_group_scores(model, statistics)
    assert [len(n) for n in neurons] == [64] * 3 and [len(g) for g in groups] == [2] * 3
    assert neurons[1][5] == 0 and groups[0][1] == 0 and groups[0][0] > 0
    assert structured.channel_scores(model, statistics).shape == (32,)


def test_strongest_keeps_the_order():
    assert structured.strongest(torch.tensor([1.0, 9.0, 5.0]), 2).tolist() == [1, 2]


def test_block_influence_is_zero_for_a_layer_that_does_nothing():
    model = tiny_model("llama-gqa-tied")
    zero_(model.model.layers[1].mlp.down_proj, rows=list(range(32)))
    zero_(model.model.layers[1].self_attn.o_proj, rows=list(range(32)))
    influence = structured.block_influence(model, [IDS])
    assert influence[1] == pytest.approx(0, abs=1e-6)
    assert min(influence[0], influence[2]) > 1e-3
    with pytest.raises(ValueError, match="at least one batch"):
        structured.block_influence(model, [])


def test_block_influence_by_hand():
    model = tiny_model("llama-gqa-tied")
    states = model(IDS, output_hidden_states=True).hidden_states
    expected = 1 - nn.functional.cosine_similarity(states[0], states[1], dim=-1).mean().item()
    assert structured.block_influence(model, [IDS])[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda m: structured.keep_neurons(m, picks(3, 64, 10)[:2] + picks(1, 64, 11)),
            r"equally many neurons.*\[10, 11\]",
        ),
        (lambda m: structured.keep_neurons(m, picks(2, 64, 10)), "every one of 3 layers"),
        (lambda m: structured.keep_neurons(m, [torch.tensor([0, 0])] * 3), "different numbers from 0 to 63"),
        (lambda m: structured.keep_neurons(m, [torch.tensor([64])] * 3), "different numbers from 0 to 63"),
        (lambda m: structured.keep_neurons(m, [torch.tensor([], dtype=torch.long)] * 3), "1 to 64"),
        (lambda m: structured.keep_head_groups(m, [torch.tensor([2])] * 3), "from 0 to 1"),
        (lambda m: structured.keep_channels(m, torch.tensor([32])), "from 0 to 31"),
        (lambda m: structured.keep_layers(m, []), "at least one"),
        (lambda m: structured.keep_layers(m, [1, 0]), "increasing"),
        (lambda m: structured.keep_layers(m, [0, 3]), "from 0 to 2"),
    ],
)
def test_removal_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call(tiny_model("llama-gqa-tied"))


def test_removal_refuses_another_architecture():
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match="llama.*got gpt2"):
        structured.rebuilt(model, model.state_dict())
