"""transformers' models with vlmfast's loss and attention: the numbers that they had, without logits."""

import inspect
import logging

import pytest
import torch
import torch.distributed as dist

from vlmfast.errors import BackendError
from vlmfast.integrations import transformers as integration

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
KINDS = ("clip", "siglip", "siglip2", "dual")
FLAGS = dict(zip(KINDS, ("clip", "siglip", "siglip2", "vision_text_dual_encoder"), strict=True))


@pytest.fixture(autouse=True)
def _all_put_back(transformers):
    before = (transformers.CLIPModel.forward, dict(transformers.AttentionInterface._global_mapping))
    yield
    integration.undo()
    assert (transformers.CLIPModel.forward, transformers.AttentionInterface._global_mapping) == before


def build(transformers, kind):
    """A small random model of that kind, without dropout, whose pairs are not told apart yet."""
    torch.manual_seed(0)
    towers = {"text_config": TEXT, "vision_config": VISION}
    siglip = {"text_config": TEXT | {"projection_size": 32}, "vision_config": VISION}
    if kind == "clip":
        model = transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=16))
    elif kind == "siglip":
        model = transformers.SiglipModel(transformers.SiglipConfig(**siglip))
    elif kind == "siglip2":
        siglip["vision_config"] = {**VISION, "num_patches": 4}
        model = transformers.Siglip2Model(transformers.Siglip2Config(**siglip))
    else:
        config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
            transformers.ViTConfig(**VISION), transformers.BertConfig(**TEXT), projection_dim=16
        )
        model = transformers.VisionTextDualEncoderModel(config)
    return model.eval()


def inputs(kind, B=5, seed=1, padded=False):
    torch.manual_seed(seed)
    batch = {"input_ids": torch.randint(3, 60, (B, 12)), "pixel_values": torch.randn(B, 3, 16, 16)}
    if kind == "siglip2":
        batch["pixel_values"] = torch.randn(B, 4, 3 * 8 * 8)
        batch["pixel_attention_mask"] = torch.ones(B, 4, dtype=torch.long)
        batch["spatial_shapes"] = torch.tensor([[2, 2]] * B)
    if padded:
        batch["attention_mask"] = (torch.arange(12) < torch.randint(3, 12, (B, 1))).long()
    return batch


def step(model, batch, **options):
    """The output, and the gradient of every parameter that has one."""
    model.zero_grad()
    output = model(**batch, return_loss=True, **options)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, tolerance=2e-5):
    assert ours.keys() == theirs.keys()
    largest = max(grad.abs().max() for grad in theirs.values())
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], rtol=0, atol=float(tolerance * largest), msg=name)


@pytest.mark.parametrize("alone", [False, True], ids=["classes", "instance"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_it_had_and_no_logits(transformers, kind, alone):
    model, batch = build(transformers, kind), inputs(kind, padded=True)
    theirs, their_gradients = step(model, batch)
    with integration.apply(model=model if alone else None):
        ours, gradients = step(model, batch)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=2e-6, atol=0)
    assert_same_gradients(gradients, their_gradients)
    assert "logit_scale" in gradients
    assert type(ours) is type(theirs)
    assert ours.logits_per_image is None
    assert ours.logits_per_text is None
    for name in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(ours[name], theirs[name])
    for tower in ("text_model_output", "vision_model_output"):
        torch.testing.assert_close(ours[tower].last_hidden_state, theirs[tower].last_hidden_state)
        torch.testing.assert_close(ours[tower].pooler_output, theirs[tower].pooler_output)


@pytest.mark.parametrize("kind", KINDS)
def test_who_asks_for_logits_gets_them(transformers, kind):
    """By the flag, by a tuple, which has them by position, and without a loss; the loss is the original's then."""
    model, batch = build(transformers, kind), inputs(kind)
    theirs = model(**batch, return_loss=True)
    with integration.apply():
        ours = model(**batch, return_loss=True, output_logits=True)
        assert torch.equal(ours.loss, theirs.loss)
        assert torch.equal(ours.logits_per_image, theirs.logits_per_image)
        loss, logits_per_image, *_ = model(**batch, return_loss=True, return_dict=False)
        assert torch.equal(loss, theirs.loss)
        assert torch.equal(logits_per_image, theirs.logits_per_image)
        if kind == "dual":  # the others' originals fail on it
            model.config.return_dict = False
            assert isinstance(model(**batch, return_loss=True), tuple)
            model.config.return_dict = True
        assert torch.equal(model(**batch).logits_per_text, theirs.logits_per_text)
        assert model(**batch, return_loss=False).loss is None


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_original_runs(transformers, kind):
    model, batch = build(transformers, kind), inputs(kind)
    with torch.no_grad():
        theirs = model(**batch, return_loss=True)
        with integration.apply():
            ours = model(**batch, return_loss=True)
    assert list(ours) == list(theirs)
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.logits_per_image, theirs.logits_per_image)


@pytest.mark.filterwarnings("ignore")  # Trainer's own
def test_metrics_get_the_logits(transformers, tmp_path):
    """Trainer hands over the output's entries by position: without logits the embeddings would take their places."""
    batch, seen = inputs("clip", B=8), []
    examples = [{name: values[row] for name, values in batch.items()} for row in range(8)]
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        remove_unused_columns=False,
        per_device_eval_batch_size=8,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = transformers.Trainer(
        model=build(transformers, "clip"),
        args=settings,
        eval_dataset=examples,
        data_collator=lambda rows: {**{n: torch.stack([row[n] for row in rows]) for n in batch}, "return_loss": True},
        compute_metrics=lambda results: seen.append(torch.tensor(results.predictions[0])) or {},
    )
    theirs = trainer.evaluate()["eval_loss"]
    with integration.apply():
        ours = trainer.evaluate()["eval_loss"]
    assert seen[0].shape == (8, 8)
    assert torch.equal(*seen)
    assert ours == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_by_position(transformers, kind):
    model, batch = build(transformers, kind), inputs(kind)
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    place = names.index("return_loss")
    args = [batch.get(name) for name in names[:place]]
    expected = model(*args, True).loss
    with integration.apply():
        output = model(*args, True)
        assert output.logits_per_image is None
        torch.testing.assert_close(output.loss, expected, rtol=2e-6, atol=0)
        assert model(*args, False).loss is None
        with pytest.raises(TypeError, match="multiple values"):
            model(*args, True, return_loss=True)


@pytest.mark.parametrize("kind", KINDS)
def test_towers_outputs_come_along(transformers, kind):
    model, batch = build(transformers, kind), inputs(kind)
    with integration.apply():
        output = model(**batch, return_loss=True, output_hidden_states=True)
    assert len(output.vision_model_output.hidden_states) == 3
    assert len(output.text_model_output.hidden_states) == 3


def test_under_autocast_the_loss_is_float32(transformers):
    model, batch = build(transformers, "clip"), inputs("clip")
    with integration.apply(), torch.autocast("cpu", torch.bfloat16):
        output, gradients = step(model, batch)
        assert output.loss.dtype == torch.float32
    assert all(grad.isfinite().all() for grad in gradients.values())


def test_memory_does_not_grow_with_the_square(transformers):
    """What autograd keeps of the loss alone: the towers are replaced by their embeddings."""
    kept = {}
    for B in (64, 256):
        model = build(transformers, "clip")
        features = torch.randn(B, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, B=B: sizes(kept, B, x), lambda x: x):
            integration._loss(model, features, features, across_devices=False)
    assert kept[256] <= 4 * kept[64]
    assert kept[256] < 256 * 256 * 4


def sizes(kept, B, tensor):
    kept[B] = kept.get(B, 0) + tensor.nbytes
    return tensor


def test_only_what_was_asked_for(transformers):
    before = {kind: type(build(transformers, kind)).forward for kind in KINDS}
    for kind in KINDS:
        with integration.apply(**{flag: other == kind for other, flag in FLAGS.items()}, attention=False):
            for other in KINDS:
                replaced = type(build(transformers, other)).forward is not before[other]
                assert replaced == (other == kind)
            assert integration.ATTENTION not in transformers.AttentionInterface._global_mapping


def test_applied_twice_and_undone_once(transformers, caplog):
    original = transformers.CLIPModel.forward
    with caplog.at_level(logging.INFO):
        integration.apply()
        patched = transformers.CLIPModel.forward
        integration.apply()
    assert transformers.CLIPModel.forward is patched
    assert caplog.text.count("CLIPModel.forward") == 1
    assert inspect.signature(patched) == inspect.signature(original)  # Trainer picks a data set's columns by it
    integration.undo()
    assert transformers.CLIPModel.forward is original
    integration.undo()


def test_a_context_inside_another(transformers):
    known = transformers.AttentionInterface._global_mapping
    with integration.apply(siglip=False):
        patched, siglip = transformers.CLIPModel.forward, transformers.SiglipModel.forward
        with integration.apply():
            assert transformers.SiglipModel.forward is not siglip
        with integration.apply(across_devices=True):
            assert transformers.CLIPModel.forward is not patched
        assert (transformers.CLIPModel.forward, transformers.SiglipModel.forward) == (patched, siglip)
        assert integration.ATTENTION in known
    assert transformers.CLIPModel.forward is not patched
    assert integration.ATTENTION not in known
    with integration.apply(attention=False):
        with integration.apply():
            assert integration.ATTENTION in known
        assert integration.ATTENTION not in known


def test_one_model_only(transformers):
    patched, other = build(transformers, "clip"), build(transformers, "clip")
    with integration.apply(model=patched):
        assert patched(**inputs("clip"), return_loss=True).logits_per_image is None
        assert other(**inputs("clip"), return_loss=True).logits_per_image is not None
    assert "forward" not in vars(patched)


def test_refusals_leave_all_as_it_was(transformers, monkeypatch):
    original = transformers.CLIPModel.forward
    with pytest.raises(BackendError, match=r"model must be one of CLIPModel.*got Linear.*model\.module"):
        integration.apply(model=torch.nn.Linear(1, 1))
    with pytest.raises(BackendError, match="got CLIPModel"):
        integration.apply(clip=False, model=build(transformers, "clip"))
    for version in ("6.0.1", "5.2.0", "4.60.0"):
        with monkeypatch.context() as patch:
            patch.setattr("transformers.__version__", version)
            with pytest.raises(BackendError, match=rf"transformers {version} is not known.*known: 5\.6 and later 5\.x"):
                integration.apply()
    for version in ("5.6.0", "5.10.1", "5.23.0.dev0"):
        with monkeypatch.context() as patch:
            patch.setattr("transformers.__version__", version)
            integration.apply()
            integration.undo()
    with monkeypatch.context() as patch:
        patch.setattr(transformers.Siglip2Model, "forward", lambda self, input_ids, temperature=1.0, **kwargs: None)
        with pytest.raises(BackendError, match=r"forward takes input_ids, temperature.* apply\(siglip2=False\)"):
            integration.apply()
        integration.apply(siglip2=False)
        integration.undo()
    assert transformers.CLIPModel.forward is original
    assert integration.ATTENTION not in transformers.AttentionInterface._global_mapping


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_sdpa_s(transformers, kind, padded):
    model, batch = build(transformers, kind), inputs(kind, padded=padded)
    model.set_attn_implementation("sdpa")
    theirs, their_gradients = step(model, batch)
    with integration.apply(**dict.fromkeys(FLAGS.values(), False)):
        model.set_attn_implementation(integration.ATTENTION)
        ours, gradients = step(model, batch)
        torch.testing.assert_close(ours.logits_per_text, theirs.logits_per_text)
        assert_same_gradients(gradients, their_gradients)


def qwen_tower(transformers, implementation):
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 16, "patch_size": 4}
    ).vision_config
    tower = transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel._from_config(config)
    tower.set_attn_implementation(implementation)
    return tower


def test_images_of_several_sizes_are_packed(transformers, monkeypatch):
    """One call a layer for all images, instead of one for each."""
    grid = torch.tensor([[1, 4, 4], [1, 2, 6], [2, 2, 2]])  # frames, rows and columns of patches
    patches = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 4 * 4)
    calls = []
    packed = integration._attend_packed
    monkeypatch.setattr(integration, "_attend_packed", lambda *args: calls.append(1) or packed(*args))

    def run(implementation):
        tower = qwen_tower(transformers, implementation)
        pixels = patches.clone().requires_grad_()
        hidden = tower(pixels, grid_thw=grid).pooler_output
        (hidden.square().sum()).backward()
        return hidden, pixels.grad, {name: p.grad for name, p in tower.named_parameters()}

    hidden, grad, gradients = run("sdpa")
    with integration.apply():
        ours = run(integration.ATTENTION)
    assert len(calls) == 2
    torch.testing.assert_close(ours[0], hidden)
    torch.testing.assert_close(ours[1], grad)
    assert_same_gradients(ours[2], gradients)


def heads(B=2, H=4, groups=1, T=6, K=8):
    torch.manual_seed(0)
    return torch.randn(B, H, T, K), torch.randn(B, H // groups, T, K), torch.randn(B, H // groups, T, K)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_dense_heads(transformers, groups, causal, masked):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = torch.nn.Module()
    module.num_key_value_groups = groups
    q, k, v = heads(groups=groups)
    mask = torch.rand(2, 1, 6, 6).gt(0.3) | torch.eye(6).bool() if masked else None
    options = {"scaling": 0.3, "is_causal": causal}
    expected, _ = sdpa_attention_forward(module, q, k, v, mask, **options)
    ours, weights = integration._attend(module, q, k, v, mask, **options)
    torch.testing.assert_close(ours, expected)
    assert weights is None


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_heads(groups, causal):
    ends = torch.tensor([0, 1, 4, 9], dtype=torch.int32)
    q, k, v = heads(B=1, groups=groups, T=9)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends.clone(), "max_length_q": 5, "max_length_k": 5}
    ours, _ = integration._attend(torch.nn.Module(), q, k, v, None, is_causal=causal, scaling=0.3, **lengths)
    assert ours.shape == (1, 9, 4, 8)
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        alone = torch.nn.functional.scaled_dot_product_attention(
            *(x[:, :, start:end] for x in (q, k, v)), is_causal=causal, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(ours[:, start:end], alone.transpose(1, 2))


def test_dropout_goes_on_to_sdpa():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    results = []
    for attend in (sdpa_attention_forward, integration._attend):
        torch.manual_seed(3)
        results.append(attend(torch.nn.Module(), *heads(), None, dropout=0.5, is_causal=False)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "with dropout are not"),
        ({"softcap": 30.0}, "with a softcap are not"),
        ({"sliding_window": 3}, "with a sliding window are not"),
        ({"cu_seq_lens_k": torch.tensor([0, 4, 6])}, "with keys of other lengths are not"),
    ],
)
def test_packed_heads_refuse_what_they_cannot(options, message):
    lengths = {"cu_seq_lens_q": torch.tensor([0, 2, 6]), "max_length_q": 4}
    with pytest.raises(BackendError, match=message):
        integration._attend(torch.nn.Module(), *heads(B=1), None, **(lengths | options))
    with pytest.raises(BackendError, match="sinks"):
        integration._attend(torch.nn.Module(), *heads(), None, s_aux=torch.zeros(4))


@pytest.mark.filterwarnings("ignore")  # Trainer's own
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps"), [("dual", 200), ("siglip", 50)])
def test_trainer_takes_the_same_course(transformers, kind, steps, tmp_path):
    """run_clip.py: its collator, and its README's settings (batches of 64, 5e-5, no warm-up, weight decay 0.1)."""
    torch.manual_seed(0)
    pictures = torch.randn(50, 3, 16, 16)
    words = torch.randint(3, 60, (50, 12))
    rows = torch.randint(50, (2048,)).tolist()
    examples = [{"pixel_values": pictures[row] + torch.randn(3, 16, 16), "input_ids": words[row]} for row in rows]

    def collate(batch):
        stacked = {name: torch.stack([example[name] for example in batch]) for name in batch[0]}
        return {**stacked, "attention_mask": torch.ones(len(batch), 12, dtype=torch.long), "return_loss": True}

    def train(folder):
        model = build(transformers, kind)
        settings = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder),
            remove_unused_columns=False,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=64,
            learning_rate=5e-5,
            warmup_steps=0,
            weight_decay=0.1,
            max_steps=steps,
            logging_steps=1,
            eval_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(
            model=model, args=settings, train_dataset=examples, eval_dataset=examples[:256], data_collator=collate
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return torch.tensor(losses), trainer.evaluate()["eval_loss"]

    theirs, their_end = train("theirs")
    with integration.apply():
        ours, our_end = train("ours")
    assert len(ours) == steps
    assert theirs[-10:].mean() < 0.98 * theirs[:10].mean()  # it learns, so that a wrong gradient would show
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    assert our_end == pytest.approx(their_end, rel=0.01)


def rank_gradients(rank, world_size, folder):
    """Losses and gradients of one of several processes, averaged over them as DistributedDataParallel does."""
    torch.set_num_threads(1)
    import transformers

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    values = {}
    for kind in ("clip", "siglip"):
        model, batch = double(transformers, kind)
        share = {name: x.chunk(world_size)[rank] for name, x in batch.items()}
        with integration.apply(across_devices=True):
            output, gradients = step(model, share)
        values[kind] = {"loss": output.loss.detach(), **gradients}
        for value in values[kind].values():
            dist.all_reduce(value)
            value /= world_size
    if rank == 0:
        torch.save(values, f"{folder}/values.pt")
    dist.destroy_process_group()


def double(transformers, kind):
    """A model and a batch of four in float64."""
    batch = inputs(kind, B=4)
    return build(transformers, kind).double(), {**batch, "pixel_values": batch["pixel_values"].double()}


@pytest.mark.slow
def test_across_devices_it_is_the_loss_of_the_whole_batch(transformers, tmp_path):
    torch.multiprocessing.spawn(rank_gradients, (2, str(tmp_path)), nprocs=2)
    for kind, values in torch.load(tmp_path / "values.pt").items():
        expected, gradients = step(*double(transformers, kind))
        torch.testing.assert_close(values.pop("loss"), expected.loss.detach())
        assert_same_gradients(values, gradients, tolerance=1e-10)
