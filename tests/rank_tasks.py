"""Functions that tests run as ranks: a rank imports its function, so they need a module of their own."""

import os
import signal
import time

import torch
import torch.distributed as dist


def rank_and_sum(offset=1):
    total = torch.tensor([dist.get_rank() + offset])
    print("rank", end=" ")  # half a line, until every rank has printed as much
    dist.all_reduce(total)
    print(f"{dist.get_rank()} says hello")
    return dist.get_rank(), int(total)


def prints(lines):
    for line in range(lines):
        print("line", line)
    return lines


def raises_on(rank):
    if dist.get_rank() == rank:
        raise KeyError(f"rank {rank} lost its key")
    dist.all_reduce(torch.zeros(1))


def signals_itself(rank, number):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), number)
    dist.barrier()


def sleeps_for_ever(pid_folder):
    path = os.path.join(pid_folder, f"{dist.get_rank()}.tmp")
    with open(path, "w", encoding="utf-8") as file:
        file.write(str(os.getpid()))
    os.rename(path, path.replace(".tmp", ".pid"))
    time.sleep(3600)


def succeeds_at_restart(count):
    dist.all_reduce(torch.zeros(1))
    if int(os.environ["TORCHELASTIC_RESTART_COUNT"]) < count:
        os.kill(os.getpid(), signal.SIGKILL) if dist.get_rank() == 1 else dist.barrier()
    return rank_and_sum()


def listening_addresses():
    import psutil

    dist.all_reduce(torch.zeros(1))
    family = [psutil.Process(), psutil.Process().parent()]
    sockets = [c for process in family for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
    return [c.laddr.ip for c in sockets]


def address_family():
    return os.environ["GROUP_RANK"], dist.get_rank(), dist.get_world_size()
