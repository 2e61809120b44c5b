"""Which tile a kernel gets: the shipped table, and the file of tuned tiles that goes before it."""

import json
import os
from pathlib import Path

import pytest
import torch

from vlmfast.ops import _configs, _tiles
from vlmfast.ops._configs import CANDIDATES, CONFIGS, DEPTHS, KINDS, LIMITS, Case, Config, Machine

CPU = torch.device("cpu")
CASE = Case("softmax", "bfloat16", "descriptors", 512)
TILE = Config(64, 256, 32, 4, 2)
TARGETS = [target for target in CONFIGS if target != "interpreter"]
DOCUMENT = Path(__file__).parent.parent.parent / "docs/backends.md"


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file of tuned tiles, not yet there."""
    monkeypatch.setenv("VLMFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VLMFAST_TUNED", raising=False)
    _configs.tuned.cache_clear()
    yield tmp_path / "cache" / "tiles-v1.json"
    _configs.tuned.cache_clear()


def entry(**changes):
    """One entry of the file, as `store` writes it."""
    return {**_configs.machine(CPU)._asdict(), **CASE._asdict(), "tile": list(TILE), **changes}


def write(file, *entries, version=1, **more):
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"version": version, "tiles": entries, **more}))
    _configs.tuned.cache_clear()


def test_a_tuned_tile_goes_before_the_shipped_one(file):
    shipped = _configs.choose(CPU, "sm_90", CASE)
    assert shipped == _configs.shipped("sm_90", CASE)
    assert _configs.store(CPU, {CASE: TILE}) == file
    assert _configs.choose(CPU, "sm_90", CASE) == TILE
    for field, value in (("kind", "sigmoid"), ("operands", "float16"), ("loads", "pointers"), ("depth", 768)):
        other = CASE._replace(**{field: value})
        assert _configs.choose(CPU, "sm_90", other) == _configs.shipped("sm_90", other)
    _configs.store(CPU, {CASE: None})
    assert _configs.choose(CPU, "sm_90", CASE) == shipped


def test_tuned_tiles_of_other_machines_stay_and_do_not_count(file, monkeypatch):
    here = _configs.machine(CPU)
    for change in ({"gpu": "another GPU"}, {"capability": "9.0"}, {"triton": "0.1"}):
        with monkeypatch.context() as context:
            context.setattr(_configs, "machine", lambda device, change=change: here._replace(**change))
            _configs.store(CPU, {CASE: TILE})
    assert _configs.tuned(CPU) == {}
    _configs.store(CPU, {CASE: TILE})
    assert len(json.loads(file.read_text())["tiles"]) == 4
    assert _configs.tuned(CPU) == {CASE: TILE}


def test_tuned_tiles_are_left_aside_when_told(file, monkeypatch):
    _configs.store(CPU, {CASE: TILE})
    monkeypatch.setenv("VLMFAST_TUNED", "0")
    _configs.tuned.cache_clear()
    assert _configs.choose(CPU, "sm_90", CASE) == _configs.shipped("sm_90", CASE)


def test_the_file_is_read_once(file, monkeypatch):
    read, reads = _configs._read, []
    monkeypatch.setattr(_configs, "_read", lambda path: reads.append(path) or read(path))
    for D in range(1, 100):
        _configs.choose(CPU, "sm_90", _configs.case("sigmoid", torch.float32, "bf16x3", True, D))
    assert reads == [file]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "Expecting value"),
        ('{"version": 1, "tiles": [', "Expecting value"),
        ("[]", "version 1"),
        ('{"version": 2, "tiles": []}', "version 1"),
        ('{"version": 1, "tiles": [], "more": 1}', "version 1"),
        ('{"version": 1, "tiles": 7}', "not iterable"),
        ('{"version": 1, "tiles": [7]}', "nothing else; got 7"),
        (b"\xff\xfe\x00", "decode"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_file_that_is_broken_is_ignored_with_a_line(file, content, why):
    file.parent.mkdir()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match=why) as warned:
        assert _configs.choose(CPU, "sm_90", CASE) == _configs.shipped("sm_90", CASE)
    (message,) = [str(warning.message) for warning in warned]
    assert str(file) in message
    assert "\n" not in message
    with pytest.warns(UserWarning, match="ignored"):
        _configs.store(CPU, {CASE: TILE})  # a cache: the next tuning replaces it
    assert _configs.choose(CPU, "sm_90", CASE) == TILE


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"colour": "red"}, "nothing else"),
        ({"kind": "cubic"}, "unknown kind"),
        ({"operands": "int3"}, "unknown kind, operands"),
        ({"loads": "magic"}, "unknown kind, operands, loads"),
        ({"depth": 500}, "or depth"),
        ({"kind": ["softmax"]}, "unknown kind"),
        ({"gpu": 7}, "unknown kind"),
        ({"tile": [64, 64, 64, 4]}, "five whole numbers"),
        ({"tile": [64, 64, 64, 4, 2.5]}, "five whole numbers"),
        ({"tile": [512, 64, 64, 4, 2]}, "is beyond"),
        ({"tile": [96, 64, 64, 4, 2]}, "powers of two"),
        ({"tile": [64, 8, 64, 4, 2]}, "powers of two"),
        ({"tile": [64, 64, 0, 4, 2]}, "powers of two"),
        ({"tile": [64, 64, 64, 3, 2]}, "powers of two"),
        ({"tile": [64, 64, 64, 32, 2]}, "is beyond"),
        ({"tile": [64, 64, 64, 4, 0]}, "is beyond"),
        ({"tile": [64, 64, 64, 4, 9]}, "is beyond"),
    ],
)
def test_an_entry_that_is_not_known_or_beyond_the_limits_is_refused(file, changes, why):
    write(file, entry())
    assert _configs.choose(CPU, "sm_90", CASE) == TILE
    write(file, entry(**changes))
    with pytest.warns(UserWarning, match=why):
        assert _configs.choose(CPU, "sm_90", CASE) == _configs.shipped("sm_90", CASE)


def test_a_write_that_fails_leaves_the_file_as_it_was(file, monkeypatch):
    _configs.store(CPU, {CASE: TILE})
    before = file.read_text()

    def fails(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        _configs.store(CPU, {CASE: None})
    assert file.read_text() == before
    assert list(file.parent.iterdir()) == [file]


def test_the_file_lies_in_the_user_s_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("VLMFAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _configs.cache_file() == tmp_path / "vlmfast/tiles-v1.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _configs.cache_file() == tmp_path / ".cache/vlmfast/tiles-v1.json"


@pytest.mark.parametrize("where", CONFIGS)
def test_every_case_has_a_tile_within_the_limits(where):
    for kind in KINDS:
        for operands in _configs.OPERANDS:
            for loads in ("descriptors", "pointers"):
                for depth in DEPTHS:
                    tile = _configs.shipped(where, Case(kind, operands, loads, depth))
                    assert _configs._entry(entry(tile=list(tile)))[1] == tile


def test_light_kernels_get_the_larger_tile_where_descriptors_spare_the_addresses():
    assert _configs.shipped("sm_90", CASE) == Config(128, 128, 64, 8, 3)
    for change in ({"kind": "sigmoid"}, {"operands": "bf16x3"}, {"operands": "float16"}, {"loads": "pointers"}):
        assert _configs.shipped("sm_90", CASE._replace(**change)) == Config(128, 64, 64, 8, 3)
    assert _configs.shipped("sm_90", CASE._replace(depth=128)).stages == 2  # two steps of 64 are all there is


@pytest.mark.parametrize("where", TARGETS)
def test_candidates_are_tiles_that_a_file_may_hold(where):
    assert 8 <= len(CANDIDATES[where]) <= 24
    for tile, kinds in CANDIDATES[where].items():
        assert _configs._entry(entry(tile=list(tile)))[1] == tile
        assert kinds
        assert set(kinds.split()) <= set(KINDS)
    for kind in ("softmax", "sigmoid", "hinge", "hardest", "topk"):
        assert sum(kind in kinds.split() for kinds in CANDIDATES[where].values()) >= 4


@pytest.mark.parametrize("where", TARGETS)
def test_the_document_shows_what_every_tile_compiles_to(where):
    rows = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {where} |")]
    tiles = {tile for table in CONFIGS[where].values() for row in table for tile in row[1:]}
    for tile in tiles | set(CANDIDATES[where]):
        shape = f"| {tile.block_m}×{tile.block_n}×{tile.block_k} {tile.warps} {tile.stages} |"
        assert any(shape in row for row in rows), f"run: benchmarks/compile_gates.py --markdown ({where}: {tile})"


def test_a_tile_does_not_depend_on_the_batch_size():
    asked = []
    for M, N in ((1, 2), (3, 700), (5000, 9)):
        with _configs.trying(None) as cases:
            _tiles.pair(torch.ones(M, 40), torch.ones(N, 40), False, "ieee", kind="topk")
        asked += cases
    assert asked == 3 * [Case("topk", "ieee", "pointers", 64)]


def test_a_tile_that_is_tried_goes_before_all_and_leaves_again(file):
    _configs.store(CPU, {CASE: TILE})
    other = Config(16, 16, 16, 1, 1)
    with _configs.trying(other):
        assert _configs.choose(CPU, "sm_90", CASE) == other
        with _configs.trying(None):
            assert _configs.choose(CPU, "sm_90", CASE) == _configs.shipped("sm_90", CASE)
        assert _configs.choose(CPU, "sm_90", CASE) == other
    assert _configs.choose(CPU, "sm_90", CASE) == TILE


def test_limits_are_those_that_blocks_of_s_allow():
    assert max(LIMITS[:2]) <= _tiles.STEP
    assert isinstance(_configs.machine(CPU), Machine)
