"""A small recogniser of our own: a time-delay network over log-mel frames, trained by CTC, read by greedy collapse.

CTC (Graves et al. 2006) lets a network write a character or a *blank* in every frame. Collapsing repeats, then dropping
blanks, gives the text; the loss is −ln of the probability of all the ways that collapse to it. Each layer of the
network looks at three frames, further and further apart (Waibel et al. 1989; Peddinti et al. 2015). All its weights
stand in linear layers, which `labutils.quantization` and `labutils.pruning` can take.
"""

from collections.abc import Callable, Sequence
from random import Random

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import ctc_loss, pad, relu

from labutils.speech.features import DEFAULT

BLANK = 0
ALPHABET = " 'abcdefghijklmnopqrstuvwxyz"  # ids from 1
STRIDE = 2  # the network writes once in two frames: every 20 ms
Utterance = tuple[Float[Tensor, "frames bands"], str]


def encode(text: str) -> list[int]:
    """Ids of a text's characters.

    Raises:
        ValueError: when one is not in `ALPHABET`.

    >>> encode("a b")
    [3, 1, 4]
    """
    unknown = sorted(set(text) - set(ALPHABET))
    if unknown:
        raise ValueError(f"text must be lower-case letters, spaces and apostrophes; got {unknown[0]!r}")
    return [ALPHABET.index(char) + 1 for char in text]


def collapse(ids: Sequence[int], blank: int = BLANK) -> list[int]:
    """Merges neighbours that repeat, then drops blanks: a blank between them keeps a doubled letter double.

    >>> collapse([0, 3, 3, 0, 3, 4, 0])
    [3, 3, 4]
    """
    return [new for old, new in zip([blank, *ids], ids, strict=False) if new != old and new != blank]


def splice(frames: Float[Tensor, "batch frames n"], reach: int, gap: int) -> Float[Tensor, "batch frames spliced"]:
    """Each frame beside its `reach` neighbours on either side, `gap` frames apart; zeros beyond the ends.

    >>> splice(torch.tensor([[[1.0], [2.0], [3.0]]]), 1, 1)
    tensor([[[0., 1., 2.],
             [1., 2., 3.],
             [2., 3., 0.]]])
    """
    width = reach * gap
    padded, count = pad(frames, (0, 0, width, width)), frames.shape[1]
    return torch.cat([padded[:, i * gap : i * gap + count] for i in range(2 * reach + 1)], dim=2)


class TimeDelayNet(nn.Module):
    """Five frames of log-mel, then layers of three frames with residuals, then logits of the blank and the characters.

    Args:
        width: numbers per frame inside.
        gaps: how far apart the frames of each layer are; their sum is how far the network looks ahead, in 20 ms.
    """

    def __init__(self, width: int = 160, gaps: Sequence[int] = (1, 1, 2, 2, 4, 4)) -> None:
        super().__init__()
        self.gaps = tuple(gaps)
        self.first = nn.Linear(5 * DEFAULT.bands, width)
        self.layers = nn.ModuleList(nn.Linear(3 * width, width) for _ in gaps)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in gaps)
        self.head = nn.Linear(width, 1 + len(ALPHABET))

    def forward(
        self, features: Float[Tensor, "batch frames bands"], lengths: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch written chars"], Int[Tensor, " batch"]]:
        """Logits once in `STRIDE` frames, and how many of each row count; padding after a row's end has no effect."""
        written = (lengths + STRIDE - 1) // STRIDE
        x = splice(features, 2, 1)[:, ::STRIDE]
        within = (torch.arange(x.shape[1]) < written[:, None])[..., None]
        x = relu(self.first(x)) * within
        for gap, layer, norm in zip(self.gaps, self.layers, self.norms, strict=True):
            x = (x + relu(layer(splice(norm(x) * within, 1, gap)))) * within
        return self.head(x), written


def batched(
    rows: Sequence[Float[Tensor, "_ bands"]],
) -> tuple[Float[Tensor, "batch frames bands"], Int[Tensor, " batch"]]:
    """Features of several utterances as one tensor, padded with zeros, and their lengths."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True), torch.tensor([len(row) for row in rows])


def utterance_loss(model: nn.Module, utterances: Sequence[Utterance]) -> Float[Tensor, ""]:
    """Mean of −ln p(text | sound) per character."""
    logits, lengths = model(*batched([features for features, _ in utterances]))
    texts = [torch.tensor(encode(text)) for _, text in utterances]
    sizes = torch.tensor([len(text) for text in texts])
    log_probs = logits.log_softmax(dim=2).transpose(0, 1)
    total = ctc_loss(log_probs, torch.cat(texts), lengths, sizes, blank=BLANK, reduction="sum", zero_infinity=True)
    return total / sizes.sum()


def train_(
    model: nn.Module,
    utterances: Sequence[Utterance],
    *,
    steps: int,
    lr: float = 2e-3,
    batch: int = 16,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> None:
    """Trains on random batches of similar length: AdamW, the learning rate up for a tenth of the steps, then down."""
    rng, optimizer = Random(seed), torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    ordered = sorted(utterances, key=lambda utterance: len(utterance[0]))
    model.train()
    for step in range(1, steps + 1):
        start = rng.randrange(max(len(ordered) - batch, 0) + 1)
        loss = utterance_loss(model, [(masked(f, rng), text) for f, text in ordered[start : start + batch]])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            log(f"step {step}: {loss.item():.3f} nats per character")
    model.eval()


def masked(features: Float[Tensor, "frames bands"], rng: Random) -> Float[Tensor, "frames bands"]:
    """A copy with a few bands and a few frames set to 0, their mean (SpecAugment; Park et al. 2019)."""
    changed = features.clone()
    band, frame = rng.randrange(features.shape[1]), rng.randrange(features.shape[0])
    changed[:, band : band + rng.randrange(7)] = 0
    changed[frame : frame + rng.randrange(15)] = 0
    return changed


@torch.no_grad()
def transcribe(model: nn.Module, features: Float[Tensor, "frames bands"]) -> str:
    """The text of the likeliest character in each frame, collapsed."""
    logits, _ = model(*batched([features]))
    return "".join(ALPHABET[i - 1] for i in collapse(logits[0].argmax(dim=1).tolist())).strip()
