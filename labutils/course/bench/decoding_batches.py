"""The batches of `bench decoding`: drafts for 4 and 8 streams at once, against plain decoding of as many."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from labutils.course.bench.decoding_ways import BATCHES, Settings
from labutils.decoding.proposers import NoDraft, Proposer
from labutils.lab.models.served import paged_llama
from labutils.measurement.timing import measure_interleaved, paired_ratio
from labutils.serving.paged import PagedLlama, slots
from labutils.serving.scheduler import Step
from labutils.serving.speculate import generate_speculative_batch

KINDS = ("qa", "code")


class RememberingPaged:
    """A paged decoder that reads each prompt once: the second time its keys and values are put back."""

    def __init__(self, model: PagedLlama) -> None:
        self.model, self.blocks, self.block_size = model, model.blocks, model.block_size
        self.read, self.logits = model.read, model.logits
        self.known: dict[tuple[int, ...], tuple] = {}

    def __call__(self, step: Step) -> Tensor:
        """The logits after one prompt, and its keys and values in the blocks of its table."""
        (chunk,), decoder = step.chunks, self.model.decoder
        key, places = tuple(chunk.request.token_ids), slots(chunk.request.table, chunk.end, self.block_size)
        if key not in self.known:
            logits = self.model(step)
            self.known[key] = (decoder.keys[:, :, places].copy(), decoder.values[:, :, places].copy(), logits.clone())
        decoder.keys[:, :, places], decoder.values[:, :, places], logits = self.known[key]
        return logits


def race_batches(
    model: nn.Module,
    makers: Mapping[str, Callable[[], Proposer]],
    lengths: Mapping[str, Mapping[str, int]],
    prompts: Mapping[str, Sequence[list[int]]],
    settings: Settings,
    stop: Sequence[int],
) -> dict[tuple[str, str], dict[int, str]]:
    """The measured speed-up of each proposer, by kind of text and number of streams.

    Both sides run on chapter 11's paged decoder; reading the prompts is not timed. Each speed-up is followed by how
    many streams got plain decoding's text.

    Args:
        model: The target, packed or not.
        makers: A new proposer for each stream.
        lengths: γ by proposer and kind.
        prompts: At least as many of each kind as the largest batch.
        settings: For the new tokens and the rounds.
        stop: Ids that end a text.
    """
    longest = max(len(ids) for kind in KINDS for ids in prompts[kind]) + settings.new_tokens + 16
    target = RememberingPaged(paged_llama(model, positions=max(BATCHES) * longest))
    ready = {name: [make() for _ in range(max(BATCHES))] for name, make in {"plain": NoDraft, **makers}.items()}
    found: dict[tuple[str, str, int], list] = {}

    def run(name: str, kind: str, batch: int) -> None:
        made = generate_speculative_batch(
            target,
            ready[name][:batch],
            prompts[kind][:batch],
            settings.new_tokens,
            draft_tokens=0 if name == "plain" else lengths[name][kind],
            stop=stop,
        )
        found.setdefault((name, kind, batch), []).append(made)

    keys = [(name, kind, batch) for kind in KINDS for batch in BATCHES[1:] for name in ready]
    measure_interleaved(
        {"|".join(map(str, key)): partial(run, *key) for key in keys}, repeats=settings.rounds, warmup=1
    )
    speedups: dict[tuple[str, str], dict[int, str]] = {}
    for (name, kind, batch), runs in found.items():
        plain = found["plain", kind, batch]
        if name != "plain":
            speeds = ([each.tokens_per_s for each in side[1:]] for side in (runs, plain))
            same = sum(ours == theirs for ours, theirs in zip(runs[0].new_ids, plain[0].new_ids, strict=True))
            speedups.setdefault((name, kind), {})[batch] = f"{paired_ratio(*speeds)}, same text {same}/{batch}"
    return speedups
