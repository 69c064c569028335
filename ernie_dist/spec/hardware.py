"""Peak speed, memory, links and power of the devices people train on, from the vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator, in a node of eight of them."""

    peak_flops: float
    """FLOP/s, dense bf16 (V100: fp16)"""
    memory: int
    """bytes"""
    link: float
    """bytes/s to the other devices of its node, one direction: NVLink"""
    network: float
    """bytes/s to other nodes, one direction: its share of the InfiniBand of the vendor's own eight-GPU systems"""
    watts: float
    """the most it takes"""


_GIB = 1 << 30
DEVICES = {
    "V100-16G": Device(125e12, 16 * _GIB, 150e9, 6.25e9, 300),
    "V100-32G": Device(125e12, 32 * _GIB, 150e9, 6.25e9, 300),
    "A100-40G": Device(312e12, 40 * _GIB, 300e9, 25e9, 400),
    "A100-80G": Device(312e12, 80 * _GIB, 300e9, 25e9, 400),
    "H100-80G": Device(989e12, 80 * _GIB, 450e9, 50e9, 700),
    "H200-141G": Device(989e12, 141 * _GIB, 450e9, 50e9, 700),
}


def peak_flops(device_name: str) -> float | None:
    """Peak of a device by the name its driver gives ("NVIDIA A100-SXM4-80GB"); None if it is not in the table."""
    for name, device in DEVICES.items():
        if name.split("-")[0] in device_name:
            return device.peak_flops
    return None
