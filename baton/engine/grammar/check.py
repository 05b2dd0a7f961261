"""`python -m baton.engine.grammar.check`: compiles one specification and says what is wrong with
it.

A process of its own, for specifications whose cost nobody can tell in advance: it can be ended.
Reads kind and text as JSON, writes the refusal, or nothing. Bounds its own time and memory too, so
that it outlives no limit when whoever started it is gone.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys

from baton.core.errors import InvalidRequest
from baton.core.structured import StructuredKind, StructuredSpec
from baton.engine.grammar.spec import refusal, validate_in_process

MAX_CPU_S = 4
"""With 0.3 s to start. The engine compiles what took less, on a thread beside its steps."""
CHECK_TIMEOUT_S = 20
"""For a busy machine."""
MAX_MEMORY_BYTES = 2 << 30


def validate_aside(spec: StructuredSpec, *, max_cpu_s: int = MAX_CPU_S) -> None:
    """`validate_in_process` in another one. Blocks up to CHECK_TIMEOUT_S."""
    question = json.dumps({"kind": spec.kind.value, "text": spec.text, "max_cpu_s": max_cpu_s})
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=question,
            capture_output=True,
            text=True,
            timeout=CHECK_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise _too_costly(spec, max_cpu_s) from error
    if done.returncode != 0:
        raise _too_costly(spec, max_cpu_s)
    if done.stdout:
        raise InvalidRequest(done.stdout, param="structured")


def _too_costly(spec: StructuredSpec, max_cpu_s: int) -> InvalidRequest:
    return refusal(
        spec,
        f"it takes more than {max_cpu_s} s or {MAX_MEMORY_BYTES >> 20} MiB to compile; "
        "use shorter repeats and fewer conditions on one value",
    )


def main() -> None:
    # Ends the process whatever it is doing.
    signal.alarm(CHECK_TIMEOUT_S + 1)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    question = json.load(sys.stdin)
    max_cpu_s = int(question["max_cpu_s"])
    resource.setrlimit(resource.RLIMIT_CPU, (max_cpu_s, max_cpu_s))
    try:
        validate_in_process(StructuredSpec(StructuredKind(question["kind"]), question["text"]))
    except InvalidRequest as error:
        sys.stdout.write(str(error))


if __name__ == "__main__":
    main()
