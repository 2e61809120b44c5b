"""Images of several sizes in one call, packed: each as if it were alone in a model of its size."""

import re
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from vlmfast.errors import DTypeError, ShapeError
from vlmfast.models import ClipConfig, build_clip
from vlmfast.ops.patch_embedding import interpolate_positions

SIZES = [(32, 32), (16, 48), (32, 32), (8, 8), (48, 16), (16, 48), (64, 40)]


def model_of(pool, size=(32, 32), **vision):
    config = {"image_size": size, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "pool_type": pool}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    sizes = {"embed_dim": 32 if pool == "map" else 20, "vision_cfg": config | vision, "text_cfg": text}
    return build_clip(ClipConfig.from_dict(sizes), seed=0).double()


def images(dtype=torch.uint8):
    generator = torch.Generator().manual_seed(1)
    made = [torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8) for size in SIZES]
    return made if dtype == torch.uint8 else [image.to(dtype) / 255 - 0.5 for image in made]


def alone(model, image):
    """The embedding [D] of one image, by a model of its size whose positions are the interpolated ones."""
    size, old = tuple(image.shape[1:]), model.visual.config.grid
    other = build_clip(replace(model.config, vision_cfg=replace(model.config.vision_cfg, image_size=size))).double()
    weights = dict(model.named_parameters())
    positions = weights["visual.positional_embedding"]
    weights["visual.positional_embedding"] = interpolate_positions(
        positions, (size[0] // 8, size[1] // 8), old_grid=old, class_token=model.visual.class_embedding is not None
    )
    image_weights = {name.removeprefix("visual."): value for name, value in weights.items() if name[:7] == "visual."}
    return torch.func.functional_call(other.visual, image_weights, (image[None],))[0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
@pytest.mark.parametrize(
    ("pool", "vision"), [("tok", {}), ("avg", {}), ("avg", {"final_ln_after_pool": True}), ("map", {})]
)
def test_each_image_is_as_if_it_were_alone(pool, vision, dtype):
    model = model_of(pool, **vision)
    ours = model.encode_image(images(dtype))
    expected = torch.stack([alone(model, image) for image in images(dtype)])
    assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves = [p for name, p in model.named_parameters() if name.startswith("visual.")]
    gradients = zip(
        torch.autograd.grad((ours * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    )
    for value, exact in gradients:
        assert_close(value, exact, rtol=1e-7, atol=1e-9)


def test_a_list_of_the_configured_size_is_the_batch():
    model = model_of("tok")
    batch = torch.stack([image for image in images() if image.shape[1:] == (32, 32)])
    assert_close(model.encode_image(list(batch)), model.encode_image(batch), rtol=1e-10, atol=1e-12)
    normal = model.encode_image(images(), normalize=True)
    assert_close(normal.norm(dim=1), torch.ones(len(SIZES), dtype=torch.float64))


def test_checkpointing_changes_nothing():
    model = model_of("tok")
    expected = torch.autograd.grad(model.encode_image(images()).sum(), model.visual.conv1.weight)[0]
    model.set_grad_checkpointing()
    assert_close(torch.autograd.grad(model.encode_image(images()).sum(), model.visual.conv1.weight)[0], expected)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([], ShapeError, "a list of images must hold at least one"),
        ([torch.zeros(3, 8, 12)], ShapeError, "images[0] must be [3, H, W] with H and W multiples of 8"),
        ([torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8)], ShapeError, "images[1] must be [3, H, W]"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)], DTypeError, "torch.float32, torch.uint8"),
        ([torch.zeros(3, 8, 8, dtype=torch.int32)], DTypeError, "got torch.int32"),
    ],
)
def test_refusals(bad, error, message):
    with pytest.raises(error, match=re.escape(message)):
        model_of("tok").encode_image(bad)


def test_a_resnet_takes_one_size():
    vision = {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    model = build_clip(ClipConfig.from_dict({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}), seed=0)
    with pytest.raises(ShapeError, match=r"takes images of one size, \[B, 3, 32, 32\]; got a list"):
        model.encode_image([torch.zeros(3, 32, 32)])
