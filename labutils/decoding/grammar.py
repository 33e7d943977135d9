"""Grammars while decoding: which tokens are allowed next, and which text is forced.

A model may be free to say anything and still be asked for JSON. So the pattern of what is wanted becomes a byte
automaton, every token is walked through it from every state once (Willard and Louf 2023, arXiv:2307.09702), and at each
step the logits of tokens that lead nowhere become -inf. Where only one text can come, it is a draft that costs nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from labutils.decoding.automaton import Automaton, compile_pattern
from labutils.decoding.proposers import Proposal
from labutils.decoding.target import Target
from labutils.generation.sampling import FILTERED


def literal(text: str) -> str:
    r"""The pattern that matches a text and nothing else.

    >>> literal('{"a": 1}')
    '\\{"a": 1\\}'
    """
    return re.sub(r"([][\\.?*+(){}|^$])", r"\\\1", text)


def choice(texts: Sequence[str]) -> str:
    """The pattern of one of several texts.

    >>> choice(["yes", "no"])
    '(yes|no)'
    """
    return "(" + "|".join(map(literal, texts)) + ")"


def json_object(fields: Mapping[str, Sequence[object]]) -> str:
    r"""The pattern of a JSON object, written as `json.dumps` does, in which each field has one of some values.

    >>> json_object({"done": [True, False]})
    '\\{"done": (true|false)\\}'
    """
    written = (literal(json.dumps(name)) + ": " + choice([*map(json.dumps, v)]) for name, v in fields.items())
    return r"\{" + ", ".join(written) + r"\}"


def token_bytes(tokenizer) -> list[bytes]:
    """The bytes that each token of a byte-level tokenizer stands for; none for special tokens.

    Byte-level BPE writes bytes as characters: printable Latin-1 ones as themselves, the other 68 from U+0100 on.
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    byte_of = {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    special = {tokenizer.eos_token_id, *tokenizer.get_added_vocab().values()}
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return [b"" if i in special else bytes(byte_of[c] for c in name) for i, name in enumerate(names)]


@dataclass(frozen=True)
class Grammar:
    """A pattern's automaton over the tokens of one vocabulary.

    The last state is `done`: behind the end token, and behind a token that is not allowed, only the end token may come.

    Attributes:
        automaton: Over bytes.
        allowed: Whether a token may come in a state.
        next_state: The state after each token.
        end: The id of the token that ends the text.
    """

    automaton: Automaton
    allowed: Bool[Tensor, "states vocab"]
    next_state: Int[Tensor, "states vocab"]
    end: int

    def walk(self, token_ids: Sequence[int], state: int = 0) -> int:
        """The state after some tokens."""
        for token in token_ids:
            state = int(self.next_state[state, token])
        return state

    def forced_bytes(self, state: int) -> tuple[bytes, int]:
        """The longest text that must come next, whatever is chosen later, and the state behind it."""
        forced = bytearray()
        while (way := self._only_ways[state]) is not None:
            forced.append(way[0])
            state = way[1]
        return bytes(forced), state

    @cached_property
    def _only_ways(self) -> list[tuple[int, int] | None]:
        """For each state the only byte that can come and where it leads; None where there is a choice, or an end."""
        table, accepting = self.automaton.next_state, self.automaton.accepting
        ways = table != self.automaton.dead
        only, byte = ((ways.sum(dim=1) == 1) & ~accepting).tolist(), ways.int().argmax(dim=1).tolist()
        return [(b, int(table[s, b])) if single else None for s, (single, b) in enumerate(zip(only, byte, strict=True))]

    def must_end(self, state: int) -> bool:
        """Whether the end token is the only one allowed."""
        return bool(self.allowed[state, self.end]) and int(self.allowed[state].sum()) == 1


def compile_grammar(pattern: str, tokens: Sequence[bytes], *, end: int) -> Grammar:
    """Walks every token from every state of a pattern's automaton: two tables of states × vocabulary.

    Args:
        pattern: In the language of `automaton.py`.
        tokens: The bytes of each token; a token without bytes is never allowed, but for the end token.
        end: The token that ends the text, allowed where the pattern may end.

    >>> grammar = compile_grammar("no|not", [b"", b"n", b"o", b"no", b"ot"], end=0)
    >>> [grammar.allowed[s].nonzero().flatten().tolist() for s in (0, grammar.walk([3]))]
    [[1, 3], [0]]

    Raises:
        ValueError: For a pattern outside the language, or one that these tokens cannot write.
    """
    automaton = compile_pattern(pattern)
    order = sorted(range(len(tokens)), key=lambda t: -len(tokens[t]))
    lengths = [len(tokens[t]) for t in order]
    padded = torch.tensor([[*tokens[t], *[0] * (lengths[0] - len(tokens[t]))] for t in order])
    states = automaton.dead + 1
    reached = torch.arange(states)[:, None].repeat(1, len(tokens))
    for i in range(lengths[0]):
        longer = sum(length > i for length in lengths)
        reached[:, :longer] = automaton.next_state[reached[:, :longer], padded[:longer, i]]
    next_state = torch.empty_like(reached)
    next_state[:, order] = reached
    no_bytes = torch.tensor([not token for token in tokens])
    next_state[:, no_bytes] = automaton.dead
    allowed = next_state != automaton.dead
    allowed[:, end] = automaton.accepting
    allowed[-1, end] = True
    seen = torch.zeros(states, dtype=torch.bool)
    found = torch.tensor([0])
    while not seen[found].all():
        seen[found] = True
        found = next_state[seen].unique()
    stuck = (seen & ~allowed.any(dim=1)).nonzero()
    if len(stuck):
        raise ValueError(f"after any allowed tokens some token must be allowed; got none in state {int(stuck[0])}")
    return Grammar(automaton, allowed, next_state, end)


def with_usual_tokens(grammar: Grammar, tokens: Sequence[bytes], encode: Callable[[str], list[int]]) -> Grammar:
    """The same texts, but where text is forced only the token that `encode` cuts first is allowed, as in llguidance.

    A model that may cut forced text as it likes can end up among tokens that training never put side by side. Where an
    allowed token is longer than the forced text, it might be the usual one: there nothing changes.

    Args:
        grammar: Of the answer.
        tokens: The bytes of each token.
        encode: From text to token ids.
    """
    allowed = grammar.allowed.clone()
    lengths = torch.tensor([len(token) for token in tokens])
    for state in range(grammar.automaton.dead):
        forced = grammar.forced_bytes(state)[0]
        usual = encode(forced.decode(errors="ignore"))[:1]
        if usual and allowed[state, usual[0]] and lengths[allowed[state]].max() <= len(forced):
            allowed[state] = False
            allowed[state, usual[0]] = True
    return replace(grammar, allowed=allowed)


class GrammarTarget:
    """A target whose logits are masked along the text, so that every token it chooses obeys a grammar.

    Drafted tokens move the grammar's state as they move the cache, and `rewind` takes both back: whatever proposes, the
    text is the one that masked decoding gives token by token.

    Args:
        target: The model.
        grammar: Of what comes after the prompt.
    """

    def __init__(self, target: Target, grammar: Grammar) -> None:
        self.target, self.grammar, self.states = target, grammar, [0]

    @property
    def length(self) -> int:
        """Positions cached."""
        return self.target.length

    @property
    def max_length(self) -> int | None:
        """Positions there is room for."""
        return self.target.max_length

    def prefill(self, token_ids: Int[Tensor, "1 positions"]) -> Float[Tensor, "1 vocab"]:
        """Reads the prompt, which the grammar does not judge, and returns the masked logits of the first token."""
        logits = self.target.prefill(token_ids)
        self.states = [0]
        return self._mask(logits, self.states)

    def extend(self, token_ids: list[int]) -> Float[Tensor, "new vocab"]:
        """Reads tokens of the answer and returns the masked logits after each."""
        logits = self.target.extend(token_ids)
        for token in token_ids:
            self.states.append(self.grammar.walk([token], self.states[-1]))
        return self._mask(logits, self.states[-len(token_ids) :])

    def rewind(self, count: int) -> None:
        """Forgets the last `count` positions."""
        self.target.rewind(count)
        self.states = self.states[: max(len(self.states) - count, 1)]

    def _mask(self, logits: Float[Tensor, "new vocab"], states: list[int]) -> Float[Tensor, "new vocab"]:
        return logits.masked_fill(~self.grammar.allowed[states], FILTERED)


class GrammarDraft:
    """Drafts what the grammar forces: tokens that cost no model.

    Forced is a *text*; a model may cut it into other tokens than `encode`, so the tokens are a guess like any other.

    Args:
        grammar: Of the answer.
        encode: From text to token ids.
        opens: The token behind whose last occurrence the answer starts.
    """

    def __init__(self, grammar: Grammar, encode: Callable[[str], list[int]], *, opens: int) -> None:
        self.grammar, self.encode, self.opens = grammar, encode, opens

    def propose(self, token_ids: list[int], count: int) -> Proposal:
        """Returns at most `count` tokens of the forced text, the end token included."""
        answer = token_ids[len(token_ids) - token_ids[::-1].index(self.opens) :]
        state = self.grammar.walk(answer)
        forced, _ = self.grammar.forced_bytes(state)
        drafted = []
        for token in self.encode(forced.decode(errors="ignore")):
            if len(drafted) == count or not self.grammar.allowed[state, token]:
                return Proposal(drafted)
            drafted.append(token)
            state = self.grammar.walk([token], state)
        if len(drafted) < count and self.grammar.must_end(state):
            drafted.append(self.grammar.end)
        return Proposal(drafted)


def masked_choice_log_probs(
    step_log_probs: Float[Tensor, "choices longest vocab"], choices: Sequence[Sequence[int]]
) -> Float[Tensor, " choices"]:
    r"""Ln of the probability that token-by-token masking gives each choice.

    $\ln q(c) = \sum_i \ln p(c_i \mid c_{<i}) - \ln \sum_{t\ \text{allowed after}\ c_{<i}} p(t \mid c_{<i})$: every
    step divides by what it allows. The model's own distribution among the choices divides once, by the sum over whole
    choices; the two differ wherever the model would have left the grammar later.

    Args:
        step_log_probs: The model's log-probabilities before each token of each choice.
        choices: Token ids, none the beginning of another.

    >>> p = torch.tensor([[[0.5, 0.5, 0], [0.1, 0, 0.9]], [[0.5, 0.5, 0], [0.8, 0, 0.2]]])  # 0 0 and 1 0; 2 is outside
    >>> masked_choice_log_probs(p.log(), [[0, 0], [1, 0]]).exp().tolist()
    [0.5, 0.5]
    """
    following: dict[tuple[int, ...], set[int]] = {}
    for tokens in choices:
        for i, token in enumerate(tokens):
            following.setdefault(tuple(tokens[:i]), set()).add(token)
    totals = []
    for log_probs, tokens in zip(step_log_probs, choices, strict=True):
        steps = (
            log_probs[i, token] - log_probs[i, sorted(following[tuple(tokens[:i])])].logsumexp(0)
            for i, token in enumerate(tokens)
        )
        totals.append(sum(steps))
    return torch.stack(totals)
