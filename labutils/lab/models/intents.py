"""LabLM's opinion of customers' intents, for small classifiers to learn from: asked once, kept in `data/results`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from labutils.distillation.classifiers import choice_log_probs
from labutils.lab.data import service
from labutils.lab.models.load import LanguageModel, load_model
from labutils.lab.models.tokenizer import chat_ids, text_ids
from labutils.lab.paths import DATA, written_whole

OPINIONS = DATA / "results" / "intent_opinions.safetensors"
COUNTS = {"train": 2000, "test": 200}  # queries of each split that LabLM was asked about
SEED = 11


@dataclass(frozen=True)
class Queries:
    """What customers say, the whole chats without their last message, and the numbers of their true intents."""

    texts: list[str]
    chats: list[Sequence[dict[str, str]]]
    labels: Int[Tensor, " queries"]


def intent_queries(split: str) -> Queries:
    """The queries of a split that LabLM was asked about; "test" has phrasings that "train" never shows."""
    items, names = service.evaluation_set(service.INTENT, split, COUNTS[split], seed=SEED), list(service.intents())
    labels = torch.tensor([names.index(item.messages[-1]["content"]) for item in items])
    return Queries([item.messages[-2]["content"] for item in items], [item.messages[:-1] for item in items], labels)


def intent_opinion(loaded: LanguageModel, chat: Sequence[dict[str, str]]) -> Float[Tensor, " intents"]:
    """Ln p of each intent's name as the reply, over all names together; in the order of `service.intents()`."""
    model, tokenizer = loaded
    prompt = torch.tensor(chat_ids(tokenizer, chat, add_generation_prompt=True), device=model.device)
    return choice_log_probs(model, prompt, intent_token_ids(tokenizer))


def intent_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Each intent's name as the tokens of a reply, the end of the turn included."""
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    return [[*text_ids(tokenizer, name), end] for name in service.intents()]


def recorded_opinions(path: Path = OPINIONS) -> dict[str, Float[Tensor, "queries intents"]]:
    """LabLM's opinion of every query of both splits: asked if the file is missing (minutes), else read."""
    if not path.is_file():
        loaded = load_model("lablm")
        asked = {s: torch.stack([intent_opinion(loaded, c) for c in intent_queries(s).chats]).half() for s in COUNTS}
        with written_whole(path) as new:
            save_file(asked, new)
    return {split: opinions.float() for split, opinions in load_file(path).items()}
