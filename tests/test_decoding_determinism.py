"""A row alone and among others: the same bits under `RowByRow`."""

import pytest
import torch
from tiny_models import random_ids, tiny_model

from labutils.decoding.determinism import RowByRow
from labutils.generation.cache import KVCache
from labutils.generation.decode import prefill


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama-gqa-tied", "llama-untied-bias", "qwen3"])
def test_a_row_s_bits_do_not_depend_on_its_batch(family, dtype):
    model, ids = tiny_model(family).to(dtype), random_ids(11, batch=5)
    with RowByRow(), torch.inference_mode():
        together, alone = model(ids).logits, [model(row[None]).logits for row in ids]
    assert torch.equal(together, torch.cat(alone))


def test_padding_is_hidden_row_by_row():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(8, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    plain = prefill(model, ids, KVCache(), attention_mask=mask)
    with RowByRow():
        torch.testing.assert_close(prefill(model, ids, KVCache(), attention_mask=mask), plain)
        torch.testing.assert_close(prefill(model, ids[1:2, 4:], KVCache()), plain[1:2], atol=1e-5, rtol=1e-4)


def test_every_layer_is_computed_one_row_at_a_time():
    layer, seen = torch.nn.Linear(3, 2), []
    x = torch.randn(4, 6, 3)
    with RowByRow():
        y = layer(x)

        class Spy(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if func is torch.nn.functional.linear:
                    seen.append(tuple(args[0].shape))
                return func(*args, **(kwargs or {}))

    with Spy(), RowByRow():
        layer(x)
    torch.testing.assert_close(y, layer(x))
    assert seen == [(1, 6, 3)] * 4
