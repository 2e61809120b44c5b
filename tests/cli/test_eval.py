"""`vlmfast eval`: CLIP_benchmark's numbers, in CLIP_benchmark's files, of any checkpoint."""

import gzip
import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from small_run import COLOURS, SIDE, VISION, encoded, model_and_tokenizer, picture, write_open_clip

from vlmfast import cli
from vlmfast.data.batch import batches
from vlmfast.data.benchmark import read_benchmark
from vlmfast.data.digits import digits
from vlmfast.data.images import fit_image, load_image
from vlmfast.data.tokenize import CLIP_MERGES, _byte_letters, load_tokenizer, train_tokenizer
from vlmfast.eval.index import read_index
from vlmfast.models import config_names, load_clip, load_config
from vlmfast.recipes import eval
from vlmfast.recipes.pretrained import OPENAI_MERGES, ModelFlags, _name, find_tokenizer, open_pretrained

CLASSES = ["red_thing", "green thing", "blue thing", "grey thing", "grey thing"]  # names may come again: "missile"
TEMPLATES = ["a {c}", "the {c}.", "{c} & {c}"]
TEXTS = [["a red thing", "red"], ["a green thing"], ["a blue thing", "blue blue", "sky"], ["a grey thing", "grey"]]


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


@pytest.fixture
def images():
    """Files of 12 images, three of each colour, from which transformers and open_clip cut the same middle."""
    return [encoded(picture(colour, (40, SIDE), seed)) for seed in range(3) for colour in COLOURS.values()]


@pytest.fixture
def labels():
    return [place % 4 if place != 7 else 4 for place in range(12)]


@pytest.fixture
def classification(tmp_path, images, labels):
    """What clip_benchmark_export_wds writes of a classification, in two tars."""
    root = tmp_path / "colours"
    (root / "test").mkdir(parents=True)
    (root / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    (root / "test" / "nshards.txt").write_text("2\n")
    for number, rows in enumerate((range(7), range(7, 12))):
        members = {}
        for row in rows:
            members |= {f"s{row:07}.webp": images[row], f"s{row:07}.cls": str(labels[row]).encode()}
        write_tar(root / "test" / f"{number}.tar", members)
    return root


@pytest.fixture
def retrieval(tmp_path, images):
    """What clip_benchmark_export_wds writes of a retrieval: several captions an image, one a line."""
    root = tmp_path / "captioned"
    (root / "test").mkdir(parents=True)
    (root / "dataset_type.txt").write_text("retrieval\n")
    (root / "test" / "nshards.txt").write_text("1\n")
    members = {}
    for row in range(4):
        members |= {f"s{row:07}.png": images[row], f"s{row:07}.txt": "\n".join(TEXTS[row]).encode()}
    write_tar(root / "test" / "0.tar", members)
    return root


def embeddings(run_folder, images, texts):
    model, tokenizer = load_clip(run_folder), load_tokenizer(run_folder)
    pixels = torch.stack([load_image(data, SIDE) for data in images])
    with torch.no_grad():
        return model.encode_image(pixels, normalize=True), model.encode_text(tokenizer(texts), normalize=True)


def test_zero_shot_is_clip_benchmarks(vlmfast, run_folder, classification, images, labels, tmp_path):
    flags = ["--dataset-type", "webdataset", "--val-data", classification, "--batch-size", "5"]
    done = vlmfast("eval", "--pretrained", run_folder, *flags, "--output", tmp_path / "results")
    assert "images 12" in done.err
    [file] = (tmp_path / "results").iterdir()
    assert file.name == "colours_run_run_en_zeroshot_classification.json"
    result = json.loads(file.read_text())
    assert list(result) == ["dataset", "model", "pretrained", "task", "metrics", "language"]
    metrics = result.pop("metrics")
    assert result == {
        "dataset": "wds/colours",
        "model": "run",
        "pretrained": str(run_folder),
        "task": "zeroshot_classification",
        "language": "en",
    }
    # CLIP_benchmark's zero_shot_classifier and evaluate, stated anew.
    rows, prompts = embeddings(run_folder, images, [t.format(c=name) for name in CLASSES for t in TEMPLATES])
    means = prompts.view(len(CLASSES), len(TEMPLATES), -1).mean(1)
    logits, truth = rows @ F.normalize(means, dim=1).T, torch.tensor(labels)
    right = logits.argmax(1) == truth
    recalls = [right[truth == label].double().mean().item() for label in range(5)]
    assert metrics == pytest.approx(
        {"acc1": right.double().mean().item(), "acc5": 1.0, "mean_per_class_recall": np.mean(recalls)}
    )
    assert 0 < metrics["acc1"] < 1


def test_names_are_taken_as_they_stand(classification):
    prompts = read_benchmark(classification, "test").prompts
    assert prompts[0] == ["a red_thing", "the red_thing.", "red_thing & red_thing"]
    assert [prompt[0] for prompt in prompts[1:]] == ["a green thing", "a blue thing", "a grey thing", "a grey thing"]


def test_retrieval_is_clip_benchmarks(vlmfast, run_folder, retrieval, images, tmp_path):
    flags = ["--dataset-type", "webdataset", "--val-data", retrieval, "--output", tmp_path / "{task}.json", "--json"]
    printed = json.loads(vlmfast("eval", "--pretrained", run_folder, *flags, "--batch-size", "3").out)
    result = json.loads((tmp_path / "zeroshot_retrieval.json").read_text())
    assert printed["results"] == [result]
    owner = torch.tensor([row for row, texts in enumerate(TEXTS) for _ in texts])
    image, text = embeddings(run_folder, images[:4], [line for texts in TEXTS for line in texts])
    scores = text @ image.T  # CLIP_benchmark's recall, stated anew
    positive = owner[:, None] == torch.arange(4)

    def recall(scores, positive, k):
        best = scores.argsort(dim=1, descending=True)[:, :k]
        return positive.gather(1, best).any(1).float().mean().item()

    expected = {}
    for k in (1, 5, 10):
        expected[f"image_retrieval_recall@{k}"] = recall(scores, positive, k)
        expected[f"text_retrieval_recall@{k}"] = recall(scores.T, positive.T, k)
    assert result["metrics"] == pytest.approx(expected)
    assert result["task"] == "zeroshot_retrieval"
    assert 0 < expected["image_retrieval_recall@1"] < 1


def test_captions_in_a_csv_and_in_tars_score_alike(vlmfast, run_folder, retrieval, images, tmp_path):
    lines = ["filepath\ttitle"]
    for row, texts in enumerate(TEXTS):
        (tmp_path / f"{row}.png").write_bytes(images[row])
        lines += [f"{tmp_path / f'{row}.png'}\t{text}" for text in texts]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines))
    metrics = {}
    for kind, where in (("webdataset", retrieval), ("csv", tmp_path / "pairs.tsv")):
        flags = ["--dataset-type", kind, "--val-data", where, "--json"]
        metrics[kind] = json.loads(vlmfast("eval", "--pretrained", run_folder, *flags).out)["metrics"]
    assert metrics["csv"] == metrics["webdataset"]


def test_digits_are_enlarged_for_any_model(vlmfast, run_folder, tmp_path):
    out = tmp_path / "results"
    done = vlmfast(
        "eval", "--pretrained", run_folder, "--split", "val", "--output", out, "--json", "--dataset", "mnist/8"
    )
    printed = json.loads(done.out)
    names = [f"mnist_8_run_run_en_{task}.json" for task in ("zeroshot_classification", "zeroshot_retrieval")]
    assert sorted(path.name for path in out.iterdir()) == names
    assert printed["results"] == [json.loads((out / name).read_text()) for name in names]
    assert {result["dataset"] for result in printed["results"]} == {"mnist/8"}
    assert printed["results"][0]["metrics"]["acc1"] == printed["metrics"]["zero_shot/acc1"]
    scans, model, tokenizer = digits("val"), load_clip(run_folder), load_tokenizer(run_folder)
    grown = [
        np.asarray(fit_image(PIL.Image.fromarray(i.permute(1, 2, 0).numpy()), SIDE, "squash")) for i in scans.images
    ]
    names = (["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"], "0123456789")
    with torch.no_grad():
        image = model.encode_image(torch.from_numpy(np.stack(grown)).permute(0, 3, 1, 2), normalize=True)
        prompts = [t.format(n) for pair in zip(*names, strict=True) for t in scans.templates for n in pair]
        text = model.encode_text(tokenizer(prompts), normalize=True).view(10, -1, 16).mean(1)
    said = (image @ F.normalize(text, dim=1).T).argmax(1)
    assert printed["metrics"]["zero_shot/acc1"] == pytest.approx((said == scans.labels).double().mean().item())


def test_every_form_of_a_checkpoint_scores_the_same(vlmfast, run_folder, retrieval, tmp_path):
    model = load_clip(run_folder)
    for form in ("hf", "open_clip"):
        vlmfast("convert", "--pretrained", run_folder, "--to", form, "--out", tmp_path / form)
    bare = tmp_path / "epoch_3.pt"
    torch.save({"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, bare)
    forms = [[run_folder], [run_folder / "checkpoints" / "step_000002"], [tmp_path / "hf"], [tmp_path / "open_clip"]]
    forms += [[bare, "--model", run_folder / "open_clip_config.json", "--tokenizer", run_folder]]
    data = ["--dataset-type", "webdataset", "--val-data", retrieval, "--json"]
    printed = [json.loads(vlmfast("eval", "--pretrained", *form, *data).out) for form in forms]
    assert all(each["metrics"] == printed[0]["metrics"] for each in printed)
    assert [each["model"] for each in printed] == ["run", "run", "hf", "open_clip", "epoch_3"]
    assert {open_pretrained(ModelFlags(pretrained=str(form[0]))).digest() for form in forms[:4]} == {
        open_pretrained(ModelFlags(pretrained=str(run_folder))).digest()
    }


@pytest.mark.parametrize(
    ("config", "prepared"),
    [
        ({}, ("crop", "bicubic")),
        ({"resize_mode": "squash"}, ("squash", "bicubic")),
        ({"interpolation": "bilinear"}, ("crop", "bilinear")),
    ],
)
def test_images_are_prepared_as_the_checkpoint_says(config, prepared, vlmfast, tmp_path):
    model, tokenizer = model_and_tokenizer()
    folder = write_open_clip(tmp_path / "model", model, tokenizer)
    whole = model.config.to_dict()
    whole["preprocess_cfg"] |= config | {"mean": [0.5, 0.4, 0.3]}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    found = open_pretrained(ModelFlags(pretrained=str(folder)))
    assert (found.fit, found.interpolation) == prepared
    assert found.model.config.image_mean == (0.5, 0.4, 0.3)
    vlmfast("convert", "--pretrained", folder, "--to", "hf", "--out", tmp_path / "hf")
    found = open_pretrained(ModelFlags(pretrained=str(tmp_path / "hf")))
    # transformers halves an odd remainder downwards, open_clip to the nearest even number.
    assert (found.fit, found.interpolation) == ("crop_floor" if prepared[0] == "crop" else "squash", prepared[1])


@pytest.fixture
def wide(tmp_path):
    """A folder, a CSV file and a tar with a picture whose middle and whole differ."""
    image = picture((200, 30, 30), (91, 30))
    image.paste((0, 0, 255), (0, 0, 30, 30))
    (tmp_path / "pairs").mkdir()
    path = tmp_path / "pairs" / "a.png"
    image.save(path)
    path.with_suffix(".txt").write_text("a thing")
    (tmp_path / "pairs.tsv").write_text(f"filepath\ttitle\n{path}\ta thing\n")
    write_tar(tmp_path / "pairs.tar", {"a.png": path.read_bytes(), "a.txt": b"a thing"})
    return path


@pytest.mark.parametrize("kind", ["folder", "csv", "webdataset"])
@pytest.mark.parametrize("how", [("crop_floor", "bilinear"), ("squash", "bicubic")])
def test_every_reader_prepares_images_so(kind, how, run_folder, wide, tmp_path):
    where = tmp_path / {"folder": "pairs", "csv": "pairs.tsv", "webdataset": "pairs.tar"}[kind]
    config = eval.Config(pretrained=str(run_folder), dataset_type=kind, val_data=str(where), split="train")
    model = replace(open_pretrained(config), fit=how[0], interpolation=how[1])
    [batch] = batches(eval.open_data(config, model), load_tokenizer(run_folder), 9, seed=0, shuffle=False, epochs=1)
    assert torch.equal(batch.image[0], load_image(wide.read_bytes(), SIDE, how[0], interpolation=how[1]))


def test_embed_prepares_images_so(vlmfast, wide, tmp_path):
    rows = {}
    for mode in ("shortest", "squash"):
        model, tokenizer = model_and_tokenizer()
        folder = write_open_clip(tmp_path / mode, model, tokenizer)
        whole = model.config.to_dict()
        whole["preprocess_cfg"]["resize_mode"] = mode
        (folder / "open_clip_config.json").write_text(json.dumps(whole))
        out = tmp_path / f"{mode}.safetensors"
        vlmfast("embed", "--pretrained", folder, "--images", tmp_path / "pairs", "--out", out)
        rows[mode] = read_index(out).images
    assert (rows["shortest"] - rows["squash"]).abs().max() > 0.01


@pytest.mark.parametrize("vision", [VISION, {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": 8}])
def test_half_precision_on_disk_is_float32_in_use(vision, tmp_path):
    model, tokenizer = model_and_tokenizer(vision_cfg=vision)
    folder = write_open_clip(tmp_path / "half", model.half(), tokenizer)
    found, expected = open_pretrained(ModelFlags(pretrained=str(folder))), load_clip(folder)
    assert not found.model.training
    weights = found.model.state_dict()
    assert {name: value.dtype for name, value in weights.items()} == {
        name: value.dtype for name, value in expected.state_dict().items()
    }
    assert all(torch.equal(value, weights[name]) for name, value in expected.state_dict().items())


def test_a_released_model_is_called_by_its_name():
    assert {name: _name(load_config(name)) for name in config_names()} == {name: name for name in config_names()}
    assert _name(model_and_tokenizer()[0].config) is None


def test_openais_vocabulary_is_found_in_open_clips_package(vlmfast, tmp_path, monkeypatch):
    package = tmp_path / "site" / "open_clip"
    package.mkdir(parents=True)
    letters = _byte_letters()
    pairs = [(a, b) for a in letters for b in letters][:CLIP_MERGES]
    merges = "\n".join(["# version", *(f"{a} {b}" for a, b in pairs)])
    (package / "__init__.py").write_text("raise ImportError('not to be imported')")
    (package / OPENAI_MERGES).write_bytes(gzip.compress(merges.encode()))
    with pytest.raises(ValueError, match="name the model's tokenizer with --tokenizer"):
        find_tokenizer("", tmp_path, 49407, 77)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert find_tokenizer("", tmp_path, 49408, 77).vocab_size == 49408


BAD_OUTPUT = (
    "--output {nothing}.json: knows dataset, language, model, pretrained, pretrained_full_path, task; got nothing"
)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "{nothing}.json"], BAD_OUTPUT),
        (["--output", "{task.json"], "--output {task.json: "),
        (["--output", "one.json"], "2 tasks would be written to one file; put {task} in it"),
        (["--dataset-type", "csv"], "needs --val-data with a path"),
        (["--dataset-type", "webdataset"], "needs --val-data with a path"),
        (["--dataset-type", "webdataset", "--val-data", "."], "is a folder without test/nshards.txt"),
        (["--tokenizer", "absent.json"], "absent.json is not a file"),
        (["--tokenizer", "other"], "is another model's tokenizer: it has 280 ids"),
        (["--pretrained", "bare"], "holds no tokenizer.json; name the model's tokenizer with --tokenizer"),
        (["--model", "ViT-B-32"], "--model ViT-B-32: is for bare files of weights"),
        (["--pretrained", "wide"], "the readers make square images"),
        (["--pretrained", "weights.safetensors"], "tensors do not say which activation they need"),
        (["--pretrained", "empty"], "holds no checkpoint that is known here"),
    ],
)
def test_bad_input_is_said(flags, message, refused, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    model, tokenizer = model_and_tokenizer()
    (write_open_clip(tmp_path / "bare", model, tokenizer) / "tokenizer.json").unlink()
    write_open_clip(tmp_path / "wide", *model_and_tokenizer(vision_cfg={**VISION, "image_size": [16, 32]}))
    save_file(model.state_dict(), "weights.safetensors")
    train_tokenizer(["abcdefg hijklmn opqrst uvwxyz"] * 9, 280, 12).save(tmp_path / "other" / "tokenizer.json")
    given = flags if "--pretrained" in flags else ["--pretrained", run_folder, *flags]
    assert message in refused("eval", *given)
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "classnames.txt").unlink(), "classnames.txt: is missing"),
        (lambda root: (root / "classnames.txt").write_text("a\n\nb"), "classnames.txt: line 2 is empty"),
        (lambda root: (root / "classnames.txt").write_text("a\nb"), "labels must be in [0, 2)"),
        (
            lambda root: (root / "zeroshot_classification_templates.txt").write_text("a thing"),
            "has no place for the name",
        ),
        (lambda root: (root / "dataset_type.txt").write_text("multilabel"), "'multilabel' is not built here"),
        (lambda root: (root / "test" / "nshards.txt").write_text("x"), "must hold the number of tars; got 'x'"),
        (lambda root: (root / "test" / "1.tar").unlink(), "no such tar"),
        (
            lambda root: write_tar(root / "test" / "1.tar", {"a.png": encoded(picture(1)), "a.cls": b"x"}),
            "a label (.cls) must",
        ),
    ],
)
def test_a_benchmark_folder_that_is_not_whole(change, message, refused, run_folder, classification):
    change(classification)
    data = ["--dataset-type", "webdataset", "--val-data", classification]
    assert message in refused("eval", "--pretrained", run_folder, *data)


def test_an_unknown_flag_names_the_nearest(capsys):
    assert cli.main(["eval", "--pretrained", "x", "--outptu", "y"]) == 2
    assert "--output" in "".join(capsys.readouterr())
