"""The compiled extension `vlmfast._C`, or the reason, as text, why it is not here."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("VLMFAST_NO_EXT") == "1":
        return None, "switched off by VLMFAST_NO_EXT=1"
    try:
        from vlmfast import _C
    except ImportError as error:
        log = Path(__file__).with_name("_ext_error.txt")
        built = log.read_text() if log.exists() else "it was never built (pip install . builds it)"
        return None, f"vlmfast._C cannot be imported ({error}): {built}"
    return _C, ""


C: Any  # its functions come from csrc/python/bindings.cpp
C, reason = _load()
