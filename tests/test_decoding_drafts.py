import pytest
import torch
from tiny_models import random_ids, tiny_model

from labutils.decoding.drafts import TrimmedTarget, frequent_tokens, full_vocabulary, trim_head
from labutils.decoding.proposers import ModelDraft
from labutils.decoding.speculate import generate_speculative
from labutils.decoding.target import ModelTarget
from labutils.decoding.verify import acceptance_probs, residual
from labutils.generation.decode import generate_cached
from labutils.generation.fast_llama import FastLlama
from labutils.generation.sampling import Sampler, greedy
from labutils.lab.models.quantized import fast_float_llama
from labutils.quantization.kernels import find_kernels

KEPT = torch.tensor([0, 3, 5, 40, 41, 42, 96])


def trimmed_draft(model, choose=greedy, kept=KEPT):
    decoder = FastLlama(trim_head(model, kept), max_length=64, matvec="numpy")
    return ModelDraft(TrimmedTarget(decoder, kept, vocab_size=97), choose=choose)


def test_frequent_tokens_by_hand():
    assert frequent_tokens([[4, 4, 1], [1, 4, 0]], vocab_size=6, count=3).tolist() == [0, 1, 4]
    assert frequent_tokens([[4], [2]], vocab_size=6, count=1).tolist() == [2]  # a tie: the smaller id
    assert frequent_tokens([], vocab_size=3, count=3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("count", [0, 7])
def test_frequent_tokens_refuses_a_count_beyond_the_vocabulary(count):
    with pytest.raises(ValueError, match=f"1 to vocab_size=6 tokens; got {count}"):
        frequent_tokens([[1]], vocab_size=6, count=count)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-untied-bias"])
def test_trim_head_gives_the_whole_heads_logits_of_the_kept_tokens(name):
    model, ids = tiny_model(name), random_ids(9)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(trim_head(model, KEPT)(ids).logits, model(ids).logits[..., KEPT])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.config.tie_word_embeddings == (name == "llama-gqa-tied")


def test_trimmed_target_is_silent_about_all_other_tokens():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(9)
    target = TrimmedTarget(FastLlama(trim_head(model, KEPT), max_length=16, matvec="numpy"), KEPT, vocab_size=97)
    probs = Sampler(torch.Generator(), temperature=0.7, top_p=0.9).probs(target.prefill(ids))
    others = torch.ones(97, dtype=torch.bool).index_fill(0, KEPT, False)
    assert probs[0, others].sum() == 0 and probs.sum() == pytest.approx(1)
    rows = target.extend([1, 2])
    target.rewind(2)
    assert rows.shape == (2, 97) and target.length == 9


@pytest.mark.skipif(find_kernels()[0] is None, reason=find_kernels()[1] or "")
def test_a_trimmed_decoder_reads_tokens_that_it_never_answers_with():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(9)
    trimmed = trim_head(model, KEPT)
    assert ids.max() >= len(KEPT)
    decoders = [fast_float_llama(trimmed, max_length=16), FastLlama(trimmed, max_length=16, matvec="numpy")]
    ours, expected = (decoder.prefill(ids) for decoder in decoders)
    torch.testing.assert_close(ours, expected)
    with pytest.raises(IndexError, match="token ids must be 0 to 96; got 97"):
        decoders[0].extend([97])


@pytest.mark.parametrize("draft_tokens", [1, 3])
def test_trimmed_draft_leaves_greedy_text_as_it_is(draft_tokens):
    model, ids = tiny_model("llama-gqa-tied"), random_ids(7)
    target = ModelTarget(model)
    made = generate_speculative(target, trimmed_draft(model), ids, 20, draft_tokens=draft_tokens)
    assert torch.equal(made.token_ids, generate_cached(model, ids, 20))
    everything = trimmed_draft(model, kept=torch.arange(97))
    assert generate_speculative(target, everything, ids, 20, draft_tokens=draft_tokens).acceptance == 1


def test_trimmed_draft_leaves_the_sampled_law_as_it_is():
    target_probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    draft_probs = full_vocabulary(torch.tensor([[1.0, 0.0]]), torch.tensor([0, 2]), 4).softmax(-1).double()
    law = torch.zeros(4, dtype=torch.float64)
    for token in (0, 2):
        drawn = draft_probs[0, token]
        stands = acceptance_probs(target_probs, [token], draft_probs)[0]
        law[token] += drawn * stands
        law += drawn * (1 - stands) * residual(target_probs[0], draft_probs[0])
    torch.testing.assert_close(law, target_probs[0])


def test_trimmed_draft_hands_over_what_it_drew_from():
    sampler = Sampler(torch.Generator().manual_seed(0), temperature=1.5)
    proposal = trimmed_draft(tiny_model("llama-gqa-tied"), sampler).propose([4, 5, 6], 5)
    assert set(proposal.token_ids) <= set(KEPT.tolist()) and proposal.probs.shape == (5, 97)
    assert all(proposal.probs[i, token] > 0 for i, token in enumerate(proposal.token_ids))
