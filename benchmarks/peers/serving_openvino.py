"""OpenVINO GenAI's ContinuousBatchingPipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import openvino
import openvino_genai
from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer

from .serving import Server


class Peer(Server):
    def versions(self) -> dict[str, str]:
        return {"openvino": openvino.__version__, "openvino-genai": openvino_genai.__version__}

    def convert(self, source: str, directory: str, batch_size: int, length: int) -> None:
        from openvino_tokenizers import convert_tokenizer

        kind = {"load_in_8bit": self.options["kind"] == "int8"}
        OVModelForCausalLM.from_pretrained(source, export=True, compile=False, **kind).save_pretrained(directory)
        tokenizers = convert_tokenizer(AutoTokenizer.from_pretrained(source), with_detokenizer=True)
        for tokenizer, name in zip(tokenizers, ("tokenizer", "detokenizer"), strict=True):
            openvino.save_model(tokenizer, Path(directory, f"openvino_{name}.xml"))

    def load(self, directory: str, batch_size: int, length: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 2
        self.slots = batch_size
        settings = {
            "INFERENCE_PRECISION_HINT": self.options["hint"],
            "INFERENCE_NUM_THREADS": str(self.threads),
            "KV_CACHE_PRECISION": "f16",
        }
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", settings)

    def serve(self, prompts: list[list[int]], lengths: list[int]) -> list[int]:
        # Its scheduler minds max_num_seqs only without dynamic_split_fuse, its default, which is faster: with it, all
        # requests that are there run at once. So each is added when another has ended.
        running: dict[int, Any] = {}
        counts = [0] * len(prompts)
        added = 0
        while added < len(prompts) or running:
            while added < len(prompts) and len(running) < self.slots:
                ids = openvino.Tensor(numpy.array([prompts[added]], dtype=numpy.int64))
                running[added] = self.pipeline.add_request(added, ids, self._config(lengths[added]))
                added += 1
            self.pipeline.step()
            for request, handle in list(running.items()):
                if handle.get_status() == openvino_genai.GenerationStatus.FINISHED:
                    counts[request] = len(handle.read_all()[0].generated_ids)
                    del running[request]
        return counts

    @staticmethod
    def _config(length: int) -> openvino_genai.GenerationConfig:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = length, True, False
        return config
