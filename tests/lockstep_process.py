"""One of two processes in lockstep, without a model: `python -m tests.lockstep_process ADDRESS PROCESS_ID PROGRAMS`.

Process 0 sends a table and a step and goes on when its stdin ends. The other one prints what it is told.
Lines that are meant begin with >.
"""

from __future__ import annotations

import os
import sys

import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.lockstep import Follower, Step, join


def main() -> int:
    address, process_id, programs = sys.argv[1:]
    config = EngineConfig(
        model=f"model {process_id}",
        coordinator_address=address,
        num_processes=2,
        process_id=int(process_id),
        tensor_parallel_size=2,
        max_num_seqs=11 + int(process_id),
    )
    others = join(config)
    least = others.least((100 - config.process_id) << 20) >> 20
    print(">", others.config.model, others.config.max_num_seqs, least, flush=True)
    try:
        others.start_together(programs)
    except ConfigError as error:
        print(">", error, flush=True)
        return 2
    if isinstance(others, Follower):
        for frame in others.frames():
            data = frame.packed if isinstance(frame, Step) else frame.data
            print(">", type(frame).__name__, np.frombuffer(data, np.int32).tolist(), flush=True)
    else:
        others.send_table("masks", np.arange(3, dtype=np.int32))
        others.send_step(2, np.arange(100_000, dtype=np.int32)[-2:])
        sys.stdin.read()
    others.close()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
