#!/usr/bin/env bash
# llama.cpp rounds Q8_0 away from zero in files and to even at run time.
#
# Guess: one format has one rounding, so a row quantized into a file and the same row as an input get the same codes.
# Seen (xllamacpp 2026.10.11549, x86-64): scale and layout agree, and where w / scale lies halfway (0.5, 2.5 …) the codes differ
# by one. A test that compares an engine's inputs with a file's codes bit by bit fails on ties only.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --no-deps xllamacpp==2026.10.11549
"$folder/venv/bin/python" - <<'PYTHON'
import ctypes
from importlib.metadata import version

import numpy as np
import xllamacpp

print("xllamacpp", version("xllamacpp"))
ggml = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
ggml.ggml_get_type_traits_cpu.restype = ctypes.POINTER(ctypes.c_void_p)
ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
ggml.ggml_cpu_init()
Q8_0, row = 8, np.zeros(32, np.float32)
row[:8] = 127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.6
file, run = np.zeros(34, np.uint8), np.zeros(34, np.uint8)
one, none = ctypes.c_int64(1), ctypes.c_int64(0)
source, to = ctypes.c_void_p(row.ctypes.data), ctypes.c_void_p(file.ctypes.data)
assert ggml.ggml_quantize_chunk(Q8_0, source, to, none, one, ctypes.c_int64(32), None) == 34
from_float = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
from_float(ggml.ggml_get_type_traits_cpu(Q8_0)[0])(row.ctypes.data, run.ctypes.data, 32)
for name, block in (("file", file), ("run time", run)):
    print(f"{name:<9} scale {block[:2].view('<f2')[0]}, codes {block[2:10].view(np.int8).tolist()}")
assert file[:2].tolist() == run[:2].tolist()  # the control
assert file[2:10].view(np.int8).tolist() == [127, 1, 2, 3, -1, -2, -3, 1]
assert run[2:10].view(np.int8).tolist() == [127, 0, 2, 2, 0, -2, -2, 1]
PYTHON
