"""A module made of a function."""

import torch
from torch import nn


class Calls(nn.Module):
    """A module that calls `function(x, weight)`."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.function(x, self.weight)
