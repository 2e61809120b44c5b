"""The building blocks of the towers: one small nn.Module each, with the parameter names of OpenAI's CLIP."""

from vlmfast.layers.attention import Attention
from vlmfast.layers.embed import PatchEmbedding
from vlmfast.layers.gated import GatedMlp
from vlmfast.layers.mlp import ACTIVATIONS, Mlp, quick_gelu
from vlmfast.layers.norm import LayerNorm, RmsNorm
from vlmfast.layers.packing import Packing, looked_into, pack
from vlmfast.layers.rotary import apply_rotary, rotary
from vlmfast.layers.transformer import Block, LayerScale, Transformer

__all__ = [
    "ACTIVATIONS",
    "Attention",
    "Block",
    "GatedMlp",
    "LayerNorm",
    "LayerScale",
    "Mlp",
    "Packing",
    "PatchEmbedding",
    "RmsNorm",
    "Transformer",
    "apply_rotary",
    "looked_into",
    "pack",
    "quick_gelu",
    "rotary",
]
