"""Every command block of README and docs runs, in order, as a reader types it, on small data with short trainings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from scipy.io import savemat

from blpseg import get_cfg
from blpseg.checkpoint.conversion import convert
from blpseg.prepare.make_synthetic import make_synthetic
from blpseg.scribbles import convert_annotations, simulate_scribble

from .snippets import blocks
from .test_commands import FENCED, INDENTED
from .test_snippets import draw_photos_and_strokes

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]

SHORT = """SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 4 INPUT.CROP.SIZE [48,48] DATALOADER.NUM_WORKERS 0
TEST.AUG.ENABLED False MODEL.DEVICE cpu OUTPUT.PANEL_PERIOD 0 MODEL.TIMM.WEIGHTS""".split()
# `python` of a reader's shell: what it trains is short, and downloads nothing.
PYTHON = f"""#!{sys.executable}
import os, sys
words = sys.argv[1:]
if words and words[0].endswith("tools/train_net.py") and "--help" not in words:
    words += {[*SHORT, ""]!r}
    if "MODEL.WEIGHTS" not in words:
        words += ["MODEL.WEIGHTS", ""]
os.execv(sys.executable, [sys.executable, "-W", "ignore", *words])
"""
# Lines that install, wait for a browser or for another machine, or show a form; the tests that run these things.
LEFT_OUT = {
    r"^(make|git clone|source|pip install) ": "Makefile, tests/test_packaging.py",
    r"^python tools/annotate\.py ": "tests/annotate",
    r"--num-machines|--nproc-per-node|^#SBATCH|^head=|^srun |scontrol": "tests/engine/test_processes.py",
    r"\[KEY VALUE|\{lam,|\[--output": "test_commands.py",
}
DRAW = "python datasets/prepare_scribbles.py --labelme annotations --vocabulary classes.yaml --images leaves/images/train --output leaves/scribbles/train"  # noqa: E501
DOCUMENTS = [ROOT / "README.md", ROOT / "datasets/README.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks(document: Path) -> list[tuple[str, str]]:
    """(language, text) of the blocks with our commands and of the Python blocks, in order; those of EXTENDING are
    test_snippets.py's."""
    text = document.read_text()
    found = {text.index(block): ("bash", block) for block in FENCED.findall(text)}
    found |= {text.index(b.text): ("python", b.text) for b in blocks(text) if b.language == "python"}
    rest = re.sub(r"^```.*?^```", lambda fence: "\n" * len(fence[0]), text, flags=re.M | re.S)
    for match in INDENTED.finditer(rest):
        block = re.sub(r"^ {4}", "", match[0], flags=re.M)
        found[match.start()] = "python" if re.search(r"^(import|from) ", block, flags=re.M) else "bash", block
    ours = re.compile(r"\b(tools|datasets)/\w+\.py|\bblpseg\b")
    return [found[at] for at in sorted(found) if ours.search(found[at][1])]


RUN = [document for document in DOCUMENTS if document.name != "EXTENDING.md" and code_blocks(document)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of the smallest pretrained config."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    make_synthetic(str(folder / "synthetic"), size=(48, 48), train=4, val=1)
    environment = {**os.environ, "DETECTRON2_DATASETS": str(folder), "OMP_NUM_THREADS": "1"}
    words = ["tools/train_net.py", "--config-file", "configs/Synthetic-Scribble/blpseg_lite.yaml", *SHORT, ""]
    words += ["DATASETS.TEST", "()", "OUTPUT_DIR", str(folder)]
    subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=True, capture_output=True)
    return folder / "model_final.pth"


def write_data(data: Path) -> None:
    """The data sets' trees before their prepare commands, two or three small images each."""
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 255, (72, 96, 3), np.uint8)
    mask = np.zeros((72, 96), np.uint8)
    mask[20:60, 30:80] = 1
    strokes = "<annotation><size><width>96</width><height>72</height></size>" + "".join(
        f"<polygon><tag>{name}</tag>{''.join(f'<point><X>{x}</X><Y>{y}</Y></point>' for x, y in points)}</polygon>"
        for name, points in (("background", [(5, 5), (90, 8)]), ("plane", [(40, 40), (70, 45)]))
    ) + "</annotation>"  # fmt: skip

    def image(path, content):
        (data / path).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(data / path), content)

    def text(path, content):
        (data / path).parent.mkdir(parents=True, exist_ok=True)
        (data / path).write_text(content)

    for stem in ("a", "b", "c"):
        for tree in ("VOC2012", "Context"):
            image(f"VOCdevkit/{tree}/JPEGImages/{stem}.jpg", photo)
        image(f"VOCdevkit/VOC2012/SegmentationClassAug/{stem}.png", mask)
        text(f"VOCdevkit/scribble_annotation/pascal_2012/{stem}.xml", strokes)
        text(f"VOCdevkit/scribble_annotation/pascal_context/{stem}.xml", strokes)
        (data / "VOCdevkit/Context/SegmentationClass").mkdir(parents=True, exist_ok=True)
        savemat(data / f"VOCdevkit/Context/SegmentationClass/{stem}.mat", {"LabelMap": mask.astype(np.uint16)})
        for part in ("training", "validation"):
            image(f"ADEChallengeData2016/images/{part}/{stem}.jpg", photo)
            image(f"ADEChallengeData2016/annotations/{part}/{stem}.png", mask)
        image(f"s4ADE20K/scribbles/training/{stem}.png", np.dstack([mask] * 3))
        for part in ("train", "val"):
            patient = f"patient{ord(stem):03d}_frame01_slice_0"
            hearts = np.where(mask, 1 + np.arange(96) // 16 % 3, 0).astype(np.uint8)
            image(f"acdc_png/images/{part}/{patient}.png", rng.integers(0, 255, (72, 96), np.uint8))
            image(f"acdc_png/masks/{part}/{patient}.png", hearts)
        image(f"acdc_png/scribbles/train/{patient}.png", simulate_scribble(hearts, seed=0))
        image(f"CamVid/train/{stem}.png", photo)
        image(f"CamVid/trainannot/{stem}.png", mask)
    for tree, train in (("VOC2012", "trainaug"), ("Context", "train")):
        text(f"VOCdevkit/{tree}/ImageSets/Segmentation/{train}.txt", "a\nb\n")
        text(f"VOCdevkit/{tree}/ImageSets/Segmentation/val.txt", "c\n")
    names = [f"thing{i}" for i in range(1, 460)]
    text("VOCdevkit/Context/SegmentationClass/labels.txt", "".join(f"{i}: {n}\n" for i, n in enumerate(names, 1)))
    kept = "".join(f"{i}: {n}\n" for i, n in enumerate(names[:59], 1))
    text("VOCdevkit/Context/SegmentationClass/59_labels.txt", kept)
    for city, part in (("aachen", "train"), ("ulm", "val")):
        name = f"{city}_000000_000019"
        image(f"cityscapes/leftImg8bit/{part}/{city}/{name}_leftImg8bit.png", photo)
        image(f"cityscapes/gtFine/{part}/{city}/{name}_gtFine_labelIds.png", mask * 7)
    name = "s4Cityscapes/scribbles/gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"
    image(name, np.dstack([mask * 7] * 3))
    make_synthetic(str(data / "synthetic"), size=(48, 48), train=20, val=3)


@pytest.fixture
def reader(tmp_path, model):
    """A clone in which the files lie that the documents speak of -> its folder."""
    for name in ("configs", "tools", "datasets"):
        (tmp_path / name).symlink_to(ROOT / name)
    data = tmp_path / "data"
    write_data(data)
    for name in ("VOCdevkit", "CamVid"):
        (tmp_path / name).symlink_to(data / name)
    draw_photos_and_strokes(tmp_path)
    for name in ("photo.png", "street.png"):
        cv2.imwrite(str(tmp_path / name), cv2.imread(str(tmp_path / "photos/a.jpg")))
    (tmp_path / "bin").mkdir()
    for name in ("python", "python3"):  # the first line of a tool names the second
        (tmp_path / "bin" / name).write_text(PYTHON)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "C").write_text(f"_BASE_: {ROOT}/configs/Synthetic-Scribble/blpseg_lite.yaml\n")
    (tmp_path / "my.yaml").write_text((tmp_path / "C").read_text())
    (tmp_path / "CONFIG").write_text(f"_BASE_: {ROOT}/configs/PascalVOC-Scribble/blpseg_lite.yaml\n")
    run = tmp_path / "output/studies/acdc/runs/ACDC/BLP_+_LAM/seed0"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text((tmp_path / "C").read_text())
    for copy in ("model_final.pth", "converted.pth", "output/demo/model/model_final.pth", run / "model_final.pth"):
        (tmp_path / copy).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / copy).symlink_to(model)
    video = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, (96, 72))
    for _ in range(2):
        video.write(np.zeros((72, 96, 3), np.uint8))
    video.release()
    return tmp_path


@pytest.mark.parametrize("document", RUN, ids=lambda document: str(document.relative_to(ROOT)))
def test_blocks_run(document, reader):
    environment = {**os.environ, "DETECTRON2_DATASETS": str(reader / "data"), "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{reader}/bin:{os.environ['PATH']}", "PYTHONPATH": f"{reader}:{ROOT}"}
    if document == ROOT / "README.md":
        cfg = get_cfg(str(ROOT / "configs/PascalVOC-Scribble/blpseg_R101.yaml"), ["MODEL.DEVICE", "cpu"])
        torch.save(convert(build_model(cfg).state_dict(), "ours.pth").state_dict, reader / "published.pth")
    if "prepare_scribbles.py --" not in document.read_text():
        strokes = reader / "VOCdevkit/scribble_annotation/pascal_2012"
        convert_annotations("xml", str(strokes), f"{strokes}_label", "voc", progress=False)
    ran = 0
    for language, block in code_blocks(document):
        if language == "python":
            (reader / "block.py").write_text(block)
            block = "python block.py\n"
        lines = block.replace("\\\n", " ").replace("python tools/annotate.py leaves --open", DRAW).splitlines()
        lines = [line for line in lines if not any(re.search(pattern, line) for pattern in LEFT_OUT)]
        script = "\n".join(lines).replace("--num-gpus 8", "--num-gpus 2").replace("/tmp/", f"{reader}/tmp/")
        script = script.replace("model_0000899.pth", "output/voc_blpseg_lite/model_final.pth")
        script = re.sub("/path/to/data|(?<==)(/data|DATA)(?= )", f"{reader}/data", script)
        result = subprocess.run(
            ["bash", "-e", "-u", "-o", "pipefail", "-c", script], cwd=reader, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert result.returncode == 0, f"{document.name}:\n{script}\n{result.stdout[-3000:]}"
        ran += bool(script.strip())
    assert ran or document.name == "ANNOTATE.md", f"{document.name} has no block that runs"
    if document.name == "GETTING_STARTED.md":
        masks = sorted(path.name for path in (reader / "output/masks").glob("*_raw.png"))
        assert masks == ["a_raw.png", "b_raw.png", "c_raw.png"]
