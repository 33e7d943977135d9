# %% WRONG programs | count the different ones
# EXERCISE programs
def programs(calls):
    return len(calls)


# %% WRONG programs | dtype is part of the key: int32
# EXERCISE programs
def programs(calls):
    return len({(shape, static) for shape, _, static in calls})


# %% WRONG programs | static argument's value
# EXERCISE programs
def programs(calls):
    return len({(shape, dtype) for shape, dtype, _ in calls})


# %% WRONG programs | shape alone
# EXERCISE programs
def programs(calls):
    return len({call[0] for call in calls})


# %% WRONG programs | not only the last
# EXERCISE programs
def programs(calls):
    count, last = 0, None
    for call in calls:
        count += call != last
        last = call
    return count


# %% WRONG cached_attention | cannot depend on a traced value
# EXERCISE cached_attention
def cached_attention(query, keys, values, position):
    filled = keys[: position + 1] @ query / query.shape[0] ** 0.5
    return jax.nn.softmax(filled) @ values[: position + 1]


# %% WRONG cached_attention | cannot depend on a traced value
# EXERCISE cached_attention
def cached_attention(query, keys, values, position):
    scores = keys @ query / query.shape[0] ** 0.5
    for at in range(len(keys)):
        if at > position:
            scores = scores.at[at].set(-jnp.inf)
    return jax.nn.softmax(scores) @ values


# %% WRONG cached_attention | empty positions take part
# EXERCISE cached_attention
def cached_attention(query, keys, values, position):
    return jax.nn.softmax(keys @ query / query.shape[0] ** 0.5) @ values


# %% WRONG cached_attention | must see itself
# EXERCISE cached_attention
def cached_attention(query, keys, values, position):
    scores = keys @ query / query.shape[0] ** 0.5
    return jax.nn.softmax(jnp.where(jnp.arange(len(keys)) < position, scores, -jnp.inf)) @ values


# %% WRONG cached_attention | turned round
# EXERCISE cached_attention
def cached_attention(query, keys, values, position):
    scores = keys @ query / query.shape[0] ** 0.5
    return jax.nn.softmax(jnp.where(jnp.arange(len(keys)) >= position, scores, -jnp.inf)) @ values


# %% WRONG cached_attention | masked after the softmax
# EXERCISE cached_attention
def cached_attention(query, keys, values, position):
    shares = jax.nn.softmax(keys @ query / query.shape[0] ** 0.5)
    return jnp.where(jnp.arange(len(keys)) <= position, shares, 0.0) @ values


# %% WRONG cached_attention | exp(0) is 1
# EXERCISE cached_attention
def cached_attention(query, keys, values, position):
    scores = keys @ query / query.shape[0] ** 0.5
    return jax.nn.softmax(jnp.where(jnp.arange(len(keys)) <= position, scores, 0.0)) @ values


# %% WRONG cached_attention | scale is missing
# EXERCISE cached_attention
def cached_attention(query, keys, values, position):
    scores = jnp.where(jnp.arange(len(keys)) <= position, keys @ query, -jnp.inf)
    return jax.nn.softmax(scores) @ values


# %% WRONG bucket_for | fits: use >=
# EXERCISE bucket_for
def bucket_for(length, buckets):
    return min(bucket for bucket in buckets if bucket > length)


# %% WRONG bucket_for | not the first
# EXERCISE bucket_for
def bucket_for(length, buckets):
    for bucket in buckets:
        if bucket >= length:
            return bucket
    raise ValueError(length)


# %% WRONG bucket_for | always the largest
# EXERCISE bucket_for
def bucket_for(length, buckets):
    return max(buckets)


# %% WRONG bucket_for | nearest may be too short
# EXERCISE bucket_for
def bucket_for(length, buckets):
    return min(buckets, key=lambda bucket: abs(bucket - length))


# %% WRONG bucket_for | never cut off
# EXERCISE bucket_for
def bucket_for(length, buckets):
    return min((bucket for bucket in buckets if bucket >= length), default=max(buckets))


# %% WRONG decode_scan | tokens that were fed
# EXERCISE decode_scan
def decode_scan(step, cache, token, position, new_tokens):
    def body(carry, _):
        token, cache, position = carry
        fed = token
        logits, cache = step(token, cache, position)
        token = jnp.argmax(logits).astype(jnp.int32)
        return (token, cache, position + 1), fed

    _, tokens = jax.lax.scan(body, (token, cache, position), length=new_tokens)
    return tokens


# %% WRONG decode_scan | stands still
# EXERCISE decode_scan
def decode_scan(step, cache, token, position, new_tokens):
    def body(carry, _):
        token, cache, position = carry
        logits, cache = step(token, cache, position)
        token = jnp.argmax(logits).astype(jnp.int32)
        return (token, cache, position), token

    _, tokens = jax.lax.scan(body, (token, cache, position), length=new_tokens)
    return tokens


# %% WRONG decode_scan | cache is forgotten
# EXERCISE decode_scan
def decode_scan(step, cache, token, position, new_tokens):
    def body(carry, _):
        token, cache, position = carry
        logits, _ = step(token, cache, position)
        token = jnp.argmax(logits).astype(jnp.int32)
        return (token, cache, position + 1), token

    _, tokens = jax.lax.scan(body, (token, cache, position), length=new_tokens)
    return tokens


# %% WRONG decode_scan | one token too few
# EXERCISE decode_scan
def decode_scan(step, cache, token, position, new_tokens):
    def body(carry, _):
        token, cache, position = carry
        logits, cache = step(token, cache, position)
        token = jnp.argmax(logits).astype(jnp.int32)
        return (token, cache, position + 1), token

    _, tokens = jax.lax.scan(body, (token, cache, position), length=new_tokens - 1)
    return tokens


# %% WRONG decode_scan | only the last token
# EXERCISE decode_scan
def decode_scan(step, cache, token, position, new_tokens):
    def body(carry, _):
        token, cache, position = carry
        logits, cache = step(token, cache, position)
        token = jnp.argmax(logits).astype(jnp.int32)
        return (token, cache, position + 1), token

    _, tokens = jax.lax.scan(body, (token, cache, position), length=new_tokens)
    return tokens[-1:]


# %% WRONG decode_scan | traces its body once
# EXERCISE decode_scan
def decode_scan(step, cache, token, position, new_tokens):
    step, tokens = jax.jit(step), []  # traced once, and called for each token all the same
    for _ in range(new_tokens):
        logits, cache = step(token, cache, position)
        token, position = jnp.argmax(logits).astype(jnp.int32), position + 1
        tokens.append(token)
    return jnp.stack(tokens)


# %% WRONG decode_scan | traces its body once | same
# EXERCISE decode_scan
def decode_scan(step, cache, token, position, new_tokens):
    tokens = []
    for _ in range(new_tokens):
        logits, cache = step(token, cache, position)
        token, position = jnp.argmax(logits).astype(jnp.int32), position + 1
        tokens.append(int(token))
    return jnp.array(tokens, jnp.int32)


# %% WRONG decode_scan | traces its body once | same
# EXERCISE decode_scan
def decode_scan(step, cache, token, position, new_tokens):
    tokens = []
    for _ in range(new_tokens):
        logits, cache = step(token, cache, position)
        token, position = jnp.argmax(logits).astype(jnp.int32), position + 1
        tokens.append(token)
    return jnp.stack(tokens)


# %% WRONG break_even_tokens | equal speed never pays
# EXERCISE break_even_tokens
def break_even_tokens(compile_s, slow_token_s, fast_token_s):
    return compile_s / (slow_token_s - fast_token_s) if slow_token_s >= fast_token_s else float("inf")


# %% WRONG break_even_tokens | slower code never pays
# EXERCISE break_even_tokens
def break_even_tokens(compile_s, slow_token_s, fast_token_s):
    return compile_s / (slow_token_s - fast_token_s)


# %% WRONG break_even_tokens | sign of the saving
# EXERCISE break_even_tokens
def break_even_tokens(compile_s, slow_token_s, fast_token_s):
    return compile_s / abs(slow_token_s - fast_token_s)


# %% WRONG break_even_tokens | fast tokens fit
# EXERCISE break_even_tokens
def break_even_tokens(compile_s, slow_token_s, fast_token_s):
    return compile_s / fast_token_s


# %% WRONG break_even_tokens | own time is missing
# EXERCISE break_even_tokens
def break_even_tokens(compile_s, slow_token_s, fast_token_s):
    return compile_s / slow_token_s


# %% WRONG break_even_tokens | upside down
# EXERCISE break_even_tokens
def break_even_tokens(compile_s, slow_token_s, fast_token_s):
    saved_s = slow_token_s - fast_token_s
    return saved_s / compile_s if saved_s > 0 else float("inf")


# %% WRONG total_flop | counted once a layer
# EXERCISE total_flop
def total_flop(one_layer, two_layers, layers):
    return one_layer * layers


# %% WRONG total_flop | half an output layer
# EXERCISE total_flop
def total_flop(one_layer, two_layers, layers):
    return two_layers / 2 * layers


# %% WRONG total_flop | one layer too many
# EXERCISE total_flop
def total_flop(one_layer, two_layers, layers):
    return one_layer + layers * (two_layers - one_layer)


# %% WRONG total_flop | outside the layers is missing
# EXERCISE total_flop
def total_flop(one_layer, two_layers, layers):
    return layers * (two_layers - one_layer)


# %% WRONG mxu_utilisation | no half tiles
# EXERCISE mxu_utilisation
def mxu_utilisation(rows, inner, columns, size):
    tiles = inner / size * columns / size
    cycles = size + rows + 2 * size - 2
    return rows * inner * columns / (size**2 * tiles * cycles)


# %% WRONG mxu_utilisation | load a tile is missing
# EXERCISE mxu_utilisation
def mxu_utilisation(rows, inner, columns, size):
    tiles = math.ceil(inner / size) * math.ceil(columns / size)
    cycles = rows + 2 * size - 2
    return rows * inner * columns / (size**2 * tiles * cycles)


# %% WRONG mxu_utilisation | has to leave the array
# EXERCISE mxu_utilisation
def mxu_utilisation(rows, inner, columns, size):
    tiles = math.ceil(inner / size) * math.ceil(columns / size)
    cycles = size + rows
    return rows * inner * columns / (size**2 * tiles * cycles)


# %% WRONG mxu_utilisation | cells, not FLOP
# EXERCISE mxu_utilisation
def mxu_utilisation(rows, inner, columns, size):
    tiles = math.ceil(inner / size) * math.ceil(columns / size)
    cycles = size + rows + 2 * size - 2
    return 2 * rows * inner * columns / (size**2 * tiles * cycles)


# %% WRONG mxu_utilisation | upside down
# EXERCISE mxu_utilisation
def mxu_utilisation(rows, inner, columns, size):
    tiles = math.ceil(inner / size) * math.ceil(columns / size)
    cycles = size + rows + 2 * size - 2
    return size**2 * tiles * cycles / (rows * inner * columns)


# %% WRONG mxu_utilisation | divide by size²
# EXERCISE mxu_utilisation
def mxu_utilisation(rows, inner, columns, size):
    tiles = math.ceil(inner / size) * math.ceil(columns / size)
    cycles = size + rows + 2 * size - 2
    return rows * inner * columns / (size * tiles * cycles)


# %% WRONG block_indices | its block is (i, k)
# EXERCISE block_indices
def block_indices(i, j, k):
    return (k, i), (k, j), (i, j)


# %% WRONG block_indices | along its second axis
# EXERCISE block_indices
def block_indices(i, j, k):
    return (i, j), (k, j), (i, j)


# %% WRONG block_indices | not transposed
# EXERCISE block_indices
def block_indices(i, j, k):
    return (i, k), (j, k), (i, j)


# %% WRONG block_indices | along its first axis
# EXERCISE block_indices
def block_indices(i, j, k):
    return (i, k), (i, j), (i, j)


# %% WRONG block_indices | the result is (rows, columns)
# EXERCISE block_indices
def block_indices(i, j, k):
    return (i, k), (k, j), (j, i)


# %% WRONG block_indices | k is summed over
# EXERCISE block_indices
def block_indices(i, j, k):
    return (i, k), (k, j), (i, k)


# %% WRONG matmul_kernel | overflow at 127
# EXERCISE matmul_kernel
def matmul_kernel(x_ref, w_ref, out_ref, sums_ref):
    @pl.when(pl.program_id(2) == 0)
    def _clear():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    sums_ref[...] += jnp.dot(x_ref[...], w_ref[...])

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _write():
        out_ref[...] = sums_ref[...]


# %% WRONG matmul_kernel | what was in memory
# EXERCISE matmul_kernel
def matmul_kernel(x_ref, w_ref, out_ref, sums_ref):
    sums_ref[...] += jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.int32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _write():
        out_ref[...] = sums_ref[...]


# %% WRONG matmul_kernel | clear in the first step
# EXERCISE matmul_kernel
def matmul_kernel(x_ref, w_ref, out_ref, sums_ref):
    sums_ref[...] = jnp.zeros_like(sums_ref)
    sums_ref[...] += jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.int32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _write():
        out_ref[...] = sums_ref[...]


# %% WRONG matmul_kernel | written after the first block
# EXERCISE matmul_kernel
def matmul_kernel(x_ref, w_ref, out_ref, sums_ref):
    @pl.when(pl.program_id(2) == 0)
    def _clear():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    sums_ref[...] += jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.int32)

    @pl.when(pl.program_id(2) == 0)
    def _write():
        out_ref[...] = sums_ref[...]


# %% WRONG matmul_kernel | nothing was written
# EXERCISE matmul_kernel
def matmul_kernel(x_ref, w_ref, out_ref, sums_ref):
    @pl.when(pl.program_id(2) == 0)
    def _clear():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    sums_ref[...] += jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.int32)


# %% WRONG vmem_bytes | blocks count twice
# EXERCISE vmem_bytes
def vmem_bytes(rows, columns, inner):
    return 1 * (rows * inner + inner * columns + 4 * rows * columns) + 4 * rows * columns


# %% WRONG vmem_bytes | they count once
# EXERCISE vmem_bytes
def vmem_bytes(rows, columns, inner):
    return 2 * (rows * inner + inner * columns + 4 * rows * columns) + 2 * 4 * rows * columns


# %% WRONG vmem_bytes | need room too
# EXERCISE vmem_bytes
def vmem_bytes(rows, columns, inner):
    return 2 * (rows * inner + inner * columns + 4 * rows * columns)


# %% WRONG vmem_bytes | result is int32
# EXERCISE vmem_bytes
def vmem_bytes(rows, columns, inner):
    return 2 * (rows * inner + inner * columns + rows * columns) + 4 * rows * columns


# %% WRONG vmem_bytes | x and w are int8
# EXERCISE vmem_bytes
def vmem_bytes(rows, columns, inner):
    return 2 * (4 * rows * inner + 4 * inner * columns + 4 * rows * columns) + 4 * rows * columns


# %% WRONG cuts | they need no gather
# EXERCISE cuts
cuts = {"q": "out", "k": "out", "v": "out", "o": "out", "gate": "out", "up": "out", "down": "out"}


# %% WRONG cuts | cut them along their outputs
# EXERCISE cuts
cuts = {"q": "in", "k": "in", "v": "in", "o": "in", "gate": "in", "up": "in", "down": "in"}


# %% WRONG cuts | turned round
# EXERCISE cuts
cuts = {"q": "in", "k": "in", "v": "in", "o": "out", "gate": "in", "up": "in", "down": "out"}


# %% WRONG cuts | nothing is cut
# EXERCISE cuts
cuts = dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"))


# %% WRONG cuts | like down
# EXERCISE cuts
cuts = {"q": "out", "k": "out", "v": "out", "o": "out", "gate": "out", "up": "out", "down": "in"}


# %% WRONG cuts | like o
# EXERCISE cuts
cuts = {"q": "out", "k": "out", "v": "out", "o": "in", "gate": "out", "up": "out", "down": "out"}
