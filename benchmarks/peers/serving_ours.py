"""optimum_opt_trn: `generate_batch`, and `generate()` in static batches to compare with."""

from __future__ import annotations

import math
import os
import random
import statistics
import threading
import time
from typing import Any

import torch
from transformers import GenerationConfig

import optimum_opt_trn
from optimum_opt_trn import NeuronOPTForCausalLM

from .serving import Server


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1}


class Peer(Server):
    def versions(self) -> dict[str, str]:
        return {"optimum_opt_trn": optimum_opt_trn.__version__, "torch": torch.__version__}

    def convert(self, source: str, directory: str, batch_size: int, length: int) -> None:
        neuron_config = NeuronOPTForCausalLM.get_neuron_config(
            source, batch_size=batch_size, sequence_length=length, amp=self.options["amp"]
        )
        exported = NeuronOPTForCausalLM.export(source, neuron_config=neuron_config, eager=self.options["eager"])
        exported.save_pretrained(directory)

    def load(self, directory: str, batch_size: int, length: int) -> None:
        torch.set_float32_matmul_precision(self.options["precision"])
        self.model = NeuronOPTForCausalLM.from_pretrained(directory)

    def serve(self, prompts: list[list[int]], lengths: list[int]) -> list[int]:
        if self.options.get("static"):
            return self._static(prompts, lengths)
        manager = self.model.init_continuous_batching(GenerationConfig(**GREEDY))
        names = [manager.add_request(p, max_new_tokens=n) for p, n in zip(prompts, lengths, strict=True)]
        with manager:
            results = [manager.get_result(name) for name in names]
        self.statistics = manager.statistics()
        for result in results:
            if result.error is not None:
                raise RuntimeError(result.error)
        return [len(result.generated_tokens) for result in results]

    def _static(self, prompts: list[list[int]], lengths: list[int]) -> list[int]:
        """In the order of arrival, each batch as long as its longest answer: as generate() without requests does."""
        size = self.model.neuron_config.batch_size
        for start in range(0, len(prompts), size):
            some, new = prompts[start : start + size], max(lengths[start : start + size])
            width = max(map(len, some))
            ids = torch.tensor([[1] * (width - len(p)) + p for p in some])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some])
            self.model.generate(ids, attention_mask=mask, max_new_tokens=new, **GREEDY)
        return lengths

    def slots_used(self) -> dict[str, float]:
        """Of the latest `serve`: the share of slots in use in steps while requests waited, and in all steps."""
        return {"with_queue": self.statistics.slots_used_with_queue, "all": self.statistics.slots_used}

    def step_seconds(self, context: int, steps: int) -> float:
        """A step of decoding with every slot in use, at this context; the median."""
        rows, chunk = self.model.neuron_config.batch_size, self.model.runtime.prompt_chunk
        # Answers are so long that the first row still decodes when the last one does.
        longest = steps + rows * math.ceil(context / chunk)
        context = max(1, min(context, self.model.neuron_config.sequence_length - longest))
        config = GenerationConfig(**GREEDY, max_new_tokens=longest)
        # Unlike one another, as in the mix: rows that are alike have zeros in the same places, which are not read.
        chance, words = random.Random(0), self.model.config.vocab_size
        prompts = [[chance.randrange(5, words) for _ in range(context)] for _ in range(rows)]
        manager = self.model.init_continuous_batching(config)
        names = [manager.add_request(prompt, record_timestamps=True) for prompt in prompts]
        with manager:
            results = [manager.get_result(name) for name in names]
        begun = max(result.timestamps[0] for result in results)
        ended = min(result.timestamps[-1] for result in results)
        times = [at for at in results[-1].timestamps if begun <= at <= ended]
        return statistics.median(b - a for a, b in zip(times, times[1:], strict=False))

    def prompt_seconds(self, prompts: list[list[int]]) -> float:
        """All prompts, one after the other, each alone and whole."""
        total = 0.0
        for prompt in prompts:
            ids = torch.tensor([prompt])
            began = time.perf_counter()
            self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, **GREEDY)
            total += time.perf_counter() - began
        return total

    def gaps(self, long: int, neighbours: int) -> dict[str, float]:
        """Seconds between tokens of a running row, alone with its neighbours and while a prompt is encoded."""
        room = self.model.neuron_config.sequence_length
        new = min(400, room - 32)
        with self.model.init_continuous_batching(GenerationConfig(**GREEDY)) as manager:
            latest: dict[str, Any] = {}
            ready = threading.Semaphore(0)

            def arrived(output: Any) -> None:
                latest[output.request_id] = output
                if len(output.generated_tokens) == 24:
                    ready.release()

            options = {"max_new_tokens": new, "record_timestamps": True, "streaming": True, "callback": arrived}
            running = [manager.add_request([7 + i] * 16, **options) for i in range(neighbours)]
            for _ in running:
                ready.acquire()
            asked = time.perf_counter()
            result = manager.get_result(manager.add_request([9 + i % 400 for i in range(long)], max_new_tokens=1))
            done = time.perf_counter()
            if result.error is not None:
                raise RuntimeError(result.error)
            times = latest[running[0]].timestamps
            for name in running:
                manager.cancel_request(name)
        pairs = list(zip(times, times[1:], strict=False))
        before = [b - a for a, b in pairs if b <= asked]
        while_encoded = [b - a for a, b in pairs if asked < b and a < done]
        return {
            "median_before": statistics.median(before),
            "median": statistics.median(while_encoded),
            "longest": max(while_encoded),
            "seconds": done - asked,
        }

    def prefix(self, common: int, requests: int) -> dict[str, Any]:
        """Seconds to the first token of requests with a common beginning, each asked after the one before."""
        start = [11 + i % 300 for i in range(common)]
        times = []
        with self.model.init_continuous_batching(GenerationConfig(**GREEDY)) as manager:
            for i in range(requests):
                began = time.perf_counter()
                output = manager.get_result(
                    manager.add_request([*start, *([20 + i] * 8)], max_new_tokens=4, record_timestamps=True)
                )
                times.append(output.timestamps[0] - began)
        made = manager.statistics()
        return {"first": times[0], "others": statistics.median(times[1:]), "copied": made.prefix_tokens}

    def soak(self, requests: int) -> dict[str, list[float]]:
        """Resident bytes, threads and open files after each tenth of many short requests."""
        seen: dict[str, list[float]] = {"resident": [], "threads": [], "files": []}
        config = GenerationConfig(**GREEDY, max_new_tokens=3)
        for _ in range(10):
            self.model.generate_batch(([5 + i % 50] * (1 + i % 7) for i in range(requests // 10)), config, False)
            with self.model.init_continuous_batching(config, max_queue_size=16) as manager:
                for i in range(requests // 100):
                    manager.add_request([5 + i % 50, 6], callback=lambda output: None)
            with open("/proc/self/statm") as opened:
                seen["resident"].append(int(opened.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
            seen["threads"].append(threading.active_count())
            seen["files"].append(len(os.listdir("/proc/self/fd")))
        return seen
