"""`vlmfast embed`: every row is the model's, what cannot be read is counted, and a stopped run goes on."""

import json

import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_run import LENGTH, SIDE, encoded, model_and_tokenizer, picture, write_open_clip, write_run
from torch.testing import assert_close

from vlmfast import cli
from vlmfast.data.images import load_image
from vlmfast.data.tokenize import load_tokenizer
from vlmfast.eval.index import read_index
from vlmfast.models import load_clip
from vlmfast.recipes import embed

NAMES = ["blue.png", "green.png", "grey.png", "more/yellow.jpg", "red.png"]
CAPTIONS = ["a red thing", "a green thing", "a blue thing"]


def test_rows_are_the_models(vlmfast, run_folder, pictures, captions, tmp_path):
    out = tmp_path / "new" / "index.safetensors"
    done = vlmfast("embed", "--pretrained", run_folder, "--images", pictures, "--texts", captions, "--out", out)
    assert "5 images, 3 captions, 16 numbers each in float32" in done.out
    assert "images 5/5" in done.err
    index, model = read_index(out), load_clip(run_folder)
    assert (index.names, index.captions, index.root) == (NAMES, CAPTIONS, str(pictures.resolve()))
    pixels = torch.stack([load_image((pictures / name).read_bytes(), SIDE) for name in NAMES])
    with torch.no_grad():
        assert_close(index.images, F.normalize(model.encode_image(pixels), dim=1))
        assert_close(index.texts, F.normalize(model.encode_text(load_tokenizer(run_folder)(CAPTIONS)), dim=1))
    assert [path.name for path in out.parent.iterdir()] == [out.name]  # no parts, nothing half written


def test_the_file_is_plain_safetensors(vlmfast, run_folder, pictures, tmp_path):
    out = tmp_path / "index.safetensors"
    vlmfast("embed", "--pretrained", run_folder, "--images", pictures, "--out", out)
    tensors = load_file(out)
    assert {name: list(value.shape) for name, value in tensors.items() if value.dim() == 2} == {
        "images": [5, 16],
        "texts": [0, 16],
    }
    assert json.loads(tensors["image_names"].numpy().tobytes()) == NAMES


def test_what_cannot_be_read_is_counted(vlmfast, run_folder, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 600 * 300)
    (pictures / "bad.jpg").write_bytes(b"<html>")
    (pictures / "cut.png").write_bytes(encoded(picture(90))[:200])
    picture(90, (601, 300)).save(pictures / "huge.png")
    out = tmp_path / "index.safetensors"
    done = vlmfast("embed", "--pretrained", run_folder, "--images", pictures, "--out", out, "--batch-size", "3")
    assert read_index(out).names == NAMES
    assert "skipped 3: " in done.err
    for reason in ("1 not an image", "1 corrupt image", "1 too many pixels"):
        assert reason in done.err


def test_nothing_is_replaced_unasked(vlmfast, refused, run_folder, pictures, captions, tmp_path):
    out = tmp_path / "index.safetensors"
    flags = ["embed", "--pretrained", run_folder, "--out", out]
    vlmfast(*flags, "--images", pictures)
    before = out.read_bytes()
    assert "exists already" in refused(*flags, "--texts", captions)
    assert out.read_bytes() == before
    vlmfast(*flags, "--texts", captions, "--force")
    assert read_index(out).names == []
    assert read_index(out).captions == CAPTIONS


def test_float16_takes_half_and_moves_cosines_little(vlmfast, run_folder, pictures, tmp_path):
    rows = {}
    for dtype in ("float32", "float16"):
        out = tmp_path / f"{dtype}.safetensors"
        vlmfast("embed", "--pretrained", run_folder, "--images", pictures, "--out", out, "--dtype", dtype)
        rows[dtype] = read_index(out).images
    assert rows["float16"].dtype == torch.float16
    # A coordinate moves by 2^-11 of itself at most, so that a cosine with a unit vector moves by 2^-11.
    moved = (rows["float16"].float() - rows["float32"]) @ rows["float32"].T
    assert 0 < moved.abs().max() < 2**-11


def test_a_stopped_run_goes_on(vlmfast, run_folder, pictures, tmp_path, monkeypatch, capsys):
    (pictures / "bad.png").write_bytes(b"bad")  # in the part that is not read again
    whole, out = tmp_path / "whole.safetensors", tmp_path / "index.safetensors"
    flags = ["embed", "--images", str(pictures), "--batch-size", "2"]
    vlmfast(*flags, "--pretrained", run_folder, "--out", whole)
    embedded, at_once = [], embed._embed_part

    def part(pretrained, images, *more):
        if len(embedded) == 2:
            raise KeyboardInterrupt
        embedded.append(images.start)
        return at_once(pretrained, images, *more)

    monkeypatch.setattr(embed, "PART", 2)
    monkeypatch.setattr(embed, "_embed_part", part)
    assert cli.main([*flags, "--pretrained", str(run_folder), "--out", str(out)]) == 130
    assert not out.exists()
    embedded[:] = [""]
    done = vlmfast(*flags, "--pretrained", run_folder, "--out", out)
    assert embedded == ["", 4]
    assert "skipped 1 more in the run before" in done.err
    finished, expected = read_index(out), read_index(whole)
    assert finished.names == expected.names == NAMES
    assert torch.equal(finished.images, expected.images)
    before = out.read_bytes()

    embedded[:] = []
    assert cli.main([*flags, "--pretrained", str(run_folder), "--out", str(out), "--force"]) == 130
    embedded[:] = []
    other = write_run(tmp_path / "other", seed=4)
    assert cli.main([*flags, "--pretrained", str(other), "--out", str(out), "--force"]) == 130
    assert embedded == [0, 2]  # another model's parts are not taken
    assert out.read_bytes() == before  # and the file of before is still there
    capsys.readouterr()


def test_long_captions(vlmfast, refused, run_folder, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text("a red thing " * LENGTH)
    flags = ["embed", "--pretrained", run_folder, "--texts", long, "--out", tmp_path / "index.safetensors"]
    said = refused(*flags, "--long-captions", "refuse")
    assert f"context_length is {LENGTH}. Shorten it, or have it cut with --long-captions truncate" in said
    assert not (tmp_path / "index.safetensors").exists()
    vlmfast(*flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --images with a folder, --texts with a file, or both"),
        (["--images", "empty"], "no image under empty"),
        (["--images", "absent"], "absent is not a folder"),
        (["--images", "corrupt"], "not one image under corrupt could be read; skipped 1: 1 not an image"),
        (["--texts", "absent.txt"], "absent.txt: there is no such file"),
        (["--texts", "blank.txt"], "blank.txt: holds no caption"),
        (["--texts", "latin.txt"], "latin.txt: is not UTF-8"),
        (["--texts", "blank.txt", "--out", "index.npy"], "must end in .safetensors"),
        (["--images", "good", "--pretrained", "absent"], "absent: there is no such file or folder"),
        (["--images", "good", "--device", "toaster"], "--device toaster"),
        (["--images", "good", "--pretrained", "broken"], "embeddings that are not finite; its weights are broken"),
    ],
)
def test_bad_input_is_said(flags, message, refused, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "corrupt", "good"):
        (tmp_path / name).mkdir()
    (tmp_path / "corrupt" / "a.png").write_bytes(b"a")
    picture(9).save(tmp_path / "good" / "a.png")
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("une pêche".encode("latin-1"))
    if "broken" in flags:
        model, tokenizer = model_and_tokenizer()
        model.visual.proj.data[0, 0] = float("nan")
        write_open_clip(tmp_path / "broken", model, tokenizer)
    given = {
        "--pretrained": run_folder,
        "--out": "index.safetensors",
        **dict(zip(flags[::2], flags[1::2], strict=True)),
    }
    assert message in refused("embed", *(word for pair in given.items() for word in pair))
    assert not list(tmp_path.glob("*.safetensors"))


def test_an_unknown_flag_names_the_nearest(capsys):
    assert cli.main(["embed", "--pretrained", "x", "--out", "y", "--image", "z"]) == 2
    captured = capsys.readouterr()
    assert "--images" in captured.out + captured.err
