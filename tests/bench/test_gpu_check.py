"""benchmarks/gpu_check.py without a GPU: what it runs, when it stops, and what it makes of failures."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check  # noqa: E402

from vlmfast.bench import loss, memory, meter, topk  # noqa: E402
from vlmfast.bench.memory import Peak  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))
OPTIONS = argparse.Namespace(device="cpu", quick=False, minutes=1.0, part="loss")
FACTS = {"part": "loss", "command": "gpu_check.sh", "date": "2026-01-02T03:04:05+00:00"}


@pytest.fixture
def in_this_process(monkeypatch):
    """Jobs run here, and quickly; answers[i] replaces what the i-th process would say."""
    monkeypatch.setattr(memory, "peak_in_child", lambda setup, **_: Peak(2**20, 2**28))
    monkeypatch.setattr(meter, "MICROKERNEL_SECONDS", 1e-4)
    monkeypatch.setattr(loss, "TUNING_SECONDS", 0.0)
    monkeypatch.setattr(topk, "TUNING_SECONDS", 0.0)
    started = []

    def here(part, jobs, seconds):
        started.append(jobs)
        order, answer = Path(tmp) / "order.json", Path(tmp) / f"answer-{len(started)}.jsonl"
        order.write_text(json.dumps({"part": part, "jobs": list(jobs.items())}))
        answer.touch()
        gpu_check.work(str(order), str(answer), str(seconds))
        return {each["job"]: each for each in map(json.loads, answer.read_text().splitlines())}, "status 0"

    tmp = None

    def use(folder):
        nonlocal tmp
        tmp = folder
        monkeypatch.setattr(gpu_check, "in_another_process", here)
        return started

    return use


def run(part, path, seconds=100.0, quick=False):
    options = argparse.Namespace(**vars(OPTIONS) | {"part": part, "quick": quick})
    failed = gpu_check.run_benchmarks(part, options, time.monotonic() + seconds, FACTS, path)
    return failed, json.loads(path.read_text())


@pytest.mark.parametrize("part", ["loss", "topk", "model"])
def test_every_benchmark_runs(part, in_this_process, tmp_path, capsys):
    in_this_process(tmp_path)
    failed, read = run(part, tmp_path / "part.json")
    wanted = {"loss": gpu_check.LOSSES, "topk": gpu_check.SEARCHES, "model": gpu_check.STEPS}[part]
    assert not failed
    assert read["left_out"] == []
    assert len(read["reports"]) == len(wanted)
    for report in read["reports"]:
        ours = report["rows"][0]
        assert ours["provider"] == "vlmfast"
        assert ours["reason"] is None
        assert ours["full_ms"]["median"] > 0
    printed = capsys.readouterr().out
    assert "`gpu_check.sh`" in printed
    shown = {
        "loss": "| vse_loss, hardest, bfloat16 |",
        "topk": "k = 10, 64 queries |",
        "model": "| CLIP-tiny, amp_bf16",
    }
    assert shown[part] in printed


def test_a_broken_process_goes_on_without_other_peoples_kernels(in_this_process, tmp_path, monkeypatch, capsys):
    started = in_this_process(tmp_path)
    monkeypatch.setattr(
        gpu_check, "LOSSES", gpu_check.LOSSES[3:5]
    )  # siglip, with siglip-kernel, and the hardest hinges
    here = gpu_check.in_another_process

    def breaks(part, jobs, seconds):
        if "siglip-kernel" in jobs.get(0, {}).get("providers", ""):
            started.append(jobs)
            return {}, "status 1"
        return here(part, jobs, seconds)

    monkeypatch.setattr(gpu_check, "in_another_process", breaks)
    failed, read = run("loss", tmp_path / "part.json")
    assert not failed
    assert len(started) == 2
    assert [report["kernel"] for report in read["reports"]] == ["siglip_loss", "vse_loss, hardest"]
    assert "siglip-kernel" not in read["reports"][0]["config"]["providers"]
    assert "ended with status 1 with other people's kernels in it" in capsys.readouterr().err


def test_what_breaks_without_them_too_is_left_out(in_this_process, tmp_path, monkeypatch, capsys):
    in_this_process(tmp_path)
    monkeypatch.setattr(gpu_check, "LOSSES", gpu_check.LOSSES[3:5])
    monkeypatch.setattr(gpu_check, "in_another_process", lambda part, jobs, seconds: ({}, "status -11"))
    failed, read = run("loss", tmp_path / "part.json")
    assert failed
    assert read["reports"] == []
    assert [each["reason"] for each in read["left_out"]] == 2 * ["the process ended with status -11"]
    assert capsys.readouterr().out.count("left out: ") == 2


def test_when_the_time_is_spent_nothing_starts(in_this_process, tmp_path):
    in_this_process(tmp_path)
    failed, read = run("topk", tmp_path / "part.json", seconds=-1.0)
    assert failed
    assert {each["reason"] for each in read["left_out"]} == {"the time was spent"}


def test_a_process_that_does_not_answer_in_time_is_ended(monkeypatch, tmp_path):
    idle = tmp_path / "idle.py"
    idle.write_text(
        "import pathlib, sys, time\n"
        "pathlib.Path(sys.argv[3]).with_suffix('.last').write_text('B=64: slow')\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.5)
    monkeypatch.setattr(gpu_check, "__file__", str(idle))
    start = time.monotonic()
    assert gpu_check.in_another_process("loss", {0: {}}, 2.0) == (
        {},
        "no answer in its time, last seen at 'B=64: slow'",
    )
    assert time.monotonic() - start < 30


TESTS = """
import time
def test_right(): pass
def test_wrong(): assert 1 == 2, "one is not two"
def test_not_here():
    import pytest
    pytest.skip("no GPU")
def test_long():
    if LONG: time.sleep(60)
"""


@pytest.mark.parametrize("long", [False, True])
def test_tests_are_counted_also_when_they_are_interrupted(tmp_path, monkeypatch, capfd, request, long):
    (tmp_path / "test_some.py").write_text(f"LONG = {long}\n{TESTS}")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)  # one process is enough
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a shell's job in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    for limit in (8.0, 40.0) if long else (60.0,):
        run = gpu_check.pytest_run(["test_some.py"], environment, limit)
        if run["failed"]:  # else pytest had not come so far: a busy machine
            break
    assert (run["failed"], run["skipped"]) == (1, 1)
    assert run["passed"] == (1 if long else 2)
    assert run["failures"] == [
        {"name": "test_some::test_wrong", "message": "AssertionError: one is not two assert 1 == 2"}
    ]
    assert run["end"] == ("interrupted: the time was spent" if long else "complete")


def test_the_part_of_tests_says_what_failed_and_what_was_left_out(tmp_path, monkeypatch, capsys):
    ran = {"end": "complete", "seconds": 3.0, "passed": 2, "failed": 1, "skipped": 0}
    answers = iter([{"arguments": ["a"], **ran, "failures": [{"name": "test::x", "message": "why"}]}])
    monkeypatch.setattr(gpu_check, "pytest_run", lambda words, environment, seconds: next(answers))
    clock = iter([0.0, 90.0])
    monkeypatch.setattr(gpu_check.time, "monotonic", clock.__next__)
    assert gpu_check.run_tests("tests", OPTIONS, 100.0, {"part": "tests"}, tmp_path / "tests.json")
    printed = capsys.readouterr().out
    assert "test::x: why" in printed
    assert "left out: the time was spent" in printed
    assert [run.get("passed") for run in json.loads((tmp_path / "tests.json").read_text())["runs"]] == [2, None]


def test_all_parts_on_a_gpu(fake_cuda, in_this_process, tmp_path, monkeypatch, capsys):
    in_this_process(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    tiny = {"loss": [{"loss": "clip", "dim": 16, "batch": "24", "dtype": "bfloat16", "providers": "vlmfast,memeff"}]}
    tiny["topk"] = [{"queries": 16, "items": 64, "dim": 16, "k": 3, "dtype": "float32", "rounds": 1}]
    tiny["model"] = [gpu_check.small(gpu_check.STEPS[0])]
    monkeypatch.setattr(gpu_check, "QUICK", tiny)
    scripts = []
    monkeypatch.setattr(gpu_check, "run_script", lambda part, *_: bool(scripts.append(part)))
    ran = {
        "arguments": ["a"],
        "end": "complete",
        "seconds": 3.0,
        "passed": 2,
        "failed": 0,
        "skipped": 0,
        "failures": [],
    }
    required = []
    monkeypatch.setattr(
        gpu_check,
        "pytest_run",
        lambda words, environment, seconds: required.append(environment["VLMFAST_REQUIRE"]) or ran,
    )
    assert gpu_check.main(["--quick", "--minutes", "3", "--out", str(tmp_path / "new")]) == 0
    assert required == ["cpu,triton"]
    files = sorted((tmp_path / "new").glob("*.json"))
    assert [path.name.split("-")[-1] for path in files] == ["loss.json", "model.json", "tests.json", "topk.json"]
    assert scripts == ["attention", "patch", "step", "vlm", "decode"]
    for path in files:
        read = json.loads(path.read_text())
        assert read["machine"]["gpu"]["name"] == "GPU of the test"
        assert "triton" in read["versions"]
    ours, peer = json.loads(files[0].read_text())["reports"][0]["rows"]
    assert ours["extra_bytes"] > 0
    assert "memeff" in peer["reason"]
    printed = capsys.readouterr().out
    assert "TFLOP/s" in printed
    assert "GPU of the test, PyTorch" in printed
    assert gpu_check.place("cuda") == "gpu-of-the-test"


def test_a_script_is_a_part(tmp_path, monkeypatch, capsys):
    script = tmp_path / "script.py"
    script.write_text("import pathlib, sys\nif 'fails' in sys.argv: sys.exit(3)\n")
    script.write_text(script.read_text() + 'pathlib.Path(sys.argv[-1]).write_text(\'{"rows": [1], "command": "x"}\')')
    options = argparse.Namespace(device="cpu")
    monkeypatch.setattr(gpu_check, "SCRIPTS", {"patch": ([str(script)], []), "attention": ([str(script)], ["fails"])})
    path = tmp_path / "patch.json"
    assert not gpu_check.run_script("patch", options, time.monotonic() + 60, FACTS, path)
    assert json.loads(path.read_text()) == FACTS | {"rows": [1]}
    assert gpu_check.run_script("attention", options, time.monotonic() + 60, FACTS, tmp_path / "attention.json")
    assert "left out: attention: the process ended with status 3" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["attention", "patch", "step"])
def test_scripts_take_their_flags(part):
    words, on_cpu = gpu_check.SCRIPTS[part]
    known = (ROOT / words[0]).read_text()
    flags = [word for word in [*words, *on_cpu, "--device", "--json"] if word.startswith("--")]
    assert [flag for flag in flags if f'add_argument("{flag}"' not in known] == []


def test_parts_run_in_their_order():
    assert gpu_check.parts_of("model,attention,patch") == ["attention", "patch", "model"]
    assert gpu_check.parts_of("all") == list(gpu_check.SHARES)
    assert sum(gpu_check.SHARES.values()) == pytest.approx(1)
    with pytest.raises(SystemExit):
        gpu_check.parser().parse_args(["--part", "models"])


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no GPU"):
        gpu_check.main(["--part", "loss"])


def test_wheels_are_unpacked_and_folders_taken_as_they_are(tmp_path):
    (tmp_path / "plain").mkdir()
    with zipfile.ZipFile(tmp_path / "some-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("some/__init__.py", "")
    folder, unpacked = map(Path, gpu_check.peers(tmp_path))
    assert folder == tmp_path
    assert (unpacked / "some" / "__init__.py").exists()
    assert gpu_check.peers(tmp_path / "plain") == [str(tmp_path / "plain")]
    assert gpu_check.peers(None) == []


def test_a_result_is_never_overwritten(tmp_path):
    first = gpu_check.free_name(tmp_path, "loss")
    first.touch()
    assert gpu_check.free_name(tmp_path, "loss").name == first.name.replace("-loss", "-loss-2")


@pytest.mark.slow
def test_the_script_from_end_to_end(tmp_path):
    environment = os.environ | {"VLMFAST_NO_EXT": "1", "PYTHON": sys.executable, "VLMFAST_COMMIT": "abc"}
    words = ["--part", "topk", "--quick", "--device", "cpu", "--minutes", "2", "--out", str(tmp_path)]
    done = subprocess.run([ROOT / "benchmarks/gpu_check.sh", *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*-topk.json")
    read = json.loads(path.read_text())
    assert [row["reason"] for row in read["reports"][0]["rows"]] == [None, None]
    assert {"date", "machine", "versions", "commit"} <= read.keys()
    assert "| similarity_topk, bfloat16, k = 10, 64 queries |" in done.stdout
