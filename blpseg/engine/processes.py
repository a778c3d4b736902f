"""Start the processes of a run, pass signals on to them, end together with one line of error."""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from detectron2.utils import comm

from ..utils.device import choose_device
from ..utils.errors import BLPSegError, debug_enabled, describe, one_line
from ..utils.parallel import die_with
from .agreement import PeerFailure
from .interrupt import SIGNALS, STOP

TIMEOUT = timedelta(minutes=30)  # Detectron2's; an evaluation on one rank may keep the others waiting
GRACE_S = 5.0  # processes that outlive a failed one get this long to end by themselves
STOP_S = 120.0  # after a signal: the step under way and a checkpoint; then a process that does not end is frozen
# How gloo and NCCL say that another process is gone.
CONNECTION_LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "socket closed", "refused")


def launch(
    main_func: Callable,
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple = (),
    *,
    device: str = "cuda",
) -> int:
    """Run ``main_func(*args)`` in every process of the run and return the run's exit status.

    Detectron2 counterpart: :func:`detectron2.engine.launch`, which needs GPUs. With one process it runs here. Under
    ``torchrun`` (RANK, WORLD_SIZE and LOCAL_RANK in the environment) this process is one of the ranks. Otherwise
    ``num_gpus_per_machine`` processes are started: a GPU each with NCCL, or on the CPU with gloo.

    Args:
        main_func: importable by name. An int that it returns is its exit status, all else counts as 0.
        num_gpus_per_machine: processes of this machine.
        num_machines: how many machines call this.
        machine_rank: the number of this one, from 0.
        dist_url: ``tcp://ADDRESS:PORT`` of machine 0; "auto" for a free port, with one machine.
        args: picklable.
        device: MODEL.DEVICE; the CPU is used where there is no GPU.

    Raises:
        BLPSegError: what the first failing process reports, or settings that cannot work.
    """
    use_gpu = choose_device(device) == "cuda"
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        return _run_under_torchrun(main_func, args, use_gpu)
    _check(num_gpus_per_machine, num_machines, machine_rank, dist_url, use_gpu)
    if num_gpus_per_machine * num_machines == 1:
        if use_gpu:
            torch.cuda.set_device(0)
        return _run(main_func, args)
    first, world_size = machine_rank * num_gpus_per_machine, num_machines * num_gpus_per_machine
    importlib.import_module("torch._dynamo.config")  # DistributedDataParallel needs it: once, before the forks
    # CUDA does not survive a fork; without it a fork saves each process the import of torch and Detectron2.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" and not use_gpu else "spawn")
    # The processes of one machine meet in a file: no port that other machines could reach.
    with tempfile.TemporaryDirectory(prefix="blpseg-") as folder:
        url = f"file://{folder}/meeting" if dist_url == "auto" else dist_url
        processes, reports = [], []
        for local_rank in range(num_gpus_per_machine):
            receiver, sender = context.Pipe(duplex=False)
            group = (url, first + local_rank, world_size, local_rank, num_gpus_per_machine, use_gpu)
            processes.append(context.Process(target=_child, args=(main_func, args, group, os.getpid(), sender)))
            reports.append(receiver)
        received = _supervise(processes)
    return _outcome([process.exitcode for process in processes], reports, received)


def _run(main_func: Callable, args: tuple) -> int:
    STOP.ready()
    result = main_func(*args)
    return result if isinstance(result, int) else 0


def _run_under_torchrun(main_func: Callable, args: tuple, use_gpu: bool) -> int:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    words = {name: os.environ.get(name, os.environ["WORLD_SIZE"]) for name in names}
    said = " ".join(f"{name}={word}" for name, word in words.items())
    if not all(word.isdecimal() for word in words.values()):
        raise BLPSegError(f"{said}: torchrun sets these to numbers; unset RANK to start processes with --num-gpus")
    rank, world_size, local_rank, local_size = map(int, words.values())
    if rank >= world_size or local_rank >= local_size:
        raise BLPSegError(f"{said}: ranks count from 0 and must be below their WORLD_SIZE")
    STOP.install()
    try:
        _join_group("env://", rank, world_size, local_rank, local_size, use_gpu)
        status = _run(main_func, args)
    except Exception as error:
        # The group is left as it is: NCCL would wait there for the others, which wait for this process.
        if not isinstance(error, PeerFailure) and _connection_lost(error):
            raise PeerFailure("another process of this run ended; its message says why") from error
        raise
    dist.destroy_process_group()
    return status


def _check(num_gpus: int, num_machines: int, machine_rank: int, dist_url: str, use_gpu: bool) -> None:
    if num_gpus < 1 or num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise BLPSegError(
            f"--num-gpus {num_gpus} --num-machines {num_machines} --machine-rank {machine_rank}: the counts start at "
            "1, the rank counts from 0 up to --num-machines - 1"
        )
    if use_gpu and num_gpus > torch.cuda.device_count():
        raise BLPSegError(
            f"--num-gpus {num_gpus}: this machine has {torch.cuda.device_count()} GPU(s); lower it, or train on the "
            "CPU with MODEL.DEVICE cpu"
        )
    if num_machines > 1 and dist_url == "auto":
        raise BLPSegError(
            "--num-machines > 1 needs --dist-url tcp://ADDRESS:PORT, a free port on machine 0, the same everywhere"
        )


def _supervise(processes: list) -> list[int]:
    """Start the processes, pass signals on, wait for all; what outlives a failed one is ended. The signals received."""
    received, until = [], []

    def forward(signum, frame):
        received.append(signum)
        until.append(time.monotonic() + STOP_S)
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signum)

    # A signal while the processes start waits until each has its own handling.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for process in processes:
        process.start()
    handled = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]  # `nohup` has SIGHUP ignored
    previous = {signum: signal.signal(signum, forward) for signum in handled}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        failed = False
        while running := [p for p in processes if p.is_alive()]:
            multiprocessing.connection.wait([p.sentinel for p in running], timeout=0.5)
            if not failed and any(p.exitcode for p in processes):
                failed = True
                until.append(time.monotonic() + GRACE_S)
            if until and time.monotonic() > min(until):
                for process in running:  # frozen, or in a collective call with one that is gone: no signal reaches it
                    process.kill()
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        for process in processes:
            process.kill()
    return received


def _outcome(statuses: list[int], reports: list, received: list[int]) -> int:
    """The run's exit status, from those of its processes.

    Raises:
        BLPSegError: what the process that failed first by itself reports.
    """
    failures = []
    for report in reports:
        if report.poll():
            try:
                failures.append(report.recv())
            except EOFError:
                pass  # it ended without a report; its exit status is judged below
    if received and not any(kind == 0 for kind, _ in failures):
        return 128 + received[0] if any(statuses) else 0
    killed = [rank for rank, status in enumerate(statuses) if status < 0]
    if failures and min(failures)[0] == 0 or failures and not killed:
        raise BLPSegError(min(failures)[1])
    if killed:
        raise BLPSegError(
            f"process {killed[0]} was killed by signal {-statuses[killed[0]]}; if not by you, then mostly for lack of "
            "memory: lower SOLVER.IMS_PER_BATCH, INPUT.CROP.SIZE or DATALOADER.NUM_WORKERS, and go on with --resume"
        )
    return max(statuses)


def _child(main_func: Callable, args: tuple, group: tuple, parent: int, report) -> None:
    die_with(parent)
    if group[3]:  # local rank
        os.environ["BLPSEG_QUIET_RANK"] = "1"
    STOP.install()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        _join_group(*group)
        status = _run(main_func, args)
        dist.destroy_process_group()
    except Exception as error:
        if debug_enabled():
            traceback.print_exc()
        # Which to report when several processes fail: 0 = the cause, 2 = the loss of another process.
        lost = isinstance(error, PeerFailure) or _connection_lost(error)
        report.send((2 if lost else 0, one_line(error)))
        status = 1
    sys.stdout.flush()
    sys.exit(status)


def _connection_lost(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in CONNECTION_LOST)


def _join_group(url: str, rank: int, world_size: int, local_rank: int, local_size: int, use_gpu: bool) -> None:
    if use_gpu:
        if local_rank >= torch.cuda.device_count():
            raise BLPSegError(f"process {local_rank} of this machine has no GPU, it has {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
    if local_size == world_size and sys.platform == "linux":
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")  # on one machine the processes listen to no other
    options = {"init_method": url, "rank": rank, "world_size": world_size, "timeout": TIMEOUT}
    errors: list[Exception] = []

    def meet() -> None:
        try:
            dist.init_process_group("nccl" if use_gpu else "gloo", **options)
        except Exception as error:
            errors.append(error)

    # In a thread: signals reach Python in this one while the others are waited for.
    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    for error in errors:
        raise BLPSegError(
            f"{url}: process {rank} of {world_size} finds no contact ({describe(error)[:200]}); is the address machine "
            "0's, the port free, and every machine started?"
        ) from error
    comm.create_local_process_group(local_size)
    comm.synchronize()
