"""Measures a group of contenders in turns: probe, ours, probe, the peer, and again.

The read bandwidth of a shared machine can double within minutes, so a time means something only beside one that was
taken a moment ago.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers import WEIGHT_BYTES, Contender

from .checkpoints import cache_bytes, read_headers, unread_head_bytes, weight_bytes
from .neighbours import Neighbours
from .records import Record
from .workers import Worker, Workplace
from .zeros import Zeros, unread_layer_bytes


# Of the prompt that a process is started for: the first token after loading, and tokens to compare.
COLD_PROMPT, COMPARED = 32, 8
# Before anything is timed, so that the threads of the process before have gone to sleep: Intel's OpenMP, which
# CTranslate2 comes with, has them spin for 200 ms (KMP_BLOCKTIME).
PAUSE = 0.25


class Probe:
    """Bytes per second at which `torch.sum` reads 256 MB of float32 on so many threads.

    It takes another 256 MB each time, of four, so that none of them are in the processor's cache.
    """

    def __init__(self, threads: int, megabytes: int = 256):
        torch.set_num_threads(threads)
        self.parts = torch.ones(4, megabytes * 1_000_000 // 4)
        self.turn = 0

    def __call__(self) -> float:
        """The median of three."""
        seen = []
        for _ in range(3):
            part = self.parts[self.turn % 4]
            self.turn += 1
            start = time.perf_counter()
            part.sum()
            seen.append(part.nbytes / (time.perf_counter() - start))
        return statistics.median(seen)


@dataclass(frozen=True)
class Plan:
    """What is measured of a group at one batch size, with each contender loaded once.

    Args:
        batch: rows.
        contexts: tokens of the prompts that decoding goes on from.
        prompts: tokens of the prompts whose first token is timed.
        steps: of one timed run of decoding.
        rounds: of each figure.
        loads: how often each is started and loaded.
        runs_a_round: 2 with neighbours, for one is without them.
    """

    batch: int
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    steps: int
    rounds: int
    loads: int
    runs_a_round: int = 1

    def room(self, length: int) -> int:
        """Tokens that a row has at most, decoding from a prompt of `length`: a run to warm up, and the timed ones."""
        return length + 1 + self.steps * (self.rounds * self.runs_a_round + 1)

    @property
    def length(self) -> int:
        """Tokens that a row has at most in all of it."""
        needs = [COLD_PROMPT + 1 + COMPARED, *map(self.room, self.contexts), *(p + 1 for p in self.prompts)]
        return -(-max(needs) // 64) * 64


class Pairs:
    """Measures groups of one shape.

    Args:
        shape: its name.
        config: the options of its configuration.
        checkpoint: its folder.
        place: where contenders run.
        probe: of the read bandwidth.
        say: told what is being done.
        zeros: of fc2's inputs in the checkpoint.
        neighbours: that run beside each measurement; None for a quiet machine.
    """

    def __init__(
        self,
        shape: str,
        config: dict[str, Any],
        checkpoint: Path,
        place: Workplace,
        probe: Probe,
        say: Callable[[str], None],
        zeros: Zeros,
        neighbours: Neighbours | None = None,
    ):
        self.shape, self.config, self.place, self.probe, self.say = shape, config, place, probe, say
        self.zeros, self.neighbours = zeros, neighbours
        self.header = read_headers(checkpoint)
        # Bytes of weights that a step of our exports reads, by contender: the files are known.
        self.exported: dict[str, float] = {}
        self.versions: dict[str, dict[str, str]] = {}
        # Contender -> how many of the first tokens, of how many, equal those of the group's first contender.
        self.agreement: dict[str, tuple[int, int]] = {}

    def measure(self, group: str, contenders: list[Contender], folders: dict[str, Path], plan: Plan) -> list[Record]:
        """Records of every figure in `plan`.

        Args:
            group: its name.
            contenders: in the order of their turns.
            folders: what each loads, by name.
            plan: what to measure.

        Raises:
            ContenderFailed: if one of them does.
        """

        def record(contender: Contender, figure: str, length: int = 0) -> Record:
            return Record(self.shape, group, contender.name, figure, plan.batch, length)

        for contender in contenders:
            if contender.is_ours:
                header = read_headers(folders[contender.name] / "checkpoint")
                weights = weight_bytes(header) - unread_head_bytes(folders[contender.name])
                unread = unread_layer_bytes(folders[contender.name], plan.batch, self.zeros)
                self.exported[contender.name] = weights - unread
        with ExitStack() as open_workers:
            workers, records = self._load(contenders, folders, plan, record, open_workers)
            for length in plan.prompts:
                self.say(f"{self.shape} {group}: batch {plan.batch}, prompt {length}")
                records += self._prefill(workers, plan, length, record)
            for length in plan.contexts:
                self.say(f"{self.shape} {group}: batch {plan.batch}, context {length}")
                records += self._decode(workers, plan, length, record)
            for contender, worker in workers.items():
                for kind, size in worker.ask("memory")[1].items():
                    records.append(record(contender, kind))
                    records[-1].runs.append(size)
        return records

    def _load(self, contenders, folders, plan, record, stack):
        """Starts and loads each in turns, `plan.loads` times; those of the last time stay."""
        timed = {
            (contender, figure): record(contender, figure, COLD_PROMPT if figure == "first" else 0)
            for contender in contenders
            for figure in ("start", "load", "first")
        }
        workers: dict[Contender, Worker] = {}
        tokens: dict[Contender, list[list[int]]] = {}
        for turn in range(plan.loads):
            last = turn == plan.loads - 1
            for contender in contenders:
                worker = stack.enter_context(Worker(contender, self.place))
                load = worker.ask("load", directory=str(folders[contender.name]))[0]
                prompts = self._prompts(plan.batch, COLD_PROMPT)
                room = COLD_PROMPT + 1 + COMPARED
                first, start = worker.ask("prefill", prompts=prompts, room=room)
                for figure, seconds in (("start", worker.seconds), ("load", load), ("first", first)):
                    timed[contender, figure].runs.append(seconds)
                if last:
                    following = worker.ask("decode", steps=COMPARED)[1]
                    tokens[contender] = [[head, *tail] for head, tail in zip(start, following, strict=True)]
                    workers[contender] = worker
                    self.versions[contender.name] = worker.versions
                else:
                    worker.close()
        if plan.batch == 1:
            for contender in contenders:
                self.agreement[contender.name] = agreeing(tokens[contenders[0]][0], tokens[contender][0])
        return workers, list(timed.values())

    def _prefill(self, workers, plan, length, record):
        prompts = self._prompts(plan.batch, length)
        arguments = {"prompts": prompts, "room": length + 1}
        for worker in workers.values():
            worker.ask("prefill", **arguments)
        made = {contender: record(contender, "prefill", length) for contender in workers}
        self._in_turns(plan.rounds, made, lambda contender: workers[contender].ask("prefill", **arguments)[0])
        return list(made.values())

    def _decode(self, workers, plan, length, record):
        prompts = self._prompts(plan.batch, length)
        for worker in workers.values():
            worker.ask("prefill", prompts=prompts, room=plan.room(length))
            worker.ask("decode", steps=plan.steps)
        made = {contender: record(contender, "decode", length) for contender in workers}

        def run(contender: Contender) -> float:
            return workers[contender].ask("decode", steps=plan.steps)[0] / plan.steps

        self._in_turns(plan.rounds, made, run)
        for contender, figure in made.items():
            # A step attends to the positions before it and its own; run i begins after a warm-up and i runs.
            taken = plan.steps * (1 if self.neighbours is None else 2)
            middles = [length + taken * (index + 1) + plan.steps / 2 for index in range(len(figure.runs))]
            figure.bytes = [self.step_bytes(contender, plan.batch, middle) for middle in middles]
        return list(made.values())

    def _in_turns(self, rounds: int, made: dict[Contender, Record], run: Callable[[Contender], float]) -> None:
        before = self._probe()
        for _ in range(rounds):
            for contender, figure in made.items():
                if self.neighbours is None:
                    figure.runs.append(run(contender))
                else:
                    figure.quiet.append(run(contender))
                    with self.neighbours.working():
                        time.sleep(PAUSE)
                        figure.runs.append(run(contender))
                after = self._probe()
                figure.bandwidths.append((before + after) / 2)
                before = after

    def _probe(self) -> float:
        time.sleep(PAUSE)
        seen = self.probe()
        time.sleep(PAUSE / 5)  # this process's own threads, GNU OpenMP's, spin for some milliseconds
        return seen

    def step_bytes(self, contender: Contender, batch: int, context: float) -> float:
        """What a step reads, with matrices and cache in the contender's dtype of weights (int8: a 16-bit cache).

        Ours does not read all of the layers' weights (`unread_layer_bytes`).
        """
        matrix = WEIGHT_BYTES[contender.weights]
        weights = self.exported.get(contender.name, weight_bytes(self.header, matrix))
        return weights + cache_bytes(self.config, batch, context, max(2, matrix))

    def _prompts(self, batch: int, length: int) -> list[list[int]]:
        """The same for every contender; no special tokens (0 to 3)."""
        drawn = random.Random(length)
        return [[drawn.randrange(4, self.config["vocab_size"]) for _ in range(length)] for _ in range(batch)]


def agreeing(ours: list[int], theirs: list[int]) -> tuple[int, int]:
    """How many of the first tokens are equal, and of how many."""
    equal = [a == b for a, b in zip(ours, theirs, strict=True)]
    return (equal + [False]).index(False), len(equal)
