"""Peak speed and memory of the devices people train on. Dense bf16 (V100: fp16), from the vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator: peak FLOP/s in half precision, memory in bytes."""

    peak_flops: float
    memory: int


_GIB = 1 << 30
DEVICES = {
    "V100-16G": Device(125e12, 16 * _GIB),
    "V100-32G": Device(125e12, 32 * _GIB),
    "A100-40G": Device(312e12, 40 * _GIB),
    "A100-80G": Device(312e12, 80 * _GIB),
    "H100-80G": Device(989e12, 80 * _GIB),
    "H200-141G": Device(989e12, 141 * _GIB),
}


def peak_flops(device_name: str) -> float | None:
    """Peak of a device by the name its driver gives ("NVIDIA A100-SXM4-80GB"); None if it is not in the table."""
    for name, device in DEVICES.items():
        if name.split("-")[0] in device_name:
            return device.peak_flops
    return None
