"""Whether a request may join the queue. Counts are the engine client's; tickets count what `/load` shows."""

from __future__ import annotations

from collections.abc import Callable

from jaxserve.config import ServerConfig
from jaxserve.engine_client import EngineClient
from jaxserve.errors import QueueFullError

DEFAULT_QUEUE_FACTOR = 4  # × max_num_seqs


class Admission:
    """Bounds the waiting queue.

    Attributes:
        num_requests: generation requests that were admitted and have not ended.
    """

    def __init__(
        self, engine: EngineClient, config: ServerConfig, on_reject: Callable[[str], None] = lambda _: None
    ) -> None:
        self._engine = engine
        self._config = config
        self._on_reject = on_reject
        self.num_requests = 0

    def admit(self, num_prompt_tokens: int) -> Callable[[], None]:
        """Take a request in; the caller must call what this returns when the request has ended.

        Requests beyond what can run at once wait; they may be as many as the limits say.

        Raises:
            QueueFullError: the queue is full.
        """
        load, max_num_seqs = self._engine.load, self._engine.info.max_num_seqs
        limit = self._config.max_num_queued_reqs or DEFAULT_QUEUE_FACTOR * max_num_seqs
        # requests that arrive in a burst are all unscheduled at first, although there is room for them
        queued = min(load.num_waiting_requests, max(0, load.num_sequences - max_num_seqs))
        if queued >= limit:
            self._on_reject("requests")
            raise QueueFullError(f"The queue is full: {queued} requests are waiting. Try again later.")
        token_limit = self._config.max_num_queued_tokens
        if token_limit is not None and queued and load.num_waiting_tokens + num_prompt_tokens > token_limit:
            self._on_reject("tokens")
            raise QueueFullError(f"The queue is full: {load.num_waiting_tokens:,} prompt tokens are waiting.")
        self.num_requests += 1
        return self._release

    def _release(self) -> None:
        self.num_requests -= 1
