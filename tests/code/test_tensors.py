"""Tensors of every type and shape come back to the last bit, in every coding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.code import tensors
from featherweight.code.container import DTYPES
from featherweight.code.entropy import entropy_bytes
from featherweight.code.numbers import Reader
from featherweight.errors import ArtifactError
from featherweight.task import raw_bytes

shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)


@given(st.sampled_from(DTYPES), shapes, st.integers(0, 2**32 - 1), st.sampled_from(tensors.CODINGS), st.booleans())
@settings(max_examples=250, deadline=None)
def test_any_tensor_comes_back_to_the_last_bit(dtype, shape, seed, coding, narrow):
    """Of random bytes, NaN and infinities among them, and of a few different values."""
    drawn = np.random.default_rng(seed)
    count = int(np.prod(shape)) * dtype.itemsize
    raw = drawn.integers(0, 2 if dtype == torch.bool or narrow else 256, count, np.uint8)
    flat = torch.from_numpy(raw).view(dtype) if count else torch.empty(0, dtype=dtype)
    tensor = flat.reshape(shape)
    data = tensors.encode(tensor, coding)
    found = tensors.decode(Reader(data), dtype, shape)
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert raw_bytes(found) == raw_bytes(tensor)


def test_views_and_extremes():
    for tensor in (
        torch.arange(12.0).reshape(3, 4).T,
        torch.ones(1).expand(50),
        torch.tensor([-(2**63), 2**63 - 1]),
        torch.tensor([2**63 - 1, 2**63 - 2]),
        torch.tensor(7, dtype=torch.int64),
        torch.tensor(True),
    ):
        found = tensors.decode(Reader(tensors.encode(tensor)), tensor.dtype, tuple(tensor.shape))
        assert torch.equal(found, tensor)


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.bfloat16, 0.665), (torch.float32, 0.835), (torch.float16, 0.86)], ids=str
)
def test_floats_are_as_small_as_their_exponents_allow(dtype, share):
    weight = (0.03 * torch.randn(400, 500, generator=torch.Generator().manual_seed(0))).to(dtype)
    size = len(tensors.encode(weight))
    assert size < share * weight.numel() * weight.element_size()
    assert size < 1.01 * entropy_bytes(weight)


def test_blocks_follow_each_other(monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK", 100)
    for tensor in (torch.randn(21, 17), torch.randint(-3, 4, (357,)), torch.rand(357) < 0.1):
        for coding in tensors.CODINGS:
            data = tensors.encode(tensor, coding)
            assert torch.equal(tensors.decode(Reader(data), tensor.dtype, tuple(tensor.shape)), tensor)


def test_a_stream_is_long_enough_for_its_values():
    zeros = torch.zeros(3_000_000, dtype=torch.int8)
    data = tensors.encode(zeros)
    assert len(data) == 46  # one byte for 65,536 values
    assert torch.equal(tensors.decode(Reader(data), torch.int8, (3_000_000,)), zeros)
    with pytest.raises(ArtifactError, match="4000000 values cannot be in 46 bytes"):
        tensors.decode(Reader(data), torch.int8, (4_000_000,))


def test_numbers_beyond_a_type_are_refused():
    data = tensors.encode(torch.tensor([200, 1, 0], dtype=torch.uint8))
    with pytest.raises(ArtifactError, match="it holds numbers that its type cannot"):
        tensors.decode(Reader(data), torch.int8, (3,))


def test_small_is_smallest_and_huffman_never_below_a_bit():
    drawn = torch.Generator().manual_seed(0)
    usage = torch.rand(90, generator=drawn) ** 4
    weight = (torch.rand(70, 90, generator=drawn) < usage).to(torch.int8)
    sizes = {coding: len(tensors.encode(weight, coding)) for coding in tensors.CODINGS}
    assert sizes["small"] < sizes["fast"] <= sizes["huffman"] * 1.05
    dense = torch.randint(0, 2, (100, 100), generator=drawn, dtype=torch.int8)
    assert len(tensors.encode(dense, "huffman")) >= 1250


def test_surroundings_are_used_where_they_tell_something():
    generator = np.random.default_rng(0)
    plain = generator.integers(-8, 8, (300, 200))
    assert tensors.encode_whole(plain, "small") == tensors.encode_whole(plain, "fast")
    columns = plain * (generator.random((1, 200)) < 0.3)  # whole columns of zeros
    small, fast = (tensors.encode_whole(columns, coding) for coding in ("small", "fast"))
    assert small is not None
    assert fast is not None
    assert len(small) < 0.8 * len(fast)
    assert (tensors.decode_whole(Reader(small), columns.shape) == columns).all()


@given(
    numbers=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=40),
    apart=st.sampled_from([4096, 65535, 65536, 2**31]),
    coding=st.sampled_from(tensors.CODINGS),
)
def test_whole_numbers_that_lie_far_apart_come_back(numbers: list[int], apart: int, coding: Any):
    values = np.array([n % apart for n in numbers] + [0, apart]) - apart // 2
    written = tensors.encode_whole(values, coding)
    assert written is not None
    assert np.array_equal(tensors.decode_whole(Reader(written), values.shape), values)


def test_codes_of_16_bits_take_two_bytes_each():
    codes = np.random.default_rng(0).integers(-(2**15), 2**15, 20_000)
    written = tensors.encode_whole(codes)
    assert written is not None
    assert len(written) <= 2 * len(codes) + 16
