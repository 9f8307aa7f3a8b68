"""`POST /start_profile` and `POST /stop_profile`: traces of the engine process. Only with `--profile-dir`."""

from __future__ import annotations

from quart import Blueprint, Response

from jaxserve.api.context import server_context
from jaxserve.api.health import OK
from jaxserve.api.respond import json_response

blueprint = Blueprint("profiling", __name__)


@blueprint.post("/start_profile")
async def start_profile() -> Response:
    """Begin a trace; 400 if one is running."""
    await server_context().engine.profile(running=True)
    return json_response(OK)


@blueprint.post("/stop_profile")
async def stop_profile() -> Response:
    """End the trace; answered once it is on the disk. 400 if none is running."""
    await server_context().engine.profile(running=False)
    return json_response(OK)
