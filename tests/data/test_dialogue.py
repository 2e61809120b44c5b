"""Which tokens of a conversation are supervised, against LLaVA's own bookkeeping; packing; what is left out."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from lm_vocabularies import NAMES, VOCABULARIES, byte_level, sentencepiece, vocabulary, words

from vlmfast.data.batch import batches
from vlmfast.data.conversation import Conversation, Turn, VlmSample
from vlmfast.data.dialogue import IGNORED, Dialogues, Prepared, pack, prompt_ids, stop_ids, supervise, template_for
from vlmfast.data.lm_tokenizer import LmTokenizer
from vlmfast.data.skips import Skipped, UnreadableError
from vlmfast.data.templates import TEMPLATES
from vlmfast.errors import DataError, ShapeError

P = 5  # tokens of an image
DIALOGUES = 200


def random_dialogue(seed, rounds=5, images=2):
    rng = random.Random(seed)
    turns, names = [], []
    for number in range(rng.randint(1, rounds)):
        question = words(rng, 8)
        if len(names) < images and rng.random() < 0.6:
            names.append(f"{number}.png")
            question = rng.choice([f"<image>\n{question}", f"{question}\n<image>", f"{question} <image> and so on"])
        turns += [Turn("user", question), Turn("assistant", words(rng, 12))]
    return Conversation(f"dialogue {seed}", tuple(names), tuple(turns))


def legacy_masks(text, tokenize, head, instruction_end, *, fix=0):
    """(ids, labels, warning) of LLaVA's length bookkeeping, preprocess_v1 and preprocess_llama_2.

    Restated from its published behaviour: each round's length is measured by tokenising it alone, with a beginning of
    text, which stands for the `</s>` that was cut off; a question's by tokenising it with a space behind it, less two
    for the beginning and the space. Where the lengths do not add up, nothing of the sample is learnt.
    """

    def with_images(part):  # a chunk's own beginning of text is dropped, but for the first
        chunks = [tokenize(chunk) for chunk in part.split("<image>")]
        begins = bool(chunks[0][:1] == [head])
        joined = chunks[0][:begins]
        for number, chunk in enumerate(chunks):
            joined += ["image"] * (number > 0) + chunk[begins:]
        return joined

    ids = with_images(text)
    labels = [IGNORED, *ids[1:]]
    place = 1
    for number, one in enumerate(text.split("</s>")):
        parts = one.split(instruction_end)
        if not one or len(parts) != 2:
            break
        lost = fix if number else 0
        question = len(with_images(parts[0] + instruction_end)) - 2 - lost
        labels[place : place + question] = [IGNORED] * question
        place += len(with_images(one)) - lost
    labels[place:] = [IGNORED] * len(labels[place:])
    warned = place != len(ids)
    return ids, [IGNORED] * len(ids) if warned else labels, warned


def expanded(ids, labels, tokenizer):
    """P ids for each image, as LLaVA's model puts P features there."""
    image = [tokenizer.image_token_id] * P
    ids_out = [i for id in ids for i in (image if id == "image" else [id])]
    labels_out = [
        i for id, label in zip(ids, labels, strict=True) for i in ([IGNORED] * P if id == "image" else [label])
    ]
    return ids_out, labels_out


def with_beginning(inner):
    return lambda text: inner.encode(text).ids


@pytest.mark.parametrize(("template", "end"), [("v1", " ASSISTANT: "), ("llama_2", "[/INST] ")])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_masks_equal_llavas_bookkeeping(name, template, end):
    tokenizer, theirs = vocabulary(name), with_beginning(VOCABULARIES[name]())
    for seed in range(DIALOGUES):
        dialogue = random_dialogue(seed)
        text = TEMPLATES[template].render(dialogue).text
        ids, labels, warned = legacy_masks(text, theirs, tokenizer.bos_id, end)
        assert not warned
        ours = supervise(dialogue, template, tokenizer, P)
        assert (ours.ids.tolist(), ours.labels.tolist()) == expanded(ids, labels, tokenizer)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_plain_masks_equal_llavas(name):
    tokenizer, theirs = vocabulary(name), with_beginning(VOCABULARIES[name]())
    for seed in range(DIALOGUES):
        caption = words(random.Random(seed), 12)
        dialogue = Conversation("1", ("a",), (Turn("user", "Say what you see.\n<image>"), Turn("assistant", caption)))
        begin, caption_ids = theirs("")[:1], theirs(caption + "\n")[1:]
        ours = supervise(dialogue, "plain", tokenizer, P)
        assert ours.ids.tolist() == begin + [tokenizer.image_token_id] * P + caption_ids
        assert ours.labels.tolist() == [IGNORED] * (1 + P) + caption_ids


def test_where_the_bookkeeping_goes_wrong():
    talk = [
        Turn("user", "what is this"),
        Turn("assistant", "a cube"),
        Turn("user", "what is it left of"),
        Turn("assistant", "a ball"),
    ]
    dialogue = Conversation("two rounds", (), tuple(talk))

    def both(inner, said=dialogue, fix=0):
        tokenizer = LmTokenizer(inner(), dict(NAMES))
        text = TEMPLATES["v1"].render(said).text
        _, labels, warned = legacy_masks(text, with_beginning(inner()), 1, " ASSISTANT: ", fix=fix)
        ours = supervise(said, "v1", tokenizer, P)
        learnt = tokenizer.decode(ours.labels[ours.labels != IGNORED], skip_special=False)
        return labels, warned, learnt.lstrip(" ")

    # A vocabulary that puts nothing at the front (GPT-2, Qwen2): nothing stands for the "</s>" of the first round.
    labels, warned, learnt = both(lambda: byte_level(bos=False))
    assert warned
    assert set(labels) == {IGNORED}
    assert learnt == "a cube</s> a ball</s>"

    # SentencePiece without a space of its own behind "</s>": "USER:" is two tokens there, but alone, with the space, it
    # is one. Nor does the rule for such vocabularies help, one less from the second round on.
    for fix in (0, 1):
        labels, warned, learnt = both(lambda: sentencepiece(legacy=False), fix=fix)
        assert warned
        assert set(labels) == {IGNORED}
        assert learnt == "a cube</s> a ball</s>"

    # An answer that quotes the template ends the bookkeeping there.
    quoting = replace(dialogue, turns=(talk[0], Turn("assistant", "you write ASSISTANT: first"), *talk[2:]))
    labels, warned, learnt = both(byte_level, quoting)
    assert warned
    assert set(labels) == {IGNORED}
    assert learnt == "you write ASSISTANT: first</s> a ball</s>"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ["Llama 2", "byte-level BPE", "Llama 3"])
def test_what_is_learnt_is_the_answers_and_their_ends(name, template):
    if TEMPLATES[template].end.startswith("<|") and name == "Llama 2":
        return  # lacks the tokens
    tokenizer = vocabulary(name)
    for seed in range(40):
        dialogue = random_dialogue(seed, rounds=1 if template == "plain" else 4)
        rendered = TEMPLATES[template].render(dialogue)
        ours = supervise(dialogue, template, tokenizer, P)
        learnt = tokenizer.decode(ours.labels[ours.labels != IGNORED], skip_special=False)
        written = "".join(rendered.text[start:end] for start, end in rendered.spans)
        assert learnt.removeprefix(" ") == written.removeprefix(" ")  # SentencePiece drops the first space of a text
        assert (ours.ids == tokenizer.image_token_id).sum() == P * len(dialogue.images)
        assert ((ours.labels == IGNORED) | (ours.labels == ours.ids)).all()
        assert (ours.ids == 1).sum() == (ours.rounds if template == "llama_2" else 1)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_is_what_comes_before_the_answer(template):
    for name in ("byte-level BPE", "Llama 3") if TEMPLATES[template].end.startswith("<|") else VOCABULARIES:
        tokenizer = vocabulary(name)
        for seed in range(20):
            dialogue = random_dialogue(seed, rounds=1 if template == "plain" else 3)
            asked = replace(dialogue, turns=dialogue.turns[:-1])
            ours = supervise(dialogue, template, tokenizer, P)
            prompt = prompt_ids(asked, template, tokenizer, P)
            assert torch.equal(ours.ids[: len(prompt)], prompt)
            assert (ours.labels[len(prompt) :] != IGNORED).all()
            if len(dialogue.turns) == 2:
                assert (ours.labels[: len(prompt)] == IGNORED).all()


def test_an_end_mark_that_joins_the_next_turn_is_learnt_with_it():
    inner = byte_level()
    inner.add_tokens(["###H"])  # the end of an answer and the first letter of "Human" in one token
    tokenizer = LmTokenizer(inner, dict(NAMES))
    ours = supervise(random_dialogue(3), "v0", tokenizer, P)
    learnt = tokenizer.decode(ours.labels[ours.labels != IGNORED])
    assert learnt.count("###H") == ours.rounds - 1
    assert learnt.endswith("###")


def test_too_long_a_dialogue_is_cut_between_rounds():
    tokenizer = vocabulary("Llama 2")
    for seed in range(40):
        dialogue = random_dialogue(seed)
        whole = supervise(dialogue, "v1", tokenizer, P)
        ends = [i + 1 for i, id in enumerate(whole.ids.tolist()) if id == tokenizer.eos_id]  # of the rounds
        for max_tokens in range(100, len(whole.ids) + 2, 7):
            if max_tokens < ends[0]:
                with pytest.raises(UnreadableError, match=f"{dialogue.id!r}: longer than max_tokens"):
                    supervise(dialogue, "v1", tokenizer, P, max_tokens)
                continue
            ours = supervise(dialogue, "v1", tokenizer, P, max_tokens)
            assert len(ours.ids) == max(end for end in ends if end <= max_tokens)
            assert ours.rounds == ends.index(len(ours.ids)) + 1
            assert torch.equal(ours.ids, whole.ids[: len(ours.ids)])
            assert torch.equal(ours.labels, whole.labels[: len(ours.ids)])
            assert (ours.ids == tokenizer.image_token_id).sum() == P * ours.images


def test_a_question_at_the_end_without_an_answer_is_left_out():
    tokenizer = vocabulary("byte-level BPE")
    dialogue = random_dialogue(1)
    asked = replace(
        dialogue, images=(*dialogue.images, "z.png"), turns=(*dialogue.turns, Turn("user", "<image>\nand this?"))
    )
    ours, without = (supervise(one, "v1", tokenizer, P) for one in (asked, dialogue))
    assert torch.equal(ours.ids, without.ids)
    assert ours.images == len(dialogue.images)


def test_what_cannot_be_trained_on_is_named():
    tokenizer = vocabulary("byte-level BPE")
    hello = (Turn("user", "hello"), Turn("assistant", "yes"))

    def reason(turns, template="v1", images=(), **options):
        with pytest.raises(UnreadableError, match=r"^f\.json sample 'the id': ") as raised:
            supervise(Conversation("the id", images, turns), template, tokenizer, P, where="f.json", **options)
        return raised.value.reason

    assert reason((Turn("user", "what is </s> in HTML?"), hello[1])) == "special token in a turn"
    assert reason((hello[0], Turn("assistant", "it is <s>"))) == "special token in a turn"
    assert reason(hello * 2, "plain") == "more than one round"
    assert reason(hello, max_tokens=10) == "longer than max_tokens"
    assert reason(hello[:1]) == "no assistant turn"
    assert reason(hello, images=("a.png",)) == "number of image marks"
    with pytest.raises(ValueError, match="no template 'v2'"):
        supervise(Conversation("the id", (), hello), "v2", tokenizer, P)
    with pytest.raises(DataError, match=r"ends an answer with '<\|im_end\|>'"):
        template_for("chatml", vocabulary("Llama 2"))

    asked = Conversation("the id", (), hello[:1])
    with pytest.raises(UnreadableError, match=r"'the id': prompt longer than the context \(.* tokens; at most 9"):
        prompt_ids(asked, "v1", tokenizer, P, max_tokens=9)
    with pytest.raises(UnreadableError, match="no question to answer"):
        prompt_ids(Conversation("the id", (), hello), "v1", tokenizer, P)


def test_the_first_token_of_all_is_not_learnt():
    tokenizer = LmTokenizer(byte_level(bos=False), dict(NAMES))
    ours = supervise(Conversation("1", (), (Turn("user", "say"), Turn("assistant", "red"))), "plain", tokenizer, P)
    assert ours.labels[0] == IGNORED
    assert torch.equal(ours.labels[1:], ours.ids[1:])


def test_an_answer_stops_at_its_end_mark():
    tokenizer = vocabulary("byte-level BPE")
    assert stop_ids("v1", tokenizer) == stop_ids("llama_2", tokenizer) == (tokenizer.eos_id,)
    assert set(stop_ids("chatml", tokenizer)) == {tokenizer.eos_id, tokenizer.token_id("<|im_end|>")}
    assert set(stop_ids("plain", tokenizer)) == {tokenizer.eos_id, tokenizer.token_id("Ċ")}


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("template", ["v0", "plain"])
def test_an_answer_stops_at_the_end_mark_that_was_learnt(name, template):
    tokenizer = vocabulary(name)  # SentencePiece has one "###" for the front of a text and another behind a word
    said = Conversation("1", (), (Turn("user", "say"), Turn("assistant", "a")))
    assert int(supervise(said, template, tokenizer, P).ids[-1]) in stop_ids(template, tokenizer)


def test_an_answer_stops_at_a_sign_and_the_end_mark_in_one_token():
    tokenizer = vocabulary("Llama 3")
    said = Conversation("1", (), (Turn("user", "say"), Turn("assistant", "a red cube.")))
    last = int(supervise(said, "plain", tokenizer, P).ids[-1])
    assert tokenizer.decode([last]) == ".\n"
    assert {last, tokenizer.token_id("Ċ"), tokenizer.eos_id} <= set(stop_ids("plain", tokenizer))
    assert tokenizer.token_id(".") not in stop_ids("plain", tokenizer)


def test_a_long_dialogue_is_cut_in_few_tries(monkeypatch):
    rounds = 200
    talk = Conversation("1", (), tuple(Turn(role, "red ball") for _ in range(rounds) for role in ("user", "assistant")))
    tokenizer = vocabulary("byte-level BPE")
    whole = supervise(talk, "v1", tokenizer, P)
    encode, read = tokenizer.encode, []
    monkeypatch.setattr(tokenizer, "encode", lambda text: read.append(text) or encode(text))
    cut = supervise(talk, "v1", tokenizer, P, len(whole.ids) // 10)
    assert 0.05 * rounds < cut.rounds < 0.11 * rounds
    assert torch.equal(cut.ids, whole.ids[: len(cut.ids)])
    assert len(read) <= 10  # the whole, 2 ** 8 > 200, and the cut


class Talks:
    """Random dialogues, every image of one shade, some unreadable, some bad."""

    path = "talks.json"

    def __init__(self, size=23, missing=(), bad=()):
        self.size, self.missing, self.bad, self.skips = size, missing, bad, Skipped()

    @property
    def skipped(self):
        return self.skips.counts()

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        dialogue = random_dialogue(index)
        image = torch.full((len(dialogue.images), 3, 4, 4), index, dtype=torch.uint8)
        if index in self.bad:
            dialogue = replace(dialogue, turns=dialogue.turns[:1])
        return VlmSample(dialogue, image)

    def draw(self, index, seed, epoch):
        if index in self.missing:
            self.skips.add(index, UnreadableError("missing image", f"{index}.png"))
            return None
        return self[index]


def stream(talks, batch_size=4, max_tokens=None, **options):
    dialogues = Dialogues(talks, "v1", vocabulary("byte-level BPE"), P, max_tokens)
    return batches(dialogues, None, batch_size, seed=3, collate=pack, **options)


def same(one, other):
    mine, yours = vars(one), vars(other)
    return all(torch.equal(mine[k], yours[k]) if torch.is_tensor(mine[k]) else mine[k] == yours[k] for k in mine)


def test_a_batch_is_its_dialogues_without_padding():
    tokenizer = vocabulary("byte-level BPE")
    batch = next(stream(Talks()))
    one_by_one = [supervise(random_dialogue(index), "v1", tokenizer, P) for index in batch.index.tolist()]
    assert torch.equal(batch.ids, torch.cat([one.ids for one in one_by_one]))
    assert torch.equal(batch.labels, torch.cat([one.labels for one in one_by_one]))
    assert len(batch) == 4
    assert batch.tokens == len(batch.ids) == batch.cu_seqlens[-1]
    assert batch.cu_seqlens.diff().tolist() == [len(one.ids) for one in one_by_one]
    assert batch.max_seqlen == max(len(one.ids) for one in one_by_one)
    assert batch.num_supervised == (batch.labels != IGNORED).sum()
    assert batch.num_supervised.dtype == torch.float32
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.prefix.dtype == batch.ids.dtype == torch.int64
    for one, prefix in zip(one_by_one, batch.prefix.tolist(), strict=True):
        assert (one.labels[:prefix] == IGNORED).all()
        assert one.labels[prefix] != IGNORED
    shades = [index for index, n in zip(batch.index.tolist(), batch.num_images.tolist(), strict=True) for _ in range(n)]
    assert batch.image[:, 0, 0, 0].tolist() == shades
    assert batch.image.shape[1:] == (3, 4, 4)


@pytest.mark.parametrize("cut", [lambda batch: batch.split(3), lambda batch: batch.split_tokens(350)])
def test_pieces_put_together_are_the_batch(cut):
    batch = next(stream(Talks(), batch_size=8))
    pieces = cut(batch)
    assert len(pieces) > 1
    for name in ("ids", "labels", "image", "prefix", "index", "num_images"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name))
    assert torch.equal(torch.cat([piece.cu_seqlens.diff() for piece in pieces]), batch.cu_seqlens.diff())
    for piece in pieces:
        assert piece.cu_seqlens[0] == 0
        assert piece.cu_seqlens[-1] == piece.tokens
        assert piece.cu_seqlens.dtype == torch.int32
        assert piece.max_seqlen == piece.cu_seqlens.diff().max()
        assert len(piece.image) == piece.num_images.sum()
        assert piece.num_supervised == batch.num_supervised  # of the whole batch: the pieces' losses add up


def test_pieces_are_as_full_as_their_budget():
    batch = next(stream(Talks(), batch_size=8))
    pieces = batch.split_tokens(350)
    assert all(piece.tokens <= 350 for piece in pieces)
    assert all(one.tokens + int(two.cu_seqlens[1]) > 350 for one, two in itertools.pairwise(pieces))
    two = int(batch.cu_seqlens[2])
    assert len(batch.split_tokens(max(two, batch.max_seqlen))[0]) >= 2  # a budget that is met to the token
    with pytest.raises(ValueError, match=r"sample .* tokens; a piece holds 60"):
        batch.split_tokens(60)
    with pytest.raises(ValueError, match="at least 1"):
        batch.split(0)


def test_a_batch_of_text_alone_has_no_image():
    talks = Talks()
    talks.draw = lambda index, seed, epoch: VlmSample(
        random_dialogue(index, images=0), torch.empty(0, 3, 4, 4, dtype=torch.uint8)
    )
    batch = next(stream(talks))
    assert batch.image.shape == (0, 3, 4, 4)
    assert batch.num_images.tolist() == [0] * 4
    assert [len(piece.image) for piece in batch.split(3)] == [0, 0]
    assert batch.to("cpu").max_seqlen == batch.max_seqlen


def test_the_stream_is_a_function_of_seed_and_step():
    def some(**options):
        source = stream(Talks(missing=(2, 9), bad=(5,)), **options)
        return [next(source) for _ in range(8)]

    first = some()
    assert all(same(one, other) for one, other in zip(first, some(workers=2), strict=True))
    assert same(first[7], next(stream(Talks(missing=(2, 9), bad=(5,)), start_step=7)))

    saved = stream(Talks(missing=(2, 9), bad=(5,)))
    for _ in range(5):
        next(saved)
    resumed = stream(Talks(missing=(2, 9), bad=(5,)), workers=1)
    resumed.load_state_dict(saved.state_dict())
    assert same(next(resumed), first[5])


def test_ranks_share_the_rows_of_a_step():
    whole = next(stream(Talks(), batch_size=4))
    ranks = [next(stream(Talks(), batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    assert torch.equal(torch.cat([rank.ids for rank in ranks]), whole.ids)
    assert torch.equal(torch.cat([rank.index for rank in ranks]), whole.index)


def test_what_is_left_out_is_counted_and_its_row_refilled():
    talks, tokenizer = Talks(missing=(2, 9), bad=(5,)), vocabulary("byte-level BPE")
    source = stream(talks, max_tokens=190, epochs=2)
    taken = list(source)
    assert all(len(batch) == 4 and batch.max_seqlen <= 190 for batch in taken)
    for batch in taken:  # images of rounds left out are left out too
        assert P * len(batch.image) == P * batch.num_images.sum() == (batch.ids == tokenizer.image_token_id).sum()
    assert not {2, 9, 5} & {index for batch in taken for index in batch.index.tolist()}
    counts = talks.skipped
    assert counts["missing image"] == 2
    assert counts["no assistant turn"] == 1
    lengths = {i: len(supervise(random_dialogue(i), "v1", tokenizer, P).ids) for i in range(23) if i not in (2, 5, 9)}
    assert counts["rounds left out, beyond max_tokens"] + counts["longer than max_tokens"] == sum(
        length > 190 for length in lengths.values()
    )
    assert counts["rounds left out, beyond max_tokens"] > 0
    told = talks.skips.describe()
    assert "talks.json sample 'dialogue 5': no assistant turn" in told
    in_order = list(stream(Talks(missing=(2, 9), bad=(5,)), shuffle=False, epochs=1))
    assert [i for batch in in_order for i in batch.index.tolist()] == [i for i in range(23) if i not in (2, 5, 9)]


def test_images_that_do_not_fit_are_refused():
    def prepared(index, size):
        dialogue = supervise(random_dialogue(0), "v1", vocabulary("byte-level BPE"), P)
        return Prepared(dialogue, torch.zeros(dialogue.images, 3, size, size, dtype=torch.uint8))

    with pytest.raises(ShapeError, match=r"one shape .* \(3, 4, 4\) \(sample 7\), \(3, 8, 8\) \(sample 8\)"):
        pack([prepared(7, 4), prepared(8, 8)], [7, 8])
    talks = Talks()
    talks.draw = lambda index, seed, epoch: VlmSample(random_dialogue(index), torch.zeros(9, 3, 4, 4))
    with pytest.raises(ShapeError, match=r"sample 'dialogue \d+' names . images; its image is \(9, 3, 4, 4\)"):
        next(stream(talks))


def test_batches_without_tokenizer_need_a_collate():
    with pytest.raises(ValueError, match="needs a tokenizer, or a collate"):
        batches(Talks(), None, 4, seed=0)
