"""Pictures of predictions for images, videos and cameras."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from tqdm import tqdm

from ..data.datasets import load_records
from ..utils.errors import BLPSegError, describe
from ..utils.files import IMAGE_EXTENSIONS, read_image, read_label, read_label_of, write_png_atomic
from ..utils.labels import IGNORED
from ..utils.palette import distinct_colors
from ..utils.parallel import file_error
from ..utils.progress import progress_bar
from ..visualization import labelled_overlay, overlay, result_panels
from .predictor import Predictor

UNKNOWN_RATE = 25.0  # frames per second of a stream that does not say


def test_metadata(cfg: CfgNode, class_names: Sequence[str] = ()) -> Metadata:
    """Metadata with the names and colours of the classes that a config's model distinguishes.

    ``class_names`` serve where no data set is to be had; their colours are our own then. Raises BLPSegError if neither
    a data set of the config nor they have ``MODEL.SEM_SEG_HEAD.NUM_CLASSES`` names.
    """
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        metadata = MetadataCatalog.get(name)
        if len(metadata.get("stuff_classes", ())) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES:
            return metadata
    if len(class_names) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES:
        colors = distinct_colors(len(class_names))
        return Metadata(stuff_classes=list(class_names), stuff_colors=colors, ignore_label=IGNORED)
    raise BLPSegError(
        f"DATASETS.TEST {tuple(cfg.DATASETS.TEST)}: no data set names the model's "
        f"{cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES} classes"
    )


def find_images(inputs: Sequence[str]) -> list[str]:
    """Files, folders (their images, sorted, not those of folders within) and glob patterns -> files, each once.

    Raises:
        BLPSegError: a folder or a pattern holds no image. A named file need not exist; reading it reports that.
    """
    files: list[str] = []
    for item in inputs:
        item = os.path.expanduser(item)
        if os.path.isdir(item):
            found = sorted(
                entry.path
                for entry in os.scandir(item)
                if not entry.name.startswith(".") and entry.name.lower().endswith(IMAGE_EXTENSIONS)
            )
        elif not os.path.exists(item) and glob.has_magic(item):
            found = sorted(path for path in glob.glob(item, recursive=True) if os.path.isfile(path))
        else:
            found = [item]
        if not found:
            raise BLPSegError(f"{item}: no images there; expected one of {', '.join(IMAGE_EXTENSIONS)}")
        files += found
    return list(dict.fromkeys(files))


def dataset_images(name: str) -> list[dict]:
    """The records of a data set, for :meth:`Demo.run_images`; pictures are named ``<data set>_<image>``."""
    return [
        {**record, "name": f"{name}_{Path(record['file_name']).stem}"}
        for record in load_records(name, optional=("scribbles", "masks"))
    ]


class Demo:
    """Runs a :class:`Predictor` over files and writes pictures into a folder."""

    def __init__(
        self,
        cfg: CfgNode,
        output_dir: str,
        *,
        class_names: Sequence[str] = (),
        raw: bool = False,
        palette: bool = False,
        plain: bool = False,
        panels: bool = False,
    ):
        """
        Args:
            cfg: as :class:`Predictor` takes it; its data sets name the classes.
            output_dir: made if it is not there.
            class_names: where no data set of the config is to be had.
            raw: also write class numbers, as grey PNG.
            palette: store the class colours in them; OpenCV then reads colours, PIL still numbers.
            plain: overlays of the image's size, without legend.
            panels: also write image, annotation probability and prediction side by side.
        """
        self.metadata = test_metadata(cfg, class_names)
        os.makedirs(output_dir, exist_ok=True)
        self.predictor = Predictor(cfg, return_logits=False)
        self.output_dir = output_dir
        self.raw = raw
        self.palette = self.metadata.stuff_colors if palette else None
        self.plain = plain
        self.panels = panels

    def run_images(self, records: Sequence[dict]) -> int:
        """Write ``NAME.png``, and on request ``NAME_raw.png`` and ``NAME_panels.png``, for each image.

        If two images have one name, the second becomes ``NAME_2``. An image that fails is reported in one line on
        stderr, and the others are still segmented.

        Args:
            records: dicts with ``file_name`` and optionally ``name`` (else the file's), ``scribble_file_name`` and
                ``sem_seg_file_name``, which the panels then show.

        Returns:
            how many failed.
        """
        inputs = {os.path.realpath(record["file_name"]) for record in records}
        failed = 0
        taken: set[str] = set()
        for record in progress_bar(records, unit="image"):
            name = _unused(record.get("name") or Path(record["file_name"]).stem, taken)
            try:
                self._run_image(record, name, inputs)
            except (BLPSegError, OSError, MemoryError) as error:
                failed += 1
                reason = describe(file_error(record["file_name"], error))
                tqdm.write(f"error: {reason}", file=sys.stderr)
        return failed

    def _run_image(self, record: dict, name: str, inputs: set[str]) -> None:
        image = read_image(record["file_name"])  # RGB
        result = self.predictor(image[..., ::-1], annotation=self.panels)
        classes = result["sem_seg"]
        pictures = {"": (self._overlay(image, classes), None)}
        if self.raw:
            pictures["_raw"] = (classes, self.palette)
        if self.panels:
            pictures["_panels"] = (self._draw_panels(record, image, result), None)
        for suffix, (picture, palette) in pictures.items():
            path = os.path.join(self.output_dir, f"{name}{suffix}.png")
            if os.path.realpath(path) in inputs:
                raise BLPSegError(f"{path}: is an input and would be overwritten; choose another --output")
            write_png_atomic(path, picture, palette=palette)

    def _draw_panels(self, record: dict, image: np.ndarray, result: dict[str, np.ndarray]) -> np.ndarray:
        scribble = read_label(record["scribble_file_name"]) if "scribble_file_name" in record else None
        maps = {"prediction": result["sem_seg"]}
        if "sem_seg_file_name" in record:
            ignore, size = self.metadata.ignore_label, image.shape[:2]
            maps["truth"] = read_label_of(record["file_name"], record["sem_seg_file_name"], size, ignore)
        heat_maps = {"annotation probability": 1 - result["annotation_prob"][-1]}
        return result_panels(image, self.metadata, scribble=scribble, heat_maps=heat_maps, maps=maps)

    def _overlay(self, image: np.ndarray, classes: np.ndarray, present: Sequence[int] | None = None) -> np.ndarray:
        if self.plain:
            return overlay(image, classes, self.metadata.stuff_colors)
        return labelled_overlay(image, classes, self.metadata, present=present)

    def run_video(self, source: str | int, *, preview: Callable[[np.ndarray], bool] | None = None) -> str:
        """Write ``NAME.mp4``: overlays with a legend, as many frames a second as the source, no sound.

        An interruption (Ctrl-C) ends the video where it is; what was written stays playable.

        Args:
            source: a video file, or the number of a camera, which becomes ``webcam.mp4``.
            preview: called with every finished frame (BGR); True ends the run.

        Returns:
            the file written.

        Raises:
            BLPSegError: the source cannot be opened or holds no frame, or the video cannot be written.
        """
        is_file = isinstance(source, str)
        name = Path(source).stem if is_file else "webcam"
        path = os.path.join(self.output_dir, f"{name}.mp4")
        if is_file and not os.path.isfile(source):
            raise BLPSegError(f"{source}: no such file")
        if is_file and os.path.realpath(path) == os.path.realpath(source):
            raise BLPSegError(f"{path}: is the input and would be overwritten; choose another --output")
        capture = cv2.VideoCapture(source)
        if not capture.isOpened():
            raise BLPSegError(f"{source}: not a video OpenCV can read" if is_file else f"there is no camera {source}")
        rate = capture.get(cv2.CAP_PROP_FPS)
        rate = rate if rate and np.isfinite(rate) and rate > 0 else UNKNOWN_RATE
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if is_file else 0
        partial = os.path.join(self.output_dir, f".{name}.{os.getpid()}.tmp.mp4")
        writer, count = None, 0
        try:
            with progress_bar(total=total if total > 0 else None, unit="frame") as progress:
                while True:
                    found, frame = capture.read()
                    if not found:
                        break
                    count += 1
                    picture = self._draw_frame(frame, name, count)
                    if writer is None:
                        size = picture.shape[1::-1]
                        writer = cv2.VideoWriter(partial, cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
                        if not writer.isOpened():
                            raise BLPSegError(f"{path}: OpenCV cannot write MP4 here")
                    writer.write(picture)
                    progress.update()
                    if preview is not None and preview(picture):
                        break
        finally:
            capture.release()
            if writer is not None:
                writer.release()
                if os.path.exists(partial):
                    os.replace(partial, path)
        if not count:
            raise BLPSegError(f"{source}: holds no frame that can be read")
        return path

    def _draw_frame(self, frame: np.ndarray, name: str, number: int) -> np.ndarray:
        """(H, W, 3) BGR -> overlay with the legend of all classes, so that every frame has one size; even sides."""
        classes = self.predictor(frame)["sem_seg"]
        if self.raw:
            path = os.path.join(self.output_dir, f"{name}_raw", f"{number:06d}.png")
            write_png_atomic(path, classes, palette=self.palette)
        everything = range(len(self.metadata.stuff_classes))
        picture = self._overlay(np.ascontiguousarray(frame[..., ::-1]), classes, everything)
        height, width = picture.shape[:2]
        picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        return np.ascontiguousarray(picture[..., ::-1])


def _unused(name: str, taken: set[str]) -> str:
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    taken.add(candidate)
    return candidate
