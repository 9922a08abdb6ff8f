"""CTranslate2: its own generation loop, held after every step until the next is asked for.

`generate_batch` calls back for every token of every row, before it runs the next step; the callback waits there. So a
step is timed inside the library's own loop, at any context, without the prompt being run again.
"""

from __future__ import annotations

import json
import queue
import threading
from pathlib import Path

import ctranslate2
import transformers
from ctranslate2.converters import TransformersConverter

from .base import Runner


class Peer(Runner):
    def versions(self) -> dict[str, str]:
        return {"ctranslate2": ctranslate2.__version__, "transformers": transformers.__version__}

    def convert(self, source: str, directory: str, batch_size: int, length: int) -> None:
        kind = self.options["type"]
        TransformersConverter(source, low_cpu_mem_usage=True).convert(directory, quantization=kind, force=True)

    def load(self, directory: str) -> None:
        self.model = ctranslate2.Generator(
            directory, device="cpu", compute_type=self.options["type"], intra_threads=self.threads
        )
        self.words = json.loads((Path(directory) / "vocabulary.json").read_text())
        self.loop: threading.Thread | None = None

    def prefill(self, prompts: list[list[int]], room: int) -> list[int]:
        if self.loop is not None:  # that of the last prompt ends
            self.allowed.put(None)
            self.loop.join()
        self.allowed: queue.SimpleQueue = queue.SimpleQueue()
        self.made: queue.SimpleQueue = queue.SimpleQueue()
        words = [[self.words[token] for token in prompt] for prompt in prompts]
        rows, new = len(prompts), room - len(prompts[0])
        step: list[int] = []

        def one_token(result: ctranslate2.GenerationStepResult) -> bool:
            step.append(result.token_id)
            if len(step) < rows:
                return False
            self.made.put(list(step))
            step.clear()
            return self.allowed.get() is None

        def run() -> None:
            try:
                self.model.generate_batch(
                    words,
                    max_length=new,
                    min_length=new,
                    sampling_topk=1,
                    include_prompt_in_result=False,
                    callback=one_token,
                )
            except Exception as error:
                self.made.put(error)

        self.loop = threading.Thread(target=run, daemon=True)
        self.loop.start()
        return self._next()

    def decode(self, steps: int) -> list[list[int]]:
        made = []
        for _ in range(steps):
            self.allowed.put(True)
            made.append(self._next())
        return [list(row) for row in zip(*made, strict=True)]

    def _next(self) -> list[int]:
        tokens = self.made.get()
        if isinstance(tokens, Exception):
            raise tokens
        return tokens
