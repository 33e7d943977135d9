"""A byte-level BPE tokenizer as GGUF metadata, so that llama.cpp cuts text into the same tokens."""

import json

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
# How llama.cpp calls the pattern that cuts text into words before BPE; an unknown pattern would cut otherwise.
SPLIT_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
}


def tokenizer_metadata(tokenizer) -> dict[str, object]:
    """Tokens, their kinds, the merges in order, the word pattern and the special ids; "none" without a tokenizer.

    Raises:
        ValueError: for a tokenizer that is not byte-level BPE, or cuts words by a pattern llama.cpp has no name for.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE":
        raise ValueError(f"the tokenizer must be byte-level BPE; got {state['model']['type']}")
    kinds = {t["content"]: CONTROL if t["special"] else USER_DEFINED for t in state["added_tokens"]}
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    entries = {
        "model": "gpt2",
        "pre": pre_tokenizer_name(state["pre_tokenizer"]),
        "tokens": tokens,
        "token_type": [kinds.get(token, NORMAL) for token in tokens],
        "merges": merges,
        "add_bos_token": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in entries.items() if value not in (None, [])}
    return metadata | ({"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {})


def pre_tokenizer_name(pre_tokenizer: dict | None) -> str:
    """llama.cpp's name of a pre-tokenizer as `tokenizer.json` describes it.

    >>> pre_tokenizer_name({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True})
    'gpt-2'

    Raises:
        ValueError: for one that has no name there.
    """
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    byte_levels = [step for step in steps if step.get("type") == "ByteLevel"]
    if len(byte_levels) == 1 and len(steps) == 1 and byte_levels[0].get("use_regex"):
        return "gpt-2"
    if len(byte_levels) == 1 and len(patterns) == 1 and patterns[0] in SPLIT_PATTERNS:
        return SPLIT_PATTERNS[patterns[0]]
    raise ValueError(f"the word pattern must be one that llama.cpp has a name for; got {patterns or steps}")
