"""The run-length code of Label Studio's brush (thi.ng/rle-pack).

A stream of bits, highest first: 32 bits number of values; 5 bits word size - 1; four times 4 bits size - 1 of a run's
counter; then runs: 1 bit whether it repeats one value, 2 bits which of the four sizes its counter has, the counter
(length - 1), and one word (repeated) or a word for each value. label-studio-sdk has a decoder, which builds a string
of every bit and brings some forty packages; this one is a page long.
"""

from __future__ import annotations

import numpy as np

from ..utils.errors import BLPSegError

_LARGEST = 1 << 22  # bytes of a stroke's code, which bounds the time it takes


def decode_rle(where: str, rle: list[int], expected: int) -> np.ndarray:
    """The values of a brush mask, (expected,) uint8, from its code: bytes as a list of integers, as in the JSON export.

    ``expected`` is 4 (RGBA) a pixel; it is checked before anything is allocated. Raises BLPSegError, which names
    ``where``, if the code is cut short, damaged or of another size.
    """
    try:
        data = bytes(rle)
    except (TypeError, ValueError):
        raise BLPSegError(f"{where}: a brush stroke's `rle` is no list of bytes; export it again") from None
    if len(data) > _LARGEST:
        raise BLPSegError(f"{where}: a brush stroke of {len(data)} bytes of `rle`; {_LARGEST} are possible")
    bits = _Bits(where, data)
    total = bits.read(32)
    if total != expected:
        raise BLPSegError(f"{where}: a brush stroke of {total} values where the image needs {expected}; annotate again")
    word_size = bits.read(5) + 1
    if word_size > 8:
        raise BLPSegError(f"{where}: a brush stroke of {word_size}-bit values, 8 expected; export it again")
    counter_sizes = [bits.read(4) + 1 for _ in range(4)]
    values = np.empty(expected, np.uint8)
    done = 0
    while done < expected:
        repeats = bits.read(1)
        end = done + 1 + bits.read(counter_sizes[bits.read(2)])
        if end > expected:
            raise BLPSegError(f"{where}: a brush stroke runs beyond the image; export it again")
        values[done:end] = bits.read(word_size) if repeats else bits.read_words(word_size, end - done)
        done = end
    return values


def encode_rle(mask: np.ndarray) -> list[int]:
    """The code of a mask (H, W) bool, as Label Studio's brush has it: RGBA, 255 in the mask and 0 elsewhere."""
    flat = np.asarray(mask, bool).reshape(-1)
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]) + 1, flat.size)
    sizes = 4 * np.diff(ends, prepend=0)
    counters = (4, 8, 12, 16)  # bits
    bits = [f"{4 * flat.size:032b}", f"{7:05b}", *(f"{size - 1:04b}" for size in counters)]
    for size, value in zip(sizes.tolist(), flat[ends - 1].tolist(), strict=True):
        while size:
            part = min(size, 1 << counters[-1])
            kind = next(i for i, counter in enumerate(counters) if part <= 1 << counter)
            bits.append(f"1{kind:02b}{part - 1:0{counters[kind]}b}{255 * value:08b}")
            size -= part
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


class _Bits:
    def __init__(self, where: str, data: bytes):
        self.where, self.data, self.place = where, data, 0

    def read(self, size: int) -> int:
        """The next 1..32 bits."""
        first, self.place = self.place, self.place + size
        self._check()
        chunk = self.data[first >> 3 : (self.place + 7) >> 3]
        return int.from_bytes(chunk, "big") >> (-self.place % 8) & ((1 << size) - 1)

    def read_words(self, size: int, count: int) -> np.ndarray:
        """``count`` words of ``size`` bits: (count,) uint8."""
        first, self.place = self.place, self.place + size * count
        self._check()
        chunk = np.frombuffer(self.data, np.uint8)[first >> 3 : (self.place + 7) >> 3]
        bits = np.unpackbits(chunk)[first % 8 :][: size * count].reshape(count, size)
        return np.packbits(bits, axis=1)[:, 0] >> (8 - size)

    def _check(self):
        if self.place > 8 * len(self.data):
            raise BLPSegError(f"{self.where}: a brush stroke's `rle` is cut short; export it again")
