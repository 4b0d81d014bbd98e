import pytest

from featherweight.cost.cost import Cost


def test_costs_add_and_subtract_and_keep_what_was_left_out() -> None:
    one = Cost(macs=10, params=4, bytes=16, activation_bytes=8, uncounted=("b in y", "a in x"))
    two = Cost(macs=1, params=2, bytes=3, activation_bytes=4, uncounted=("a in x",))
    assert one + two == Cost(11, 6, 19, 12, ("a in x", "b in y"))
    assert two - one == Cost(-9, -2, -13, -4, ("a in x", "b in y"))
    assert sum([one, two], Cost()) == one + two


def test_energy_reads_weights_once_and_moves_activations_twice() -> None:
    # Horowitz: 3.7 + 0.9 pJ a multiply-add, 640 pJ for four bytes from DRAM
    assert Cost(macs=1000).energy_joules == pytest.approx(4600e-12)
    assert Cost(bytes=4).energy_joules == pytest.approx(640e-12)
    assert Cost(activation_bytes=4).energy_joules == pytest.approx(1280e-12)
    assert Cost(params=10**9).energy_joules == 0


def test_metrics_are_asked_for_by_name() -> None:
    cost = Cost(macs=3, params=5, bytes=20, activation_bytes=7)
    assert [cost.metric(name) for name in ("macs", "params", "bytes", "energy")] == [3, 5, 20, cost.energy_joules]


def test_a_metric_that_is_not_there_gets_a_hint() -> None:
    with pytest.raises(ValueError, match=r"no cost 'mac', only macs, params, bytes, energy; did you mean 'macs'\?"):
        Cost().metric("mac")
