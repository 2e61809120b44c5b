"""`vlmfast caption` and `vlmfast vqa`: answers, likelihoods, controls, and files that others read."""

import json
from dataclasses import replace

import PIL.Image
import pytest
import torch
from small_vlm import write_vlm

from vlmfast.data.conversation import Conversation, LlavaJson, Turn, VlmSample
from vlmfast.data.dialogue import supervise
from vlmfast.data.scenes import tasks
from vlmfast.errors import DataError
from vlmfast.eval.predictions import Prediction, read_predictions
from vlmfast.recipes import vlm_ask
from vlmfast.recipes.train_vlm import accuracies
from vlmfast.recipes.vlm_ask import AskFlags
from vlmfast.recipes.vlm_data import Items, VlmDataFlags, controlled, open_conversations
from vlmfast.recipes.vlm_predict import VlmFlags, answers, ask, likelihoods, open_talker, predict


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_vlm(tmp_path_factory.mktemp("vlm") / "run")


@pytest.fixture(scope="module")
def talker(folder):
    return open_talker(VlmFlags(model=folder, device="cpu"))


@pytest.fixture
def pictures(tmp_path):
    """Two scenes as files."""
    paths = []
    for i, sample in enumerate(tasks.dataset("L1", "test", "caption", 2).__getitems__([0, 1])):
        paths.append(tmp_path / f"{i}.png")
        PIL.Image.fromarray(sample.image[0].permute(1, 2, 0).numpy()).save(paths[-1])
    return paths


def questions(n=6, task="vqa"):
    return Items(open_conversations(VlmDataFlags(), "L1", task, "test", n, None), n)


def flat(parts):
    return [each for part in parts for each in part]


FLAGS = VlmFlags(max_new_tokens=6, batch_size=4)


def test_a_batch_of_questions_is_answered_as_each_alone(talker):
    items = questions()
    together = flat(predict(talker, items, FLAGS))
    alone = flat(predict(talker, items, replace(FLAGS, batch_size=1)))
    assert [each.prediction for each in together] == [each.prediction for each in alone]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.score == pytest.approx(theirs.score, rel=1e-4)
        assert 0 <= ours.score <= 1
    assert [each.id for each in together] == [f"vqa-{i}" for i in range(6)]
    truth = [items.dataset.truth(i) for i in range(6)]
    assert [each.references for each in together] == [(about["answer"],) for about in truth]
    assert [each.group for each in together] == [about["family"] for about in truth]
    generation = answers(talker, items.read([2]), FLAGS)[0]
    assert together[2].score == pytest.approx(float(generation.log_probs.sum().exp()), rel=1e-4)


def test_likelihoods_are_those_of_the_training_loss(talker):
    items = [item for item in questions(8).read(range(8)) if item.candidates]
    found = likelihoods(talker, items)
    for item, probs in list(zip(items, found, strict=True))[:3]:
        nlls = []
        for candidate in item.candidates:
            turns = (*item.conversation.turns, Turn("assistant", candidate))
            told = supervise(replace(item.conversation, turns=turns), "bare", talker.tokenizer, 16)
            ends = torch.tensor([0, len(told.ids)], dtype=torch.int32)
            nlls.append(talker.model(told.ids, item.image, told.labels, ends, reduction="sum").detach())
        exact = torch.stack(nlls).neg().double().softmax(0)
        assert list(probs) == list(item.candidates)
        torch.testing.assert_close(torch.tensor(list(probs.values())).double(), exact, rtol=1e-3, atol=1e-5)
        assert max(probs.values()) > 1.05 * min(probs.values()), "the candidates are told apart"


def test_a_ranked_answer_is_the_likeliest_candidate(talker):
    for each in flat(predict(talker, questions(), FLAGS, rank=True)):
        assert each.prediction == max(each.probs, key=each.probs.get)
        assert each.score == each.probs[each.prediction] == each.confidence
        assert sum(each.probs.values()) == pytest.approx(1)


@pytest.mark.parametrize("rank", [False, True])
def test_a_probability_that_is_no_number_is_named_by_its_item(folder, rank):
    broken = open_talker(VlmFlags(model=folder, device="cpu"))
    with torch.no_grad():
        broken.model.decoder.norm.weight.fill_(torch.nan)
    with pytest.raises(DataError, match="item 'vqa-0': the model gives its answer no probability but NaN"):
        flat(predict(broken, questions(2), FLAGS, rank=rank))


def test_controls_show_what_they_say(talker):
    items = questions(8, "caption")
    own, gray = items.read(range(8)), controlled(items, range(8), "blank")
    away = controlled(items, range(8), "shuffled")
    for item, blank, other in zip(own, gray, away, strict=True):
        assert blank.image.unique().tolist() == [128]
        assert not torch.equal(other.image, item.image)
        assert any(torch.equal(other.image, each.image) for each in own)
        for changed in (blank, other):
            assert replace(changed, image=item.image).conversation == item.conversation
            assert changed.references == item.references
    assert all(torch.equal(a.image, b.image) for a, b in zip(own, controlled(items, range(8), "none"), strict=True))
    scores = {
        control: {round(each.score, 9) for each in flat(predict(talker, items, FLAGS, control=control))}
        for control in ("none", "blank")
    }
    assert len(scores["blank"]) == 1, "one question without an image has one answer"
    assert len(scores["none"]) == 8, "images change the answer's probability"
    with pytest.raises(DataError, match="no item shows anything else"):
        controlled(questions(1), [0], "shuffled")


class Shown:
    """Items at hand."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, number):
        return self.items[number]

    def read(self, numbers):
        return [self.items[number] for number in numbers]


def test_shuffled_bears_text_alone_and_several_images():
    a, b, c, d = (item.image for item in (questions(4, "caption")[i] for i in range(4)))
    shown = [a, b[:0], torch.cat([a, b]), b, c, d]
    items = Shown([replace(questions(1)[0], id=str(i), image=image) for i, image in enumerate(shown)])
    for item, other in zip(items.items, controlled(items, range(6), "shuffled"), strict=True):
        assert other.image.shape == item.image.shape
        assert not any(torch.equal(x, y) for x in item.image for y in other.image)


def test_shuffled_looks_further_where_an_image_is_shown_again():
    # Two questions about each of three images: half the set away lies another image for some only.
    items = Shown([questions(3, "caption")[i] for i in (0, 1, 0, 0, 2, 0)])
    for item, other in zip(items.items, controlled(items, range(6), "shuffled"), strict=True):
        assert not torch.equal(item.image, other.image)


def test_scenes_are_captioned_and_written_for_the_scorers(vlmfast, tmp_path, folder):
    out = tmp_path / "captions.jsonl"
    words = ["--model", folder, "--level", "L1", "--n", "3", "--max-new-tokens", "5", "--device", "cpu"]
    said = vlmfast("caption", *words, "--num-beams", "2", "--out", out)
    assert "accuracy" in said.out
    assert "3 answers" in said.out
    found = read_predictions(out)
    assert [each.id for each in found] == ["caption-0", "caption-1", "caption-2"]
    assert all(len(each.references) > 1 for each in found)
    assert found[0].meta["control"] == "none"
    told = json.loads(vlmfast("vqa", *words, "--rank", "--control", "shuffled", "--json").out)
    assert len(told["predictions"]) == 3
    assert 0 <= told["scores"]["accuracy"] <= 1


def test_what_was_answered_before_a_run_was_stopped_is_there(tmp_path, folder, monkeypatch, capsys):
    def stopped(*arguments, **options):
        for number, batch in enumerate(predict(*arguments, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    out = tmp_path / "answers/out.jsonl"
    flags = AskFlags(images=(), model=folder, level="L1", n=5, batch_size=2, max_new_tokens=2, device="cpu", out=out)
    monkeypatch.setattr(vlm_ask, "predict", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            vlm_ask.run_ask(flags, "caption", "")
        assert len(read_predictions(tmp_path / "answers/out.jsonl.partial")) == 4
    assert not out.exists()
    monkeypatch.undo()
    capsys.readouterr()
    vlm_ask.run_ask(flags, "caption", "")
    assert f"{out}.partial.2: the answers of a run that was stopped" in capsys.readouterr().err
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "out.jsonl",
        "out.jsonl.partial.1",
        "out.jsonl.partial.2",
    ]
    assert len(read_predictions(out)) == 5
    assert read_predictions(tmp_path / "answers/out.jsonl.partial.2") == read_predictions(out)[:4]


def test_files_are_asked_about_one_by_one(vlmfast, folder, talker, pictures):
    words = ["--model", folder, "--max-new-tokens", "5", "--device", "cpu"]
    lines = vlmfast("caption", *pictures, *words).out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(path) for path in pictures]
    question = "What colour is it?"
    items = [ask([path], talker, question, ("red", "green")) for path in pictures]
    told = json.loads(
        vlmfast("vqa", *pictures, *words, "--question", question, "--candidates", "red, green", "--json").out
    )
    for each, probs in zip(told["predictions"], likelihoods(talker, items), strict=True):
        assert each["probs"] == pytest.approx(probs, rel=1e-4)
    picture = tasks.dataset("L1", "test", "caption", 1)[0].image
    assert torch.equal(items[0].image, picture), "an image of the model's size is shown as it is"


def test_files_of_one_name_in_two_folders_are_told_apart(vlmfast, tmp_path, folder, pictures):
    (tmp_path / "more").mkdir()
    other = pictures[1].rename(tmp_path / "more/0.png")
    out = tmp_path / "out.jsonl"
    words = ["--model", folder, "--max-new-tokens", "2", "--device", "cpu", "--out", out]
    vlmfast("caption", pictures[0], other, *words)
    assert [each.id for each in read_predictions(out)] == [str(pictures[0]), str(other)]


def test_a_file_of_questions_and_a_file_of_conversations(vlmfast, tmp_path, folder, pictures):
    lines = [{"question_id": 7, "image": "0.png", "text": "Is there a star?", "label": "yes", "category": "random"}]
    lines += [{"id": "b", "image": "1.png", "question": "<image>\nHow\u2028many?"}]
    path, out = tmp_path / "questions.jsonl", tmp_path / "out.jsonl"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8-sig")
    words = ["--model", folder, "--image-folder", tmp_path, "--max-new-tokens", "4", "--device", "cpu", "--out", out]
    vlmfast("vqa", "--questions", path, *words)
    found = read_predictions(out)
    assert [(each.id, each.references, each.group) for each in found] == [("7", ("yes",), "random"), ("b", (), None)]
    vlmfast("vqa", "--questions", path, *words, "--candidates", "yes,no")
    assert [set(each.probs) for each in read_predictions(out)] == [{"yes", "no"}] * 2

    turns = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "two"}]
    turns += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes"}]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": "s", "image": "0.png", "conversations": turns}]))
    vlmfast("vqa", "--data", data, *words)
    found = read_predictions(out)
    assert [(each.id, each.references, each.input["question"]) for each in found] == [
        ("s/0", ("two",), "How many?"),
        ("s/1", ("yes",), "Sure?"),
    ]
    vlmfast("vqa", "--data", data, *words, "--candidates", "two,yes")
    assert [set(each.probs) for each in read_predictions(out)] == [{"two", "yes"}] * 2
    asked = Items(LlavaJson(data, tmp_path, (64, 64)))[1].conversation
    assert [turn.text for turn in asked.turns] == ["<image>\nHow many?", "two", "Sure?"]


def test_refusals(refused, tmp_path, folder, pictures):
    model = ["--model", folder, "--device", "cpu"]
    assert "say what is asked about by one of" in refused("vqa", *model)
    assert "say what is asked about by one of" in refused("vqa", pictures[0], *model, "--level", "L1")
    assert "--question is for image files" in refused("vqa", "--level", "L1", *model, "--question", "Why?")
    assert "--prompt is for image files" in refused("caption", "--level", "L1", *model, "--prompt", "Say!")
    assert "--candidates is not for --level" in refused("vqa", "--level", "L1", *model, "--candidates", "yes,no")
    assert "--rank chooses among --candidates" in refused("vqa", "--data", "d.json", *model, "--rank")
    assert "must be at least 1; got 0 and 1" in refused("vqa", "--level", "L1", *model, "--batch-size", "0", "--n", "1")
    assert "must be at least 1; got 64 and 0" in refused("vqa", "--level", "L1", *model, "--n", "0")
    assert "named twice" in refused("caption", pictures[0], pictures[0], *model)
    assert "need a --question" in refused("vqa", pictures[0], *model)
    assert "--control is for questions with known answers" in refused(
        "caption", pictures[0], *model, "--control", "blank"
    )
    assert "there is no such image" in refused("caption", tmp_path / "none.png", *model)
    (tmp_path / "text.png").write_text("no image")
    assert "not an image" in refused("caption", tmp_path / "text.png", *model)
    assert "needs --model" in refused("caption", "--level", "L1")
    assert "config.json" in refused("caption", "--level", "L1", "--model", tmp_path / "none")
    assert "--template must be one of" in refused("caption", "--level", "L1", *model, "--template", "v9")
    (tmp_path / "q.jsonl").write_text('{"image": "0.png"}')
    said = refused("vqa", "--questions", tmp_path / "q.jsonl", "--image-folder", tmp_path, *model)
    assert "q.jsonl:1: must be an object" in said
    (tmp_path / "q.jsonl").write_text('{"id": 5, "image": "0.png", "text": "Why?"}\n' * 2)
    said = refused("vqa", "--questions", tmp_path / "q.jsonl", "--image-folder", tmp_path, *model)
    assert "several questions have the id '5'" in said
    long = "why " * 500
    assert "prompt longer than the context" in refused("vqa", pictures[0], *model, "--question", long)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    assert "has not come to its end" in refused("caption", "--level", "L1", "--model", tmp_path / "run")


def test_a_tokenizer_of_another_model_is_refused(refused, tmp_path, folder):
    other = write_vlm(tmp_path / "other")
    path = other / "model/config.json"
    config = json.loads(path.read_text())
    (other / "model/config.json").write_text(json.dumps({**config, "image_token_id": 9}))
    assert "they are not of one model" in refused("caption", "--level", "L1", "--model", other, "--device", "cpu")


def test_the_answer_ends_at_the_templates_mark(talker):
    v0 = replace(talker, template="v0")
    ids = torch.tensor(talker.tokenizer.encode(" two###Human: and").ids)
    assert v0.text(ids) == "two"
    assert talker.text(torch.tensor([*talker.tokenizer.encode(" two").ids, talker.tokenizer.eos_id])) == "two"


def test_accuracies_by_kind_and_group():
    def said(prediction, *references, **more):
        return Prediction(id="x", prediction=prediction, references=references, **more)

    found = [
        said("A red circle", "a red circle.", task="caption"),
        said("red circle a", "a red circle.", task="caption"),
        said("Two.", "two", task="vqa", group="count"),
        said("three", "two", task="vqa", group="count"),
        said("yes", "yes", task="vqa", group="exist"),
    ]
    assert accuracies(found) == {"accuracy": 0.6, "count": 0.5, "exist": 1.0}


def test_items_of_a_conversation_with_two_images():
    class Two:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            turns = [Turn("user", "<image>\nA?"), Turn("assistant", "a"), Turn("user", "<image>\nB?")]
            conversation = Conversation("c", ("1", "2"), (*turns, Turn("assistant", "b")))
            return VlmSample(conversation, torch.arange(2).view(2, 1, 1, 1).expand(2, 3, 4, 4).to(torch.uint8))

    first, second = Items(Two()).read([0, 1])
    assert (first.image.shape[0], first.conversation.images) == (1, ("1",))
    assert (second.image.shape[0], second.conversation.images) == (2, ("1", "2"))
