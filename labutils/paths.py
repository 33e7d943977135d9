"""Where the course's files lie: the repository, its shipped data, and the learner's own folder."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"


def learner_dir() -> Path:
    """The learner's own folder (ledger, progress): $LABUTILS_HOME if set, else `learner` in the repository."""
    return Path(os.environ.get("LABUTILS_HOME") or ROOT / "learner")


def tool_cache_dir() -> Path:
    """Where compiled FPGA tools and their results are kept: $YOWASP_CACHE_DIR if set, else `fpga` in `learner_dir`."""
    return Path(os.environ.get("YOWASP_CACHE_DIR") or learner_dir() / "fpga")
