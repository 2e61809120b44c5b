"""Attributes of another library replaced, and put back: what every `apply()` and `undo()` here is made of."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

from vlmfast.errors import BackendError

_ABSENT = object()  # the owner had no attribute of its own there: it was inherited


class Patches:
    """What stands replaced in one library, and what stood there before.

    Args:
        library: its name, for the log.
    """

    def __init__(self, library: str) -> None:
        self.library = library
        self._log = logging.getLogger(f"vlmfast.integrations.{library}")
        # owner -> name -> (what the owner itself held, what stands there now); owners are modules, classes and models.
        self._kept: WeakKeyDictionary[Any, dict[str, tuple[Any, Any]]] = WeakKeyDictionary()

    def __str__(self) -> str:
        """What stands replaced."""
        return ", ".join(f"{_called(owner)}.{name}" for owner, names in self._kept.items() for name in names)

    def replace(self, changes: Sequence[tuple[Any, str, Any]]) -> Applied:
        """Sets every (owner, name, value), or none of them; what already stands replaced keeps its first original.

        Args:
            changes: the modules, classes or models, the names of their attributes and the values to set.
        Returns: a context manager whose end puts back what this call has set, and nothing that stood before it.
        Raises:
            BackendError: an owner has no such attribute; nothing was set.
        """
        for owner, name, _ in changes:
            if not hasattr(owner, name):
                raise BackendError(f"{self.library}: {_called(owner)} has no {name} to replace; nothing was patched")
        new = [change for change in changes if not self._stands(*change)]
        added = []
        for owner, name, value in new:
            kept = self._kept.setdefault(owner, {})
            held, earlier = vars(owner).get(name, _ABSENT), kept.get(name)
            # A bound method would keep its model, the owner, alive: its function is enough to know it again.
            kept[name] = (earlier[0] if earlier else held, _function(value))
            added.append((owner, name, held, earlier, kept[name]))
            setattr(owner, name, value)
        if new:
            self._log.info("vlmfast replaced %s", ", ".join(f"{_called(owner)}.{name}" for owner, name, _ in new))
        applied = Applied(self)
        applied.callback(self._undo_one, added)
        return applied

    def original(self, owner: Any, name: str) -> Any:
        """What stood there before `replace`, bound if the owner is an instance; what stands there, if that is not ours.

        Args:
            owner: a module, class or model.
            name: of the attribute.
        """
        if name not in self._kept.get(owner, {}):
            return getattr(owner, name)
        value = self._kept[owner][name][0]
        if value is not _ABSENT:
            return value
        if isinstance(owner, type):
            return getattr(super(owner, owner), name)
        return getattr(type(owner), name).__get__(owner)

    def undo(self) -> None:
        """Puts back what `replace` found; what somebody else has replaced since is left as it is, with a warning."""
        self._put_back(
            [(owner, name, original) for owner, names in self._kept.items() for name, (original, _) in names.items()]
        )
        self._kept.clear()

    def _undo_one(self, added: Iterable[tuple[Any, str, Any, tuple[Any, Any] | None, tuple[Any, Any]]]) -> None:
        """Puts back what one `replace` found, except where `undo` or a later `replace` has been since."""
        mine = [entry for entry in added if self._kept.get(entry[0], {}).get(entry[1]) is entry[4]]
        self._put_back([(owner, name, held) for owner, name, held, _, _ in mine])
        for owner, name, _, earlier, _ in mine:
            if earlier is None:
                del self._kept[owner][name]
            else:
                self._kept[owner][name] = earlier

    def _put_back(self, values: Sequence[tuple[Any, str, Any]]) -> None:
        """Sets or deletes what we have replaced; warns of what is not ours any more."""
        restored = []
        for owner, name, value in values:
            if _function(getattr(owner, name, _ABSENT)) is not self._kept[owner][name][1]:
                self._log.warning("%s.%s is not vlmfast's any more; left as it is", _called(owner), name)
                continue
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
            restored.append(f"{_called(owner)}.{name}")
        if restored:
            self._log.info("vlmfast put back %s", ", ".join(restored))

    def _stands(self, owner: Any, name: str, value: Any) -> bool:
        """Whether that value stands there by our doing."""
        ours = self._kept.get(owner, {}).get(name, (None, _ABSENT))[1]
        return ours is _function(value) and _function(getattr(owner, name)) is ours


class Applied(ExitStack):
    """What one call has replaced: at the end of a `with` it is put back, and what stood replaced before stays so.

    `str()` names all that stands replaced in the library, by this call and others.

    Args:
        patches: of the library.
    """

    def __init__(self, patches: Patches) -> None:
        super().__init__()
        self._patches = patches

    def __str__(self) -> str:
        return str(self._patches)


def known_version(library: str, version: str, known: str, pattern: str) -> None:
    """Refuses a version of a library that this file was not written for.

    Args:
        library: as pip calls it.
        version: what is installed.
        known: the versions that are known, in words.
        pattern: a regular expression that those match from the start.
    Raises:
        BackendError: the version is another.
    """
    if not re.match(pattern, version):
        raise BackendError(
            f"{library} {version} is not known to this vlmfast, so nothing was patched; known: {known}. "
            f"Install one of those, or use the unpatched {library}"
        )


def takes(ours: Callable[..., Any], theirs: Callable[..., Any], library: str) -> None:
    """Refuses a function or class whose arguments its replacement does not take, by the same names in the same order.

    Args:
        ours: the replacement; it may take more.
        theirs: what it replaces.
        library: name and version, for the message.
    Raises:
        BackendError: an argument of theirs is not one of ours, or stands elsewhere.
    """
    wanted, known = list(inspect.signature(theirs).parameters), list(inspect.signature(ours).parameters)
    if [name for name in known if name in wanted] != wanted:
        raise BackendError(
            f"{library}: {theirs.__qualname__} takes ({', '.join(wanted)}), vlmfast's {ours.__qualname__} takes "
            f"({', '.join(known)}), so nothing was patched; use the unpatched {library}, or another version of it"
        )


def _function(value: Any) -> Any:
    """The function of a bound method; anything else as it is."""
    return getattr(value, "__func__", value)


def _called(owner: Any) -> str:
    """The name of a module or class, or of a model's class."""
    return getattr(owner, "__name__", None) or f"{type(owner).__name__} instance"
