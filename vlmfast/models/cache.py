"""Keys and values of the tokens that a decoder has seen, row by row, so that the next token costs one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmfast.errors import ShapeError

if TYPE_CHECKING:
    from vlmfast.models.decoder import DecoderConfig


class KvCache:
    """What a decoder keeps of B sequences of different lengths: every layer's keys and values, [B, capacity] tokens.

    A decoder that is given one appends to it and attends to all that it holds. Nothing of it takes part in a backward.

    Args:
        config: of the decoder.
        rows: B, sequences.
        capacity: tokens of a row that there is room for at first; room doubles when it is used up, as far as the
            decoder's context goes.
        device: where keys and values lie.
        dtype: theirs: the decoder's, or autocast's.
    Raises:
        ShapeError: no rows, or a capacity outside 1 .. context_length.

    Attributes:
        lengths: [B] int64, tokens that each row holds.
        capacity: tokens of a row that there is room for.
    """

    def __init__(
        self,
        config: DecoderConfig,
        rows: int,
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if rows < 1 or not 1 <= capacity <= config.context_length:
            raise ShapeError(
                f"KvCache: rows must be at least 1 and capacity 1 .. {config.context_length}, the decoder's context; "
                f"got {rows} and {capacity}"
            )
        self.config = config
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        # No row is longer: kept on the host, so that a step waits for no device. Exact while rows grow alike.
        self._longest = 0
        # A masked token has weight 0, and 0 times what unwritten memory holds may be NaN: the room is zeros.
        shape = (config.layers, 2, rows, capacity, config.kv_heads, config.head_width)
        self._hold(torch.zeros(shape, dtype=dtype, device=device))

    @property
    def rows(self) -> int:
        """B, the number of sequences."""
        return self._room.shape[2]

    @property
    def capacity(self) -> int:
        """Tokens of a row that there is room for."""
        return self._room.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._room.dtype

    @property
    def empty(self) -> bool:
        """Whether no row holds a token."""
        return self._longest == 0

    def reserve(self, new: Tensor | int, most: int) -> int:
        """How many tokens of each row need looking at once `new` more are written; makes room for them.

        Args:
            new: [B] int64 tokens for each row, or the same number for all.
            most: the largest of them.
        Raises:
            ShapeError: a row would be longer than the decoder's context.
        """
        if self._longest + most > self.capacity:
            need = int((self.lengths + new).max())  # waits for the device, once in a doubling
            if need > self.config.context_length:
                raise ShapeError(
                    f"KvCache: a row would hold {need} tokens; the decoder's context_length is "
                    f"{self.config.context_length}. Ask for fewer new tokens, or start anew with a shorter prompt"
                )
            if need > self.capacity:
                self._grow(min(max(need, 2 * self.capacity), self.config.context_length))
        return min(self._longest + most, self.capacity)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Puts one layer's keys and values in their places.

        Args:
            layer: which.
            slots: [tokens] int64, row * capacity + the token's place in its row, within what `reserve` made room for.
            keys, values: [tokens, H, K] of the config's kv_heads H and head_width K.
        """
        for room, new in zip(self._rows[layer], (keys, values), strict=True):
            room.index_copy_(0, slots, new.to(room.dtype))

    def read(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """One layer's keys and values.

        Args:
            layer: which.
            tokens: how many of each row, from its first.
        Returns: keys, values: [B, H, tokens, K] views. What lies beyond a row's length must be masked.
        """
        keys, values = self._heads[layer]
        return keys[:, :, :tokens], values[:, :, :tokens]

    def advance(self, new: Tensor | int, most: int) -> None:
        """Counts tokens that were written to all layers.

        Args:
            new, most: as for `reserve`.
        """
        self.lengths = self.lengths + new
        self._longest = min(self._longest + most, self.capacity)

    def select(self, rows: Tensor) -> KvCache:
        """A new cache of some rows of this one, which stays as it is.

        Args:
            rows: [N] int64, in the new order; a row may come several times, as beams of one prompt do.
        """
        chosen = object.__new__(KvCache)
        chosen.config, chosen._longest = self.config, self._longest
        chosen.lengths = self.lengths.index_select(0, rows)
        chosen._hold(self._room.index_select(2, rows))
        return chosen

    def truncate(self, lengths: Tensor | int) -> None:
        """Forgets what comes after the first tokens of each row.

        Args:
            lengths: [B] int64 tokens that stay, or the same number for all; a shorter row stays as it is.
        Raises:
            ShapeError: lengths are not one a row, or below 0.
        """
        if isinstance(lengths, Tensor) and lengths.shape != self.lengths.shape:
            raise ShapeError(f"KvCache.truncate: lengths must be [{self.rows}] or an int; got {tuple(lengths.shape)}")
        left = self.lengths.clamp_max(lengths) if isinstance(lengths, int) else self.lengths.minimum(lengths)
        least, longest = torch.stack(left.aminmax()).tolist()
        if least < 0:
            raise ShapeError(f"KvCache.truncate: lengths must be at least 0; got {least}")
        self.lengths, self._longest = left, longest

    def _hold(self, room: Tensor) -> None:
        """Takes [layers, keys | values, B, capacity, H, K], and makes each layer's views of it once for all steps."""
        self._room = room
        self._rows = [(keys.flatten(0, 1), values.flatten(0, 1)) for keys, values in room]  # [B * capacity, H, K]
        self._heads = [(keys.transpose(1, 2), values.transpose(1, 2)) for keys, values in room]  # [B, H, capacity, K]

    def _grow(self, capacity: int) -> None:
        layers, parts, rows, before, *rest = self._room.shape
        room = self._room.new_zeros(layers, parts, rows, capacity, *rest)
        room[:, :, :, :before] = self._room
        self._hold(room)
