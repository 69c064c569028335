"""Amounts that carry their unit: "30B tokens", "2 epochs", "500 steps", "5 %"; and plain counts such as "1M".

In a quantity K, M, B and T are decimal (30B tokens = 30 * 10**9), as in papers. In `tokens_per_batch` they are powers
of 1024, as in batch sizes: 1M = 1,048,576 = 256 sequences of 4096.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

_AMOUNT = re.compile(
    r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*(?:([kKmMbBgGtT]i?)(?![a-zA-Z]))?\s*([a-zA-Z%]*)\s*$"
)
_POWER = {"k": 1, "m": 2, "b": 3, "g": 3, "t": 4}


class Unit(str, Enum):
    TOKENS = "tokens"
    STEPS = "steps"
    EPOCHS = "epochs"
    PERCENT = "%"


_UNITS = {
    **dict.fromkeys(("tokens", "token", "tok"), Unit.TOKENS),
    **dict.fromkeys(("steps", "step"), Unit.STEPS),
    **dict.fromkeys(("epochs", "epoch"), Unit.EPOCHS),
    **dict.fromkeys(("%", "percent"), Unit.PERCENT),
}


@dataclass(frozen=True)
class Quantity:
    """An amount and its unit. Whole for tokens and steps; epochs and percent may be fractions."""

    amount: int | float
    unit: Unit

    def __str__(self) -> str:
        return f"{self.amount} {self.unit.value}"


def parse_quantity(value: Any, units: tuple[Unit, ...], *, positive: bool = False) -> Quantity:
    """Reads "30B tokens". Raises ValueError with the accepted forms."""
    accepted = " or ".join(f'"{_EXAMPLE[unit]}"' for unit in units)
    if isinstance(value, Quantity):
        number, unit = Decimal(str(value.amount)), value.unit
    else:
        match = _AMOUNT.match(value) if isinstance(value, str) else None
        if match is None or (match[3].lower() not in _UNITS):
            raise ValueError(f"needs an amount with its unit: {accepted}")
        number, unit = _scaled(match[1], match[2], binary=False), _UNITS[match[3].lower()]
    if unit not in units:
        raise ValueError(f"cannot be counted in {unit.value} here: use {accepted}")
    if number == 0 and positive:
        raise ValueError("must be greater than zero")
    if unit in (Unit.TOKENS, Unit.STEPS):
        if number != int(number):
            raise ValueError(f"must be a whole number of {unit.value}")
        return Quantity(int(number), unit)
    return Quantity(int(number) if number == int(number) else float(number), unit)


def parse_count(value: Any) -> int:
    """Reads 1048576, "1M" or "1Mi" (both 2**20), "64K". Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError('needs a whole number such as 1048576 or "1M" (= 1024 * 1024)')
    match = _AMOUNT.match(str(value))
    if match is None or match[3]:
        raise ValueError('needs a whole number such as 1048576 or "1M" (= 1024 * 1024)')
    number = _scaled(match[1], match[2], binary=True)
    if number != int(number) or number < 1:
        raise ValueError("must be a whole number of at least 1")
    return int(number)


def _scaled(digits: str, suffix: str | None, *, binary: bool) -> Decimal:
    number = Decimal(digits.replace("_", ""))
    if not suffix:
        return number
    base = 1024 if binary or suffix.endswith("i") else 1000
    return number * base ** _POWER[suffix[0].lower()]


_EXAMPLE = {Unit.TOKENS: "30B tokens", Unit.STEPS: "500 steps", Unit.EPOCHS: "2 epochs", Unit.PERCENT: "5 %"}


def _quantity_type(*units: Unit, positive: bool) -> Any:
    schema = {"type": "string", "examples": [_EXAMPLE[unit] for unit in units]}
    return Annotated[
        Quantity,
        BeforeValidator(lambda value: parse_quantity(value, units, positive=positive)),
        PlainSerializer(str, return_type=str),
        WithJsonSchema(schema),
    ]


Duration = _quantity_type(Unit.TOKENS, Unit.STEPS, Unit.EPOCHS, positive=True)
"""How long a stage lasts."""
Interval = _quantity_type(Unit.TOKENS, Unit.STEPS, positive=True)
"""How often something happens."""
Span = _quantity_type(Unit.TOKENS, Unit.STEPS, Unit.PERCENT, positive=False)
"""A part of a schedule; percent of the stages that share it."""
Count = Annotated[
    int, BeforeValidator(parse_count), WithJsonSchema({"type": ["integer", "string"], "examples": ["1M"]})
]
"""A count with an optional binary suffix."""
