"""What a checkpoint's files depend on, and which other engine and number of ranks they can be converted to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class EngineLayout:
    """How an engine cuts the state of a run into files."""

    kind: str
    """deepspeed or plain"""
    ds_config: str
    """name of the policy; "" for plain"""
    zero_stage: int
    partitioning: str
    """what of the policy decides how states are cut up, besides the ZeRO stage"""
    precision: str
    """as it came to be in the ranks; "auto" before anybody knows"""
    ranks: int
    frozen: tuple[tuple[str, ...], ...]
    """all freeze lists of the job: parameter groups follow from them"""

    def __str__(self) -> str:
        frozen = f", freezing {' and '.join(' '.join(names) for names in self.frozen)}" if self.frozen else ""
        return f"{self.kind} {self.ds_config}".rstrip() + f", {self.precision}, {self.ranks} rank(s){frozen}"

    def obstacle(self, other: EngineLayout) -> str | None:
        """Why a checkpoint of this layout cannot go on as `other`, with the remedy; None if it can."""
        if "auto" in (self.precision, other.precision):  # nobody knows yet: the ranks will
            other = replace(other, precision=self.precision)
        if self.fits(other):
            return None
        for field, what in (("kind", "engine"), ("precision", "precision"), ("frozen", "freeze lists")):
            if getattr(self, field) != getattr(other, field):
                return f"the {what} of a run cannot change; go on with {self}"
        if self.zero_stage == 0 or other.zero_stage == 0:
            return f"zero0 can neither be converted to another ZeRO stage nor from one; go on with {self.ds_config}"
        return None

    def fits(self, other: EngineLayout) -> bool:
        """Whether the files of one are the files of the other."""
        if self.zero_stage == other.zero_stage == 0 and self.kind == other.kind == "deepspeed":
            return (self.precision, self.frozen) == (other.precision, other.frozen)  # every rank holds everything
        return replace(self, ds_config="") == replace(other, ds_config="")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> EngineLayout:
        """Raises ValueError if it is none."""
        try:
            return cls(**{**value, "frozen": tuple(tuple(names) for names in value["frozen"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not the layout of a checkpoint ({error})") from None
