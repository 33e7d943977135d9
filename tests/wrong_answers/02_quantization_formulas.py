# %% WRONG affine_codes | multiplied by the scale
# EXERCISE affine_codes
def affine_codes(x, scale, zero_point, qmin, qmax):
    return (torch.round(x * scale) + zero_point).clamp(qmin, qmax).to(torch.int32)


# %% WRONG affine_codes | codes leave the range
# EXERCISE affine_codes
def affine_codes(x, scale, zero_point, qmin, qmax):
    return (torch.round(x / scale) + zero_point).to(torch.int32)


# %% WRONG affine_codes | round first
# EXERCISE affine_codes
def affine_codes(x, scale, zero_point, qmin, qmax):
    return ((x / scale).to(torch.int32) + zero_point).clamp(qmin, qmax)


# %% WRONG affine_codes | even neighbour
# EXERCISE affine_codes
def affine_codes(x, scale, zero_point, qmin, qmax):
    return (torch.floor(x / scale + 0.5) + zero_point).clamp(qmin, qmax).to(torch.int32)


# %% WRONG affine_codes | zero point is missing
# EXERCISE affine_codes
def affine_codes(x, scale, zero_point, qmin, qmax):
    return torch.round(x / scale).clamp(qmin, qmax).to(torch.int32)


# %% WRONG affine_codes | clamp last
# EXERCISE affine_codes
def affine_codes(x, scale, zero_point, qmin, qmax):
    return (torch.round(x / scale).clamp(qmin, qmax) + zero_point).to(torch.int32)


# %% WRONG affine_codes | codes are integers
# EXERCISE affine_codes
def affine_codes(x, scale, zero_point, qmin, qmax):
    return (torch.round(x / scale) + zero_point).clamp(qmin, qmax)


# %% WRONG affine_qparams | 255 steps between them
# EXERCISE affine_qparams
def affine_qparams(x, qmin, qmax):
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = (high - low) / (qmax - qmin + 1)
    return scale, qmin - round(low / scale)


# %% WRONG affine_qparams | 0 must have a code
# EXERCISE affine_qparams
def affine_qparams(x, qmin, qmax):
    low, high = x.min().item(), x.max().item()
    scale = (high - low) / (qmax - qmin)
    return scale, qmin - round(low / scale)


# %% WRONG affine_qparams | low must land on qmin
# EXERCISE affine_qparams
def affine_qparams(x, qmin, qmax):
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = (high - low) / (qmax - qmin)
    return scale, -round(low / scale)


# %% WRONG affine_qparams | a sign is wrong
# EXERCISE affine_qparams
def affine_qparams(x, qmin, qmax):
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = (high - low) / (qmax - qmin)
    return scale, qmin + round(low / scale)


# %% WRONG affine_qparams | round it to an int
# EXERCISE affine_qparams
def affine_qparams(x, qmin, qmax):
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = (high - low) / (qmax - qmin)
    return scale, qmin - low / scale


# %% WRONG affine_codes | you lost float64
# EXERCISE affine_codes
def affine_codes(x, scale, zero_point, qmin, qmax):
    return (torch.round(x.float() / torch.tensor(scale)) + zero_point).clamp(qmin, qmax).to(torch.int32)


# %% WRONG affine_codes | moves with an odd Z
# EXERCISE affine_codes
def affine_codes(x, scale, zero_point, qmin, qmax):
    return torch.round(x / scale + zero_point).clamp(qmin, qmax).to(torch.int32)


# %% WRONG affine_codes | the codes are int32
# EXERCISE affine_codes
def affine_codes(x, scale, zero_point, qmin, qmax):
    return (torch.round(x / scale) + zero_point).clamp(qmin, qmax).long()


# %% WRONG affine_qparams | a code is an int
# EXERCISE affine_qparams
def affine_qparams(x, qmin, qmax):
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = (high - low) / (qmax - qmin)
    return scale, float(qmin - round(low / scale))


# %% WRONG group_scales | take the largest |w|
# EXERCISE group_scales
def group_scales(weight, qmax, group_size):
    return weight.unflatten(1, (-1, group_size)).amax(dim=-1) / qmax


# %% WRONG group_scales | one scale a row
# EXERCISE group_scales
def group_scales(weight, qmax, group_size):
    return weight.abs().amax(dim=1) / qmax


# %% WRONG group_scales | run down the columns
# EXERCISE group_scales
def group_scales(weight, qmax, group_size):
    return weight.T.unflatten(1, (-1, group_size)).abs().amax(dim=-1) / qmax


# %% WRONG group_scales | group_size neighbours
# EXERCISE group_scales
def group_scales(weight, qmax, group_size):
    return weight.unflatten(1, (group_size, -1)).abs().amax(dim=1) / qmax


# %% WRONG group_scales | divide by qmax
# EXERCISE group_scales
def group_scales(weight, qmax, group_size):
    return weight.unflatten(1, (-1, group_size)).abs().amax(dim=-1) / (2 * qmax + 1)


# %% WRONG group_scales | drop the last axis
# EXERCISE group_scales
def group_scales(weight, qmax, group_size):
    return weight.unflatten(1, (-1, group_size)).abs().amax(dim=-1, keepdim=True) / qmax


# %% WRONG smallest_group | zero points are missing
# EXERCISE smallest_group
def smallest_group(columns, bits, scale_bits, zero_point_bits, budget):
    size = 1
    while columns % size == 0:
        if bits + scale_bits / size <= budget:
            return size
        size *= 2


# %% WRONG smallest_group | in bytes
# EXERCISE smallest_group
def smallest_group(columns, bits, scale_bits, zero_point_bits, budget):
    size = 1
    while columns % size == 0:
        if bits + (scale_bits + zero_point_bits) / 8 / size <= budget:
            return size
        size *= 2


# %% WRONG smallest_group | within it
# EXERCISE smallest_group
def smallest_group(columns, bits, scale_bits, zero_point_bits, budget):
    size = 1
    while columns % size == 0:
        if bits + (scale_bits + zero_point_bits) / size < budget:
            return size
        size *= 2


# %% WRONG smallest_group | must divide columns
# EXERCISE smallest_group
def smallest_group(columns, bits, scale_bits, zero_point_bits, budget):
    size = 1
    while size <= columns:
        if bits + (scale_bits + zero_point_bits) / size <= budget:
            return size
        size *= 2


# %% WRONG smallest_group | most scales
# EXERCISE smallest_group
def smallest_group(columns, bits, scale_bits, zero_point_bits, budget):
    size = columns & -columns
    return size if bits + (scale_bits + zero_point_bits) / size <= budget else None


# %% WRONG best_share | the worst share
# EXERCISE best_share
def best_share(x, bits, shares):
    qmax = 2 ** (bits - 1) - 1
    errors = []
    for share in shares:
        scale = share * x.abs().max() / qmax
        back = torch.round(x / scale).clamp(-qmax, qmax) * scale
        errors.append((back - x).square().sum().item())
    return shares[errors.index(max(errors))]


# %% WRONG best_share | nothing is ever cut
# EXERCISE best_share
def best_share(x, bits, shares):
    qmax = 2 ** (bits - 1) - 1

    def squared_error(share):
        scale = share * x.abs().max() / qmax
        return (torch.round(x / scale) * scale - x).square().sum().item()

    return min(shares, key=squared_error)


# %% WRONG best_share | errors of both signs cancel
# EXERCISE best_share
def best_share(x, bits, shares):
    qmax = 2 ** (bits - 1) - 1

    def error(share):
        scale = share * x.abs().max() / qmax
        return (torch.round(x / scale).clamp(-qmax, qmax) * scale - x).sum().item()

    return min(shares, key=error)


# %% WRONG best_share | absolute errors
# EXERCISE best_share
def best_share(x, bits, shares):
    qmax = 2 ** (bits - 1) - 1

    def error(share):
        scale = share * x.abs().max() / qmax
        return (torch.round(x / scale).clamp(-qmax, qmax) * scale - x).abs().sum().item()

    return min(shares, key=error)


# %% WRONG bits_for | takes the whole step
# EXERCISE bits_for
def bits_for(x, target_db):
    signal, peak = x.square().mean().item(), x.abs().max().item()
    return next(b for b in range(2, 17) if 10 * math.log10(signal / (peak / (2 ** (b - 1) - 1)) ** 2) >= target_db)


# %% WRONG bits_for | not S²/3
# EXERCISE bits_for
def bits_for(x, target_db):
    signal, peak = x.square().mean().item(), x.abs().max().item()
    return next(b for b in range(2, 17) if 10 * math.log10(3 * signal / (peak / (2 ** (b - 1) - 1)) ** 2) >= target_db)


# %% WRONG bits_for | for amplitudes
# EXERCISE bits_for
def bits_for(x, target_db):
    signal, peak = x.square().mean().item(), x.abs().max().item()
    return next(b for b in range(2, 17) if 20 * math.log10(12 * signal / (peak / (2 ** (b - 1) - 1)) ** 2) >= target_db)


# %% WRONG bits_for | half the codes
# EXERCISE bits_for
def bits_for(x, target_db):
    signal, peak = x.square().mean().item(), x.abs().max().item()
    return next(b for b in range(2, 17) if 10 * math.log10(12 * signal / (peak / (2**b - 1)) ** 2) >= target_db)


# %% WRONG bits_for | mean of its squares
# EXERCISE bits_for
def bits_for(x, target_db):
    signal, peak = x.abs().mean().item(), x.abs().max().item()
    return next(b for b in range(2, 17) if 10 * math.log10(12 * signal / (peak / (2 ** (b - 1) - 1)) ** 2) >= target_db)


# %% WRONG xnor_product | each of them is a −1
# EXERCISE xnor_product
def xnor_product(x_bits, weight_bits, count):
    return POPCOUNT[(x_bits[:, None] ^ weight_bits[None]).int()].sum(dim=-1)


# %% WRONG xnor_product | subtract those that differ once more
# EXERCISE xnor_product
def xnor_product(x_bits, weight_bits, count):
    return count - POPCOUNT[(x_bits[:, None] ^ weight_bits[None]).int()].sum(dim=-1)


# %% WRONG xnor_product | the sign is turned
# EXERCISE xnor_product
def xnor_product(x_bits, weight_bits, count):
    return 2 * POPCOUNT[(x_bits[:, None] ^ weight_bits[None]).int()].sum(dim=-1) - count


# %% WRONG xnor_product | AND finds two +1 only
# EXERCISE xnor_product
def xnor_product(x_bits, weight_bits, count):
    return count - 2 * POPCOUNT[(x_bits[:, None] & weight_bits[None]).int()].sum(dim=-1)


# %% WRONG xnor_product | the padding was counted
# EXERCISE xnor_product
def xnor_product(x_bits, weight_bits, count):
    return 8 * x_bits.shape[1] - 2 * POPCOUNT[(x_bits[:, None] ^ weight_bits[None]).int()].sum(dim=-1)


# %% WRONG decode_e4m3 | the bias is 7
# EXERCISE decode_e4m3
def decode_e4m3(code):
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    value = (1 + mantissa / 8) * 2.0 ** (exponent - 8) if exponent else mantissa / 8 * 2.0**-7
    return -value if sign else value


# %% WRONG decode_e4m3 | hidden 1 is missing
# EXERCISE decode_e4m3
def decode_e4m3(code):
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    value = mantissa / 8 * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
    return -value if sign else value


# %% WRONG decode_e4m3 | means subnormal
# EXERCISE decode_e4m3
def decode_e4m3(code):
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    value = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


# %% WRONG decode_e4m3 | counts eighths
# EXERCISE decode_e4m3
def decode_e4m3(code):
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    value = (1 + mantissa) * 2.0 ** (exponent - 7) if exponent else mantissa * 2.0**-6
    return -value if sign else value


# %% WRONG decode_e4m3 | is the sign
# EXERCISE decode_e4m3
def decode_e4m3(code):
    exponent, mantissa = code >> 3 & 15, code & 7
    return (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6


# %% WRONG decode_e4m3 | by hand
# EXERCISE decode_e4m3
def decode_e4m3(code):
    return torch.tensor([code], dtype=torch.uint8).view(torch.float8_e4m3fn).float().item()


# %% WRONG nf4_codes | divide the block by its max
# EXERCISE nf4_codes
def nf4_codes(block, levels):
    return (block[:, None] - levels).abs().argmin(dim=1)


# %% WRONG nf4_codes | mostly negative
# EXERCISE nf4_codes
def nf4_codes(block, levels):
    return ((block / block.max())[:, None] - levels).abs().argmin(dim=1)


# %% WRONG nf4_codes | evenly spaced
# EXERCISE nf4_codes
def nf4_codes(block, levels):
    return torch.round((block / block.abs().max() + 1) / 2 * 15).long()


# %% WRONG nf4_codes | next level above
# EXERCISE nf4_codes
def nf4_codes(block, levels):
    return torch.searchsorted(levels, block / block.abs().max()).clamp(max=15)


# %% WRONG nf4_codes | those are levels
# EXERCISE nf4_codes
def nf4_codes(block, levels):
    return levels[((block / block.abs().max())[:, None] - levels).abs().argmin(dim=1)]


# %% WRONG nvfp4_back | stored in E4M3
# EXERCISE nvfp4_back
def nvfp4_back(block, tensor_scale):
    step = block.abs().max() / 6
    return decode(encode(block / step, E2M1), E2M1) * step


# %% WRONG nvfp4_back | missing on the way back
# EXERCISE nvfp4_back
def nvfp4_back(block, tensor_scale):
    scale = decode(encode(block.abs().max() / (6 * tensor_scale), E4M3), E4M3)
    return decode(encode(block / (scale * tensor_scale), E2M1), E2M1) * scale


# %% WRONG nvfp4_back | largest number is 6
# EXERCISE nvfp4_back
def nvfp4_back(block, tensor_scale):
    step = decode(encode(block.abs().max() / (7 * tensor_scale), E4M3), E4M3) * tensor_scale
    return decode(encode(block / step, E2M1), E2M1) * step


# %% WRONG nvfp4_back | power of two
# EXERCISE nvfp4_back
def nvfp4_back(block, tensor_scale):
    step = 2.0 ** (block.abs().max().log2().floor() - 2)
    return decode(encode(block / step, E2M1), E2M1) * step


# %% WRONG quantize_bias | the weight's scale alone
# EXERCISE quantize_bias
def quantize_bias(bias, x_scale, weight_scale):
    return torch.round(bias / weight_scale).to(torch.int32)


# %% WRONG quantize_bias | the input's scale alone
# EXERCISE quantize_bias
def quantize_bias(bias, x_scale, weight_scale):
    return torch.round(bias / x_scale).to(torch.int32)


# %% WRONG quantize_bias | multiplied by the scales
# EXERCISE quantize_bias
def quantize_bias(bias, x_scale, weight_scale):
    return torch.round(bias * x_scale * weight_scale).to(torch.int32)


# %% WRONG quantize_bias | the article's mistake
# EXERCISE quantize_bias
def quantize_bias(bias, x_scale, weight_scale):
    return torch.round(bias / (x_scale * weight_scale)).clamp(-128, 127).to(torch.int8)


# %% WRONG quantize_bias | codes are integers
# EXERCISE quantize_bias
def quantize_bias(bias, x_scale, weight_scale):
    return torch.round(bias / (x_scale * weight_scale))


# %% WRONG requantize | a shift rounds down
# EXERCISE requantize
def requantize(sums, multiplier, shift, zero_point):
    return ((sums.long() * multiplier >> shift) + zero_point).clamp(-128, 127).to(torch.int8)


# %% WRONG requantize | clamp to
# EXERCISE requantize
def requantize(sums, multiplier, shift, zero_point):
    return ((sums.long() * multiplier + (1 << shift - 1)) >> shift) + zero_point


# %% WRONG requantize | after the shift
# EXERCISE requantize
def requantize(sums, multiplier, shift, zero_point):
    return ((sums.long() * multiplier + zero_point + (1 << shift - 1)) >> shift).clamp(-128, 127).to(torch.int8)


# %% WRONG requantize | up to 62 bits
# EXERCISE requantize
def requantize(sums, multiplier, shift, zero_point):
    product = (sums.long() * multiplier + (1 << shift - 1)).int()
    return ((product.long() >> shift) + zero_point).clamp(-128, 127).to(torch.int8)


# %% WRONG requantize | the multiplier is missing
# EXERCISE requantize
def requantize(sums, multiplier, shift, zero_point):
    return ((sums.long() + (1 << shift - 1) >> shift) + zero_point).clamp(-128, 127).to(torch.int8)


# %% WRONG requantize | no floats
# EXERCISE requantize
def requantize(sums, multiplier, shift, zero_point):
    rounded = torch.floor(sums.double() * multiplier / 2.0**shift + 0.5)
    return (rounded + zero_point).clamp(-128, 127).to(torch.int8)


# %% WRONG requantize | eight bits
# EXERCISE requantize
def requantize(sums, multiplier, shift, zero_point):
    return (((sums.long() * multiplier + (1 << (shift - 1))) >> shift) + zero_point).clamp(-128, 127)
