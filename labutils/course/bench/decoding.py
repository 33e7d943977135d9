"""`bench decoding`: every proposer on every kind of text, on LabLM and on LabLM tiled to 0.24B, beside its peers.

Every path reads the same prompts, and its greedy text is compared with plain decoding's before anything is timed. A
prompt is read once and remembered, drafts included: what is timed is the decoding after the first token.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from labutils.course.bench.decoding_batches import race_batches
from labutils.course.bench.decoding_rows import DraftRow, as_table, judge
from labutils.course.bench.decoding_ways import (
    BATCHES,
    LENGTHS,
    Remembering,
    Settings,
    Way,
    draft_way,
    llama_way,
    near_tie,
    plain_way,
    predicted_at,
    step_curve,
    transformers_way,
)
from labutils.course.bench.llama_server import Engine, EngineSettings, why_missing
from labutils.course.bench.table import Bar
from labutils.decoding.drafts import TrimmedTarget, frequent_tokens, trim_head
from labutils.decoding.heads import LookAheadDraft
from labutils.decoding.proposers import CorpusNgram, ModelDraft, PromptLookup, SuffixAutomaton
from labutils.decoding.speculate import Speculation
from labutils.generation.fast_llama import FastLlama
from labutils.lab.models.calibration_text import calibration_batches
from labutils.lab.models.draft_heads import load_head
from labutils.lab.models.drafting_text import KINDS, text_prompts
from labutils.lab.models.gguf import export_gguf
from labutils.lab.models.load import LanguageModel, load_model
from labutils.lab.models.quantized import fast_packed_llama
from labutils.lab.models.tiled import tiled_model
from labutils.measurement.threads import thread_count
from labutils.measurement.timing import bootstrap_interval, measure_interleaved, paired_ratio
from labutils.quantization.affine import Scheme
from labutils.quantization.packed import pack_model_

INT8, INT4 = Scheme(8), Scheme(4, granularity="group", group_size=64)
MAX_LENGTH, KEPT_TOKENS = 512, 2048
LLAMA_DRAFTS = {
    "llama.cpp": {},
    "llama.cpp, n-gram simple": {
        "drafts": "NGRAM_SIMPLE",
        "options": {"ngram_simple.size_n": 3, "ngram_simple.size_m": 8},
    },
    "llama.cpp, n-gram map": {
        "drafts": "NGRAM_MAP_K4V",
        "options": {"ngram_map_k4v.size_n": 3, "ngram_map_k4v.size_m": 8},
    },
    "llama.cpp, LabLM-small": {"drafts": "DRAFT_SIMPLE", "options": {"draft.n_max": 3}},
}


def bench_decoding(settings: Settings, *, say: Callable[[str], None] = print) -> tuple[list, list[Bar]]:
    """Measures every way on both subjects, prints a table for each, and returns all rows and bars."""
    rows, bars = [], []
    for name in ("lablm", f"lablm, {settings.width} times as wide"):
        with ExitStack() as stack, thread_count(settings.threads):
            subject = Bench(name, settings, stack, say)
            found = subject.measure()
        say(as_table(found))
        rows += found
        bars += judge(found)
    return rows, bars


class Bench:
    """One subject: its prompts, its ways to decode, and their measurement."""

    def __init__(self, name: str, settings: Settings, stack: ExitStack, say: Callable[[str], None]) -> None:
        self.name, self.settings, self.stack, self.say = name, settings, stack, say
        self.small, (self.lablm, self.tokenizer) = load_model("lablm-small").model, load_model("lablm")
        self.model = self.lablm if name == "lablm" else tiled_model(self.lablm, width=settings.width)
        self.stop = (self.tokenizer.eos_token_id,)
        count = settings.prompts
        self.prompts = {
            kind: text_prompts(kind, self.tokenizer, count + 1) for kind in KINDS
        }  # the last to choose with
        self.ways: list[Way] = []
        self.texts: dict[tuple[str, str, int], object] = {}
        self._plain_ways()
        self._draft_ways()
        if settings.peers:
            self._peers()

    def measure(self) -> list[DraftRow]:
        """Proves equal texts, times all ways interleaved, and returns a row for each way and kind."""
        records: dict[tuple[str, str], list] = {}
        same = {(way.name, kind): self._same(way, kind) for way in self.ways for kind in KINDS}
        self.say(f"  texts compared; {self.settings.rounds} rounds of {len(self.ways)} ways begin")

        def run(way: Way, kind: str) -> None:
            runs = [way.run(kind, i, prompt) for i, prompt in self._timed(way, kind)]
            records.setdefault((way.name, kind), []).append(runs)

        functions = {f"{way.name}|{kind}": partial(run, way, kind) for way in self.ways for kind in KINDS}
        measure_interleaved(functions, repeats=self.settings.rounds, warmup=1)
        speeds = {
            key: tuple(sum(r[1] for r in runs) / max(sum(r[2] for r in runs), 1e-9) for runs in rounds)
            for key, (_, *rounds) in records.items()  # the first warmed up
        }
        rows = [self._row(way, kind, speeds, records, same) for way in self.ways for kind in KINDS]
        return self._with_batches(rows)

    def _with_batches(self, rows: list[DraftRow]) -> list[DraftRow]:
        """Adds what drafts gain when several streams are decoded at once, for a packed target."""
        if self.fastest == "plain float32":
            return rows
        self.say("  batches begin")
        prompts = {
            kind: [ids[0].tolist() for ids in text_prompts(kind, self.tokenizer, max(BATCHES))] for kind in KINDS
        }
        lengths = {way.name: way.lengths for way in self.ways if way.lengths}
        model = pack_model_(copy.deepcopy(self.model), INT4 if "int4" in self.fastest else INT8)
        found = race_batches(model, self.makers, lengths, prompts, self.settings, self.stop)
        return [replace(row, measured=found.get((row.technique, row.kind))) for row in rows]

    def _timed(self, way: Way, kind: str) -> list[tuple[int, Tensor]]:
        return list(enumerate(self.prompts[kind][: min(way.prompts, self.settings.prompts)]))

    def _plain_ways(self) -> None:
        makers = {"int8": lambda: self._packed(self.model, INT8), "int4": lambda: self._packed(self.model, INT4)}
        makers["float32"] = lambda: FastLlama(self.model, max_length=MAX_LENGTH)
        self.decoders = {name: Remembering(make()) for name, make in makers.items()}
        for name, decoder in self.decoders.items():
            way = plain_way(f"plain {name}", decoder, self.settings, self.stop)
            way.prompts = 1 if name == "float32" and self.name != "lablm" else way.prompts
            self.ways.append(way)
        probe = {way.name: self._speed(way, [(kind, 0) for kind in KINDS for _ in range(2)]) for way in self.ways}
        self.fastest = max(probe, key=probe.get)
        self.decoder = self.decoders[self.fastest.removeprefix("plain ")]
        self.curve = step_curve(self.decoder)
        self.say(f"{self.name}: fastest plain decoding is {self.fastest}, {probe[self.fastest]:.0f} tokens/s")

    def _draft_ways(self) -> None:
        rows = torch.cat(calibration_batches(self.tokenizer, code=48, dialogues=48)).tolist()
        vocab = self.lablm.config.vocab_size
        kept = frequent_tokens(rows, vocab_size=vocab, count=KEPT_TOKENS)
        trimmed = TrimmedTarget(self._packed(trim_head(self.small, kept), INT8), kept, vocab_size=vocab)
        narrow = pack_model_(copy.deepcopy(self.lablm), INT8)
        self.makers = {  # a new one for each stream of a batch
            "suffix automaton": SuffixAutomaton,
            "LabLM-small int8": lambda: ModelDraft(self._packed(self.small, INT8)),
        }
        proposers = {
            "prompt lookup": PromptLookup(),
            "corpus n-gram": CorpusNgram(rows, vocab_size=vocab, shortest=2),
            **{name: make() for name, make in self.makers.items()},
            f"LabLM-small, {KEPT_TOKENS} tokens": ModelDraft(trimmed),
            "look-ahead head": LookAheadDraft(self.decoder, load_head("mtp", self.lablm), narrow),
        }
        made = [draft_way(n, self.decoder, p, self.settings, self.stop, self.fastest) for n, p in proposers.items()]
        if self.name == "lablm":
            draft = ModelDraft(self._packed(self.lablm, INT4))
            target = self.decoders["float32"]
            made.append(draft_way("int4 for float32", target, draft, self.settings, self.stop, "plain float32"))
        for way in made:
            self._choose_lengths(way)
        self.ways += made

    def _choose_lengths(self, way: Way) -> None:
        """The best of `LENGTHS` for each kind on a prompt that is not timed, two runs each."""
        for kind in KINDS:
            speeds = {}
            for way.lengths[kind] in LENGTHS:
                speeds[way.lengths[kind]] = self._speed(way, [(kind, self.settings.prompts)] * 3)
            way.lengths[kind] = max(speeds, key=speeds.get)
        self.say(f"  {way.name}: drafts of {way.lengths}")

    def _speed(self, way: Way, reads: Iterable[tuple[str, int]]) -> float:
        runs = [way.run(kind, index, self.prompts[kind][index]) for kind, index in reads][1:]  # the first warms up
        return sum(run[1] for run in runs) / sum(run[2] for run in runs)

    def _peers(self) -> None:
        wise, options = LanguageModel(self.lablm, self.tokenizer), {"prompt_lookup_num_tokens": 8}
        if self.name == "lablm":
            self.ways.append(transformers_way("transformers", wise, self.settings))
            self.ways.append(
                transformers_way("transformers, assistant", wise, self.settings, assistant_model=self.small)
            )
            self.ways.append(transformers_way("transformers, prompt lookup", wise, self.settings, **options))
        if reason := why_missing():
            self.say(f"  llama.cpp {reason}")
            return
        folder = Path(self.stack.enter_context(TemporaryDirectory()))
        form = "Q4_0" if "int4" in self.fastest else "Q8_0"
        export_gguf(self.model, self.tokenizer, folder / "target.gguf", format=form)
        export_gguf(self.small, self.tokenizer, folder / "draft.gguf", format="Q8_0")
        for name, drafts in LLAMA_DRAFTS.items():
            draft = str(folder / "draft.gguf") if drafts.get("drafts") == "DRAFT_SIMPLE" else ""
            slots = len(KINDS) * self.settings.prompts
            there = EngineSettings(
                str(folder / "target.gguf"), slots, self.settings.threads, draft_model=draft, **drafts
            )
            engine = Engine(there)
            self.stack.callback(engine.close)
            self.ways.append(llama_way(name, engine, self.settings))

    def _packed(self, model: nn.Module, scheme: Scheme) -> FastLlama:
        return fast_packed_llama(pack_model_(copy.deepcopy(model), scheme), max_length=MAX_LENGTH)

    def _same(self, way: Way, kind: str) -> tuple[str, bool]:
        """How many prompts give plain decoding's text, or part from it at a near-tie, and whether these are all."""
        equal = ties = 0
        timed = self._timed(way, kind)
        for index, prompt in timed:
            text = way.run(kind, index, prompt)[0]
            plain = self.texts.setdefault((way.plain, kind, index), text)
            if text == plain:
                equal += 1
            elif isinstance(text, list) and near_tie(self.decoders, way.plain, text, plain):
                ties += 1
        said = f"{equal}/{len(timed)}" + (f" + {ties} near-ties" if ties else "")
        return said, equal + ties == len(timed)

    def _row(self, way: Way, kind: str, speeds: dict, records: dict, same: dict) -> DraftRow:
        if not max(speeds[way.name, kind]):  # a library that hands over a whole text at once
            return DraftRow(
                technique=way.name,
                model=self.name,
                kind=kind,
                threads=self.settings.threads,
                note="all its tokens came with the first step",
            )
        made = [run[3] for run in records[way.name, kind][-1] if run[3] is not None]
        ours = self.fastest if way.plain not in ("transformers", "llama.cpp") else way.plain
        if way.lengths and way.plain == "plain float32":  # a draft for float32 is compared with float32
            ours = way.plain
        row = DraftRow(
            technique=way.name,
            model=self.name,
            kind=kind,
            threads=self.settings.threads,
            samples=speeds[way.name, kind],
            speedup=str(paired_ratio(speeds[way.name, kind], speeds[ours, kind])),
            same_text=same[way.name, kind][0],
            exact=same[way.name, kind][1],
        )
        return replace(row, **self._draft_columns(way, kind, made)) if made else row

    def _draft_columns(self, way: Way, kind: str, made: list[Speculation]) -> dict[str, object]:
        length, judged = way.lengths[kind], sum(each.judged for each in made)
        columns = {"draft_tokens": length}
        columns["tokens_per_step"] = sum(s.made for m in made for s in m.steps) / sum(m.target_steps for m in made)
        if not judged:
            return columns
        columns["shares"] = self._shares(made)
        pairs = [(each.accepted, each.judged) for each in made]
        share = sum(a for a, _ in pairs) / judged
        low, high = bootstrap_interval(pairs, statistic=_share)
        columns["acceptance"] = (share, low, high)
        draft_s = sum(each.draft_s for each in made) / max(sum(each.drafted for each in made), 1)
        if way.plain == self.fastest:
            columns["predicted"] = {b: predicted_at(b, share, length, self.curve, draft_s) for b in BATCHES}
        return columns

    def _shares(self, made: list[Speculation]) -> tuple[float, float, float]:
        """Of the time of all runs: drafting, the target's rows by the step curve, and the rest (verifier, Python)."""
        draft_s, target_s = sum(each.draft_s for each in made), sum(each.target_s for each in made)
        rows_s = min(sum(self.curve[step.drafted] for each in made for step in each.steps), target_s)
        whole = draft_s + target_s
        return draft_s / whole, rows_s / whole, (target_s - rows_s) / whole


def _share(pairs: Sequence[tuple[int, int]]) -> float:
    return sum(a for a, _ in pairs) / max(sum(judged for _, judged in pairs), 1)
