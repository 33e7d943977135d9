"""The contest of chapter 03: LabLM in 3 bits under a limit of size."""

import copy
from dataclasses import replace

from torch import nn

from labutils.course.checks import exercise, expect_shape, expect_true
from labutils.course.checks.compare import describe, kind
from labutils.lab.layers.linears import change_weights_, linear_layers, weight_of
from labutils.lab.models.compare import bits_by_document, held_out_documents, paired_quality
from labutils.quantization.affine import QParams, Scheme, dequantize, fake_quantize

BITS, LIMIT_BYTES = 3, 4_060_000
NEAREST = Scheme(bits=BITS, symmetric=False, granularity="group", group_size=64)


def entry(answer, model: nn.Module, statistics) -> tuple[dict, float]:
    """Codes and `QParams` of every layer, and the bytes of the model; each scale takes 16 bits.

    Raises:
        CheckFailed: for an answer that is not allowed, or too large.
    """
    layers, bits = {}, 16 * sum(p.numel() for p in model.parameters())
    for name, layer in linear_layers(model):
        weight = weight_of(layer)
        pair = answer(name, weight.clone(), statistics[name].gram)
        bits += _stored_bits(name, weight, pair) - 16 * weight.numel()
        layers[name] = pair[0], replace(pair[1], scale=pair[1].scale.half().float())  # as 16 bits keep it
    limit, actual = f"at most {LIMIT_BYTES:,} bytes", f"{bits / 8:,.0f} bytes"
    hint = "each group stores a scale of 16 bits and a zero point (16 bits, if it is no integer): make groups larger"
    expect_true(bits / 8 <= LIMIT_BYTES, "the model is too large", expected=limit, actual=actual, hint=hint)
    return layers, bits / 8


def _stored_bits(name, weight, pair) -> int:
    """The bits of one layer: 3 a code, 16 a scale, 3 a zero point or 16 where it is a real number."""
    given = f"name={name!r}, weight of shape {tuple(weight.shape)}"
    is_pair = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], QParams)
    expect_true(is_pair, "the answer is no pair (codes, qparams)", given=given, actual=describe(pair))
    codes, qparams = pair
    expect_shape(codes, tuple(weight.shape), given=given)
    hint = "those are rounded weights: quantize(rounded, qparams) gives their codes"
    expect_true(kind(codes) == "integer", "the codes are no integers", given=given, actual=describe(codes), hint=hint)
    width = max(int(codes.max()) - int(codes.min()), qparams.qmax - qparams.qmin)
    hint = "3 bits have eight codes: use `scheme`, or another one with bits=3"
    expect_true(width < 2**BITS, "the codes need more than 3 bits", given=given, actual=describe(codes), hint=hint)
    zero_bits = BITS if kind(qparams.zero_point) == "integer" else 16
    return BITS * codes.numel() + 16 * qparams.scale.numel() + zero_bits * qparams.zero_point.numel()


@exercise("3.14")
def three_bits(answer, model, tokenizer, statistics):
    """Within the limit, and surely better on held-out code than rounding to nearest."""
    layers, _ = entry(answer, model, statistics)
    documents = held_out_documents(limit_bytes=1000)
    mine = change_weights_(copy.deepcopy(model), lambda name, _: dequantize(*layers[name]))
    nearest = change_weights_(copy.deepcopy(model), lambda _, weight: fake_quantize(weight, NEAREST))
    quality = paired_quality(*(bits_by_document(each, tokenizer, documents) for each in (mine, nearest)))
    low, high = quality.interval
    hint = "begin with gptq on the grid of choose_qparams(weight, scheme), and improve the grid from there"
    if abs(quality.difference) < 1e-3:
        hint = "that rounds every weight for itself: let the next columns make up for an error (gptq), or clip the grid"
    elif quality.difference > 0.5:
        hint = "a code means scale * (code - zero_point): are these codes of the same qparams that you return?"
    expect_true(
        high < 0,
        "it does not surely lose less than rounding to nearest",
        expected="an interval below 0, in bits per byte of held-out code, paired",
        actual=f"{quality.difference:+.4f} [{low:+.4f}, {high:+.4f}]",
        hint=hint,
    )
