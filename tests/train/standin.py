"""A small contrastive model with every trap of a resume in it, its batches, and a run of it."""

import io
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from vlmfast.train import adamw, fit, warmup_cosine

CLOCK = {"samples_per_second", "samples_per_second_per_gpu", "data_time", "batch_time"}


@dataclass
class Pairs:
    x: torch.Tensor
    y: torch.Tensor

    def __len__(self):
        return len(self.x)

    def to(self, device, *, non_blocking=False):
        return Pairs(self.x.to(device), self.y.to(device))


class Towers(nn.Module):
    """Dropout draws random numbers, batch norm keeps buffers, logit_scale starts near its bound."""

    def __init__(self, width=16, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.x = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 6))
        self.y = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 6, bias=False))
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(1, 8))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(99.0)))

    def no_weight_decay(self):
        return {"positional_embedding"}

    def forward(self, pairs):
        x = F.normalize(self.x(pairs.x + self.positional_embedding), dim=1)
        return self.logit_scale.exp() * x @ F.normalize(self.y(pairs.y), dim=1).T


def loss_fn(model, pairs):
    logits = model(pairs)
    loss = F.cross_entropy(logits, torch.arange(len(pairs)))
    return {"contrastive_loss": loss, "accuracy": (logits.argmax(1) == torch.arange(len(pairs))).float().mean()}


def batches(start):
    step = start
    while True:
        generator = torch.Generator().manual_seed(1000 + step)
        x = torch.randn(12, 8, generator=generator)
        yield Pairs(x, x.flip(1) + 0.3 * torch.randn(12, 8, generator=generator))
        step += 1


def train(out, steps=20, *, model=None, optimizer=None, total=20, lr=3e-3, batches=batches, loss_fn=loss_fn, **options):
    """(model, optimizer, what fit returned) of a run whose schedule is made for `total` steps."""
    model = model or Towers()
    optimizer = optimizer or adamw(model)
    options = {"log_every": 3, "stream": io.StringIO(), **options}
    schedule = warmup_cosine(lr, 4, total)
    return model, optimizer, fit(model, loss_fn, batches, optimizer, schedule, steps=steps, out=out, **options)


def lines(out):
    """The lines of metrics.jsonl without what the clock says."""
    from vlmfast.train import read_metrics

    clock = {f"train/{name}" for name in CLOCK}
    return [
        {key: value for key, value in line.items() if key not in clock} for line in read_metrics(out / "metrics.jsonl")
    ]
