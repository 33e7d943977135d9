#!/usr/bin/env bash
# OpenVINO's cast to int4 depends on whether its argument is a constant.
#
# Guess: Convert to i4 and back gives numbers from -8 to 7, the same for a constant and for an input.
# Seen (openvino 2026.4.1, CPU): a constant is folded, and keeps the lowest four bits (8 -> -8, 100 -> 4); an input is only cut to
# a whole number (8 -> 8, 100 -> 100). The same model gives other numbers once a weight becomes an input.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 openvino==2026.4.1
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
import openvino as ov
from openvino import opset15 as op

print("openvino", version("openvino"))
numbers = np.array([7.6, 8.0, 100.0], np.float32)


def there_and_back(x, inputs, given):
    model = ov.Model([op.convert(op.convert(x, "i4"), "f32")], inputs)
    return ov.Core().compile_model(model, "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"})(given)[0].tolist()


parameter = op.parameter([3], np.float32)
folded, at_run_time = there_and_back(op.constant(numbers), [], []), there_and_back(parameter, [parameter], [numbers])
print(numbers.tolist(), "-> constant", folded, "-> input", at_run_time)
assert folded == [7, -8, 4] and at_run_time == [7, 8, 100]
PYTHON
