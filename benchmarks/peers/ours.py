"""optimum_opt_trn, used as its users do: `export`, `from_pretrained`, `generate`."""

from __future__ import annotations

import os

import torch

import optimum_opt_trn
from optimum_opt_trn import NeuronOPTForCausalLM

from .base import Runner


class Peer(Runner):
    def versions(self) -> dict[str, str]:
        return {"optimum_opt_trn": optimum_opt_trn.__version__, "torch": torch.__version__}

    def convert(self, source: str, directory: str, batch_size: int, length: int) -> None:
        """An export; of a `source` that is an export itself the weights are linked, not written."""
        neuron_config = NeuronOPTForCausalLM.get_neuron_config(
            source,
            batch_size=batch_size,
            sequence_length=length,
            amp=self.options["amp"],
            weight_dtype=self.options["weight_dtype"],
            tensor_parallel_size=self.options["tp_degree"],
        )
        exported = NeuronOPTForCausalLM.export(source, neuron_config=neuron_config, eager=self.options["eager"])
        exported.save_pretrained(directory)

    def load(self, directory: str) -> None:
        torch.set_float32_matmul_precision(self.options["precision"])
        processes = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun starts them
        self.model = NeuronOPTForCausalLM.from_pretrained(directory, tp_processes=processes)

    def prefill(self, prompts: list[list[int]], room: int) -> list[int]:
        self.ids, self.cache = torch.tensor(prompts), None
        return [row[0] for row in self.decode(1)]

    def decode(self, steps: int) -> list[list[int]]:
        width = self.ids.shape[1]
        generated = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            past_key_values=self.cache,
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
        )
        self.ids, self.cache = generated.sequences, generated.past_key_values
        return self.ids[:, width:].tolist()
