"""What a report tells about the layers, where their names and numbers change."""

from dataclasses import replace

import report_samples as samples

from featherweight.ledger import Choice, Entry, Point, Row
from featherweight.report import contents


def macs(rows: dict[str, Row]) -> dict[str, int]:
    return {name: row.macs for name, row in rows.items()}


def test_what_replaced_a_layer_counts_under_its_name() -> None:
    before = {"conv1": samples.row(8, 0, 0), "conv10": samples.row(5, 0, 0), "gone": samples.row(3, 0, 0)}
    after = {
        "conv1.vertical": samples.row(2, 0, 0),
        "conv1.horizontal": samples.row(1, 0, 0),
        "conv10": samples.row(5, 0, 0),
        "new": samples.row(1, 0, 0),
    }
    assert macs(contents.under_old_names(before, after)) == {"conv1": 3, "conv10": 5, "new": 1}


def test_a_network_that_is_one_layer_has_the_empty_name() -> None:
    assert macs(contents.under_old_names({"": samples.row(8, 0, 0)}, {"down": samples.row(3, 0, 0)})) == {"": 3}


def test_a_layer_inside_another_keeps_its_own_cost() -> None:
    before = {"block": samples.row(1, 0, 0), "block.conv": samples.row(8, 0, 0)}
    after = {"block": samples.row(1, 0, 0), "block.conv.down": samples.row(3, 0, 0)}
    assert macs(contents.under_old_names(before, after)) == {"block": 1, "block.conv": 3}


def pruned() -> Entry:
    """conv1 is chosen as part of a group, conv2 follows, drop goes, fc stays."""
    rows = {name: samples.row(100, 10, 10, "Conv2d") for name in ("conv1", "conv2", "drop", "fc")}
    after = {"conv1": samples.row(50, 5, 5), "conv2": samples.row(60, 6, 10), "fc": rows["fc"]}
    return Entry(
        step="prune.Channels",
        settings={},
        edits=(),
        left={"fc": "its outputs are the network's"},
        before=samples.snapshot(rows, None),
        after=samples.snapshot(after, None),
        choices={"conv1 + conv2": Choice(Point("8 of 16 channels", 0.55))},
    )


def test_layers_that_changed_without_a_choice_are_listed_too() -> None:
    rows = {layer.name: layer for layer in contents.layers(pruned())}
    assert list(rows) == ["conv1", "conv2", "drop", "conv1 + conv2"]
    assert rows["conv2"].setting == "with another layer"
    _, table = contents.layer_table(pruned(), contents.Score("score", percent=True))
    said = {cells[0].text: [cell.text for cell in cells] for cells in table}
    assert said["drop"] == ["drop", "Conv2d", "with another layer", "–", "100 → removed"]
    assert said["conv2"][-1] == "100 → 60"
    assert said["conv1 + conv2"] == ["conv1 + conv2", "–", "8 of 16 channels", "0.55", "– → –"]


def test_reasons_are_told_once() -> None:
    entry = replace(pruned(), left={"a": "too small", "b": "ignored", "c": "too small"})
    assert contents.left(entry) == {"too small": ("a", "c"), "ignored": ("b",)}


def test_the_metric_of_the_choice_decides_which_costs_are_listed() -> None:
    first = samples.factorized()
    assert [metric.name for metric in contents.metrics(first)] == ["MACs"]
    assert [metric.name for metric in contents.metrics(samples.quantized(first))] == ["stored bytes"]
    assert [metric.name for metric in contents.metrics(replace(first, metric="params"))] == ["MACs", "parameters"]
    assert [metric.name for metric in contents.metrics(replace(first, metric="latency_ms"))] == ["MACs"]


def test_a_loss_that_was_predicted_of_a_part_only_is_not_summed() -> None:
    first = samples.factorized()
    assert contents.predicted(first)
    assert not contents.predicted(replace(first, choices={**first.choices, "other": Choice(Point("8 of 16", 0.5))}))
