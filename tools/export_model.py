#!/usr/bin/env python
"""Export a trained model to ONNX or TorchScript with open height and width, checked against the original."""

import argparse

from blpseg.utils.cli import add_debug_flag, parse_with_opts, run_command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
The exported graph takes `image`, (1, 3, H, W) float32 in 0..255 with channels in the order of INPUT.FORMAT, and
returns `logits`, (1, C, H, W): one view, local aggregation included. Class names are stored in the file.

example:
  tools/export_model.py --config-file configs/Synthetic-Scribble/blpseg_tiny.yaml \\
      --output output/model.onnx output/model.ts --opts MODEL.WEIGHTS output/synthetic_blpseg_tiny/model_final.pth
""",
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML config of the trained model")
    parser.add_argument(
        "--output", required=True, nargs="+", metavar="FILE", help="*.onnx for ONNX, *.ts or *.pt for TorchScript"
    )
    return parse_with_opts(add_debug_flag(parser))


def main() -> None:
    args = parse_arguments()

    from blpseg import get_cfg
    from blpseg.data.datasets.trained import class_names
    from blpseg.evaluation.export import export
    from blpseg.evaluation.predictor import load_model

    cfg = get_cfg(args.config_file, args.opts)
    names, model = class_names(cfg), load_model(cfg)
    for path in args.output:
        difference = export(model, path, class_names=names, image_format=cfg.INPUT.FORMAT)
        print(f"{path}: written; logits differ from the model's by {difference:.2g} at most")


if __name__ == "__main__":
    run_command(main)
