"""A tree of guesses instead of a chain: where the draft is unsure, its second choice is checked in the same step.

All nodes go through the target at once. Each attends to the text, to its ancestors and to itself, and stands at the
position that its depth says, as if its branch were the only one (SpecInfer, Miao et al. 2023, arXiv:2305.09781). Which
nodes are worth a row: the likeliest by the draft's own account (EAGLE-2, Li et al. 2024, arXiv:2406.16858).

Node 0 is the text's last token, which the cache does not hold yet; every other node names its parent, an earlier node.
"""

import heapq
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from labutils.decoding.heads import LookAhead
from labutils.decoding.speculate import Speculation, Step
from labutils.decoding.verify import up_to_stop
from labutils.generation.cache import KVCache


@dataclass(frozen=True)
class TokenTree:
    """Drafted tokens below the text's last token.

    Attributes:
        token_ids: one a node; the first is the text's last token.
        parents: of each node its parent's number, which is smaller; −1 for the first.
    """

    token_ids: list[int]
    parents: list[int]

    @property
    def depths(self) -> list[int]:
        """Steps from node 0."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths


Grow = Callable[[Float[Tensor, "1 width"], int], TokenTree]  # the target's last hidden state and last token -> a tree


def tree_mask(parents: Sequence[int]) -> Bool[Tensor, "nodes nodes"]:
    """Which nodes (columns) a node (row) may attend to: its ancestors and itself.

    >>> tree_mask([-1, 0, 0, 1]).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]

    Raises:
        ValueError: If a parent is no earlier node.
    """
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if not (parent < node and (parent >= 0 or node == 0)):
            raise ValueError(f"a node's parent must be an earlier node, of the first −1; got {list(parents)}")
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


def verify_tree(target_logits: Float[Tensor, "nodes vocab"], tree: TokenTree) -> tuple[list[int], int]:
    """Greedy: follows the target's choices down the tree; returns the nodes that stand, and the token after them.

    >>> logits = torch.tensor([[0.0, 0.0, 9.0], [9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
    >>> verify_tree(logits, TokenTree([0, 1, 2], [-1, 0, 0]))
    ([0, 2], 1)
    """
    wanted, path = target_logits.argmax(dim=-1).tolist(), [0]
    while True:
        children = (n for n, parent in enumerate(tree.parents) if parent == path[-1])
        match = next((n for n in children if tree.token_ids[n] == wanted[path[-1]]), None)
        if match is None:
            return path, wanted[path[-1]]
        path.append(match)


class TreeTarget:
    """A Llama of `transformers` that reads a tree in one pass and keeps one of its branches."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.cache = model, KVCache()

    def read(self, tree: TokenTree) -> tuple[Float[Tensor, "nodes vocab"], Float[Tensor, "nodes width"]]:
        """Logits after each node, and the hidden states that they come from."""
        start, nodes = self.cache.get_seq_length(), len(tree.parents)
        mask = torch.cat([torch.ones(nodes, start, dtype=torch.bool), tree_mask(tree.parents)], dim=1)
        hidden = self.model.model(
            input_ids=torch.tensor([tree.token_ids]),
            position_ids=torch.tensor([tree.depths]) + start,
            attention_mask=mask[None, None],
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return self.model.lm_head(hidden)[0], hidden[0]

    def keep(self, path: list[int], *, of: int) -> None:
        """Forgets the nodes of the last tree, of `of` nodes, that are not on the path."""
        start = self.cache.get_seq_length() - of
        places = torch.tensor([*range(start), *(start + node for node in path)])
        self.cache.keys = [keys[:, :, places] for keys in self.cache.keys]
        self.cache.values = [values[:, :, places] for values in self.cache.values]


@torch.inference_mode()
def generate_tree(
    model: nn.Module, grow: Grow, token_ids: Int[Tensor, "1 positions"], max_new_tokens: int, stop: Collection[int] = ()
) -> Speculation:
    """Greedy decoding of a Llama by trees; the same tokens as without, a tree of one node being plain decoding."""
    target, began, text = TreeTarget(model), time.perf_counter(), token_ids[0].tolist()
    prompt = TokenTree(text, list(range(-1, len(text) - 1)))  # a chain
    logits, hidden = target.read(prompt)
    end, path, steps = len(text) + max_new_tokens, [-1], []
    text.append(int(logits[-1].argmax()))
    prefill_s = time.perf_counter() - began
    while len(text) < end and text[-1] not in stop:
        began = time.perf_counter()
        tree = grow(hidden[path[-1:]], text[-1])
        grown = time.perf_counter()
        logits, hidden = target.read(tree)
        path, token = verify_tree(logits, tree)
        target.keep(path, of=len(tree.parents))
        new = up_to_stop([*(tree.token_ids[node] for node in path[1:]), token][: end - len(text)], stop)
        text += new
        drafted = len(tree.parents) - 1
        steps.append(Step(drafted, len(path) - 1, len(new), grown - began, time.perf_counter() - grown))
    return Speculation(torch.tensor([text]), prefill_s, tuple(steps))


def likeliest_tree(head: LookAhead, model: nn.Module, *, nodes: int, branches: int) -> Grow:
    """Grows a tree of `nodes` drafted tokens, always the likeliest that is left by the draft's own probabilities.

    With one branch it is a chain, so both cost the same steps of the head and the same rows of the target.
    """
    embed, output = model.get_input_embeddings(), model.get_output_embeddings()

    def grow(state: Tensor, token: int) -> TokenTree:
        tokens, parents = [token], [-1]
        candidates: list[tuple[float, int, int, Tensor]] = []  # cost, a tie-breaker, parent, token, the parent's state

        def expand(node: int, cost: float, state: Tensor) -> None:
            after = head(state, embed(torch.tensor([tokens[node]])))
            best = output(after).float().log_softmax(dim=-1)[0].topk(branches)
            for log_prob, child in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                heapq.heappush(candidates, (cost - log_prob, len(parents) * branches + child, node, child, after))

        expand(0, 0.0, state)
        while len(parents) <= nodes:
            cost, _, parent, child, state = heapq.heappop(candidates)
            tokens.append(child)
            parents.append(parent)
            if len(parents) <= nodes:
                expand(len(parents) - 1, cost, state)
        return TokenTree(tokens, parents)

    return grow
