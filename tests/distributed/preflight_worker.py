"""One rank of a preflight, again and again in the same processes: once per run directory.

arguments: run directories, each with a job.json and the folder of attempt 1
prints one line of JSON per preflight: the event, or the message of the refusal
environment: STRANGE_PACKAGES, a folder with another transformers, which counts from the directory `versions` on
"""

import json
import os
import sys
from pathlib import Path

from ernie_dist import preflight
from ernie_dist.spec.errors import PreflightFailed
from ernie_dist.spec.run_files import RunFiles
from ernie_dist.world import World

preflight.PATIENCE_SECONDS = 1.0  # nothing is cached here

if __name__ == "__main__":
    world = World.from_environment()
    world.connect()
    for folder in map(Path, sys.argv[1:]):
        if folder.name == "versions" and "STRANGE_PACKAGES" in os.environ:
            sys.path.insert(0, os.environ["STRANGE_PACKAGES"])
        try:
            result = preflight.preflight(RunFiles(folder), 1, world).to_json()
        except PreflightFailed as error:
            result = {"refused": str(error), "exit_code": error.exit_code}
        print(json.dumps(result), flush=True)
    world.close()
