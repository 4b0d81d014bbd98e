"""How many architectures can be narrowed without a hint, whether any is narrowed wrongly, and Torch-Pruning beside it.

Half of the units of every group go, at random, from networks of random weights. The verdict knows nothing of how a
network was narrowed: every weight is another number, so what was kept is found by value; the removed slices of the
eager original are set to zero, its norms take their statistics over what was kept, what stays of a weight under a
weight norm is as it was, and the answers must agree to 1e-9 of the largest in float64 and to 1e-4 in float32.
Torch-Pruning is judged alike (local, half of every group, L2); it is told which layers make the network's outputs,
which it does not find out.

Needs an environment of its own, beside this package (put the repository on PYTHONPATH):

    pip install torch numpy pytorchcv==0.0.67 transformers torch-pruning
    pip install --no-deps torchvision timm        # beside a CPU build of torch

Run as

    python benchmarks/coverage.py                              # every set, hours; goes on where it was interrupted
    python benchmarks/coverage.py --sets constructs timm       # some of them
    python benchmarks/coverage.py --names vision:resnet18 timm:vit_tiny_patch16_224 --again
    python benchmarks/coverage.py --write                      # and keep the tables

Every network runs in a process of its own, for no longer than --seconds of CPU time. Verdicts: ok; wrong (answers
differ); frozen (no group found); refused (narrowing was an error); uncaptured (no graph: torch.export could not);
unbuilt (the library itself could not make or run it); late. Of Torch-Pruning also: error, and width (an output's).
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import os
import random
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import zoo
from results import publish
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from featherweight import batch
from featherweight.batch import Inputs
from featherweight.graph import GraphError, capture, couple, narrow

RECORDS = Path(__file__).resolve().parents[1] / "data" / "benchmarks" / "coverage.jsonl"
DOUBLE, SINGLE = 1e-9, 1e-4
PEER_SECONDS = 30  # of CPU time; in what it handles Torch-Pruning takes a few
PEER_SETS = ("vision", "transformers", "more", "constructs", "torchvision", "timm")
WEIGHT_NORMS = (("original1", "original0"), ("weight_v", "weight_g"))  # how direction and length are called
Record = dict[str, Any]

# The original without what was removed -------------------------------------------------------------------------------


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Values that are all different and do not happen to be 0 or 1, of about the size they had."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        drawn = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith(("weight", "gamma"))):
            tensor.copy_(drawn + 0.5)
        elif isinstance(tensor, nn.Parameter) or name.endswith("running_mean"):
            spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
            tensor.add_((drawn - 0.5) * (0.1 * spread or 0.1))


def kept_of(whole: Tensor, part: Tensor) -> list[Tensor] | None:
    """Along each dimension the indices of `whole` that `part` is made of; None where it is no part of it."""
    if whole.ndim != part.ndim or not part.numel():
        return None
    if whole.shape == part.shape and torch.equal(whole, part):
        return [torch.arange(n) for n in whole.shape]
    values, order = whole.flatten().sort()
    found = []
    for d in range(whole.ndim):
        line = part[tuple(slice(None) if e == d else 0 for e in range(whole.ndim))].contiguous()
        at = torch.searchsorted(values, line).clamp(max=len(values) - 1)
        if not torch.equal(values[at], line):
            return None
        found.append(order[at] // math.prod(whole.shape[d + 1 :]) % whole.shape[d])
    cut = whole
    for d, indices in enumerate(found):
        cut = cut.index_select(d, indices)
    return found if torch.equal(cut, part) else None


@torch.no_grad()
def masked(model: nn.Module, narrowed: nn.Module) -> nn.Module:
    """A copy of the eager original with the removed slices set to zero, and norms that see only what was kept.

    Raises:
        ValueError: a parameter of the narrowed network is no part of the original's.
    """
    model, parts = copy.deepcopy(model), dict(narrowed.named_parameters())
    kept: dict[str, list[Tensor]] = {}
    lengths: dict[str, Tensor] = {}  # of weight norms, that were changed, with the directions as they were
    for name, whole in model.named_parameters():
        if name not in parts:
            continue  # of the graph form, a parameter that nothing uses
        found = kept_of(whole, parts[name].detach())
        if found is None and _direction_of(name) is not None:
            lengths[name] = model.get_parameter(str(_direction_of(name))).clone()
            continue
        if found is None and whole.ndim > 1:  # in other places in every group of a grouped convolution
            whole.copy_(_scattered(name, whole, parts[name].detach()))
            continue
        if found is None:
            raise ValueError(f"{name} {tuple(parts[name].shape)} is no part of {tuple(whole.shape)}")
        kept[name] = found
    for name, found in kept.items():
        whole = model.get_parameter(name)
        stays = torch.ones(whole.shape, dtype=torch.bool)
        for d, indices in enumerate(found):
            # Of a weight norm the scale is zero where a slice went: a direction of zeros would be 0 / 0.
            if len(indices) < whole.shape[d] and not _direction(model, name, d):
                gone = torch.ones(whole.shape[d], dtype=torch.bool)
                gone[indices] = False
                stays.index_fill_(d, gone.nonzero().flatten(), False)
        whole.mul_(stays)
    for name, before in lengths.items():  # weights that stay are as they were, whatever the norm was over
        direction, scale = str(_direction_of(name)), model.get_parameter(name)
        over = [d for d in range(scale.ndim) if scale.shape[d] == 1]
        left, first = (v.square().sum(over, keepdim=True).sqrt() for v in (model.get_parameter(direction), before))
        scale.mul_(left / first)
        for d in set(range(scale.ndim)) - set(over):
            gone = torch.ones(scale.shape[d], dtype=torch.bool)
            gone[kept[direction][d]] = False
            scale.index_fill_(d, gone.nonzero().flatten(), 0)
    for name, module in list(model.named_modules()):
        own = [n for n, _ in module.named_parameters(recurse=False) if f"{name}.{n}" in kept]
        if "Norm" in type(module).__name__ and own and not isinstance(module, nn.modules.batchnorm._NormBase):
            (indices, *_), count = kept[f"{name}.{own[0]}"], len(module.get_parameter(own[0]))
            if module.get_parameter(own[0]).ndim == 1 and len(indices) < count:
                model.set_submodule(name, _Restricted(module, indices))
    return model


def _scattered(name: str, whole: Tensor, part: Tensor) -> Tensor:
    values, order = whole.flatten().sort()
    at = torch.searchsorted(values, part.flatten()).clamp(max=len(values) - 1)
    if not torch.equal(values[at], part.flatten()):
        raise ValueError(f"{name} {tuple(part.shape)} is no part of {tuple(whole.shape)}")
    stays = torch.zeros(whole.numel(), dtype=torch.bool)
    stays[order[at]] = True
    return whole * stays.reshape(whole.shape)


def _direction(model: nn.Module, name: str, dim: int) -> bool:
    """Whether a parameter is the direction of a weight norm, and its scale runs along this dimension."""
    for direction, scale in WEIGHT_NORMS:
        if name.endswith(direction):
            return bool(model.get_parameter(name.removesuffix(direction) + scale).shape[dim] > 1)
    return False


def _direction_of(name: str) -> str | None:
    """The direction of a weight norm whose length is a parameter of this name."""
    for direction, length in WEIGHT_NORMS:
        if name.endswith(length):
            return name.removesuffix(length) + direction
    return None


class _Restricted(nn.Module):
    """A norm that sees only the kept slices: a copy of it, cut, between a selection and zeros."""

    def __init__(self, norm: Any, kept: Tensor) -> None:
        super().__init__()
        self.inner, self.kept = copy.deepcopy(norm), kept
        for name, parameter in list(self.inner.named_parameters(recurse=False)):
            setattr(self.inner, name, nn.Parameter(parameter.detach()[kept]))
        if hasattr(self.inner, "normalized_shape"):
            self.inner.normalized_shape = (len(kept),)
        if hasattr(self.inner, "num_channels"):
            self.inner.num_channels = len(kept)
        planes = isinstance(norm, (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)) or "2d" in type(norm).__name__
        self.first = planes or getattr(norm, "data_format", "") == "channels_first"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The norm's answer, with zeros where slices went."""
        d = 1 if self.first else x.ndim - 1
        made = self.inner(x.index_select(d, self.kept), *args, **kwargs)
        zeros: Tensor = made.new_zeros(x.shape).index_copy(d, self.kept, made)
        return zeros


# The verdict ---------------------------------------------------------------------------------------------------------


def answers(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Every floating-point tensor in the answer; of language models the logits."""
    with torch.no_grad(), batch.plain_attention():
        made = inputs.into(model)
    return [t for t in batch.tensors_in(_plain(made)) if t.is_floating_point()]


def distance(given: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, as a share of the largest value; infinite where something is not finite."""
    worst = 0.0
    for one, other in zip(given, expected, strict=True):
        error = float((one - other).abs().max() / (other.abs().max() + 1e-30))
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def in_single(model: nn.Module) -> nn.Module:
    """The network in float32; of a captured graph, the types written in it too."""
    made = copy.deepcopy(model).float()
    if isinstance(made, fx.GraphModule):
        for node in made.graph.nodes:
            node.args, node.kwargs = pytree.tree_map(
                lambda leaf: torch.float32 if leaf is torch.float64 else leaf, (node.args, node.kwargs)
            )
        made.recompile()
    return made


def judged(model: nn.Module, narrowed: nn.Module, inputs: Inputs) -> Record:
    """How a narrowed network compares with the original."""
    given = answers(narrowed.eval(), inputs)
    try:
        reference = masked(model, narrowed)
        expected = answers(reference, inputs)
    except (AssertionError, ValueError) as error:
        return {"verdict": "wrong", "why": str(error)[:200]}
    if [t.shape for t in given] != [t.shape for t in expected] or not given:
        return {"verdict": "width", "why": f"the answer is {[list(t.shape) for t in given]}"}
    record: Record = {"error": distance(given, expected)}
    single = Inputs(*pytree.tree_map(_singled, (inputs.args, dict(inputs.kwargs))))
    small = in_single(narrowed)
    made = [t for t in batch.tensors_in(_plain(single.into(small))) if t.is_floating_point()]
    record["error32"] = distance([t.detach() for t in made], answers(in_single(reference), single))
    if learned := [t for t in made if t.requires_grad]:
        sum(t.sum() for t in learned).backward()  # type: ignore[union-attr]
    record["trains"] = any(p.grad is not None for p in small.parameters())
    count = [sum(p.numel() for p in one.parameters()) for one in (model, narrowed)]
    record |= {"params": count[1] / max(1, count[0]), "macs": macs(narrowed, inputs) / max(1, macs(model, inputs))}
    right = record["error"] < DOUBLE and record["error32"] < SINGLE
    return {**record, "verdict": "ok" if right else "wrong"}


def _singled(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _plain(made: Any) -> Any:
    return getattr(made, "logits", made)


def macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-adds of convolutions, products and attention in one call, counted without computing anything."""
    model = copy.deepcopy(model).requires_grad_(False)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, FlopCounterMode(display=False) as counter:
            args, kwargs = pytree.tree_map_only(Tensor, fake.from_tensor, (inputs.args, dict(inputs.kwargs)))
            model(*args, **kwargs)
    except Exception:  # lengths that depend on values are only known once they are computed
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            inputs.into(model)
    return int(counter.get_total_flops()) // 2


# The tools -----------------------------------------------------------------------------------------------------------


def featherweight(model: nn.Module, inputs: Inputs, share: float, record: Record) -> nn.Module | None:
    """Narrow a network by this package; what it took and why something was left go into the record."""
    start = time.process_time()
    try:
        trace = capture(model, inputs)
    except GraphError as error:
        answers(model, inputs)  # which is an error of another kind where the library's own code cannot run
        record |= {"verdict": "uncaptured", "why": str(error)[:300]}
        return None
    captured = time.process_time()
    coupling = couple(trace)
    draw = random.Random(0)
    kept = {g.name: sorted(draw.sample(range(g.size), g.size - int(g.size * share))) for g in coupling.groups}
    outputs = [n for (n, d), why in coupling.frozen.items() if d == 0 and "network's output" in str(why)]
    record["protected"] = [name.rpartition(".")[0] for name in outputs]
    record["groups"] = len(kept)
    record["unknown"] = sorted({f"{operation}: {reason}" for operation, reason in coupling.unknown})
    record["capture"], analysed = captured - start, time.process_time()
    if not kept:
        why = next((str(reason) for reason in coupling.frozen.values()), "")
        record |= {"verdict": "frozen", "why": why}
        return None
    try:
        made = narrow(model, coupling, kept)
    except GraphError as error:
        record |= {"verdict": "refused", "why": str(error)[:300]}
        return None
    record["seconds"] = time.process_time() - captured
    record["analysis"] = analysed - captured
    record |= {"form": made.narrowing.form, "why": made.narrowing.why}
    return made.module


def torch_pruning(model: nn.Module, inputs: Inputs, share: float, record: Record) -> nn.Module | None:
    """Narrow a network by Torch-Pruning, which is told the layers whose outputs are the network's."""
    tp = importlib.import_module("torch_pruning")
    names = set(record["protected"])
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))}
    ignored = [m for n, m in layers.items() if n in names] or list(layers.values())[-1:]
    start = time.process_time()
    pruner = tp.pruner.BasePruner(
        model,
        inputs.args,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=share,
        ignored_layers=ignored,
        output_transform=lambda made: batch.tensors_in(getattr(made, "logits", made)),
        in_channel_groups={},
        out_channel_groups={},
    )
    pruner.step()
    record["seconds"] = time.process_time() - start
    return model


TOOLS: dict[str, Callable[[nn.Module, Inputs, float, Record], nn.Module | None]] = {
    "featherweight": featherweight,
    "torch-pruning": torch_pruning,
}


def run(name: str, tool: str, share: float, protected: Sequence[str]) -> Record:
    """One network narrowed by one tool."""
    record: Record = {"protected": list(protected)}
    torch.manual_seed(0)
    try:
        model, inputs = zoo.build(name)
        model = model.eval().double()
        randomise(model)
        inputs = inputs.on(model)
        with torch.no_grad():
            inputs.into(copy.deepcopy(model))
    except Exception as error:
        return {**record, "verdict": "unbuilt", "why": f"{type(error).__name__}: {error}"[:200]}
    try:
        narrowed = TOOLS[tool](copy.deepcopy(model), inputs, share, record)
        return record if narrowed is None else {**record, **judged(model, narrowed, inputs)}
    except Exception as error:
        return {**record, "verdict": "error", "why": f"{type(error).__name__}: {error}"[:200]}


def forked(name: str, tool: str, share: float, protected: Sequence[str], seconds: int) -> Record:
    """The same in a process of its own, for so much CPU time."""
    with tempfile.NamedTemporaryFile("r") as out:
        child = os.fork()
        if not child:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            try:
                made = run(name, tool, share, protected)
            except BaseException as error:
                made = {"verdict": "error", "why": repr(error)[:200]}
            Path(out.name).write_text(json.dumps(made))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        text = out.read()
    if text:
        return dict(json.loads(text))
    late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (9, 24)
    return {"verdict": "late" if late else "error", "why": f"status {status}"}


# The tables ----------------------------------------------------------------------------------------------------------


def median(values: Sequence[float]) -> str:
    """Of some numbers, as a table has it."""
    return f"{statistics.median(values):.2f}" if values else "–"


def tables(records: Mapping[tuple[str, str], Record], names: Mapping[str, Sequence[str]]) -> list[str]:
    """A row a set, those that were not narrowed with the reason, and a row a network."""
    lines = [
        "Verdicts of Featherweight. MACs and parameters left are medians over networks that are ok.",
        "",
        (
            "| set | networks | ok | module form | frozen | uncaptured | unbuilt | refused, late, error | **wrong** "
            "| MACs left | parameters | capture s | the rest s: median, most |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group, members in names.items():
        mine = [records[f"{group}:{n}", "featherweight"] for n in members]
        count, ok = Counter(r["verdict"] for r in mine), [r for r in mine if r["verdict"] == "ok"]
        module = sum(r["form"] == "module" for r in ok)
        seconds = [r["seconds"] for r in ok]
        lines.append(
            f"| {group} | {len(mine)} | {count['ok']} | {module} ({module / max(1, len(ok)):.0%}) | {count['frozen']} "
            f"| {count['uncaptured']} | {count['unbuilt']} | {count['refused'] + count['late'] + count['error']} "
            f"| {count['wrong'] + count['width']} | {median([r['macs'] for r in ok])} "
            f"| {median([r['params'] for r in ok])} | {median([r['capture'] for r in ok])} "
            f"| {median(seconds)}, {max(seconds, default=0):.1f} |"
        )
    every = [records[f"{g}:{n}", "featherweight"] for g, members in names.items() for n in members]
    able = [r for r in every if r["verdict"] not in ("unbuilt", "uncaptured")]
    ok = [r for r in able if r["verdict"] == "ok"]
    form = sum(r["form"] == "module" for r in ok)
    lines += [
        "",
        (
            f"Together: {len(ok)} of {len(able)} that torch.export captures, {form / max(1, len(ok)):.1%} of them in "
            f"module form; gradients reach the parameters of {sum(r['trains'] for r in ok)}. Largest error of those in "
            f"float64 {max(r['error'] for r in ok):.0e}, in float32 {max(r['error32'] for r in ok):.0e}."
        ),
        "",
        "## Torch-Pruning on the same networks",
        "",
        (
            "| set | networks | ok | unchanged | error | late | **wrong, or an output's width** "
            "| MACs left, both ok: Featherweight, Torch-Pruning |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for group, members in ((g, m) for g, m in names.items() if g in PEER_SETS):
        run = [name for name in members if (f"{group}:{name}", "torch-pruning") in records]
        both = [tuple(records[f"{group}:{n}", tool] for tool in TOOLS) for n in run]
        theirs = [t for _, t in both if t["verdict"] != "unbuilt"]
        good = [t for t in theirs if t["verdict"] == "ok"]
        changed = [t for t in good if t["macs"] < 0.98 or t["params"] < 0.98]
        count = Counter(t["verdict"] for t in theirs)
        pairs = [(m, t) for m, t in both if m["verdict"] == "ok" and t in changed]
        lines.append(
            f"| {group} | {len(theirs)} | {len(changed)} | {len(good) - len(changed)} | {count['error']} "
            f"| {count['late']} | {count['wrong']}, {count['width']} "
            f"| {median([m['macs'] for m, _ in pairs])}, {median([t['macs'] for _, t in pairs])} |"
        )
    lines += ["", "## Not narrowed, or not as a whole", "", "| network | verdict | reason |", "|---|---|---|"]
    for group, members in names.items():
        for name in members:
            record = records[f"{group}:{name}", "featherweight"]
            if record["verdict"] != "ok":
                why = record.get("why", "").replace("|", "\\|").replace("\n", " ")
                lines.append(f"| {group}:{name} | {record['verdict']} | {why} |")
    unknown = Counter(u.partition(" (")[0] for r in every for u in r.get("unknown", []))
    lines += ["", "## Operations that no rule covered, and in how many networks", ""]
    lines += [f"- {text}: {count}" for text, count in unknown.most_common()] or ["None."]
    lines += [
        "",
        "## Network by network",
        "",
        (
            "| network | verdict, form | groups | MACs left | parameters | error | in float32 | capture s | the rest s "
            "| Torch-Pruning | MACs left | s |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group, members in names.items():
        for name in members:
            mine, theirs = (records.get((f"{group}:{name}", tool), {"verdict": "–"}) for tool in TOOLS)
            lines.append(
                f"| {group}:{name} | {mine['verdict']} {mine.get('form', '')} | {mine.get('groups', '–')} "
                f"| {_number(mine, 'macs', '.3f')} | {_number(mine, 'params', '.3f')} "
                f"| {_number(mine, 'error', '.0e')} | {_number(mine, 'error32', '.0e')} "
                f"| {_number(mine, 'capture', '.1f')} "
                f"| {_number(mine, 'seconds', '.1f')} | {theirs['verdict']} | {_number(theirs, 'macs', '.3f')} "
                f"| {_number(theirs, 'seconds', '.1f')} |"
            )
    return lines


def _number(record: Record, key: str, form: str) -> str:
    return format(record[key], form) if key in record else "–"


def _said(key: tuple[str, str], record: Record) -> str:
    """A record as it comes: the whole takes hours."""
    numbers = " ".join(_number(record, key, ".1e") for key in ("macs", "error", "error32", "capture", "seconds"))
    plain = record["verdict"] == "ok" and record.get("form") != "graph"
    why = "" if plain else str(record.get("why", ""))
    unknown = "; ".join(record.get("unknown", []))[:200]
    return f"{key[0]:44} {key[1]:14} {record['verdict']:10} {record.get('form', ''):6} {numbers} {why} {unknown}"


def main(asked: argparse.Namespace) -> None:
    """Run what was asked for and is not on record, and print the tables."""
    warnings.filterwarnings("ignore")
    zoo.allow_torchvision()
    for library in ("torch_pruning", "transformers", "torchvision.models", "timm", "pytorchcv.models.common"):
        importlib.import_module(library)  # once, before every process forks off
    names = {group: zoo.SETS[group]() for group in asked.sets}
    if asked.names:
        names = {}
        for whole in asked.names:
            group, _, name = whole.partition(":")
            names.setdefault(group, []).append(name)
    RECORDS.parent.mkdir(parents=True, exist_ok=True)
    records: dict[tuple[str, str], Record] = {}
    if RECORDS.is_file():
        for line in RECORDS.read_text(encoding="utf-8").splitlines():
            key, tool, record = json.loads(line)
            records[key, tool] = record
    for group, members in ({} if asked.recorded else names).items():
        for name in members:
            for tool in TOOLS if group in PEER_SETS else ("featherweight",):
                key = (f"{group}:{name}", tool)
                known = records.get(key)
                if known is not None and not (asked.again and tool == asked.tool):
                    continue
                protected = records.get((f"{group}:{name}", "featherweight"), {}).get("protected", [])
                limit = asked.seconds if tool == "featherweight" else PEER_SECONDS
                records[key] = forked(*key, asked.share, protected, limit)
                with RECORDS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([*key, records[key]]) + "\n")
                print(_said(key, records[key]), file=sys.stderr, flush=True)
    lines = [f"{sum(map(len, names.values()))} networks were asked for."]
    if asked.recorded:  # where time was short
        names = {g: [n for n in members if (f"{g}:{n}", "featherweight") in records] for g, members in names.items()}
        lines.append(f"{sum(map(len, names.values()))} of them have been run so far.")
    publish("coverage", __doc__ or "", [*lines, "", *tables(records, names)], asked.write)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(zoo.SETS), default=list(zoo.SETS), help="default: all")
    parser.add_argument("--names", nargs="+", help="set:name, instead of whole sets")
    parser.add_argument("--again", action="store_true", help="also what is on record already")
    parser.add_argument("--tool", default="featherweight", choices=list(TOOLS), help="whose records --again makes anew")
    parser.add_argument("--share", type=float, default=0.5, help="of the units of every group, how many go")
    parser.add_argument("--seconds", type=int, default=200, help="CPU time for one network")
    parser.add_argument("--recorded", action="store_true", help="run nothing, and show what is on record")
    parser.add_argument("--write", action="store_true", help="also keep the tables in benchmarks/results")
    given = parser.parse_args()
    if given.write and (given.names or set(given.sets) != set(zoo.SETS)):
        parser.error("--write keeps the tables of all sets, so give no --sets or --names with it")
    main(given)
