"""XLA compilation: the cache on disk, and a count of what is compiled after the start."""

from __future__ import annotations

import os

import jax

from jaxserve.config import cache_dir

_LOWERING_EVENT = "/jax/core/compile/jaxpr_to_mlir_module_duration"

# a quarter of the time in which programs are compiled for a CPU, which run no slower
_EXTRA_OPTIONS = "--xla_backend_extra_options="
_NO_UNROLLING = "xla_cpu_disable_loop_unrolling"


def set_compiler_flags() -> None:
    """For all programs of this process, unless JAX has computed something in it already: XLA reads its flags once."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    if not any(_NO_UNROLLING in flag for flag in flags):
        own = [flag.removeprefix(_EXTRA_OPTIONS) for flag in flags if flag.startswith(_EXTRA_OPTIONS)]
        others = [flag for flag in flags if not flag.startswith(_EXTRA_OPTIONS)]
        os.environ["XLA_FLAGS"] = " ".join([*others, _EXTRA_OPTIONS + ",".join([*own, _NO_UNROLLING])])


def enable_compilation_cache() -> None:
    """Keep every compiled program under the cache directory; JAX names them by program, version and machine."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class CompilationCounter:
    """Counts lowerings in this process since the last `reset`. After the engine is ready it must stay 0."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def reset(self) -> None:
        self.count = 0

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:  # noqa: ARG002
        if event == _LOWERING_EVENT:
            self.count += 1
