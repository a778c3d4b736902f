"""Make narrow_r50.npz: what METHOD.md's formulas give for one narrow network, in float64.

    python -m tests.golden.make_golden      # from the project's root; writes tests/golden/narrow_r50.npz

The network has the published layout, a ResNet-50 with a deep stem at an eighth of its width. Weights, images and
scribbles follow from seeds, so that the file holds results alone. They come from tests/modeling/reference.py, which
shares no code with the package; where ../shared/golden stands, tests/modeling/test_parity.py compares the package with
the published implementation itself.
"""

from pathlib import Path
from zlib import crc32

import numpy as np
import torch

from tests.modeling.reference import PublishedNetwork, literal_losses

FILE = Path(__file__).with_name("narrow_r50.npz")
CLASSES, WIDTH, SIGMA, GAMMA, UNANNOTATED_WEIGHT, THRESHOLD = 6, 8, 6.0, 2.0, 0.02, 0.3
# The same network by config.
OPTS = [
    *("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.WIDTH_PER_GROUP", WIDTH, "MODEL.RESNETS.RES2_OUT_CHANNELS", 4 * WIDTH),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 2 * WIDTH, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", CLASSES),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 2 * WIDTH, "MODEL.BLPSEG.HEAD_CHANNELS", 2 * WIDTH),
    *("MODEL.BLPSEG.LAM.EMBEDDING_CHANNELS", 2 * WIDTH, "MODEL.BLPSEG.LAM.SIGMA", SIGMA),
    *("MODEL.BLPSEG.BLP.GAMMA", GAMMA, "MODEL.BLPSEG.ANNOTATION.UNANNOTATED_WEIGHT", UNANNOTATED_WEIGHT),
    *("MODEL.BLPSEG.SELF_TRAINING.START_ITER", 100, "MODEL.BLPSEG.SELF_TRAINING.THRESHOLD", THRESHOLD),
]
MEAN, STD = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def shapes():
    """{name: shape} of the published layout (names as in blpseg.checkpoint.conversion) at WIDTH instead of 64."""
    w, d = WIDTH, 2 * WIDTH
    found = {}

    def conv(name, norm, out, inputs, side):
        found[f"{name}.weight"] = (out, inputs, side, side)
        if norm:
            for part in ("weight", "bias", "running_mean", "running_var"):
                found[f"{norm}.{part}"] = (out,)
            found[f"{norm}.num_batches_tracked"] = ()

    conv("backbone.conv1.0", "backbone.conv1.1", w, 3, 3)
    conv("backbone.conv1.3", "backbone.conv1.4", w, w, 3)
    conv("backbone.conv1.6", "backbone.bn1", 2 * w, w, 3)
    inputs = 2 * w
    for stage, blocks in enumerate((3, 4, 6, 3)):
        middle, out = w << stage, 4 * w << stage
        for block in range(blocks):
            name = f"backbone.layer{stage + 1}.{block}"
            for i, (a, b, side) in enumerate(((middle, inputs, 1), (middle, middle, 3), (out, middle, 1)), 1):
                conv(f"{name}.conv{i}", f"{name}.bn{i}", a, b, side)
            if block == 0:
                conv(f"{name}.downsample.0", f"{name}.downsample.1", out, inputs, 1)
            inputs = out
    for i in range(4):
        conv(f"ppm.stages.{i}.1", f"ppm.stages.{i}.2", d, inputs, 1)
    conv("ppm.bottleneck.0", "ppm.bottleneck.1", d, inputs + 4 * d, 1)
    for i in range(3):
        conv(f"decoder.lateral_convs.{i}.0", f"decoder.lateral_convs.{i}.1", d, 4 * w << i, 1)
        conv(f"decoder.fpn_convs.{i}.0", f"decoder.fpn_convs.{i}.1", d, d, 3)
    conv("decoder.fpn_bottleneck.0", "decoder.fpn_bottleneck.1", d, 4 * d, 3)
    for head, out in (("seg_head", CLASSES), ("scribble_head", CLASSES + 1)):
        conv(f"{head}.0", "", d, d, 1)
        conv(f"{head}.2", "", d, d, 1)
        conv(f"{head}.4", "", out, d, 1)
        found[f"{head}.4.bias"] = (out,)
    conv("embed_proj.proj", "", d, 3, 4)
    conv("embed_proj.conv", "", d, d, 1)
    for name in ("embed_proj.proj.bias", "embed_proj.norm.weight", "embed_proj.norm.bias", "embed_proj.conv.bias"):
        found[name] = (d,)
    return found


def weights():
    """A published state dict, float32; numpy's RandomState gives the same numbers in every version."""
    state = {}
    for name, shape in shapes().items():
        random = np.random.RandomState(crc32(name.encode()))
        if not shape:
            value = np.zeros(shape, np.int64)
        elif name.endswith("running_var"):
            value = 0.5 + random.rand(*shape)
        elif len(shape) > 1:
            value = random.randn(*shape) * (2 / np.prod(shape[1:])) ** 0.5
        else:
            value = 0.1 * random.randn(*shape) + name.endswith("weight")
        if ".bn3.weight" in name:
            value *= 0.25  # keeps the residual sum from growing block by block
        if name == "embed_proj.conv.weight":
            value *= 0.2
        if name == "seg_head.4.bias":
            value += [6, 0, 4, 0, 0, 5]  # the classes that are scribbled, so that self-training finds labels
        state[name] = torch.from_numpy(np.asarray(value, np.int64 if not shape else np.float32))
    return state


def images_and_scribbles():
    """(2, 64, 80, 3) uint8 and (2, 64, 80) int64: CLASSES is not annotated, 255 padding."""
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (2, 64, 80, 3)).astype(np.uint8)
    scribbles = np.full((2, 64, 80), CLASSES)
    scribbles[0, 10:14, 5:60], scribbles[0, 30:33, 20:70], scribbles[1, 8:50, 40:43] = 0, CLASSES - 1, 2
    scribbles[1, :, 70:] = 255
    return images, scribbles


def results():
    """{name: float64 array}: logits of the first image; losses and gradient norms before and in self-training."""
    images, scribbles = images_and_scribbles()
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).double() / 255
    x = (x - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(3, 1, 1)
    state = {k: v.double() if v.is_floating_point() else v for k, v in weights().items()}
    with torch.no_grad():
        found = {"logits": PublishedNetwork(state, SIGMA)(x[:1])[0][0, :, ::4, ::4].numpy()}
    present = torch.zeros(2, CLASSES, dtype=torch.bool)
    for i, scribble in enumerate(scribbles):
        present[i, np.unique(scribble[scribble < CLASSES])] = True
    present[:, 0] = True
    for when, threshold in (("before", None), ("self_training", THRESHOLD)):
        leaves = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in state.items()}
        logits, annotation = PublishedNetwork(leaves, SIGMA, training=True)(x)
        target = torch.from_numpy(scribbles)
        seg, ann, supervision = literal_losses(
            logits, annotation, target, present, GAMMA, UNANNOTATED_WEIGHT, threshold=threshold
        )
        (seg + ann).backward()
        found[f"{when}/loss_seg"], found[f"{when}/loss_annotation"] = seg.item(), ann.item()
        found[f"{when}/labels"] = torch.bincount(supervision.flatten(), minlength=256).numpy()
        found["names"] = sorted(name for name, leaf in leaves.items() if leaf.grad is not None)
        found[f"{when}/gradients"] = np.array([leaves[name].grad.norm().item() for name in found["names"]])
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    np.savez_compressed(FILE, **results())
    print(f"wrote {FILE}, {FILE.stat().st_size} bytes")
