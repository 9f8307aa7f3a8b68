"""Whether constrained texts satisfy their constraints, as others see it: `scripts/check_structured_output` MODEL.

Over 300 JSON schemas, 100 regexes, 30 grammars and choices of many kinds (tests/conformance_*.py), some seeds each at
temperature 1, in one engine without a server. jsonschema, `re` and Lark say what is a violation; a text that max_tokens
cut is none, and is counted apart. Exits with 1 if there is a violation, or a constraint is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from jaxserve import LLM
from jaxserve.constraints.compiler import Compiler
from jaxserve.constraints.constraint import ConstraintError
from tests.conformance import Case, Outcome, all_cases, generate
from tests.tiny_llama import BASE

MAX_MODEL_LEN = 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="directory, .gguf file or hub id")
    parser.add_argument(
        "--random-weights", action="store_true", help="a tiny random model with MODEL's vocabulary"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64, help="sequences at once")
    parser.add_argument("--only", default="", help="cases with this in their name, such as schema/oneOf")
    parser.add_argument("--part", default="1/1", help="2/3: the second third of the cases")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        llm = _random_model(args, Path(directory)) if args.random_weights else _model(args)
        sys.exit(_run(llm, args))


def _model(args: argparse.Namespace) -> LLM:
    return LLM(args.model, max_model_len=MAX_MODEL_LEN, max_num_seqs=args.batch)


def _random_model(args: argparse.Namespace, directory: Path) -> LLM:
    vocab_size = _vocab_size(args.model)
    config = BASE | {"vocab_size": vocab_size, "max_position_embeddings": MAX_MODEL_LEN}
    (directory / "config.json").write_text(json.dumps(config))
    options: dict[str, Any] = {"tokenizer": args.model, "load_format": "dummy", "max_num_seqs": args.batch}
    return LLM(str(directory), kv_cache_memory_bytes=256 << 20, **options)


def _vocab_size(model: str) -> int:
    from jaxserve.models.loader import resolve_model
    from jaxserve.tokenizer import load_tokenizer

    return load_tokenizer(resolve_model(model)).vocab_size


def _run(llm: LLM, args: argparse.Namespace) -> int:
    compiler = llm.engine.text_constraints.compiler(llm.eos_token_ids)
    compiler.prepare()
    cases, num_refused = _compile(compiler, all_cases())
    part, parts = map(int, args.part.split("/"))
    chosen = [case for case in cases if args.only in case.name][part - 1 :: parts]
    started, outcomes = time.monotonic(), []
    for first in range(0, len(chosen), args.batch):
        some = chosen[first : first + args.batch]
        outcomes += generate(llm, some, [_prompt(llm, case) for case in some], args.seeds, args.max_tokens)
    seconds = time.monotonic() - started
    num_violations = _report(outcomes, seconds)
    _report_masks(llm, compiler, outcomes)
    return int(bool(num_refused or num_violations))


def _compile(compiler: Compiler, cases: Sequence[Case]) -> tuple[list[Case], int]:
    """Those that are not refused, and the number of the others."""
    taken, accepted = [], []
    for case in cases:
        started = time.perf_counter()
        try:
            compiler.compile(case.constraint)
        except ConstraintError as error:
            print(f"REFUSED {case.name}: {error}")
            continue
        taken.append(1000 * (time.perf_counter() - started))
        accepted.append(case)
    print(
        f"{len(accepted)} constraints compiled, {len(cases) - len(accepted)} refused; {_percentiles(taken)} to compile"
    )
    return accepted, len(cases) - len(accepted)


def _prompt(llm: LLM, case: Case) -> list[int]:
    what = f"Give an example of: {case.name.partition('/')[2][:60]}"
    return llm.tokenizer.encode(what, add_special_tokens=True)


def _report(outcomes: Sequence[Outcome], seconds: float) -> int:
    """Print what came out, and count the violations."""
    violations = [outcome for outcome in outcomes if outcome.violation is not None]
    for outcome in violations:
        print(
            f"VIOLATION {outcome.case.name}, seed {outcome.seed}: {outcome.text[:300]!r}: {outcome.violation}"
        )
    totals, cut, bad = (
        Counter(outcome.case.name.partition("/")[0] for outcome in some)
        for some in (outcomes, [o for o in outcomes if o.cut], violations)
    )
    for kind, total in totals.items():
        print(f"{kind:8s} {total:5d} texts, {cut[kind]:3d} cut by max_tokens, {bad[kind]:3d} violations")
    num_tokens = sum(len(outcome.token_ids) for outcome in outcomes)
    print(f"{num_tokens} tokens in {seconds:.0f} s, {num_tokens / seconds:.0f} a second")
    return len(violations)


def _report_masks(llm: LLM, compiler: Compiler, outcomes: Sequence[Outcome]) -> None:
    """Go through every fifth text again, and time what each of its steps takes the engine on the host."""
    row = np.zeros(-(-llm.engine.model_runner.model_config.vocab_size // 32), np.int32)
    eos, taken = set(llm.eos_token_ids), []
    for outcome in outcomes[::5]:
        matcher = compiler.matcher(compiler.compile(outcome.case.constraint))
        for token_id in outcome.token_ids:
            if token_id in eos:
                break
            started = time.perf_counter()
            matcher.fill_mask(row)
            matcher.accept(token_id)
            taken.append(1000 * (time.perf_counter() - started))
    print(f"{_percentiles(taken)} a token for its mask and for taking it in")


def _percentiles(milliseconds: Sequence[float]) -> str:
    p50, p99 = np.percentile(milliseconds, [50, 99])
    return f"p50 {p50:.2f} ms, p99 {p99:.2f} ms, at most {max(milliseconds):.1f} ms"


if __name__ == "__main__":
    main()
