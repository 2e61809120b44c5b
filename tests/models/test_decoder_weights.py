"""Folders of transformers' language models: read, written, and refused by name where something is not built here."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmfast.errors import DataError
from vlmfast.models.decoder import DecoderConfig, build_decoder
from vlmfast.models.weights.decoder import config_from_hf, config_to_hf, load_decoder, save_decoder

V = 61
SIZES = {"vocab_size": V, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 32}
NO_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
GPT2 = {"vocab_size": V, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}
MODELS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-own-head": ("GPT2", {**GPT2, "tie_word_embeddings": False, "n_inner": 40, "activation_function": "gelu"}),
    "llama": ("Llama", {**SIZES, "num_key_value_heads": 2, "head_dim": 10, "rms_norm_eps": 1e-5}),
    "llama-tied": (
        "Llama",
        {**SIZES, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "qwen2": ("Qwen2", {**SIZES, "num_key_value_heads": 1}),
    "qwen2-tied": ("Qwen2", {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**SIZES, "num_key_value_heads": 2, "sliding_window": None}),
}
pytestmark = pytest.mark.filterwarnings("ignore")  # another library's


@pytest.fixture(params=MODELS)
def theirs(request, transformers):
    torch.manual_seed(0)
    family, sizes = MODELS[request.param]
    config = getattr(transformers, f"{family}Config")(**sizes, **NO_IDS)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def logits(decoder, ids):
    with torch.no_grad():
        return decoder.logits(decoder(decoder.embed(ids)))


def written(tmp_path, config, name="ours"):
    """A folder with a decoder of ours, and its tensors and config.json, to be changed."""
    save_decoder(build_decoder(config, seed=0), tmp_path / name)
    return tmp_path / name


def edited(folder, change=None, tensors=None):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(change or {})}))
    if tensors is not None:
        save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    return folder


LLAMA = DecoderConfig.llama(vocab_size=V, width=24, layers=1, heads=4, context_length=32)
TIED = DecoderConfig.qwen2(vocab_size=V, width=24, layers=1, heads=4, context_length=32, tied=True)
SMALL_GPT2 = DecoderConfig.gpt2(vocab_size=V, width=24, layers=1, heads=4, context_length=32)


def test_their_folders_load_and_ours_load_there(theirs, transformers, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_decoder(tmp_path / "theirs")
    assert not ours.training
    ids = torch.randint(V, (2, 11))
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(logits(ours, ids), expected, rtol=1e-4, atol=1e-4)

    save_decoder(ours, tmp_path / "ours", extra={"eos_token_id": 3})
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert back.config.eos_token_id == 3
    for name, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(back.eval()(ids).logits, expected)

    again = load_decoder(tmp_path / "ours")
    assert again.config == ours.config
    for name, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_shards_and_torch_files_and_bare_names_load(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    theirs.save_pretrained(tmp_path / "bare")
    expected = load_decoder(tmp_path / "bare").state_dict()
    # As the first GPT-2 files were: without the prefix, with its causal masks, in torch's format.
    prefix = f"{theirs.base_model_prefix}."
    bare = {name.removeprefix(prefix): value for name, value in load_file(tmp_path / "bare/model.safetensors").items()}
    layers = "h" if prefix == "transformer." else "layers"
    bare |= {f"{layers}.0.attn.bias": torch.ones(1), f"{layers}.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    (tmp_path / "bare/model.safetensors").unlink()
    torch.save(bare, tmp_path / "bare/pytorch_model.bin")
    for folder in ("shards", "bare"):
        found = load_decoder(tmp_path / folder).state_dict()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def test_the_defaults_are_theirs(transformers):
    for family in ("GPT2", "Llama", "Qwen2", "Mistral"):
        config = getattr(transformers, f"{family}Config")(sliding_window=None)
        whole = json.loads(config.to_json_string(use_diff=False))
        kind = whole["model_type"]
        silent = {"model_type": kind, **({"sliding_window": None} if kind == "mistral" else {})}
        assert config_from_hf(silent, "here") == config_from_hf(whole, "here"), family


@pytest.mark.parametrize("config", [LLAMA, TIED, SMALL_GPT2], ids=["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bits_and_dtypes_survive(config, dtype, tmp_path):
    ours = build_decoder(config, seed=1).to(dtype)
    save_decoder(ours, tmp_path / "a")
    assert json.loads((tmp_path / "a/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    found = load_decoder(tmp_path / "a", dtype=None)
    assert found.config == config
    storages = set()
    for name, value in ours.state_dict().items():
        tensor = found.state_dict()[name]
        assert tensor.dtype == dtype, name
        assert torch.equal(tensor, value), name
        assert tensor.is_contiguous(), name
        storages.add(tensor.untyped_storage().data_ptr())
    assert len(storages) == len(ours.state_dict())  # nothing that would be trained or saved twice
    assert all(parameter.requires_grad for parameter in found.parameters())
    assert load_decoder(tmp_path / "a").head_weight.dtype == torch.float32


@pytest.mark.parametrize("config", [LLAMA, TIED, SMALL_GPT2], ids=["llama", "qwen2", "gpt2"])
def test_no_field_of_a_config_is_lost(config, transformers):
    unusual = {"eps": 0.25, "activation": "quick_gelu", "mlp_width": 17, "tied": not config.tied}
    unusual |= {"rope_theta": 77.0, "head_width": 10, "kv_heads": 2} if config.norm == "rms" else {}
    config = DecoderConfig.from_dict({**config.to_dict(), **unusual})
    content = config_to_hf(config)
    assert config_from_hf(content, "ours") == config
    theirs = transformers.AutoConfig.for_model(**content)
    assert config_from_hf(json.loads(theirs.to_json_string(use_diff=False)), "theirs") == config


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, 5e5),
        ({"rope_theta": 3.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({}, 1e4),
    ],
)
def test_rope_is_read_as_both_versions_write_it(rope, theta, transformers):
    content = {"model_type": "llama", **SIZES, **rope}
    assert config_from_hf(content, "here").rope_theta == theta
    assert transformers.LlamaConfig(**content).rope_parameters["rope_theta"] == theta


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"rope_scaling \{'rope_type': 'llama3'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling \{'type': 'linear'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, r"rope_parameters \{'rope_type': 'yarn'"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, r"rope_parameters \{'full_attention'"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, r"rope_parameters"),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5"),
        ("llama", {"attention_bias": True, "mlp_bias": True}, r"attention_bias True, mlp_bias True"),
        ("llama", {"hidden_act": "relu"}, r"hidden_act 'relu'"),
        ("llama", {"quantization_config": {"bits": 4}}, r"quantization_config \{'bits': 4\}"),
        ("qwen2", {"use_sliding_window": True}, r"use_sliding_window True"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types \['full_attention', 'sl"),
        ("mistral", {}, r"sliding_window 4096"),
        ("gpt2", {"scale_attn_weights": False}, r"scale_attn_weights False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx True"),
        ("gpt2", {"add_cross_attention": True}, r"add_cross_attention True"),
        ("gpt2", {"activation_function": "tanh"}, r"activation_function 'tanh'"),
    ],
)
def test_what_is_not_built_is_refused_by_name(kind, change, message):
    with pytest.raises(DataError, match=rf"here/config\.json: not built here: .*{message}"):
        config_from_hf({"model_type": kind, **change}, "here/config.json")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llama", {"hidden_size": "64"}, "hidden_size '64'"),
        ("llama", {"num_attention_heads": 0, "num_hidden_layers": 2.0}, "num_hidden_layers 2.0, num_attention_heads 0"),
        ("qwen2", {"num_key_value_heads": 0, "head_dim": -1}, "num_key_value_heads 0, head_dim -1"),
        ("mistral", {"vocab_size": None, "sliding_window": None}, "vocab_size None"),
        ("gpt2", {"n_inner": True, "hidden_size": [8]}, r"n_embd \[8\], n_inner True"),
    ],
)
def test_sizes_that_are_no_whole_numbers_are_named(kind, change, message):
    with pytest.raises(DataError, match=rf"here/config\.json: sizes must be whole numbers >= 1; got {message}$"):
        config_from_hf({"model_type": kind, **change}, "here/config.json")


def test_other_kinds_of_models_are_refused(tmp_path):
    folder = edited(written(tmp_path, LLAMA), {"model_type": "bert"})
    with pytest.raises(DataError, match=r"config\.json: model_type 'bert' is not built here; built: llama, mistral"):
        load_decoder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(DataError, match=r"config\.json: there is no such file"):
        load_decoder(folder)


def test_a_folder_without_weights_is_refused(tmp_path):
    folder = written(tmp_path, LLAMA)
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"holds no weights: neither model\.safetensors nor pytorch_model\.bin"):
        load_decoder(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(DataError, match=r"model\.safetensors\.index\.json: names no file: it must hold a weight_map"):
        load_decoder(folder)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (LLAMA, lambda t: {k: v for k, v in t.items() if "lm_head" not in k}, r"1 missing: lm_head\.weight"),
        (LLAMA, lambda t: {**t, "score.weight": torch.ones(1)}, r"1 unknown: score\.weight"),
        (LLAMA, lambda t: {**t, "model.layers.1.mlp.up_proj.weight": torch.ones(64, 24)}, r"1 unknown: .*layers\.1"),
        (LLAMA, lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": torch.ones(24)}, r"1 unknown: .*q_proj\.bias"),
        (LLAMA, lambda t: {**t, "model.norm.weight": torch.ones(25)}, r"model\.norm\.weight is \[25\], not \[24\]"),
        (TIED, lambda t: {k: v for k, v in t.items() if "k_proj.bias" not in k}, r"1 missing: .*k_proj\.bias"),
        (SMALL_GPT2, lambda t: {k: v for k, v in t.items() if "c_attn.b" not in k}, r"3 missing: .*c_attn\.bias \(q\)"),
        (SMALL_GPT2, lambda t: {**t, "transformer.h.0.attn.c_attn.weight": torch.ones(24, 73)}, r"c_attn\.weight \(q"),
        (SMALL_GPT2, lambda t: {**t, "transformer.h.0.crossattention.c_attn.bias": torch.ones(3)}, r"unknown: .*cross"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_listed(config, change, message, tmp_path):
    folder = edited(written(tmp_path, config), tensors=change)
    with pytest.raises(DataError, match=rf"do not fit the model that its config describes.*{message}"):
        load_decoder(folder)


def test_a_tied_head_may_lie_in_the_file_and_must_be_the_embedding(tmp_path):
    folder = written(tmp_path, TIED)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    expected = load_decoder(folder).state_dict()
    edited(folder, tensors=lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    for name, value in load_decoder(folder).state_dict().items():
        assert torch.equal(value, expected[name]), name
    edited(folder, tensors=lambda t: {**t, "lm_head.weight": t["lm_head.weight"] + 1})
    with pytest.raises(DataError, match=r"lm_head\.weight is not model\.embed_tokens\.weight, though .*say false"):
        load_decoder(folder)
    edited(folder, {"tie_word_embeddings": False})
    assert torch.equal(load_decoder(folder).head_weight, expected["embed_tokens.weight"] + 1)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"positions": "learned"}, r"LlamaForCausalLM with norm rms has no place for: positions learned"),
        ({"bias": True}, r"bias True, qkv_bias False"),
        ({"gated": False, "bias": True}, r"gated False, bias True"),
        ({"norm": "layer"}, r"GPT2LMHeadModel with norm layer has no place for: positions rope, gated True"),
    ],
)
def test_decoders_that_transformers_does_not_have_are_refused(parts, message, tmp_path):
    config = DecoderConfig.from_dict({**LLAMA.to_dict(), **parts})
    with pytest.raises(DataError, match=message):
        config_to_hf(config)
    with pytest.raises(DataError, match=message):
        save_decoder(build_decoder(config), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_nothing_is_overwritten(tmp_path):
    folder = written(tmp_path, LLAMA)
    with pytest.raises(DataError, match=r"is not an empty folder"):
        save_decoder(build_decoder(LLAMA), folder)
