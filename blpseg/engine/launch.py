"""Start the processes of a run, pass signals on to them, end together with one line of error."""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from detectron2.utils import comm

from ..utils.errors import BLPSegError, debug_enabled, describe
from .interrupt import SIGNALS, StopRequest

__all__ = ["PeerFailure", "launch"]

TIMEOUT = timedelta(minutes=30)  # Detectron2's; an evaluation on one rank may keep the others waiting
GRACE_S = 5.0  # processes that outlive a failed one get this long to end by themselves
# How gloo and NCCL say that another process is gone.
CONNECTION_LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "socket closed", "refused")


class PeerFailure(BLPSegError):
    """Another process of this run failed; its own message tells why."""


def launch(worker: Callable, args, *, use_gpu: bool) -> int:
    """Run ``worker(args, stop)`` in every process of the run and return the run's exit status.

    With one process it runs here. Under ``torchrun`` (RANK, WORLD_SIZE and LOCAL_RANK in the environment) this
    process is one of the ranks. Otherwise ``args.num_gpus`` processes are spawned: a GPU each with NCCL, or on the
    CPU with gloo.

    Args:
        worker: importable by name; takes ``args`` and a :class:`StopRequest`; returns an exit status or None.
        args: picklable, with num_gpus, num_machines, machine_rank, dist_url.
        use_gpu: whether the processes compute on GPUs.

    Raises:
        BLPSegError: what the first failing process reports, or settings that cannot work.
    """
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        world_size = int(os.environ["WORLD_SIZE"])
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        stop = StopRequest().install()
        try:
            rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
            _join_group("env://", rank, world_size, local_rank, local_size, use_gpu)
            status = worker(args, stop) or 0
        except Exception as error:
            # The group is left as it is: NCCL would wait there for the others, which wait for this process.
            if not isinstance(error, PeerFailure) and _connection_lost(error):
                raise PeerFailure("another process of this run ended; its message tells why") from error
            raise
        _leave_group()
        return status
    _check(args, use_gpu)
    if args.num_gpus * args.num_machines == 1:
        if use_gpu:
            torch.cuda.set_device(0)
        return worker(args, StopRequest().install()) or 0
    return _spawn(worker, args, use_gpu)


def _check(args, use_gpu: bool) -> None:
    if args.num_gpus < 1 or args.num_machines < 1 or not 0 <= args.machine_rank < args.num_machines:
        raise BLPSegError(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines} --machine-rank {args.machine_rank}: "
            "the counts start at 1, the rank counts from 0 up to --num-machines - 1"
        )
    if use_gpu and args.num_gpus > torch.cuda.device_count():
        raise BLPSegError(
            f"--num-gpus {args.num_gpus}: this machine has {torch.cuda.device_count()} GPU(s); lower it, or train "
            "on the "
            "CPU with MODEL.DEVICE cpu"
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise BLPSegError(
            "--num-machines > 1 needs --dist-url tcp://ADDRESS:PORT, a free port on machine 0, the same everywhere"
        )


def _spawn(worker: Callable, args, use_gpu: bool) -> int:
    url = args.dist_url
    if url == "auto":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            url = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    # CUDA does not survive a fork; without it a fork saves each process the import of torch and Detectron2.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" and not use_gpu else "spawn")
    processes, reports = [], []
    for local_rank in range(args.num_gpus):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(local_rank, worker, args, url, use_gpu, os.getpid(), sender))
        processes.append(process)
        reports.append(receiver)

    received = []

    def forward(signum, frame):
        received.append(signum)
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signum)

    # A signal while the processes start waits until each has its own handling.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for process in processes:
        process.start()
    previous = {signum: signal.signal(signum, forward) for signum in SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        deadline = None
        while running := [p for p in processes if p.is_alive()]:
            multiprocessing.connection.wait([p.sentinel for p in running], timeout=0.5)
            if deadline is None and any(p.exitcode for p in processes):
                deadline = time.monotonic() + GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                for process in running:  # waiting in a collective call for one that is gone: no signal reaches Python
                    process.kill()
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        for process in processes:
            process.kill()
    statuses = [process.exitcode for process in processes]
    if received and all(status in (0, 128 + received[0], -received[0]) for status in statuses):
        return 128 + received[0] if any(statuses) else 0
    failures = []
    for report in reports:
        if report.poll():
            try:
                failures.append(report.recv())
            except EOFError:
                pass  # it ended without a report; its exit status is judged below
    killed = [rank for rank, status in enumerate(statuses) if status < 0]
    if failures and min(failures)[0] == 0 or failures and not killed:
        raise BLPSegError(min(failures)[1])
    if killed:
        rank = killed[0]
        raise BLPSegError(
            f"process {rank} was killed by signal {-statuses[rank]}; if not by you, then mostly for lack of "
            "memory: lower "
            "SOLVER.IMS_PER_BATCH, INPUT.CROP.SIZE or DATALOADER.NUM_WORKERS, and go on with --resume"
        )
    return max(statuses)


def _child(local_rank: int, worker: Callable, args, url: str, use_gpu: bool, parent: int, report) -> None:
    die_with(parent)
    if local_rank:
        os.environ["BLPSEG_QUIET_RANK"] = "1"
    stop = StopRequest().install()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        rank = args.machine_rank * args.num_gpus + local_rank
        _join_group(url, rank, args.num_gpus * args.num_machines, local_rank, args.num_gpus, use_gpu)
        status = worker(args, stop) or 0
        _leave_group()
    except Exception as error:
        if debug_enabled():
            traceback.print_exc()
        report.send((_rank_of_interest(error), _one_line(error)))
        status = 1
    sys.stdout.flush()
    sys.exit(status)


def _rank_of_interest(error: Exception) -> int:
    """Which failure to report when several processes fail: 0 = the cause, 2 = the loss of another process."""
    if isinstance(error, PeerFailure) or _connection_lost(error):
        return 2
    return 0


def _connection_lost(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in CONNECTION_LOST)


def _one_line(error: Exception) -> str:
    if isinstance(error, (BLPSegError, OSError)):
        return describe(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"unexpected {type(error).__name__} at {os.path.basename(frame.filename)}:{frame.lineno}: {describe(error)} "
        "(--debug shows the traceback)"
    )


def _join_group(url: str, rank: int, world_size: int, local_rank: int, local_size: int, use_gpu: bool) -> None:
    if use_gpu:
        if local_rank >= torch.cuda.device_count():
            raise BLPSegError(f"process {local_rank} of this machine has no GPU, it has {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // local_size))
    try:
        dist.init_process_group(
            "nccl" if use_gpu else "gloo", init_method=url, rank=rank, world_size=world_size, timeout=TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        raise BLPSegError(
            f"{url}: process {rank} of {world_size} finds no contact ({describe(error)[:200]}); is the address "
            "machine 0's, the "
            "port free, and every machine started?"
        ) from error
    comm.create_local_process_group(local_size)
    comm.synchronize()


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def die_with(parent: int) -> None:
    """End this process when its parent is killed: an orphan would go on writing beside a resumed run."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return  # not Linux
    if os.getppid() != parent:
        os._exit(1)
