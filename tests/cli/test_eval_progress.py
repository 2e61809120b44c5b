"""How far a command is, as a terminal and as a log file show it."""

import io
import re

import pytest

from vlmfast.recipes import progress


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize(("terminal", "end"), [(True, "\r"), (False, "\n")])
def test_lines(terminal, end, monkeypatch):
    stream, clock = Stream(terminal), iter(range(0, 100, 4))
    monkeypatch.setattr(progress.sys, "stderr", stream)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))  # s
    assert list(progress.counted(["ab", "c", "def"], "letters", 6)) == ["ab", "c", "def"]
    lines = [line for line in re.split("[\r\n]", stream.getvalue()) if line]
    whole = ["letters 2/6  0/s", "letters 3/6  0/s", "letters 6/6  0/s"]
    assert lines == ([*whole, whole[-1]] if terminal else ["letters 3/6  0/s", whole[-1]])
    assert stream.getvalue().count(end) == (3 if terminal else 2)


def test_nothing_is_told_once(capsys):
    assert list(progress.counted([], "images", 0)) == []
    assert capsys.readouterr().err == "images 0/0  0/s\n"
