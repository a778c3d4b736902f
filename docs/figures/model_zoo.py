#!/usr/bin/env python
"""The measured columns of docs/MODEL_ZOO.md: size, cost and memory of every config on this machine."""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("config", "backbone weights", "parameters M", "image", "multiply-adds G", "s / training image",
           "s / test image", "memory GiB")  # fmt: skip
IMAGES = 2  # of the measured step: batch statistics need more than one


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"""\
Every config is measured in a process of its own, on one core and on images of its crop's size. Multiply-adds are those
of one forward as fvcore counts them, with local aggregation by its dense formula. Seconds are processor seconds of one
core: of a training step on {IMAGES} images, divided by {IMAGES}, and of a forward in evaluation mode. Memory is the
process's highest during that step.

example:
  python docs/figures/model_zoo.py configs/*/blpseg_lite.yaml
""",
    )
    parser.add_argument("configs", nargs="*", metavar="FILE", help="default: every config in configs/")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(" | ".join(measure(args.configs[0])))
        return
    configs = args.configs or sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").glob("*/*.yaml"))
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for config in configs:
        command = [sys.executable, "-W", "ignore", __file__, "--measure", config]
        print(f"| {subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()} |", flush=True)


def measure(config: str) -> list[str]:
    """The cells of one config's row."""
    import torch
    from detectron2.modeling import build_model
    from fvcore.nn import FlopCountAnalysis

    from blpseg import get_cfg

    torch.set_num_threads(1)
    torch.manual_seed(0)
    cfg = get_cfg(config, ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    height, width = cfg.INPUT.CROP.SIZE
    image = 255 * torch.rand(3, height, width)
    scribble = torch.full((height, width), cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    scribble[height // 4, :], scribble[height // 2, :] = 0, 1
    present = torch.arange(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES) < 2
    sample = {"image": image, "scribble": scribble, "image_classes": present}

    model.train()
    step = least_seconds(lambda: sum(model([sample] * IMAGES).values()).backward()) / IMAGES
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    model.eval()
    with torch.no_grad():
        test = least_seconds(lambda: model([{"image": image}]))
        cfg.MODEL.BLPSEG.LAM.IMPL = "dense"
        counted = build_model(cfg).eval()
        counter = FlopCountAnalysis(OneImage(counted), image).unsupported_ops_warnings(False)
        operations = counter.uncalled_modules_warnings(False).tracer_warnings("none").total()
    weights = cfg.MODEL.WEIGHTS or (cfg.MODEL.TIMM.WEIGHTS and f"{cfg.MODEL.TIMM.NAME}, ImageNet") or "none"
    return [
        f"`{config}`", weights, f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}", f"{height} x {width}",
        f"{operations / 1e9:.1f}", f"{step:.2f}", f"{test:.2f}", f"{memory:.1f}",
    ]  # fmt: skip


def least_seconds(run, repeats: int = 3) -> float:
    """The least of a few processor times, so that what else the machine does tells little."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def OneImage(model):
    """(3, H, W) -> (C, H, W) logits: a module that can be traced."""
    import torch

    class Traced(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, image):
            return self.model([{"image": image}])[0]["sem_seg"]

    return Traced()


if __name__ == "__main__":
    main()
