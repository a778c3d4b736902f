"""Image and label files of every kind: read right, or refused in one line that names the file."""

import io
import os
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from blpseg.utils import files as blpseg_io
from blpseg.utils.errors import BLPSegError, describe
from blpseg.utils.files import (
    image_size,
    lock_file,
    read_image,
    read_label,
    without_nan,
    write_bytes_atomic,
    write_png_atomic,
)

rng = np.random.default_rng(0)
COLOR = cv2.GaussianBlur(rng.integers(0, 256, (20, 30, 3), np.uint8), (0, 0), 3)
LABEL = rng.integers(0, 5, (20, 30), np.uint8)


def save(tmp_path, image, name, **options):
    path = tmp_path / name
    image.save(path, **options)
    return str(path)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
def test_png_modes_are_what_pil_makes_of_them(tmp_path, mode):
    image = Image.fromarray(COLOR).convert(mode)
    path = save(tmp_path, image, "a.png")
    np.testing.assert_array_equal(read_image(path), np.array(image.convert("RGB")))
    np.testing.assert_array_equal(read_image(path, "BGR"), np.array(image.convert("RGB"))[..., ::-1])
    assert image_size(path) == (20, 30)


@pytest.mark.parametrize("name", ["a.jpg", "a.bmp", "a.tif", "a.webp"])
def test_formats(tmp_path, name):
    path = save(tmp_path, Image.fromarray(COLOR), name)
    with Image.open(path) as image:
        np.testing.assert_allclose(read_image(path).astype(int), np.array(image.convert("RGB")).astype(int), atol=2)


def test_cmyk_jpeg(tmp_path):
    path = save(tmp_path, Image.fromarray(COLOR).convert("CMYK"), "a.jpg", quality=98)
    np.testing.assert_allclose(read_image(path).astype(int), COLOR.astype(int), atol=10)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_keep_the_upper_eight(tmp_path, channels):
    deep = rng.integers(0, 65536, (20, 30, channels), np.uint16)
    path = str(tmp_path / "a.png")
    cv2.imwrite(path, deep)
    np.testing.assert_array_equal(read_image(path, "BGR"), np.broadcast_to(deep >> 8, (20, 30, 3)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_exif_rotation(tmp_path, orientation, name):
    path = save(tmp_path, Image.fromarray(COLOR), name, exif=exif(orientation))
    with Image.open(path) as image:
        upright = np.array(ImageOps.exif_transpose(image))
    assert np.abs(read_image(path).astype(int) - upright).max() <= 2
    assert image_size(path) == upright.shape[:2]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_of_labels(tmp_path, orientation):
    path = save(tmp_path, Image.fromarray(LABEL), "a.png", exif=exif(orientation))
    with Image.open(path) as image:
        np.testing.assert_array_equal(read_label(path), np.array(ImageOps.exif_transpose(image)))


@pytest.mark.parametrize("kind", ["cut jpeg", "cut png", "empty", "text", "float", "missing", "folder"])
def test_bad_images_are_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "bad"
    buffer = io.BytesIO()
    if kind == "float":
        Image.fromarray(COLOR[..., 0].astype(np.float32)).save(buffer, "TIFF")
    elif kind.startswith("cut"):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, kind[4:])
    data = {"text": b"not an image", "empty": b"", "float": buffer.getvalue()}.get(kind, buffer.getvalue()[:2000])
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(data)
    with pytest.raises(BLPSegError, match=f"^{path}: ") as caught:
        read_image(str(path))
    assert "\n" not in str(caught.value)


def test_cut_jpeg_with_a_whole_thumbnail_is_noticed():
    thumbnail = cv2.imencode(".jpg", COLOR)[1].tobytes()
    whole = cv2.imencode(".jpg", rng.integers(0, 256, (64, 64, 3), np.uint8))[1].tobytes()
    assert blpseg_io._is_cut_jpeg(whole[:2] + thumbnail + whole[2:-200])
    assert not blpseg_io._is_cut_jpeg(whole[:2] + thumbnail + whole[2:] + b"trailing bytes")


def test_label_kinds(tmp_path):
    grey = Image.fromarray(LABEL)
    palette = grey.convert("P")
    palette.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
    palette.putdata(LABEL.ravel().tolist())
    deep = Image.fromarray(LABEL.astype(np.uint16))
    same = Image.fromarray(np.repeat(LABEL[..., None], 3, 2))
    for name, image in {
        "grey": grey,
        "palette": palette,
        "deep": deep,
        "same": same,
        "alpha": same.convert("RGBA"),
    }.items():
        path = save(tmp_path, image, f"{name}.png")
        label = read_label(path)
        assert label.dtype == np.uint8
        np.testing.assert_array_equal(label, LABEL, err_msg=name)
    np.testing.assert_array_equal(read_label(save(tmp_path, grey, "a.tif")), LABEL)


def grey_png(bits):
    """A grey PNG of fewer than 8 bits, which PIL does not write."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes([0b01010101]) for _ in range(4))
    header = struct.pack(">IIBBBBB", 8 // bits, 4, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "kind, why",
    [
        ("colour", "colour image"),
        ("jpeg", "JPEG"),
        ("large", "do not fit"),
        ("float", "no label"),
        ("cut", "damaged"),
        ("text", "not an image"),
        *((bits, "fewer than 8 bits") for bits in (1, 2, 4)),
    ],
)
def test_what_is_no_label_is_refused(tmp_path, kind, why):
    path = tmp_path / "bad.png"
    buffer = io.BytesIO()
    if kind == "colour":
        Image.fromarray(COLOR).save(buffer, "PNG")
    elif kind == "jpeg":
        Image.fromarray(LABEL).save(buffer, "JPEG")
    elif kind == "large":
        Image.fromarray(LABEL.astype(np.uint16) + 255).save(buffer, "PNG")
    elif kind == "float":
        Image.fromarray(LABEL.astype(np.float32)).save(buffer, "TIFF")
    elif kind == "cut":
        Image.fromarray(LABEL).save(buffer, "PNG")
        buffer = io.BytesIO(buffer.getvalue()[:-60])
    elif kind == "text":
        buffer.write(b"hello")
    else:
        buffer.write(grey_png(kind))
    path.write_bytes(buffer.getvalue())
    with pytest.raises(BLPSegError, match=f"^{path}: .*{why}"):
        read_label(str(path))


def test_written_png_reads_back(tmp_path):
    path = str(tmp_path / "new" / "folder" / "a.png")
    write_png_atomic(path, COLOR)
    np.testing.assert_array_equal(read_image(path), COLOR)
    write_png_atomic(path, LABEL)
    np.testing.assert_array_equal(read_label(path), LABEL)
    palette = rng.integers(0, 256, (256, 3), np.uint8)
    write_png_atomic(path, LABEL, palette)
    np.testing.assert_array_equal(read_label(path), LABEL)
    np.testing.assert_array_equal(read_image(path), palette[LABEL])
    with pytest.raises(BLPSegError, match="cannot write"):
        write_png_atomic(path, LABEL.astype(np.int64))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_bytes_atomic(str(path), b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes_atomic(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_what_has_no_value_is_null_in_json():
    nan, inf = float("nan"), float("inf")
    assert without_nan({"a": [nan, 1.5, "x", True, 3], "b": {"c": nan, "d": [-inf, None]}, "e": inf}) == {
        "a": [None, 1.5, "x", True, 3],
        "b": {"c": None, "d": [None, None]},
        "e": None,
    }
    assert repr(without_nan([np.float32(0.5), np.int64(3), np.float64(nan)])) == "[0.5, 3, None]"


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touched) (w) file closefile\nshowpage\n"


def png_header(width, height, depth=8, kind=0):
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"


HOSTILE = {
    "a program": (EPS, "not an image"),
    "324 megapixels": (png_header(18000, 18000), "too many|more than"),
    "colours of 16 bits": (png_header(65000, 65000, 16, 6), "more than"),
    "sizes without pixels": (png_header(0, 0), "image"),
    "a bitmap that ends": (b"BM" + b"\0" * 30, "image"),
    "a TIFF in circles": (b"II*\0\x08\0\0\0\x01\0" + b"\0" * 12 + b"\x08\0\0\0", "image"),
    "a JPEG of one byte": (b"\xff\xd8\xff", "image|JPEG"),
    "a WebP without picture": (b"RIFF\x04\0\0\0WEBP", "image"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("read", [read_image, read_label, image_size])
def test_hostile_images_are_one_line_and_start_nothing(tmp_path, name, read, monkeypatch):
    content, words = HOSTILE[name]
    monkeypatch.setattr("subprocess.Popen.__init__", lambda *_, **__: pytest.fail("a program was started"))
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(BLPSegError, match=f"^{path}: .*({words})"):
        read(str(path))


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path in (str(tmp_path / "a.png"), "/dev/zero"):
        for read in (read_image, read_label, image_size):
            with pytest.raises(BLPSegError, match="not an ordinary file"):
                read(path)


def test_names_with_escape_codes_do_not_reach_the_terminal():
    with pytest.raises(BLPSegError) as caught:
        read_image("\x1b]0;gone\x07.png")
    assert describe(caught.value).isprintable() and "\\x1b" in describe(caught.value)
    assert describe(OSError("a\udcff")).encode() == b"a\\udcff"


def test_a_lock_is_held_by_one_process_and_not_through_a_link(tmp_path):
    path = str(tmp_path / ".lock")
    held = lock_file(path)
    code = f"from blpseg.utils.files import lock_file; print(lock_file({path!r}))"
    answer = lambda: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout  # noqa: E731
    assert answer() == "None\n"
    held.close()
    assert answer() != "None\n"
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BLPSegError, match="symbolic link"):
        lock_file(str(tmp_path / "link"))
    assert not (tmp_path / "elsewhere").exists()
