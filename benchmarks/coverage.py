"""How many architectures of other libraries can be narrowed without a hint, and whether any is narrowed wrongly.

Half of the units of every group go, at random, from networks of random weights in float64; each network runs in a
process of its own. The verdict is held against the eager original, not against the captured graph: the removed slices
of its parameters are set to zero, norms are patched to take their statistics over what was kept, and the answers must
agree to 1e-6 of the largest.

Needs an environment of its own, beside this package (put the repository on PYTHONPATH):

    pip install torch pytorchcv==0.0.67 transformers
    pip install --no-deps torchvision timm        # beside a CPU build of torch

Run as

    python benchmarks/coverage.py pytorchcv:resnet18 timm:vit_tiny_patch16_224 torchvision:resnet18 transformers:Bert
    python benchmarks/coverage.py --families 40       # one network of each of 40 families of pytorchcv
    python benchmarks/coverage.py --libraries timm torchvision transformers

Verdicts: ok, wrong, frozen (no group found), refused (narrowing was an error), uncaptured (no graph), unbuilt (the
library itself could not make or run it), late (more than --seconds of CPU time).
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import json
import os
import pkgutil
import random
import resource
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor, nn

from featherweight import batch
from featherweight.batch import Inputs
from featherweight.graph import GraphError, Narrowing, capture, couple, narrow

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

SMALL: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 128,
}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("BertForSequenceClassification", SMALL),
    "Roberta": ("RobertaForSequenceClassification", {**SMALL, "max_position_embeddings": 64}),
    "Electra": ("ElectraForSequenceClassification", {**SMALL, "embedding_size": 96}),
    "Albert": ("AlbertForSequenceClassification", {**SMALL, "embedding_size": 48}),
    "Llama": ("LlamaForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    "Mistral": ("MistralForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    "Qwen3": ("Qwen3ForCausalLM", {**SMALL, "num_key_value_heads": 2, "head_dim": 24}),
    "Gemma": ("GemmaForCausalLM", {**SMALL, "num_key_value_heads": 2, "head_dim": 24}),
    "Phi": ("PhiForCausalLM", SMALL),
    "GPTNeoX": ("GPTNeoXForCausalLM", SMALL),
    "OPT": ("OPTForCausalLM", {**SMALL, "ffn_dim": 128, "word_embed_proj_dim": 96, "max_position_embeddings": 64}),
    "ViT": ("ViTForImageClassification", {**SMALL, "image_size": 64, "patch_size": 8}),
    "DeiT": ("DeiTForImageClassification", {**SMALL, "image_size": 64, "patch_size": 8}),
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


def build(name: str) -> tuple[nn.Module, Inputs]:
    """A network with random weights, and an example of its inputs."""
    library, _, model = name.partition(":")
    images = Inputs((torch.randn(1, 3, 224, 224),))
    if library == "pytorchcv":
        module, _, function = model.partition(".")
        made = _called(getattr(importlib.import_module(f"pytorchcv.models.{module}"), function or module))
        size = getattr(made, "in_size", (224, 224))
        return made, Inputs((torch.randn(1, getattr(made, "in_channels", 3), *size),))
    if library == "timm":
        timm = importlib.import_module("timm")
        made = timm.create_model(model, pretrained=False)
        return made, Inputs((torch.randn(1, *made.default_cfg["input_size"]),))
    if library == "torchvision":
        settings = {"init_weights": False} if model in ("googlenet", "inception_v3") else {}
        made = getattr(importlib.import_module("torchvision.models"), model)(weights=None, **settings)
        return made, Inputs((torch.randn(1, 3, 299, 299),)) if model == "inception_v3" else images
    if library == "transformers":
        transformers = importlib.import_module("transformers")
        kind, settings = TRANSFORMERS[model]
        config = getattr(transformers, kind).config_class(**settings)
        config.use_cache = False
        made = getattr(transformers, kind)._from_config(config)
        ids = Inputs((torch.randint(3, 128, (1, 16)),))
        return made, Inputs((torch.randn(1, 3, 64, 64),)) if "image_size" in settings else ids
    raise SystemExit(f"{name}: the libraries are pytorchcv, timm, torchvision and transformers")


def _called(function: Callable[..., nn.Module]) -> nn.Module:
    try:
        return function(pretrained=False)
    except TypeError:
        return function()


def families(count: int) -> list[str]:
    """The first network of each of pytorchcv's files, evenly spread over the alphabet."""
    package = importlib.import_module("pytorchcv.models")
    found = []
    for info in pkgutil.iter_modules(package.__path__):
        source = inspect.getsource(importlib.import_module(f"pytorchcv.models.{info.name}"))
        listed = [
            line.split("'")[1]
            for line in source.partition("__all__ = [")[2].partition("]")[0].split(",")
            if "'" in line
        ]
        functions = [name for name in listed if name[0].islower()]
        if functions and info.name not in ("common", "model_store"):
            found.append(f"pytorchcv:{info.name}.{functions[0]}")
    step = max(1.0, len(found) / count)
    return [found[int(i * step)] for i in range(min(count, len(found)))]


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Values that do not happen to be 0 or 1, of about the size they had."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        drawn = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith(("weight", "gamma"))):
            tensor.copy_(drawn + 0.5)
        else:
            spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
            tensor.add_((drawn - 0.5) * (0.1 * spread or 0.1))


@torch.no_grad()
def masked(model: nn.Module, narrowing: Narrowing) -> nn.Module:
    """The eager original with the removed slices set to zero, and its norms' statistics over what was kept."""
    model = copy.deepcopy(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, dims in narrowing.tensors.items():
        for d, kept in dims.items():
            direction = name.endswith("original1") and d == 0  # of a weight norm: its scale is zero there
            if tensors[name].is_floating_point() and not direction:
                stays = torch.zeros(tensors[name].shape[d], dtype=torch.bool)
                stays[list(kept)] = True
                tensors[name].index_fill_(d, (~stays).nonzero().reshape(-1), 0)
    for name, module in model.named_modules():
        weights = [n for n, _ in module.named_parameters(recurse=False) if f"{name}.{n}" in narrowing.tensors]
        if "Norm" in type(module).__name__ and weights and not isinstance(module, nn.modules.batchnorm._NormBase):
            kept = narrowing.tensors[f"{name}.{weights[0]}"].get(0)
            if kept is not None:
                _restrict(module, torch.tensor(kept))
    return model


def _restrict(module: Any, kept: Tensor) -> None:
    """Let a norm see only the kept slices: a copy of it, cut, between a selection and zeros."""
    inner = copy.deepcopy(module)
    count = len(next(iter(module.parameters(recurse=False))))
    for name, parameter in list(inner.named_parameters(recurse=False)):
        setattr(inner, name, nn.Parameter(parameter.detach()[kept]))
    if hasattr(inner, "normalized_shape"):
        inner.normalized_shape = (len(kept),)
    if hasattr(inner, "num_channels"):
        inner.num_channels = len(kept)
    channels_first = isinstance(module, (nn.GroupNorm, nn.InstanceNorm2d)) or "2d" in type(module).__name__
    first = channels_first or getattr(module, "data_format", "") == "channels_first"

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        d = 1 if first else x.ndim - 1
        assert x.shape[d] == count
        made = inner(x.index_select(d, kept), *args, **kwargs)
        return x.new_zeros(x.shape).to(made.dtype).index_copy(d, kept, made)

    module.forward = forward


def answers(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Every floating-point tensor in the answer; of language models the logits."""
    with torch.no_grad(), batch.plain_attention():
        made = inputs.into(model)
    made = getattr(made, "logits", made)
    return [t for t in batch.tensors_in(made) if t.is_floating_point()]


def judge(name: str, share: float, heads_only: bool) -> dict[str, Any]:
    """Narrow one network and hold it against its original."""
    record: dict[str, Any] = {"name": name}
    torch.manual_seed(0)
    try:
        model, inputs = build(name)
        model = model.eval().double()
        randomise(model)
        inputs = inputs.on(model)
        before = answers(model, inputs)
    except Exception as error:
        return {**record, "verdict": "unbuilt", "why": f"{type(error).__name__}: {error}"[:200]}
    start = time.process_time()
    try:
        trace = capture(model, inputs)
    except GraphError as error:
        return {**record, "verdict": "uncaptured", "why": str(error)[:200]}
    captured = time.process_time()
    coupling = couple(trace)
    analysed = time.process_time()
    draw = random.Random(0)
    groups = [g for g in coupling.groups if not heads_only or g.kind not in ("head dims", "slots")]
    kept = {g.name: draw.sample(range(g.size), g.size - int(g.size * share)) for g in groups}
    record |= {"seconds": {"capture": captured - start, "analysis": analysed - captured}, "groups": len(groups)}
    record["unknown"] = sorted({f"{operation}: {reason}" for operation, reason in coupling.unknown})
    if not groups:
        return {**record, "verdict": "frozen"}
    try:
        narrowed = narrow(model, coupling, kept)
    except GraphError as error:
        return {**record, "verdict": "refused", "why": str(error)[:300]}
    record["seconds"]["narrowing"] = time.process_time() - analysed
    record |= {"form": narrowed.narrowing.form, "why": narrowed.narrowing.why}
    ratio = sum(p.numel() for p in narrowed.module.parameters()) / sum(p.numel() for p in model.parameters())
    record |= {"parameters": ratio, "macs": macs(narrowed.module, inputs) / max(1, macs(model, inputs))}
    given, expected = answers(narrowed.module.eval(), inputs), answers(masked(model, narrowed.narrowing), inputs)
    same = [t.shape for t in given] == [t.shape for t in before] == [t.shape for t in expected]
    errors = [float((a - b).abs().max() / (b.abs().max() + 1e-30)) for a, b in zip(given, expected, strict=False)]
    record["error"] = max(errors, default=0.0)
    right = same and bool(given) and all(error < 1e-6 for error in errors)
    return {**record, "verdict": "ok" if right else "wrong"}


def macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-adds of convolutions, products and attention in one call."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        inputs.into(model)
    return int(counter.get_total_flops()) // 2


def main() -> None:
    """Run what was asked for, one process after the other, and print a table and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="library:network")
    parser.add_argument("--families", type=int, default=0, help="one network of each of so many families of pytorchcv")
    parser.add_argument("--libraries", nargs="*", default=[], choices=["timm", "torchvision", "transformers"])
    parser.add_argument("--share", type=float, default=0.5, help="of the units of every group, how many go")
    parser.add_argument("--heads-only", action="store_true", help="of attention, only whole heads go")
    parser.add_argument("--seconds", type=int, default=300, help="CPU time for one network")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    allow_torchvision()
    warnings.filterwarnings("ignore")
    if asked.one:
        resource.setrlimit(resource.RLIMIT_CPU, (asked.seconds, asked.seconds + 5))
        print("record:" + json.dumps(judge(asked.names[0], asked.share, asked.heads_only)))
        return
    tables = {"timm": TIMM, "torchvision": TORCHVISION, "transformers": list(TRANSFORMERS)}
    names = list(asked.names) + [f"{library}:{name}" for library in asked.libraries for name in tables[library]]
    if asked.families:
        names += families(asked.families)
    summary: Counter[str] = Counter()
    for name in names:
        call = [sys.executable, __file__, name, "--one", "--share", str(asked.share), "--seconds", str(asked.seconds)]
        ran = subprocess.run(call + ["--heads-only"] * asked.heads_only, capture_output=True, text=True, check=False)
        line = next((text for text in ran.stdout.splitlines() if text.startswith("record:")), "")
        late = {"name": name, "verdict": "late" if ran.returncode < 0 else "crashed", "why": ran.stderr[-200:]}
        record = json.loads(line.removeprefix("record:")) if line else late
        summary[record["verdict"] + (f" ({record['form']} form)" if record["verdict"] == "ok" else "")] += 1
        seconds = " ".join(f"{k} {v:.1f}" for k, v in record.get("seconds", {}).items())
        numbers = f"macs {record.get('macs', 0):.2f} params {record.get('parameters', 0):.2f}"
        numbers += f" error {record.get('error', 0):.0e}"
        note = record.get("why", "") if record["verdict"] != "ok" or record["form"] == "graph" else ""
        unknown = "; ".join(record.get("unknown", []))[:160]
        print(
            f"{name:44} {record['verdict']:10} {record.get('form', ''):6} {numbers} {seconds} {note} {unknown}",
            flush=True,
        )
    print(dict(summary))


if __name__ == "__main__":
    main()
