"""`python -m jaxserve.api --model M`, and `jaxserve serve M`."""

from __future__ import annotations

import logging
import sys

from jaxserve.api.cli import parse_args
from jaxserve.api.serving import follow, serve
from jaxserve.errors import ConfigError, JaxserveError, ModelLoadError


def cli() -> None:
    """Entry point: ends the process with 0 after a drain, 2 for a wrong flag or model, 1 for a defect."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit status; everything that goes wrong on purpose is one line on stderr."""
    try:
        config = parse_args(arguments)
        logging.basicConfig(
            stream=sys.stderr,
            level=config.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        )
        if config.engine.process_id > 0:
            follow(config)
        return serve(config)
    except (ConfigError, ModelLoadError) as error:
        print(f"jaxserve: {error}", file=sys.stderr)
        return 2
    except JaxserveError as error:
        print(f"jaxserve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the server had begun to listen for signals
        return 130


if __name__ == "__main__":
    cli()
