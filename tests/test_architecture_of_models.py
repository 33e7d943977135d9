"""What a model is: read from configurations, measured on one token, and asked by everything that depends on it."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import CONFIGS, random_ids, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from labutils.generation.cache import CompiledKVCache, KVCache, StaticKVCache
from labutils.generation.decode import generate_cached, generate_naive, generate_static
from labutils.generation.fast_llama import FastLlama
from labutils.lab.layers.architecture import Architecture, LayerCache, is_tied, layer_caches, require_llama
from labutils.measurement.resources import kv_bytes_per_position, kv_cache_bytes
from labutils.pruning import low_rank, structured
from labutils.pruning.masks import apply_masks_, mask_model
from labutils.pruning.recovery import add_lora_
from labutils.pruning.scores import magnitude_scores
from labutils.pruning.sparse import pack_linears_
from labutils.quantization.affine import Scheme
from labutils.quantization.integer_linear import use_integers_
from labutils.quantization.packed import pack_model_
from labutils.quantization.rotation import rotate_

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SIZES | {"num_key_value_heads": 2, "intermediate_size": 64}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "falcon multi-query": ("falcon", SIZES | {"multi_query": True, "new_decoder_architecture": False}),
    "falcon, many keys": ("falcon", SIZES | {"multi_query": False, "new_decoder_architecture": False}),
    "falcon, grouped": ("falcon", SIZES | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "bigcode multi-query": ("gpt_bigcode", {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "mistral window 8": ("mistral", GROUPED | {"sliding_window": 8}),
    "mistral window 100": ("mistral", GROUPED | {"sliding_window": 100}),
    "mistral, no window": ("mistral", GROUPED | {"sliding_window": None}),
    "qwen2, half in windows": ("qwen2", GROUPED | {"use_sliding_window": True} | WINDOW),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 32}),
    "gemma": ("gemma", GROUPED | {"head_dim": 32}),
    "gemma2": ("gemma2", GROUPED | {"head_dim": 32} | WINDOW),
    "gemma3": ("gemma3_text", GROUPED | {"head_dim": 32} | WINDOW),
    "gpt-oss": ("gpt_oss", GROUPED | {"head_dim": 16, "num_local_experts": 4} | WINDOW),
    "cohere2": ("cohere2", GROUPED | WINDOW),
    "deepseek v2": ("deepseek_v2", SIZES | MLA | EXPERTS | {"intermediate_size": 64}),
    "deepseek v3": ("deepseek_v3", SIZES | MLA | EXPERTS | {"intermediate_size": 64, "num_key_value_heads": 4}),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 4, "sliding_window": None}),
    "llama": ("llama", GROUPED),
    "llama, wide heads": ("llama", GROUPED | {"head_dim": 24}),
    "gpt2": ("gpt2", {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "opt": ("opt", SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 64}),
    "neox": ("gpt_neox", SIZES | {"intermediate_size": 64}),
    "bloom": ("bloom", {"vocab_size": 64, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {"vocab_size": 64, "d_model": 64, "n_layers": 2, "n_heads": 4}),
    "phi": ("phi", SIZES | {"intermediate_size": 64}),
    "phi3": ("phi3", GROUPED | {"sliding_window": None, "pad_token_id": 0}),
    "granite": ("granite", GROUPED),
    "olmo2": ("olmo2", GROUPED),
}  # fmt: skip
WINDOWED = {
    "mistral window 8",
    "mistral window 100",
    "qwen2, half in windows",
    "gemma2",
    "gemma3",
    "gpt-oss",
    "cohere2",
}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2}
STATEFUL = {
    "bamba": ("bamba", GROUPED),  # its configuration holds an infinity, which JSON has not
    "mamba": ("mamba", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "lfm2": ("lfm2", GROUPED | {"layer_types": ["conv", "full_attention"]}),
    "qwen3-next": ("qwen3_next", GROUPED | LINEAR),
}  # fmt: skip


def configured(kind):
    name, settings = (MODELS | STATEFUL)[kind]
    return AutoConfig.for_model(name, **settings)


def built(kind):
    torch.manual_seed(0)
    config = configured(kind)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", MODELS)
def test_kv_bytes_are_those_of_the_librarys_own_cache(kind):
    model = built(kind)
    for positions in (1, 5, 24):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(random_ids(positions, vocab=64), past_key_values=cache, use_cache=True)
        real = sum(4 * t.numel() for layer in cache.layers for t in (layer.keys, layer.values))
        assert kv_cache_bytes(model.config, positions) == real
        if kind not in WINDOWED:
            assert kv_bytes_per_position(model.config, element_bytes=2) * positions == real // 2
    if kind in WINDOWED:
        with pytest.raises(ValueError, match=r"keep every position.*which keeps (7|99) positions"):
            kv_bytes_per_position(model.config)


def test_kv_bytes_by_hand():
    assert kv_bytes_per_position(configured("falcon multi-query")) == 2 * 2 * 1 * 16 * 4  # one head of 16, 2 layers
    assert kv_bytes_per_position(configured("deepseek v3")) == 2 * (16 + 8) * 4  # one latent vector, one rotary key
    assert kv_cache_bytes(configured("mistral window 8"), 24) == 2 * 2 * 2 * 16 * 4 * 7  # 8 − 1 positions stay
    with pytest.raises(ValueError, match="not be negative; got -1"):
        kv_cache_bytes(configured("llama"), -1)


def test_measuring_costs_no_randomness_and_leaves_the_config():
    config = configured("falcon multi-query")
    config.alibi = True  # no other test measured this one
    before, state = config.to_dict(), torch.get_rng_state()
    assert layer_caches(config) == (LayerCache(keys=(1, 16), values=(1, 16)),) * 2
    assert config.to_dict() == before and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", STATEFUL)
def test_other_states_are_refused_in_one_sentence(kind):
    config = configured(kind)
    for call in (
        lambda: kv_bytes_per_position(config),
        lambda: StaticKVCache(config, max_length=8),
        lambda: CompiledKVCache(config, max_length=8),
        lambda: generate_cached(built(kind), random_ids(3, vocab=64), 2),
    ):
        with pytest.raises(
            ValueError, match="keys and values of each token, nothing else; got Linear|BambaConfig on one token"
        ):
            call()


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="run T5Config on one token.*got ValueError"):
        kv_bytes_per_position(AutoConfig.for_model("t5"))
    assert kv_bytes_per_position(SimpleNamespace(num_hidden_layers=1, num_attention_heads=2, hidden_size=8)) == 64


@pytest.mark.parametrize("kind", ["falcon multi-query", "falcon, grouped", "deepseek v3", "mistral window 8", "gemma3"])
def test_static_caches_hold_what_any_model_keeps(kind):
    model, ids = built(kind), random_ids(10, vocab=64)
    wanted = generate_naive(model, ids, 6)
    assert torch.equal(generate_static(model, ids, 6), wanted)
    assert torch.equal(generate_cached(model, ids, 6), wanted)
    cache, growing = StaticKVCache(model.config, max_length=10), KVCache()
    with torch.no_grad():
        for each in (cache, growing):
            model(ids, past_key_values=each, use_cache=True)
    assert cache.resident_bytes == growing.resident_bytes


def test_layers_of_different_sizes_get_no_static_cache(monkeypatch):
    two = (LayerCache(keys=(1, 4), values=(1, 4)), LayerCache(keys=(2, 4), values=(2, 4)))
    monkeypatch.setattr("labutils.generation.cache.layer_caches", lambda config: two)
    with pytest.raises(ValueError, match="keys and values of one size; got"):
        StaticKVCache(SimpleNamespace(num_hidden_layers=2), max_length=4)


def test_architecture_by_hand():
    known = Architecture.of(CONFIGS["llama-head-dim"]())
    assert (known.family, known.activation, known.rope, known.sliding) == ("llama", "silu", "default", False)
    assert (known.layers, known.heads, known.kv_heads, known.head_dim) == (3, 4, 2, 16)
    assert Architecture.of(configured("mistral window 8")).sliding
    assert not Architecture.of(configured("mistral, no window")).sliding
    assert Architecture.of(configured("qwen2, half in windows")).sliding
    with pytest.raises(ValueError, match="must be full, not sliding"):
        require_llama(configured("mistral window 8"), ropes=("default",))


def replaced(kind):
    model, generator = tiny_model("llama-gqa-tied"), torch.Generator().manual_seed(0)
    if kind == "rotated":
        rotate_(model, generator=generator)
    elif kind == "int8":
        use_integers_(model)
    elif kind == "2:4":
        apply_masks_(model, mask_model(magnitude_scores(model), (2, 4)))
        pack_linears_(model)
    elif kind == "lora":
        add_lora_(model, mask_model(magnitude_scores(model), 0.5), rank=2, generator=generator)
    elif kind == "packed":
        pack_model_(model, Scheme(bits=8))
    elif kind == "norm":
        model.model.layers[1].input_layernorm = nn.LayerNorm(32)
    return model


REPLACED = {
    "rotated": "layers.0.mlp.down_proj must be nn.Linear; got Sequential",
    "int8": "layers.0.self_attn.q_proj must be nn.Linear; got IntegerLinear",
    "2:4": "layers.0.self_attn.q_proj must be nn.Linear; got Linear24",
    "lora": "layers.0.self_attn.q_proj must be nn.Linear; got LoraLinear",
    "packed": "layers.0.self_attn.q_proj must be nn.Linear; got PackedLinear",
    "norm": "layers.1.input_layernorm must be RMSNorm; got LayerNorm",
}
NEURONS, GROUPS = [torch.arange(8)] * 3, [torch.arange(1)] * 3
CONSUMERS = {
    "FastLlama": lambda m: FastLlama(m, max_length=4),
    "keep_neurons": lambda m: structured.keep_neurons(m, NEURONS),
    "keep_head_groups": lambda m: structured.keep_head_groups(m, GROUPS),
    "keep_channels": lambda m: structured.keep_channels(m, torch.arange(8)),
    "keep_layers": lambda m: structured.keep_layers(m, [0]),
    "neuron_scores": lambda m: structured.neuron_scores(m, {}),
    "head_group_scores": lambda m: structured.head_group_scores(m, {}),
    "channel_scores": lambda m: structured.channel_scores(m, {}),
    "rotated": lambda m: low_rank.rotated(m, torch.eye(32)),
    "rotate_": lambda m: rotate_(m, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("kind", REPLACED)
def test_replaced_layers_are_refused_by_name_and_left_alone(kind, consumer):
    model = replaced(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=REPLACED[kind]):
        CONSUMERS[consumer](model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("consumer", [*CONSUMERS, "principal_axes", "block_influence"])
@pytest.mark.parametrize("kind", ["gpt2", "falcon multi-query", "opt", "phi3"])
def test_other_architectures_are_refused_before_anything_else(kind, consumer):
    other = {"principal_axes": low_rank.principal_axes, "block_influence": structured.block_influence}
    call = CONSUMERS.get(consumer) or (lambda m: other[consumer](m, [random_ids(3)]))
    model = built(kind)
    with pytest.raises(ValueError, match=f"model_type must be one of llama.*; got {model.config.model_type}"):
        call(model)


def test_tied_is_what_the_modules_share():
    model = tiny_model("llama-gqa-tied")
    assert is_tied(model) and not is_tied(tiny_model("llama-untied-bias"))
    assert is_tied(pack_model_(tiny_model("llama-gqa-tied"), Scheme(bits=8)))
    assert not is_tied(pack_model_(tiny_model("llama-untied-bias"), Scheme(bits=8)))
    model.lm_head.weight = nn.Parameter(-model.lm_head.weight.detach())  # the configuration still says tied
    assert not is_tied(model)
    fast, ids = FastLlama(model, max_length=8, matvec="numpy"), random_ids(5)
    with torch.no_grad():
        torch.testing.assert_close(fast.prefill(ids), model(ids).logits[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda f: f.prefill(random_ids(9, batch=2)), r"shape \(1, positions\); got \(2, 9\)"),
        (lambda f: f.prefill(random_ids(9)[0]), r"shape \(1, positions\); got \(9,\)"),
        (lambda f: f.prefill(random_ids(9)[:0]), r"got \(0, 9\)"),
        (lambda f: f.decode_one_token(torch.tensor([1, 2])), r"shape \(1,\); got \(2,\)"),
        (lambda f: f.decode_one_token(torch.tensor([[1]])), r"got \(1, 1\)"),
        (lambda f: f.generate(random_ids(9, batch=2), 3), r"shape \(1, positions\); got \(2, 9\)"),
    ],
)
def test_a_batch_is_refused_by_the_single_stream_decoder(call, rule):
    fast = FastLlama(tiny_model("llama-gqa-tied"), max_length=20, matvec="numpy")
    fast.prefill(random_ids(4))
    with pytest.raises(ValueError, match=rule):
        call(fast)
    assert fast.length == 4
