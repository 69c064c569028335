"""Run under torchrun: one rank of one attempt, with faults that no job would have.

arguments: run directory, attempt, JSON with `nan` and `spike` (batches whose loss is made so), `stop` (a batch before
which a stop is asked for), `flip` ([rank, batch]: a bit of that rank's parameters flips after that batch)
leaves in the attempt's folder: touched.json, batch -> whether its step changed a parameter
"""

import json
import math
import os
import sys
from pathlib import Path

import torch

from ernie_dist import __main__, train
from ernie_dist.spec.run_files import RunFiles
from ernie_dist.spec.stop_file import StopNote, ask

RUN, ATTEMPT, FAULTS = RunFiles(Path(sys.argv[1])), int(sys.argv[2]), json.loads(sys.argv[3])
RANK = int(os.environ.get("RANK", 0))
touched: dict[int, bool] = {}
current = [-1]


def faulty_loss(model, batch, loss=train.summed_loss):
    value = loss(model, batch)
    if not torch.is_grad_enabled():  # an evaluation
        return value
    return value * (math.nan if current[0] in FAULTS.get("nan", ()) else 50 if current[0] in FAULTS["spike"] else 1)


def watched_engine(*given, build=train.build_engine, **named):
    engine = build(*given, **named)
    step = engine.step

    def watched_step(batch, *rest, **options):
        current[0] = batch.index
        if FAULTS.get("stop") == batch.index and RANK == 0:
            ask(RUN.stop, StopNote("the test"))
        before = engine.replicated_digest()
        result = step(batch, *rest, **options)
        touched[batch.index] = engine.replicated_digest() != before
        if FAULTS.get("flip") == [RANK, batch.index]:
            weight = next(engine._engine.module.parameters()).data.view(-1).view(torch.int32)
            weight[3] ^= 1 << 22
        if RANK == 0:
            RUN.attempt(ATTEMPT).joinpath("touched.json").write_text(json.dumps(touched))
        return result

    engine.step = watched_step
    return engine


if __name__ == "__main__":
    torch.set_num_threads(1)
    train.summed_loss, train.build_engine = faulty_loss, watched_engine
    sys.exit(__main__.main())
