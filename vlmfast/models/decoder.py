"""Decoders of language: GPT-2's, Llama's and Qwen2's shapes from one file, on packed sequences, with a cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmfast.errors import DataError, DTypeError, ShapeError
from vlmfast.layers.attention import take
from vlmfast.layers.gated import GatedMlp
from vlmfast.layers.linear import Linear, linear
from vlmfast.layers.mlp import ACTIVATIONS, Mlp
from vlmfast.layers.norm import LayerNorm, RmsNorm
from vlmfast.layers.rotary import apply_rotary, rotary
from vlmfast.models.cache import KvCache
from vlmfast.models.seeded import seeded
from vlmfast.ops.attention import attention
from vlmfast.ops.linear_cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder's sizes, and which of the known parts it is made of; `gpt2`, `llama` and `qwen2` choose the parts."""

    vocab_size: int  # V
    width: int  # C, features of a token
    layers: int
    heads: int  # H
    kv_heads: int  # heads of keys and values, each shared by heads / kv_heads queries
    head_width: int  # K
    mlp_width: int  # hidden features of the perceptron
    context_length: int  # tokens of the longest sequence
    norm: str = "rms"  # or "layer"
    eps: float = 1e-6  # of the norms
    activation: str = "silu"  # a key of vlmfast.layers.ACTIVATIONS
    gated: bool = True  # GatedMlp, or Mlp
    positions: str = "rope"  # or "learned"
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    bias: bool = False  # of attention's last map and the perceptron's
    tied: bool = False  # the head's weight is the embedding

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "context_length")
        if small := [f"{name} {getattr(self, name)}" for name in sizes if getattr(self, name) < 1]:
            raise ShapeError(f"DecoderConfig: sizes must be at least 1; got {', '.join(small)}")
        if self.heads % self.kv_heads:
            raise ShapeError(f"DecoderConfig: kv_heads {self.kv_heads} must divide heads {self.heads}")
        for name, known in {
            "norm": ("rms", "layer"),
            "positions": ("rope", "learned"),
            "activation": tuple(ACTIVATIONS),
        }.items():
            if getattr(self, name) not in known:
                raise DataError(f"DecoderConfig: {name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if self.positions == "rope" and self.head_width % 2:
            raise ShapeError(f"DecoderConfig: rope turns pairs: head_width must be even; got {self.head_width}")
        if not self.gated and not self.bias:
            raise DataError(
                "DecoderConfig: a perceptron without gate has biases: bias must be True where gated is False"
            )

    @classmethod
    def llama(cls, **sizes: Any) -> DecoderConfig:
        """The config of a decoder shaped like Llama 2: RMSNorm, rope, a gated perceptron, no biases, a head of its own.

        Args:
            sizes: fields; by default kv_heads is heads, head_width width / heads, and mlp_width 8/3 width, rounded up
                to a multiple of 64.
        Raises:
            DataError: sizes are missing; all are listed.
        """
        _check_sizes(sizes)
        return cls(**{"eps": 1e-5, **_derived(sizes, -(-sizes["width"] // 24) * 64)})

    @classmethod
    def qwen2(cls, **sizes: Any) -> DecoderConfig:
        """The config of a decoder shaped like Qwen2: Llama's with biases of q, k and v and a larger rope_theta.

        Args:
            sizes: as for `llama`.
        Raises:
            DataError: as for `llama`.
        """
        return cls.llama(**{"eps": 1e-6, "rope_theta": 1e6, "qkv_bias": True, **sizes})

    @classmethod
    def gpt2(cls, **sizes: Any) -> DecoderConfig:
        """The config of a decoder shaped like GPT-2: LayerNorm, learned positions, tanh GELU, biases, a tied head.

        Args:
            sizes: fields; by default kv_heads is heads, head_width width / heads, and mlp_width 4 width.
        Raises:
            DataError: as for `llama`.
        """
        _check_sizes(sizes)
        parts = {"norm": "layer", "activation": "gelu_tanh", "gated": False, "positions": "learned"}
        flags = {"eps": 1e-5, "qkv_bias": True, "bias": True, "tied": True}
        return cls(**{**parts, **flags, **_derived(sizes, 4 * sizes["width"])})

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DecoderConfig:
        """The config that `to_dict` wrote as `content`.

        Raises:
            DataError: fields are missing or unknown; all are listed.
        """
        known = {item.name for item in fields(cls)}
        if wrong := known.symmetric_difference(content):
            raise DataError(f"DecoderConfig: missing or unknown fields: {', '.join(sorted(wrong))}")
        return cls(**content)


def _check_sizes(sizes: Mapping[str, Any]) -> None:
    needed = ("vocab_size", "width", "layers", "heads", "context_length")
    if missing := [name for name in needed if name not in sizes]:
        raise DataError(f"DecoderConfig: missing sizes: {', '.join(missing)}")


def _derived(sizes: dict[str, Any], mlp_width: int) -> dict[str, Any]:
    heads = sizes["heads"]
    return {"kv_heads": heads, "head_width": sizes["width"] // max(heads, 1), "mlp_width": mlp_width, **sizes}


class _Sight(NamedTuple):
    """Which token of a call sees which, worked out once for all layers."""

    dense: int | None  # T, where all sequences of the call are of one length and are not packed
    cu_seqlens: Tensor | None  # [B + 1] int32, of packed sequences
    max_seqlen: int  # no sequence of the call is longer
    prefix: tuple[Tensor, Tensor, int] | None = None  # the prefixes' tokens [N], their cu_seqlens and the longest
    turn: tuple[Tensor, Tensor] | None = None  # of `rotary`
    cache: KvCache | None = None
    slots: Tensor | None = None  # [tokens] int64, of KvCache.write
    reach: int = 0  # tokens of each row of the cache that are looked at; 0: the cache was empty, look at the call's own
    grid: Tensor | None = None  # [tokens] int64, where packed tokens lie in a padded batch [B * T]
    mask: Tensor | None = None  # [B, 1, G * T | 1, reach], added to the scores of a head's G queries


class _Attention(nn.Module):
    """Each token's mixture of the tokens it sees; keys and values have fewer heads, each for a group of queries."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads = layer, config.heads, config.kv_heads
        inner, shared = config.heads * config.head_width, config.kv_heads * config.head_width
        self.q_proj = Linear(config.width, inner, bias=config.qkv_bias)
        self.k_proj = Linear(config.width, shared, bias=config.qkv_bias)
        self.v_proj = Linear(config.width, shared, bias=config.qkv_bias)
        self.o_proj = Linear(inner, config.width, bias=config.bias)

    def forward(
        self,
        x: Tensor,  # [tokens, C]
        sight: _Sight,
        rows: Tensor | None,
    ) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))  # [tokens, H, K]
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, -1))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1))
        if sight.turn is not None:
            q, k = apply_rotary(q, *sight.turn), apply_rotary(k, *sight.turn)
        if sight.cache is not None:
            assert sight.slots is not None
            sight.cache.write(self.layer, sight.slots, k, v)
        mixed = _among_themselves(q, k, v, sight) if sight.reach == 0 else self._with_cache(q, sight)
        return self.o_proj(take(mixed.flatten(1), rows))

    def _with_cache(self, q: Tensor, sight: _Sight) -> Tensor:
        """[tokens, H * K]: queries see the rows of the cache, in which their own keys are by now."""
        cache, T = sight.cache, sight.max_seqlen
        assert cache is not None
        keys, values = cache.read(self.layer, sight.reach)
        dtype, q = q.dtype, q.to(keys.dtype)
        if sight.grid is not None:
            q = q.new_zeros(cache.rows * T, *q.shape[1:]).index_copy(0, sight.grid, q)
        # A group's queries are told apart like tokens, so that no head of the cache is copied for each of them.
        groups = q.view(cache.rows, T, self.kv_heads, -1, q.shape[-1]).permute(0, 2, 3, 1, 4)  # [B, kv, G, T, K]
        mixed = F.scaled_dot_product_attention(groups.flatten(2, 3), keys, values, sight.mask)
        return take(mixed.view(groups.shape).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1), sight.grid).to(dtype)


def _among_themselves(q: Tensor, k: Tensor, v: Tensor, sight: _Sight) -> Tensor:
    """[tokens, H, K]: the sequences of the call, which hold all that there is to see."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if sight.dense is not None:
        q4, k4, v4 = (each.unflatten(0, (-1, sight.dense)).transpose(1, 2) for each in (q, k, v))
        mixed = attention(q4, k4, v4, causal=True).transpose(1, 2).flatten(0, 1)
    else:
        mixed = attention(q, k, v, causal=True, cu_seqlens=sight.cu_seqlens, max_seqlen=sight.max_seqlen)
    if sight.prefix is None:
        return mixed
    tokens, cu_seqlens, longest = sight.prefix
    # Tokens after the prefix see all before them anyway: only the prefix's own need a second look, without the mask.
    q, k, v = (each.index_select(0, tokens) for each in (q, k, v))
    return mixed.index_copy(0, tokens, attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=longest))


class _Block(nn.Module):
    """One pre-norm residual block, under the names of Hugging Face's Llama."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attn = _Attention(config, layer)
        self.post_attention_layernorm = _norm(config)
        self.mlp = (
            GatedMlp(config.width, config.mlp_width, config.activation, bias=config.bias)
            if config.gated
            else Mlp(config.width, config.mlp_width, config.activation)
        )

    def forward(
        self,
        x: Tensor,  # [tokens, C]
        sight: _Sight,
        rows: Tensor | None,
    ) -> Tensor:
        x = take(x, rows) + self.self_attn(self.input_layernorm(x), sight, rows)
        return x + self.mlp(self.post_attention_layernorm(x))


def _norm(config: DecoderConfig) -> nn.Module:
    return RmsNorm(config.width, config.eps) if config.norm == "rms" else LayerNorm(config.width, config.eps)


class Decoder(nn.Module):
    """Hidden states of tokens, each from itself and those before it; and the head that makes logits or a loss of them.

    Takes embeddings, so that what goes in may be `embed(ids)`, image features, or both. Sequences are dense [B, T, C],
    or packed one after the other in [tokens, C] without padding. Parameters are named as in Hugging Face's LlamaModel.

    Args:
        config: sizes and parts.
        x: [B, T, C] embeddings, or packed [tokens, C] with
        cu_seqlens, max_seqlen: of `vlmfast.attention`.
        positions: int64, of x without its last dimension, each token's place in its sequence; None: 0, 1, .. from the
            sequence's first, or on from what `cache` holds.
        cache: its row b holds what came before sequence b, which sees it, and takes up the sequence's keys and values.
            Nothing is kept for a backward then.
        prefix: [B] int64: the first prefix[b] tokens of sequence b see each other, the rest only what came before, as
            all do where it is None. Not with a cache that holds something.
        rows: [N] int64, the only tokens whose hidden state is wanted, numbered from 0 through all sequences; the last
            block's perceptron is spared all others. None: all.
    Returns: the shape of x, or [N, C] where `rows` is given, after the final norm.
    Raises:
        ShapeError: x is not [B, T, C], or [tokens, C] with cu_seqlens, of the config's width; positions or prefix do
            not fit it; a sequence is longer than the context, with what the cache holds; the cache has other rows;
            prefix with a cache that holds something; cu_seqlens fall (looked at on the CPU only, as what follows:
            elsewhere it would wait).
        ValueError: a position lies outside the context, or cu_seqlens do not fit x.
        DTypeError: cu_seqlens are not int32.
    Source: Radford et al. 2019 (GPT-2), Touvron et al. 2023 (Llama), Yang et al. 2024 (Qwen2); prefix: Raffel et al.
        2020, section 3.2.1. Initialised like GPT-2: normal with deviation 0.02, maps onto the residual stream over
        sqrt(2 layers). There is no dropout.
    """

    embed_positions: nn.Embedding | None
    lm_head: nn.Linear | None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        learned = config.positions == "learned"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.embed_positions = nn.Embedding(config.context_length, config.width) if learned else None
        self.layers = nn.ModuleList(_Block(config, layer) for layer in range(config.layers))
        self.norm = _norm(config)
        self.lm_head = None if config.tied else Linear(config.width, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                onto_stream = name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers) if onto_stream else 0.02)

    @property
    def head_weight(self) -> Tensor:
        """The head's weight [V, C]: the embedding's own where they are tied."""
        return (self.lm_head or self.embed_tokens).weight

    def embed(self, ids: Tensor) -> Tensor:
        """The embeddings of tokens, without positions.

        Args:
            ids: [...] int64, each in [0, V).
        Returns: [..., C].
        Raises:
            ValueError: an id is no token (found on the CPU only).
        """
        try:
            return self.embed_tokens(ids)
        except IndexError:
            low, high = ids.aminmax()
            raise ValueError(
                f"Decoder.embed: ids must be in [0, {self.config.vocab_size}); got {int(low)} .. {int(high)}"
            ) from None

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: KvCache | None = None,
        prefix: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            hidden, sight, new, most = self._begin(x, positions, cu_seqlens, max_seqlen, cache, prefix)
            for i, block in enumerate(self.layers, 1):
                wanted = rows if i == len(self.layers) else None
                if self.checkpointing and torch.is_grad_enabled():
                    hidden = checkpoint(block, hidden, sight, wanted, use_reentrant=False)
                else:
                    hidden = block(hidden, sight, wanted)
            if cache is not None:
                cache.advance(new, most)
            hidden = self.norm(hidden)
            return hidden if rows is not None else hidden.view(x.shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head's scores of every token of the vocabulary.

        Args:
            hidden: [..., C], of `forward`.
        Returns: [..., V].
        """
        return linear(hidden, self.head_weight)

    def loss(self, hidden: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """Mean cross-entropy of the next token in nats, without logits of all tokens at one time.

        Args:
            hidden: [..., C], of `forward`.
            labels: int64, of hidden without its last dimension: the token that comes next, or -100.
            options: of `vlmfast.ops.linear_cross_entropy.linear_cross_entropy`.
        Returns: [] float32; with reduction="none" one loss a token, in the shape of labels.
        Raises:
            ShapeError: labels are not one for each hidden state.
        """
        if labels.shape != hidden.shape[:-1]:
            raise ShapeError(
                f"Decoder.loss: labels must be {tuple(hidden.shape[:-1])}, one for each hidden state; "
                f"got {tuple(labels.shape)}"
            )
        loss = linear_cross_entropy(hidden.flatten(0, -2), self.head_weight, labels.flatten(), **options)
        return loss.view(labels.shape) if loss.dim() else loss

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keeps only each block's input for the backward, which then runs the block a second time, if `enable`."""
        self.checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """The matrices that take no weight decay, beside gains and biases: what is added to tokens."""
        return set() if self.embed_positions is None else {"embed_positions.weight"}

    def _begin(
        self,
        x: Tensor,
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        cache: KvCache | None,
        prefix: Tensor | None,
    ) -> tuple[Tensor, _Sight, Tensor | int, int]:
        """[tokens, C] with learned positions added; who sees whom; how many tokens are new: [B] or for all, at most."""
        config = self.config
        self._check(x, positions, cu_seqlens, cache, prefix)
        new: Tensor | int
        # Each token's sequence and its place in that: [tokens], or broadcast to [B, T].
        if cu_seqlens is None:
            B, most = x.shape[:2]
            new, sequence, place = most, torch.arange(B, device=x.device)[:, None], torch.arange(most, device=x.device)
        else:
            B, new = len(cu_seqlens) - 1, cu_seqlens.diff().long()
            most = max_seqlen if max_seqlen and x.device.type != "cpu" else int(new.max())
            sequence = torch.arange(B, device=x.device).repeat_interleave(new, output_size=len(x))
            place = torch.arange(len(x), device=x.device) - cu_seqlens.long()[sequence]
        if most > config.context_length:
            raise ShapeError(f"Decoder: a sequence has {most} tokens; the context_length is {config.context_length}")
        sight = _Sight(most if cu_seqlens is None else None, cu_seqlens, most)
        if prefix is not None:
            sight = sight._replace(prefix=_prefix(prefix, new, sequence, place))
        if cache is not None:
            reach = cache.reserve(new, most)
            grid = None if cu_seqlens is None else sequence * most + place
            place = place + cache.lengths[sequence]
            sight = sight._replace(cache=cache, slots=(sequence * cache.capacity + place).flatten())
            if not cache.empty:
                last = place if grid is None else place.new_zeros(B * most).index_copy(0, grid, place)
                mask = _mask(last.view(B, 1, most, 1), reach, cache.dtype)
                if most > 1:
                    mask = mask.repeat(1, 1, config.heads // config.kv_heads, 1)
                sight = sight._replace(reach=reach, grid=grid, mask=mask)
        place = place.expand(x.shape[:-1]).flatten()
        x = x.flatten(0, -2)
        if positions is not None:
            place = self._checked(positions.flatten())
        if self.embed_positions is not None:
            return x + self.embed_positions(place), sight, new, most
        turn = rotary(place, config.head_width, config.rope_theta, x.dtype)
        return x, sight._replace(turn=turn), new, most

    def _checked(self, positions: Tensor) -> Tensor:
        """The positions, looked at where that costs no wait."""
        context = self.config.context_length
        if positions.device.type == "cpu" and positions.numel():
            low, high = (int(each) for each in positions.aminmax())
            if low < 0 or high >= context:
                raise ValueError(
                    f"Decoder: positions must be in [0, {context}), the context_length; got {low} .. {high}"
                )
        return positions

    def _check(
        self,
        x: Tensor,
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: KvCache | None,
        prefix: Tensor | None,
    ) -> None:
        expected = "[B, T, C]" if cu_seqlens is None else "[tokens, C] with cu_seqlens"
        if x.dim() != (3 if cu_seqlens is None else 2) or x.shape[-1] != self.config.width or x.numel() == 0:
            hint = ". Use decoder.embed(ids)" if not x.is_floating_point() else ""
            raise ShapeError(f"Decoder: x must be {expected}, C = {self.config.width}; got {tuple(x.shape)}{hint}")
        if cu_seqlens is not None:
            if cu_seqlens.dtype != torch.int32:
                raise DTypeError(f"Decoder: cu_seqlens must be int32; got {cu_seqlens.dtype}. Use .int()")
            ends = cu_seqlens.tolist() if x.device.type == "cpu" else [0, len(x)]
            if [ends[0], ends[-1]] != [0, len(x)]:
                raise ValueError(
                    f"Decoder: cu_seqlens must start at 0 and end at the number of tokens, {len(x)}; "
                    f"got {ends[0]} and {ends[-1]}"
                )
            if ends != sorted(ends):
                raise ShapeError(f"Decoder: cu_seqlens must not fall; got {ends}. Use the running sum of the lengths")
        B = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
        if positions is not None and positions.shape != x.shape[:-1]:
            raise ShapeError(f"Decoder: positions must be {tuple(x.shape[:-1])}; got {tuple(positions.shape)}")
        if cache is not None and cache.rows != B:
            raise ShapeError(f"Decoder: cache must have a row for each of the {B} sequences; it has {cache.rows}")
        if prefix is None:
            return
        if prefix.shape != (B,):
            raise ShapeError(f"Decoder: prefix must be [{B}], one length a sequence; got {tuple(prefix.shape)}")
        if cache is not None and not cache.empty:
            raise ShapeError(
                "Decoder: prefix belongs to the call that fills an empty cache: what the cache holds by now was "
                "computed without seeing later tokens. Leave it out for the tokens that follow"
            )


def _prefix(prefix: Tensor, new: Tensor | int, sequence: Tensor, place: Tensor) -> tuple[Tensor, Tensor, int] | None:
    """The prefixes' tokens [N], their cu_seqlens [B + 1] and the longest; None where no sequence has one."""
    lengths = prefix.clamp_max(new) if isinstance(new, int) else prefix.minimum(new)
    longest = int(lengths.max())
    if longest < 1:
        return None
    tokens = (place < lengths[sequence]).flatten().nonzero()[:, 0]
    return tokens, F.pad(lengths.cumsum(0), (1, 0)).int(), longest


def _mask(last: Tensor, reach: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, reach]: 0 for the tokens up to each query's own place [B, 1, T, 1], -inf for those after it."""
    later = torch.arange(reach, device=last.device) > last
    return torch.zeros(later.shape, dtype=dtype, device=last.device).masked_fill_(later, -torch.inf)


def build_decoder(config: DecoderConfig, *, seed: int | None = None) -> Decoder:
    """A freshly initialised decoder.

    Args:
        config: its sizes and parts.
        seed: of the weights, which then depend on nothing else and leave PyTorch's CPU generator as it was; None: draws
            from that generator.
    """
    with seeded(seed):
        return Decoder(config)
