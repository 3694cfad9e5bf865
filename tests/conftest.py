"""One thread: the suites share cores, and fits are the same on every machine they run on."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # for tasks.py
torch.set_num_threads(1)
