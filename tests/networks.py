"""Small networks, and data for them, that several tests use."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

N, PIXELS = 26, 8


class Small(nn.Module):
    """Two convolutions and a linear layer: 8 filters, 3 classes, images (3, 8, 8)."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.two(self.one(x).tanh()).tanh().mean((2, 3)))


class Skip(nn.Module):
    """Two convolutions with a skip connection, batch normalization, and a head with a bias."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.one(x).tanh()
        x = x + self.norm(self.two(x)).relu_()
        return self.head(x.mean((2, 3)))


def make_model(seed: int = 0, width: int = 4) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, width, 3), nn.Tanh(), nn.Conv2d(width, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(80, 4)]
        return nn.Sequential(*layers)


def make_data(n: int = N, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, PIXELS, PIXELS, generator=generator)
    return TensorDataset(images, torch.randint(4, (n,), generator=generator))
