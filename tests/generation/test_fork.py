"""A fork of a process that holds a model generates as the process does, whatever its threads were doing."""

import subprocess
import sys
from pathlib import Path

import pytest


FORK = """
import os, sys, threading, time
import torch
from small_models import tiny_opt
from optimum_opt_trn import NeuronOPTForCausalLM

directory, eager, threads, calling = sys.argv[1], sys.argv[2] == "eager", int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
# Large enough for torch to use its threads.
tiny_opt(hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024).save_pretrained(directory)
model = NeuronOPTForCausalLM.from_pretrained(directory, batch_size=2, sequence_length=64, eager=eager)
prompts = torch.tensor([[2, 17, 99, 4, 56] * 6] * 2)
run = lambda: model.generate(prompts, max_new_tokens=6, min_new_tokens=6, do_sample=False)
expected, stop = run(), threading.Event()

def calls():
    while not stop.is_set():
        run()

for _ in range(calling):
    threading.Thread(target=calls, daemon=True).start()
for attempt in range(6):
    time.sleep(0.01 * attempt)
    child = os.fork()
    if child == 0:
        os._exit(0 if all(torch.equal(run(), expected) for _ in range(2)) else 1)
    assert os.waitpid(child, 0)[1] == 0
assert torch.equal(run(), expected)
os._exit(0)
"""


@pytest.mark.parametrize(("how", "threads", "calling"), [("kernels", 2, 3), ("kernels", 2, 0), ("eager", 2, 1)])
def test_a_fork_generates_too(how, threads, calling, tmp_path):
    """It hung where another thread was in a call, or torch had used its threads."""
    support = str(Path(__file__).parents[1] / "support")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path.insert(0, {support!r})\n{FORK}",
         tmp_path, how, str(threads), str(calling)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
