"""A Llama decoder written plainly for one stream on a CPU, on the same fp32 weights.

Decoding one token multiplies every weight matrix by one vector, so its floor is: bytes of weights / bandwidth.
`transformers` stays above that floor for three reasons, and each has its answer here:

* Python and dispatch between the kernels: preallocated buffers and a dozen NumPy calls a layer.
* Seven matrices a layer: q, k, v become one, gate and up become one, so each call is long enough to stream.
* The matrix-vector kernel: on some CPUs PyTorch's BLAS does not use a second core for it, NumPy's does.
  `matvec="auto"` times both on this model's own matrices and keeps the faster.

The fused matrices are a parameter, and `few_tokens` may be set: `lab.models.quantized` passes quantized ones, and
tokens through C.

NumPy and PyTorch share the memory of every array here; nothing is copied between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from labutils.generation.cache import check_truncation, length_after_rewind
from labutils.generation.llama_steps import attend, rms_norm, swiglu
from labutils.generation.sampling import Sampler, greedy
from labutils.lab.layers.architecture import ROPES, Architecture, is_tied, require, require_llama, require_plain_layers

Choose = Callable[[Tensor], Tensor]
SUPPORTED = ("llama", "qwen2")
MATVECS = ("numpy", "torch")
BLOCK = 32  # tokens between two looks at the keyboard: Ctrl-C waits for a call into C


class Linear:
    """Layers that read the same input, stacked into one fp32 matrix (out_features, in_features)."""

    def __init__(self, *layers: nn.Linear) -> None:
        weights = [layer.weight.detach().float() for layer in layers]
        self.weight = (torch.cat(weights) if len(weights) > 1 else weights[0]).contiguous()
        self.array = self.weight.numpy()
        self.bias = (
            None if layers[0].bias is None else torch.cat([layer.bias.detach().float() for layer in layers]).numpy()
        )
        self.out = torch.empty(len(self.weight))
        self.out_array = self.out.numpy()

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix and the bias."""
        return self.array.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: np.ndarray, matvec: str) -> np.ndarray:
        """Returns x W^T + b for x (positions, in_features); a single position goes through `matvec`.

        A single position's result lies in this layer's buffer and is overwritten by the next call.
        """
        if len(x) > 1:
            y = torch.nn.functional.linear(torch.from_numpy(x), self.weight).numpy()
        elif matvec == "numpy":
            y = np.dot(self.array, x[0], out=self.out_array)[None]
        else:
            torch.mv(self.weight, torch.from_numpy(x[0]), out=self.out)
            y = self.out_array[None]
        return y if self.bias is None else np.add(y, self.bias, out=y)


Fuse = Callable[..., Linear]  # layers that read the same input -> something that behaves like `Linear`


@dataclass(frozen=True)
class Layer:
    """A decoder layer's weights."""

    attention_gain: np.ndarray
    qkv: Linear
    output: Linear
    mlp_gain: np.ndarray
    gate_up: Linear
    down: Linear

    @classmethod
    def of(cls, layer: nn.Module, fuse: Fuse) -> Layer:
        """Takes over a `transformers` decoder layer."""
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            attention_gain=_array(layer.input_layernorm.weight),
            qkv=fuse(attention.q_proj, attention.k_proj, attention.v_proj),
            output=fuse(attention.o_proj),
            mlp_gain=_array(layer.post_attention_layernorm.weight),
            gate_up=fuse(mlp.gate_proj, mlp.up_proj),
            down=fuse(mlp.down_proj),
        )


class FastLlama:
    """Decodes one stream of a Llama-architecture model; by default in fp32, the weights copied once, fused.

    Args:
        model: A `LlamaForCausalLM` or `Qwen2ForCausalLM` of `transformers`, on the CPU.
        max_length: Positions to make room for.
        matvec: `numpy`, `torch`, or `auto` to measure which is faster here, with the threads set now.
        fuse: Makes one matrix of layers that read the same input.
        kinds: Linear layers that `fuse` can read.

    Attributes:
        few_tokens: Reads tokens in one call, as `packed_steps.FewTokens`; None for NumPy and PyTorch.
        hidden: What the last call gave the head, (rows, width), without what was rewound since.

    Raises:
        ValueError: If the model differs from Llama in a way this decoder does not know.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_length: int,
        matvec: str = "auto",
        fuse: Fuse = Linear,
        kinds: tuple[type[nn.Module], ...] = (nn.Linear,),
    ) -> None:
        known = check_supported(model.config, max_length=max_length, matvec=matvec)
        require_plain_layers(model, *kinds)
        self.max_length, self.length = max_length, 0
        self.hidden = np.zeros((0, model.config.hidden_size), np.float32)
        self.eps = np.float32(model.config.rms_norm_eps)
        self.few_tokens = None
        self.embedding, self.tied = model.get_input_embeddings(), is_tied(model)
        self.head = fuse(model.get_output_embeddings())  # the largest matrix first: two of it, and none of the others
        self.layers = [Layer.of(layer, fuse) for layer in model.model.layers]
        self.final_gain = _array(model.model.norm.weight)
        self.cos, self.sin = _rotary_tables(model, max_length)
        shape = (known.layers, known.kv_heads, max_length, known.head_dim)
        self.keys, self.values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.matvec = faster_matvec(self._matrices()) if matvec == "auto" else matvec

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights one token reads: every matrix and gain, and one row of an untied embedding."""
        gains = (2 * len(self.layers) + 1) * self.final_gain.nbytes
        row = 0 if self.tied else self.final_gain.nbytes
        return sum(m.nbytes for m in self._matrices()) + gains + row

    def prefill(self, token_ids: Int[Tensor, "..."]) -> Float[Tensor, "1 vocab"]:
        """Reads tokens (1, positions) behind what is cached and returns the logits after the last one.

        Raises:
            ValueError: If there is not exactly one row of at least one token, or no room for it.
        """
        _require_one_row(token_ids)
        return self._forward(token_ids[0].tolist(), rows=1)

    def decode_one_token(self, next_ids: Int[Tensor, "..."]) -> Float[Tensor, "1 vocab"]:
        """Feeds one token (1,) and returns the logits of the next, in a buffer that the next call overwrites.

        Raises:
            ValueError: If there is not exactly one token, or no room for it.
        """
        if next_ids.shape != (1,):
            raise ValueError(f"next_ids must have shape (1,); got {tuple(next_ids.shape)}")
        return self._forward(next_ids.tolist(), rows=1)

    def extend(self, token_ids: list[int]) -> Float[Tensor, "new vocab"]:
        """Reads tokens behind what is cached and returns the logits after each of them; see `decode_one_token`."""
        return self._forward(token_ids, rows=len(token_ids))

    def truncate(self, length: int) -> None:
        """Forgets everything from position `length` on.

        Raises:
            ValueError: If fewer positions are cached, or `length` is negative.
        """
        check_truncation(length, self.length)
        self.length = length

    def rewind(self, count: int) -> None:
        """Forgets the last `count` positions.

        Raises:
            ValueError: If fewer positions are cached, or `count` is negative.
        """
        self.length = length_after_rewind(count, self.length)
        self.hidden = self.hidden[: max(len(self.hidden) - count, 0)]

    def generate(
        self,
        token_ids: Int[Tensor, "..."],
        max_new_tokens: int,
        *,
        choose: Choose = greedy,
        stop: Collection[int] = (),
    ) -> Int[Tensor, "1 longer"]:
        """Generates from an empty cache; the same tokens as `generate_cached` on the original model.

        Raises:
            ValueError: If `max_new_tokens` is below 1, or there is more than one row.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
        _require_one_row(token_ids)
        self.truncate(0)
        new = [int(choose(self.prefill(token_ids)))]
        if new[0] not in stop:
            for block in self.blocks(new[0], max_new_tokens - 1, choose=choose, stop=stop):
                new += block
        return torch.cat([token_ids, torch.tensor([new], dtype=token_ids.dtype)], dim=1)

    def blocks(
        self, token: int, count: int, *, choose: Choose = greedy, stop: Collection[int] = (), size: int = BLOCK
    ) -> Iterator[list[int]]:
        """Feeds a token and those chosen after it; yields `count` of them, `size` at a time, or up to one in `stop`.

        A decoder with `few_tokens` chooses greedily or as a `Sampler` in one call for a block, else token by token.

        Raises:
            IndexError: For an id that is no token's.
            ValueError: If there is no room for them, or a block holds none.
        """
        if size < 1:
            raise ValueError(f"a block must hold at least 1 token; got {size}")
        while count > 0:
            made = self._block(token, min(size, count), choose, stop)
            yield made
            count, token = 0 if made[-1] in stop else count - len(made), made[-1]

    def _block(self, token: int, size: int, choose: Choose, stop: Collection[int]) -> list[int]:
        if self.few_tokens and (choose is greedy or isinstance(choose, Sampler)):
            size = min(size, self.max_length - self._room(1)[0])
            sampler = None if choose is greedy else choose
            self.hidden, made = self.few_tokens.decode(token, self.length, size, stop, sampler)
            self.length += len(made)
            return made
        made = [token]
        while len(made) <= size and (len(made) == 1 or made[-1] not in stop):
            made.append(int(choose(self._forward(made[-1:], rows=1))))
        return made[1:]

    def _room(self, count: int) -> tuple[int, int]:
        start, end = self.length, self.length + count
        if count < 1 or end > self.max_length:
            raise ValueError(f"this decoder holds 1 to max_length={self.max_length} positions; got {start} to {end}")
        return start, end

    def _forward(self, token_ids: list[int], *, rows: int) -> Float[Tensor, "rows vocab"]:
        start, end = self._room(len(token_ids))
        if self.few_tokens:
            self.hidden, logits = self.few_tokens.read(token_ids, start, rows)
            self.length = end
            return logits
        with np.errstate(over="ignore"), torch.inference_mode():  # exp(-gate) may overflow to inf: the gate is 0 then
            hidden = self.embedding(torch.tensor(token_ids)).float().numpy()
            self._through_layers(hidden, start, end)
            self.length = end
            self.hidden = rms_norm(hidden[-rows:], self.final_gain, self.eps)
            logits = self.head(self.hidden, self.matvec)
        return torch.from_numpy(logits)

    def _through_layers(self, hidden: np.ndarray, start: int, end: int) -> None:
        cos, sin = self.cos[start:end], self.sin[start:end]
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(rms_norm(hidden, layer.attention_gain, self.eps), self.matvec)
            hidden += layer.output(attend(qkv, self.keys[index], self.values[index], cos, sin, start), self.matvec)
            gate_up = layer.gate_up(rms_norm(hidden, layer.mlp_gain, self.eps), self.matvec)
            hidden += layer.down(swiglu(gate_up), self.matvec)

    def _matrices(self) -> list[Linear]:
        return [m for layer in self.layers for m in (layer.qkv, layer.output, layer.gate_up, layer.down)] + [self.head]


def faster_matvec(matrices: list[Linear], *, rounds: int = 3) -> str:
    """Returns the matrix-vector kernel that gets through all these matrices faster: the best of interleaved rounds."""
    inputs = {m.array.shape[1]: np.ones((1, m.array.shape[1]), np.float32) for m in matrices}
    best = dict.fromkeys(MATVECS, float("inf"))
    for _ in range(rounds):
        for matvec in MATVECS:
            began = time.perf_counter()
            for matrix in matrices:
                matrix(inputs[matrix.array.shape[1]], matvec)
            best[matvec] = min(best[matvec], time.perf_counter() - began)
    return min(best, key=best.get)


def check_supported(config, *, max_length: int, matvec: str) -> Architecture:
    """Refuses what this decoder would compute wrongly, and returns what it knows of the model.

    Raises:
        ValueError: If the architecture, activation, attention or rotary embedding is another.
    """
    known = require_llama(config, families=SUPPORTED, ropes=ROPES)
    require(
        {
            f"matvec must be auto or one of {MATVECS}": (matvec, matvec in ("auto", *MATVECS)),
            "max_length must be at least 1": (max_length, max_length >= 1),
        }
    )
    return known


def _require_one_row(token_ids: Tensor) -> None:
    if token_ids.ndim != 2 or len(token_ids) != 1:
        raise ValueError(f"token_ids must have shape (1, positions); got {tuple(token_ids.shape)}")


def _array(parameter: Tensor) -> np.ndarray:
    return parameter.detach().float().contiguous().numpy()


def _rotary_tables(model: nn.Module, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the model's own cosines and sines, (max_length, head_dim): its scaling rules included."""
    with torch.inference_mode():
        cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32), torch.arange(max_length)[None])
    return cos[0].numpy(), sin[0].numpy()
