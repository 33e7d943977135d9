"""A step recorded once and replayed without Python: CUDA graphs on a GPU, and a tape with the same rules on a CPU.

A graph holds kernels and the *addresses* they read and write. So new inputs must be copied into the old memory, results
appear in the old memory, and what Python decided while recording stays decided.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WARMUP = 3


class CaptureError(RuntimeError):
    """Something in the step cannot be recorded; the message says what."""


class Tape:
    """Records PyTorch's operators and replays them on the same memory: a CUDA graph's rules, on any device.

    It is here to teach: each replayed operator still passes PyTorch's dispatcher, where a GPU replays all of them in
    one launch.

    >>> x = torch.tensor([1.0, 2.0])
    >>> tape, y = Tape.record(lambda: x * 2 + 1)
    >>> _ = x.copy_(torch.tensor([10.0, 20.0]))
    >>> tape.replay()
    >>> y.tolist()
    [21.0, 41.0]
    """

    def __init__(self) -> None:
        self.operators: list[tuple[Callable, tuple, dict, list[Tensor]]] = []

    @classmethod
    def record(cls, function: Callable[[], Tensor]) -> tuple[Tape, Tensor]:
        """Runs the function once; returns the tape and the function's result, which a replay overwrites.

        Raises:
            CaptureError: when the function asks for a number, as `.item()` does: a replay could not change its mind.
        """
        tape = cls()
        with torch.no_grad(), _Recorder(tape.operators):
            result = function()
        return tape, result

    def replay(self) -> None:
        """Runs every recorded operator again and puts the results where the first ones lay."""
        with torch.no_grad():
            for function, arguments, settings, outputs in self.operators:
                fresh = tree_leaves(function(*arguments, **settings))
                for old, new in zip(outputs, fresh, strict=False):
                    if old is not new:
                        old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, operators: list) -> None:
        super().__init__()
        self.operators = operators

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise CaptureError("a recorded step must not ask for a number (.item(), int(), if): keep it in a tensor")
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        shares = outputs and all(t.untyped_storage().data_ptr() in inputs for t in outputs if t.numel())
        if torch.Tag.inplace_view in func.tags:  # `squeeze_` and the like change a shape, and no memory
            return result
        if func._schema.is_mutable:
            self.operators.append((func, args, kwargs or {}, []))
        elif outputs and not shares:  # a view of old memory stays a view of it
            self.operators.append((func, args, kwargs or {}, [t.detach() for t in outputs]))  # in the shape of now
        return result


class GraphedStep:
    """A decoding step as a CUDA graph on a GPU, as a tape on a CPU. The CUDA half was not run on a GPU.

    Args:
        step: from one tensor to one tensor; whatever else it reads must stay at its address.
        example: an input; copied, the copy is the graph's input for ever.
        undo: puts back what a trial run changed (a cache's length).
    """

    def __init__(self, step: Callable[[Tensor], Tensor], example: Tensor, *, undo: Callable[[], object]) -> None:
        self.input = example.clone()
        if not example.is_cuda:
            self.graph, self.output = Tape.record(lambda: step(self.input))
            undo()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # lazy set-up must not be recorded, nor happen on the stream that records
            for _ in range(WARMUP):
                step(self.input)
                undo()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = step(self.input)

    def __call__(self, x: Tensor) -> Tensor:
        """Copies the input into the graph's, replays, and returns the graph's output, overwritten by the next call.

        Raises:
            ValueError: for an input of another shape: the graph holds one.
        """
        if x.shape != self.input.shape:
            recorded = tuple(self.input.shape)
            raise ValueError(f"a graph is replayed with the shape recorded, {recorded}; got {tuple(x.shape)}")
        self.input.copy_(x)
        self.graph.replay()
        return self.output
