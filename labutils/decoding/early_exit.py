"""Leaving early: a token's answer read after a few layers, as a draft for the whole model or as the answer itself.

* As a draft (self-speculation, LayerSkip, Elhoushi et al. 2024, arXiv:2404.16710): `exit_model` is an ordinary model of
  the first layers, so that any decoder runs it. It keeps a cache of its own: the whole model computes the same keys and
  values again when it checks the draft, which costs the draft's share of the layers once more, and keeps both simple.
* As the answer (CALM, Schuster et al. 2022, arXiv:2207.07061): each token leaves at the first layer that is sure
  enough. Layers that a token skipped take its keys and values from the hidden state it left with, so that later tokens
  find something to attend to: CALM's state propagation. Quality pays for it; nothing here is lossless.
"""

import copy
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, linear, rms_norm, softmax
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from labutils.generation.cache import KVCache
from labutils.lab.training.losses import LossOf, counted, forward_kl

Hidden = Float[Tensor, "batch positions width"]
# Layers run, hidden state before and after the last of them, what the output layer would read: which positions leave?
Leave = Callable[[int, Hidden, Hidden, Hidden], Bool[Tensor, "batch positions"]]


class ExitHeads(nn.Module):
    """An exit after every layer but the last: a norm gain and a matrix before the model's own output layer.

    logits = E M (g ⊙ h / rms(h)), where E is the model's output matrix. At first M is the identity and g is the final
    norm's gain: the untrained exit, also known as the logit lens.

    Args:
        model: built like Llama; only its sizes and its final norm are read.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        config, gain = model.config, model.model.norm.weight.detach()
        self.eps = config.rms_norm_eps
        self.gains = nn.Parameter(gain.repeat(config.num_hidden_layers - 1, 1))
        self.maps = nn.Parameter(torch.eye(len(gain), dtype=gain.dtype).repeat(config.num_hidden_layers - 1, 1, 1))

    def forward(self, hidden: Float[Tensor, "... width"], layers: int) -> Float[Tensor, "... width"]:
        """What the output layer reads if the text leaves after this many layers."""
        gain = self.gains[layers - 1]
        return linear(rms_norm(hidden, gain.shape, gain, self.eps), self.maps[layers - 1])


def exit_model(model: nn.Module, *, layers: int, heads: ExitHeads | None = None) -> nn.Module:
    """An ordinary model that leaves after some layers; it shares the embedding and the layers with the whole one.

    The exit's matrix goes into the output layer, E M, once; without `heads` the exit is the untrained one.

    Raises:
        ValueError: If the model would keep no layer, or all of them.
    """
    check_exit(layers, model.config.num_hidden_layers)
    heads = heads or ExitHeads(model)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.tie_word_embeddings = layers, False
    short = type(model)(config).to(dtype=model.dtype, device=model.device).requires_grad_(False)
    short.set_input_embeddings(model.get_input_embeddings())
    short.model.layers = nn.ModuleList(model.model.layers[:layers])
    short.model.norm.weight.copy_(heads.gains[layers - 1])
    short.get_output_embeddings().weight.copy_(model.get_output_embeddings().weight @ heads.maps[layers - 1])
    return short.eval()


def check_exit(layers: int, of: int) -> None:
    """Refuses an exit that is none.

    Raises:
        ValueError: If `layers` is outside 1 to `of` − 1.
    """
    if not 1 <= layers < of:
        raise ValueError(f"an exit lies after 1 to {of - 1} of {of} layers; got {layers}")


def exit_loss(model: nn.Module, heads: ExitHeads) -> LossOf:
    """KL(whole model ‖ exit), the mean over all exits: what `heads` learn, while the model stays as it is."""
    depth, output = model.config.num_hidden_layers, model.get_output_embeddings()

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        kept = counted(labels)
        with torch.no_grad():
            whole = model(input_ids=ids, use_cache=False, output_hidden_states=True)
            target = whole.logits[:, :-1][kept]
        states = [state[:, :-1][kept] for state in whole.hidden_states[1:depth]]  # the first is the embedding
        losses = [forward_kl(output(heads(state, n)), target) for n, state in enumerate(states, start=1)]
        return torch.stack(losses).mean()

    return loss


def by_margin(model: nn.Module, threshold: float) -> Leave:
    """Leave where the exit's best token leads the second by this much probability (CALM's softmax response)."""
    output = model.get_output_embeddings()

    def leave(layers: int, before: Hidden, after: Hidden, features: Hidden) -> Tensor:
        first, second = softmax(output(features), dim=-1).topk(2, dim=-1).values.unbind(-1)
        return first - second >= threshold

    return leave


def by_saturation(threshold: float) -> Leave:
    """Leave where a layer hardly turned the hidden state: cosine of before and after (CALM's state saturation)."""
    return lambda layers, before, after, features: cosine_similarity(before, after, dim=-1) >= threshold


def by_depth(depths: Int[Tensor, "batch positions"]) -> Leave:
    """Leave after a number of layers that was decided beforehand: a fixed one, or one drawn at random as a control."""
    return lambda layers, before, after, features: depths <= layers


@torch.no_grad()
def adaptive_logits(
    model: nn.Module, heads: ExitHeads, token_ids: Int[Tensor, "batch positions"], leave: Leave
) -> tuple[Float[Tensor, "batch positions vocab"], Int[Tensor, "batch positions"]]:
    """Logits at every position of a known text where each token leaves when it may, and the layers that each token ran.

    All positions go through a layer together; those that have left keep their hidden state, and the layer makes keys
    and values of it all the same: state propagation. Token by token, `AdaptiveDecoder` gives the same logits.
    """
    hidden, depth = model.get_input_embeddings()(token_ids), model.config.num_hidden_layers
    rope = model.model.rotary_emb(hidden, torch.arange(token_ids.shape[1], device=token_ids.device)[None])
    depths, features = torch.full_like(token_ids, depth), torch.empty_like(hidden)
    for layers, layer in enumerate(model.model.layers[:-1], start=1):
        running = depths == depth
        after = torch.where(running[..., None], layer(hidden, position_embeddings=rope), hidden)
        answer = heads(after, layers)
        leaving = running & leave(layers, hidden, after, answer)
        features = torch.where(leaving[..., None], answer, features)
        hidden, depths = after, depths.masked_fill(leaving, layers)
    whole = model.model.norm(model.model.layers[-1](hidden, position_embeddings=rope))
    features = torch.where((depths == depth)[..., None], whole, features)
    return model.get_output_embeddings()(features), depths


class AdaptiveDecoder:
    """One stream in which each token leaves when it may, in plain PyTorch; a `Decoder` of `labutils.generation`.

    Attributes:
        depths: Layers that each decoded token ran.
    """

    def __init__(self, model: nn.Module, heads: ExitHeads, leave: Leave) -> None:
        self.model, self.heads, self.leave = model, heads, leave
        self.cache, self.depths = KVCache(), []

    @torch.no_grad()
    def prefill(self, token_ids: Int[Tensor, "1 positions"]) -> Float[Tensor, "1 vocab"]:
        """Reads the prompt through all layers."""
        return self.model(input_ids=token_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[
            :, -1
        ]

    @torch.no_grad()
    def decode_one_token(self, next_ids: Int[Tensor, "1"]) -> Float[Tensor, "1 vocab"]:
        """Feeds one token; layers that it skips get their keys and values, and nothing else."""
        body, hidden = self.model.model, self.model.get_input_embeddings()(next_ids[None])
        position = self.cache.get_seq_length() if self.cache.keys else 0
        rope = body.rotary_emb(hidden, torch.tensor([[position]], device=hidden.device))
        for layers, layer in enumerate(body.layers, start=1):
            before = hidden
            hidden = layer(before, position_embeddings=rope, past_key_values=self.cache)
            features = body.norm(hidden) if layers == len(body.layers) else self.heads(hidden, layers)
            if layers == len(body.layers) or self.leave(layers, before, hidden, features):
                break
        for layer in body.layers[layers:]:
            self._propagate(layer, hidden, rope)
        self.depths.append(layers)
        return self.model.get_output_embeddings()(features)[:, -1]

    def _propagate(self, layer: nn.Module, hidden: Hidden, rope: tuple[Tensor, Tensor]) -> None:
        """Stores a skipped layer's keys and values, made of the hidden state that the token left with."""
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        keys, values = (
            project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.k_proj, attention.v_proj)
        )
        keys, _ = apply_rotary_pos_emb(keys, keys, *rope)
        self.cache.update(keys, values, attention.layer_idx)
