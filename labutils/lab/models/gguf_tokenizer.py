"""A byte-level BPE tokenizer as GGUF metadata, so that llama.cpp cuts text into the same tokens."""

import json
import re
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# How llama.cpp calls the pattern that cuts text into words before BPE; an unknown pattern would cut otherwise.
SPLIT_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
}
WHOLE_WORDS = "llama-bpe"  # by this name llama.cpp takes a word that is a token before it merges
BYTE_LEVEL = {"add_prefix_space": False, "trim_offsets": None}  # None: an option that moves no token
SPLIT = {"pattern": None, "behavior": "Isolated", "invert": False}
BPE = {
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False}
TEXTS = (
    "",
    " ",
    "\n\n",
    "Hello, world! It's 12345.67 o'clock; DON'T (ever) panic...",
    "  two  spaces\tand a tab \n\n    indented\r\nlast line ",
    "def f(x_1):\n    return [x_1 ** 2] # square\n",
    "你好，世界！今天是2026年。 中文 and English混合",
    "Größe, café, cafe\u0301, ﬁ, Ａ, 😀👍🏽, \u00a0nbsp",
)


def tokenizer_metadata(tokenizer, *, rows: int | None = None) -> dict[str, object]:
    """Tokens at their ids, their kinds, the merges in order, the word pattern and the special ids; "none" without one.

    Whether llama.cpp adds a token before and behind a text is read off what the tokenizer does. At the end a tokenizer
    is built anew from these entries alone, and must give the same ids.

    Args:
        tokenizer: of the transformers library, or None.
        rows: of the embedding; ids without a token get unused tokens. As many as there are ids where it is None.

    Raises:
        ValueError: for a tokenizer that is not byte-level BPE, has a step or an option that llama.cpp has not, cuts
            words by a pattern it has no name for, has no end of text, or has more ids than there are rows.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"the tokenizer must be one of the tokenizers library; got {type(tokenizer).__name__}")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = _checked_pipeline(state)
    tokens, types = _vocabulary(tokenizer, state["added_tokens"], rows)
    before, behind = _added_around(tokenizer)
    entries = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]],
        "add_bos_token": before,
        "add_eos_token": behind,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in entries.items() if value not in (None, [])}
    _compare(tokenizer, metadata)
    return metadata | dict(_chat_templates(tokenizer.chat_template))


def pre_tokenizer_name(pre_tokenizer: dict | None) -> str:
    """llama.cpp's name of a pre-tokenizer as `tokenizer.json` describes it.

    >>> pre_tokenizer_name({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True})
    'gpt-2'

    Raises:
        ValueError: for one that has no name there.
    """
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    if [step.get("type") for step in steps] == ["ByteLevel"]:
        _require_options(steps[0], BYTE_LEVEL | {"use_regex": True}, "the pre-tokenizer ByteLevel")
        return "gpt-2"
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"] or patterns[0] not in SPLIT_PATTERNS:
        raise ValueError(f"the word pattern must be one that llama.cpp has a name for; got {patterns or steps}")
    _require_options(steps[0], SPLIT, "the pre-tokenizer Split")
    _require_options(steps[1], BYTE_LEVEL | {"use_regex": False}, "the pre-tokenizer ByteLevel")
    return SPLIT_PATTERNS[patterns[0]]


def tokenizer_of(metadata: dict[str, object]) -> Tokenizer:
    """The tokenizer that the entries describe: what llama.cpp makes of them, without the tokens around a text."""
    entries = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    vocabulary = {token: i for i, token in enumerate(entries["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in entries.get("merges", [])]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=entries["pre"] == WHOLE_WORDS))
    pattern = {name: pattern for pattern, name in SPLIT_PATTERNS.items()}.get(entries["pre"])
    steps = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    kinds = zip(entries["tokens"], entries["token_type"], strict=True)
    added = [token for token, kind in kinds if kind in (CONTROL, USER_DEFINED)]
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added])
    return made


def _checked_pipeline(state: dict) -> str:
    """The name of the word pattern, where every part of the pipeline is one that llama.cpp has."""
    if state["model"]["type"] != "BPE":
        raise ValueError(f"the tokenizer must be byte-level BPE; got {state['model']['type']}")
    if state["normalizer"] is not None:
        raise ValueError(f"the tokenizer must not normalize: llama.cpp does not; got {state['normalizer']['type']}")
    pre = pre_tokenizer_name(state["pre_tokenizer"])
    ignored = {"type", "vocab", "merges", "ignore_merges"}
    model = {key: value or BPE.get(key) for key, value in state["model"].items() if key not in ignored}
    _require_options(model, BPE, "the model BPE")
    if state["model"].get("ignore_merges", False) != (pre == WHOLE_WORDS):
        rule = f"ignore_merges must be {pre == WHOLE_WORDS} where the word pattern is llama.cpp's {pre}"
        raise ValueError(f"{rule}; got {state['model'].get('ignore_merges', False)}")
    for token in state["added_tokens"]:
        ignored = {"id", "content", "normalized", "special"}
        options = {key: value for key, value in token.items() if key not in ignored}
        _require_options(options, ADDED, f"the added token {token['content']!r}")
    return pre


def _require_options(found: dict, wanted: dict, what: str) -> None:
    for key, value in found.items():
        if key != "type" and (key not in wanted or (value != wanted[key] and key not in ("pattern", "trim_offsets"))):
            raise ValueError(f"{what} must have {key}={wanted.get(key)}; got {value}")


def _vocabulary(tokenizer, added: list[dict], rows: int | None) -> tuple[list[str], list[int]]:
    """Every id's token and kind, unused ones where there is none."""
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    rows = max(by_id) + 1 if rows is None else rows
    if max(by_id) >= rows:
        raise ValueError(f"the embedding must have a row for every token; got {rows} rows for id {max(by_id)}")
    kinds = {t["id"]: CONTROL if t["special"] else USER_DEFINED for t in added}
    tokens, names = [], set(by_id.values())
    for i in range(rows):
        unused = f"[PAD{i}]"
        while unused in names:
            unused = f"[{unused}]"
        tokens.append(by_id.get(i, unused))
    return tokens, [kinds.get(i, NORMAL) if i in by_id else UNUSED for i in range(rows)]


def _added_around(tokenizer) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before and EOS behind a text."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer must have eos_token: llama.cpp would take token 11 in its place; got None")
    bare, full = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    for before in ([], [tokenizer.bos_token_id]):
        for behind in ([], [tokenizer.eos_token_id]):
            if before + bare + behind == full:
                return bool(before), bool(behind)
    raise ValueError(f"the tokenizer may add BOS and EOS to a text, nothing else; got {full} for {bare}")


def _compare(tokenizer, metadata: dict[str, object]) -> None:
    """Refuses entries that give other ids than the tokenizer, on texts that exercise it."""
    made, tokens = tokenizer_of(metadata), metadata["tokenizer.ggml.tokens"]
    before = [tokenizer.bos_token_id] if metadata["tokenizer.ggml.add_bos_token"] else []
    behind = [tokenizer.eos_token_id] if metadata["tokenizer.ggml.add_eos_token"] else []
    types = metadata["tokenizer.ggml.token_type"]
    special = [t for t, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    for text in (*TEXTS, *(f"{a}x {a} {b}{a}\ny" for a, b in zip(special, special[1:] + special[:1], strict=True))):
        wanted = list(tokenizer(text).input_ids)
        found = before + made.encode(text, add_special_tokens=False).ids + behind
        if found != wanted:
            raise ValueError(f"llama.cpp must cut {text!r} into the tokenizer's ids {wanted}; got {found}")


def _chat_templates(templates: str | dict[str, str] | None) -> Iterator[tuple[str, object]]:
    """The default template, and the others by name, as llama.cpp looks for them."""
    templates = {"default": templates} if isinstance(templates, str) else templates or {}
    others = {re.sub(r"\W", "_", name): text for name, text in templates.items() if name != "default"}
    if "default" in templates:
        yield "tokenizer.chat_template", templates["default"]
    if others:
        yield "tokenizer.chat_templates", list(others)
    for name, text in others.items():
        yield f"tokenizer.chat_template.{name}", text
