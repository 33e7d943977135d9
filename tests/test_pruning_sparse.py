"""Packed weights hold what they should, multiply as the dense ones do, and take the bytes that are claimed."""

import copy
import shutil
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import random_ids, tiny_model
from torch import nn

from labutils.lab.layers.compile import KernelError
from labutils.measurement.threads import thread_count
from labutils.pruning import sparse
from labutils.pruning.masks import apply_masks_, mask_model, mask_n_of_m
from labutils.pruning.scores import magnitude_scores


def two_of_four(rows=16, columns=64, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return weight * mask_n_of_m(weight.abs(), 2, 4)


def test_kernels_leave_the_process_its_subnormal_numbers():
    sparse.kernels()
    assert sys.float_info.min / 2 > 0, "loading the library set flush-to-zero, as one linked with -ffast-math does"


def test_the_kernels_say_why_they_cannot_be_built(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(KernelError, match="no C compiler"):
        sparse.kernels.__wrapped__()


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_pack_and_unpack_are_inverse(blocks, spans, seed):
    weight = two_of_four(8 * blocks, 32 * spans, seed)
    weight[0, :8] = 0  # fewer than 2 of 4 is allowed
    assert torch.equal(sparse.unpack_2_4(sparse.pack_2_4(weight)), weight)


def test_places_by_hand():
    weight = torch.zeros(8, 32)
    weight[0, 1], weight[0, 3], weight[0, 4] = 5.0, 6.0, 7.0
    packed = sparse.pack_2_4(weight)
    assert packed.places[0, 0, 0].item() & 0b11111111 == 0b01_00_11_01
    assert packed.weights[0, 0, :3, 0].tolist() == [5, 6, 7]


def test_packed_bytes_are_17_of_32():
    weight = two_of_four()
    assert sparse.pack_2_4(weight).nbytes / weight.nbytes == (32 + 2) / 64


def test_two_of_four_in_fp16_stores_36_of_64_bits():
    """METHODS.md: two values of 16 bits and two places of 2 bits, for four values of 16 bits."""
    packed = sparse.pack_2_4(two_of_four())
    place_bits = packed.places.nbytes * 8 / packed.weights.numel()
    assert (2 * 16 + 2 * place_bits, 4 * 16) == (36, 64)


@pytest.mark.parametrize("shape", [(8, 32), (16, 64), (40, 96)])
def test_matvec_2_4_equals_dense(shape):
    weight, x = two_of_four(*shape), torch.randn(shape[1])
    assert torch.allclose(sparse.matvec_2_4(sparse.pack_2_4(weight), x), weight @ x, atol=1e-4)


def test_plain_c_and_vector_units_agree():
    packed, x, y = sparse.pack_2_4(two_of_four(16, 64)), torch.randn(64), torch.zeros(16)
    plain = sparse.kernels(("-DSCALAR",))
    sparse._call(plain.matvec_2_4, (packed.places, packed.weights, x, y), 2, 2)
    assert torch.allclose(y, sparse.matvec_2_4(packed, x), atol=1e-4)


def test_two_threads_give_the_same():
    packed, csr, x = sparse.pack_2_4(two_of_four()), sparse.to_csr(two_of_four()), torch.randn(64)
    alone = sparse.matvec_2_4(packed, x), sparse.matvec_csr(csr, x)
    with thread_count(2):
        assert torch.equal(sparse.matvec_2_4(packed, x), alone[0])
        assert torch.equal(sparse.matvec_csr(csr, x), alone[1])


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99, 1.0])
def test_matvec_csr_equals_dense_and_torch(sparsity):
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    weight = weight * (torch.rand(24, 40, generator=torch.Generator().manual_seed(1)) >= sparsity)
    csr, x = sparse.to_csr(weight), torch.randn(40)
    reference = weight.to_sparse_csr()
    assert torch.equal(csr.starts.long(), reference.crow_indices())
    assert torch.equal(csr.columns.long(), reference.col_indices())
    assert torch.equal(csr.weights, reference.values())
    assert torch.allclose(sparse.matvec_csr(csr, x), weight @ x, atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99, 1.0])
def test_matvec_bitmap_equals_dense(sparsity):
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    weight = weight * (torch.rand(24, 96, generator=torch.Generator().manual_seed(1)) >= sparsity)
    bitmap, x = sparse.to_bitmap(weight), torch.randn(96)
    assert torch.allclose(sparse.matvec_bitmap(bitmap, x), weight @ x, atol=1e-4)
    with thread_count(2):
        assert torch.allclose(sparse.matvec_bitmap(bitmap, x), weight @ x, atol=1e-4)


def test_bitmap_by_hand():
    weight = torch.zeros(2, 64)
    weight[0, 0], weight[0, 33], weight[1, 31] = 5.0, 6.0, 7.0
    bitmap = sparse.to_bitmap(weight)
    assert bitmap.words.tolist() == [[1, 2], [-(2**31), 0]] and bitmap.starts.tolist() == [0, 2, 3]
    assert bitmap.weights.tolist() == [5.0, 6.0, 7.0]
    half = two_of_four(64, 64)  # half of the weights, and one bit of 32 a place
    assert sparse.to_bitmap(half).nbytes - 4 * 65 == half.nbytes * (1 / 2 + 1 / 32)


def test_csr_breaks_even_in_bytes_at_half():
    weight = two_of_four(64, 64)
    assert sparse.to_csr(weight).nbytes == weight.nbytes + 4 * 65


def test_packed_model_gives_the_masked_models_logits():
    model = tiny_model("llama-untied-bias")
    apply_masks_(model, mask_model(magnitude_scores(model), (2, 4)))
    packed = copy.deepcopy(model)
    sparse.pack_linears_(packed)
    for length in (1, 7):
        ids = random_ids(length)
        with torch.no_grad():
            assert torch.allclose(packed(ids).logits, model(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sparse.pack_2_4(torch.ones(8, 32)), "at most 2 nonzero"),
        (lambda: sparse.pack_2_4(torch.zeros(8, 36)), r"multiples of \(8, 32\); got \(8, 36\)"),
        (lambda: sparse.matvec_2_4(sparse.pack_2_4(two_of_four()), torch.ones(32)), "vector of 64; got torch.float32"),
        (lambda: sparse.matvec_csr(sparse.to_csr(two_of_four()), torch.ones(64).double()), "float64"),
        (lambda: sparse.to_bitmap(torch.ones(2, 40)), "multiple of 32; got 40"),
        (
            lambda: sparse.matvec_bitmap(sparse.to_bitmap(two_of_four()), torch.ones(32)),
            "vector of 64; got torch.float32",
        ),
        (lambda: sparse.pack_linears_(tiny_model("gpt2")), "nn.Linear; got Conv1D"),
    ],
)
def test_sparse_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.gpu
def test_semi_structured_on_cuda_equals_dense():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    weight = two_of_four(128, 128).half().cuda()
    x = torch.randn(128, 128, dtype=torch.half, device="cuda")
    packed = torch.sparse.to_sparse_semi_structured(weight)
    assert torch.allclose(nn.functional.linear(x, packed), x @ weight.T, atol=1e-1)
