"""What is claimed of the CPU target, held against what was measured: pass, short, or not measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from peers import PEERS, ours_beside

from .records import Record, Records


PASS, SHORT, UNKNOWN = "pass", "short", "not measured"
BASE, BASE_BF16, BASE_INT8 = "ours-f16", "ours-bf16", "ours-int8"
# Compile times are equal if they differ by no more, relatively or in seconds.
EQUAL, EQUAL_SECONDS = 0.15, 2.0


@dataclass(frozen=True)
class Claim:
    """A line with its numbers and its verdict."""

    text: str
    numbers: str
    verdict: str

    def __str__(self) -> str:
        return f"[{self.verdict}] {self.text}: {self.numbers}" if self.numbers else f"[{self.verdict}] {self.text}"


def _judge(text: str, value: float | None, limit: float, numbers: str = "", at_most: bool = False) -> Claim:
    if value is None:
        return Claim(text, numbers, UNKNOWN)
    holds = value <= limit if at_most else value >= limit
    return Claim(text, numbers, PASS if holds else SHORT)


def check(records: Records, busy: int = 0, zeros: float | None = None) -> list[Claim]:
    """Every line: decoding, prompts, loading, exporting, ranks; other ones of a run with neighbours or planted zeros.

    Args:
        records: what was measured.
        busy: processes of plain work beside it.
        zeros: the share of fc2's inputs that was planted.
    """
    if busy:
        return list(_busy(records, busy))
    if zeros is not None:
        return list(_planted(records, zeros))
    return [
        *_decoding(records),
        *_int8(records),
        _against("125m: 1.5 times the fastest 16- or 32-bit peer, batch 1", records, "125m", 1, 1.5, floats()),
        _prefill(records, BASE, "f32"),
        _prefill(records, BASE_BF16, "bf16"),
        _loading(records),
        _exporting(records),
        _compiling(records),
        *_parallel(records),
    ]


def floats() -> list[str]:
    return [name for name, peer in PEERS.items() if peer.weights != "int8"]


def _busy(records: Records, busy: int) -> Iterator[Claim]:
    for shape in ("125m", "1.3b"):
        for batch in (1, 4):
            beside = f"beside {busy} busy process{'es' if busy > 1 else ''}, batch {batch}"
            yield _against(f"{shape}: 1.2 times the fastest peer {beside}", records, shape, batch, 1.2, PEERS)
            ours = [record for one in (BASE, BASE_BF16) for record in _shortest(records, shape, batch, one)]
            slowdowns = [record.slowdown for record in ours if record.slowdown is not None]
            worst = statistics.median(slowdowns) if slowdowns else None
            shown = f"{worst:.2f} times (median of {len(slowdowns)} groups)" if worst is not None else ""
            yield _judge(f"{shape}: at most 2.2 times its quiet time {beside}", worst, 2.2, shown, at_most=True)


def _planted(records: Records, zeros: float) -> Iterator[Claim]:
    sixteen = [name for name, peer in PEERS.items() if peer.weights in ("f16", "bf16")]
    for shape in ("1.3b", "2.7b"):
        for batch, times in ((1, 1.5), (4, 1.3)):
            text = f"{shape}: {times} times the fastest peer with 16-bit weights, {zeros:.0%} zeros, batch {batch}"
            yield _against(text, records, shape, batch, times, sixteen)


def _decoding(records: Records) -> Iterator[Claim]:
    sixteen = [name for name, peer in PEERS.items() if peer.weights in ("f16", "bf16")]
    for shape in ("1.3b", "2.7b"):
        for batch in (1, 2):
            yield _bandwidth(f"{shape}: 80 % of the probe's bandwidth, batch {batch}", records, shape, batch, 0.8)
        for batch in (1, 2, 4, 8):
            times = 1.3 if batch <= 2 else 1.2
            text = f"{shape}: {times} times the fastest peer with 16-bit weights, batch {batch}"
            yield _against(text, records, shape, batch, times, sixteen)


def _int8(records: Records) -> Iterator[Claim]:
    """Of ours with int8 weights: beside our float16, beside peers with int8 weights, and the bandwidth."""
    eight = [name for name, peer in PEERS.items() if peer.weights == "int8"]
    for batch in (1, 2):
        text = f"1.3b: int8 weights 1.6 times ours in float16, batch {batch}"
        found = _shortest(records, "1.3b", batch, BASE_INT8)
        ratios = [r for r in (_beside_float16(records, record) for record in found) if r is not None]
        ratio = statistics.median(ratios) if ratios else None
        shown = f"{ratio:.2f} times (median of {len(ratios)} groups)" if ratio is not None else ""
        yield _judge(text, ratio, 1.6, shown)
        text = f"1.3b: int8 weights 1.3 times the fastest peer with int8 weights, batch {batch}"
        yield _against(text, records, "1.3b", batch, 1.3, eight, BASE_INT8)
        text = f"1.3b: int8 weights at 75 % of the probe's bandwidth, batch {batch}"
        yield _bandwidth(text, records, "1.3b", batch, 0.75, BASE_INT8)


def _beside_float16(records: Records, int8: Record) -> float | None:
    where = {"shape": int8.shape, "group": int8.group, "figure": int8.figure}
    return records.ratio(int8.contender, BASE, batch=int8.batch, length=int8.length, **where)


def _bandwidth(text: str, records: Records, shape: str, batch: int, limit: float, base: str = BASE) -> Claim:
    """Whether the bytes that a step reads, by its time, are such a share of the probe's bandwidth around it."""
    shares = [share for record in _shortest(records, shape, batch, base) for share in record.shares]
    share = statistics.median(shares) if shares else None
    shown = f"{share:.0%} ({len(shares)} runs)" if share is not None else ""
    return _judge(text, share, limit, shown)


def _shortest(records: Records, shape: str, batch: int, contender: str = BASE) -> list[Record]:
    """Records of decoding at the shortest context, in every group."""
    found = records.select(shape=shape, contender=contender, figure="decode", batch=batch)
    return [record for record in found if record.length == min(r.length for r in found)]


def _against(
    text: str, records: Records, shape: str, batch: int, times: float, peers: Iterable[str], base: str | None = None
) -> Claim:
    bases = (BASE, BASE_BF16) if base is None else (base,)
    lengths = [record.length for one in bases for record in _shortest(records, shape, batch, one)]
    if not lengths:
        return Claim(text, "", UNKNOWN)
    wanted = {"shape": shape, "figure": "decode", "batch": batch, "length": lengths[0]}
    return _fastest(text, records, base, list(peers), times, wanted)


def _fastest(text: str, records: Records, base: str | None, peers: list[str], times: float, wanted: dict) -> Claim:
    """Whether the nearest of `peers` takes so many times as long as `base` did beside it, or ours of its precision."""
    ratios = {peer: records.ratio(base or ours_beside(PEERS[peer]), peer, group=peer, **wanted) for peer in peers}
    known = {peer: ratio for peer, ratio in ratios.items() if ratio is not None}
    if not known:
        return Claim(text, "", UNKNOWN)
    fastest = min(known, key=lambda peer: known[peer])
    runs = len(records.select(contender=fastest, group=fastest, **wanted)[0].runs)
    shown = f"{known[fastest]:.2f} times {fastest} ({runs} runs each; {len(known)} of {len(peers)} peers measured)"
    return _judge(text, known[fastest], times, shown)


def _prefill(records: Records, base: str, compute: str) -> Claim:
    peers = [name for name in floats() if PEERS[name].compute == compute]
    text = f"1.3b: a prompt of 512 no slower than the fastest peer that computes in {compute}, {base}"
    return _fastest(text, records, base, peers, 1.0, {"shape": "1.3b", "figure": "prefill", "batch": 1, "length": 512})


def _loading(records: Records) -> Claim:
    """Load and first token together, imports left out; run by run."""
    summed = Records()
    for load in records.select(shape="1.3b", figure="load", batch=1):
        first = records.one(shape="1.3b", figure="first", batch=1, group=load.group, contender=load.contender)
        if first is not None:
            runs = [a + b for a, b in zip(load.runs, first.runs, strict=True)]
            summed.add(Record("1.3b", load.group, load.contender, "loaded", runs=runs))
    text = "1.3b: loaded to first token in a quarter of the fastest peer's time"
    return _fastest(text, summed, None, list(PEERS), 4.0, {"shape": "1.3b", "figure": "loaded"})


def _exporting(records: Records) -> Claim:
    text = "1.3b: exported no slower than the fastest converting peer converts"
    ours = records.one(shape="1.3b", contender=BASE, figure="convert")
    theirs = [r for r in records.select(shape="1.3b", figure="convert") if r.contender in PEERS]
    if ours is None or not theirs:
        return Claim(text, "", UNKNOWN)
    fastest = min(theirs, key=lambda record: record.median)
    shown = f"{ours.median:.1f} s, {fastest.contender} {fastest.median:.1f} s ({len(ours.runs)} and "
    return _judge(text, ours.median, fastest.median, shown + f"{len(fastest.runs)} runs)", at_most=True)


def _compiling(records: Records) -> Claim:
    text = "1.3b: compile time flat in depth"
    found = sorted(records.select(shape="1.3b", figure="compile"), key=lambda record: record.length)
    if len(found) < 2:
        return Claim(text, "", UNKNOWN)
    seconds = [record.median for record in found]
    apart = max(seconds) - min(seconds)
    shown = ", ".join(f"{record.length} layers {record.median:.1f} s" for record in found)
    return _judge(text, apart, max(EQUAL * max(seconds), EQUAL_SECONDS), shown, at_most=True)


def _parallel(records: Records) -> Iterator[Claim]:
    for group, contender, limit, where in (
        ("tensor-parallel", "ours-f16-tp2", 1.05, "in one process"),
        ("tensor-parallel", "ours-f16-tp4", 1.05, "in one process"),
        ("torchrun", "ours-f16-torchrun2", 1.15, "in two processes"),
    ):
        for shape in ("125m", "1.3b"):
            found = records.select(shape=shape, group=group, contender=contender, figure="decode", batch=1)
            text = f"{shape}: {contender} within {limit - 1:.0%} of one rank, {where}"
            wanted = {"length": found[0].length} if found else {}
            ratio = records.ratio(BASE, contender, shape=shape, group=group, figure="decode", batch=1, **wanted)
            shown = f"{ratio:.3f} times ({len(found[0].runs)} runs each)" if ratio is not None else ""
            yield _judge(text, ratio, limit, shown, at_most=True)
