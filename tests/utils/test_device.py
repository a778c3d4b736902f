"""The device of a run."""

import subprocess
import sys

import pytest
import torch


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this CPU cannot")
def test_all_threads_of_a_cpu_take_subnormal_numbers_as_0():
    script = """
import torch
from blpseg.utils.device import choose_device
assert choose_device("cpu") == "cpu"
torch.set_num_threads(3)
print(int((torch.full((1 << 20,), 2.0**-100) * 2.0**-30).count_nonzero()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("0", 0), done.stderr
