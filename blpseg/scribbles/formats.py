"""Annotation files of several tools, read into label images.

A format is a function ``draw(path, part, vocabulary, images, brush)`` that makes the label of one image. Where a file
holds many images, ``pictures(path)`` lists them as (image name, part) first; a part is plain data, which goes to a
worker.

All of it is untrusted input: whatever is wrong becomes a BLPSegError that names the file.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from PIL import Image

from ..utils.errors import BLPSegError, describe
from ..utils.files import MOST_PIXELS, image_size, upright_size
from ..utils.labels import UNANNOTATED
from ._untrusted import check_size, check_xml, parse_json, parse_xml, pixel_points, read_bytes
from .label_studio_rle import decode_rle
from .rasterize import rasterize_strokes
from .vocabulary import Vocabulary

_MOST_WIDE = 1 << 33  # strokes times pixels, which is what wide strokes cost


@dataclass(frozen=True)
class Format:
    """How to read one kind of annotation file.

    Attributes:
        title: for help and messages.
        extension: of its files, lower case.
        draw: path, part, vocabulary, folder of the images or None, width of strokes in pixels -> (H, W) uint8 label.
        pictures: path -> (image name, part) of every annotated image; None if a file is one image, with its name.
    """

    title: str
    extension: str
    draw: Callable[[str, object, Vocabulary, str | None, int], np.ndarray]
    pictures: Callable[[str], list[tuple[str, object]]] | None = None


def _rasterize(path, strokes, height, width, brush):
    if brush > 1 and len(strokes) * height * width > _MOST_WIDE:
        raise BLPSegError(f"{path}: {len(strokes)} strokes on {width} x {height} pixels are too many for --width")
    try:
        return rasterize_strokes([(class_id, points, brush) for class_id, points in strokes], height, width)
    except ValueError as error:
        raise BLPSegError(f"{path}: {error}; draw it again") from error


def _check_against_image(where, height, width, image_name, images):
    """The image itself, where its folder is known, must have the size that the annotation gives."""
    path = images and _find_image(images, image_name)
    if path and image_size(path) != (height, width):
        actual = image_size(path)
        raise BLPSegError(
            f"{where}: says {width} x {height} pixels but {path} has {actual[1]} x {actual[0]}; "
            "annotate the image as it is, or correct the size"
        )


def _find_image(folder, image_name):
    # The base name alone: a path inside an annotation may point anywhere.
    name = PurePosixPath(str(image_name).replace("\\", "/")).name
    stem = PurePosixPath(name).stem
    for candidate in (name, *(stem + ext for ext in (".jpg", ".png", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"))):
        if candidate and os.path.isfile(os.path.join(folder, candidate)):
            return os.path.join(folder, candidate)
    return None


# PASCAL-Scribble XML (METHOD section 8)


_POLYGON = re.compile(
    rb"<polygon>\s*<tag>([^<]*)</tag>\s*"
    rb"((?:<point>\s*<X>\s*-?\d{1,9}\s*</X>\s*<Y>\s*-?\d{1,9}\s*</Y>\s*</point>\s*)*)</polygon>"
)
_SIZE = re.compile(rb"<size>\s*<width>([^<]*)</width>\s*<height>([^<]*)</height>")
_XML_DECLARATION = re.compile(rb"\A\s*<\?xml [^<>?]*\?>")
_TAGS_TO_SPACES = bytes.maketrans(b"<", b" ")


def _draw_pascal(path, part, vocabulary, images, brush):
    data = read_bytes(path)
    height, width, polygons = _pascal_as_published(path, data) or _pascal_as_xml(path, data)
    _check_against_image(path, height, width, os.path.basename(path), images)
    strokes = []
    for number, (name, points) in enumerate(polygons, 1):
        if not name:
            raise BLPSegError(f"{path}: polygon {number} has no <tag>; name its class")
        class_id = vocabulary.class_id(name, path)
        if len(points):  # PASCAL-Scribble tolerates empty strokes
            strokes.append((class_id, points))
    return _rasterize(path, strokes, height, width, brush)


def _pascal_as_xml(path, data):
    """(height, width, [(class name, (K, 2) points)]) of any well-formed stroke file."""
    root = parse_xml(path, data)
    sizes = list(root.iter("size"))
    if root.tag != "annotation" or not sizes:
        raise BLPSegError(f"{path}: not a stroke file: <annotation> with <size> and <polygon>s expected")
    sizes = {check_size(path, size.findtext("height", ""), size.findtext("width", "")) for size in sizes}
    if len(sizes) > 1:
        raise BLPSegError(f"{path}: has several <size> that disagree; keep the right one")
    height, width = sizes.pop()
    polygons = []
    for number, polygon in enumerate(root.iter("polygon"), 1):
        points = list(polygon.iter("point"))
        columns = [point.findtext("X") for point in points]
        rows = [point.findtext("Y") for point in points]
        points = pixel_points(f"{path}: polygon {number}", rows, columns, height, width)
        polygons.append(((polygon.findtext("tag") or "").strip(), points))
    return height, width, polygons


def _pascal_as_published(path, data):
    """The same for files laid out as the published ones are, at five times the speed; None for all others.

    Tags are searched as text, which is sound where the file is well-formed and has no comment, CDATA, declaration or
    entity, and where no <point>, <polygon> or <size> is left that the pattern did not take.
    """
    text = _XML_DECLARATION.sub(b"", data, count=1).lstrip()
    if not text.isascii() or any(mark in text for mark in (b"<!", b"<?", b"&", b"\0")):
        return None
    size = _SIZE.findall(text)
    polygons = _POLYGON.findall(text)
    points = sum(body.count(b"<point") for _, body in polygons)
    if (len(size), len(polygons), points) != tuple(text.count(tag) for tag in (b"<size", b"<polygon", b"<point")):
        return None
    if len(size) != 1 or not text.startswith(b"<annotation>"):
        return None
    check_xml(path, data)
    height, width = check_size(path, size[0][1].decode(), size[0][0].decode())
    return height, width, [(name.decode().strip(), _published_points(body)) for name, body in polygons]


def _published_points(body: bytes) -> np.ndarray:
    numbers = body.translate(_TAGS_TO_SPACES, b"/>pointXY").split()
    return np.array(numbers, dtype=np.int64).reshape(-1, 2)[:, ::-1]


# labelme JSON

_LABELME_POINTS = {"linestrip": None, "line": 2, "point": 1}  # how many points each has


def _draw_labelme(path, part, vocabulary, images, brush):
    data = read_bytes(path)
    document = parse_json(path, data)
    shapes = document.get("shapes") if isinstance(document, dict) else None
    if not isinstance(shapes, list):
        raise BLPSegError(f"{path}: not a labelme file: an object with a list of `shapes` expected")
    image_name = document.get("imagePath") or os.path.basename(path)
    height, width = document.get("imageHeight"), document.get("imageWidth")
    if height is None or width is None:
        height, width = _labelme_image_size(path, document, image_name, images)
    height, width = check_size(path, height, width)
    _check_against_image(path, height, width, image_name, images)
    strokes = []
    for number, shape in enumerate(shapes, 1):
        where = f"{path}: shape {number}"
        if not isinstance(shape, dict):
            raise BLPSegError(f"{where} is no object; export it again")
        kind = shape.get("shape_type") or "polygon"  # what labelme itself assumes
        if kind not in _LABELME_POINTS:
            raise BLPSegError(f"{where} is a {str(kind)[:40]}, no stroke: draw linestrip, line or point")
        rows, columns = _xy_pairs(where, shape.get("points"))
        if len(rows) != (_LABELME_POINTS[kind] or max(1, len(rows))):
            raise BLPSegError(f"{where}: a {kind} with {len(rows)} points; draw it again")
        class_id = vocabulary.class_id(_text(where, shape.get("label")), where)
        strokes.append((class_id, pixel_points(where, rows, columns, height, width)))
    return _rasterize(path, strokes, height, width, brush)


def _labelme_image_size(path, document, image_name, images):
    if document.get("imageData"):
        try:
            content = base64.b64decode(document["imageData"], validate=True)
        except (ValueError, TypeError, binascii.Error) as error:
            raise BLPSegError(f"{path}: imageData is no image ({describe(error)}); save it again") from error
        return upright_size(f"{path}: imageData", io.BytesIO(content))
    found = _find_image(images or os.path.dirname(path), image_name)
    if found is None:
        raise BLPSegError(f"{path}: has no imageHeight and imageWidth; give the folder of its image with --images")
    return image_size(found)


def _xy_pairs(where, points):
    if not isinstance(points, list) or not all(isinstance(p, list) and len(p) == 2 for p in points):
        raise BLPSegError(f"{where}: `points` is no list of [x, y]; draw it again")
    return [p[1] for p in points], [p[0] for p in points]


def _text(where, value):
    if not isinstance(value, str) or not value.strip():
        raise BLPSegError(f"{where} has no label; name its class")
    return value.strip()


# CVAT XML ("CVAT for images 1.1")


def _cvat_pictures(path):
    root = parse_xml(path, read_bytes(path))
    if root.tag != "annotations" or root.find("track") is not None:
        raise BLPSegError(f"{path}: not 'CVAT for images 1.1' XML; export in that format (video tracks are not read)")
    pictures = []
    for image in root.iter("image"):
        shapes = [
            (shape.tag, shape.get("label"), shape.get("points"), shape.get("z_order", "0"))
            for shape in image
            if shape.tag not in ("tag", "attribute")  # of the image as a whole
        ]
        name = image.get("name") or ""
        pictures.append((name, (name, image.get("height"), image.get("width"), shapes)))
    if not pictures:
        raise BLPSegError(f"{path}: holds no <image>; export the task again")
    return pictures


def _draw_cvat(path, part, vocabulary, images, brush):
    name, height, width, shapes = part
    where = f"{path}: image {name[:100]!r}"
    height, width = check_size(where, height, width)
    _check_against_image(where, height, width, name, images)
    try:
        shapes = sorted(shapes, key=lambda shape: int(shape[3]))  # stable: document order within a level
    except ValueError:
        raise BLPSegError(f"{where}: z_order is no number; export it again") from None
    strokes = []
    for kind, label, points, _ in shapes:
        if kind not in ("polyline", "points"):
            raise BLPSegError(f"{where}: a {kind[:40]} is no stroke: draw polylines or points")
        pairs = [pair.split(",") for pair in (points or "").split(";")]
        if any(len(pair) != 2 for pair in pairs):
            raise BLPSegError(f"{where}: points of a {kind} are not 'x,y;x,y'; export it again")
        class_id = vocabulary.class_id(_text(where, label), where)
        pixels = pixel_points(where, [y for _, y in pairs], [x for x, _ in pairs], height, width)
        strokes += [(class_id, pixels)] if kind == "polyline" else [(class_id, pixel[None]) for pixel in pixels]
    return _rasterize(path, strokes, height, width, brush)


# Label Studio JSON, brush masks

_UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")  # Label Studio puts it before the name of an uploaded file
_NOT_DRAWN = ("choices", "rating", "textarea", "number", "datetime", "pairwise", "ranker", "taxonomy", "relation")


def _label_studio_pictures(path):
    document = parse_json(path, read_bytes(path))
    tasks = document if isinstance(document, list) else [document]
    pictures = []
    for number, task in enumerate(tasks, 1):
        where = f"{path}: task {number}"
        if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
            raise BLPSegError(f"{where} has no `data`; export the project as JSON (not JSON-MIN)")
        annotations = task.get("annotations", task.get("completions"))
        if not isinstance(annotations, list) or not all(isinstance(a, dict) for a in annotations):
            raise BLPSegError(f"{where} has no list of `annotations`; export the project as JSON (not JSON-MIN)")
        results = []
        for annotation in annotations:
            if not (annotation.get("was_cancelled") or annotation.get("skipped")):
                found = annotation.get("result")
                results += found if isinstance(found, list) else [found]
        if results:  # a task that nobody has worked on has no size either
            name = _label_studio_image(where, task)
            pictures.append((name, (name, results)))
    if not pictures:
        raise BLPSegError(f"{path}: no task has an annotation; export after annotating")
    return pictures


def _label_studio_image(where, task):
    """The name of a task's image: the last part of its path or URL, without the prefix of an upload."""
    values = [task["data"].get("image"), *task["data"].values()]
    for value in values:
        if isinstance(value, str) and value:
            url = urlsplit(value.replace("\\", "/"))
            local = parse_qs(url.query).get("d", [])  # /data/local-files/?d=folder/name.jpg
            name = PurePosixPath(local[0] if local else unquote(url.path)).name
            if PurePosixPath(name).suffix.lower() in Image.registered_extensions():
                return _UPLOAD_PREFIX.sub("", name) if "/upload/" in url.path else name
    raise BLPSegError(f"{where}: no value of its `data` is the path of an image; export the project as JSON")


def _draw_label_studio(path, part, vocabulary, images, brush):
    name, results = part
    where = f"{path}: image {name[:100]!r}"
    label = None
    for result in results:
        value = result.get("value") if isinstance(result, dict) else None
        if not isinstance(value, dict):
            if isinstance(result, dict) and result.get("type") in _NOT_DRAWN:
                continue
            raise BLPSegError(f"{where}: a result without `value`; export the project as JSON")
        if "rle" not in value:
            if str(result.get("type", "")).lower() in _NOT_DRAWN:
                continue
            raise BLPSegError(f"{where}: a {str(result.get('type'))[:40]} is no brush stroke; draw with the brush")
        size = check_size(where, result.get("original_height"), result.get("original_width"))
        if result.get("image_rotation"):
            raise BLPSegError(f"{where}: annotated on a rotated image; turn it back in Label Studio")
        if label is None:
            label = np.full(size, UNANNOTATED, np.uint8)
            _check_against_image(where, *size, name, images)
        if label.shape != size:
            raise BLPSegError(f"{where}: results disagree on the image's size; annotate it again")
        names = value.get("brushlabels") or value.get("labels")
        if not isinstance(names, list) or len(names) != 1:
            raise BLPSegError(f"{where}: a brush stroke with {names!r:.80} for its label; give it one label")
        alpha = decode_rle(where, value["rle"], 4 * label.size).reshape(*size, 4)[..., 3]
        label[alpha > 0] = vocabulary.class_id(_text(where, names[0]), where)
    if label is None:
        raise BLPSegError(f"{where}: no brush stroke; draw with the brush")
    return label


# Colour PNG


def _draw_color_png(path, part, vocabulary, images, brush):
    data = read_bytes(path)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if 4 * image.size[0] * image.size[1] > MOST_PIXELS:  # four bytes a pixel and more
                raise BLPSegError(f"{path}: {image.size[0]} x {image.size[1]} pixels are too many")
            by_index = image.mode == "L" or (image.mode == "P" and not vocabulary.colors)
            pixels = np.asarray(image if by_index else image.convert("RGBA"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BLPSegError(f"{path}: not a PNG ({describe(error)}); save it as PNG") from error
    _check_against_image(path, *pixels.shape[:2], os.path.basename(path), images)
    if by_index:
        return _check_indices(path, pixels, vocabulary)
    if not vocabulary.colors:
        raise BLPSegError(f"{path}: the vocabulary {vocabulary.source} gives no colours; add them (docs/SCRIBBLES.md)")
    code = pixels[..., :3].astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    table = np.full(1 << 24, -1, np.int16)
    for (red, green, blue), class_id in vocabulary.colors.items():
        table[red << 16 | green << 8 | blue] = class_id
    label = table[code]
    label[pixels[..., 3] == 0] = UNANNOTATED  # transparent: nothing drawn there
    unknown = np.argwhere(label < 0)
    if len(unknown):
        row, column = unknown[0]
        colors = len(np.unique(code[label < 0]))
        raise BLPSegError(
            f"{path}: {len(unknown)} pixels of {colors} colours that the vocabulary {vocabulary.source} lacks, first "
            f"#{code[row, column]:06x} at row {row}, column {column}; draw without anti-aliasing or add the colours"
        )
    return label.astype(np.uint8)


def _check_indices(path, label, vocabulary):
    allowed = np.zeros(256, bool)
    allowed[[*vocabulary.ids.values(), *vocabulary.colors.values(), UNANNOTATED]] = True
    if not allowed[label].all():
        row, column = np.argwhere(~allowed[label])[0]
        raise BLPSegError(
            f"{path}: value {label[row, column]} at row {row}, column {column} is no class of the vocabulary "
            f"{vocabulary.source}; 255 means not annotated"
        )
    return label


FORMATS = {
    "xml": Format("PASCAL-Scribble XML", ".xml", _draw_pascal),
    "labelme": Format("labelme JSON: linestrip, line, point", ".json", _draw_labelme),
    "cvat": Format("CVAT for images 1.1 XML: polyline, points", ".xml", _draw_cvat, _cvat_pictures),
    "label-studio": Format("Label Studio JSON: brush", ".json", _draw_label_studio, _label_studio_pictures),
    "color-png": Format("colour PNG", ".png", _draw_color_png),
}
