"""`GET /openapi.json` and `GET /docs`: the API's own description, as data and as a page."""

from __future__ import annotations

import base64
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import jinja2
import orjson
from markupsafe import Markup
from quart import Blueprint, Response

from jaxserve.api.context import ServerContext, server_context
from jaxserve.api.openapi import DocumentConfig, Json, openapi_document
from jaxserve.api.respond import in_executor, json_response, request_protocol

blueprint = Blueprint("docs", __name__)
HUGE = 2**53  # bounds from here on are those of a type
STYLE = Path(__file__).with_name("docs.css")
TEMPLATE = Path(__file__).with_name("docs.html")


@blueprint.get("/openapi.json")
async def openapi() -> Response:
    """The document; it depends on the model, and so is there once that is."""
    context = server_context()
    config = _document_config(context)
    return json_response(await in_executor(context, lambda: orjson.dumps(openapi_document(config))))


@blueprint.get("/docs")
async def docs() -> Response:
    """The document as a page that needs nothing else."""
    context = server_context()
    config = _document_config(context)
    page, policy = await in_executor(context, lambda: docs_page(config))
    return Response(
        page, content_type="text/html; charset=utf-8", headers={"Content-Security-Policy": policy}
    )


def _document_config(context: ServerContext) -> DocumentConfig:
    config = context.config
    return DocumentConfig(
        protocol=request_protocol(context).config,
        root_path=config.root_path,
        needs_key=bool(config.api_keys),
        profiles=config.engine.profile_dir is not None,
    )


@lru_cache(maxsize=4)
def docs_page(config: DocumentConfig) -> tuple[str, str]:
    """The page, and the policy by which browsers let it load nothing but its own style."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.ChainableUndefined
    )
    document = openapi_document(config)
    style = STYLE.read_text("utf-8")
    page = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        document=document,
        tags=_by_tag(document),
        base=config.root_path,
        huge=HUGE,
        required="required",
        style=Markup(style),
    )
    digest = base64.b64encode(sha256(f"\n{style}\n".encode()).digest()).decode()
    return page, f"default-src 'none'; style-src 'sha256-{digest}'"


def _by_tag(document: Json) -> dict[str, list[tuple[str, str, Json]]]:
    """Path, method and operation, by the operations' tags."""
    tags: dict[str, list[tuple[str, str, Json]]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            tags.setdefault(operation["tags"][0], []).append((path, method, operation))
    return tags
