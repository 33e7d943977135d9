# %% WRONG linear_attention | then read
# EXERCISE linear_attention
def linear_attention(query, key, value):
    state, rows = torch.zeros(key.shape[1], value.shape[1]), []
    for q, k, v in zip(query, key, value, strict=True):
        rows.append(q @ state)
        state = state + torch.outer(k, v)
    return torch.stack(rows), state


# %% WRONG linear_attention | newest token only
# EXERCISE linear_attention
def linear_attention(query, key, value):
    rows = []
    for q, k, v in zip(query, key, value, strict=True):
        state = torch.outer(k, v)
        rows.append(q @ state)
    return torch.stack(rows), state


# %% WRONG linear_attention | turned round
# EXERCISE linear_attention
def linear_attention(query, key, value):
    state, rows = torch.zeros(key.shape[1], value.shape[1]), []
    for q, k, v in zip(query, key, value, strict=True):
        state = state + torch.outer(v, k)
        rows.append(q @ state)
    return torch.stack(rows), state


# %% WRONG linear_attention | nothing is divided
# EXERCISE linear_attention
def linear_attention(query, key, value):
    state, rows = torch.zeros(key.shape[1], value.shape[1]), []
    for q, k, v in zip(query, key, value, strict=True):
        state = state + torch.outer(k, v)
        rows.append(q @ state / key.shape[1] ** 0.5)
    return torch.stack(rows), state


# %% WRONG linear_attention | as it was
# EXERCISE linear_attention
def linear_attention(query, key, value):
    state = key.T @ value
    return query @ state, state


# %% WRONG causal_attention | write the steps yourself
# EXERCISE causal_attention
def causal_attention(query, key, value):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


# %% WRONG causal_attention | the mask is missing
# EXERCISE causal_attention
def causal_attention(query, key, value):
    return (query @ key.T / query.shape[1] ** 0.5).softmax(dim=1) @ value


# %% WRONG causal_attention | the scale is missing
# EXERCISE causal_attention
def causal_attention(query, key, value):
    scores = query @ key.T
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf")).softmax(dim=1) @ value


# %% WRONG causal_attention | by its square root
# EXERCISE causal_attention
def causal_attention(query, key, value):
    scores = query @ key.T / query.shape[1]
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf")).softmax(dim=1) @ value


# %% WRONG causal_attention | masked after the softmax
# EXERCISE causal_attention
def causal_attention(query, key, value):
    shares = (query @ key.T / query.shape[1] ** 0.5).softmax(dim=1)
    return shares.masked_fill(torch.ones_like(shares).triu(1).bool(), 0) @ value


# %% WRONG causal_attention | exp(0) is 1
# EXERCISE causal_attention
def causal_attention(query, key, value):
    scores = query @ key.T / query.shape[1] ** 0.5
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), 0).softmax(dim=1) @ value


# %% WRONG causal_attention | wrong axis
# EXERCISE causal_attention
def causal_attention(query, key, value):
    scores = query @ key.T / query.shape[1] ** 0.5
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf")).softmax(dim=0) @ value


# %% WRONG causal_attention | must see itself
# EXERCISE causal_attention
def causal_attention(query, key, value):
    scores = query @ key.T / query.shape[1] ** 0.5
    return scores.masked_fill(torch.ones_like(scores).triu().bool(), float("-inf")).softmax(dim=1) @ value


# %% WRONG parameter_count | num_key_value_heads heads
# EXERCISE parameter_count
def parameter_count(config):
    hidden, head_dim = config.hidden_size, config.head_dim
    attention = 2 * hidden * head_dim * (config.num_attention_heads + config.num_attention_heads)
    layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    tables = 1 if config.tie_word_embeddings else 2
    return config.num_hidden_layers * layer + hidden + tables * config.vocab_size * hidden


# %% WRONG parameter_count | three matrices
# EXERCISE parameter_count
def parameter_count(config):
    hidden, head_dim = config.hidden_size, config.head_dim
    attention = 2 * hidden * head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 2 * hidden * config.intermediate_size + 2 * hidden
    tables = 1 if config.tie_word_embeddings else 2
    return config.num_hidden_layers * layer + hidden + tables * config.vocab_size * hidden


# %% WRONG parameter_count | two norms a layer
# EXERCISE parameter_count
def parameter_count(config):
    hidden, head_dim = config.hidden_size, config.head_dim
    attention = 2 * hidden * head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * hidden * config.intermediate_size + 0
    tables = 1 if config.tie_word_embeddings else 2
    return config.num_hidden_layers * layer + tables * config.vocab_size * hidden


# %% WRONG parameter_count | count the table once
# EXERCISE parameter_count
def parameter_count(config):
    hidden, head_dim = config.hidden_size, config.head_dim
    attention = 2 * hidden * head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    tables = 2
    return config.num_hidden_layers * layer + hidden + tables * config.vocab_size * hidden


# %% WRONG parameter_count | table of its own
# EXERCISE parameter_count
def parameter_count(config):
    hidden, head_dim = config.hidden_size, config.head_dim
    attention = 2 * hidden * head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    tables = 1
    return config.num_hidden_layers * layer + hidden + tables * config.vocab_size * hidden


# %% WRONG parameter_count | numbers of its own
# EXERCISE parameter_count
def parameter_count(config):
    hidden, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    attention = 2 * hidden * head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    tables = 1 if config.tie_word_embeddings else 2
    return config.num_hidden_layers * layer + hidden + tables * config.vocab_size * hidden


# %% WRONG greedy_naive | only the new tokens
# EXERCISE greedy_naive
def greedy_naive(model, token_ids, new_tokens):
    start = token_ids.shape[1]
    for _ in range(new_tokens):
        logits = model(input_ids=token_ids).logits
        token_ids = torch.cat([token_ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    return token_ids[:, start:]


# %% WRONG greedy_naive | after the first token
# EXERCISE greedy_naive
def greedy_naive(model, token_ids, new_tokens):
    for _ in range(new_tokens):
        logits = model(input_ids=token_ids).logits
        token_ids = torch.cat([token_ids, logits[:, :1].argmax(dim=-1)], dim=1)
    return token_ids


# %% WRONG greedy_naive | saw only the last token
# EXERCISE greedy_naive
def greedy_naive(model, token_ids, new_tokens):
    for _ in range(new_tokens):
        logits = model(input_ids=token_ids[:, -1:]).logits
        token_ids = torch.cat([token_ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    return token_ids


# %% WRONG greedy_naive | the same token every time
# EXERCISE greedy_naive
def greedy_naive(model, token_ids, new_tokens):
    text = token_ids
    for _ in range(new_tokens):
        logits = model(input_ids=token_ids).logits
        text = torch.cat([text, logits[:, -1:].argmax(dim=-1)], dim=1)
    return text


# %% WRONG greedy_naive | from a cache
# EXERCISE greedy_naive
def greedy_naive(model, token_ids, new_tokens):
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
    return model.generate(token_ids, attention_mask=torch.ones_like(token_ids), **settings)


# %% WRONG greedy_naive | one token too few
# EXERCISE greedy_naive
def greedy_naive(model, token_ids, new_tokens):
    for _ in range(1, new_tokens):
        logits = model(input_ids=token_ids).logits
        token_ids = torch.cat([token_ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    return token_ids


# %% WRONG layer_cache | only the new ones
# EXERCISE layer_cache
class LayerCache:
    def __init__(self):
        self.keys = self.values = None

    def update(self, keys, values):
        if self.keys is None:
            self.keys, self.values = keys, values
        else:
            self.keys = torch.cat([self.keys, keys], dim=2)
            self.values = torch.cat([self.values, values], dim=2)
        return keys, values


# %% WRONG layer_cache | not stored
# EXERCISE layer_cache
class LayerCache:
    def __init__(self):
        self.keys = self.values = None

    def update(self, keys, values):
        if self.keys is None:
            self.keys, self.values = keys, values
            return keys, values
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)


# %% WRONG layer_cache | the old come first
# EXERCISE layer_cache
class LayerCache:
    def __init__(self):
        self.keys = self.values = None

    def update(self, keys, values):
        if self.keys is not None:
            keys = torch.cat([keys, self.keys], dim=2)
            values = torch.cat([values, self.values], dim=2)
        self.keys, self.values = keys, values
        return keys, values


# %% WRONG layer_cache | positions are dim 2
# EXERCISE layer_cache
class LayerCache:
    def __init__(self):
        self.keys = self.values = None

    def update(self, keys, values):
        if self.keys is not None:
            keys = torch.cat([self.keys, keys], dim=1)
            values = torch.cat([self.values, values], dim=1)
        self.keys, self.values = keys, values
        return keys, values


# %% WRONG layer_cache | copies of the keys
# EXERCISE layer_cache
class LayerCache:
    def __init__(self):
        self.keys = None

    def update(self, keys, values):
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=2)
        return self.keys, self.keys


# %% WRONG greedy_cached | every pass read the whole text
# EXERCISE greedy_cached
def greedy_cached(model, token_ids, new_tokens):
    for _ in range(new_tokens):
        logits = prefill(model, token_ids, KVCache())
        token_ids = torch.cat([token_ids, logits.argmax(dim=-1)[:, None]], dim=1)
    return token_ids


# %% WRONG greedy_cached | holds it already
# EXERCISE greedy_cached
def greedy_cached(model, token_ids, new_tokens):
    cache = KVCache()
    for _ in range(new_tokens):
        logits = prefill(model, token_ids, cache)
        token_ids = torch.cat([token_ids, logits.argmax(dim=-1)[:, None]], dim=1)
    return token_ids


# %% WRONG greedy_cached | one pass too many
# EXERCISE greedy_cached
def greedy_cached(model, token_ids, new_tokens):
    cache = KVCache()
    logits = prefill(model, token_ids, cache)
    for _ in range(new_tokens):
        next_ids = logits.argmax(dim=-1)
        token_ids = torch.cat([token_ids, next_ids[:, None]], dim=1)
        logits = decode_one_token(model, next_ids, cache)
    return token_ids


# %% WRONG greedy_cached | read twice
# EXERCISE greedy_cached
def greedy_cached(model, token_ids, new_tokens):
    cache = KVCache()
    prefill(model, token_ids, cache)
    for _ in range(new_tokens):
        logits = decode_one_token(model, token_ids[:, -1], cache)
        token_ids = torch.cat([token_ids, logits.argmax(dim=-1)[:, None]], dim=1)
    return token_ids


# %% WRONG greedy_cached | no pass of its own
# EXERCISE greedy_cached
def greedy_cached(model, token_ids, new_tokens):
    cache = KVCache()
    prefill(model, token_ids[:, :-1], cache)
    for _ in range(new_tokens):
        logits = decode_one_token(model, token_ids[:, -1], cache)
        token_ids = torch.cat([token_ids, logits.argmax(dim=-1)[:, None]], dim=1)
    return token_ids


# %% WRONG greedy_cached | forgets the text
# EXERCISE greedy_cached
def greedy_cached(model, token_ids, new_tokens):
    logits = prefill(model, token_ids, KVCache())
    for i in range(new_tokens):
        next_ids = logits.argmax(dim=-1)
        token_ids = torch.cat([token_ids, next_ids[:, None]], dim=1)
        if i < new_tokens - 1:
            logits = decode_one_token(model, next_ids, KVCache())
    return token_ids


# %% WRONG kv_cache_bytes | half of it is missing
# EXERCISE kv_cache_bytes
def kv_cache_bytes(layers, positions, element_bytes):
    numbers = 0
    for layer in layers:
        kept = min(positions, layer.get("window", positions))
        if "state" in layer:
            numbers += layer["state"]
        elif "latent_dim" in layer:
            numbers += kept * layer["latent_dim"]
        else:
            numbers += kept * layer["kv_heads"] * layer["head_dim"]
    return numbers * element_bytes


# %% WRONG kv_cache_bytes | stored once
# EXERCISE kv_cache_bytes
def kv_cache_bytes(layers, positions, element_bytes):
    numbers = 0
    for layer in layers:
        kept = min(positions, layer.get("window", positions))
        if "state" in layer:
            numbers += layer["state"]
        elif "latent_dim" in layer:
            numbers += 2 * kept * layer["latent_dim"]
        else:
            numbers += 2 * kept * layer["kv_heads"] * layer["head_dim"]
    return numbers * element_bytes


# %% WRONG kv_cache_bytes | at most so many
# EXERCISE kv_cache_bytes
def kv_cache_bytes(layers, positions, element_bytes):
    numbers = 0
    for layer in layers:
        kept = positions
        if "state" in layer:
            numbers += layer["state"]
        elif "latent_dim" in layer:
            numbers += kept * layer["latent_dim"]
        else:
            numbers += 2 * kept * layer["kv_heads"] * layer["head_dim"]
    return numbers * element_bytes


# %% WRONG kv_cache_bytes | shorter than the window
# EXERCISE kv_cache_bytes
def kv_cache_bytes(layers, positions, element_bytes):
    numbers = 0
    for layer in layers:
        kept = layer.get("window", positions)
        if "state" in layer:
            numbers += layer["state"]
        elif "latent_dim" in layer:
            numbers += kept * layer["latent_dim"]
        else:
            numbers += 2 * kept * layer["kv_heads"] * layer["head_dim"]
    return numbers * element_bytes


# %% WRONG kv_cache_bytes | fixed size
# EXERCISE kv_cache_bytes
def kv_cache_bytes(layers, positions, element_bytes):
    numbers = 0
    for layer in layers:
        kept = min(positions, layer.get("window", positions))
        if "state" in layer:
            numbers += positions * layer["state"]
        elif "latent_dim" in layer:
            numbers += kept * layer["latent_dim"]
        else:
            numbers += 2 * kept * layer["kv_heads"] * layer["head_dim"]
    return numbers * element_bytes


# %% WRONG texts_to_ridge | cache of its own, which
# EXERCISE texts_to_ridge
def texts_to_ridge(parameters, bytes_per_parameter, cache_bytes, machine):
    weights_s = parameters * bytes_per_parameter / machine["bytes_per_s"]
    return math.ceil(weights_s / (2 * parameters / machine["flops_per_s"]))


# %% WRONG texts_to_ridge | one cache for all
# EXERCISE texts_to_ridge
def texts_to_ridge(parameters, bytes_per_parameter, cache_bytes, machine):
    read_s = (parameters * bytes_per_parameter + cache_bytes) / machine["bytes_per_s"]
    return math.ceil(read_s / (2 * parameters / machine["flops_per_s"]))


# %% WRONG texts_to_ridge | multiplies and adds
# EXERCISE texts_to_ridge
def texts_to_ridge(parameters, bytes_per_parameter, cache_bytes, machine):
    flop_s, cache_s = parameters / machine["flops_per_s"], cache_bytes / machine["bytes_per_s"]
    if flop_s <= cache_s:
        return None
    weights_s = parameters * bytes_per_parameter / machine["bytes_per_s"]
    return math.ceil(weights_s / (flop_s - cache_s))


# %% WRONG texts_to_ridge | one text fewer
# EXERCISE texts_to_ridge
def texts_to_ridge(parameters, bytes_per_parameter, cache_bytes, machine):
    flop_s, cache_s = 2 * parameters / machine["flops_per_s"], cache_bytes / machine["bytes_per_s"]
    if flop_s <= cache_s:
        return None
    weights_s = parameters * bytes_per_parameter / machine["bytes_per_s"]
    return int(weights_s / (flop_s - cache_s))


# %% WRONG texts_to_ridge | texts are whole
# EXERCISE texts_to_ridge
def texts_to_ridge(parameters, bytes_per_parameter, cache_bytes, machine):
    flop_s, cache_s = 2 * parameters / machine["flops_per_s"], cache_bytes / machine["bytes_per_s"]
    if flop_s <= cache_s:
        return None
    weights_s = parameters * bytes_per_parameter / machine["bytes_per_s"]
    return weights_s / (flop_s - cache_s)


# %% WRONG texts_to_ridge | more reading than work
# EXERCISE texts_to_ridge
def texts_to_ridge(parameters, bytes_per_parameter, cache_bytes, machine):
    flop_s, cache_s = 2 * parameters / machine["flops_per_s"], cache_bytes / machine["bytes_per_s"]
    if flop_s <= cache_s:
        return math.inf
    weights_s = parameters * bytes_per_parameter / machine["bytes_per_s"]
    return math.ceil(weights_s / (flop_s - cache_s))


# %% WRONG texts_to_ridge | return None where
# EXERCISE texts_to_ridge
def texts_to_ridge(parameters, bytes_per_parameter, cache_bytes, machine):
    flop_s, cache_s = 2 * parameters / machine["flops_per_s"], cache_bytes / machine["bytes_per_s"]
    if flop_s <= cache_s:
        return 0
    weights_s = parameters * bytes_per_parameter / machine["bytes_per_s"]
    return math.ceil(weights_s / (flop_s - cache_s))


# %% WRONG speedup | you timed the launch
# EXERCISE speedup
def speedup(baseline, candidate, warmup, rounds, wait, clock):
    slow, fast = [], []
    for _ in range(warmup):
        baseline()
        candidate()
    for _ in range(rounds):
        for function, samples in ((baseline, slow), (candidate, fast)):
            start = clock()
            function()
            samples.append(clock() - start)
    return statistics.median(slow) / statistics.median(fast)


# %% WRONG speedup | call each function `warmup` times untimed
# EXERCISE speedup
def speedup(baseline, candidate, warmup, rounds, wait, clock):
    slow, fast = [], []
    for _ in range(rounds):
        for function, samples in ((baseline, slow), (candidate, fast)):
            wait()
            start = clock()
            function()
            wait()
            samples.append(clock() - start)
    return statistics.median(slow) / statistics.median(fast)


# %% WRONG speedup | slowed down between the two
# EXERCISE speedup
def speedup(baseline, candidate, warmup, rounds, wait, clock):
    medians = []
    for function in (baseline, candidate):
        for _ in range(warmup):
            function()
        samples = []
        for _ in range(rounds):
            wait()
            start = clock()
            function()
            wait()
            samples.append(clock() - start)
        medians.append(statistics.median(samples))
    return medians[0] / medians[1]


# %% WRONG speedup | drags the mean along
# EXERCISE speedup
def speedup(baseline, candidate, warmup, rounds, wait, clock):
    slow, fast = [], []
    for _ in range(warmup):
        baseline()
        candidate()
    for _ in range(rounds):
        for function, samples in ((baseline, slow), (candidate, fast)):
            wait()
            start = clock()
            function()
            wait()
            samples.append(clock() - start)
    return statistics.mean(slow) / statistics.mean(fast)


# %% WRONG speedup | luckiest
# EXERCISE speedup
def speedup(baseline, candidate, warmup, rounds, wait, clock):
    slow, fast = [], []
    for _ in range(warmup):
        baseline()
        candidate()
    for _ in range(rounds):
        for function, samples in ((baseline, slow), (candidate, fast)):
            wait()
            start = clock()
            function()
            wait()
            samples.append(clock() - start)
    return min(slow) / min(fast)


# %% WRONG speedup | upside down
# EXERCISE speedup
def speedup(baseline, candidate, warmup, rounds, wait, clock):
    slow, fast = [], []
    for _ in range(warmup):
        baseline()
        candidate()
    for _ in range(rounds):
        for function, samples in ((baseline, slow), (candidate, fast)):
            wait()
            start = clock()
            function()
            wait()
            samples.append(clock() - start)
    return statistics.median(fast) / statistics.median(slow)
