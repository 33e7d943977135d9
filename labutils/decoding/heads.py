"""A head that looks ahead: from what the target knows here and the token it chose, a guess at the token after that.

The target's last hidden state h_i already holds the whole text; the head adds the token that the state does not know
yet, the one just chosen, and answers with the hidden state that the target would have had one position later:

    h'_{i+1} = h_i + e(t_{i+1}) + W_down swiglu(W_gate_up [h_i; e(t_{i+1})]),    logits = E h'_{i+1}

with the target's own embedding e and output matrix E. Fed with its own answer and its own guess it goes on to the next
position. EAGLE (Li et al. 2024, arXiv:2401.15077) and the MTP modules of DeepSeek-V3 (arXiv:2412.19437, section 2.2)
put an attention layer into the block; without one, as in Hydra (Ankner et al. 2024, arXiv:2402.05109), it needs no
cache.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from labutils.decoding.proposers import Proposal, draft_one_by_one
from labutils.generation.fast_llama import FastLlama
from labutils.generation.sampling import greedy
from labutils.lab.training.losses import LossOf, counted, forward_kl

NEURONS = 768
POSITIONS_AHEAD = 2  # that the head is trained to go on for


class LookAhead(nn.Module):
    """The block between a target's hidden state and its output layer, for the position after the next.

    Args:
        model: the target; only its width is read.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        width = model.config.hidden_size
        self.gate_up = nn.Linear(2 * width, 2 * NEURONS, bias=False)
        self.down = nn.Linear(NEURONS, width, bias=False)
        nn.init.zeros_(self.down.weight)  # at first it repeats the state

    def forward(
        self, hidden: Float[Tensor, "*positions width"], embedded: Float[Tensor, "*positions width"]
    ) -> Float[Tensor, "*positions width"]:
        """The state one position later, from the state here and the embedding of the token that follows it."""
        token = rms_norm(embedded, embedded.shape[-1:], eps=1e-6)
        gate, up = self.gate_up(torch.cat([hidden, token], dim=-1)).chunk(2, dim=-1)
        return hidden + self.down(silu(gate) * up)


def look_ahead_loss(model: nn.Module, head: LookAhead) -> LossOf:
    """KL(target ‖ head) at the first and the second position ahead, the mean of both; the model stays as it is.

    At the second the head reads its own state, as it will when it drafts (EAGLE-3's training-time test, Li et al.
    2025, arXiv:2503.01840), but the text's own tokens. A position counts if the first label that it foretells does.
    """
    embed, output = model.get_input_embeddings(), model.get_output_embeddings()

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        rows, positions = counted(labels)[:, 1 : ids.shape[1] - POSITIONS_AHEAD + 1].nonzero(as_tuple=True)
        with torch.no_grad():
            states = model.model(input_ids=ids, use_cache=False).last_hidden_state
        state, losses = states[rows, positions], []
        for ahead in range(1, POSITIONS_AHEAD + 1):
            state = head(state, embed(ids[rows, positions + ahead]))
            losses.append(forward_kl(output(state), output(states[rows, positions + ahead])).mean())
        return torch.stack(losses).mean()

    return loss


class LookAheadDraft:
    """Drafts for a `FastLlama` from the hidden state of its last position; keeps nothing between calls.

    Args:
        target: the decoder whose text is drafted; a tiled one's copies are added up.
        head: trained on `model`.
        model: whose embedding and output layer the head was trained with; packed ones will do.
        choose: `greedy`, or a `Sampler` that draws the tokens and hands over the distributions it drew from.
    """

    def __init__(
        self, target: FastLlama, head: LookAhead, model: nn.Module, *, choose: Callable[[Tensor], Tensor] = greedy
    ) -> None:
        self.target, self.head, self.choose = target, head, choose
        self.embed, self.output = model.get_input_embeddings(), model.get_output_embeddings()
        self.width = model.config.hidden_size

    def propose(self, token_ids: list[int], count: int) -> Proposal:
        """Returns `count` tokens, each from the state that the head foretold for the position before it."""
        state = torch.from_numpy(self.target.hidden[-1]).view(-1, self.width).sum(dim=0, keepdim=True)

        def logits_after(drafted: list[int]) -> Tensor:
            nonlocal state
            last = (drafted or token_ids)[-1]
            state = self.head(state, self.embed(torch.tensor([last])))
            return self.output(state)

        with torch.inference_mode():
            return draft_one_by_one(logits_after, count, choose=self.choose)
