"""`vlmfast train --task`: what it trains, what it leaves, how it goes on, and what it refuses before it begins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from small_vlm import SHORT, SIZES

from vlmfast import cli
from vlmfast.data.batch import batches
from vlmfast.data.dialogue import Dialogues, pack, supervise
from vlmfast.errors import DataError
from vlmfast.models.weights.decoder import load_decoder
from vlmfast.models.weights.vlm import load_vlm
from vlmfast.recipes.vlm_data import (
    Pixels,
    TaskMix,
    VlmDataFlags,
    blank,
    open_conversations,
    task_weights,
    train_vocabulary,
    without_images,
)
from vlmfast.train import read_metrics

CLOCK = ("train/samples_per_second", "train/samples_per_second_per_gpu", "train/tokens_per_second")
CLOCK += ("train/data_time", "train/batch_time")


def lines(folder):
    """The lines of metrics.jsonl without what the clock says."""
    records = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in records]


def weights(folder, step):
    return load_file(folder / f"checkpoints/step_{step:06d}/model.safetensors")


@pytest.fixture
def train(tmp_path, vlmfast):
    """Trains a tiny model by a command line that must work, and gives its folder."""

    def run(name, *words, task="patch-lm", sizes=tuple(SIZES)):
        vlmfast("train", "--task", task, "--logs", tmp_path, "--name", name, *sizes, *SHORT, *words)
        return tmp_path / name

    return run


def test_a_run_leaves_a_model_that_others_can_ask(train, vlmfast):
    folder = train("eyes", "--steps", "3", "--vlm-task", "caption,vqa=3", "--prefix-lm", "--lr", "0.01")
    told = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in told if "train/text_loss" in line] == [1, 2, 3]
    assert told[-2]["train/text_loss"] < told[0]["train/text_loss"]
    assert told[0]["train/tokens_per_second"] > 16 * told[0]["train/samples_per_second"]
    assert {"val/caption/loss", "val/caption/accuracy", "val/vqa/loss", "val/vqa/accuracy"} <= told[-1].keys()
    model, trained = load_vlm(folder / "model"), weights(folder, 3)
    assert model.prefix_lm
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    assert json.loads((folder / "model/conversation.json").read_text()) == {"template": "bare"}
    assert json.loads((folder / "flags.json").read_text())["vlm_task"] == "caption,vqa=3"
    assert "4 answers" in vlmfast("vqa", "--model", folder, "--level", "L1", "--n", "4").out


@pytest.mark.parametrize("more", [(), ("--accum-freq", "2", "--batch-size", "2", "--ema", "0.5", "--workers", "1")])
def test_a_run_that_was_resumed_has_the_bits_of_one_that_was_not(train, more):
    flags = ["--lr-scheduler", "const", "--questions-per-image", "2", *more]
    straight = train("straight", "--steps", "4", *flags)
    resumed = train("resumed", "--steps", "2", *flags)
    train("resumed", "--steps", "4", "--resume", "latest", *flags)
    ours, theirs = weights(resumed, 4), weights(straight, 4)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    trains = [[line for line in lines(folder) if "train/text_loss" in line] for folder in (resumed, straight)]
    assert trains[0] == trains[1]
    final = load_file(resumed / "model/model.safetensors")  # not the model that it was before it went on
    expected = load_file(straight / "checkpoints/step_000004/ema.safetensors") if more else theirs
    assert all(torch.equal(final[name], value) for name, value in expected.items())


def test_pieces_of_a_step_are_the_step(train):
    whole = train("whole", "--steps", "3", "--vlm-task", "vqa")
    pieces = train("pieces", "--steps", "3", "--vlm-task", "vqa", "--micro-batch-size", "3")
    for ours, exact in zip(lines(pieces)[:3], lines(whole)[:3], strict=True):
        for key in ("train/text_loss", "train/grad_norm"):
            assert ours[key] == pytest.approx(exact[key], rel=1e-4)


def test_a_blind_model_sees_gray(train):
    """Two worlds whose texts are the same would train the same; here one world, gray or not, trains otherwise."""
    flags = ["--steps", "2", "--vlm-task", "caption"]
    seeing, blind = train("seeing", *flags), train("blind", "--blind", *flags)
    assert lines(blind)[0]["train/text_loss"] != lines(seeing)[0]["train/text_loss"]
    sample = open_conversations(VlmDataFlags(), "L1", "caption", "train", 4, None)[1]
    shown = blank(sample)
    assert shown.image.shape == sample.image.shape
    assert shown.image.unique().tolist() == [128]
    assert shown.conversation == sample.conversation


def test_amp_and_checkpointing_train(train):
    folder = train("amp", "--steps", "2", "--precision", "amp_bf16", "--grad-checkpointing", "--vlm-task", "vqa")
    plain = train("plain", "--steps", "2", "--vlm-task", "vqa")
    first = [lines(each)[0]["train/text_loss"] for each in (folder, plain)]
    assert first[0] == pytest.approx(first[1], rel=2**-6)  # bfloat16 has 8 bits
    assert first[0] != first[1]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a CLIP run."""
    logs = tmp_path_factory.mktemp("clip")
    config = {"embed_dim": 16, "vision_cfg": {"image_size": 64, "layers": 2, "width": 32, "head_width": 16}}
    config["vision_cfg"]["patch_size"] = 16
    config["text_cfg"] = {"context_length": 16, "vocab_size": 400, "width": 32, "heads": 2, "layers": 1}
    (logs / "small.json").write_text(json.dumps(config))
    words = ["--dataset-type", "scenes", "--train-data", "L1", "--model", logs / "small.json", "--logs", logs]
    words += ["--name", "clip", "--steps", "1", "--batch-size", "4", "--warmup", "0", "--train-num-samples", "8"]
    words += ["--val-num-samples", "4", "--device", "cpu"]
    assert cli.main(["train", *map(str, words)]) == 0
    return logs / "clip"


def test_llava_in_two_stages_from_a_language_model_trained_here(train, clip, tmp_path, transformers):
    lm = train("words", "--steps", "1", task="lm", sizes=SIZES[:8])
    flags = ["--vision-tower", clip, "--language-model", lm]
    one = train("one", "--stage", "1", "--steps", "2", *flags, task="llava", sizes=())
    parts = ("vision_tower", "multi_modal_projector", "decoder")

    def state(model, part):
        return list(getattr(model, part).state_dict().values())

    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    first, words = load_vlm(one / "model"), load_decoder(lm / "model")
    assert same(state(first, "decoder"), list(words.state_dict().values())), "stage 1 leaves the language model alone"
    flags = ["--template", "bare", "--lr", "0.01", "--vlm-task", "vqa"]
    rates = ["--projector-lr", "0.0", "--lr-scheduler", "const", "--steps", "2"]
    two = train("two", "--stage", "2", "--init-from", one, *flags, *rates, task="llava", sizes=())
    second = load_vlm(two / "model")
    assert [same(state(first, part), state(second, part)) for part in parts] == [True, True, False]
    assert {line["train/lr"] for line in lines(two)[:2]} == {0.01}
    whole = train("whole", "--init-from", one, *flags, "--steps", "1", "--train-parts", "tower", task="llava", sizes=())
    third = load_vlm(whole / "model")
    assert [same(state(first, part), state(third, part)) for part in parts] == [False, True, True]

    flags = [
        "--vision-tower",
        clip,
        "--language-model",
        "Lm-tiny",
        "--pretrain-projector",
        tmp_path / "one",
        "--steps",
        "1",
    ]
    fresh = ["--width", "32", "--layers", "1", "--heads", "2", "--context-length", "160", "--vlm-task", "caption"]
    taken = train("taken", *flags, *fresh, "--projector-lr", "0", "--template", "bare", task="llava", sizes=())
    assert same(state(first, "multi_modal_projector"), state(load_vlm(taken / "model"), "multi_modal_projector"))

    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(two / "model")
    assert theirs.config.text_config.vocab_size == second.decoder.config.vocab_size
    processor = transformers.AutoProcessor.from_pretrained(two / "model")
    image = PIL.Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    ids = processor(images=image, text="USER: <image>\nHow many? ASSISTANT:", return_tensors="pt")["input_ids"]
    assert int((ids == second.image_token_id).sum()) == second.image_tokens


@pytest.fixture
def dialogues(tmp_path):
    """A file of LLaVA's format with six conversations about six images; and its records."""
    folder = tmp_path / "images"
    folder.mkdir()
    records = []
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 30 + 10 * i, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": f"{i}"}]
        turns += [{"from": "human", "value": "Are you sure?"}, {"from": "gpt", "value": "Yes, I counted."}]
        records.append({"id": f"s{i}", "image": f"{i}.png", "conversations": turns})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return path, records


def llava(path, *more):
    return ["--dataset-type", "llava", "--train-data", path, "--image-folder", path.parent / "images", *more]


def test_a_file_of_conversations_trains(train, dialogues):
    path, _ = dialogues
    flags = ["--image-size", "32", "--image-aspect-ratio", "pad", "--batch-size", "2", "--epochs", "2"]
    folder = train("own", *llava(path, "--val-data", path), *flags)
    told = lines(folder)
    assert told[-1]["step"] == 6
    assert "val/held_out/loss" in told[-1]
    model = load_vlm(folder / "model")
    assert (model.image_hw, model.aspect) == ((32, 32), "pad")


def test_a_damaged_image_is_left_out_wherever_it_stands(train, dialogues):
    path, records = dialogues
    (path.parent / "images/broken.png").write_bytes(b"no image")
    path.write_text(json.dumps([{**records[0], "image": "broken.png"}, *records[1:]]))
    folder = train("damaged", *llava(path), "--image-size", "32", "--batch-size", "2", "--steps", "2")
    assert lines(folder)[-1]["step"] == 2


def test_a_conversation_with_an_error_stops_before_the_run_begins(tmp_path, refused, dialogues):
    path, records = dialogues
    command = ["train", "--task", "patch-lm", "--logs", tmp_path, "--name", "never", *SIZES, *SHORT, *llava(path)]

    def said(**change):
        path.write_text(json.dumps([*records[:3], {**records[3], **change}, *records[4:]]))
        message = refused(*command)
        assert not (tmp_path / "never").exists()
        return message

    turns = records[3]["conversations"]
    assert "unknown role" in said(conversations=[{**turns[0], "from": "robot"}, *turns[1:]])
    assert "sample 's3'" in said(conversations=[{**turns[0], "from": "robot"}, *turns[1:]])
    assert "no assistant turn" in said(conversations=turns[:1])
    assert "sample 's3'" in said(conversations=[{**turns[0], "value": "<image><image>How?"}, *turns[1:]])
    assert said(image="lost.png").endswith("sample 's3': there is no image " + str(tmp_path / "images/lost.png"))
    early = {"from": "gpt", "value": "Hello"}  # left out by itself, as LLaVA leaves it out
    path.write_text(json.dumps([{**records[0], "conversations": [early, *records[0]["conversations"]]}]))
    found = open_conversations(
        VlmDataFlags(dataset_type="llava", image_folder=tmp_path / "images"),
        str(path),
        "",
        "train",
        None,
        Pixels((16, 16), (0.5, 0.5, 0.5)),
    )
    assert len(found) == 1
    assert "is not a file" in refused(*command, "--train-data", tmp_path / "none.json")
    path.write_text(json.dumps(records))
    short = refused(*command, "--context-length", "20", "--steps", "2")
    assert "sample 's0'" in short
    assert "longer than max_tokens" in short
    (tmp_path / "val.json").write_text(json.dumps([{**record, "id": "v", "image": "broken.png"} for record in records]))
    (tmp_path / "images/broken.png").write_bytes(b"no image")
    assert "not an image" in refused(*command, "--val-data", tmp_path / "val.json", "--steps", "2")


def test_bad_records_are_left_out_where_that_is_wanted(vlmfast, refused, dialogues):
    path, records = dialogues
    bad = [{**record, "conversations": record["conversations"][:1]} for record in records[:2]]
    lost = [{**record, "image": "lost.png"} for record in records[2:4]]
    path.write_text(json.dumps([*bad, *lost, *records[4:]]))
    command = ["train", "--task", "patch-lm", "--logs", path.parent, *SIZES, *SHORT, *llava(path)]
    command += ["--image-size", "32", "--batch-size", "2", "--steps", "2", "--name", "whole"]
    assert "cannot use 2" in refused(*command)
    (path.parent / "val.json").write_text(json.dumps([*lost[:1], *records[4:]]))
    said = vlmfast(*command, "--skip-bad", "--val-data", path.parent / "val.json").err
    assert "skipped 1: 1 missing image, such as" in said
    assert lines(path.parent / "whole")[-1]["step"] == 2
    assert "skipped 4: 2 no assistant turn, such as" in said
    assert "2 missing image, such as" in said
    path.write_text(json.dumps(lost))
    assert "has no conversation whose images are there" in refused(*command, "--name", "none", "--skip-bad")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train-data", "L9"], "levels L0, L1, L2, L3; got 'L9'"),
        (["--vlm-task", "caption=no"], "weight of 'caption' must be a number > 0"),
        (["--vlm-task", "poetry"], "got 'poetry'"),
        (["--template", "v9"], "--template must be one of plain,"),
        (["--template", "chatml", "--vocab-size", "200"], "vocab-size 200"),
        (["--template", "plain", "--vlm-task", "caption,vqa"], "caption,vqa would be answers to nothing"),
        (["--vision-tower", "CLIP-tiny"], "--vision-tower is for --task llava"),
        (["--model", "PatchLm-huge"], "PatchLm-tiny, PatchLm-small"),
        (["--train-parts", "lm"], "are for --task llava"),
        (["--init-from", "x", "--width", "8"], "--init-from says what the model is"),
        (["--batch-size", "50"], "a step takes 50 conversations; there are 40"),
        (["--patch-size", "7"], "must be a multiple of patch_size 7"),
        (["--resume", "latest"], "needs the --name"),
        (["--families", "count", "--vlm-task", "caption"], "--families is for --vlm-task vqa; got caption"),
        (["--families", "count", "--dataset-type", "llava"], "--families is for --dataset-type scenes"),
    ],
)
def test_refusals(tmp_path, refused, words, message):
    assert message in refused("train", "--task", "patch-lm", "--logs", tmp_path, *SHORT, "--steps", "2", *words)
    assert not list(tmp_path.iterdir())


def test_a_llava_needs_its_parts(tmp_path, refused, clip):
    command = ["train", "--task", "llava", "--logs", tmp_path, *SHORT]
    assert "needs --vision-tower" in refused(*command)
    assert "needs --language-model" in refused(*command, "--vision-tower", clip)
    assert "config.json" in refused(*command, "--vision-tower", clip, "--language-model", tmp_path / "none")
    words = ["--vision-tower", clip, "--language-model", tmp_path, "--width", "8"]
    assert "is there already; leave out --width" in refused(*command, *words)
    assert "a llava's parts are" in refused(*command, "--model", "Lm-tiny")
    words = ["--vision-tower", clip, "--language-model", "Lm-tiny", "--train-parts", "eyes"]
    assert "the parts are tower, projector, lm" in refused(*command, *words)
    words = ["--vision-tower", clip, "--language-model", "Lm-tiny", "--tower-lr", "1e-5"]
    assert "--tower-lr: the tower is not trained; trained are lm, projector" in refused(*command, *words)


def test_a_mixture_of_tasks_draws_by_weight_and_for_good():
    weights = task_weights("caption=1, vqa=3")
    assert weights == {"caption": 1.0, "vqa": 3.0}
    mix = open_conversations(VlmDataFlags(questions_per_image=2), "L1", "caption=1, vqa=3", "train", 400, None)
    assert isinstance(mix, TaskMix)
    kinds = [sample.conversation.id.split("-")[0] for sample in mix.__getitems__(range(400))]
    assert 70 <= kinds.count("caption") <= 130  # three standard deviations of a binomial around 100
    for index in (0, 7, 200):
        assert mix[index].conversation == mix.__getitems__([3, index])[1].conversation
        assert mix.truth(index)["answer"] == mix[index].conversation.turns[1].text
    several = open_conversations(VlmDataFlags(), "L2", "vqa,pope-random", "train", None, None)
    assert [len(source) for source in several.sources] == [100_000] * 2  # POPE's own number is another
    with pytest.raises(DataError, match="sources must be of one length"):
        TaskMix([range(3), range(4)], [1, 1])
    alone = without_images(mix[0])
    assert alone.image.shape[0] == 0
    assert not any("<image>" in turn.text for turn in alone.conversation.turns)


@pytest.mark.slow
def test_two_ranks_train_as_one_process_with_both_their_conversations(tmp_path, train):
    common = [
        "--task",
        "patch-lm",
        "--logs",
        str(tmp_path),
        *SIZES,
        *SHORT,
        "--steps",
        "3",
        "--questions-per-image",
        "2",
    ]
    runs = {"ddp": [], "pieces": ["--micro-batch-size", "1"], "fsdp": ["--fsdp", "--fsdp-checkpoint", "sharded"]}
    words = [[*common, *flags, "--batch-size", "2", "--name", name] for name, flags in runs.items()]
    script = Path(__file__).with_name("train_on_ranks.py")
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, script, json.dumps(words)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    alone = train("alone", "--steps", "3", "--questions-per-image", "2")
    for name in runs:
        for ours, exact in zip(lines(tmp_path / name), lines(alone), strict=True):
            for key in set(ours) - {"step", "train/lr"}:
                assert ours[key] == pytest.approx(exact[key], rel=1e-4, abs=1e-6), f"{name}: {key}"
        ours, exact = (load_file(folder / "model/model.safetensors") for folder in (tmp_path / name, alone))
        for key, value in exact.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=2e-5)


def test_a_batch_of_scenes_is_read_in_one_call():
    """And is the same as one by one; what cannot be trained on has its row taken by another."""
    calls = []

    class Watched:
        def __init__(self, dataset):
            self.dataset = dataset

        def __len__(self):
            return len(self.dataset)

        def __getitem__(self, index):
            return self.dataset[index]

        def __getitems__(self, indices):
            calls.append(len(indices))
            return self.dataset.__getitems__(indices)

    scenes = open_conversations(VlmDataFlags(), "L1", "caption", "train", 64, None)
    tokenizer = train_vocabulary(scenes, "bare", 300)
    together = Dialogues(Watched(scenes), "bare", tokenizer, 16, 70)
    lengths = [len(supervise(scenes[i].conversation, "bare", tokenizer, 16).ids) for i in range(64)]
    assert 0 < sum(length > 70 for length in lengths) < 40
    batch = next(batches(together, None, 8, seed=1, collate=pack))
    assert calls == [8]
    assert len(batch) == 8
    for dialogue, index in zip(batch.split(1), batch.index.tolist(), strict=True):
        alone = together[index]
        assert torch.equal(dialogue.ids, alone.dialogue.ids)
        assert torch.equal(dialogue.image, alone.image)
