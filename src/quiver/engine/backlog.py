"""What waits, in numbers: how many tokens come before a request's last one, told before it is let in.

Who comes later is due later, but for a share: so of each other request, and of each other caller, at most so many tokens
come before a new request's last as are due by then.
"""

from collections.abc import Hashable


class Shares:
    """Tokens by key. Its one question costs the same however many keys there are."""

    def __init__(self) -> None:
        self.total = 0
        self._amounts: dict[Hashable, int] = {}
        self._classes: dict[int, tuple[int, int]] = {}
        """How many amounts there are below each power of two, and their sum."""

    def __bool__(self) -> bool:
        return bool(self._amounts)

    def add(self, key: Hashable, tokens: int) -> None:
        """Give a key more tokens, or, with a number below zero, fewer."""
        before = self._amounts.pop(key, 0)
        after = before + tokens
        self._move(before, -1)
        self._move(after, +1)
        if after:
            self._amounts[key] = after
        self.total += tokens

    def _move(self, amount: int, sign: int) -> None:
        if not amount:
            return
        size = amount.bit_length()
        count, total = self._classes.pop(size, (0, 0))
        if count + sign:
            self._classes[size] = count + sign, total + sign * amount

    def of(self, key: Hashable) -> int:
        """Return what a key has."""
        return self._amounts.get(key, 0)

    def up_to(self, tokens: int) -> int:
        """Return what all keys have together, of each at most `tokens`; off by a part of those of its own size."""
        return sum([min(total, count * tokens) for count, total in self._classes.values()])


class Backlog:
    """What waits at one priority, by caller and request."""

    def __init__(self) -> None:
        self._callers = Shares()
        self._requests: dict[str, Shares] = {}

    @property
    def tokens(self) -> int:
        """All that waits."""
        return self._callers.total

    def add(self, caller: str, request: int, tokens: int) -> None:
        """Count an input that comes, or, with a number below zero, one that goes."""
        requests = self._requests.setdefault(caller, Shares())
        requests.add(request, tokens)
        self._callers.add(caller, tokens)
        if not requests:
            del self._requests[caller]

    def of(self, caller: str, request: int) -> int:
        """Return what waits of a request."""
        requests = self._requests.get(caller)
        return requests.of(request) if requests else 0

    def before(self, caller: str, due: int) -> int:
        """Return how many tokens come before those of a new request's, of each request and each caller at most `due`."""
        requests = self._requests.get(caller)
        own = requests.up_to(due) if requests else 0
        others = self._callers.up_to(due) - min(self._callers.of(caller), due)
        return own + max(0, others)
