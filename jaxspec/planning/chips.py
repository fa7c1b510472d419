"""Rates and memory of TPU chips by Google's figures, the speed of a mesh axis on their network, and rates of GPUs.

Peak rates, memory and links are those of Google Cloud's documentation (docs.cloud.google.com/tpu, 2026). It gives the
bandwidth of all links of a chip in both directions; here a link has its share of that in one direction, with two links
for every axis of the torus. v4's network between slices and tpu7x's int8 rate are not documented, and are estimates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Chip(NamedTuple):
    """One chip; rates are per second."""

    flops: float
    """Peak FLOPs of bf16 matmuls."""
    int8_ops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    """Bytes over one link in one direction."""
    slice_bandwidth: float
    """Bytes over a chip's share of the data-centre network in one direction."""
    whole_ring: int
    """An axis of a slice is a ring if its number of chips is a multiple of this."""
    cores: int = 1
    """Number of devices that JAX sees in a chip, which share all of the above."""


CHIPS = {
    "v4": Chip(275e12, 275e12, 32 * 2**30, 1228e9, 50e9, 6.25e9, 4, cores=2),
    "v5e": Chip(197e12, 393e12, 16 * 2**30, 819e9, 50e9, 3.125e9, 16),
    "v5p": Chip(459e12, 918e12, 95 * 2**30, 2765e9, 100e9, 6.25e9, 4),
    "v6e": Chip(918e12, 1836e12, 32 * 2**30, 1638e9, 100e9, 12.5e9, 16),
    "tpu7x": Chip(2307e12, 2307e12, 192 * 2**30, 7380e9, 100e9, 12.5e9, 4, cores=2),
}
"""Name before the colon of a topology such as `v6e:8x8` -> its chip."""


class DataSheet(NamedTuple):
    """Peak rates of a device a second, by its vendor's data sheet."""

    flops: float
    """Of dense bf16 matmuls."""
    hbm_bandwidth: float


GPUS = {
    "NVIDIA H200": DataSheet(989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": DataSheet(989e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": DataSheet(312e12, 2.039e12),
}
"""Name of a device as JAX gives it -> its data sheet. H100 and A100 are the SXM modules."""


def chip_of(topology: str) -> Chip:
    """Returns the chip of a topology such as `v5p:4x4x8`; raises ValueError for an unknown chip or a missing shape."""
    name, _, shape = topology.partition(":")
    if name not in CHIPS:
        raise ValueError(f"topology {topology!r}: there is no chip {name!r}; choose from {', '.join(CHIPS)}")
    if not all(part.isdecimal() and int(part) > 0 for part in shape.split("x")):
        raise ValueError(f"topology {topology!r}: give the chip and the slice's shape, such as v6e:8x8 or v5p:4x4x8")
    return CHIPS[name]


def device_part(chip: Chip) -> Chip:
    """Returns a device's share of its chip."""
    n = chip.cores
    return chip._replace(
        flops=chip.flops / n,
        int8_ops=chip.int8_ops / n,
        hbm_bytes=chip.hbm_bytes // n,
        hbm_bandwidth=chip.hbm_bandwidth / n,
        link_bandwidth=chip.link_bandwidth / n,
        slice_bandwidth=chip.slice_bandwidth / n,
    )


def network_bandwidth(chip: Chip, devices: Sequence[Any], shape: Sequence[int]) -> float:
    """Returns the bytes a second that each of these devices of a slice of this shape can send to the next one.

    If the devices extend along several axes of the torus, all these axes carry data. An axis carries data in both
    directions if they cover a whole ring, and otherwise in one. Devices of several slices use the slower network.
    """
    if len({getattr(device, "slice_index", 0) or 0 for device in devices}) > 1:
        return chip.slice_bandwidth
    places = np.asarray([device.coords for device in devices])
    total = 0.0
    for axis in range(places.shape[1]):
        along = len(set(places[:, axis].tolist()))
        if along < 2:
            continue
        whole = along == shape[axis] and along % chip.whole_ring == 0 and along > 2
        total += chip.link_bandwidth * (2 if whole else 1)
    return total or math.inf  # devices of one chip do not use the network
