"""The frame of the command line: help, misuse, failures, and the doctor."""

import importlib
import json
import subprocess
import sys

import pytest

from vlmfast import _ext, backend, cli
from vlmfast.errors import DataError

COMMANDS = pytest.mark.parametrize("command", cli.COMMANDS)


@COMMANDS
def test_help_shows_an_example(command, capsys):
    assert cli.main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: vlmfast {command.removesuffix(' --task')} " in text
    assert f"For example:\n    vlmfast {command}" in text


def test_top_level_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for command in cli.COMMANDS:
        assert any(line.strip().startswith(f"{command} ") for line in lines)


def test_no_command_is_misuse_and_shows_help(capsys):
    assert cli.main([]) == 2
    assert "vlmfast <command>" in capsys.readouterr().out


def test_a_group_shows_its_own_commands(capsys):
    assert cli.main(["data"]) == 0
    text = capsys.readouterr().out
    assert "data preview" in text
    assert "data export" in text
    assert "doctor" not in text


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == importlib.import_module("vlmfast").__version__


@pytest.mark.parametrize(
    ("words", "nearest"), [(["trian"], "train"), (["doctr", "--json"], "doctor"), (["data", "exprot"], "data export")]
)
def test_an_unknown_command_names_the_nearest(words, nearest, capsys):
    assert cli.main(words) == 2
    assert f"did you mean '{nearest}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["train", "--batchsize", "64"], "--batch-size"),
        (["train", "--weight-decay", "0.1", "--warm-up", "3"], "--warmup"),
        (["eval", "--pretraned", "logs/x"], "--pretrained"),
        (["bench", "loss", "--dims", "8"], "--dim"),
        (["doctor", "--jsn"], "--json"),
        (["demo", "--output", "x"], "--out"),
    ],
)
def test_an_unknown_flag_names_the_nearest(words, nearest, capsys):
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert nearest in captured.out + captured.err


def test_a_wrong_choice_names_the_right_ones(capsys):
    assert cli.main(["train", "--precision", "fp8"]) == 2
    captured = capsys.readouterr()
    assert "amp_bf16" in captured.out + captured.err


def test_a_failure_is_one_line_and_status_1(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("VLMFAST_DEBUG", raising=False)
    assert cli.main(["train", "--dataset-type", "csv", "--train-data", str(tmp_path / "none.tsv")]) == 1
    text = capsys.readouterr().err
    assert text.startswith("vlmfast train: ")
    assert "none.tsv" in text
    assert text.count("\n") == 1


def test_debugging_shows_where(monkeypatch, tmp_path):
    monkeypatch.setenv("VLMFAST_DEBUG", "1")
    with pytest.raises(DataError, match=r"none\.tsv"):
        cli.main(["train", "--dataset-type", "csv", "--train-data", str(tmp_path / "none.tsv")])


def test_a_bug_keeps_its_traceback(monkeypatch):
    module = importlib.import_module("vlmfast.recipes.doctor")
    monkeypatch.setattr(module, "diagnose", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_a_missing_library_names_its_extra(capsys, monkeypatch):
    monkeypatch.delenv("VLMFAST_DEBUG", raising=False)
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.main(["doctor"]) == 1
    assert "pip install 'vlmfast[cli]'" in capsys.readouterr().err


def test_doctor_json_names_every_op_and_backend(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"vlmfast", "python", "torch", "numpy"} <= set(found["versions"])
    assert set(found["ops"]) >= {"softmax_loss", "sigmoid_loss", "hinge_loss", "similarity"}
    for devices in found["ops"].values():
        assert devices["cpu"]["reference"] == "runs"
        assert devices["cpu"]["cpu"] == "runs" if _ext.C is not None else devices["cpu"]["cpu"] != "runs"
    assert found["extension"]["loaded"] == (_ext.C is not None)


def test_doctor_tells_why_the_extension_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(_ext, "C", None)
    monkeypatch.setattr(_ext, "reason", "the build failed: no compiler")
    assert cli.main(["doctor"]) == 0
    assert "the build failed: no compiler" in capsys.readouterr().out


def test_doctor_says_which_backend_is_forced(capsys):
    with backend.use_backend("reference"):
        cli.main(["doctor"])
    assert "forces reference" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_is_no_failure():
    shell = f"{sys.executable} -m vlmfast.cli --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
