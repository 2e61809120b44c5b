"""Checkpoints that are whole or absent.

    checkpoints/step_000123/model.safetensors       weights, as model.state_dict() names them
                            optimizer.safetensors   "<parameter>/<state>", such as "text.proj/exp_avg"
                            ema.safetensors         their exponential mean, of a run that keeps one
                            state.json              step, what the run is, parameter groups, data, file sizes
                            SHA256SUMS              of all of them; `sha256sum -c SHA256SUMS` checks it by hand
    checkpoints/latest                              the name of the checkpoint to go on from

A checkpoint is written under a hidden name, synced to the disk and then renamed; `latest` is replaced last. A process
that dies at any moment leaves the last checkpoint in place. There is no pickle in it: a foreign one can run no code.

Several ranks write the same files, through rank 0. A sharded one has, in place of the .safetensors above, one file a
rank, shard-00001-*.safetensors, with its parts of "model/<name>", "optimizer/<parameter>/<state>" and "ema/<name>": the
safetensors form of torch.distributed.checkpoint. The header of each file tells where its parts belong, and any number
of ranks can read them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmfast.errors import DataError
from vlmfast.train.ema import Ema
from vlmfast.train.world import World, inner

STATE, SUMS, LATEST = "state.json", "SHA256SUMS", "latest"
KINDS = {"model": "model.safetensors", "optimizer": "optimizer.safetensors", "ema": "ema.safetensors"}
FORMAT = 1


def save_checkpoint(
    directory: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    run: Mapping[str, Any] | None = None,
    keep: int = 3,
    ema: Ema | None = None,
    data: Any = None,
    world: World | None = None,
    sharded: bool = False,
) -> Path:
    """The new checkpoint's path, once it is on the disk and `latest` names it.

    With several ranks each of them calls this, and goes on when all is done.

    Args:
        directory: the folder of the run's checkpoints, the same for all ranks; made if it is missing.
        step: steps taken so far.
        model: its state_dict is kept, under the names of the model inside DDP.
        optimizer: over parameters of `model`; its state must be tensors.
        run: what must be the same for this run to go on, as JSON can hold it (seed, batch size, model, ...).
        keep: how many checkpoints up to this one stay; older ones are deleted.
        ema: the mean of the weights, if the run keeps one.
        data: where this rank's data stands, as JSON can hold it; `data_state` gives it back.
        world: the ranks; None for one process.
        sharded: each rank writes what it holds of an FSDP2 model, instead of rank 0 everything.

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
    world, model, directory = world or World(), inner(model), Path(directory)
    path = directory / f"step_{step:06d}"
    if path.exists() and latest_checkpoint(directory) == path:
        raise DataError(f"checkpoint {path}: is already the latest; it is not overwritten")
    partial = directory / f".{path.name}.partial"
    if world.main:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".step_*"):  # of a process that died
            shutil.rmtree(leftover)
        partial.mkdir()
    world.wait()
    tensors = {"model": model.state_dict(), "optimizer": _optimizer_tensors(model, optimizer)}
    tensors |= {"ema": ema.tensors} if ema else {}
    if sharded:
        _write_shards(partial, tensors, world)
    else:
        _write_whole(partial, tensors, getattr(model, "points", ()), world)
    states = world.gather(data)
    if world.main:
        written = sorted(file.name for file in partial.iterdir())
        state = {
            "format": FORMAT,
            "step": step,
            "run": dict(run or {}),
            "groups": _groups(model, optimizer),
            "world_size": world.world_size,
            "data": states,
            "bytes": {name: (partial / name).stat().st_size for name in written},
        }
        (partial / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        sums = "".join(f"{_sha256(partial / name)}  {name}\n" for name in (*written, STATE))
        (partial / SUMS).write_text(sums, encoding="utf-8")
        for name in (*written, STATE, SUMS):
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
    world.wait()
    return path


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    run: Mapping[str, Any] | None = None,
    ema: Ema | None = None,
    world_size: int | None = None,
) -> int:
    """The step of the checkpoint, whose weights and optimizer state are now those of `model` and `optimizer`.

    Everything is checked before anything is changed. Any number of ranks can read what any other number wrote, sharded
    or not; each of them calls this.

    Args:
        path: a checkpoint, .../checkpoints/step_<step>.
        model: as it was built for the run; plain, or in DDP or FSDP2.
        optimizer: as it was built for the run; learning rates may differ.
        run: must equal what was given to `save_checkpoint`.
        ema: gets the mean of the weights, if there is one for it.
        world_size: how many ranks must have written it; None for any number.

    Returns:
        Steps taken until the checkpoint was written.

    Raises:
        DataError: the checkpoint is missing, truncated or corrupted, or belongs to another run, model, optimizer or
            number of ranks; the message names the file, what is wrong, and the older checkpoint if there is one.
    """
    path, model = Path(path), inner(model)
    state = read_state(path)
    written_by = state.get("world_size", 1)
    if world_size not in (None, written_by):
        raise DataError(
            f"checkpoint {path}: was written at world_size {written_by}, this run has world_size {world_size}: other "
            f"batches would follow. Nothing was loaded; start {written_by} rank(s), or accept it by --elastic"
        )
    _same(path, STATE, "the run", state["run"], json.loads(json.dumps(dict(run or {}))))
    weights = _read(path, state, "model", model.state_dict())
    means = _read(path, state, "ema", ema.tensors) if ema else {}
    _same(path, STATE, "the optimizer's parameter groups", state["groups"], _groups(model, optimizer))
    slots = {name: slot for slot, name in enumerate(name for group in state["groups"] for name in group["params"])}
    slot_states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in _read(path, state, "optimizer", dict(model.named_parameters())).items():
        name, _, kind = key.rpartition("/")
        slot_states.setdefault(slots[name], {})[kind] = tensor.clone()  # of a file that is mapped into memory
    model.load_state_dict(weights)
    for name, tensor in means.items():
        ema.tensors[name].copy_(tensor)  # type: ignore[union-attr]
    optimizer.load_state_dict({"state": slot_states, "param_groups": optimizer.state_dict()["param_groups"]})
    return state["step"]


def data_state(path: str | Path, world: World) -> Any:
    """What this rank gave as `data` to `save_checkpoint`; None where another number of ranks wrote the checkpoint.

    Args:
        path: a checkpoint that was loaded.
        world: the ranks.

    Returns:
        As JSON holds it.
    """
    state = json.loads((Path(path) / STATE).read_text(encoding="utf-8"))
    states = state.get("data", [None])
    return states[world.rank] if len(states) == world.world_size else None


def load_weights(path: str | Path, model: nn.Module, *, ema: bool = False) -> dict[str, Any]:
    """The checkpoint's state ("step", "run", ...), once its weights are those of `model`; for evaluation.

    Args:
        path: a checkpoint, .../checkpoints/step_<step>.
        model: with the same names, shapes and dtypes.
        ema: the mean of the weights instead of the last ones.

    Returns:
        What state.json holds.

    Raises:
        DataError: as for `load_checkpoint`, or there is no mean; the model is unchanged then.
    """
    path, model = Path(path), inner(model)
    state = read_state(path)
    model.load_state_dict(_read(path, state, "ema" if ema else "model", model.state_dict()))
    return state


def read_state(path: str | Path) -> dict[str, Any]:
    """What state.json of a checkpoint holds, once all its files are found whole: "step", "run", "groups", "data", ...

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
    for name in (SUMS, STATE):
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
        if not (path / name).is_file():
            raise _refusal(path, name, "is missing")
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


def _write_whole(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], points: Collection[str], world: World
) -> None:
    """Rank 0 writes one file a kind; the others give it their parts."""
    for kind, named in tensors.items():
        whole = {}
        for name, tensor in named.items():
            if hasattr(tensor, "full_tensor"):  # every rank takes part, in the same order
                tensor = tensor.full_tensor()
                tensor = tensor.reshape(()) if name.split("/")[0] in points else tensor
            if world.main:
                whole[name] = tensor.detach().cpu()
        if world.main:
            save_file(_separate(whole), folder / KINDS[kind])


def _write_shards(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], world: World) -> None:
    """Each rank writes one file, with its parts."""
    import torch.distributed.checkpoint as dcp

    named = {f"{kind}/{name}": tensor for kind, part in tensors.items() for name, tensor in part.items()}
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(named, storage_writer=writer, process_group=world.words, no_dist=world.words is None)


def _read(path: Path, state: Mapping[str, Any], kind: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors of that kind, each shaped as the one that it replaces, and spread over ranks as that.

    The optimizer's are like the parameter that they belong to; the others must be those of `like`, by name.
    """
    file = KINDS[kind] if KINDS[kind] in state["bytes"] else f"{kind} in shards"
    found = load_file(path / file) if file in state["bytes"] else _read_shards(path, kind, like)
    if not found and kind == "ema":
        raise _refusal(path, "", "holds no mean of the weights: its run was started without --ema")
    if kind != "optimizer":
        _same(path, file, "the model", _described(found), _described(like))
    return {name: _spread(name, tensor, like[name.split("/")[0]]) for name, tensor in found.items()}


def _read_shards(path: Path, kind: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What shards hold of that kind: each rank reads its parts alone, where `like` is spread over ranks."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(path))
    named = {}
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    for key in (key for key in stored if key.startswith(f"{kind}/")):
        name = key.removeprefix(f"{kind}/")
        shape, dtype, pattern = stored[key].size, stored[key].properties.dtype, like.get(name.split("/")[0])
        fits = pattern is not None and pattern.shape == shape
        named[name] = torch.empty_like(pattern, dtype=dtype) if fits else torch.empty(shape, dtype=dtype)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # meant so: each reads alone
        dcp.load({f"{kind}/{name}": tensor for name, tensor in named.items()}, storage_reader=reader, no_dist=True)
    return named


def _spread(name: str, tensor: Tensor, pattern: Any) -> Tensor:
    """The tensor as `pattern` is: [] or [1], whole or in parts; the optimizer's counts of steps stay as they are."""
    if name.endswith("/step") or tensor.numel() != pattern.numel():
        return tensor
    tensor = tensor.reshape(pattern.shape)
    if hasattr(pattern, "device_mesh") and not hasattr(tensor, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        here = tensor.to(pattern.device)
        return distribute_tensor(here, pattern.device_mesh, pattern.placements, src_data_rank=None)
    return tensor


def _described(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Dtype and shape in words; [1], which FSDP2 makes of [], is the same as that."""
    return {
        name: f"{str(x.dtype).removeprefix('torch.')} {[] if x.shape == (1,) else list(x.shape)}"
        for name, x in tensors.items()
    }


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
                {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr", "lr_scale")}
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
