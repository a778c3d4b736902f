"""What the benchmark of stroke conversion runs against: made stroke files and the plain way to convert them."""

from __future__ import annotations

import os
from xml.dom import minidom

import numpy as np
from PIL import Image

from blpseg.scribbles.vocabulary import VOC_NAMES

__all__ = ["convert_plainly", "write_stroke_files"]


def write_stroke_files(folder: str, count: int, seed: int = 0) -> None:
    """Made-up files of PASCAL-Scribble's form and size: 500 x 375 pixels, a handful of strokes as a mouse reports them.

    Args:
        folder: made where missing.
        count: files to write.
        seed: same seed, same files.
    """
    rng = np.random.default_rng(seed)
    os.makedirs(folder, exist_ok=True)
    for number in range(count):
        polygons = []
        for _ in range(rng.integers(3, 8)):
            length = int(rng.integers(20, 120))
            heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.15, length))
            steps = rng.uniform(2, 6, length)[:, None] * np.stack([np.cos(heading), np.sin(heading)], axis=1)
            points = (rng.uniform((50, 50), (450, 325)) + np.cumsum(steps, axis=0)).astype(int)
            body = "".join(f"\n\t\t<point>\n\t\t\t<X>{x}</X>\n\t\t\t<Y>{y}</Y>\n\t\t</point>" for x, y in points)
            name = VOC_NAMES[rng.integers(len(VOC_NAMES))]
            polygons.append(f"\n\t<polygon>\n\t\t<tag>{name}</tag>{body}\n\t</polygon>")
        with open(os.path.join(folder, f"{number:06d}.xml"), "w") as file:
            file.write(
                f"<annotation>\n\t<folder>anno</folder>\n\t<filename>{number:06d}.jpg</filename>\n\t<size>"
                "\n\t\t<width>500</width>\n\t\t<height>375</height>\n\t\t<depth>3</depth>\n\t</size>"
                f"\n\t<segmented>1</segmented>{''.join(polygons)}\n</annotation>\n"
            )


def convert_plainly(xml_dir: str, output_dir: str, names: list[str] = VOC_NAMES) -> None:
    """Convert stroke files (METHOD section 8) the obvious way: minidom, loops over pixels, one file after the other."""
    os.makedirs(output_dir, exist_ok=True)

    def text(node, tag):
        return node.getElementsByTagName(tag)[0].firstChild.data

    for file_name in sorted(os.listdir(xml_dir)):
        root = minidom.parse(os.path.join(xml_dir, file_name)).documentElement
        height, width = int(text(root, "height")), int(text(root, "width"))
        label = np.full((height, width), 255, np.uint8)
        for polygon in root.getElementsByTagName("polygon"):
            class_id = names.index(text(polygon, "tag"))
            points = [
                (min(max(int(text(p, "Y")), 0), height - 1), min(max(int(text(p, "X")), 0), width - 1))
                for p in polygon.getElementsByTagName("point")
            ]
            label[points[0]] = class_id
            for (r1, c1), (r2, c2) in zip(points, points[1:], strict=False):
                m = max(abs(r2 - r1), abs(c2 - c1))
                for i in range(m if m > 1 else 0):
                    label[int(r1 + i * ((r2 - r1) / m)), int(c1 + i * ((c2 - c1) / m))] = class_id
                label[r1, c1] = label[r2, c2] = class_id
        Image.fromarray(label).save(os.path.join(output_dir, os.path.splitext(file_name)[0] + ".png"))
