"""llama.cpp with its own drafts as a peer, from the wheel `xllamacpp`: each engine in a process of its own."""

import importlib.util
import json
import sys
from dataclasses import dataclass, field

from labutils.course.bench.child import Child

INSTALL = "not installed: pip install xllamacpp==2026.10.11549"


@dataclass(frozen=True)
class EngineSettings:
    """What a llama.cpp server is started with.

    Attributes:
        model: a GGUF file.
        slots: prompts that it remembers, each in a slot of its own, of 512 tokens.
        threads: of decoding and of reading prompts.
        drafts: a member of `common_speculative_type` without its prefix, or NONE.
        options: attributes of `CommonParams.speculative`, by dotted name.
        draft_model: a GGUF file for DRAFT_SIMPLE.
    """

    model: str
    slots: int
    threads: int
    drafts: str = "NONE"
    options: dict[str, float] = field(default_factory=dict)
    draft_model: str = ""


@dataclass(frozen=True)
class Answer:
    """A text, the tokens after its first and the seconds they took, and what was drafted and accepted on the way."""

    text: str
    tokens: int
    seconds: float
    drafted: int
    accepted: int


class Engine:
    """A server in a child process, stopped whenever it is not asked.

    Raises:
        RuntimeError: when the child ends instead of answering.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.child = Child([sys.executable, "-m", "labutils.course.bench.llama_server", json.dumps(settings.__dict__)])
        self.close = self.child.close

    def complete(self, token_ids: list[int], slot: int, count: int) -> Answer:
        """Greedy decoding of at most `count` tokens; the slot's prompt is read once."""
        return Answer(**self.child.ask([token_ids, slot, count]))


def why_missing() -> str:
    """Empty, or one sentence that says how to install the wheel."""
    return "" if importlib.util.find_spec("xllamacpp") else INSTALL


def serve(settings: EngineSettings) -> None:
    """The child: answers one line of JSON with another."""
    import xllamacpp

    p = xllamacpp.CommonParams()
    p.model.path, p.n_parallel, p.n_ctx = settings.model, settings.slots, 512 * settings.slots
    draft = p.speculative.draft
    for threads in (p.cpuparams, p.cpuparams_batch, draft.cpuparams, draft.cpuparams_batch):
        threads.n_threads = settings.threads
    kinds = xllamacpp.common_speculative_type
    p.speculative.types = [getattr(kinds, f"COMMON_SPECULATIVE_TYPE_{settings.drafts}")]
    if settings.draft_model:
        draft.mparams.path = settings.draft_model
    for name, value in settings.options.items():
        *path, last = name.split(".")
        place = p.speculative
        for part in path:
            place = getattr(place, part)
        setattr(place, last, value)
    server = xllamacpp.Server(p)
    print("ready", flush=True)
    for line in sys.stdin:
        ids, slot, count = json.loads(line)
        request = {"prompt": ids, "id_slot": slot, "n_predict": count, "temperature": 0.0, "cache_prompt": True}
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        times = answer["timings"]
        told = {"text": answer["choices"][0]["text"], "tokens": times["predicted_n"] - 1}
        told |= {"drafted": times.get("draft_n", 0), "accepted": times.get("draft_n_accepted", 0)}
        print(json.dumps(told | {"seconds": times["predicted_ms"] / 1e3}), flush=True)


if __name__ == "__main__":
    serve(EngineSettings(**json.loads(sys.argv[1])))
