"""The benchmark as a whole: what it takes, what it measures, what it hands over."""

import csv
import dataclasses
import json
import sys

import pytest
import torch

from vlmfast.bench import loss, memory, meter, providers, report
from vlmfast.bench.loss import LossBench, parse_batches, run
from vlmfast.bench.memory import Peak
from vlmfast.bench.providers import BenchError
from vlmfast.bench.report import Report, Row
from vlmfast.bench.timing import Spread

MIB = 2**20
EVERYONE = "vlmfast,reference,eager-one,eager-two,linear-cross-entropy,open_clip"  # torch-compile takes a while
QUICK = LossBench(batch="40,24", dim=16, providers=EVERYONE, rounds=2, seconds=0.0)


@pytest.fixture
def small(monkeypatch):
    """Runs a config without the fresh process: its peaks are 5 MiB for vlmfast and 20 MiB for everyone else."""

    def peak_in_child(setup, *, provider, **_):
        return Peak(5 * MIB if provider == "vlmfast" else 20 * MIB, 300 * MIB)

    monkeypatch.setattr(memory, "unmeasurable", lambda: None)
    monkeypatch.setattr(memory, "peak_in_child", peak_in_child)
    monkeypatch.setattr(loss, "TUNING_SECONDS", 0.0)
    monkeypatch.setattr(meter, "MICROKERNEL_SECONDS", 1e-4)
    return lambda **changes: run(dataclasses.replace(QUICK, **changes))


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1024,4096", [1024, 4096]),
        (" 64 ", [64]),
        ("1024..65536:x2", [1024, 2048, 4096, 8192, 16384, 32768, 65536]),
        ("64..1000:x3,7", [64, 192, 576, 7]),
        ("8..8:x2", [8]),
    ],
)
def test_batch_sizes(text, sizes):
    assert parse_batches(text) == sizes


@pytest.mark.parametrize("text", ["", "0", "64,", "64..32:x2", "64..128", "64..128:x1", "64..128:+64", "-4", "1e3"])
def test_a_wrong_batch_size_shows_right_ones(text):
    with pytest.raises(BenchError, match=r"such as 1024,4096 or 1024\.\.65536:x2"):
        parse_batches(text)


def test_a_wrong_number_is_refused_before_anything_runs():
    with pytest.raises(BenchError, match="rounds must be at least 1; got 0"):
        run(dataclasses.replace(QUICK, rounds=0))
    with pytest.raises(BenchError, match="did you mean 'torch-compile'"):
        run(dataclasses.replace(QUICK, providers="vlmfast,torch-compiler"))


@pytest.mark.parametrize("name", providers.LOSSES)
def test_everyone_has_a_row_with_numbers_or_a_reason(small, name):
    result = small(loss=name)
    assert [row.provider for row in result.rows] == 2 * EVERYONE.split(",")
    assert result.batches() == [40, 24]
    for row in result.rows:
        if row.reason is not None:
            assert row.full_ms is None
            assert row.provider in ("linear-cross-entropy", "open_clip")
            continue
        assert row.rounds == 2
        assert row.loss_error < 1e-5
        assert row.gradient_error < 1e-5
        assert row.forward_ms.p20 <= row.forward_ms.median <= row.forward_ms.p80
        flops = {"clip": 8, "siglip": 6, "vse": 6, "vse-hardest": 2}[name] * row.batch**2 * 16
        assert row.gflops == pytest.approx(flops / (row.full_ms.median * 1e-3) / 1e9)


def test_low_precision_runs_under_autocast(small):
    for row in small(dtype="bfloat16", batch="40", providers="vlmfast,eager-one,eager-two").rows:
        assert row.reason is None
        assert row.loss_error < 0.02
        assert row.gradient_error < 0.05


def test_errors_are_relative_and_absolute_where_the_truth_is_zero(small):
    row = Row("vlmfast", 2)
    exact = {"loss": torch.tensor(2.0), "image": torch.tensor([3.0, 4.0]), "text": torch.zeros(2)}
    loss._measure_errors(row, {name: tensor + 1 for name, tensor in exact.items()}, exact)
    assert row.loss_error == 0.5
    assert row.gradient_errors == pytest.approx({"image": 2**0.5 / 5, "text": 2**0.5})
    assert small(batch="1", providers="vlmfast").rows[0].loss_error < 1e-6  # one pair has nothing to tell apart


def test_inputs_gradients_and_unmeasured_errors(small):
    result = small(providers="vlmfast,eager-two", batch="64", exact_up_to=63)
    ours, theirs = result.rows
    assert theirs.extra_bytes == 20 * MIB - 2 * 64 * 16 * 4  # the peak less the two embeddings' gradients
    assert ours.process_bytes == 300 * MIB
    assert theirs.memory_ratio == theirs.extra_bytes / ours.extra_bytes
    assert ours.loss_error is None
    assert ours.gradient_error is None
    assert ours.form in ("cpu", "reference")


def test_what_does_not_fit_is_not_started(small, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 4 * 4 * 40**2 - 1)
    rows = {row.provider: row for row in small(batch="40", providers="vlmfast,eager-one,eager-two").rows}
    assert "[B, B] arrays need" in rows["eager-two"].reason
    assert rows["eager-one"].reason is None
    assert rows["vlmfast"].reason is None


def test_a_provider_that_fails_says_why_and_the_others_go_on(small, monkeypatch):
    def broken(image, text, scale, bias):
        raise RuntimeError("no kernel for this\nand a long trace")

    monkeypatch.setitem(providers.EAGER_TWO, "clip", {"broken": broken})
    rows = {row.provider: row for row in small(batch="40", providers="eager-two,eager-one").rows}
    assert rows["eager-two"].reason == "RuntimeError: no kernel for this"
    assert rows["eager-one"].full_ms
    assert rows["eager-one"].full_ratio is None  # vlmfast did not run


def test_what_is_compiled_is_the_form_that_was_fastest_uncompiled(small, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda fn, dynamic: lambda *leaves: compiled.append(fn) or fn(*leaves))
    plain, row = small(batch="40", providers="eager-one,torch-compile").rows
    assert row.form == f"of {plain.form}"
    assert set(compiled) == {providers.EAGER_ONE["clip"][plain.form]}


def test_a_child_that_dies_takes_its_provider_along(small, monkeypatch):
    def killed(setup, **_):
        raise RuntimeError("killed by the system, most likely for want of memory")

    monkeypatch.setattr(memory, "peak_in_child", killed)
    (row,) = small(batch="40", providers="eager-one").rows
    assert "killed by the system" in row.reason


def test_ratios_are_the_providers_median_over_ours():
    def row(provider, batch, forward, full, extra):
        times = {"forward_ms": Spread(forward, 0.1, 99.0), "full_ms": Spread(full, 0.1, 99.0)} if forward else {}
        return Row(provider, batch, extra_bytes=extra, **times)

    rows = [row("eager-one", 64, 3.0, 9.0, 600), row("vlmfast", 64, 2.0, 4.0, 200), row("eager-one", 128, 1.0, 1.0, 1)]
    rows += [row("open_clip", 64, None, None, None)]
    report.set_ratios(rows)
    assert [each.forward_ratio for each in rows] == [1.5, 1.0, None, None]
    assert [each.full_ratio for each in rows] == [2.25, 1.0, None, None]
    assert [each.memory_ratio for each in rows] == [3.0, 1.0, None, None]


def test_the_json_carries_what_repeats_the_run(small, tmp_path):
    result = small(providers="vlmfast,open_clip,linear-cross-entropy", loss="vse")
    report.write(result, tmp_path / "new" / "out.json", None, None)
    read = json.loads((tmp_path / "new" / "out.json").read_text())
    assert read["schema"] == "vlmfast-bench-2"
    assert read["kernel"] == "vse_loss"
    assert read["config"] == {
        "loss": "vse",
        "device": "cpu",
        "threads": 1,
        "batch": "40,24",
        "dim": 16,
        "dtype": "float32",
        "providers": "vlmfast,open_clip,linear-cross-entropy",
        "precision": None,
        "max_workspace": None,
        "rounds": 2,
        "seconds": 0.0,
        "exact_up_to": 8192,
        "seed": 0,
    }
    assert read.keys() == {field.name for field in dataclasses.fields(Report)}
    assert read["rows"][0].keys() == {field.name for field in dataclasses.fields(Row)}
    assert read["rows"][0]["full_ms"].keys() == {"median", "p20", "p80"}
    assert read["rows"][1]["reason"] == "open_clip has no hinge loss"
    assert {"cpu", "cores", "instruction_sets", "load_average"} <= read["machine"].keys()
    assert read["machine"]["cores"] >= 1
    assert {"vlmfast", "python", "torch"} <= read["versions"].keys()
    assert read["commit"] is None or len(read["commit"]["sha"]) == 40


LIGER = (  # its benchmark/data/all_benchmark_data.csv, with vlmfast_version for liger_version
    "kernel_name,kernel_provider,kernel_operation_mode,metric_name,metric_unit,x_name,x_label,x_value,y_value_50,"
    "y_value_20,y_value_80,extra_benchmark_config_str,gpu_name,timestamp,vlmfast_version"
)


def test_the_csv_is_ligers(small, tmp_path):
    path = tmp_path / "all.csv"
    result = small(providers="vlmfast,eager-two", batch="24")
    report.write_csv(result, path)
    report.write_csv(result, path)
    header, *lines = path.read_text().splitlines()
    assert header == LIGER
    assert len(lines) == 2 * 2 * 4  # runs x providers x (forward, backward, full, memory)
    read = list(csv.DictReader(path.read_text().splitlines()))
    assert {(line["kernel_operation_mode"], line["metric_name"], line["metric_unit"]) for line in read} == {
        ("forward", "speed", "ms"),
        ("backward", "speed", "ms"),
        ("full", "speed", "ms"),
        ("full", "memory", "MB"),
    }
    full = next(line for line in read if line["kernel_provider"] == "eager-two" and line["metric_unit"] == "MB")
    assert float(full["y_value_50"]) == pytest.approx(20, abs=0.01)
    assert full["kernel_name"] == "clip_loss"
    assert (full["x_name"], full["x_value"]) == ("B", "24")
    assert json.loads(full["extra_benchmark_config_str"])["dim"] == 16


def test_a_csv_with_other_columns_is_left_alone_and_refused_before_the_run(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(BenchError, match=r"other\.csv has the columns a,b"):
        loss.main(dataclasses.replace(QUICK, csv=path))
    assert path.read_text() == "a,b\n1,2\n"
    with pytest.raises(BenchError, match="must end in one of"):
        loss.main(dataclasses.replace(QUICK, plot=tmp_path / "plot.bmp2"))


def test_the_table_names_everyone_and_every_reason(small, capsys, monkeypatch):
    monkeypatch.setattr(loss, "run", lambda config, say: small(loss="siglip", batch="24"))
    loss.main(QUICK)
    printed = capsys.readouterr().out
    for provider in EVERYONE.split(","):
        assert provider in printed
    for column in ("fwd + bwd ms", "x memory", "in all MiB", "grad err"):
        assert column in printed
    assert "…" not in printed  # nothing is cut off
    assert "linear-cross-entropy did not run: linear_cross_entropy is a softmax over classes" in printed
    assert "siglip_loss, D=16, float32, 1 thread" in printed


def test_the_plot_is_a_picture(small, tmp_path):
    result = small(providers="vlmfast,eager-one")
    report.write(result, None, None, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_library_is_named_before_the_run(monkeypatch, tmp_path):
    for library, extra, changes in (("rich", "cli", {}), ("matplotlib", "demo", {"plot": tmp_path / "a.png"})):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, library, None)
            with pytest.raises(ImportError, match=rf"{library} is not installed.*vlmfast\[{extra}\]"):
                loss.main(dataclasses.replace(QUICK, **changes))
