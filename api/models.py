"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

from typing import Any

import orjson
from quart import Blueprint, Response
from quart.blueprints import BlueprintSetupState
from werkzeug.routing import BaseConverter

from jaxserve.api.context import ServerContext, server_context
from jaxserve.api.errors import model_not_found
from jaxserve.api.respond import json_response

blueprint = Blueprint("models", __name__)


class ModelIdConverter(BaseConverter):
    """The rest of the path, whatever slashes it holds: a name may be a path itself."""

    regex = ".+"
    part_isolating = False


@blueprint.record_once
def add_converter(state: BlueprintSetupState) -> None:
    """Make the converter known before the routes below; double slashes in a name are part of it."""
    state.app.url_map.converters["model_id"] = ModelIdConverter
    state.app.url_map.merge_slashes = False


@blueprint.get("/v1/models")
async def list_models() -> Response:
    """A card for every served name."""
    context = server_context()
    cards = [model_card(context, name) for name in context.config.model_names]
    return json_response(orjson.dumps({"object": "list", "data": cards}))


@blueprint.get("/v1/models/<model_id:model_id>")
async def retrieve_model(model_id: str) -> Response:
    """The card of one served name; the name may hold slashes."""
    context = server_context()
    if model_id not in context.config.model_names:
        raise model_not_found(model_id)
    return json_response(orjson.dumps(model_card(context, model_id)))


def model_card(context: ServerContext, name: str) -> dict[str, Any]:
    """What a client may know about a served name."""
    permission = {
        "id": f"modelperm-{context.created:x}",
        "object": "model_permission",
        "created": context.created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "jaxserve",
        "root": context.config.model_names[0],
        "parent": None,
        "max_model_len": context.engine.info.max_model_len,
        "permission": [permission],
    }
