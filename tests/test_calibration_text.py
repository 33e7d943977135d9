"""Calibration rows come from the training split, full length, the same for the same seed."""

import pytest
import torch

from labutils.lab.data.corpus import held_out_documents
from labutils.lab.layers.calibration import input_statistics
from labutils.lab.models.calibration_text import calibration_batches
from labutils.lab.models.load import load_model
from labutils.measurement.limits import status_bytes
from labutils.measurement.resources import PROC_SELF


@pytest.fixture(scope="module")
def tokenizer():
    return load_model("lablm-small").tokenizer


def test_calibration_batches_have_full_rows_of_both_kinds(tokenizer):
    batches = calibration_batches(tokenizer, code=3, dialogues=2, context=64, batch=4)
    assert [tuple(b.shape) for b in batches] == [(4, 64), (1, 64)]
    texts = [tokenizer.decode(row) for batch in batches for row in batch]
    assert ["<|user|>" in text for text in texts] == [False, False, False, True, True]
    assert (torch.cat(batches)[:, 0] == tokenizer.bos_token_id)[:3].all()


def test_calibration_batches_hold_no_held_out_text(tokenizer):
    (rows,) = calibration_batches(tokenizer, code=8, dialogues=0, context=64)
    held_out = "\n".join(d.text for d in held_out_documents())
    for row in rows:
        assert tokenizer.decode(row[1:]) not in held_out


def test_calibration_batches_depend_on_the_seed_alone(tokenizer):
    first, again, other = (
        calibration_batches(tokenizer, code=2, dialogues=2, context=32, seed=s)[0] for s in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_calibration_batches_refuse_nothing(tokenizer):
    with pytest.raises(ValueError, match="got 0 and 0"):
        calibration_batches(tokenizer, code=0, dialogues=0)


@pytest.mark.skipif(not PROC_SELF.exists(), reason="needs Linux's /proc")
def test_sums_of_inputs_pin_no_memory_that_the_model_needed_for_a_moment():
    """Glibc carves small pieces out of freed large ones, which then serve no large tensor any more."""
    model = load_model("lablm").model
    before = status_bytes("VmRSS")
    statistics = input_statistics(model, [torch.randint(4096, (8, 512))], with_gram=True)
    assert len(statistics) == 42
    assert status_bytes("VmRSS") - before < 250e6
