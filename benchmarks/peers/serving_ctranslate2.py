"""CTranslate2's `generate_batch`: static batches, sorted by the length of the prompts, as it does by itself."""

from __future__ import annotations

import json
from pathlib import Path

import ctranslate2

from .ctranslate2 import Peer as Converter
from .serving import Server


class Peer(Server):
    versions = Converter.versions
    convert = Converter.convert

    def load(self, directory: str, batch_size: int, length: int) -> None:
        self.model = ctranslate2.Generator(
            directory, device="cpu", compute_type=self.options["type"], intra_threads=self.threads
        )
        self.words = json.loads((Path(directory) / "vocabulary.json").read_text())
        self.batch_size = batch_size

    def serve(self, prompts: list[list[int]], lengths: list[int]) -> list[int]:
        """It has one length for all: requests of similar lengths go together, which is its best."""
        order = sorted(range(len(prompts)), key=lambda i: lengths[i])
        for start in range(0, len(order), self.batch_size):
            some = order[start : start + self.batch_size]
            new = max(lengths[i] for i in some)
            self.model.generate_batch(
                [[self.words[token] for token in prompts[i]] for i in some],
                max_length=new,
                min_length=new,
                sampling_topk=1,
                include_prompt_in_result=False,
            )
        return lengths
