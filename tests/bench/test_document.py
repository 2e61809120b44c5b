"""Tables made of result files: those of the documents, and those of files made up here."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest

from vlmfast import cli
from vlmfast.bench import document, goals, report
from vlmfast.bench.providers import BenchError, quiet_compiler
from vlmfast.bench.report import Report, Row
from vlmfast.bench.timing import Spread
from vlmfast.models import load_config

ROOT = Path(__file__).parent.parent.parent
MIB = 2**20
MACHINE = {"cpu": "Processor of the test", "cores": 2}
GPU = MACHINE | {"gpu": {"name": "GPU of the test", "driver": "580.1"}}
CONFIG = {"loss": "clip", "device": "cpu", "threads": 1, "batch": "64", "dim": 512, "dtype": "float32"}


def row(provider, batch, ms, **more):
    return Row(provider, batch, forward_ms=Spread(ms / 4, 0, 0), full_ms=Spread(ms, ms, ms), gflops=800.0, **more)


def made(batches=(64,), machine=MACHINE, **changes):
    """A report in which eager-one takes 1.5 times as long as ours and open_clip did not run."""
    rows = []
    for batch in batches:
        rows += [
            row(
                "vlmfast", batch, 10.0, extra_bytes=3 * MIB, loss_error=2e-6, gradient_errors={"image": 3e-3, "text": 0}
            ),
            row("eager-one", batch, 15.0, extra_bytes=30 * MIB),
            Row("open_clip", batch, reason="No module named 'open_clip'"),
        ]
        rows[-3].peak_share, rows[-3].forward_gflops = 0.8, 900.0
    config = CONFIG | {"batch": ",".join(map(str, batches))} | changes
    commit = {"sha": "0123456789abcdef", "dirty": False}
    result = Report("clip_loss", config, "2026-01-02T03:04:05+00:00", machine, {"torch": "2.99"}, commit, rows)
    result.peak_gflops = {str(batch): Spread(1000.0, 0, 0) for batch in batches}
    report.set_ratios(result.rows)
    return result


@pytest.fixture
def results(tmp_path):
    """A folder, and a function that writes a file into it."""
    folder = tmp_path / "results"
    folder.mkdir()

    def write(name, *reports, **more):
        read = [dataclasses.asdict(each) for each in reports]
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(read[0] if not more else {"reports": read} | more))
        return path

    return folder, write


def test_the_tables_of_the_documents_are_what_the_files_say(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert cli.main(["bench", "report", "--check"]) == 0
    assert "as its files say" in capsys.readouterr().out
    text = (ROOT / "docs/benchmarks.md").read_text()
    assert len(document.BLOCK.findall(text)) == text.count("<!-- results:") > 0
    assert len(goals.BLOCK.findall(text)) == text.count("<!-- goals:") > 0


def test_a_number_that_was_changed_is_seen_and_mended(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs/benchmarks.md").read_text()
    copied = tmp_path / "benchmarks.md"
    words = ["bench", "report", "--document", str(copied)]
    copied.write_text(text)
    assert cli.main(words) == 0  # its links name the folder from here
    text = copied.read_text()
    copied.write_text(text.replace("| 663 |", "| 563 |", 1))
    assert cli.main([*words, "--check"]) == 1
    assert "differ from their files" in capsys.readouterr().out
    assert cli.main(words) == 0
    assert copied.read_text() == text


def test_prose_is_left_alone_and_only_the_named_sizes_are_shown(results):
    folder, write = results
    write("box/some.json", made((64, 128)))
    start = "<!-- results: box/some.json, B = 128 -->"
    text = f"before\n\n{start}\nold\n<!-- end of results -->\nafter\n"
    new = document.refreshed(text, folder, "../results")
    assert new.startswith(f"before\n\n{start}\n`vlmfast bench loss")
    assert new.endswith("<!-- end of results -->\nafter\n")
    assert "old" not in new
    assert "B = 128 |" in new
    assert "B = 64 |" not in new
    assert "(../results/box/some.json)" in new
    assert document.refreshed(new, folder, "../results") == new


def test_a_table_of_a_processor(results):
    text = document.tables(results[1]("some.json", made()))
    assert text.splitlines()[0] == "`vlmfast bench loss --loss clip --threads 1 --batch 64 --dim 512`"
    assert "| clip_loss | vlmfast | eager-one | of the micro-kernel | extra MiB: vlmfast, eager-one |" in text
    assert "| D = 512, B = 64 | 10.0 | 15.0 (1.50×) | 80 % | 3.0, 30 | 2e-06, 3e-03 |" in text
    assert "- open_clip did not run at D = 512, B = 64: No module named 'open_clip'" in text
    assert "some.json: Processor of the test, PyTorch 2.99, 2026-01-02, commit 0123456." in text


def test_a_part_of_gpu_check_is_a_table_a_kernel_and_dtype(results):
    gpu = {"machine": GPU, "device": "cuda"}
    reports = [
        made((4096,), dtype="bfloat16", **gpu),
        made((8192,), **gpu),
        made((64,), dtype="bfloat16", dim=768, **gpu),
    ]
    reports.append(made((65536,), dtype="bfloat16", **gpu))
    text = document.tables(results[1]("part.json", *reports, command="benchmarks/gpu_check.sh --part loss"))
    assert text.startswith("`benchmarks/gpu_check.sh --part loss`\n")
    assert text.count("| TFLOP/s forward |") == 2
    assert "| clip_loss, float32 |" in text
    lines = [line for line in text.splitlines() if line.startswith("| D = ")]
    assert [line.split("|")[1].strip() for line in lines] == [
        "D = 512, B = 4096",
        "D = 512, B = 65536",
        "D = 768, B = 64",
        "D = 512, B = 8192",
    ]
    assert "| 1 | 1 | 80 % of 1 |" in lines[0]
    assert "driver 580.1" in text


def test_who_did_not_run_has_a_line_where_nobody_did(results):
    nobody = made()
    nobody.rows = [Row("vlmfast", 64, reason="no kernel"), Row("memeff", 64, reason="no GPU")]
    text = document.tables(results[1]("some.json", nobody))
    assert "- vlmfast did not run at D = 512, B = 64: no kernel\n- memeff" in text
    assert "|" not in text


def test_results_of_the_first_schema_are_read(results):
    read = dataclasses.asdict(made())
    read["microkernel_gflops"] = read.pop("peak_gflops")
    for each in read["rows"]:
        each["microkernel_share"] = each.pop("peak_share")
        for name in ("forward_gflops", "recall"):
            del each[name]
    path = results[0] / "old.json"
    path.write_text(json.dumps(read))
    (loaded,) = document.load(path)
    assert loaded.peak_gflops["64"].median == 1000
    assert loaded.rows[0].peak_share == 0.8
    assert loaded.rows[0].full_ms.median == 10


@pytest.mark.parametrize("text", ["{", "[]", '{"kernel": "clip_loss"}', '{"reports": [{"rows": 1}]}'])
def test_what_is_no_result_is_said(tmp_path, text):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(BenchError, match=r"wrong\.json is no result"):
        document.load(path)


def test_a_missing_file_or_size_is_said(results):
    folder, write = results
    write("some.json", made())
    for name, said in (("none.json", "there is no file"), ("some.json, B = 65", "has no batch size 65; it has 64")):
        with pytest.raises(BenchError, match=said):
            document.refreshed(f"<!-- results: {name} -->\n<!-- end of results -->", folder, "x")


def test_files_are_printed_and_drawn(results, tmp_path, capsys):
    folder, write = results
    write("some.json", made((64, 128)))
    write("parts.json", made((64, 128)), made((64, 128), dim=768), command="gpu_check.sh")
    (folder / "other.json").write_text('{"benchmarks": []}')
    none = str(tmp_path / "no.md")
    assert cli.main(["bench", "report", str(folder), "--results", str(folder), "--document", none, "--plots"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("<!-- results: ") == 2
    assert "<!-- results: some.json -->" in printed
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == ["parts-clip-float32-512.png", "parts-clip-float32-768.png", "some.png"]
    assert (folder / "some.png").read_bytes().startswith(b"\x89PNG")


def test_no_result_is_no_goal_reached(tmp_path):
    table = goals.table(tmp_path / "nowhere")
    assert table.count(goals.UNMEASURED) == len(goals.GOALS) + 1
    assert "met" not in table
    assert "missed" not in table


def line(table, start):
    return next(each for each in table.splitlines() if each.startswith(f"| {start}"))


def test_goals_are_met_or_missed_by_the_newest_result(results):
    folder, write = results
    large = {"machine": GPU, "device": "cuda", "dtype": "bfloat16"}
    reports = [made((65536,), dim=D, **large) for D in (512, 768, 1024)]
    for each, rate in zip(reports, (600e3, 640e3, 660e3), strict=True):
        each.rows[0].forward_gflops, each.rows[0].gflops = rate, rate
        each.rows[1].provider = "eager-two"
        each.rows[1].full_ms = Spread(29.0, 29.0, 29.0)
    write("b.json", *reports[:2], command="x", date="2026-01-01")
    table = goals.table(folder)
    assert "| 600 / 640 / unmeasured |" in line(table, "clip_loss, forward, D")
    newer = copy.deepcopy(reports[0])
    newer.rows[0].forward_gflops, newer.date = 580e3, "2026-02-01T00:00:00+00:00"
    write("a.json", newer, reports[2], command="x", date="2026-02-01")
    (folder / "c.json").write_text(
        json.dumps(
            {
                "part": "tests",
                "date": "2026-01-03",
                "runs": [
                    {"passed": 5, "failed": 1, "skipped": 2, "end": "complete"},
                    {"left_out": "the time was spent"},
                ],
            }
        )
    )
    table = goals.table(folder)
    assert "| 580 / 640 / 660 TFLOP/s, **missed** |" in line(table, "clip_loss, forward, D")
    assert "| 600 / 640 / 660 TFLOP/s, met |" in line(table, "clip_loss, forward and backward")
    assert "| 2.9 / 2.9 / 2.9 ×, **missed** |" in line(table, "clip_loss against open_clip's formula")
    assert "5 passed, 1 failed, 2 skipped; not all were run" in line(table, "the tests")


def test_every_goal_is_measured_by_gpu_check():
    import runpy

    check = runpy.run_path(str(ROOT / "benchmarks/gpu_check.py"))
    points = {("similarity_topk", job["dtype"], job["dim"], job["items"]) for job in check["SEARCHES"]}
    for job in check["LOSSES"]:
        kernel = document.TITLES[job["loss"]]
        points |= {(kernel, job["dtype"], job["dim"], int(batch)) for batch in job["batch"].split(",")}
    for job in check["STEPS"]:
        kernel = f"{job['model']}, training step, {job['caption_length']}"
        points.add((kernel, "bfloat16", load_config(job["model"]).embed_dim, job["batch"]))
    with quiet_compiler():
        attention, patch, step, head, _ = (
            runpy.run_path(str(ROOT / words[0])) for words, _ in check["SCRIPTS"].values()
        )
    points |= {("attention", "bfloat16", K, T) for T, K in attention["SHAPES"]}
    points |= {("patch_embed", "bfloat16", p, B) for p, B in patch["GPU_SIZES"]}
    size = step["DEFAULTS"]["cuda"]
    width = load_config(size["model"]).embed_dim
    points |= {("cached step", "bfloat16", width, size[name]) for name in ("batch", "large_batch")}
    rows, width, _ = head["SIZES"]["cuda"]
    shares = check["SCRIPTS"]["vlm"][0][-1].split(",")
    points |= {("linear_cross_entropy", "bfloat16", width, round(float(share) * rows)) for share in shares}
    assert {point for goal in goals.GOALS for point in goal.points} <= points


def test_goals_of_scripts_and_training_steps(results):
    folder, write = results
    rows = [
        {"what": f"dense, T={T}, K=64", "provider": name, "forward_ratio": ratio, "full_ratio": ratio}
        for T in goals.LENGTHS
        for name, ratio in (("vlmfast", 1.0), ("sdpa-flash", 2.75), ("sdpa-cudnn", 2.5), ("sdpa", 0.5))
    ]
    rows.append({"what": "packed text", "provider": "vlmfast", "forward_ratio": 1.0, "full_ratio": 1.0})
    (folder / "attention.json").write_text(json.dumps({"benchmark": "attention", "date": "2026-01-02", "rows": rows}))
    patch = [
        {"provider": name, "patch": 16, "batch": 1024, "forward_ms_ratio": ratio, "full_ms_ratio": 1.0}
        for name, ratio in (("vlmfast", 1.0), ("eager", 3.5))
    ]
    read = {"op": "patch_embed", "date": "2026-01-02", "measurements": patch}
    (folder / "patch.json").write_text(json.dumps(read))
    cached = [
        {"what": "ViT-B-32", "provider": name, "batch": batch, "full_ratio": ratio}
        for name, batch, ratio in (("plain", 4096, 0.75), ("open_clip", 4096, 1.25), ("loss alone", 65536, 0.02))
    ]
    (folder / "step.json").write_text(json.dumps({"benchmark": "cached step", "date": "2026-01-02", "rows": cached}))
    head = [
        {"provider": name, "supervised": share, "full_ratio": ratio, "full_ms": {"median": ms}}
        for share, other, ms in ((0.05, 9.0, 1.0), (0.15, 9.0, 2.0), (0.5, 9.0, 8.0), (1.0, 4.0, 16.0))
        for name, ratio in (("vlmfast", 1.0), ("liger", other))
    ]
    head.append({"provider": "quack", "supervised": 1.0, "left_out": "No module named 'quack'"})
    read = {"benchmark": "linear_cross_entropy", "date": "2026-01-02", "sizes": {"M": 4096, "D": 4096, "V": 9}}
    (folder / "head.json").write_text(json.dumps(read | {"rows": head}))
    for length in ("real", "77"):
        step = made((2048,), machine=GPU, device="cuda", dtype="bfloat16", caption_length=length, model="ViT-B-32")
        step.kernel = "ViT-B-32, training step"
        del step.config["loss"]
        step.rows[1].provider = "open_clip-compile"
        write(f"step-{length}.json", step, command="x", date="2026-01-02")
    table = goals.table(folder)
    assert "| 2.5 / 2.5 / 2.5 / 2.5 / 2.5 / 2.5 ×, met |" in line(table, "attention, forward")
    assert "| 3.5 ×, **missed** |" in line(table, "patch_embed")
    assert "| 4 ×, **missed** |" in line(table, "linear_cross_entropy, M = 4096")
    assert "| unmeasured |" in line(table, "… against quack's")
    assert "| 16 / 8 / 2 ×, met |" in line(table, "… with 5 / 15 / 50 % of the rows supervised")
    assert "| 0.75 ×, met |" in line(table, "cached step of ViT-B/32")
    assert "| 1.25 ×, **missed** |" in line(table, "… against open_clip's accum-freq")
    assert "| 0.02, met |" in line(table, "… the loss's part")
    assert "| unmeasured |" in line(table, "training step of ViT-B/32")
    assert "| 1.5 ×, met |" in line(table, "… against open_clip compiled")
    assert "| 1.5 ×, met |" in line(table, "… with real caption lengths")
