"""Runs tools/train_net.py, or a script, as a process of its own, with a network small enough to train in milliseconds.

Processes are forked from one that has imported everything (multiprocessing's forkserver, tests/conftest.py). As a
script (``python -m tests.engine.door ARGS``) it is the command line itself, for tests that need a whole interpreter
of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import time
from pathlib import Path

from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 1200  # of a hang; a busy machine takes minutes

context = multiprocessing.get_context("forkserver")


if "build_tiny_backbone" not in BACKBONE_REGISTRY:

    @BACKBONE_REGISTRY.register()
    class build_tiny_backbone(Backbone):  # noqa: N801 (config names a function)
        """Four convolutions, named as a ResNet's stages."""

        def __init__(self, cfg, input_shape):
            super().__init__()
            self._out_features = ["res2", "res3", "res4", "res5"]
            channels = [input_shape.channels, 8, 8, 12, 16]
            for k, name in enumerate(self._out_features):
                conv = Conv2d(
                    channels[k],
                    channels[k + 1],
                    kernel_size=3,
                    padding=1,
                    stride=4 if k == 0 else 2,
                    norm=get_norm(cfg.MODEL.RESNETS.NORM, channels[k + 1]),
                    activation=nn.functional.relu,
                )
                self.add_module(name, conv)
            self._shape = {
                name: ShapeSpec(channels=channels[k + 1], stride=4 * 2**k) for k, name in enumerate(self._out_features)
            }

        def forward(self, x):
            outputs = {}
            for name in self._out_features:
                x = outputs[name] = getattr(self, name)(x)
            return outputs

        def output_shape(self):
            return self._shape


TRAIN_NET = str(ROOT / "tools" / "train_net.py")


def run_script(script: str, arguments: list[str]) -> None:
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _child(script: str, arguments: list[str], output: str, prelude: str) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for loader workers: Linux's default, not the forkserver's
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    exec(prelude, {"__name__": "prelude"})
    run_script(script, arguments)


class Run:
    """One call of a script.

    Args:
        arguments: its command line.
        output: file that stdout and stderr go to.
        prelude: Python source that the process runs first, to plant a fault.
        script: Python file to run.
    """

    def __init__(self, arguments: list, output: Path, prelude: str = "", script: str = TRAIN_NET):
        self._output = output
        words = [str(a) for a in arguments]
        self._process = context.Process(target=_child, args=(script, words, str(output), prelude))
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def wait_for(self, text: str) -> None:
        """Until ``text`` has been printed."""
        end = time.monotonic() + PATIENCE_S
        while text not in self.output:
            assert self._process.is_alive() and time.monotonic() < end, f"no {text!r} in:\n{self.output}"
            time.sleep(0.01)

    @staticmethod
    def wait_until(condition) -> None:
        """Until ``condition()`` holds."""
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.01)

    def wait(self) -> int:
        """The exit status, negative for a signal."""
        self._process.join(PATIENCE_S)
        if self._process.exitcode is None:
            self.kill_all()
            raise AssertionError(f"still running after {PATIENCE_S} s:\n{self.output}")
        return self._process.exitcode

    def send(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def kill_all(self) -> None:
        """SIGKILL to the process and every one it started (but loader workers, which end by themselves)."""
        os.killpg(self.pid, signal.SIGKILL)
        self._process.join()

    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("error: ")]


if __name__ == "__main__":
    run_script(TRAIN_NET, sys.argv[1:])
