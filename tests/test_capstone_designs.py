"""Designs: what is done to a model, and in which order."""

import pytest
import torch

from labutils.capstone.designs import Design
from labutils.lab.layers.linears import linear_layers, weight_of
from labutils.lab.models.load import load_model
from labutils.lab.models.quantized import packed_layers
from labutils.quantization.affine import Scheme
from labutils.quantization.packed import pack_model_

PROMPT = torch.tensor([[2, 70, 71, 72, 90]])


def test_float_design_is_the_model_itself():
    for ours, theirs in zip(Design().build().model.parameters(), load_model().model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_rounded_design_equals_pack_model(bits):
    scheme = Scheme(8) if bits == 8 else Scheme(bits, granularity="group", group_size=32)
    theirs = pack_model_(load_model("lablm-small").model, scheme)
    ours = Design(model="lablm-small", bits=bits).build().model
    for name, layer in packed_layers(theirs).items():
        assert torch.equal(packed_layers(ours)[name].packed.codes, layer.packed.codes)


def test_calibrated_codes_lie_on_the_same_grid_and_differ():
    rounded, calibrated = (Design(model="lablm-small", bits=4, calibrated=c).build().model for c in (False, True))
    name = next(iter(packed_layers(rounded)))
    one, two = packed_layers(rounded)[name].packed, packed_layers(calibrated)[name].packed
    assert torch.equal(one.scales, two.scales) and not torch.equal(one.codes, two.codes)


def test_pruning_comes_before_quantizing_and_keeps_the_head():
    model = Design(model="lablm-small", pruned=0.5).build().model
    for _, layer in linear_layers(model):
        assert (weight_of(layer) == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    packed = Design(model="lablm-small", pruned=0.5, bits=8).build().model
    weight = next(iter(packed_layers(packed).values())).packed.dequantize()
    assert (weight == 0).float().mean() >= 0.5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": "gpt2"}, "model must be one of lablm, lablm-small; got 'gpt2'"),
        ({"bits": 5}, "bits must be 8, 4, 3 or None; got 5"),
        ({"pruned": 1.0}, "pruned must be a share"),
        ({"bits": 4, "group_size": 48}, "group_size must be 32, 64 or 128; got 48"),
        ({"calibrated": True}, "only quantized weights"),
        ({"draft_tokens": -1}, "draft_tokens must be from 0 to 16; got -1"),
    ],
)
def test_bad_design_is_refused_by_a_sentence(values, words):
    with pytest.raises(ValueError, match=words):
        Design(**values)
