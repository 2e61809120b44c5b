"""Runs of `open_clip_train.main` on tiny models, with and without vlmfast's losses; as a program, a rank of two."""

import importlib
import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_hook

from vlmfast.bench.providers import open_clip_module
from vlmfast.integrations import open_clip as integration

LOSSES = ("ClipLoss", "SigLipLoss", "CoCaLoss", "DistillClipLoss")
VISION = {"image_size": 8, "patch_size": 4, "layers": 1, "width": 32, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
CLIP = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
CONFIGS = {
    "tiny-clip": CLIP,
    "tiny-bias": CLIP | {"init_logit_bias": -10, "custom_text": True},
    "tiny-coca": CLIP
    | {
        "custom_text": True,
        "vision_cfg": VISION | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
}
FLAGS = [
    *("--dataset-type", "webdataset", "--workers", "0", "--device", "cpu", "--precision", "fp32"),
    *("--epochs", "1", "--lr", "2e-3", "--warmup", "20", "--seed", "3", "--save-frequency", "0"),
]
RANKED = ["--model tiny-clip --local-loss --gather-with-grad", "--model tiny-bias --siglip"]


def arguments(shards, folder, calls, batch, flags):
    """The command line of so many calls of the loss, on a batch of so many on all ranks together."""
    size = ["--train-num-samples", str(calls * batch), "--batch-size", str(batch)]
    return ["--train-data", shards, *size, *FLAGS, *flags.format(folder=folder).split()]


def prepare(folder):
    """open_clip knows the models above, whose weights lie in the folder; the order of the samples repeats."""
    open_clip, main = open_clip_module("open_clip"), importlib.import_module("open_clip_train.main")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    for name in ("tiny-clip", "tiny-coca"):
        torch.manual_seed(5)
        model = open_clip.create_model(name)
        for weight in model.parameters():
            if not weight.isfinite().all():  # open_clip leaves one of CoCa's as it was allocated
                torch.nn.init.normal_(weight, std=0.1)
        torch.save(model.state_dict(), folder / f"{name}.pt")
    main.setup_logging = lambda *_: None  # it changes every logger there is
    webdataset = importlib.import_module("webdataset")
    shuffle = webdataset.filters.shuffle  # seeded by the time and the number of the process, else
    webdataset.shuffle = lambda *args, **sizes: shuffle(*args, **sizes, rng=random.Random(0))
    return main.main


def losses_of(train, argv):
    """Trains; returns every step's losses, and the packages of the classes that computed them."""
    steps, packages = [], set()

    def note(module, _, output):
        if type(module).__name__ in LOSSES:
            packages.add(type(module).__module__.split(".")[0])
            steps.append({name: value.item() for name, value in output.items()})

    hook = register_module_forward_hook(note)
    try:
        train(argv)
    finally:
        hook.remove()
    return steps, packages


def both_ways(main, folder, argv):
    """The losses of a run without vlmfast's and of one with them; only the folder of the logs differs."""
    theirs, original = losses_of(main, [*argv, "--logs", str(folder / "theirs")])
    ours, replaced = losses_of(integration.main, [*argv, "--logs", str(folder / "ours")])
    assert (original, replaced) == ({"open_clip"}, {"vlmfast"})
    return theirs, ours


def on_a_rank(folder, shards):
    """One of torchrun's processes: what both runs lost on it, for each of `RANKED`."""
    main = prepare(Path(tempfile.mkdtemp(dir=folder)))
    wrap = torch.nn.parallel.DistributedDataParallel  # open_clip names the device, which DDP refuses for a CPU
    torch.nn.parallel.DistributedDataParallel = lambda model, device_ids=None, **flags: wrap(model, **flags)
    start = torch.distributed.init_process_group  # every run would; the store of torchrun knows one group
    torch.distributed.init_process_group = lambda **how: torch.distributed.is_initialized() or start(**how)
    losses = []
    for number, flags in enumerate(RANKED):
        (folder / str(number)).mkdir(exist_ok=True)
        argv = arguments(shards, folder, 60, 8, f"{flags} --dist-backend gloo")
        losses.append(both_ways(main, folder / str(number), argv))
    (folder / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    on_a_rank(Path(sys.argv[1]), sys.argv[2])
