# %% WRONG all_answers | only the last batch
# EXERCISE all_answers
def all_answers(replicas, batches):
    for i, batch in enumerate(batches):
        output = replicas[i % len(replicas)](batch)
    return output


# %% WRONG all_answers | a request's own numbers
# EXERCISE all_answers
def all_answers(replicas, batches):
    return torch.cat([replicas[i % len(replicas)](batch).mean(dim=1) for i, batch in enumerate(batches)])


# %% WRONG all_answers | mixes different requests
# EXERCISE all_answers
def all_answers(replicas, batches):
    return torch.stack([replicas[i % len(replicas)](batch).mean(dim=0) for i, batch in enumerate(batches)])


# %% WRONG all_answers | ordered by replica
# EXERCISE all_answers
def all_answers(replicas, batches):
    outputs = []
    for r, replica in enumerate(replicas):
        outputs += [replica(batch) for batch in batches[r :: len(replicas)]]
    return torch.cat(outputs)


# %% WRONG all_answers | they take turns
# EXERCISE all_answers
def all_answers(replicas, batches):
    return torch.cat([replica(batch) for replica, batch in zip(replicas, batches, strict=False)])


# %% WRONG partition | in the order of arrival
# EXERCISE partition
def partition(lengths, max_tokens):
    batches = []
    for i in range(len(lengths)):
        if batches and (len(batches[-1]) + 1) * max(lengths[j] for j in [*batches[-1], i]) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


# %% WRONG partition | padded to the longest
# EXERCISE partition
def partition(lengths, max_tokens):
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and sum(lengths[j] for j in batches[-1]) + lengths[i] <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


# %% WRONG partition | compare with <=
# EXERCISE partition
def partition(lengths, max_tokens):
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[i] < max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


# %% WRONG partition | still open when the loop ends
# EXERCISE partition
def partition(lengths, max_tokens):
    batches, current = [], []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if current and (len(current) + 1) * lengths[i] > max_tokens:
            batches.append(current)
            current = []
        current.append(i)
    return batches


# %% WRONG partition | those are lengths
# EXERCISE partition
def partition(lengths, max_tokens):
    batches = []
    for length in sorted(lengths):
        if batches and (len(batches[-1]) + 1) * length <= max_tokens:
            batches[-1].append(length)
        else:
            batches.append([length])
    return batches


# %% WRONG weighted_shares | belong to nobody
# EXERCISE weighted_shares
def weighted_shares(count, rates):
    return [int(count * rate / sum(rates)) for rate in rates]


# %% WRONG weighted_shares | rounded each by itself
# EXERCISE weighted_shares
def weighted_shares(count, rates):
    return [round(count * rate / sum(rates)) for rate in rates]


# %% WRONG weighted_shares | went to the fastest node
# EXERCISE weighted_shares
def weighted_shares(count, rates):
    shares = [int(count * rate / sum(rates)) for rate in rates]
    shares[max(range(len(rates)), key=lambda i: rates[i])] += count - sum(shares)
    return shares


# %% WRONG weighted_shares | went to the first node
# EXERCISE weighted_shares
def weighted_shares(count, rates):
    shares = [int(count * rate / sum(rates)) for rate in rates]
    shares[0] += count - sum(shares)
    return shares


# %% WRONG weighted_shares | requests per second, not seconds per request
# EXERCISE weighted_shares
def weighted_shares(count, rates):
    weights = [1 / rate for rate in rates]
    exact = [count * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    for node in sorted(range(len(rates)), key=lambda i: shares[i] - exact[i])[: count - sum(shares)]:
        shares[node] += 1
    return shares


# %% WRONG pull_finish_s | a request cannot be split
# EXERCISE pull_finish_s
def pull_finish_s(count, delays_s):
    return count / sum(1 / delay for delay in delays_s)


# %% WRONG pull_finish_s | that is the static policy
# EXERCISE pull_finish_s
def pull_finish_s(count, delays_s):
    ends = [0.0] * len(delays_s)
    for i in range(count):
        ends[i % len(ends)] += delays_s[i % len(ends)]
    return max(ends)


# %% WRONG pull_finish_s | without such foresight
# EXERCISE pull_finish_s
def pull_finish_s(count, delays_s):
    ends = [0.0] * len(delays_s)
    for _ in range(count):
        after = [end + delay for end, delay in zip(ends, delays_s, strict=True)]
        node = after.index(min(after))
        ends[node] = after[node]
    return max(ends)


# %% WRONG pull_finish_s | the first node falls idle
# EXERCISE pull_finish_s
def pull_finish_s(count, delays_s):
    free = [0.0] * len(delays_s)
    for _ in range(count):
        node = free.index(min(free))
        free[node] += delays_s[node]
    return min(free)


# %% WRONG merge | in the order of arrival
# EXERCISE merge
def merge(count, pairs):
    ids = [i for i, _ in pairs]
    missing = [i for i in range(count) if i not in ids]
    return [a for _, a in pairs], missing, sorted(i for n, i in enumerate(ids) if i in ids[:n])


# %% WRONG merge | the gaps closed up
# EXERCISE merge
def merge(count, pairs):
    found, duplicates = {}, []
    for i, answer in pairs:
        if i in found:
            duplicates.append(i)
        found[i] = answer
    return [found[i] for i in sorted(found)], [i for i in range(count) if i not in found], sorted(duplicates)


# %% WRONG merge | duplicates went unnoticed
# EXERCISE merge
def merge(count, pairs):
    found = dict(pairs)
    return [found.get(i) for i in range(count)], [i for i in range(count) if i not in found], []


# %% WRONG merge | three times is two duplicates
# EXERCISE merge
def merge(count, pairs):
    found, ids = dict(pairs), [i for i, _ in pairs]
    duplicates = sorted({i for i in ids if ids.count(i) > 1})
    return [found.get(i) for i in range(count)], [i for i in range(count) if i not in found], duplicates


# %% WRONG merge | gaps went unnoticed
# EXERCISE merge
def merge(count, pairs):
    found, duplicates = {}, []
    for i, answer in pairs:
        if i in found:
            duplicates.append(i)
        found[i] = answer
    return [found.get(i) for i in range(count)], [], sorted(duplicates)


# %% WRONG mlp_part | that is the whole layer
# EXERCISE mlp_part
def mlp_part(x, gate, up, down, rank, ranks):
    return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


# %% WRONG mlp_part | each rank did all the work
# EXERCISE mlp_part
def mlp_part(x, gate, up, down, rank, ranks):
    return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T / ranks


# %% WRONG mlp_part | another rank's part
# EXERCISE mlp_part
def mlp_part(x, gate, up, down, rank, ranks):
    size = gate.shape[0] // ranks
    mine = slice((ranks - 1 - rank) * size, (ranks - rank) * size)
    return (nn.functional.silu(x @ gate[mine].T) * (x @ up[mine].T)) @ down[:, mine].T


# %% WRONG mlp_part | need the same ones
# EXERCISE mlp_part
def mlp_part(x, gate, up, down, rank, ranks):
    size = gate.shape[0] // ranks
    mine = slice(rank * size, (rank + 1) * size)
    return (nn.functional.silu(x @ gate[rank::ranks].T) * (x @ up[rank::ranks].T)) @ down[:, mine].T


# %% WRONG heads_of | one key/value head per query head
# EXERCISE heads_of
def heads_of(rank, ranks, heads, kv_heads):
    size = heads // ranks
    queries = list(range(rank * size, (rank + 1) * size))
    return queries, queries


# %% WRONG heads_of | every rank keeps all
# EXERCISE heads_of
def heads_of(rank, ranks, heads, kv_heads):
    size = heads // ranks
    return list(range(rank * size, (rank + 1) * size)), list(range(kv_heads))


# %% WRONG heads_of | left without one
# EXERCISE heads_of
def heads_of(rank, ranks, heads, kv_heads):
    size = heads // ranks
    keys = range(rank * kv_heads // ranks, (rank + 1) * kv_heads // ranks)
    return list(range(rank * size, (rank + 1) * size)), list(keys)


# %% WRONG heads_of | came more than once
# EXERCISE heads_of
def heads_of(rank, ranks, heads, kv_heads):
    size = heads // ranks
    queries = list(range(rank * size, (rank + 1) * size))
    return queries, [q // (heads // kv_heads) for q in queries]


# %% WRONG heads_of | deals the keys out in turn
# EXERCISE heads_of
def heads_of(rank, ranks, heads, kv_heads):
    size = heads // ranks
    queries = list(range(rank * size, (rank + 1) * size))
    return queries, sorted({q % kv_heads for q in queries})


# %% WRONG heads_of | which share their keys
# EXERCISE heads_of
def heads_of(rank, ranks, heads, kv_heads):
    queries = list(range(rank, heads, ranks))
    return queries, sorted({q // (heads // kv_heads) for q in queries})


# %% WRONG sent_bytes | the embedding's all-reduce is missing
# EXERCISE sent_bytes
def sent_bytes(layers, hidden, batch, ranks, value_bytes):
    return 2 * layers * 2 * (ranks - 1) / ranks * batch * hidden * value_bytes


# %% WRONG sent_bytes | attention's output and the MLP's
# EXERCISE sent_bytes
def sent_bytes(layers, hidden, batch, ranks, value_bytes):
    return (layers + 1) * 2 * (ranks - 1) / ranks * batch * hidden * value_bytes


# %% WRONG sent_bytes | the size of what is added up
# EXERCISE sent_bytes
def sent_bytes(layers, hidden, batch, ranks, value_bytes):
    return (2 * layers + 1) * batch * hidden * value_bytes


# %% WRONG sent_bytes | half of it
# EXERCISE sent_bytes
def sent_bytes(layers, hidden, batch, ranks, value_bytes):
    return (2 * layers + 1) * (ranks - 1) / ranks * batch * hidden * value_bytes


# %% WRONG sent_bytes | all ranks together
# EXERCISE sent_bytes
def sent_bytes(layers, hidden, batch, ranks, value_bytes):
    return (2 * layers + 1) * 2 * (ranks - 1) * batch * hidden * value_bytes


# %% WRONG pipeline_s | one micro-batch at a time
# EXERCISE pipeline_s
def pipeline_s(stage_s, micro_batches):
    return micro_batches * sum(stage_s)


# %% WRONG pipeline_s | the filling is missing
# EXERCISE pipeline_s
def pipeline_s(stage_s, micro_batches):
    return micro_batches * max(stage_s)


# %% WRONG pipeline_s | one too many
# EXERCISE pipeline_s
def pipeline_s(stage_s, micro_batches):
    return sum(stage_s) + micro_batches * max(stage_s)


# %% WRONG pipeline_s | right for equal stages only
# EXERCISE pipeline_s
def pipeline_s(stage_s, micro_batches):
    return (micro_batches + len(stage_s) - 1) * max(stage_s)


# %% WRONG merge_attention | a plain mean
# EXERCISE merge_attention
def merge_attention(output, log_sum, other, other_log_sum):
    return (output + other) / 2


# %% WRONG merge_attention | added without weights
# EXERCISE merge_attention
def merge_attention(output, log_sum, other, other_log_sum):
    return output + other


# %% WRONG merge_attention | must add up to 1
# EXERCISE merge_attention
def merge_attention(output, log_sum, other, other_log_sum):
    return output * log_sum.exp()[..., None] + other * other_log_sum.exp()[..., None]


# %% WRONG merge_attention | take exp first
# EXERCISE merge_attention
def merge_attention(output, log_sum, other, other_log_sum):
    share = (log_sum / (log_sum + other_log_sum))[..., None]
    return output * share + other * (1 - share)


# %% WRONG merge_attention | goes with its own sum
# EXERCISE merge_attention
def merge_attention(output, log_sum, other, other_log_sum):
    total = torch.logaddexp(log_sum, other_log_sum)
    return output * (other_log_sum - total).exp()[..., None] + other * (log_sum - total).exp()[..., None]


# %% WRONG coordinates | share a tensor group
# EXERCISE coordinates
def coordinates(rank, tensor, pipeline):
    return rank // (tensor * pipeline), rank % pipeline, rank // pipeline % tensor


# %% WRONG coordinates | in the reverse order
# EXERCISE coordinates
def coordinates(rank, tensor, pipeline):
    return rank % tensor, rank // tensor % pipeline, rank // (tensor * pipeline)


# %% WRONG coordinates | take it modulo
# EXERCISE coordinates
def coordinates(rank, tensor, pipeline):
    return rank // (tensor * pipeline), rank // tensor, rank % tensor


# %% WRONG coordinates | counts stages too
# EXERCISE coordinates
def coordinates(rank, tensor, pipeline):
    return rank // tensor, rank // tensor % pipeline, rank % tensor


# %% WRONG break_even_bytes_per_s | keys *and* values
# EXERCISE break_even_bytes_per_s
def break_even_bytes_per_s(layers, kv_heads, head_dim, positions, value_bytes, recompute_s, latency_s):
    return layers * kv_heads * head_dim * positions * value_bytes / (recompute_s - latency_s)


# %% WRONG break_even_bytes_per_s | all of the prompt
# EXERCISE break_even_bytes_per_s
def break_even_bytes_per_s(layers, kv_heads, head_dim, positions, value_bytes, recompute_s, latency_s):
    return 2 * layers * kv_heads * head_dim * value_bytes / (recompute_s - latency_s)


# %% WRONG break_even_bytes_per_s | before the first byte
# EXERCISE break_even_bytes_per_s
def break_even_bytes_per_s(layers, kv_heads, head_dim, positions, value_bytes, recompute_s, latency_s):
    return 2 * layers * kv_heads * head_dim * positions * value_bytes / recompute_s


# %% WRONG break_even_bytes_per_s | subtract it
# EXERCISE break_even_bytes_per_s
def break_even_bytes_per_s(layers, kv_heads, head_dim, positions, value_bytes, recompute_s, latency_s):
    return 2 * layers * kv_heads * head_dim * positions * value_bytes / (recompute_s + latency_s)


# %% WRONG break_even_bytes_per_s | turn it over
# EXERCISE break_even_bytes_per_s
def break_even_bytes_per_s(layers, kv_heads, head_dim, positions, value_bytes, recompute_s, latency_s):
    return (recompute_s - latency_s) / (2 * layers * kv_heads * head_dim * positions * value_bytes)
