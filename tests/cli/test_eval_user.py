"""A new user's path: a folder of transformers, scored, embedded, searched, and handed to open_clip."""

import json
import string

import pytest
import torch
import torch.nn.functional as F
from small_run import SIDE
from torch.testing import assert_close

from vlmfast.data.images import load_image
from vlmfast.eval.index import read_index
from vlmfast.models import load_clip

LENGTH = 16
MERGES = [("t", "h"), ("th", "e</w>"), ("r", "e"), ("re", "d</w>"), ("b", "l")]


def lively(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.fixture
def hf_folder(transformers, tmp_path):
    """A CLIPModel with random weights, its own tokenizer and its image processor, as save_pretrained leaves them."""
    letters = [*string.ascii_lowercase, *string.digits, *".,!?'"]
    names = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, MERGES)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    V = len(names)
    towers = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = {"vocab_size": V, "max_position_embeddings": LENGTH, "bos_token_id": V - 2, "eos_token_id": V - 1}
    config = transformers.CLIPConfig(
        text_config={**towers, **text}, vision_config={**towers, "image_size": SIDE, "patch_size": 8}, projection_dim=24
    )
    folder = tmp_path / "hf"
    lively(transformers.CLIPModel(config)).save_pretrained(folder)
    vocabulary = {name: id for id, name in enumerate(names)}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=MERGES, model_max_length=LENGTH).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)
    return folder


CAPTIONS = ["a red thing", "a green thing", "a blue thing"]


@pytest.mark.filterwarnings("ignore")  # another library's
def test_eval_embed_search(transformers, hf_folder, vlmfast, pictures, captions, tmp_path):
    printed = json.loads(vlmfast("eval", "--pretrained", hf_folder, "--output", tmp_path / "results", "--json").out)
    assert (printed["model"], len(printed["results"])) == ("hf", 2)
    index = tmp_path / "index.safetensors"
    vlmfast("embed", "--pretrained", hf_folder, "--images", pictures, "--texts", captions, "--out", index)

    from PIL import Image

    theirs = transformers.CLIPModel.from_pretrained(hf_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_folder)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(hf_folder)  # torchvision's rounds otherwise
    rows = read_index(index)
    images = [Image.open(pictures / name).convert("RGB") for name in rows.names]
    text = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs(input_ids=text, pixel_values=processor(images, return_tensors="pt").pixel_values)
    # Their pixels are rounded to float32 after the mean, ours enter the patch embedding as integers.
    assert_close(rows.images, expected.image_embeds, rtol=1e-4, atol=1e-5)
    assert_close(rows.texts, expected.text_embeds, rtol=1e-4, atol=1e-5)

    sheet = tmp_path / "sheet.html"
    flags = ["--index", index, "--text", "a green thing", "--html", sheet, "--json"]
    [query] = json.loads(vlmfast("search", "--pretrained", hf_folder, *flags).out)["queries"]
    scores = expected.text_embeds[1] @ expected.image_embeds.T
    best = [rows.names[row] for row in scores.argsort(descending=True)]
    assert [hit["name"] for hit in query["found"]] == best
    assert sheet.read_text().count("<img") == 5


@pytest.mark.filterwarnings("ignore")  # another library's
def test_converted_for_open_clip(open_clip, hf_folder, vlmfast, pictures, tmp_path):
    folder = tmp_path / "converted"
    vlmfast("convert", "--pretrained", hf_folder, "--to", "open_clip", "--out", folder)
    theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    ours = load_clip(hf_folder)
    text = tokenizer(CAPTIONS)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (ours.config.image_mean, ours.config.image_std))
    pixels = load_image((pictures / "red.png").read_bytes(), SIDE)[None]
    with torch.no_grad():
        assert_close(ours.encode_text(text), theirs.encode_text(text), rtol=1e-5, atol=1e-5)
        seen = theirs.encode_image((pixels / 255 - mean) / std)
        assert_close(ours.encode_image(pixels), seen, rtol=1e-4, atol=1e-5)
    # Its own embeddings, where both libraries cut the same middle out of the picture.
    index = tmp_path / "index.safetensors"
    (pictures / "red.png").rename(pictures / "more" / "red.png")
    vlmfast("embed", "--pretrained", folder, "--images", pictures / "more", "--out", index)
    row = read_index(index).names.index("red.png")
    mine = read_index(index).images[row]
    vlmfast("embed", "--pretrained", hf_folder, "--images", pictures / "more", "--out", index, "--force")
    assert 0.9 < F.cosine_similarity(mine, read_index(index).images[row], dim=0) <= 1.0001


@pytest.mark.filterwarnings("ignore")  # another library's
def test_siglip_and_align(transformers, hf_folder, vlmfast, pictures, captions, tmp_path):
    towers = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    siglip = transformers.SiglipConfig(
        text_config={**towers, "vocab_size": 100, "max_position_embeddings": LENGTH, "projection_size": 32},
        vision_config={**towers, "image_size": SIDE, "patch_size": 8},
    )
    align = transformers.AlignConfig(
        text_config={**towers, "vocab_size": 100, "max_position_embeddings": 80},
        vision_config={"width_coefficient": 0.35, "depth_coefficient": 0.35, "image_size": 64, "hidden_dim": 112},
        projection_dim=112,
    )
    for name, model in (("siglip", transformers.SiglipModel(siglip)), ("align", transformers.AlignModel(align))):
        folder, index = tmp_path / name, tmp_path / f"{name}.safetensors"
        lively(model).save_pretrained(folder)
        flags = ["--pretrained", folder, "--tokenizer", hf_folder]
        vlmfast("embed", *flags, "--images", pictures, "--texts", captions, "--out", index)
        assert read_index(index).images.shape[0] == 5
        found = vlmfast("search", *flags, "--index", index, "--image", pictures / "red.png", "--json").out
        scores = {hit["name"]: hit["score"] for hit in json.loads(found)["queries"][0]["found"]}
        assert scores["red.png"] == pytest.approx(1, abs=1e-5)  # random weights tell pictures hardly apart
        assert "zero_shot/acc1" in json.loads(vlmfast("eval", *flags, "--json").out)["metrics"]
