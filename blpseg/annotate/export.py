"""What comes out of a project: class maps, and the files that other programs read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np

from ..scribbles.label_studio_rle import encode_rle
from ..scribbles.rasterize import UNANNOTATED
from ..utils.files import read_image, write_bytes_atomic, write_png_atomic
from .instant import Instant
from .store import Project

_NNUNET = "nnunet/Dataset001_scribbles"


def export(project: Project, instant: Instant) -> list[str]:
    """Write the predictions of all photos that have strokes or a model's prediction.

    * ``predictions/STEM.png``: class maps, grey.
    * ``export/coco.json``: a run-length mask for each class of a photo; ``category_id`` is the class number.
    * ``export/label_studio.json`` and ``label_studio_config.xml``: pre-annotations for its brush.
    * ``export/nnunet/Dataset001_scribbles``: nnU-Net v2's raw folder with the strokes as labels, "not annotated" as its
      ignore label, photos without strokes as its test images.

    Returns:
        the files, relative to the project.
    """
    files = []
    coco = {"images": [], "annotations": [],
            "categories": [{"id": i, "name": name} for i, name in enumerate(project.classes)]}  # fmt: skip
    tasks = []
    for photo in project.photos.values():
        label, source = instant.predict(photo)
        if source == "none":
            continue
        number = len(coco["images"]) + 1
        path = project.root / "predictions" / f"{photo.stem}.png"
        write_png_atomic(str(path), label)
        files.append(path)
        masks = {int(c): label == c for c in np.setdiff1d(np.unique(label), UNANNOTATED)}
        coco["images"].append({"id": number, "file_name": photo.name, "height": photo.height, "width": photo.width})
        coco["annotations"] += [_coco_mask(c, mask) | {"image_id": number} for c, mask in masks.items()]
        tasks.append(_task(project, photo, masks))
    for identity, annotation in enumerate(coco["annotations"], 1):
        annotation["id"] = identity
    folder = project.root / "export"
    for name, content in (("coco.json", coco), ("label_studio.json", tasks)):
        write_bytes_atomic(str(folder / name), json.dumps(content).encode())
        files.append(folder / name)
    write_bytes_atomic(str(folder / "label_studio_config.xml"), _label_studio_config(project).encode())
    files.append(folder / "label_studio_config.xml")
    files += _nnunet(project, folder / _NNUNET)
    return [os.path.relpath(path, project.root) for path in files]


def _coco_mask(class_id: int, mask: np.ndarray) -> dict:
    from pycocotools import mask as coco_mask

    code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {
        "category_id": class_id,
        "segmentation": {"size": [int(v) for v in code["size"]], "counts": code["counts"].decode()},
        "area": int(mask.sum()),
        "bbox": [float(v) for v in coco_mask.toBbox(code)],
        "iscrowd": 0,
    }


def _task(project: Project, photo, masks: dict[int, np.ndarray]) -> dict:
    common = {"type": "brushlabels", "from_name": "label", "to_name": "image", "image_rotation": 0,
              "original_width": photo.width, "original_height": photo.height}  # fmt: skip
    result = [
        common
        | {
            "id": f"{photo.stem}-{c}",
            "value": {"format": "rle", "rle": encode_rle(mask), "brushlabels": [project.classes[c]]},
        }
        for c, mask in masks.items()
    ]
    return {"data": {"image": photo.name}, "predictions": [{"model_version": "blpseg", "result": result}]}


def _label_studio_config(project: Project) -> str:
    labels = "".join(
        f"    <Label value={quoteattr(name)} background={quoteattr('#{:02x}{:02x}{:02x}'.format(*color))}/>\n"
        for name, color in zip(project.classes, project.colors, strict=True)
    )
    return (
        '<View>\n  <Image name="image" value="$image"/>\n  <BrushLabels name="label" toName="image">\n'
        f"{labels}  </BrushLabels>\n</View>\n"
    )


def _nnunet(project: Project, folder: Path) -> list[Path]:
    """The raw data set of nnU-Net v2 for sparse labels (its documentation, "ignore label"): the highest label."""
    ignore, files = len(project.classes), []
    shutil.rmtree(folder, ignore_errors=True)  # photos may have left; all of it is made here
    for photo in project.photos.values():
        image = read_image(str(photo.path))
        part = "imagesTr" if photo.count else "imagesTs"
        files.append(folder / part / f"{photo.stem}_0000.png")
        write_png_atomic(str(files[-1]), image)
        if photo.count:
            label = project.rasterize(photo, project.read(photo))
            files.append(folder / "labelsTr" / f"{photo.stem}.png")
            write_png_atomic(str(files[-1]), np.where(label == UNANNOTATED, np.uint8(ignore), label))
    labels = {"background": 0}
    for i, name in enumerate(project.classes[1:], 1):  # it gives these two names a meaning of their own
        labels[f"{name} {i}" if name in ("background", "ignore") else name] = i
    content = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": labels | {"ignore": ignore},
        "numTraining": sum(photo.count > 0 for photo in project.photos.values()),
        "file_ending": ".png",
        "overwrite_image_reader_writer": "NaturalImage2DIO",
    }
    files.append(folder / "dataset.json")
    write_bytes_atomic(str(files[-1]), json.dumps(content, indent=1).encode())
    return files
