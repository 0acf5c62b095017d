"""A U-Net of two levels; batch, height and width are free, in steps of 4."""

import torch
from torch import Tensor, nn

INPUTS = {"image": ("batch", 1, "height", "width")}


def double(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU(),
                         nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU())  # fmt: skip


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = double(1, 8), double(8, 16), double(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.Upsample(scale_factor=2, mode="bilinear")
        self.left2, self.left1 = double(32, 16), double(24, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        first = self.down1(image)
        second = self.down2(nn.functional.max_pool2d(first, 2))
        deep = self.middle(nn.functional.max_pool2d(second, 2))
        second = self.left2(torch.cat([second, self.up2(deep)], dim=1))
        return {"mask": self.head(self.left1(torch.cat([first, self.up1(second)], dim=1)))}


def build() -> nn.Module:
    torch.manual_seed(0)
    return UNet()


def samples() -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    sizes = ((1, 16, 16), (2, 32, 24), (3, 24, 40), (2, 40, 16))
    return [{"image": torch.randn(batch, 1, high, wide, generator=random)} for batch, high, wide in sizes]
