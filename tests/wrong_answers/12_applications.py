# %% WRONG keeps_metric | a mean alone
# EXERCISE keeps_metric
def keeps_metric(changed, baseline, margin):
    gap = sum(changed) / len(changed) - sum(baseline) / len(baseline)
    return "keeps" if gap >= -margin else "loses"


# %% WRONG keeps_metric | zero inside the interval
# EXERCISE keeps_metric
def keeps_metric(changed, baseline, margin):
    gaps = [new - old for new, old in zip(changed, baseline, strict=True)]
    mean, n = statistics.fmean(gaps), len(gaps)
    half = max(1.96 * statistics.stdev(gaps) / n**0.5, 3 / n)
    return "keeps" if mean - half <= 0 <= mean + half else "loses"


# %% WRONG keeps_metric | deviation of the differences
# EXERCISE keeps_metric
def keeps_metric(changed, baseline, margin):
    n = len(changed)
    mean = statistics.fmean(changed) - statistics.fmean(baseline)
    half = max(1.96 * ((statistics.variance(changed) + statistics.variance(baseline)) / n) ** 0.5, 3 / n)
    if mean - half >= -margin:
        return "keeps"
    return "loses" if mean + half < -margin else "unsure"


# %% WRONG keeps_metric | no width
# EXERCISE keeps_metric
def keeps_metric(changed, baseline, margin):
    gaps = [new - old for new, old in zip(changed, baseline, strict=True)]
    mean, half = statistics.fmean(gaps), 1.96 * statistics.stdev(gaps) / len(gaps) ** 0.5
    if mean - half >= -margin:
        return "keeps"
    return "loses" if mean + half < -margin else "unsure"


# %% WRONG keeps_metric | root of n
# EXERCISE keeps_metric
def keeps_metric(changed, baseline, margin):
    gaps = [new - old for new, old in zip(changed, baseline, strict=True)]
    mean, n = statistics.fmean(gaps), len(gaps)
    half = max(1.96 * statistics.stdev(gaps), 3 / n)
    if mean - half >= -margin:
        return "keeps"
    return "loses" if mean + half < -margin else "unsure"


# %% WRONG keeps_metric | a loss is negative
# EXERCISE keeps_metric
def keeps_metric(changed, baseline, margin):
    gaps = [old - new for new, old in zip(changed, baseline, strict=True)]
    mean, n = statistics.fmean(gaps), len(gaps)
    half = max(1.96 * statistics.stdev(gaps) / n**0.5, 3 / n)
    if mean - half >= -margin:
        return "keeps"
    return "loses" if mean + half < -margin else "unsure"


# %% WRONG macro_f1 | accuracy
# EXERCISE macro_f1
def macro_f1(predicted, expected):
    return sum(p == e for p, e in zip(predicted, expected, strict=True)) / len(expected)


# %% WRONG macro_f1 | weighted by class size
# EXERCISE macro_f1
def macro_f1(predicted, expected):
    total = 0.0
    for c in set(expected):
        right = sum(p == e == c for p, e in zip(predicted, expected, strict=True))
        total += expected.count(c) * 2 * right / (predicted.count(c) + expected.count(c))
    return total / len(expected)


# %% WRONG macro_f1 | only predicted
# EXERCISE macro_f1
def macro_f1(predicted, expected):
    total = 0.0
    for c in set(expected):
        right = sum(p == e == c for p, e in zip(predicted, expected, strict=True))
        total += 2 * right / (predicted.count(c) + expected.count(c))
    return total / len(set(expected))


# %% WRONG macro_f1 | that is recall
# EXERCISE macro_f1
def macro_f1(predicted, expected):
    classes = set(predicted) | set(expected)
    total = 0.0
    for c in classes:
        right = sum(p == e == c for p, e in zip(predicted, expected, strict=True))
        total += right / expected.count(c) if c in expected else 0.0
    return total / len(classes)


# %% WRONG macro_f1 | F1 of mean precision
# EXERCISE macro_f1
def macro_f1(predicted, expected):
    classes = set(predicted) | set(expected)
    precision = recall = 0.0
    for c in classes:
        right = sum(p == e == c for p, e in zip(predicted, expected, strict=True))
        precision += right / predicted.count(c) / len(classes) if c in predicted else 0.0
        recall += right / expected.count(c) / len(classes) if c in expected else 0.0
    return 2 * precision * recall / (precision + recall)


# %% WRONG span_f1 | the label counts
# EXERCISE span_f1
def span_f1(predicted, expected):
    right = sum(len({s[:2] for s in p} & {s[:2] for s in e}) for p, e in zip(predicted, expected, strict=True))
    total = sum(map(len, predicted)) + sum(map(len, expected))
    return 2 * right / total if total else 1.0


# %% WRONG span_f1 | only overlaps
# EXERCISE span_f1
def span_f1(predicted, expected):
    right = 0
    for p, e in zip(predicted, expected, strict=True):
        right += sum(any(a < d and c < b and kind == other for c, d, other in e) for a, b, kind in p)
    total = sum(map(len, predicted)) + sum(map(len, expected))
    return 2 * right / total if total else 1.0


# %% WRONG span_f1 | mean of texts
# EXERCISE span_f1
def span_f1(predicted, expected):
    each = [2 * len(p & e) / (len(p) + len(e)) if p or e else 1.0 for p, e in zip(predicted, expected, strict=True)]
    return sum(each) / len(each)


# %% WRONG span_f1 | intersect text by text
# EXERCISE span_f1
def span_f1(predicted, expected):
    p, e = set().union(*predicted), set().union(*expected)
    return 2 * len(p & e) / (len(p) + len(e)) if p or e else 1.0


# %% WRONG span_f1 | is right: 1.0
# EXERCISE span_f1
def span_f1(predicted, expected):
    right = sum(len(p & e) for p, e in zip(predicted, expected, strict=True))
    total = sum(map(len, predicted)) + sum(map(len, expected))
    return 2 * right / total if total else 0.0


# %% WRONG choice_probs | favours long choices
# EXERCISE choice_probs
def choice_probs(token_log_probs):
    import math

    means = [sum(row) / len(row) for row in token_log_probs]
    parts = [math.exp(m - max(means)) for m in means]
    return [part / sum(parts) for part in parts]


# %% WRONG choice_probs | divide by their sum
# EXERCISE choice_probs
def choice_probs(token_log_probs):
    import math

    return [math.exp(sum(row)) for row in token_log_probs]


# %% WRONG choice_probs | first token is not the choice
# EXERCISE choice_probs
def choice_probs(token_log_probs):
    import math

    parts = [math.exp(row[0] - max(r[0] for r in token_log_probs)) for row in token_log_probs]
    return [part / sum(parts) for part in parts]


# %% WRONG choice_probs | multiplied, not added
# EXERCISE choice_probs
def choice_probs(token_log_probs):
    import math

    parts = [sum(math.exp(value) for value in row) for row in token_log_probs]
    return [part / sum(parts) for part in parts]


# %% WRONG choice_probs | subtract the largest
# EXERCISE choice_probs
def choice_probs(token_log_probs):
    import math

    parts = [math.exp(sum(row)) for row in token_log_probs]
    return [part / sum(parts) for part in parts]


# %% WRONG search_cells | reads every vector
# EXERCISE search_cells
def search_cells(query, centres, cells, vectors, count, near):
    return (vectors @ query).topk(count).indices.tolist()


# %% WRONG search_cells | not only the nearest one
# EXERCISE search_cells
def search_cells(query, centres, cells, vectors, count, near):
    candidates = cells[int((centres @ query).argmax())]
    return sorted(candidates, key=lambda i: -float(vectors[i] @ query))[:count]


# %% WRONG search_cells | positions among the candidates
# EXERCISE search_cells
def search_cells(query, centres, cells, vectors, count, near):
    candidates = [i for c in (centres @ query).topk(near).indices.tolist() for i in cells[c]]
    return (vectors[candidates] @ query).topk(min(count, len(candidates))).indices.tolist()


# %% WRONG search_cells | LARGE inner product
# EXERCISE search_cells
def search_cells(query, centres, cells, vectors, count, near):
    candidates = [i for c in (centres @ query).argsort()[:near].tolist() for i in cells[c]]
    return sorted(candidates, key=lambda i: -float(vectors[i] @ query))[:count]


# %% WRONG search_cells | the best comes first
# EXERCISE search_cells
def search_cells(query, centres, cells, vectors, count, near):
    candidates = [i for c in (centres @ query).topk(near).indices.tolist() for i in cells[c]]
    return candidates[:count]


# %% WRONG chrf | recall counts more
# EXERCISE chrf
def chrf(hypothesis, reference, longest=6):
    texts = ["".join(text.split()) for text in (hypothesis, reference)]
    precisions, recalls = [], []
    for n in range(1, longest + 1):
        h, r = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in texts)
        if h and r:
            precisions.append((h & r).total() / h.total())
            recalls.append((h & r).total() / r.total())
    if not any(precisions):
        return 0.0
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 2 * p * r / (p + r)


# %% WRONG chrf | beta is squared
# EXERCISE chrf
def chrf(hypothesis, reference, longest=6):
    texts = ["".join(text.split()) for text in (hypothesis, reference)]
    precisions, recalls = [], []
    for n in range(1, longest + 1):
        h, r = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in texts)
        if h and r:
            precisions.append((h & r).total() / h.total())
            recalls.append((h & r).total() / r.total())
    if not any(precisions):
        return 0.0
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 3 * p * r / (2 * p + r)


# %% WRONG chrf | white space does not count
# EXERCISE chrf
def chrf(hypothesis, reference, longest=6):
    precisions, recalls = [], []
    for n in range(1, longest + 1):
        h, r = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (hypothesis, reference))
        if h and r:
            precisions.append((h & r).total() / h.total())
            recalls.append((h & r).total() / r.total())
    if not any(precisions):
        return 0.0
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 5 * p * r / (4 * p + r)


# %% WRONG chrf | at most as often
# EXERCISE chrf
def chrf(hypothesis, reference, longest=6):
    texts = ["".join(text.split()) for text in (hypothesis, reference)]
    precisions, recalls = [], []
    for n in range(1, longest + 1):
        h, r = ([text[i : i + n] for i in range(len(text) - n + 1)] for text in texts)
        if h and r:
            match = sum(gram in r for gram in h)
            precisions.append(match / len(h))
            recalls.append(match / len(r))
    if not any(precisions):
        return 0.0
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 5 * p * r / (4 * p + r)


# %% WRONG chrf | HYPOTHESIS
# EXERCISE chrf
def chrf(hypothesis, reference, longest=6):
    texts = ["".join(text.split()) for text in (hypothesis, reference)]
    precisions, recalls = [], []
    for n in range(1, longest + 1):
        h, r = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in texts)
        if h and r:
            precisions.append((h & r).total() / r.total())
            recalls.append((h & r).total() / h.total())
    if not any(precisions):
        return 0.0
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 5 * p * r / (4 * p + r)


# %% WRONG chrf | average P and R over n first
# EXERCISE chrf
def chrf(hypothesis, reference, longest=6):
    texts = ["".join(text.split()) for text in (hypothesis, reference)]
    each = []
    for n in range(1, longest + 1):
        h, r = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in texts)
        if h and r:
            p, q = (h & r).total() / h.total(), (h & r).total() / r.total()
            each.append(5 * p * q / (4 * p + q) if p else 0.0)
    return sum(each) / len(each) if any(each) else 0.0


# %% WRONG word_error_rate | rate of characters
# EXERCISE word_error_rate
def word_error_rate(said, heard):
    above = list(range(len(heard) + 1))
    for i, a in enumerate(said, start=1):
        row = [i]
        for j, b in enumerate(heard, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
        above = row
    return above[-1] / len(said)


# %% WRONG word_error_rate | place by place
# EXERCISE word_error_rate
def word_error_rate(said, heard):
    a, b = said.split(), heard.split()
    return (sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))) / len(a)


# %% WRONG word_error_rate | words that were SAID
# EXERCISE word_error_rate
def word_error_rate(said, heard):
    a, b = said.split(), heard.split()
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
        above = row
    return above[-1] / max(len(b), 1)


# %% WRONG word_error_rate | inserted words are errors
# EXERCISE word_error_rate
def word_error_rate(said, heard):
    a, b = said.split(), heard.split()
    above = [0] * (len(b) + 1)
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1], above[j - 1] + (x != y)))
        above = row
    return above[-1] / len(a)


# %% WRONG word_error_rate | do not cut at 1
# EXERCISE word_error_rate
def word_error_rate(said, heard):
    a, b = said.split(), heard.split()
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
        above = row
    return min(above[-1] / len(a), 1.0)


# %% WRONG collapse | BEFORE you drop blanks
# EXERCISE collapse
def collapse(ids, blank):
    kept = [i for i in ids if i != blank]
    return [i for k, i in enumerate(kept) if k == 0 or i != kept[k - 1]]


# %% WRONG collapse | merge neighbours first
# EXERCISE collapse
def collapse(ids, blank):
    return [i for i in ids if i != blank]


# %% WRONG collapse | a blank is no letter
# EXERCISE collapse
def collapse(ids, blank):
    return [i for k, i in enumerate(ids) if k == 0 or i != ids[k - 1]]


# %% WRONG collapse | only NEIGHBOURS merge
# EXERCISE collapse
def collapse(ids, blank):
    return list(dict.fromkeys(i for i in ids if i != blank))


# %% WRONG collapse | not always 0
# EXERCISE collapse
def collapse(ids, blank):
    merged = [i for k, i in enumerate(ids) if k == 0 or i != ids[k - 1]]
    return [i for i in merged if i]


# %% WRONG commit | may still change
# EXERCISE commit
def commit(done, before, now):
    return now


# %% WRONG commit | what was shown stays
# EXERCISE commit
def commit(done, before, now):
    words = []
    for a, b in zip(before.split(), now.split(), strict=False):
        if a != b:
            break
        words.append(a)
    return " ".join(words)


# %% WRONG commit | compare words, not letters
# EXERCISE commit
def commit(done, before, now):
    count = 0
    while count < min(len(before), len(now)) and before[count] == now[count]:
        count += 1
    return now[: max(count, len(done))]


# %% WRONG commit | common BEGINNING
# EXERCISE commit
def commit(done, before, now):
    words = [a for a, b in zip(before.split(), now.split(), strict=False) if a == b]
    kept = done.split()
    return " ".join(words) if len(words) > len(kept) and words[: len(kept)] == kept else done


# %% WRONG commit | contradicts what was shown
# EXERCISE commit
def commit(done, before, now):
    words = []
    for a, b in zip(before.split(), now.split(), strict=False):
        if a != b:
            break
        words.append(a)
    return " ".join(words) if len(words) > len(done.split()) else done


# %% WRONG noise_gain | 20 belongs to a ratio of amplitudes
# EXERCISE noise_gain
def noise_gain(speech, noise, snr_db):
    powers = [sum(x * x for x in part) / len(part) for part in (speech, noise)]
    return (powers[0] / powers[1] / 10 ** (snr_db / 20)) ** 0.5


# %% WRONG noise_gain | take the square root
# EXERCISE noise_gain
def noise_gain(speech, noise, snr_db):
    powers = [sum(x * x for x in part) / len(part) for part in (speech, noise)]
    return powers[0] / powers[1] / 10 ** (snr_db / 10)


# %% WRONG noise_gain | a peak is no power
# EXERCISE noise_gain
def noise_gain(speech, noise, snr_db):
    peaks = [max(abs(x) for x in part) for part in (speech, noise)]
    return peaks[0] / peaks[1] / 10 ** (snr_db / 20)


# %% WRONG noise_gain | LESS noise
# EXERCISE noise_gain
def noise_gain(speech, noise, snr_db):
    powers = [sum(x * x for x in part) / len(part) for part in (speech, noise)]
    return (powers[0] / powers[1] * 10 ** (snr_db / 10)) ** 0.5


# %% WRONG noise_gain | not their sum
# EXERCISE noise_gain
def noise_gain(speech, noise, snr_db):
    energies = [sum(x * x for x in part) for part in (speech, noise)]
    return (energies[0] / energies[1] / 10 ** (snr_db / 10)) ** 0.5
