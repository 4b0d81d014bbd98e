"""The file: whole or refused, never half; and a failure to write never costs what was there before."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import re
import shutil
import stat
import tempfile
import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Mixed, Residual, assert_same_state, make, task_of
from safetensors.torch import save_file
from torch import Tensor, nn

import featherweight as fw
from featherweight import artifact, factorize, prune
from featherweight.code import container, tensors
from featherweight.code.numbers import varint
from featherweight.edits import Constrain, Edit, Replace
from featherweight.errors import ArtifactError
from featherweight.forms import Grid, LowRank, Mask, constraints_on, released
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


def path_of(data: bytes) -> Path:
    """A file of these bytes."""
    path = Path(tempfile.gettempdir()) / f"featherweight-test-{os.getpid()}.fw"
    path.write_bytes(data)
    return path


def load_bytes(data: bytes) -> fw.Compressed:
    return loaded(path_of(data))


def decoded(data: bytes) -> dict[str, Tensor]:
    """All tensors of a file, without a model."""
    with artifact.open(path_of(data)) as file:
        for entry in file._file.entries:
            file._file.stream(entry)  # finds damage without decoding what comes before it
        return dict(file)


@cache
def small_file() -> bytes:
    """A file without a record."""
    with tempfile.TemporaryDirectory() as folder:
        artifact.save(Path(folder) / "small.fw", *confined(), None)
        return (Path(folder) / "small.fw").read_bytes()


@pytest.fixture(autouse=True, scope="module")
def cleaned():
    """Takes the file away that `path_of` writes."""
    yield
    path_of(b"").unlink()


# Damage


def test_the_whole_file_loads():
    found = load_bytes(whole_file())
    assert_same_state(found.model, compressed().model)
    assert list(found.edits) == list(compressed().edits)
    assert found.ledger.steps == compressed().ledger.steps


def test_no_truncation_loads_and_each_is_named():
    data = small_file()
    for length in range(len(data)):
        with pytest.raises(ArtifactError, match=r"is truncated|no Featherweight file"):
            decoded(data[:length])
    with pytest.raises(ArtifactError, match=r"is truncated: of '\(record\)' and what follows it, 1 bytes are missing"):
        load_bytes(whole_file()[:-1])


def test_nor_does_a_file_with_more_at_its_end():
    with pytest.raises(ArtifactError, match="behind its last tensor there are 1 bytes more"):
        load_bytes(whole_file() + b"\0")


def test_a_flipped_byte_is_noticed_wherever_it_is_and_the_tensor_named():
    """Every byte of a file with a mask, grids and plain tensors."""
    data = small_file()
    with artifact.open(path_of(data)) as file:
        entries = file._file.entries
    assert len(data) < 1500
    for at in range(len(data)):
        damaged = [e.name for e in entries if e.inline is None and e.offset <= at < e.offset + e.size]
        raw = bytearray(data)
        raw[at] ^= 1 << at % 8
        with pytest.raises(ArtifactError) as refused:
            decoded(bytes(raw))
        message = str(refused.value)
        assert not damaged or repr(damaged[0]) in message
        assert damaged or re.search("in its header|no Featherweight file|format version", message), message


@settings(max_examples=50, deadline=None)
@given(st.integers(0), st.integers(1, 255))
def test_nor_does_one_load_with_a_record(at: int, flip: int):
    raw = bytearray(whole_file())
    raw[at % len(raw)] ^= flip
    with pytest.raises(ArtifactError):
        load_bytes(bytes(raw))


def forged(entries, streams, about=None) -> bytes:
    """A file that is whole by its checksums, whatever is in it."""
    made = [replace(e, size=len(s), checksum=zlib.crc32(s), inline=None) for e, s in zip(entries, streams, strict=True)]
    return container.opening(about or {}, made) + b"".join(streams)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_streams_made_to_deceive_are_refused_or_decode_to_something_of_the_right_size(data: st.DataObject):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool]))
    shape = data.draw(st.sampled_from([(6, 20), (300,), (2, 3, 9)]))
    honest = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    stream = bytearray(tensors.encode(honest, data.draw(st.sampled_from(tensors.CODINGS))))
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    stream = bytes(stream[: data.draw(st.integers(0, len(stream)))]) + data.draw(st.binary(max_size=20))
    stream += b"\0" * (17 - len(stream))  # longer than what stands in the header
    with artifact.open(path_of(forged([container.Entry("w", dtype, shape)], [stream]))) as file:
        try:
            found = file["w"]
        except ArtifactError as error:
            if "'w'" not in str(error):
                raise
        else:
            assert (found.dtype, found.shape) == (dtype, shape)


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 20, 1 << 20), (1 << 31,)], ids=str)
def test_a_small_file_cannot_ask_for_much_memory(shape):
    entry = container.Entry("w", torch.float32, shape)
    with pytest.raises(ArtifactError, match="values cannot be in 20 bytes"):
        artifact.open(path_of(forged([entry], [b"\5" * 20])))


def test_a_header_that_unpacks_to_much_is_refused():
    header = bytes([container.VERSION]) + varint(1 << 40) + varint(20) + varint(0) + b"\0" * 20
    with pytest.raises(ArtifactError, match="speaks of more than it can hold"):
        artifact.open(path_of(container.MAGIC + header + zlib.crc32(header).to_bytes(4, "little")))


def test_masks_and_grids_that_contradict_their_form_are_refused_by_name(tmp_path):
    model = make(Mixed)
    form = Mask(5)
    form.put_on(model.first)  # whose mask keeps all 288
    artifact.save(tmp_path / "small.fw", model, [Constrain("first", form)], None)
    with pytest.raises(ArtifactError, match="'first': a mask keeps 288 of 288 values, where its form says 5"):
        fw.load(tmp_path / "small.fw", into=make(Mixed))


# Other files


def test_a_newer_version_says_to_upgrade():
    data = bytearray(whole_file())
    data[len(container.MAGIC)] = 7
    with pytest.raises(
        ArtifactError, match=r"format version 7, and this Featherweight reads up to 2: upgrade with pip"
    ):
        load_bytes(bytes(data))


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


@pytest.mark.parametrize("where", ["copyfileobj", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where):
    path = tmp_path / "small.fw"
    path.write_bytes(b"what was there before")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    # When the streams are copied, the header is written already.
    monkeypatch.setattr(shutil if where == "copyfileobj" else os, where, full)
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
    with fw.open(tmp_path / "tied.fw") as file:
        assert len(file.sizes().keys() & {"embedding.weight", "head.weight"}) == 1
        assert torch.equal(file["head.weight"], small.model.head.weight)
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


# Constraints


def confined(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Edit]]:
    """A model with a mask and a grid on one weight, a mask on another, and a grid on a bias."""
    model, edits = make(Mixed).to(dtype), []
    generator = torch.Generator().manual_seed(1)
    for name, form in (
        ("first", Mask(100)),
        ("first", Grid(4)),
        ("second", Mask(60)),
        ("head", Grid(8, axis=None, tensor="bias")),
    ):
        layer = model.get_submodule(name)
        made = form.put_on(layer)
        if isinstance(form, Mask):
            places = torch.randperm(made.mask.numel(), generator=generator)[: form.kept]
            made.mask.zero_().view(-1)[places] = True
        edits.append(Constrain(name, form))
    return model, edits


@pytest.mark.parametrize("coding", tensors.CODINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_confined_tensors_come_back_to_their_constraints(tmp_path, coding, dtype):
    model, edits = confined(dtype)
    artifact.save(tmp_path / "small.fw", model, edits, None, coding=coding)
    again, found, *_ = artifact.load(tmp_path / "small.fw", make(Mixed, seed=1).to(dtype))
    assert found == edits
    x = Mixed.data(5).to(dtype)
    assert torch.equal(again(x), model(x))
    for name, tensor in model.state_dict().items():
        if not name.endswith(".original"):  # where the confined value is now
            assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(again.first.parametrizations.weight.original, model.first.weight)
    again(x).float().square().sum().backward()
    assert again.first.parametrizations.weight.original.grad.count_nonzero()


def test_what_lies_beneath_is_kept_where_training_is_to_go_on(tmp_path):
    model, edits = confined()
    artifact.save(tmp_path / "small.fw", model, edits, None, beneath=True)
    again, *_ = artifact.load(tmp_path / "small.fw", make(Mixed, seed=1))
    assert_same_state(again, model)


def test_plain_weights_where_they_are_asked_for(tmp_path):
    model, edits = confined()
    fw.Compressed(model, edits, EMPTY, compressed().example).save(tmp_path / "small.fw", ledger=False)
    plain = fw.load(tmp_path / "small.fw", into=make(Mixed, seed=1), dense=True)
    assert_same_state(plain.model, released(model))
    assert not plain.edits
    with fw.open(tmp_path / "small.fw") as file:
        assert file.ledger is None
        assert dict.fromkeys(file) == dict.fromkeys(file.keys())
        assert set(file) == set(released(model).state_dict())
        for name, tensor in released(model).state_dict().items():
            assert torch.equal(file[name], tensor), name
            assert file.kind(name) == (tensor.dtype, tuple(tensor.shape))
        with pytest.raises(KeyError):
            file["first.parametrizations.weight.0.mask"]


def test_two_values_take_about_a_bit_and_pruned_ones_hardly_any(tmp_path):
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randint(0, 2, (256, 256)) - 1)
        model[1].weight.zero_()[0, :16] = 1.0
    edits = [Constrain(str(n), Grid(2, axis=None)) for n in range(2)]
    for edit in edits:
        edit.apply(model)
    artifact.save(tmp_path / "small.fw", model, edits, None)
    with fw.open(tmp_path / "small.fw") as file:
        sizes = file.sizes()
    assert 8192 <= sizes["0.parametrizations.weight.original"] <= 1.02 * 8192
    assert sizes["1.parametrizations.weight.original"] < 40


def test_values_that_no_code_gives_back_are_written_as_they_are(tmp_path):
    model, edits = confined()
    with torch.no_grad():
        model.first.parametrizations.weight.original.fill_(float("nan"))
    artifact.save(tmp_path / "small.fw", model, edits, None)
    again, *_ = artifact.load(tmp_path / "small.fw", make(Mixed, seed=1))
    original = again.first.parametrizations.weight.original
    assert torch.isnan(original).all()


def test_a_tighter_mask_takes_the_place_of_a_mask():
    layer = nn.Linear(4, 3)
    wide, tight = Mask(8), Mask(3)
    wide.put_on(layer).mask.view(-1)[8:] = False
    tight.put_on(layer).mask.view(-1)[3:] = False
    assert [c.kept for c in constraints_on(layer)] == [3]
    assert layer.weight.count_nonzero() == 3


# Batch norms


def test_folded_batch_norms_answer_the_same_and_take_less(tmp_path):
    model = make(Residual)
    whole = artifact.save(tmp_path / "whole.fw", model, [], None)
    folded = artifact.save(tmp_path / "folded.fw", model, [], None, fold=True)
    assert folded < whole - 300
    assert model.stem_norm.running_mean.any(), "the model itself stays as it is"
    again, *_ = artifact.load(tmp_path / "folded.fw", make(Residual, seed=1))
    torch.testing.assert_close(again.eval()(Residual.data(6)), model(Residual.data(6)))


# Files of earlier versions, which are to be read for ever


GOLDEN = {
    "version1.fw": "4b7476a0bcef7256dafdeec816e3894e184e04c813629f5976f30ad7f690e59e",
    "version2.fw": "aed4b71cfef0b2c209d3f7474534f4bda0dd47aa4b1a2c27cd5677a859ce3c32",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_files_of_every_version_are_read(name):
    """The values in them as one hash; they were written once and are never written again."""
    path = Path(__file__).parent / "golden" / name
    with fw.open(path) as file:
        digest = hashlib.sha256()
        for tensor in sorted(file):
            digest.update(tensor.encode() + artifact.raw_bytes(file[tensor]))
        assert digest.hexdigest() == GOLDEN[name]
        assert file.ledger is not None
        assert file.ledger.steps[0].step == "factorize.SVD"
    small = fw.load(path, into=make(Mixed, seed=4))
    assert int(small.model.first.parametrizations.weight[0].mask.sum()) == 96
    assert type(small.model.second).__name__ == "LinearPair"


@pytest.mark.parametrize("coding", ["smal", 3])
def test_a_coding_that_there_is_not_is_refused(tmp_path, coding):
    with pytest.raises(ArtifactError, match=r"coding is .*: it is one of small, fast, huffman"):
        compressed().save(tmp_path / "small.fw", coding=coding)
