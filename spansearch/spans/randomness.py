"""The same random numbers in every forward pass, and the user's own put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fixed_random() -> Iterator[None]:
    """Torch's generators seeded with 0 for the duration of a block, of the CPU and, where in use, of CUDA.

    Not torch.manual_seed: before CUDA is in use that queues the call, with its traceback, for ever.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(0)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(0)
        yield
