"""Hidden states by name, and towers that are not trained."""

import pytest
import torch
from torch.testing import assert_close

from vlmfast.errors import ShapeError
from vlmfast.models import ClipConfig, build_clip, taps
from vlmfast.models.hidden_states import TapError

EOT = 63
VIT = {"image_size": 24, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
MAP = {**VIT, "pool_type": "map", "width": 32}
TEXT = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 4, "layers": 3}


def a_model(vision=VIT, **text):
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT | text}
    return build_clip(ClipConfig.from_dict(config), seed=0)


def inputs(size=24):
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, EOT, (3, 16), generator=generator)
    text[:, 9:] = 0
    text[torch.arange(3), torch.tensor([2, 8, 5])] = EOT
    return torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=generator), text


# Taps.


def test_any_hidden_state_by_name():
    model = a_model()
    image, text = inputs()
    plain = model(image, text)
    names = ["visual.conv1", "visual.ln_pre", "visual.transformer.resblocks.2", "transformer.resblocks.1.attn"]
    with taps(model, [*names, "ln_final"]) as hidden:
        got = model(image, text)
    for key, value in plain.items():
        assert_close(got[key], value, rtol=1e-5, atol=1e-6)
    shapes = {name: tuple(hidden[name].shape) for name in names}
    assert shapes == {
        "visual.conv1": (3, 9, 48),
        "visual.ln_pre": (3, 10, 48),
        "visual.transformer.resblocks.2": (3, 10, 48),
        "transformer.resblocks.1.attn": (3, 9, 32),  # as long as the longest text
    }
    assert torch.equal(hidden["visual.transformer.resblocks.2"], model.visual.tokens(image))
    pooled = hidden["ln_final"][torch.arange(3), text.argmax(-1)] @ model.text_projection
    assert_close(torch.nn.functional.normalize(pooled, dim=-1), got["text_features"])
    assert not any(module._forward_hooks for module in model.modules())


def test_taps_have_gradients_and_go_when_the_block_fails():
    model = a_model()
    image, _ = inputs()
    with taps(model, ["visual.transformer.resblocks.0"]) as hidden:
        model.encode_image(image)
    hidden["visual.transformer.resblocks.0"].square().sum().backward()
    assert model.visual.conv1.weight.grad.norm() > 0
    assert model.visual.proj.grad is None
    with pytest.raises(ZeroDivisionError), taps(model, ["visual"]):
        raise ZeroDivisionError
    assert not model.visual._forward_hooks


@pytest.mark.parametrize(
    ("vision", "name", "shape"),
    [
        (RESNET, "visual.layer3", (3, 128, 2, 2)),
        (MAP, "visual.attn_pool", (3, 32)),
        (MAP, "visual.ln_post", (3, 9, 32)),
    ],
)
def test_other_towers_have_theirs(vision, name, shape):
    model = a_model(vision)
    with taps(model, [name]) as hidden:
        model.encode_image(inputs(vision["image_size"])[0])
    assert hidden[name].shape == shape


def test_an_unknown_name_gets_the_nearest():
    with (
        pytest.raises(TapError, match=r"no module 'visual.blocks.1'; nearest: .*visual\.\w+"),
        taps(a_model(), ["visual", "visual.blocks.1"]),
    ):
        pass


def test_taps_compile():
    model = a_model().eval()
    image, _ = inputs()
    with taps(model, ["visual.transformer.resblocks.1"]) as hidden:
        torch.compile(model.encode_image, fullgraph=True, backend="aot_eager")(image)
        compiled = hidden["visual.transformer.resblocks.1"]
        model.encode_image(image)
    assert_close(compiled, hidden["visual.transformer.resblocks.1"], rtol=1e-5, atol=1e-5)


# Locks.

BLOCKS = [f"visual.transformer.resblocks.{i}" for i in range(3)]
STEM = ["visual.conv1", "visual.class_embedding", "visual.positional_embedding", "visual.ln_pre"]


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def under(model, prefixes):
    return {name for name, _ in model.named_parameters() if any(name.startswith(prefix) for prefix in prefixes)}


@pytest.mark.parametrize(
    ("groups", "unlocked"),
    [
        (0, []),
        (1, ["visual.proj"]),
        (2, ["visual.proj", "visual.ln_post", BLOCKS[2]]),
        (3, ["visual.proj", "visual.ln_post", BLOCKS[2], BLOCKS[1]]),
        (5, ["visual.proj", "visual.ln_post", *BLOCKS, *STEM]),
    ],
)
def test_the_image_tower_is_locked_from_the_start(groups, unlocked):
    model = a_model()
    model.lock_image_tower(groups)
    others = {name for name in trained(model) if not name.startswith("visual.")}
    assert others == {name for name, _ in model.named_parameters() if not name.startswith("visual.")}
    assert trained(model) - others == under(model, unlocked)


TEXT_BLOCKS = [f"transformer.resblocks.{i}" for i in range(3)]


@pytest.mark.parametrize(
    ("layers", "unlocked"),
    [
        (0, []),
        (1, ["text_projection"]),
        (2, ["text_projection", "ln_final", TEXT_BLOCKS[2]]),
        (5, ["text_projection", "ln_final", *TEXT_BLOCKS, "token_embedding", "positional_embedding"]),
    ],
)
def test_the_text_tower_is_locked_from_the_start(layers, unlocked):
    model = a_model()
    model.lock_text_tower(layers)
    assert trained(model) == under(model, ["visual.", "logit_scale", *unlocked])


def test_a_locked_tower_learns_nothing_and_the_other_does():
    model = a_model()
    model.lock_image_tower()
    out = model(*inputs())
    (out["image_features"] @ out["text_features"].T).diagonal().sum().backward()
    assert all(p.grad is None for p in model.visual.parameters())
    assert model.text_projection.grad.norm() > 0


def test_a_resnets_statistics_stay_where_they_are():
    image, _ = inputs(32)
    for freeze in (False, True):
        model = a_model(RESNET)
        model.lock_image_tower(freeze_bn_stats=freeze)
        model.train()
        before = model.visual.bn1.running_mean.clone(), model.visual.layer4[0].bn3.running_var.clone()
        features = model.encode_image(image)
        after = model.visual.bn1.running_mean, model.visual.layer4[0].bn3.running_var
        assert all(torch.equal(a, b) == freeze for a, b in zip(before, after, strict=True))
        assert torch.equal(features, model.eval().encode_image(image)) == freeze
        model.state_dict()


def test_impossible_locks_are_refused():
    with pytest.raises(ShapeError, match=r"lock_image_tower: unlocked_groups must be 0 \.\. 5; got 6"):
        a_model().lock_image_tower(6)
    with pytest.raises(ShapeError, match=r"lock_text_tower: unlocked_layers must be 0 \.\. 5; got -1"):
        a_model().lock_text_tower(-1)
    with pytest.raises(ShapeError, match="a ResNet is locked whole; use unlocked_groups=0"):
        a_model(RESNET).lock_image_tower(1)
    with pytest.raises(ValueError, match="freeze_layer_norm must be True"):
        a_model().lock_text_tower(freeze_layer_norm=False)


@pytest.mark.filterwarnings("ignore")  # another library's
@pytest.mark.parametrize("count", range(6))
def test_the_groups_are_open_clips(open_clip, count):
    theirs = open_clip.model.CLIP(32, VIT, TEXT)
    ours = a_model()
    for model in (theirs, ours):
        model.lock_image_tower(count)
        model.lock_text_tower(count)
    assert trained(ours) == trained(theirs)


# Every kind of model compiles in one graph and can be checkpointed.


@pytest.mark.parametrize("vision", [RESNET, MAP], ids=["resnet", "map"])
def test_compiles_in_one_graph(vision):
    model = a_model(vision, no_causal_mask=True, pool_type="last", proj_bias=True).eval()
    image, text = inputs(vision["image_size"])
    eager = model(image, text)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(image, text)
    for name, value in eager.items():
        assert_close(compiled[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vision", [RESNET, MAP], ids=["resnet", "map"])
def test_checkpointing_changes_no_gradient(vision):
    model = a_model(vision)
    image, text = inputs(vision["image_size"])

    def gradients():
        out = model(image, text)
        return torch.autograd.grad((out["image_features"] @ out["text_features"].T).diagonal().sum(), trainable)

    trainable = [p for name, p in model.named_parameters() if name != "logit_scale"]
    plain = gradients()
    model.set_grad_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
    model.set_grad_checkpointing(False)
    assert not model.transformer.checkpointing
