"""Probes, version, load and metrics."""

from __future__ import annotations

import contextlib

import orjson
from quart import Blueprint, Response

import jaxserve
from jaxserve.api.context import server_context
from jaxserve.api.respond import json_response
from jaxserve.errors import EngineStartingError

blueprint = Blueprint("health", __name__)
OK = b'{"status":"ok"}'


@blueprint.get("/health")
@blueprint.route("/ping", methods=["GET", "POST"])
async def health() -> Response:
    """200 only if requests are served and the engine makes progress."""
    return await ready()


@blueprint.get("/health/ready")
async def ready() -> Response:
    """200 once requests can be served; 503 while starting, draining, dead or stalled."""
    context = server_context()
    context.check_serving()
    return json_response(OK)


@blueprint.get("/health/live")
async def live() -> Response:
    """200 unless the engine is dead or has stalled: a start or a drain is no reason to be restarted."""
    with contextlib.suppress(EngineStartingError):
        server_context().engine.check_serving()
    return json_response(OK)


@blueprint.get("/version")
async def version() -> Response:
    return json_response(orjson.dumps({"version": jaxserve.__version__}))


@blueprint.get("/load")
async def load() -> Response:
    """Generation requests accepted and not yet finished."""
    return json_response(orjson.dumps({"server_load": server_context().admission.num_requests}))


@blueprint.get("/metrics")
async def metrics() -> Response:
    return Response(
        server_context().metrics.render(), content_type="text/plain; version=0.0.4; charset=utf-8"
    )
