"""The other end of `peers/worker.py`: a contender's process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from peers import Contender

from .environments import environment


BENCHMARKS = Path(__file__).parent.parent
FRESH = Path("caches", "fresh")


class ContenderFailed(RuntimeError):
    """A contender said that it cannot, or its process ended; the message says why."""


class Workplace:
    """Where contenders run: folders, interpreters, threads.

    Args:
        directory: for checkpoints, conversions, caches and logs.
        environments: for virtual environments; None to run all contenders in this interpreter.
        threads: for each contender.
        patience: seconds after which one that does not answer is ended.
        eager: whether ours are exported without compiling.
    """

    def __init__(self, directory: Path, environments: Path | None, threads: int, patience: float, eager: bool = False):
        self.directory, self.environments, self.eager = directory, environments, eager
        self.threads, self.patience = threads, patience
        for name in ("caches", "logs", "temporary"):
            (directory / name).mkdir(parents=True, exist_ok=True)

    def python(self, contender: Contender) -> str:
        if contender.environment is None or self.environments is None:
            return sys.executable
        return str(environment(contender.environment, self.environments))

    def variables(self) -> dict[str, str]:
        """The environment variables of workers: nothing from the network, and what is cached stays here."""
        caches = self.directory / "caches"
        return {
            **os.environ,
            "PYTHONPATH": str(BENCHMARKS),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_ASSETS_CACHE": str(caches / "assets"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        }


class Worker:
    """A contender's process, from its start to `close`.

    Args:
        contender: which.
        place: where.
        variables: of its environment, beside those of `place`.

    Attributes:
        seconds: from the start of the process until its packages were imported.
        versions: of those that matter.
    """

    def __init__(self, contender: Contender, place: Workplace, **variables: str):
        python = place.python(contender)
        launch = [python]
        if contender.processes > 1:
            launch += ["-m", "torch.distributed.run", f"--nproc_per_node={contender.processes}"]
        options = {**contender.options, **({"eager": place.eager} if contender.is_ours else {})}
        launch += ["-m", "peers.worker", contender.module, json.dumps(options)]
        threads = max(1, place.threads // contender.processes)
        self.contender, self.patience = contender, place.patience
        self._log = place.directory / "logs" / f"{contender.name}.log"
        # What the contender leaves there goes with it: gigabytes, of some converters.
        self._temporary = tempfile.mkdtemp(dir=place.directory / "temporary")
        own = {"OMP_NUM_THREADS": str(threads), "TMPDIR": self._temporary}
        started = time.perf_counter()
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [*launch, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=place.directory,
                env={**place.variables(), **own, **contender.variables, **variables},
                start_new_session=True,
            )
        self.versions: dict[str, str] = self._answer()["versions"]
        self.seconds = time.perf_counter() - started

    def ask(self, do: str, **arguments: Any) -> tuple[float, Any]:
        """Seconds that it took, and what the contender's method returned.

        Raises:
            ContenderFailed: if it raised an error, ended, or took too long.
        """
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._ended()
        answer = self._answer()
        return answer["seconds"], answer["value"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        timer = threading.Timer(self.patience, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        except BaseException:  # the run is ended, and this process with it
            self.close()
            raise
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if not line:
            self._ended(f"no answer in {self.patience:.0f} s, so it was ended" if late else None)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.close()
            raise ContenderFailed(answer["error"])
        return answer

    def _ended(self, why: str | None = None) -> None:
        self.close()
        if why is None:
            why = f"its process ended with {self._process.returncode}"
            if self._process.returncode == -9:
                why += ", killed, as the system does when memory runs out"
        last = self._log.read_text().strip().splitlines()[-1:]
        raise ContenderFailed(": ".join([why, *last]))

    def close(self) -> None:
        """Ends the process: the end of its stdin does, or it is killed. Processes that it started are killed."""
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.stdout.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fresh_cache(place: Workplace) -> dict[str, str]:
    """Variables with which a worker finds nothing compiled before."""
    cache = place.directory / FRESH
    shutil.rmtree(cache, ignore_errors=True)
    return {"HF_ASSETS_CACHE": str(cache / "assets"), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}


def keep_fresh_cache(place: Workplace) -> None:
    """Lets later workers find what one with a fresh cache compiled."""
    for made in (place.directory / FRESH).glob("*"):
        shutil.copytree(made, place.directory / "caches" / made.name, dirs_exist_ok=True)
