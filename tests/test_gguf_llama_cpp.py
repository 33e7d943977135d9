"""Our GGUF files in llama.cpp itself: the same ids of texts, the same probabilities of every transformed model."""

import copy
from pathlib import Path

import pytest
import torch
from aside import install_aside
from llama_cpp_server import ask
from tiny_models import random_ids, tiny_model
from tokenizers import pre_tokenizers, processors

from labutils.lab.models.gguf import export_gguf
from labutils.lab.models.gguf_tokenizer import SPLIT_PATTERNS, TEXTS
from labutils.lab.models.load import load_model
from labutils.pruning import low_rank, structured
from labutils.pruning.masks import apply_masks_, mask_model
from labutils.pruning.recovery import add_lora_, merge_lora_
from labutils.pruning.scores import magnitude_scores
from labutils.quantization.affine import Scheme
from labutils.quantization.folding import inject_outliers_
from labutils.quantization.packed import pack_model_
from labutils.quantization.rotation import fold_gains_

pytestmark = pytest.mark.slow
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 4160}  # more rows than tokens
BLOCKS = {"granularity": "group", "group_size": 32}


@pytest.fixture(scope="module")
def xllamacpp(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("xllamacpp")
    install_aside(folder, ["xllamacpp==2026.10.11549"])
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return load_model("lablm-small").tokenizer


def generator():
    return torch.Generator().manual_seed(0)


def masked(model):
    apply_masks_(model, mask_model(magnitude_scores(model), (2, 4)))
    return model


def merged(model):
    add_lora_(model, mask_model(magnitude_scores(model), 0.5), rank=2, generator=generator())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=generator())
    merge_lora_(model)
    return model


def done(change_, model, **settings):
    change_(model, **settings)
    return model


def rotated(model):
    axes = torch.linalg.qr(torch.randn(64, 64, generator=generator()))[0]
    return low_rank.rotated(model, axes)


MADE = {
    "plain": lambda m: m,
    "fewer neurons": lambda m: structured.keep_neurons(m, [torch.arange(32, 128)] * 3),
    "fewer heads": lambda m: structured.keep_head_groups(m, [torch.tensor([i % 2]) for i in range(3)]),
    "fewer channels": lambda m: structured.keep_channels(m, torch.arange(1, 64, 2)),
    "fewer layers": lambda m: structured.keep_layers(m, [0, 2]),
    "2:4 zeros": masked,
    "merged LoRA": merged,
    "scaled inputs": lambda m: done(inject_outliers_, m, channels=4, factor=20.0, generator=generator()),
    "folded gains": lambda m: done(fold_gains_, m),
    "turned residual stream": rotated,
    "packed, 8 bits": lambda m: pack_model_(m, Scheme(bits=8, **BLOCKS), half_scales=True),
    "packed, 4 bits": lambda m: pack_model_(m, Scheme(bits=4, **BLOCKS), half_scales=True),
}


@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-untied-bias"])
@pytest.mark.parametrize("kind", MADE)
def test_llama_cpp_gives_our_probabilities(xllamacpp, tokenizer, tmp_path, kind, name):
    if kind == "turned residual stream" and name == "llama-untied-bias":
        pytest.skip("turned with the same function; one model is enough")
    model = MADE[kind](tiny_model(name, **SIZES)).eval()
    export_gguf(model, tokenizer, tmp_path / "model.gguf")
    ids, vocab = random_ids(30, vocab=4096)[0].tolist(), SIZES["vocab_size"]
    settings = {"n_predict": 1, "n_probs": vocab, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
    prompts = [ids[:length] for length in range(5, 31, 5)]
    posted = [{"to": "completion", "prompt": prompt, **settings} for prompt in prompts]
    compared = 0
    for prompt, answer in zip(prompts, ask(xllamacpp, tmp_path / "model.gguf", posted), strict=True):
        for first in answer.get("completion_probabilities", []):  # none where the token is the beginning of a character
            found = {each["id"]: each["logprob"] for each in first["top_logprobs"]}
            with torch.no_grad():
                ours = model(torch.tensor([prompt])).logits[0, -1].log_softmax(dim=-1)
            theirs = torch.tensor([found[i] for i in range(vocab)])
            if kind.startswith("packed"):  # both round the inputs too, in blocks of their own
                assert (theirs - ours).square().mean().sqrt() < 0.03 * ours.std()
            else:
                assert (theirs - ours).abs().max() < 1e-4
            assert ours.std() > 0.3  # a uniform distribution would agree with anything
            compared += 1
    assert compared >= 2


def variants(tokenizer):
    yield "as it is", tokenizer
    for name, template in (("BOS", "<|endoftext|> $A"), ("BOS and EOS", "<|endoftext|> $A <|end|>")):
        other = copy.deepcopy(tokenizer)
        ids = [("<|endoftext|>", tokenizer.bos_token_id), ("<|end|>", tokenizer.eos_token_id)]
        other.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
        yield name, other
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    yield "gpt-2", other


def test_llama_cpp_cuts_texts_into_our_ids(xllamacpp, tokenizer, tmp_path):
    assert len(SPLIT_PATTERNS) == 2
    model = tiny_model("llama-gqa-tied", **SIZES)
    texts = [*TEXTS, "<|user|>hi<|end|> <|assistant|>", *(Path(__file__).read_text(encoding="utf-8").splitlines())]
    for name, each in variants(tokenizer):
        export_gguf(model, each, tmp_path / "model.gguf")
        posted = [{"to": "tokenize", "content": t, "add_special": True, "parse_special": True} for t in texts]
        for text, answer in zip(texts, ask(xllamacpp, tmp_path / "model.gguf", posted), strict=True):
            assert answer["tokens"] == list(each(text).input_ids), (name, text)
