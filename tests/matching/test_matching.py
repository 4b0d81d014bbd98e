"""The losses between student and teacher: against PyTorch's and NumPy's own, and by what must hold for all inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featherweight import matching


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOSSES = {
    "soft targets": matching.soft_targets,
    "decoupled": lambda s, t: matching.decoupled(s, t, torch.arange(len(s)) % s.shape[1]),
    "dist": matching.relation_of_classes,
    "error": matching.relative_error,
    "distances": matching.distances,
    "angles": matching.angles,
    "similarity": matching.similarity_preserving,
    "correlation": matching.correlation_congruence,
    "attention": lambda s, t: matching.attention_transfer(s[:, :, None], t[:, :, None]),
    "overhaul": lambda s, t: matching.overhaul(s, t, matching.margin(t)),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@every_loss
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), samples=st.integers(2, 6), width=st.integers(3, 8))
def test_never_negative_and_falls_on_the_way_to_the_teacher(loss, seed, samples, width):
    teacher, student = randn(samples, width, seed=seed), randn(samples, width, seed=seed + 1)
    student.requires_grad_()
    far = loss(student, teacher)
    (gradient,) = torch.autograd.grad(far, student)
    before = far.detach().item()
    assert before >= -1e-9
    assert bool(torch.isfinite(gradient).all())
    step = 1e-5 / max(float(gradient.norm()), 1e-9)
    assert loss((student - step * gradient).detach(), teacher).item() <= before + 1e-9


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "overhaul"])
def test_zero_at_the_teacher_itself(name):
    teacher = randn(5, 6)
    student = teacher.clone().requires_grad_()
    value = LOSSES[name](student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.detach().item() == pytest.approx(0, abs=1e-9)
    assert float(gradient.abs().max()) < 1e-5


def test_soft_targets_are_pytorchs_divergence():
    s, t = randn(6, 5, seed=1), randn(6, 5, seed=2)
    expected = F.kl_div((s / 3).log_softmax(1), (t / 3).softmax(1), reduction="batchmean") * 9
    assert torch.allclose(matching.soft_targets(s, t, 3.0), expected)


def test_several_teachers_have_the_gradient_of_their_mean_distribution():
    s, teachers = randn(4, 5).requires_grad_(), [randn(4, 5, seed=n) for n in (1, 2, 3)]
    apart = sum(matching.soft_targets(s, t, 2.0) for t in teachers) / 3
    mean = sum((t / 2).softmax(1) for t in teachers) / 3
    whole = -(mean * (s / 2).log_softmax(1)).sum(1).mean() * 4
    one, other = (torch.autograd.grad(value, s)[0] for value in (apart, whole))
    assert torch.allclose(one, other)


def test_decoupled_parts_add_up_to_soft_targets():
    """Zhao et al., equation 7: KD = TCKD + (1 − p_target) NCKD, sample by sample."""
    s, t, labels = randn(1, 6, seed=3), randn(1, 6, seed=4), torch.tensor([2])
    target, others = (matching.decoupled(s, t, labels, 2.0, *weights) for weights in ((1.0, 0.0), (0.0, 1.0)))
    doubt = 1 - (t / 2).softmax(1)[0, 2]
    assert torch.allclose(target + doubt * others, matching.soft_targets(s, t, 2.0))


def test_dist_is_numpys_correlation():
    s, t = randn(5, 4, seed=5), randn(5, 4, seed=6)
    p, q = ((x / 4).softmax(1).numpy() for x in (s, t))
    between = 1 - np.mean([np.corrcoef(p[n], q[n])[0, 1] for n in range(5)])
    within = 1 - np.mean([np.corrcoef(p[:, n], q[:, n])[0, 1] for n in range(4)])
    assert float(matching.relation_of_classes(s, t)) == pytest.approx(16 * (2 * between + 2 * within))


def test_dist_does_not_mind_how_sure_the_student_is():
    t = randn(5, 4)
    p = (t / 4).softmax(1)
    shrunk = (0.5 * p + 0.5 / 4).log() * 4  # a linear function of the probabilities
    assert float(matching.relation_of_classes(shrunk, t)) == pytest.approx(0, abs=1e-6)


def test_one_sample_has_no_relations_within_classes():
    assert bool(torch.isfinite(matching.relation_of_classes(randn(1, 4), randn(1, 4, seed=1))))


def test_standardized_logits_have_lost_place_and_scale():
    logits = randn(6, 5)
    made = matching.standardized(3 * logits + 7)
    assert torch.allclose(made, matching.standardized(logits), atol=1e-5)
    assert torch.allclose(made.mean(1), torch.zeros(6, dtype=made.dtype), atol=1e-9)
    assert torch.allclose(made.std(1), torch.ones(6, dtype=made.dtype), atol=1e-5)


def test_relative_error_does_not_mind_the_teachers_scale():
    s, t = randn(6, 3, 4), randn(6, 3, 4, seed=1)
    assert torch.allclose(matching.relative_error(s, t), matching.relative_error(100 * s, 100 * t))
    assert float(matching.relative_error(t.mean(0, keepdim=True).expand_as(t), t)) == pytest.approx(1)


def test_attention_maps_by_hand():
    features = randn(2, 3, 4, 5)
    energy = (features.numpy() ** 2).sum(-1).reshape(2, 12)
    expected = energy / np.linalg.norm(energy, axis=1, keepdims=True)
    assert np.allclose(matching.attention_map(features).numpy(), expected)
    wider = torch.cat([features, features], -1)
    assert float(matching.attention_transfer(wider, features)) == pytest.approx(0, abs=1e-12)


def test_the_overhaul_is_blind_where_both_are_cut_off():
    teacher = torch.tensor([[[-1.0, 2.0]], [[-3.0, -4.0]]])  # two samples, one position, two channels
    margins = matching.margin(teacher)
    assert margins.tolist() == [-2.0, -4.0]
    student = torch.tensor([[[-9.0, 1.0]], [[5.0, -5.0]]])
    # Wanted are -1, 2, -2, -4: below them at most 0 nothing counts, so there are 1² and 7², of a mean square of 25/4.
    assert float(matching.overhaul(student, teacher, margins)) == pytest.approx((1 + 49) / 4 / (25 / 4))


def test_distances_and_angles_by_hand():
    s, t = randn(5, 3, seed=7), randn(5, 8, seed=8)

    def parts(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        x = x.numpy()
        far = np.linalg.norm(x[:, None] - x[None], axis=2)
        sides = x[None] - x[:, None]
        lengths = np.linalg.norm(sides, axis=2, keepdims=True)
        unit = sides / np.where(lengths > 0, lengths, 1)
        return far / (far.sum() / 20), np.einsum("ijw,ikw->ijk", unit, unit)

    def huber(a: np.ndarray, b: np.ndarray) -> float:
        d = np.abs(a - b)
        return float(np.where(d < 1, d**2 / 2, d - 0.5).mean())

    (d1, a1), (d2, a2) = parts(s), parts(t)
    assert float(matching.distances(s, t)) == pytest.approx(huber(d1, d2))
    assert float(matching.angles(s, t)) == pytest.approx(huber(a1, a2))


def test_relations_do_not_mind_turns_and_scales():
    t = randn(6, 4)
    turn, _ = torch.linalg.qr(randn(4, 4, seed=9))
    for loss in (matching.distances, matching.angles):
        assert float(loss(3 * t @ turn + 1, t)) == pytest.approx(0, abs=1e-9)
    assert float(matching.similarity_preserving(3 * t @ turn, t)) == pytest.approx(0, abs=1e-9)
    assert float(matching.correlation_congruence(3 * t @ turn, t)) == pytest.approx(0, abs=1e-9)


def test_correlations_by_hand():
    s, t = randn(4, 3), randn(4, 5, seed=1)

    def kernel(x: np.ndarray) -> np.ndarray:
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        return np.exp(-0.4 * ((x[:, None] - x[None]) ** 2).sum(2))

    expected = ((kernel(s.numpy()) - kernel(t.numpy())) ** 2).sum(1).mean()
    assert float(matching.correlation_congruence(s, t)) == pytest.approx(expected)


def test_contrastive_is_least_for_the_right_pairs():
    t = randn(8, 6)
    right = float(matching.contrastive(t, t))
    assert right < float(matching.contrastive(t.roll(1, 0), t))
    assert right < float(matching.contrastive(randn(8, 6, seed=1), t))
    s = randn(8, 6, seed=2)
    values = np.exp((F.normalize(s, dim=1) @ F.normalize(t, dim=1).T).numpy() / 0.1)
    r = values / values.mean()
    h = r / (r + 7)
    real = np.log(np.diag(h))
    false = np.log(1 - h)
    np.fill_diagonal(false, 0)
    assert float(matching.contrastive(s, t)) == pytest.approx(-(real + false.sum(1)).mean())
