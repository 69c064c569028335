"""Peak speed, memory, links and power of the devices people train on, from the vendors' data sheets; and this CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator, in a node of eight of them; or a rank's share of this machine's CPU."""

    peak_flops: float
    """FLOP/s, dense bf16 (V100: fp16); 0: known only by measuring"""
    memory: int
    """bytes"""
    link: float
    """bytes/s to the other devices of its node, one direction: NVLink"""
    network: float
    """bytes/s to other nodes, one direction: its share of the InfiniBand of the vendor's own eight-GPU systems"""
    watts: float
    """the most it takes; 0: not known"""
    flash: bool = True
    """whether variable-length flash attention runs on it, in half precision: from Ampere on"""
    cpu: bool = False


_GIB = 1 << 30
DEVICES = {
    "V100-16G": Device(125e12, 16 * _GIB, 150e9, 6.25e9, 300, flash=False),
    "V100-32G": Device(125e12, 32 * _GIB, 150e9, 6.25e9, 300, flash=False),
    "A100-40G": Device(312e12, 40 * _GIB, 300e9, 25e9, 400),
    "A100-80G": Device(312e12, 80 * _GIB, 300e9, 25e9, 400),
    "H100-80G": Device(989e12, 80 * _GIB, 450e9, 50e9, 700),
    "H200-141G": Device(989e12, 141 * _GIB, 450e9, 50e9, 700),
}
CPU = "CPU"
"""a device like those above: ranks that share the memory and the cores of this machine"""
ASSUMED_LOOPBACK = 1e9
"""bytes/s from a CPU rank to the next on the same machine, through gloo"""


def cpu(ranks: int) -> Device:
    """A rank's part of the memory of this machine, which `ranks` of them share."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks
    return Device(0, memory, ASSUMED_LOOPBACK, ASSUMED_LOOPBACK, 0, flash=False, cpu=True)


def device_name(driver_name: str, memory: int) -> str | None:
    """The table's name of a device that its driver calls so ("NVIDIA A100-SXM4-80GB") and that has so many bytes."""
    names = [name for name in DEVICES if name.split("-")[0] in driver_name]
    return min(names, key=lambda name: abs(DEVICES[name].memory - memory), default=None)


def peak_flops(device_name: str) -> float | None:
    """Peak of a device by the name its driver gives ("NVIDIA A100-SXM4-80GB"); None if it is not in the table."""
    for name, device in DEVICES.items():
        if name.split("-")[0] in device_name:
            return device.peak_flops
    return None
