"""Peak memory and time of one image: `python -m tests.evaluation.peak_memory HEIGHT WIDTH CONFIG [KEY VALUE ...]`."""

import resource
import sys
import time

import torch
from detectron2.modeling import build_model

from blpseg import get_cfg
from blpseg.evaluation import Inference


def main(height: str, width: str, config: str, *options: str) -> None:
    cfg = get_cfg(config, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *options])
    torch.manual_seed(0)
    inference = Inference.from_config(cfg, build_model(cfg).eval(), classes_only=True)
    image = torch.randint(0, 256, (3, int(height), int(width)), dtype=torch.uint8)
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    inference([{"image": image}])
    after = resource.getrusage(resource.RUSAGE_SELF)
    print(
        f"{height} x {width}, {inference.views} views: peak {after.ru_maxrss / 2**20:.2f} GiB of the whole process "
        f"({before.ru_maxrss / 2**20:.2f} before), {time.perf_counter() - start:.0f} s, "
        f"{after.ru_utime - before.ru_utime:.0f} s of CPU"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
