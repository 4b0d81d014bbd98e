"""Architectures to narrow without a hint: vision networks, transformers, small constructs; all with random weights.

Every network has a name, ``set:name``, and `build` makes it with an example of its inputs. The sets:

* ``vision``: 66 networks of pytorchcv, classifiers, segmentation, detection and pose;
* ``families``: one network of every other file of pytorchcv;
* ``transformers``: 14 small configurations of transformers;
* ``more``: 11 further configurations of transformers;
* ``constructs``: 37 networks of a few layers with one structural hazard each;
* ``torchvision`` and ``timm``: architectures of these libraries.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.batch import Inputs

# pytorchcv: name, its file where that has another name, and the side of its images where it is not 224.
VISION = """
alexnet | vgg11 vgg | resnet18 resnet | resnet50 resnet | preresnet18 preresnet | resnext50_32x4d resnext
seresnet18 seresnet | senet16 senet | densenet121 densenet | mobilenet_w1 mobilenet | mobilenetv2_w1 mobilenetv2
mobilenetv3_small_w1 mobilenetv3 | shufflenet_g3_w1 shufflenet | shufflenetv2_w1 shufflenetv2
squeezenet_v1_1 squeezenet | bninception | efficientnet_b0 efficientnet | regnetx002 regnet | regnety002 regnet
dla34 dla | dpn68 dpn | hrnet_w18_small_v1 hrnet | ghostnet | mnasnet_a1 mnasnet | mixnet_s mixnet | sknet50 sknet
resnestabc14 resnesta | ibn_resnet50 ibnresnet | condensenet74_c4_g4 condensenet | vovnet27s vovnet
hardnet39ds hardnet | octresnet10_ad2 octresnet | peleenet | diracnet18v2 diracnetv2 | igcv3_w1 igcv3
cbam_resnet18 cbamresnet | isqrtcovresnet18 isqrtcovresnet | proxylessnas_mobile proxylessnas | resattnet56 resattnet
fishnet99 fishnet | menet108_8x1_g3 menet | sqnxt23_w1 squeezenext | channelnet | revnet38 revnet
inceptionv3 inceptionv3 299 | xception xception 299 | nasnet_4a1056 nasnet | resnet56_cifar10 resnet_cifar 32
densenet40_k12_cifar10 densenet_cifar 32 | nin_cifar10 nin_cifar 32
unet_cityscapes unet 128 | linknet_cityscapes linknet 128 | segnet_cityscapes segnet 128 | enet_cityscapes enet 128
erfnet_cityscapes erfnet 128 | fastscnn_cityscapes fastscnn 256 | dabnet_cityscapes dabnet 128
bisenet_resnet18_celebamaskhq bisenet 128 | deeplabv3_resnetd50b_voc deeplabv3 96 | pspnet_resnetd50b_voc pspnet 96
sinet_cityscapes sinet 128 | lednet_cityscapes lednet 128
centernet_resnet18_voc centernet 128 | simplepose_resnet18_coco simplepose_coco 128
lwopenpose2d_mobilenet_cmupan_coco lwopenpose_cmupan 128 | lffd20x5s320v2_widerface lffd 128
"""

# Of these the ones that are told the size of their images, and those with a second head to leave out.
SIZED = "fastscnn bisenet deeplabv3 pspnet sinet centernet simplepose_coco lwopenpose_cmupan".split()  # noqa: SIM905
AUXILIARY = "fastscnn deeplabv3 pspnet".split()  # noqa: SIM905

# The side of images for networks that would want larger ones, where they take smaller.
LARGEST = 256
# Settings and inputs of those that do not look at images of three channels, or not at those alone.
OTHER: dict[str, Callable[[], tuple[dict[str, Any], Inputs]]] = {
    **dict.fromkeys(
        ("alphapose_coco", "simpleposemobile_coco"),  # whose points are found by branches on the values
        lambda: ({"return_heatmap": True}, Inputs((torch.randn(1, 3, 256, 192),))),
    ),
    "pfpcnet": lambda: ({}, Inputs((torch.randn(1, 1, 320, 240),))),
    "superpointnet": lambda: ({}, Inputs((torch.randn(1, 1, 224, 224),))),
    "nvpattexp": lambda: ({}, Inputs((torch.randn(1, 8, 16, 29), torch.full((1,), 3)))),
    "visemenet": lambda: ({}, Inputs((torch.randn(34, 8, 195), torch.full((34, 76), 3)))),
    "voca": lambda: ({}, Inputs((torch.randn(1, 1, 16, 29), torch.full((1,), 3)))),
    **dict.fromkeys(
        ("jasper", "jasperdr", "quartznet"),
        lambda: (
            {"in_channels": 64, "num_classes": 29, "from_audio": False},
            Inputs((torch.randn(1, 64, 200), torch.tensor([198]))),
        ),
    ),
}

TIMM = """
vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 swin_tiny_patch4_window7_224 convnext_atto mixer_s32_224
resmlp_12_224 coat_tiny pit_ti_224 levit_128s poolformer_s12 efficientformer_l1 mobilevit_xxs
mobilenetv4_conv_small regnety_002 resnest14d res2net50_26w_4s hrnet_w18_small nfnet_l0 ghostnetv2_100
edgenext_xx_small fastvit_t8 repvit_m0_9 tf_efficientnetv2_b0 cspdarknet53 dla34 xcit_nano_12_p16_224
beit_base_patch16_224 maxvit_nano_rw_256 gcresnet33ts visformer_tiny
""".split()  # noqa: SIM905 - a table, not code

TORCHVISION = """
alexnet vgg11_bn resnet18 resnext50_32x4d wide_resnet50_2 densenet121 googlenet inception_v3 mobilenet_v2
mobilenet_v3_small mnasnet0_5 shufflenet_v2_x0_5 squeezenet1_1 efficientnet_b0 efficientnet_v2_s
regnet_y_400mf convnext_tiny vit_b_16 swin_t swin_v2_t
""".split()  # noqa: SIM905 - a table, not code

# Transformers: the class, its configuration, and its inputs. ------------------------------------------------------

_TEXT: dict[str, Any] = {"vocab_size": 256, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
_CAUSAL: dict[str, Any] = {**_TEXT, "intermediate_size": 192, "max_position_embeddings": 64}
_PHOTO: dict[str, Any] = {
    "image_size": 64, "patch_size": 8, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 192, "num_labels": 10,
}  # fmt: skip
_WHISPER: dict[str, Any] = {
    "vocab_size": 256, "num_mel_bins": 16, "d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64,
    "max_source_positions": 32, "classifier_proj_size": 32, "num_labels": 5, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
_WAV2VEC2: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "conv_dim": (32, 32, 32), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 32, "num_labels": 5,
}  # fmt: skip
_SEGFORMER: dict[str, Any] = {
    "hidden_sizes": [16, 32, 64, 96], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
    "decoder_hidden_size": 64, "num_labels": 10,
}  # fmt: skip
_MOBILEVIT: dict[str, Any] = {
    "image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [16, 16, 24, 32, 48, 64, 128],
    "num_attention_heads": 4, "num_labels": 10,
}  # fmt: skip


def _words(count: int = 16) -> Tensor:
    return torch.randint(0, 256, (1, count))


def _photo() -> Tensor:
    return torch.randn(1, 3, 64, 64)


TRANSFORMERS: dict[str, tuple[str, dict[str, Any], Callable[[], tuple[Tensor, ...]]]] = {
    "vit": ("ViTForImageClassification", _PHOTO, lambda: (_photo(),)),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        lambda: (_photo(),),
    ),
    "bert": ("BertForSequenceClassification", {**_CAUSAL, "num_labels": 5}, lambda: (_words(),)),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 256, "n_positions": 64, "n_embd": 96, "n_layer": 3, "n_head": 4},
        lambda: (_words(),),
    ),
    "llama, grouped queries": (
        "LlamaForCausalLM",
        {**_CAUSAL, "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": False},
        lambda: (_words(),),
    ),
    "qwen2, tied": (
        "Qwen2ForCausalLM",
        {**_CAUSAL, "num_key_value_heads": 4, "tie_word_embeddings": True},
        lambda: (_words(),),
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 256, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2,
         "num_heads": 4, "decoder_start_token_id": 0},
        lambda: (_words(), torch.ones(1, 16, dtype=torch.long), _words(8)),
    ),
    "whisper": ("WhisperForAudioClassification", _WHISPER, lambda: (torch.randn(1, 16, 64),)),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 2, 1], "num_labels": 10, "image_size": 64},
        lambda: (_photo(),),
    ),
    "segformer": ("SegformerForSemanticSegmentation", _SEGFORMER, lambda: (_photo(),)),
    "mobilevit": ("MobileViTForImageClassification", _MOBILEVIT, lambda: (_photo(),)),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 256, "dim": 96, "n_layers": 2, "n_heads": 4, "hidden_dim": 192, "max_position_embeddings": 64,
         "num_labels": 5},
        lambda: (_words(),),
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {**_CAUSAL, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_key_value_heads": 2,
         "num_local_experts": 4},
        lambda: (_words(),),
    ),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", _WAV2VEC2, lambda: (torch.randn(1, 1600),)),
}  # fmt: skip

MORE: dict[str, tuple[str, dict[str, Any], Callable[[], tuple[Tensor, ...]]]] = {
    "roberta": ("RobertaForSequenceClassification", _CAUSAL, lambda: (_words(),)),
    "electra": ("ElectraForSequenceClassification", {**_CAUSAL, "embedding_size": 96}, lambda: (_words(),)),
    "albert": ("AlbertForSequenceClassification", {**_CAUSAL, "embedding_size": 48}, lambda: (_words(),)),
    "mistral": ("MistralForCausalLM", {**_CAUSAL, "num_key_value_heads": 2}, lambda: (_words(),)),
    "qwen3": ("Qwen3ForCausalLM", {**_CAUSAL, "num_key_value_heads": 2, "head_dim": 24}, lambda: (_words(),)),
    "gemma": ("GemmaForCausalLM", {**_CAUSAL, "num_key_value_heads": 2, "head_dim": 24}, lambda: (_words(),)),
    "phi": ("PhiForCausalLM", _CAUSAL, lambda: (_words(),)),
    "gpt-neox": ("GPTNeoXForCausalLM", _CAUSAL, lambda: (_words(),)),
    "opt": ("OPTForCausalLM", {**_CAUSAL, "ffn_dim": 128, "word_embed_proj_dim": 96}, lambda: (_words(),)),
    "deit": ("DeiTForImageClassification", _PHOTO, lambda: (_photo(),)),
    "dinov2": ("Dinov2ForImageClassification", _PHOTO, lambda: (_photo(),)),
}

# Constructs --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Named parts and a forward, so that a construct is one expression."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        """What the construct makes of its input."""
        return self._forward(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, groups: int = 1, stride: int = 1) -> nn.Sequential:
    """A convolution with its norm."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def pooled(s: Any, x: Tensor) -> Tensor:
    """The classifier on the mean over positions."""
    made: Tensor = s.fc(x.mean((2, 3)))
    return made


def shuffled(s: Any, x: Tensor) -> Tensor:
    """A channel shuffle with computed sizes."""
    x = s.b(s.a(x))
    n, c, h, w = x.shape
    return pooled(s, s.c(x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)))


def focus(s: Any, x: Tensor) -> Tensor:
    """Every other row and column to channels, as in YOLOv5."""
    x = s.a(x)
    parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
    return pooled(s, s.b(torch.cat(parts, 1)))


def chunked(s: Any, x: Tensor) -> Tensor:
    """Halves, of which one goes on and both are kept, as in CSP networks."""
    y = [*s.a(x).chunk(2, 1)]
    y.append(s.b(y[-1]))
    return pooled(s, s.c(torch.cat(y, 1)))


def thrice(s: Any, x: Tensor) -> Tensor:
    """One layer called three times."""
    x = s.a(x)
    for _ in range(3):
        x = F.relu(s.b(x))
    return pooled(s, x)


def encoder(s: Any, x: Tensor) -> Tensor:
    """PyTorch's own multi-head attention and a feed-forward block."""
    x = s.e(x)
    h = s.ln(x)
    x = x + s.at(h, h, h, need_weights=False)[0]
    return s.fc((x + s.f2(F.gelu(s.f1(x)))).mean(1))  # type: ignore[no-any-return]


def fused(s: Any, x: Tensor) -> Tensor:
    """Queries, keys and values from one layer, as in timm."""
    x = s.e(x)
    h = s.ln(x)
    b, n, _ = h.shape
    q, k, v = s.qkv(h).reshape(b, n, 3, s.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    x = x + s.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))
    return s.fc((x + s.f2(F.gelu(s.f1(x)))).mean(1))  # type: ignore[no-any-return]


def summed(s: Any, x: Tensor) -> Tensor:
    """Attention written with einsum."""
    a, b = s.a(x), s.b(x)
    weights = torch.einsum("bnd,bmd->bnm", a, b).softmax(-1)
    return s.fc(F.relu(s.c(torch.einsum("bnm,bmd->bnd", weights, a))).mean(1))  # type: ignore[no-any-return]


def without_gradient(s: Any, x: Tensor) -> Tensor:
    """A part that runs without gradients."""
    with torch.no_grad():
        x = s.a(x)
    return pooled(s, s.b(x))


def token(s: Any, x: Tensor) -> Tensor:
    """A class token, positions and a layer scale, all bare parameters."""
    x = torch.cat([s.cls.expand(x.shape[0], -1, -1), s.e(x)], 1) + s.pos
    return s.fc((x + s.ls * s.f2(F.gelu(s.f1(s.ln(x)))))[:, 0])  # type: ignore[no-any-return]


def mixed(s: Any, x: Tensor) -> Tensor:
    """A layer over tokens and one over channels."""
    x = s.e(x)
    x = x + s.t2(F.gelu(s.t1(x.transpose(1, 2)))).transpose(1, 2)
    return s.fc((x + s.c2(F.gelu(s.c1(x)))).mean(1))  # type: ignore[no-any-return]


def branching(s: Any, x: Tensor) -> Tensor:
    """A branch on what goes through, which no graph can hold."""
    x = s.a(x)
    return pooled(s, s.c(s.b(x) if x.mean() > -1 else x))


def excited(s: Any, x: Tensor) -> Tensor:
    """Squeeze and excitation in three dimensions."""
    x = F.relu(s.bn(s.a(x)))
    gate = torch.sigmoid(s.x(F.relu(s.r(x.mean((2, 3, 4))))))[:, :, None, None, None]
    return s.fc(F.relu(s.b(x * gate)).mean((2, 3, 4)))  # type: ignore[no-any-return]


def tied() -> nn.Module:
    """Two layers with one weight."""
    made = Net(
        lambda s, x: pooled(s, F.relu(s.c(F.relu(s.b(s.a(x)))))),
        a=conv(3, 16), b=nn.Conv2d(16, 16, 1), c=nn.Conv2d(16, 16, 1), fc=nn.Linear(16, 5),
    )  # fmt: skip
    made.c.weight = made.b.weight
    return made


def half_frozen() -> nn.Module:
    """A backbone that asks for no gradients."""
    made = Net(
        lambda s, x: pooled(s, s.c(s.b(s.a(x)))), a=conv(3, 16), b=conv(16, 24), c=conv(24, 16), fc=nn.Linear(16, 5)
    )
    for part in (made.a, made.b):
        part.requires_grad_(False)
    return made


_IMAGE, _TOKENS = (2, 3, 16, 16), (2, 7, 24)
_Made = tuple[Callable[[], nn.Module], tuple[int, ...]]
CONSTRUCTS: dict[str, _Made] = {
    "flatten": (lambda: Net(lambda s, x: s.fc(F.relu(s.h(s.a(x).flatten(1)))), a=conv(3, 16, stride=2),
        h=nn.Linear(1024, 24), fc=nn.Linear(24, 5)), _IMAGE),
    "flatten, channels last": (lambda: Net(
        lambda s, x: s.fc(F.relu(s.h(s.a(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1)))),
        a=conv(3, 16, stride=2), h=nn.Linear(1024, 24), fc=nn.Linear(24, 5)), _IMAGE),
    "channel shuffle": (lambda: Net(shuffled, a=conv(3, 16), b=conv(16, 24, 1, 4), c=conv(24, 16),
        fc=nn.Linear(16, 5)), _IMAGE),
    "pixel shuffle": (lambda: Net(lambda s, x: pooled(s, s.b(F.pixel_shuffle(s.a(x), 2))), a=conv(3, 32),
        b=conv(8, 16), fc=nn.Linear(16, 5)), _IMAGE),
    "space to depth": (lambda: Net(focus, a=conv(3, 8), b=conv(32, 16), fc=nn.Linear(16, 5)), _IMAGE),
    "chunks": (lambda: Net(chunked, a=conv(3, 16), b=conv(8, 8), c=conv(24, 16), fc=nn.Linear(16, 5)), _IMAGE),
    "one tensor twice in a cat": (lambda: Net(
        lambda s, x: pooled(s, s.c(torch.cat([y := s.a(x), F.avg_pool2d(y, 3, 1, 1)], 1))),
        a=conv(3, 16), c=conv(32, 16), fc=nn.Linear(16, 5)), _IMAGE),
    "a layer called three times": (lambda: Net(thrice, a=conv(3, 16), b=nn.Conv2d(16, 16, 3, 1, 1),
        fc=nn.Linear(16, 5)), _IMAGE),
    "a layer on two inputs": (lambda: Net(
        lambda s, x: pooled(s, s.c(torch.cat([s.b(s.a(x)), s.b(s.a2(x))], 1))),
        a=conv(3, 16), a2=conv(3, 16), b=nn.Conv2d(16, 12, 3, 1, 1), c=conv(24, 16), fc=nn.Linear(16, 5)), _IMAGE),
    "tied weights": (tied, _IMAGE),
    "functional convolution": (lambda: Net(
        lambda s, x: pooled(s, s.c(F.relu(F.conv2d(s.a(x), s.w, s.bias, padding=1)))),
        a=conv(3, 16), w=nn.Parameter(torch.randn(24, 16, 3, 3) * 0.1), bias=nn.Parameter(torch.randn(24)),
        c=conv(24, 16), fc=nn.Linear(16, 5)), _IMAGE),
    "nn.MultiheadAttention": (lambda: Net(encoder, e=nn.Linear(24, 32), ln=nn.LayerNorm(32),
        at=nn.MultiheadAttention(32, 4, batch_first=True), f1=nn.Linear(32, 64), f2=nn.Linear(64, 32),
        fc=nn.Linear(32, 5)), _TOKENS),
    "fused attention": (lambda: Net(fused, e=nn.Linear(24, 32), ln=nn.LayerNorm(32), qkv=nn.Linear(32, 96),
        proj=nn.Linear(32, 32), f1=nn.Linear(32, 64), f2=nn.Linear(64, 32), fc=nn.Linear(32, 5), num_heads=4,
        head_dim=8), _TOKENS),
    "einsum": (lambda: Net(summed, a=nn.Linear(24, 32), b=nn.Linear(24, 32), c=nn.Linear(32, 16),
        fc=nn.Linear(16, 5)), _TOKENS),
    "LSTM": (lambda: Net(lambda s, x: s.fc(F.relu(s.h(s.l(s.e(x))[0][:, -1]))), e=nn.Linear(24, 20),
        l=nn.LSTM(20, 16, batch_first=True), h=nn.Linear(16, 12), fc=nn.Linear(12, 5)), _TOKENS),
    "LSTM, two layers both ways": (lambda: Net(lambda s, x: s.fc(F.relu(s.h(s.l(s.e(x))[0].mean(1)))),
        e=nn.Linear(24, 20), l=nn.LSTM(20, 16, 2, bidirectional=True, batch_first=True), h=nn.Linear(32, 12),
        fc=nn.Linear(12, 5)), _TOKENS),
    "GRU": (lambda: Net(lambda s, x: s.fc(F.relu(s.h(s.l(s.e(x))[0].mean(1)))), e=nn.Linear(24, 20),
        l=nn.GRU(20, 16, batch_first=True), h=nn.Linear(16, 12), fc=nn.Linear(12, 5)), _TOKENS),
    "group norm, grouped convolution": (lambda: Net(
        lambda s, x: pooled(s, F.relu(s.b(F.relu(s.g(s.a(x)))))), a=nn.Conv2d(3, 16, 3), g=nn.GroupNorm(4, 16),
        b=nn.Conv2d(16, 24, 3, groups=2), fc=nn.Linear(24, 5)), _IMAGE),
    "grouped transposed convolution": (lambda: Net(lambda s, x: pooled(s, s.c(F.relu(s.u(s.a(x))))), a=conv(3, 16),
        u=nn.ConvTranspose2d(16, 24, 2, 2, groups=4), c=conv(24, 16), fc=nn.Linear(16, 5)), _IMAGE),
    "depthwise with a multiplier": (lambda: Net(lambda s, x: pooled(s, s.c(F.relu(s.d(s.a(x))))), a=conv(3, 16),
        d=nn.Conv2d(16, 32, 3, 1, 1, groups=16), c=conv(32, 16), fc=nn.Linear(16, 5)), _IMAGE),
    "gated linear unit": (lambda: Net(lambda s, x: pooled(s, s.c(F.glu(s.a(x), 1))), a=conv(3, 32), c=conv(16, 16),
        fc=nn.Linear(16, 5)), _IMAGE),
    "slices at written places": (lambda: Net(
        lambda s, x: pooled(s, s.b((y := s.a(x))[:, :10]) + s.c(y[:, 10:])),
        a=conv(3, 24), b=conv(10, 16), c=conv(14, 16), fc=nn.Linear(16, 5)), _IMAGE),
    "half frozen": (half_frozen, _IMAGE),
    "a part without gradients": (lambda: Net(without_gradient, a=conv(3, 16), b=conv(16, 24), fc=nn.Linear(24, 5)),
        _IMAGE),
    "token, positions, layer scale": (lambda: Net(token, e=nn.Linear(24, 32), cls=nn.Parameter(torch.randn(1, 1, 32)),
        pos=nn.Parameter(torch.randn(1, 8, 32)), ls=nn.Parameter(torch.randn(32)), ln=nn.LayerNorm(32),
        f1=nn.Linear(32, 64), f2=nn.Linear(64, 32), fc=nn.Linear(32, 5)), _TOKENS),
    "a parameter of channels and places": (lambda: Net(lambda s, x: pooled(s, s.b(s.a(x) * s.g)), a=conv(3, 16),
        g=nn.Parameter(torch.randn(1, 16, 16, 16)), b=conv(16, 24), fc=nn.Linear(24, 5)), _IMAGE),
    "a buffer of channels": (lambda: Net(lambda s, x: pooled(s, s.b(s.a(x) * s.m)), a=conv(3, 16),
        m=nn.Buffer(torch.randn(1, 16, 1, 1)), b=conv(16, 24), fc=nn.Linear(24, 5)), _IMAGE),
    "a written view": (lambda: Net(
        lambda s, x: s.fc(F.relu(s.b(F.adaptive_avg_pool2d(s.a(x), 2).view(-1, 64)))),
        a=conv(3, 16), b=nn.Linear(64, 24), fc=nn.Linear(24, 5)), _IMAGE),
    "a gate from a sum over channels": (lambda: Net(
        lambda s, x: pooled(s, s.b((y := s.a(x)) * torch.sigmoid(s.g(y.sum(1, keepdim=True))))),
        a=conv(3, 16), g=nn.Conv2d(1, 1, 3, 1, 1), b=conv(16, 24), fc=nn.Linear(24, 5)), _IMAGE),
    "features among the outputs": (lambda: Net(
        lambda s, x: {"features": (y := s.a(x)), "logits": pooled(s, s.b(y))},
        a=conv(3, 16), b=conv(16, 24), fc=nn.Linear(24, 5)), _IMAGE),
    "a branch on data": (lambda: Net(branching, a=conv(3, 16), b=conv(16, 16), c=conv(16, 24), fc=nn.Linear(24, 5)),
        _IMAGE),
    "weight norm": (lambda: Net(lambda s, x: pooled(s, s.c(F.relu(s.b(s.a(x))))), a=conv(3, 16),
        b=nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 24, 3)), c=conv(24, 16), fc=nn.Linear(16, 5)), _IMAGE),
    "an unused layer": (lambda: Net(lambda s, x: pooled(s, s.b(s.a(x))), a=conv(3, 16), unused=nn.Conv2d(16, 99, 1),
        b=conv(16, 24), fc=nn.Linear(24, 5)), _IMAGE),
    "one channel added to all": (lambda: Net(lambda s, x: pooled(s, s.b(s.a(x) + s.g(x))), a=conv(3, 16),
        g=nn.Conv2d(3, 1, 1), b=conv(16, 24), fc=nn.Linear(24, 5)), _IMAGE),
    "convolution, transpose, linear": (lambda: Net(
        lambda s, x: s.fc(F.relu(s.b(F.relu(s.l(F.relu(s.a(x)).transpose(1, 2))).transpose(1, 2))).mean(2)),
        a=nn.Conv1d(8, 16, 3, padding=1), l=nn.Linear(16, 20), b=nn.Conv1d(20, 12, 3), fc=nn.Linear(12, 5)),
        (2, 8, 10)),
    "mixing tokens": (lambda: Net(mixed, e=nn.Linear(24, 32), t1=nn.Linear(9, 18), t2=nn.Linear(18, 9),
        c1=nn.Linear(32, 64), c2=nn.Linear(64, 32), fc=nn.Linear(32, 5)), (2, 9, 24)),
    "excitation in three dimensions": (lambda: Net(excited, a=nn.Conv3d(3, 16, 3, padding=1), bn=nn.BatchNorm3d(16),
        r=nn.Linear(16, 4), x=nn.Linear(4, 16), b=nn.Conv3d(16, 24, 3), fc=nn.Linear(24, 5)), (1, 3, 6, 8, 8)),
}  # fmt: skip

# What is asked for -------------------------------------------------------------------------------------------------


def vision() -> dict[str, tuple[str, int]]:
    """Of the 66 networks by name the file and the side of the images."""
    found = {}
    for entry in VISION.replace("\n", " | ").split(" | "):
        if words := entry.split():
            name, file, side = (*words, words[0], "224")[:3] if len(words) != 2 else (*words, "224")
            found[name] = (file, int(side))
    return found


def families() -> list[str]:
    """``file.network`` for the first network of each of pytorchcv's files that `vision` has none of."""
    package = importlib.import_module("pytorchcv.models")
    known, found = {file for file, _ in vision().values()}, []
    for info in pkgutil.iter_modules(package.__path__):
        if info.name in known or info.name in ("common", "model_store") or info.name.startswith("_"):
            continue
        module = importlib.import_module(f"pytorchcv.models.{info.name}")
        listed = [name for name in getattr(module, "__all__", ()) if name[0].islower()]
        networks = [n for n in listed if inspect.isfunction(getattr(module, n, None)) and not n.startswith("get_")]
        if networks:
            found.append(f"{info.name}.{networks[0]}")
    return found


SETS: dict[str, Callable[[], list[str]]] = {
    "vision": lambda: list(vision()),
    "transformers": lambda: list(TRANSFORMERS),
    "constructs": lambda: list(CONSTRUCTS),
    "families": families,
    "more": lambda: list(MORE),
    "torchvision": lambda: list(TORCHVISION),
    "timm": lambda: list(TIMM),
}


def build(name: str) -> tuple[nn.Module, Inputs]:
    """A network by its name, ``set:name``, and an example of its inputs, both float32."""
    group, _, model = name.partition(":")
    return _BUILDERS[group](model)


def _pytorchcv(file: str, function: str, side: int | None) -> tuple[nn.Module, Inputs]:
    vars(np).setdefault("int", int)  # which numpy had when pytorchcv was written
    make = getattr(importlib.import_module(f"pytorchcv.models.{file}"), function)
    settings: dict[str, Any] = {"pretrained": False}
    if side is not None and file in SIZED:
        settings["in_size"] = (side, side)
    if file in AUXILIARY:
        settings["aux"] = False
    if "coco" in function and side is not None:
        settings["return_heatmap"] = True
    more, inputs = OTHER[file]() if file in OTHER else ({}, None)
    settings |= more
    known = inspect.signature(make).parameters
    if "pretrained" not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        settings = {}
    with _names_kept():
        made = make(**settings)
    if inputs is not None:
        return made, inputs
    if side is None and max(getattr(made, "in_size", (0,))) > LARGEST:
        # Which say that it takes no other size, in the end at the first pooling that nothing is left for.
        with contextlib.suppress(AssertionError, TypeError, ValueError, RuntimeError), torch.no_grad():
            smaller = make(**settings, in_size=(LARGEST, LARGEST))
            copy.deepcopy(smaller).eval()(torch.randn(1, getattr(made, "in_channels", 3), LARGEST, LARGEST))
            made, side = smaller, LARGEST
    size = (side, side) if side is not None else getattr(made, "in_size", (224, 224))
    return made, Inputs((torch.randn(1, getattr(made, "in_channels", 3), *size),))


@contextlib.contextmanager
def _names_kept() -> Iterator[None]:
    """Parts of a Sequential keep their names when one is deleted, as they did when pytorchcv was written."""
    renumbering = nn.Sequential.__delitem__

    def delete(parts: nn.Sequential, index: int) -> None:
        del parts._modules[list(parts._modules)[index]]

    nn.Sequential.__delitem__ = delete  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Sequential.__delitem__ = renumbering  # type: ignore[method-assign]


def _vision(name: str) -> tuple[nn.Module, Inputs]:
    file, side = vision()[name]
    return _pytorchcv(file, name, side)


def _family(name: str) -> tuple[nn.Module, Inputs]:
    file, _, function = name.partition(".")
    return _pytorchcv(file, function, None)


def _timm(name: str) -> tuple[nn.Module, Inputs]:
    made = importlib.import_module("timm").create_model(name, pretrained=False)
    return made, Inputs((torch.randn(1, *made.default_cfg["input_size"]),))


def _torchvision(name: str) -> tuple[nn.Module, Inputs]:
    allow_torchvision()
    settings = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    made = getattr(importlib.import_module("torchvision.models"), name)(weights=None, **settings)
    side = 299 if name == "inception_v3" else 224
    return made, Inputs((torch.randn(1, 3, side, side),))


def _transformer(table: dict[str, Any], name: str) -> tuple[nn.Module, Inputs]:
    transformers = importlib.import_module("transformers")
    kind, settings, inputs = table[name]
    config = getattr(transformers, kind).config_class(**settings)
    how = {"experts_implementation": "grouped_mm"} if "Mixtral" in kind else {}
    try:
        made = getattr(transformers, kind)._from_config(config, attn_implementation="sdpa", **how)
    except ValueError:  # not every architecture has more than its own
        made = getattr(transformers, kind)._from_config(config, attn_implementation="eager")
    for part in made.modules():
        if hasattr(getattr(part, "config", None), "use_cache"):
            part.config.use_cache = False
    return made, Inputs(inputs())


def _construct(name: str) -> tuple[nn.Module, Inputs]:
    make, shape = CONSTRUCTS[name]
    return make(), Inputs((torch.randn(shape),))


_BUILDERS: dict[str, Callable[[str], tuple[nn.Module, Inputs]]] = {
    "vision": _vision,
    "families": _family,
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": partial(_transformer, TRANSFORMERS),
    "more": partial(_transformer, MORE),
    "constructs": _construct,
}


def allow_torchvision() -> None:
    """Name the operators that torchvision would load from its binary, so that it imports beside any torch."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    names = "nms qnms roi_align roi_pool ps_roi_align ps_roi_pool deform_conv2d".split()  # noqa: SIM905
    for name in [*names, *(f"_{name}_backward" for name in names)]:
        try:
            library.define(f"{name}(Tensor x) -> Tensor")
        except RuntimeError:  # it is there
            return
    globals()["_library"] = library  # goes with the last reference to it
