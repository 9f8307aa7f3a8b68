"""A process of an engine that spans several: `python -m jaxserve.follower [--log-level LEVEL] CONFIG`.

It serves nobody. It loads its share of the model, and runs each step that process 0 runs, until that one ends.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

import msgspec

from jaxserve.config import EngineConfig
from jaxserve.engine_server import configure_logging
from jaxserve.errors import ConfigError, ModelLoadError

logger = logging.getLogger("jaxserve.engine")


def main() -> int:
    """Entry point; the exit status is 0 when process 0 was told to end, 2 for a wrong model or flag, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m jaxserve.follower")
    parser.add_argument("--log-level", default="info")
    parser.add_argument("config", help="fields of EngineConfig as a JSON object")
    arguments = parser.parse_args()
    configure_logging(arguments.log_level.upper())
    from jaxserve.model_runner import ModelRunner  # imports jax, which reads what was configured

    config = EngineConfig(**msgspec.json.decode(arguments.config))
    try:
        runner = ModelRunner(config, lambda line: logger.info("%s", line))
        logger.info("process %d follows process 0", config.process_id)
        runner.follow()
        runner.close()
    except (ConfigError, ModelLoadError) as error:
        print(f"jaxserve: {error}", file=sys.stderr)
        return 2
    except Exception:
        logger.exception("process %d failed", config.process_id)
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # XLA's own threads need no farewell
