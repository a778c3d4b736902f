"""Evaluators against plain loops, through ``evaluate`` and ``build_evaluator``."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from PIL import Image

from blpseg.evaluation import SemSegEvaluator, VolumeEvaluator, build_evaluator, evaluate
from blpseg.evaluation.sem_seg import prediction_folder
from blpseg.utils.errors import BLPSegError

from .toys import CLASSES, COLORS, IGNORE, ColorModel, load_inputs


def scores_by_loop(pairs, classes):
    """mIoU, fwIoU, mACC, pACC and IoU by class, percent, from (prediction, label) maps, a pixel at a time."""
    hits, predicted, there = [0] * classes, [0] * classes, [0] * classes
    for prediction, label in pairs:
        for p, y in zip(prediction.ravel().tolist(), label.ravel().tolist(), strict=True):
            if y != IGNORE:
                predicted[p] += 1
                there[y] += 1
                hits[y] += p == y
    present = [c for c in range(classes) if there[c]]
    iou = {c: 100 * hits[c] / (predicted[c] + there[c] - hits[c]) for c in present}
    total = sum(there)
    return {
        "mIoU": sum(iou.values()) / len(present),
        "fwIoU": sum(iou[c] * there[c] / total for c in present),
        "mACC": sum(100 * hits[c] / there[c] for c in present) / len(present),
        "pACC": 100 * sum(hits) / total,
        **{f"IoU-{CLASSES[c]}": iou.get(c, math.nan) for c in range(classes)},
    }


def predictions_and_labels(model, records):
    with torch.no_grad():
        outputs = model(load_inputs(records))
    maps = [output["sem_seg"].numpy().argmax(0) for output in outputs]
    return [(p, np.array(Image.open(r["sem_seg_file_name"]))) for p, r in zip(maps, records, strict=True)]


def test_evaluate_agrees_with_a_plain_loop(dataset, toy_cfg, capsys):
    records, model = dataset(), ColorModel(4)
    results = evaluate(toy_cfg, model)
    expected = scores_by_loop(predictions_and_labels(model, records), 4)
    for name, value in expected.items():
        assert results["sem_seg"][name] == pytest.approx(value, abs=1e-9, nan_ok=True), name
    assert not any(name.startswith("Boundary") for name in results["sem_seg"])

    printed = capsys.readouterr().out
    assert float(re.search(r"^mIoU: (\d+\.\d{2,})$", printed, re.M)[1]) == pytest.approx(expected["mIoU"], abs=1e-3)
    for name in CLASSES:
        assert re.search(rf"^{name} ", printed, re.M)
    saved = json.loads((Path(toy_cfg.OUTPUT_DIR) / "results.json").read_text())
    assert saved["toy_val"]["sem_seg"]["mIoU"] == results["sem_seg"]["mIoU"]
    assert saved["toy_val"]["sem_seg"]["IoU-never"] is None  # valid JSON has no NaN


def _read(path, dtype):
    return np.array(Image.open(path)).astype(dtype)


def test_agrees_with_detectron2(dataset, toy_cfg):
    from detectron2.evaluation import SemSegEvaluator as Reference  # its own reader needs NumPy 1

    inputs = load_inputs(dataset())
    model = ColorModel(4)
    toy_cfg.TEST.BOUNDARY_IOU = True
    reference = Reference("toy_val", sem_seg_loading_fn=_read)
    theirs = inference_on_dataset(model, [[x] for x in inputs], reference)["sem_seg"]
    ours = inference_on_dataset(model, [[x] for x in inputs], build_evaluator(toy_cfg, "toy_val"))["sem_seg"]
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), atol=1e-9)


@pytest.mark.parametrize("palette", [False, True])
def test_written_png_give_the_same_miou(dataset, toy_cfg, palette):
    """Grey, which every program reads as numbers, or with the class colours."""
    records, model = dataset(), ColorModel(4)
    toy_cfg.TEST.WRITE_PREDICTIONS, toy_cfg.TEST.PALETTE = True, palette
    results = evaluate(toy_cfg, model)
    folder = Path(toy_cfg.OUTPUT_DIR, "inference/toy_val/results/toy/Segmentation/comp6_val_cls")
    assert sorted(p.name for p in folder.iterdir()) == [f"img{i}.png" for i in range(4)]
    pairs = []
    for record in records:
        image = Image.open(folder / (record["image_id"] + ".png"))
        assert image.mode == ("P" if palette else "L")
        if palette:
            assert np.array(image.getpalette()).reshape(-1, 3)[: len(COLORS)].tolist() == [list(c) for c in COLORS]
        pairs.append((np.array(image), np.array(Image.open(record["sem_seg_file_name"]))))
    assert scores_by_loop(pairs, 4)["mIoU"] == pytest.approx(results["sem_seg"]["mIoU"], abs=1e-9)


def test_folder_of_the_pascal_server():
    assert prediction_folder("voc_2012_val") == "results/VOC2012/Segmentation/comp6_val_cls"
    assert prediction_folder("pascal_context_val") == "results/pascal_context/Segmentation/comp6_val_cls"
    assert prediction_folder("mine") == "results/mine/Segmentation/comp6_test_cls"


def test_coco_json_on_request(dataset, toy_cfg):
    dataset(2)
    toy_cfg.TEST.COCO_JSON = True
    evaluate(toy_cfg, ColorModel(4))
    segments = json.loads(Path(toy_cfg.OUTPUT_DIR, "inference/toy_val/sem_seg_predictions.json").read_text())
    assert {s["file_name"].rsplit("/", 1)[1] for s in segments} == {"img0.png", "img1.png"}


def test_several_data_sets_and_multi_scale(dataset, toy_cfg):
    dataset(2)
    dataset(3, name="other_val")
    toy_cfg.DATASETS.TEST = ("toy_val", "other_val")
    toy_cfg.TEST.AUG.ENABLED = True
    model = ColorModel(4)
    results = evaluate(toy_cfg, model)
    assert list(results) == ["toy_val", "other_val"]
    assert {len(call) for call in model.calls} == {2}


@pytest.mark.parametrize("value, ok", [(3, True), (4, False), (254, False), (IGNORE, True)])
def test_labels_out_of_range_name_both_files(dataset, toy_cfg, value, ok):
    record = dataset(1)[0]
    mask = np.array(Image.open(record["sem_seg_file_name"]))
    mask[5, 5] = value
    Image.fromarray(mask).save(record["sem_seg_file_name"])
    if ok:
        evaluate(toy_cfg, ColorModel(4))
        return
    with pytest.raises(BLPSegError, match=rf"mask0.png: label {value} \(mask of .*img0.png\)"):
        evaluate(toy_cfg, ColorModel(4))


def test_ignore_label_among_the_classes(dataset, toy_cfg):
    """Only what is not the ignore label counts, also where that is a number below C."""
    records, model = dataset(2), ColorModel(4)
    MetadataCatalog.get("toy_val").__dict__["ignore_label"] = 0
    for record in records:
        mask = np.array(Image.open(record["sem_seg_file_name"]))
        mask[mask == IGNORE] = 0
        Image.fromarray(mask).save(record["sem_seg_file_name"])
    pairs = [(p, np.where(y == 0, IGNORE, y)) for p, y in predictions_and_labels(model, records)]
    assert evaluate(toy_cfg, model)["sem_seg"]["mIoU"] == pytest.approx(scores_by_loop(pairs, 4)["mIoU"])


def test_mask_of_another_size_names_both_files(dataset, toy_cfg):
    record = dataset(1)[0]
    Image.fromarray(np.zeros((40, 55), np.uint8)).save(record["sem_seg_file_name"])
    with pytest.raises(BLPSegError, match=r"mask0.png: the label is 55 x 40 pixels, the image .*img0.png 56 x 40"):
        evaluate(toy_cfg, ColorModel(4))


def test_unsound_data_sets_and_configs_are_refused(dataset, toy_cfg):
    records = dataset(2)
    with pytest.raises(BLPSegError, match="4 classes.*NUM_CLASSES is 5"):
        build_evaluator(_with(toy_cfg, "NUM_CLASSES", 5), "toy_val")
    for record in records:
        Image.fromarray(np.full((40, 56), IGNORE, np.uint8)).save(record["sem_seg_file_name"])
    with pytest.raises(BLPSegError, match="no labelled pixel"):
        evaluate(toy_cfg, ColorModel(4))
    del records[1]["sem_seg_file_name"]
    with pytest.raises(BLPSegError, match="img1.png: .*no mask"):
        build_evaluator(toy_cfg, "toy_val")
    MetadataCatalog.get("toy_val").__dict__["evaluator_type"] = "coco"
    with pytest.raises(BLPSegError, match="evaluator_type 'coco'"):
        build_evaluator(toy_cfg, "toy_val")
    with pytest.raises(BLPSegError, match="'nowhere_val' is not registered"):
        build_evaluator(toy_cfg, "nowhere_val")
    toy_cfg.DATASETS.TEST = ()
    with pytest.raises(BLPSegError, match="DATASETS.TEST"):
        evaluate(toy_cfg, ColorModel(4))


def _with(cfg, key, value):
    cfg = cfg.clone()
    cfg.MODEL.SEM_SEG_HEAD[key] = value
    return cfg


def test_two_images_of_one_name_cannot_both_be_written(dataset, toy_cfg, tmp_path):
    records = dataset(2)
    (tmp_path / "elsewhere").mkdir()
    twin = tmp_path / "elsewhere" / "img0.png"
    twin.write_bytes(Path(records[1]["file_name"]).read_bytes())
    records[1]["file_name"] = str(twin)
    toy_cfg.TEST.WRITE_PREDICTIONS = True
    with pytest.raises(BLPSegError, match="several images named img0"):
        build_evaluator(toy_cfg, "toy_val")


def _rank(rank, port, out, records):
    """One of two processes that share the images."""
    import gc

    from detectron2.utils import comm

    gc.freeze()  # objects of earlier tests, such as ONNX sessions, whose end would wait for threads of the parent
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    evaluator = VolumeEvaluator("toy_val")
    mine = load_inputs(records)[rank::2]
    results = inference_on_dataset(ColorModel(4), [[x] for x in mine], evaluator)
    Path(out, f"rank{rank}.json").write_text(json.dumps(results))


def test_two_processes_agree_with_one(dataset, tmp_path):
    import socket

    records = dataset(5, evaluator_type="sem_seg_volume", volumes=[("a", 0), ("a", 1), ("b", 1), ("b", 0), ("a", 2)])
    alone = inference_on_dataset(ColorModel(4), [[x] for x in load_inputs(records)], VolumeEvaluator("toy_val"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked, not spawned: importing torch and Detectron2 twice takes longer than all the other tests.
    torch.multiprocessing.start_processes(_rank, (port, str(tmp_path), records), nprocs=2, start_method="fork")
    together = json.loads((tmp_path / "rank0.json").read_text())
    assert json.loads((tmp_path / "rank1.json").read_text()) == {}
    for task in ("sem_seg", "volume"):
        np.testing.assert_allclose(list(together[task].values()), list(alone[task].values()), atol=1e-9)


def test_confusion_takes_class_maps_too(dataset):
    records = dataset(1)
    model, inputs = ColorModel(4), load_inputs(records)
    (output,) = model(inputs)
    one, other = SemSegEvaluator("toy_val"), SemSegEvaluator("toy_val")
    for evaluator, sem_seg in ((one, output["sem_seg"]), (other, output["sem_seg"].argmax(0).to(torch.uint8))):
        evaluator.reset()
        evaluator.process(inputs, [{"sem_seg": sem_seg}])
    assert (one.confusion == other.confusion).all() and one.confusion.sum() == 39 * 56
