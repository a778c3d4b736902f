"""Flags that all command lines share: config keys wherever they stand, numbers that are what they should be."""

import argparse

import pytest

from blpseg.utils.cli import count, fraction, parse_with_opts


@pytest.mark.parametrize(
    "line, inputs, opts",
    [
        ("--input a b", ["a", "b"], []),
        ("--input a b MODEL.WEIGHTS m.pth", ["a", "b"], ["MODEL.WEIGHTS", "m.pth"]),
        ("MODEL.WEIGHTS m.pth --input a", ["a"], ["MODEL.WEIGHTS", "m.pth"]),
        ("--input a --opts MINE.KEY 1 SEED 2", ["a"], ["MINE.KEY", "1", "SEED", "2"]),
        ("--input a SEED 1 --resume OUTPUT_DIR o", ["a"], ["SEED", "1", "OUTPUT_DIR", "o"]),
        ("--input IMAGE.PNG --resume MINE.KEY 1", ["IMAGE.PNG"], ["MINE.KEY", "1"]),
        ("--input a TEST.AUG.SCALES [1.0]", ["a"], ["TEST.AUG.SCALES", "[1.0]"]),
        ("SEED 1 SEED 2 --input a --opts SEED 3", ["a"], ["SEED", "1", "SEED", "2", "SEED", "3"]),
    ],
)
def test_config_keys_wherever_they_stand(line, inputs, opts):
    parser = argparse.ArgumentParser()
    parser.add_argument("--input", nargs="+")
    parser.add_argument("--resume", action="store_true")
    args = parse_with_opts(parser, line.split())
    assert args.input == inputs and args.opts == opts and args.resume == ("--resume" in line)


@pytest.mark.parametrize("kind, text", [(count, "0"), (count, "-1"), (count, "x"), (count, "1.5"), (fraction, "nan"),
                                        (fraction, "1.01"), (fraction, "-0.1"), (fraction, "x")])  # fmt: skip
def test_numbers_out_of_range(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a"):
        kind(text)
