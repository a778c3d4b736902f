#!/usr/bin/env python
"""README's picture: the panels that `make demo` writes for its photographs, below each other."""

import argparse
from pathlib import Path

import cv2
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  make demo && python docs/figures/readme_picture.py output/demo/photos docs/demo.jpg",
    )
    parser.add_argument("folder", help="with *_panels.png")
    parser.add_argument("output", help="JPEG to write")
    parser.add_argument("--width", type=int, default=1000, help="pixels (default: 1000)")
    args = parser.parse_args()
    files = sorted(Path(args.folder).glob("*_panels.png"))
    if not files:
        parser.error(f"{args.folder}: holds no *_panels.png; run make demo first")
    rows = []
    for file in files:
        picture = cv2.imread(str(file))
        height = round(picture.shape[0] * args.width / picture.shape[1])
        rows.append(cv2.resize(picture, (args.width, height), interpolation=cv2.INTER_AREA))
    cv2.imwrite(args.output, np.vstack(rows), [cv2.IMWRITE_JPEG_QUALITY, 85])


if __name__ == "__main__":
    main()
