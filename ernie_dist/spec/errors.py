"""One root for every error a person may read; each one is also a standard exception type.

A message names the field or file and line, the value, and the remedy. `exit_code` is what the process ends with:
2 says "the job or its data is wrong, do not retry".
"""


class ErnieError(Exception):
    """Root of all errors of ernie_dist that are not bugs. Shown to the person without a traceback."""

    exit_code = 2
    final = False
    """whether starting the run again would end in the same way, whatever the exit code says"""


class SpecError(ErnieError, ValueError):
    """The job description is wrong."""


class DataError(ErnieError, ValueError):
    """A source, a row or a prepared shard is wrong."""


class RunDirError(ErnieError, RuntimeError):
    """The run directory cannot be used for this job."""


class CheckpointError(ErnieError, RuntimeError):
    """A checkpoint cannot be written, read or trusted."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint could not be written: the run goes on from the one before, once there is room."""

    exit_code = 1


class RecordNotKept(ErnieError, RuntimeError):
    """metrics.jsonl or events.jsonl could not be written for too long."""

    exit_code = 1


class CheckpointReadError(CheckpointError):
    """The disk would not give a checkpoint back: perhaps it will by the next attempt."""

    exit_code = 1


class BadNumbersError(ErnieError, ArithmeticError):
    """Too many updates in a row were refused. The next attempt skips their batches, unless it is final."""

    exit_code = 1

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class RanksDiffer(ErnieError, RuntimeError):
    """Ranks that must hold the same parameters do not."""

    exit_code = 1


class PreflightFailed(ErnieError, RuntimeError):
    """A node is not fit for the run, or ranks do not reach each other: on other nodes it may go."""

    exit_code = 1


class EnvironmentProblem(ErnieError, RuntimeError):
    """This machine lacks something the job needs."""


class LeaseLost(ErnieError, RuntimeError):
    """Another launch has taken over the run."""

    exit_code = 1
    final = True
