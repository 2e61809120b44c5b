"""`vlmfast plan`: bytes counted without values are those that a real model holds, and what is chosen fits."""

import functools
import json

import pytest
import torch

from vlmfast.bench.plan import Towers, held
from vlmfast.models import ClipConfig, build_clip
from vlmfast.recipes import plan

SIDE, T, D = 32, 12, 16
VISION = {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": T, "vocab_size": 290, "width": 32, "heads": 2, "layers": 2}
TINY = ClipConfig.from_dict({"embed_dim": D, "vision_cfg": VISION, "text_cfg": TEXT})
MB = 10**6
towers_of = functools.cache(Towers)  # what was measured once need not be for the next test


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY.to_dict()))
    return path


@pytest.fixture
def small(monkeypatch):
    """A loss that holds little, so that towers of this size are what counts."""
    monkeypatch.setattr(plan, "Towers", towers_of)
    monkeypatch.setattr(plan, "MAX_WORKSPACE", 2**16)


def flags(tiny, **changes):
    return plan.Config(**{"model": str(tiny), "batch": 1024, "memory": "100MB"} | changes)


def saved_bytes(model, image, text, precision):
    """What autograd keeps of a real forward, storage by storage, weights and inputs not counted; and the outputs."""
    storages = {}

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        alive.append(x)
        return x

    alive = []
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "amp_bf16"),
    ):
        outputs = model(image, text)
    for x in outputs.values():
        keep(x)
    given = {x.untyped_storage().data_ptr() for x in (*model.parameters(), image, text)}
    return sum(size for place, size in storages.items() if place not in given)


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pairs", [5])
def test_bytes_without_values_are_those_of_a_real_model(precision, checkpointing, pairs):
    model = build_clip(TINY, seed=0)
    model.set_grad_checkpointing(checkpointing)
    model.packing = False
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    image = torch.randint(0, 256, (pairs, 3, SIDE, SIDE), dtype=torch.uint8)
    text = torch.randint(1, 280, (pairs, T))
    text[:, -1] = 289
    planned = towers_of(TINY, precision=precision, tokens=T).held(pairs, checkpointing)
    real = held(model, image, text, precision)
    saved = saved_bytes(model, image, text, precision)
    assert planned == real
    assert planned.kept == saved
    assert planned.features == pairs * D * 2 * (2 if precision == "amp_bf16" else 4)


def test_checkpointing_and_shorter_captions_hold_less():
    long, short = (towers_of(TINY, precision="fp32", tokens=tokens) for tokens in (T, T // 2))
    assert long.held(64, True).kept < 0.4 * long.held(64, False).kept
    assert short.held(64, False).kept < 0.9 * long.held(64, False).kept


def test_what_fits_whole_needs_no_micro_batches(tiny, small):
    made = plan.make(flags(tiny, memory="2GB"))
    assert (made.micro_batch_size, made.batch_size, made.grad_checkpointing) == (1024, 1024, False)
    assert made.command.endswith(
        f"vlmfast train --model {tiny} --batch-size 1024 --precision amp_bf16 --positives pair"
    )


@pytest.mark.parametrize("memory", [9, 40])
def test_the_largest_micro_batch_that_fits_is_chosen(tiny, small, memory):
    made = plan.make(flags(tiny, memory=f"{memory}MB"))
    assert made.total_bytes <= made.memory_bytes == memory * MB
    assert 1 <= made.micro_batch_size < 1024
    assert f"--micro-batch-size {made.micro_batch_size}" in made.command
    assert ("--grad-checkpointing" in made.command) == made.grad_checkpointing
    towers = towers_of(TINY, precision="amp_bf16", tokens=T)
    now, twice = (towers.held(n * made.micro_batch_size, made.grad_checkpointing).peak for n in (1, 2))
    assert made.total_bytes - (made.max_workspace - plan.MAX_WORKSPACE) + twice - now > made.memory_bytes


def test_parts_are_what_they_say(tiny, small):
    parts = {part.name: part.bytes for part in plan.make(flags(tiny)).parts}
    P = sum(p.numel() for p in build_clip(TINY).parameters())
    assert parts["weights"] == parts["gradients"] == 4 * P
    assert parts["optimizer"] == 8 * P
    assert parts["batch"] == 1024 * (3 * SIDE * SIDE + 8 * T + 16)
    assert parts["features"] == 1024 * 2 * D * 2 * 2
    assert parts["reserve"] == 6 * MB


def test_blocks_are_computed_twice_before_micro_batches_get_small(tiny, small):
    made = plan.make(flags(tiny, memory="8MB"))
    assert made.grad_checkpointing
    assert made.micro_batch_size > 1


def test_ranks_share(tiny, small):
    alone = {part.name: part.bytes for part in plan.make(flags(tiny)).parts}
    made = plan.make(flags(tiny, world_size=4))
    shared = {part.name: part.bytes for part in made.parts}
    assert shared["batch"] == alone["batch"] / 4
    assert shared["weights"] == alone["weights"]
    assert made.command.startswith("torchrun --nproc-per-node 4 -m -- vlmfast.cli train ")
    assert "--batch-size 256" in made.command
    sharded = plan.make(flags(tiny, world_size=4, fsdp=True))
    assert {part.name: part.bytes for part in sharded.parts}["optimizer"] == alone["optimizer"] // 4
    assert sharded.command.endswith("--fsdp")


def test_what_travels_grows_with_the_ranks_until_it_goes_round(tiny):
    row = 2 * D

    def travelling(ranks, rows=1024, siglip=False):
        return plan._travelling(ranks, rows, D, row, siglip)

    assert travelling(1) == 0
    assert travelling(8) == 2 * travelling(4) == 3 * 8 * 1024 * row
    assert travelling(8, rows=8192) == travelling(64, rows=8192) < travelling(3, rows=8192) * 2
    assert travelling(64, siglip=True) == travelling(2, siglip=True)


def test_spare_memory_keeps_tiles_of_the_softmax_loss_alone(tiny, small):
    assert plan.make(flags(tiny, memory="14MB")).max_workspace == 2**16 + 2**20
    made = plan.make(flags(tiny, memory="500MB"))
    assert made.max_workspace == 2**16 + 2 * 1024**2
    assert made.command.startswith(f"VLMFAST_MAX_WORKSPACE={made.max_workspace} ")
    assert plan.make(flags(tiny, memory="500MB", siglip=True)).max_workspace == 2**16


def test_what_cannot_fit_is_refused_with_what_is_missing(tiny, small):
    with pytest.raises(plan.DoesNotFitError, match=r"1024 pairs a step on 1 rank does not fit into 3MB.*are missing"):
        plan.make(flags(tiny, memory="3MB"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": "lots"}, "a number with a unit, such as 80GB"),
        ({"memory": "80 XB"}, "got '80 XB'"),
        ({"world_size": 3}, "--batch 1024 must be a multiple of --world-size 3"),
        ({"caption_length": 13}, "--caption-length must be 1 .. 12"),
        ({"fsdp": True}, "--world-size above 1"),
    ],
)
def test_refusals(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        plan.make(flags(tiny, **changes))


def test_units():
    assert plan.parse_bytes("80GB") == 80 * 10**9
    assert plan.parse_bytes("1.5 GiB") == 3 * 2**29


def test_batch_norms_see_the_whole_batch():
    resnet = {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    config = ClipConfig.from_dict({"embed_dim": D, "vision_cfg": resnet, "text_cfg": TEXT})
    towers = Towers(config, precision="fp32", tokens=T)
    assert towers.held(8, False).kept > 0


def test_the_command_prints_a_table_or_json(tiny, vlmfast):
    words = ["plan", "--model", tiny, "--batch", 1024, "--memory", "1GB"]
    printed = vlmfast(*words).out
    assert "activations" in printed
    assert "of 1.00" in printed
    assert f"vlmfast train --model {tiny} --batch-size 1024" in printed
    read = json.loads(vlmfast(*words, "--json").out)
    assert read["total_bytes"] == sum(part["bytes"] for part in read["parts"])
