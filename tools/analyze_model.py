#!/usr/bin/env python
"""Parameters, operations, memory and time of a model, part by part, and the share of local aggregation."""

import argparse
import json
import time
import warnings

from blpseg.utils.cli import add_debug_flag, parse_with_opts, run_command

EPILOG = """
One image, one forward in evaluation mode with gradient; no weights are loaded. Operations are multiply-adds as fvcore
counts them; those of local aggregation are the dense formula's. `kept` is what waits for the gradient.

example:
  tools/analyze_model.py --config-file configs/PascalVOC-Scribble/blpseg_R101.yaml --size 384 384 \\
      --opts MODEL.DEVICE cpu
"""
UNITS = {"parameters": 1e6, "operations": 1e9, "output": 2**20, "kept": 2**20, "seconds": 1}


def count_operations(module, inputs) -> float:
    """Multiply-adds of ``module(*inputs)`` by fvcore, with the elementwise operations that it leaves out. A softmax is
    a subtraction, an exponential, a sum and a division."""
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import elementwise_flop_counter

    handlers = {f"aten::{name}": elementwise_flop_counter(0, 1) for name in ("mul", "div", "add", "sub", "exp")}
    handlers |= {"aten::softmax": elementwise_flop_counter(0, 4), "aten::sum": elementwise_flop_counter(1, 0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, on shapes that become numbers
        counter = FlopCountAnalysis(module.eval(), inputs).set_op_handle(**handlers)
        return counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none").total()


def analyze(cfg, height: int, width: int) -> dict[str, dict[str, float]]:
    """Part of the model -> parameters, operations, bytes of its output, bytes kept for the gradient, seconds."""
    import torch
    from detectron2.modeling import build_model

    from blpseg.modeling import BLPSeg
    from blpseg.utils.errors import BLPSegError

    model = build_model(cfg).eval()
    if not isinstance(model, BLPSeg):
        raise BLPSegError(f"config: MODEL.META_ARCHITECTURE is {type(model).__name__}; only BLPSeg is analysed")
    image = model.preprocess_image([{"image": 255 * torch.rand(3, height, width)}]).tensor
    named = {"backbone": model.backbone, **dict(model.sem_seg_head.named_children())}
    if lam := model.local_aggregation:
        named["embedding"] = lam.embedding
    parts: dict[str, dict[str, float]] = {}
    seen = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    alive = []  # what is kept for the gradient, so that no later tensor takes its place in memory

    def measured(name, module, forward):
        def run(*inputs):
            part = parts[name] = {"parameters": 0, "operations": 0.0, "output": 0, "kept": 0, "seconds": 0.0}

            def keep(tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    alive.append(tensor)
                    part["kept"] += storage.nbytes()
                return tensor

            start = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                result = forward(*inputs)
            if image.is_cuda:
                torch.cuda.synchronize()
            part["seconds"] = time.perf_counter() - start
            tensors = result.values() if isinstance(result, dict) else [result]
            part["output"] = sum(t.numel() * t.element_size() for t in tensors)
            # The embedding is a part of its own.
            part["parameters"] = 0 if module is lam else sum(p.numel() for p in module.parameters())
            plain, impl = type(module).forward, getattr(module, "impl", None)
            module.forward = plain.__get__(module)
            if module is lam:
                lam.impl = "dense"
            with torch.no_grad():
                part["operations"] = count_operations(module, inputs)
            if module is lam:
                lam.impl = impl
            return result

        return run

    if image.is_cuda:
        model.outputs(image)  # libraries and kernels load at their first use
    for name, module in named.items():
        module.forward = measured(name, module, module.forward)
    model.outputs(image)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML config of the model")
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), default=[384, 384], help="default: 384 384")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    args = parse_with_opts(add_debug_flag(parser))

    import torch
    from tabulate import tabulate

    from blpseg import get_cfg
    from blpseg.utils.errors import BLPSegError

    if min(args.size) < 32:
        raise BLPSegError(f"--size {args.size[0]} {args.size[1]}: sides of at least 32 pixels are needed")
    cfg = get_cfg(args.config_file, args.opts)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    parts = analyze(cfg, *args.size)
    if args.json:
        print(json.dumps(parts, indent=1))
        return
    total = {column: sum(part[column] for part in parts.values()) for column in UNITS}
    rows = [
        [name, *(f"{part[c] / unit:.2f} ({100 * part[c] / max(total[c], 1e-9):.0f} %)" for c, unit in UNITS.items())]
        for name, part in {**parts, "sum": total}.items()
    ]
    headers = ["part", "parameters, M", "operations, G", "output, MiB", "kept, MiB", "seconds"]
    print(tabulate(rows, headers=headers, disable_numparse=True, stralign="right"))


if __name__ == "__main__":
    run_command(main)
