"""Proposers: what they copy or count, against slow twins; a draft model's cache; never more than was asked for."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_ids, tiny_model

from labutils.decoding.proposers import CorpusNgram, ModelDraft, NoDraft, PromptLookup, SuffixAutomaton, copy_from
from labutils.decoding.target import ModelTarget
from labutils.generation.cache import StaticKVCache
from labutils.generation.decode import forward_logits, generate_naive
from labutils.generation.sampling import Sampler

texts = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def longest_match(text, *, longest, shortest, most_recent):
    """Where the longest suffix that occurred before went on, by comparing all places; None without a match."""
    for n in range(min(longest, len(text) - 1), shortest - 1, -1):
        starts = [i for i in range(len(text) - n) if text[i : i + n] == text[-n:]]
        if starts:
            return (starts[-1] if most_recent else starts[0]) + n
    return None


def copied(text, start, count):
    """Token by token, so that the copy may run into itself."""
    grown = list(text)
    for i in range(count if start is not None else 0):
        grown.append(grown[start + i])
    return grown[len(text) :]


@settings(deadline=None, max_examples=60)
@given(texts, st.integers(0, 6), st.lists(st.integers(1, 6), max_size=5))
def test_lookups_equal_a_search_through_all_places_while_the_text_grows(text, count, pieces):
    lookup, automaton = PromptLookup(longest=4, shortest=2), SuffixAutomaton(shortest=2)
    known = len(text) - min(sum(pieces), len(text) - 1)
    for piece in [0, *pieces]:
        known = min(known + piece, len(text))
        part = text[:known]
        recent = longest_match(part, longest=4, shortest=2, most_recent=True)
        first = longest_match(part, longest=len(part), shortest=2, most_recent=False)
        assert lookup.propose(part, count).token_ids == copied(part, recent, count)
        assert automaton.propose(part, count).token_ids == copied(part, first, count)


@pytest.mark.parametrize("tokens", [2, 3])
def test_an_automaton_of_long_texts_with_few_tokens_equals_a_search(tokens):
    """Here states are split again and again, which short texts seldom need."""
    for seed in range(60):
        text = random_ids(40, seed=seed, vocab=tokens)[0].tolist()
        first = longest_match(text, longest=len(text), shortest=2, most_recent=False)
        assert SuffixAutomaton(shortest=2).propose(text, 3).token_ids == copied(text, first, 3)


@pytest.mark.parametrize("proposer", [PromptLookup(shortest=1), SuffixAutomaton(shortest=1)])
def test_another_text_is_never_answered_from_the_one_before(proposer):
    assert proposer.propose([1, 2, 3, 1], 2).token_ids == [2, 3]
    assert proposer.propose([5, 6, 1], 2).token_ids == []
    assert proposer.propose([5, 6, 1, 5], 1).token_ids == [6]


def test_copy_from_runs_into_its_own_copy():
    assert copy_from([4, 5, 6], 1, 0) == []
    assert copy_from([4, 5, 6], 2, 3) == [6, 6, 6]
    assert copy_from([4, 5, 6], 0, 7) == [4, 5, 6, 4, 5, 6, 4]


@settings(deadline=None, max_examples=40)
@given(st.lists(texts, min_size=1, max_size=4), texts, st.integers(1, 3))
def test_corpus_ngram_equals_a_counter(rows, text, order):
    def favourite(context):
        for n in range(min(order, len(context)), 0, -1):
            grams = [tuple(row[i : i + n + 1]) for row in rows for i in range(len(row) - n)]
            found = Counter(gram[-1] for gram in grams if list(gram[:-1]) == context[-n:])
            if found:
                return min(found, key=lambda token: (-found[token], token))
        return None

    grown = list(text)
    while len(grown) < len(text) + 5 and (token := favourite(grown)) is not None:
        grown.append(token)
    assert CorpusNgram(rows, vocab_size=4, order=order).propose(text, 5).token_ids == grown[len(text) :]


def draft_of(model, *, max_length=40, **settings):
    return ModelDraft(ModelTarget(model, StaticKVCache(model.config, max_length=max_length)), **settings)


def test_a_draft_model_writes_what_it_would_write_alone_and_rewinds_to_what_is_shared():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(9)
    draft, text = draft_of(model), ids[0].tolist()
    alone = generate_naive(model, ids, 6)[0, 9:].tolist()
    assert draft.propose(text, 4).token_ids == alone[:4]
    assert draft.propose(text, 0).token_ids == []
    assert draft.propose([*text, *alone[:2]], 4).token_ids == alone[2:]  # two of four stood
    other = random_ids(7, seed=3)
    assert draft.propose(other[0].tolist(), 3).token_ids == generate_naive(model, other, 3)[0, 7:].tolist()
    assert draft.propose(other[0].tolist()[:4], 1).token_ids == generate_naive(model, other[:, :4], 1)[0, 4:].tolist()


def test_a_draft_model_reads_no_token_twice():
    model = tiny_model("llama-gqa-tied")
    draft, text, read = draft_of(model), random_ids(9)[0].tolist(), []
    inner = draft.model.prefill
    draft.model.prefill = lambda ids: read.append(ids.shape[1]) or inner(ids)
    drafted = draft.propose(text, 3).token_ids
    draft.propose([*text, *drafted, 1], 2)
    assert read == [9, 1, 1, 2, 1]  # the third drafted token was never read, so two are new


def test_a_sampled_draft_hands_over_what_it_drew_from():
    model, text = tiny_model("llama-gqa-tied"), random_ids(6)
    choose = Sampler(torch.Generator().manual_seed(0), temperature=0.8, top_p=0.9)
    proposal = draft_of(model, choose=choose).propose(text[0].tolist(), 4)
    whole = torch.cat([text, torch.tensor([proposal.token_ids])], dim=1)
    expected = choose.probs(forward_logits(model, whole)[0, 5:9])
    torch.testing.assert_close(proposal.probs, expected, atol=1e-4, rtol=0)
    assert (proposal.probs[range(4), proposal.token_ids] > 0).all()


def test_a_draft_model_whose_cache_is_full_proposes_less():
    draft = draft_of(tiny_model("llama-gqa-tied"), max_length=8)
    assert len(draft.propose(random_ids(6)[0].tolist(), 5).token_ids) == 3
    assert draft.propose(random_ids(9)[0].tolist(), 5).token_ids == []


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: PromptLookup(longest=1, shortest=2), "1 <= shortest <= longest; got 2 and 1"),
        (lambda: SuffixAutomaton(shortest=0), "at least 1; got 0"),
        (lambda: CorpusNgram([], vocab_size=4096, order=5), r"2\^63; got 1, 5 and 4096"),
        (lambda: CorpusNgram([], vocab_size=10, order=2, shortest=3), "got 3, 2 and 10"),
    ],
)
def test_proposers_bad_input_states_the_rule(make, rule):
    with pytest.raises(ValueError, match=rule):
        make()


def test_no_draft_and_an_empty_corpus_propose_nothing():
    assert NoDraft().propose([1, 2], 4).token_ids == []
    assert CorpusNgram([[1]], vocab_size=10).propose([1, 2], 4).token_ids == []
