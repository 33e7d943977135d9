"""Chapter 06's kernels are the learner's own: interpreted first, and run compiled where there is a GPU."""

import pytest
import torch
from aside import triton_there

from labutils.acceleration.interpreter import WITHOUT_TRITON, interpret
from labutils.course.checks import ch06_kernels


def doubling_kernel(x, out, n, BLOCK: "tl.constexpr"):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)


@pytest.mark.skipif(not triton_there(), reason=WITHOUT_TRITON)
def test_where_there_is_a_gpu_the_result_is_the_compiled_kernels(monkeypatch):
    launched = []

    def launch(kernel, grid, *arguments, **constants):
        launched.append(kernel)
        interpret(kernel, grid, *arguments, **constants)
        arguments[1].add_(100.0)  # so that it can be told from the interpreter's

    x, out = torch.arange(10.0), torch.zeros(10)
    assert ch06_kernels._launch(doubling_kernel, (2,), (x, out), 10).tolist() == (2 * x).tolist() and not launched
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor.clone())
    monkeypatch.setattr(ch06_kernels, "launch", launch)
    result = ch06_kernels._launch(doubling_kernel, (2,), (x, out), 10)
    assert result.tolist() == (2 * x + 100).tolist() and launched == [doubling_kernel]
    assert out.tolist() == [0.0] * 10
