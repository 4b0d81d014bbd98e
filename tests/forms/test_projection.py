"""Attention's projections are reached by all that changes values alone, though no layer of them is called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight import prune, quantize, share
from featherweight.forms import constrained_tensors


class Net(nn.Module):
    """An encoder, and attention to inputs of other widths: (n, 5, 16), (n, 4, 12), (n, 4, 8) → (n, 3)."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.cross = nn.MultiheadAttention(16, 2, kdim=12, vdim=8, batch_first=True)
        self.unused = nn.MultiheadAttention(16, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        x = self.encoder(x)
        return self.head((x + self.cross(x, keys, values, need_weights=False)[0]).mean(1))


OWN = (
    "encoder.layers.0.self_attn.in_proj_weight",
    "cross.q_proj_weight",
    "cross.k_proj_weight",
    "cross.v_proj_weight",
)
ALL = {*OWN, "encoder.layers.0.self_attn.out_proj.weight", "cross.out_proj.weight"}


def inputs(samples: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(samples, *shape, generator=generator) for shape in ((5, 16), (4, 12), (4, 8)))


def made() -> Net:
    torch.manual_seed(3)
    return Net().eval()


def train(model: nn.Module, epochs: float) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
    optimizer.zero_grad()
    model(*inputs(16, seed=2)).square().mean().backward()
    optimizer.step()


def task(data: bool = True) -> fw.Task:
    given = {"calibration": [inputs(16, seed) for seed in range(4)]} if data else {}
    return fw.Task(inputs(2), train=train, **given)


def value(model: nn.Module, name: str) -> Tensor:
    owner, _, tensor = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(owner), tensor)
    return found.detach()


def confined(model: nn.Module) -> set[str]:
    return {f"{name}.{tensor}" for name, _, tensor in constrained_tensors(model)}


def answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(*inputs(8, seed=9))
    return found


def assert_as_by_hand(compressed: nn.Module, model: nn.Module) -> None:
    """The network answers what the original does with every changed weight written into it, fused kernels and all."""
    reference = copy.deepcopy(model)
    changed = confined(compressed) | {name for name, _ in model.named_parameters() if name.endswith("bias")}
    with torch.no_grad():
        for name in changed:
            value(reference, name).copy_(value(compressed, name))
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.allclose(answers(compressed), answers(reference), atol=1e-6)


STEPS: dict[str, tuple[Any, bool]] = {
    "nearest": (quantize.Weights(bits=4, effort="nearest"), False),
    "gptq": (quantize.GPTQ(bits=4), True),
    "adaround": (quantize.AdaRound(bits=4, steps=5), True),
    "brecq": (quantize.BRECQ(bits=4, steps=5), True),
    "greedy": (quantize.GPTQ(budget=fw.Budget(bytes=0.45), select="greedy", offer=(8, 4)), True),
    "kmeans": (share.KMeans(bits=3), True),
    "ternary": (quantize.Ternary(), False),
    "wanda": (prune.Wanda(sparsity=0.5), True),
    "obs": (prune.OBS(n=2), True),
    "n of m": (prune.NM(n=2), False),
    "taylor": (prune.Magnitude(sparsity=0.5, score="taylor"), True),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_that_change_values_reach_attentions_weights(name: str) -> None:
    step, data = STEPS[name]
    model = made()
    before = copy.deepcopy(model.state_dict())
    compressed = fw.Recipe(step).run(model, task(data))
    assert confined(compressed.model) >= ALL if name != "greedy" else OWN[0] in confined(compressed.model)
    assert not confined(compressed.model) & {"unused.in_proj_weight", "unused.out_proj.weight"}
    assert compressed.ledger.steps[0].left["unused.in_proj_weight"] == "the example never multiplies by it"
    assert_as_by_hand(compressed.model, model)
    state = model.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[key], before[key]) for key in before)
    assert type(model.cross) is nn.MultiheadAttention


def test_small_weights_go_and_those_that_stay_are_as_they_were(tmp_path: Any) -> None:
    model = made()
    compressed = fw.Recipe(prune.Magnitude(sparsity={"*_proj_weight": 0.5})).run(model, task(False))
    assert confined(compressed.model) == set(OWN)
    for name in OWN:
        weight = value(model, name)
        limit = weight.abs().flatten().sort().values[weight.numel() // 2]
        assert torch.equal(value(compressed.model, name), torch.where(weight.abs() >= limit, weight, 0))
    gone = sum(value(model, name).numel() // 2 for name in OWN)
    assert compressed.ledger.steps[0].before.total.params - compressed.ledger.steps[0].after.total.params == gone
    compressed.save(tmp_path / "pruned.fw")
    loaded = fw.load(tmp_path / "pruned.fw", Net()).model
    assert torch.equal(answers(loaded), answers(compressed.model))
    with fw.open(tmp_path / "pruned.fw") as file:
        assert torch.equal(file[OWN[0]], value(compressed.model, OWN[0]))


def test_four_bits_round_to_the_nearest_and_are_counted_and_written_as_four_bits(tmp_path: Any) -> None:
    model = made()
    step = quantize.Weights(bits={"*_proj_weight": 4}, effort="nearest", ranges="min-max")
    compressed = fw.Recipe(step).run(model, task(False))
    saved = 0
    for name in OWN:
        weight, now = value(model, name), value(compressed.model, name)
        steps = torch.maximum(weight.amax(1) / 7, -weight.amin(1) / 8)
        assert bool(((now - weight).abs() <= 0.52 * steps[:, None]).all())
        assert max(len(row.unique()) for row in now) <= 16
        saved += 4 * weight.numel() - weight.numel() // 2 - 4 * len(weight)
    before, after = compressed.ledger.steps[0].before.total, compressed.ledger.steps[0].after.total
    assert before.bytes - after.bytes == saved
    compressed.save(tmp_path / "rounded.fw")
    fw.Recipe(quantize.Weights(bits={"head": 8})).run(model, task(False)).save(tmp_path / "plain.fw")
    written = (tmp_path / "plain.fw").stat().st_size - (tmp_path / "rounded.fw").stat().st_size
    assert written > 0.7 * saved  # other floats are not written plainly either
    assert torch.equal(answers(fw.load(tmp_path / "rounded.fw", Net()).model), answers(compressed.model))


def test_steps_stand_on_each_other_and_train() -> None:
    model = made()
    steps = (
        prune.Magnitude(sparsity=0.25, schedule="gradual", rounds=2, epochs=1),
        prune.Movement(sparsity=0.5, rounds=2, epochs=1),
        quantize.RateDistortion(coarseness=0.3),
    )
    compressed = fw.Recipe(*steps).run(model, task())
    assert confined(compressed.model) >= ALL
    for name in OWN:
        assert int(value(compressed.model, name).count_nonzero()) <= value(model, name).numel() // 2
    again = copy.deepcopy(compressed.model)
    assert torch.equal(answers(again), answers(compressed.model))
    assert "unused.in_proj_weight" in compressed.ledger.steps[2].left


def test_attention_that_is_the_whole_model(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(16, 2, batch_first=True).eval(), torch.randn(4, 5, 16)
    compressed = fw.Recipe(quantize.Weights(bits=4)).run(model, fw.Task((x, x, x), calibration=[(x, x, x)]))
    assert [name for name, _, _ in constrained_tensors(compressed.model)] == ["", "out_proj"]
    compressed.save(tmp_path / "attention.fw")
    loaded = fw.load(tmp_path / "attention.fw", nn.MultiheadAttention(16, 2, batch_first=True)).model
    assert torch.equal(loaded(x, x, x)[0], compressed.model(x, x, x)[0])


def test_onnx_runtime_answers_as_the_model_does(tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    compressed = fw.Recipe(prune.Magnitude(sparsity=0.5), quantize.Weights(bits=8)).run(made(), task())
    whole = fw.Recipe(quantize.Weights(bits={"head": 8})).run(made(), task())
    # Exporting holds the runtime's answers against the model's, and raises where they differ.
    for name, result in (("small", compressed), ("whole", whole)):
        result.export("onnx", tmp_path / f"{name}.onnx")
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("whole", "small")]
    attention = sum(value(made(), name).numel() for name in ALL)
    assert sizes[0] - sizes[1] > 2 * attention


def test_rounding_by_the_data_loses_less() -> None:
    """Inputs of queries, keys and values are known, so errors go where they do no harm."""
    model = made()
    narrow = torch.randn(4, 12, generator=torch.Generator().manual_seed(4))

    def batch(seed: int) -> tuple[Tensor, ...]:
        x, keys, values = inputs(32, seed)
        return x, keys[..., :4] @ narrow, values

    names = {"cross.?_proj_weight": 3}
    task = fw.Task(batch(0), calibration=[batch(seed) for seed in range(4)])
    lost = {}
    for effort in ("nearest", "gptq"):
        rounded = fw.Recipe(quantize.Weights(bits=names, effort=effort)).run(model, task)
        keys = batch(9)[1]
        wanted = keys @ value(model, "cross.k_proj_weight").T
        lost[effort] = float((keys @ value(rounded.model, "cross.k_proj_weight").T - wanted).square().mean())
    assert lost["gptq"] < 0.6 * lost["nearest"]
