#!/usr/bin/env python
"""Segment photos with an exported model: onnxruntime, NumPy and Pillow, no PyTorch.

python examples/onnx_masks.py model.onnx masks photos/*.jpg
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def load(path):
    """(function (H, W, 3) uint8 RGB -> (H, W) uint8 class numbers, class names)."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map

    def segment(photo):
        if metadata["image_format"] == "BGR":
            photo = photo[..., ::-1]
        image = photo.transpose(2, 0, 1)[None].astype(np.float32)  # 0..255; the graph normalises
        (logits,) = session.run(["logits"], {"image": image})
        return logits[0].argmax(axis=0).astype(np.uint8)

    return segment, json.loads(metadata["classes"])


def main(model, folder, *photos):
    segment, classes = load(model)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path in map(Path, photos):
        photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        mask = segment(np.asarray(photo))
        Image.fromarray(mask).save(Path(folder) / f"{path.stem}.png")
        shares = np.bincount(mask.ravel(), minlength=len(classes)) / mask.size
        print(path, {name: f"{share:.1%}" for name, share in zip(classes, shares, strict=True) if share})


if __name__ == "__main__":
    main(*sys.argv[1:])
