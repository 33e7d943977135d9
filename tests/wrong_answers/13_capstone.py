# %% WRONG badge | begin at t_1
# EXERCISE badge
def badge(arrival_s, admitted_s, token_s):
    per_token_s = (token_s[-1] - arrival_s) / len(token_s) if len(token_s) > 1 else None
    return admitted_s - arrival_s, token_s[0] - arrival_s, per_token_s


# %% WRONG badge | n - 1 gaps
# EXERCISE badge
def badge(arrival_s, admitted_s, token_s):
    per_token_s = (token_s[-1] - token_s[0]) / len(token_s) if len(token_s) > 1 else None
    return admitted_s - arrival_s, token_s[0] - arrival_s, per_token_s


# %% WRONG badge | take the mean gap
# EXERCISE badge
def badge(arrival_s, admitted_s, token_s):
    gaps = [b - a for a, b in zip(token_s, token_s[1:], strict=False)]
    return admitted_s - arrival_s, token_s[0] - arrival_s, statistics.median(gaps) if gaps else None


# %% WRONG badge | the queue ends at admission
# EXERCISE badge
def badge(arrival_s, admitted_s, token_s):
    per_token_s = (token_s[-1] - token_s[0]) / (len(token_s) - 1) if len(token_s) > 1 else None
    return token_s[0] - arrival_s, token_s[0] - arrival_s, per_token_s


# %% WRONG badge | TTFT contains the queue
# EXERCISE badge
def badge(arrival_s, admitted_s, token_s):
    per_token_s = (token_s[-1] - token_s[0]) / (len(token_s) - 1) if len(token_s) > 1 else None
    return admitted_s - arrival_s, token_s[0] - admitted_s, per_token_s


# %% WRONG badge | one token has no gap
# EXERCISE badge
def badge(arrival_s, admitted_s, token_s):
    per_token_s = (token_s[-1] - token_s[0]) / (len(token_s) - 1)
    return admitted_s - arrival_s, token_s[0] - arrival_s, per_token_s


# %% WRONG badge | infinitely fast
# EXERCISE badge
def badge(arrival_s, admitted_s, token_s):
    per_token_s = (token_s[-1] - token_s[0]) / max(len(token_s) - 1, 1)
    return admitted_s - arrival_s, token_s[0] - arrival_s, per_token_s


# %% WRONG most_users | stop there
# EXERCISE most_users
def most_users(runs, limit_s=1.0):
    served = [n for n, some in runs.items() if sum(s is not None and s <= limit_s for s in some) >= 0.99 * len(some)]
    return max(served, default=0)


# %% WRONG most_users | the mean hides
# EXERCISE most_users
def most_users(runs, limit_s=1.0):
    most = 0
    for users in sorted(runs):
        seconds = [s for s in runs[users] if s is not None]
        if statistics.fmean(seconds) > limit_s:
            break
        most = users
    return most


# %% WRONG most_users | counts among all
# EXERCISE most_users
def most_users(runs, limit_s=1.0):
    most = 0
    for users in sorted(runs):
        seconds = [s for s in runs[users] if s is not None]
        if sum(s <= limit_s for s in seconds) < 0.99 * len(seconds):
            break
        most = users
    return most


# %% WRONG most_users | not the maximum
# EXERCISE most_users
def most_users(runs, limit_s=1.0):
    most = 0
    for users in sorted(runs):
        if max(s for s in runs[users] if s is not None) > limit_s:
            break
        most = users
    return most


# %% WRONG most_users | that is p95
# EXERCISE most_users
def most_users(runs, limit_s=1.0):
    most = 0
    for users in sorted(runs):
        if sum(s is not None and s <= limit_s for s in runs[users]) < 0.95 * len(runs[users]):
            break
        most = users
    return most


# %% WRONG fleet_cost | round up
# EXERCISE fleet_cost
def fleet_cost(peak_users, per_replica, spare, price_per_hour, mean_load=0.4, think_s=20.0):
    replicas = peak_users // per_replica + spare
    return replicas, replicas * price_per_hour / (peak_users * mean_load / think_s * 3600) * 1e6


# %% WRONG fleet_cost | add the spare
# EXERCISE fleet_cost
def fleet_cost(peak_users, per_replica, spare, price_per_hour, mean_load=0.4, think_s=20.0):
    replicas = math.ceil(peak_users / per_replica)
    return replicas, replicas * price_per_hour / (peak_users * mean_load / think_s * 3600) * 1e6


# %% WRONG fleet_cost | MEAN load
# EXERCISE fleet_cost
def fleet_cost(peak_users, per_replica, spare, price_per_hour, mean_load=0.4, think_s=20.0):
    replicas = math.ceil(peak_users / per_replica) + spare
    return replicas, replicas * price_per_hour / (peak_users / think_s * 3600) * 1e6


# %% WRONG fleet_cost | bought for the peak
# EXERCISE fleet_cost
def fleet_cost(peak_users, per_replica, spare, price_per_hour, mean_load=0.4, think_s=20.0):
    replicas = math.ceil(peak_users * mean_load / per_replica) + spare
    return replicas, replicas * price_per_hour / (peak_users * mean_load / think_s * 3600) * 1e6


# %% WRONG fleet_cost | take a million
# EXERCISE fleet_cost
def fleet_cost(peak_users, per_replica, spare, price_per_hour, mean_load=0.4, think_s=20.0):
    replicas = math.ceil(peak_users / per_replica) + spare
    return replicas, replicas * price_per_hour / (peak_users * mean_load / think_s * 3600)


# %% WRONG fleet_cost | cost as much
# EXERCISE fleet_cost
def fleet_cost(peak_users, per_replica, spare, price_per_hour, mean_load=0.4, think_s=20.0):
    needed = math.ceil(peak_users / per_replica)
    return needed + spare, needed * price_per_hour / (peak_users * mean_load / think_s * 3600) * 1e6


# %% WRONG evolve_step | above the budget
# EXERCISE evolve_step
def evolve_step(found, space, budget):
    best = min(found, key=lambda c: found[c][1])
    children = []
    for axis, values in enumerate(space):
        place = values.index(best[axis])
        for other in (place - 1, place + 1):
            if 0 <= other < len(values):
                child = (*best[:axis], values[other], *best[axis + 1 :])
                if child not in found:
                    children.append(child)
    return sorted(children)


# %% WRONG evolve_step | tried before
# EXERCISE evolve_step
def evolve_step(found, space, budget):
    fitting = [c for c in found if found[c][0] <= budget]
    if not fitting:
        return []
    best = min(fitting, key=lambda c: found[c][1])
    children = []
    for axis, values in enumerate(space):
        place = values.index(best[axis])
        for other in (place - 1, place + 1):
            if 0 <= other < len(values):
                children.append((*best[:axis], values[other], *best[axis + 1 :]))
    return sorted(children)


# %% WRONG evolve_step | is not the best
# EXERCISE evolve_step
def evolve_step(found, space, budget):
    fitting = [c for c in found if found[c][0] <= budget]
    if not fitting:
        return []
    best = min(fitting, key=lambda c: found[c])
    children = []
    for axis, values in enumerate(space):
        place = values.index(best[axis])
        for other in (place - 1, place + 1):
            if 0 <= other < len(values):
                child = (*best[:axis], values[other], *best[axis + 1 :])
                if child not in found:
                    children.append(child)
    return sorted(children)


# %% WRONG evolve_step | index -1 wraps
# EXERCISE evolve_step
def evolve_step(found, space, budget):
    fitting = [c for c in found if found[c][0] <= budget]
    if not fitting:
        return []
    best = min(fitting, key=lambda c: found[c][1])
    children = []
    for axis, values in enumerate(space):
        place = values.index(best[axis])
        for move in (-1, 1):
            child = (*best[:axis], values[(place + move) % len(values)], *best[axis + 1 :])
            if child not in found:
                children.append(child)
    return sorted(children)


# %% WRONG evolve_step | not any other
# EXERCISE evolve_step
def evolve_step(found, space, budget):
    fitting = [c for c in found if found[c][0] <= budget]
    if not fitting:
        return []
    best = min(fitting, key=lambda c: found[c][1])
    children = [
        (*best[:axis], value, *best[axis + 1 :])
        for axis, values in enumerate(space)
        for value in values
        if value != best[axis]
    ]
    return sorted(child for child in children if child not in found)


# %% WRONG inherit | over FEWER channels
# EXERCISE inherit
def inherit(embedding, gain, read, write, channels, tokens):
    return embedding[:tokens][:, channels], gain[channels], read[:, channels], write[channels]


# %% WRONG inherit | above 1
# EXERCISE inherit
def inherit(embedding, gain, read, write, channels, tokens):
    factor = (len(channels) / len(gain)) ** 0.5
    return embedding[:tokens][:, channels], gain[channels] * factor, read[:, channels], write[channels]


# %% WRONG inherit | shrinks too
# EXERCISE inherit
def inherit(embedding, gain, read, write, channels, tokens):
    factor = (len(gain) / len(channels)) ** 0.5
    return embedding[:, channels], gain[channels] * factor, read[:, channels], write[channels]


# %% WRONG inherit | FIRST rows
# EXERCISE inherit
def inherit(embedding, gain, read, write, channels, tokens):
    factor = (len(gain) / len(channels)) ** 0.5
    return embedding[-tokens:][:, channels], gain[channels] * factor, read[:, channels], write[channels]


# %% WRONG inherit | as many leading ones
# EXERCISE inherit
def inherit(embedding, gain, read, write, channels, tokens):
    count = len(channels)
    factor = (len(gain) / count) ** 0.5
    return embedding[:tokens, :count], gain[:count] * factor, read[:, :count], write[:count]


# %% WRONG joules_per_token | idle power runs
# EXERCISE joules_per_token
def joules_per_token(readings, wraps_at, idle_w, tokens):
    total = 0
    for (_, a), (_, b) in zip(readings, readings[1:], strict=False):
        total += b - a if b >= a else b - a + wraps_at
    return total / 1e6 / tokens


# %% WRONG joules_per_token | add wraps_at
# EXERCISE joules_per_token
def joules_per_token(readings, wraps_at, idle_w, tokens):
    joules = (readings[-1][1] - readings[0][1]) / 1e6
    return (joules - idle_w * (readings[-1][0] - readings[0][0])) / tokens


# %% WRONG joules_per_token | more than once
# EXERCISE joules_per_token
def joules_per_token(readings, wraps_at, idle_w, tokens):
    joules = ((readings[-1][1] - readings[0][1]) % wraps_at) / 1e6
    return (joules - idle_w * (readings[-1][0] - readings[0][0])) / tokens


# %% WRONG joules_per_token | microjoules
# EXERCISE joules_per_token
def joules_per_token(readings, wraps_at, idle_w, tokens):
    total = sum((b - a) % wraps_at for (_, a), (_, b) in zip(readings, readings[1:], strict=False))
    return (total - idle_w * (readings[-1][0] - readings[0][0])) / tokens


# %% WRONG joules_per_token | not a thousandth
# EXERCISE joules_per_token
def joules_per_token(readings, wraps_at, idle_w, tokens):
    total = sum((b - a) % wraps_at for (_, a), (_, b) in zip(readings, readings[1:], strict=False)) / 1e3
    return (total - idle_w * (readings[-1][0] - readings[0][0])) / tokens


# %% WRONG joules_per_token | not evenly spaced
# EXERCISE joules_per_token
def joules_per_token(readings, wraps_at, idle_w, tokens):
    pairs = list(zip(readings, readings[1:], strict=False))
    watts = [((b - a) % wraps_at) / 1e6 / (t - s) for (s, a), (t, b) in pairs]
    return (statistics.fmean(watts) - idle_w) * (readings[-1][0] - readings[0][0]) / tokens


# %% WRONG joules_per_token | does not begin at 0
# EXERCISE joules_per_token
def joules_per_token(readings, wraps_at, idle_w, tokens):
    total = sum((b - a) % wraps_at for (_, a), (_, b) in zip(readings, readings[1:], strict=False)) / 1e6
    return (total - idle_w * readings[-1][0]) / tokens


# %% WRONG joules_per_token | multiply it by the seconds
# EXERCISE joules_per_token
def joules_per_token(readings, wraps_at, idle_w, tokens):
    total = sum((b - a) % wraps_at for (_, a), (_, b) in zip(readings, readings[1:], strict=False)) / 1e6
    return (total - idle_w) / tokens


# %% WRONG joules_per_token | power in watts
# EXERCISE joules_per_token
def joules_per_token(readings, wraps_at, idle_w, tokens):
    total = sum((b - a) % wraps_at for (_, a), (_, b) in zip(readings, readings[1:], strict=False)) / 1e6
    seconds = readings[-1][0] - readings[0][0]
    return total / seconds - idle_w


# %% WRONG loss_gap | scored low before
# EXERCISE loss_gap
def loss_gap(changed, baseline, picks):
    means = {name: statistics.fmean(scores) for name, scores in changed.items()}
    worst, best = min(means, key=means.get), max(means, key=means.get)
    drawn = []
    for one, two in zip(picks[worst], picks[best], strict=True):
        low, high = statistics.fmean(changed[worst][i] for i in one), statistics.fmean(changed[best][i] for i in two)
        drawn.append(high - low)
    return means[best] - means[worst], quantile(drawn, 0.025), quantile(drawn, 0.975)


# %% WRONG loss_gap | mean of all hides
# EXERCISE loss_gap
def loss_gap(changed, baseline, picks):
    losses = {n: [b - c for c, b in zip(changed[n], baseline[n], strict=True)] for n in changed}
    overall = statistics.fmean(value for loss in losses.values() for value in loss)
    worst = max(losses, key=lambda n: statistics.fmean(losses[n]))
    drawn = [statistics.fmean(losses[worst][i] for i in pick) - overall for pick in picks[worst]]
    return statistics.fmean(losses[worst]) - overall, quantile(drawn, 0.025), quantile(drawn, 0.975)


# %% WRONG loss_gap | belong together
# EXERCISE loss_gap
def loss_gap(changed, baseline, picks):
    def mean(scores, pick):
        return statistics.fmean(scores[i] for i in pick)

    means = {n: statistics.fmean(baseline[n]) - statistics.fmean(changed[n]) for n in changed}
    worst, best = max(means, key=means.get), min(means, key=means.get)
    drawn = []
    for k in range(len(picks[worst])):
        loss = {n: mean(baseline[n], picks[n][k - 1]) - mean(changed[n], picks[n][k]) for n in (worst, best)}
        drawn.append(loss[worst] - loss[best])
    return means[worst] - means[best], quantile(drawn, 0.025), quantile(drawn, 0.975)


# %% WRONG loss_gap | decide once
# EXERCISE loss_gap
def loss_gap(changed, baseline, picks):
    losses = {n: [b - c for c, b in zip(changed[n], baseline[n], strict=True)] for n in changed}
    means = [statistics.fmean(loss) for loss in losses.values()]
    drawn = []
    for k in range(len(next(iter(picks.values())))):
        now = [statistics.fmean(loss[i] for i in picks[n][k]) for n, loss in losses.items()]
        drawn.append(max(now) - min(now))
    return max(means) - min(means), quantile(drawn, 0.025), quantile(drawn, 0.975)


# %% WRONG loss_gap | the groups themselves are given
# EXERCISE loss_gap
def loss_gap(changed, baseline, picks):
    means = [statistics.fmean(baseline[n]) - statistics.fmean(changed[n]) for n in changed]
    drawn = []
    for pick in next(iter(picks.values())):
        now = [means[i % len(means)] for i in pick[: len(means)]]
        drawn.append(max(now) - min(now))
    return max(means) - min(means), quantile(drawn, 0.025), quantile(drawn, 0.975)


# %% WRONG loss_gap | quantiles of the drawn gaps
# EXERCISE loss_gap
def loss_gap(changed, baseline, picks):
    losses = {n: [b - c for c, b in zip(changed[n], baseline[n], strict=True)] for n in changed}
    means = {n: statistics.fmean(loss) for n, loss in losses.items()}
    worst, best = max(means, key=means.get), min(means, key=means.get)
    one = [statistics.fmean(losses[worst][i] for i in pick) for pick in picks[worst]]
    two = [statistics.fmean(losses[best][i] for i in pick) for pick in picks[best]]
    low, high = quantile(one, 0.025) - quantile(two, 0.975), quantile(one, 0.975) - quantile(two, 0.025)
    return means[worst] - means[best], low, high


# %% WRONG loss_gap | without an interval
# EXERCISE loss_gap
def loss_gap(changed, baseline, picks):
    means = [statistics.fmean(baseline[n]) - statistics.fmean(changed[n]) for n in changed]
    return max(means) - min(means)


# %% WRONG exposure | counted in bits
# EXERCISE exposure
def exposure(log_probs, secret):
    own = log_probs[secret]
    rank = 1 + sum(x > own for x in log_probs) + (log_probs.count(own) - 1) / 2
    return math.log(len(log_probs)) - math.log(rank)


# %% WRONG exposure | not 0
# EXERCISE exposure
def exposure(log_probs, secret):
    own = log_probs[secret]
    rank = sum(x > own for x in log_probs) + (log_probs.count(own) - 1) / 2
    return math.log2(len(log_probs)) - math.log2(rank)


# %% WRONG exposure | the LIKELIEST code
# EXERCISE exposure
def exposure(log_probs, secret):
    own = log_probs[secret]
    rank = 1 + sum(x < own for x in log_probs) + (log_probs.count(own) - 1) / 2
    return math.log2(len(log_probs)) - math.log2(rank)


# %% WRONG exposure | the secret's surprise
# EXERCISE exposure
def exposure(log_probs, secret):
    return -log_probs[secret] / math.log(2)


# %% WRONG exposure | share their mean rank
# EXERCISE exposure
def exposure(log_probs, secret):
    rank = 1 + sorted(log_probs, reverse=True).index(log_probs[secret])
    return math.log2(len(log_probs)) - math.log2(rank)


# %% WRONG exposure | begin with log2
# EXERCISE exposure
def exposure(log_probs, secret):
    own = log_probs[secret]
    return -math.log2(1 + sum(x > own for x in log_probs) + (log_probs.count(own) - 1) / 2)


# %% WRONG attack_scores | a coin's toss
# EXERCISE attack_scores
def attack_scores(members, others, fpr):
    area = sum(m >= o for m in members for o in others) / (len(members) * len(others))
    best = 0.0
    for t in {*members, *others}:
        if sum(o >= t for o in others) / len(others) <= fpr:
            best = max(best, sum(m >= t for m in members) / len(members))
    return area, best


# %% WRONG attack_scores | minus the loss already
# EXERCISE attack_scores
def attack_scores(members, others, fpr):
    pairs = [(m < o) + (m == o) / 2 for m in members for o in others]
    best = 0.0
    for t in {*members, *others}:
        if sum(o <= t for o in others) / len(others) <= fpr:
            best = max(best, sum(m <= t for m in members) / len(members))
    return sum(pairs) / len(pairs), best


# %% WRONG attack_scores | at most, not below
# EXERCISE attack_scores
def attack_scores(members, others, fpr):
    pairs = [(m > o) + (m == o) / 2 for m in members for o in others]
    best = 0.0
    for t in {*members, *others}:
        if sum(o >= t for o in others) / len(others) < fpr:
            best = max(best, sum(m >= t for m in members) / len(members))
    return sum(pairs) / len(pairs), best


# %% WRONG attack_scores | accuses more of the others
# EXERCISE attack_scores
def attack_scores(members, others, fpr):
    pairs = [(m > o) + (m == o) / 2 for m in members for o in others]
    for t in sorted({*members, *others}, reverse=True):
        if sum(o >= t for o in others) / len(others) >= fpr:
            return sum(pairs) / len(pairs), sum(m >= t for m in members) / len(members)


# %% WRONG attack_scores | rate is that of the OTHERS
# EXERCISE attack_scores
def attack_scores(members, others, fpr):
    pairs = [(m > o) + (m == o) / 2 for m in members for o in others]
    best = 0.0
    for t in {*members, *others}:
        if sum(m >= t for m in members) / len(members) <= fpr:
            best = max(best, sum(o >= t for o in others) / len(others))
    return sum(pairs) / len(pairs), best


# %% WRONG clipped_noisy_gradient | the mean is clipped too late
# EXERCISE clipped_noisy_gradient
def clipped_noisy_gradient(gradients, noise, clip, sigma, expected):
    mean = gradients.sum(dim=0) / expected
    return mean * (clip / mean.norm()).clamp(max=1) + sigma * clip * noise / expected


# %% WRONG clipped_noisy_gradient | LENGTH of an example's gradient
# EXERCISE clipped_noisy_gradient
def clipped_noisy_gradient(gradients, noise, clip, sigma, expected):
    return (gradients.clamp(-clip, clip).sum(dim=0) + sigma * clip * noise) / expected


# %% WRONG clipped_noisy_gradient | shorter than clip
# EXERCISE clipped_noisy_gradient
def clipped_noisy_gradient(gradients, noise, clip, sigma, expected):
    total = (gradients / gradients.norm(dim=1, keepdim=True)).sum(dim=0) * clip
    return (total + sigma * clip * noise) / expected


# %% WRONG clipped_noisy_gradient | it grows with clip
# EXERCISE clipped_noisy_gradient
def clipped_noisy_gradient(gradients, noise, clip, sigma, expected):
    factors = (clip / gradients.norm(dim=1)).clamp(max=1)
    return (factors @ gradients + sigma * noise) / expected


# %% WRONG clipped_noisy_gradient | joins the SUM
# EXERCISE clipped_noisy_gradient
def clipped_noisy_gradient(gradients, noise, clip, sigma, expected):
    factors = (clip / gradients.norm(dim=1)).clamp(max=1)
    return factors @ gradients / expected + sigma * clip * noise


# %% WRONG clipped_noisy_gradient | divided by expected once
# EXERCISE clipped_noisy_gradient
def clipped_noisy_gradient(gradients, noise, clip, sigma, expected):
    factors = (clip / gradients.norm(dim=1)).clamp(max=1)
    return (factors @ gradients + sigma * clip * noise / expected) / expected


# %% WRONG clipped_noisy_gradient | EXPECTED batch size
# EXERCISE clipped_noisy_gradient
def clipped_noisy_gradient(gradients, noise, clip, sigma, expected):
    factors = (clip / gradients.norm(dim=1)).clamp(max=1)
    return (factors @ gradients + sigma * clip * noise) / len(gradients)


# %% WRONG best_design | begin with its student
# EXERCISE best_design
def best_design():
    return Design(bits=4, calibrated=True, draft_tokens=4)


# %% WRONG best_design | make the groups larger
# EXERCISE best_design
def best_design():
    return Design(model="lablm-small", bits=4, calibrated=True, draft_tokens=4)


# %% WRONG best_design | let GPTQ choose
# EXERCISE best_design
def best_design():
    return Design(model="lablm-small", bits=4, group_size=64, draft_tokens=4)


# %% WRONG best_design | too coarse here
# EXERCISE best_design
def best_design():
    return Design(model="lablm-small", bits=4, group_size=128, calibrated=True, draft_tokens=4)


# %% WRONG best_design | share one reading
# EXERCISE best_design
def best_design():
    return Design(model="lablm-small", bits=4, group_size=64, calibrated=True)
