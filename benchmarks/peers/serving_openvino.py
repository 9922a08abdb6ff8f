"""OpenVINO GenAI's ContinuousBatchingPipeline."""

from __future__ import annotations

from pathlib import Path

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
        scheduler.max_num_seqs = batch_size
        scheduler.cache_size = 2
        settings = {
            "INFERENCE_PRECISION_HINT": self.options["hint"],
            "INFERENCE_NUM_THREADS": str(self.threads),
            "KV_CACHE_PRECISION": "f16",
        }
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", settings)

    def serve(self, prompts: list[list[int]], lengths: list[int]) -> list[int]:
        ids = [openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt in prompts]
        configs = []
        for length in lengths:
            config = openvino_genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.do_sample = length, True, False
            configs.append(config)
        return [len(result.m_generation_ids[0]) for result in self.pipeline.generate(ids, configs)]
