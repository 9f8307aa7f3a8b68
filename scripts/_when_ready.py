"""Wait until the server of process PID is ready, then print an example to paste: `_when_ready.py PID FLAGS…`."""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import ssl
import sys
import time

from jaxserve.api.cli import parse_args
from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError

POLL_S = 1.0  # each is a line in the log of a server that is still loading
TIMEOUT_S = 5.0
REACHED_AT = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # a server that listens everywhere

EXAMPLE = """
jaxserve is ready at {base}. Ask it something:

  curl {base}/v1/chat/completions{curl_flags} -H 'Content-Type: application/json' \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

or, with the OpenAI SDK (pip install openai):

  from openai import OpenAI
  client = OpenAI(base_url="{base}/v1", api_key="{key}")
  answer = client.chat.completions.create(
      model="{model}", messages=[{{"role": "user", "content": "What is the capital of France?"}}]
  )
  print(answer.choices[0].message.content)

Ctrl-C ends it.
"""


def main(server: int, flags: list[str]) -> None:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # --help: the server itself prints it
            config = parse_args(flags)
    except (ConfigError, SystemExit):
        return  # the server itself says what is wrong
    if config.uds or config.port == 0:
        return  # no address to print; the log has it
    if is_ready(config):
        return  # so early it is another server, which has the port; ours will say so
    while not is_ready(config):
        time.sleep(POLL_S)
        if not is_alive(server):
            return
    print(example(config), flush=True)


def example(config: ServerConfig) -> str:
    """What to paste into a shell or a program."""
    host = host_of(config)
    scheme = "https" if config.ssl_certfile else "http"
    return EXAMPLE.format(
        base=f"{scheme}://{f'[{host}]' if ':' in host else host}:{config.port}{config.root_path}",
        model=config.model_names[0],
        key="YOUR-KEY" if config.api_keys else "none",
        curl_flags=" -H 'Authorization: Bearer YOUR-KEY'" if config.api_keys else "",
    )


def host_of(config: ServerConfig) -> str:
    """Where the server is reached from this machine; an IPv6 address without brackets."""
    host = config.host.strip("[]")
    return REACHED_AT.get(host, host)


def is_ready(config: ServerConfig) -> bool:
    """Whether a server answers at the address and is ready."""
    host = host_of(config)
    connection = http.client.HTTPConnection(host, config.port, timeout=TIMEOUT_S)
    if config.ssl_certfile:  # nothing secret is sent, and the certificate may be for another name
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, config.port, timeout=TIMEOUT_S, context=context)
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
