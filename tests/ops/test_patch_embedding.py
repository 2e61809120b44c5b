"""Patch embeddings against a convolution of the normalised image in float64: every gradient, layout and odd shape."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vlmfast import _ext, use_backend
from vlmfast.backend import explain
from vlmfast.errors import BackendError, DTypeError, ShapeError
from vlmfast.ops import patch_embedding
from vlmfast.ops.patch_embedding import IMPLS, _cpu, _triton, interpolate_positions, patch_embed, reference
from vlmfast.testing import assert_accurate

MEAN, STD = (0.48, 0.45, 0.41), (0.27, 0.26, 0.28)
# (B, H, W, p, D): one patch | one a pixel | p no multiple of 4, ragged D | grid not square, on a panel | over two tiles
SHAPES = [(1, 3, 3, 3, 1), (2, 2, 3, 1, 5), (3, 28, 42, 14, 20), (2, 32, 48, 16, 64), (5, 40, 24, 8, 131)]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def _kernels_for_few_pixels_too(monkeypatch):
    monkeypatch.setattr(_cpu, "FEW", 0)


def images(B, H, W, C=3, T=None, dtype=torch.uint8, seed=0):
    """Pixels of all values; channels of different brightness."""
    generator = torch.Generator().manual_seed(seed)
    shape = (B, C, H, W) if T is None else (B, C, T, H, W)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return pixels if dtype == torch.uint8 else (pixels.double() / 100 - 1).to(dtype)


def parameters(D, patch, L, C=3, dtype=torch.float32):
    """Weight, bias, class token and positions."""
    generator = torch.Generator().manual_seed(D)
    draws = [torch.randn(D, C, *patch, generator=generator) * 0.1, *torch.randn(2, D, generator=generator)]
    return [draw.to(dtype) for draw in (*draws, torch.randn(L, D, generator=generator))]


def plain(pixels, weight, bias=None, class_token=None, positions=None, mean=(0.0,) * 3, std=(1.0,) * 3):
    """The definition in the docstring, in float64."""
    x = pixels.double() / (255 if pixels.dtype == torch.uint8 else 1)
    per_channel = [torch.tensor(each, dtype=torch.float64).view(-1, *(1,) * (pixels.dim() - 2)) for each in (mean, std)]
    x = (x - per_channel[0]) / per_channel[1]
    conv = F.conv2d if weight.dim() == 4 else F.conv3d
    tokens = conv(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    if class_token is not None:
        tokens = torch.cat([class_token.expand(len(tokens), 1, -1), tokens], 1)
    return tokens if positions is None else tokens + positions


def magnitude(pixels, weight, mean, std):
    """What the largest token could be if nothing cancelled, also where pixels are multiplied before the mean goes."""
    unit = 255 if pixels.dtype == torch.uint8 else 1
    highest = max((float(pixels.double().abs().max()) / unit + abs(m)) / s for m, s in zip(mean, std, strict=True))
    return float(weight.detach().double().abs().flatten(1).sum(1).max()) * highest, highest


def check(backend, pixels, leaves, grad_seed=7, **options):
    """Value and every gradient of a call, against the definition."""
    mean, std = options.get("mean", (0.0,) * 3), options.get("std", (1.0,) * 3)
    leaves = [None if leaf is None else leaf.clone().requires_grad_() for leaf in leaves]
    twins = [None if leaf is None else leaf.detach().double().requires_grad_() for leaf in leaves]
    weight, bias, class_token, positions = leaves
    inputs, exact_inputs = pixels, pixels
    if pixels.is_floating_point():
        inputs = pixels.clone().requires_grad_()
        exact_inputs = pixels.double().requires_grad_()
    tokens = patch_embed(inputs, weight, bias, class_token=class_token, positions=positions, **options)
    exact = plain(exact_inputs, *twins, mean, std)
    assert tokens.dtype == weight.dtype
    size, highest = magnitude(pixels, weight, mean, std)
    size += sum(float(leaf.detach().abs().max()) for leaf in leaves[1:] if leaf is not None)
    assert_accurate(tokens, exact, size=size, name="tokens")
    grad = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(grad_seed)).to(tokens.dtype)
    given = [*(leaf for leaf in leaves if leaf is not None), *([inputs] if inputs.requires_grad else [])]
    truth = [*(leaf for leaf in twins if leaf is not None), *([exact_inputs] if inputs.requires_grad else [])]
    ours = torch.autograd.grad(tokens, given, grad)
    theirs = torch.autograd.grad(exact, truth, grad.double())
    total = float(grad.double().abs().sum((0, 1)).max())
    sizes = [total * highest, *(total for leaf in leaves[1:] if leaf is not None)]
    sizes.append(float((grad.double().abs() @ weight.detach().double().abs().flatten(1)).max()) / min(std))
    names = [n for n, leaf in zip(("d weight", "d bias", "d class token", "d positions"), leaves, strict=True) if
             leaf is not None]  # fmt: skip
    for name, leaf, a, b, bound in zip([*names, "d pixels"], given, ours, theirs, sizes, strict=False):
        assert a.dtype == leaf.dtype
        assert_accurate(a, b, size=bound, name=name)


@dtypes
@pytest.mark.parametrize(("B", "H", "W", "p", "D"), SHAPES)
def test_value_and_gradients(backend, B, H, W, p, D, dtype):
    leaves = parameters(D, (p, p), 1 + H * W // p**2, dtype=dtype)
    check(backend, images(B, H, W), leaves, mean=MEAN, std=STD)


@pytest.mark.parametrize("pixels", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@dtypes
def test_float_pixels_have_a_gradient(backend, pixels, dtype):
    leaves = parameters(20, (14, 14), 1 + 6, dtype=dtype)
    check(backend, images(3, 28, 42, dtype=pixels), leaves, mean=MEAN, std=STD)


@pytest.mark.parametrize("without", [(1,), (2, 3), (1, 2, 3), (3,)], ids=str)
def test_every_addition_is_optional(backend, without):
    L = 6 + (2 not in without)
    leaves = [None if i in without else leaf for i, leaf in enumerate(parameters(20, (14, 14), L))]
    check(backend, images(3, 28, 42), leaves)


@pytest.mark.parametrize("t", [1, 2])
def test_videos(backend, t):
    check(backend, images(2, 8, 12, T=4), parameters(9, (t, 4, 4), 1 + 4 // t * 6), mean=MEAN, std=STD)


def test_four_channels_and_oblong_patches(backend):
    pixels = images(2, 6, 10, C=4)
    leaves = parameters(9, (3, 5), 1 + 4, C=4)
    check(backend, pixels, leaves, mean=(0.1, 0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7, 0.8))


def test_more_patches_than_are_held_at_once(cpu_backend):
    """The compiled kernels hold 16 MiB of bytes, and 65536 patches where they add up the weight's gradient."""
    check("cpu", images(6, 1000, 1000), parameters(3, (4, 4), 1 + 250 * 250), mean=MEAN, std=STD)


def test_dark_and_bright_images(backend):
    """The extremes of a byte, and columns of the gradient of very different size."""
    pixels = images(2, 8, 8)
    pixels[0], pixels[1, :, 4:] = 0, 255
    weight = parameters(40, (4, 4), 5)[0]
    weight *= torch.logspace(-6, 4, 40)[:, None, None, None]
    tokens = patch_embed(pixels, weight, mean=MEAN, std=STD)
    exact = plain(pixels, weight.double(), mean=MEAN, std=STD)
    size = weight.double().abs().flatten(1).sum(1) * max((1 + m) / s for m, s in zip(MEAN, STD, strict=True))
    assert_accurate(tokens, exact, size=size, name="tokens")


def faulty_forward(fault):
    """The reference's forward with a fault."""
    right = reference.forward

    def forward(patches, weight, bias, class_token, positions, mean, std, precision):
        if fault == "a dropped pixel":
            patches = patches.clone()
            patches[..., -1, -1] = 0
        if fault == "a wrong deviation":
            std = [*std[:-1], 1.01 * std[-1]]
        if fault == "a mean in the wrong unit":
            mean = [mean[0] + 0.5, *mean[1:]]
        if fault == "positions one off":
            positions = positions.roll(1, 0)
        tokens = right(patches, weight, bias, class_token, positions, mean, std, precision)
        if fault == "a gain":
            tokens *= 1.01
        if fault == "an unwritten last token":
            tokens[-1, -1] = 0
        return tokens

    return forward


def faulty_backward(fault):
    """The reference's backward with a fault."""
    right = reference.backward

    def backward(grad, patches, weight, mean, std, *rest):
        if fault == "a dropped last patch":
            grad = grad.clone()
            grad[-1, -1] = 0
        if fault == "a mean left out":
            mean = [0.0] * len(mean)
        dpatches, dweight = right(grad, patches, weight, mean, std, *rest)
        return dpatches, 1.01 * dweight if fault == "a gradient's gain" else dweight

    return backward


@pytest.mark.parametrize(
    "fault",
    ["a dropped pixel", "a wrong deviation", "a mean in the wrong unit", "positions one off", "a gain",
     "an unwritten last token", "a dropped last patch", "a mean left out", "a gradient's gain"],
)  # fmt: skip
@dtypes
@pytest.mark.parametrize(("B", "H", "W", "p", "D"), SHAPES[2:])
def test_a_planted_fault_is_caught(monkeypatch, B, H, W, p, D, dtype, fault):
    monkeypatch.setattr(reference, "forward", faulty_forward(fault))
    monkeypatch.setattr(reference, "backward", faulty_backward(fault))
    leaves = parameters(D, (p, p), 1 + H * W // p**2, dtype=dtype)
    with use_backend("reference"), pytest.raises(AssertionError, match=r"elements are wrong|share a gain"):
        check("reference", images(B, H, W), leaves, mean=MEAN, std=STD)


# Layouts


def packed(pixels, patch, last=False):
    """Patches [N, C t p q], or channels last, as an image processor packs them."""
    x = pixels if pixels.dim() == 5 else pixels[:, :, None]
    t, p, q = patch if len(patch) == 3 else (1, *patch)
    x = x.unflatten(4, (-1, q)).unflatten(3, (-1, p)).unflatten(2, (-1, t))
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1) if last else x.permute(0, 2, 4, 6, 1, 3, 5, 7)
    return x.flatten(0, 3).flatten(1).contiguous()


@pytest.mark.parametrize("view", ["nhwc", "channels_last", "cropped", "flipped", "every other", "one for all"])
def test_every_view_of_the_same_pixels_gives_the_same_bits(backend, view):
    pixels = images(3, 28, 42)
    weight, bias, class_token, positions = parameters(20, (14, 14), 7)
    weight.requires_grad_()
    more = {"class_token": class_token, "positions": positions, "mean": MEAN, "std": STD}
    if view == "one for all":
        pixels = pixels[:1].expand(3, -1, -1, -1).contiguous()
    given = {
        "nhwc": lambda: pixels.permute(0, 2, 3, 1).contiguous(),
        "channels_last": lambda: pixels.contiguous(memory_format=torch.channels_last),
        "cropped": lambda: F.pad(pixels, (5, 3, 2, 1))[:, :, 2:-1, 5:-3],
        "flipped": lambda: pixels.flip(3).contiguous()[:, :, :, torch.arange(41, -1, -1)],
        "every other": lambda: torch.stack([pixels, 255 - pixels], 4).flatten(3)[:, :, :, ::2],
        "one for all": lambda: pixels[:1].expand(3, -1, -1, -1),
    }[view]()
    results = []
    for x, layout in ((pixels, "nchw"), (given, "nhwc" if view == "nhwc" else "nchw")):
        tokens = patch_embed(x, weight, bias, layout=layout, **more)
        results.append((tokens, *torch.autograd.grad(tokens.square().sum(), weight)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("patch", [(14, 14), (2, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_packed_patches_are_the_image(backend, patch, last, dtype):
    pixels = images(3, 28, 56, T=4 if len(patch) == 3 else None, dtype=dtype)
    weight, bias, _, _ = parameters(20, patch, 1)
    weight.requires_grad_()
    if dtype == torch.float32:
        pixels.requires_grad_()
    whole = patch_embed(pixels, weight, bias, mean=MEAN, std=STD)
    row = packed(pixels, patch, last)
    positions = torch.randn(len(row), 20, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = patch_embed(row, weight, bias, positions=positions, mean=MEAN, std=STD, layout="nhwc" if last else "nchw")
    expected = whole.flatten(0, 1) + positions
    torch.testing.assert_close(tokens, expected, rtol=0, atol=2e-6)
    leaves = [weight, positions, *([pixels] if dtype == torch.float32 else [])]
    for a, b in zip(
        torch.autograd.grad(tokens.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# Laws


def test_a_patch_that_is_the_mean_gives_the_bias(backend):
    weight, bias, _, _ = parameters(20, (4, 4), 1)
    pixels = torch.full((1, 3, 4, 4), 51, dtype=torch.uint8)
    tokens = patch_embed(pixels, weight, bias, mean=(0.2,) * 3, std=STD)
    torch.testing.assert_close(tokens[0, 0], bias, rtol=0, atol=2e-6)


def test_a_patch_knows_nothing_of_the_others(backend):
    pixels = images(2, 28, 42)
    weight, _, _, _ = parameters(20, (14, 14), 1)
    before = patch_embed(pixels, weight, mean=MEAN, std=STD)
    pixels[1, :, 14:, 28:] ^= 255
    after = patch_embed(pixels, weight, mean=MEAN, std=STD)
    moved = (before != after).any(2)
    assert moved.nonzero().tolist() == [[1, 5]]


def test_the_order_of_images_is_theirs(backend):
    pixels, order = images(4, 28, 42), torch.tensor([2, 0, 3, 1])
    weight, _, class_token, positions = parameters(20, (14, 14), 7)
    call = lambda x: patch_embed(x, weight, class_token=class_token, positions=positions, mean=MEAN, std=STD)  # noqa: E731
    assert torch.equal(call(pixels[order]), call(pixels)[order])


def test_gradients_of_two_calls_add_up(backend):
    """No gradient lies in another's memory, where adding to one, or clipping it, would change both."""
    leaves = [leaf.requires_grad_() for leaf in parameters(20, (14, 14), 7)]
    weight, bias, class_token, positions = leaves
    for _ in range(2):
        tokens = patch_embed(images(2, 28, 42), weight, bias, class_token=class_token, positions=positions)
        tokens.square().sum().backward()
    once = torch.autograd.grad(
        patch_embed(images(2, 28, 42), weight, bias, class_token=class_token, positions=positions).square().sum(),
        leaves,
    )
    for leaf, gradient in zip(leaves, once, strict=True):
        assert leaf.grad.equal(2 * gradient)


def test_normalised_floats_give_what_bytes_give(backend):
    pixels = images(2, 32, 48)
    weight, bias, _, _ = parameters(64, (16, 16), 1)
    x = (pixels.double() / 255 - torch.tensor(MEAN, dtype=torch.float64).view(3, 1, 1)) / torch.tensor(STD).view(
        3, 1, 1
    )
    torch.testing.assert_close(
        patch_embed(pixels, weight, bias, mean=MEAN, std=STD), patch_embed(x.float(), weight, bias), rtol=0, atol=3e-5
    )


def test_the_norm_is_layer_norm(backend):
    pixels, (weight, bias, class_token, positions) = images(2, 28, 42), parameters(20, (14, 14), 7)
    gain, offset = (v.requires_grad_() for v in torch.randn(2, 20, generator=torch.Generator().manual_seed(1)))
    more = {"class_token": class_token, "positions": positions, "mean": MEAN, "std": STD}
    tokens = patch_embed(pixels, weight, bias, **more)
    ours = patch_embed(pixels, weight, bias, norm=(gain, offset, 1e-5), **more)
    expected = F.layer_norm(tokens, (20,), gain, offset, 1e-5)
    assert torch.equal(ours, expected)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (gain, offset)) for y in (ours, expected)), strict=True):
        assert torch.equal(a, b)


def test_gradients_are_those_of_finite_differences():
    leaves = [leaf.requires_grad_() for leaf in parameters(3, (2, 2), 5, dtype=torch.float64)]
    pixels = images(2, 4, 4, dtype=torch.float64).requires_grad_()

    def call(pixels, weight, bias, class_token, positions):
        return patch_embed(pixels, weight, bias, class_token=class_token, positions=positions, mean=MEAN, std=STD)

    with use_backend("reference"):
        assert torch.autograd.gradcheck(call, (pixels, *leaves))


def test_a_gradient_of_stride_zero(backend):
    weight = parameters(20, (14, 14), 1)[0].requires_grad_()
    tokens = [patch_embed(images(3, 28, 42), weight) for _ in range(2)]
    sums = torch.autograd.grad(tokens[0].sum(), weight)
    ones = torch.autograd.grad(tokens[1], weight, torch.ones_like(tokens[1]))
    assert torch.equal(*sums, *ones)


def test_only_the_needed_gradient_is_computed(backend, monkeypatch):
    needs = []
    backward = IMPLS[backend].backward

    def spy(*args):
        needs.append(args[5:7])
        return backward(*args)

    monkeypatch.setattr(IMPLS[backend], "backward", spy)
    weight, bias, _, _ = parameters(5, (2, 2), 1)
    pixels = images(1, 4, 4, dtype=torch.float32)
    patch_embed(pixels, weight.requires_grad_()).sum().backward()
    patch_embed(pixels.requires_grad_(), weight.detach()).sum().backward()
    patch_embed(pixels.detach(), weight.detach(), bias.requires_grad_()).sum().backward()
    assert needs == [(False, True), (True, False)]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["weight", "pixels", "grad"])
def test_what_is_not_finite_is_not_hidden(backend, where, value):
    weight, bias, _, _ = parameters(20, (4, 4), 1)
    pixels = images(2, 8, 8, dtype=torch.float32 if where == "pixels" else torch.uint8)
    if where == "weight":
        weight[3, 1, 2, 2] = value
    if where == "pixels":
        pixels[1, 0, 0, 0] = value
    tokens = patch_embed(pixels, weight.requires_grad_(), bias)
    if where == "weight":
        assert not tokens[..., 3].isfinite().any()
        assert tokens[..., torch.arange(20) != 3].isfinite().all()
    if where == "pixels":
        assert not tokens[1, 0].isfinite().any()
        assert tokens[0].isfinite().all()
    if where == "grad":
        grad = torch.ones_like(tokens)
        grad[1, 2, 5] = value
        dweight = torch.autograd.grad(tokens, weight, grad)[0]
        assert not dweight[5].isfinite().all()
        assert dweight[torch.arange(20) != 5].isfinite().all()


def test_second_derivatives_are_refused(backend):
    weight = parameters(5, (2, 2), 1)[0].requires_grad_()
    tokens = patch_embed(images(1, 4, 4), weight)
    gradient = torch.autograd.grad(tokens.square().sum(), weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="patch_embed_backward"):
        gradient.sum().backward()


# Memory and threads


class WatchBytes(TorchDispatchMode):
    """Records the most bytes of a tensor that any call returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return result


def test_nothing_larger_than_the_bytes_is_held(backend, scratch_below, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 2**12)
    pixels = images(40, 64, 64)
    weight = parameters(2, (1, 4, 4), 1)[0]
    patches = patch_embedding._patches("patch_embed", pixels[:, :, None], weight, "nchw")
    with WatchBytes() as watch, scratch_below(pixels.numel()):
        tokens = IMPLS[backend].forward(patches, weight, None, None, None, [0.0] * 3, [1.0] * 3, "ieee")
        IMPLS[backend].backward(tokens, patches, weight, [0.0] * 3, [1.0] * 3, False, True, "ieee")
    assert watch.largest <= pixels.numel()


def test_only_the_bytes_are_kept_for_backward(backend):
    kept = []
    pixels, leaves = images(4, 32, 32), parameters(5, (8, 8), 17)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        patch_embed(pixels, leaves[0].requires_grad_(), class_token=leaves[2], positions=leaves[3], mean=MEAN, std=STD)
    assert sum(x.numel() * x.element_size() for x in kept) <= pixels.numel() + 4 * leaves[0].numel()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_the_same_bits_on_any_number_of_threads(cpu_backend, dtype):
    pixels, (weight, bias, class_token, positions) = images(12, 96, 96, dtype=dtype), parameters(200, (16, 16), 37)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        tokens = patch_embed(
            pixels, weight.requires_grad_(), bias, class_token=class_token, positions=positions, mean=MEAN, std=STD
        )
        results.append((tokens, *torch.autograd.grad(tokens.square().sum(), weight)))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", [] if _ext.C is None else _ext.C.isas())
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_every_instruction_set(cpu_backend, isa, dtype):
    _ext.C.force_isa(isa)
    try:
        leaves = parameters(37, (14, 14), 1 + 6)
        check("cpu", images(3, 28, 42, dtype=dtype), leaves, mean=MEAN, std=STD)
    finally:
        _ext.C.force_isa(None)


def test_few_pixels_are_left_to_pytorch(cpu_backend, monkeypatch):
    pixels, leaves = images(3, 28, 42, dtype=torch.float32), parameters(20, (14, 14), 7)
    monkeypatch.setattr(_cpu, "FEW", pixels.numel() + 1)
    monkeypatch.setattr(_cpu, "C", type("C", (), {"isa": lambda: "avx2"}))  # has no kernels to call
    check("cpu", pixels, leaves, mean=MEAN, std=STD)
    monkeypatch.setattr(_cpu, "FEW", pixels.numel())
    with pytest.raises(AttributeError, match="patch_embedding_forward"):
        patch_embed(pixels, leaves[0])


def test_an_image_beyond_two_gigabytes(backend, tmp_path):
    """The second image lies 2^31 bytes behind the first, in a file that is mostly a hole."""
    if backend == "triton":
        pytest.skip("the interpreter copies the whole file")
    pixels, (weight, bias, _, _) = images(2, 28, 42), parameters(20, (14, 14), 7)
    size = pixels[0].numel()
    file = torch.from_file(str(tmp_path / "hole"), shared=True, size=2**31 + size, dtype=torch.uint8)
    far = file.as_strided(pixels.shape, (2**31, *pixels.stride()[1:]))
    far.copy_(pixels)
    results = []
    for x in (pixels, far):
        tokens = patch_embed(x, weight.requires_grad_(), bias, mean=MEAN, std=STD)
        results.append((tokens, *torch.autograd.grad(tokens.square().sum(), weight)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# The Triton kernels' own


@pytest.mark.parametrize(("pixels", "weight"), [(torch.uint8, torch.float32), (torch.float32, torch.float32),
                                                (torch.float32, torch.bfloat16)], ids=str)  # fmt: skip
def test_float32_as_two_parts(triton_backend, pixels, weight):
    """What a GPU runs by default; the interpreter cuts parts off instead of rounding, hence 2^-14 and not 2^-16."""
    x, (w, bias, _, _) = images(3, 28, 42, dtype=pixels), parameters(20, (14, 14), 1, dtype=weight)
    tokens = patch_embed(x, w.requires_grad_(), bias, mean=MEAN, std=STD, precision="bf16x3")
    twin = w.detach().double().requires_grad_()
    exact = plain(x, twin, bias.double(), mean=MEAN, std=STD)
    bound = 2**-14 if weight == torch.float32 else 2**-7
    assert (tokens - exact).norm() < bound * exact.norm()
    grad = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(7)).to(weight)
    ours, truth = torch.autograd.grad(tokens, w, grad)[0], torch.autograd.grad(exact, twin, grad.double())[0]
    assert (ours - truth).norm() < bound * truth.norm()


def test_splits_of_the_patches_are_added_in_order(triton_backend, monkeypatch):
    pixels = images(3, 96, 96)
    weight = parameters(5, (4, 4), 1)[0].requires_grad_()
    for programs, nbytes in ((1, 2**26), (7, 2**26), (512, 4 * weight.numel() * 3)):
        monkeypatch.setattr(_triton, "_PROGRAMS", programs)
        monkeypatch.setattr(_triton, "_PARTIAL_BYTES", nbytes)
        tokens = patch_embed(pixels, weight, mean=MEAN, std=STD)
        ours = torch.autograd.grad(tokens, weight, torch.ones_like(tokens))[0]
        twin = weight.detach().double().requires_grad_()
        exact = plain(pixels, twin, mean=MEAN, std=STD)
        truth = torch.autograd.grad(exact, twin, torch.ones_like(exact))[0]
        assert_accurate(ours, truth, size=3 * 24 * 24 * 6, name=f"{programs} programs")


# As an op


def test_backends_have_the_signatures_of_the_reference():
    for impl in IMPLS.values():
        for name in ("unsupported", "forward", "backward"):
            ours, its = (inspect.signature(getattr(module, name)) for module in (impl, reference))
            assert ours.parameters == its.parameters


def test_autocast_gives_its_dtype(backend):
    pixels, (weight, bias, class_token, positions) = images(2, 28, 42), parameters(20, (14, 14), 7)
    more = {"class_token": class_token, "positions": positions, "mean": MEAN, "std": STD}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = patch_embed(pixels, weight, bias, **more)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, patch_embed(pixels, weight.bfloat16(), bias, **more))


def test_opcheck(backend):
    weight, bias, class_token, positions = (leaf.requires_grad_() for leaf in parameters(3, (1, 2, 2), 5))
    op = patch_embedding._patch_embed.overload
    for pixels in (images(2, 4, 4), images(2, 4, 4, dtype=torch.float32).requires_grad_()):
        patches = patch_embedding._patches("patch_embed", pixels[:, :, None], weight, "nchw")
        patches = patches.detach().requires_grad_(pixels.requires_grad)
        rest = (list(MEAN), list(STD), "ieee", backend)
        torch.library.opcheck(op, (patches, weight, bias, class_token, positions, *rest))
        torch.library.opcheck(op, (patches.detach(), weight.detach().half(), None, None, None, *rest))


def test_compiled_equals_eager(backend):
    def call(pixels, weight, class_token, positions):
        return patch_embed(pixels, weight, class_token=class_token, positions=positions, mean=MEAN, std=STD)

    weight, _, class_token, positions = (leaf.requires_grad_() for leaf in parameters(20, (14, 14), 7))
    for pixels in (images(3, 28, 42), images(3, 28, 42, dtype=torch.float32).requires_grad_()):
        args = (pixels, weight, class_token, positions)
        eager, ours = call(*args), torch.compile(call, fullgraph=True, backend="aot_eager")(*args)
        assert torch.equal(eager, ours)
        leaves = [leaf for leaf in args if leaf.requires_grad]
        gradients = [torch.autograd.grad(y.square().sum(), leaves) for y in (eager, ours)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# Positions for another grid


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("grid", [(7, 5), (2, 3)], ids=str)
def test_interpolated_positions(grid, class_token, antialias):
    positions = torch.randn(16 + class_token, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours = interpolate_positions(positions, grid, class_token=class_token, antialias=antialias)
    square = positions[int(class_token) :].reshape(1, 4, 4, 6).permute(0, 3, 1, 2)
    new = F.interpolate(square, grid, mode="bicubic", align_corners=False, antialias=antialias)
    new = new.permute(0, 2, 3, 1).reshape(-1, 6)
    assert torch.equal(ours, torch.cat([positions[: int(class_token)], new]))
    assert torch.autograd.grad(ours.sum(), positions)[0].isfinite().all()


def test_interpolation_keeps_the_grid_it_has():
    positions = torch.randn(13, 6)
    assert interpolate_positions(positions, (3, 4), old_grid=(3, 4)) is positions
    assert interpolate_positions(torch.ones(17, 6, dtype=torch.float16), (5, 5)).dtype == torch.float16
    with pytest.raises(ShapeError, match=r"12 patches, which are no grid of 3 x 3; give old_grid=\(rows, columns\)"):
        interpolate_positions(positions, (5, 5))


def test_transformers_embeds_the_same(backend):
    clip = pytest.importorskip("transformers.models.clip.modeling_clip", reason="transformers is not installed")
    config = clip.CLIPVisionConfig(hidden_size=32, image_size=32, patch_size=8, num_attention_heads=4)
    theirs = clip.CLIPVisionEmbeddings(config)
    pixels = images(2, 48, 16, dtype=torch.float32)  # the grid grows one way and shrinks the other
    positions = interpolate_positions(theirs.position_embedding.weight, (6, 2), antialias=False)
    ours = patch_embed(pixels, theirs.patch_embedding.weight, class_token=theirs.class_embedding, positions=positions)
    torch.testing.assert_close(ours, theirs(pixels, interpolate_pos_encoding=True), rtol=0, atol=1e-5)


# Refusals

X, K = torch.zeros(2, 3, 8, 12, dtype=torch.uint8), torch.zeros(5, 3, 4, 4)


@pytest.mark.parametrize(
    ("pixels", "options", "error", "message"),
    [
        (X[:, :, :7], {}, ShapeError, r"an image of 7 x 12 is not whole patches of 4 x 4; resize or crop it to 4 x 12"),
        (X[:, :, :3, :], {}, ShapeError, r"an image of 3 x 12 is not whole patches"),
        (X[:, :2], {}, ShapeError, r"pixels must be \[B, 3, H, W\].*layout 'nchw'.* got \(2, 2, 8, 12\)"),
        (X, {"layout": "nhwc"}, ShapeError, r"pixels must be \[B, H, W, 3\].* got \(2, 3, 8, 12\)"),
        (X, {"layout": "hwc"}, ValueError, r"layout must be 'nchw' or 'nhwc'; got 'hwc'"),
        (X[0], {}, ShapeError, r"pixels must be \[B, 3, H, W\], B >= 1"),
        (X[:0], {}, ShapeError, r"pixels must be \[B, 3, H, W\], B >= 1"),
        (X[0, 0], {}, ShapeError, r"packed patches must be \[N, 48\].* got \(8, 12\)"),
        (X.long(), {}, DTypeError, r"pixels must be uint8 in 0..255, or floating; got torch.int64"),
        (X, {"bias": torch.zeros(4)}, ShapeError, r"bias must be \[5\].* got \(4,\)"),
        (X, {"class_token": torch.zeros(1, 5)}, ShapeError, r"class_token must be \[5\].* got \(1, 5\)"),
        (
            X,
            {"positions": torch.zeros(5, 5)},
            ShapeError,
            r"positions must be \[6, 5\].*\(2 x 3 patches\); got \(5, 5\)",
        ),
        (X, {"positions": torch.zeros(6, 5), "class_token": torch.zeros(5)}, ShapeError, r"positions must be \[7, 5\]"),
        (X, {"positions": torch.zeros(6, 5).long()}, DTypeError, r"positions must be float32"),
        (X, {"mean": (0.5,)}, ShapeError, r"mean must be 3 numbers, one a channel; got 1"),
        (X, {"std": (0.5, 0.0, 1.0)}, ValueError, r"std must be above 0"),
        (X, {"precision": "fp8"}, ValueError, r"precision must be one of"),
        (X.to("meta"), {}, ValueError, r"all tensors must be on one device.*pixels on meta"),
        (X.flatten(2)[:, 0, :48], {"class_token": torch.zeros(5)}, ShapeError, r"packed patches have no class token"),
    ],
)
def test_refusals(pixels, options, error, message):
    options = dict(options)
    with pytest.raises(error, match=f"patch_embed: .*{message}"):
        patch_embed(pixels, K, options.pop("bias", None), **options)


def test_a_weight_of_another_shape_is_refused():
    with pytest.raises(
        ShapeError, match=r"weight must be \[D, C, p, q\], or \[D, C, t, p, q\] for videos; got \(5, 48\)"
    ):
        patch_embed(X, K.flatten(1))
    with pytest.raises(ShapeError, match=r"an image of 3 x 8 x 12 is not whole patches of 2 x 4 x 4; .* 2 x 8 x 12"):
        patch_embed(X[:, :, None].expand(-1, -1, 3, -1, -1), K[:, :, None].expand(-1, -1, 2, -1, -1))


def test_a_forced_backend_says_why_not():
    with use_backend("cpu"), pytest.raises(BackendError, match=r"patch_embed: backend 'cpu' cannot run this call"):
        patch_embed(X, K.double())
    patches = patch_embedding._patches("patch_embed", X, K, "nchw")
    assert explain(IMPLS, patches, K)["reference"] == "runs"
