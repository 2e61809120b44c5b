"""Greedy decoding with a cache, beside recomputing the prefix for each token and beside transformers' `generate`.

    python benchmarks/models/bench_decode.py --json FILE
    python benchmarks/models/bench_decode.py --device cuda                    # a decoder of Llama 3.2 1B's size

Model: of P prompt and N new tokens a cache computes P + N - 1, recomputing N (P + (N - 1) / 2): with P = 64, N = 128 it
is 86 times as many, but in long products, where a cached step is a product of each weight with one vector a row, bound
by the reading of the weights.

Weights and prompts are the same and random, and nobody stops early. In float32 all tokens must agree; in bfloat16,
where two tokens may be as likely as each other, the share that does is told. On the CPU rates and ratios are of the
process's own seconds, which others cannot take of a shared machine; on a GPU they are the GPU's
(vlmfast/bench/meter.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfast.bench import machine, meter, timing
from vlmfast.bench.providers import UnavailableError
from vlmfast.models.decoder import Decoder, DecoderConfig, build_decoder
from vlmfast.models.generation import generate
from vlmfast.models.weights.decoder import save_decoder

SMALL = {"vocab_size": 8192, "width": 256, "layers": 6, "heads": 4, "context_length": 512}
LARGE = {"vocab_size": 128256, "width": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "mlp_width": 8192} | {
    "context_length": 2048,
    "tied": True,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"dtype": "float32", "prompt": 64, "sizes": SMALL},
    "cuda": {"dtype": "bfloat16", "prompt": 512, "sizes": LARGE},
}
Decode = Callable[[int], Tensor]  # number of new tokens -> [B, new]


@dataclass(frozen=True)
class Case:
    """What is run."""

    batch: int
    prompt: int
    new: int
    dtype: str
    threads: int
    device: str

    def name(self) -> str:
        return f"B={self.batch}, prompt {self.prompt}, {self.new} new tokens, {self.dtype}, {self.device}"


def cached(decoder: Decoder, ids: Tensor) -> Decode:
    """What we do."""
    return lambda new: torch.stack([row.tokens for row in generate(decoder, list(ids), max_new_tokens=new)])


def recomputed(decoder: Decoder, ids: Tensor) -> Decode:
    """The same decoder without a cache: the whole prefix for each token, the head for the last one only."""

    @torch.no_grad()
    def call(new: int) -> Tensor:
        whole = ids
        for _ in range(new):
            last = torch.arange(1, len(ids) + 1, device=ids.device) * whole.shape[1] - 1
            hidden = decoder(decoder.embed(whole), rows=last)
            whole = torch.cat([whole, decoder.logits(hidden).argmax(-1, keepdim=True)], 1)
        return whole[:, -new:].cpu()

    return call


def theirs(decoder: Decoder, ids: Tensor) -> Decode:
    """transformers' model of the same weights, with the cache that its `generate` takes by default."""
    try:
        import transformers
    except ImportError as error:
        raise UnavailableError(f"{error}; pip install transformers brings it") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    weight = decoder.embed_tokens.weight
    with tempfile.TemporaryDirectory() as folder:
        save_decoder(decoder, Path(folder))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=weight.dtype).to(weight.device).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    mask = torch.ones_like(ids)
    return lambda new: model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)[:, -new:].cpu()


PROVIDERS: dict[str, Callable[[Decoder, Tensor], Decode]] = {
    "vlmfast": cached,
    "recomputed": recomputed,
    "transformers": theirs,
}


def measure(case: Case, decoder: Decoder, names: list[str], rounds: int, gauge: meter.Meter) -> list[dict[str, Any]]:
    """A row for each provider that runs here, interleaved."""
    print(case.name())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, decoder.config.vocab_size, (case.batch, case.prompt), generator=generator).to(case.device)
    calls: dict[str, Callable[[], tuple[float, float]]] = {}
    tokens: dict[str, Tensor] = {}
    for name in names:
        try:
            decode = PROVIDERS[name](decoder, ids)
        except UnavailableError as why:
            print(f"{name}: {why}", file=sys.stderr)
            continue
        decode(2)  # warms up

        def call(name: str = name, decode: Decode = decode) -> tuple[float, float]:
            start = time.process_time()
            seconds = gauge.timed(lambda: tokens.__setitem__(name, decode(case.new)))
            return seconds, time.process_time() - start

        calls[name] = call
    samples = timing.interleave(calls, rounds)
    same = {name: float((each == tokens[names[0]]).double().mean()) for name, each in tokens.items()}
    for name, share in same.items():
        if case.dtype == "float32" and share < 1:
            raise RuntimeError(f"{name} has {share:.1%} of the tokens of {names[0]}: not the same model")
    own = gauge.name == "cpu"
    spreads = {name: [timing.spread([1e3 * each[i] for each in of]) for i in (0, 1)] for name, of in samples.items()}
    ms = {name: each[int(own)].median for name, each in spreads.items()}
    rows: list[dict[str, Any]] = []
    for name, (wall, cpu) in spreads.items():
        row = {
            "what": case.name(),
            "provider": name,
            "batch": case.batch,
            "rounds": len(samples[name]),
            "wall_ms": asdict(wall),
            "cpu_ms": asdict(cpu) if own else None,
            "tokens_per_s": 1e3 * case.batch * case.new / ms[name] * (case.threads if own else 1),
            "full_ratio": ms[name] / ms["vlmfast"] if "vlmfast" in ms else None,
            "same_tokens": same[name],
        }
        rows.append(row)
        times = f"{row['full_ratio']:7.2f} x vlmfast" if row["full_ratio"] else ""
        print(f"{name:14} {ms[name]:10.1f} ms {row['tokens_per_s']:10.1f} tokens/s {times}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch", default="1,8", help="prompts at once, with commas")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens that are generated")
    for name in ("width", "layers", "vocab_size"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, help="of the decoder, instead of the default")
    parser.add_argument("--providers", default=",".join(PROVIDERS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    defaults = DEFAULTS[options.device]
    dtype, prompt = options.dtype or defaults["dtype"], options.prompt or defaults["prompt"]
    gauge = meter.meter(options.device, options.threads)
    asked = {name: value for name in ("width", "layers", "vocab_size") if (value := getattr(options, name))}
    config = DecoderConfig.llama(**defaults["sizes"] | asked)
    if prompt + options.new > config.context_length:
        parser.error(f"--prompt {prompt} and --new {options.new} do not fit a context of {config.context_length}")
    rows: list[dict[str, Any]] = []
    with timing.threads(options.threads):
        decoder = build_decoder(config, seed=0).to(options.device, getattr(torch, dtype)).eval()
        with torch.no_grad():
            decoder.head_weight.mul_(10)  # sure of its tokens, as a trained model is: rounding must not choose them
        for batch in options.batch.split(","):
            case = Case(int(batch), prompt, options.new, dtype, options.threads, options.device)
            rows += measure(case, decoder, options.providers.split(","), options.rounds, gauge)
    if options.json:
        result = {
            "benchmark": "decode",
            "command": " ".join(["python", *sys.argv]),
            "date": machine.now(),
            "machine": gauge.facts(),
            "versions": machine.versions("transformers"),
            "commit": machine.commit(),
            "decoder": config.to_dict(),
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
