"""A student that may predict the difference to its input."""

import torch
from torch import Tensor, nn


class Skip(nn.Module):
    """``layers(x) + skip * x``; ``skip``, a buffer, is 1 where the difference is predicted and else 0.

    A buffer, so that both students are built alike and the state says which it is.

    Args:
        layers: from start to stop activations of one shape.
    """

    position_wise = True  # whatever its layers are (spans/kv_cache.py)
    skip: Tensor

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers
        self.register_buffer("skip", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: (N, *shape)."""
        return self.layers(x) + self.skip * x
