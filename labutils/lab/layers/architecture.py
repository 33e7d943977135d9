"""What a model is, read once and in one place: whatever depends on how a model is built asks here.

Two kinds of questions. Is this model built like Llama, of plain layers (`require_llama`, `require_plain_layers`)? And
what does each layer keep of a token (`layer_caches`)? The second is measured where a configuration leaves it open.
"""

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
ROPES = ("default", "linear", "llama3")  # rotary embeddings whose tables do not depend on the text
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
NORMS = ("input_layernorm", "post_attention_layernorm")
_measured: dict[tuple[type, str], tuple["LayerCache", ...]] = {}


@dataclass(frozen=True)
class Architecture:
    """How a Llama-like decoder is built.

    RMSNorm before attention and before a gated MLP, rotary embeddings on halves, queries in groups that share a key
    and a value.

    Attributes:
        family: `model_type` of its configuration.
        activation: of the gate.
        rope: kind of rotary embedding.
        sliding: whether some layer sees a window of the text only.
    """

    family: str
    activation: str | None
    rope: str | None
    sliding: bool
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config) -> "Architecture":
        """Reads a configuration.

        >>> from transformers import LlamaConfig
        >>> known = Architecture.of(LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2))
        >>> known.family, known.kv_heads, known.head_dim, known.sliding
        ('llama', 2, 16, False)
        """
        heads = config.num_attention_heads
        rope = getattr(config, "rope_parameters", None) or {}
        return cls(
            family=getattr(config, "model_type", ""),
            activation=getattr(config, "hidden_act", None),
            rope=rope.get("rope_type"),
            sliding=_slides(config),
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )


def _slides(config) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds) != {"full_attention"}
    return getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None) is not None


def require_llama(
    config, *, families: Collection[str] = LLAMA_LIKE, ropes: Collection[str] | None = None
) -> Architecture:
    """The architecture, where it is one of these families.

    Args:
        config: a Hugging Face configuration.
        families: model types that the caller knows.
        ropes: for callers that compute the layers themselves: the rotary embeddings they know. They take SiLU and
            full attention only.

    Raises:
        ValueError: naming the rule and what was found.
    """
    family = getattr(config, "model_type", None)
    if family not in families:
        raise ValueError(f"model_type must be one of {', '.join(families)}; got {family}")
    known = Architecture.of(config)
    if ropes is not None:
        require(
            {
                "hidden_act must be silu": (known.activation, known.activation == "silu"),
                f"rope_type must be one of {', '.join(ropes)}": (known.rope, known.rope in ropes),
                "attention must be full, not sliding": ("a sliding window", not known.sliding),
            }
        )
    return known


def require(rules: dict[str, tuple[object, bool]]) -> None:
    """Raises at the first rule that does not hold.

    Args:
        rules: each rule, in words, with the value found and whether it holds.

    Raises:
        ValueError: the rule, then the value.
    """
    for rule, (value, holds) in rules.items():
        if not holds:
            raise ValueError(f"{rule}; got {value}")


def require_token_ids(token_ids: Sequence[int], vocab: int) -> None:
    """Refuses an id that is no row of an embedding: a lookup would take another token's row, or other memory.

    >>> require_token_ids([0, 96], 97)

    Raises:
        IndexError: naming the rule and the first such id.
    """
    if wrong := [each for each in token_ids if not 0 <= each < vocab]:
        raise IndexError(f"token ids must be 0 to {vocab - 1}; got {int(wrong[0])}")


def require_layer(module: nn.Module | None, name: str, *kinds: type[nn.Module]) -> None:
    """Refuses a layer that was replaced by something else, subclasses included: they may compute something else.

    Raises:
        ValueError: naming the layer, the kinds and what stands there.
    """
    if type(module) not in kinds:
        wanted = " or ".join(f"nn.{k.__name__}" if k.__module__.startswith("torch.nn") else k.__name__ for k in kinds)
        raise ValueError(f"{name} must be {wanted}; got {type(module).__name__ if module is not None else 'nothing'}")


def require_norm(module: nn.Module | None, name: str) -> None:
    """Refuses a norm that is not the library's RMSNorm.

    Raises:
        ValueError: naming the norm and what stands there.
    """
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        raise ValueError(f"{name} must be RMSNorm; got {type(module).__name__ if module is not None else 'nothing'}")


def require_plain_layers(model: nn.Module, *kinds: type[nn.Module]) -> None:
    """Refuses a Llama-like model with a linear layer or a norm in it that is not what the library put there.

    Args:
        model: a causal LM of one of the families in `LLAMA_LIKE`.
        kinds: of linear layers that the caller can read; nn.Linear where none is given.

    Raises:
        ValueError: naming the first layer that is something else.
    """
    modules = dict(model.named_modules())
    for i in range(model.config.num_hidden_layers):
        for name in LINEARS:
            require_layer(modules.get(f"model.layers.{i}.{name}"), f"model.layers.{i}.{name}", *(kinds or (nn.Linear,)))
        for name in NORMS:
            require_norm(modules.get(f"model.layers.{i}.{name}"), f"model.layers.{i}.{name}")
    require_norm(modules.get("model.norm"), "model.norm")
    require_layer(modules.get("lm_head"), "lm_head", *(kinds or (nn.Linear,)))


def is_tied(model: nn.Module) -> bool:
    """Whether the head and the embedding share one weight, packed or not, whatever the configuration says."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    shared = [getattr(layer, "packed", None) or getattr(layer, "weight", None) for layer in (head, embedding)]
    return shared[0] is not None and shared[0] is shared[1]


@dataclass(frozen=True)
class LayerCache:
    """What a layer keeps of the text.

    Attributes:
        keys: (heads, head_dim) of the keys of one position.
        values: (heads, head_dim) of the values of one position.
        window: how many positions it keeps at most; None for all.
    """

    keys: tuple[int, int]
    values: tuple[int, int]
    window: int | None = None

    def numbers(self, positions: int) -> int:
        """Numbers kept after so many positions.

        >>> LayerCache(keys=(2, 16), values=(2, 16), window=7).numbers(24)
        448
        """
        kept = positions if self.window is None else min(positions, self.window)
        return kept * (math.prod(self.keys) + math.prod(self.values))


def layer_caches(config) -> tuple[LayerCache, ...]:
    """What each layer keeps of the text.

    A Llama-like configuration with full attention says it: `num_key_value_heads` heads of `head_dim`. Others do not:
    Falcon shares one key among all heads or copies it for each, latent attention (DeepSeek-V2, arXiv:2405.04434) caches
    one short vector for all, a sliding window drops the oldest positions (the library keeps window − 1). So one token
    goes through a model without weights (on PyTorch's meta device), and the library's own cache is looked at.

    Raises:
        ValueError: where a layer keeps other states (convolutions, recurrences), or the library cannot build or run
            the model.
    """
    known = not isinstance(config, PreTrainedConfig) or config.model_type in LLAMA_LIKE
    if known and not _slides(config):
        size = Architecture.of(config)
        shape = (size.kv_heads, size.head_dim)
        return (LayerCache(keys=shape, values=shape),) * size.layers
    text = config.get_text_config(decoder=True)
    key = (type(text), text.to_json_string())
    if key not in _measured:
        _measured[key] = _measure(text)
    return _measured[key]


def _measure(config: PreTrainedConfig) -> tuple[LayerCache, ...]:
    found = []
    for i, layer in enumerate(_after_one_token(config).layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or keys is None:
            if type(layer).__name__ == "DummyLayer":  # reads another layer's keys and values
                found.append(LayerCache(keys=(0, 0), values=(0, 0)))
                continue
            raise ValueError(
                "every layer must keep keys and values of each token, nothing else; got "
                + type(layer).__name__
                + f"{' without any' if keys is None else ''} in layer {i} of {type(config).__name__}"
            )
        window = layer.sliding_window - 1 if isinstance(layer, DynamicSlidingWindowLayer) else None
        found.append(LayerCache(keys=_heads(keys), values=_heads(values), window=window))
    return tuple(found)


def _heads(stored: torch.Tensor) -> tuple[int, int]:
    return stored.shape[1], stored.shape[3]


def _after_one_token(config: PreTrainedConfig) -> DynamicCache:
    """The library's cache after one token through a model without weights."""
    try:
        with torch.device("meta"), torch.no_grad():
            # bfloat16: the products of experts have no other type there
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16).eval()
            cache = DynamicCache(config=model.config)
            model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    except Exception as error:
        rule = f"the library must be able to run {type(config).__name__} on one token, to see what it keeps"
        raise ValueError(f"{rule}; got {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    return cache
