"""`vlmfast demo` from end to end, too short to learn; and its goals, on made-up results."""

import json
import re
from dataclasses import replace

import pytest

from vlmfast import cli
from vlmfast.recipes import demo, demo_report
from vlmfast.recipes.run_flags import FLAGS_FILE

TINY = ["--steps", "6", "--batch-size", "32", "--bench-batch", "32", "--bench-dim", "16", "--bench-seconds", "0"]


@pytest.mark.slow
def test_demo_leaves_a_summary_and_a_page(tmp_path, capsys):
    out = tmp_path / "demo"
    for run in ("fused", "reference"):  # an earlier demo's, which is replaced
        (out / run).mkdir(parents=True)
        (out / run / FLAGS_FILE).write_text("{}")
        (out / run / "metrics.jsonl").write_text("")
    assert cli.main(["demo", "--out", str(out), *TINY]) == 0
    table = capsys.readouterr().out
    assert "What the demo promises" in table
    summary = json.loads((out / "summary.json").read_text())
    assert summary["largest_relative_difference"] <= 1e-4
    assert summary["runs"]["fused"]["steps"] == summary["runs"]["reference"]["steps"] == 6
    assert {row["batch"] for row in summary["bench"]["rows"]} == {32}
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2
    assert page.count("<img") >= 10 * demo.SHOWN + demo_report.STRIP
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # self-contained
    assert cli.main(["eval", "--pretrained", str(out / "fused"), "--split", "val"]) == 0


def test_demo_does_not_delete_what_is_not_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("VLMFAST_DEBUG", raising=False)
    (tmp_path / "fused").mkdir()
    precious = tmp_path / "fused/thesis.txt"
    precious.write_text("years of work")
    assert cli.main(["demo", "--out", str(tmp_path), *TINY]) == 1
    assert "is not a run of the demo" in capsys.readouterr().err
    assert precious.read_text() == "years of work"


def results(fused, reference):
    trained = demo_report.Trained(losses=[2.0] * 200, scores={"zero_shot/acc1": 0.97}, seconds=1.0)
    empty = dict.fromkeys(("images", "labels", "predicted", "queries", "bench"))
    return demo_report.Results(
        fused=replace(trained, **fused),
        reference=replace(trained, **reference),
        backend="cpu",
        extension_reason="",
        seconds=1.0,
        **empty,
    )


@pytest.mark.parametrize(
    ("fused", "reference", "reached"),
    [
        ({}, {}, [True, True, True]),
        ({"scores": {"zero_shot/acc1": 0.949}}, {"scores": {"zero_shot/acc1": 0.95}}, [False, True, True]),
        ({"losses": [2.0] * 99 + [2.0003] + [2.0] * 100}, {}, [True, False, True]),
        ({"losses": [2.0] * 100 + [2.5] * 100}, {}, [True, True, True]),  # rounding may grow after step 100
        ({"scores": {"zero_shot/acc1": 0.985}}, {}, [True, True, False]),
    ],
)
def test_goals(fused, reference, reached):
    found = results(fused, reference)
    assert [goal[2] for goal in demo_report.goals(found)] == reached
    assert found.agree == reached[1]
