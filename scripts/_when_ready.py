"""Wait until the server of process PID is ready, then print an example to paste: `_when_ready.py PID FLAGS…`."""

from __future__ import annotations

import http.client
import os
import ssl
import sys
import time

from jaxserve.api.cli import parse_args
from jaxserve.errors import ConfigError

POLL_S = 0.2

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


def main() -> None:
    server, flags = int(sys.argv[1]), sys.argv[2:]
    try:
        config = parse_args(flags)
    except (ConfigError, SystemExit):
        return  # the server itself says what is wrong
    if config.uds:
        return
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    while not ready(host, config.port, tls=config.ssl_certfile is not None):
        time.sleep(POLL_S)
        if not alive(server):
            return
    scheme = "https" if config.ssl_certfile else "http"
    key_flag = " -H 'Authorization: Bearer YOUR-KEY'" if config.api_keys else ""
    key = "YOUR-KEY" if config.api_keys else "none"
    base = f"{scheme}://{host}:{config.port}{config.root_path}"
    print(EXAMPLE.format(base=base, model=config.model_names[0], key=key, curl_flags=key_flag), flush=True)


def ready(host: str, port: int, *, tls: bool) -> bool:
    context = ssl._create_unverified_context() if tls else None
    connection = (
        http.client.HTTPSConnection(host, port, timeout=5, context=context)
        if tls
        else http.client.HTTPConnection(host, port, timeout=5)
    )
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    main()
