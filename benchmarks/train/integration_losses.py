"""The losses of transformers and sentence-transformers as they are and with `apply()`: peak memory and time.

    python benchmarks/train/integration_losses.py --batch-size 8192

Measured is the loss alone, forward and backward, from embeddings [batch size, 512] in float32, on one thread: the
towers of a model are replaced by their outputs. Each peak is of a process of its own, above what it held before the
call; for the times the two take turns in one process, and the medians are given.
"""

import argparse
import statistics
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch

from vlmfast.bench import memory

EVERY = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
CASES = {
    "transformers CLIPModel": {"model": "CLIP"},
    "transformers SiglipModel": {"model": "Siglip"},
    "MultipleNegativesRankingLoss": {"loss": {}},
    "MultipleNegativesRankingLoss, symmetric": {
        "loss": {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    },
    "MultipleNegativesRankingLoss, four directions": {"loss": {"directions": EVERY}},
    "CachedMultipleNegativesRankingLoss": {"loss": {"mini_batch_size": 64}},
    "CachedMultipleNegativesRankingLoss, four directions": {"loss": {"mini_batch_size": 64, "directions": EVERY}},
}
TOWER = {"hidden_size": 512, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 8}


def call_of(case, batch_size, patched):
    """What computes the case's loss and its gradients once; what `patched` says holds during the call."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if batch_size > 8:
        call_of(case, 8, patched)()  # what is imported or built at the first call is not the loss's
    pair = [torch.randn(batch_size, 512, requires_grad=True) for _ in range(2)]
    loss, integration = (of_model if "model" in CASES[case] else of_embeddings)(case, *pair)

    def call():
        with integration.apply() if patched else nullcontext():
            value = loss()
            if value.requires_grad:
                value.backward()
        return value.item()

    return call


def of_model(case, image, text):
    """The forward of a model whose towers answer with these embeddings."""
    import transformers

    from vlmfast.integrations import transformers as integration

    name = CASES[case]["model"]
    config = getattr(transformers, f"{name}Config")(
        text_config=TOWER | {"vocab_size": 8, "bos_token_id": 1, "eos_token_id": 2, "projection_size": 512},
        vision_config=TOWER | {"image_size": 8, "patch_size": 8},
    )
    model = getattr(transformers, f"{name}Model")(config)
    for tower, pooled in (("vision_model", image), ("text_model", text)):
        setattr(model, tower, Answer(pooled))
    for get, pooled in (("get_image_features", image), ("get_text_features", text)):
        setattr(model, get, Answer(pooled).forward)
    return lambda: model(return_loss=True).loss, integration


class Answer(torch.nn.Module):
    """A tower that has already run."""

    def __init__(self, pooled):
        super().__init__()
        self.pooled = pooled

    def forward(self, **_):
        return SimpleNamespace(pooler_output=self.pooled)


def of_embeddings(case, query, doc):
    """The loss of these embeddings; the cached one goes backward by itself."""
    from sentence_transformers.sentence_transformer import losses

    from vlmfast.integrations import sentence_transformers as integration

    loss = getattr(losses, case.split(",")[0])(torch.nn.Sequential(torch.nn.Identity()), **CASES[case]["loss"])
    if hasattr(loss, "calculate_loss"):
        return lambda: loss.calculate_loss([[query], [doc]], with_backward=True), integration
    return lambda: loss.compute_loss_from_embeddings([query, doc], None), integration


def seconds(case, batch_size, rounds):
    """Medians over the rounds, as it is and patched."""
    calls, times = [call_of(case, batch_size, patched) for patched in (False, True)], ([], [])
    for _ in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="cases with this in their name")
    flags = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    import integration_losses

    print(f"| loss of {flags.batch_size} pairs | MB as it is | MB with vlmfast | seconds as it is | with vlmfast |")
    print("|---|---|---|---|---|")
    for case in filter(lambda case: flags.only in case, CASES):
        peaks = [
            memory.peak_in_child(integration_losses.call_of, case=case, batch_size=flags.batch_size, patched=patched)
            for patched in (False, True)
        ]
        megabytes = [f"{peak.extra_bytes / 1e6:.0f}" for peak in peaks]
        taken = [f"{second:.2f}" for second in seconds(case, flags.batch_size, flags.rounds)]
        print("|", " | ".join([case, *megabytes, *taken]), "|", flush=True)
