"""Runs one contender, told by lines of JSON on stdin, answering with a line of JSON each.

    PYTHONPATH=benchmarks python -m peers.worker transformers '{"dtype": "f32", "how": "eager"}' 2

The first line, `{"versions": …}`, comes when its packages are imported. Commands are `{"do": "convert" | "load" |
"prefill" | "decode" | "memory", …}` with the arguments of `Runner`'s methods; the answer has `seconds`, and `value`,
what the method returned; or `error`. The end of stdin ends it. Under torchrun rank 0 reads and answers, and the
others do the same as it does.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Memory:
    """The peaks of this process, in bytes: of all resident pages, and of those that are no file's.

    The kernel keeps no peak of the latter, so a thread looks every 20 ms; but not while `watching` is cleared, for it
    takes a core, and Python's lock, from whom it watches.
    """

    def __init__(self) -> None:
        self.anonymous = 0
        self.watching = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self.watching.wait():
            self.anonymous = max(self.anonymous, self._status("RssAnon"))
            time.sleep(0.02)

    def peaks(self) -> dict[str, int]:
        return {"resident": self._status("VmHWM"), "anonymous": max(self.anonymous, self._status("RssAnon"))}

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def commands() -> Iterator[dict[str, Any]]:
    """Those on stdin; rank 0 hands them to the other ranks."""
    if WORLD_SIZE == 1:
        yield from map(json.loads, sys.stdin)
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    while True:
        line = [sys.stdin.readline() if RANK == 0 else None]
        dist.broadcast_object_list(line, src=0)
        if not line[0]:
            return
        yield json.loads(line[0])


def main() -> None:
    # Libraries print; only answers go to the real stdout.
    answers: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module, options, threads = sys.argv[1:]

    def answer(**content: Any) -> None:
        if RANK == 0:
            answers.write(json.dumps(content) + "\n")

    try:
        runner = importlib.import_module(f"peers.{module}").Peer(json.loads(options), int(threads))
        answer(versions=runner.versions())
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}")
        return
    memory: Memory | None = None
    for command in commands():
        action = command.pop("do")
        try:
            if action == "memory":
                answer(seconds=0.0, value=memory.peaks() if memory else {})
                continue
            if action == "load":
                memory = Memory()
            if memory and action == "decode":  # loading and prompts have the peaks; steps are not to be disturbed
                memory.watching.clear()
            elif memory:
                memory.watching.set()
            start = time.perf_counter()
            value = getattr(runner, action)(**command)
            answer(seconds=time.perf_counter() - start, value=value)
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
    sys.stderr.flush()
    os._exit(0)  # not to wait for a generation that goes on in a thread
