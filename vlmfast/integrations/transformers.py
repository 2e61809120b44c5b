"""transformers: CLIP's and SigLIP's losses without the logits, and attention under the name "vlmfast_flash"."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlmfast.errors import BackendError, missing_extra
from vlmfast.integrations._patch import Applied, Patches, known_version
from vlmfast.losses import ClipLoss, SigLipLoss
from vlmfast.ops.attention import attention as vlmfast_attention

ATTENTION = "vlmfast_flash"
"""A name for `model.set_attn_implementation`. As it has "flash" in it, Qwen-VL packs its images for it, in one call."""


class _TransformersPatches(Patches):
    """Undoing takes the attention from transformers' registries, too."""

    def undo(self) -> None:
        """As `Patches.undo`, and "vlmfast_flash" is unknown again."""
        super().undo()
        _unregister_attention()


_PATCHES = _TransformersPatches("transformers")


def apply(
    *,
    clip: bool = True,
    siglip: bool = True,
    siglip2: bool = True,
    vision_text_dual_encoder: bool = True,
    attention: bool = True,
    across_devices: bool = False,
    model: nn.Module | None = None,
) -> Applied:
    """Gives transformers 5's contrastive models a loss without logits, and registers an attention, until `undo`.

    With `return_loss=True` a patched model's output has the loss, the embeddings and the towers' outputs as before,
    and `logits_per_image` and `logits_per_text` are None: nothing of [B, B] is held. Loss and gradients are the
    original's up to rounding, in float32 also under autocast. The original forward runs without `return_loss`, where
    logits are asked for with `model(..., output_logits=True)`, for `return_dict=False`, whose tuple has them by
    position, and under `torch.no_grad()`: what `Trainer.evaluate` and `predict` hand to `compute_metrics` is the
    library's own. A subclass that takes the logits from `super().forward(return_loss=True)` must ask for them.

    Call it before `Trainer` and `Accelerator.prepare`: under mixed precision these keep the model's forward of that
    time as an attribute of the model, and later patches, or an `undo`, of the class do not reach it.

    Args:
        clip: `CLIPModel`.
        siglip: `SiglipModel`.
        siglip2: `Siglip2Model`.
        vision_text_dual_encoder: `VisionTextDualEncoderModel`.
        attention: makes "vlmfast_flash" known; `model.set_attn_implementation("vlmfast_flash")` chooses it. Masks,
            dropout and grouped heads go on to transformers' "sdpa".
        across_devices: where torch.distributed runs, compare with the pairs of every rank. transformers compares a
            rank's pairs among themselves: another objective, and under `torch.no_grad()` still the one that is
            computed. Every rank must have as many pairs, and an optimizer that averages gradients over ranks, as
            Trainer's does, then sees the gradient of the whole batch's loss.
        model: this model alone instead of the classes.
    Returns:
        What stands patched: `with apply(): ...` undoes at the end what that call has changed.
    Raises:
        MissingExtraError: transformers is not installed.
        BackendError: its version or a forward's arguments are not known, or `model` is of another class; nothing is
            patched then.
    """
    try:
        import transformers
    except ImportError as error:
        raise missing_extra("transformers", "hf") from error

    version = transformers.__version__
    known_version("transformers", version, known="5.6 and later 5.x", pattern=r"5\.([6-9]|\d\d)")
    wanted = (clip, siglip, siglip2, vision_text_dual_encoder)
    changes: list[tuple[Any, str, Any]] = []
    matched = False
    for kind, use in zip(_KINDS, wanted, strict=True):
        if not use:
            continue
        module = importlib.import_module(f"transformers.models.{kind.module}")
        owner = getattr(module, kind.name)
        original = _PATCHES.original(owner, "forward")
        _known_forward(kind, original, version)
        forward = _without_logits(original, kind, getattr(module, kind.output), across_devices)
        if model is None:
            changes.append((owner, "forward", forward))
        elif isinstance(model, owner):
            matched = True
            changes.append((model, "forward", forward.__get__(model)))
    if model is not None and not matched:
        names = ", ".join(kind.name for kind in _KINDS)
        raise BackendError(
            f"apply: model must be one of {names} whose flag is set; got {type(model).__name__}. Of a wrapped model "
            "give what is wrapped (model.module)"
        )
    if attention:
        modeling = importlib.import_module("transformers.modeling_utils")
        name = "lazy_import_flash_attention"
        if hasattr(modeling, name):
            changes.append((modeling, name, _nothing_to_load(_PATCHES.original(modeling, name))))
    applied = _PATCHES.replace(changes)
    if attention and _register_attention():
        applied.callback(_unregister_attention)
    return applied


def undo() -> None:
    """Puts back every forward that `apply` replaced, and takes back the attention's name.

    A model that still bears the name then fails with transformers' message: give it `set_attn_implementation("sdpa")`
    before.
    """
    _PATCHES.undo()


class _Kind(NamedTuple):
    """A class whose forward we know, and how its embeddings are come by."""

    flag: str
    module: str
    name: str
    output: str
    parameters: tuple[str, ...]
    towers: Callable[..., tuple[Any, Any, Tensor, Tensor]]


def _known_forward(kind: _Kind, forward: Callable[..., Any], version: str) -> None:
    parameters = tuple(inspect.signature(forward).parameters)
    if parameters != ("self", *kind.parameters, "kwargs"):
        raise BackendError(
            f"transformers {version}: {kind.name}.forward takes {', '.join(parameters[1:])}; this vlmfast knows "
            f"{', '.join(kind.parameters)}, so nothing was patched. Leave it out, apply({kind.flag}=False), or install "
            "another version"
        )


@functools.cache
def _without_logits(original: Callable[..., Any], kind: _Kind, output: type, across_devices: bool) -> Any:
    """The forward that computes the loss from the embeddings, where nobody asked for logits."""

    @functools.wraps(original)
    def forward(self, *args, output_logits: bool = False, **kwargs):
        given = dict(zip(kind.parameters, args, strict=False)) | kwargs
        as_tuple = not (self.config.return_dict if given.get("return_dict") is None else given["return_dict"])
        # Trainer evaluates without gradients, and hands the output's entries to metrics by position.
        if output_logits or as_tuple or not given.get("return_loss") or not torch.is_grad_enabled():
            return original(self, *args, **kwargs)
        vision, text, image_embeds, text_embeds = kind.towers(self, *args, **kwargs)
        image_embeds = image_embeds / image_embeds.norm(dim=-1, keepdim=True)
        text_embeds = text_embeds / text_embeds.norm(dim=-1, keepdim=True)
        return output(
            loss=_loss(self, image_embeds.to(text_embeds.device), text_embeds, across_devices),
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
        )

    return forward


def _loss(
    model: Any,
    image: Tensor,  # [B, D] of length one
    text: Tensor,  # [B, D] of length one
    across_devices: bool,
) -> Tensor:
    """The model's own loss: SigLIP's where it has a bias, else CLIP's."""
    rank, world_size = 0, 1
    if across_devices and torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    scale = model.logit_scale.to(text.device).exp()
    if hasattr(model, "logit_bias"):
        return SigLipLoss(rank=rank, world_size=world_size)(image, text, scale, model.logit_bias.to(text.device))
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
    return loss(image, text, scale)


def _clip_towers(
    self,
    input_ids=None,
    pixel_values=None,
    attention_mask=None,
    position_ids=None,
    return_loss=None,
    interpolate_pos_encoding=False,
    **kwargs,
):
    vision = self.get_image_features(
        pixel_values=pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **_as_dict(kwargs)
    )
    text = self.get_text_features(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **_as_dict(kwargs)
    )
    return vision, text, vision.pooler_output, text.pooler_output


def _siglip_towers(
    self,
    input_ids=None,
    pixel_values=None,
    attention_mask=None,
    position_ids=None,
    return_loss=None,
    interpolate_pos_encoding=False,
    **kwargs,
):
    vision = self.vision_model(
        pixel_values=pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **_as_dict(kwargs)
    )
    text = self.text_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **_as_dict(kwargs)
    )
    return vision, text, vision.pooler_output, text.pooler_output


def _siglip2_towers(
    self,
    input_ids=None,
    pixel_values=None,
    pixel_attention_mask=None,
    spatial_shapes=None,
    attention_mask=None,
    position_ids=None,
    return_loss=None,
    **kwargs,
):
    vision = self.vision_model(
        pixel_values=pixel_values,
        pixel_attention_mask=pixel_attention_mask,
        spatial_shapes=spatial_shapes,
        **_as_dict(kwargs),
    )
    text = self.text_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **_as_dict(kwargs)
    )
    return vision, text, vision.pooler_output, text.pooler_output


def _dual_encoder_towers(
    self,
    input_ids=None,
    pixel_values=None,
    attention_mask=None,
    position_ids=None,
    return_loss=None,
    token_type_ids=None,
    output_attentions=None,
    output_hidden_states=None,
    return_dict=None,
    **kwargs,
):
    outputs = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
    vision = self.vision_model(pixel_values=pixel_values, **_as_dict(outputs))
    text = self.text_model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        token_type_ids=token_type_ids,
        position_ids=position_ids,
        **_as_dict(outputs),
    )
    return vision, text, self.visual_projection(vision[1]), self.text_projection(text[1])


def _as_dict(kwargs: dict[str, Any]) -> dict[str, Any]:
    """As the originals call their towers, which then answer by name."""
    return kwargs | {"return_dict": True}


_PAIR = ("input_ids", "pixel_values", "attention_mask", "position_ids", "return_loss")
_KINDS = (
    _Kind("clip", "clip.modeling_clip", "CLIPModel", "CLIPOutput", (*_PAIR, "interpolate_pos_encoding"), _clip_towers),
    _Kind(
        "siglip",
        "siglip.modeling_siglip",
        "SiglipModel",
        "SiglipOutput",
        (*_PAIR, "interpolate_pos_encoding"),
        _siglip_towers,
    ),
    _Kind(
        "siglip2",
        "siglip2.modeling_siglip2",
        "Siglip2Model",
        "Siglip2Output",
        (*_PAIR[:2], "pixel_attention_mask", "spatial_shapes", *_PAIR[2:]),
        _siglip2_towers,
    ),
    _Kind(
        "vision_text_dual_encoder",
        "vision_text_dual_encoder.modeling_vision_text_dual_encoder",
        "VisionTextDualEncoderModel",
        "CLIPOutput",
        (*_PAIR, "token_type_ids", "output_attentions", "output_hidden_states", "return_dict"),
        _dual_encoder_towers,
    ),
)


def _attend(
    module: nn.Module,
    query: Tensor,  # [B, H, T, K]
    key: Tensor,  # [B, H or fewer, T, K]
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: ([B, T, H, K], None)."""
    if kwargs.get("s_aux") is not None:
        raise BackendError(f"{ATTENTION}: attention sinks are not supported; use the model's default attention")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is None and kwargs.get("cu_seq_lens_q") is not None:
        return _attend_packed(query, key, value, dropout, scaling, causal, kwargs), None

    special = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    special |= bool(kwargs.get("output_attentions"))
    if attention_mask is None and not dropout and not special and query.shape == key.shape == value.shape:
        out = vlmfast_attention(query, key, value, causal=causal, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal} | kwargs
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _attend_packed(
    query: Tensor,  # [1, H, tokens, K]
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    causal: bool,
    kwargs: dict[str, Any],
) -> Tensor:
    """[1, tokens, H, K]: each sequence between two entries of cu_seq_lens looks at itself alone."""
    ends, key_ends, longest = kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k"), kwargs.get("max_length_q")
    window = kwargs.get("sliding_window")
    reasons = {
        "dropout": bool(dropout),
        "a softcap": kwargs.get("softcap") is not None,
        "a sliding window": window is not None and (longest is None or longest > window),
        "keys of other lengths": not (key_ends is None or key_ends is ends or torch.equal(ends, key_ends)),
    }
    wrong = [reason for reason, found in reasons.items() if found]
    if wrong:
        raise BackendError(f"{ATTENTION}: packed sequences with {' and '.join(wrong)} are not supported; use 'sdpa'")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    tokens = (x[0].transpose(0, 1) for x in (query, key, value))
    longest = None if longest is None else int(longest)
    return vlmfast_attention(*tokens, causal=causal, scale=scaling, cu_seqlens=ends.int(), max_seqlen=longest)[None]


@functools.cache
def _nothing_to_load(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers takes a name with "flash" in it for a package or a kernel on the hub, and loads it."""

    @functools.wraps(original)
    def lazy_import_flash_attention(implementation, *args, **kwargs):
        return None if implementation == ATTENTION else original(implementation, *args, **kwargs)

    return lazy_import_flash_attention


def _register_attention() -> bool:
    """Whether the name was not known yet."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if ATTENTION in AttentionInterface._global_mapping:
        return False
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    return True


def _unregister_attention() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for registry in (AttentionInterface, AttentionMaskInterface):
        registry._global_mapping.pop(ATTENTION, None)
