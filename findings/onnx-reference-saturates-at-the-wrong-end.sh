#!/usr/bin/env bash
# ONNX's reference quantizes a large positive number to the smallest code.
#
# Guess: QuantizeLinear saturates, so a number far above the range gets the largest code: above all in ONNX's own reference
# evaluator, which backends are compared with.
# Seen (onnx 1.23.2, x86-64; onnxruntime 1.32.0 for comparison): where x / scale reaches 2^31 the code is -128 in int8, 0 in
# uint8, -8 in int4. The reference casts to int32, where NumPy has the lowest number for what does not fit, and clips after
# that (`_CommonQuantizeLinear._run` in reference/ops/op_quantize_linear.py). A scale of 1e-8, as a channel that was nearly
# silent in calibration gets, makes this of 30 already: the outlier changes its sign. onnxruntime gives the largest code.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, checker, helper
from onnx.reference import ReferenceEvaluator

print("onnx", onnx.__version__, "onnxruntime", onnxruntime.__version__, "numpy", np.__version__)
ENDS = {"UINT8": (0, 255), "INT8": (-128, 127), "INT4": (-8, 7)}
inputs = {"x": np.array([20, 30, -30, 1e-7], np.float32), "scale": np.array(1e-8, np.float32)}
for name, (low, high) in ENDS.items():
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], output_dtype=getattr(TensorProto, name)),
        helper.make_node("Cast", ["q"], ["y"], to=TensorProto.INT32),
    ]
    sides = [("x", TensorProto.FLOAT, [4]), ("scale", TensorProto.FLOAT, []), ("y", TensorProto.INT32, [4])]
    *before, after = (helper.make_tensor_value_info(*side) for side in sides)
    graph = helper.make_graph(nodes, "quantize", before, [after])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    checker.check_model(model, full_check=True)
    (reference,) = ReferenceEvaluator(model).run(None, inputs)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (runtime,) = session.run(None, inputs)
    print(f"{name}: {inputs['x'].tolist()} / 1e-8 become {reference.tolist()} in the reference, {runtime.tolist()} in onnxruntime")
    small = min(10, high)
    assert runtime.tolist() == [high, high, low, small]  # the control
    assert reference.tolist() == [high, low, low, small]
PYTHON
