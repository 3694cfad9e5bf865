"""A plain network with skip connections: hidden features in every block, cut points between them."""

import torch
from torch import Tensor, nn


class ResidualMLP(nn.Module):
    """6 inputs, ``blocks`` of 8 -> ``hidden`` -> 8 with a skip connection, 3 outputs."""

    def __init__(self, blocks: int, hidden: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 8)) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x)
