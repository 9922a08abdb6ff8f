"""Row operations on the calling thread give torch's results. A step leaves torch's OpenMP threads asleep."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import tiny_opt

from optimum_opt_trn import NeuronOPTForCausalLM
from optimum_opt_trn.generation.inputs import pack
from optimum_opt_trn.model.sampling import SamplingInputs
from optimum_opt_trn.targets.cpu.one_thread import MOST_ELEMENTS, fill_rows, take_rows


@settings(deadline=None)
@given(
    st.integers(1, 40),
    st.sampled_from([1, 3, 768, 2048]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8]),
    st.data(),
)
def test_take_rows(n, width, dtype, data):
    matrix = torch.randint(-100, 100, (n, width)).to(dtype)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), dtype=torch.int64)
    taken = take_rows(matrix, rows)
    assert taken.dtype == dtype and torch.equal(taken, matrix[rows])
    assert taken.data_ptr() != matrix.data_ptr()


@settings(deadline=None)
@given(st.integers(0, 100), st.sampled_from([1, 768, 12288, MOST_ELEMENTS, MOST_ELEMENTS + 1]))
def test_fill_rows(n, width):
    source, seen = torch.arange(float(n))[:, None].expand(n, width), []

    def compute(rows):
        seen.append(source[rows].numel())
        return source[rows]

    assert torch.equal(fill_rows(torch.empty(n, width), compute), source)
    assert all(count <= max(width, MOST_ELEMENTS) for count in seen)


def busy_seconds() -> dict[int, float]:
    """The time that each thread of this process has computed, but for this one and the kernels'."""
    seconds = {}
    for thread in map(int, os.listdir("/proc/self/task")):
        with contextlib.suppress(FileNotFoundError):  # it ended
            text = Path(f"/proc/self/task/{thread}/stat").read_text(encoding="utf-8")
            name, fields = text.partition("(")[2].rpartition(")")[0], text.rpartition(")")[2].split()
            if thread != threading.get_native_id() and not name.startswith("opt-kernels"):
                seconds[thread] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what threads do")
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("prompt", [40, 200])
def test_a_step_leaves_the_threads_of_torch_asleep(save_opt, dtype, prompt):
    """Each operation that they shared would keep them awake for milliseconds."""
    path = save_opt(tiny_opt(hidden_size=1536, num_attention_heads=24, ffn_dim=1536, max_position_embeddings=256))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        runtime = NeuronOPTForCausalLM.from_pretrained(path, batch_size=8, sequence_length=256, amp=dtype).runtime
        counts = [1] * 7 + [prompt]
        ids, mask = torch.ones(8, prompt, dtype=torch.int64), torch.zeros(8, prompt, dtype=torch.bool)
        for row, count in enumerate(counts):
            mask[row, :count] = True
        step = pack(ids, mask, list(range(8)), torch.full((8,), 5), 1, SamplingInputs.greedy(8), logits=False)
        (torch.ones(4 * MOST_ELEMENTS) + 1).sum()  # starts torch's threads
        runtime.step(step)
        before = busy_seconds()
        for _ in range(40):
            runtime.step(step)
        after = busy_seconds()
    finally:
        torch.set_num_threads(threads)
    spent = {thread: seconds - before.get(thread, 0.0) for thread, seconds in after.items()}
    assert len(spent) > 0 and sum(spent.values()) <= 0.05, spent
