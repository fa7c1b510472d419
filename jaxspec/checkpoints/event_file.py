"""TensorBoard's event files: scalars by step, in records of protocol buffers.

The usual writer (tensorboardX) is not used, because it imports torch if that is installed, and loses its queue of
records when a run is killed. The format is TensorBoard's `event.proto` (version 2) in TFRecord framing.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from pathlib import Path

VERSION = b"brain.Event:2"
_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), bits reversed


class EventFile:
    """One event file in `folder`; TensorBoard reads all files of a folder as one run.

    TensorBoard drops the steps of earlier files behind `resumed_from`, because the run repeats them.
    """

    def __init__(self, folder: Path, resumed_from: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        again = any(folder.glob("events.out.tfevents.*"))
        self.path = folder / f"events.out.tfevents.{time.time_ns()}"
        self._append(_text(3, VERSION))
        if resumed_from or again:
            self._append(_number(2, resumed_from + 1) + _text(7, _number(1, 1)))  # session_log: START

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends the scalars of one step; the operating system has them when this returns."""
        values = (_text(1, name.encode()) + _fixed(2, "f", value) for name, value in scalars.items())
        self._append(_number(2, step) + _text(5, b"".join(_text(1, value) for value in values)))

    def _append(self, fields: bytes) -> None:
        event = _fixed(1, "d", time.time()) + fields
        length = struct.pack("<Q", len(event))
        append_whole(self.path, length + masked_crc(length) + event + masked_crc(event))


def append_whole(path: Path, data: bytes) -> None:
    """Appends all of `data` or, if that fails, nothing."""
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(end)
            raise


def masked_crc(data: bytes) -> bytes:
    """Returns TFRecord's checksum: CRC-32C, rotated by 15 bits and shifted by a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _crc_of(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (_POLYNOMIAL if byte & 1 else 0)
    return byte


_TABLE = [_crc_of(byte) for byte in range(256)]


def _number(field: int, value: int) -> bytes:
    """Returns a varint field."""
    return _varint(field << 3) + _varint(value)


def _fixed(field: int, kind: str, value: float) -> bytes:
    """Returns a double (`d`) or float (`f`) field."""
    return _varint(field << 3 | (1 if kind == "d" else 5)) + struct.pack(f"<{kind}", value)


def _text(field: int, value: bytes) -> bytes:
    """Returns a string, bytes or message field."""
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Returns a varint: seven bits a byte, the lowest first; all bytes but the last have the highest bit set."""
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
