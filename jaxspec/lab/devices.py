"""Devices that rounds are priced for: their names, and their peak rates."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax

from jaxspec.planning.chips import CHIPS, GPUS, chip_of, device_part

GPU_NAMES = {"a100": "NVIDIA A100-SXM4-80GB", "h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
"""Short names of GPUs -> names as JAX gives them."""
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    **{name: short for short, name in GPU_NAMES.items()},
}
"""Names of devices as JAX gives them -> short names."""
CPU = "cpu"


class DevicePeaks(NamedTuple):
    """Peak rates a second of what runs a round: one device, or all chips of a slice."""

    device: str
    flops: float
    bandwidth: float
    memory: float = math.inf
    """Bytes that it holds."""

    @property
    def rates(self) -> dict[str, float]:
        """The facts of its peak rates."""
        return {"peak_flops_per_second": self.flops, "bandwidth_bytes_per_second": self.bandwidth}


def device_here() -> str:
    """Returns the short name of the device that JAX computes on; the name that JAX gives where there is none."""
    device = jax.devices()[0]
    kind = str(device.device_kind)
    return CPU if device.platform == "cpu" else KINDS.get(kind, kind)


def is_tpu(device: str) -> bool:
    """Returns whether this is a TPU's name, or a topology's."""
    return device.partition(":")[0] in CHIPS


def check_device(device: str) -> None:
    """Raises ValueError for a device whose peak rates are not known."""
    if device != CPU and device not in GPU_NAMES and not is_tpu(device):
        known = ", ".join((CPU, *CHIPS, *GPU_NAMES))
        raise ValueError(f"--device is {device!r}; give one of {known}, or a slice of TPUs such as v6e:2x4")
    if ":" in device:
        chip_of(device)


def peaks_of(device: str) -> DevicePeaks:
    """Returns the peak rates of an accelerator by its vendor's figures: of one device, or of a whole TPU slice.

    Raises ValueError for a device that is not known.
    """
    check_device(device)
    if device in GPU_NAMES:
        sheet = GPUS[GPU_NAMES[device]]
        return DevicePeaks(device, sheet.flops, sheet.hbm_bandwidth)
    if device == CPU:
        raise ValueError("a CPU has no data sheet here: its rates are measured")
    name, _, shape = device.partition(":")
    chips = math.prod(int(n) for n in shape.split("x")) if shape else 1
    chip = CHIPS[name] if shape else device_part(CHIPS[name])
    return DevicePeaks(device, chips * chip.flops, chips * chip.hbm_bandwidth, chips * chip.hbm_bytes)
