"""Integer codes packed into machine words, and back. Pure functions on tensors.

All formats read here but one pack a dense bit stream, least significant bit first, and words are
little-endian: code k holds the bits k·b to k·b + b − 1 of the bytes, whatever the word. So bytes
are what is worked on, and a code that straddles two words needs no special case.

Unpacking goes through numpy: the work is many small steps on pieces that stay in cache, and a step
of torch costs four times as much before it begins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad as pad_last

BYTE = 8
WORD = 32

# Codes unpacked at a time, so that what lies between stays in cache.
CHUNK = 1 << 19

# A number as wide as the codes of one byte are when each has a byte of its own.
SPREAD = {1: torch.int64, 2: torch.int32, 4: torch.int16}
WIDE = {1: np.int64, 2: np.int32, 4: np.int16}

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.signedinteger[Any]]


def words_for(count: int, bits: int, word_bits: int = WORD) -> int:
    """Words that hold `count` codes of `bits` bits each."""
    return -(-count * bits // word_bits)


def unpack(words: Tensor, bits: int, count: int, dim: int = -1) -> Tensor:
    """The first `count` codes packed along `dim` of an integer tensor, as uint8.

    The result keeps the order of dimensions; along `dim` it lies contiguously in memory. `bits` is
    1 to 8. Written for any word width: int32 is what checkpoints hold.
    """
    # Twice where words are packed along another dimension: turning some columns of a large matrix
    # takes two to three times as long as a copy of them does.
    stream = np.ascontiguousarray(words.numpy())
    stream = np.ascontiguousarray(np.moveaxis(stream, dim, -1)).view(np.uint8)
    codes = stream if bits == BYTE else _unpack(stream.reshape(-1, stream.shape[-1]), bits)
    codes = codes.reshape(*stream.shape[:-1], codes.shape[-1])[..., :count]
    return torch.from_numpy(codes).movedim(-1, dim)


def _unpack(rows: Bytes, bits: int) -> Bytes:
    step = max(1, CHUNK * bits // BYTE // max(1, rows.shape[1]))
    parts = [_codes(rows[at : at + step], bits) for at in range(0, max(1, len(rows)), step)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _codes(rows: Bytes, bits: int) -> Bytes:
    if bits in SPREAD:
        return _spread(rows.astype(WIDE[bits]), bits, BYTE // bits)
    return _spread(_numbers(rows, bits), bits, BYTE)


def pack(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """The inverse of `unpack` into int32 words; the last word is filled up with zeros.

    Codes must lie below 2^bits: a larger one would spill into its neighbours.
    """
    assert codes.numel() == 0 or (int(codes.min()) >= 0 and int(codes.max()) >> bits == 0)
    words = words_for(codes.shape[dim], bits)
    rows = _rows(pad_last(codes.movedim(dim, -1).to(torch.uint8), (0, -codes.shape[dim] % WORD)))
    if bits == BYTE:
        stream = rows
    elif bits in SPREAD:
        stream = _gather(rows.view(SPREAD[bits]), bits, BYTE // bits).to(torch.uint8)
    else:
        number = _gather(rows.view(torch.int64), bits, BYTE)
        places = torch.arange(0, BYTE * bits, BYTE)
        stream = ((number.unsqueeze(-1) >> places) & 0xFF).to(torch.uint8).flatten(-2)
    return stream.view(torch.int32)[..., :words].movedim(-1, dim).contiguous()


def unpack_word_aligned(words: Tensor, bits: int, count: int, dim: int = -1) -> Tensor:
    """Like `unpack`, for a layout in which no code straddles two words.

    32 // bits codes lie in each int32 and the bits left over are unused: how compressed-tensors
    packed 3-bit codes up to release 0.17.
    """
    rows = words.movedim(dim, -1).unsqueeze(-1)
    shifts = torch.arange(0, WORD - bits + 1, bits, dtype=words.dtype)
    codes = ((rows >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(-2)
    return codes[..., :count].movedim(-1, dim)


def look_up(index: Tensor, pairs: Tensor, out: Tensor | None = None) -> Tensor:
    """The rows of `pairs` (fp32 [N, 2]) that a vector of indices names, one after the other.

    Two values move as one number of 8 bytes, half as many as are looked up; measured 2 to 6 times
    faster than indexing with one value each or with rows, and numpy's as 1.3 times torch's.
    """
    out = torch.empty(2 * len(index)) if out is None else out
    table, numbers = pairs.view(torch.int64).flatten(), out.view(torch.int64)
    # Without a mode numpy makes a copy of `out`, to keep it whole where an index is out of range.
    np.take(table.numpy(), index.numpy(), out=numbers.numpy(), mode="clip")
    return out


def _rows(tensor: Tensor, dim: int = -1) -> Tensor:
    """`dim` last, in memory as a new tensor would lie; `contiguous` lets odd strides of 1 pass."""
    rows = tensor.movedim(dim, -1).contiguous()
    return rows.view(-1).view(rows.shape)


def _numbers(rows: Bytes, bits: int) -> Numbers:
    """Eight codes fill `bits` bytes: those bytes as one int64."""
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % bits)))
    parts = padded.reshape(len(rows), -1, bits)
    number = parts[..., 0].astype(np.int64)
    for place in range(1, bits):
        number |= parts[..., place].astype(np.int64) << (BYTE * place)
    return number


def _spread(number: Numbers, bits: int, codes: int) -> Bytes:
    """Give each of the `codes` fields of a number a byte of its own.

    Field k moves from bit k·b to bit 8k; whatever else the shift brings along is masked away.
    """
    mask = (1 << bits) - 1
    spread = number & mask
    for place in range(1, codes):
        moved = number << (place * (BYTE - bits))
        moved &= mask << (BYTE * place)
        spread |= moved
    return spread.view(np.uint8)


def _gather(spread: Tensor, bits: int, codes: int) -> Tensor:
    """The inverse of `_spread`: the low `bits` bits of every byte, side by side."""
    mask = (1 << bits) - 1
    number = spread & mask
    for place in range(1, codes):
        number |= (spread >> (place * (BYTE - bits))) & (mask << (bits * place))
    return number
