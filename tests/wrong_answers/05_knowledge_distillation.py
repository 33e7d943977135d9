import torch


# %% WRONG soft_loss | the article's loss
# EXERCISE soft_loss
def soft_loss(student_logits, teacher_logits):
    p = torch.softmax(student_logits, dim=-1)
    return -(p * p.log()).sum(-1).mean()


# %% WRONG soft_loss | the other way round
# EXERCISE soft_loss
def soft_loss(student_logits, teacher_logits):
    student = torch.log_softmax(student_logits, dim=-1)
    wanted = torch.log_softmax(teacher_logits, dim=-1)
    return (student.exp() * (student - wanted)).sum(-1).mean()


# %% WRONG soft_loss | the cross-entropy
# EXERCISE soft_loss
def soft_loss(student_logits, teacher_logits):
    wanted = torch.softmax(teacher_logits, dim=-1)
    return -(wanted * torch.log_softmax(student_logits, dim=-1)).sum(-1).mean()


# %% WRONG soft_loss | summed over the positions
# EXERCISE soft_loss
def soft_loss(student_logits, teacher_logits):
    student = torch.log_softmax(student_logits, dim=-1)
    wanted = torch.log_softmax(teacher_logits, dim=-1)
    return (wanted.exp() * (wanted - student)).sum()


# %% WRONG soft_loss | averaged over the vocabulary
# EXERCISE soft_loss
def soft_loss(student_logits, teacher_logits):
    student = torch.log_softmax(student_logits, dim=-1)
    wanted = torch.log_softmax(teacher_logits, dim=-1)
    return (wanted.exp() * (wanted - student)).mean()


# %% WRONG soft_loss | LOGARITHMS
# EXERCISE soft_loss
def soft_loss(student_logits, teacher_logits):
    student = torch.softmax(student_logits, dim=-1)
    wanted = torch.softmax(teacher_logits, dim=-1)
    return torch.nn.functional.kl_div(student, wanted, reduction="batchmean")


# %% WRONG soft_loss | cut the student off
# EXERCISE soft_loss
def soft_loss(student_logits, teacher_logits):
    student = torch.log_softmax(student_logits, dim=-1)
    wanted = torch.log_softmax(teacher_logits, dim=-1)
    return (wanted.exp() * (wanted - student)).sum(-1).mean().item()


# %% WRONG soften | must flatten
# EXERCISE soften
def soften(logits, temperature):
    return torch.softmax(logits * temperature, dim=-1)


# %% WRONG soften | no longer sum to 1
# EXERCISE soften
def soften(logits, temperature):
    return torch.softmax(logits, dim=-1) / temperature


# %% WRONG soften | the wrong axis
# EXERCISE soften
def soften(logits, temperature):
    return torch.softmax(logits / temperature, dim=0)


# %% WRONG soften | still logits
# EXERCISE soften
def soften(logits, temperature):
    return logits / temperature


# %% WRONG hinton_loss | cut the student off
# EXERCISE hinton_loss
def hinton_loss(student_logits, teacher_logits, labels, temperature, soft):
    student = torch.log_softmax(student_logits.detach() / temperature, dim=-1)
    wanted = torch.log_softmax(teacher_logits / temperature, dim=-1)
    kd = temperature**2 * (wanted.exp() * (wanted - student)).sum(-1).mean()
    return soft * kd + (1 - soft) * torch.nn.functional.cross_entropy(student_logits.detach(), labels)


# %% WRONG hinton_loss | T² is missing
# EXERCISE hinton_loss
def hinton_loss(student_logits, teacher_logits, labels, temperature, soft):
    student = torch.log_softmax(student_logits / temperature, dim=-1)
    wanted = torch.log_softmax(teacher_logits / temperature, dim=-1)
    kd = (wanted.exp() * (wanted - student)).sum(-1).mean()
    return soft * kd + (1 - soft) * torch.nn.functional.cross_entropy(student_logits, labels)


# %% WRONG hinton_loss | T where T² belongs
# EXERCISE hinton_loss
def hinton_loss(student_logits, teacher_logits, labels, temperature, soft):
    student = torch.log_softmax(student_logits / temperature, dim=-1)
    wanted = torch.log_softmax(teacher_logits / temperature, dim=-1)
    kd = temperature * (wanted.exp() * (wanted - student)).sum(-1).mean()
    return soft * kd + (1 - soft) * torch.nn.functional.cross_entropy(student_logits, labels)


# %% WRONG hinton_loss | only the student was softened
# EXERCISE hinton_loss
def hinton_loss(student_logits, teacher_logits, labels, temperature, soft):
    student = torch.log_softmax(student_logits / temperature, dim=-1)
    wanted = torch.log_softmax(teacher_logits, dim=-1)
    kd = temperature**2 * (wanted.exp() * (wanted - student)).sum(-1).mean()
    return soft * kd + (1 - soft) * torch.nn.functional.cross_entropy(student_logits, labels)


# %% WRONG hinton_loss | the hard part was softened too
# EXERCISE hinton_loss
def hinton_loss(student_logits, teacher_logits, labels, temperature, soft):
    student = torch.log_softmax(student_logits / temperature, dim=-1)
    wanted = torch.log_softmax(teacher_logits / temperature, dim=-1)
    kd = temperature**2 * (wanted.exp() * (wanted - student)).sum(-1).mean()
    return soft * kd + (1 - soft) * torch.nn.functional.nll_loss(student, labels)


# %% WRONG hinton_loss | the weights are swapped
# EXERCISE hinton_loss
def hinton_loss(student_logits, teacher_logits, labels, temperature, soft):
    student = torch.log_softmax(student_logits / temperature, dim=-1)
    wanted = torch.log_softmax(teacher_logits / temperature, dim=-1)
    kd = temperature**2 * (wanted.exp() * (wanted - student)).sum(-1).mean()
    return (1 - soft) * kd + soft * torch.nn.functional.cross_entropy(student_logits, labels)


# %% WRONG jensen_shannon | Jeffreys
# EXERCISE jensen_shannon
def jensen_shannon(student_probs, teacher_probs):
    one = (teacher_probs * (teacher_probs / student_probs).log()).sum(-1)
    return (one + (student_probs * (student_probs / teacher_probs).log()).sum(-1)) / 2


# %% WRONG jensen_shannon | halve it
# EXERCISE jensen_shannon
def jensen_shannon(student_probs, teacher_probs):
    m = (student_probs + teacher_probs) / 2
    return sum((p * (p / m).log()).sum(-1) for p in (teacher_probs, student_probs))


# %% WRONG jensen_shannon | only the teacher was compared
# EXERCISE jensen_shannon
def jensen_shannon(student_probs, teacher_probs):
    m = (student_probs + teacher_probs) / 2
    return (teacher_probs * (teacher_probs / m).log()).sum(-1) / 2


# %% WRONG jensen_shannon | geometric mean
# EXERCISE jensen_shannon
def jensen_shannon(student_probs, teacher_probs):
    m = (student_probs * teacher_probs).sqrt()
    return sum((p * (p / m).log()).sum(-1) for p in (teacher_probs, student_probs)) / 2


# %% WRONG jensen_shannon | in bits
# EXERCISE jensen_shannon
def jensen_shannon(student_probs, teacher_probs):
    m = (student_probs + teacher_probs) / 2
    return sum((p * (p / m).log2()).sum(-1) for p in (teacher_probs, student_probs)) / 2


# %% WRONG bucket_loss | the rest is missing
# EXERCISE bucket_loss
def bucket_loss(student_logits, ids, probs):
    return -(probs * torch.log_softmax(student_logits, dim=-1).gather(-1, ids)).sum(-1)


# %% WRONG bucket_loss | rescaled to 1
# EXERCISE bucket_loss
def bucket_loss(student_logits, ids, probs):
    probs = probs / probs.sum(-1, keepdim=True)
    return -(probs * torch.log_softmax(student_logits, dim=-1).gather(-1, ids)).sum(-1)


# %% WRONG bucket_loss | saw only the stored tokens
# EXERCISE bucket_loss
def bucket_loss(student_logits, ids, probs):
    return -(probs * torch.log_softmax(student_logits.gather(-1, ids), dim=-1)).sum(-1)


# %% WRONG bucket_loss | the STUDENT's
# EXERCISE bucket_loss
def bucket_loss(student_logits, ids, probs):
    stored = torch.log_softmax(student_logits, dim=-1).gather(-1, ids)
    rest = 1 - probs.sum(-1)
    return -(probs * stored).sum(-1) - rest * rest.log()


# %% WRONG bucket_loss | wrong sign
# EXERCISE bucket_loss
def bucket_loss(student_logits, ids, probs):
    stored = torch.log_softmax(student_logits, dim=-1).gather(-1, ids)
    return -(probs * stored).sum(-1) + (1 - probs.sum(-1)) * (1 - stored.exp().sum(-1)).log()


# %% WRONG mean_where_counted | padding and prompt were counted
# EXERCISE mean_where_counted
def mean_where_counted(values, labels):
    return values.mean()


# %% WRONG mean_where_counted | divided by all positions
# EXERCISE mean_where_counted
def mean_where_counted(values, labels):
    return (values * (labels[:, 1:] != -100)).mean()


# %% WRONG mean_where_counted | off by one
# EXERCISE mean_where_counted
def mean_where_counted(values, labels):
    return values[labels[:, :-1] != -100].mean()


# %% WRONG mean_where_counted | each row's mean
# EXERCISE mean_where_counted
def mean_where_counted(values, labels):
    counts = (labels[:, 1:] != -100).float()
    return ((values * counts).sum(1) / counts.sum(1)).mean()


# %% WRONG mean_where_counted | the mask is inverted
# EXERCISE mean_where_counted
def mean_where_counted(values, labels):
    return values[labels[:, 1:] == -100].mean()


# %% WRONG hidden_distance | as nn.Linear stores it
# EXERCISE hidden_distance
def hidden_distance(student, teacher, projection):
    return ((student @ projection - teacher) ** 2).mean() / (teacher**2).mean()


# %% WRONG hidden_distance | loud layers
# EXERCISE hidden_distance
def hidden_distance(student, teacher, projection):
    return ((student @ projection.T - teacher) ** 2).mean()


# %% WRONG hidden_distance | win by growing
# EXERCISE hidden_distance
def hidden_distance(student, teacher, projection):
    projected = student @ projection.T
    return ((projected - teacher) ** 2).mean() / (projected**2).mean()


# %% WRONG hidden_distance | the root
# EXERCISE hidden_distance
def hidden_distance(student, teacher, projection):
    return (student @ projection.T - teacher).norm() / teacher.norm()


# %% WRONG acceptance | two independent draws
# EXERCISE acceptance
def acceptance(draft_probs, target_probs):
    return (draft_probs * target_probs).sum(-1).mean()


# %% WRONG acceptance | the share refused
# EXERCISE acceptance
def acceptance(draft_probs, target_probs):
    return (draft_probs - target_probs).abs().sum(-1).mean() / 2


# %% WRONG acceptance | agreement of the favourites
# EXERCISE acceptance
def acceptance(draft_probs, target_probs):
    return (draft_probs.argmax(-1) == target_probs.argmax(-1)).float().mean()


# %% WRONG acceptance | averaged over the vocabulary
# EXERCISE acceptance
def acceptance(draft_probs, target_probs):
    return torch.minimum(draft_probs, target_probs).mean()
