"""`python -m labutils evaluate`: the numbers of the model card, measured again."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

HELP = "measure a model's bits per byte on held-out code and its accuracy on held-out service phrasings"
NEEDS_ENVIRONMENT = True


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("model", nargs="?", default="lablm", help="lablm, lablm-small, a folder or a hub name")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--count", type=int, default=500, help="service items of each task (0: leave them out)")
    parser.add_argument("--context", type=int, default=1024, help="tokens that the model sees at once")
    parser.add_argument("--limit-bytes", type=int, help="read only the beginning of each module")
    parser.add_argument("--compressors", action="store_true", help="measure xz and a bigram model as well")
    parser.add_argument("--json", type=Path, help="write the rows to this file")


def run(args: Namespace) -> int:
    """Measures and prints a Markdown table."""
    import json
    import platform

    from labutils.lab.models import model_card
    from labutils.lab.models.load import load_model

    loaded = load_model(args.model)
    rows = model_card.text_rows(loaded, split=args.split, context=args.context, limit_bytes=args.limit_bytes)
    if args.count:
        rows += model_card.service_rows(loaded, count=args.count, split=args.split)
    if args.compressors:
        rows += model_card.compressor_rows(split=args.split)
    print(f"{args.model} on the {args.split} split, Python {platform.python_version()}\n")
    print(model_card.table(rows))
    if args.json:
        result = {"model": args.model, "split": args.split, "python": platform.python_version(), "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0
