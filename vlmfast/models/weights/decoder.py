"""Transformers' names and config.json, for GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfast.errors import DataError
from vlmfast.models.decoder import Decoder, DecoderConfig
from vlmfast.models.weights.files import read_json, read_weights, write_folder
from vlmfast.models.weights.table import Row, inward, module, outward, row

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh"}
ACTIVATIONS |= {"gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}  # theirs: ours

# What transformers takes where config.json is silent.
LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
QWEN2 = {
    **LLAMA,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
MISTRAL = {
    **LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
GPT2: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
DEFAULTS = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "gpt2": GPT2}
GPT2_KEYS = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer"}
GPT2_KEYS |= {"num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}  # may be called either

GPT2_SIZES = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"]
SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
SIZES += ["num_key_value_heads", "head_dim", "max_position_embeddings"]
NULLABLE = ("num_key_value_heads", "head_dim", "n_inner")

# Numbers that older versions saved and that follow from the config.
DERIVED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def load_decoder(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> Decoder:
    """The decoder of a folder that transformers or `save_decoder` wrote, in evaluation mode.

    Args:
        folder: of a GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM or Qwen2ForCausalLM: config.json, and the
            weights whole or in shards.
        device: where it goes.
        dtype: what its tensors become; None: what they are in the file.
    Raises:
        DataError: files are missing or not whole; a model that is not built here, with all that it would need;
            tensors missing, unknown or of another shape, all listed; a head of its own where config.json says tied.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = config_from_hf(read_json(path), str(path))
    weights, where = read_weights(folder)
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.load_state_dict(from_theirs(config, weights, str(where)), assign=True)
    return decoder.to(device=device, dtype=dtype).eval()


def save_decoder(decoder: Decoder, folder: str | Path, *, extra: Mapping[str, Any] | None = None) -> None:
    """Nothing; the folder then holds the decoder as transformers and `load_decoder` read it, bit for bit.

    Args:
        decoder: shaped like GPT-2, Llama or Qwen2.
        folder: must not exist, or be empty.
        extra: more entries of config.json, bos_token_id and eos_token_id for example, which are null without.
    Raises:
        DataError: transformers has no such model; every reason is listed. Or the folder is not empty.
    """
    content = {**config_to_hf(decoder.config), "dtype": str(decoder.head_weight.dtype).removeprefix("torch.")}
    tensors = to_theirs(decoder.config, decoder.state_dict())
    write_folder(Path(folder), {"model.safetensors": tensors}, {"config.json": {**content, **(extra or {})}}, {})


def config_from_hf(content: Mapping[str, Any], where: str) -> DecoderConfig:
    """The decoder that a config.json, or a text_config in one, describes.

    Args:
        content: its entries. Dropout is not built here and taken for 0.
        where: what errors call it.
    Raises:
        DataError: another kind of model, or one with parts that are not built here; all are listed. Or sizes that are
            no whole numbers.
    """
    kind = content.get("model_type")
    if kind not in DEFAULTS:
        raise DataError(f"{where}: model_type {kind!r} is not built here; built: {', '.join(DEFAULTS)}")
    given = {GPT2_KEYS.get(key, key) if kind == "gpt2" else key: value for key, value in content.items()}
    c = {**DEFAULTS[kind], **given}
    act = c["activation_function" if kind == "gpt2" else "hidden_act"]
    if wrong := [f"{key} {c[key]!r}" for key in _unbuilt(kind, c)]:
        raise DataError(f"{where}: not built here: {', '.join(wrong)}")
    names = GPT2_SIZES if kind == "gpt2" else SIZES
    sizes = {name: c[name] for name in names if c[name] is not None or name not in NULLABLE}
    if wrong := [f"{name} {size!r}" for name, size in sizes.items() if type(size) is not int or size < 1]:
        raise DataError(f"{where}: sizes must be whole numbers >= 1; got {', '.join(wrong)}")
    if kind == "gpt2":
        return DecoderConfig.gpt2(
            vocab_size=c["vocab_size"],
            width=c["n_embd"],
            layers=c["n_layer"],
            heads=c["n_head"],
            mlp_width=c["n_inner"] or 4 * c["n_embd"],
            context_length=c["n_positions"],
            eps=c["layer_norm_epsilon"],
            activation=ACTIVATIONS[act],
            tied=c["tie_word_embeddings"],
        )
    family = DecoderConfig.qwen2 if kind == "qwen2" else DecoderConfig.llama
    return family(
        vocab_size=c["vocab_size"],
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"] or c["num_attention_heads"],
        head_width=c["head_dim"] or c["hidden_size"] // c["num_attention_heads"],
        mlp_width=c["intermediate_size"],
        context_length=c["max_position_embeddings"],
        eps=c["rms_norm_eps"],
        activation=ACTIVATIONS[act],
        rope_theta=float(_rope(c).get("rope_theta", c.get("rope_theta", 10000.0))),
        tied=c["tie_word_embeddings"],
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """What config.json holds.

    Args:
        config: the decoder.
    Raises:
        DataError: transformers has no such model; every reason is listed.
    """
    gpt2 = config.norm == "layer"
    family = "GPT2LMHeadModel" if gpt2 else "Qwen2ForCausalLM" if config.qkv_bias else "LlamaForCausalLM"
    reasons = {
        f"positions {config.positions}": config.positions != ("learned" if gpt2 else "rope"),
        f"gated {config.gated}": config.gated == gpt2,
        f"bias {config.bias}, qkv_bias {config.qkv_bias}": config.bias != gpt2 or (gpt2 and not config.qkv_bias),
        f"kv_heads {config.kv_heads} for {config.heads} heads": gpt2 and config.kv_heads != config.heads,
        f"head_width {config.head_width} for {config.heads} heads of width {config.width}": (
            gpt2 and config.head_width * config.heads != config.width
        ),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise DataError(f"to hf: transformers' {family} with norm {config.norm} has no place for: {', '.join(found)}")
    act = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    shared = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tied, **ids}
    if gpt2:
        return {
            "architectures": [family],
            "model_type": "gpt2",
            **shared,
            "n_positions": config.context_length,
            "n_embd": config.width,
            "n_layer": config.layers,
            "n_head": config.heads,
            "n_inner": config.mlp_width,
            "activation_function": act,
            "layer_norm_epsilon": config.eps,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        }
    return {
        "architectures": [family],
        "model_type": "qwen2" if config.qkv_bias else "llama",
        **shared,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": act,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.eps,
        "rope_theta": config.rope_theta,  # for transformers 4, which reads nothing of the next line
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


def rows(config: DecoderConfig) -> list[Row]:
    """The table between our tensors and theirs, where GPT-2's c_attn is three, as `from_theirs` splits it.

    Args:
        config: a decoder that `config_to_hf` can describe.
    """
    gpt2 = config.norm == "layer"
    head = [] if config.tied else [row("lm_head.weight")]
    if gpt2:
        table = [row("embed_tokens.weight", "transformer.wte.weight")]
        table += [row("embed_positions.weight", "transformer.wpe.weight"), *module("norm", "transformer.ln_f")]
        for i in range(config.layers):
            table += _gpt2_block(f"layers.{i}", f"transformer.h.{i}")
        return table + head
    with torch.device("meta"):
        names = Decoder(config).state_dict()
    return [row(name, f"model.{name}") for name in names if name != "lm_head.weight"] + head


def from_theirs(config: DecoderConfig, weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Our tensors from theirs, bit for bit, once every name and shape is found right.

    Args:
        config: the decoder.
        weights: theirs, with or without the prefix that a model without a head leaves out.
        where: what errors call the checkpoint.
    Raises:
        DataError: tensors are missing, unknown or of another shape; all are listed. Or the head is not the embedding.
    """
    prefix, embedding = ("transformer.", "wte.weight") if config.norm == "layer" else ("model.", "embed_tokens.weight")
    theirs = {name: value for name, value in weights.items() if not name.endswith(DERIVED)}
    if not any(name.startswith(prefix) for name in theirs):
        theirs = {name if name == "lm_head.weight" else prefix + name: value for name, value in theirs.items()}
    if config.tied and "lm_head.weight" in theirs:
        head, table = theirs.pop("lm_head.weight"), theirs.get(prefix + embedding)
        if table is not None and not torch.equal(head, table):
            raise DataError(
                f"{where}: lm_head.weight is not {prefix}{embedding}, though config.json says tie_word_embeddings: "
                "say false there to keep both, or take lm_head.weight out of the file"
            )
    for name in [name for name in theirs if ".c_attn." in name and config.norm == "layer"]:
        parts = theirs.pop(name).chunk(3, -1)
        theirs |= {f"{name} ({letter})": part.clone() for letter, part in zip("qkv", parts, strict=False)}
    with torch.device("meta"):
        built = Decoder(config).state_dict()
    return {name: value.contiguous() for name, value in inward(theirs, rows(config), built, where).items()}


def to_theirs(config: DecoderConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors from ours, bit for bit.

    Args:
        config: the decoder.
        weights: its state dict.
    Returns: theirs, without a head where it is the embedding.
    """
    theirs = outward(weights, rows(config))
    for name in [name for name in theirs if name.endswith(" (q)")]:
        whole = name.removesuffix(" (q)")
        theirs[whole] = torch.cat([theirs.pop(f"{whole} ({letter})") for letter in "qkv"], -1)
    return theirs


def _gpt2_block(ours: str, theirs: str) -> list[Row]:
    table = module(f"{ours}.input_layernorm", f"{theirs}.ln_1")
    table += module(f"{ours}.post_attention_layernorm", f"{theirs}.ln_2")
    maps = {f"self_attn.{letter}_proj": ("attn.c_attn", f" ({letter})") for letter in "qkv"}
    maps |= {"self_attn.o_proj": ("attn.c_proj", ""), "mlp.c_fc": ("mlp.c_fc", ""), "mlp.c_proj": ("mlp.c_proj", "")}
    for mine, (their, part) in maps.items():
        table += [row(f"{ours}.{mine}.weight", f"{theirs}.{their}.weight{part}", form="transposed")]
        table += [row(f"{ours}.{mine}.bias", f"{theirs}.{their}.bias{part}")]
    return table


def _rope(c: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of rope, in transformers 5 under one name and before under another."""
    return c.get("rope_scaling") or c.get("rope_parameters") or {}


def _unbuilt(kind: str, c: Mapping[str, Any]) -> list[str]:
    """The entries of a config.json that ask for what is not built here."""
    inert: dict[str, tuple[Any, ...]] = {"quantization_config": (None,)}
    if kind == "gpt2":
        inert |= {"activation_function": tuple(ACTIVATIONS), "scale_attn_weights": (True,)}
        inert |= dict.fromkeys(("scale_attn_by_inverse_layer_idx", "add_cross_attention"), (False,))
    else:
        inert |= {"hidden_act": tuple(ACTIVATIONS), "partial_rotary_factor": (None, 1)}
        inert |= dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window"), (None, False))
    if kind == "mistral":
        inert["sliding_window"] = (None,)
    wrong = [key for key, values in inert.items() if key in c and c[key] not in values]
    if any(layer != "full_attention" for layer in c.get("layer_types") or ()):
        wrong.append("layer_types")
    if kind != "gpt2":
        rope = _rope(c)
        plain = (
            rope.get("rope_type", rope.get("type", "default")) == "default"
            and rope.get("partial_rotary_factor", 1) == 1
        )
        if not plain or any(isinstance(value, Mapping) for value in rope.values()):
            wrong.append("rope_scaling" if c.get("rope_scaling") else "rope_parameters")
    return wrong
