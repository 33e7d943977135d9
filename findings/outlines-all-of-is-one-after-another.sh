#!/usr/bin/env bash
# outlines-core writes JSON Schema's "all of" as one after another.
#
# Guess: {"allOf": [A, B]} allows what fits both A and B, or is refused with an error, as outlines-core refuses "not".
# Seen (outlines-core 0.2.14): the expression for A is followed by that for B. Two objects make `{"a":1}{"b":2}`, which no JSON
# reader takes, and the valid {"a":1,"b":2} is forbidden; of two strings one gets "ab""abc"; an integer that is an integer
# needs two digits. Inheritance in OpenAPI documents is written with allOf, and a model that is held by the expression can only
# give text that does not parse. One schema alone in the list is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet outlines-core==0.2.14 jsonschema==4.26.0
"$folder/venv/bin/python" - <<'PYTHON'
import json
import re
from importlib.metadata import version

from jsonschema import Draft202012Validator
from outlines_core.json_schema import build_regex_from_schema

print("outlines-core", version("outlines-core"), "jsonschema", version("jsonschema"))


def typed(name):
    return {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}


def allowed(schema, text):
    return re.fullmatch(build_regex_from_schema(json.dumps(schema)), text) is not None


CASES = {
    "objects": ([typed("a"), typed("b")], '{"a":1,"b":2}', '{"a":1}{"b":2}'),
    "strings": ([{"type": "string", "minLength": 2}, {"type": "string", "maxLength": 3}], '"abc"', '"ab""abc"'),
    "integers": ([{"type": "integer"}, {"type": "integer"}], "7", "7-7"),
}
for name, (both, valid, broken) in CASES.items():
    schema = {"allOf": both}
    assert Draft202012Validator(schema).is_valid(json.loads(valid))
    found = allowed(schema, valid), allowed(schema, broken)
    print(f"all of two {name}: allows the valid {valid} {found[0]}, and {broken} {found[1]}")
    assert found == (False, True)
    try:
        json.loads(broken)
    except json.JSONDecodeError:
        pass
    else:
        raise AssertionError(f"{broken} parses")
assert allowed({"allOf": [typed("a")]}, '{"a":1}')  # the control
try:
    build_regex_from_schema('{"not": {"type": "integer"}}')
except ValueError as error:
    print("not:", str(error).splitlines()[0])
else:
    raise AssertionError("not is no longer refused")
PYTHON
