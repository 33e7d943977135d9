"""The packed product as a PyTorch operator: the C kernels on a CPU, PyTorch's own operators anywhere else.

Both take the same steps in the same order on exact integers, so they agree to the last bit; `torch.compile` sees one
operator and its shapes.
"""

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor
from torch.nn.functional import pad

from labutils.quantization.kernels import Weight, find_kernels

ROWS, CHUNK, MAX_BLOCK = 8, 32, 64  # as in kernels.c
SMALLEST = 1e-30  # a block of smaller inputs counts as zeros


def unpack_codes(packed: UInt8[Tensor, "tiles chunks vectors rows 4"], *, bits: int) -> UInt8[Tensor, "out n"]:
    """Undoes `pack_codes`."""
    if bits == 4:
        packed = torch.cat([packed & 15, packed >> 4], dim=2)
    return packed.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1)


def quantize_tokens(
    x: Float[Tensor, "tokens n"], *, padded: int, block: int
) -> tuple[Int8[Tensor, "tokens blocks block"], Float[Tensor, "tokens blocks 1"]]:
    """Rounds inputs to int8, a scale for each block: s = max|x| / 127, p = round(x / s), ties to even.

    A block with infinity or NaN gets the scale NaN.

    >>> codes, scales = quantize_tokens(torch.tensor([[127.0, -3.5, 0.2]]), padded=4, block=4)
    >>> codes.tolist(), scales.tolist()
    ([[[127, -4, 0, 0]]], [[[1.0]]])
    """
    blocks = pad(x, (0, padded - x.shape[1])).unflatten(1, (-1, block))
    largest = blocks.abs().amax(dim=2, keepdim=True)
    inverse = torch.full_like(largest, 127) / largest  # 127 / largest rounds twice
    inverse = torch.where(largest > SMALLEST, inverse, 0.0)
    codes = torch.round(blocks * inverse).nan_to_num(0).to(torch.int8)
    scales = torch.where(largest > SMALLEST, largest / 127, 0.0)
    return codes, torch.where(largest.isfinite(), scales, torch.nan)


def packed_linear_torch(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    padded: int,
    group: int,
    block: int,
) -> Tensor:
    """Returns x W^T + b for float32 x (…, in_features) by PyTorch's operators, unpacking `block` inputs at a time.

    Products of codes are summed in float32, where integers below 2^24 are exact.
    """
    flat = x.reshape(-1, x.shape[-1])
    inputs, input_scales = quantize_tokens(flat, padded=padded, block=block)
    vectors = codes.view(-1, padded // CHUNK, bits, ROWS, 4)
    y = flat.new_zeros(len(flat), len(vectors) * ROWS)
    for b in range(padded // block):
        chunks = slice(b * block // CHUNK, (b + 1) * block // CHUNK)
        weights = unpack_codes(vectors[:, chunks], bits=bits).float()
        p, g = inputs[:, b].float(), b * block // group
        zero = 2 ** (bits - 1) if zeros is None else zeros[:, g].flatten()
        y += (scales[:, g].flatten() * input_scales[:, b]) * (p @ weights.T - zero * p.sum(dim=1, keepdim=True))
    y = y[:, :out_features] if bias is None else y[:, :out_features] + bias
    return y.reshape(*x.shape[:-1], out_features).contiguous()


packed_linear = torch.library.custom_op("labutils::packed_linear", packed_linear_torch, mutates_args=())


@packed_linear.register_kernel("cpu")
def _on_cpu(x, codes, scales, zeros, bias, out_features, bits, padded, group, block):
    library, _ = find_kernels()
    if library is None:
        return packed_linear_torch(x, codes, scales, zeros, bias, out_features, bits, padded, group, block)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], out_features)
    addresses = [t if t is None else t.data_ptr() for t in (codes, scales, zeros, bias)]
    weight = Weight(*addresses, x.shape[-1], out_features, padded, group, block, bits)
    library.packed_linear(weight, x.data_ptr(), y.data_ptr(), x.numel() // x.shape[-1], torch.get_num_threads())
    return y


@packed_linear.register_fake
def _shape(x, codes, scales, zeros, bias, out_features, bits, padded, group, block):
    return x.new_empty(*x.shape[:-1], out_features)
