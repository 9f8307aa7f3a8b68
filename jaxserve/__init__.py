"""jaxserve serves large language models from JAX, over OpenAI's API or in-process.

from jaxserve import LLM, SamplingParams
LLM(model="…").generate(["Hello"], SamplingParams(max_tokens=16))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """`LLM` is imported on first use: it pulls in jax, which the API process must not load."""
    if name == "LLM":
        from jaxserve.llm import LLM

        return LLM
    raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
