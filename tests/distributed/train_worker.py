"""Run under torchrun: trains the job of one run directory after another in the same processes.

arguments: run directories, each with a frozen job.json
"""

import io
import sys
from pathlib import Path

import torch

from ernie_dist.train import train
from ernie_dist.world import World

if __name__ == "__main__":
    torch.set_num_threads(1)
    world = World.from_environment()
    for folder in sys.argv[1:]:
        assert train(Path(folder), 1, world, io.StringIO())
    world.close()
