"""One decision with all that it rests on, as one line of JSON.

`state` is what the planner remembered before it; on the first line of a file, after a start and
now and then. From there on every decision can be made once more (`Replay`).

Does not know: files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from baton.core.config import build
from baton.core.errors import ConfigError
from services.planner.autoscale import Autoscaler, Decision, Observation
from services.planner.autoscale_config import AutoscaleConfig
from services.planner.autoscaler_state import AutoscalerState
from services.planner.plain import to_plain
from services.planner.pool_model import PoolModel

VERSION = 2
MAX_SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class Models:
    """Seconds of both pools' workers, as measured or predicted beforehand."""

    prefill: PoolModel
    decode: PoolModel


@dataclass(frozen=True, slots=True)
class Term:
    """How one of a model's terms has done lately."""

    ratio: float = 1.0
    """What it is multiplied by for the decision."""
    error_ratio: float = 0.0
    """Mean share by which measurements differed from what it predicted."""
    predicted_s: float = 0.0
    measured_s: float = 0.0
    """Since the last decision; 0 for nothing measured."""


@dataclass(frozen=True, slots=True)
class Record:
    """Everything of one decision."""

    version: int
    number: int
    """Goes on over restarts, as long as the log is there."""
    at: str
    """UTC, to the second; `seen` has it exactly."""
    config: AutoscaleConfig
    models: Models
    prefill_seconds: Term
    decode_step: Term
    used: Models
    """The models with their corrections."""
    num_copies: int
    """Routers that answered."""
    num_refused: float
    """Requests sent away since the last decision."""
    seen: Observation
    decision: Decision
    orders: tuple[str, ...]
    """What was begun."""
    state: AutoscalerState | None = None


def to_line(record: Record) -> str:
    """Without its newline."""
    return json.dumps(to_plain(record), separators=(",", ":"), allow_nan=False)


def from_line(line: str, where: str) -> Record:
    """Raises ConfigError naming `where` and what is wrong."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON ({error}): no line of a decision log") from None
    if not isinstance(values, dict):
        shown = line.strip()[:MAX_SHOWN_CHARS]
        raise ConfigError(f"{where} holds {shown!r}, no decision of a planner")
    version = values.get("version")
    if version != VERSION:
        raise ConfigError(
            f"{where} is of version {version!r:.20}, this release reads {VERSION}: it is no line "
            "of a decision log, or of another release's"
        )
    return build(Record, values, where=f"{where}: ")


class Replay:
    """Makes every decision once more, with the state machine as it is now.

    Begins with the first record that has a state, and takes up every later one.
    """

    def __init__(self) -> None:
        self.autoscaler: Autoscaler | None = None
        """As it is after the last record."""
        self.num_equal = 0
        self.num_different = 0

    def step(self, record: Record) -> Decision | None:
        """None before the first state. Raises ConfigError for a record that cannot follow the one
        before it."""
        try:
            if record.state is not None:
                self.autoscaler = Autoscaler(record.config, record.used.prefill, record.used.decode)
                self.autoscaler.restore(record.state)
            if self.autoscaler is None:
                return None
            self.autoscaler.use(record.used.prefill, record.used.decode)
            decision = self.autoscaler.decide(record.seen)
        except ValueError as error:
            raise ConfigError(f"decision {record.number} cannot be replayed: {error}") from None
        is_equal = decision == record.decision
        self.num_equal += is_equal
        self.num_different += not is_equal
        return decision
