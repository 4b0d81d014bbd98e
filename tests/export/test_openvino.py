"""OpenVINO's files as a user's program opens them; what they answer is in ``test_static.py`` and ``test_verify.py``."""

import subprocess
import sys
from pathlib import Path

import torch

from featherweight.batch import Inputs
from featherweight.export import export

# Two models that close in the order they were opened, then a signal that Python handles: how the end of a data loader's
# worker reaches a program. In a process of its own, which a failure would end.
PROGRAM = """
import os, signal, sys
import featherweight.export.openvino as files

signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
first = files.OpenVINOModel(sys.argv[1])
second = files.OpenVINOModel(sys.argv[1])
del first
del second
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_signals_are_handled_after_models_were_closed(tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    export(torch.nn.Linear(4, 2), Inputs((torch.randn(1, 4),)), "openvino", path)
    done = subprocess.run([sys.executable, "-c", PROGRAM, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
