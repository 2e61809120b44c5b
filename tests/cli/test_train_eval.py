"""`vlmfast train` and `vlmfast eval` on digits, scenes and CSV files, and what they say of bad input."""

import json

import pytest
import torch

from vlmfast import cli
from vlmfast.data.digits import digits
from vlmfast.recipes import train
from vlmfast.recipes.run_flags import FLAGS_FILE
from vlmfast.recipes.sources import DataFlags, Nudged, nudge, open_pairs
from vlmfast.train import read_metrics

# Steps of 32 pairs: enough to walk every path, too few to learn.
TINY = ["--batch-size", "32", "--warmup", "2", "--log-every-n-steps", "1", "--val-frequency", "0"]


def training(tmp_path, *more):
    return cli.main(["train", "--logs", str(tmp_path), "--name", "run", *TINY, *more])


def losses(tmp_path, name="run"):
    records = read_metrics(tmp_path / name / "metrics.jsonl")
    return {r["step"]: r["train/contrastive_loss"] for r in records if "train/contrastive_loss" in r}


@pytest.mark.slow
def test_train_resume_eval(tmp_path, capsys):
    assert training(tmp_path, "--steps", "4", "--lr-scheduler", "const", "--json", "--report-to", "tensorboard") == 0
    last = json.loads(capsys.readouterr().out)
    assert last["step"] == 4
    assert 0 <= last["val/zero_shot/acc1"] <= 1
    assert list((tmp_path / "run/tensorboard").iterdir())

    assert training(tmp_path, "--steps", "8", "--lr-scheduler", "const", "--resume", "latest") == 0
    whole = ["--steps", "8", "--lr-scheduler", "const"]
    assert cli.main(["train", "--logs", str(tmp_path), "--name", "whole", *TINY, *whole]) == 0
    assert losses(tmp_path) == losses(tmp_path, "whole")  # to the bit
    files = [tmp_path / "run" / name for name in (FLAGS_FILE, train.MODEL_FILE, "metrics.jsonl")]
    before = [file.read_bytes() for file in files]
    assert training(tmp_path, *whole, "--siglip", "--resume", "latest") == 1  # refused, and nothing is changed
    assert [file.read_bytes() for file in files] == before
    capsys.readouterr()

    assert cli.main(["eval", "--pretrained", str(tmp_path / "run"), "--json"]) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert cli.main(["eval", "--pretrained", str(tmp_path / "whole/checkpoints/step_000008"), "--json"]) == 0
    assert resumed["metrics"] == json.loads(capsys.readouterr().out)["metrics"]
    assert {"zero_shot/acc1", "retrieval/text_to_image_R@1"} <= set(resumed["metrics"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--siglip"],
        ["--positives", "in"],
        ["--positives", "pair"],
        ["--torchcompile", "--torchcompile-backend", "eager"],
    ],
    ids=" ".join,
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile imports
def test_every_loss_trains(tmp_path, flags):
    assert training(tmp_path, "--steps", "3", *flags) == 0
    assert all(value > 0 for value in losses(tmp_path).values())
    model = json.loads((tmp_path / "run/open_clip_config.json").read_text())["model_cfg"]
    assert ("init_logit_bias" in model) == ("--siglip" in flags)


@pytest.mark.slow
def test_exported_scenes_train_as_csv_and_as_tars(tmp_path, capsys, small_model):
    for split, size, format in (("train", "40", "csv"), ("val", "12", "csv"), ("train", "40", "webdataset")):
        where = str(tmp_path / f"{split}-{format}")
        what = ["--split", split, "--size", size, "--format", format, "--level", "L0"]
        assert cli.main(["data", "export", "--out", where, *what]) == 0
    train_data, val_data = (str(tmp_path / f"{split}-csv/pairs.csv") for split in ("train", "val"))
    data = ["--dataset-type", "csv", "--train-data", train_data, "--val-data", val_data, "--model", small_model]
    assert training(tmp_path, *data, "--steps", "3", "--batch-size", "8") == 0
    capsys.readouterr()
    flags = ["--dataset-type", "csv", "--val-data", val_data, "--json"]
    assert cli.main(["eval", "--pretrained", str(tmp_path / "run"), *flags]) == 0
    assert "retrieval/image_to_text_R@1" in json.loads(capsys.readouterr().out)["metrics"]

    tars = ["--dataset-type", "webdataset", "--train-data", str(tmp_path / "train-webdataset/00000.tar")]
    tars += ["--model", small_model, "--steps", "3", "--batch-size", "8", "--name", "tars"]
    sizes = tmp_path / "train-webdataset/sizes.json"
    sizes.rename(tmp_path / "sizes.json")
    assert training(tmp_path, *tars) == 1
    assert "--train-num-samples" in capsys.readouterr().err
    assert training(tmp_path, *tars, "--train-num-samples", "40") == 0
    (tmp_path / "sizes.json").rename(sizes)
    assert training(tmp_path, *tars, "--name", "counted") == 0


@pytest.mark.slow
def test_pieces_of_a_step_give_its_losses(tmp_path, capsys):
    for name, flags in {
        "whole": ["--batch-size", "32"],
        "accum": ["--batch-size", "8", "--accum-freq", "4"],
        "micro": ["--batch-size", "32", "--micro-batch-size", "12", "--grad-checkpointing", "--ema", "0.9"],
    }.items():
        assert training(tmp_path, "--steps", "3", *flags, "--name", name) == 0
    whole = list(losses(tmp_path, "whole").values())
    for name in ("accum", "micro"):
        assert list(losses(tmp_path, name).values()) == pytest.approx(whole, rel=1e-5)
        assert len(set(whole)) == 3
    folder = tmp_path / "micro/checkpoints/step_000003"
    assert (folder / "ema.safetensors").stat().st_size == (folder / "model.safetensors").stat().st_size
    capsys.readouterr()
    scores = []
    for flags in ([], ["--ema"]):
        assert cli.main(["eval", "--pretrained", str(tmp_path / "micro"), "--split", "val", "--json", *flags]) == 0
        scores.append(json.loads(capsys.readouterr().out)["metrics"])
    assert scores[0] != scores[1]
    assert cli.main(["eval", "--pretrained", str(tmp_path / "whole"), "--ema"]) == 1
    assert "holds no mean of the weights" in capsys.readouterr().err


@pytest.mark.slow
def test_scenes_train(tmp_path, small_model):
    scenes = ["--dataset-type", "scenes", "--train-data", "L0", "--train-num-samples", "64", "--val-num-samples", "16"]
    assert training(tmp_path, *scenes, "--model", small_model, "--steps", "3", "--json") == 0


@pytest.fixture
def small_model(tmp_path):
    """A config for images of 32 pixels, as the scenes of level L0 have."""
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 320, "width": 32, "heads": 2, "layers": 1}
    path = tmp_path / "small.json"
    path.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    return str(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--batch-size", "0"], "--batch-size, --accum-freq, --epochs and --steps must be at least 1"),
        (
            ["train", "--batch-size", "2000"],
            "--batch-size 2000: a step of 2000 pairs is more than the 1168 training samples",
        ),
        (["train", "--accum-freq", "2", "--micro-batch-size", "8"], "give one of them"),
        (["train", "--fsdp"], "FSDP needs ranks to share the model among; start the ranks with: torchrun"),
        (["train", "--fsdp-checkpoint", "sharded"], "--fsdp-checkpoint sharded needs --fsdp"),
        (["train", "--local-loss"], "--local-loss without --gather-with-grad is for --positives pair"),
        (["train", "--warmup", "900"], "--warmup 900 must be less than the run's 288 steps"),
        (["train", "--model", "digit"], "nearest: digits"),
        (["train", "--model", "ViT-B-32"], "the digits are 8 x 8 pixels and the model takes 224"),
        (["train", "--resume", "latest"], "--resume latest needs the --name"),
        (["train", "--dataset-type", "folder"], "needs --train-data"),
        (["train", "--dataset-type", "csv", "--train-data", "x", "--csv-separator", "ab"], "must be one character"),
        (["train", "--device", "toaster"], "--device toaster"),
        (["eval", "--pretrained", "nowhere", "--ema"], "--ema: is for runs of vlmfast train, and nowhere is none"),
        (["eval", "--pretrained", "nowhere"], "nowhere: there is no such file or folder"),
    ],
)
def test_bad_input_is_said(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("VLMFAST_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 1
    text = capsys.readouterr().err
    assert message in text
    assert text.count("\n") == 1
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_a_run_is_never_overwritten(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("VLMFAST_DEBUG", raising=False)
    flags = tmp_path / "run" / FLAGS_FILE
    flags.parent.mkdir()
    flags.write_text("{}")
    assert training(tmp_path, "--steps", "3") == 1
    assert "already holds a run; go on with it by --resume latest" in capsys.readouterr().err
    assert flags.read_text() == "{}"


def test_a_nudge_moves_the_image_and_brings_in_black():
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3)
    assert nudge(image, 0, 0).equal(image)
    assert nudge(image, 1, 0)[0].tolist() == [[0, 1, 2], [0, 4, 5], [0, 7, 8]]
    assert nudge(image, 0, -1)[0].tolist() == [[4, 5, 6], [7, 8, 9], [0, 0, 0]]


def test_some_training_scans_are_nudged_the_same_way_each_time():
    scans, nudged = digits("train"), open_pairs(DataFlags(), "", "train", 8)
    assert isinstance(nudged, Nudged)
    moved = [not nudged.draw(i, 0, 3).image.equal(scans.draw(i, 0, 3).image) for i in range(len(scans))]
    # 0.3 * 8/9 of the scans move: 311 of 1168 expected, standard deviation 15.
    assert 311 - 75 < sum(moved) < 311 + 75
    assert all(nudged.draw(i, 0, 3).image.equal(nudged.draw(i, 0, 3).image) for i in range(20))
    assert nudged.draw(5, 0, 3).text == scans.draw(5, 0, 3).text
