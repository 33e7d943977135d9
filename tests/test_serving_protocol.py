"""OpenAI's forms: what is read, what is refused by the name of its field, and how a stop string cuts a stream."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labutils.serving.protocol import Answer, ApiError, StopText, parse, usage

MESSAGES = [{"role": "user", "content": "Hi"}]


def parsed(chat=True, **fields):
    prompt = {"messages": MESSAGES} if chat else {"prompt": "Hi"}
    return parse(json.dumps({"model": "m"} | prompt | fields).encode(), chat=chat)


def test_defaults_are_openai_s():
    chat, text = parsed(), parsed(chat=False)
    assert (chat.max_tokens, text.max_tokens) == (None, 16)
    assert (chat.temperature, chat.top_p, chat.seed, chat.stop, chat.stream, chat.usage) == (
        1.0,
        1.0,
        None,
        (),
        False,
        False,
    )
    assert parsed(temperature=None, stop=None, user="me", n=1) == chat  # null and what has no effect


def test_every_field_arrives():
    wanted = parsed(
        max_tokens=5, temperature=0, top_p=0.5, seed=3, stop=["a", "b"], stream=True, priority=-1, cache_salt="s",
        stream_options={"include_usage": True},
    )  # fmt: skip
    assert (wanted.max_tokens, wanted.temperature, wanted.top_p, wanted.seed) == (5, 0, 0.5, 3)
    assert (wanted.stop, wanted.stream, wanted.usage, wanted.priority, wanted.salt) == (("a", "b"), True, True, -1, "s")
    assert parsed(max_tokens=5, max_completion_tokens=7).max_tokens == 7
    assert parsed(stop="x").stop == ("x",)
    assert parsed(chat=False, prompt=["one"]).prompt == "one" and parsed(chat=False, prompt=[1, 2]).prompt == [1, 2]


def test_parts_of_text_are_joined_and_developers_are_the_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parsed(messages=[{"role": "developer", "content": parts}]).prompt == [{"role": "system", "content": "ab"}]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("max_tokens", True), ("max_tokens", 1.5), ("max_tokens", "5"), ("temperature", 2.1),
        ("temperature", -1), ("top_p", 0), ("seed", 2**70), ("n", 2), ("stop", [""]), ("stop", ["a"] * 5),
        ("stop", [1]), ("stream", 1), ("stream_options", {"include_usage": True}), ("messages", []),
        ("messages", "Hi"), ("messages", [{"role": "tool", "content": "x"}]), ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}]), ("messages", [[]]), ("model", 3),
        ("messages", [{"role": ["user"], "content": "x"}]), ("temperature", float("nan")),
        ("messages", [{"role": "user", "content": "\ud800"}]), ("logprobs", True), ("tools", []),
    ],
)  # fmt: skip
def test_a_bad_field_is_refused_by_its_name(field, value):
    with pytest.raises(ApiError) as caught:
        parsed(**{field: value})
    assert caught.value.param == field and caught.value.status == 400
    error = caught.value.body()["error"]
    assert error["type"] == "invalid_request_error" and field in error["message"]


@pytest.mark.parametrize("prompt", ["\ud800", [], ["a", "b"], [True], [1.0], {}, [[1]]])
def test_a_bad_prompt_is_refused(prompt):
    with pytest.raises(ApiError, match="prompt must be"):
        parsed(chat=False, prompt=prompt)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[]", b"1", b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(ApiError, match="the body must be") as caught:
        parse(body, chat=True)
    assert caught.value.code == "invalid_json"


@given(st.text("abE", max_size=20), st.lists(st.text("abE", min_size=1, max_size=3), max_size=3), st.data())
def test_a_stop_string_cuts_any_stream_where_it_cuts_the_text(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    stop = StopText(tuple(stops))
    sent = [stop.push(piece, last=n == len(pieces) - 1) for n, piece in enumerate(pieces)]
    # the first stop string that is complete ends the stream; of those complete with the same piece the leftmost
    found = stop.found
    assert found == any(s in text for s in stops)
    assert text.startswith("".join(sent)) and (found or "".join(sent) == text)
    assert not any(s in "".join(sent) for s in stops)
    if found:
        assert any(text.startswith(s, len("".join(sent))) for s in stops)


def test_forms_by_hand():
    answer = Answer("chatcmpl-1", 5, "m", chat=True)
    whole = answer.whole("Hi", "stop", usage(3, 1, 2))
    assert whole["object"] == "chat.completion" and whole["choices"][0]["message"]["content"] == "Hi"
    assert whole["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}
    }  # fmt: skip
    first, last = answer.piece("", None, first=True), answer.piece("", "length")
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""} and last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "length" and answer.usage({})["choices"] == []
    assert Answer("cmpl-1", 5, "m", chat=False).piece("a", None)["object"] == "text_completion"


@pytest.mark.parametrize(
    ("status", "kind"), [(400, "invalid_request_error"), (429, "rate_limit_error"), (500, "server_error")]
)
def test_an_error_s_type_follows_its_status(status, kind):
    assert ApiError(status, "no").body()["error"] == {"message": "no", "type": kind, "param": None, "code": None}
