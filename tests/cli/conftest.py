"""Command lines that must work or must be refused, and what they work on."""

import pytest
from small_run import COLOURS, picture, write_run

from vlmfast import cli


@pytest.fixture
def vlmfast(capsys, monkeypatch):
    """Runs a command line that must work, and gives what it printed."""
    monkeypatch.delenv("VLMFAST_DEBUG", raising=False)

    def run(*words):
        assert cli.main([str(word) for word in words]) == 0, capsys.readouterr().err
        return capsys.readouterr()

    return run


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs a command line that must fail, and gives the last line on standard error."""
    monkeypatch.delenv("VLMFAST_DEBUG", raising=False)

    def run(*words):
        assert cli.main([str(word) for word in words]) == 1
        return capsys.readouterr().err.splitlines()[-1]

    return run


@pytest.fixture
def run_folder(tmp_path):
    return write_run(tmp_path / "run")


@pytest.fixture
def pictures(tmp_path):
    """blue.png, green.png, grey.png (of one channel), red.png and more/yellow.jpg."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for seed, (name, colour) in enumerate(COLOURS.items()):
        picture(colour, seed=seed).save(folder / f"{name}.png")
    picture((250, 240, 30), (600, 300), seed=9).save(folder / "more" / "yellow.jpg")
    return folder


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("a red thing\n\n  a green thing \na blue thing\n", encoding="utf-8")
    return path
