#!/usr/bin/env python3
"""Train and evaluate a model: one way for one process, several GPUs, several machines."""

from blpseg import engine, get_cfg
from blpseg.engine.interrupt import STOP
from blpseg.utils.cli import parse_with_opts, run_command
from blpseg.utils.errors import BLPSegError

EXAMPLES = """
examples:
  train, evaluating at the end (results and checkpoints in OUTPUT_DIR):
    tools/train_net.py --config-file configs/Synthetic-Scribble/blpseg_tiny.yaml OUTPUT_DIR output/tiny
  go on after an interruption of any kind:
    tools/train_net.py --config-file configs/Synthetic-Scribble/blpseg_tiny.yaml --resume OUTPUT_DIR output/tiny
  evaluate:
    tools/train_net.py --config-file C --eval-only MODEL.WEIGHTS output/tiny/model_final.pth
  two machines of 8 GPUs:
    tools/train_net.py --config-file C --num-gpus 8 --num-machines 2 --machine-rank {0,1} --dist-url tcp://HOST0:29500
  torchrun starts the processes instead:
    torchrun --nproc-per-node 8 tools/train_net.py --config-file C

exit status: 0 done; 1 an error, reported in one line; 130 or 143 stopped by Ctrl-C or SIGTERM with the state saved.
docs/TRAINING.md says more. To change the model, the data or the evaluation, call main with a Trainer of yours, or copy
this file (docs/EXTENDING.md).
"""


def parser():
    return engine.argument_parser(__doc__, EXAMPLES)


def setup(args, add_keys=None):
    """The config of the command line. ``add_keys(cfg)`` adds the keys of a project that builds on this one."""
    cfg = get_cfg(args.config_file, args.opts, add_keys)
    if not (cfg.DATASETS.TRAIN or args.eval_only or args.replay):
        raise BLPSegError("config: DATASETS.TRAIN is empty; give a recipe with --config-file, or name a data set")
    return cfg


def evaluate(cfg, args, trainer_class):
    model = trainer_class.build_model(cfg)
    engine.load_trained(cfg, model, resume=args.resume, trust=args.trust_checkpoint)
    return trainer_class.test(cfg, model)


def work(cfg, args, trainer_class=None):
    """What each process does."""
    trainer_class = trainer_class or engine.Trainer  # imported here, since --help does not need it
    engine.default_setup(cfg, args)
    if args.replay:
        return engine.replay(args.replay, cfg.MODEL.DEVICE)
    if args.eval_only:
        return evaluate(cfg, args, trainer_class)
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=args.resume, trust=args.trust_checkpoint)
    return trainer.train()


def main(trainer_class=None, add_keys=None):
    """The command line, with ``Trainer`` or a subclass of it, and perhaps with config keys of one's own."""
    STOP.install()  # a signal while PyTorch is imported ends the run with a line too
    args = parse_with_opts(parser())
    cfg = setup(args, add_keys)  # mistakes in it are reported before any process starts
    processes = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    return engine.launch(work, *processes, args=(cfg, args, trainer_class), device=cfg.MODEL.DEVICE)


if __name__ == "__main__":
    run_command(main)
