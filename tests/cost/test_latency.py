import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

from featherweight.batch import Inputs
from featherweight.cost.latency import Latency, measure, torch_run


class Stage:
    """Callables that note their names and let a pretended clock run on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.played: list[str] = []

    def clock(self) -> float:
        return self.now

    def actor(self, name: str, *seconds: float) -> Callable[[], None]:
        durations = list(seconds)

        def run() -> None:
            self.played.append(name)
            self.now += durations.pop(0) if len(durations) > 1 else durations[0]

        return run


def test_every_callable_warms_up_and_then_they_take_turns_there_and_back() -> None:
    stage = Stage()
    runs = {name: stage.actor(name, 1.0) for name in "abc"}
    measure(runs, repeats=3, warmup=2, clock=stage.clock)
    assert "".join(stage.played) == "abcabc" + "aabbcc" + "ccbbaa" + "aabbcc"


def test_median_and_quartiles_in_milliseconds_without_the_warm_up() -> None:
    stage = Stage()
    timed = (0.001, 0.002, 0.003, 0.004, 0.009)
    untimed_too = (seconds for each in timed for seconds in (50.0, each))
    runs = {"slow": stage.actor("slow", 100.0, *untimed_too), "fast": stage.actor("fast", 0.0015)}
    found = measure(runs, repeats=5, warmup=1, clock=stage.clock)
    slow = found["slow"]
    assert (slow.median_ms, slow.lower_ms, slow.upper_ms) == pytest.approx((3, 2, 4))
    assert slow.repeats == 5
    assert found["fast"].ratio(slow) == pytest.approx(0.5)


def test_a_limit_in_seconds_ends_the_rounds_but_not_before_the_first() -> None:
    stage = Stage()
    assert measure({"a": stage.actor("a", 1.0)}, 30, 0, seconds=7.5, clock=stage.clock)["a"].repeats == 4
    assert measure({"a": stage.actor("a", 1.0)}, 30, 0, seconds=0.0, clock=stage.clock)["a"] == Latency(
        1e3, 1e3, 1e3, 1
    )


def test_garbage_is_not_collected_during_a_timed_call() -> None:
    seen: list[bool] = []
    measure({"a": lambda: seen.append(gc.isenabled())}, repeats=2, warmup=1)
    assert seen == [True, False, False, False, False]
    assert gc.isenabled()


def test_settings_that_time_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="got 0 and 5"):
        measure({"a": lambda: None}, repeats=0)


def test_pytorch_runs_in_inference_and_evaluation_mode_and_leaves_the_model_in_training() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.9)).double().train()
    x = torch.ones(2, 3)
    output = torch_run(model, Inputs((x,)))()
    assert torch.equal(output, model[0](x.double()))
    assert output.is_inference()
    assert all(module.training for module in model.modules())


def test_the_timed_copy_holds_no_second_set_of_weights() -> None:
    model = nn.Linear(3, 4, bias=False)
    run = torch_run(model, Inputs((torch.ones(1, 3),)))
    with torch.no_grad():
        model.weight.fill_(2.0)
    assert torch.equal(run(), torch.full((1, 4), 6.0))
