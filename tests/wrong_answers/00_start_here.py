# %% WRONG tokens_per_second | seconds per token
# EXERCISE tokens_per_second
def tokens_per_second(new_tokens, seconds):
    return statistics.median(seconds[1:]) / new_tokens


# %% WRONG tokens_per_second | leave seconds[0] out
# EXERCISE tokens_per_second
def tokens_per_second(new_tokens, seconds):
    return new_tokens / statistics.median(seconds)


# %% WRONG tokens_per_second | you took the mean
# EXERCISE tokens_per_second
def tokens_per_second(new_tokens, seconds):
    return new_tokens / statistics.mean(seconds[1:])


# %% WRONG tokens_per_second | mean of the middle two
# EXERCISE tokens_per_second
def tokens_per_second(new_tokens, seconds):
    runs = sorted(seconds[1:])
    return new_tokens / runs[(len(runs) - 1) // 2]


# %% WRONG tokens_per_second | luckiest
# EXERCISE tokens_per_second
def tokens_per_second(new_tokens, seconds):
    return new_tokens / min(seconds)


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


# %% WRONG best_tokens_per_s | not bytes
# EXERCISE best_tokens_per_s
def best_tokens_per_s(parameters, bytes_per_parameter, bandwidth_bytes_per_s):
    return bandwidth_bytes_per_s / parameters


# %% WRONG best_tokens_per_s | seconds for one token
# EXERCISE best_tokens_per_s
def best_tokens_per_s(parameters, bytes_per_parameter, bandwidth_bytes_per_s):
    return parameters * bytes_per_parameter / bandwidth_bytes_per_s


# %% WRONG best_tokens_per_s | leave the 8 out
# EXERCISE best_tokens_per_s
def best_tokens_per_s(parameters, bytes_per_parameter, bandwidth_bytes_per_s):
    return bandwidth_bytes_per_s / (parameters * bytes_per_parameter * 8)


# %% WRONG predict_all | only the last batch
# EXERCISE predict_all
def predict_all(model, batches):
    for batch in batches:
        output = model(batch)
    return output


# %% WRONG predict_all | only the first batch
# EXERCISE predict_all
def predict_all(model, batches):
    for batch in batches:
        return model(batch)


# %% WRONG predict_all | features, not GPUs; leave the mean out
# EXERCISE predict_all
def predict_all(model, batches):
    return torch.cat([model(batch) for batch in batches]).mean(dim=1)


# %% WRONG predict_all | use torch.cat
# EXERCISE predict_all
def predict_all(model, batches):
    return [model(batch) for batch in batches]


# %% WRONG predict_all | inference keeps no graph
# EXERCISE predict_all
def predict_all(model, batches):
    return torch.cat([model(batch) for batch in batches])


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
def clock_cycles(parameters, tokens, flops_per_s, clock_hz):
    return parameters * tokens / (flops_per_s / clock_hz)


# %% WRONG clock_cycles | that is one token
# EXERCISE clock_cycles
def clock_cycles(parameters, tokens, flops_per_s, clock_hz):
    return 2 * parameters / (flops_per_s / clock_hz)


# %% WRONG clock_cycles | those are seconds
# EXERCISE clock_cycles
def clock_cycles(parameters, tokens, flops_per_s, clock_hz):
    return 2 * parameters * tokens / flops_per_s


# %% WRONG clock_cycles | more than one operation a cycle
# EXERCISE clock_cycles
def clock_cycles(parameters, tokens, flops_per_s, clock_hz):
    return 2 * parameters * tokens / clock_hz


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
