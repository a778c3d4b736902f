"""Names of weights in checkpoints of earlier versions."""

from __future__ import annotations

# Before the head was one module in SEM_SEG_HEADS_REGISTRY.
_MOVED = {
    "pixel_decoder.": "sem_seg_head.pixel_decoder.",
    "annotation_head.": "sem_seg_head.annotation_head.",
    "embedding.": "sem_seg_head.local_aggregation.embedding.",
    **{f"sem_seg_head.{i}.": f"sem_seg_head.predictor.{i}." for i in (0, 2, 4)},
}


def current_name(name: str, prefix: str = "") -> str:
    """The name that a weight of a BLPSeg model has in this version; one that is not of an earlier version stays.
    ``prefix`` begins all names of the model, e.g. ``module.``."""
    for old, new in _MOVED.items():
        if name.startswith(prefix + old):
            return prefix + new + name[len(prefix + old) :]
    return name
