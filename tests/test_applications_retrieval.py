"""Vectors by hand, search against a sort, cells that find all when all are read, recall."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from labutils.applications.retrieval import CellIndex, document_weights, exact_search, hashed_vectors, recall


@pytest.fixture(scope="module")
def vectors():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 16, generator=generator)
    rows = centres.repeat(30, 1) + 0.5 * torch.randn(180, 16, generator=generator)
    return normalize(rows, dim=1)


def test_weights_are_ln_of_documents_over_holders():
    weights = document_weights([[1, 1, 2], [1], [1, 3]])
    assert weights[1] == 0 and weights[2] == pytest.approx(math.log(3))


def test_hashed_vectors_keep_inner_products():
    rows = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8, 9], [10, 11, 12]]
    weights = dict.fromkeys(range(1, 13), 1.0)
    products = hashed_vectors(rows, weights, width=4096) @ hashed_vectors(rows, weights, width=4096).T
    assert products.diag().allclose(torch.ones(3))
    assert products[0, 1] == pytest.approx(0.5, abs=0.06) and abs(products[0, 2]) < 0.06


def test_what_nobody_weighed_adds_nothing():
    known = hashed_vectors([[1, 2]], {1: 1.0, 2: 0.5}, width=8)
    assert hashed_vectors([[1, 2, 99]], {1: 1.0, 2: 0.5}, width=8).equal(known)
    assert hashed_vectors([[99]], {1: 1.0}, width=8).equal(torch.zeros(1, 8))


def test_exact_search_is_a_sort(vectors):
    query = vectors[17]
    order = sorted(range(len(vectors)), key=lambda i: -float(vectors[i] @ query))
    assert exact_search(vectors, query, 5) == order[:5] and order[0] == 17
    assert len(exact_search(vectors[:3], query, 5)) == 3


def test_each_vector_lies_in_the_cell_of_its_nearest_centre(vectors):
    index = CellIndex(vectors, cells=6)
    assert index.centres.norm(dim=1).allclose(torch.ones(6))
    assert sorted(index.order.tolist()) == list(range(180)) and index.starts[-1] == 180
    for cell, (start, end) in enumerate(zip(index.starts, index.starts[1:], strict=False)):
        members = vectors[index.order[start:end]]
        assert members.equal(index.sorted[start:end])
        assert ((members @ index.centres.T).argmax(dim=1) == cell).all()


def test_all_cells_give_the_exact_answer_and_more_cells_never_less(vectors):
    index = CellIndex(vectors, cells=6)
    queries = normalize(vectors[::20] + 0.3 * torch.randn(9, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    true = [exact_search(vectors, q, 8) for q in queries]
    found = [recall([index.search(q, 8, cells=n) for q in queries], true) for n in range(1, 7)]
    assert found == sorted(found) and found[-1] == 1.0 and found[0] < 1.0
    assert [index.search(q, 8, cells=6) for q in queries] == true


def test_equal_vectors_leave_cells_empty():
    index = CellIndex(torch.ones(4, 2) / 2**0.5, cells=3)
    assert index.centres.norm(dim=1).allclose(torch.ones(3)) and sorted(index.starts) == index.starts
    assert sorted(index.search(torch.tensor([1.0, 0.0]), 4, cells=3)) == [0, 1, 2, 3]


def test_bad_input_is_refused(vectors):
    with pytest.raises(ValueError, match="1 to texts=180; got 181"):
        CellIndex(vectors, cells=181)
    with pytest.raises(ValueError, match="at least 1 cell; got 0"):
        CellIndex(vectors, cells=2).search(vectors[0], 3, cells=0)
    with pytest.raises(ValueError, match="true neighbours for each query; got 1 and 1"):
        recall([[1]], [[]])


def test_recall_by_hand():
    assert recall([[1, 2, 3], [9]], [[3, 4], [9, 8]]) == 0.5
