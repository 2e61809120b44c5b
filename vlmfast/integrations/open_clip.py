"""open_clip trains with vlmfast's losses: two lines in a script, or its own command line behind `python -m`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import nn

from vlmfast.errors import MissingExtraError, VlmfastError
from vlmfast.integrations._patch import Applied, Patches, known_version, takes
from vlmfast.losses.clip import ClipLoss
from vlmfast.losses.coca import CoCaLoss
from vlmfast.losses.distill import DistillClipLoss
from vlmfast.losses.siglip import SigLipLoss

KNOWN, PATTERN = "3.3 and 4", r"3\.3\.|4\."
_patches = Patches("open_clip")


def apply(clip: bool = True, siglip: bool = True, coca: bool = True, distill: bool = True) -> Applied:
    """vlmfast's losses in the place of open_clip's, in every module of it that builds one.

    Whatever builds its loss from now on gets ours: `open_clip.create_loss`, the tasks of open_clip 4, and
    `open_clip_train`. A class that was imported by name before, and a loss that was built before, stay open_clip's.
    Calling it again changes nothing; `with apply():` undoes at the end what that call has changed, and no other's. One
    line is logged, at level INFO.

    Args:
        clip: replace ClipLoss; False leaves it as it stands, as the others do.
        siglip: replace SigLipLoss.
        coca: replace CoCaLoss.
        distill: replace DistillClipLoss.
    Returns: what stands replaced, as a context manager; `str()` names it.
    Raises:
        MissingExtraError: open_clip cannot be imported.
        BackendError: this version of open_clip is not known, or one of its losses takes other arguments than ours;
            nothing is patched then.
    """
    open_clip, *_ = _imported("open_clip", "open_clip.factory", "open_clip.loss")
    known_version("open_clip_torch", open_clip.__version__, KNOWN, PATTERN)
    wanted: dict[type[nn.Module], bool] = {ClipLoss: clip, SigLipLoss: siglip, CoCaLoss: coca, DistillClipLoss: distill}
    changes: list[tuple[Any, str, Any]] = []
    for ours in (loss for loss, asked in wanted.items() if asked):
        name = ours.__name__
        theirs = getattr(open_clip.loss, name)
        if theirs is not ours:
            takes(ours, theirs, f"open_clip {open_clip.__version__}")
            takes(ours.forward, theirs.forward, f"open_clip {open_clip.__version__}")
        holders = (open_clip, open_clip.loss, open_clip.factory)
        changes += [(holder, name, ours) for holder in holders if getattr(holder, name, None) is theirs]
    return _patches.replace(changes)


def undo() -> None:
    """open_clip's own losses again, wherever `apply` replaced them."""
    _patches.undo()


def main(argv: Sequence[str]) -> None:
    """open_clip_train's own command line, with vlmfast's losses in it for as long as it runs.

    Args:
        argv: what stands behind `python -m open_clip_train.main`, unchanged.
    Raises:
        MissingExtraError: open_clip or open_clip_train cannot be imported, as the latter without open_clip's
            `training` extra.
        BackendError: as from `apply`. What open_clip_train raises comes through.
    """
    with apply() as patches:
        training, open_clip = _imported("open_clip_train.main", "open_clip")
        if os.environ.get("RANK", "0") == "0":
            print(f"vlmfast replaced {patches} ({open_clip.__version__})", flush=True)
        training.main(list(argv))


def _imported(*names: str) -> list[ModuleType]:
    """open_clip's modules of these names."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise MissingExtraError(
            f"{names[0]} cannot be imported ({error}); run: pip install 'open_clip_torch[training]>=3.3'"
        ) from error


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except VlmfastError as error:
        sys.exit(f"vlmfast: {error}")
