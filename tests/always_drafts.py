"""Speculation that drafts whatever it can, without regard to what that costs."""

from __future__ import annotations

import random

from jaxserve.speculation import Payoff, Proposal


class AlwaysDrafts(Payoff):
    """As many drafts as there is room for, or a random number of them, so that other rows get some, too."""

    def choose(self, num_rows: int, proposals: list[Proposal], max_drafts: int) -> list[int]:
        room = min(max_drafts, max(shape.num_rows for shape in self._times.shapes) - num_rows)
        rng = random.Random(num_rows + sum(len(proposal.row.sequence) for proposal in proposals))
        counts = []
        for proposal in proposals:
            counts.append(min(rng.randrange(room + 1), len(proposal.token_ids)))
            room -= counts[-1]
        return counts

    def settle(self, num_rows: int, num_drafts: int, accepted: list[int], seconds: float) -> None:
        """Nothing is learned."""
