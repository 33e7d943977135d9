"""Recognition in chunks: the two clocks, what is committed, and what each kind of search hears."""

import importlib.util
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labutils.lab.models import spoken
from labutils.speech import recognise as r
from labutils.speech import voices

needs_sphinx = pytest.mark.skipif(importlib.util.find_spec("pocketsphinx") is None, reason="pocketsphinx is missing")
needs_espeak = pytest.mark.skipif(not voices.can_speak(), reason="espeak-ng is not installed")


def silence(seconds):
    return torch.zeros(round(seconds * voices.RATE), dtype=torch.int16)


class Scripted:
    """A decoder that knows one more word with each chunk."""

    def __init__(self, words):
        self.words, self.heard, self.bytes = words.split(), 0, b""

    def start_utt(self):
        self.heard = 0

    def process_raw(self, data, no_search, full_utt):
        self.bytes, self.heard = self.bytes + data, self.heard + 1

    def end_utt(self):
        self.heard = len(self.words)

    def hyp(self):
        words = self.words[: self.heard]
        return type("Hypothesis", (), {"hypstr": " ".join(words)}) if words else None


def test_every_sample_is_fed_once_and_every_chunk_gives_a_partial_text():
    samples = torch.arange(8000, dtype=torch.int16)
    decoder = Scripted("one two three four five six seven")
    result = r.recognise(decoder, samples, chunk_s=0.15)
    assert decoder.bytes == samples.numpy().tobytes()
    assert [step.heard_s for step in result.steps] == pytest.approx([0.15, 0.3, 0.45, 0.5])
    assert [step.text for step in result.steps][:2] == ["one", "one two"] and result.text.endswith("seven")


def test_real_time_factor_and_latency_by_hand():
    steps = (r.Step(1.0, 0.2, "a"), r.Step(2.0, 1.5, "a b"), r.Step(3.0, 0.1, "a b c"))
    result = r.Recognition(steps, final_work_s=0.6, text="a b c")
    assert result.real_time_factor == pytest.approx(0.8)  # (0.2 + 1.5 + 0.1 + 0.6) / 3
    assert result.ready_s == pytest.approx((1.2, 3.5, 3.6))  # the third chunk waits for the second
    assert result.latency_s == pytest.approx(1.2)  # 3.6 + 0.6 − 3


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 1)), min_size=1, max_size=8))
def test_work_is_done_in_order_and_never_before_it_arrives(gaps):
    arrivals = [sum(gap for gap, _ in gaps[: i + 1]) for i in range(len(gaps))]
    works = [work for _, work in gaps]
    ends = r.ready_times(arrivals, works)
    assert all(end >= arrival + work for end, arrival, work in zip(ends, arrivals, works, strict=True))
    assert list(ends) == sorted(ends) and ends[-1] <= arrivals[-1] + sum(works) + 1e-9


def test_committed_text_never_changes_and_needs_two_in_a_row():
    partials = ["can", "can i", "can eye pay", "can eye pay now", "can i pay now", "can i pay now"]
    shown = r.committed(partials)
    assert shown == ["", "can", "can", "can eye pay", "can eye pay", "can eye pay"]  # wrong, and shown for good
    assert r.committed([]) == [] and r.committed(["a"]) == [""]


@given(st.lists(st.lists(st.sampled_from("ab"), max_size=4).map(" ".join), max_size=8))
def test_committed_only_grows_and_was_heard_twice(partials):
    shown = [text.split() for text in r.committed(partials)]
    for before, after in zip(shown, shown[1:], strict=False):
        assert after[: len(before)] == before
    for i, words in enumerate(shown):
        heard = [p.split()[: len(words)] == words for p in partials[: i + 1]]
        assert not words or any(a and b for a, b in zip(heard, heard[1:], strict=False))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: r.recognise(Scripted("a"), silence(0)), "at least one sample; got 0"),
        (lambda: r.recognise(Scripted("a"), silence(1), chunk_s=0), "at least one sample; got 16000 and 0"),
        (lambda: r.open_decoder("whisper"), "mode must be 'lm' alone.*got 'whisper'"),
        (lambda: r.open_decoder("jsgf"), "with a value; got 'jsgf', None"),
        (lambda: r.open_decoder("lm", "hello"), "got 'lm', 'hello'"),
        (lambda: r.grammar_of([]), "at least one sentence"),
    ],
)
def test_bad_input_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_without_the_package_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(r.SpeechError, match="needs the package pocketsphinx: pip install pocketsphinx"):
        r.open_decoder()


def test_grammar_of_the_service_corpus_has_every_rule_it_names():
    jsgf = spoken.service_jsgf()
    words = r.grammar_words(jsgf)
    assert "printer" in words and "hoodie" not in words and all(word.replace("'", "").isalpha() for word in words)
    named = {part.split(">")[0] for part in jsgf.split("<")[1:]}
    defined = {line.split(">")[0].removeprefix("<") for line in jsgf.splitlines() if line.startswith("<")}
    assert named - {"sentence"} == defined


@needs_sphinx
@needs_espeak
def test_a_grammar_hears_its_sentences_and_chunks_do_not_change_them():
    said = ["return the printer", "reset my password", "find a shop in london"]
    decoder = r.open_decoder("jsgf", r.grammar_of(said))
    for text in said:
        sound = voices.speak(text)
        for chunk_s in (0.02, 0.1, 10.0):
            assert r.recognise(decoder, sound, chunk_s=chunk_s).text == text


@needs_sphinx
@needs_espeak
def test_a_phrase_is_spotted_inside_a_sentence_and_only_there():
    decoder = r.open_decoder("keyphrase", "password", threshold=1e-40)
    assert "password" in r.recognise(decoder, voices.speak("i want to reset my password please")).text
    assert r.recognise(decoder, voices.speak("where can i find a shop in london")).text == ""


@needs_sphinx
def test_a_word_that_the_dictionary_lacks_is_named():
    with pytest.raises(ValueError, match="in the recogniser's dictionary; got 'blorbify'"):
        r.open_decoder("jsgf", r.grammar_of(["please blorbify it"]))
    with pytest.raises(ValueError, match="got 'blorbify'"):
        r.open_decoder("keyphrase", "blorbify")


@needs_sphinx
@needs_espeak
def test_endpoints_find_the_speech_between_silences_and_notice_its_end_later():
    speech = voices.speak("i want to return the printer")
    ((start, end, noticed),) = r.endpoints(torch.cat([silence(1.0), speech, silence(1.0)]))
    assert start == pytest.approx(1.0, abs=0.25) and end == pytest.approx(1.0 + len(speech) / voices.RATE, abs=0.45)
    assert noticed >= end
    assert r.endpoints(silence(2.0)) == []


@needs_sphinx
@needs_espeak
def test_speech_up_to_the_last_sample_has_an_end_too():
    speech = voices.speak("i want to return the printer")[:20_000]
    ((_, end, noticed),) = r.endpoints(speech)
    assert end == pytest.approx(noticed, abs=0.2) and noticed == len(speech) / voices.RATE
