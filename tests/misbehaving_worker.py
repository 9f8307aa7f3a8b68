"""`python -m tests.misbehaving_worker`: a worker whose jobs do what they are told, to test the killable worker."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from jaxserve.killable_worker import JobLimits, control_socket, serve_jobs

LIMITS = JobLimits(seconds=0.5, memory_bytes=200_000_000, output_bytes=1 << 20)
state: list[str] = []


def handle(job: bytes) -> bytes:
    word, _, argument = job.partition(b" ")
    match word:
        case b"echo":
            return argument
        case b"spin":  # one instruction of the interpreter's, which no signal handler of Python's interrupts
            return bytes(9 ** (9**9))
        case b"sleep":
            time.sleep(float(argument))
        case b"eat":
            return b"%d" % len(bytearray(int(argument)))
        case b"talk":
            return bytes(int(argument))
        case b"die":
            os.kill(os.getpid(), signal.Signals(int(argument)))
        case b"raise":
            raise RuntimeError("a defect")
        case b"pids":
            return f"{os.getpid()} {os.getppid()}".encode()
        case b"environment":
            return json.dumps(dict(os.environ)).encode()
        case b"remember":
            state.append(argument.decode())
            return json.dumps(state).encode()
        case b"nice":
            return str(os.nice(0)).encode()
        case b"idle":  # whether it runs only where nobody else would, after so many seconds
            time.sleep(float(argument))
            return str(os.sched_getscheduler(0) == os.SCHED_IDLE).encode()
    return b"done"


if __name__ == "__main__":
    serve_jobs(handle, LIMITS, control_socket(sys.argv[1]))
