# SPDX-License-Identifier: Apache-2.0
"""Page bookkeeping of a KV cache."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import _core


class PageCopy(NamedTuple):
    """A page to copy, in K, V and index K of every layer, before the next append."""

    source_page: int
    destination_page: int
    num_tokens: int  #: The first tokens of the page; the rest is unused.


class PagedKvCache:
    """Which page holds which block of which sequence: bookkeeping only, it owns no keys or values.

    num_pages pages of block_size tokens each. One instance serves all layers; sequences may share the
    pages of a common prefix. Not thread-safe.
    """

    def __init__(self, num_pages: int, block_size: int = 128) -> None:
        self._native = _core.PagedKvCache(num_pages, block_size)

    def create(self) -> int:
        """A new, empty sequence. Ids of released sequences are used again."""
        return self._native.create()

    def fork(self, sequence: int, num_tokens: int) -> int:
        """A new sequence that shares the first num_tokens tokens of `sequence`."""
        return self._native.fork(sequence, num_tokens)

    def append(self, sequence: int, num_tokens: int) -> PageCopy | None:
        """Makes room for num_tokens more tokens; returns the copy to make where the last page is shared.

        Raises MemoryError, and changes nothing, where too few pages are free.
        """
        copy = self._native.append(sequence, num_tokens)
        return None if copy is None else PageCopy(*copy)

    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Forgets all tokens past the first num_tokens."""
        self._native.truncate(sequence, num_tokens)

    def release(self, sequence: int) -> None:
        """Ends a sequence and frees the pages that nobody else holds."""
        self._native.release(sequence)

    def length(self, sequence: int) -> int:
        """Tokens."""
        return self._native.length(sequence)

    def pages(self, sequence: int) -> list[int]:
        return self._native.pages(sequence)

    @property
    def num_free_pages(self) -> int:
        return self._native.num_free_pages

    @property
    def num_pages(self) -> int:
        return self._native.num_pages

    @property
    def block_size(self) -> int:
        return self._native.block_size

    def batch_arrays(
        self, sequences: list[int], max_pages: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """page_table int32 [batch_size, max_pages], -1 past a sequence's pages, and seq_lens_k int32
        [batch_size]. max_pages: None for what the longest of `sequences` has."""
        if max_pages is None:
            max_pages = max((len(self.pages(sequence)) for sequence in sequences), default=0)
        page_table = np.empty((len(sequences), max_pages), np.int32)
        seq_lens_k = np.empty(len(sequences), np.int32)
        self._native.fill(
            list(sequences),
            _core.Tensor(page_table, "page_table", True, None),
            _core.Tensor(seq_lens_k, "seq_lens_k", True, None),
        )
        return page_table, seq_lens_k
