import pytest
import torch
from tiny_models import random_ids, tiny_model

from labutils.decoding.heads import POSITIONS_AHEAD, LookAhead, LookAheadDraft, look_ahead_loss
from labutils.decoding.speculate import generate_speculative
from labutils.generation.decode import generate_cached
from labutils.generation.fast_llama import FastLlama
from labutils.generation.sampling import Sampler
from labutils.lab.models.tiled import tiled_model
from labutils.lab.training.loop import FitPlan, fit_
from labutils.lab.training.losses import IGNORED, forward_kl


def random_head(model, seed=0):
    head = LookAhead(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return head


def test_untrained_head_repeats_the_state():
    model = tiny_model("llama-gqa-tied")
    hidden, embedded = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    assert torch.equal(LookAhead(model)(hidden, embedded), hidden)


def test_look_ahead_loss_equals_a_loop_over_places():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(9, batch=2)
    head, labels = random_head(model), ids.clone()
    labels[1, :5] = IGNORED
    with torch.no_grad():
        loss = look_ahead_loss(model, head)(ids, labels)
        states = model.model(input_ids=ids).last_hidden_state
        embedded, each = model.get_input_embeddings()(ids), []
        for row, position in ((r, i) for r in range(2) for i in range(9) if i + POSITIONS_AHEAD < 9):
            state = states[row, position]
            for ahead in range(1, POSITIONS_AHEAD + 1):
                state = head(state, embedded[row, position + ahead])
                if labels[row, position + 2] != IGNORED:
                    each.append(forward_kl(model.lm_head(state), model.lm_head(states[row, position + ahead])))
    torch.testing.assert_close(loss, torch.stack(each).mean())


def test_look_ahead_learns():
    model = tiny_model("llama-gqa-tied").requires_grad_(False)
    head, ids = LookAhead(model), random_ids(24, batch=4)
    losses = fit_(head, lambda step: [(ids, ids)], look_ahead_loss(model, head), FitPlan(steps=30, lr=0.01))
    assert losses[-1] < 0.6 * losses[0]


def test_draft_follows_the_heads_own_states():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(6)
    target, head = FastLlama(model, max_length=32, matvec="numpy"), random_head(model)
    first = int(target.prefill(ids).argmax())
    drafted = LookAheadDraft(target, head, model).propose([*ids[0].tolist(), first], 3).token_ids
    with torch.no_grad():
        state, token, expected = model.model(input_ids=ids).last_hidden_state[0, -1], first, []
        for _ in range(3):
            state = head(state, model.get_input_embeddings().weight[token])
            token = int(model.lm_head(state).argmax())
            expected.append(token)
    assert drafted == expected


@pytest.mark.parametrize("width", [1, 2])
def test_draft_leaves_greedy_text_as_it_is_on_a_tiled_target_too(width):
    model, ids = tiny_model("llama-gqa-tied"), random_ids(6)
    target = FastLlama(tiled_model(model, width=width), max_length=32, matvec="numpy")
    made = generate_speculative(target, LookAheadDraft(target, random_head(model), model), ids, 20, draft_tokens=3)
    assert torch.equal(made.token_ids, generate_cached(model, ids, 20))


def test_tiled_target_gets_the_same_drafts():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(6)
    drafts = []
    for subject in (model, tiled_model(model, width=2)):
        target = FastLlama(subject, max_length=32, matvec="numpy")
        text = [*ids[0].tolist(), int(target.prefill(ids).argmax())]
        drafts.append(LookAheadDraft(target, random_head(model), model).propose(text, 4).token_ids)
    assert drafts[0] == drafts[1]


def test_sampling_draft_hands_over_its_distributions():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(6)
    target, sampler = FastLlama(model, max_length=32, matvec="numpy"), Sampler(torch.Generator().manual_seed(0))
    target.prefill(ids)
    proposal = LookAheadDraft(target, random_head(model), model, choose=sampler).propose(ids[0].tolist(), 3)
    assert proposal.probs.shape == (3, 97) and torch.allclose(proposal.probs.sum(-1), torch.ones(3))
