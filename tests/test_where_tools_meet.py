"""Places where a library does what users of the course would not guess, and what the course does there."""

import numpy as np
import pytest
import torch
import transformers
from tiny_models import random_ids, tiny_model
from transformers import DynamicCache
from transformers.cache_utils import QuantizedLayer

from labutils.generation.cache import CompiledKVCache, KVCache
from labutils.quantization.kv_cache import QuantizedKVCache


class Counted(QuantizedLayer):
    """Transformers' quantized cache with a rounding that only counts positions."""

    def _quantize(self, tensor, axis):
        self.rounded = tensor.shape[-2]
        return tensor

    def _dequantize(self, tensor):
        return tensor


def test_transformers_rounds_a_whole_prompt_and_ours_keeps_the_newest_positions():
    theirs, prompt = Counted(residual_length=128), torch.randn(1, 2, 200, 32)
    theirs.update(prompt, prompt)
    assert theirs.rounded == 200 and theirs.keys.numel() == 0  # residual_length counts from the next token on
    ours = QuantizedKVCache(tiny_model("llama-gqa-tied").config, bits=4, group_size=32, recent=128)
    ours.update(prompt, prompt, 0)
    assert ours.layers[0].keys.shape[2] == 200 - 64  # two groups of 32 have left the window of 128


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23), reason="before 5.23 crop took a length"
)
def test_a_cache_is_cropped_by_how_much_to_forget_and_ours_by_what_to_keep():
    theirs, ours, x = DynamicCache(), KVCache(), torch.randn(1, 2, 9, 4)
    for cache in (theirs, ours):
        cache.update(x, x, 0)
    with pytest.raises(ValueError, match="positive value"):
        theirs.crop(7)
    theirs.crop(-2)
    ours.truncate(7)
    assert theirs.get_seq_length() == ours.get_seq_length() == 7


def test_a_transposed_weight_is_saved_as_it_is(tmp_path):
    """safetensors' NumPy writer stores the memory behind a view; what the course writes is made contiguous first."""
    from safetensors.numpy import load, save

    view = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert np.array_equal(load(save({"w": np.ascontiguousarray(view)}))["w"], view)
    from safetensors.torch import load_file

    from labutils.lab.models.compressed_tensors import save_compressed_tensors

    model = tiny_model("llama-gqa-tied")
    layer = model.model.layers[0].self_attn.o_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().T.contiguous().T)  # the same numbers, turned in memory
    assert not layer.weight.is_contiguous()
    save_compressed_tensors(model, None, tmp_path, {})
    stored = load_file(tmp_path / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"]
    assert torch.equal(stored, layer.weight)


def test_generate_s_own_arguments_do_not_reach_the_assistant():
    model, assistant, ids = tiny_model("llama-gqa-tied"), tiny_model("llama-gqa-tied"), random_ids(5)
    calls = []
    hook = assistant.register_forward_hook(lambda *_: calls.append(1))
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    counts = []
    for told in (None, 1):
        calls.clear()
        assistant.generation_config.update(num_assistant_tokens=told or 6, num_assistant_tokens_schedule="constant")
        assistant.generation_config.assistant_confidence_threshold = 0
        options = {"num_assistant_tokens": 6} if told else {}
        model.generate(ids, **settings, **options, assistant_model=assistant)
        counts.append(len(calls))
    hook.remove()
    assert counts[1] != counts[0]  # the second call's argument says 6 as well, and the assistant's 1 counts


class Counter(torch.nn.Module):
    """Counts its calls in a Python number or in a tensor."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def forward(self, x):
        self.calls = self.calls + 1
        return x * self.calls


@pytest.mark.parametrize(("calls", "graphs"), [(0, 6), (torch.zeros(()), 1)])
def test_a_counter_attribute_compiles_each_time_and_a_tensor_once(calls, graphs):
    assert compilations(Counter(calls), [(torch.ones(2),)] * 6) == graphs


def test_our_compiled_decoder_counts_in_tensors():
    cache = CompiledKVCache(tiny_model("llama-gqa-tied").config, max_length=16)
    keys = torch.ones(1, cache.keys[0].shape[1], 1, cache.keys[0].shape[3])
    steps = [(keys, keys, 0)] * 6
    assert compilations(cache.update, steps) == 1


def compilations(function, calls):
    graphs = []

    def counting(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=counting)
    for arguments in calls:
        compiled(*arguments)
    torch._dynamo.reset()
    return len(graphs)
