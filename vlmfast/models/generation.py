"""Text from a decoder, for prompts of any lengths at once, and how likely it finds texts that are given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.errors import ShapeError
from vlmfast.models.cache import KvCache
from vlmfast.models.decoder import Decoder

COLDEST = 1e-6  # the lowest temperature above 0: divided by less, log-probs would leave float32's range
FIRST_ROOM = 256  # new tokens that a cache has room for at first; it grows with what is written

Choice = Callable[[Tensor, list[int], int], Tensor]  # log-probs [N, V], their rows, the step -> token ids [N]


@dataclass(frozen=True)
class Generation:
    """What a decoder wrote after one prompt."""

    tokens: Tensor  # [n] int64 on the CPU, without the token that ended it
    log_probs: Tensor  # [n], or [n + 1] with that token's: float32 nats, the model's own, before any temperature
    finished: bool  # whether a token of eos ended it; else max_new_tokens or the context did


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompts: Sequence[Tensor],  # each [T_b] int64 or [T_b, C]
    *,
    max_new_tokens: int,
    eos: Collection[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    prefix: bool | Sequence[int] = False,
    seed: int | Sequence[int] = 0,
    suppress: Sequence[int] = (),
    on_token: Callable[[int, int], object] | None = None,
    cache: KvCache | None = None,
) -> list[Generation]:
    """What the decoder writes after each prompt: its likeliest tokens, tokens drawn at random, or its best beam.

    Equals, for each prompt alone, with temperature 0 and one beam:
        for _ in range(max_new_tokens):
            token = decoder.logits(decoder(x))[-1].argmax()
            if token in eos: break
            x = torch.cat([x, decoder.embed(token)[None]])

    Prompts are packed without padding into one forward; then each step takes one token a row, and rows that ended drop
    out. Tokens are drawn, at a temperature above 0, from softmax(logits / temperature), of which top_k and then top_p
    keep the likeliest. Beams are transformers' `generate(num_beams=)`, to the same tokens. A prompt may fill the
    context: the token that its last place foretells is the last one then.

    Args:
        decoder: on the device of the prompts.
        prompts: B of them, at least one token each: ids, or embeddings. With a cache: what follows its tokens.
        max_new_tokens: at least 1, the token of eos included.
        eos: ids that end a row.
        temperature: 0 takes the likeliest token each time; else at least 1e-6.
        top_k: only the k likeliest tokens are drawn, with all that are as likely as the last of them.
        top_p: only the fewest likeliest tokens are drawn whose probabilities add up to this, in (0, 1].
        beams: hypotheses kept a prompt; above 1 with temperature 0 only.
        length_penalty: a finished beam's score is the sum of its log-probs / number of tokens ** length_penalty.
        early_stopping: True ends a prompt when `beams` hypotheses have ended, False when none that runs scores higher
            at its present length, "never" at the length that is best for it.
        prefix: True where the tokens of a prompt see each other, as a prefix-LM was trained; or how many of its first
            ones do, one number for each prompt (those before a conversation's first answer).
        seed: of the draws: row b's are seed + b's alone, whatever stands beside it; or one seed a row.
        suppress: ids that are never written.
        on_token: called with a row and an id for each token as it is chosen; with beams at the end, row by row.
        cache: B rows that hold what comes before the prompts. It is appended to, and keeps what `cache.lengths` says:
            the prompts and, as long as no row had ended, the tokens. With beams it keeps the prompts.
    Returns: a Generation a prompt, in their order.
    Raises:
        ShapeError: there is no prompt; a prompt is empty, not ids or [T, C], or longer than the context; the cache,
            seed or prefix has another number of rows, or a prefix is longer than its prompt.
        ValueError: an option is out of its range; beams with a temperature; prefix with a cache that holds tokens.
    Source: beams as in transformers 5 (Apache-2.0), each prompt ending by itself; top_p is Holtzman et al. 2020.
    """
    _check_options(max_new_tokens, temperature, top_k, top_p, beams, early_stopping)
    V, ends = decoder.config.vocab_size, {int(token) for token in eos}  # of a tensor's, too, which no int would equal
    if not all(0 <= token < V for token in suppress) or len(set(suppress)) == V:
        raise ValueError(f"generate: suppress must be some ids in [0, {V}), and leave at least one; got {suppress!r}")
    borrowed = cache is not None
    hidden, cache, room = _prefill("generate", decoder, prompts, max_new_tokens, prefix, cache)
    barred = torch.tensor(sorted(set(suppress)), dtype=torch.int64, device=hidden.device)
    if beams > 1:
        done = _search(decoder, hidden, cache, room, ends, barred, beams, length_penalty, early_stopping)
        if on_token:
            for row, generation in enumerate(done):
                for token in generation.tokens.tolist():
                    on_token(row, token)
        return done
    choose: Choice = _likeliest
    if temperature > 0:
        seeds = range(seed, seed + len(room)) if isinstance(seed, int) else seed
        if len(seeds) != len(room):
            raise ShapeError(
                f"generate: seed must be one int, or one for each of {len(room)} prompts; got {len(seeds)}"
            )
        draws = torch.stack([torch.rand(max(room), dtype=torch.float64, generator=_generator(each)) for each in seeds])
        choose = partial(_drawn, draws.to(hidden.device), temperature, top_k, top_p)
    return _follow(decoder, hidden, cache, borrowed, room, ends, barred, choose, on_token)


@torch.no_grad()
def score(
    decoder: Decoder,
    prompts: Sequence[Tensor],  # each [T_b] int64 or [T_b, C]
    continuations: Sequence[Sequence[Tensor]],  # each [n] int64
    *,
    prefix: bool | Sequence[int] = False,
    at_once: int = 256,
) -> list[Tensor]:
    """How likely the decoder finds each of a prompt's continuations: the sums of their tokens' log-probs, in nats.

    Equals, for prompt b and its continuation c of ids:
        z = decoder.logits(decoder(torch.cat([x_b, decoder.embed(c)])))[len(x_b) - 1 : -1]
        z.log_softmax(-1).gather(1, c[:, None]).sum()

    A prompt's keys and values are computed once; no [tokens, V] logits are held where the head's kernel runs.

    Args:
        decoder: on the device of the prompts.
        prompts: B of them, at least one token each: ids, or embeddings.
        continuations: for each prompt the candidates, at least one token each; with the token that ends a text, if its
            end is to count.
        prefix: as for `generate`.
        at_once: candidates in one forward. Each holds a copy of its prompt's keys and values.
    Returns: for each prompt [number of its continuations] float32.
    Raises:
        ShapeError: there is no prompt; a prompt is empty, not ids or [T, C]; another number of lists of continuations;
            a prefix that does not fit; a continuation is empty, or too long for the context after its prompt.
        ValueError: an id of a continuation is not in the vocabulary.
    """
    if len(continuations) != len(prompts):
        raise ShapeError(f"score: {len(prompts)} prompts need as many lists of continuations; got {len(continuations)}")
    candidates = [(row, ids) for row, each in enumerate(continuations) for ids in each]
    for row, ids in candidates:
        if ids.ndim != 1 or not len(ids):
            raise ShapeError(f"score: a continuation of prompt {row} must be [n] with n >= 1; got {tuple(ids.shape)}")
    longest = max((len(ids) for _, ids in candidates), default=1)
    hidden, cache, room = _prefill("score", decoder, prompts, longest, prefix, None)
    for row, ids in candidates:
        if len(ids) > room[row]:
            raise ShapeError(
                f"score: after prompt {row} the context of {decoder.config.context_length} has room for {room[row]} "
                f"tokens; a continuation has {len(ids)}: shorten either"
            )
    sums = [_scored(decoder, hidden, cache, candidates[i : i + at_once]) for i in range(0, len(candidates), at_once)]
    return list(
        torch.cat([*sums, hidden.new_empty(0, dtype=torch.float32)]).split([len(each) for each in continuations])
    )


def _scored(decoder: Decoder, hidden: Tensor, cache: KvCache, candidates: list[tuple[int, Tensor]]) -> Tensor:
    """The summed log-probs [N] of N candidates after the prompts whose last hidden states are `hidden`."""
    device = hidden.device
    ids = [each.to(device) for _, each in candidates]
    rows = torch.tensor([row for row, _ in candidates], device=device)
    lengths = torch.tensor([len(each) for each in ids], device=device)
    places = torch.arange(len(ids), device=device)
    foretelling, labels, owners = [hidden[rows]], [torch.stack([each[0] for each in ids])], [places]
    more = places[lengths > 1]
    if len(more):
        heads = [each[:-1] for each in ids if len(each) > 1]
        foretelling.append(_packed(decoder, [decoder.embed(each) for each in heads], cache.select(rows[more]), None))
        labels += [each[1:] for each in ids]
        owners.append(places.repeat_interleave(lengths - 1))
    wanted = torch.cat(labels)
    if int(wanted.min()) < 0:  # -100 would count as certain
        raise ValueError(f"score: ids of continuations must be at least 0; got {int(wanted.min())}")
    losses = decoder.loss(torch.cat(foretelling), wanted, reduction="none")
    return torch.zeros(len(ids), device=device).index_add_(0, torch.cat(owners), -losses.float())


def _prefill(
    op: str,
    decoder: Decoder,
    prompts: Sequence[Tensor],
    more: int,
    prefix: bool | Sequence[int],
    cache: KvCache | None,
) -> tuple[Tensor, KvCache, list[int]]:
    """The hidden states [B, C] of the prompts' last tokens, the cache that holds them, and each row's room for more."""
    config, B = decoder.config, len(prompts)
    if not B:
        raise ShapeError(f"{op}: there must be at least one prompt; got none")
    if cache is not None and len(cache.lengths) != B:
        raise ShapeError(f"{op}: the cache has {len(cache.lengths)} rows and there are {B} prompts; it needs one each")
    held = [0] * B if cache is None else cache.lengths.tolist()
    if prefix is not False and any(held):
        raise ValueError(f"{op}: the tokens of a prefix see each other: none of them can lie in the cache already")
    room = []
    for row, (prompt, before) in enumerate(zip(prompts, held, strict=True)):
        if not len(prompt) or prompt.ndim != (2 if prompt.is_floating_point() else 1):
            raise ShapeError(f"{op}: prompt {row} must be [T] ids or [T, C], T >= 1; got {tuple(prompt.shape)}")
        total = before + len(prompt)
        if total > config.context_length:
            raise ShapeError(
                f"{op}: prompt {row} has {total} tokens and the decoder's context is {config.context_length}: shorten "
                f"the prompt (fewer turns or images), or take a decoder with a longer context_length"
            )
        room.append(min(more, config.context_length - total + 1))  # the last token need not be read
    lengths = [len(prompt) for prompt in prompts]
    seen = lengths if prefix is True else list(prefix) if prefix is not False else None
    if seen is not None and (len(seen) != B or any(not 0 <= a <= b for a, b in zip(seen, lengths, strict=True))):
        raise ShapeError(
            f"{op}: prefix must be a number of each prompt's first tokens, of which there are {lengths}; got {seen}"
        )
    x = [each if each.is_floating_point() else decoder.embed(each) for each in prompts]
    if cache is None:
        capacity = max(len(each) + min(left, FIRST_ROOM) - 1 for each, left in zip(x, room, strict=True))
        cache = KvCache(config, B, capacity, device=x[0].device, dtype=x[0].dtype)
    return _packed(decoder, x, cache, seen, only_last=True), cache, room


def _packed(
    decoder: Decoder, x: list[Tensor], cache: KvCache, prefix: list[int] | None, *, only_last: bool = False
) -> Tensor:
    """The hidden states [tokens, C] of sequences [T_b, C] after what the cache's rows hold; or of their last tokens."""
    device = x[0].device
    lengths = torch.tensor([len(each) for each in x])
    ends = lengths.cumsum(0)
    return decoder(
        torch.cat(x),
        cu_seqlens=F.pad(ends, (1, 0)).int().to(device),
        max_seqlen=int(lengths.max()),
        cache=cache,
        prefix=None if prefix is None else torch.tensor(prefix, device=device),
        rows=(ends - 1).to(device) if only_last else None,
    )


def _next(decoder: Decoder, hidden: Tensor) -> Tensor:
    """The next token's log-probs [N, V] float32 after hidden states [N, C]."""
    return decoder.logits(hidden).float().log_softmax(-1)


def _follow(
    decoder: Decoder,
    hidden: Tensor,
    cache: KvCache,
    borrowed: bool,
    room: list[int],
    eos: set[int],
    barred: Tensor,
    choose: Choice,
    on_token: Callable[[int, int], object] | None,
) -> list[Generation]:
    """One token a row and step, as `choose` has it, until eos or no room."""
    tokens: list[list[int]] = [[] for _ in room]
    log_probs: list[list[float]] = [[] for _ in room]
    finished = [False] * len(room)
    rows, ended = list(range(len(room))), set[int]()  # the rows of the cache, and which of them are done
    for step in range(max(room)):
        likely = _next(decoder, hidden)
        chosen = choose(likely.index_fill(1, barred, -torch.inf) if len(barred) else likely, rows, step)
        own = likely.gather(1, chosen[:, None])[:, 0]
        for row, token, log_prob in zip(rows, chosen.tolist(), own.tolist(), strict=True):
            if row in ended:
                continue
            log_probs[row].append(log_prob)
            finished[row] = token in eos
            if not finished[row]:
                tokens[row].append(token)
                if on_token:
                    on_token(row, token)
            if finished[row] or step + 1 == room[row]:
                ended.add(row)
        onward = [place for place, row in enumerate(rows) if row not in ended]
        if not onward:
            break
        # To leave rows out is to copy all others: that waits for a quarter to have ended, unless one has no room left,
        # or what a caller's cache holds would grow past a row's end.
        full = any(row in ended and step + 1 >= room[row] for row in rows)
        if len(onward) < len(rows) and (borrowed or full or 4 * len(onward) <= 3 * len(rows)):
            kept = torch.tensor(onward, device=chosen.device)
            rows, chosen, cache = [rows[place] for place in onward], chosen[kept], cache.select(kept)
            borrowed = False
        hidden = decoder(decoder.embed(chosen)[:, None], cache=cache)[:, 0]
    return [_generation(*each) for each in zip(tokens, log_probs, finished, strict=True)]


def _search(
    decoder: Decoder,
    hidden: Tensor,
    cache: KvCache,
    room: list[int],
    eos: set[int],
    barred: Tensor,
    beams: int,
    length_penalty: float,
    early_stopping: bool | Literal["never"],
) -> list[Generation]:
    """The best of `beams` hypotheses a row."""
    device, rows = hidden.device, list(range(len(room)))
    origin = torch.tensor(rows, device=device).repeat_interleave(beams)
    hidden, cache = hidden[origin], cache.select(origin)
    # At first all beams of a row are its prompt: the candidates must come from one of them.
    running = [_Beam(0.0 if place % beams == 0 else -1e9, place, [], []) for place in range(len(origin))]
    ended: list[list[tuple[float, bool, _Beam]]] = [[] for _ in room]  # (score, by eos, beam), best first
    for step in range(1, max(room) + 1):
        likely = _next(decoder, hidden).index_fill(1, barred, -torch.inf)
        V = likely.shape[1]
        totals = torch.tensor([beam.total for beam in running], device=device)[:, None] + likely
        # A beam can end in len(eos) ways: among so many candidates `beams` go on.
        top = totals.view(len(rows), -1).topk(min((1 + max(1, len(eos))) * beams, beams * V))
        own = likely.view(len(rows), -1).gather(1, top.indices)
        found = [each.tolist() for each in (top.values, top.indices, own)]
        before, running, onward = running, [], []
        for place, row in enumerate(rows):
            follow: list[_Beam] = []
            for rank, (total, index, log_prob) in enumerate(zip(*(each[place] for each in found), strict=True)):
                parent, token = place * beams + index // V, index % V
                _, _, tokens, log_probs = before[parent]
                beam = _Beam(total, parent, [*tokens, token], [*log_probs, log_prob])
                if token in eos or step == room[row]:
                    if rank < beams:
                        ended[row].append((total / step**length_penalty, token in eos, beam))
                elif len(follow) < beams:
                    follow.append(beam)
            ended[row] = sorted(ended[row], key=lambda each: -each[0])[:beams]
            length = room[row] if early_stopping == "never" and length_penalty > 0 else step
            if follow and (
                len(ended[row]) < beams
                or (early_stopping is not True and follow[0].total / length**length_penalty > ended[row][-1][0])
            ):
                onward.append(row)
                running += follow
        if not onward:
            break
        rows, parents = onward, [beam.parent for beam in running]
        if parents != list(range(len(before))):
            cache = cache.select(torch.tensor(parents, device=device))
        chosen = torch.tensor([beam.tokens[-1] for beam in running], device=device)
        hidden = decoder(decoder.embed(chosen)[:, None], cache=cache)[:, 0]
    best = [each[0] for each in ended]
    return [_generation(beam.tokens[: -1 if by_eos else None], beam.log_probs, by_eos) for _, by_eos, beam in best]


class _Beam(NamedTuple):
    total: float  # the sum of log_probs
    parent: int  # the row of the cache that it continues
    tokens: list[int]
    log_probs: list[float]


def _generation(tokens: list[int], log_probs: list[float], finished: bool) -> Generation:
    return Generation(torch.tensor(tokens, dtype=torch.int64), torch.tensor(log_probs), finished)


def _likeliest(log_probs: Tensor, rows: list[int], step: int) -> Tensor:
    return log_probs.argmax(-1)


def _drawn(
    draws: Tensor,  # [B, steps] float64 in [0, 1)
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    log_probs: Tensor,
    rows: list[int],
    step: int,
) -> Tensor:
    """Where each row's draw falls among the probabilities that are left, laid side by side."""
    edges = _filtered(log_probs, temperature, top_k, top_p).softmax(-1).double().cumsum(-1)
    point = (1 - draws[rows, step, None]) * edges[:, -1:]  # in (0, end]: never at a token of probability 0
    return torch.searchsorted(edges, point)[:, 0]


def _filtered(log_probs: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """log_probs / temperature [N, V], -inf where top_k and then top_p leave a token out."""
    z = log_probs / temperature
    if top_k is not None:
        z = z.masked_fill(z < z.topk(min(top_k, z.shape[-1])).values[:, -1:], -torch.inf)
    if top_p is not None:
        ascending, order = z.sort()
        out = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        out[:, -1] = False
        z = z.masked_fill(torch.empty_like(out).scatter_(1, order, out), -torch.inf)
    return z


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device


def _check_options(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    beams: int,
    early_stopping: bool | str,
) -> None:
    for name, value, right, wanted in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, temperature == 0 or COLDEST <= temperature < inf, f"0, or in [{COLDEST}, inf)"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1, or None"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "in (0, 1], or None"),
        ("beams", beams, beams >= 1, "at least 1"),
        ("early_stopping", early_stopping, early_stopping in (True, False, "never"), "True, False or 'never'"),
    ):
        if not right:
            raise ValueError(f"generate: {name} must be {wanted}; got {value!r}")
    if temperature > 0 and beams > 1:
        raise ValueError(f"generate: beams are not drawn at random: temperature must be 0 with {beams} beams")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("generate: top_k and top_p are for draws: give a temperature above 0, or leave them out")
