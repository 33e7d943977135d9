# %% WRONG honest_seconds | timed the launches
# EXERCISE honest_seconds
def honest_seconds(launch, wait, clock, calls):
    wait()
    start = clock()
    for _ in range(calls):
        launch()
    return (clock() - start) / calls


# %% WRONG honest_seconds | earlier work was still in the queue
# EXERCISE honest_seconds
def honest_seconds(launch, wait, clock, calls):
    start = clock()
    for _ in range(calls):
        launch()
    wait()
    return (clock() - start) / calls


# %% WRONG honest_seconds | after every call
# EXERCISE honest_seconds
def honest_seconds(launch, wait, clock, calls):
    wait()
    start = clock()
    for _ in range(calls):
        launch()
        wait()
    return (clock() - start) / calls


# %% WRONG honest_seconds | divide by their number
# EXERCISE honest_seconds
def honest_seconds(launch, wait, clock, calls):
    wait()
    start = clock()
    for _ in range(calls):
        launch()
    wait()
    return clock() - start


# %% WRONG busy_share | count once
# EXERCISE busy_share
def busy_share(events):
    end = max(s + d for s, d in events)
    return sum(d for _, d in events) / (end - min(s for s, _ in events))


# %% WRONG busy_share | begins with the first event
# EXERCISE busy_share
def busy_share(events):
    busy = counted = 0.0
    for start, seconds in sorted(events):
        busy += max(0.0, start + seconds - max(start, counted))
        counted = max(counted, start + seconds)
    return busy / counted


# %% WRONG busy_share | share of waiting
# EXERCISE busy_share
def busy_share(events):
    first, busy = min(start for start, _ in events), 0.0
    counted = first
    for start, seconds in sorted(events):
        busy += max(0.0, start + seconds - max(start, counted))
        counted = max(counted, start + seconds)
    return 1 - busy / (counted - first)


# %% WRONG balancing_batch | multiplied and added
# EXERCISE balancing_batch
def balancing_batch(flops_per_s, bytes_per_s, bytes_per_weight):
    return flops_per_s * bytes_per_weight / bytes_per_s


# %% WRONG balancing_batch | upside down
# EXERCISE balancing_batch
def balancing_batch(flops_per_s, bytes_per_s, bytes_per_weight):
    return 2 * bytes_per_s / (flops_per_s * bytes_per_weight)


# %% WRONG balancing_batch | now count texts
# EXERCISE balancing_batch
def balancing_batch(flops_per_s, bytes_per_s, bytes_per_weight):
    return flops_per_s / bytes_per_s


# %% WRONG balancing_batch | longer to read
# EXERCISE balancing_batch
def balancing_batch(flops_per_s, bytes_per_s, bytes_per_weight):
    return flops_per_s / (2 * bytes_per_s * bytes_per_weight)


# %% WRONG attention_bytes | written and read too
# EXERCISE attention_bytes
def attention_bytes(positions, head_dim, element_bytes):
    fused = 4 * positions * head_dim * element_bytes
    return fused + 2 * positions**2 * element_bytes, fused


# %% WRONG attention_bytes | the output is written
# EXERCISE attention_bytes
def attention_bytes(positions, head_dim, element_bytes):
    fused = 3 * positions * head_dim * element_bytes
    return fused + 4 * positions**2 * element_bytes, fused


# %% WRONG attention_bytes | the order is (plain, fused)
# EXERCISE attention_bytes
def attention_bytes(positions, head_dim, element_bytes):
    fused = 4 * positions * head_dim * element_bytes
    return fused, fused + 4 * positions**2 * element_bytes


# %% WRONG attention_bytes | multiply by element_bytes
# EXERCISE attention_bytes
def attention_bytes(positions, head_dim, element_bytes):
    fused = 4 * positions * head_dim
    return fused + 4 * positions**2, fused


# %% WRONG largest_batch | not for you
# EXERCISE largest_batch
def largest_batch(memory_bytes, parameters, weight_bits, position_bytes, positions):
    free = memory_bytes - parameters * weight_bits / 8
    return max(int(free // (positions * position_bytes)), 0)


# %% WRONG largest_batch | take them off first
# EXERCISE largest_batch
def largest_batch(memory_bytes, parameters, weight_bits, position_bytes, positions):
    return int(memory_bytes * 0.92 // (positions * position_bytes))


# %% WRONG largest_batch | negative number of texts
# EXERCISE largest_batch
def largest_batch(memory_bytes, parameters, weight_bits, position_bytes, positions):
    free = memory_bytes * 0.92 - parameters * weight_bits / 8
    return int(free // (positions * position_bytes))


# %% WRONG largest_batch | whole number
# EXERCISE largest_batch
def largest_batch(memory_bytes, parameters, weight_bits, position_bytes, positions):
    free = memory_bytes * 0.92 - parameters * weight_bits / 8
    return max(free / (positions * position_bytes), 0)


# %% WRONG replayed_step | never reached the recorded memory
# EXERCISE replayed_step
def replayed_step(step, example, record):
    buffer = example.clone()
    tape, output = record(lambda: step(buffer))

    def call(x):
        buffer = x  # noqa: F841
        tape.replay()
        return output.clone()

    return call


# %% WRONG replayed_step | nothing ran again
# EXERCISE replayed_step
def replayed_step(step, example, record):
    buffer = example.clone()
    tape, output = record(lambda: step(buffer))

    def call(x):
        buffer.copy_(x)
        return output.clone()

    return call


# %% WRONG replayed_step | became the last one
# EXERCISE replayed_step
def replayed_step(step, example, record):
    buffer = example.clone()
    tape, output = record(lambda: step(buffer))
    results = []

    def call(x):
        buffer.copy_(x)
        tape.replay()
        results.append(output)
        return output

    return call


# %% WRONG replayed_step | record on a copy
# EXERCISE replayed_step
def replayed_step(step, example, record):
    tape, output = record(lambda: step(example))

    def call(x):
        example.copy_(x)
        tape.replay()
        return output.clone()

    return call


# %% WRONG replayed_step | do it once
# EXERCISE replayed_step
def replayed_step(step, example, record):
    def call(x):
        tape, output = record(lambda: step(x))
        return output.clone()

    return call


# %% WRONG replayed_step | replay the tape instead
# EXERCISE replayed_step
def replayed_step(step, example, record):
    record(lambda: step(example.clone()))
    return lambda x: step(x)


# %% WRONG threads_to_saturate | round up
# EXERCISE threads_to_saturate
def threads_to_saturate(channels, transfers_per_s, lines, latency_s):
    return int(channels * transfers_per_s * 8 / (lines * 64 / latency_s))


# %% WRONG threads_to_saturate | 64 bits a transfer are 8 bytes
# EXERCISE threads_to_saturate
def threads_to_saturate(channels, transfers_per_s, lines, latency_s):
    return math.ceil(channels * transfers_per_s * 64 / (lines * 64 / latency_s))


# %% WRONG threads_to_saturate | lines are not bytes
# EXERCISE threads_to_saturate
def threads_to_saturate(channels, transfers_per_s, lines, latency_s):
    return math.ceil(channels * transfers_per_s * 8 / (lines / latency_s))


# %% WRONG threads_to_saturate | upside down
# EXERCISE threads_to_saturate
def threads_to_saturate(channels, transfers_per_s, lines, latency_s):
    return math.ceil((lines * 64 / latency_s) / (channels * transfers_per_s * 8))


# %% WRONG saxpy_kernel | every program worked on the first block
# EXERCISE saxpy_kernel
def saxpy_kernel(x, y, out, a, n, BLOCK: "tl.constexpr"):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out + offsets, a * tl.load(x + offsets, mask=mask) + tl.load(y + offsets, mask=mask), mask=mask)


# %% WRONG saxpy_kernel | programs overlap
# EXERCISE saxpy_kernel
def saxpy_kernel(x, y, out, a, n, BLOCK: "tl.constexpr"):
    offsets = tl.program_id(0) + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out + offsets, a * tl.load(x + offsets, mask=mask) + tl.load(y + offsets, mask=mask), mask=mask)


# %% WRONG saxpy_kernel | behind the end
# EXERCISE saxpy_kernel
def saxpy_kernel(x, y, out, a, n, BLOCK: "tl.constexpr"):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + offsets, a * tl.load(x + offsets) + tl.load(y + offsets))


# %% WRONG saxpy_kernel | only x is multiplied
# EXERCISE saxpy_kernel
def saxpy_kernel(x, y, out, a, n, BLOCK: "tl.constexpr"):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out + offsets, a * (tl.load(x + offsets, mask=mask) + tl.load(y + offsets, mask=mask)), mask=mask)


# %% WRONG rms_norm_kernel | divided by BLOCK
# EXERCISE rms_norm_kernel
def rms_norm_kernel(x, gain, out, n, eps, BLOCK: "tl.constexpr"):
    start, columns = tl.program_id(0) * n, tl.arange(0, BLOCK)
    mask = columns < n
    row = tl.load(x + start + columns, mask=mask, other=0.0)
    inverse = 1 / tl.sqrt(tl.sum(row * row, axis=0) / BLOCK + eps)
    tl.store(out + start + columns, row * inverse * tl.load(gain + columns, mask=mask, other=0.0), mask=mask)


# %% WRONG rms_norm_kernel | eps is missing
# EXERCISE rms_norm_kernel
def rms_norm_kernel(x, gain, out, n, eps, BLOCK: "tl.constexpr"):
    start, columns = tl.program_id(0) * n, tl.arange(0, BLOCK)
    mask = columns < n
    row = tl.load(x + start + columns, mask=mask, other=0.0)
    inverse = 1 / tl.sqrt(tl.sum(row * row, axis=0) / n)
    tl.store(out + start + columns, row * inverse * tl.load(gain + columns, mask=mask, other=0.0), mask=mask)


# %% WRONG rms_norm_kernel | gains are missing
# EXERCISE rms_norm_kernel
def rms_norm_kernel(x, gain, out, n, eps, BLOCK: "tl.constexpr"):
    start, columns = tl.program_id(0) * n, tl.arange(0, BLOCK)
    mask = columns < n
    row = tl.load(x + start + columns, mask=mask, other=0.0)
    inverse = 1 / tl.sqrt(tl.sum(row * row, axis=0) / n + eps)
    tl.store(out + start + columns, row * inverse, mask=mask)


# %% WRONG rms_norm_kernel | a row has n numbers
# EXERCISE rms_norm_kernel
def rms_norm_kernel(x, gain, out, n, eps, BLOCK: "tl.constexpr"):
    start, columns = tl.program_id(0) * n, tl.arange(0, BLOCK)
    row = tl.load(x + start + columns)
    inverse = 1 / tl.sqrt(tl.sum(row * row, axis=0) / n + eps)
    tl.store(out + start + columns, row * inverse * tl.load(gain + columns))


# %% WRONG rms_norm_kernel | what a mask hides is undefined
# EXERCISE rms_norm_kernel
def rms_norm_kernel(x, gain, out, n, eps, BLOCK: "tl.constexpr"):
    start, columns = tl.program_id(0) * n, tl.arange(0, BLOCK)
    mask = columns < n
    row = tl.load(x + start + columns, mask=mask)
    inverse = 1 / tl.sqrt(tl.sum(row * row, axis=0) / n + eps)
    tl.store(out + start + columns, row * inverse * tl.load(gain + columns, mask=mask), mask=mask)


# %% WRONG int8_gemv_kernel | what a mask hides is undefined
# EXERCISE int8_gemv_kernel
def int8_gemv_kernel(codes, scales, x, out, n, BLOCK: "tl.constexpr"):
    r = tl.program_id(0)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, n, BLOCK):
        k = start + tl.arange(0, BLOCK)
        sums += tl.load(codes + r * n + k, mask=k < n) * tl.load(x + k, mask=k < n)
    tl.store(out + r, tl.sum(sums, axis=0) * tl.load(scales + r))


# %% WRONG int8_gemv_kernel | the scale is missing
# EXERCISE int8_gemv_kernel
def int8_gemv_kernel(codes, scales, x, out, n, BLOCK: "tl.constexpr"):
    r = tl.program_id(0)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, n, BLOCK):
        k = start + tl.arange(0, BLOCK)
        sums += tl.load(codes + r * n + k, mask=k < n, other=0) * tl.load(x + k, mask=k < n, other=0.0)
    tl.store(out + r, tl.sum(sums, axis=0))


# %% WRONG int8_gemv_kernel | only the first block
# EXERCISE int8_gemv_kernel
def int8_gemv_kernel(codes, scales, x, out, n, BLOCK: "tl.constexpr"):
    r, k = tl.program_id(0), tl.arange(0, BLOCK)
    sums = tl.load(codes + r * n + k, mask=k < n, other=0) * tl.load(x + k, mask=k < n, other=0.0)
    tl.store(out + r, tl.sum(sums, axis=0) * tl.load(scales + r))


# %% WRONG int8_gemv_kernel | each block replaced the sum
# EXERCISE int8_gemv_kernel
def int8_gemv_kernel(codes, scales, x, out, n, BLOCK: "tl.constexpr"):
    r = tl.program_id(0)
    for start in range(0, n, BLOCK):
        k = start + tl.arange(0, BLOCK)
        sums = tl.load(codes + r * n + k, mask=k < n, other=0) * tl.load(x + k, mask=k < n, other=0.0)
    tl.store(out + r, tl.sum(sums, axis=0) * tl.load(scales + r))


# %% WRONG int8_gemv_kernel | not at r
# EXERCISE int8_gemv_kernel
def int8_gemv_kernel(codes, scales, x, out, n, BLOCK: "tl.constexpr"):
    r = tl.program_id(0)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, n, BLOCK):
        k = start + tl.arange(0, BLOCK)
        sums += tl.load(codes + r + k, mask=k < n, other=0) * tl.load(x + k, mask=k < n, other=0.0)
    tl.store(out + r, tl.sum(sums, axis=0) * tl.load(scales + r))


# %% WRONG int8_gemv_kernel | into the next row
# EXERCISE int8_gemv_kernel
def int8_gemv_kernel(codes, scales, x, out, n, BLOCK: "tl.constexpr"):
    r = tl.program_id(0)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, n, BLOCK):
        k = start + tl.arange(0, BLOCK)
        sums += tl.load(codes + r * n + k) * tl.load(x + k)
    tl.store(out + r, tl.sum(sums, axis=0) * tl.load(scales + r))


# %% WRONG online_update | the old total
# EXERCISE online_update
def online_update(m, total, output, scores, values):
    larger = torch.maximum(m, scores.max())
    powers = torch.exp(scores - larger)
    return larger, total + powers.sum(), output * torch.exp(m - larger) + powers @ values


# %% WRONG online_update | nothing old was rescaled
# EXERCISE online_update
def online_update(m, total, output, scores, values):
    larger = torch.maximum(m, scores.max())
    powers = torch.exp(scores - larger)
    return larger, total + powers.sum(), output + powers @ values


# %% WRONG online_update | the old maximum was forgotten
# EXERCISE online_update
def online_update(m, total, output, scores, values):
    larger = scores.max()
    shrink, powers = torch.exp(m - larger), torch.exp(scores - larger)
    return larger, total * shrink + powers.sum(), output * shrink + powers @ values


# %% WRONG online_update | once, at the end
# EXERCISE online_update
def online_update(m, total, output, scores, values):
    larger = torch.maximum(m, scores.max())
    shrink, powers = torch.exp(m - larger), torch.exp(scores - larger)
    total = total * shrink + powers.sum()
    return larger, total, (output * shrink + powers @ values) / total


# %% WRONG nvfp4_gemv | that is int4
# EXERCISE nvfp4_gemv
def nvfp4_gemv(codes, scales, tensor_scale, x):
    values = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).float() - 8
    return tensor_scale * ((values * x).unflatten(1, (-1, 16)).sum(dim=-1) * scales).sum(dim=-1)


# %% WRONG nvfp4_gemv | the fourth bit is the sign
# EXERCISE nvfp4_gemv
def nvfp4_gemv(codes, scales, tensor_scale, x):
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = table[(torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1) & 7).long()]
    return tensor_scale * ((values * x).unflatten(1, (-1, 16)).sum(dim=-1) * scales).sum(dim=-1)


# %% WRONG nvfp4_gemv | the low half comes first
# EXERCISE nvfp4_gemv
def nvfp4_gemv(codes, scales, tensor_scale, x):
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = table[torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1).long()]
    return tensor_scale * ((values * x).unflatten(1, (-1, 16)).sum(dim=-1) * scales).sum(dim=-1)


# %% WRONG nvfp4_gemv | are neighbours
# EXERCISE nvfp4_gemv
def nvfp4_gemv(codes, scales, tensor_scale, x):
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = table[torch.cat([codes & 15, codes >> 4], dim=1).long()]
    return tensor_scale * ((values * x).unflatten(1, (-1, 16)).sum(dim=-1) * scales).sum(dim=-1)


# %% WRONG nvfp4_gemv | the tensor's scale is missing
# EXERCISE nvfp4_gemv
def nvfp4_gemv(codes, scales, tensor_scale, x):
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = table[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).long()]
    return ((values * x).unflatten(1, (-1, 16)).sum(dim=-1) * scales).sum(dim=-1)
