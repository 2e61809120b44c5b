"""open_clip's names. A CLIP's are ours; its SigLIPs have timm's image tower under `visual.trunk.` and `text.`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from vlmfast.errors import DataError
from vlmfast.models.config import ClipConfig, trunk_name
from vlmfast.models.weights.table import Row, module, row

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
DROPPED = {"attn_mask", "text.attn_mask"}  # a buffer that older versions saved


def has_our_names(weights: Mapping[str, Tensor]) -> bool:
    """Whether the tensors bear our names already, as all that are not a SigLIP of open_clip's do.

    Args:
        weights: a checkpoint's tensors.
    """
    return "visual.conv1.weight" in weights


def rows(config: ClipConfig, names: list[str]) -> list[Row]:
    """The table between our tensors and open_clip's.

    Args:
        config: the model.
        names: of all our tensors.
    """
    if config.vision_cfg.pool_type != "map":
        return [row(name) for name in names]
    scalars = ("logit_scale", "logit_bias")
    table = [row(name, name if name in scalars else f"text.{name}") for name in names if not name.startswith("visual.")]
    trunk = "visual.trunk"
    table += module("visual.conv1", f"{trunk}.patch_embed.proj")
    table += [row("visual.positional_embedding", f"{trunk}.pos_embed", form="[1, ...]")]
    for i in range(_depth(config)):
        ours, theirs = f"visual.transformer.resblocks.{i}", f"{trunk}.blocks.{i}"
        table += module(f"{ours}.ln_1", f"{theirs}.norm1") + module(f"{ours}.ln_2", f"{theirs}.norm2")
        table += [row(f"{ours}.attn.in_proj_{part}", f"{theirs}.attn.qkv.{part}") for part in ("weight", "bias")]
        table += module(f"{ours}.attn.out_proj", f"{theirs}.attn.proj")
        table += module(f"{ours}.mlp.c_fc", f"{theirs}.mlp.fc1") + module(f"{ours}.mlp.c_proj", f"{theirs}.mlp.fc2")
    table += module("visual.ln_post", f"{trunk}.norm")
    ours, theirs = "visual.attn_pool", f"{trunk}.attn_pool"
    table += [row(f"{ours}.probe", f"{theirs}.latent", form="[1, 1, ...]")]
    for part in ("weight", "bias"):
        table += [row(f"{ours}.in_proj_{part}", f"{theirs}.q.{part}", f"{theirs}.kv.{part}", form="q|kv")]
    table += module(f"{ours}.out_proj", f"{theirs}.proj") + module(f"{ours}.ln", f"{theirs}.norm")
    return table + module(f"{ours}.mlp.c_fc", f"{theirs}.mlp.fc1") + module(f"{ours}.mlp.c_proj", f"{theirs}.mlp.fc2")


def plain(weights: Mapping[str, Tensor], config: ClipConfig) -> dict[str, Tensor]:
    """The checkpoint's tensors without old buffers and, for a CLIP, without `text.` before its names.

    Args:
        weights: of an open_clip checkpoint; `custom_text` models other than SigLIP have that prefix.
        config: the model.
    """
    kept = {name: value for name, value in weights.items() if name not in DROPPED}
    if config.vision_cfg.pool_type == "map":
        return kept
    return {name.removeprefix("text."): value for name, value in kept.items()}


def check_writable(config: ClipConfig) -> None:
    """Nothing, if open_clip can build the model.

    Args:
        config: the model.
    Raises:
        DataError: it is a SigLIP of sizes, or with an activation, that timm has no name for.
    """
    vision = config.vision_cfg
    if vision.pool_type == "map" and trunk_name(vision) is None:
        others = [trunk_name(replace(vision, act_kwargs=kwargs)) for kwargs in (None, {"approximate": "tanh"})]
        near = next((name for name in others if name), None)
        raise DataError(
            "to open_clip: it builds SigLIP's image tower by a timm name, and timm has none for "
            f"image_size {vision.image_size}, patch_size {vision.patch_size}, width {vision.width}, "
            f"layers {vision.layers}, activation {config.activation(vision)}"
            + (f"; {near} has {'gelu' if near == others[0] else 'gelu_tanh'}: name that activation" if near else "")
        )


def _depth(config: ClipConfig) -> int:
    assert isinstance(config.vision_cfg.layers, int)
    return config.vision_cfg.layers
