"""A bar on a terminal, plain lines elsewhere."""

import io
import sys

from standin import train

from vlmfast.train import progress
from vlmfast.train.progress import show_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


METRICS = {"contrastive_loss": 1.23456, "lr": 0.1, "samples_per_second": 4321.9}


def tell(stream, steps=50):
    with show_progress(steps, 10, stream) as bar:
        for done in range(11, steps + 1):
            bar.update(done, METRICS)
        bar.say("step 50  zero_shot/acc1 [0.97]")
    return stream.getvalue()


def test_plain_lines_without_a_terminal(monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 1e9)
    text = tell(io.StringIO())
    assert "\x1b" not in text
    assert "\r" not in text
    first, last, said = text.splitlines()
    assert first.startswith("step 11/50  contrastive_loss 1.2346  4,322 samples/s  ")
    assert last.startswith("step 50/50  ")
    assert last.endswith("0:00:00 left")
    assert said == "step 50  zero_shot/acc1 [0.97]"


def test_a_line_each_few_seconds(monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    assert len(tell(io.StringIO()).splitlines()) == 41


def test_a_bar_on_a_terminal():
    text = tell(Terminal())
    assert "\x1b[" in text
    for part in ("50/50", "contrastive_loss 1.2346", "4,322 samples/s", "zero_shot/acc1 [0.97]"):
        assert part in text


def test_plain_lines_on_a_terminal_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    text = tell(Terminal())
    assert "\x1b" not in text
    assert "step 50/50" in text


def test_standard_error_by_default(capsys):
    with show_progress(2) as bar:
        bar.update(1, METRICS)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 1/2" in captured.err


def test_a_run_tells_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    told = io.StringIO()
    train(tmp_path, 4, stream=told, evaluators={"zero_shot": lambda model: {"acc1": 0.5}})
    text = told.getvalue().splitlines()
    assert [line.split("  ")[0] for line in text] == [f"step {n}/4" for n in range(1, 5)] + ["step 4"]
    assert all("contrastive_loss" in line and "samples/s" in line and "left" in line for line in text[:4])
    assert text[4] == "step 4  zero_shot/acc1 0.5"
