import torch


# %% WRONG greedy_verify | unverified
# EXERCISE greedy_verify
def greedy_verify(target_logits, drafted):
    own = target_logits.argmax(-1).tolist()
    accepted = min(1, len(drafted))
    while accepted < len(drafted) and drafted[accepted] == own[accepted]:
        accepted += 1
    return accepted, own[accepted]


# %% WRONG greedy_verify | shifted by one
# EXERCISE greedy_verify
def greedy_verify(target_logits, drafted):
    own = target_logits.argmax(-1).tolist()
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == own[accepted + 1]:
        accepted += 1
    return accepted, own[accepted]


# %% WRONG greedy_verify | behind the first wrong token
# EXERCISE greedy_verify
def greedy_verify(target_logits, drafted):
    own = target_logits.argmax(-1).tolist()
    accepted = sum(d == o for d, o in zip(drafted, own, strict=False))
    return accepted, own[accepted]


# %% WRONG greedy_verify | the bonus
# EXERCISE greedy_verify
def greedy_verify(target_logits, drafted):
    own = target_logits.argmax(-1).tolist()
    accepted = 0
    while accepted < len(drafted) - 1 and drafted[accepted] == own[accepted]:
        accepted += 1
    return accepted, own[accepted]


# %% WRONG greedy_verify | not the draft's
# EXERCISE greedy_verify
def greedy_verify(target_logits, drafted):
    own = target_logits.argmax(-1).tolist()
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == own[accepted]:
        accepted += 1
    return accepted, (drafted + own[-1:])[accepted]


# %% WRONG sampled_verify | judged by the full q
# EXERCISE sampled_verify
def sampled_verify(target_probs, drafted, draft_probs, is_drawn, uniforms):
    for i, token in enumerate(drafted):
        p, q = target_probs[i], draft_probs[i]
        if uniforms[i] >= min(1.0, (p[token] / q[token]).item()):
            left = (p - q).clamp(min=0)
            return i, left / left.sum()
    return len(drafted), target_probs[-1]


# %% WRONG sampled_verify | not normalised
# EXERCISE sampled_verify
def sampled_verify(target_probs, drafted, draft_probs, is_drawn, uniforms):
    if not is_drawn:
        draft_probs = torch.nn.functional.one_hot(torch.tensor(drafted), target_probs.shape[1]).float()
    for i, token in enumerate(drafted):
        p, q = target_probs[i], draft_probs[i]
        if uniforms[i] >= min(1.0, (p[token] / q[token]).item()):
            return i, (p - q).clamp(min=0)
    return len(drafted), target_probs[-1]


# %% WRONG sampled_verify | replacement drawn from p
# EXERCISE sampled_verify
def sampled_verify(target_probs, drafted, draft_probs, is_drawn, uniforms):
    if not is_drawn:
        draft_probs = torch.nn.functional.one_hot(torch.tensor(drafted), target_probs.shape[1]).float()
    for i, token in enumerate(drafted):
        p, q = target_probs[i], draft_probs[i]
        if uniforms[i] >= min(1.0, (p[token] / q[token]).item()):
            return i, p
    return len(drafted), target_probs[-1]


# %% WRONG sampled_verify | upside down
# EXERCISE sampled_verify
def sampled_verify(target_probs, drafted, draft_probs, is_drawn, uniforms):
    if not is_drawn:
        draft_probs = torch.nn.functional.one_hot(torch.tensor(drafted), target_probs.shape[1]).float()
    for i, token in enumerate(drafted):
        p, q = target_probs[i], draft_probs[i]
        if uniforms[i] >= min(1.0, (q[token] / p[token]).item()):
            left = (p - q).clamp(min=0)
            return i, left / left.sum()
    return len(drafted), target_probs[-1]


# %% WRONG sampled_verify | LAST row
# EXERCISE sampled_verify
def sampled_verify(target_probs, drafted, draft_probs, is_drawn, uniforms):
    if not is_drawn:
        draft_probs = torch.nn.functional.one_hot(torch.tensor(drafted), target_probs.shape[1]).float()
    for i, token in enumerate(drafted):
        p, q = target_probs[i], draft_probs[i]
        if uniforms[i] >= min(1.0, (p[token] / q[token]).item()):
            left = (p - q).clamp(min=0)
            return i, left / left.sum()
    return len(drafted), target_probs[len(drafted) - 1]


# %% WRONG best_draft_tokens | swapped
# EXERCISE best_draft_tokens
def best_draft_tokens(acceptance, step_s, draft_s):
    gains = []
    for count, seconds in enumerate(step_s):
        tokens = acceptance + 1 if count == 1 else (1 - count ** (acceptance + 1)) / (1 - count)
        gains.append(tokens * step_s[0] / (seconds + count * draft_s))
    best = max(range(len(gains)), key=gains.__getitem__)
    return best, gains[best]


# %% WRONG best_draft_tokens | make γ + 1 rows
# EXERCISE best_draft_tokens
def best_draft_tokens(acceptance, step_s, draft_s):
    gains = []
    for count in range(len(step_s)):
        tokens = sum(acceptance**i for i in range(count + 1))
        gains.append(tokens * step_s[0] / (step_s[max(count, 1) - 1] + count * draft_s))
    best = max(range(len(gains)), key=gains.__getitem__)
    return best, gains[best]


# %% WRONG best_draft_tokens | not free
# EXERCISE best_draft_tokens
def best_draft_tokens(acceptance, step_s, draft_s):
    gains = []
    for count, seconds in enumerate(step_s):
        gains.append(sum(acceptance**i for i in range(count + 1)) * step_s[0] / seconds)
    best = max(range(len(gains)), key=gains.__getitem__)
    return best, gains[best]


# %% WRONG best_draft_tokens | only if all before it stood
# EXERCISE best_draft_tokens
def best_draft_tokens(acceptance, step_s, draft_s):
    gains = []
    for count, seconds in enumerate(step_s):
        gains.append((1 + acceptance * count) * step_s[0] / (seconds + count * draft_s))
    best = max(range(len(gains)), key=gains.__getitem__)
    return best, gains[best]


# %% WRONG prompt_lookup | found itself
# EXERCISE prompt_lookup
def prompt_lookup(token_ids, count, longest):
    for n in range(min(longest, len(token_ids) - 1), 0, -1):
        for start in range(len(token_ids) - n, -1, -1):
            if token_ids[start : start + n] == token_ids[-n:]:
                return token_ids[start + n : start + n + count]
    return []


# %% WRONG prompt_lookup | the first occurrence
# EXERCISE prompt_lookup
def prompt_lookup(token_ids, count, longest):
    for n in range(min(longest, len(token_ids) - 1), 0, -1):
        for start in range(len(token_ids) - n):
            if token_ids[start : start + n] == token_ids[-n:]:
                return token_ids[start + n : start + n + count]
    return []


# %% WRONG prompt_lookup | begin with the longest
# EXERCISE prompt_lookup
def prompt_lookup(token_ids, count, longest):
    for n in range(1, min(longest, len(token_ids) - 1) + 1):
        for start in range(len(token_ids) - n - 1, -1, -1):
            if token_ids[start : start + n] == token_ids[-n:]:
                return token_ids[start + n : start + n + count]
    return []


# %% WRONG prompt_lookup | more than `count`
# EXERCISE prompt_lookup
def prompt_lookup(token_ids, count, longest):
    for n in range(min(longest, len(token_ids) - 1), 0, -1):
        for start in range(len(token_ids) - n - 1, -1, -1):
            if token_ids[start : start + n] == token_ids[-n:]:
                return token_ids[start + n :]
    return []


# %% WRONG prompt_lookup | try shorter ones
# EXERCISE prompt_lookup
def prompt_lookup(token_ids, count, longest):
    for start in range(len(token_ids) - longest - 1, -1, -1):
        if token_ids[start : start + longest] == token_ids[-longest:]:
            return token_ids[start + longest : start + longest + count]
    return []


# %% WRONG repaired_loop | still the bug
# EXERCISE repaired_loop
def repaired_loop(target, draft, token_ids, new_tokens, draft_tokens):
    text = list(token_ids)
    target.extend(text[:-1])
    while len(text) < len(token_ids) + new_tokens:
        drafted = draft.propose(text, draft_tokens)
        own = target.extend([text[-1], *drafted]).argmax(-1).tolist()
        accepted = next((i for i in range(len(drafted)) if drafted[i] != own[i]), len(drafted))
        target.rewind(target.length)
        text += [*drafted[:accepted], own[accepted]]
    return text[: len(token_ids) + new_tokens]


# %% WRONG repaired_loop | no rollback
# EXERCISE repaired_loop
def repaired_loop(target, draft, token_ids, new_tokens, draft_tokens):
    text = list(token_ids)
    target.extend(text[:-1])
    while len(text) < len(token_ids) + new_tokens:
        drafted = draft.propose(text, draft_tokens)
        own = target.extend([text[-1], *drafted]).argmax(-1).tolist()
        accepted = next((i for i in range(len(drafted)) if drafted[i] != own[i]), len(drafted))
        text += [*drafted[:accepted], own[accepted]]
    return text[: len(token_ids) + new_tokens]


# %% WRONG repaired_loop | one position too many
# EXERCISE repaired_loop
def repaired_loop(target, draft, token_ids, new_tokens, draft_tokens):
    text = list(token_ids)
    target.extend(text[:-1])
    while len(text) < len(token_ids) + new_tokens:
        drafted = draft.propose(text, draft_tokens)
        own = target.extend([text[-1], *drafted]).argmax(-1).tolist()
        accepted = next((i for i in range(len(drafted)) if drafted[i] != own[i]), len(drafted))
        target.rewind(len(drafted) - accepted + 1)
        text += [*drafted[:accepted], own[accepted]]
    return text[: len(token_ids) + new_tokens]


# %% WRONG repaired_loop | every step reads all of it
# EXERCISE repaired_loop
def repaired_loop(target, draft, token_ids, new_tokens, draft_tokens):
    text = list(token_ids)
    while len(text) < len(token_ids) + new_tokens:
        target.rewind(target.length)
        drafted = draft.propose(text, draft_tokens)
        own = target.extend([*text, *drafted])[len(text) - 1 :].argmax(-1).tolist()
        accepted = next((i for i in range(len(drafted)) if drafted[i] != own[i]), len(drafted))
        text += [*drafted[:accepted], own[accepted]]
    return text[: len(token_ids) + new_tokens]


# %% WRONG trimmed_probs | no longer sum to 1
# EXERCISE trimmed_probs
def trimmed_probs(hidden, head, counts, keep):
    kept = counts.topk(keep).indices
    probs = torch.softmax(head @ hidden, dim=-1)
    return torch.zeros(len(head)).index_copy(0, kept, probs[kept])


# %% WRONG trimmed_probs | must be minus infinity
# EXERCISE trimmed_probs
def trimmed_probs(hidden, head, counts, keep):
    kept = counts.topk(keep).indices
    logits = torch.zeros(len(head))
    logits[kept] = head[kept] @ hidden
    return torch.softmax(logits, dim=-1)


# %% WRONG trimmed_probs | the first ids are not the most frequent
# EXERCISE trimmed_probs
def trimmed_probs(hidden, head, counts, keep):
    logits = torch.full((len(head),), -torch.inf)
    logits[:keep] = head[:keep] @ hidden
    return torch.softmax(logits, dim=-1)


# %% WRONG trimmed_probs | its own token's id
# EXERCISE trimmed_probs
def trimmed_probs(hidden, head, counts, keep):
    kept = counts.topk(keep).indices.sort().values
    return torch.softmax(head[kept] @ hidden, dim=-1)


# %% WRONG trimmed_probs | choose by the counts
# EXERCISE trimmed_probs
def trimmed_probs(hidden, head, counts, keep):
    logits = head @ hidden
    kept = logits.topk(keep).indices
    return torch.full_like(logits, -torch.inf).index_copy(0, kept, logits[kept]).softmax(-1)


# %% WRONG output_law | enumerate what does come out
# EXERCISE output_law
def output_law(target_probs, draft_probs, drawn_from):
    return target_probs


# %% WRONG output_law | that is the repair
# EXERCISE output_law
def output_law(target_probs, draft_probs, drawn_from):
    law = torch.zeros_like(target_probs)
    q = torch.where(drawn_from > 0, drawn_from, 1.0)
    stands = (target_probs / q).clamp(max=1)
    left = (target_probs - q).clamp(min=0)
    left = left / left.sum() if left.sum() > 0 else target_probs
    return law + drawn_from * stands + (drawn_from * (1 - stands)).sum() * left


# %% WRONG output_law | only tokens that stand
# EXERCISE output_law
def output_law(target_probs, draft_probs, drawn_from):
    return drawn_from * (target_probs / draft_probs).clamp(max=1)


# %% WRONG output_law | divide the residual by its own sum
# EXERCISE output_law
def output_law(target_probs, draft_probs, drawn_from):
    stands = (target_probs / draft_probs).clamp(max=1)
    left = (target_probs - draft_probs).clamp(min=0)
    return drawn_from * stands + (drawn_from * (1 - stands)).sum() * left


# %% WRONG output_law | not from p itself
# EXERCISE output_law
def output_law(target_probs, draft_probs, drawn_from):
    stands = (target_probs / draft_probs).clamp(max=1)
    return drawn_from * stands + (drawn_from * (1 - stands)).sum() * target_probs


# %% WRONG tree_mask | a chain's causal mask
# EXERCISE tree_mask
def tree_mask(parents):
    return torch.ones(len(parents), len(parents)).tril().bool()


# %% WRONG tree_mask | only the parent is seen
# EXERCISE tree_mask
def tree_mask(parents):
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node, parent] = True
    return mask


# %% WRONG tree_mask | a node sees itself
# EXERCISE tree_mask
def tree_mask(parents):
    mask = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] = mask[parent]
            mask[node, parent] = True
    return mask


# %% WRONG tree_mask | rows and columns are swapped
# EXERCISE tree_mask
def tree_mask(parents):
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[:, node] |= mask[:, parent]
    return mask


# %% WRONG exit_depths | a row without a True is 0
# EXERCISE exit_depths
def exit_depths(confidence, threshold):
    return (confidence >= threshold).int().argmax(dim=1) + 1


# %% WRONG exit_depths | off by one
# EXERCISE exit_depths
def exit_depths(confidence, threshold):
    always = torch.ones(len(confidence), 1, dtype=torch.bool)
    return torch.cat([confidence >= threshold, always], dim=1).int().argmax(dim=1)


# %% WRONG exit_depths | which has no column
# EXERCISE exit_depths
def exit_depths(confidence, threshold):
    sure = confidence >= threshold
    first = sure.int().argmax(dim=1) + 1
    return torch.where(sure.any(dim=1), first, confidence.shape[1])


# %% WRONG exit_depths | wrong way round
# EXERCISE exit_depths
def exit_depths(confidence, threshold):
    always = torch.ones(len(confidence), 1, dtype=torch.bool)
    return torch.cat([confidence <= threshold, always], dim=1).int().argmax(dim=1) + 1


# %% WRONG exit_depths | LAST layer
# EXERCISE exit_depths
def exit_depths(confidence, threshold):
    depths = []
    for row in confidence.tolist():
        layers = len(row) + 1
        for layer, value in enumerate(row, start=1):
            if value >= threshold:
                layers = layer
        depths.append(layers)
    return torch.tensor(depths)


# %% WRONG exit_depths | counts the unsure layers
# EXERCISE exit_depths
def exit_depths(confidence, threshold):
    return (confidence < threshold).sum(dim=1) + 1


# %% WRONG kept_positions | the sinks count too
# EXERCISE kept_positions
def kept_positions(length, sinks, budget):
    if length <= budget:
        return list(range(length))
    return list(range(sinks)) + list(range(length - budget, length))


# %% WRONG kept_positions | the newest position, length - 1, is missing
# EXERCISE kept_positions
def kept_positions(length, sinks, budget):
    if length <= budget:
        return list(range(length))
    newest = length - 1
    return [*range(sinks), *range(newest - (budget - sinks), newest)]


# %% WRONG kept_positions | without sinks
# EXERCISE kept_positions
def kept_positions(length, sinks, budget):
    return list(range(max(length - budget, 0), length))


# %% WRONG kept_positions | the wrong side
# EXERCISE kept_positions
def kept_positions(length, sinks, budget):
    return list(range(min(length, budget)))


# %% WRONG kept_positions | a short text
# EXERCISE kept_positions
def kept_positions(length, sinks, budget):
    return [*range(sinks), *range(length - (budget - sinks), length)]


# %% WRONG visible | the bug itself
# EXERCISE visible
def visible(cached, new):
    if cached > 0:
        return torch.ones(new, cached + new, dtype=torch.bool)
    return torch.ones(new, new, dtype=torch.bool).tril()


# %% WRONG visible | aligned at the first key
# EXERCISE visible
def visible(cached, new):
    return torch.ones(new, cached + new, dtype=torch.bool).tril()


# %% WRONG visible | its own position too
# EXERCISE visible
def visible(cached, new):
    query = torch.arange(cached, cached + new)[:, None]
    return torch.arange(cached + new)[None] < query


# %% WRONG visible | the position after its own
# EXERCISE visible
def visible(cached, new):
    return torch.ones(new, cached + new, dtype=torch.bool).tril(cached + 1)


# %% WRONG visible | inverted
# EXERCISE visible
def visible(cached, new):
    return torch.ones(new, cached + new, dtype=torch.bool).triu(cached + 1)


# %% WRONG token_mask | only the first byte was tried
# EXERCISE token_mask
def token_mask(next_state, tokens, state):
    return [len(token) > 0 and token[0] in next_state[state] for token in tokens]


# %% WRONG token_mask | from the same state
# EXERCISE token_mask
def token_mask(next_state, tokens, state):
    return [len(token) > 0 and all(byte in next_state[state] for byte in token) for token in tokens]


# %% WRONG token_mask | a token without bytes is special
# EXERCISE token_mask
def token_mask(next_state, tokens, state):
    mask = []
    for token in tokens:
        here, lives = state, True
        for byte in token:
            if byte not in next_state[here]:
                lives = False
                break
            here = next_state[here][byte]
        mask.append(lives)
    return mask


# %% WRONG token_mask | the mask of state 0
# EXERCISE token_mask
def token_mask(next_state, tokens, state):
    mask = []
    for token in tokens:
        here, lives = 0, len(token) > 0
        for byte in token:
            lives = lives and byte in next_state[here]
            here = next_state[here].get(byte, here)
        mask.append(lives)
    return mask


# %% WRONG forced_run | where the text may end
# EXERCISE forced_run
def forced_run(next_state, accepting, state):
    forced = bytearray()
    while len(next_state[state]) == 1:
        ((byte, state),) = next_state[state].items()
        forced.append(byte)
    return bytes(forced)


# %% WRONG forced_run | only one byte was taken
# EXERCISE forced_run
def forced_run(next_state, accepting, state):
    if len(next_state[state]) == 1 and not accepting[state]:
        return bytes(next_state[state])
    return b""


# %% WRONG forced_run | ends at the first choice
# EXERCISE forced_run
def forced_run(next_state, accepting, state):
    forced = bytearray()
    while next_state[state] and not accepting[state]:
        byte = min(next_state[state])
        forced.append(byte)
        state = next_state[state][byte]
    return bytes(forced)


# %% WRONG masked_and_conditioned | the two are swapped
# EXERCISE masked_and_conditioned
def masked_and_conditioned(first, second, allowed):
    both = first[:, None] * second * allowed
    kept, rows = first * allowed.any(1), second * allowed
    masked = kept[:, None] / kept.sum() * rows / rows.sum(1, keepdim=True).clamp(min=1e-12)
    return both / both.sum(), masked


# %% WRONG masked_and_conditioned | masking does not know what comes later
# EXERCISE masked_and_conditioned
def masked_and_conditioned(first, second, allowed):
    both = first[:, None] * second * allowed
    return both / both.sum(), both / both.sum()


# %% WRONG masked_and_conditioned | the first token was not masked
# EXERCISE masked_and_conditioned
def masked_and_conditioned(first, second, allowed):
    both = first[:, None] * second * allowed
    rows = second * allowed
    return first[:, None] * rows / rows.sum(1, keepdim=True).clamp(min=1e-12), both / both.sum()


# %% WRONG masked_and_conditioned | divide by what is left
# EXERCISE masked_and_conditioned
def masked_and_conditioned(first, second, allowed):
    both = first[:, None] * second * allowed
    return both, both / both.sum()


# %% WRONG row_sums | still depends on len(rows)
# EXERCISE row_sums
def row_sums(rows):
    parts = max(8 // len(rows), 1)
    sums = []
    for row in rows:
        total = torch.zeros((), dtype=rows.dtype)
        for part in row.chunk(parts):
            subtotal = torch.zeros((), dtype=rows.dtype)
            for value in part:
                subtotal = subtotal + value
            total = total + subtotal
        sums.append(total)
    return torch.stack(sums)


# %% WRONG row_sums | seven wait
# EXERCISE row_sums
def row_sums(rows):
    sums = []
    for row in rows:
        total = torch.zeros((), dtype=rows.dtype)
        for value in row:
            total = total + value
        sums.append(total)
    return torch.stack(sums)


# %% WRONG row_sums | leaves its cause
# EXERCISE row_sums
def row_sums(rows):
    parts = max(8 // len(rows), 1)
    sums = []
    for row in rows.float():
        total = torch.zeros(())
        for part in row.chunk(parts):
            subtotal = torch.zeros(())
            for value in part:
                subtotal = subtotal + value
            total = total + subtotal
        sums.append(total)
    return torch.stack(sums).to(rows.dtype)
