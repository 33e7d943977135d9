"""`python -m labutils export`: a model in the file format of another engine."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

HELP = "write a model for llama.cpp: `export gguf`, with its tokenizer, as F32, Q8_0 or Q4_0"
NEEDS_ENVIRONMENT = True


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("kind", choices=("gguf",), help="the file format")
    parser.add_argument("model", nargs="?", default="lablm", help="lablm, lablm-small, a folder or a hub name")
    parser.add_argument("--format", choices=("F32", "Q8_0", "Q4_0"), default="F32", help="how matrices are stored")
    parser.add_argument("--output", type=Path, help="the file to write (default: MODEL-FORMAT.gguf)")


def run(args: Namespace) -> int:
    """Writes the file; 1 with a sentence where the model cannot be exported."""
    from labutils.lab.models.gguf import export_gguf
    from labutils.lab.models.load import LoadError, load_model

    path = args.output or Path(f"{Path(args.model).name}-{args.format}.gguf")
    try:
        loaded = load_model(args.model)
        export_gguf(loaded.model, loaded.tokenizer, path, format=args.format, name=Path(args.model).name)
    except (LoadError, ValueError, OSError) as error:
        print(f"labutils: {error}")
        return 1
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {args.format}")
    return 0
