"""API keys: compared as SHA-256 digests in constant time, all of them every time."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from hashlib import sha256

OPEN_ROUTES = frozenset({"/health", "/health/live", "/health/ready", "/ping", "/version"})


class Authenticator:
    """Decides on the matched route, never on a string from the URL; what matches no route needs a key, too."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [sha256(key.encode("utf-8", "surrogateescape")).digest() for key in keys]

    def allows(self, route: str | None, authorization: str | None) -> bool:
        """Whether a request may go on.

        Args:
            route: the rule that matched, or None.
            authorization: the header's value.
        """
        if not self._digests or route in OPEN_ROUTES:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        digest = sha256(
            key.strip().encode("latin-1", "replace")
        ).digest()  # a header's bytes arrive as Latin-1
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)
