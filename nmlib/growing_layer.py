"""Keys and values of one layer that grow in place: the memory under a `PrefixCache`."""

import copy
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

MIN_ROOM = 64  # tokens that a layer has room for beyond those it holds, when it moves


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer with room to grow, so that a new token is written and the old ones stay in place.

    A copy made by `share` has the same memory. Whichever of the two writes first moves to memory of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None  # (B, heads, capacity, D_head), None while it is shared

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, heads, t, D_head); returns all of them, (B, heads, L + t, D_head)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        total = length + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < total:
            capacity = total + max(total // 2, MIN_ROOM)
            rooms = [part.new_empty(*part.shape[:2], capacity, part.shape[3]) for part in (key_states, value_states)]
            for room, kept in zip(rooms, (self.keys, self.values), strict=True):
                if kept is not None and length:
                    room[..., :length, :] = kept
            self._room = (rooms[0], rooms[1])
        self._room[0][..., length:total, :], self._room[1][..., length:total, :] = key_states, value_states
        self.keys, self.values = (room[..., :total, :] for room in self._room)  # (B, heads, L + t, D_head)
        return self.keys, self.values

    def share(self) -> "GrowingLayer":
        """A copy in the same memory, which from now on neither of the two writes to."""
        self._room = None
        return copy.copy(self)
