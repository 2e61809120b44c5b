"""LLaVA 1 and 1.5: a CLIP image tower, a projector, and a language model that reads its features among the text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast.errors import DataError, ShapeError
from vlmfast.layers import ACTIVATIONS
from vlmfast.models.clip import Clip
from vlmfast.models.config import ClipConfig
from vlmfast.models.decoder import Decoder, DecoderConfig
from vlmfast.models.seeded import seeded
from vlmfast.models.vit import VisionConfig, ViT
from vlmfast.models.vlm import Vlm

PROJECTORS = ("linear", "mlp2x_gelu")
SELECTS = ("default", "full")


@dataclass(frozen=True)
class LlavaConfig:
    """A `Llava`'s image tower and decoder, and what lies between them."""

    vision: VisionConfig
    decoder: DecoderConfig
    image_token_id: int  # stands in ids where a feature of an image goes
    activation: str = "quick_gelu"  # of the image tower, a key of `vlmfast.layers.ACTIVATIONS`
    feature_layer: int = -2  # 0: what the first block takes, n: what block n gives; -1 the last, -2 the one before
    select: str = "default"  # "default": patches without the class token; "full": with it
    projector: str = "mlp2x_gelu"  # LLaVA 1.5's; "linear" is LLaVA 1's
    projector_bias: bool = True
    image_mean: tuple[float, ...] = ClipConfig.image_mean  # of pixels in 0..1, R G B
    image_std: tuple[float, ...] = ClipConfig.image_std
    aspect: str = "pad"  # how images are made square: "pad", "square" or "squash", see `vlmfast.data.LlavaJson`

    def __post_init__(self) -> None:
        layers = self.vision.layers
        if self.vision.pool_type != "tok" or not isinstance(layers, int):
            kind = "a ResNet" if not isinstance(layers, int) else f"pooled by {self.vision.pool_type!r}"
            raise DataError(f"Llava: the image tower must be a ViT with a class token; got one that is {kind}")
        if self.decoder.norm == "layer":
            raise DataError(
                "Llava: the decoder must be shaped like Llama or Qwen2, as on disk there is no other; got GPT-2"
            )
        for name, known in (("select", SELECTS), ("projector", PROJECTORS), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, name) not in known:
                raise DataError(f"Llava: {name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if not -layers - 1 <= self.feature_layer <= layers:
            raise ShapeError(
                f"Llava: feature_layer must be in {-layers - 1} .. {layers}, as the image tower has {layers} blocks; "
                f"got {self.feature_layer}"
            )

    @property
    def blocks(self) -> int:
        """How many of the image tower's blocks features go through."""
        assert isinstance(self.vision.layers, int)
        return self.feature_layer if self.feature_layer >= 0 else self.vision.layers + 1 + self.feature_layer

    @property
    def image_tokens(self) -> int:
        """P, features of an image."""
        return self.vision.tokens - (self.select == "default")


class Llava(Vlm):
    """A language model that sees through a CLIP's image tower, which it does not change.

    Equals, for one image and the ids that follow it:
        hidden = [ln_pre(embedded), *outputs of the image tower's blocks][feature_layer]        # [1, 1 + P, C]
        features = multi_modal_projector(hidden[:, 1:])
        decoder(torch.cat([features, decoder.embed(ids)], 1))

    The tower's blocks behind `feature_layer` are kept, for checkpoints, and never run. At first the tower is frozen;
    `freeze` says what a stage of training changes.

    Args:
        config: sizes.
    Source: Liu et al. 2023, "Visual Instruction Tuning"; 2024, "Improved Baselines with Visual Instruction Tuning".
    """

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(
            Decoder(config.decoder),
            image_token_id=config.image_token_id,
            image_tokens=config.image_tokens,
            image_hw=config.vision.image_hw,
            image_mean=config.image_mean,
            image_std=config.image_std,
            aspect=config.aspect,
        )
        C = config.vision.width
        self.config = config
        self.vision_tower = ViT(config.vision, C, config.activation, config.image_mean, config.image_std)
        self.vision_tower.proj = None  # to CLIP's own space, where no feature goes
        self.multi_modal_projector = Projector(C, config.decoder.width, config.projector, config.projector_bias)
        self.freeze(tower=True)

    def freeze(self, *, tower: bool = True, projector: bool = False, decoder: bool = False) -> None:
        """Says what training changes. LLaVA's first stage is `freeze(decoder=True)`, its second `freeze()`.

        Args:
            tower: whether the image tower stays; its blocks that no feature goes through always do.
            projector: whether the projector stays.
            decoder: whether the language model stays.
        """
        vit = self.vision_tower
        vit.requires_grad_(not tower)
        for unused in (*vit.transformer.resblocks[self.config.blocks :], vit.ln_post):
            unused.requires_grad_(False)
        self.multi_modal_projector.requires_grad_(not projector)
        self.decoder.requires_grad_(not decoder)

    def encode_image(self, image: Tensor) -> Tensor:
        """Projected features of patches [N, P, C], in reading order. Args and Raises: see `Vlm.encode_image`."""
        hidden = self.vision_tower.tokens(image, self.config.blocks)
        return self.multi_modal_projector(hidden[:, 1:] if self.config.select == "default" else hidden)

    def describe(self) -> dict[str, Any]:
        """The config as JSON can hold it, with "model_type": "llava"; on disk it has transformers' form."""
        return {"model_type": "llava", **asdict(self.config), "decoder": self.config.decoder.to_dict()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keeps only the blocks' inputs for the backward, which then runs each block a second time."""
        super().set_grad_checkpointing(enable)
        self.vision_tower.set_grad_checkpointing(enable)


class Projector(nn.Module):
    """Image features in the width of a language model's tokens.

    Equals:
        x = linear_1(x)
        x if kind == "linear" else linear_2(F.gelu(x))

    Args:
        width: of the features.
        out: of the tokens.
        kind: "linear" or "mlp2x_gelu".
        bias: of the linear maps.
        x: [..., width] floating.
    Returns: [..., out].
    Source: Liu et al. 2023, eq. 1; 2024, section 3.2.
    """

    def __init__(self, width: int, out: int, kind: str, bias: bool) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, out, bias)
        self.linear_2 = None if kind == "linear" else nn.Linear(out, out, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_1(x)
        return x if self.linear_2 is None else self.linear_2(F.gelu(x))


def build_llava(config: LlavaConfig, *, seed: int | None = None) -> Llava:
    """A freshly initialised model.

    Args:
        config: sizes.
        seed: of the weights, which then depend on nothing else and leave PyTorch's CPU generator as it was; None: draws
            from that generator.
    """
    with seeded(seed):
        return Llava(config)


def llava_from(
    clip: Clip,
    decoder: Decoder,
    *,
    image_token_id: int,
    projector: str = "mlp2x_gelu",
    feature_layer: int = -2,
    select: str = "default",
    aspect: str = "pad",
    seed: int | None = None,
) -> Llava:
    """A Llava with copies of a CLIP's image tower and of a language model, and a fresh projector between them.

    Args:
        clip: whose image tower is a ViT with a class token.
        decoder: the language model.
        image_token_id: where it is the id behind the last of the decoder's vocabulary, the vocabulary grows by it; its
            embedding and its row of the head are the means of the others.
        projector, feature_layer, select, aspect: see `LlavaConfig`.
        seed: of the projector, see `build_llava`.
    Raises:
        DataError: another kind of image tower.
        ShapeError: image_token_id lies further behind the vocabulary.
    Source: the means as new rows: Hewitt 2021, "Initializing new word embeddings for pretrained language models".
    """
    V = decoder.config.vocab_size
    grows = image_token_id == V
    vision = clip.config.vision_cfg
    config = LlavaConfig(
        vision,
        replace(decoder.config, vocab_size=V + grows),
        image_token_id,
        activation=clip.config.activation(vision),
        feature_layer=feature_layer,
        select=select,
        projector=projector,
        aspect=aspect,
        image_mean=clip.config.image_mean,
        image_std=clip.config.image_std,
    )
    model = build_llava(config, seed=seed)
    tower = {name: value for name, value in clip.visual.state_dict().items() if name != "proj"}
    text = decoder.state_dict()
    if grows:
        for name in {"embed_tokens.weight", "lm_head.weight"} & set(text):
            text[name] = torch.cat([text[name], text[name].mean(0, keepdim=True)])
    model.vision_tower.load_state_dict(tower)
    model.decoder.load_state_dict(text)
    return model
