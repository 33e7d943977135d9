"""What must hold on the trained model: METHODS.md's lines on pruning, on text that nobody calibrated on."""

import copy

import pytest
import torch

from labutils.lab.layers.calibration import input_statistics, layer_error
from labutils.lab.layers.linears import change_weights_, linear_layers, weight_of
from labutils.lab.models.calibration_text import calibration_batches
from labutils.lab.models.compare import bits_by_document, held_out_documents, paired_quality
from labutils.lab.models.load import load_model
from labutils.pruning import masks, scores, structured
from labutils.pruning.sparsegpt import sparsegpt

METHODS = ("magnitude", "wanda", "sparsegpt")
PATTERNS = (0.5, (4, 8), (2, 4))


@pytest.fixture(scope="module")
def lablm():
    return load_model("lablm-small")


@pytest.fixture(scope="module")
def seen(lablm):
    return input_statistics(lablm.model, calibration_batches(lablm.tokenizer, context=256), with_gram=True)


@pytest.fixture(scope="module")
def unseen(lablm):
    texts = [d.text for d in held_out_documents(limit_bytes=1500)]
    ids = [lablm.tokenizer(text, return_tensors="pt").input_ids[:, :256] for text in texts]
    return input_statistics(lablm.model, ids, with_gram=True)


def changed(method, weight, statistics, pattern):
    if method == "sparsegpt":
        return sparsegpt(weight, statistics.gram, pattern)
    score = scores.wanda(weight, statistics.norms) if method == "wanda" else scores.magnitude(weight)
    return weight * masks.mask_model({"": score}, pattern, scope="row" if method == "wanda" else "layer")[""]


def test_sparsegpt_beats_magnitude_in_every_layer_on_held_out_activations(lablm, seen, unseen):
    for name, layer in linear_layers(lablm.model):
        weight, gram = weight_of(layer), unseen[name].gram
        errors = {m: layer_error(weight, changed(m, weight, seen[name], 0.5), gram) for m in METHODS}
        assert errors["sparsegpt"] < errors["magnitude"], name
        assert errors["sparsegpt"] < errors["wanda"], name


@pytest.mark.parametrize("method", METHODS)
def test_unstructured_beats_4_of_8_beats_2_of_4(lablm, seen, method):
    documents = held_out_documents(limit_bytes=600)
    base, quality = bits_by_document(*lablm, documents), []
    for pattern in PATTERNS:
        model = copy.deepcopy(lablm.model)
        change_weights_(model, lambda name, weight, p=pattern: changed(method, weight, seen[name], p))
        assert masks.sparsity(model) == 0.5
        quality.append(paired_quality(bits_by_document(model, lablm.tokenizer, documents), base, resamples=200))
    damage = [q.difference for q in quality]
    assert 0 < damage[0] < damage[1] < damage[2]
    assert quality[0].interval[0] > 0


def test_a_small_model_has_no_free_layer(lablm):
    documents = held_out_documents(limit_bytes=600)
    base = bits_by_document(*lablm, documents)
    layers = range(lablm.model.config.num_hidden_layers)
    for gone in layers:
        kept = [layer for layer in layers if layer != gone]
        smaller = structured.keep_layers(lablm.model, kept)
        quality = paired_quality(bits_by_document(smaller, lablm.tokenizer, documents), base, resamples=200)
        assert quality.interval[0] > 0.05


def test_removing_neurons_that_say_least_beats_removing_any(lablm, seen):
    documents = held_out_documents(limit_bytes=600)
    found = structured.neuron_scores(lablm.model, seen)
    bits, count = {}, 2 * lablm.model.config.intermediate_size // 3
    for name, chosen in (
        ("weakest gone", [structured.strongest(s, count) for s in found]),
        ("any gone", [torch.arange(count) for _ in found]),
        ("strongest gone", [structured.strongest(-s, count) for s in found]),
    ):
        smaller = structured.keep_neurons(lablm.model, chosen)
        bits[name] = sum(b for b, _ in bits_by_document(smaller, lablm.tokenizer, documents))
    assert bits["weakest gone"] < bits["any gone"] < bits["strongest gone"]
