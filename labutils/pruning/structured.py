"""Structured pruning by physical removal: neurons, head groups, layers or width leave, an ordinary model stays.

Each function returns a new, smaller Hugging Face model of the same class (`save_pretrained`, `from_pretrained` and
GGUF export treat it like any other) and leaves the old one as it was. Hugging Face's configuration knows one size for
all layers, so every layer loses equally many; *which* ones go may differ from layer to layer.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from labutils.lab.layers.architecture import Architecture, require_llama, require_plain_layers
from labutils.lab.layers.calibration import InputStatistics
from labutils.pruning.scores import column_scores
from labutils.pruning.similarity import reconstruct

Indices = Int[Tensor, " kept"]
State = dict[str, Tensor]
READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def require_removable(model: nn.Module) -> Architecture:
    """What is known of a model that can lose parts: one built like Llama, of plain layers.

    Raises:
        ValueError: naming the architecture, or the layer that was replaced.
    """
    known = require_llama(model.config)
    require_plain_layers(model)
    return known


def rebuilt(model: nn.Module, state: State, **sizes) -> nn.Module:
    """A model of the same class with other sizes and these weights.

    Raises:
        ValueError: when the model is not built like Llama.
    """
    known = require_removable(model)
    config = copy.deepcopy(model.config)
    for name, value in ({"head_dim": known.head_dim} | sizes).items():
        setattr(config, name, value)
    smaller = type(model)(config).to(dtype=model.dtype, device=model.device)
    smaller.load_state_dict(state)
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.eval()


def _select_(state: State, name: str, *, rows: Indices | None = None, columns: Indices | None = None) -> None:
    """Keeps rows (outputs, with their bias) or columns (inputs) of a linear layer's entry."""
    if rows is not None:
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in state:
                state[f"{name}.{kind}"] = state[f"{name}.{kind}"][rows]
    if columns is not None:
        state[f"{name}.weight"] = state[f"{name}.weight"][:, columns]


def _checked(kept: Sequence[Indices], *, layers: int, of: int, what: str) -> int:
    """The common number kept, in every layer."""
    sizes = {len(each) for each in kept}
    if len(kept) != layers or len(sizes) != 1 or not 0 < min(sizes) <= of:
        raise ValueError(f"every one of {layers} layers must keep equally many {what}, 1 to {of}; got {sorted(sizes)}")
    if any(len(each.unique()) < len(each) or each.min() < 0 or each.max() >= of for each in kept):
        raise ValueError(f"kept {what} must be different numbers from 0 to {of - 1}")
    return sizes.pop()


def keep_neurons(
    model: nn.Module, kept: Sequence[Indices], *, grams: Sequence[Float[Tensor, "n n"]] | None = None
) -> nn.Module:
    """Keeps these MLP neurons of each layer: rows of gate and up, columns of down.

    Args:
        model: built like Llama.
        kept: for each layer, which neurons.
        grams: XᵀX of each layer's `down_proj` inputs; with it the kept columns make up for the others (`reconstruct`).

    Raises:
        ValueError: when layers keep differently many, or a neuron does not exist.
    """
    require_removable(model)
    config, state = model.config, model.state_dict()
    size = _checked(kept, layers=config.num_hidden_layers, of=config.intermediate_size, what="neurons")
    for i, neurons in enumerate(kept):
        mlp = f"model.layers.{i}.mlp"
        for name in ("gate_proj", "up_proj"):
            _select_(state, f"{mlp}.{name}", rows=neurons)
        down = state[f"{mlp}.down_proj.weight"]
        state[f"{mlp}.down_proj.weight"] = down[:, neurons] if grams is None else reconstruct(down, grams[i], neurons)
    return rebuilt(model, state, intermediate_size=size)


def keep_head_groups(model: nn.Module, kept: Sequence[Indices]) -> nn.Module:
    """Keeps these groups of each layer: a key-value head with all the query heads that share it (GQA).

    Raises:
        ValueError: when layers keep differently many groups, or a group does not exist.
    """
    known, state = require_removable(model), model.state_dict()
    width, groups, shared = known.head_dim, known.kv_heads, known.heads // known.kv_heads
    size = _checked(kept, layers=known.layers, of=groups, what="head groups")
    for i, chosen in enumerate(kept):
        attention = f"model.layers.{i}.self_attn"
        keys, queries = _spans(chosen, width), _spans(chosen, shared * width)
        _select_(state, f"{attention}.q_proj", rows=queries)
        _select_(state, f"{attention}.k_proj", rows=keys)
        _select_(state, f"{attention}.v_proj", rows=keys)
        _select_(state, f"{attention}.o_proj", columns=queries)
    return rebuilt(model, state, num_attention_heads=size * shared, num_key_value_heads=size)


def _spans(chosen: Indices, width: int) -> Int[Tensor, " positions"]:
    """Positions of whole blocks of that width."""
    return (chosen[:, None] * width + torch.arange(width)).flatten()


def keep_layers(model: nn.Module, kept: Sequence[int]) -> nn.Module:
    """Keeps these decoder layers, in their order.

    Raises:
        ValueError: when none is kept, or one does not exist.
    """
    count = require_removable(model).layers
    if not kept or sorted(set(kept)) != list(kept) or not 0 <= kept[0] <= kept[-1] < count:
        raise ValueError(
            f"kept layers must be increasing numbers from 0 to {count - 1}, at least one; got {list(kept)}"
        )
    prefix = "model.layers."
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefix)}
    for new, old in enumerate(kept):
        state |= {f"{prefix}{new}.{name}": t for name, t in model.model.layers[old].state_dict().items()}
    types = getattr(model.config, "layer_types", None)
    changes = {} if types is None else {"layer_types": [types[old] for old in kept]}
    return rebuilt(model, state, num_hidden_layers=len(kept), **changes)


def keep_channels(model: nn.Module, kept: Indices) -> nn.Module:
    """Keeps these channels of the residual stream: in embeddings, norms, and every matrix that reads or writes it.

    RMSNorm divides by the mean over the width, so its gain takes a factor √(width / kept) and its epsilon the
    square of it: the smaller model equals the old one with the other channels held at zero.

    Raises:
        ValueError: when a channel does not exist.
    """
    require_removable(model)
    config, state = model.config, model.state_dict()
    size = _checked([kept], layers=1, of=config.hidden_size, what="channels")
    share = size / config.hidden_size
    for name in [f"model.layers.{i}.{n}" for i in range(config.num_hidden_layers) for n in READERS]:
        _select_(state, name, columns=kept)
    for name in [f"model.layers.{i}.{n}" for i in range(config.num_hidden_layers) for n in WRITERS]:
        _select_(state, name, rows=kept)
    for name in ("model.embed_tokens", "lm_head"):
        _select_(state, name, columns=kept)
    for name, tensor in state.items():
        if name.endswith(("layernorm.weight", "model.norm.weight")):
            state[name] = tensor[kept] / share**0.5
    return rebuilt(model, state, hidden_size=size, rms_norm_eps=config.rms_norm_eps / share)


def neuron_scores(model: nn.Module, statistics: dict[str, InputStatistics]) -> list[Float[Tensor, " n"]]:
    """`column_scores` of each layer's MLP neurons, at `down_proj`."""
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(require_removable(model).layers)]
    return [column_scores(model.get_submodule(n).weight.detach(), statistics[n].norms) for n in names]


def head_group_scores(model: nn.Module, statistics: dict[str, InputStatistics]) -> list[Float[Tensor, " groups"]]:
    """Root of the summed squares of `column_scores` over each group's part of `o_proj`."""
    known = require_removable(model)
    names = [f"model.layers.{i}.self_attn.o_proj" for i in range(known.layers)]
    scores = [column_scores(model.get_submodule(n).weight.detach(), statistics[n].norms) for n in names]
    return [each.view(known.kv_heads, -1).norm(dim=1) for each in scores]


def channel_scores(model: nn.Module, statistics: dict[str, InputStatistics]) -> Float[Tensor, " hidden"]:
    """Summed squares of `column_scores` over every matrix that reads the residual stream."""
    names = [f"model.layers.{i}.{n}" for i in range(require_removable(model).layers) for n in READERS]
    scores = [column_scores(model.get_submodule(n).weight.detach(), statistics[n].norms) for n in names]
    return torch.stack(scores).square().sum(dim=0)


def strongest(scores: Float[Tensor, " n"], count: int) -> Indices:
    """Positions of the `count` largest scores, in their order.

    >>> strongest(torch.tensor([5.0, 1.0, 9.0]), 2)
    tensor([0, 2])
    """
    return scores.topk(count).indices.sort().values


@torch.no_grad()
def block_influence(model: nn.Module, batches: Iterable[Int[Tensor, "b positions"]]) -> list[float]:
    """1 − mean cos(x_in, x_out) of every decoder layer (ShortGPT, Men et al. 2024, arXiv:2403.03853, equation 1).

    Near 0: the layer hardly turns the residual stream, so it is the first candidate to go.

    Raises:
        ValueError: when there is no batch, the model is not built like Llama, or it computes NaN, as one in float16
            may.
    """
    require_llama(model.config)
    cosines: list[list[Tensor]] = [[] for _ in model.model.layers]

    def watch(index: int) -> Callable:
        def hook(_module, inputs, output) -> None:
            after = output[0] if isinstance(output, tuple) else output
            cosines[index].append(torch.cosine_similarity(inputs[0].float(), after.float(), dim=-1).flatten())

        return hook

    handles = [layer.register_forward_hook(watch(i)) for i, layer in enumerate(model.model.layers)]
    try:
        for token_ids in batches:
            model(token_ids)
    finally:
        for handle in handles:
            handle.remove()
    if not all(cosines):
        raise ValueError("block influence needs at least one batch; got none")
    influences = [1 - torch.cat(each).mean().item() for each in cosines]
    if any(math.isnan(value) for value in influences):
        layer = next(index for index, value in enumerate(influences) if math.isnan(value))
        raise ValueError(f"block influence needs numbers; got nan in layer {layer} (a model in float16 may overflow)")
    return influences
