"""Calls: what the grammar allows can be read, what cannot be read is not carried out."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labutils.applications.assistant import Call, Desk, Tool, call_pattern, read_call
from labutils.decoding.grammar import compile_grammar

ORDER = "[A-Z][0-9]{2}"
TOOLS = [Tool("cancel", {"order_id": ORDER}), Tool("move", {"order_id": ORDER, "city": "Rome|Bonn"}), Tool("help")]
VALUES = {"order_id": ["A12", "B34"], "city": ["Rome"]}


def spelt(pattern):
    """A grammar whose tokens are the 256 bytes and, as token 0, the end."""
    return compile_grammar(pattern, [b"", *(bytes([b]) for b in range(1, 256))], end=0)


def accepts(grammar, text):
    state = 0
    for byte in text.encode():
        if not grammar.allowed[state, byte]:
            return False
        state = grammar.walk([byte], state)
    return bool(grammar.allowed[state, 0])


def test_what_the_pattern_allows_is_read_and_written_back():
    grammar = spelt(call_pattern(TOOLS, VALUES))
    calls = [Call("cancel", {"order_id": "B34"}), Call("move", {"order_id": "A12", "city": "Rome"}), Call("help", {})]
    for call in calls:
        assert accepts(grammar, call.json()) and read_call(call.json(), TOOLS) == call


@pytest.mark.parametrize(
    "text",
    [
        '{"tool": "cancel", "order_id": "C99"}',  # the customer never said it
        '{"tool": "cancel"}',
        '{"tool": "delete"}',
        '{"tool": "help"} ',
        '{"tool":"help"}',
        "",
    ],
)
def test_what_the_pattern_does_not_allow(text):
    assert not accepts(spelt(call_pattern(TOOLS, VALUES)), text)


def test_a_tool_without_its_values_is_left_out():
    assert not accepts(spelt(call_pattern(TOOLS, {"order_id": ["A12"]})), '{"tool": "move", "order_id": "A12"}')
    with pytest.raises(ValueError, match=r"callable with the values of \['city'\]; got none"):
        call_pattern(TOOLS[:2], {"city": ["Rome"]})


@pytest.mark.parametrize(
    "text",
    [
        "cancel A12",
        '{"tool": "cancel", "order_id": "A123"}',
        '{"tool": "cancel", "order_id": ["A12"]}',
        '{"tool": "cancel", "order_id": "A12", "city": "Rome"}',
        '{"order_id": "A12", "tool": "cancel"}',
        '{"tool": ["cancel"], "order_id": "A12"}',
        '[{"tool": "help"}]',
        '{"tool": "help"} and more',
        '{"tool": "move", "order_id": "A12", "city": "Rome or Bonn"}',
        "[" * 100_000,
        "null",
    ],
)
def test_what_is_no_call_is_not_read(text):
    assert read_call(text, TOOLS) is None


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3)
                    | st.dictionaries(st.sampled_from(["tool", "order_id", "city"]), x, max_size=3)))  # fmt: skip
def test_whatever_is_read_has_the_form_of_its_tool(value):
    call = read_call(json.dumps(value), TOOLS)
    if call is not None:
        assert call.tool == "help" or set(call.arguments) >= {"order_id"}


def test_the_desk_does_what_is_allowed_and_logs_only_that():
    desk = Desk(TOOLS, {"order_id": frozenset({"A12"})}, results=lambda call: f"{call.tool} done")
    assert desk.carry_out('{"tool": "cancel", "order_id": "A12"}') == "cancel done"
    assert desk.carry_out('{"tool": "cancel", "order_id": "B34"}') == "refused: order_id B34 is not this customer's"
    assert desk.carry_out("please cancel A12") == "refused: no call of a known tool"
    assert desk.carry_out('{"tool": "help"}') == "help done"
    assert [call.tool for call in desk.log] == ["cancel", "help"]
