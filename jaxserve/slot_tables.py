"""What requests fix about their logits, in tables on the device: one row a slot.

Most steps change nothing here, so the tables stay on the device and are sent anew only when a row of them changed.
A sequence keeps its slot as long as it is in the plans; who is in none loses it to whoever needs one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from jaxserve.logits_processors import BITS, SlotTables
from jaxserve.sampling_params import MAX_BAD_WORD_TOKENS, MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS
from jaxserve.sequence import Sequence
from jaxserve.step_plan import ScheduledRow

NEUTRAL_SLOT = 0
MAX_EOS_TOKEN_IDS = 64
MAX_BIASES = (
    MAX_LOGIT_BIASES + MAX_BAD_WORD_TOKENS + MAX_STOP_TOKEN_IDS + MAX_EOS_TOKEN_IDS
)  # a multiple of 64


class SlotTableManager:
    """Owns the tables, on the host and on the device, and which sequence has which slot.

    Args:
        place: puts a table (its name in SlotTables, and what is in it: given away) on every chip.
    """

    def __init__(
        self, num_slots: int, vocab_size: int, place: Callable[[str, npt.NDArray[Any]], jax.Array]
    ) -> None:
        self._place = place
        self._bias_ids = np.zeros((num_slots + 1, MAX_BIASES), np.int32)
        self._bias_values = np.zeros((num_slots + 1, MAX_BIASES), np.float32)
        self._masks = np.full((num_slots + 1, -(-vocab_size // BITS)), 0xFFFFFFFF, np.uint32)
        self._slot_of: dict[Sequence, int] = {}
        self._forbidden_in: dict[int, list[int]] = {}
        self._free = list(range(num_slots, NEUTRAL_SLOT, -1))
        self._biases_on_device: tuple[jax.Array, jax.Array] | None = None
        self._masks_on_device: jax.Array | None = None

    def assign(self, rows: list[ScheduledRow]) -> None:
        """Give a slot to each sequence that needs one in a step, and bring its row of the tables up to date.

        Args:
            rows: that sample, from logits that are changed.
        """
        needing = [row.sequence for row in rows if needs_slot(row)]
        missing = [s for s in needing if s not in self._slot_of]
        if missing:
            self._evict(keep=set(needing))
            for sequence in missing:
                self._slot_of[sequence] = slot = self._free.pop()
                self._write_mask(slot, _allowed_mask(sequence, self._masks.shape[1]))
        for row in rows:  # also of those that need nothing any more
            sequence = row.sequence
            if sequence in self._slot_of:
                slot = self._slot_of[sequence]
                self._write_biases(slot, row)
                if sequence.constraint is not None:
                    self._write_mask(slot, sequence.constraint.mask.view(np.uint32))

    def slot(self, sequence: Sequence) -> int:
        return self._slot_of.get(sequence, NEUTRAL_SLOT)

    def num_biases(self, sequence: Sequence) -> int:
        """Entries of the sequence's row that count."""
        forbidden = self._forbidden_in.get(self.slot(sequence))
        return 0 if forbidden is None else len(sequence.params.logit_bias) + len(forbidden)

    def on_device(self) -> SlotTables:
        """The tables as they are now."""
        if self._biases_on_device is None:
            self._biases_on_device = (
                self._send("bias_ids", self._bias_ids),
                self._send("bias_values", self._bias_values),
            )
        if self._masks_on_device is None:
            self._masks_on_device = self._send("masks", self._masks)
        return SlotTables(*self._biases_on_device, self._masks_on_device)

    def _send(self, name: str, array: npt.NDArray[Any]) -> jax.Array:
        # a copy: the CPU device may use the host's memory as it is
        return self._place(name, array.copy())

    def _evict(self, keep: set[Sequence]) -> None:
        for sequence in [s for s in self._slot_of if s not in keep]:
            slot = self._slot_of.pop(sequence)
            self._forbidden_in.pop(slot, None)
            self._free.append(slot)

    def _write_mask(self, slot: int, mask: npt.NDArray[np.uint32]) -> None:
        if not np.array_equal(self._masks[slot], mask):
            self._masks[slot] = mask
            self._masks_on_device = None

    def _write_biases(self, slot: int, row: ScheduledRow) -> None:
        forbidden = forbidden_tokens(row)
        if self._forbidden_in.get(slot) == forbidden:
            return  # the request's own biases never change
        self._forbidden_in[slot] = forbidden
        biases = [*row.sequence.params.logit_bias, *((token_id, -np.inf) for token_id in forbidden)]
        if biases:
            self._bias_ids[slot, : len(biases)], self._bias_values[slot, : len(biases)] = zip(
                *biases, strict=True
            )
            self._biases_on_device = None


def needs_slot(row: ScheduledRow) -> bool:
    """Whether the row's logits are changed by something that lies in the tables."""
    sequence, params = row.sequence, row.sequence.params
    return bool(
        params.logit_bias
        or sequence.constraint is not None
        or params.allowed_token_ids is not None
        or params.bad_words_token_ids
        or _is_too_short(row)
    )


def _is_too_short(row: ScheduledRow) -> bool:
    return row.end - row.sequence.num_prompt_tokens < row.sequence.params.min_tokens


def _allowed_mask(sequence: Sequence, num_words: int) -> npt.NDArray[np.uint32]:
    allowed = sequence.params.allowed_token_ids
    if allowed is None:
        return np.full(num_words, 0xFFFFFFFF, np.uint32)
    bits = np.zeros(num_words * BITS, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def forbidden_tokens(row: ScheduledRow) -> list[int]:
    """Tokens that would complete a bad word, or end the sequence before min_tokens, where the row samples."""
    sequence, params = row.sequence, row.sequence.params
    forbidden = [word[-1] for word in params.bad_words_token_ids if _ends_with(sequence, word[:-1])]
    if _is_too_short(row):
        forbidden += params.stop_token_ids
        forbidden += () if params.ignore_eos else sequence.eos_token_ids
    if forbidden and sequence.constraint is not None and not _leaves_any(sequence.constraint.mask, forbidden):
        return []  # the constraint comes first: its only way on may be to end
    return forbidden


def _leaves_any(mask: npt.NDArray[np.int32], forbidden: list[int]) -> bool:
    """Whether a packed mask has a token that is not forbidden."""
    left = mask.view(np.uint32).copy()
    ids = np.asarray(forbidden, np.uint32)
    np.bitwise_and.at(left, ids // BITS, ~(np.uint32(1) << (ids % BITS)))
    return bool(left.any())


def _ends_with(sequence: Sequence, token_ids: tuple[int, ...]) -> bool:
    """Whether the output ends with these tokens (any output ends with none)."""
    count = len(token_ids)
    if count > sequence.num_output_tokens:
        return False
    return count == 0 or tuple(sequence.token_ids[-count:]) == token_ids
