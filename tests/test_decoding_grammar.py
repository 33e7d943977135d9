"""Patterns as byte automata, token masks against two libraries, and speculation under a grammar."""

import functools
import json
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_ids, tiny_model

from labutils.decoding import automaton, grammar
from labutils.decoding.proposers import NoDraft, Proposal
from labutils.decoding.speculate import generate_speculative
from labutils.decoding.target import ModelTarget
from labutils.generation.cache import KVCache
from labutils.generation.decode import prefill
from labutils.generation.sampling import Sampler
from labutils.lab.data import service
from labutils.lab.models.load import load_model

PATTERNS = [
    grammar.json_object({"intent": ["track_order", "track_parcel", "café"], "urgent": [True, False]}),
    grammar.choice(list(service.intents())),
    r'"[^"\\]*"',
    "(订单|请|[^x])+",  # not `.`, which matches a line end too in xgrammar
    "[a-c]+(é|è)?",
    r"-?[1-9]?[0-9]+(\.[0-9]+)?",
]


compiled_once = functools.cache(automaton.compile_pattern)
ALPHABET = 'abcxyz请订单é\n"1.-]'


@pytest.mark.parametrize(
    "pattern", [*PATTERNS[2:], "(ab|a)(bc|c)?", ".请?", "(a|b)*abb", "x(y?z)*", "[^a]|", r"[\]-]?"]
)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_automaton_accepts_what_re_matches(pattern, data):
    table = compiled_once(pattern)
    own = sorted(set(pattern) & set(ALPHABET)) or ["a"]  # drawn from these, a text often matches
    texts = st.text(own, max_size=5) | st.text(ALPHABET, max_size=5)
    text = data.draw(texts | texts.map('"{}"'.format))
    assert bool(table.accepting[table.walk(text.encode())]) == bool(re.fullmatch(pattern, text))


def test_equal_rests_are_one_state_and_half_a_character_is_no_text():
    table = automaton.compile_pattern("(refer|offer)_friend")
    assert table.walk(b"refer") == table.walk(b"offer") != table.dead
    half = automaton.compile_pattern(".")
    state = half.walk("订".encode()[:2])
    assert state != half.dead and not half.accepting[state]
    assert half.walk(b"\xed\xa0\x80") == half.walk(b"\xc0\x80") == half.walk(b"\xf4\x90") == half.dead  # no UTF-8


@pytest.mark.parametrize("pattern", ["(a", "a)", "*a", "a|+", "a{2}", "^a$", "[é]", "[a", "\\d", "a\\"])
def test_patterns_outside_the_language_are_refused(pattern):
    with pytest.raises(ValueError, match="; got "):
        automaton.compile_pattern(pattern)


VOCAB = [b"", b"a", b"b", b"ab", b"ba", b"abb", b"c", b"\xe8\xae", b"\xa2"]


def test_masks_are_those_of_a_walk_byte_by_byte():
    compiled = grammar.compile_grammar("(ab|订)+c?", VOCAB, end=0)
    for state in range(compiled.automaton.dead):
        for token, data in enumerate(VOCAB):
            reached = compiled.automaton.walk(data, state)
            lives = bool(compiled.automaton.accepting[state]) if token == 0 else reached != compiled.automaton.dead
            assert bool(compiled.allowed[state, token]) == lives
            if token and lives:
                assert int(compiled.next_state[state, token]) == reached
    done = compiled.automaton.dead
    assert compiled.walk([3, 0]) == compiled.walk([6]) == done  # the end, and a token that is not allowed
    assert compiled.allowed[done].nonzero().flatten().tolist() == [0]


def test_forced_text_ends_at_the_first_choice():
    compiled = grammar.compile_grammar("ab(a|b)ab", VOCAB, end=0)
    assert compiled.forced_bytes(0) == (b"ab", compiled.walk([3]))
    assert compiled.forced_bytes(compiled.walk([3, 1])) == (b"ab", compiled.walk([3, 1, 3]))
    assert compiled.must_end(compiled.walk([3, 1, 3])) and not compiled.must_end(0)
    assert grammar.compile_grammar("a?b", VOCAB, end=0).forced_bytes(0) == (b"", 0)  # two ways on
    assert grammar.compile_grammar("(ab)*", VOCAB, end=0).forced_bytes(0) == (b"", 0)  # it may end here


def test_a_pattern_that_the_tokens_cannot_write_is_refused():
    with pytest.raises(ValueError, match="some token must be allowed; got none in state 2"):
        grammar.compile_grammar("abd", VOCAB, end=0)


def test_json_grammar_matches_what_json_writes():
    values = {"intent": ["a", 'quote " and \\', "é"], "count": [1, 2.5, None], "done": [True, False]}
    table = automaton.compile_pattern(grammar.json_object(values))
    rng = random.Random(0)
    for _ in range(20):
        text = json.dumps({name: rng.choice(options) for name, options in values.items()})
        assert table.accepting[table.walk(text.encode())]
    assert not table.accepting[table.walk(b'{"intent": "a"}')]


@pytest.fixture(scope="module")
def lablm():
    return load_model("lablm")


@pytest.fixture(scope="module")
def tokens(lablm):
    return grammar.token_bytes(lablm.tokenizer)


@given(st.text(max_size=30))
@settings(max_examples=25, deadline=None)
def test_token_bytes_spell_the_text(lablm, tokens, text):
    ids = lablm.tokenizer(text, add_special_tokens=False)["input_ids"]
    text_only = not any(token in text for token in lablm.tokenizer.get_added_vocab())
    assert not text_only or b"".join(tokens[i] for i in ids).decode() == text


def test_no_text_allows_a_special_token(lablm, tokens):
    compiled = grammar.compile_grammar(".*", tokens, end=lablm.tokenizer.eos_token_id)
    special = sorted(lablm.tokenizer.get_added_vocab().values())
    assert special == [0, 1, 2, 3, 4, 5]
    assert compiled.allowed[0, special].tolist() == [False, False, True, False, False, False]


def random_walks(compiled, count=12, length=24):
    """Yields walks: pairs (state, token chosen), each token drawn from the allowed ones."""
    rng = random.Random(0)
    for _ in range(count):
        state, walk = 0, []
        while len(walk) < length and (not walk or walk[-1][1] != compiled.end):
            walk.append((state, rng.choice(compiled.allowed[state].nonzero().flatten().tolist())))
            state = compiled.walk([walk[-1][1]], state)
        yield walk


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_and_forced_text_are_those_of_xgrammar(library_aside, tokens, pattern):
    library_aside("tvm_ffi")
    xgrammar = library_aside("xgrammar")
    compiled = grammar.compile_grammar(pattern, tokens, end=2)
    info = xgrammar.TokenizerInfo(tokens, vocab_size=len(tokens), stop_token_ids=[2])  # no bytes: special
    theirs = xgrammar.GrammarCompiler(info).compile_regex(pattern)
    bits = torch.arange(32)
    for walk in random_walks(compiled):
        matcher = xgrammar.GrammarMatcher(theirs)
        for state, token in walk:
            packed = xgrammar.allocate_token_bitmask(1, len(tokens))
            packed.fill_(-1)  # left alone where everything is allowed
            matcher.fill_next_token_bitmask(packed)
            mask = (packed[0, :, None] >> bits & 1).bool().flatten()[: len(tokens)]
            assert torch.equal(mask, compiled.allowed[state]), f"state {state}"
            assert matcher.find_jump_forward_string() == compiled.forced_bytes(state)[0].decode(errors="ignore")
            assert matcher.accept_token(token)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_with_usual_tokens_are_those_of_llguidance(library_aside, lablm, tokens, pattern):
    guidance = library_aside("llguidance")
    compiled = grammar.compile_grammar(pattern, tokens, end=2)
    usual = grammar.with_usual_tokens(
        compiled, tokens, lambda t: lablm.tokenizer(t, add_special_tokens=False)["input_ids"]
    )
    tokenizer = library_aside("llguidance.hf").from_tokenizer(lablm.tokenizer)
    for walk in random_walks(usual):
        matcher = guidance.LLMatcher(tokenizer, guidance.LLMatcher.grammar_from_regex(pattern))
        for state, token in walk:
            packed = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
            mask = (packed[:, None] >> torch.arange(8) & 1).bool().flatten()[: len(tokens)]
            assert matcher.compute_ff_bytes() == compiled.forced_bytes(state)[0]
            assert torch.equal(mask, usual.allowed[state]), f"state {state}"
            assert matcher.consume_token(token)


def test_usual_tokens_narrow_forced_states_unless_a_token_reaches_further():
    def encode(text):
        return [VOCAB.index(char.encode()) for char in text]

    compiled = grammar.compile_grammar("cb(a|b)ab", VOCAB, end=0)
    usual = grammar.with_usual_tokens(compiled, VOCAB, encode)
    b, choice, ab = compiled.walk([6]), compiled.walk([6, 2]), compiled.walk([6, 2, 2])
    assert [compiled.allowed[s].nonzero().flatten().tolist() for s in (b, choice, ab)] == [[2, 4], [1, 2, 4], [1, 3]]
    assert torch.equal(usual.allowed[b], compiled.allowed[b])  # "ba" reaches beyond the forced "b"
    assert torch.equal(usual.allowed[choice], compiled.allowed[choice])  # two ways on
    assert usual.allowed[ab].nonzero().flatten().tolist() == [1]  # "ab" is forced, and cut into "a" and "b"


def masked_greedily(model, compiled, prompt, count):
    """Token by token, without any of the classes: the naive twin."""
    cache, state, answer = KVCache(), 0, []
    logits = prefill(model, prompt, cache)
    while len(answer) < count and (not answer or answer[-1] != compiled.end):
        answer.append(int(logits[0].masked_fill(~compiled.allowed[state], -torch.inf).argmax()))
        state = compiled.walk([answer[-1]], state)
        logits = prefill(model, torch.tensor([[answer[-1]]]), cache)
    return answer


TINY_TOKENS = [b"", *(bytes([97 + i % 26]) + bytes([97 + i // 26]) * (i >= 26) for i in range(96))]


class Chaos:
    """Proposes anything: mostly what the grammar forbids."""

    def propose(self, token_ids, count):
        rng = random.Random(len(token_ids))
        return Proposal([rng.randrange(97) for _ in range(count)])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("proposer", ["forced", "chaos", "none"])
def test_speculation_under_a_grammar_gives_the_masked_text(seed, proposer):
    model = tiny_model("llama-gqa-tied", seed=seed)
    compiled = grammar.compile_grammar("(the|that|those)order(is|was)late(now)?", TINY_TOKENS, end=0)
    prompt = torch.cat([random_ids(9, seed=seed), torch.tensor([[96]])], dim=1)
    # token 96 opens the answer; one byte a token is not how this model would cut the text: drafts may fall
    forced = grammar.GrammarDraft(compiled, lambda text: [TINY_TOKENS.index(c.encode()) for c in text], opens=96)
    chosen = {"forced": forced, "chaos": Chaos(), "none": NoDraft()}[proposer]
    made = generate_speculative(
        grammar.GrammarTarget(ModelTarget(model), compiled), chosen, prompt, 30, draft_tokens=5, stop=[0]
    )
    answer = made.token_ids[0, 10:].tolist()
    assert answer == masked_greedily(model, compiled, prompt, 30)
    assert answer[-1] == 0 and re.fullmatch("(the|that|those)order(is|was)late(now)?", spelled(answer))
    assert made.drafted > 0 if proposer == "forced" else True


def spelled(answer):
    return b"".join(TINY_TOKENS[token] for token in answer).decode()


def test_drafts_are_the_forced_text_and_its_end():
    compiled = grammar.compile_grammar("(a|b)cd", TINY_TOKENS, end=0)
    draft = grammar.GrammarDraft(compiled, lambda text: [TINY_TOKENS.index(c.encode()) for c in text], opens=96)
    a, c, d = (TINY_TOKENS.index(x) for x in (b"a", b"c", b"d"))
    assert draft.propose([5, 96], 4).token_ids == []
    assert draft.propose([5, 96, a], 4).token_ids == [c, d, 0]
    assert draft.propose([5, 96, a], 2).token_ids == [c, d]
    assert draft.propose([96, a, 96, a, c], 9).token_ids == [d, 0]  # the last answer counts


def test_sampling_under_a_grammar_follows_the_masked_distribution():
    model = tiny_model("llama-gqa-tied")
    compiled = grammar.compile_grammar("(a|b|c)d", TINY_TOKENS, end=0)
    prompt = torch.tensor([[7, 96]])
    first = [TINY_TOKENS.index(x) for x in (b"a", b"b", b"c", b"ad", b"bd", b"cd") if x in TINY_TOKENS]
    logits = prefill(model, prompt, KVCache())[0]
    wanted = logits.masked_fill(~compiled.allowed[0], -torch.inf).softmax(0)[first]
    draft = grammar.GrammarDraft(compiled, lambda text: [TINY_TOKENS.index(c.encode()) for c in text], opens=96)
    sampler = Sampler(torch.Generator().manual_seed(0))
    target, counts = grammar.GrammarTarget(ModelTarget(model), compiled), torch.zeros(97)
    for _ in range(80):
        made = generate_speculative(target, draft, prompt, 4, draft_tokens=3, choose=sampler, stop=[0])
        answer = made.token_ids[0, 2:].tolist()
        assert re.fullmatch("[abc]d", spelled(answer))
        counts[answer[0]] += 1
    chi2 = ((counts[first] - 80 * wanted) ** 2 / (80 * wanted)).sum()
    assert chi2 < 20.5  # 5 degrees of freedom: one in a thousand


def test_rewind_takes_the_state_back_and_prefill_begins_anew():
    compiled = grammar.compile_grammar("abc", TINY_TOKENS, end=0)
    target = grammar.GrammarTarget(ModelTarget(tiny_model("llama-gqa-tied")), compiled)
    prompt, a, b = torch.tensor([[7, 96]]), 1, 2
    target.prefill(prompt)
    before = target.extend([a])
    target.extend([b, 5])
    assert target.length == 5 and target.states[-1] == compiled.automaton.dead
    target.rewind(3)
    torch.testing.assert_close(target.extend([a]), before)
    target.rewind(target.length)
    assert target.states == [0] and target.length == 0


@pytest.mark.parametrize("seed", range(5))
def test_masked_and_conditioned_distributions_by_enumeration(seed):
    generator = torch.Generator().manual_seed(seed)
    table = {prefix: torch.rand(5, generator=generator) for prefix in ["", "0", "00", "1", "2"]}
    table = {prefix: probs / probs.sum() for prefix, probs in table.items()}
    choices = [[0, 0, 4], [0, 1], [1, 3], [2, 4]]
    log_probs = torch.full((4, 3, 5), torch.nan)
    masked = []
    for c, tokens in enumerate(choices):
        q = 1.0
        for i, token in enumerate(tokens):
            prefix = "".join(map(str, tokens[:i]))
            log_probs[c, i] = table[prefix].log()
            allowed = {"": [0, 1, 2], "0": [0, 1], "00": [4], "1": [3], "2": [4]}[prefix]
            q *= float(table[prefix][token] / table[prefix][allowed].sum())
        masked.append(q)
    ours = grammar.masked_choice_log_probs(log_probs, choices).exp()
    torch.testing.assert_close(ours, torch.tensor(masked))
    torch.testing.assert_close(ours.sum(), torch.tensor(1.0))
