"""The small CTC recogniser: its collapse, its loss against all paths, and the stored weights."""

import copy
import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labutils.course.cli.main import main
from labutils.lab.layers.linears import linear_layers, set_weight_, weight_of
from labutils.lab.models import spoken
from labutils.lab.models.load import LoadError
from labutils.pruning.masks import apply_masks_, mask_model, sparsity
from labutils.pruning.scores import magnitude_scores
from labutils.quantization.affine import Scheme, fake_quantize
from labutils.speech import ctc, voices
from labutils.speech.edit_distance import total_edits
from labutils.speech.features import log_mel, normalized

needs_espeak = pytest.mark.skipif(not voices.can_speak(), reason="espeak-ng is not installed")


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = ctc.TimeDelayNet(width=8, gaps=(1, 2)).eval()
    for norm in model.norms:
        torch.nn.init.normal_(norm.bias)  # what lies beyond a row's end must not come in by way of it
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def heard():
    """Test queries in a voice of the training, with their features."""
    queries = spoken.spoken_queries("test", 8)
    return [(q.words, normalized(log_mel(voices.speak(q.words, voices.Voice("en-us+f2"))))) for q in queries]


def rate(model, heard):
    return total_edits((words, ctc.transcribe(model, features)) for words, features in heard).rate


@given(st.lists(st.integers(0, 3), max_size=10))
def test_collapse_is_merging_then_dropping(ids):
    merged = [key for key, _ in itertools.groupby(ids)]
    assert ctc.collapse(ids) == [i for i in merged if i != 0]


def test_a_blank_keeps_a_doubled_letter():
    a, b = ctc.encode("ab")
    assert ctc.collapse([a, a, b, b]) == [a, b] and ctc.collapse([a, 0, a, b, 0, 0, b]) == [a, a, b, b]
    assert ctc.collapse([9, 9, 1], blank=9) == [1] and ctc.collapse([]) == []


def test_the_loss_is_the_sum_over_all_paths():
    torch.manual_seed(1)
    features = torch.randn(8, 40)  # four written frames
    torch.manual_seed(0)
    model = ctc.TimeDelayNet(width=4, gaps=(1,)).eval()
    probs = model(*ctc.batched([features]))[0][0].softmax(dim=1)
    a, b = ctc.encode("ab")
    paths = itertools.product((0, a, b), repeat=4)
    total = sum(math.prod(probs[t, i].item() for t, i in enumerate(p)) for p in paths if ctc.collapse(p) == [a, b])
    assert ctc.utterance_loss(model, [(features, "ab")]).item() == pytest.approx(-math.log(total) / 2, rel=1e-4)


def test_a_batch_gives_each_row_what_it_gives_alone(tiny):
    rows = [torch.randn(length, 40) for length in (31, 8, 20)]
    together, lengths = tiny(*ctc.batched(rows))
    assert lengths.tolist() == [16, 4, 10]
    for row, logits, count in zip(rows, together, lengths, strict=True):
        torch.testing.assert_close(logits[:count], tiny(*ctc.batched([row]))[0][0], atol=1e-5, rtol=1e-4)


def test_how_far_the_network_looks_is_the_sum_of_its_gaps(tiny):
    features = torch.randn(80, 40)
    changed = features.clone()
    changed[40] += 5.0
    moved = (tiny(*ctc.batched([features]))[0] - tiny(*ctc.batched([changed]))[0]).abs().amax(dim=2)[0] > 0
    assert moved.nonzero().flatten().tolist() == list(range(20 - 1 - 3, 20 + 1 + 3 + 1))


def test_encode_and_transcribe_are_inverse(tiny):
    text = "can i pay"
    ids = [part for char in ctc.encode(text) for part in (char, 0)]
    scripted = lambda features, lengths: (torch.nn.functional.one_hot(torch.tensor([ids]), 29).float(), lengths)  # noqa: E731
    assert ctc.transcribe(scripted, torch.zeros(len(ids), 40)) == text
    with pytest.raises(ValueError, match="lower-case letters, spaces and apostrophes; got 'C'"):
        ctc.encode("Can")


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    said = []
    model = ctc.TimeDelayNet(width=16, gaps=(1,))
    data = [(torch.randn(30, 40), text) for text in ("yes", "no", "maybe", "never")]
    before = ctc.utterance_loss(model, data).item()
    ctc.train_(model, data, steps=60, batch=4, lr=1e-2, log=said.append)
    assert ctc.utterance_loss(model, data).item() < 0.5 * before and not model.training
    assert [line.split(":")[0] for line in said] == ["step 50", "step 60"]


def test_masking_leaves_the_features_themselves_alone():
    features = torch.ones(50, 40)
    changed = [ctc.masked(features, random.Random(seed)) for seed in range(20)]
    assert (features == 1).all() and any((c == 0).any() for c in changed)
    assert all(((c == 0) | (c == 1)).all() and (c == 0).float().mean() < 0.5 for c in changed)


def test_spoken_queries_have_words_only_and_keep_their_split():
    train, test = (spoken.spoken_queries(split, 200) for split in ("train", "test"))
    assert not {q.words for q in train} & {q.words for q in test}
    assert len({q.text for q in test}) == 200 and spoken.spoken_queries("test", 5) == test[:5]
    assert all(set(q.words) <= set(ctc.ALPHABET) for q in train + test)
    with pytest.raises(ValueError, match="written in words.*'order A5'"):
        spoken.spoken_form("order A5")


def test_written_form_brings_back_what_speech_lost():
    queries = spoken.spoken_queries("test", 200)
    same = [spoken.written_form(q.words) == q.text for q in queries]
    assert sum(same) > 100  # all but commas, hyphens and names
    assert spoken.written_form("") == "" and spoken.written_form("i need it") == "I need it."


def test_the_stored_recogniser_is_small_and_whole(tmp_path):
    model = spoken.load_recogniser()
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert (spoken.FOLDER / "ctc.safetensors").stat().st_size < 1_500_000
    spoken.save_recogniser(model, tmp_path)
    again = spoken.load_recogniser(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    (tmp_path / "ctc.safetensors").write_bytes(b"damaged")
    with pytest.raises(LoadError, match=r"ctc.safetensors"):
        spoken.load_recogniser(tmp_path)
    with pytest.raises(LoadError, match="there is none"):
        spoken.load_recogniser(tmp_path / "nowhere")


@needs_espeak
def test_the_stored_recogniser_understands_sentences_that_training_never_had(heard):
    model = spoken.load_recogniser()
    assert rate(model, heard) < 0.25
    assert rate(ctc.TimeDelayNet(), heard) > 0.9  # untrained


@needs_espeak
def test_few_bits_and_many_zeros_cost_words(heard):
    model = spoken.load_recogniser()
    rates = {}
    for bits in (8, 2):
        changed = copy.deepcopy(model)
        for _, layer in linear_layers(changed):
            set_weight_(layer, fake_quantize(weight_of(layer), Scheme(bits)))
        rates[bits] = rate(changed, heard)
    assert rates[8] < rate(model, heard) + 0.05 < rates[2]
    apply_masks_(model, mask_model(magnitude_scores(model), 0.8))
    assert sparsity(model) == pytest.approx(0.8, abs=0.01) and rate(model, heard) > 0.5


@needs_espeak
def test_training_sentences_come_with_their_words():
    made = list(spoken.utterances(3))
    assert [text for _, text in made] == [q.words for q in spoken.spoken_queries("train", 3)]
    assert all(features.shape[1] == 40 and len(features) > 50 for features, _ in made)


def test_the_command_trains_and_stores_a_recogniser(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(spoken, "train_recogniser", lambda **options: asked.append(options) or ctc.TimeDelayNet())
    assert main(["train", "speech", "--steps", "3", "--out", str(tmp_path / "new")]) == 0
    assert asked[0]["steps"] == 3 and f"wrote {tmp_path / 'new'}" in capsys.readouterr().out
    assert not spoken.load_recogniser(tmp_path / "new").training


@needs_espeak
def test_training_speaks_fresh_sentences_and_fits_them():
    said = []
    model = spoken.train_recogniser(steps=2, sentences=4, log=said.append)
    assert said == [said[-1]] and said[-1].startswith("step 2:") and not model.training
