"""The file: whole or refused, never half; and a failure to write never costs what was there before."""

from __future__ import annotations

import errno
import os
import pickle
import stat
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Mixed, Residual, assert_same_state, make, task_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import featherweight as fw
from featherweight import artifact, factorize, prune
from featherweight.edits import Replace
from featherweight.errors import ArtifactError
from featherweight.forms import LowRank
from featherweight.ledger import Ledger

EMPTY = Ledger("Model", "none", "evaluate")


@cache
def compressed() -> fw.Compressed:
    model = make(Mixed)
    return fw.compress(model, factorize.SVD(rank={"second": 2}), task=task_of(model, 16))


@cache
def whole_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        compressed().save(Path(folder) / "small.fw")
        return (Path(folder) / "small.fw").read_bytes()


def loaded(path: Path) -> fw.Compressed:
    return fw.load(path, into=make(Mixed, seed=1))


def loads_equal_or_not_at_all(data: bytes) -> bool:
    """Whether the bytes load; if they do, it must be as the whole file does."""
    with tempfile.NamedTemporaryFile(suffix=".fw") as file:
        file.write(data)
        file.flush()
        try:
            found = loaded(Path(file.name))
        except ArtifactError:
            return False
    assert_same_state(found.model, compressed().model)
    assert list(found.edits) == list(compressed().edits)
    assert found.ledger.steps == compressed().ledger.steps
    return True


# Damage


def test_the_whole_file_loads():
    assert loads_equal_or_not_at_all(whole_file())


def test_no_truncation_loads():
    data = whole_file()
    lengths = {0, 1, 7, 8, 9, len(data) - 1, *range(0, len(data), max(1, len(data) // 60))}
    assert not any(loads_equal_or_not_at_all(data[:length]) for length in sorted(lengths))


def test_nor_does_a_file_with_more_at_its_end():
    assert not loads_equal_or_not_at_all(whole_file() + b"\0")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_flipped_byte_is_noticed_wherever_it_is(data: st.DataObject):
    raw = bytearray(whole_file())
    # Header and values alike: the header is a small part of a large file, and a large one of this.
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    loads_equal_or_not_at_all(bytes(raw))


def test_every_flip_of_a_digit_or_type_in_the_header_is_noticed():
    raw = whole_file()
    header = 8 + int.from_bytes(raw[:8], "little")
    other = bytes.maketrans(b"0123456789FIt", b"1234567890IFf")
    flips = [at for at in range(8, header) if raw[at : at + 1].translate(other) != raw[at : at + 1]]
    assert len(flips) > 200
    for at in flips[:: max(1, len(flips) // 150)]:
        assert not loads_equal_or_not_at_all(raw[:at] + raw[at : at + 1].translate(other) + raw[at + 1 :]), at


def test_a_tensor_of_another_type_or_shape_with_the_same_bytes_is_noticed(tmp_path):
    """What a tool that rewrites the file could do to it, metadata and all."""
    path = tmp_path / "small.fw"
    path.write_bytes(whole_file())
    metadata, tensors = artifact.read(path)
    for changed in (tensors["head.bias"].view(torch.int32), tensors["head.bias"].reshape(2, 2)):
        save_file({**tensors, "head.bias": changed}, path, metadata)
        with pytest.raises(ArtifactError, match=r"damaged: head\.bias do not match their checksums"):
            loaded(path)


def test_metadata_that_was_edited_is_noticed(tmp_path):
    path = tmp_path / "small.fw"
    path.write_bytes(whole_file())
    metadata, tensors = artifact.read(path)
    for key in metadata:
        if key not in ("format", "version", "checksum"):
            save_file(tensors, path, {**metadata, key: metadata[key].replace("2", "3", 1) + " "})
            with pytest.raises(ArtifactError, match="damaged: its metadata"):
                loaded(path)


# Other files


def test_a_newer_version_says_to_upgrade(tmp_path):
    path = tmp_path / "small.fw"
    path.write_bytes(whole_file())
    metadata, tensors = artifact.read(path)
    save_file(tensors, path, {**metadata, "version": "7"})
    with pytest.raises(
        ArtifactError, match=r"format version 7, and this Featherweight reads up to 1: upgrade with pip"
    ):
        loaded(path)


class Boom:
    def __reduce__(self):
        return (os.abort, ())


def test_files_of_others_are_refused_and_none_is_run(tmp_path):
    path = tmp_path / "other.fw"
    with pytest.raises(ArtifactError, match="there is no file"):
        loaded(path)
    with pytest.raises(ArtifactError, match="there is no file"):
        loaded(tmp_path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ArtifactError, match="a safetensors file, but none that Featherweight wrote"):
        loaded(path)
    path.write_bytes(pickle.dumps(Boom()))
    with pytest.raises(ArtifactError, match="no Featherweight file"):
        loaded(path)
    torch.save(make(Mixed).state_dict(), path)
    with pytest.raises(ArtifactError, match="no Featherweight file"):
        loaded(path)


def test_any_tool_that_reads_safetensors_reads_the_values(tmp_path):
    path = tmp_path / "small.fw"
    path.write_bytes(whole_file())
    state = compressed().model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in load_file(path).items())


@pytest.mark.parametrize(
    ("into", "message"),
    [
        (lambda: make(Residual), r"is not a Residual's: Residual has no layer 'second'"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), r"is not a Sequential's"),
        (lambda: make(Mixed).double(), r"does not fit this Mixed: .*is float32\[\d+.*in the file and float64\["),
        (lambda: Mixed, r"into is <class .*Mixed'>, no nn.Module: give a freshly made model, such as make_model\(\)"),
    ],
    ids=["another architecture", "no such layer", "another type", "a class"],
)
def test_another_model_is_refused(tmp_path, into, message):
    path = tmp_path / "small.fw"
    path.write_bytes(whole_file())
    with pytest.raises(ArtifactError, match=message):
        fw.load(path, into=into())


def test_a_model_of_other_sizes_hears_all_that_does_not_fit(tmp_path):
    path = tmp_path / "small.fw"
    path.write_bytes(whole_file())
    other = make(Mixed)
    other.first, other.extra = nn.Linear(13, 24), nn.Linear(1, 1)
    with pytest.raises(ArtifactError) as refused:
        fw.load(path, into=other)
    assert "extra.weight is missing in the file" in str(refused.value)
    assert "first.weight is float32[24, 12] in the file and float32[24, 13] in the model" in str(refused.value)


def test_a_compressed_model_cannot_be_loaded_into_twice(tmp_path):
    path = tmp_path / "small.fw"
    path.write_bytes(whole_file())
    with pytest.raises(ArtifactError, match="'second' is a LinearPair already"):
        fw.load(path, into=loaded(path).model)


class Written(Mixed):
    """`Mixed` with a width written into its forward: only a captured graph can be narrower."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)).view(-1, 24))))


class Slim(Mixed):
    """`Mixed` with fewer neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 9), nn.Linear(9, 9), nn.Linear(9, 4)


@pytest.mark.parametrize("kind", [Mixed, Written], ids=lambda kind: kind.__name__)
def test_a_narrowed_model_is_loaded_into_its_like_and_into_no_other(tmp_path, kind):
    path, model = tmp_path / "small.fw", make(kind)
    small = fw.compress(model, prune.Neurons(ratio=0.5), task=task_of(model, 16))
    small.save(path)
    given = make(kind, seed=1)
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    found = fw.load(path, into=given)
    assert_same_state(found.model, small.model)
    assert torch.equal(found.model(Mixed.data(5)), small.model(Mixed.data(5)))
    assert isinstance(found.model, Mixed) == (kind is Mixed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())
    for other in (make(Residual), make(Slim), found.model, make(kind).double()):
        with pytest.raises(ArtifactError, match=r"small\.fw (is not a|does not fit this) "):
            fw.load(path, into=other)


def test_loading_leaves_the_model_given_as_it_is(tmp_path):
    path = tmp_path / "small.fw"
    path.write_bytes(whole_file())
    fresh, same = make(Mixed, seed=3), make(Mixed, seed=3)
    assert fw.load(path, into=fresh).model is not fresh
    assert_same_state(fresh, same)


# Writing


@pytest.mark.parametrize("where", ["save_file", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where):
    path = tmp_path / "small.fw"
    path.write_bytes(b"what was there before")

    def full(*args, **kwargs):
        if where == "save_file":  # half of it is written already
            Path(args[1]).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((artifact, "save_file") if where == "save_file" else (os, where)), full)
    with pytest.raises(
        ArtifactError, match=r"could not be written .*No space left.*what was there before is still there"
    ):
        compressed().save(path)
    assert path.read_bytes() == b"what was there before"
    assert os.listdir(tmp_path) == ["small.fw"]


def test_a_killed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "small.fw"
    path.write_bytes(whole_file())

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        artifact.save(path, make(Mixed, seed=9), [], EMPTY)
    assert path.read_bytes() == whole_file()
    assert os.listdir(tmp_path) == ["small.fw"]


def test_a_folder_that_is_not_there_or_a_name_that_is_taken_is_said(tmp_path):
    with pytest.raises(ArtifactError, match="could not be written"):
        compressed().save(tmp_path / "missing" / "small.fw")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ArtifactError, match="could not be written"):
        compressed().save(tmp_path / "taken")
    assert os.listdir(tmp_path) == ["taken"]


def test_the_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    compressed().save(tmp_path / "small.fw")
    plain, saved = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "small.fw"))
    assert saved == plain


# Models of all kinds


class Tied(nn.Module):
    """An embedding whose weight the head shares, and a buffer that the state dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 12)
        self.middle = nn.Linear(12, 12)
        self.head = nn.Linear(12, 64, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("passing", torch.arange(3.0), persistent=False)
        self.register_buffer("counter", torch.tensor(4, dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("empty", torch.zeros(0, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(self.embedding(tokens))) * self.scale + self.passing.sum()


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    model = Tied()
    tokens = torch.arange(6)[None]
    small = fw.compress(model, factorize.SVD(rank=3), task=fw.Task(tokens, calibration=[tokens]))
    assert "shared" in small.ledger.steps[0].left["head"]
    small.save(tmp_path / "tied.fw")
    assert len(load_file(tmp_path / "tied.fw").keys() & {"embedding.weight", "head.weight"}) == 1
    again = fw.load(tmp_path / "tied.fw", into=Tied()).model
    assert again.head.weight is again.embedding.weight
    assert torch.equal(again(tokens), small.model(tokens))
    assert again.passing.tolist() == [0.0, 1.0, 2.0]
    assert_same_state(again, small.model)


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(3),
        torch.tensor(0.25, dtype=torch.bfloat16),
        torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,
        torch.tensor([1, -2], dtype=torch.int8),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]),
        torch.arange(4.0).to(torch.float8_e4m3fn),
        torch.arange(12.0)[2:8:2],
        torch.ones(1).expand(4),
        torch.zeros(0, 2),
        torch.tensor([float("nan"), float("inf"), -0.0]),
    ],
    ids=str,
)
def test_tensors_of_every_kind_come_back_to_the_last_bit(tmp_path, value):
    def model(buffer: Tensor) -> nn.Module:
        made = nn.Sequential(nn.Linear(1, 1))
        made.register_buffer("kept", buffer)
        return made

    artifact.save(tmp_path / "kept.fw", model(value), [], EMPTY)
    fresh = model(torch.zeros_like(value, memory_format=torch.contiguous_format))
    artifact.load(tmp_path / "kept.fw", fresh)
    assert (fresh.kept.dtype, fresh.kept.shape) == (value.dtype, value.shape)
    assert artifact.raw_bytes(fresh.kept) == artifact.raw_bytes(value)


class Extra(nn.Linear):
    """A layer with state that is no tensor."""

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


def test_state_that_is_no_tensor_is_refused_by_name(tmp_path):
    with pytest.raises(ArtifactError, match=r"'0\._extra_state', a dict: only tensors are stored"):
        artifact.save(tmp_path / "extra.fw", nn.Sequential(Extra(2, 2)), [], EMPTY)
    assert os.listdir(tmp_path) == []


def test_a_layer_under_two_names_is_replaced_and_restored_under_both(tmp_path):
    def model() -> nn.Module:
        layer = nn.Linear(12, 12)
        made = nn.Sequential(layer, nn.ReLU(), layer)
        made.inner = nn.Sequential(layer)
        return made

    given = model()
    x = torch.randn(8, 12)
    small = fw.compress(given, factorize.SVD(rank=2), task=fw.Task(x[:1], calibration=[x]))
    assert small.model[0] is small.model[2] is small.model.inner[0]
    assert isinstance(small.edits[0], Replace)
    assert small.edits[0].form == LowRank(2)
    small.save(tmp_path / "twice.fw")
    again = fw.load(tmp_path / "twice.fw", into=model())
    assert torch.equal(again.model(x), small.model(x))
    assert again.model[0] is again.model[2]
