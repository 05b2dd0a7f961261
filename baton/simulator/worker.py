"""One worker in virtual time: the engine as it is, over a runner that computes nothing.

    kick ─► step ─► its results a step's time later ─► the next step

Does not know: the router, other workers; it tells `listener`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, Role, WorkerId, WorkerInfo
from baton.engine.batch import Batch, LaunchedStep, SampledToken
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.step_output import StepOutput
from baton.simulator.events import EventQueue
from baton.simulator.hardware import Hardware
from baton.simulator.host import Host

TOKEN = SampledToken(1, None)


class SimRunner:
    """Implements Runner; remembers how long what it has launched would take."""

    max_in_flight = 1

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self._seconds = 0.0

    def launch(self, batch: Batch) -> LaunchedStep:
        self._seconds += self._hardware.step_s(batch)
        # Of sequences that do not sample yet, the engine does not look at the result.
        return _Step([TOKEN] * len(batch.scheduled))

    def take_s(self) -> float:
        """Seconds of all that was launched since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class _Step:
    def __init__(self, results: Sequence[SampledToken]) -> None:
        self._results = results

    def wait(self) -> list[SampledToken | None]:
        return list(self._results)


class WorkerListener(Protocol):
    def on_step(self, worker: SimWorker, output: StepOutput) -> None:
        """A step is over; the clock shows its end."""
        ...


class SimWorker:
    """`engine` is called between steps only, as in a real worker; follow a call by `kick`."""

    def __init__(
        self,
        name: str,
        role: Role,
        *,
        layout: KvLayout,
        num_blocks: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        hardware: Hardware,
        events: EventQueue,
        listener: WorkerListener,
    ) -> None:
        self.runner = SimRunner(hardware)
        self.host: Host | None = None
        """That it shares with others; None: it has one of its own."""
        self._neighbour_share = hardware.neighbour_share
        self._gap_s = hardware.step_gap_s
        self._events = events
        self._listener = listener
        self._is_stepping = False
        self.busy_s = 0.0
        """Seconds spent in steps."""
        self.engine = Engine(
            config=EngineConfig(
                model_path=Path(),
                block_size=layout.block_size,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_waiting=1 << 20,
            ),
            layout=layout,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            runner=self.runner,
            clock=events,
            timer=events,
        )
        self.info = WorkerInfo(
            WorkerId(name), Epoch("1"), role, f"{name}:1", "simulated", layout, num_blocks,
            max_model_len, max_num_seqs, "fake", 1,
        )  # fmt: skip

    @property
    def worker_id(self) -> WorkerId:
        return self.info.worker_id

    def kick(self) -> None:
        """Something may have to be done: step, unless a step is under way."""
        if self._is_stepping or not self.engine.has_work:
            return
        self._is_stepping = True
        output = self.engine.step()
        seconds = self.runner.take_s()
        if self.host is not None:
            self.host.run(seconds, self._neighbour_share, self._timed(output))
            return
        self.busy_s += seconds
        self._events.after(seconds, lambda: self._end_step(output))

    def _timed(self, output: StepOutput) -> Callable[[], None]:
        """The end of a step whose seconds depend on others."""
        started_s = self._events.now()

        def end() -> None:
            self.busy_s += self._events.now() - started_s
            self._end_step(output)

        return end

    def _end_step(self, output: StepOutput) -> None:
        if self._gap_s:
            self._events.after(self._gap_s, self._go_on)
            self._listener.on_step(self, output)
            return
        self._is_stepping = False
        self._listener.on_step(self, output)
        self.kick()

    def _go_on(self) -> None:
        self._is_stepping = False
        self.kick()
