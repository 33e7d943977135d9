"""Execute a solution and keep of its outputs only what is the same on every machine."""

import copy
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from labutils.course.figures import BESIDE
from labutils.lab.language import ENGLISH
from labutils.lab.paths import tool_cache_dir

CELL_TIMEOUT_S = 1800
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


class ExecutionError(RuntimeError):
    """A cell of a solution failed; the text names it."""


def execute(notebook, root: Path, *, timeout_s: int = CELL_TIMEOUT_S, editions: Sequence[str] = ()):
    """Run a notebook in a fresh kernel of this Python, in ``root/notebooks``; return it cleaned.

    Args:
        notebook: The notebook; its outputs are replaced.
        root: The course's folder.
        timeout_s: Of one cell.
        editions: The languages in which each figure stands beside the English one: see `labutils.course.figures`.

    Raises:
        ExecutionError: When a cell raises, hangs or kills the kernel, or an exercise does not pass.
    """
    import nbclient

    metadata = copy.deepcopy(notebook.metadata)  # the client writes this Python's version into it
    with tempfile.TemporaryDirectory(prefix="labutils-build-") as home:
        client = nbclient.NotebookClient(
            notebook,
            timeout=timeout_s,
            kernel_name="python3",
            record_timing=False,
            store_widget_state=False,
            resources={"metadata": {"path": str(root / "notebooks")}},
        )
        try:
            client.execute(env=_environment(root, Path(home)) | {BESIDE: " ".join(editions)}, stderr=subprocess.DEVNULL)
        except (nbclient.exceptions.CellControlSignal, nbclient.exceptions.DeadKernelError) as error:
            stem = notebook.metadata.get("labutils", {}).get("chapter", "notebook")
            raise ExecutionError(f"{stem}: {error}") from None
    notebook.metadata = metadata
    return clean(notebook, root)


def _environment(root: Path, home: Path) -> dict[str, str]:
    """The kernel's environment: the course importable, no traces in the learner's folder."""
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    own = {"PYTHONPATH": path, "LABUTILS_HOME": str(home), "YOWASP_CACHE_DIR": str(tool_cache_dir().resolve())}
    return {**os.environ, **own, "LABUTILS_LANGUAGE": ENGLISH, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}


def clean(notebook, root: Path):
    """Drop from the outputs what belongs to one machine or one run; in place, and returned.

    Warnings and progress bars (the stderr stream), widget views and all metadata go; folders and
    the host's name become short words; numbers in ``<object at 0x7f…>`` become dots.
    """
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            cell.outputs = [kept for out in _joined(cell.outputs) if (kept := _clean_output(out, root))]
    return notebook


def _joined(outputs: list) -> list:
    """The outputs with neighbouring pieces of one stream in one, however they arrived."""
    result = []
    for output in outputs:
        before = result[-1] if result else None
        is_stream = output.output_type == "stream"
        if is_stream and before is not None and before.output_type == "stream" and before.name == output.name:
            before.text += output.text
        else:
            result.append(output)
    return result


def _clean_output(output, root: Path):
    if output.output_type == "stream":
        output.text = clean_text(output.text, root)
        return None if output.name == "stderr" else output
    if output.output_type == "error":
        output.traceback = [clean_text(line, root) for line in output.traceback]
        output.evalue = clean_text(output.evalue, root)
        return output
    if output.data.pop(WIDGET_VIEW, None) is not None:
        return None
    output.metadata = {}
    for mime, value in output.data.items():
        if isinstance(value, str) and not mime.startswith("image/"):
            output.data[mime] = clean_text(value, root)
    return output


def clean_text(text: str, root: Path) -> str:
    """Text without this machine's folders, host name and memory addresses."""
    places = {str(root): ".", sys.prefix: "<python>", sys.base_prefix: "<python>", str(Path.home()): "~"}
    for place, word in sorted(places.items(), key=lambda item: -len(item[0])):
        if len(place) > 1:
            text = re.sub(re.escape(place) + r"(?![\w-])", lambda _, w=word: w, text)
    # From a word's beginning only: sound in a page is one word of megabytes, where each letter would be tried.
    text = re.sub(r"(?<![^\s'\"(])[^\s'\"(]*ipykernel_\d+[/\\]\d+\.py", "<cell>", text)
    text = re.sub(re.escape(tempfile.gettempdir()) + r"(?![\w-])", "<tmp>", text)
    text = re.sub(r"\bat 0x[0-9a-fA-F]{6,}", "at 0x...", text)
    host = socket.gethostname()
    return re.sub(rf"\b{re.escape(host)}\b", "<host>", text) if len(host) > 3 and host != "localhost" else text


def unclean(notebook, root: Path) -> list[str]:
    """What in a stored notebook must not be there: one sentence per finding."""
    import json

    found = ["metadata.widgets breaks GitHub's preview"] if "widgets" in notebook.metadata else []
    again = clean(copy.deepcopy(notebook), root)
    for index, (cell, tidy) in enumerate(zip(notebook.cells, again.cells, strict=True)):
        if json.dumps(cell, sort_keys=True) != json.dumps(tidy, sort_keys=True):
            found.append(f"cell {index} holds outputs that belong to one machine or one run")
    return found
