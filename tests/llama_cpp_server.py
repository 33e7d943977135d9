"""llama.cpp in a process of its own, which it may end instead of raising: a file, questions in, answers out as JSON."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

TIMEOUT_S = 120


def ask(folder: Path, gguf: Path, questions: list[dict]) -> list[dict]:
    """Loads the file with the xllamacpp that lies in `folder` and posts each question, {"to": route} and a body."""
    command = [sys.executable, __file__, str(folder), str(gguf)]
    result = subprocess.run(
        command, input=json.dumps(questions), capture_output=True, encoding="utf-8", timeout=TIMEOUT_S
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """Starts the server, asks it everything and prints the answers on the last line."""
    sys.path.insert(0, sys.argv[1])
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = sys.argv[2], 128, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup, params.flash_attn_type = False, xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    answers = []
    for question in json.load(sys.stdin):
        request = urllib.request.Request(
            f"{server.listening_address}/{question.pop('to')}",
            json.dumps(question).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            answers.append(json.load(response))
    print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
