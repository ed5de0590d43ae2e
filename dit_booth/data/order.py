"""Order of a data set's examples in training: batches of one shape each, a pure function of seed and number."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Place = tuple[int, int]
"""Index of an example, and the epoch that it is read in."""
_BATCHES = 1
"""Tells the draw of the batches' order from that of the examples'."""


class BatchOrder:
    """An endless sequence of batches, each from one bucket of examples.

    Epoch `e` is a permutation of all examples drawn from `(seed, e)`. The examples of a bucket, in this order over all
    epochs, fill the bucket's batches one after another: none is dropped at an epoch's end, or read twice in an epoch.
    Of a bucket of n examples, floor((e + 1) n / size) - floor(e n / size) batches of `size` end in epoch `e`; the
    batches of all buckets that end there come in an order drawn from `(seed, e)`.

    With a single bucket, batch `i` holds the places from `i * size` on in the sequence of all epochs.

    Args:
        buckets: number of each example's bucket.
        size: examples in a batch.
        seed: of all draws.
    """

    def __init__(self, buckets: NDArray[np.int64], size: int, seed: int) -> None:
        self.buckets = buckets
        self.counts: NDArray[np.int64] = np.bincount(buckets)
        self.size = size
        self.seed = seed
        self._orders: dict[int, list[NDArray[np.int64]]] = {}
        self._schedule: tuple[int, NDArray[np.int64]] | None = None

    def batch(self, number: int) -> list[Place]:
        """Return the examples of batch `number`, with their epochs."""
        bucket, batch = self.find(number)
        places = range(batch * self.size, (batch + 1) * self.size)
        epochs = (divmod(place, int(self.counts[bucket])) for place in places)
        return [(int(self._order(epoch)[bucket][place]), epoch) for epoch, place in epochs]

    def find(self, number: int) -> tuple[int, int]:
        """Return a batch's bucket, and its number among the bucket's batches."""
        if len(self.counts) == 1:
            return 0, number
        epoch = number * self.size // len(self.buckets)
        while self._ended(epoch + 1).sum() <= number:
            epoch += 1
        begun = self._ended(epoch)
        labels, place = self._labels(epoch), number - int(begun.sum())
        bucket = int(labels[place])
        return bucket, int(begun[bucket] + np.count_nonzero(labels[:place] == bucket))

    def _ended(self, epoch: int) -> NDArray[np.int64]:
        """Return how many batches of each bucket end before an epoch."""
        return epoch * self.counts // self.size

    def _labels(self, epoch: int) -> NDArray[np.int64]:
        """Return the bucket of each batch that ends in an epoch."""
        if self._schedule is None or self._schedule[0] != epoch:
            counts = self._ended(epoch + 1) - self._ended(epoch)
            rng = np.random.default_rng((self.seed, epoch, _BATCHES))
            self._schedule = epoch, rng.permutation(np.repeat(np.arange(len(counts)), counts))
        return self._schedule[1]

    def _order(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the examples of each bucket, in the order of an epoch."""
        if epoch not in self._orders:
            drawn = np.random.default_rng((self.seed, epoch)).permutation(len(self.buckets))
            of = self.buckets[drawn]
            kept = dict(list(self._orders.items())[-1:])  # a batch may begin in one epoch and end in the next
            self._orders = {**kept, epoch: [drawn[of == bucket] for bucket in range(len(self.counts))]}
        return self._orders[epoch]
