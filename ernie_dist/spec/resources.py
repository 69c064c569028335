"""Where it runs: nodes, ranks per node, time; what only one launcher knows lives under its own name."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from ernie_dist.spec.hardware import CPU, DEVICES
from ernie_dist.spec.problems import suggest
from ernie_dist.spec.strict import Strict

_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def parse_time(value: Any) -> timedelta:
    """ "1d12h" -> timedelta. Raises ValueError."""
    if isinstance(value, timedelta):
        return value
    parts = re.findall(r"(\d+)\s*([dhms])", value) if isinstance(value, str) else []
    if not parts or re.sub(r"(\d+)\s*([dhms])\s*", "", value):
        raise ValueError("needs a time such as 24h, 90m or 1d12h")
    return timedelta(seconds=sum(int(number) * _SECONDS[unit] for number, unit in parts))


def _time_text(value: timedelta) -> str:
    return f"{int(value.total_seconds())}s"


TimeLimit = Annotated[
    timedelta,
    BeforeValidator(parse_time),
    PlainSerializer(_time_text, return_type=str),
    WithJsonSchema({"type": "string", "examples": ["24h", "90m"]}),
]


def _variable_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", value):
        raise ValueError("needs the name of a variable, without a value: WANDB_API_KEY")
    return value


EnvironmentName = Annotated[str, AfterValidator(_variable_name)]


class ContainerSpec(Strict):
    """The image in which each node's ranks run."""

    image: str = Field(description="what --container-image or apptainer takes")
    kind: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: tuple[str, ...] = Field((), description="host:container[:options]; the run directory has to be seen")
    python: str = Field("python", description="the interpreter in the image that has ernie_dist")


class SlurmSpec(Strict):
    """Site settings of a Slurm cluster."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    exclude: str | None = Field(None, description="nodes never to use, such as n[3,7]")
    exclusive: bool = Field(False, description="whole nodes, shared with no other job")
    gpus: bool | str = Field(
        True, description="a type of GPU to ask for, such as a100; false on a cluster without GPUs"
    )
    cpus_per_node: int | None = Field(None, ge=1)
    memory: str | None = Field(None, description="of each node, as --mem takes it: 480G; 0 is all of it")
    notice: TimeLimit | None = Field(
        None, description="how long before its end Slurm warns the job; default: by what saves took, else 2m"
    )
    modules: tuple[str, ...] = Field((), description="for `module load`")
    setup: tuple[str, ...] = Field((), description="lines of shell to begin with: conda activate, export NCCL_...")
    container: ContainerSpec | None = None
    options: tuple[str, ...] = Field((), description="further options of sbatch, as written: --mail-type=FAIL")

    @field_validator("options")
    @classmethod
    def _one_job_here(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            if re.match(r"--array|-a|--clusters?|-M|--wrap", option):
                raise ValueError(f"{option} cannot be used: a run is one job of the cluster one submits from")
        return options


class RaySpec(Strict):
    """Settings of a Ray cluster."""

    address: str | None = Field(None, description="of the dashboard, to submit to: http://head:8265")
    cpus_per_node: int | None = Field(None, ge=1, description="default: one per rank")
    gpus: bool | None = Field(None, description="whether nodes need GPUs; default: if the cluster has any at the time")
    labels: dict[str, str] = Field({}, description="what nodes must be labelled with: {team: law}")
    wait_for_nodes: TimeLimit = Field(
        timedelta(minutes=1),
        description="before going on with fewer nodes, or stopping for want of them",
    )
    stop_wait: TimeLimit = Field(
        timedelta(minutes=10), description="what `ray job stop` leaves to a run that was submitted from outside"
    )
    environment_file: str | None = Field(
        None, description="NAME=VALUE lines on the head of the cluster, for the names in resources.environment"
    )


class ResourcesSpec(Strict):
    nodes: int = Field(1, ge=1)
    min_nodes: int | None = Field(None, ge=1, description="go on with so few if nodes are lost for good; Ray alone")
    gpus_per_node: int = Field(1, ge=1, description="ranks per node; without GPUs that many CPU ranks")
    device: str | None = Field(None, description="what each rank runs on, for engine.memory: A100-80G, or CPU")
    time_limit: TimeLimit | None = Field(None, description="24h, 90m, 1d12h")
    health_check: str | None = Field(
        None, description="a line of shell run on every node before each attempt; a node where it fails is left out"
    )
    environment: tuple[EnvironmentName, ...] = Field(
        (), description="names of variables to take along to the nodes, besides the usual ones"
    )
    slurm: SlurmSpec = SlurmSpec()
    ray: RaySpec = RaySpec()

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str | None) -> str | None:
        if value is not None and value not in (known := (*DEVICES, CPU)):
            raise ValueError(f"unknown device; {suggest(value, known)}")
        return value

    @model_validator(mode="after")
    def _enough_nodes(self) -> ResourcesSpec:
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes {self.min_nodes} is more than nodes {self.nodes}")
        return self

    @property
    def world_size(self) -> int:
        """Ranks over all nodes."""
        return self.nodes * self.gpus_per_node
