"""`python -m labutils serve`: a model behind an OpenAI-compatible address."""

import os
import sys
from argparse import ArgumentParser, Namespace

HELP = (
    "Serve a model to OpenAI's clients: /v1/chat/completions, /v1/completions and /v1/models. On this machine only, "
    "unless --host says otherwise; then clients must know the key in the environment variable LABUTILS_API_KEY."
)
NEEDS_ENVIRONMENT = True
KEY = "LABUTILS_API_KEY"


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("model", nargs="?", default="lablm", help="lablm, lablm-small, a folder or a hub name")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantize the weights (default: as they are)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--positions", type=int, default=16_384, help="tokens in memory, of all requests together")
    parser.add_argument("--max-running", type=int, default=32, help="requests computed at once")
    parser.add_argument("--max-waiting", type=int, default=256, help="requests in the queue; others are refused")
    parser.add_argument("--token-budget", type=int, default=256, help="tokens in one step")
    parser.add_argument("--answer-seconds", type=float, default=120.0, help="an answer that takes longer is given up")


def run(args: Namespace) -> int:
    """Serves until interrupted."""
    from labutils.course.extras import install_extra
    from labutils.lab.hosts import is_loopback

    key = os.environ.get(KEY) or None
    if not is_loopback(args.host) and key is None:
        print(f"labutils: to listen on {args.host}, set a key first: {KEY}=... (clients send it)", file=sys.stderr)
        return 2
    if not install_extra("serve"):
        return 1
    try:
        serve(args, key)
    except (RuntimeError, ValueError) as error:  # LoadError and KernelError are RuntimeErrors
        print(f"labutils: {error}", file=sys.stderr)
        return 1
    return 0


def serve(args: Namespace, key: str | None) -> None:
    """Loads the model and runs uvicorn."""
    import uvicorn

    from labutils.lab.models.load import load_model
    from labutils.lab.models.served import paged_llama, served_model
    from labutils.quantization.affine import Scheme
    from labutils.quantization.packed import pack_model_
    from labutils.serving.connections import bounded_http
    from labutils.serving.engine import Engine
    from labutils.serving.scheduler import Limits
    from labutils.serving.server import Bounds, make_app
    from labutils.serving.service import Service

    loaded = load_model(args.model)
    if args.bits:
        pack_model_(loaded.model, Scheme(8) if args.bits == 8 else Scheme(4, granularity="group", group_size=32))
    limits = Limits(
        token_budget=args.token_budget,
        max_running=args.max_running,
        max_waiting=args.max_waiting,
        max_positions=loaded.model.config.max_position_embeddings,
    )
    engine = Engine(paged_llama(loaded.model, positions=args.positions), limits)
    served = served_model(loaded, args.model)
    decode = loaded.tokenizer.decode
    with Service(
        engine, lambda ids: decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ) as service:
        bounds = Bounds(answer_s=args.answer_seconds)
        app = make_app(service, served, key=key, bounds=bounds)
        print(f"{args.model} at http://{args.host}:{args.port}/v1 (Ctrl+C ends it)", flush=True)
        connections = 2 * (args.max_running + args.max_waiting)
        options = {"limit_concurrency": connections, "http": bounded_http(bounds), "ws": "none"}
        uvicorn.run(app, host=args.host, port=args.port, log_level="warning", **options)
