"""Repeat the step that a dump holds and find where it stops being finite."""

from __future__ import annotations

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from .. import config
from ..checkpoint import load_file
from ..utils.errors import BLPSegError
from .trainer import autocast_dtype, seed_step

__all__ = ["replay"]


def replay(path: str, device: str) -> int:
    """Run forward and backward of a dump made by :func:`blpseg.engine.failures.save_dump`, printing what is found.

    Printed are the losses, the first module whose output and the parameters whose gradients are not finite.
    The batch runs as one part in one process, whatever the run had.

    Args:
        path: the dump.
        device: "cpu" or "cuda".

    Returns:
        0, the step is finite here; 3, it is not.

    Raises:
        BLPSegError: the file is no dump.
    """
    dump = load_file(path)
    if not {"batch", "model", "config", "iteration", "seed", "rank"} <= dump.keys():
        raise BLPSegError(f"{path}: not a dump of a step; a run that meets NaN writes them as dump_*.pth")
    cfg = config.get_cfg()
    cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(dump["config"])))
    cfg.MODEL.DEVICE = device
    model = build_model(cfg)
    model.load_state_dict(dump["model"])
    model.train()

    culprits: list[str] = []

    def watch(name: str):
        def hook(module, inputs, output):
            tensors = [t for t in _tensors(output) if t.is_floating_point()]
            if not all(torch.isfinite(t).all() for t in tensors):
                culprits.append(name)

        return hook

    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(watch(name))
    dtype = autocast_dtype(cfg, torch.device(device))
    seed_step(dump["seed"], dump["iteration"], dump["rank"])
    with EventStorage(dump["iteration"]), torch.autocast(device, dtype, enabled=dtype is not None):
        losses = model(dump["batch"])
    sum(losses.values()).backward()
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


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _first(names: list[str]) -> str:
    return "none" if not names else names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
