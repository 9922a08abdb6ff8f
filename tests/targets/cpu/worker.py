"""One process of several that share a model: `test_processes.py` starts it, and judges what it writes.

python worker.py DIRECTORY: loads the exports in there, and writes what it found to RANK.pt
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, set_seed
from transformers.generation.streamers import BaseStreamer

from optimum_opt_trn import NeuronOPTForCausalLM


class Late(StoppingCriteria):
    """A clock that runs differently in each process: ends after 3 tokens in the first, never in others."""

    def __init__(self, rank: int, width: int):
        self._end = width + 3 if rank == 0 else 10**9

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self._end)


class Dies(BaseStreamer):
    """Ends the process in the middle of a call, as a crash would: without a word. (By 0, for torchrun would end the
    other process, too, before it could say what it saw.)
    """

    def put(self, value: torch.Tensor) -> None:
        if value.dim() == 1:  # not the prompt
            os._exit(0)

    def end(self) -> None:
        pass


class Noise(LogitsProcessor):
    """On the host, and random: from the default generator."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + torch.rand_like(scores)


def error_of(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def calls(model: NeuronOPTForCausalLM, batch: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """What the test compares with transformers and with one process; `seed` counts only in the first process."""
    asked = {"max_new_tokens": 8, "min_new_tokens": 8}
    single = {"input_ids": batch["input_ids"][:1]}
    inner = model(**batch, output_attentions=True, output_hidden_states=True)
    embeds = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"]), **batch}
    results = {
        "logits": model(**batch).logits,
        "attentions": torch.stack(inner.attentions),
        "hidden_states": torch.stack(inner.hidden_states[:-1]),
        "embeddings": model.generate(**embeds, **asked, do_sample=False),
        "greedy": model.generate(**batch, **asked, do_sample=False),
        "beams": model.generate(**single, **asked, num_beams=3, num_return_sequences=2, do_sample=False),
        "lookup": model.generate(**single, **asked, prompt_lookup_num_tokens=3, do_sample=False),
    }
    for name, options in {
        "device": {"top_k": 20},
        "host": {"top_k": 0},
        "beam_sample": {"num_beams": 3},
        "noise": {"logits_processor": LogitsProcessorList([Noise()])},
    }.items():
        set_seed(seed)
        inputs = single if name == "beam_sample" else batch
        results[name] = model.generate(**inputs, **asked, do_sample=True, **options)
    set_seed(seed)
    rows, n = 2, 4
    results["slots"] = model(
        input_ids=batch["input_ids"][:rows, -n:],
        position_ids=torch.arange(n).repeat(rows, 1),
        seq_ids=torch.arange(rows),
        sampling_params=torch.tensor([[30.0, 0.95, 1.2]] * rows),
    )
    return results


def main(directory: Path) -> None:
    rank = int(os.environ["RANK"])
    batch = torch.load(directory / "batch.pt")
    found: dict = {"models": {}}
    for path in sorted(directory.glob("export-*")):
        model = NeuronOPTForCausalLM.from_pretrained(path, tp_processes=2)
        found["models"][path.name] = {"ranks": model.runtime.program.group.ranks, **calls(model, batch, 100 + rank)}
    own = NeuronOPTForCausalLM.from_pretrained(directory / "export-pre_norm-2")
    prompt = batch["input_ids"][rank : rank + 1, -3:]
    tokens = own.generate(prompt, max_new_tokens=4, do_sample=False)
    found["own"] = {"ranks": own.runtime.program.group.ranks, "tokens": tokens}

    criteria = StoppingCriteriaList([Late(rank, batch["input_ids"].shape[1])])
    found["stopped"] = model.generate(**batch, stopping_criteria=criteria, do_sample=False)

    # A checkpoint: one process exports it, all load it, the first saves it.
    options = {"tp_degree": 2, "batch_size": 3, "sequence_length": 64, "eager": True, "kv_cache_dtype": "f32"}
    options["tp_processes"] = 2
    made = NeuronOPTForCausalLM.from_pretrained(directory / "source", **options)
    found["made"] = made.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    found["made_in"] = str(made.directory)
    made.save_pretrained(directory / f"saved-{rank}")

    # Errors: in all processes, and the next call is right.
    broken, exports = directory / "broken", sorted(directory.glob("export-*"))
    found["failed_export"] = error_of(lambda: NeuronOPTForCausalLM.from_pretrained(broken, **options))
    found["too_few_ranks"] = error_of(
        lambda: NeuronOPTForCausalLM.from_pretrained(directory / "source", tp_processes=2)
    )
    found["another_number"] = error_of(lambda: NeuronOPTForCausalLM.from_pretrained(exports[0], tp_processes=4))
    other = batch["input_ids"] + (batch["input_ids"] > 3) * rank
    found["other_ids"] = error_of(lambda: made.generate(other, max_new_tokens=4))
    shorter = batch["input_ids"][:, rank:]
    found["other_width"] = error_of(lambda: made.generate(shorter, max_new_tokens=4))
    found["other_temperature"] = error_of(lambda: made.generate(**batch, do_sample=True, temperature=1.0 + rank))
    embeds = made.get_input_embeddings()(batch["input_ids"]) * (1 + rank)
    found["other_embeddings"] = error_of(lambda: made(inputs_embeds=embeds))
    found["other_inner"] = error_of(lambda: made(**batch, output_hidden_states=rank == 1))
    found["other_export"] = error_of(lambda: NeuronOPTForCausalLM.from_pretrained(exports[rank], tp_processes=2))
    found["after"] = made.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    torch.save(found, directory / f"{rank}.pt")

    # Last of all, one ends; the other must not wait for it.
    single = batch["input_ids"][:1]
    if rank == 1:
        made.generate(single, max_new_tokens=8, streamer=Dies())
    found["died"] = error_of(lambda: made.generate(single, max_new_tokens=8))
    found["again"] = error_of(lambda: made.generate(single, max_new_tokens=8))
    torch.save(found, directory / f"{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
