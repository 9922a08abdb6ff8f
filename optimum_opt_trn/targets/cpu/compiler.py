"""Compiles one exported stage for this host, or takes it from the cache of what was compiled before.

Weights are no part of a stage, so that all checkpoints of one shape share what is compiled. The cache is a folder of
huggingface_hub's assets (`HF_ASSETS_CACHE`, else within `HF_HOME`); it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path
from torch._inductor import aoti_compile_and_package
from torch.utils._pytree import tree_leaves


# Parallel code for as many threads as the process that runs it has, whatever the one that compiles it has.
_INDUCTOR = {"cpp.threads": os.cpu_count() or 1, "cpp.dynamic_threads": True}


def has_compiler() -> bool:
    """Whether this host has the C++ compiler that Inductor needs."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        return False
    return True


def host() -> dict[str, str]:
    """What compiled code depends on: it runs on an equal host alone."""
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        # Inductor compiles for the very processor (-march=native), of which the capability is but a part.
        "cpu_flags": hashlib.sha256(_cpu_flags().encode()).hexdigest()[:16],
    }


def compile_stage(program: torch.export.ExportedProgram, file: Path) -> None:
    """Writes the ahead-of-time compiled package of `program` to `file`."""
    cached = cached_assets_path("optimum_opt_trn", "compiled", _key(program))
    package = cached / "stage.pt2"
    if not package.is_file():
        # Compiled beside and renamed, for other processes that want the same stage.
        with tempfile.TemporaryDirectory(dir=cached) as scratch, torch.no_grad():
            made = aoti_compile_and_package(
                program, package_path=str(Path(scratch) / "stage.pt2"), inductor_configs=_INDUCTOR
            )
            os.replace(made, package)
    shutil.copyfile(package, file)


def _key(program: torch.export.ExportedProgram) -> str:
    """A hash of the graph with its shapes, of its inputs' strides, of the compiler's settings, and of the host."""
    strides = [tensor.stride() for tensor in tree_leaves(program.example_inputs)]
    graph = program.graph_module.print_readable(print_output=False)
    described = (sorted(host().items()), sorted(_INDUCTOR.items()), graph, str(program.range_constraints), strides)
    return hashlib.sha256(repr(described).encode()).hexdigest()


def _cpu_flags() -> str:
    """The processor's features as the system lists them; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
