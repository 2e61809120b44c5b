"""Name tables: which tensors of ours are which of another library's, followed in both directions and checked whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from vlmfast.errors import DataError

# How one tensor of ours is theirs: as it is; transposed; in two or three parts along the first dimension, (1 : 2) or
# (1 : 1 : 1); with leading dimensions of 1.
Form: TypeAlias = Literal["same", "transposed", "q|kv", "q|k|v", "[1]", "[1, ...]", "[1, 1, ...]"]


class Row(NamedTuple):
    """One tensor: our name, their names (several where they split it), and how the values relate."""

    ours: str
    theirs: tuple[str, ...]
    form: Form = "same"


def row(ours: str, *theirs: str, form: Form = "same") -> Row:
    """A `Row`; without a name of theirs, it is ours.

    Args:
        ours: our name.
        theirs: their names.
        form: how the values relate.
    """
    return Row(ours, theirs or (ours,), form)


def module(ours: str, theirs: str, parts: Sequence[str] = ("weight", "bias")) -> list[Row]:
    """The rows of a module that both have.

    Args:
        ours: our module's name.
        theirs: their module's name.
        parts: its parameters.
    """
    return [row(f"{ours}.{part}", f"{theirs}.{part}") for part in parts]


def outward(weights: Mapping[str, Tensor], rows: Iterable[Row]) -> dict[str, Tensor]:
    """Their tensors from ours.

    Args:
        weights: ours, all that the rows name.
        rows: the table.
    """
    return {name: part for r in rows for name, part in zip(r.theirs, _split(weights[r.ours], r.form), strict=True)}


def inward(
    weights: Mapping[str, Tensor], rows: Sequence[Row], built: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Our tensors from theirs, bit for bit, once every name and shape is found right.

    Args:
        weights: theirs.
        rows: the table, of every tensor in `built`.
        built: what the model's state dict holds, on any device (meta will do).
        where: what errors call the checkpoint.
    Raises:
        DataError: keys are missing, unknown or of another shape; all are listed.
    """
    expected = outward(built, rows)
    missing = [name for name in expected if name not in weights]
    unknown = [name for name in weights if name not in expected]
    # A scalar may have been kept as [1], as sharded training and Hugging Face's SigLIP do.
    shapes = [
        f"{name} is {list(weights[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape and {weights[name].numel(), tensor.numel()} != {1}
    ]
    wrong = [
        f"{len(found)} {what}: {', '.join(found)}"
        for what, found in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if found
    ]
    if wrong:
        raise DataError(f"{where}: its tensors do not fit the model that its config describes. {'. '.join(wrong)}")
    return {r.ours: _join([weights[name] for name in r.theirs], r.form).reshape(built[r.ours].shape) for r in rows}


def _split(x: Tensor, form: Form) -> tuple[Tensor, ...]:
    if form == "q|k|v":
        return x.chunk(3)
    if form == "q|kv":
        return x.split([len(x) // 3, 2 * (len(x) // 3)])
    if form == "transposed":
        return (x.T,)
    return (x[(None,) * form.count("1")],)


def _join(parts: list[Tensor], form: Form) -> Tensor:
    if form == "transposed":
        return parts[0].T
    return torch.cat(parts) if len(parts) > 1 else parts[0]
