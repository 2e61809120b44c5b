"""`vlmfast bench loss` and `vlmfast data`, small."""

import csv
import json

import pytest
import torch
from PIL import Image

from vlmfast import cli


def width(path):
    with Image.open(path) as image:
        return image.width


@pytest.mark.slow
def test_bench_loss_writes_json_csv_and_a_plot(tmp_path, capsys):
    files = {kind: tmp_path / f"loss.{kind}" for kind in ("json", "csv", "png")}
    words = ["bench", "loss", "--batch", "32", "--dim", "16", "--providers", "vlmfast,eager-one"]
    words += ["--rounds", "2", "--seconds", "0", "--json", str(files["json"]), "--csv", str(files["csv"])]
    assert cli.main([*words, "--plot", str(files["png"])]) == 0
    assert "vlmfast" in capsys.readouterr().out
    rows = json.loads(files["json"].read_text())["rows"]
    assert [row["provider"] for row in rows] == ["vlmfast", "eager-one"]
    with files["csv"].open() as file:
        assert {line["kernel_provider"] for line in csv.DictReader(file)} == {"vlmfast", "eager-one"}
    assert width(files["png"]) > 100


def test_an_unknown_provider_is_said(capsys, monkeypatch):
    monkeypatch.delenv("VLMFAST_DEBUG", raising=False)
    assert cli.main(["bench", "loss", "--batch", "8", "--providers", "eager"]) == 1
    assert "eager-one" in capsys.readouterr().err


def test_preview_draws_the_scenes(tmp_path, capsys):
    path = tmp_path / "new" / "grid.png"
    assert cli.main(["data", "preview", "--level", "L0", "--n", "4", "--out", str(path)]) == 0
    assert "4 scenes of L0" in capsys.readouterr().out
    assert width(path) > 4 * 32


def test_export_refuses_a_full_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("VLMFAST_DEBUG", raising=False)
    (tmp_path / "file").write_text("")
    assert cli.main(["data", "export", "--out", str(tmp_path), "--size", "2"]) == 1
    assert "not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_topk_writes_json_which_bench_report_prints(tmp_path, capsys):
    words = ["bench", "topk", "--queries", "8", "--items", "64", "--dim", "16", "--k", "3", "--rounds", "2"]
    assert cli.main([*words, "--seconds", "0", "--json", str(tmp_path / "topk.json")]) == 0
    assert "recall" in capsys.readouterr().out
    words = ["bench", "report", str(tmp_path / "topk.json"), "--document", str(tmp_path / "none.md")]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "`vlmfast bench topk --threads 1 --queries 8 --items 64 --dim 16 --k 3" in printed
    assert "| similarity_topk, k = 3, 8 queries | vlmfast | mm-topk |" in printed


def test_a_report_of_nothing_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("VLMFAST_DEBUG", raising=False)
    assert cli.main(["bench", "report", str(tmp_path / "none.json")]) == 1
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["loss", "topk"])
def test_a_missing_gpu_is_said(capsys, monkeypatch, command):
    monkeypatch.delenv("VLMFAST_DEBUG", raising=False)
    assert cli.main(["bench", command, "--device", "cuda"]) == 1
    assert "sees no GPU" in capsys.readouterr().err
