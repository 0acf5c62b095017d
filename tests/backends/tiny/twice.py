"""One head of convolution, batch norm and ReLU over two sizes of a picture, and a linear behind."""

import torch
from torch import Tensor, nn

INPUTS = {"input": ("batch", 3, 12, 12)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.out = nn.Linear(16, 4)

    def forward(self, input: Tensor) -> Tensor:
        large = torch.relu(self.stem(input))
        small = torch.relu(self.down(large))
        return self.out(torch.cat([self.head(level).mean((2, 3)) for level in (large, small)], 1))


def build() -> nn.Module:
    torch.manual_seed(0)
    model = Model()
    norm = model.head[1]
    nn.init.uniform_(norm.running_mean, -0.1, 0.1)
    nn.init.uniform_(norm.running_var, 0.1, 0.5)
    return model.eval()


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input": torch.randn(batch, 3, 12, 12, generator=generator)} for batch in (1, 2, 4)]
