"""What a reader leaves out: named by a reason, counted once, never lost in silence."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

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
        self._lock = threading.Lock()
        self._found: dict[str, set[int | str]] = {}  # reason -> keys of the things
        self._examples: dict[str, str] = {}  # reason -> the first of its messages, by the alphabet

    def add(self, key: int | str, error: UnreadableError) -> bool:
        """Whether the thing is new; it is counted then."""
        with self._lock:
            if any(key in keys for keys in self._found.values()):
                return False
            self._found.setdefault(error.reason, set()).add(key)
            message = str(error)
            self._examples[error.reason] = min(message, self._examples.get(error.reason, message))
            return True

    def counts(self) -> Counter[str]:
        """How many things were skipped, by reason."""
        with self._lock:
            return Counter({reason: len(keys) for reason, keys in self._found.items()})

    def describe(self) -> str:
        """One line for people, with an example of each reason; empty if nothing was skipped."""
        counts = self.counts()
        parts = [f"{count} {reason}, such as {self._examples[reason]}" for reason, count in counts.most_common()]
        return f"skipped {counts.total()}: " + "; ".join(parts) if parts else ""

    def state_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        with self._lock:
            found = {reason: sorted(keys, key=str) for reason, keys in self._found.items()}
            return {"found": found, "examples": dict(self._examples)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Adds what another reader of the same data has met: of an earlier run, or of another rank."""
        with self._lock:
            known = set().union(*self._found.values())
            for reason, keys in state["found"].items():
                self._found.setdefault(reason, set()).update(set(keys) - known)
                message = state["examples"][reason]
                self._examples[reason] = min(message, self._examples.get(reason, message))
