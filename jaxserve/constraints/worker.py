"""Constraints are compiled where they can do no harm: `python -m jaxserve.constraints.worker TOKENIZER V EOS FD`."""

from __future__ import annotations

import resource
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import msgspec

from jaxserve.constraints.compiler import Compiler
from jaxserve.constraints.constraint import (
    Code,
    CompiledConstraint,
    Constraint,
    ConstraintError,
    TooComplexError,
    check_size,
)
from jaxserve.constraints.vocabulary import Vocabulary
from jaxserve.errors import JobError, RequestError
from jaxserve.killable_worker import JobLimits, KillableWorker, control_socket, serve_jobs
from jaxserve.tokenizer import load_tokenizer

LIMITS = JobLimits(seconds=2.0, memory_bytes=1 << 30, output_bytes=64 << 20)
# half of what the engine's threads have: what does not crash here does not crash there
STACK_BYTES = 4 << 20
MAX_CACHE_BYTES = 64 << 20


class _Refused(msgspec.Struct, tag="refused"):
    code: Code
    message: str


class _Compiled(msgspec.Struct, tag="compiled"):
    constraint: CompiledConstraint


class ConstraintWorker:
    """Compiles requests' constraints in a killable worker, and keeps what it compiled.

    Args:
        tokenizer: directory or GGUF file.
        vocab_size: V.

    Attributes:
        process: the worker; it starts with the first job, or earlier if it is told to.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        eos = ",".join(map(str, eos_token_ids))
        arguments = (str(tokenizer), str(vocab_size), eos)
        self.process = KillableWorker("jaxserve.constraints.worker", LIMITS, arguments)
        self._cache: OrderedDict[Constraint, CompiledConstraint] = OrderedDict()
        self._cache_bytes = 0

    async def compile(self, constraint: Constraint, *, param: str | None) -> CompiledConstraint:
        """The constraint, checked and compiled.

        Args:
            param: the request's field that it comes from.

        Raises:
            RequestError: it is refused (code `invalid_constraint` or `constraint_too_complex`).
            QueueFullError: too many others are being compiled.
        """
        known = self._cache.get(constraint)
        if known is not None:
            self._cache.move_to_end(constraint)
            return known
        try:
            check_size(constraint)
            answer = await self.process.run(msgspec.msgpack.encode(constraint))
        except ConstraintError as error:
            raise error.to_request_error(param) from error
        except JobError as error:
            raise _too_complex(error).to_request_error(param) from error
        result = msgspec.msgpack.decode(answer, type=_Compiled | _Refused)
        if isinstance(result, _Refused):
            raise RequestError(result.message, param=param, code=result.code)
        self._keep(constraint, result.constraint)
        return result.constraint

    def _keep(self, constraint: Constraint, compiled: CompiledConstraint) -> None:
        if constraint not in self._cache:
            self._cache[constraint] = compiled
            self._cache_bytes += _size(constraint, compiled)
        while self._cache_bytes > MAX_CACHE_BYTES:
            self._cache_bytes -= _size(*self._cache.popitem(last=False))


def _size(constraint: Constraint, compiled: CompiledConstraint) -> int:
    return 1024 + len(constraint.text) + len(compiled.source) + len(compiled.artifact)


def _too_complex(error: JobError) -> TooComplexError:
    match error.reason:
        case "time":
            return TooComplexError(f"The constraint takes longer than {LIMITS.seconds:g} s to compile.")
        case "memory":
            return TooComplexError(
                f"The constraint needs more than {LIMITS.memory_bytes >> 30} GiB to compile."
            )
    return TooComplexError("The constraint cannot be compiled.")


# --- in the worker ------------------------------------------------------------------------------------------


class _Handler:
    """Compiles for one vocabulary."""

    def __init__(self, vocabulary: Vocabulary | str) -> None:
        self._why_not = vocabulary if isinstance(vocabulary, str) else None
        self._compiler = None if isinstance(vocabulary, str) else Compiler(vocabulary)

    def __call__(self, job: bytes) -> bytes:
        constraint = msgspec.msgpack.decode(job, type=Constraint)
        try:
            return msgspec.msgpack.encode(_Compiled(self._compile(constraint)))
        except RecursionError:
            return _encode(TooComplexError("The constraint is nested too deeply."))
        except ConstraintError as error:
            return _encode(error)

    def _compile(self, constraint: Constraint) -> CompiledConstraint:
        if self._compiler is None:
            raise ConstraintError(f"This model's text cannot be constrained: {self._why_not}.")
        return self._compiler.compile(constraint)


def _encode(error: ConstraintError) -> bytes:
    return msgspec.msgpack.encode(_Refused(error.code, str(error)))


def main() -> None:
    """The worker process."""
    path, vocab_size, eos, descriptor = sys.argv[1:]
    tokenizer = load_tokenizer(Path(path))
    try:
        vocabulary: Vocabulary | str = Vocabulary.of(
            tokenizer, int(vocab_size), [int(token_id) for token_id in eos.split(",") if token_id]
        )
    except ValueError as error:
        vocabulary = str(error)
    handler = _Handler(vocabulary)
    # the first job pays for what is made only once
    handler(msgspec.msgpack.encode(Constraint(kind="json_object")))
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, STACK_BYTES))
    serve_jobs(handler, LIMITS, control_socket(descriptor))


if __name__ == "__main__":
    main()
