# %% WRONG tokens_per_second | leave runs[0] out
# EXERCISE tokens_per_second
def tokens_per_second(runs):
    whole, after = [], []
    for start, *arrivals in runs[:]:
        whole.append(len(arrivals) / (arrivals[-1] - start))
        after.append(1 / statistics.median(b - a for a, b in pairwise(arrivals)))
    return statistics.median(whole), statistics.median(after)


# %% WRONG tokens_per_second | time to first token
# EXERCISE tokens_per_second
def tokens_per_second(runs):
    whole, after = [], []
    for start, *arrivals in runs[1:]:
        whole.append(len(arrivals) / (arrivals[-1] - start))
        after.append(1 / statistics.median(b - a for a, b in pairwise([start, *arrivals])))
    return statistics.median(whole), statistics.median(after)


# %% WRONG tokens_per_second | made all n
# EXERCISE tokens_per_second
def tokens_per_second(runs):
    whole, after = [], []
    for start, *arrivals in runs[1:]:
        whole.append((len(arrivals) - 1) / (arrivals[-1] - start))
        after.append(1 / statistics.median(b - a for a, b in pairwise(arrivals)))
    return statistics.median(whole), statistics.median(after)


# %% WRONG tokens_per_second | one disturbed run
# EXERCISE tokens_per_second
def tokens_per_second(runs):
    whole, after = [], []
    for start, *arrivals in runs[1:]:
        whole.append(len(arrivals) / (arrivals[-1] - start))
        after.append(1 / statistics.median(b - a for a, b in pairwise(arrivals)))
    return statistics.mean(whole), statistics.mean(after)


# %% WRONG tokens_per_second | one late token
# EXERCISE tokens_per_second
def tokens_per_second(runs):
    whole, after = [], []
    for start, *arrivals in runs[1:]:
        whole.append(len(arrivals) / (arrivals[-1] - start))
        after.append(1 / statistics.mean(b - a for a, b in pairwise(arrivals)))
    return statistics.median(whole), statistics.median(after)


# %% WRONG tokens_per_second | no duration
# EXERCISE tokens_per_second
def tokens_per_second(runs):
    whole, after = [], []
    for start, *arrivals in runs[1:]:
        whole.append(len(arrivals) / (arrivals[-1]))
        after.append(1 / statistics.median(b - a for a, b in pairwise(arrivals)))
    return statistics.median(whole), statistics.median(after)


# %% WRONG tokens_per_second | the mean of the middle two
# EXERCISE tokens_per_second
def tokens_per_second(runs):
    whole, after = [], []
    for start, *arrivals in runs[1:]:
        whole.append(len(arrivals) / (arrivals[-1] - start))
        after.append(1 / statistics.median(b - a for a, b in pairwise(arrivals)))
    return statistics.median_low(whole), statistics.median_low(after)


# %% WRONG tokens_per_second | whole call comes first
# EXERCISE tokens_per_second
def tokens_per_second(runs):
    whole, after = [], []
    for start, *arrivals in runs[1:]:
        whole.append(len(arrivals) / (arrivals[-1] - start))
        after.append(1 / statistics.median(b - a for a, b in pairwise(arrivals)))
    return statistics.median(after), statistics.median(whole)


# %% WRONG bits_per_byte | nats per byte
# EXERCISE bits_per_byte
def bits_per_byte(nats, text):
    return nats.sum().item() / len(text.encode())


# %% WRONG bits_per_byte | bits per token
# EXERCISE bits_per_byte
def bits_per_byte(nats, text):
    return nats.mean().item() / math.log(2)


# %% WRONG bits_per_byte | counts characters
# EXERCISE bits_per_byte
def bits_per_byte(nats, text):
    return nats.sum().item() / math.log(2) / len(text)


# %% WRONG bits_per_byte | multiplied by ln 2
# EXERCISE bits_per_byte
def bits_per_byte(nats, text):
    return nats.sum().item() * math.log(2) / len(text.encode())


# %% WRONG best_tokens_per_s | of a table and
# EXERCISE best_tokens_per_s
def best_tokens_per_s(tensors, bandwidth_bytes_per_s):
    return bandwidth_bytes_per_s / sum(t["parameters"] * t["bits"] / 8 for t in tensors)


# %% WRONG best_tokens_per_s | reads no others
# EXERCISE best_tokens_per_s
def best_tokens_per_s(tensors, bandwidth_bytes_per_s):
    read_bytes = 0
    for tensor in tensors:
        share = 1
        if "rows" in tensor and not tensor.get("tied"):
            share = 1 / tensor["rows"]
        read_bytes += share * tensor["parameters"] * tensor["bits"] / 8
    return bandwidth_bytes_per_s / read_bytes


# %% WRONG best_tokens_per_s | that is no head
# EXERCISE best_tokens_per_s
def best_tokens_per_s(tensors, bandwidth_bytes_per_s):
    read_bytes = 0
    for tensor in tensors:
        share = 1
        if "experts" in tensor:
            share = tensor["used"] / tensor["experts"]
        read_bytes += share * tensor["parameters"] * tensor["bits"] / 8
    return bandwidth_bytes_per_s / read_bytes


# %% WRONG best_tokens_per_s | multiplies by all of it
# EXERCISE best_tokens_per_s
def best_tokens_per_s(tensors, bandwidth_bytes_per_s):
    read_bytes = 0
    for tensor in tensors:
        share = 1
        if "experts" in tensor:
            share = tensor["used"] / tensor["experts"]
        if "rows" in tensor:
            share = 1 / tensor["rows"]
        read_bytes += share * tensor["parameters"] * tensor["bits"] / 8
    return bandwidth_bytes_per_s / read_bytes


# %% WRONG best_tokens_per_s | eight bits each
# EXERCISE best_tokens_per_s
def best_tokens_per_s(tensors, bandwidth_bytes_per_s):
    read_bytes = 0
    for tensor in tensors:
        share = 1
        if "experts" in tensor:
            share = tensor["used"] / tensor["experts"]
        if "rows" in tensor and not tensor.get("tied"):
            share = 1 / tensor["rows"]
        read_bytes += share * tensor["parameters"] * tensor["bits"]
    return bandwidth_bytes_per_s / read_bytes


# %% WRONG best_tokens_per_s | seconds for one token
# EXERCISE best_tokens_per_s
def best_tokens_per_s(tensors, bandwidth_bytes_per_s):
    read_bytes = 0
    for tensor in tensors:
        share = 1
        if "experts" in tensor:
            share = tensor["used"] / tensor["experts"]
        if "rows" in tensor and not tensor.get("tied"):
            share = 1 / tensor["rows"]
        read_bytes += share * tensor["parameters"] * tensor["bits"] / 8
    return read_bytes / bandwidth_bytes_per_s


# %% WRONG predict_all | only the last batch
# EXERCISE predict_all
def predict_all(replicas, batches):
    for batch in batches:
        output = torch.cat([r(p) for r, p in zip(replicas, batch.tensor_split(len(replicas)), strict=True)])
    return output


# %% WRONG predict_all | features, not GPUs
# EXERCISE predict_all
def predict_all(replicas, batches):
    with torch.inference_mode():
        parts = [r(p) for b in batches for r, p in zip(replicas, b.tensor_split(len(replicas)), strict=True)]
    return torch.cat(parts).mean(dim=1)


# %% WRONG predict_all | read whole batches
# EXERCISE predict_all
def predict_all(replicas, batches):
    with torch.inference_mode():
        return torch.cat([replica(batch) for batch in batches for replica in replicas])


# %% WRONG predict_all | saves no time
# EXERCISE predict_all
def predict_all(replicas, batches):
    with torch.inference_mode():
        return torch.cat([torch.stack([r(b) for r in replicas]).mean(dim=0) for b in batches])


# %% WRONG predict_all | saves no time | same
# EXERCISE predict_all
def predict_all(replicas, batches):
    with torch.inference_mode():
        return torch.cat([replicas[0](batch) for batch in batches])


# %% WRONG predict_all | use torch.cat
# EXERCISE predict_all
def predict_all(replicas, batches):
    with torch.inference_mode():
        return [r(p) for b in batches for r, p in zip(replicas, b.tensor_split(len(replicas)), strict=True)]


# %% WRONG predict_all | stay together
# EXERCISE predict_all
def predict_all(replicas, batches):
    with torch.inference_mode():
        return torch.cat([r(b.tensor_split(len(replicas))[i]) for i, r in enumerate(replicas) for b in batches])


# %% WRONG predict_all | inference keeps no graph
# EXERCISE predict_all
def predict_all(replicas, batches):
    parts = [r(p) for b in batches for r, p in zip(replicas, b.tensor_split(len(replicas)), strict=True)]
    return torch.cat(parts)


# %% WRONG refuted | may be true
# EXERCISE refuted
def refuted(claims, bandwidth_bytes_per_s):
    found = []
    for claim in claims:
        read_bytes = claim["active_parameters"] * claim["bits"] / 8
        if claim["tokens_per_s"] <= claim["streams"] * bandwidth_bytes_per_s / read_bytes:
            found.append(claim["name"])
    return found


# %% WRONG refuted | active parameters only
# EXERCISE refuted
def refuted(claims, bandwidth_bytes_per_s):
    found = []
    for claim in claims:
        read_bytes = claim["parameters"] * claim["bits"] / 8
        if claim["tokens_per_s"] > claim["streams"] * bandwidth_bytes_per_s / read_bytes:
            found.append(claim["name"])
    return found


# %% WRONG refuted | share one read
# EXERCISE refuted
def refuted(claims, bandwidth_bytes_per_s):
    found = []
    for claim in claims:
        read_bytes = claim["active_parameters"] * claim["bits"] / 8
        if claim["tokens_per_s"] > bandwidth_bytes_per_s / read_bytes:
            found.append(claim["name"])
    return found


# %% WRONG refuted | divide them by 8
# EXERCISE refuted
def refuted(claims, bandwidth_bytes_per_s):
    found = []
    for claim in claims:
        read_bytes = claim["active_parameters"] * claim["bits"]
        if claim["tokens_per_s"] > claim["streams"] * bandwidth_bytes_per_s / read_bytes:
            found.append(claim["name"])
    return found


# %% WRONG clock_cycles | factor of 2
# EXERCISE clock_cycles
def clock_cycles(parameters, tokens, bytes_per_parameter, gpu):
    arithmetic_s = parameters * tokens / gpu["flops_per_s"]
    reading_s = parameters * bytes_per_parameter / gpu["bytes_per_s"]
    return max(arithmetic_s, reading_s) * gpu["clock_hz"]


# %% WRONG clock_cycles | come out of memory
# EXERCISE clock_cycles
def clock_cycles(parameters, tokens, bytes_per_parameter, gpu):
    return 2 * parameters * tokens / gpu["flops_per_s"] * gpu["clock_hz"]


# %% WRONG clock_cycles | the reading alone
# EXERCISE clock_cycles
def clock_cycles(parameters, tokens, bytes_per_parameter, gpu):
    return parameters * bytes_per_parameter / gpu["bytes_per_s"] * gpu["clock_hz"]


# %% WRONG clock_cycles | at the same time
# EXERCISE clock_cycles
def clock_cycles(parameters, tokens, bytes_per_parameter, gpu):
    arithmetic_s = 2 * parameters * tokens / gpu["flops_per_s"]
    reading_s = parameters * bytes_per_parameter / gpu["bytes_per_s"]
    return (arithmetic_s + reading_s) * gpu["clock_hz"]


# %% WRONG clock_cycles | once for all its tokens
# EXERCISE clock_cycles
def clock_cycles(parameters, tokens, bytes_per_parameter, gpu):
    arithmetic_s = 2 * parameters * tokens / gpu["flops_per_s"]
    reading_s = parameters * bytes_per_parameter * tokens / gpu["bytes_per_s"]
    return max(arithmetic_s, reading_s) * gpu["clock_hz"]


# %% WRONG clock_cycles | those are seconds
# EXERCISE clock_cycles
def clock_cycles(parameters, tokens, bytes_per_parameter, gpu):
    arithmetic_s = 2 * parameters * tokens / gpu["flops_per_s"]
    reading_s = parameters * bytes_per_parameter / gpu["bytes_per_s"]
    return max(arithmetic_s, reading_s)


# %% WRONG lying_settings | setup can hide
# EXERCISE lying_settings
def lying_settings():
    theirs = {"prompt_tokens": 16, "warmup": 1, "runs": 3, "statistic": statistics.mean}
    ours = {"prompt_tokens": 512, "warmup": 1, "runs": 9, "statistic": min}
    return theirs, ours


# %% WRONG lying_settings | as if they were written
# EXERCISE lying_settings
def lying_settings():
    theirs = {"prompt_tokens": 16, "warmup": 0, "runs": 3, "statistic": statistics.mean}
    ours = {"prompt_tokens": 16, "warmup": 1, "runs": 9, "statistic": min}
    return theirs, ours


# %% WRONG lying_settings | never the fastest run
# EXERCISE lying_settings
def lying_settings():
    theirs = {"prompt_tokens": 16, "warmup": 0, "runs": 1, "statistic": statistics.mean}
    ours = {"prompt_tokens": 512, "warmup": 1, "runs": 9, "statistic": min}
    return theirs, ours


# %% WRONG lying_settings | theirs comes first
# EXERCISE lying_settings
def lying_settings():
    theirs = {"prompt_tokens": 16, "warmup": 0, "runs": 3, "statistic": statistics.mean}
    ours = {"prompt_tokens": 512, "warmup": 1, "runs": 9, "statistic": min}
    return ours, theirs


# %% WRONG lying_settings | nobody objects
# EXERCISE lying_settings
def lying_settings():
    theirs = {"prompt_tokens": 0, "warmup": 0, "runs": 3, "statistic": max}
    ours = {"prompt_tokens": 100_000, "warmup": 1, "runs": 9, "statistic": min}
    return theirs, ours
