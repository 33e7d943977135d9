"""The prompts of chapter 10: four kinds, the same at every call, none of them seen in training."""

import pytest

from labutils.lab.data.corpus import stdlib_documents
from labutils.lab.models.drafting_text import CODE_STRIDE, CODE_TOKENS, FAQ_TURNS, KINDS, text_prompts
from labutils.lab.models.load import load_model


@pytest.fixture(scope="module")
def tokenizer():
    return load_model("lablm-small").tokenizer


def decoded(kind, tokenizer, count):
    return [tokenizer.decode(ids[0]) for ids in text_prompts(kind, tokenizer, count)]


@pytest.fixture(scope="module")
def code(tokenizer):
    return text_prompts("code", tokenizer, 20)  # of 17 modules


def test_a_longer_list_begins_with_the_shorter_one_and_repeats_nothing(tokenizer, code):
    for kind in KINDS:
        few, more = text_prompts(kind, tokenizer, 3), code if kind == "code" else text_prompts(kind, tokenizer, 20)
        assert [ids.tolist() for ids in few] == [ids.tolist() for ids in more[:3]]
        assert len({tuple(ids[0].tolist()) for ids in more}) == len(more) == 20


def test_code_is_a_window_of_a_held_out_module(tokenizer, code):
    assert all(ids.shape == (1, 1 + CODE_TOKENS) and ids[0, 0] == tokenizer.bos_token_id for ids in code)
    modules = stdlib_documents("test")
    first = tokenizer(modules[0].text, add_special_tokens=False, verbose=False).input_ids
    assert code[0][0, 1:].tolist() == first[CODE_STRIDE : CODE_STRIDE + CODE_TOKENS]
    for ids in code:
        assert any(tokenizer.decode(ids[0, 1:]).strip("\ufffd") in module.text for module in modules)


def test_chats_open_an_answer_and_translations_change_direction(tokenizer):
    for kind in ("chat", "translation", "qa"):
        assert all(text.endswith("<|assistant|>") for text in decoded(kind, tokenizer, 4))
    assert all(text.count("<|user|>") == 1 for text in decoded("chat", tokenizer, 4))
    wanted = ["into Chinese" in text for text in decoded("translation", tokenizer, 4)]
    assert wanted == [True, False, True, False]
    for to_chinese, text in zip(wanted, decoded("translation", tokenizer, 4), strict=True):
        sentence = text.split("<|user|>")[1].split("<|end|>")[0]
        assert any("\u4e00" <= char <= "\u9fff" for char in sentence) != to_chinese


def test_a_faq_holds_the_question_that_is_asked_and_its_answer(tokenizer):
    for index, text in enumerate(decoded("qa", tokenizer, 7)):
        *turns, last = text.split("<|user|>")[1:]
        asked = [turn.split("<|end|>")[0] for turn in turns]
        answers = [turn.split("<|assistant|>")[1].split("<|end|>")[0] for turn in turns]
        assert len(asked) == FAQ_TURNS and all(answers)
        assert asked.index(last.split("<|end|>")[0]) == index % FAQ_TURNS


@pytest.mark.parametrize(
    ("kind", "count", "got"), [("poem", 2, "'poem' and 2"), ("code", 0, "'code' and 0"), ("qa", 65, "'qa' and 65")]
)
def test_another_kind_or_no_prompt_is_refused(tokenizer, kind, count, got):
    with pytest.raises(ValueError, match=f"code, chat, translation, qa, and 1 to 64; got {got}"):
        text_prompts(kind, tokenizer, count)
