"""Checkpoints of OpenAI, open_clip and Hugging Face: recognised, equal to their owners' models, refused when wrong."""

import json
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from vlmfast.errors import DataError, MissingExtraError
from vlmfast.models import (
    Align,
    ClipConfig,
    build_clip,
    load_clip,
    load_config,
    read_checkpoint,
    write_checkpoint,
)
from vlmfast.models.weights import files, hf
from vlmfast.models.weights.table import outward

EOT, LENGTH = 63, 16
CLIP = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": LENGTH, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2},
}
RESNET = {**CLIP, "vision_cfg": {"image_size": 64, "layers": [1, 1, 2, 1], "width": 8}}
SIGLIP = {
    "embed_dim": 48,
    "init_logit_bias": -10.0,
    "vision_cfg": {**CLIP["vision_cfg"], "pool_type": "map", "act_kwargs": {"approximate": "tanh"}},
    "text_cfg": {
        **CLIP["text_cfg"],
        "act_kwargs": {"approximate": "tanh"},
        "no_causal_mask": True,
        "pool_type": "last",
        "proj_bias": True,
    },
}
BASE = load_config("ViT-B-16-SigLIP").vision_cfg
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def lively(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model.eval()


def ours(config):
    return lively(build_clip(ClipConfig.from_dict(config), seed=0))


def inputs(size=32, dtype=torch.float64):
    image = torch.randn(4, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(2))
    text = torch.randint(1, EOT - 1, (4, LENGTH), generator=torch.Generator().manual_seed(3))
    text[torch.arange(4), torch.tensor([3, 15, 7, 1])] = EOT
    return image, text


def open_clip_folder(model, folder):
    """What open_clip's save_pretrained leaves, of a model whose names are open_clip's."""
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(model.config.to_dict()))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def same_weights(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert torch.equal(value, b[name]), name


# Hugging Face.


def sizes(activation, **more):
    towers = {"num_hidden_layers": 2, "hidden_act": activation}
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 100, "num_attention_heads": 4}
    vision = {"hidden_size": 48, "intermediate_size": 190, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    return {
        "text_config": {**towers, **text, "max_position_embeddings": LENGTH, **more},
        "vision_config": {**towers, **vision},
    }


def hf_clip(transformers, activation="quick_gelu", eos=EOT):
    config = transformers.CLIPConfig(**sizes(activation, eos_token_id=eos), projection_dim=24)
    return lively(transformers.CLIPModel(config).double())


def hf_siglip(transformers):
    config = transformers.SiglipConfig(**sizes("gelu_pytorch_tanh", projection_size=48))
    return lively(transformers.SiglipModel(config).double())


@pytest.mark.filterwarnings("ignore")  # another library's
@pytest.mark.parametrize("kind", ["clip", "clip gelu", "clip that pools at 7", "clip of old", "siglip"])
def test_a_hugging_face_folder_gives_its_models_numbers(transformers, kind, tmp_path):
    theirs = {
        "clip": lambda: hf_clip(transformers),
        "clip gelu": lambda: hf_clip(transformers, "gelu"),
        "clip that pools at 7": lambda: hf_clip(transformers, eos=7),
        "clip of old": lambda: hf_clip(transformers, eos=2),
        "siglip": lambda: hf_siglip(transformers),
    }[kind]()
    theirs.save_pretrained(tmp_path)
    model = load_clip(tmp_path, dtype=torch.float64)
    image, text = inputs()
    text[:, 10] = 7
    hidden = {"visual": [], "text": []}
    for name, tower in (("visual", model.visual.transformer), ("text", model.transformer)):
        tower.resblocks[0].register_forward_pre_hook(lambda _m, args, name=name: hidden[name].append(args[0]))
        for block in tower.resblocks:
            block.register_forward_hook(lambda _m, _i, out, name=name: hidden[name].append(out))
    got = model(image, text)
    expected = theirs(input_ids=text, pixel_values=image, output_hidden_states=True, return_loss=True)
    assert_close(got["image_features"], expected.image_embeds, **CLOSE)
    assert_close(got["text_features"], expected.text_embeds, **CLOSE)
    for name, states in (("visual", expected.vision_model_output), ("text", expected.text_model_output)):
        for a, b in zip(hidden[name], states.hidden_states, strict=True):
            assert_close(a, b[:, : a.shape[1]], **CLOSE)  # ours ends with the longest text
    logits, by_text = model.get_logits(image, text)
    assert_close(logits, expected.logits_per_image, **CLOSE)
    assert_close(by_text, expected.logits_per_text, **CLOSE)
    likely = expected.logits_per_image.sigmoid() if kind == "siglip" else expected.logits_per_image.softmax(1)
    assert_close(model.probabilities(image, text), likely, **CLOSE)
    if kind == "siglip":
        loss = -torch.nn.functional.logsigmoid(logits * (2 * torch.eye(4) - 1)).sum() / 4
    else:
        loss = -(logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / 2
    assert_close(loss, expected.loss, **CLOSE)
    loss.backward()
    expected.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients = outward(gradients, hf.rows(model.config))
    assert gradients.keys() == dict(theirs.named_parameters()).keys()
    for name, p in theirs.named_parameters():
        assert_close(gradients[name], p.grad, rtol=1e-8, atol=1e-11, msg=lambda words, name=name: f"{name}: {words}")


@pytest.mark.filterwarnings("ignore")  # another library's
def test_an_align_folder_gives_its_models_numbers(transformers, tmp_path):
    text = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"intermediate_size": 64, "max_position_embeddings": LENGTH}
    vision = {"width_coefficient": 0.35, "depth_coefficient": 0.35, "image_size": 64, "hidden_dim": 112}
    config = transformers.AlignConfig(text_config=text, vision_config=vision, projection_dim=112)
    theirs = lively(transformers.AlignModel(config).double())
    theirs.save_pretrained(tmp_path)
    processor = {"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False, "include_top": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))

    model = load_clip(tmp_path, dtype=torch.float64)
    assert isinstance(model, Align)
    image, words = inputs(64)
    for row, end in enumerate([3, 15, 7, 1]):
        words[row, end + 1 :] = 0  # padding
    got = model(image, words)
    expected = theirs(input_ids=words, pixel_values=image, attention_mask=words.ne(0).long(), return_loss=True)
    assert_close(got["image_features"], expected.image_embeds, **CLOSE)
    assert_close(got["text_features"], expected.text_embeds, **CLOSE)
    logits = got["logit_scale"] * got["image_features"] @ got["text_features"].T
    assert_close(logits, expected.logits_per_image, **CLOSE)
    assert_close(model.logit_scale.exp(), got["logit_scale"], **CLOSE)
    target = torch.arange(4)
    smooth = [torch.nn.functional.cross_entropy(z, target, label_smoothing=0.1) for z in (logits, logits.T)]
    assert_close(sum(smooth) / 2, expected.loss, **CLOSE)
    (sum(smooth) / 2).backward()
    expected.loss.backward()
    others = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        assert (p.grad is None) == (others[name].grad is None), name
        if p.grad is not None:
            assert_close(p.grad, others[name].grad, rtol=1e-8, atol=1e-11)

    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert_close(model.encode_image(pixels), model.encode_image(pixels.double() / 127.5 - 1), **CLOSE)
    with pytest.raises(DataError, match=r"an ALIGN has transformers' own towers; load_clip loads it"):
        read_checkpoint(tmp_path)


def test_align_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text('{"model_type": "align"}')
    with pytest.raises(MissingExtraError, match=r"transformers is not installed; run: pip install 'vlmfast\[hf\]'"):
        load_clip(tmp_path)


# Converting.


@pytest.mark.filterwarnings("ignore")  # another library's
@pytest.mark.parametrize("config", [CLIP, SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_to_hugging_face_and_back_is_bit_equal(transformers, config, dtype, tmp_path):
    model = ours(config).to(dtype)
    source = read_checkpoint(open_clip_folder(model, tmp_path / "ours"))
    same_weights(dict(source.weights), model.state_dict())
    write_checkpoint(source, tmp_path / "hf", "hf")
    back = read_checkpoint(tmp_path / "hf")
    assert back.source == "hf"
    same_weights(dict(back.weights), dict(source.weights))
    assert replace(back.config, init_logit_scale=0, init_logit_bias=0, text_cfg=source.config.text_cfg) == replace(
        source.config, init_logit_scale=0, init_logit_bias=0
    )

    kind = transformers.CLIPModel if config is CLIP else transformers.SiglipModel
    theirs, info = kind.from_pretrained(tmp_path / "hf", output_loading_info=True, dtype=torch.float32)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    image, text = inputs(dtype=torch.float32)
    got = load_clip(tmp_path / "ours")(image, text)
    expected = theirs(input_ids=text, pixel_values=image)
    assert_close(got["image_features"], expected.image_embeds, rtol=1e-4, atol=1e-5)
    assert_close(got["text_features"], expected.text_embeds, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # another library's
@pytest.mark.parametrize("config", [CLIP, RESNET], ids=["clip", "resnet"])
def test_open_clip_loads_what_is_written(open_clip, config, tmp_path):
    model = ours(config)
    torch.save({"state_dict": model.state_dict(), "epoch": 3, "name": "x"}, tmp_path / "epoch_3.pt")
    source = read_checkpoint(tmp_path / "epoch_3.pt", model.config)
    folder = write_checkpoint(source, tmp_path / "written", "open_clip")
    theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    theirs.eval()
    assert tuple(theirs.visual.image_mean) == model.config.image_mean
    image, text = inputs(model.config.vision_cfg.image_size, torch.float32)
    for got, expected in zip(model(image, text).values(), theirs(image, text), strict=True):
        assert_close(got, expected, rtol=1e-5, atol=1e-5)
    same_weights(dict(read_checkpoint(folder).weights), model.state_dict())


@pytest.mark.filterwarnings("ignore")  # another library's
def test_a_hugging_face_model_reaches_open_clip(transformers, open_clip, tmp_path):
    theirs = hf_clip(transformers).float()
    theirs.save_pretrained(tmp_path / "hf")
    write_checkpoint(read_checkpoint(tmp_path / "hf"), tmp_path / "open_clip", "open_clip")
    loaded, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'open_clip'}")
    image, text = inputs(dtype=torch.float32)
    expected = theirs(input_ids=text, pixel_values=image)
    image_features, text_features, scale = loaded(image, text)
    assert_close(image_features, expected.image_embeds, rtol=1e-4, atol=1e-5)
    assert_close(text_features, expected.text_embeds, rtol=1e-4, atol=1e-5)
    assert_close(scale, theirs.logit_scale.exp(), rtol=1e-6, atol=0)


def test_what_the_other_library_cannot_build_is_refused(tmp_path):
    model = ours(RESNET)
    source = read_checkpoint(open_clip_folder(model, tmp_path / "ours"))
    with pytest.raises(DataError, match=r"^to hf: transformers' CLIPModel has no place for: a ResNet$"):
        write_checkpoint(source, tmp_path / "hf", "hf")
    source = read_checkpoint(open_clip_folder(ours(SIGLIP), tmp_path / "siglip"), ClipConfig.from_dict(SIGLIP))
    with pytest.raises(DataError, match=r"^to open_clip: .* timm has none for image_size 32, .*activation gelu_tanh$"):
        write_checkpoint(source, tmp_path / "open_clip", "open_clip")
    base = replace(load_config("ViT-B-16-SigLIP"), vision_cfg=replace(BASE, act_kwargs={"approximate": "tanh"}))
    with pytest.raises(DataError, match=r"activation gelu_tanh; vit_base_patch16_siglip_224 has gelu: name that"):
        write_checkpoint(replace(source, config=base), tmp_path / "open_clip", "open_clip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "siglip"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    source = read_checkpoint(open_clip_folder(ours(CLIP), tmp_path / "ours"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(DataError, match=r"full: is not an empty folder; nothing is overwritten"):
        write_checkpoint(source, tmp_path / "full", "hf")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes"]

    (tmp_path / "empty").mkdir()
    write_checkpoint(source, tmp_path / "empty", "hf")
    assert (tmp_path / "empty" / "model.safetensors").is_file()

    def fails(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(source, tmp_path / "late", "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "ours"]


def test_tokenizer_files_come_along(tmp_path):
    folder = open_clip_folder(ours(CLIP), tmp_path / "ours")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("not copied")
    for to, config in (("hf", "config.json"), ("open_clip", "open_clip_config.json")):
        written = write_checkpoint(
            read_checkpoint(folder), tmp_path / to, to, extra={"tokenizer_config.json": {"a": 1}}
        )
        assert {"tokenizer.json", "tokenizer_config.json", config} < {path.name for path in written.iterdir()}
        assert not (written / "README.md").exists()
    said = json.loads((tmp_path / "open_clip" / "open_clip_config.json").read_text())
    assert said["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "open_clip"  # else open_clip takes OpenAI's


@pytest.mark.filterwarnings("ignore")  # another library's
@pytest.mark.parametrize("image_size", [48, 16, [40, 24]], ids=str)
def test_another_image_size_is_open_clips(open_clip, image_size, tmp_path):
    folder = open_clip_folder(ours(CLIP), tmp_path / "ours")
    theirs = open_clip.create_model(f"local-dir:{folder}", force_image_size=image_size).eval()
    size = tuple(image_size) if isinstance(image_size, list) else image_size
    model = load_clip(folder, image_size=size)
    height, width = model.config.vision_cfg.image_hw
    image = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    assert_close(model.encode_image(image), theirs.encode_image(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [CLIP, RESNET, SIGLIP], ids=["clip", "resnet", "siglip"])
def test_another_image_size_keeps_what_it_can(config, tmp_path):
    model = ours(config)
    folder = open_clip_folder(model, tmp_path / "ours")
    larger = load_clip(folder, image_size=96)
    assert larger.encode_image(torch.zeros(1, 3, 96, 96)).shape == (1, config["embed_dim"])
    same = load_clip(folder, image_size=model.config.vision_cfg.image_size)
    same_weights(same.state_dict(), model.state_dict())
    different = {name for name, p in larger.state_dict().items() if p.shape != model.state_dict()[name].shape}
    assert different == {"visual.attnpool.positional_embedding" if config is RESNET else "visual.positional_embedding"}


# Bare files.


@pytest.mark.parametrize("config", [CLIP, RESNET], ids=["vit", "resnet"])
def test_openais_files_need_no_config(config, tmp_path):
    config = {**config, "text_cfg": {**config["text_cfg"], "width": 128, "heads": 2}}
    config["vision_cfg"] = {**config["vision_cfg"], **({"width": 128, "head_width": 64} if config["embed_dim"] else {})}
    if isinstance(config["vision_cfg"]["layers"], list):
        config["vision_cfg"] = RESNET["vision_cfg"]
    model = ours(config).half()
    marks = {"input_resolution": 32, "context_length": LENGTH, "vocab_size": 64}
    torch.save(
        {**model.state_dict(), **{name: torch.tensor(value) for name, value in marks.items()}}, tmp_path / "x.pt"
    )
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    assert checkpoint.source == "openai"
    assert checkpoint.config.quick_gelu
    assert checkpoint.config == replace(model.config, init_logit_scale=checkpoint.config.init_logit_scale)
    same_weights(dict(checkpoint.weights), model.state_dict())
    assert load_clip(tmp_path / "x.pt").text_projection.dtype == torch.float32
    with pytest.raises(DataError, match=r"another model: quick_gelu is True in the checkpoint, False asked for$"):
        load_clip(tmp_path / "x.pt", replace(model.config, quick_gelu=False))


def test_a_bare_file_needs_a_config_for_its_activation(tmp_path):
    model = ours(CLIP)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(DataError, match=r"tensors do not say which activation they need.*ViT-B-32-quickgelu"):
        load_clip(tmp_path / "weights.safetensors")
    loaded = load_clip(tmp_path / "weights.safetensors", model.config)
    assert not loaded.training
    same_weights(loaded.state_dict(), model.state_dict())
    (tmp_path / "open_clip_config.json").write_text(json.dumps(model.config.to_dict()))
    same_weights(load_clip(tmp_path / "weights.safetensors").state_dict(), model.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappings_of_training_come_off(prefix, tmp_path):
    model = ours(CLIP)
    torch.save({"state_dict": {prefix + k: v for k, v in model.state_dict().items()}, "epoch": 1}, tmp_path / "x.pt")
    same_weights(load_clip(tmp_path / "x.pt", model.config).state_dict(), model.state_dict())


def test_scalars_of_one_dimension_and_old_buffers_load(tmp_path):
    model = ours(CLIP)
    state = model.state_dict() | {"attn_mask": torch.zeros(LENGTH, LENGTH)}
    state["logit_scale"] = state["logit_scale"].reshape(1)
    torch.save(state, tmp_path / "x.pt")
    loaded = load_clip(tmp_path / "x.pt", model.config)
    assert loaded.logit_scale.shape == ()
    assert torch.equal(loaded.logit_scale, model.logit_scale)


def test_a_run_of_vlmfast_train_is_a_checkpoint(tmp_path):
    model = ours(CLIP)
    step = tmp_path / "checkpoints" / "step_000007"
    step.mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("step_000007\n")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(model.config.to_dict()))
    save_file(model.state_dict(), step / "model.safetensors")
    checkpoint = read_checkpoint(tmp_path)
    assert (checkpoint.source, checkpoint.folder) == ("vlmfast", tmp_path)
    same_weights(dict(checkpoint.weights), model.state_dict())


@pytest.mark.filterwarnings("ignore")  # another library's
def test_shards_are_put_together(transformers, tmp_path):
    theirs = hf_clip(transformers).float()
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert not (tmp_path / "many" / "model.safetensors").exists()
    same_weights(load_clip(tmp_path / "many").state_dict(), load_clip(tmp_path / "one").state_dict())


# What is wrong is listed, and what could run code is not loaded.


@pytest.mark.parametrize("form", ["open_clip", "hf"])
def test_every_wrong_key_is_listed(form, tmp_path):
    source = read_checkpoint(open_clip_folder(ours(CLIP), tmp_path / "ours"))
    folder = write_checkpoint(source, tmp_path / form, form)
    path = next(folder.glob("*.safetensors"))
    state = load_file(path)
    names = sorted(name for name in state if "layer" in name or "resblocks" in name)[:3]
    for name in names:
        del state[name]
    wide = next(name for name in state if name.endswith("mlp.c_fc.weight") or name.endswith("mlp.fc1.weight"))
    shape = list(state[wide].shape)
    state[wide] = torch.zeros(shape[0], shape[1] + 1)
    state |= {"adapter.weight": torch.zeros(2), "adapter.bias": torch.zeros(2)}
    save_file(state, path)
    with pytest.raises(DataError) as error:
        load_clip(folder)
    message = str(error.value)
    assert str(path) in message
    assert f"3 missing: {', '.join(names)}" in message or all(name in message for name in names)
    assert "2 unknown: adapter.bias, adapter.weight" in message or "adapter.weight, adapter.bias" in message
    assert f"1 of another shape: {wide} is {[shape[0], shape[1] + 1]}, not {shape}" in message


def test_a_checkpoint_that_says_another_activation_is_refused(tmp_path):
    folder = open_clip_folder(ours(CLIP), tmp_path / "ours")
    other = {**CLIP, "quick_gelu": False, "text_cfg": {**CLIP["text_cfg"], "pool_type": "eos", "eos_id": 3}}
    with pytest.raises(DataError) as error:
        load_clip(folder, ClipConfig.from_dict(other))
    message = str(error.value)
    assert "quick_gelu is True in the checkpoint, False asked for" in message
    assert "text_cfg.pool_type is argmax in the checkpoint, eos asked for" in message
    assert load_clip(folder, ClipConfig.from_dict(CLIP)).config.quick_gelu


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize("wrap", [dict, lambda bomb: {"state_dict": bomb}], ids=["bare", "in a state dict"])
def test_a_file_that_holds_code_runs_none(wrap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bomb.pt", "bomb.bin"):
        torch.save(wrap({"x": Bomb()}), tmp_path / name)
        with pytest.raises(DataError, match=r"bomb\.\w+: holds more than tensors, and loading it could run code"):
            files.read_tensors(tmp_path / name)
    (tmp_path / "old.pt").write_bytes(pickle.dumps(wrap({"x": Bomb()}), protocol=2))
    with pytest.raises(DataError, match=r"old\.pt"):
        files.read_tensors(tmp_path / "old.pt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.filterwarnings("ignore")  # TorchScript is old
def test_torchscript_is_refused_with_the_way_out(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "jit.pt")
    with pytest.raises(DataError, match=r"jit\.pt: is a TorchScript archive, which holds code.*torch\.jit\.load"):
        load_clip(tmp_path / "jit.pt")


def test_other_bad_files_are_named(tmp_path):
    model = ours(CLIP)
    for name, content in (
        ("cut.safetensors", b"\x10\0\0\0\0\0\0\0{"),
        ("cut.pt", b"PK\x03\x04"),
        ("text.pt", b"hello"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            load_clip(tmp_path / name, model.config)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(DataError, match=r"list\.pt: is no state dict"):
        load_clip(tmp_path / "list.pt", model.config)
    with pytest.raises(DataError, match=r"absent\.pt: there is no such file or folder"):
        load_clip(tmp_path / "absent.pt", model.config)
    with pytest.raises(DataError, match=r"holds no checkpoint that is known here"):
        load_clip(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "blip-2"}')
    with pytest.raises(DataError, match=r"model_type 'blip-2' is not built here; built: clip, siglip, align"):
        load_clip(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": {"hidden_act": "relu"}}, r"hidden_act 'quick_gelu' of the text and 'relu' of the image"),
        ({"text_config": {"hidden_act": "gelu"}}, r"quick_gelu only in both"),
        ({"vision_config": {"num_channels": 1}}, r"images of 1 channels are not built here"),
        ({"model_type": "siglip", "vision_config": {"vision_use_head": False}}, r"without its attention pooling"),
    ],
)
def test_hugging_face_configs_that_are_not_built(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **changes}))
    with pytest.raises(DataError, match=message):
        load_clip(tmp_path)


@pytest.mark.filterwarnings("ignore")  # another library's
def test_an_old_files_second_section_wins_as_in_transformers(transformers, tmp_path):
    towers = sizes("gelu")
    old = {"model_type": "clip", "projection_dim": 24}
    old |= {name: {"hidden_act": "quick_gelu", "num_hidden_layers": 7} for name in towers}
    old |= {f"{name}_dict": tower for name, tower in towers.items()}
    (tmp_path / "config.json").write_text(json.dumps(old))
    theirs, found = transformers.CLIPConfig.from_pretrained(tmp_path), hf.read_config(tmp_path)
    for mine, tower in ((found.text_cfg, theirs.text_config), (found.vision_cfg, theirs.vision_config)):
        assert (mine.layers, mine.width) == (tower.num_hidden_layers, tower.hidden_size) == (2, tower.hidden_size)
        assert hf.ACTIVATIONS[tower.hidden_act] == found.activation(mine) == "gelu"


PROCESSORS = [
    ({}, "bicubic", "shortest"),
    ({"size": 32, "crop_size": 32}, "bicubic", "shortest"),
    ({"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 2}, "bilinear", "shortest"),
    ({"size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 3}, "bicubic", "squash"),
]


@pytest.mark.parametrize(("processor", "interpolation", "resize_mode"), PROCESSORS)
def test_preprocessing_is_the_folders(processor, interpolation, resize_mode, tmp_path):
    folder = write_checkpoint(read_checkpoint(open_clip_folder(ours(CLIP), tmp_path / "a")), tmp_path / "hf", "hf")
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, **statistics}))
    config = load_clip(folder).config
    assert (config.image_mean, config.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (config.interpolation, config.resize_mode) == (interpolation, resize_mode)
    (folder / "preprocessor_config.json").rename(folder / "was.json")
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {**processor, **statistics}}))
    assert load_clip(folder).config == config


@pytest.mark.parametrize(
    "processor",
    [
        {"size": {"shortest_edge": 40}},
        {"crop_size": 24},
        {"resample": 0},
        {"do_resize": False},
        {"do_center_crop": False},
    ],
)
def test_preprocessing_that_is_not_built_is_refused(processor, tmp_path):
    folder = write_checkpoint(read_checkpoint(open_clip_folder(ours(CLIP), tmp_path / "a")), tmp_path / "hf", "hf")
    path = Path(folder / "preprocessor_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **processor}))
    with pytest.raises(DataError, match=r"preprocessing is not built here, for images of 32 x 32"):
        load_clip(folder)


def test_a_hugging_face_name_is_downloaded(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed", exc_type=ImportError)
    folder = open_clip_folder(ours(CLIP), tmp_path / "snapshot")
    asked = []

    def snapshot_download(name, *, allow_patterns):
        asked.append((name, "*.safetensors" in allow_patterns, "*.bin" in allow_patterns))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert read_checkpoint("someone/clip").folder == folder
    assert asked == [("someone/clip", True, False)]

    def fails(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", fails)
    with pytest.raises(DataError, match=r"someone/clip: there is no such folder here, nor could it be .*no network"):
        load_clip("someone/clip")
    with pytest.raises(DataError, match=r"^/someone/clip: there is no such file or folder$"):
        load_clip("/someone/clip")
