"""The real thing, briefly: CLIP on handwritten digits through the fused loss, stopped, resumed, and evaluated."""

import io

import pytest
import torch
from standin import CLOCK
from test_checkpoint import everything, same

from vlmfast.data import batches
from vlmfast.data.digits import CLASS_NAMES, TEST_TEMPLATES, all_captions, digits
from vlmfast.data.tokenize import train_tokenizer
from vlmfast.eval import embed_images, embed_texts, retrieval_metrics, zero_shot_accuracy, zero_shot_classifier
from vlmfast.models import build_clip, load_config
from vlmfast.ops.softmax_loss import info_nce_loss
from vlmfast.train import adamw, fit, parameter_groups, read_metrics, warmup_cosine

STEPS = 40
LOSS = "train/contrastive_loss"


def loss_fn(model, batch):
    image, text = model.encode_image(batch.image), model.encode_text(batch.text)
    loss = info_nce_loss(
        image, text, model.logit_scale.exp(), query_ids=batch.ids, key_ids=batch.ids, positives="out", directions="both"
    )
    return {"contrastive_loss": loss}


@pytest.mark.slow
def test_clip_learns_digits_and_resumes_to_the_bit(tmp_path):
    train, test = digits("train"), digits("test")
    text = load_config("digits").text_cfg
    tokenizer = train_tokenizer(all_captions(), text.vocab_size, text.context_length)
    prompts = {name: [template.format(name) for template in TEST_TEMPLATES] for name in CLASS_NAMES}

    def zero_shot(model):
        W = zero_shot_classifier(model, tokenizer, CLASS_NAMES, prompts)
        return zero_shot_accuracy(model, W, zip(test.images.split(256), test.labels.split(256), strict=True))

    def retrieval(model):
        image = embed_images(model, [test.images])
        captions = embed_texts(model, tokenizer, [prompt for name in CLASS_NAMES for prompt in prompts[name]])
        ids = torch.arange(10).repeat_interleave(len(TEST_TEMPLATES))
        return retrieval_metrics(image, captions, image_ids=test.labels, text_ids=ids)

    def run(out, steps, seed, resume=None):
        model = build_clip("digits", seed=seed)
        optimizer = adamw(model, weight_decay=0.1)
        last = fit(
            model,
            loss_fn,
            lambda start: batches(train, tokenizer, 64, seed=3, start_step=start),
            optimizer,
            warmup_cosine(3e-3, 10, STEPS),
            steps=steps,
            out=out,
            evaluators={"zero_shot": zero_shot, "retrieval": retrieval},
            log_every=1,
            save_every=15,
            grad_clip_norm=1.0,
            resume=resume,
            stream=io.StringIO(),
        )
        return everything(model, optimizer), last

    straight, scores = run(tmp_path / "straight", STEPS, seed=0)
    run(tmp_path / "stopped", 20, seed=0)
    resumed, again = run(tmp_path / "stopped", STEPS, seed=1, resume="latest")
    assert same(straight, resumed)
    clock = {f"train/{name}" for name in CLOCK}
    assert {key: scores[key] for key in scores.keys() - clock} == {key: again[key] for key in again.keys() - clock}
    losses = [line[LOSS] for line in read_metrics(tmp_path / "straight/metrics.jsonl") if LOSS in line]
    print(scores, losses[::5])
    assert len(losses) == STEPS
    assert sum(losses[-5:]) < sum(losses[:5])
    # Chance is 0.1 with a standard deviation of 0.014 over the 450 scans.
    assert scores["val/zero_shot/acc1"] > 0.2
    assert scores["val/retrieval/image_to_text_R@1"] > 0.2


def test_no_two_gradients_share_memory():
    """Micro-batches add to gradients and clipping scales them, each in place."""
    model = build_clip("digits", seed=0)
    data, tokenizer = digits("train"), train_tokenizer(all_captions(), 512, 16)
    loss_fn(model, next(iter(batches(data, tokenizer, 8, seed=0))))["contrastive_loss"].backward()
    places = [p.grad.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(places)) == len(places)


def test_parameter_groups_of_clip():
    model = build_clip("digits", seed=0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    still = {names[p] for group in parameter_groups(model) if group["name"] == "no_decay" for p in group["params"]}
    assert {"logit_scale", "positional_embedding", "visual.positional_embedding", "visual.class_embedding"} < still
    assert not {"token_embedding.weight", "text_projection", "visual.proj"} & still
    assert still == {n for n, p in model.named_parameters() if p.ndim <= 1} | model.no_weight_decay()
