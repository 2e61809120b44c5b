"""A Llava on disk: transformers' directories, of every version's names, read and written bit for bit."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from vlmfast.errors import DataError, ShapeError
from vlmfast.models.decoder import DecoderConfig
from vlmfast.models.llava import Llava, LlavaConfig, build_llava
from vlmfast.models.vit import VisionConfig
from vlmfast.models.weights.vlm import load_vlm, save_vlm

V, IMAGE = 60, 57
VISION = VisionConfig(image_size=24, patch_size=8, layers=3, width=32, head_width=16, mlp_ratio=2)
TEXT = DecoderConfig.llama(vocab_size=V, width=48, layers=2, heads=4, kv_heads=2, context_length=64)
CONFIG = LlavaConfig(VISION, TEXT, IMAGE)
QWEN2 = DecoderConfig.qwen2(vocab_size=V, width=48, layers=2, heads=4, kv_heads=2, context_length=64, tied=True)
VARIANTS = {
    "1.5": {},
    "qwen2, tied": {"decoder": QWEN2},
    "1, linear": {"projector": "linear", "aspect": "square"},
    "linear, no bias": {"projector": "linear", "projector_bias": False},
    "other": {
        "vision": replace(VISION, norm_kwargs={"eps": 1e-6}),
        "activation": "gelu",
        "feature_layer": -1,
        "select": "full",
        "projector_bias": False,
        "image_mean": (0.5, 0.4, 0.3),
        "image_std": (0.2, 0.2, 0.1),
        "aspect": "squash",
    },
}
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")  # another library's


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def logits(model, image):
    """Of one sequence with all the images."""
    ids = torch.tensor([1, *[IMAGE] * (len(image) * model.image_tokens), 4, 5])
    return ids, model.decoder.logits(model.decoder(model.embed(ids, image)[None]))


def picture():
    return torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_ours_back_bit_for_bit_and_in_transformers_the_same_numbers(transformers, tmp_path, variant):
    model = build_llava(replace(CONFIG, **VARIANTS[variant]), seed=0)
    folder = save_vlm(model, tmp_path / "model", eos=(2,))
    back = load_vlm(folder)
    assert isinstance(back, Llava)
    assert back.config == model.config
    assert not back.training
    same(back.state_dict(), model.state_dict())
    assert {n for n, p in back.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    theirs, told = transformers.LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    assert theirs.generation_config.eos_token_id == [2]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.image_mean, model.image_std))
    ids, mine = logits(model, picture())
    out = theirs.eval()(input_ids=ids[None], pixel_values=(picture() / 255 - mean) / std)
    assert_close(mine, out.logits, rtol=1e-4, atol=1e-5)


def their_folder(transformers, folder, text="llama", **changes):
    """A tiny model that transformers made and saved."""
    vision = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": V, "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=24, patch_size=8),
        text_config=transformers.AutoConfig.for_model(
            text, **sizes, **({"sliding_window": None} if text == "mistral" else {})
        ),
        **{"image_token_index": IMAGE, "image_seq_length": 9, **changes},
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("text", ["llama", "qwen2", "mistral"])
def test_theirs_loads_and_goes_back_whole(transformers, tmp_path, text):
    theirs = their_folder(transformers, tmp_path / "theirs", text)
    model = load_vlm(tmp_path / "theirs")
    ids, mine = logits(model, picture())
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.image_mean, model.image_std))
    out = theirs(input_ids=ids[None], pixel_values=(picture() / 255 - mean) / std)
    assert_close(mine, out.logits, rtol=1e-4, atol=1e-5)
    save_vlm(model, tmp_path / "ours")
    back = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    same(back.state_dict(), theirs.state_dict())  # the blocks behind layer -2 and post_layernorm too


def renamed(name, version):
    """The name that a version of transformers gave a tensor, from that of the first."""
    text = name.replace("language_model.lm_head.", "lm_head.").replace("language_model.model.", "language_model.")
    if version == "5, in memory":
        name = text if text.startswith("lm_head.") else f"model.{text}"
        return name.replace("vision_tower.vision_model.", "vision_tower.")
    if version == "4.52, in memory":
        return text if text.startswith("lm_head.") else f"model.{text}"
    if version == "5, saved":
        return name.replace("vision_tower.vision_model.", "vision_tower.")
    return name


@pytest.mark.parametrize("version", ["4.36 to 4.51", "4.52, in memory", "5, in memory", "5, saved"])
def test_names_of_every_version_load(tmp_path, version):
    model = build_llava(CONFIG, seed=0)
    folder = save_vlm(model, tmp_path / "model")
    path = folder / "model.safetensors"
    weights = {renamed(name, version): value for name, value in load_file(path).items()}
    if version.startswith("4.36"):  # numbers that these versions saved, too
        weights["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(10)[None]
        weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(weights, path)
    same(load_vlm(folder).state_dict(), model.state_dict())


def test_shards_load(transformers, tmp_path):
    theirs = their_folder(transformers, tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    same(load_vlm(tmp_path / "shards").state_dict(), load_vlm(tmp_path / "whole").state_dict())


def test_what_a_hub_config_leaves_out_is_what_transformers_takes(transformers, tmp_path):
    theirs = their_folder(transformers, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for key in ("hidden_act", "layer_norm_eps", "num_channels", "attention_dropout", "projection_dim"):
        del config["vision_config"][key]
    for key in ("rms_norm_eps", "hidden_act", "max_position_embeddings", "rope_parameters", "head_dim", "model_type"):
        del config["text_config"][key]
    for key in ("projector_hidden_act", "multimodal_projector_bias", "vision_feature_layer", "tie_word_embeddings"):
        del config[key]
    path.write_text(json.dumps(config))
    model = load_vlm(tmp_path)
    ids, mine = logits(model, picture())
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.image_mean, model.image_std))
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert_close(
        mine, theirs(input_ids=ids[None], pixel_values=(picture() / 255 - mean) / std).logits, rtol=1e-4, atol=1e-5
    )
    assert model.aspect == "square"  # no image processor is there: CLIP's


@pytest.mark.parametrize("aspect", ["pad", "square", "squash"])
def test_their_image_processor_makes_our_pixels(transformers, tmp_path, aspect):
    Image = pytest.importorskip("PIL.Image")
    model = build_llava(replace(CONFIG, aspect=aspect), seed=0)
    processor = transformers.AutoImageProcessor.from_pretrained(save_vlm(model, tmp_path / "model"))
    wide = torch.randint(0, 256, (24, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wide[:, :12] = 200
    pixels = processor(Image.fromarray(wide.numpy()), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 24, 24)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.image_mean, model.image_std))
    if aspect == "square":  # the middle, at the size that it has
        assert_close(pixels[0], (wide[:, 12:36].permute(2, 0, 1) / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    filled = (pixels[0, :, 0].abs() < 0.02).all()  # the mean colour, above and below
    assert bool(filled) == (aspect == "pad")
    left = ((pixels[0] * std + mean)[:, 12, :2] * 255 - 200).abs().max() < 1  # the left edge is still to be seen
    assert bool(left) == (aspect != "square")
    assert load_vlm(tmp_path / "model").aspect == aspect


def test_processor_finds_a_tokenizer_that_is_copied(transformers, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<image>": IMAGE, "a": 1, "</s>": 2, "<unk>": 0}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.save(str(tmp_path / "words.json"))
    (tmp_path / "tokenizer.json").write_text((tmp_path / "words.json").read_text())
    (tmp_path / "more.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
    )
    files = {"tokenizer.json": tmp_path / "tokenizer.json", "tokenizer_config.json": tmp_path / "more.json"}
    model = build_llava(CONFIG, seed=0)
    folder = save_vlm(model, tmp_path / "model", files)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    image = torch.zeros(24, 24, 3, dtype=torch.uint8).numpy()
    ids = processor(images=[image], text="<image> a", return_tensors="pt")["input_ids"][0]
    assert ids.tolist() == [IMAGE] * model.image_tokens + [1]


def test_precision_is_the_file_s(tmp_path):
    model = build_llava(CONFIG, seed=0).bfloat16()
    folder = save_vlm(model, tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    same(load_vlm(folder, dtype=None).state_dict(), model.state_dict())
    assert {p.dtype for p in load_vlm(folder).parameters()} == {torch.float32}


def refused(folder, match, section=None, **changes):
    """The folder with other entries in its config.json (None: without them) is refused."""
    path = folder / "config.json"
    good = path.read_text()
    config = json.loads(good)
    (config if section is None else config[section]).update(changes)
    path.write_text(json.dumps(config))
    with pytest.raises((DataError, ShapeError), match=match):
        load_vlm(folder)
    path.write_text(good)


def test_what_is_not_built_is_refused_by_name(tmp_path):
    folder = save_vlm(build_llava(CONFIG, seed=0), tmp_path / "model")
    refused(
        folder, "image tower 'siglip_vision_model' is not built here", "vision_config", model_type="siglip_vision_model"
    )
    refused(
        folder,
        "language model 'gemma' is not built here; built: llama, qwen2, mistral",
        "text_config",
        model_type="gemma",
    )
    refused(folder, "not built here: sliding_window 64", "text_config", model_type="mistral", sliding_window=64)
    refused(folder, "projector_hidden_act 'relu' is not built here", projector_hidden_act="relu")
    refused(folder, r"features of several layers, \[-2, -1\], are not built", vision_feature_layer=[-2, -1])
    refused(folder, "hidden_act 'relu'", "vision_config", hidden_act="relu")
    refused(folder, "image_token_id must be in the decoder's vocabulary of 60; got 60", image_token_index=V)
    refused(folder, "select must be one of default, full; got 'cls'", vision_feature_select_strategy="cls")
    refused(folder, "is no vision-language model that is built here", model_type="llava_next")
    refused(folder, "of another shape: .*patch_embedding.weight is", "vision_config", patch_size=4)
    # A linear projector has one map; transformers has always two.
    refused(folder, "linear_2.*: a projector of two linear maps, nothing between", projector_hidden_act="linear")


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    folder = save_vlm(build_llava(CONFIG, seed=0), tmp_path / "model")
    path = folder / "model.safetensors"
    weights = load_file(path)

    def stored(changed, match):
        save_file(changed, path)
        with pytest.raises(DataError, match=match):
            load_vlm(folder)

    lost = "vision_tower.vision_model.post_layernorm.bias"
    stored({k: v for k, v in weights.items() if k != lost}, f"1 missing: {lost}")
    stored({**weights, "image_newline": torch.zeros(48)}, "1 unknown: image_newline")
    lost = "language_model.model.norm.weight"
    stored({k: v for k, v in weights.items() if k != lost}, "1 missing: model.norm.weight")
    stored({**weights, "multi_modal_projector.linear_1.bias": torch.zeros(3)}, r"linear_1.bias is \[3\], not \[48\]")
