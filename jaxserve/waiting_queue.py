"""The queue of sequences that wait for their turn: the most urgent first, whatever order they come and go in."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from jaxserve.sequence import Sequence


def urgency(sequence: Sequence) -> tuple[int, int, int]:
    """What sequences are ordered by, the most urgent first: priority, arrival, index in the request."""
    priority, arrival = sequence.order
    return priority, arrival, sequence.index


class WaitingQueue:
    """Sequences in order of urgency.

    It is a sorted list: with 10,000 waiting, moving the pointers behind the place of a change takes a microsecond or
    two, and nothing else depends on their number.
    """

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self._holders: dict[Sequence, None] = {}  # those that came with blocks

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __getitem__(self, i: int) -> Sequence:
        """The i-th; the first is the most urgent."""
        return self._sequences[i]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence at its place, behind those that are as urgent."""
        insort(self._sequences, sequence, key=urgency)
        if sequence.block_table:
            self._holders[sequence] = None

    def remove(self, sequence: Sequence) -> bool:
        """Take a sequence out; returns whether it was there."""
        key = urgency(sequence)
        for i in range(bisect_left(self._sequences, key, key=urgency), len(self._sequences)):
            if self._sequences[i] is sequence:
                del self._sequences[i]
                self._holders.pop(sequence, None)
                return True
            if urgency(self._sequences[i]) != key:
                break
        return False

    def last_holder(self, *, but: Sequence | None = None) -> Sequence | None:
        """The least urgent one that has blocks (it shares them with others of its request), if there is one."""
        return max((s for s in self._holders if s.block_table and s is not but), key=urgency, default=None)
