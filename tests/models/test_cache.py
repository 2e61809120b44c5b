"""Tokens that come one by one, or a few at a time, into rows of several lengths: the same as all at once."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from vlmfast.errors import ShapeError
from vlmfast.models.cache import KvCache
from vlmfast.models.decoder import DecoderConfig, build_decoder

V, CONTEXT = 61, 32
SIZES = {"vocab_size": V, "width": 24, "layers": 2, "heads": 4, "context_length": CONTEXT}
FAMILIES = {
    "gpt2": DecoderConfig.gpt2(**SIZES),
    "llama": DecoderConfig.llama(**SIZES, kv_heads=2, head_width=10),
    "qwen2": DecoderConfig.qwen2(**SIZES, kv_heads=1, tied=True),
}
LENGTHS = (9, 1, 17, 4)  # of the rows at first
EXACT64 = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(params=FAMILIES)
def decoder(request):
    torch.manual_seed(0)
    decoder = build_decoder(FAMILIES[request.param]).double().eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


def ends(*lengths):
    return torch.tensor((0, *lengths)).cumsum(0).int()


def texts(lengths=LENGTHS, more=12):
    return [torch.randint(V, (length + more,)) for length in lengths]


def whole(decoder, ids, prefix=None):
    """The hidden states of one sequence, computed at once and without a cache."""
    with torch.no_grad():
        return decoder(decoder.embed(ids)[None], prefix=prefix)[0]


def filled(decoder, rows, lengths=LENGTHS, capacity=2, **options):
    """A cache that holds the first tokens of each row, and their hidden states."""
    cache = KvCache(decoder.config, len(rows), capacity, dtype=torch.float64)
    x = decoder.embed(torch.cat([ids[:length] for ids, length in zip(rows, lengths, strict=True)]))
    hidden = decoder(x, cu_seqlens=ends(*lengths), cache=cache, **options)
    return cache, hidden.split(list(lengths))


def append(decoder, cache, rows, count):
    """The hidden states of the next `count` tokens of every row."""
    new = torch.stack([ids[n : n + count] for ids, n in zip(rows, cache.lengths.tolist(), strict=True)])
    return decoder(decoder.embed(new), cache=cache)


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1, 1), (2, 3, 1), (6,)])
def test_decoding_is_prefilling(decoder, chunks):
    rows = texts()
    cache, first = filled(decoder, rows)
    assert cache.lengths.tolist() == list(LENGTHS)
    steps = [append(decoder, cache, rows, count) for count in chunks]
    assert cache.lengths.tolist() == [length + 6 for length in LENGTHS]
    for b, length in enumerate(LENGTHS):
        expected = whole(decoder, rows[b])
        assert_close(first[b], expected[:length], **EXACT64)
        assert_close(torch.cat([step[b] for step in steps]), expected[length : length + 6], **EXACT64)


def test_packed_pieces_of_several_lengths_go_on_where_each_row_ends(decoder):
    rows = texts()
    cache, _ = filled(decoder, rows)
    for lengths in [(3, 0, 1, 4), (0, 1, 0, 0), (1, 5, 1, 2)]:
        before = cache.lengths.tolist()
        pieces = [ids[n : n + count] for ids, n, count in zip(rows, before, lengths, strict=True)]
        last = ends(*lengths)[1:][torch.tensor(lengths) > 0].long() - 1
        options = {"cu_seqlens": ends(*lengths), "cache": cache.select(torch.arange(4))}
        wanted = decoder(decoder.embed(torch.cat(pieces)), rows=last, **options)
        hidden = decoder(decoder.embed(torch.cat(pieces)), **{**options, "cache": cache})
        assert_close(wanted, hidden[last], **EXACT64)
        for b, part in enumerate(hidden.split(list(lengths))):
            assert_close(part, whole(decoder, rows[b])[before[b] : before[b] + lengths[b]], **EXACT64)
    assert cache.lengths.tolist() == [13, 7, 19, 10]


def test_dense_sequences_fill_an_empty_cache(decoder):
    rows = [ids[:9] for ids in texts((9, 9), 0)]
    cache = KvCache(decoder.config, 2, 9, dtype=torch.float64)
    found = torch.cat([append(decoder, cache, rows, 5), append(decoder, cache, rows, 4)], 1)
    for b in range(2):
        assert_close(found[b], whole(decoder, rows[b]), **EXACT64)


def test_a_row_that_was_empty_may_start_later(decoder):
    rows = texts((6, 0), 5)
    cache, _ = filled(decoder, rows, (6, 0))
    hidden = append(decoder, cache, rows, 5)
    assert_close(hidden[0], whole(decoder, rows[0])[6:], **EXACT64)
    assert_close(hidden[1], whole(decoder, rows[1]), **EXACT64)


def test_a_prefix_fills_an_empty_cache_and_the_rest_follows(decoder):
    rows, prefix = texts(), torch.tensor([9, 0, 5, 3])
    cache, first = filled(decoder, rows, prefix=prefix)
    steps = [append(decoder, cache, rows, 1) for _ in range(3)]
    for b, length in enumerate(LENGTHS):
        expected = whole(decoder, rows[b], prefix[b : b + 1])
        assert_close(first[b], expected[:length], **EXACT64)
        assert_close(torch.cat([step[b] for step in steps]), expected[length : length + 3], **EXACT64)
    with pytest.raises(ShapeError, match=r"prefix belongs to the call that fills an empty cache"):
        decoder(decoder.embed(torch.zeros(4, 1).long()), cache=cache, prefix=prefix)


def test_selected_rows_go_on_and_leave_the_others_alone(decoder):
    rows = texts()
    cache, _ = filled(decoder, rows)
    order = [2, 0, 0, 3, 2]
    beams = cache.select(torch.tensor(order))
    assert beams.lengths.tolist() == [LENGTHS[b] for b in order]
    follow = [torch.cat([rows[b][: LENGTHS[b]], torch.randint(V, (3,))]) for b in order]
    found = append(decoder, beams, follow, 3)
    for i, b in enumerate(order):
        assert_close(found[i], whole(decoder, follow[i])[LENGTHS[b] :], **EXACT64)
    found = append(decoder, cache, rows, 3)
    for b, length in enumerate(LENGTHS):
        assert_close(found[b], whole(decoder, rows[b])[length : length + 3], **EXACT64)


@pytest.mark.parametrize("keep", [torch.tensor([5, 1, 30, 0]), 3])
def test_what_is_forgotten_is_gone(decoder, keep):
    rows = texts()
    cache, _ = filled(decoder, rows)
    cache.truncate(keep)
    limits = keep.tolist() if isinstance(keep, torch.Tensor) else [keep] * 4
    left = [min(length, limit) for length, limit in zip(LENGTHS, limits, strict=True)]
    assert cache.lengths.tolist() == left
    follow = [torch.cat([ids[:n], torch.randint(V, (4,))]) for ids, n in zip(rows, left, strict=True)]
    found = append(decoder, cache, follow, 4)
    for b, n in enumerate(left):
        assert_close(found[b], whole(decoder, follow[b])[n:], **EXACT64)
    cache.truncate(0)
    assert cache.empty


def test_room_doubles_up_to_the_context(decoder):
    rows = texts((3, 1), 29)
    cache, _ = filled(decoder, rows, (3, 1))
    assert cache.capacity == 4
    seen = set()
    steps = []
    for _ in range(29):
        steps.append(append(decoder, cache, rows, 1))
        seen.add(cache.capacity)
    assert seen == {4, 8, 16, 32}
    assert_close(torch.cat([step[0] for step in steps]), whole(decoder, rows[0])[3:], **EXACT64)
    with pytest.raises(ShapeError, match=r"would hold 33 tokens; the decoder's context_length is 32"):
        decoder(decoder.embed(torch.zeros(2, 1).long()), cache=cache)
    assert cache.lengths.tolist() == [32, 30]
    room = torch.randint(V, (2,))  # the other row is not full
    hidden = decoder(decoder.embed(room), cu_seqlens=ends(0, 2), cache=cache)
    assert_close(hidden, whole(decoder, torch.cat([rows[1], room]))[30:], **EXACT64)


def test_a_step_waits_for_no_device(decoder):
    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Waits.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    rows = texts()
    cache, _ = filled(decoder, rows, capacity=32)
    with Waits():
        append(decoder, cache, rows, 1)
        append(decoder, cache, rows, 3)
        assert Waits.count == 0
        int(cache.lengths[0])  # the mode sees one
    assert Waits.count == 1


def test_a_cache_keeps_no_graph(decoder):
    rows = texts()
    cache, hidden = filled(decoder, rows)
    assert not hidden[0].requires_grad
    assert not append(decoder, cache, rows, 2).requires_grad


def test_a_cache_may_be_of_another_dtype(decoder):
    rows = texts()
    decoder = decoder.float()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        cache = KvCache(decoder.config, 4, 32, dtype=dtype)
        x = decoder.embed(torch.cat([ids[:length] for ids, length in zip(rows, LENGTHS, strict=True)]))
        decoder(x, cu_seqlens=ends(*LENGTHS), cache=cache)
        found.append(append(decoder, cache, rows, 2))
    assert found[1].dtype == torch.float32
    assert_close(found[1], found[0], rtol=0, atol=2**-4 * float(found[0].abs().max()))


def test_a_bound_that_is_too_small_writes_into_no_other_row(decoder):
    rows = texts((3, 3), 4)
    cache, _ = filled(decoder, rows, (3, 3))
    x = decoder.embed(torch.cat([rows[0][3:], rows[1][3:4]]))
    hidden = decoder(x, cu_seqlens=ends(4, 1), max_seqlen=1, cache=cache)
    assert_close(hidden[:4], whole(decoder, rows[0])[3:], **EXACT64)
    assert_close(hidden[4:], whole(decoder, rows[1])[3:4], **EXACT64)


def test_what_a_cache_refuses(decoder):
    for rows, capacity in [(0, 4), (2, 0), (2, 33)]:
        with pytest.raises(ShapeError, match=r"rows must be at least 1 and capacity 1 \.\. 32"):
            KvCache(decoder.config, rows, capacity)
    cache = KvCache(decoder.config, 2, 4, dtype=torch.float64)
    for lengths in (-1, torch.tensor([0, -1])):
        with pytest.raises(ShapeError, match="truncate: lengths must be at least 0; got -1"):
            cache.truncate(lengths)
    with pytest.raises(ShapeError, match=r"truncate: lengths must be \[2\] or an int; got \(3,\)"):
        cache.truncate(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"cache must have a row for each of the 3 sequences; it has 2"):
        decoder(decoder.embed(torch.zeros(3, 1).long()), cache=cache)
