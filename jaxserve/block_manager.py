"""Which KV block belongs to whom: free list, reference counts, prefix cache, copy-on-write.

A block is free when nobody references it. A free block may still hold the KV of a known prefix; such blocks
are the prefix cache, and are given away least recently used first. Block 0 is the null block: padding writes
go there and nobody ever owns it.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from jaxserve.config import SchedulerConfig
from jaxserve.sequence import Sequence

NULL_BLOCK = 0


class BlockCopy(NamedTuple):
    """Copy block `source` to `target` on the device before the step writes anything."""

    source: int
    target: int


Copies = tuple[BlockCopy, ...]


class BlockManager:
    """Owns every block of the pool. All methods are O(blocks they touch).

    Attributes:
        num_lookup_tokens, num_hit_tokens: running totals of the prefix cache.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.block_size = config.block_size
        self.num_blocks = config.num_blocks
        self._caching = config.enable_prefix_caching
        self._ref_counts = [0] * config.num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(NULL_BLOCK + 1, config.num_blocks))
        self._hash_of_block: dict[int, bytes] = {}
        self._block_of_hash: dict[bytes, int] = {}
        self.num_lookup_tokens = 0
        self.num_hit_tokens = 0

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks that are referenced, 0…1."""
        return 1.0 - len(self._free) / (self.num_blocks - 1)

    def blocks_needed(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that `allocate` would take from the free list, copy-on-write included."""
        end = sequence.num_computed_tokens + num_tokens
        new_blocks = -(-end // self.block_size) - len(sequence.block_table)
        return (new_blocks if new_blocks > 0 else 0) + self._must_copy(sequence)

    def has_room_for(self, sequence: Sequence) -> bool:
        """Whether there are blocks for all known tokens of a sequence, with what it has or would find in the cache."""
        found = [] if sequence.block_table else self._cached_prefix(sequence)
        in_use = sum(self._ref_counts[block] > 0 for block in found)  # the others are in the free list
        return self.blocks_needed(sequence, sequence.num_uncomputed_tokens) - in_use <= len(self._free)

    def has_cached(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether the cache has so many tokens of a sequence, or more. Mostly it has not: then no more is hashed than
        up to the first block that is missing, and the next time that one is asked for first."""
        num_blocks = -(-num_tokens // self.block_size)
        if num_blocks > self._num_cacheable_blocks(sequence):
            return False
        hashed = sequence.block_hashes
        if hashed and hashed[min(len(hashed), num_blocks) - 1] not in self._block_of_hash:
            return False
        return all(sequence.block_hash(i, self.block_size) in self._block_of_hash for i in range(num_blocks))

    def allocate(self, sequence: Sequence, num_tokens: int) -> Copies | None:
        """Give `sequence` the blocks for its next `num_tokens` tokens, one or more, writable by it alone.

        Returns:
            The copies that the step must do first, or None (and nothing changed) if blocks ran out.
        """
        table, start = sequence.block_table, sequence.num_computed_tokens
        has_blocks = start + num_tokens <= len(table) * self.block_size
        if has_blocks and self._ref_counts[table[start // self.block_size]] == 1:
            return ()
        needed = self.blocks_needed(sequence, num_tokens)
        if needed == 0:
            return ()
        if needed > len(self._free):
            return None
        copies: Copies = ()
        if self._must_copy(sequence):
            index = sequence.num_computed_tokens // self.block_size
            shared = sequence.block_table[index]
            sequence.block_table[index] = self._take_free_block()
            self._release(shared)
            copies = (BlockCopy(shared, sequence.block_table[index]),)
        end = sequence.num_computed_tokens + num_tokens
        while len(sequence.block_table) * self.block_size < end:
            sequence.block_table.append(self._take_free_block())
        return copies

    def trim(self, sequence: Sequence) -> None:
        """Take back the blocks behind the one that the last computed token is in."""
        while (len(sequence.block_table) - 1) * self.block_size >= sequence.num_computed_tokens:
            self._release(sequence.block_table.pop())

    def take_cached_prefix(self, sequence: Sequence) -> int:
        """Give a sequence without blocks those of its longest cached prefix, in whole blocks and short of
        its last token, which must be computed to sample from.

        Returns:
            The number of tokens found; also added to `sequence.num_computed_tokens`.
        """
        for block in self._cached_prefix(sequence):
            self._reference(block)
            sequence.block_table.append(block)
        num_cached = len(sequence.block_table) * self.block_size
        sequence.num_computed_tokens = num_cached
        sequence.num_published_blocks = len(sequence.block_table)
        return num_cached

    def count_lookup(self, num_tokens: int, num_hits: int) -> None:
        """Add one prefix-cache look-up to the totals."""
        if self._caching:
            self.num_lookup_tokens += num_tokens
            self.num_hit_tokens += num_hits

    def publish_full_blocks(self, sequence: Sequence) -> None:
        """Make the blocks that `sequence` has filled with tokens that are known findable by others. A step under way
        may still have to write them: whoever finds them reads them in a later one."""
        num_known = min(sequence.num_computed_tokens, len(sequence))
        if not self._caching or num_known < (sequence.num_published_blocks + 1) * self.block_size:
            return
        first, sequence.num_published_blocks = sequence.num_published_blocks, num_known // self.block_size
        for i in range(first, sequence.num_published_blocks):
            block = sequence.block_table[i]
            block_hash = sequence.block_hash(i, self.block_size)
            if block not in self._hash_of_block and block_hash not in self._block_of_hash:
                self._hash_of_block[block] = block_hash
                self._block_of_hash[block_hash] = block

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child` share all blocks of `parent`; whoever writes first into a shared block copies it."""
        child.block_table = parent.block_table[:]
        child.block_hashes = list(parent.block_hashes)
        child.num_cached_tokens, child.num_prefix_tokens = parent.num_cached_tokens, parent.num_prefix_tokens
        child.num_computed_tokens = parent.num_computed_tokens
        child.num_published_blocks = parent.num_published_blocks
        for block in child.block_table:
            self._reference(block)

    def free(self, sequence: Sequence) -> None:
        """Take back all blocks of `sequence`. The tail is freed first, so that it is also evicted first.

        A step under way may still read and write them: whoever gets them writes in a later one, and steps run in
        order.
        """
        self.publish_full_blocks(sequence)
        for block in reversed(sequence.block_table):
            self._release(block)
        sequence.block_table = array("i")
        sequence.num_computed_tokens = sequence.num_published_blocks = 0

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Verify the invariants against all sequences that hold blocks.

        Raises:
            AssertionError: a block is lost, shared by accident, or both free and owned.
        """
        owners = Counter(block for sequence in sequences for block in sequence.block_table)
        assert NULL_BLOCK not in owners, "the null block is owned"
        assert NULL_BLOCK not in self._free, "the null block is free"
        for block in range(NULL_BLOCK + 1, self.num_blocks):
            count = self._ref_counts[block]
            assert count == owners[block], f"block {block}: {count} references, {owners[block]} owners"
            assert (count == 0) == (block in self._free), (
                f"block {block}: {count} references, free list disagrees"
            )
        assert len(self._hash_of_block) == len(self._block_of_hash), "prefix cache maps disagree"
        for block, block_hash in self._hash_of_block.items():
            assert self._block_of_hash[block_hash] == block, f"block {block}: prefix cache maps disagree"

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """The blocks of the longest prefix that the cache has, short of the last token."""
        blocks: list[int] = []
        for i in range(self._num_cacheable_blocks(sequence)):
            block = self._block_of_hash.get(sequence.block_hash(i, self.block_size))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _num_cacheable_blocks(self, sequence: Sequence) -> int:
        """Blocks that need not be computed, if they are cached: whole ones, short of the last token."""
        if not self._caching or sequence.rates_prompt:  # what is not computed cannot be rated
            return 0
        return (len(sequence) - 1) // self.block_size

    def _must_copy(self, sequence: Sequence) -> bool:
        """Whether the next token goes into a block that others reference too."""
        index = sequence.num_computed_tokens // self.block_size
        return index < len(sequence.block_table) and self._ref_counts[sequence.block_table[index]] > 1

    def _take_free_block(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._ref_counts[block] = 1
        block_hash = self._hash_of_block.pop(block, None)
        if block_hash is not None:
            del self._block_of_hash[block_hash]
        return block

    def _reference(self, block: int) -> None:
        if self._ref_counts[block] == 0:
            del self._free[block]
        self._ref_counts[block] += 1

    def _release(self, block: int) -> None:
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            self._free[block] = None
            if block not in self._hash_of_block:
                self._free.move_to_end(block, last=False)  # nothing worth keeping: use it first
