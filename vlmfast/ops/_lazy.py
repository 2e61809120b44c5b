"""A backend's module, imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any


class Lazy(ModuleType):
    """Stands for the module `name`: importing Triton takes half a second, which a run without a GPU need not pay."""

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self.__name__), attribute)
