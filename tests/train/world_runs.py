"""What torchrun starts for test_world.py: runs of a small model on every rank, which leave their folders behind."""

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from vlmfast.distributed import gather_rows
from vlmfast.train import SplitLoss, adamw, fit, warmup_constant
from vlmfast.train.world import World, replicate, shard, start

ROWS, STEPS, WIDTH = 12, 6, 6  # rows of a step, over all ranks


@dataclass
class Pairs:
    x: torch.Tensor
    y: torch.Tensor

    def __len__(self):
        return len(self.x)

    def to(self, device, *, non_blocking=False):
        return self

    def split(self, size):
        return [Pairs(*parts) for parts in zip(self.x.split(size), self.y.split(size), strict=True)]


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(torch.tanh(self.linear(x)))


class Towers(nn.Module):
    """float64, with blocks to shard, an odd number of rows to shard unevenly, and a scale without dimensions."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(dropout) for _ in range(2)])
        self.head = nn.Linear(WIDTH, 3)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.double()

    def forward(self, x, y):
        for block in self.blocks:
            x, y = block(x), block(y)
        x, y = (F.normalize(self.head(z), dim=1) for z in (x, y))
        return {"image_features": x, "text_features": y, "logit_scale": self.logit_scale.exp()}


def loss(outputs, batch):
    """The rows of this rank against the columns of all: its mean over ranks is the whole batch's."""
    x, y, scale = outputs["image_features"], outputs["text_features"], outputs["logit_scale"]
    rank, columns = 0, y
    if dist.is_initialized():
        rank, columns = dist.get_rank(), gather_rows(y)
    return {"contrastive_loss": F.cross_entropy(scale * x @ columns.T, torch.arange(len(x)) + rank * len(x))}


LOSS = SplitLoss(lambda model, batch: model(batch.x, batch.y), loss)


class Stream:
    """This rank's rows of steps start, start + 1, ...; with `stateful` it starts at 0 and must be told where it was."""

    def __init__(self, world, start, stateful):
        self.world, self.stateful = world, stateful
        self.step = 0 if stateful else start
        if stateful:
            self.state_dict = lambda: {"rank": world.rank, "at": self.step}
            self.load_state_dict = self._load

    def _load(self, state):
        assert state["rank"] == self.world.rank
        self.step = state["at"]

    def __iter__(self):
        return self

    def __next__(self):
        generator = torch.Generator().manual_seed(self.step)
        x, y = torch.randn(2, ROWS, WIDTH, generator=generator, dtype=torch.float64)
        self.step += 1
        rows = slice(*(ROWS // self.world.world_size * (self.world.rank + i) for i in (0, 1)))
        return Pairs(x[rows], y[rows])


def score(model):
    """Of a model in parts it takes all ranks to tell."""
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return {"norm": sum(p.square().sum() for p in whole)}


def train(out, world, *, spread=replicate, steps=STEPS, dropout=0.0, stateful=False, **options):
    model = spread(Towers(dropout), world)
    options = {
        "log_every": 1,
        "save_every": 3,
        "eval_every": 3,
        "ema": 0.5,
        "grad_clip_norm": 0.5,
        "stream": io.StringIO(),
        **options,
    }
    return fit(
        model,
        LOSS,
        lambda start: Stream(world, start, stateful),
        adamw(model, lr=0.01),
        warmup_constant(0.01),
        steps=steps,
        out=out,
        evaluators={"score": score},
        world=world,
        **options,
    )


def main(out: Path, world: World) -> None:
    train(out / "ddp", world)
    train(out / "micro", world, micro_batch_size=4)
    train(out / "fsdp", world, spread=shard)
    train(out / "fsdp-micro", world, spread=shard, micro_batch_size=4)
    train(out / "sharded", world, spread=shard, sharded_checkpoints=True)
    train(out / "crossed", world, spread=shard, resume=out / "ddp/checkpoints/step_000003")
    train(out / "uncrossed", world, resume=out / "sharded/checkpoints/step_000003")
    for name, options in {"ddp": {}, "fsdp": {"spread": shard, "sharded_checkpoints": True}}.items():
        options = {"dropout": 0.3, "stateful": True, **options}
        train(out / f"{name}-straight", world, **options)
        train(out / f"{name}-resumed", world, steps=3, **options)
        train(out / f"{name}-resumed", world, resume="latest", **options)
    said = world.gather(f"rank {world.rank}"), world.first(lambda: f"first {world.rank}")
    (out / f"said-{world.rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with start("cpu") as world:
        main(Path(sys.argv[1]), world)
