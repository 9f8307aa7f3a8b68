"""What hostile constraints cost the others: python scripts/bench_hostile_constraints.py [URL].

Needs a running server, with at least 16 sequences and 2,048 tokens of context. 16 streams decode; every constraint of
tests/hostile_constraints.py is sent, one after the other. Prints each answer and the streams' inter-token latency while
constraints are being refused, and in pauses of the same length between. Exits with 1 unless each is a 400 within 3 s.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.hostile_constraints import HOSTILE
from tests.hostile_streams import observe

LIMIT_S = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=2000)
    args = parser.parse_args()
    model = httpx.get(f"{args.url}/v1/models").json()["data"][0]["id"]
    seen = asyncio.run(
        observe(args.url, model, HOSTILE, num_streams=args.streams, max_tokens=args.max_tokens)
    )
    for refusal in seen.refusals:
        print(f"{refusal.name:32s} {refusal.status} {refusal.code:24s} {refusal.seconds:6.3f} s")
    for name, gaps in (("beside them", seen.beside), ("alone", seen.alone)):
        p50, p99 = (1000 * value for value in np.percentile(gaps, [50, 99]))
        print(f"{name:12s} {len(gaps)} gaps between tokens, p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    print(f"ratio of the medians: {np.median(seen.beside) / np.median(seen.alone):.3f}")
    sys.exit(any(refusal.status != 400 or refusal.seconds > LIMIT_S for refusal in seen.refusals))


if __name__ == "__main__":
    main()
