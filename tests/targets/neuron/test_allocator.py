"""Freed memory returns to the system, seen in a process of its own."""

import subprocess
import sys

import pytest


# A tracer's pattern: each graph's blocks are allocated and freed by a thread of its own.
CODE = """
import sys, threading
import torch
from contextlib import nullcontext
import importlib.util
spec = importlib.util.spec_from_file_location("allocator", sys.argv[1])
allocator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(allocator)

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

def graphs():
    def copy():
        blocks = [torch.ones(3 * 2**18) for _ in range(16)]  # 3 MiB each
        small = [torch.ones(2**10) for _ in range(16)]
        del blocks
        kept.extend(small)
    for _ in range(4):
        thread = threading.Thread(target=copy)
        thread.start()
        thread.join()

torch.ones(2**23).sum()  # freed: from now on glibc takes blocks of up to 32 MiB from the heaps of threads
kept, before = [], resident()
with allocator.large_blocks_return() if sys.argv[2] == "within" else nullcontext():
    graphs()
    print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_blocks_return():
    from importlib.util import find_spec
    from pathlib import Path

    file = Path(find_spec("optimum_opt_trn").origin).parent / "targets" / "neuron" / "allocator.py"
    grown = {}
    for where in ("within", "without"):
        ran = subprocess.run([sys.executable, "-c", CODE, file, where], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        grown[where] = int(ran.stdout)
    print(grown)
    assert grown["within"] < 2**23 < grown["without"]
