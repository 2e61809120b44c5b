"""Checkpoints that are whole or absent.

    checkpoints/step_000123/model.safetensors       weights, as model.state_dict() names them
                            optimizer.safetensors   "<parameter>/<state>", such as "text.proj/exp_avg"
                            state.json              step, what the run is, parameter groups, file sizes
                            SHA256SUMS              of the three; `sha256sum -c SHA256SUMS` checks it by hand
    checkpoints/latest                              the name of the checkpoint to go on from

A checkpoint is written under a hidden name, synced to the disk and then renamed; `latest` is replaced last. A process
that dies at any moment leaves the last checkpoint in place. There is no pickle in it: a foreign one can run no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmfast.errors import DataError

WEIGHTS, OPTIMIZER, STATE, SUMS, LATEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "SHA256SUMS",
    "latest",
)
FORMAT = 1


def save_checkpoint(
    directory: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    run: Mapping[str, Any] | None = None,
    keep: int = 3,
) -> Path:
    """The new checkpoint's path, once it is on the disk and `latest` names it.

    Args:
        directory: the folder of the run's checkpoints; made if it is missing.
        step: steps taken so far.
        model: its state_dict is kept.
        optimizer: over parameters of `model`; its state must be tensors.
        run: what must be the same for this run to go on, as JSON can hold it (seed, batch size, model, ...).
        keep: how many checkpoints up to this one stay; older ones are deleted.

    Returns:
        directory / "step_<step>".

    Raises:
        DataError: `latest` already names a checkpoint of this step.
        ValueError: keep < 1, or the optimizer holds parameters that are not the model's.
        TypeError: the optimizer keeps something other than tensors, or `run` something that JSON cannot hold.
        OSError: the disk refused; the last checkpoint is untouched.
    """
    if keep < 1:
        raise ValueError(f"save_checkpoint: keep must be at least 1; got {keep}")
    directory = Path(directory)
    path = directory / f"step_{step:06d}"
    if path.exists() and latest_checkpoint(directory) == path:
        raise DataError(f"checkpoint {path}: is already the latest; it is not overwritten")
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".step_*"):  # of a process that died
        shutil.rmtree(leftover)

    partial = directory / f".{path.name}.partial"
    partial.mkdir()
    save_file(_separate(model.state_dict()), partial / WEIGHTS)
    save_file(_separate(_optimizer_tensors(model, optimizer)), partial / OPTIMIZER)
    state = {
        "format": FORMAT,
        "step": step,
        "run": dict(run or {}),
        "groups": _groups(model, optimizer),
        "bytes": {name: (partial / name).stat().st_size for name in (WEIGHTS, OPTIMIZER)},
    }
    (partial / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    sums = "".join(f"{_sha256(partial / name)}  {name}\n" for name in (WEIGHTS, OPTIMIZER, STATE))
    (partial / SUMS).write_text(sums, encoding="utf-8")
    for name in (WEIGHTS, OPTIMIZER, STATE, SUMS):
        _sync(partial / name)
    _sync(partial)

    if path.exists():  # left by a run that went back to an older checkpoint
        _discard(path)
    os.replace(partial, path)
    _sync(directory)
    point_latest(path)
    older = _before(path)
    for old in older[: max(len(older) + 1 - keep, 0)]:
        _discard(old)
    return path


def load_checkpoint(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, run: Mapping[str, Any] | None = None
) -> int:
    """The step of the checkpoint, whose weights and optimizer state are now those of `model` and `optimizer`.

    Everything is checked before anything is changed.

    Args:
        path: a checkpoint, .../checkpoints/step_<step>.
        model: as it was built for the run.
        optimizer: as it was built for the run; learning rates may differ.
        run: must equal what was given to `save_checkpoint`.

    Returns:
        Steps taken until the checkpoint was written.

    Raises:
        DataError: the checkpoint is missing, truncated or corrupted, or belongs to another run, model or optimizer; the
            message names the file, what is wrong, and the older checkpoint if there is one.
    """
    path = Path(path)
    state = read_state(path)
    _same(path, STATE, "the run", state["run"], json.loads(json.dumps(dict(run or {}))))
    weights = _weights(path, model)
    _same(path, STATE, "the optimizer's parameter groups", state["groups"], _groups(model, optimizer))
    slots = {name: slot for slot, name in enumerate(name for group in state["groups"] for name in group["params"])}
    slot_states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(path / OPTIMIZER).items():
        name, _, kind = key.rpartition("/")
        slot_states.setdefault(slots[name], {})[kind] = tensor.clone()  # load_file gives views of the mapped file
    model.load_state_dict(weights)
    optimizer.load_state_dict({"state": slot_states, "param_groups": optimizer.state_dict()["param_groups"]})
    return state["step"]


def load_weights(path: str | Path, model: nn.Module) -> dict[str, Any]:
    """The checkpoint's state ("step", "run", ...), once its weights are those of `model`; for evaluation.

    Args:
        path: a checkpoint, .../checkpoints/step_<step>.
        model: with the same names, shapes and dtypes.

    Returns:
        What state.json holds.

    Raises:
        DataError: as for `load_checkpoint`; the model is unchanged then.
    """
    path = Path(path)
    state = read_state(path)
    model.load_state_dict(_weights(path, model))
    return state


def read_state(path: str | Path) -> dict[str, Any]:
    """What state.json of a checkpoint holds, once all its files are found whole: "step", "run", "groups", "bytes".

    Args:
        path: a checkpoint, .../checkpoints/step_<step>.

    Returns:
        The parsed state.json.

    Raises:
        DataError: a file is missing, truncated or changed since it was written.
    """
    path = Path(path)
    if not path.is_dir():
        raise _refusal(path, "", "there is no such folder")
    for name in (SUMS, STATE, WEIGHTS, OPTIMIZER):
        if not (path / name).is_file():
            raise _refusal(path, name, "is missing")
    lines = (line.split() for line in (path / SUMS).read_text(encoding="utf-8", errors="replace").splitlines())
    sums = {words[1]: words[0] for words in lines if len(words) == 2}
    if _sha256(path / STATE) != sums.get(STATE):
        raise _refusal(path, STATE, f"is not what {SUMS} says was written: one of the two was truncated or changed")
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    if state["format"] != FORMAT:
        raise _refusal(path, STATE, f"has format {state['format']}; this version reads format {FORMAT}")
    for name, written in state["bytes"].items():
        if (found := (path / name).stat().st_size) != written:
            raise _refusal(path, name, f"has {found} bytes, {written} were written: it is truncated or was replaced")
        if _sha256(path / name) != sums.get(name):
            raise _refusal(path, name, f"is not what {SUMS} says was written: its content has changed")
    return state


def checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoints in the folder, oldest first.

    Args:
        directory: the folder of a run's checkpoints, which need not exist.

    Returns:
        Paths of step_<step> folders in order of their step.
    """
    found = {int(path.name[5:]): path for path in Path(directory).glob("step_*") if path.name[5:].isdigit()}
    return [found[step] for step in sorted(found)]


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The checkpoint to go on from, or None if there is none.

    Args:
        directory: the folder of a run's checkpoints, which need not exist.

    Returns:
        What `latest` names. Without `latest` (the process died just before it wrote the first), the newest.

    Raises:
        DataError: `latest` names a checkpoint that is not there.
    """
    directory = Path(directory)
    pointer = directory / LATEST
    if not pointer.exists():
        return next(reversed(checkpoints(directory)), None)
    path = directory / pointer.read_text(encoding="utf-8", errors="replace").strip()
    if path not in checkpoints(directory):
        raise _refusal(path, "", f"{pointer} names it, but it is not there")
    return path


def point_latest(path: Path) -> None:
    """Nothing; `latest` beside the checkpoint names it from now on.

    Args:
        path: a checkpoint.
    """
    replace_text(path.parent / LATEST, path.name + "\n")


def replace_text(path: Path, text: str) -> None:
    """Nothing; the file holds `text` from now on, and at no moment anything between its old content and that.

    Args:
        path: the file, which need not exist.
        text: its new content.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    os.replace(partial, path)
    _sync(path.parent)


def _weights(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The checkpoint's weights, once they fit the model."""
    weights = load_file(path / WEIGHTS)
    saved, built = (
        {name: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for name, tensor in tensors.items()}
        for tensors in (weights, model.state_dict())
    )
    _same(path, WEIGHTS, "the model", saved, built)
    return weights


def _same(path: Path, file: str, what: str, saved: Any, built: Any) -> None:
    """Refuse the checkpoint, naming up to five differences, if `saved` is not `built`."""
    if lines := _differences(saved, built):
        more = f", and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise _refusal(path, file, f"does not fit {what}: {'; '.join(lines[:5])}{more}")


def _differences(saved: Any, built: Any, at: str = "") -> list[str]:
    """Where two JSON values differ, in words."""
    if isinstance(saved, dict) and isinstance(built, dict):
        return [
            line
            for key in (*saved, *(built.keys() - saved.keys()))
            for line in _differences(saved.get(key, "absent"), built.get(key, "absent"), f"{at} {key}".strip())
        ]
    if isinstance(saved, list) and isinstance(built, list) and len(saved) == len(built):
        return [
            line for i, pair in enumerate(zip(saved, built, strict=True)) for line in _differences(*pair, f"{at}[{i}]")
        ]
    return [] if saved == built else [f"{at} is {saved!s:.99} in the checkpoint, {built!s:.99} here"]


def _groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The optimizer's groups as JSON holds them: parameters by name, and no learning rate, which the schedule sets."""
    names = _names(model, optimizer)
    return json.loads(
        json.dumps(
            [
                {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}
                | {"params": [names[parameter] for parameter in group["params"]]}
                for group in optimizer.param_groups
            ]
        )
    )


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    """Parameter -> name, for every parameter that the optimizer holds."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    if not all(parameter in names for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError("checkpoint: the optimizer holds parameters that are not the model's; make them the model's")
    return names


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """ "<parameter>/<state>" -> tensor."""
    names = _names(model, optimizer)
    tensors = {f"{names[p]}/{kind}": value for p, kinds in optimizer.state.items() for kind, value in kinds.items()}
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"checkpoint: optimizer state must be tensors; {key} is {type(value).__name__}")
    return tensors


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous, no two in one memory (tied weights are stored twice), as safetensors wants them."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.detach().clone().contiguous() if memory in seen else tensor.detach().contiguous()
        seen.add(memory)
    return separate


def _before(path: Path) -> list[Path]:
    """The checkpoints beside this one that are older, oldest first."""
    step = int(path.name[5:]) if path.name[5:].isdigit() else 0
    return [other for other in checkpoints(path.parent) if int(other.name[5:]) < step]


def _refusal(path: Path, file: str, why: str) -> DataError:
    """The error that says which file of the checkpoint is wrong, how, and where to go on instead."""
    older = _before(path)
    remedy = f"the one before it: resume={str(older[-1])!r}" if older else f"there is no older one in {path.parent}"
    return DataError(f"checkpoint {path}: {f'{file} ' if file else ''}{why}. Nothing was loaded; {remedy}")


def _discard(path: Path) -> None:
    """Delete a checkpoint so that at no moment half of it bears its name."""
    doomed = path.with_name(f".{path.name}.discarded")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def _sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Have the file's or folder's content on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
