"""A whole run: for every shape its checkpoint, exports and conversions, and every group at every batch size."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peers import OURS, Contender, groups

from .checkpoints import make_checkpoint, shape_options
from .environments import EnvironmentFailed
from .neighbours import Neighbours
from .pairs import Pairs, Plan, Probe
from .records import Record, Records
from .report import write_report
from .workers import ContenderFailed, Worker, Workplace, fresh_cache, keep_fresh_cache
from .zeros import measure as measure_zeros
from .zeros import plant


# Of one timed run of decoding: some 0.1 to 1 s of a 2-core machine.
STEPS = {"tiny": 4, "125m": 32, "350m": 8, "1.3b": 8, "2.7b": 8}
# To see whether compile time depends on depth.
DEPTHS = (2, 4)
FIGURES = ("decode", "prefill", "load", "export")


@dataclass(frozen=True)
class Choice:
    """What to measure; see the command's options."""

    shapes: tuple[str, ...]
    groups: tuple[str, ...]
    figures: tuple[str, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    rounds: int
    loads: int
    steps: int | None
    full: bool
    busy: int = 0
    zeros: float | None = None

    def plan(self, shape: str, batch: int) -> Plan:
        """Without `full`, only the shortest context beyond batch 1. Prompts and repeated loads at batch 1 alone."""
        contexts = self.contexts if batch == 1 or self.full else self.contexts[:1]
        return Plan(
            batch=batch,
            contexts=contexts if "decode" in self.figures else (),
            prompts=self.prompts if batch == 1 and "prefill" in self.figures else (),
            steps=self.steps or STEPS[shape],
            rounds=self.rounds,
            loads=self.loads if batch == 1 and "load" in self.figures else 1,
            runs_a_round=2 if self.busy else 1,
        )


class Session:
    """Runs a choice and reports after each group and batch size.

    Args:
        choice: what.
        place: where.
        output: the folder of the report.
        keep: whether checkpoints and conversions stay.
        say: told what is being done.
    """

    def __init__(self, choice: Choice, place: Workplace, output: Path, keep: bool, say: Callable[[str], None]):
        self.choice, self.place, self.output, self.keep, self.say = choice, place, output, keep, say
        self._started = time.perf_counter()
        self.records = Records()
        self.failures: list[dict[str, str]] = []
        # Batch size and length of the exports that were made from checkpoints.
        self._made: dict[Path, tuple[int, int]] = {}
        self.probe = Probe(place.threads)
        self.neighbours: Neighbours | None = None
        self.about: dict[str, Any] = {
            "processor": processor(),
            "threads": place.threads,
            "started": time.strftime("%Y-%m-%d %H:%M"),
            "busy": choice.busy,
            "zeros": choice.zeros,
            "choice": vars(choice),
            "versions": {},
            "agreement": {},
        }

    def run(self) -> None:
        self.neighbours = Neighbours(self.choice.busy) if self.choice.busy else None
        try:
            for shape in self.choice.shapes:
                folder = self.place.directory / shape
                try:
                    self._shape(shape, folder)
                finally:
                    if not self.keep:
                        shutil.rmtree(folder, ignore_errors=True)
        finally:
            if self.neighbours is not None:
                self.neighbours.close()

    def _shape(self, shape: str, folder: Path) -> None:
        self.say(f"{shape}: making the checkpoint")
        checkpoint = make_checkpoint(shape, folder / "checkpoint")
        if self.choice.zeros is not None:
            self.say(f"{shape}: planting zeros")
            # It and what is made of it lie apart from what is made of the other one.
            folder = folder / f"zeros-{self.choice.zeros:g}"
            checkpoint = plant(checkpoint, self.choice.zeros, folder / "checkpoint")
        zeros = measure_zeros(checkpoint)
        self.about[f"zeros found, {shape}"] = zeros.describe()
        pairs = Pairs(
            shape, shape_options(shape), checkpoint, self.place, self.probe, self.say, zeros, self.neighbours
        )
        self.about["agreement"][shape], self.about["versions"][shape] = pairs.agreement, pairs.versions
        if "export" in self.choice.figures:
            self._attempt(shape, "export", lambda: self._time_exports(shape, checkpoint, folder))
        selected = {name: groups()[name] for name in self.choice.groups}
        for name, contenders in selected.items():
            for batch in self.choice.batches:
                plan = self.choice.plan(shape, batch)

                def measure(name=name, contenders=contenders, plan=plan) -> None:
                    folders = {c.name: self._folder(shape, c, checkpoint, folder, plan) for c in contenders}
                    self.records.add(*pairs.measure(name, contenders, folders, plan))

                if not self._attempt(shape, name, measure):
                    break  # it will not run with more rows
            if not self.keep:
                # Conversions that no later group needs; the groups of one conversion follow each other.
                later = {
                    c.conversion for other in list(selected)[list(selected).index(name) + 1 :] for c in selected[other]
                }
                for contender in contenders:
                    if contender.conversion and contender.conversion not in later and not contender.is_ours:
                        shutil.rmtree(folder / contender.conversion, ignore_errors=True)

    def _attempt(self, shape: str, group: str, action: Callable[[], None]) -> bool:
        """Whether it went well; what did not is noted, and the run goes on. Reports either way."""
        error = None
        try:
            action()
        except (ContenderFailed, EnvironmentFailed) as failure:
            error = str(failure)
            self.say(f"{shape} {group} FAILED: {error}")
            self.failures.append({"shape": shape, "group": group, "error": error})
        self.about["seconds"] = round(time.perf_counter() - self._started)
        write_report(self.output, self.about, self.records, self.failures)
        return error is None

    def _folder(self, shape: str, contender: Contender, checkpoint: Path, folder: Path, plan: Plan) -> Path:
        """What the contender loads, made if it is not there; a first conversion is timed."""
        if contender.conversion is None:
            return checkpoint
        whole = folder / contender.conversion
        if not contender.is_ours:
            self._convert(shape, contender, checkpoint, whole, plan.batch, plan.length)
            return whole
        # Exports have their shapes; all but the first in a dtype are linked to that.
        first = folder / f"ours-{contender.weights}"
        self._convert(shape, OURS[first.name], checkpoint, first, plan.batch, plan.length)
        if (first.name, plan.batch, plan.length) == (contender.name, *self._made.get(first, ())):
            return first
        fitting = folder / f"{contender.name}-batch{plan.batch}-length{plan.length}"
        if not fitting.exists():
            self.say(f"{shape}: exporting {fitting.name}")
            _ask_once(contender, self.place, first, fitting, plan.batch, plan.length)
        return fitting

    def _convert(self, shape: str, contender: Contender, source: Path, target: Path, batch: int, length: int) -> None:
        if target.exists():
            return
        self.say(f"{shape}: converting to {target.name}")
        arguments = (contender, self.place, source, target, batch, length)
        if contender.is_ours:
            seconds = _ask_once(*arguments, **fresh_cache(self.place))
            keep_fresh_cache(self.place)  # for the exports that follow
            self._made[target] = batch, length
        else:
            seconds = _ask_once(*arguments)
        self.records.add(Record(shape, "export", contender.name, "convert", runs=[seconds]))

    def _time_exports(self, shape: str, checkpoint: Path, folder: Path) -> None:
        """Our export as a user's first; then its compilation, at several depths."""
        ours, plan = OURS["ours-f16"], self.choice.plan(shape, 1)
        whole = folder / ours.name
        self._convert(shape, ours, checkpoint, whole, 1, plan.length)
        for layers in sorted({*DEPTHS, shape_options(shape)["num_hidden_layers"]}):
            source = folder / f"depth{layers}"
            self.say(f"{shape}: compiling {layers} layers")
            try:
                make_checkpoint(shape, source / "checkpoint", layers)
                # The weights once, so that of the second, timed, export they are links.
                sizes = (self.place, source / "checkpoint", source / "first", 1, plan.length)
                _ask_once(ours, *sizes)
                arguments = (ours, self.place, source / "first", source / "second", 1, plan.length)
                seconds = _ask_once(*arguments, **fresh_cache(self.place))
            finally:
                shutil.rmtree(source, ignore_errors=True)
            self.records.add(Record(shape, "export", ours.name, "compile", length=layers, runs=[seconds]))


def _ask_once(
    contender: Contender, place: Workplace, source: Path, target: Path, batch: int, length: int, **variables: str
) -> float:
    """Seconds of a conversion in a process of its own; imports are not counted. What is half done is removed."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with Worker(replace(contender, processes=1), place, **variables) as worker:
            arguments = {"source": str(source), "directory": str(partial), "batch_size": batch, "length": length}
            seconds = worker.ask("convert", **arguments)[0]
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return seconds


def processor() -> str:
    """Its name and number of cores, as the system has them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
