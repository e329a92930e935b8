"""Packing against whole numbers of any size, and against itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qmerge.formats.packing import pack, unpack, unpack_word_aligned, words_for

ALL_BITS = range(1, 9)
FEW = settings(max_examples=40)


@st.composite
def codes_of_bits(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A matrix of codes, the extreme ones often, and its width in bits."""
    bits = draw(st.sampled_from(ALL_BITS))
    rows, columns = draw(st.integers(1, 2)), draw(st.integers(1, 40))
    top = (1 << bits) - 1
    code = st.one_of(st.sampled_from([0, top]), st.integers(0, top))
    flat = draw(st.lists(code, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(flat, dtype=torch.uint8).view(rows, columns), bits


def as_number(words: Tensor) -> int:
    return sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))


@FEW
@given(codes_of_bits())
def test_packed_words_are_one_long_number(case: tuple[Tensor, int]) -> None:
    codes, bits = case
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (len(codes), words_for(codes.shape[1], bits))
    for row, packed in zip(codes, words, strict=True):
        number = sum(int(code) << (bits * place) for place, code in enumerate(row))
        assert as_number(packed) == number


@FEW
@given(codes_of_bits(), st.sampled_from([0, 1]))
def test_unpack_is_the_inverse_along_both_dimensions(case: tuple[Tensor, int], dim: int) -> None:
    codes, bits = case
    assert torch.equal(unpack(pack(codes, bits, dim=dim), bits, codes.shape[dim], dim=dim), codes)


@FEW
@given(st.sampled_from(ALL_BITS), st.integers(1, 40), st.integers(0, 39), st.data())
def test_a_code_leaves_its_neighbours_alone(
    bits: int, count: int, place: int, data: st.DataObject
) -> None:
    place %= count
    top = (1 << bits) - 1
    for others, own in ((0, top), (top, 0), (top, data.draw(st.integers(0, top)))):
        codes = torch.full((1, count), others, dtype=torch.uint8)
        codes[0, place] = own
        assert torch.equal(unpack(pack(codes, bits), bits, count), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_of_any_width(bits: int, dtype: torch.dtype) -> None:
    """gptqmodel can pack into words of 8, 16 and 64 bits."""
    codes = torch.randint(0, 1 << bits, (3, 64), generator=torch.Generator().manual_seed(bits))
    width = dtype.itemsize * 8
    per_word = width // bits
    words = torch.zeros(3, 64 // per_word, dtype=torch.int64)
    for place in range(64):
        words[:, place // per_word] |= codes[:, place] << (bits * (place % per_word))
    assert torch.equal(unpack(words.to(dtype), bits, 64), codes.to(torch.uint8))


@FEW
@given(st.sampled_from(ALL_BITS), st.integers(1, 70))
def test_word_aligned_codes(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (2, count), generator=torch.Generator().manual_seed(count))
    per_word = 32 // bits
    words = torch.zeros(2, -(-count // per_word), dtype=torch.int64)
    for place in range(count):
        words[:, place // per_word] |= codes[:, place] << (bits * (place % per_word))
    words = (words - ((words >> 31) << 32)).to(torch.int32)
    assert torch.equal(unpack_word_aligned(words, bits, count), codes.to(torch.uint8))
    down = unpack_word_aligned(words.T.contiguous(), bits, count, dim=0)
    assert torch.equal(down, codes.T.to(torch.uint8))


def test_a_code_too_large_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        pack(torch.tensor([[16]]), 4)
    with pytest.raises(AssertionError):
        pack(torch.tensor([[-1]]), 4)
