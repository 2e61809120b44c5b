"""The same weights in Hugging Face's CLIPModel give the same numbers. Skipped where `transformers` is not installed."""

import pytest
import torch
from torch.testing import assert_close

from vlmfast.models import ClipConfig, build_clip

EOT = 63


def to_hugging_face(state):
    """open_clip's names -> Hugging Face's; in_proj in three parts, projections transposed."""
    out = {}
    for name, value in state.items():
        tower, name = ("vision", name.removeprefix("visual.")) if name.startswith("visual.") else ("text", name)
        for ours, theirs in [
            ("transformer.resblocks", f"{tower}_model.encoder.layers"),
            ("conv1", "vision_model.embeddings.patch_embedding"),
            ("class_embedding", "vision_model.embeddings.class_embedding"),
            ("positional_embedding", f"{tower}_model.embeddings.position_embedding.weight"),
            ("token_embedding", "text_model.embeddings.token_embedding"),
            ("ln_pre", "vision_model.pre_layrnorm"),
            ("ln_post", "vision_model.post_layernorm"),
            ("ln_final", "text_model.final_layer_norm"),
            ("attn.", "self_attn."),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ]:
            name = name.replace(ours, theirs)
        if name in ("proj", "text_projection"):
            out["visual_projection.weight" if name == "proj" else "text_projection.weight"] = value.T
        elif "in_proj_" in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                out[name.replace("in_proj_", f"{part}_proj.")] = piece
        else:
            out[name] = value
    return out


@pytest.mark.filterwarnings("ignore")  # another library's
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_equals_clip_model(transformers, activation):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_act": activation}
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4}
    text |= {"max_position_embeddings": 16, "bos_token_id": 62, "eos_token_id": EOT, "pad_token_id": 0}
    vision = {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text | sizes, vision_config=vision | sizes, projection_dim=24)
    ).double()
    config = ClipConfig.from_dict(
        {
            "embed_dim": 24,
            "quick_gelu": activation == "quick_gelu",
            "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8},
            "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2},
        }
    )
    ours = build_clip(config, seed=0).double()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs.load_state_dict(to_hugging_face(ours.state_dict()), strict=True)

    image = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    tokens = torch.randint(1, 62, (4, 16))
    tokens[torch.arange(4), torch.tensor([3, 15, 7, 1])] = EOT
    hidden = {"vision": [], "text": []}
    for name, tower in (("vision", ours.visual.transformer), ("text", ours.transformer)):
        tower.resblocks[0].register_forward_pre_hook(lambda _m, args, name=name: hidden[name].append(args[0]))
        for block in tower.resblocks:
            block.register_forward_hook(lambda _m, _i, out, name=name: hidden[name].append(out))
    out = ours(image, tokens)
    expected = theirs(input_ids=tokens, pixel_values=image, output_hidden_states=True, return_loss=True)

    close = {"rtol": 1e-10, "atol": 1e-10}
    assert_close(out["image_features"], expected.image_embeds, **close)
    assert_close(out["text_features"], expected.text_embeds, **close)
    for name, states in (("vision", expected.vision_model_output), ("text", expected.text_model_output)):
        for got, state in zip(hidden[name], states.hidden_states, strict=True):
            assert_close(got, state, **close)
    logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
    assert_close(logits, expected.logits_per_image, **close)
    diagonal = torch.arange(4)
    loss = (
        torch.nn.functional.cross_entropy(logits, diagonal) + torch.nn.functional.cross_entropy(logits.T, diagonal)
    ) / 2
    assert_close(loss, expected.loss, **close)

    loss.backward()
    expected.loss.backward()
    gradients = to_hugging_face({name: p.grad for name, p in ours.named_parameters()})
    for name, p in theirs.named_parameters():
        # A key's bias moves all scores of a row alike: its gradient is rounding, and is compared with the tower's size.
        assert_close(gradients[name], p.grad, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
