"""`vlmfast eval caption|vqa|pope|calibration`: what they print and write of files that people have."""

import json
import math
import random

import pytest

from vlmfast.errors import DataError
from vlmfast.eval.predictions import Prediction, write_predictions
from vlmfast.recipes import eval_calibration, eval_caption, eval_pope, eval_vqa


@pytest.fixture
def scored(tmp_path, capsys):
    """Runs a command on predictions, and gives its JSON, which must be the same on the screen and in the file."""

    def run(module, predictions, **flags):
        path = tmp_path / "preds.jsonl"
        write_predictions(path, predictions)
        module.run(module.Config(predictions=path, json=True, output=tmp_path / "out" / "scores.json", **flags))
        printed = capsys.readouterr().out
        assert (tmp_path / "out" / "scores.json").read_text(encoding="utf-8") == printed
        results = json.loads(printed, parse_constant=pytest.fail)
        assert results.pop("predictions") == str(path)
        assert results["items"] == len(predictions)
        return results

    return run


def answers(N=400, factor=2.0, seed=0):
    """Predictions whose probabilities are what decides the truth, made sharper by a factor in the logits."""
    draw = random.Random(seed)
    for i in range(N):
        names = draw.sample(["red", "blue", "green", "black", "white"], 4)
        logits = [draw.gauss(0, 1.5) for _ in names]
        total = sum(math.exp(factor * z) for z in logits)
        probs = {name: math.exp(factor * z) / total for name, z in zip(names, logits, strict=True)}
        truth = draw.choices(names, [math.exp(z) for z in logits])[0]
        said = max(probs, key=lambda name: probs[name])
        yield Prediction(id=str(i), prediction=said, probs=probs, references=(truth,), group="ab"[i % 2])


def test_captions(scored):
    references = ["A red square.", "a square that is red"]
    said = [("1", "a red square", "plain"), ("2", "A square that is red", "plain"), ("3", "a dog", "odd")]
    other = {"1": references, "2": references, "3": ["two blue circles", "a pair of blue circles"]}
    results = scored(
        eval_caption, [Prediction(id=i, prediction=text, references=tuple(other[i]), group=g) for i, text, g in said]
    )
    metrics = results["metrics"]
    assert list(metrics) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr", "exact_match"]
    assert metrics["exact_match"] == pytest.approx(2 / 3)
    assert results["groups"]["plain"]["exact_match"] == 1
    assert results["groups"]["odd"] == {
        "items": 1,
        "ROUGE_L": pytest.approx(0.25, abs=0.1),
        "CIDEr": 0,
        "exact_match": 0,
    }
    assert results["macro"]["exact_match"] == 0.5
    assert results["worst_group"]["exact_match"] == "odd"


def test_coco_files(tmp_path, capsys):
    results, truth = tmp_path / "results.json", tmp_path / "captions.json"
    results.write_text(json.dumps([{"image_id": i, "caption": f"thing {i} is here"} for i in (7, 9)]))
    annotations = [{"id": n, "image_id": i, "caption": f"Thing {i} is here."} for n, i in enumerate((7, 7, 9, 11))]
    truth.write_text(json.dumps({"images": [], "annotations": annotations}))
    with pytest.raises(DataError, match=r"1 references have no prediction: '11'; .*--allow-missing"):
        eval_caption.run(eval_caption.Config(predictions=results, references=truth))
    eval_caption.run(eval_caption.Config(predictions=results, references=truth, allow_missing=True))
    captured = capsys.readouterr()
    assert captured.err == "left out: 1 without a prediction or a reference\n"
    assert f"{results}: 2 predictions" in captured.out
    assert "exact_match              1.0000" in captured.out
    assert "group" not in captured.out


def test_answers_to_vqa(scored):
    said = [
        ("two", ["2"] * 6 + ["two"] * 4, "number"),
        ("Yes.", ["yes"] * 10, "yes/no"),
        ("cat", ["dog"] * 10, "other"),
    ]
    predictions = [
        Prediction(id=str(i), prediction=answer, references=tuple(references), group=group)
        for i, (answer, references, group) in enumerate(said)
    ]
    official = scored(eval_vqa, predictions)
    assert official["metrics"] == {"exact_match": pytest.approx(2 / 3), "vqa_accuracy": pytest.approx(1 / 3)}
    assert scored(eval_vqa, predictions, rule="fixed")["metrics"]["vqa_accuracy"] == pytest.approx(2 / 3)
    assert official["groups"]["number"] == {"items": 1, "exact_match": 1, "vqa_accuracy": 1}
    single = [Prediction(id="1", prediction="Two", references=("two",))]
    assert scored(eval_vqa, single) == {"items": 1, "metrics": {"exact_match": 1}}


def test_pope(scored, capsys):
    truths = ["yes", "no"] * 4
    predictions = [
        Prediction(id=f"{group}{i}", prediction="Yes, there is.", references=(truth,), group=group)
        for group in ("random", "popular")
        for i, truth in enumerate(truths)
    ]
    results = scored(eval_pope, predictions)
    golden = {"accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": pytest.approx(2 / 3), "yes_ratio": 1}
    assert results["metrics"].items() >= golden.items()
    assert results["groups"]["random"].items() >= golden.items()
    assert list(results["groups"]) == ["popular", "random"]
    assert "macro" not in results
    assert capsys.readouterr().err == ""


def test_pope_tells_of_what_it_cannot_say(scored, tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    path.write_text(
        '{"question": "is there a dog?", "answer": "No"}\n{"question": "is there a cat?", "answer": "dunno"}\n'
    )
    truth = tmp_path / "coco_pope_random.json"
    truth.write_text('{"question_id": 1, "text": "?", "label": "no"}\n{"question_id": 2, "text": "?", "label": "no"}\n')
    eval_pope.run(eval_pope.Config(predictions=path, references=truth))
    captured = capsys.readouterr()
    assert "no answer, or no truth, is yes" in captured.err
    assert "1 of 2 answers say neither yes nor no" in captured.err
    assert "accuracy                 0.5000" in captured.out
    with pytest.raises(DataError, match="id 'x': the reference must be \"yes\" or \"no\"; got \\('maybe',\\)"):
        scored(eval_pope, [Prediction(id="x", prediction="yes", references=("maybe",))])


def test_calibration_over_candidates(scored, tmp_path):
    results = scored(eval_calibration, list(answers()), plot=tmp_path / "plots" / "reliability.png")
    metrics = results["metrics"]
    assert results["over"] == "candidates"
    assert metrics["temperature"] == pytest.approx(2, abs=0.25)
    assert metrics["confidence"] > metrics["accuracy"] + 0.05
    assert metrics["ece_scaled"] < metrics["ece"] / 2
    assert metrics["nll_scaled"] < metrics["nll"]
    assert metrics["brier_scaled"] < metrics["brier"]
    table = results["reliability"]
    assert len(table) == 15
    assert sum(row["items"] for row in table) == 400
    assert sum(row["items"] * row["accuracy"] for row in table) == pytest.approx(400 * metrics["accuracy"])
    assert (tmp_path / "plots" / "reliability.png").read_bytes()[:4] == b"\x89PNG"


def test_calibration_of_scores(scored):
    # The score is twice as sure, in logits, as the truth warrants.
    draw = random.Random(0)
    predictions = []
    for i in range(2000):
        logit = draw.gauss(0.5, 1)
        right = draw.random() < 1 / (1 + math.exp(-logit))
        score = 1 / (1 + math.exp(-2 * logit))
        predictions.append(
            Prediction(id=str(i), prediction="Yes." if right else "no", score=score, references=("yes",))
        )
    results = scored(eval_calibration, predictions, bins=10)
    assert results["over"] == "right or wrong"
    assert results["metrics"]["temperature"] == pytest.approx(2, abs=0.25)
    assert results["metrics"]["ece_scaled"] < results["metrics"]["ece"] / 2
    assert "classwise_ece" not in results["metrics"]
    assert len(results["reliability"]) == 10


def test_probabilities_without_the_truth_are_read_as_scores(scored):
    predictions = [*answers(50), Prediction(id="x", prediction="red", probs={"red": 1.0}, references=("lilac",))]
    results = scored(eval_calibration, predictions)
    assert results["over"] == "right or wrong"
    assert math.isfinite(results["metrics"]["nll"])


def test_of_two_spellings_that_are_right_the_one_that_was_said_counts(scored):
    probs = {"yes": 0.6, "Yes.": 0.3, "no": 0.1}
    predictions = [Prediction(id=str(i), prediction="Yes.", probs=probs, references=("yes",)) for i in range(2)]
    metrics = scored(eval_calibration, predictions)["metrics"]
    assert (metrics["accuracy"], metrics["confidence"]) == (1, pytest.approx(0.3))


def test_a_certainty_that_is_wrong_is_finite(scored):
    probs = {"red": 1.0, "blue": 0.0}
    predictions = [Prediction(id=str(i), prediction="red", probs=probs, references=("blue",)) for i in range(2)]
    metrics = scored(eval_calibration, predictions)["metrics"]
    assert metrics["ece"] == pytest.approx(1)
    assert metrics["nll"] == pytest.approx(-math.log(1e-12), rel=1e-6)
    assert metrics["temperature"] == pytest.approx(100)


@pytest.mark.parametrize("score", [None, -0.5, 1.5])
def test_calibration_needs_probabilities(scored, score):
    with pytest.raises(DataError, match=r'needs "probs" .* or a "score" from 0 to 1; got score'):
        scored(eval_calibration, [Prediction(id="0", prediction="a", score=score, references=("a",))] * 1)


def test_the_screen_shows_a_table(tmp_path, capsys):
    path = tmp_path / "preds.jsonl"
    write_predictions(path, answers(40))
    eval_calibration.run(eval_calibration.Config(predictions=path))
    out = capsys.readouterr().out
    assert "probabilities of: candidates" in out
    assert sum(" - " in line for line in out.splitlines()) == 15
    eval_vqa.run(eval_vqa.Config(predictions=path))
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[3:]] == ["group", "a", "b", "mean", "worst"]


def test_the_commands(vlmfast, refused, tmp_path):
    path = tmp_path / "preds.jsonl"
    write_predictions(path, answers(40))
    assert vlmfast("eval", "caption", path).out.startswith(f"{path}: 40 predictions\nBleu_1")
    assert json.loads(vlmfast("eval", "vqa", path, "--rule", "fixed", "--json").out)["items"] == 40
    assert json.loads(vlmfast("eval", "calibration", path, "--bins", "5", "--json").out)["reliability"][4]["upper"] == 1
    assert "id '0': the reference must be" in refused("eval", "pope", path)
    path.write_text('{"id": 1}\n', encoding="utf-8")
    assert refused("eval", "vqa", path).startswith(f"vlmfast eval vqa: {path}:1: needs text")
    assert "No such file" in refused("eval", "caption", tmp_path / "none.jsonl")
