# %% WRONG best_flip | return None where
# EXERCISE best_flip
def best_flip(row, rounded, gram, step):
    pull = (row - rounded) @ gram
    gains = 2 * step * pull.abs() - step**2 * gram.diagonal()
    column = gains.argmax().item()
    return column, 1 if pull[column] > 0 else -1


# %% WRONG best_flip | whole Gram
# EXERCISE best_flip
def best_flip(row, rounded, gram, step):
    pull = (row - rounded) * gram.diagonal()
    gains = 2 * step * pull.abs() - step**2 * gram.diagonal()
    column = gains.argmax().item()
    if gains[column] > 0:
        return column, 1 if pull[column] > 0 else -1


# %% WRONG best_flip | error of its own
# EXERCISE best_flip
def best_flip(row, rounded, gram, step):
    pull = (row - rounded) @ gram
    gains = 2 * step * pull.abs()
    column = gains.argmax().item()
    if gains[column] > 0:
        return column, 1 if pull[column] > 0 else -1


# %% WRONG best_flip | turn the direction
# EXERCISE best_flip
def best_flip(row, rounded, gram, step):
    pull = (row - rounded) @ gram
    gains = 2 * step * pull.abs() - step**2 * gram.diagonal()
    column = gains.argmax().item()
    if gains[column] > 0:
        return column, -1 if pull[column] > 0 else 1


# %% WRONG best_flip | near the middle
# EXERCISE best_flip
def best_flip(row, rounded, gram, step):
    column = (row - rounded).abs().argmax().item()
    return column, 1 if row[column] > rounded[column] else -1


# %% WRONG best_flip | direction is missing
# EXERCISE best_flip
def best_flip(row, rounded, gram, step):
    pull = (row - rounded) @ gram
    gains = 2 * step * pull.abs() - step**2 * gram.diagonal()
    column = gains.argmax().item()
    return column if gains[column] > 0 else None


# %% WRONG gptq_round | plain rounding
# EXERCISE gptq_round
def gptq_round(weight, factor, scale, qmax):
    return torch.round(weight / scale[:, None]).clamp(-qmax, qmax) * scale[:, None]


# %% WRONG gptq_round | the sign is wrong
# EXERCISE gptq_round
def gptq_round(weight, factor, scale, qmax):
    work, rounded = weight.clone(), torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        rounded[:, j] = torch.round(work[:, j] / scale).clamp(-qmax, qmax) * scale
        error = (work[:, j] - rounded[:, j]) / factor[j, j]
        work[:, j + 1 :] += error[:, None] * factor[j, j + 1 :]
    return rounded


# %% WRONG gptq_round | divide the error by U[j, j]
# EXERCISE gptq_round
def gptq_round(weight, factor, scale, qmax):
    work, rounded = weight.clone(), torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        rounded[:, j] = torch.round(work[:, j] / scale).clamp(-qmax, qmax) * scale
        error = work[:, j] - rounded[:, j]
        work[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return rounded


# %% WRONG gptq_round | clamp it
# EXERCISE gptq_round
def gptq_round(weight, factor, scale, qmax):
    work, rounded = weight.clone(), torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        rounded[:, j] = torch.round(work[:, j] / scale) * scale
        error = (work[:, j] - rounded[:, j]) / factor[j, j]
        work[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return rounded


# %% WRONG gptq_round | along row j of U | same
# EXERCISE gptq_round
def gptq_round(weight, factor, scale, qmax):
    work, rounded = weight.clone(), torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        rounded[:, j] = torch.round(work[:, j] / scale).clamp(-qmax, qmax) * scale
        error = (work[:, j] - rounded[:, j]) / factor[j, j]
        work[:, j + 1 :] -= error[:, None] * factor[j + 1 :, j]
    return rounded


# %% WRONG gptq_round | those are codes
# EXERCISE gptq_round
def gptq_round(weight, factor, scale, qmax):
    work, codes = weight.clone(), torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        codes[:, j] = torch.round(work[:, j] / scale).clamp(-qmax, qmax)
        error = (work[:, j] - codes[:, j] * scale) / factor[j, j]
        work[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return codes


# %% WRONG gptq_round | work on a copy
# EXERCISE gptq_round
def gptq_round(weight, factor, scale, qmax):
    for j in range(weight.shape[1]):
        column = torch.round(weight[:, j] / scale).clamp(-qmax, qmax) * scale
        error = (weight[:, j] - column) / factor[j, j]
        weight[:, j] = column
        weight[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return weight


# %% WRONG best_alpha | by s again
# EXERCISE best_alpha
def best_alpha(weight, mean_abs, gram, scheme):
    losses = {a: layer_error(weight, fake_quantize(weight * awq_scale(mean_abs, a), scheme), gram) for a in ALPHAS}
    return min(losses, key=losses.get)


# %% WRONG best_alpha | must become larger
# EXERCISE best_alpha
def best_alpha(weight, mean_abs, gram, scheme):
    losses = {}
    for alpha in ALPHAS:
        s = awq_scale(mean_abs, alpha)
        losses[alpha] = layer_error(weight, fake_quantize(weight / s, scheme) * s, gram)
    return min(losses, key=losses.get)


# %% WRONG best_alpha | that compares weights
# EXERCISE best_alpha
def best_alpha(weight, mean_abs, gram, scheme):
    losses = {}
    for alpha in ALPHAS:
        s = awq_scale(mean_abs, alpha)
        losses[alpha] = (weight - fake_quantize(weight * s, scheme) / s).square().sum().item()
    return min(losses, key=losses.get)


# %% WRONG best_alpha | return its α
# EXERCISE best_alpha
def best_alpha(weight, mean_abs, gram, scheme):
    losses = {}
    for alpha in ALPHAS:
        s = awq_scale(mean_abs, alpha)
        losses[alpha] = layer_error(weight, fake_quantize(weight * s, scheme) / s, gram)
    return min(losses.values())


# %% WRONG best_alpha | the largest loss
# EXERCISE best_alpha
def best_alpha(weight, mean_abs, gram, scheme):
    losses = {}
    for alpha in ALPHAS:
        s = awq_scale(mean_abs, alpha)
        losses[alpha] = layer_error(weight, fake_quantize(weight * s, scheme) / s, gram)
    return max(losses, key=losses.get)


# %% WRONG split_product | own product is missing
# EXERCISE split_product
def split_product(x, weight, threshold):
    outliers = (x.abs() >= threshold).any(dim=0)
    regular = fake_quantize(x.masked_fill(outliers, 0), Scheme(granularity="token"))
    return regular @ fake_quantize(weight.masked_fill(outliers, 0), Scheme()).T


# %% WRONG split_product | set them to 0 first
# EXERCISE split_product
def split_product(x, weight, threshold):
    outliers = (x.abs() >= threshold).any(dim=0)
    regular = fake_quantize(x, Scheme(granularity="token")) @ fake_quantize(weight, Scheme()).T
    return regular + x[:, outliers] @ weight[:, outliers].T


# %% WRONG split_product | equality counts
# EXERCISE split_product
def split_product(x, weight, threshold):
    outliers = (x.abs() > threshold).any(dim=0)
    regular = fake_quantize(x.masked_fill(outliers, 0), Scheme(granularity="token"))
    rounded = fake_quantize(weight.masked_fill(outliers, 0), Scheme())
    return regular @ rounded.T + x[:, outliers] @ weight[:, outliers].T


# %% WRONG split_product | outliers count too
# EXERCISE split_product
def split_product(x, weight, threshold):
    outliers = (x >= threshold).any(dim=0)
    regular = fake_quantize(x.masked_fill(outliers, 0), Scheme(granularity="token"))
    rounded = fake_quantize(weight.masked_fill(outliers, 0), Scheme())
    return regular @ rounded.T + x[:, outliers] @ weight[:, outliers].T


# %% WRONG split_product | one scale for each token
# EXERCISE split_product
def split_product(x, weight, threshold):
    outliers = (x.abs() >= threshold).any(dim=0)
    regular = fake_quantize(x.masked_fill(outliers, 0), Scheme(granularity="tensor"))
    rounded = fake_quantize(weight.masked_fill(outliers, 0), Scheme())
    return regular @ rounded.T + x[:, outliers] @ weight[:, outliers].T


# %% WRONG split_product | nothing was split off
# EXERCISE split_product
def split_product(x, weight, threshold):
    return fake_quantize(x, Scheme(granularity="token")) @ fake_quantize(weight, Scheme()).T


# %% WRONG butterfly | so that the length stays
# EXERCISE butterfly
def butterfly(x):
    y, distance = x, 1
    while distance < x.shape[-1]:
        a, b = y.unflatten(-1, (-1, 2, distance)).unbind(-2)
        y, distance = torch.stack([a + b, a - b], dim=-2).flatten(-3), 2 * distance
    return y / x.shape[-1]


# %% WRONG butterfly | division is missing
# EXERCISE butterfly
def butterfly(x):
    y, distance = x, 1
    while distance < x.shape[-1]:
        a, b = y.unflatten(-1, (-1, 2, distance)).unbind(-2)
        y, distance = torch.stack([a + b, a - b], dim=-2).flatten(-3), 2 * distance
    return y


# %% WRONG butterfly | not b − a
# EXERCISE butterfly
def butterfly(x):
    y, distance = x, 1
    while distance < x.shape[-1]:
        a, b = y.unflatten(-1, (-1, 2, distance)).unbind(-2)
        y, distance = torch.stack([a + b, b - a], dim=-2).flatten(-3), 2 * distance
    return y / x.shape[-1] ** 0.5


# %% WRONG butterfly | distance of its own
# EXERCISE butterfly
def butterfly(x):
    y = x
    for _ in range(x.shape[-1].bit_length() - 1):
        a, b = y.unflatten(-1, (-1, 2)).unbind(-1)
        y = torch.stack([a + b, a - b], dim=-1).flatten(-2)
    return y / x.shape[-1] ** 0.5


# %% WRONG round_keys | along a token
# EXERCISE round_keys
def round_keys(keys, bits, group_size):
    return fake_quantize(keys, Scheme(bits=bits, symmetric=False, granularity="group", group_size=group_size))


# %% WRONG round_keys | turn the axes back
# EXERCISE round_keys
def round_keys(keys, bits, group_size):
    scheme = Scheme(bits=bits, symmetric=False, granularity="group", group_size=group_size)
    return fake_quantize(keys.transpose(-1, -2), scheme)


# %% WRONG round_keys | symmetric range
# EXERCISE round_keys
def round_keys(keys, bits, group_size):
    scheme = Scheme(bits=bits, granularity="group", group_size=group_size)
    return fake_quantize(keys.transpose(-1, -2), scheme).transpose(-1, -2)


# %% WRONG round_keys | zero need not lie in it
# EXERCISE round_keys
def round_keys(keys, bits, group_size):
    scheme = Scheme(bits=bits, symmetric=False, granularity="group", group_size=group_size)
    return fake_quantize(keys.transpose(-1, -2), scheme).transpose(-1, -2)


# %% WRONG round_keys | along a token | same
# EXERCISE round_keys
def round_keys(keys, bits, group_size):
    groups = keys.unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    return (((groups - low) / scale).round() * scale + low).flatten(-2)


# %% WRONG round_keys | not for the whole text
# EXERCISE round_keys
def round_keys(keys, bits, group_size):
    scheme = Scheme(bits=bits, symmetric=False, granularity="channel")
    return fake_quantize(keys.transpose(-1, -2), scheme).transpose(-1, -2)


# %% WRONG straight_through | almost everywhere
# EXERCISE straight_through
def straight_through(weight, scale, qmax):
    x = (weight / scale).clamp(-qmax, qmax)
    return x.round() * scale


# %% WRONG straight_through | no gradient arrives
# EXERCISE straight_through
def straight_through(weight, scale, qmax):
    x = (weight / scale).clamp(-qmax, qmax)
    return (x.round() * scale).detach()


# %% WRONG straight_through | a clamped weight
# EXERCISE straight_through
def straight_through(weight, scale, qmax):
    x = (weight / scale).clamp(-qmax, qmax)
    return weight + (x.round() * scale - weight).detach()


# %% WRONG straight_through | scale gets no gradient
# EXERCISE straight_through
def straight_through(weight, scale, qmax):
    scale = scale.detach()
    x = (weight / scale).clamp(-qmax, qmax)
    return (x + (x.round() - x).detach()) * scale


# %% WRONG straight_through | two places
# EXERCISE straight_through
def straight_through(weight, scale, qmax):
    x = (weight / scale).clamp(-qmax, qmax)
    return (x + (x.round() - x).detach()) * scale.detach()


# %% WRONG straight_through | round it
# EXERCISE straight_through
def straight_through(weight, scale, qmax):
    x = (weight / scale).clamp(-qmax, qmax)
    return x * scale


# %% WRONG straight_through | clamp w / s
# EXERCISE straight_through
def straight_through(weight, scale, qmax):
    x = weight / scale
    return (x + (x.round() - x).detach()) * scale


# %% WRONG straight_through | those are codes
# EXERCISE straight_through
def straight_through(weight, scale, qmax):
    x = (weight / scale).clamp(-qmax, qmax)
    return x + (x.round() - x).detach()


# %% WRONG pack_halves | pair code k with code k + 16
# EXERCISE pack_halves
def pack_halves(codes):
    return codes[0::2] | (codes[1::2] << 4)


# %% WRONG pack_halves | halves are swapped
# EXERCISE pack_halves
def pack_halves(codes):
    chunks = codes.reshape(-1, 2, 16)
    return (chunks[:, 1] | (chunks[:, 0] << 4)).reshape(-1)


# %% WRONG pack_halves | shift it up by 4 bits
# EXERCISE pack_halves
def pack_halves(codes):
    chunks = codes.reshape(-1, 2, 16)
    return (chunks[:, 0] | chunks[:, 1]).reshape(-1)


# %% WRONG pack_halves | halve every 32 codes
# EXERCISE pack_halves
def pack_halves(codes):
    half = len(codes) // 2
    return codes[:half] | (codes[half:] << 4)


# %% WRONG pack_halves | return dtype uint8
# EXERCISE pack_halves
def pack_halves(codes):
    chunks = codes.reshape(-1, 2, 16).astype(int)
    return (chunks[:, 0] + 16 * chunks[:, 1]).reshape(-1)


# %% WRONG maddubs | this instruction saturates
# EXERCISE maddubs
def maddubs(unsigned, signed):
    products = unsigned.astype(np.int32) * signed.astype(np.int32)
    return products.reshape(-1, 2).sum(axis=1).astype(np.int16)


# %% WRONG maddubs | saturate there
# EXERCISE maddubs
def maddubs(unsigned, signed):
    products = unsigned.astype(np.int32) * signed.astype(np.int32)
    return np.clip(products.reshape(-1, 2).sum(axis=1), -128, 127).astype(np.int16)


# %% WRONG maddubs | not the two halves
# EXERCISE maddubs
def maddubs(unsigned, signed):
    products = unsigned.astype(np.int32) * signed.astype(np.int32)
    half = len(products) // 2
    return np.clip(products[:half] + products[half:], -(2**15), 2**15 - 1).astype(np.int16)


# %% WRONG maddubs | nothing saturates in int32
# EXERCISE maddubs
def maddubs(unsigned, signed):
    products = unsigned.astype(np.int32) * signed.astype(np.int32)
    return products.reshape(-1, 2).sum(axis=1)


# %% WRONG maddubs | read unsigned codes as signed
# EXERCISE maddubs
def maddubs(unsigned, signed):
    products = unsigned.astype(np.int8).astype(np.int32) * signed
    return np.clip(products.reshape(-1, 2).sum(axis=1), -(2**15), 2**15 - 1).astype(np.int16)


# %% WRONG block_product | wraps around
# EXERCISE block_product
def block_product(codes, scale, x_codes, x_scales):
    q = (codes - np.uint8(128)).reshape(len(codes), len(x_scales), -1)
    p = x_codes.astype(np.int32).reshape(len(x_scales), -1)
    return scale * ((q * p).sum(axis=2) * x_scales).sum(axis=1)


# %% WRONG block_product | the zero point is missing
# EXERCISE block_product
def block_product(codes, scale, x_codes, x_scales):
    q = codes.astype(np.int32).reshape(len(codes), len(x_scales), -1)
    p = x_codes.astype(np.int32).reshape(len(x_scales), -1)
    return scale * ((q * p).sum(axis=2) * x_scales).sum(axis=1)


# %% WRONG block_product | each block has a scale of its own
# EXERCISE block_product
def block_product(codes, scale, x_codes, x_scales):
    dots = (codes.astype(np.int32) - 128) @ x_codes.astype(np.int32)
    return scale * dots * x_scales.mean()


# %% WRONG block_product | the weights' scale is missing
# EXERCISE block_product
def block_product(codes, scale, x_codes, x_scales):
    q = codes.astype(np.int32).reshape(len(codes), len(x_scales), -1) - 128
    p = x_codes.astype(np.int32).reshape(len(x_scales), -1)
    return ((q * p).sum(axis=2) * x_scales).sum(axis=1)


# %% WRONG block_product | and you added it
# EXERCISE block_product
def block_product(codes, scale, x_codes, x_scales):
    q = codes.astype(np.int32).reshape(len(codes), len(x_scales), -1) + 128
    p = x_codes.astype(np.int32).reshape(len(x_scales), -1)
    return scale * ((q * p).sum(axis=2) * x_scales).sum(axis=1)


# %% WRONG decode_q4_0 | the scale's sign belongs to it
# EXERCISE decode_q4_0
def decode_q4_0(block):
    scale = np.abs(block[:2].view(np.float16).astype(np.float32))
    codes = np.concatenate([block[2:] & 15, block[2:] >> 4])
    return scale * (codes.astype(np.float32) - 8)


# %% WRONG decode_q4_0 | not two neighbours
# EXERCISE decode_q4_0
def decode_q4_0(block):
    scale = block[:2].view(np.float16).astype(np.float32)
    codes = np.stack([block[2:] & 15, block[2:] >> 4], axis=1).reshape(-1)
    return scale * (codes.astype(np.float32) - 8)


# %% WRONG decode_q4_0 | the halves are swapped
# EXERCISE decode_q4_0
def decode_q4_0(block):
    scale = block[:2].view(np.float16).astype(np.float32)
    codes = np.concatenate([block[2:] >> 4, block[2:] & 15])
    return scale * (codes.astype(np.float32) - 8)


# %% WRONG decode_q4_0 | stand for −8 to 7
# EXERCISE decode_q4_0
def decode_q4_0(block):
    scale = block[:2].view(np.float16).astype(np.float32)
    return scale * np.concatenate([block[2:] & 15, block[2:] >> 4]).astype(np.float32)


# %% WRONG decode_q4_0 | uint8 has no negative numbers
# EXERCISE decode_q4_0
def decode_q4_0(block):
    scale = block[:2].view(np.float16).astype(np.float32)
    codes = np.concatenate([block[2:] & 15, block[2:] >> 4]) - 8
    return scale * codes.astype(np.float32)


# %% WRONG differing_codes | rounds halves up
# EXERCISE differing_codes
def differing_codes(row):
    ratio = row / (np.abs(row).max() / 127)
    return np.flatnonzero(np.floor(ratio + 0.5) != np.rint(ratio))


# %% WRONG differing_codes | compare the codes
# EXERCISE differing_codes
def differing_codes(row):
    ratio = row / (np.abs(row).max() / 127)
    return np.flatnonzero(ratio % 1 == 0.5)


# %% WRONG differing_codes | those are booleans
# EXERCISE differing_codes
def differing_codes(row):
    ratio = row / (np.abs(row).max() / 127)
    return np.trunc(ratio + np.copysign(0.5, ratio)) != np.rint(ratio)


# %% WRONG differing_codes | with another divisor
# EXERCISE differing_codes
def differing_codes(row):
    ratio = row / (np.abs(row).max() / 128)
    return np.flatnonzero(np.trunc(ratio + np.copysign(0.5, ratio)) != np.rint(ratio))


# %% WRONG unpack_zero_points | along the groups
# EXERCISE unpack_zero_points
def unpack_zero_points(packed, outputs):
    codes = packed[:, :, None] >> 4 * np.arange(8) & 15
    return codes.reshape(len(packed), -1)[:outputs] - 8


# %% WRONG unpack_zero_points | subtract 8
# EXERCISE unpack_zero_points
def unpack_zero_points(packed, outputs):
    codes = packed[:, None, :] >> 4 * np.arange(8)[:, None] & 15
    return codes.reshape(-1, packed.shape[1])[:outputs]


# %% WRONG unpack_zero_points | lowest four bits
# EXERCISE unpack_zero_points
def unpack_zero_points(packed, outputs):
    codes = packed[:, None, :] >> 4 * np.arange(7, -1, -1)[:, None] & 15
    return codes.reshape(-1, packed.shape[1])[:outputs] - 8


# %% WRONG unpack_zero_points | filled up with padding
# EXERCISE unpack_zero_points
def unpack_zero_points(packed, outputs):
    codes = packed[:, None, :] >> 4 * np.arange(8)[:, None] & 15
    return codes.reshape(-1, packed.shape[1]) - 8


# %% WRONG three_bits | for itself
# EXERCISE three_bits
def three_bits(name, weight, gram):
    qparams = choose_qparams(weight, scheme)
    return quantize(weight, qparams), qparams


# %% WRONG three_bits | gives their codes
# EXERCISE three_bits
def three_bits(name, weight, gram):
    qparams = choose_qparams(weight, scheme)
    return gptq(weight, gram, qparams, act_order=True), qparams


# %% WRONG three_bits | eight codes
# EXERCISE three_bits
def three_bits(name, weight, gram):
    qparams = choose_qparams(weight, scheme_of(4))
    return quantize(gptq(weight, gram, qparams), qparams), qparams


# %% WRONG three_bits | make groups larger
# EXERCISE three_bits
def three_bits(name, weight, gram):
    qparams = choose_qparams(weight, scheme_of(3, 32))
    return quantize(gptq(weight, gram, qparams), qparams), qparams


# %% WRONG three_bits | same qparams that you return
# EXERCISE three_bits
def three_bits(name, weight, gram):
    qparams = choose_qparams(weight, scheme)
    return quantize(weight, qparams), choose_qparams(weight.abs(), scheme)


# %% WRONG three_bits | improve the grid
# EXERCISE three_bits
def three_bits(name, weight, gram):
    qparams = choose_qparams(weight, scheme_of(3, None))
    return quantize(weight, qparams), qparams
