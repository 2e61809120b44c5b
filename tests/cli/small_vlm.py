"""A vision-language model small enough to ask in no time, and flags that train one as small."""

import json

import torch

from vlmfast.data.scenes import tasks
from vlmfast.models.decoder import DecoderConfig
from vlmfast.models.patch_lm import PatchLmConfig, build_patch_lm
from vlmfast.models.weights.vlm import save_vlm
from vlmfast.recipes.vlm_data import train_vocabulary

SIZES = ["--width", "32", "--layers", "1", "--heads", "2", "--context-length", "160", "--patch-size", "16"]
SHORT = ["--batch-size", "4", "--train-num-samples", "40", "--val-num-samples", "4", "--val-frequency", "0"]
SHORT += ["--warmup", "0", "--log-every-n-steps", "1", "--save-frequency", "0", "--vocab-size", "320"]
SHORT += ["--device", "cpu"]


def write_vlm(folder, template="bare", prefix_lm=False):
    """The folder of a PatchLm with random weights that minds its images, its tokenizer beside it."""
    folder.mkdir()
    tokenizer = train_vocabulary(tasks.dataset("L1", "train", "caption", 64), template, 320)
    tokenizer.save(folder / "files")
    (folder / "files/conversation.json").write_text(json.dumps({"template": template}))
    sizes = DecoderConfig.llama(vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2, context_length=400)
    config = PatchLmConfig(sizes, tokenizer.image_token_id, image_size=64, patch_size=16, prefix_lm=prefix_lm)
    model, generator = build_patch_lm(config, seed=3), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    save_vlm(model, folder / "model", {path.name: path for path in (folder / "files").iterdir()})
    return folder
