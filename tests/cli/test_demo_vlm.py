"""`vlmfast demo-vlm` from end to end, too short to learn; and its numbers, on made-up answers."""

import json
import re

import pytest
import torch

from vlmfast import cli
from vlmfast.eval.predictions import Prediction, read_predictions
from vlmfast.recipes import vlm_report
from vlmfast.recipes.run_flags import FLAGS_FILE
from vlmfast.recipes.vlm_report import Asked, Results, calibration_error, goals, html, summary


@pytest.mark.slow
def test_the_demo_leaves_a_summary_a_page_and_a_model(tmp_path, capsys):
    out = tmp_path / "demo"
    (out / "run").mkdir(parents=True)  # an earlier demo's, which is replaced
    (out / "run" / FLAGS_FILE).write_text("{}")
    assert cli.main(["demo-vlm", "--out", str(out), "--steps", "4", "--n", "4", "--cores", "2"]) == 0
    assert "captions of held-out scenes right" in capsys.readouterr().out
    told = json.loads((out / "summary.json").read_text())
    assert set(told["accuracy"]["answers"]) == {"none", "blank", "shuffled"}
    assert len(read_predictions(out / "vqa-shuffled.jsonl")) == 4
    page = (out / "report.html").read_text()
    assert page.count("<figure class=") == 8
    assert page.count("<svg") == 1
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # self-contained
    words = ["caption", "--model", str(out / "run"), "--level", "L1", "--n", "2", "--max-new-tokens", "3"]
    assert cli.main([*words, "--device", "cpu"]) == 0


def test_the_demo_does_not_delete_what_is_not_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("VLMFAST_DEBUG", raising=False)
    (tmp_path / "run").mkdir()
    precious = tmp_path / "run/thesis.txt"
    precious.write_text("years of work")
    assert cli.main(["demo-vlm", "--out", str(tmp_path)]) == 1
    assert "is not a run of the demo" in capsys.readouterr().err
    assert precious.read_text() == "years of work"


def test_more_cores_than_conversations_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("VLMFAST_DEBUG", raising=False)
    assert cli.main(["demo-vlm", "--out", str(tmp_path / "out"), "--cores", "65"]) == 1
    assert "--cores must be 1 .. 64" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def said(right, n, **more):
    """n answers of which the first are right; half of the truths are "red"."""
    truth = ["red", "blue"] * (n // 2)
    return [
        Prediction(
            id=str(i),
            prediction=truth[i] if i < right else "<b>green</b>",
            references=(truth[i],),
            input={"question": "What colour?"},
            score=0.75,
            **more,
        )
        for i in range(n)
    ]


def results(captions=20, answers=20, lucky=0, shuffled=10):
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    tasks = {}
    for name, right, wrong in (("caption", captions, lucky), ("vqa", answers, shuffled)):
        group = {"group": "query-colour"} if name == "vqa" else {}
        found = {"none": right, "blank": wrong, "shuffled": wrong}
        tasks[name] = Asked({c: said(k, 20, task=name, **group) for c, k in found.items()}, [image] * 3)
    metrics = [{"step": 1, "train/text_loss": 5.0}, {"step": 2, "train/text_loss": 4.0, "val/caption/accuracy": 0.5}]
    machine = {"cpu": "a CPU", "cores": 2}
    return Results(metrics, tasks["caption"], tasks["vqa"], 1000, 60.0, 70.0, machine, {"torch": "2"}, "today")


@pytest.mark.parametrize(
    ("changes", "reached"),
    [
        ({}, [True, True, True, True]),
        ({"captions": 18}, [False, True, True, True]),
        ({"answers": 16}, [True, False, True, True]),
        ({"shuffled": 11}, [True, True, False, True]),  # 55 % where always "red" has 50 %
        ({"lucky": 1}, [True, True, True, False]),
    ],
)
def test_goals(changes, reached):
    assert [goal[2] for goal in goals(results(**changes))] == reached


def test_numbers_and_page_of_made_up_answers():
    made = results(answers=15)
    told = summary(made)
    assert told["accuracy"]["answers"]["none"] == {"accuracy": 0.75, "query-colour": 0.75}
    assert told["prior"] == {"accuracy": 0.5, "query-colour": 0.5}
    assert calibration_error(made.answers) == pytest.approx(0.0, abs=1e-12)  # 75 % sure, 75 % right
    page = html(made)
    assert page.count("class=hit") == 6
    assert "&lt;b&gt;green" not in page, "the first three answers are right"
    assert "&lt;b&gt;green&lt;/b&gt;" in html(results(answers=1))
    assert vlm_report.show(made).count("MISSED") == 1
