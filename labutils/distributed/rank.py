"""What `launch` starts once per rank: run one function, leave its result or its traceback behind, and always end.

The standard library comes first: the watcher runs before torch is imported, which takes seconds.
"""

import contextlib
import faulthandler
import importlib
import os
import pickle
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def watch_stdin(stack_file: Path) -> None:
    """Ends this process as soon as its stdin closes: whoever held the other end is gone, or has called time.

    The operating system closes the pipe however its owner ends, SIGKILL included. What every thread was doing goes
    into `stack_file` first. An owner that has ended without a word reads it no more: its folder is removed.
    """

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin.read: its lock would be held while the interpreter shuts down
            pass
        with contextlib.suppress(OSError), stack_file.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
        if not (stack_file.parent / "ended").exists():
            remove(stack_file.parent)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def remove(folder: Path) -> None:
    """Removes a launch's folder, after its agent, which would wait for the files in it for minutes."""
    import psutil

    with contextlib.suppress(psutil.Error):
        agent = psutil.Process().parent()  # another process, where the agent is dead
        if agent and str(folder) in agent.cmdline():
            agent.kill()
    shutil.rmtree(folder, ignore_errors=True)


def resolve(target: str) -> Callable:
    """Returns the function that "module:function" names.

    >>> resolve("os.path:basename")("a/b")
    'b'
    """
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def join_group(folder: Path, backend: str, rank: int, world_size: int) -> None:
    """Joins the ranks' process group: through a file on one machine, through the rendezvous' address on several.

    A file needs no port. Every restart takes a fresh one: an old one still holds the addresses of the dead.

    Args:
        folder: The launch's.
        backend: One for all devices, or one for each, such as "cpu:gloo,cuda:nccl" (then each rank takes one GPU).
        rank: This rank's number.
        world_size: Ranks of all machines.
    """
    import torch.distributed as dist

    device = None
    if "nccl" in backend:
        import torch

        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    meeting = folder / f"meeting.{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    on_one_machine = os.environ["GROUP_WORLD_SIZE"] == "1"
    method = meeting.resolve().as_uri() if on_one_machine else "env://"
    dist.init_process_group(backend, init_method=method, rank=rank, world_size=world_size, device_id=device)


def write(path: Path, data: bytes) -> None:
    """Writes a file that appears whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(path)


def main(target: str, folder: Path, backend: str) -> None:
    """Runs `target(**args)` as one rank. A failure keeps its attempt and its time.

    So the first one of the last attempt can be told from its echoes.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    sys.stdout.reconfigure(line_buffering=True, write_through=False)  # unbuffered, two ranks' lines would mix
    watch_stdin(folder / f"{rank}.stack")
    (folder / f"{rank}.result").unlink(missing_ok=True)  # of the attempt before a restart
    write(folder / f"{rank}.pid", str(os.getpid()).encode())
    try:
        join_group(folder, backend, rank, world_size)
        result = resolve(target)(**pickle.loads((folder / "args").read_bytes()))
        write(folder / f"{rank}.result", pickle.dumps(result))
        import torch.distributed as dist

        dist.barrier()  # nobody leaves while another still reads from it
        dist.destroy_process_group()
    except BaseException:
        write(folder / f"{rank}.error", pickle.dumps((-attempt, time.time(), traceback.format_exc())))
        sys.stdout.flush()
        os._exit(1)  # without a farewell to the group: its other ranks may hang


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
