"""Blocks of the key-value cache: which are free, and how many a sequence needs."""

from __future__ import annotations

from collections.abc import Iterable


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Return how many blocks of `block_size` tokens hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


class BlockPool:
    """The ids 0 .. num_blocks - 1 of equal cache blocks, each free or in use by one owner.

    The block freed last is given out first: its memory is the likeliest to be in a cache.

    Args:
        num_blocks: at least 1.

    Raises:
        ValueError: num_blocks is out of range.

    Example:
        >>> pool = BlockPool(4)
        >>> block_ids = pool.allocate(3)
        >>> pool.num_free
        1
        >>> pool.free(block_ids)
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"BlockPool: num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._in_use = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        """How many blocks are free."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks.

        Args:
            count: in [0, num_free].

        Returns:
            Their ids.

        Raises:
            ValueError: fewer are free, or count is negative; nothing is taken.
        """
        if not 0 <= count <= len(self._free):
            raise ValueError(
                f"BlockPool.allocate: count must be in [0, free blocks], "
                f"got {count} with {len(self._free)} free of {self.num_blocks}"
            )
        block_ids = [self._free.pop() for _ in range(count)]
        for block_id in block_ids:
            self._in_use[block_id] = 1
        return block_ids

    def free(self, block_ids: Iterable[int]) -> None:
        """Give blocks back.

        Args:
            block_ids: blocks in use, each named once.

        Raises:
            ValueError: an id is out of range, or its block is already free; the ids before it are
                given back.
        """
        for block_id in block_ids:
            if not 0 <= block_id < self.num_blocks:
                raise ValueError(
                    f"BlockPool.free: block_ids must be in [0, {self.num_blocks}), got {block_id}"
                )
            if not self._in_use[block_id]:
                raise ValueError(
                    f"BlockPool.free: block_ids must be in use, got {block_id}, which is free"
                )
            self._in_use[block_id] = 0
            self._free.append(block_id)
