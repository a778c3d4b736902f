"""The Trainer as a Detectron2 user meets it: subclassed in a script of their own, beside stock Detectron2."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from detectron2.engine import DefaultTrainer

from blpseg import get_cfg
from blpseg.engine import Trainer
from blpseg.utils.errors import BLPSegError

from .door import Run
from .test_lost_nothing import weights

# What a user writes: own config keys, an overridden optimiser, loader, evaluator and hook, Detectron2's parser.
SCRIPT = """
import sys, torch
import tests.engine.door  # the test's backbone
from detectron2.engine import HookBase, default_argument_parser
from detectron2.evaluation import SemSegEvaluator
from blpseg import get_cfg
from blpseg.data.build import build_train_loader
from blpseg.data.dataset_mapper import ScribbleDatasetMapper
from blpseg.engine import Trainer, default_setup, launch

class DarkMapper(ScribbleDatasetMapper):
    def __call__(self, record, *args):
        sample = super().__call__(record, *args)
        return {**sample, "image": sample["image"] * 0.8}

class Report(HookBase):
    def after_step(self):
        if self.trainer.iter == self.trainer.max_iter - 1:
            print("own hook", self.trainer.optimizer.__class__.__name__, flush=True)

class MyTrainer(Trainer):
    @classmethod
    def build_optimizer(cls, cfg, model):
        return torch.optim.RMSprop(model.parameters(), lr=cfg.MY.RATE)
    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 3)
    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg, mapper=DarkMapper(cfg, is_train=True))
    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return SemSegEvaluator(dataset_name)
    def build_hooks(self):
        return [*super().build_hooks(), Report()]

def setup(args):
    cfg = get_cfg()
    cfg.MY = type(cfg)({"RATE": 1e-3})
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg

def main(args):
    cfg = setup(args)
    trainer = MyTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()

if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    sys.exit(launch(main, args.num_gpus, dist_url="auto", args=(args,)))
"""


@pytest.fixture
def script(tmp_path, config_file):
    """``script(source, *arguments)`` runs Python source, which must end well; what it printed."""

    def run(source: str, *arguments) -> str:
        path = tmp_path / "script.py"
        path.write_text(source)
        done = Run(arguments, tmp_path / "output.txt", script=str(path))
        assert done.wait() == 0, done.output
        return done.output

    return run


def test_names_and_signatures_of_default_trainer():
    assert issubclass(Trainer, DefaultTrainer)
    names = ["build_model", "build_optimizer", "build_lr_scheduler", "build_train_loader", "build_test_loader"]
    for name in [*names, "build_evaluator", "build_hooks", "build_writers", "test", "train", "resume_or_load"]:
        own, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (Trainer, DefaultTrainer))
        assert list(own)[: len(theirs)] == list(theirs), name
        assert name in vars(Trainer), f"{name} would be Detectron2's"


def test_subclass_with_own_keys(script, config_file, tmp_path):
    """Two processes train, evaluate and resume exactly with the user's parts."""
    common = ["--config-file", config_file, "--num-gpus", 2]
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    options = ["MY.RATE", "0.002", "SOLVER.CHECKPOINT_PERIOD", 4]
    printed = script(SCRIPT, *common, *options, "OUTPUT_DIR", calm)
    assert "own hook RMSprop" in printed and "mIoU: " in printed
    rates = {r["iteration"]: r["lr"] for r in map(json.loads, (calm / "metrics.json").open()) if "lr" in r}
    assert rates == pytest.approx({k: 0.002 * 0.1 ** (k // 3) for k in range(8)})

    script(SCRIPT, *common, *options, "OUTPUT_DIR", rough, "SOLVER.MAX_ITER", 4, "DATASETS.TEST", "()")
    script(SCRIPT, *common, "--resume", *options, "OUTPUT_DIR", rough, "DATASETS.TEST", "()")
    first, second = weights(calm), weights(rough)
    assert all(torch.equal(first[name], second[name]) for name in first)


STOCK = """
import cv2
import tests.engine.door
from detectron2.data import MetadataCatalog, build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultPredictor, DefaultTrainer, default_argument_parser, default_setup
from detectron2.evaluation import SemSegEvaluator
from detectron2.utils.visualizer import Visualizer
from blpseg import get_cfg
from blpseg.data.dataset_mapper import ScribbleDatasetMapper
UPSTREAM

class StockTrainer(DefaultTrainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, mapper=ScribbleDatasetMapper(cfg, is_train=True))
    @classmethod
    def build_test_loader(cls, cfg, name):
        return build_detection_test_loader(cfg, name, mapper=ScribbleDatasetMapper(cfg, is_train=False))
    @classmethod
    def build_evaluator(cls, cfg, name):
        return SemSegEvaluator(name, output_dir=cfg.OUTPUT_DIR)

args = default_argument_parser().parse_args()
cfg = get_cfg(args.config_file, args.opts)
default_setup(cfg, args)
trainer = StockTrainer(cfg)
trainer.resume_or_load(resume=False)
trainer.train()
cfg.MODEL.WEIGHTS = cfg.OUTPUT_DIR + "/model_final.pth"
image = cv2.imread(IMAGE)
prediction = DefaultPredictor(cfg)(image)["sem_seg"].argmax(0)
drawn = Visualizer(image[..., ::-1], MetadataCatalog.get("tiny_val")).draw_sem_seg(prediction)
print("drawn", drawn.get_image().shape, prediction.shape)
"""

# Detectron2's main since NumPy 2: no `copy` in the call, so nothing to mend.
UPSTREAM = """
import numpy as np
from PIL import Image
from detectron2.evaluation import sem_seg_evaluation
def load_image_into_numpy_array(filename, dtype=None):
    return np.array(Image.open(filename), dtype=dtype)
SemSegEvaluator.__init__.__kwdefaults__["sem_seg_loading_fn"] = load_image_into_numpy_array
"""


@pytest.mark.parametrize("upstream", ["", UPSTREAM], ids=["installed", "upstream"])
def test_stock_detectron2_script(script, config_file, data_root, tmp_path, upstream):
    image = data_root / "images/val/val0.png"
    options = ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.MAX_ITER", 2, "OUTPUT_DIR", tmp_path / "out"]
    options += ["INPUT.MIN_SIZE_TEST", 64]  # what Detectron2's predictor enlarges the image to
    source = STOCK.replace("UPSTREAM", upstream).replace("IMAGE", repr(str(image)))
    printed = script(source, "--config-file", config_file, *options)
    assert "copypaste: mIoU," in printed and "drawn (40, 44, 3) torch.Size([40, 44])" in printed


@pytest.mark.parametrize(
    "options",
    [
        ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", (30, 10)],
        ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR_END", 1.0],
    ],
)
def test_a_schedule_that_contradicts_itself_is_one_line(options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(BLPSegError, match="LR_SCHEDULER_NAME .* cannot be made of BASE_LR") as error:
        Trainer.build_lr_scheduler(get_cfg("", options), optimizer)
    assert "\n" not in str(error.value)
