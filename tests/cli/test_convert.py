"""`vlmfast convert` as a user runs it: from a run or another library's folder to one that the other library loads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from vlmfast import cli
from vlmfast.data.tokenize import load_tokenizer, train_tokenizer
from vlmfast.models import build_clip, load_clip, load_config

CAPTIONS = ["a photo of a one", "a photo of a two", "Handwritten &amp; three"]


@pytest.fixture
def run_folder(tmp_path):
    """What `vlmfast train` leaves, as far as it matters here."""
    folder = tmp_path / "run"
    tokenizer = train_tokenizer(CAPTIONS, 280, 16)
    config = load_config("digits").with_text(vocab_size=tokenizer.vocab_size, context_length=16)
    (folder / "checkpoints" / "step_000002").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("step_000002\n")
    (folder / "open_clip_config.json").write_text(json.dumps(config.to_dict()))
    tokenizer.save(folder / "tokenizer.json")
    save_file(build_clip(config, seed=3).state_dict(), folder / "checkpoints" / "step_000002" / "model.safetensors")
    return folder


def convert(source, to, out, *more):
    return cli.main(["convert", "--pretrained", str(source), "--to", to, "--out", str(out), *more])


@pytest.mark.filterwarnings("ignore")  # another library's
def test_a_run_reaches_transformers(transformers, run_folder, tmp_path, capsys):
    assert convert(run_folder, "hf", tmp_path / "hf") == 0
    assert "from vlmfast to hf" in capsys.readouterr().out
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "hf")
    ours = load_clip(run_folder)
    image = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    words = [text.lower() for text in CAPTIONS[:2]]
    text = tokenizer(words, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(text, load_tokenizer(run_folder)(words))
    pixels = processor(list(image.numpy()), return_tensors="pt").pixel_values
    expected = theirs(input_ids=text, pixel_values=pixels)
    assert_close(ours.encode_image(image, normalize=True), expected.image_embeds, rtol=1e-4, atol=1e-5)
    assert_close(ours.encode_text(text, normalize=True), expected.text_embeds, rtol=1e-4, atol=1e-5)


def test_there_and_back_is_bit_equal(run_folder, tmp_path):
    assert convert(run_folder, "hf", tmp_path / "hf") == 0
    assert convert(tmp_path / "hf", "open_clip", tmp_path / "back") == 0
    before = load_file(run_folder / "checkpoints" / "step_000002" / "model.safetensors")
    after = load_file(tmp_path / "back" / "open_clip_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(load_tokenizer(tmp_path / "back")(CAPTIONS), load_tokenizer(run_folder)(CAPTIONS))


@pytest.mark.filterwarnings("ignore")  # another library's
def test_a_run_reaches_open_clip(open_clip, run_folder, tmp_path):
    assert convert(run_folder, "open_clip", tmp_path / "open_clip") == 0
    theirs, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'open_clip'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'open_clip'}")
    text = tokenizer([text.lower() for text in CAPTIONS[:2]])
    assert torch.equal(text, load_tokenizer(run_folder)(CAPTIONS[:2]))
    ours = load_clip(tmp_path / "open_clip")
    assert_close(ours.encode_text(text), theirs.encode_text(text), rtol=1e-5, atol=1e-5)
    from PIL import Image

    pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8)
    expected = theirs.encode_image(preprocess(Image.fromarray(pixels.numpy()))[None])
    assert_close(ours.encode_image(pixels.permute(2, 0, 1)[None]), expected, rtol=1e-4, atol=1e-5)


def test_a_bare_file_needs_its_model(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("VLMFAST_DEBUG", raising=False)
    weights = tmp_path / "epoch_3.pt"
    torch.save(load_file(run_folder / "checkpoints" / "step_000002" / "model.safetensors"), weights)
    assert convert(weights, "hf", tmp_path / "hf") == 1
    assert "tensors do not say which activation they need" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    assert convert(weights, "hf", tmp_path / "hf", "--model", str(run_folder / "open_clip_config.json")) == 0
    assert "no tokenizer lies beside the checkpoint" in capsys.readouterr().out


def test_another_activation_is_named_knowingly(run_folder, tmp_path):
    assert convert(run_folder, "hf", tmp_path / "hf", "--activation", "gelu_tanh") == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["vision_config"]["hidden_act"] == config["text_config"]["hidden_act"] == "gelu_pytorch_tanh"
