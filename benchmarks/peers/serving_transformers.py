"""transformers' own continuous batching, `generate_batch`."""

from __future__ import annotations

import torch
import transformers
from transformers import GenerationConfig, OPTForCausalLM

from .serving import Server


DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


class Peer(Server):
    def versions(self) -> dict[str, str]:
        torch.set_num_threads(self.threads)
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def load(self, directory: str, batch_size: int, length: int) -> None:
        dtype = DTYPES[self.options["dtype"]]
        self.model = OPTForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa_paged").eval()
        # Its cache is shared by all requests: room for so many of the longest, as ours has.
        self.config = GenerationConfig(
            do_sample=False,
            eos_token_id=-1,
            max_new_tokens=length,
            num_blocks=batch_size * -(-length // 32),
            block_size=32,
            max_batch_tokens=256,
        )

    def serve(self, prompts: list[list[int]], lengths: list[int]) -> list[int]:
        manager = self.model.init_continuous_batching(generation_config=self.config)
        names = [manager.add_request(p, max_new_tokens=n) for p, n in zip(prompts, lengths, strict=True)]
        manager.start()
        made: dict[str, int] = {}
        while len(made) < len(names):
            result = manager.get_result(timeout=1)
            if result is not None:
                made[result.request_id] = len(result.generated_tokens)
            elif not manager.is_running():
                raise RuntimeError("its thread has ended")
        manager.stop(block=True)
        return [made[name] for name in names]
