"""Tells how far a running step is: a thread that waits for points in the stream, in their order.

The engine's thread launches a whole step in a moment and goes on; what it marks on the way is
waited for here, asleep. Not known here: what a mark means, who hears of it.
"""

from __future__ import annotations

import logging
import threading
from queue import SimpleQueue
from typing import NamedTuple

from baton.engine.batch import LayerMarks
from baton.engine.gpu.device import ComputeDevice, Event

logger = logging.getLogger(__name__)


class _Mark(NamedTuple):
    event: Event
    marks: LayerMarks
    num_layers: int


class LayerWatch:
    """All calls from the engine's thread, inside `ComputeDevice.stream()`. The thread starts with
    the first mark and ends with the process: marks are as few as the steps that have them."""

    def __init__(self, device: ComputeDevice) -> None:
        self._device = device
        self._marks: SimpleQueue[_Mark] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def pass_layers(self, marks: LayerMarks | None, num_layers: int) -> None:
        """Everything launched so far computes these layers; tell when it has ended."""
        if marks is None or num_layers not in marks.layers:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="layer-watch", daemon=True)
            self._thread.start()
        self._marks.put(_Mark(self._device.record(sleeps=True), marks, num_layers))

    def _run(self) -> None:
        while True:
            event, marks, num_layers = self._marks.get()
            try:
                event.wait()
            except Exception as error:
                # The GPU has failed; whoever waits for the step is told so.
                logger.warning("a step's progress is not known: %s", error)
                continue
            marks.pass_layers(num_layers)
