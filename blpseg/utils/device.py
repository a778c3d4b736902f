"""MODEL.DEVICE on this machine."""

from __future__ import annotations

from .errors import BLPSegError


def choose_device(wanted: str) -> str:
    """``cuda`` or ``cpu`` for MODEL.DEVICE ``wanted``, "auto" among others: the CPU where there is no GPU.

    From then on a CPU takes subnormal numbers (below 2^-126 in float32) as 0 in this thread and in those it starts. A
    softmax over many positions is full of them, and a CPU of Intel computes with them ten times as slowly.

    Raises:
        BLPSegError: a GPU is asked for by its number, or Metal where it is missing.
    """
    import torch

    if wanted.startswith("cuda:") and wanted != "cuda:0":
        raise BLPSegError(
            f"MODEL.DEVICE {wanted}: processes take GPUs by their rank; write cuda, and choose the GPUs with "
            f"CUDA_VISIBLE_DEVICES={wanted[5:]}"
        )
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise BLPSegError("MODEL.DEVICE mps: there is no Metal device here; write auto")
    if wanted == "auto" or wanted.startswith("cuda"):
        # A process has one GPU, chosen by its rank.
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        torch.set_flush_denormal(True)  # before PyTorch starts its threads, which inherit it; False on some CPUs
    return wanted
