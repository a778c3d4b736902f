"""A step that met NaN: written to a file, and repeated from it to find where it stops being finite."""

from __future__ import annotations

import os

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch.utils._pytree import tree_leaves

from .. import config
from ..checkpoint import load_file, save_atomic
from ..utils.errors import BLPSegError, describe
from ..utils.yaml_files import parse_yaml
from .amp import autocast_dtype
from .resume import seed_step


def save_dump(step, culprits: list[str]) -> str:
    """Write the step under way: batch, weights from before it, config, and what its random numbers follow from.

    ``step`` is a :class:`TrainingStep`, ``culprits`` are the names of what is not finite. Returns the path, in
    OUTPUT_DIR.
    """
    path = os.path.join(step.cfg.OUTPUT_DIR, f"dump_iter{step.iter:07d}_rank{step.rank}.pth")
    dump = {
        "batch": _plain(step.batch),
        "model": step.model.state_dict(),
        "scaler": step.scaler.state_dict(),
        "iteration": step.iter,
        "seed": step.cfg.SEED,
        "rank": step.rank,
        "world_size": step.world_size,
        "culprits": culprits,
        "config": step.cfg.dump(),
    }
    save_atomic(path, dump)
    return path


def _plain(value):
    """``value`` as something ``torch.load(weights_only=True)`` reads."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (torch.Tensor, str, int, float, bool, type(None))) else str(value)


def replay(path: str, device: str) -> int:
    """Run forward and backward of a dump of :func:`save_dump` on ``device``; returns 0 if the step is finite here, else
    3.

    It prints the losses, the first module whose output is not finite, and the parameters whose gradients are not. The
    batch runs as one part in one process, however the run had divided it. Raises BLPSegError if the file is no dump.
    """
    dump = load_file(path)
    if not {"batch", "model", "config", "iteration", "seed", "rank"} <= dump.keys():
        raise BLPSegError(f"{path}: not a dump of a step; a run that meets NaN writes them as dump_*.pth")
    cfg = config.get_cfg()
    cfg.set_new_allowed(True)  # a script's own keys
    try:
        cfg.merge_from_other_cfg(CfgNode(parse_yaml(dump["config"], path)))
        cfg.MODEL.DEVICE = device
        model = build_model(cfg)
        model.load_state_dict(dump["model"])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise BLPSegError(f"{path}: damaged, its model cannot be made ({describe(error)[:200]})") from error
    model.train()
    culprits = _watch_outputs(model)
    losses = _repeat(cfg, model, dump)
    gradients = [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    weights = [n for n, v in dump["model"].items() if v.is_floating_point() and not torch.isfinite(v).all()]

    print(f"iteration {dump['iteration']}, process {dump['rank']} of {dump['world_size']}:")
    for x in dump["batch"]:
        print(f"  {x.get('file_name', '?')}: image {tuple(x['image'].shape)}")
    print("losses: " + ", ".join(f"{name} {loss.item():.6g}" for name, loss in losses.items()))
    print(f"weights that are not finite: {_first(weights)}")
    print(f"first module with an output that is not finite: {_first(culprits[:1])}")
    print(f"gradients that are not finite: {_first(gradients)}")
    finite = not (weights or culprits or gradients) and all(torch.isfinite(v) for v in losses.values())
    print("the step is finite here" if finite else "the step is not finite")
    return 0 if finite else 3


def _repeat(cfg: CfgNode, model: torch.nn.Module, dump: dict) -> dict[str, torch.Tensor]:
    """Forward and backward; the losses."""
    device = cfg.MODEL.DEVICE
    dtype = autocast_dtype(cfg, torch.device(device))
    seed_step(dump["seed"], dump["iteration"], dump["rank"])
    with EventStorage(dump["iteration"]), torch.autocast(device, dtype, enabled=dtype is not None):
        losses = model(dump["batch"])
    sum(losses.values()).backward()
    return losses


def _watch_outputs(model: torch.nn.Module) -> list[str]:
    """A list that gets the names of the modules whose output is not finite, in the order in which they run."""
    culprits: list[str] = []

    def watch(name: str):
        def hook(module, inputs, output):
            tensors = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]
            if not all(torch.isfinite(t).all() for t in tensors):
                culprits.append(name)

        return hook

    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(watch(name))
    return culprits


def _first(names: list[str]) -> str:
    return "none" if not names else names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
