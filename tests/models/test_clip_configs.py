"""Configs in open_clip's format: goldens of the released sizes, round trips, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch

from vlmfast.errors import DataError, ShapeError
from vlmfast.models import Clip, ClipConfig, VisionConfig, build_clip, config_names, load_config
from vlmfast.models.config import CONFIGS


@pytest.mark.parametrize(
    ("name", "tokens", "parameters"),
    [
        ("ViT-B-32", 50, 151_277_313),
        ("ViT-B-16", 197, 149_620_737),
        ("ViT-L-14", 257, 427_616_513),
        ("ViT-L-14-336", 577, 427_944_193),
    ],
)
@pytest.mark.parametrize("suffix", ["", "-quickgelu"])
def test_released_sizes(name, suffix, tokens, parameters):
    config = load_config(name + suffix)
    assert config.vision_cfg.tokens == tokens
    assert config.activation(config.vision_cfg) == config.activation(config.text_cfg)
    assert config.activation(config.text_cfg) == ("quick_gelu" if suffix else "gelu")
    with torch.device("meta"):
        model = Clip(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.visual.positional_embedding.shape[0] == tokens
    assert (model.context_length, model.vocab_size) == (77, 49408)


@pytest.mark.parametrize("name", config_names())
def test_every_config_round_trips(name, tmp_path):
    config = load_config(name)
    saved = tmp_path / "open_clip_config.json"
    saved.write_text(json.dumps(config.to_dict()))
    assert load_config(saved) == config
    assert load_config(str(saved)) == config


def test_a_config_with_everything_round_trips():
    tanh = {"approximate": "tanh"}
    config = ClipConfig(
        embed_dim=8,
        vision_cfg=VisionConfig((16, 32), 1, 32, 16, 8, 2.0, tanh),
        init_logit_scale=2.0,
        init_logit_bias=-10.0,
        image_mean=(0.1, 0.2, 0.3),
        image_std=(0.4, 0.5, 0.6),
        interpolation="bilinear",
        resize_mode="squash",
    )
    assert ClipConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.vision_cfg.tokens == 9


def test_what_changes_nothing_may_be_said():
    said = a_config({"patch_dropout": 0.0, "attentional_pool": False}, {"pad_id": 0}, custom_text=True)
    preprocess = {"size": 16, "mode": "RGB", "fill_color": 0, "interpolation": "bicubic"}
    whole = {"model_cfg": said, "preprocess_cfg": preprocess}
    assert ClipConfig.from_dict(whole) == ClipConfig.from_dict(a_config())


@pytest.mark.parametrize("name", ["RN50x4", "ViT-SO400M-14-SigLIP-384", "ViT-H-14-CLIPA-336", "ViT-H-14-378"])
def test_a_released_config_is_said_again_as_open_clip_says_it(name):
    written = json.loads((CONFIGS / f"{name}.json").read_text())
    again = load_config(name).to_dict()
    for section, content in (written if "model_cfg" in written else {"model_cfg": written}).items():
        for key, value in content.items():
            found = again[section][key]
            assert found.items() >= value.items() if isinstance(value, dict) else found == value, key


def test_flat_and_wrapped_forms_are_one():
    wrapped = load_config("ViT-B-32").to_dict()
    assert ClipConfig.from_dict(wrapped["model_cfg"]) == ClipConfig.from_dict(wrapped) == load_config("ViT-B-32")


@pytest.mark.parametrize(("name", "size"), [("digits", 8), ("CLIP-tiny", 64)])
def test_tiny_configs_take_any_tokenizer(name, size):
    config = load_config(name).with_text(vocab_size=300, context_length=9)
    assert config.vision_cfg == load_config(name).vision_cfg
    model = build_clip(config, seed=0)
    text = torch.tensor([[298, 3, 4, 299, 0, 0, 0, 0, 0]])
    out = model(torch.zeros(1, 3, size, size, dtype=torch.uint8), text)
    assert out["image_features"].shape == out["text_features"].shape == (1, config.embed_dim)
    assert out["text_features"].norm().item() == pytest.approx(1)


VISION, TEXT = {"image_size": 16, "width": 64, "patch_size": 8}, {"width": 64, "heads": 2}


def a_config(vision=(), text=(), **model):
    return {"embed_dim": 8, "vision_cfg": {**VISION, **dict(vision)}, "text_cfg": {**TEXT, **dict(text)}, **model}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (a_config({"timm_model_name": "vit_so400m"}), r"not built here: timm image tower 'vit_so400m'.*ViT-B-32"),
        (a_config((), {"hf_model_name": "roberta-base"}), r"Hugging Face text tower 'roberta-base'"),
        (a_config(multimodal_cfg={}), r"CoCa's multimodal decoder"),
        (
            a_config({"timm_model_name": "x"}, {"hf_model_name": "y"}),
            r"timm image tower 'x'; Hugging Face text tower 'y'",
        ),
        (a_config(text_tower=True), r"unsupported: text_tower. Supported: embed_dim, .*vision_cfg"),
        (a_config(nonscalar_logit_scale=True), r"unsupported: nonscalar_logit_scale"),
        (
            a_config({"patch_dropout": 0.1, "widht": 3}),
            r"vision_cfg.patch_dropout, vision_cfg.widht\. .*vision_cfg.width",
        ),
        (a_config((), {"pool_type": "mean"}), r"text_cfg: pool_type must be one of .*; got 'mean'"),
        (a_config((), {"pool_type": "eos"}), r"text_cfg: pool_type 'eos' needs eos_id"),
        (a_config((), {"proj_type": "mlp"}), r"text_cfg: proj_type must be linear or none; got 'mlp'"),
        (a_config((), {"embed_cls": True}), r"text_cfg.embed_cls"),
        (a_config((), {"norm_kwargs": {"epsilon": 1}}), r"norm_kwargs must be .*epsilon"),
        (a_config({"pool_type": "none"}), r"vision_cfg: pool_type must be one of tok, avg, map; got 'none'"),
        ({"model_cfg": a_config(), "preprocess_cfg": {"fill_color": 9}}, r"preprocess_cfg.fill_color"),
        ({"model_cfg": a_config(), "preprocess_cfg": {"interpolation": "random"}}, r"interpolation must be bicubic or"),
        ({"model_cfg": a_config(), "preprocess_cfg": {"resize_mode": "longest"}}, r"resize_mode must be shortest or"),
        ({"model_cfg": a_config(), "optimizer": {}}, r"unsupported: optimizer"),
        ({"model_cfg": a_config(), "preprocess_cfg": {"mean": [0.5]}}, r"three numbers each.*got 1 and 3"),
        ({"embed_dim": 8}, r"\['text_cfg', 'vision_cfg'\] missing"),
        (a_config({"act_kwargs": {"approximate": "tanh"}}, quick_gelu=True), r"quick_gelu has no act_kwargs"),
        (a_config({"act_kwargs": {"negative_slope": 0.1}}), r"act_kwargs must be .*negative_slope"),
    ],
)
def test_refuses_by_name_what_it_does_not_build(config, message):
    with pytest.raises(DataError, match="(?s)" + message):
        ClipConfig.from_dict(config, "some.json")


def test_refuses_sizes_that_do_not_divide():
    with pytest.raises(ShapeError, match="image_size 30 must be a multiple of patch_size 8"):
        ClipConfig.from_dict(a_config({"image_size": 30}))
    with pytest.raises(ShapeError, match="width 64 must be a multiple of head_width 48"):
        ClipConfig.from_dict(a_config({"head_width": 48}))
    with pytest.raises(ShapeError, match="text_cfg: width 64 must be a multiple of heads 5"):
        replace(load_config("digits").text_cfg, heads=5)
    with pytest.raises(
        ShapeError, match=r"four numbers of layers and .* 32 pixels; got layers \[1, 2\], image_size 64"
    ):
        VisionConfig(64, (1, 2))
    with pytest.raises(ShapeError, match="pool_type 'map' ends with the width 64, and embed_dim is 8"):
        build_clip(ClipConfig.from_dict(a_config({"pool_type": "map"})))
    with pytest.raises(ShapeError, match="proj_type 'none' ends with the width 64, and embed_dim is 8"):
        build_clip(ClipConfig.from_dict(a_config((), {"proj_type": "none"})))


def test_an_unknown_name_gets_the_nearest(tmp_path):
    with pytest.raises(DataError, match="no config 'ViT-B32'; nearest: ViT-B-32; known: CLIP-tiny, "):
        load_config("ViT-B32")
    with pytest.raises(DataError, match=r"no config file .*absent\.json"):
        load_config(tmp_path / "absent.json")
    cut = tmp_path / "cut.json"
    cut.write_text('{"embed_dim": 51')
    with pytest.raises(DataError, match=r"cut\.json is not JSON: "):
        load_config(cut)
