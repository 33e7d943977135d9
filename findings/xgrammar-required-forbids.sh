#!/usr/bin/env bash
# XGrammar turns two of JSON Schema's demands into their opposites.
#
# Guess: {"type": "object", "required": ["a"]} allows objects that have "a"; what is not supported is refused with an error.
# Seen (xgrammar 0.2.8): only {} is allowed, the one object that the schema forbids; and {"type": "array", "contains": …} allows
# only []. The default `strict_mode=True` closes what lists no `properties` or `items`, then forgets the demand that nothing can
# meet any more ("minProperties" in its place is refused). Without the demand both stay open, and so they do with
# `strict_mode=False`. A model held by such a grammar cannot give a valid answer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0 pydantic==2.14.4 jsonschema==4.26.0
"$folder/venv/bin/pip" install --quiet --no-deps xgrammar==0.2.8 apache-tvm-ffi==0.1.15.post2
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import json
from importlib.metadata import version

from jsonschema import Draft202012Validator
from xgrammar import Grammar
from xgrammar.testing import _is_grammar_accept_string as accepts

print("xgrammar", version("xgrammar"), "jsonschema", version("jsonschema"))
TYPED = {"a": {"type": "integer"}}
CASES = {
    "required": ({"type": "object", "required": ["a"]}, '{"a": 1}', "{}"),
    "contains": ({"type": "array", "contains": {"const": 1}}, "[1]", "[]"),
    "the first with properties": ({"type": "object", "properties": TYPED, "required": ["a"]}, '{"a": 1}', "{}"),
}
seen = {}
for name, (schema, valid, invalid) in CASES.items():
    validator, grammar = Draft202012Validator(schema), Grammar.from_json_schema(json.dumps(schema))
    assert validator.is_valid(json.loads(valid)) and not validator.is_valid(json.loads(invalid))
    seen[name] = accepts(grammar, valid), accepts(grammar, invalid)
    print(f"{json.dumps(schema)}: accepts the valid {valid} {seen[name][0]}, the invalid {invalid} {seen[name][1]}")
assert accepts(Grammar.from_json_schema('{"type": "object"}'), '{"a": 1}')  # without the demand it is open
assert accepts(Grammar.from_json_schema(json.dumps(CASES["required"][0]), strict_mode=False), '{"a": 1}')
assert seen["required"] == seen["contains"] == (False, True)
assert seen["the first with properties"] == (True, False)  # the control
PYTHON
