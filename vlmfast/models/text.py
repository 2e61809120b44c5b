"""The text tower: a transformer pooled at one token, in CLIP a causal one pooled at the end-of-text token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast.errors import DataError, DTypeError, ShapeError
from vlmfast.layers import LayerNorm, Packing, Transformer, looked_into, pack

POOLS = ("argmax", "eos", "last", "first")


@dataclass(frozen=True)
class TextConfig:
    """The text tower's sizes, under the names of open_clip's `text_cfg`."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    act_kwargs: dict[str, Any] | None = None  # {"approximate": "tanh"} or nothing
    norm_kwargs: dict[str, Any] | None = None  # {"eps": ...}; nothing: 1e-5
    ls_init_value: float | None = None  # of LayerScale; None: the blocks have none
    no_causal_mask: bool = False  # every token sees every token, padding too
    pool_type: str = "argmax"  # the pooled token: "argmax" the highest id, "eos" the first eos_id, "last", "first"
    eos_id: int | None = None  # for pool_type "eos"
    proj_type: str = "linear"  # "none": there is no projection, and the width is D
    proj_bias: bool = False  # the projection is then an nn.Linear
    hf_tokenizer_name: str | None = None  # carried along for open_clip; not looked at here
    tokenizer_kwargs: dict[str, Any] | None = None  # likewise

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ShapeError(f"text_cfg: width {self.width} must be a multiple of heads {self.heads}")
        if self.pool_type not in POOLS:
            raise DataError(f"text_cfg: pool_type must be one of {', '.join(POOLS)}; got {self.pool_type!r}")
        if self.proj_type not in ("linear", "none"):
            raise DataError(f"text_cfg: proj_type must be linear or none; got {self.proj_type!r}")
        if self.pool_type == "eos" and self.eos_id is None:
            raise DataError("text_cfg: pool_type 'eos' needs eos_id, the end-of-text token's id")

    @property
    def ends_early(self) -> bool:
        """Whether what follows the pooled token changes nothing: the transformer is causal and the place is known."""
        return not self.no_causal_mask and self.pool_type in ("argmax", "eos")


class TextTower(nn.Module):
    """Text embeddings [B, D], not normalised: the token at the end-of-text token's place, projected.

    Equals, with `pool_type` "argmax" (see `TextConfig` for the others):
        x = ln_final(transformer(token_embedding(text) + positional_embedding[:T]))
        x[arange(B), text.argmax(-1)] @ text_projection

    The end-of-text token must therefore have the highest id of its row. CLIP's transformer is causal, so that what
    comes after that token changes nothing: it is never computed. The tokens up to it, of all texts, are packed into one
    stream, and the last block's perceptron runs on the end-of-text tokens alone. Where packing is exact (causal, pool
    "argmax" or "eos"), the attribute `packing` decides:
        True: texts are packed, or cut off after the longest where lengths are nearly equal. A GPU is waited for once
            or twice, for the number of tokens and the longest text.
        False: they are not. On the CPU, the columns after the last end-of-text token are cut off all the same.
        None, the default: as True, unless somebody looks inside and expects [B, T, C] there (a forward hook on the
            embedding, the transformer or a part of it, ln_final), or the call is compiled (each number of tokens would
            compile anew).

    Args:
        config: sizes.
        embed_dim: D.
        activation: a key of `vlmfast.layers.ACTIVATIONS`.
        text: [B, T] int64 token ids, T at most the context length.
    Returns: [B, D].
    Raises:
        ShapeError: text is not [B, T], or is longer than the context length.
        DTypeError: text is not int64.
        ValueError: a token id is outside the vocabulary (checked on the CPU only: elsewhere it would synchronise).
    Source: Radford et al. 2021, section 2.4; the initialisation as in OpenAI's CLIP.
    """

    def __init__(self, config: TextConfig, embed_dim: int, activation: str) -> None:
        super().__init__()
        C, eps = config.width, (config.norm_kwargs or {}).get("eps", 1e-5)
        self.text_config = config
        self.context_length, self.vocab_size = config.context_length, config.vocab_size
        self.packing: bool | None = None
        self.token_embedding = nn.Embedding(config.vocab_size, C)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, C))
        self.transformer = Transformer(
            config.layers,
            C,
            config.heads,
            config.mlp_ratio,
            activation,
            causal=not config.no_causal_mask,
            eps=eps,
            layer_scale=config.ls_init_value,
        )
        self.ln_final = LayerNorm(C, eps)
        self.text_projection: nn.Parameter | nn.Linear | None = None
        if config.proj_type == "none":
            if embed_dim != C:
                raise ShapeError(f"text_cfg: proj_type 'none' ends with the width {C}, and embed_dim is {embed_dim}")
        elif config.proj_bias:
            self.text_projection = nn.Linear(C, embed_dim)
        else:
            self.text_projection = nn.Parameter(torch.empty(C, embed_dim))
        self._initialize(C, config.layers)

    def _initialize(self, C: int, layers: int) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        into_residual = C**-0.5 * (2 * layers) ** -0.5  # the residual stream adds up 2 * layers branches
        deviations = {
            "attn.in_proj_weight": C**-0.5,
            "attn.out_proj.weight": into_residual,
            "mlp.c_fc.weight": (2 * C) ** -0.5,
            "mlp.c_proj.weight": into_residual,
        }
        for block in self.transformer.resblocks:
            for name, std in deviations.items():
                nn.init.normal_(block.get_parameter(name), std=std)
        if isinstance(self.text_projection, nn.Linear):
            nn.init.normal_(self.text_projection.weight, std=C**-0.5)
            nn.init.zeros_(self.text_projection.bias)
        elif self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=C**-0.5)

    def forward(self, text: Tensor) -> Tensor:
        self._check(text)
        end = self.end(text)
        on_cpu = text.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu:
            self._check_ids(text)
        seen = looked_into(self.token_embedding, self.transformer, self.ln_final)
        packs = self._packs(seen)
        if packs and (packing := pack(end + 1)) is not None:
            return self.project(self.ln_final(self._packed(text, packing)))
        if packs or (on_cpu and self.text_config.ends_early):
            text = text[:, : int(end.max()) + 1]
        B, T = text.shape
        if seen:
            return self.project(self.tokens(text)[torch.arange(B, device=text.device), end])
        pooled = torch.arange(B, device=text.device) * T + end
        return self.project(self.ln_final(self.transformer(self._embed(text), pooled=pooled)))

    def _packs(self, seen: bool) -> bool:
        if self.packing is not None or not self.text_config.ends_early:
            return bool(self.packing) and self.text_config.ends_early
        return not seen and not torch.compiler.is_compiling()

    def _packed(self, text: Tensor, packing: Packing) -> Tensor:
        """The pooled tokens' features before ln_final [B, C], from the tokens up to them alone."""
        x = self.token_embedding(text[packing.rows, packing.places])  # [tokens, C]
        x = x + F.embedding(packing.places, self.positional_embedding)
        return self.transformer(x, packing.cu_seqlens, packing.max_seqlen, packing.last)

    def _embed(self, text: Tensor) -> Tensor:
        return self.token_embedding(text) + self.positional_embedding[: text.shape[1]]

    def end(self, text: Tensor) -> Tensor:
        """The place [B] int64 of the token that is pooled, for token ids [B, T]."""
        pool = self.text_config.pool_type
        if pool == "argmax":
            return text.argmax(-1)
        if pool == "eos":
            return text.eq(self.text_config.eos_id or 0).int().argmax(-1)
        return text.new_full((len(text),), text.shape[1] - 1 if pool == "last" else 0)

    def project(self, pooled: Tensor) -> Tensor:
        """The embeddings [B, D] of pooled tokens [B, C]."""
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(pooled)
        return pooled if self.text_projection is None else pooled @ self.text_projection

    def tokens(self, text: Tensor) -> Tensor:
        """Every token's features after ln_final: [B, T, C]; token t has seen tokens 0 .. t."""
        return self.ln_final(self.transformer(self._embed(text)))

    def _check(self, text: Tensor) -> None:
        if text.dim() != 2 or not text.numel():
            raise ShapeError(f"encode_text: text must be token ids [B, T], B and T >= 1; got {tuple(text.shape)}")
        if text.shape[1] > self.context_length:
            raise ShapeError(
                f"encode_text: text must have at most {self.context_length} tokens; got {tuple(text.shape)}. "
                f"Tokenize with context_length={self.context_length}, or build the model with a longer one"
            )
        if text.dtype != torch.int64:
            raise DTypeError(f"encode_text: text must be int64 token ids; got {text.dtype}. Use .long()")

    def _check_ids(self, text: Tensor) -> None:
        lowest, highest = (int(value) for value in text.aminmax())
        if lowest < 0 or highest >= self.vocab_size:
            raise ValueError(
                f"encode_text: token ids must be in [0, {self.vocab_size}) (vocab_size); got {lowest}..{highest}. "
                "Was the text tokenized with this model's tokenizer?"
            )
