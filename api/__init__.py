"""The OpenAI-compatible HTTP server. It imports no jax: the engine lives in a process of its own."""
