"""Packing: a state dict of any kind, bit by bit there and back, and nothing lost where it goes wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from networks import Mixed, make
from safetensors.torch import load_file, save_file

import featherweight as fw
from featherweight import artifact, cli
from featherweight.edits import Constrain
from featherweight.errors import ArtifactError
from featherweight.forms import Grid, released


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A safetensors file of many types."""
    drawn = torch.Generator().manual_seed(0)
    state = {
        "model.embed.weight": (0.02 * torch.randn(500, 64, generator=drawn)).bfloat16(),
        "model.norm.weight": torch.ones(64).bfloat16(),
        "half": torch.randn(30, 5, generator=drawn).half(),
        "quarter": torch.randn(64, generator=drawn).to(torch.float8_e4m3fn),
        "packed": torch.randint(-(2**31), 2**31 - 1, (40, 3), generator=drawn, dtype=torch.int32),
        "scalar": torch.tensor(3.5),
        "step": torch.tensor(12345),
        "empty": torch.zeros(0, 4),
        "mask": torch.rand(77, generator=drawn) < 0.1,
        "名前": torch.arange(3, dtype=torch.uint8),
    }
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def test_the_same_bytes_come_back(packed, tmp_path):
    size = fw.pack(packed, tmp_path / "model.fw")
    assert size == (tmp_path / "model.fw").stat().st_size < 0.75 * packed.stat().st_size
    assert fw.unpack(tmp_path / "model.fw", tmp_path / "again.safetensors") == packed.stat().st_size
    assert (tmp_path / "again.safetensors").read_bytes() == packed.read_bytes()
    with fw.open(tmp_path / "model.fw") as file:
        assert set(file) == set(load_file(packed))
        assert file.metadata == {"format": "pt"}
        assert file.kind("step") == (torch.int64, ())
        assert file["step"] == 12345


def test_a_packed_state_dict_loads_into_its_model(tmp_path):
    model = make(Mixed)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fw.pack(tmp_path / "model.safetensors", tmp_path / "model.fw", coding="fast")
    again = fw.load(tmp_path / "model.fw", into=make(Mixed, seed=1))
    assert torch.equal(again.model(Mixed.data(3)), model(Mixed.data(3)))


def test_a_compressed_model_unpacks_to_plain_weights(tmp_path):
    model = make(Mixed)
    edit = Constrain("second", Grid(3))
    edit.apply(model)
    artifact.save(tmp_path / "small.fw", model, [edit], None)
    fw.unpack(tmp_path / "small.fw", tmp_path / "plain.safetensors")
    found = load_file(tmp_path / "plain.safetensors")
    assert found.keys() == released(model).state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in released(model).state_dict().items())


def test_bad_files_are_refused_and_nothing_is_left(packed, tmp_path):
    (tmp_path / "text").write_text("no weights")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ArtifactError, match="there is no file"):
        fw.pack(tmp_path / "missing", tmp_path / "model.fw")
    with pytest.raises(ArtifactError, match="truncated, damaged, or no safetensors file"):
        fw.pack(tmp_path / "text", tmp_path / "model.fw")
    with pytest.raises(ArtifactError, match="coding is 'smal': it is one of small, fast, huffman; did you mean"):
        fw.pack(packed, tmp_path / "model.fw", coding="smal")
    with pytest.raises(ArtifactError, match="could not be written"):
        fw.pack(packed, tmp_path / "missing" / "model.fw")
    with pytest.raises(ArtifactError, match="no Featherweight file"):
        fw.unpack(tmp_path / "text", tmp_path / "again")
    assert sorted(os.listdir(tmp_path)) == before
    fw.pack(packed, tmp_path / "model.fw")
    data = bytearray((tmp_path / "model.fw").read_bytes())
    data[-3] ^= 1
    (tmp_path / "model.fw").write_bytes(data)
    (tmp_path / "again").write_text("what was there before")
    with pytest.raises(ArtifactError, match="does not match its checksum"):
        fw.unpack(tmp_path / "model.fw", tmp_path / "again")
    assert (tmp_path / "again").read_text() == "what was there before"


def test_a_type_that_safetensors_has_not_is_named(tmp_path):
    model = torch.nn.Module()
    model.register_buffer("odd", torch.zeros(3, dtype=torch.complex128))
    artifact.save(tmp_path / "odd.fw", model, [], None)
    with pytest.raises(ArtifactError, match="holds 'odd' in complex128, which safetensors files do not have"):
        fw.unpack(tmp_path / "odd.fw", tmp_path / "odd.safetensors")


def test_the_command_line_packs_and_inspects(packed, tmp_path, capsys):
    small, again = str(tmp_path / "model.fw"), str(tmp_path / "again.safetensors")
    assert cli.main(["pack", str(packed), small]) == 0
    assert "model.fw: 5" in capsys.readouterr().out.replace("\n", "")
    assert cli.main(["unpack", small, again]) == 0
    assert cli.main(["inspect", small]) == 0
    assert "model.embed" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "missing.fw")]) == 1


def test_every_byte_of_a_file_is_accounted_for(tmp_path):
    model = make(Mixed)
    edits = [Constrain("second", Grid(3)), Constrain("first", Grid(4, axis=None))]
    for edit in edits:
        edit.apply(model)
    size = artifact.save(tmp_path / "small.fw", model, edits, None)
    found = fw.inspect_file(tmp_path / "small.fw")
    assert found.size == size == found.header + found.record + sum(part.bytes for part in found.layers.values())
    assert found.record == 0
    assert {name: part.values for name, part in found.layers.items()} == {"first": 312, "second": 600, "head": 100}
    assert found.plain == 4 * 1012
    assert found.layers["second"].tables >= 24
    assert not any(part.positions for part in found.layers.values())
    # 600 values: 576 numbers of 3 bits at most, 24 floats of which the sign and mantissa are as good as random.
    assert found.layers["second"].bound < 576 * 3 / 8 + 24 * 4 * 2
    assert "total" in str(found)
    assert f"{size:,} bytes" in str(found)
