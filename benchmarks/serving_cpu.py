#!/usr/bin/env python
"""How many tokens a second this CPU gives to many requests: ours and every peer, in turns.

    python benchmarks/serving_cpu.py --quick                                    # a minute, a tiny model, ours only
    python benchmarks/serving_cpu.py --shapes 125m --batches 8 --peers vllm-f32       # one comparison
    python benchmarks/serving_cpu.py --directory /scratch/opt                         # everything, for hours

64 requests are there from the beginning, prompts of 8 to 512 and answers of 8 to 256 tokens, both log-uniform, from
one seed. Ours and a peer are loaded, each in its process, and answer all of them in turns. What is printed:

- **requests**: tokens per second of ours and of the peer, and the ratio of each turn; the share of slots in use; and
  of what the mix allows how much was reached. That bound is the time of as many steps as the answers take with every
  slot in use, at the mean context, plus the time of the prompts, each alone.
- **gaps**: seconds between the tokens of a running row, before and while a prompt of 1500 tokens is encoded.
- **prefix**: seconds to the first token of 32 requests with 512 tokens in common, of the first and of the others.
- **soak**: resident memory, threads and open files over ten thousand short requests of a tiny model.

Ours is the float16 export, but the bfloat16 export with `torch.set_float32_matmul_precision("medium")` beside a peer
that computes in bfloat16. Checkpoints have random weights. Each peer gets a virtual environment with the packages of
benchmarks/peers/*.txt. --output gets serving_cpu.json with every time that was taken, anew after each measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from peers import Contender
from speed.checkpoints import SHAPES, make_checkpoint, shape_options
from speed.environments import EnvironmentFailed
from speed.session import processor
from speed.workers import ContenderFailed, Worker, Workplace
from traffic.contenders import OURS, PEERS
from traffic.mix import Mix, make_mix


HERE = Path(__file__).parent
FIGURES = ("requests", "gaps", "prefix", "soak")


class Benchmark:
    """Runs what was asked for.

    Args:
        given: the command's arguments.
        place: where contenders run.
    """

    def __init__(self, given: argparse.Namespace, place: Workplace):
        self.given, self.place = given, place
        self.report: dict[str, Any] = {"processor": processor(), "threads": given.threads, "results": []}

    def _ours(self, contender: Contender = OURS["f32"]) -> Contender:
        """As the command was asked to export it."""
        return replace(contender, options={**contender.options, "eager": self.given.eager})

    def run(self) -> None:
        given = self.given
        print(f"{self.report['processor']}, {given.threads} threads\n")
        for shape in given.shapes:
            for batch in given.batches:
                if "requests" in given.figures:
                    for peer in given.peers:
                        self._attempt(
                            "requests", shape, batch, peer, lambda s=shape, b=batch, p=peer: self._requests(s, b, p)
                        )
                for figure in ("gaps", "prefix"):
                    if figure in given.figures:
                        measure = getattr(self, f"_{figure}")
                        self._attempt(figure, shape, batch, None, lambda m=measure, s=shape, b=batch: m(s, b))
        if "soak" in given.figures:
            self._attempt("soak", "tiny", 4, None, self._soak)

    def _attempt(self, figure: str, shape: str, batch: int, peer: str | None, measure: Any) -> None:
        where = {"figure": figure, "shape": shape, "slots": batch, "peer": peer}
        try:
            result = measure()
        except (ContenderFailed, EnvironmentFailed) as error:
            result = {"error": str(error)}
        self.report["results"].append({**where, **result})
        said = ", ".join(f"{name} {_short(value)}" for name, value in result.items())
        print(f"{shape}, {batch} slots, {figure}{f', {peer}' if peer else ''}: {said}", flush=True)
        self.given.output.mkdir(parents=True, exist_ok=True)
        file = self.given.output / "serving_cpu.json"
        file.with_suffix(".partial").write_text(json.dumps(self.report, indent=1) + "\n")
        file.with_suffix(".partial").rename(file)

    def _mix(self, shape: str) -> Mix:
        given = self.given
        vocabulary = shape_options(shape)["vocab_size"]
        return make_mix(given.requests, tuple(given.prompts), tuple(given.answers), vocabulary)

    def _requests(self, shape: str, batch: int, name: str) -> dict[str, Any]:
        mix, rates = self._mix(shape), {"ours": [], "peer": []}
        asked = {"prompts": mix.prompts, "lengths": mix.lengths}
        peer = PEERS[name]
        peer = self._ours(peer) if peer.environment is None else peer
        ours = self._ours(OURS.get(peer.compute, OURS["f32"]))
        with ExitStack() as stack:
            workers = {
                "peer": stack.enter_context(self._loaded(peer, shape, batch, mix.longest)),
                "ours": stack.enter_context(self._loaded(ours, shape, batch, mix.longest)),
            }
            few = {"prompts": mix.prompts[:batch], "lengths": [4] * batch}
            for worker in workers.values():
                worker.ask("serve", **few)  # warm
            for _ in range(self.given.rounds):
                for who, worker in workers.items():
                    seconds, made = worker.ask("serve", **asked)
                    if made != mix.lengths:
                        raise ContenderFailed(f"{who} made {sum(made)} tokens, not the {mix.new_tokens} asked for")
                    rates[who].append(mix.new_tokens / seconds)
            result: dict[str, Any] = {
                "tokens_per_second": {who: statistics.median(measured) for who, measured in rates.items()},
                "ratio": statistics.median(a / b for a, b in zip(rates["ours"], rates["peer"], strict=True)),
                "slots_used": workers["ours"].ask("slots_used")[1],
                "rounds": rates,
            }
            if name == "ours-f16-static":  # once for each number of slots is enough
                result["of_the_bound"] = self._bound(workers["ours"], mix, batch, result["tokens_per_second"]["ours"])
        return result

    def _bound(self, worker: Worker, mix: Mix, batch: int, rate: float) -> dict[str, float]:
        """What the mix allows, and how much of it ours reached."""
        pairs = list(zip(mix.prompts, mix.lengths, strict=True))
        context = sum((len(prompt) + new / 2) * new for prompt, new in pairs) / mix.new_tokens
        step = worker.ask("step_seconds", context=max(1, int(context) - 12), steps=24)[1]
        # The first token of each answer comes with its prompt.
        steps = (mix.new_tokens - len(pairs)) / batch
        prompts = worker.ask("prompt_seconds", prompts=mix.prompts)[1]
        bound = mix.new_tokens / (steps * step + prompts)
        return {"tokens_per_second": bound, "reached": rate / bound, "step": step, "prompts": prompts}

    def _gaps(self, shape: str, batch: int) -> dict[str, Any]:
        with self._loaded(self._ours(), shape, batch, 2048) as worker:
            worker.ask("gaps", long=200, neighbours=batch - 1)  # warm
            measured = [
                worker.ask("gaps", long=1500, neighbours=rows)[1]
                for rows in (1, batch - 1)
                for _ in range(self.given.rounds)
            ]
        half = self.given.rounds
        return {
            f"{rows}_rows": {
                "longest_to_median": statistics.median(one["longest"] / one["median"] for one in some),
                "longest_to_median_before": statistics.median(one["longest"] / one["median_before"] for one in some),
                **some[0],
            }
            for rows, some in ((1, measured[:half]), (batch - 1, measured[half:]))
        }

    def _prefix(self, shape: str, batch: int) -> dict[str, Any]:
        with self._loaded(self._ours(), shape, batch, 768) as worker:
            worker.ask("serve", prompts=[[5, 6, 7] * 30], lengths=[4])  # warm
            made = worker.ask("prefix", common=512, requests=32)[1]
        return {**made, "ratio": made["first"] / made["others"], "expected_copied": 31 * 512}

    def _soak(self) -> dict[str, Any]:
        with self._loaded(self._ours(), "tiny", 4, 64) as worker:
            seen = worker.ask("soak", requests=self.given.soak)[1]
        resident = seen["resident"]
        return {"requests": self.given.soak, "growth": resident[-1] / resident[len(resident) // 2] - 1, **seen}

    def _loaded(self, contender: Contender, shape: str, batch: int, length: int) -> Worker:
        folder = self.place.directory / shape
        folder.mkdir(parents=True, exist_ok=True)
        source = target = make_checkpoint(shape, folder / "checkpoint")
        worker = Worker(contender, self.place)
        try:
            if contender.conversion is not None:
                # An export is made for so many slots of such a length.
                own = f"-{batch}-{length}" if contender.environment is None else ""
                target = folder / f"{contender.conversion}{own}"
                if not target.is_dir():
                    arguments = {"batch_size": batch, "length": length}
                    worker.ask("convert", source=str(source), directory=str(target), **arguments)
            worker.ask("load", directory=str(target), batch_size=batch, length=length)
        except BaseException:
            worker.close()
            raise
        return worker


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_short(inner)}" for name, inner in value.items()) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return str(value)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["125m", "1.3b"], choices=list(SHAPES), metavar="SHAPE",
                        help=f"of {', '.join(SHAPES)} (default: 125m 1.3b)")  # fmt: skip
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 8], metavar="N",
                        help="requests at once (default: 4 8)")  # fmt: skip
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS), metavar="PEER",
                        help=f"of {', '.join(PEERS)} (default: all)")  # fmt: skip
    parser.add_argument("--figures", nargs="+", default=list(FIGURES), choices=FIGURES, metavar="FIGURE",
                        help=f"of {', '.join(FIGURES)} (default: all)")  # fmt: skip
    parser.add_argument("--requests", type=int, default=64, help="how many (default: 64)")
    parser.add_argument("--prompts", nargs=2, type=int, default=[8, 512], metavar="N",
                        help="shortest and longest prompt (default: 8 512)")  # fmt: skip
    parser.add_argument("--answers", nargs=2, type=int, default=[8, 256], metavar="N",
                        help="shortest and longest answer (default: 8 256)")  # fmt: skip
    parser.add_argument("--soak", type=int, default=10000, help="short requests of the soak (default: 10000)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)),
                        help="of each contender (default: as many as there are cores)")  # fmt: skip
    parser.add_argument("--patience", type=float, default=3600, metavar="S",
                        help="seconds to wait for a contender's answer (default: 3600)")  # fmt: skip
    parser.add_argument(
        "--directory", type=Path, help="for checkpoints and conversions, which stay (default: a temporary one)"
    )
    parser.add_argument("--environments", type=Path, default=HERE / ".venv",
                        help="for the peers' environments, which stay (default: benchmarks/.venv)")  # fmt: skip
    parser.add_argument("--in_place", action="store_true",
                        help="run peers in this interpreter, without environments of their own")  # fmt: skip
    parser.add_argument("--eager", action="store_true",
                        help="export ours without compiling, to try this command: the times mean nothing")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help="a tiny model, few requests, our static batches as the only peer")  # fmt: skip
    parser.add_argument("--output", type=Path, default=HERE / "results",
                        help="for serving_cpu.json (default: benchmarks/results)")  # fmt: skip
    given = parser.parse_args(arguments)
    if given.quick:
        given.shapes, given.batches, given.peers, given.rounds = ["tiny"], [4], ["ours-f16-static"], 1
        given.requests, given.soak = min(given.requests, 24), min(given.soak, 200)
    for name in ("batches", "requests", "prompts", "answers", "soak", "rounds", "threads"):
        value = getattr(given, name)
        if any(number < 1 for number in (value if isinstance(value, list) else [value])):
            parser.error(f"--{name} {value}: numbers must be 1 or more")
    for name in ("prompts", "answers"):
        if getattr(given, name)[0] > getattr(given, name)[1]:
            parser.error(f"--{name} {getattr(given, name)}: the shortest comes first")
    if given.prompts[1] + given.answers[1] > 2048:
        parser.error(f"--prompts {given.prompts} --answers {given.answers}: the models have 2048 positions")
    if min(given.batches) < 2:
        parser.error(f"--batches {given.batches}: at least 2 requests at once")
    return given


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    with ExitStack() as stack:
        directory = given.directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="serving-cpu-")))
        environments = None if given.in_place else given.environments.absolute()
        benchmark = Benchmark(given, Workplace(directory.absolute(), environments, given.threads, given.patience))
        benchmark.run()
    print(f"\nWritten to {given.output}.")
    return 1 if any("error" in result for result in benchmark.report["results"]) else 0


if __name__ == "__main__":
    sys.exit(main())
