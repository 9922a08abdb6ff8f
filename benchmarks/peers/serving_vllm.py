"""vLLM's CPU backend."""

from __future__ import annotations

import os

import vllm
from vllm import LLM, SamplingParams

from .serving import Server


DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


class Peer(Server):
    def versions(self) -> dict[str, str]:
        return {"vllm": vllm.__version__}

    def load(self, directory: str, batch_size: int, length: int) -> None:
        # Its default is nearly all of the memory; 2 GiB of cache are more than so many requests fill.
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"
        self.model = LLM(
            directory,
            dtype=DTYPES[self.options["dtype"]],
            max_num_seqs=batch_size,
            max_model_len=length,
            gpu_memory_utilization=0.5,
            seed=0,
        )

    def serve(self, prompts: list[list[int]], lengths: list[int]) -> list[int]:
        options = [SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True) for new in lengths]
        results = self.model.generate([{"prompt_token_ids": p} for p in prompts], options, use_tqdm=False)
        return [len(result.outputs[0].token_ids) for result in results]
