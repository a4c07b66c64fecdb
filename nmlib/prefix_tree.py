"""Keys and values of a whole session: every round once, whatever branches go through it."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from nmlib.prefix_cache import PrefixCache, Segment

MAX_BYTES = 2**30


class PrefixTree:
    """Keys and values of a session's rounds, each stored once; branches share those before the fork.

    Attention wants the keys and values of a branch side by side, so one branch is kept so as well, the *working
    copy*: going on from it, or from anywhere on its path, copies nothing; another branch is put together from
    the rounds it does not share. When the rounds are larger than `max_bytes`, the leaf that was used least recently
    goes first. What has gone is read again when it is needed: eviction changes speed only.

    A round is stored once its picture was read, which happens in the forward pass of what is said next; one that
    nobody went on from is not stored unless `settle` is called.

    Args:
        empty: makes a cache in which nothing was read.
        max_bytes: largest size of the stored rounds; the working copy comes on top.
    """

    def __init__(self, empty: Callable[[], PrefixCache], max_bytes: int = MAX_BYTES) -> None:
        self.empty, self.max_bytes = empty, max_bytes
        self.segments: OrderedDict[int, Segment] = OrderedDict()  # least recently used first
        self._working: PrefixCache | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the stored rounds."""
        return sum(segment.nbytes for segment in self.segments.values())

    def resume(self, path: Sequence[int]) -> tuple[PrefixCache, int]:
        """The cache of the longest beginning of a path that is known, and the number of nodes it covers.

        The cache is the working copy: read on in it, call `keep` after each round, and no longer use it after the
        next `resume`.

        Args:
            path: nodes from the root.
        """
        cache = self.empty() if self._working is None else self._working
        shared = _common([end.node for end in cache.ends], path)
        stored = next((depth for depth, node in enumerate(path) if node not in self.segments), len(path))
        if shared:
            cache.back_to(shared)
        else:
            cache = self.empty()
        if shared < stored:
            cache.extend(path[shared:stored], [self.segments[node] for node in path[shared:stored]])
        for node in path[:stored]:
            self.segments.move_to_end(node)
        self._working = cache
        return cache, max(shared, stored)

    def keep(self, node: int, cache: PrefixCache) -> None:
        """Note that a round ends here, and store all rounds of the working copy that were read.

        Args:
            node: the round's.
            cache: the working copy, as `resume` gave it, with that round and its picture in it.
        """
        cache.end_round(node)
        self._store(cache)

    def settle(self) -> None:
        """Read and store what the working copy has not read yet, as one may while nobody waits."""
        if self._working is not None:
            self._working.settle()
            self._store(self._working)

    def _store(self, cache: PrefixCache) -> None:
        read = cache.length_read
        for index, end in enumerate(cache.ends):
            if end.length <= read:
                if end.node not in self.segments:
                    self.segments[end.node] = cache.segment(index)
                self.segments.move_to_end(end.node)
        while self.nbytes > self.max_bytes:
            parents = {segment.parent for segment in self.segments.values()}
            del self.segments[next(key for key in self.segments if key not in parents)]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))
