"""Who has which page of a paged cache; plain bookkeeping on the host."""

from collections.abc import Hashable


class Pages:
    """`count` pages of `size` tokens, each free or held by one owner."""

    def __init__(self, count: int, size: int) -> None:
        if count < 1 or size < 1:
            raise ValueError(f"a cache needs at least one page of at least one token, not {count} of {size}")
        self.count, self.size = count, size
        self._free = list(range(count))[::-1]
        self._held: dict[Hashable, list[int]] = {}

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Pages that so many tokens fill, the last one perhaps in part."""
        return -(-tokens // self.size)

    def held(self, owner: Hashable) -> list[int]:
        """The owner's pages, in the order of its tokens."""
        return list(self._held.get(owner, ()))

    def hold(self, owner: Hashable, tokens: int) -> bool:
        """Gives the owner what it lacks for so many tokens; where there is not enough, nothing, and returns False."""
        missing = self.needed(tokens) - len(self._held.get(owner, ()))
        if missing > len(self._free):
            return False
        if missing > 0:
            self._held.setdefault(owner, []).extend(self._free.pop() for _ in range(missing))
        return True

    def release(self, owner: Hashable) -> None:
        """Takes all pages of the owner back."""
        self._free.extend(reversed(self._held.pop(owner, [])))


__all__ = ["Pages"]
