"""What a reader leaves out: named by a reason, counted once, never lost in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from vlmfast.errors import DataError


class UnreadableError(DataError):
    """One sample or file cannot be used.

    Args:
        reason: a few words, the same for all of one kind: they are what is counted.
        where: the file or member.
        detail: what was found there.
    """

    def __init__(self, reason: str, where: object, detail: str = "") -> None:
        super().__init__(f"{where}: {reason}" + (f" ({detail})" if detail else ""))
        self.reason = reason


class Skipped:
    """The unreadable things that a reader has met, each once, however often and from however many threads."""

    def __init__(self) -> None:
        self._found: dict[Hashable, tuple[str, str]] = {}  # key of the thing -> reason, message

    def add(self, key: Hashable, error: UnreadableError) -> bool:
        """Whether the thing is new; it is counted then."""
        found = (error.reason, str(error))  # not the error itself, whose traceback would keep the image alive
        return self._found.setdefault(key, found) is found

    def counts(self) -> Counter[str]:
        """How many things were skipped, by reason."""
        return Counter(reason for reason, _ in list(self._found.values()))

    def describe(self) -> str:
        """One line for people, with an example of each reason; empty if nothing was skipped."""
        examples = dict(sorted(self._found.values(), reverse=True))  # the first message of each reason stays
        parts = [f"{count} {reason}, such as {examples[reason]}" for reason, count in self.counts().most_common()]
        return f"skipped {len(self._found)}: " + "; ".join(parts) if parts else ""
