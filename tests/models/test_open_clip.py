"""The same weights in open_clip's own models give the same numbers. Skipped where `open_clip` is not installed."""

import pytest
import torch
from torch.testing import assert_close

from vlmfast.models import ClipConfig, ModifiedResNet, build_clip, config
from vlmfast.models.weights import open_clip as names
from vlmfast.models.weights.table import outward

EOT, LENGTH = 63, 16
VISION = {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": LENGTH, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2}
TANH, EPS = {"approximate": "tanh"}, {"eps": 1e-3}
SIGLIP = {"timm_model_name": "vit_tiny_patch8_siglip_36", "timm_pool": "map", "timm_proj": "none", "image_size": 36}

# What each key of the released configs changes, in models that take milliseconds.
CONFIGS = {
    "ResNet": {"vision_cfg": {"layers": [1, 2, 1, 1], "width": 8, "image_size": 64}, "quick_gelu": True},
    "QuickGELU": {"quick_gelu": True},
    "not square": {"vision_cfg": VISION | {"image_size": [16, 32]}},
    "tanh, eps and LayerScale": {
        "vision_cfg": VISION | {"act_kwargs": TANH, "norm_kwargs": EPS, "ls_init_value": 0.3},
        "text_cfg": TEXT | {"act_kwargs": TANH, "norm_kwargs": EPS, "ls_init_value": 0.2},
    },
    "mean of patches": {"vision_cfg": VISION | {"pool_type": "avg"}},
    "CLIPA": {
        "vision_cfg": VISION | {"pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True, "mlp_ratio": 2.5},
        "text_cfg": TEXT | {"pool_type": "last", "no_causal_mask": True},
    },
    "CLIPA, normalised first": {"vision_cfg": VISION | {"pool_type": "avg", "no_ln_pre": True}},
    "first of the ends": {"text_cfg": TEXT | {"pool_type": "eos", "eos_id": 7}},
    "first token": {"text_cfg": TEXT | {"pool_type": "first", "no_causal_mask": True}},
    "bias": {"text_cfg": TEXT | {"proj_bias": True}, "init_logit_bias": -3.0},
    "custom_text": {"custom_text": True},
    "SigLIP": {
        "embed_dim": 48,
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": SIGLIP,
        "text_cfg": TEXT
        | {"pool_type": "last", "no_causal_mask": True, "proj_bias": True, "norm_kwargs": {"eps": 1e-6}},
    },
}


@pytest.fixture
def tiny_siglip(open_clip, monkeypatch):
    """A SigLIP image tower under a name that timm and we know for the time of the test; 36 = 4 patches of 8, 4 left."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    size = (48, 2, 3, 2.5)
    monkeypatch.setitem(config.TRUNKS, "tiny", size)
    monkeypatch.setattr(config, "SIGLIP_NAME", config.SIGLIP_NAME.replace("(", "(tiny|", 1))

    def vit_tiny_patch8_siglip_36(pretrained=False, **flags):
        sizes = {"img_size": 36, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.5}
        return timm.models.VisionTransformer(**sizes, class_token=False, global_pool="map", num_classes=0)

    monkeypatch.setitem(
        timm.models._registry._model_entrypoints, "vit_tiny_patch8_siglip_36", vit_tiny_patch8_siglip_36
    )


def lively(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def hidden_states(model, blocks):
    """Where each block's output will be."""
    hidden = []
    for block in blocks:
        block.register_forward_hook(lambda _m, _i, out: hidden.append(out))
    return hidden


def pair(open_clip, name):
    """(the config, ours, theirs) with one set of weights, in double precision."""
    whole = {"embed_dim": 20, "vision_cfg": VISION, "text_cfg": TEXT, **CONFIGS[name]}
    ours = lively(build_clip(ClipConfig.from_dict(whole), seed=0).double())
    custom = whole.pop("custom_text", False)
    theirs = (open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP)(**whole, output_dict=True).double()
    state = outward(ours.state_dict(), names.rows(ours.config, list(ours.state_dict())))
    if name == "custom_text":
        state = {key if key.startswith(("visual.", "logit_")) else f"text.{key}": value for key, value in state.items()}
    theirs.load_state_dict(state, strict=True)
    return ours, theirs


@pytest.mark.filterwarnings("ignore")  # another library's
@pytest.mark.parametrize(("name", "mode"), [("ResNet", "train"), *((name, "eval") for name in CONFIGS)])
def test_values_and_gradients_equal(open_clip, tiny_siglip, name, mode):
    ours, theirs = pair(open_clip, name)
    for model in (ours, theirs):
        model.train(mode == "train")
    height, width = ours.config.vision_cfg.image_hw
    image = torch.randn(4, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    text = torch.randint(1, EOT, (4, LENGTH), generator=torch.Generator().manual_seed(3))
    text[torch.arange(4), torch.tensor([3, 15, 7, 1])] = EOT
    text[:3, 5], text[3, 15] = 7, 7

    text_tower = getattr(theirs, "text", theirs)
    if isinstance(ours.visual, ModifiedResNet):
        towers = [(getattr(model.visual, f"layer{i}") for i in range(1, 5)) for model in (ours, theirs)]
    elif name == "SigLIP":
        towers = [ours.visual.transformer.resblocks, theirs.visual.trunk.blocks]
    else:
        towers = [ours.visual.transformer.resblocks, theirs.visual.transformer.resblocks]
    hidden = [hidden_states(model, tower) for model, tower in zip((ours, theirs), towers, strict=True)]
    text_hidden = [hidden_states(tower, tower.transformer.resblocks) for tower in (ours, text_tower)]

    got, expected = ours(image, text), theirs(image, text)
    assert set(got) == set(expected)
    close = {"rtol": 1e-9, "atol": 1e-9}
    for key in expected:
        assert_close(got[key], expected[key], **close)
    for a, b in zip(*hidden, strict=True):
        assert_close(a, b, **close)
    for a, b in zip(*text_hidden, strict=True):
        assert_close(a, b[:, : a.shape[1]], **close)  # ours ends with the longest text

    for out in (got, expected):
        logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T + out.get("logit_bias", 0)
        logits.log_softmax(1).diagonal().sum().add(logits.sigmoid().sum()).backward()
    gradients = {key: p.grad for key, p in ours.named_parameters()}
    gradients |= {key: p for key, p in ours.named_buffers() if p.dim()}  # batch norms: their statistics
    table = [r for r in names.rows(ours.config, list(ours.state_dict())) if gradients.get(r.ours) is not None]
    gradients = outward(gradients, table)
    others = {key.removeprefix("text.") if name == "custom_text" else key: p for key, p in theirs.named_parameters()}
    for key, p in others.items():
        assert_close(gradients[key], p.grad, rtol=1e-8, atol=1e-10, msg=lambda words, key=key: f"{key}: {words}")
    for key, p in theirs.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            assert_close(gradients[key], p, **close)


@pytest.mark.filterwarnings("ignore")  # another library's
def test_a_seed_draws_open_clips_weights(open_clip):
    whole = {"embed_dim": 20, "vision_cfg": VISION, "text_cfg": TEXT}
    ours = build_clip(ClipConfig.from_dict(whole), seed=5)
    torch.manual_seed(5)
    theirs = open_clip.model.CLIP(**whole)
    for name, p in theirs.named_parameters():
        assert torch.equal(p, ours.get_parameter(name)), name
