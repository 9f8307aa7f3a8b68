"""What the route handlers share: one `ServerContext` per app, at `current_app.extensions["jaxserve"]`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import cast

from quart import current_app

from jaxserve.api.admission import Admission
from jaxserve.api.errors import unavailable
from jaxserve.api.metrics import Metrics
from jaxserve.chat_template import ChatTemplate
from jaxserve.config import ServerConfig
from jaxserve.constraints.worker import ConstraintWorker
from jaxserve.engine_client import EngineClient
from jaxserve.errors import EngineStartingError
from jaxserve.generation_config import GenerationDefaults
from jaxserve.template_worker import TemplateWorker
from jaxserve.tokenizer import Tokenizer

EXTENSION = "jaxserve"


@dataclass(kw_only=True)
class ServerContext:
    """Filled while the server starts; handlers that need the model run only once it is ready.

    Attributes:
        executor: threads for tokenization and template rendering, which must not hold the event loop.
        created: whole Unix seconds at which the server started; the model cards' `created`.
        system_fingerprint: `jaxserve-…`, one value per version and model.
        templates: renders the templates that requests bring.
        constraints: compiles the constraints that requests bring; None until the model is known.
        draining: the server was told to end; it takes no more requests.
        num_open_requests: HTTP requests whose response has not ended, streams included.
        num_connections: open connections, idle ones included.
    """

    config: ServerConfig
    engine: EngineClient
    metrics: Metrics
    admission: Admission
    executor: Executor
    created: int
    system_fingerprint: str
    templates: TemplateWorker = field(default_factory=TemplateWorker)
    constraints: ConstraintWorker | None = None
    draining: bool = False
    num_open_requests: int = 0
    num_connections: Callable[[], int] = lambda: 0
    _tokenizer: Tokenizer | None = None
    _chat_template: ChatTemplate | None = None
    _generation_defaults: GenerationDefaults | None = None

    def set_model(
        self, tokenizer: Tokenizer, chat_template: ChatTemplate | None, defaults: GenerationDefaults
    ) -> None:
        """Called once, before the server says that it is ready."""
        self._tokenizer, self._chat_template, self._generation_defaults = tokenizer, chat_template, defaults

    def is_crowded(self) -> bool:
        """Whether there are more connections or (many may share one) requests than `--max-connections`."""
        return max(self.num_connections(), self.num_open_requests) > self.config.max_connections

    def check_serving(self) -> None:
        """Whether requests can be served now.

        Raises:
            HttpError: the server is draining.
            EngineError: it is starting, or the engine is dead or has stalled.
        """
        if self.draining:
            raise unavailable("draining", "The server is shutting down.", retry_after_s=10)
        self.engine.check_serving()
        if self._tokenizer is None or self.constraints is None:
            raise EngineStartingError("The tokenizer is still loading.")

    @property
    def tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None, "a handler ran before the server was ready"
        return self._tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The template that requests without their own use; None if the model has none."""
        return self._chat_template

    @property
    def generation_defaults(self) -> GenerationDefaults:
        assert self._generation_defaults is not None, "a handler ran before the server was ready"
        return self._generation_defaults


def server_context() -> ServerContext:
    """The context of the app that handles the current request."""
    return cast(ServerContext, current_app.extensions[EXTENSION])
