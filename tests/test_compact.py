"""Width and resolution multipliers: what they cost, what they keep, and what cannot be looked at in another size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, assert_same_state, make, task_of
from torch import Tensor, nn

import featherweight as fw
from featherweight import prune
from featherweight.batch import as_inputs
from featherweight.compact import Resized
from featherweight.cost.count import profile
from featherweight.errors import TaskError
from featherweight.score import Divergence


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 4)).eval()


IMAGES = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_every_width_is_multiplied():
    model = make(NETWORKS["residual"])
    before = {n: m.weight.shape[0] for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    state = {n: t.clone() for n, t in model.state_dict().items()}
    small = fw.widen(model, task_of(model), 0.5)
    after = {n: m.weight.shape[0] for n, m in small.model.named_modules() if isinstance(m, nn.Conv2d)}
    assert after == {name: width // 2 for name, width in before.items()}
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert small.ledger.after.total.macs < 0.3 * small.ledger.before.total.macs


def test_the_best_channels_stay():
    model = make(NETWORKS["residual"])
    task = task_of(model)
    lost = Divergence(model, task)
    chosen = lost(fw.widen(model, task, 0.75).model)
    assert chosen < lost(fw.compress(model, prune.Channels(ratio=0.25, score="random"), task=task).model)


def test_widths_that_hardware_likes():
    model = make(NETWORKS["residual"])
    small = fw.widen(model, task_of(model), 0.6, multiple_of=8, ignore=("down",))
    widths = {n: m.weight.shape[0] for n, m in small.model.named_modules() if isinstance(m, nn.Conv2d)}
    assert widths["down"] == 20
    assert {width % 8 for name, width in widths.items() if name != "down"} == {0}


@pytest.mark.parametrize("alpha", [0.0, -0.5, 1.5, float("nan")])
def test_an_alpha_that_is_no_share(alpha):
    model = make(NETWORKS["residual"])
    with pytest.raises(TaskError, match=r"alpha is .* it is the share of every width to keep"):
        fw.widen(model, task_of(model), alpha)


def test_a_curve_over_resolutions():
    model = net()
    seen = []

    def evaluate(network: nn.Module) -> float:
        seen.append(network)
        return network(IMAGES).mean().item()

    task = fw.Task(IMAGES[:1], evaluate=evaluate)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    curve = fw.resolutions(model, task, [1.0, 0.75, 0.5], repeats=2)
    assert [row.sizes for row in curve.rows] == [((16, 16),), ((12, 12),), ((8, 8),)]
    for row in curve.rows:
        (size,) = row.sizes
        smaller = IMAGES if row.share == 1 else F.interpolate(IMAGES, size, mode="bilinear", antialias=True)
        assert row.score == pytest.approx(float(model(smaller).detach().mean()), rel=1e-5)
        assert row.macs == profile(model, as_inputs(smaller[:1])).total.macs
        assert row.latency is not None
        assert row.latency.repeats == 2
    assert curve.rows[2].macs < 0.26 * curve.rows[0].macs
    assert "12×12" in str(curve)
    assert "evaluate" in str(curve)
    assert_same_state(model, model)
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())


def test_without_an_evaluate_the_score_is_agreement_with_full_resolution():
    curve = fw.resolutions(net(), fw.Task(IMAGES[:1], calibration=IMAGES.split(16)), [1.0, 0.5], repeats=1)
    assert curve.rows[0].score == 1.0
    assert curve.rows[1].score is not None
    assert curve.rows[1].score <= 1.0


def test_a_network_of_one_size_says_so():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 5))
    curve = fw.resolutions(model, fw.Task(IMAGES[:1]), [1.0, 0.5], repeats=1)
    assert curve.rows[0].problem == ""
    assert curve.rows[1].score is None
    assert "adaptive pooling" in curve.rows[1].problem
    assert "Does not run at 8×8" in str(curve)


def test_only_images_are_resized_and_sizes_rounded():
    class Two(nn.Module):
        def forward(self, image: Tensor, weights: Tensor, name: str = "") -> tuple[Tensor, Tensor, str]:
            return image, weights, name

    sized = Resized(Two(), 0.6, multiple_of=4)
    image, weights, name = sized(IMAGES[:2], weights=torch.ones(2, 7), name="x")
    assert image.shape == (2, 3, 8, 8)
    assert weights.shape == (2, 7)
    assert name == "x"


def test_what_cannot_be_looked_at():
    with pytest.raises(TaskError, match="has no image"):
        fw.resolutions(nn.Linear(4, 2), fw.Task(torch.ones(1, 4)))
    for shares in ([], [0.0], [1.0, float("inf")]):
        with pytest.raises(TaskError, match="give shares of the resolution"):
            fw.resolutions(net(), fw.Task(IMAGES[:1]), shares)
    with pytest.raises(TaskError, match="repeats is 0"):
        fw.resolutions(net(), fw.Task(IMAGES[:1]), [1.0], repeats=0)
