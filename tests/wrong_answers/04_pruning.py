# %% WRONG explained_share | the article's coefficient
# EXERCISE explained_share
def explained_share(rows):
    gram = rows @ rows.T
    return gram / gram.diagonal()[:, None]


# %% WRONG explained_share | the cosine, and it can be negative
# EXERCISE explained_share
def explained_share(rows):
    unit = rows / rows.norm(dim=1, keepdim=True)
    return unit @ unit.T


# %% WRONG explained_share | one row only
# EXERCISE explained_share
def explained_share(rows):
    gram = rows @ rows.T
    return gram / gram.diagonal()[None, :]


# %% WRONG explained_share | stays unexplained
# EXERCISE explained_share
def explained_share(rows):
    unit = rows / rows.norm(dim=1, keepdim=True)
    return 1 - (unit @ unit.T) ** 2


# %% WRONG explained_share | compared the columns
# EXERCISE explained_share
def explained_share(rows):
    gram = rows.T @ rows
    power = gram.diagonal()
    return gram**2 / (power[:, None] * power[None, :])


# %% WRONG magnitude_mask | inverted
# EXERCISE magnitude_mask
def magnitude_mask(weight, sparsity):
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[weight.abs().flatten().argsort()[: round(sparsity * weight.numel())]] = True
    return mask.view_as(weight)


# %% WRONG magnitude_mask | signs were left in
# EXERCISE magnitude_mask
def magnitude_mask(weight, sparsity):
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    mask[weight.flatten().argsort()[: round(sparsity * weight.numel())]] = False
    return mask.view_as(weight)


# %% WRONG magnitude_mask | the largest went
# EXERCISE magnitude_mask
def magnitude_mask(weight, sparsity):
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    mask[weight.abs().flatten().argsort(descending=True)[: round(sparsity * weight.numel())]] = False
    return mask.view_as(weight)


# %% WRONG magnitude_mask | the whole layer competes
# EXERCISE magnitude_mask
def magnitude_mask(weight, sparsity):
    smallest = weight.abs().argsort(dim=1)[:, : round(sparsity * weight.shape[1])]
    return torch.ones_like(weight, dtype=torch.bool).scatter_(1, smallest, False)


# %% WRONG magnitude_mask | not the share kept
# EXERCISE magnitude_mask
def magnitude_mask(weight, sparsity):
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    mask[weight.abs().flatten().argsort()[: round((1 - sparsity) * weight.numel())]] = False
    return mask.view_as(weight)


# %% WRONG magnitude_mask | rank them, and count
# EXERCISE magnitude_mask
def magnitude_mask(weight, sparsity):
    return weight.abs() > sparsity * weight.abs().max()


# %% WRONG magnitude_mask | cut off, not rounded
# EXERCISE magnitude_mask
def magnitude_mask(weight, sparsity):
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    mask[weight.abs().flatten().argsort()[: int(sparsity * weight.numel())]] = False
    return mask.view_as(weight)


# %% WRONG wanda_mask | the norms were squared
# EXERCISE wanda_mask
def wanda_mask(weight, norms, sparsity):
    smallest = (weight.abs() * norms**2).argsort(dim=1)[:, : round(sparsity * weight.shape[1])]
    return torch.ones_like(weight, dtype=torch.bool).scatter_(1, smallest, False)


# %% WRONG wanda_mask | the whole layer competed
# EXERCISE wanda_mask
def wanda_mask(weight, norms, sparsity):
    scores = weight.abs() * norms
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort()[: round(sparsity * weight.numel())]] = False
    return mask.view_as(weight)


# %% WRONG wanda_mask | the inputs are missing
# EXERCISE wanda_mask
def wanda_mask(weight, norms, sparsity):
    smallest = weight.abs().argsort(dim=1)[:, : round(sparsity * weight.shape[1])]
    return torch.ones_like(weight, dtype=torch.bool).scatter_(1, smallest, False)


# %% WRONG wanda_mask | signs were left in
# EXERCISE wanda_mask
def wanda_mask(weight, norms, sparsity):
    smallest = (weight * norms).argsort(dim=1)[:, : round(sparsity * weight.shape[1])]
    return torch.ones_like(weight, dtype=torch.bool).scatter_(1, smallest, False)


# %% WRONG wanda_mask | you divided by the norms
# EXERCISE wanda_mask
def wanda_mask(weight, norms, sparsity):
    smallest = (weight.abs() / norms).argsort(dim=1)[:, : round(sparsity * weight.shape[1])]
    return torch.ones_like(weight, dtype=torch.bool).scatter_(1, smallest, False)


# %% WRONG wanda_mask | within each column
# EXERCISE wanda_mask
def wanda_mask(weight, norms, sparsity):
    smallest = (weight.abs() * norms).argsort(dim=0)[: round(sparsity * weight.shape[0])]
    return torch.ones_like(weight, dtype=torch.bool).scatter_(0, smallest, False)


# %% WRONG two_of_four | two smallest of each four
# EXERCISE two_of_four
def two_of_four(scores):
    fours = scores.reshape(-1, 4)
    smallest = fours.topk(2, dim=1, largest=False).indices
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(1, smallest, True).view_as(scores)


# %% WRONG two_of_four | half of each row
# EXERCISE two_of_four
def two_of_four(scores):
    largest = scores.topk(scores.shape[1] // 2, dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, largest, True)


# %% WRONG two_of_four | one of four
# EXERCISE two_of_four
def two_of_four(scores):
    fours = scores.reshape(-1, 4)
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(1, fours.argmax(dim=1)[:, None], True).view_as(scores)


# %% WRONG two_of_four | that is 4:8
# EXERCISE two_of_four
def two_of_four(scores):
    eights = scores.reshape(-1, 8)
    largest = eights.topk(4, dim=1).indices
    return torch.zeros_like(eights, dtype=torch.bool).scatter_(1, largest, True).view_as(scores)


# %% WRONG two_of_four | half of the layer
# EXERCISE two_of_four
def two_of_four(scores):
    largest = scores.flatten().topk(scores.numel() // 2).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[largest] = True
    return mask.view_as(scores)


# %% WRONG remove_one | nobody made up for it
# EXERCISE remove_one
def remove_one(weights, inverse, index):
    changed = weights.clone()
    changed[index] = 0
    return changed


# %% WRONG remove_one | the others moved the wrong way
# EXERCISE remove_one
def remove_one(weights, inverse, index):
    changed = weights + weights[index] / inverse[index, index] * inverse[index]
    changed[index] = 0
    return changed


# %% WRONG remove_one | so that the weight itself lands on 0
# EXERCISE remove_one
def remove_one(weights, inverse, index):
    changed = weights - weights[index] * inverse[index]
    changed[index] = 0
    return changed


# %% WRONG remove_one | inverted already
# EXERCISE remove_one
def remove_one(weights, inverse, index):
    h = torch.linalg.inv(inverse)
    changed = weights - weights[index] / h[index, index] * h[index]
    changed[index] = 0
    return changed


# %% WRONG remove_one | the weight doubled
# EXERCISE remove_one
def remove_one(weights, inverse, index):
    return weights + weights[index] / inverse[index, index] * inverse[index]


# %% WRONG prune_column | no column made up
# EXERCISE prune_column
def prune_column(weight, factor, column, gone):
    changed = weight.clone()
    changed[gone, column] = 0
    return changed


# %% WRONG prune_column | the wrong way
# EXERCISE prune_column
def prune_column(weight, factor, column, gone):
    errors = torch.where(gone, weight[:, column] / factor[column, column], 0.0)
    changed = weight + errors[:, None] * factor[column]
    changed[:, column] = torch.where(gone, 0.0, weight[:, column])
    return changed


# %% WRONG prune_column | divide by
# EXERCISE prune_column
def prune_column(weight, factor, column, gone):
    errors = torch.where(gone, weight[:, column], 0.0)
    changed = weight - errors[:, None] * factor[column]
    changed[:, column] = torch.where(gone, 0.0, weight[:, column])
    return changed


# %% WRONG prune_column | rows that keep their weight
# EXERCISE prune_column
def prune_column(weight, factor, column, gone):
    errors = weight[:, column] / factor[column, column]
    changed = weight - errors[:, None] * factor[column]
    changed[:, column] = torch.where(gone, 0.0, weight[:, column])
    return changed


# %% WRONG prune_column | was left out
# EXERCISE prune_column
def prune_column(weight, factor, column, gone):
    errors = torch.where(gone, weight[:, column] / factor[column, column], 0.0)
    changed = weight.clone()
    changed[:, column + 2 :] -= errors[:, None] * factor[column, column + 2 :]
    changed[gone, column] = 0
    return changed


# %% WRONG smaller_mlp | as they were
# EXERCISE smaller_mlp
def smaller_mlp(gate, up, down, gram, kept):
    return gate[kept], up[kept], down[:, kept]


# %% WRONG smaller_mlp | nothing was solved
# EXERCISE smaller_mlp
def smaller_mlp(gate, up, down, gram, kept):
    return gate[kept], up[kept], down @ gram[:, kept]


# %% WRONG smaller_mlp | as if it were alone
# EXERCISE smaller_mlp
def smaller_mlp(gate, up, down, gram, kept):
    return gate[kept], up[kept], down @ gram[:, kept] / gram[kept, kept]


# %% WRONG smaller_mlp | not the inverse of a part
# EXERCISE smaller_mlp
def smaller_mlp(gate, up, down, gram, kept):
    inverse = torch.linalg.inv(gram)
    return gate[kept], up[kept], down @ gram[:, kept] @ inverse[kept][:, kept]


# %% WRONG smaller_mlp | part is missing
# EXERCISE smaller_mlp
def smaller_mlp(gate, up, down, gram, kept):
    gone = torch.tensor([i for i in range(len(gate)) if i not in kept.tolist()])
    return gate[kept], up[kept], down[:, gone] @ gram[gone][:, kept] @ torch.linalg.inv(gram[kept][:, kept])


# %% WRONG smaller_mlp | take their rows
# EXERCISE smaller_mlp
def smaller_mlp(gate, up, down, gram, kept):
    solved = torch.linalg.solve(gram[kept][:, kept], down @ gram[:, kept], left=False)
    return gate[:, kept], up[:, kept], solved


# %% WRONG smaller_mlp | up still has every neuron
# EXERCISE smaller_mlp
def smaller_mlp(gate, up, down, gram, kept):
    return gate[kept], up, torch.linalg.solve(gram[kept][:, kept], down @ gram[:, kept], left=False)


# %% WRONG influence | how little it does
# EXERCISE influence
def influence(before, after):
    return torch.cosine_similarity(before, after, dim=-1).mean().item()


# %% WRONG influence | channel by channel
# EXERCISE influence
def influence(before, after):
    return 1 - torch.cosine_similarity(before, after, dim=0).mean().item()


# %% WRONG influence | one cosine over everything
# EXERCISE influence
def influence(before, after):
    return 1 - torch.cosine_similarity(before.flatten(), after.flatten(), dim=0).item()


# %% WRONG influence | size of the change
# EXERCISE influence
def influence(before, after):
    return ((after - before).norm() / before.norm()).item()


# %% WRONG influence | divide by both norms
# EXERCISE influence
def influence(before, after):
    return 1 - (before * after).sum(dim=-1).mean().item()


# %% WRONG head_budget | lost its last group
# EXERCISE head_budget
def head_budget(damage, kv_heads, remove):
    cost = damage.view(len(damage), kv_heads, -1).sum(-1)
    kept = torch.ones_like(cost, dtype=torch.bool).flatten()
    kept[cost.flatten().argsort()[:remove]] = False
    return kept.view_as(cost)


# %% WRONG head_budget | are neighbours
# EXERCISE head_budget
def head_budget(damage, kv_heads, remove):
    cost = damage.view(len(damage), -1, kv_heads).sum(1)
    cost[torch.arange(len(cost)), cost.argmax(dim=1)] = torch.inf
    kept = torch.ones_like(cost, dtype=torch.bool).flatten()
    kept[cost.flatten().argsort()[:remove]] = False
    return kept.view_as(cost)


# %% WRONG head_budget | add them up
# EXERCISE head_budget
def head_budget(damage, kv_heads, remove):
    cost = damage.view(len(damage), kv_heads, -1).amax(-1)
    cost[torch.arange(len(cost)), cost.argmax(dim=1)] = torch.inf
    kept = torch.ones_like(cost, dtype=torch.bool).flatten()
    kept[cost.flatten().argsort()[:remove]] = False
    return kept.view_as(cost)


# %% WRONG head_budget | inverted
# EXERCISE head_budget
def head_budget(damage, kv_heads, remove):
    cost = damage.view(len(damage), kv_heads, -1).sum(-1)
    cost[torch.arange(len(cost)), cost.argmax(dim=1)] = torch.inf
    gone = torch.zeros_like(cost, dtype=torch.bool).flatten()
    gone[cost.flatten().argsort()[:remove]] = True
    return gone.view_as(cost)


# %% WRONG head_budget | of all layers together
# EXERCISE head_budget
def head_budget(damage, kv_heads, remove):
    cost = damage.view(len(damage), kv_heads, -1).sum(-1)
    kept = torch.ones_like(cost, dtype=torch.bool)
    while (~kept).sum() < remove:
        for i in range(len(cost)):
            if (~kept).sum() < remove and kept[i].sum() > 1:
                kept[i, torch.where(kept[i], cost[i], torch.inf).argmin()] = False
    return kept
