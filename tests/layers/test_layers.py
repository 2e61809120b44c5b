"""The building blocks, each against PyTorch's own definition of it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from vlmfast.errors import ShapeError
from vlmfast.layers import ACTIVATIONS, Attention, LayerNorm, Mlp, PatchEmbedding, Transformer, pack, quick_gelu

EXACT64 = {"rtol": 1e-12, "atol": 1e-12}  # float64 rounding of a few hundred terms


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_attention_is_multihead_attention(tokens, causal):
    ours, theirs = Attention(24, 3, causal=causal).double(), nn.MultiheadAttention(24, 3, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, tokens, 24, dtype=torch.float64)
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1) if causal else None
    assert_close(ours(x), theirs(x, x, x, need_weights=False, attn_mask=later)[0], **EXACT64)


def test_attention_starts_as_multihead_attention():
    torch.manual_seed(5)
    theirs = nn.MultiheadAttention(24, 3).state_dict()
    torch.manual_seed(5)
    ours = Attention(24, 3).state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_attention_refuses_heads_that_do_not_divide():
    with pytest.raises(ShapeError, match="width 24, heads 5"):
        Attention(24, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_rounds_once(dtype):
    norm = LayerNorm(96)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (10 + torch.randn(7, 96)).to(dtype)
    assert torch.equal(norm(x), F.layer_norm(x.float(), (96,), norm.weight, norm.bias, 1e-5).to(dtype))
    assert norm(x.double()).dtype == torch.float64


def test_layer_norm_in_low_precision_keeps_wide_statistics():
    norm = LayerNorm(64).bfloat16()
    x = torch.randn(5, 64).bfloat16()
    wide = F.layer_norm(x.float(), (64,), norm.weight.float(), norm.bias.float(), 1e-5)
    assert torch.equal(norm(x), wide.bfloat16())


def test_activations_are_those_of_released_models():
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    assert_close(quick_gelu(x), x / (1 + torch.exp(-1.702 * x)), **EXACT64)
    assert_close(ACTIVATIONS["gelu"](x), x / 2 * (1 + torch.erf(x / math.sqrt(2))), **EXACT64)
    tanh = x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert_close(ACTIVATIONS["gelu_tanh"](x), tanh, **EXACT64)
    assert_close(ACTIVATIONS["silu"](x), x / (1 + torch.exp(-x)), **EXACT64)


def test_mlp_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match=r"one of gelu, gelu_tanh, quick_gelu, silu; got 'relu'"):
        Mlp(8, 16, "relu")


@pytest.mark.parametrize(("height", "width", "patch"), [(8, 8, 2), (4, 12, 4), (6, 9, 3), (5, 5, 5)])
def test_patches_are_a_strided_convolution(height, width, patch):
    embed = PatchEmbedding(10, patch, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)).double()
    image = torch.randn(3, 3, height, width, dtype=torch.float64)
    conv = F.conv2d(image, embed.weight, stride=patch).flatten(2).transpose(1, 2)
    assert_close(embed(image), conv, **EXACT64)
    assert_close(embed(image.contiguous(memory_format=torch.channels_last)), conv, **EXACT64)


def test_uint8_pixels_are_normalised_inside():
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    embed = PatchEmbedding(10, 4, mean, std).double()
    image = torch.randint(0, 256, (3, 3, 8, 12), dtype=torch.uint8)
    shift, scale = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
    from_float = embed((image.double() / 255 - shift) / scale)
    from_uint8 = embed(image)
    assert_close(from_uint8, from_float, **EXACT64)
    upstream = torch.randn_like(from_float)
    (expected,) = torch.autograd.grad(from_float, embed.weight, upstream)
    (got,) = torch.autograd.grad(from_uint8, embed.weight, upstream)
    assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_checkpointing_runs_blocks_twice_and_changes_no_gradient():
    stack = Transformer(2, 16, 2, 4.0, "gelu")
    runs = []
    for block in stack.resblocks:
        block.ln_1.register_forward_hook(lambda *_: runs.append(1))
    x = torch.randn(2, 5, 16)
    plain = torch.autograd.grad(stack(x).square().sum(), list(stack.parameters()))
    assert len(runs) == 2
    stack.checkpointing = True
    again = torch.autograd.grad(stack(x).square().sum(), list(stack.parameters()))
    assert len(runs) == 2 + 4
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_class_token_and_positions_are_added():
    embed = PatchEmbedding(10, 4, (0.5,) * 3, (0.2,) * 3, bias=True).double()
    image = torch.randint(0, 256, (3, 3, 8, 12), dtype=torch.uint8)
    class_token, positions = torch.randn(10, dtype=torch.float64), torch.randn(7, 10, dtype=torch.float64)
    expected = torch.cat([class_token.expand(3, 1, -1), embed(image)], 1) + positions
    assert_close(embed(image, class_token, positions), expected, **EXACT64)


def packed_by(lengths, padded):
    packing = pack(torch.tensor(lengths))
    return packing, padded[packing.rows, packing.places]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_sequences_are_what_each_is_alone(causal, checkpointing):
    """Images of different sizes, or texts: the stack gives each sequence what it gives it alone, and its gradients."""
    stack = Transformer(2, 16, 2, 4.0, "gelu", causal=causal).double()
    stack.checkpointing = checkpointing
    lengths = [4, 9, 1, 9, 16]
    padded = torch.randn(5, 16, 16, dtype=torch.float64, requires_grad=True)
    packing, x = packed_by(lengths, padded)
    ours = stack(x, packing.cu_seqlens, packing.max_seqlen)
    alone = torch.cat([stack(padded[b : b + 1, :length])[0] for b, length in enumerate(lengths)])
    upstream = torch.randn(sum(lengths), 16, dtype=torch.float64)
    places = torch.cat(
        [torch.nonzero(packing.rows == b)[:, 0] for b in range(5)]
    )  # of the stream, in the batch's order
    assert_close(ours[places], alone, **EXACT64)
    leaves = [padded, *stack.parameters()]
    got = torch.autograd.grad(ours[places], leaves, upstream)
    expected = torch.autograd.grad(alone, leaves, upstream)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_packing_says_where_every_token_is():
    lengths = [3, 1, 5, 3]
    padded = torch.arange(20).reshape(4, 5)
    packing, stream = packed_by(lengths, padded)
    assert packing.cu_seqlens.tolist() == [0, 1, 4, 7, 12]  # short ones first
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.max_seqlen == 5
    assert stream.tolist() == [5, 0, 1, 2, 15, 16, 17, 10, 11, 12, 13, 14]
    assert stream[packing.last].tolist() == [2, 5, 14, 17]


def test_nearly_equal_lengths_are_not_packed():
    assert pack(torch.tensor([7, 7, 7])) is None
    assert pack(torch.tensor([7])) is None
    assert pack(torch.tensor([10, 9, 8])) is None  # 30 places for 27 tokens
    assert pack(torch.tensor([10, 9, 7])) is not None  # 30 for 26


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dense", [True, False])
def test_pooled_tokens_alone_are_the_same_tokens(dense, checkpointing):
    """And the last perceptron has seen no other."""
    stack = Transformer(2, 16, 2, 4.0, "gelu").double()
    stack.checkpointing = checkpointing
    x = torch.randn(*((3, 7) if dense else (21,)), 16, dtype=torch.float64, requires_grad=True)
    packed = () if dense else (torch.tensor([0, 4, 21], dtype=torch.int32), 17)
    pooled, rows = torch.tensor([20, 0, 9, 9]), []
    expected = stack(x, *packed).reshape(21, 16)[pooled]
    handle = stack.resblocks[-1].mlp.register_forward_hook(lambda _m, _i, out: rows.append(out.shape[:-1]))
    ours = stack(x, *packed, pooled=pooled)
    handle.remove()
    assert rows == [(4,)]
    assert_close(ours, expected, **EXACT64)
    leaves, upstream = [x, *stack.parameters()], torch.randn(4, 16, dtype=torch.float64)
    both = (torch.autograd.grad(value, leaves, upstream) for value in (ours, expected))
    for a, b in zip(*both, strict=True):
        assert_close(a, b, rtol=1e-11, atol=1e-11)
