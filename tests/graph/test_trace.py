"""Capturing: what the graph knows of the model, and one clear error where there can be no graph."""

from __future__ import annotations

import logging

import pytest
import torch
from constructs import IMAGE, Net, conv, example, head, randomised
from torch import nn

from featherweight.batch import Inputs
from featherweight.errors import FeatherweightError
from featherweight.graph import GraphError, capture, couple, narrow


def small() -> nn.Module:
    return Net(lambda s, x: head(s, s.b(s.a(x))), a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 3))


def test_any_batch_size_is_captured_and_the_model_stays_as_it_was():
    model = small().train()
    trace = capture(model, Inputs((torch.randn(1, 3, 8, 8),)))
    assert trace.dynamic
    assert trace.note == ""
    assert model.training
    assert model.a[1].num_batches_tracked == 0
    assert trace.graph(torch.randn(5, 3, 8, 8)).shape == (5, 3)


def test_a_model_that_fixes_its_batch_is_captured_for_that_size_with_a_note():
    model = Net(lambda s, x: s.fc(x.reshape(2, -1)), fc=nn.Linear(192, 3))
    trace = capture(model, example(IMAGE))
    assert not trace.dynamic
    assert trace.note == "its code makes a fixed number of the batch's length"
    assert not capture(small(), example(IMAGE), dynamic_batch=False).dynamic


@pytest.mark.parametrize("samples", [1, 4])
def test_a_length_that_only_python_asks_for_leaves_the_batch_free(samples, caplog):
    model = Net(lambda s, x: s.fc(x.flatten(1)) + s.shift.expand(len(x), -1), fc=nn.Linear(192, 3))
    model.shift = nn.Parameter(torch.randn(1, 3))
    trace = capture(model, Inputs((torch.randn(samples, 3, 8, 8),)))
    assert (trace.dynamic, trace.note) == (True, "")
    x = torch.randn(7, 3, 8, 8)
    assert torch.equal(trace.graph(x), model(x))
    assert set(trace.tensors) == {"fc.weight", "fc.bias", "shift"}
    assert trace.tensors["shift"] is model.shift
    assert not capture(Net(lambda s, x: s.fc(x.reshape(2, -1)), fc=nn.Linear(192, 3)), example(IMAGE)).dynamic
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_what_cannot_be_captured_is_one_clear_error():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            x = self.a(x)
            if x.mean() > 0:
                x = -x
            return x

    with pytest.raises(GraphError) as error:
        capture(Branching(), example(IMAGE))
    message = str(error.value)
    assert isinstance(error.value, FeatherweightError)
    assert "Branching called with float" in message
    assert "at test_trace.py:" in message
    assert "branches on the values that go through it" in message
    assert "masks and quantized weights alone" in message


def test_a_wrong_example_is_the_users_own_error():
    with pytest.raises(GraphError, match=r"torch.export says: .*"):
        capture(small(), Inputs((torch.randn(2, 5, 8, 8),)))


def test_regions_without_gradients_are_part_of_the_graph():
    def forward(s, x):
        with torch.no_grad():
            x = s.a(x)
        return head(s, s.b(x))

    model = randomised(Net(forward, a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 3)))
    coupling = couple(model, example(IMAGE))
    assert {group.name for group in coupling.groups} == {"a.0 channels", "b.0 channels"}
    narrowed = narrow(model, coupling, {"a.0 channels": range(4)}, form="graph").module
    narrowed(example(IMAGE).args[0]).sum().backward()
    parameters = dict(narrowed.named_parameters())
    assert parameters["a.0.weight"].grad is None
    assert parameters["b.0.weight"].grad is not None


def test_frozen_and_tied_parameters_and_the_meta_device():
    model = small().to("meta")
    model.b[0].weight.requires_grad_(False)
    coupling = couple(model, Inputs((torch.empty(2, 3, 8, 8, device="meta"),)))
    assert {group.name: group.size for group in coupling.groups} == {"a.0 channels": 8, "b.0 channels": 6}
    narrowed = narrow(model, coupling, {"a.0 channels": range(3)})
    assert narrowed.error is None
    assert narrowed.module.b[0].weight.shape == (6, 3, 3, 3)
    assert narrowed.module.b[0].weight.is_meta
    assert not narrowed.module.b[0].weight.requires_grad
    tied = Net(lambda s, x: head(s, s.c(s.b(s.a(x)))), a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), fc=nn.Linear(8, 3))
    tied.c[0].weight = tied.b[0].weight
    trace = capture(tied, example(IMAGE))
    assert trace.names["c.0.weight"] == "b.0.weight"
    coupling = couple(trace)
    for form in ("module", "graph"):
        narrowed = narrow(tied, coupling, {coupling.groups[0].name: range(5)}, form=form).module
        assert narrowed.get_parameter("b.0.weight") is narrowed.get_parameter("c.0.weight")
        assert [n for n, _ in narrowed.named_parameters()] == [n for n, _ in tied.named_parameters()]


def test_a_capture_that_fails_logs_nothing_beside_the_refusal(caplog):
    class Branching(nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            return -x if x.sum() > 0 else x

    with pytest.raises(GraphError, match="its code branches on the values"):
        capture(Branching(4, 4), torch.randn(2, 4))
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
