import json


# %% WRONG queue_waits | whole latency
# EXERCISE queue_waits
def queue_waits(arrivals, service_s):
    waits, free_s = [], 0.0
    for arrival, seconds in zip(arrivals, service_s, strict=True):
        free_s = max(arrival, free_s) + seconds
        waits.append(free_s - arrival)
    return waits


# %% WRONG queue_waits | never negative
# EXERCISE queue_waits
def queue_waits(arrivals, service_s):
    waits, free_s = [], 0.0
    for arrival, seconds in zip(arrivals, service_s, strict=True):
        waits.append(free_s - arrival)
        free_s = max(arrival, free_s) + seconds
    return waits


# %% WRONG queue_waits | START + seconds
# EXERCISE queue_waits
def queue_waits(arrivals, service_s):
    waits, free_s = [], 0.0
    for arrival, seconds in zip(arrivals, service_s, strict=True):
        waits.append(max(free_s - arrival, 0.0))
        free_s = arrival + seconds
    return waits


# %% WRONG queue_waits | stood idle
# EXERCISE queue_waits
def queue_waits(arrivals, service_s):
    waits, free_s = [], 0.0
    for arrival, seconds in zip(arrivals, service_s, strict=True):
        waits.append(max(free_s - arrival, 0.0))
        free_s += seconds
    return waits


# %% WRONG highest_rate | solve the formula
# EXERCISE highest_rate
def highest_rate(mean_s, second_moment, wait_s):
    return 1 / mean_s


# %% WRONG highest_rate | multiply it out
# EXERCISE highest_rate
def highest_rate(mean_s, second_moment, wait_s):
    return 2 * wait_s / second_moment


# %% WRONG highest_rate | not E[S]²
# EXERCISE highest_rate
def highest_rate(mean_s, second_moment, wait_s):
    return 2 * wait_s / (mean_s**2 + 2 * wait_s * mean_s)


# %% WRONG highest_rate | below the fraction is lost
# EXERCISE highest_rate
def highest_rate(mean_s, second_moment, wait_s):
    return wait_s / (second_moment + wait_s * mean_s)


# %% WRONG client_times | TTFT was counted into ITL
# EXERCISE client_times
def client_times(arrival_s, token_s):
    gaps = [b - a for a, b in zip([arrival_s, *token_s], token_s, strict=False)]
    return gaps[0], gaps, sum(gaps) / len(gaps)


# %% WRONG client_times | n - 1 gaps
# EXERCISE client_times
def client_times(arrival_s, token_s):
    gaps = [b - a for a, b in zip(token_s, token_s[1:], strict=False)]
    return token_s[0] - arrival_s, gaps, sum(gaps) / len(token_s)


# %% WRONG client_times | begins at the first token
# EXERCISE client_times
def client_times(arrival_s, token_s):
    gaps = [b - a for a, b in zip(token_s, token_s[1:], strict=False)]
    return token_s[0] - arrival_s, gaps, (token_s[-1] - arrival_s) / len(gaps) if gaps else None


# %% WRONG client_times | flatter the average
# EXERCISE client_times
def client_times(arrival_s, token_s):
    gaps = [b - a for a, b in zip(token_s, token_s[1:], strict=False)]
    return token_s[0] - arrival_s, gaps, sum(gaps) / max(len(gaps), 1)


# %% WRONG good_share | in the denominator
# EXERCISE good_share
def good_share(times, ttft_s, tpot_s):
    answered = [pair for pair in times if pair is not None]
    return sum(ttft <= ttft_s and (tpot or 0.0) <= tpot_s for ttft, tpot in answered) / len(answered)


# %% WRONG good_share | BOTH objectives
# EXERCISE good_share
def good_share(times, ttft_s, tpot_s):
    answered = [pair for pair in times if pair is not None]
    return sum(ttft <= ttft_s or (tpot or 0.0) <= tpot_s for ttft, tpot in answered) / len(times)


# %% WRONG good_share | equal to the objective
# EXERCISE good_share
def good_share(times, ttft_s, tpot_s):
    answered = [pair for pair in times if pair is not None]
    return sum(ttft < ttft_s and (tpot or 0.0) < tpot_s for ttft, tpot in answered) / len(times)


# %% WRONG good_share | a mean hides
# EXERCISE good_share
def good_share(times, ttft_s, tpot_s):
    answered = [pair for pair in times if pair is not None]
    ttft = sum(pair[0] for pair in answered) / len(answered)
    tpot = sum(pair[1] or 0.0 for pair in answered) / len(answered)
    return 1.0 if ttft <= ttft_s and tpot <= tpot_s else 0.0


# %% WRONG steps_needed | follow each slot
# EXERCISE steps_needed
def steps_needed(lengths, slots):
    static = sum(max(lengths[i : i + slots]) for i in range(0, len(lengths), slots))
    return static, -(-sum(lengths) // slots)


# %% WRONG steps_needed | cannot sort
# EXERCISE steps_needed
def steps_needed(lengths, slots):
    ordered = sorted(lengths)
    static = sum(max(ordered[i : i + slots]) for i in range(0, len(lengths), slots))
    free = [0] * slots
    for length in lengths:
        free[free.index(min(free))] += length
    return static, max(free)


# %% WRONG steps_needed | no step passes between
# EXERCISE steps_needed
def steps_needed(lengths, slots):
    static = sum(max(lengths[i : i + slots]) for i in range(0, len(lengths), slots))
    free = [0] * slots
    for length in lengths:
        first = free.index(min(free))
        free[first] += length + (free[first] > 0)
    return static, max(free)


# %% WRONG steps_needed | its longest answer
# EXERCISE steps_needed
def steps_needed(lengths, slots):
    free = [0] * slots
    for length in lengths:
        free[free.index(min(free))] += length
    return sum(lengths), max(free)


# %% WRONG plan_step | decode first
# EXERCISE plan_step
def plan_step(left, budget):
    sizes = []
    for tokens in left:
        sizes.append(min(tokens, budget))
        budget -= sizes[-1]
    return sizes


# %% WRONG plan_step | cuts it into chunks
# EXERCISE plan_step
def plan_step(left, budget):
    sizes = [int(tokens == 1) for tokens in left]
    budget -= sum(sizes)
    for i, tokens in enumerate(left):
        if tokens > 1 and budget > 0:
            sizes[i] = tokens
            budget -= tokens
    return sizes


# %% WRONG plan_step | not in equal parts
# EXERCISE plan_step
def plan_step(left, budget):
    sizes = [int(tokens == 1) for tokens in left]
    reading = [i for i, tokens in enumerate(left) if tokens > 1]
    for i in reading:
        sizes[i] = min(left[i], (budget - (len(left) - len(reading))) // len(reading))
    return sizes


# %% WRONG plan_step | count in the budget too
# EXERCISE plan_step
def plan_step(left, budget):
    sizes = [int(tokens == 1) for tokens in left]
    for i, tokens in enumerate(left):
        if tokens > 1:
            sizes[i] = min(tokens, budget)
            budget -= sizes[i]
    return sizes


# %% WRONG clear_ended | was passed over
# EXERCISE clear_ended
def clear_ended(running, ended, references):
    running, references = list(running), list(references)
    for request in running:
        name, table = request
        if name in ended:
            running.remove(request)
            for block in table:
                references[block] -= 1
    return [name for name, _ in running], references


# %% WRONG clear_ended | after EVERY step
# EXERCISE clear_ended
def clear_ended(running, ended, references):
    references = list(references)
    if not all(name in ended for name, _ in running):
        return [name for name, _ in running], references
    for _, table in running:
        for block in table:
            references[block] -= 1
    return [], references


# %% WRONG clear_ended | the memory leaks
# EXERCISE clear_ended
def clear_ended(running, ended, references):
    return [name for name, _ in running if name not in ended], list(references)


# %% WRONG clear_ended | lost ALL its holders
# EXERCISE clear_ended
def clear_ended(running, ended, references):
    references = list(references)
    for name, table in running:
        for block in table if name in ended else []:
            references[block] = 0
    return [name for name, _ in running if name not in ended], references


# %% WRONG block_names | chain in the name
# EXERCISE block_names
def block_names(token_ids, block_size, salt, digest):
    starts = range(0, len(token_ids) - block_size + 1, block_size)
    return [digest(salt, token_ids[start : start + block_size]) for start in starts]


# %% WRONG block_names | not full
# EXERCISE block_names
def block_names(token_ids, block_size, salt, digest):
    names, parent = [], salt
    for start in range(0, len(token_ids), block_size):
        parent = digest(parent, token_ids[start : start + block_size])
        names.append(parent)
    return names


# %% WRONG block_names | salt is missing
# EXERCISE block_names
def block_names(token_ids, block_size, salt, digest):
    names, parent = [], ""
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = digest(parent, token_ids[start : start + block_size])
        names.append(parent)
    return names


# %% WRONG block_names | do not overlap
# EXERCISE block_names
def block_names(token_ids, block_size, salt, digest):
    names, parent = [], salt
    for start in range(len(token_ids) - block_size + 1):
        parent = digest(parent, token_ids[start : start + block_size])
        names.append(parent)
    return names


# %% WRONG cached_tokens | zero queries
# EXERCISE cached_tokens
def cached_tokens(names, known, block_size, prompt):
    found = 0
    while found < len(names) and names[found] in known:
        found += 1
    return found * block_size


# %% WRONG cached_tokens | given up too often
# EXERCISE cached_tokens
def cached_tokens(names, known, block_size, prompt):
    found = 0
    while found < len(names) and names[found] in known:
        found += 1
    return max(found * block_size - 1, 0)


# %% WRONG cached_tokens | behind a gap
# EXERCISE cached_tokens
def cached_tokens(names, known, block_size, prompt):
    return min(sum(name in known for name in names) * block_size, prompt - 1)


# %% WRONG cached_tokens | times block_size
# EXERCISE cached_tokens
def cached_tokens(names, known, block_size, prompt):
    found = 0
    while found < len(names) and names[found] in known:
        found += 1
    return min(found, prompt - 1)


# %% WRONG take_block | a stale hash
# EXERCISE take_block
def take_block(free, cached, block_of):
    if free:
        return free[0], free[1:], cached, block_of
    return cached[0], free, cached[1:], block_of


# %% WRONG take_block | the newest was evicted
# EXERCISE take_block
def take_block(free, cached, block_of):
    if free:
        return free[0], free[1:], cached, block_of
    block = cached[-1]
    return block, free, cached[:-1], {name: b for name, b in block_of.items() if b != block}


# %% WRONG take_block | free ones first
# EXERCISE take_block
def take_block(free, cached, block_of):
    if not cached:
        return free[0], free[1:], cached, block_of
    block = cached[0]
    return block, free, cached[1:], {name: b for name, b in block_of.items() if b != block}


# %% WRONG take_block | all names are gone
# EXERCISE take_block
def take_block(free, cached, block_of):
    if free:
        return free[0], free[1:], cached, block_of
    return cached[0], free, cached[1:], {}


# %% WRONG write_alone | a live block was written
# EXERCISE write_alone
def write_alone(table, index, references, block_of, new):
    block = table[index]
    return list(table), list(references), {name: b for name, b in block_of.items() if b != block}, None


# %% WRONG write_alone | still published
# EXERCISE write_alone
def write_alone(table, index, references, block_of, new):
    table, references, block = list(table), list(references), table[index]
    if references[block] == 1:
        return table, references, block_of, None
    table[index], references[new] = new, 1
    references[block] -= 1
    return table, references, block_of, (block, new)


# %% WRONG write_alone | lower its reference count
# EXERCISE write_alone
def write_alone(table, index, references, block_of, new):
    table, references, block = list(table), list(references), table[index]
    if references[block] == 1:
        return table, references, {name: b for name, b in block_of.items() if b != block}, None
    table[index], references[new] = new, 1
    return table, references, block_of, (block, new)


# %% WRONG write_alone | a copy costs memory
# EXERCISE write_alone
def write_alone(table, index, references, block_of, new):
    table, references, block = list(table), list(references), table[index]
    table[index], references[new] = new, 1
    references[block] -= 1
    return table, references, block_of, (block, new)


# %% WRONG preempted | the oldest gave way
# EXERCISE preempted
def preempted(held, free, needed):
    gone = []
    for i in range(len(held)):
        if free >= needed:
            break
        free += held[i]
        gone.append(i)
    return gone


# %% WRONG preempted | the largest gave way
# EXERCISE preempted
def preempted(held, free, needed):
    gone = []
    for i in sorted(range(len(held)), key=lambda i: -held[i]):
        if free >= needed:
            break
        free += held[i]
        gone.append(i)
    return gone


# %% WRONG preempted | free already
# EXERCISE preempted
def preempted(held, free, needed):
    gone = []
    for i in reversed(range(len(held))):
        if sum(held[j] for j in gone) >= needed:
            break
        gone.append(i)
    return gone


# %% WRONG preempted | one too many
# EXERCISE preempted
def preempted(held, free, needed):
    gone = []
    for i in reversed(range(len(held))):
        if free > needed:
            break
        free += held[i]
        gone.append(i)
    return gone


# %% WRONG streamed_text | is not an event
# EXERCISE streamed_text
def streamed_text(parts):
    text = ""
    for part in parts:
        for line in part.decode().split("\n"):
            if line.startswith("data: ") and line != "data: [DONE]":
                text += "".join(c["delta"].get("content", "") for c in json.loads(line[6:])["choices"])
    return text


# %% WRONG streamed_text | cut in two
# EXERCISE streamed_text
def streamed_text(parts):
    text = ""
    for line in "".join(part.decode(errors="replace") for part in parts).split("\n"):
        if line.startswith("data: ") and line != "data: [DONE]":
            text += "".join(c["delta"].get("content", "") for c in json.loads(line[6:])["choices"])
    return text


# %% WRONG streamed_text | the first event only
# EXERCISE streamed_text
def streamed_text(parts):
    event = b"".join(parts).decode().split("\n\n")[0]
    return "".join(c["delta"].get("content", "") for c in json.loads(event[6:])["choices"])


# %% WRONG streamed_text | no choices
# EXERCISE streamed_text
def streamed_text(parts):
    text = ""
    for line in b"".join(parts).decode().split("\n"):
        if line.startswith("data: ") and line != "data: [DONE]":
            text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
    return text


# %% WRONG streamed_text | is not JSON
# EXERCISE streamed_text
def streamed_text(parts):
    text = ""
    for line in b"".join(parts).decode().split("\n"):
        if line.startswith("data: "):
            text += "".join(c["delta"].get("content", "") for c in json.loads(line[6:])["choices"])
    return text


# %% WRONG route | one hot replica
# EXERCISE route
def route(names, replicas, slack):
    def beginning(known):
        return next((i for i, name in enumerate(names) if name not in known), len(names))

    return max(range(len(replicas)), key=lambda i: (beginning(replicas[i][0]), -replicas[i][1], -i))


# %% WRONG route | the shortest queue alone
# EXERCISE route
def route(names, replicas, slack):
    return min(range(len(replicas)), key=lambda i: (replicas[i][1], i))


# %% WRONG route | behind a gap
# EXERCISE route
def route(names, replicas, slack):
    shortest = min(queue for _, queue in replicas)
    open_ones = [i for i, (_, queue) in enumerate(replicas) if queue <= shortest + slack]
    return max(open_ones, key=lambda i: (len(set(names) & set(replicas[i][0])), -replicas[i][1], -i))


# %% WRONG route | shorter queue
# EXERCISE route
def route(names, replicas, slack):
    def beginning(known):
        return next((i for i, name in enumerate(names) if name not in known), len(names))

    shortest = min(queue for _, queue in replicas)
    open_ones = [i for i, (_, queue) in enumerate(replicas) if queue <= shortest + slack]
    return max(open_ones, key=lambda i: (beginning(replicas[i][0]), -i))
