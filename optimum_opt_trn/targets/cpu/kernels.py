"""The CPU target's C++ kernels: compiled for this host, loaded, and called by the rank program."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import cached_assets_path
from torch import Tensor
from tqdm.auto import tqdm

from ...model.arithmetic import LAYER_NORM_EPS, Arithmetic, LayerNorm


SOURCE = Path(__file__).with_name("kernels.cpp")
LIBRARY_NAME = "kernels.so"


class CompileError(RuntimeError):
    """The kernels could not be compiled; the message says why."""


class KernelArithmetic(Arithmetic):
    """Products that read 16-bit weights as they are, once; sums are float32. Needs `load_kernels`."""

    def linears(
        self,
        x: Tensor,
        weights: list[Tensor],
        biases: list[Tensor] | None = None,
        relu: bool = False,
        norm: LayerNorm | None = None,
    ) -> list[Tensor]:
        """See `Arithmetic.linears`; x contiguous, rows of weights contiguous. Threads meet once for all of them."""
        eps, parameters = (None, (None, None)) if norm is None else (LAYER_NORM_EPS, norm)
        results: list[Tensor] = torch.ops.optimum_opt_trn.linears(x, weights, biases or [], relu, eps, *parameters)
        return results

    def linear_sum(
        self, xs: list[Tensor], weights: list[Tensor], bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """See `Arithmetic.linear_sum`; xs and residual contiguous, rows of weights contiguous."""
        result: Tensor = torch.ops.optimum_opt_trn.linear_sum(xs, weights, bias, residual)
        return result

    def layer_norm(self, x: Tensor, norm: LayerNorm) -> Tensor:
        """See `Arithmetic.layer_norm`."""
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, LAYER_NORM_EPS)


def host() -> dict[str, str]:
    """What compiled kernels depend on: they run on an equal host alone."""
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        # They are compiled for the very processor (-march=native), of which the capability is but a part.
        "cpu_flags": hashlib.sha256(_cpu_flags().encode()).hexdigest()[:16],
    }


def source_hash() -> str:
    """A hash of the kernels' source."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()


def compile_kernels() -> Path:
    """The kernels, compiled for this host, in a cache: what was compiled before is there already.

    The cache is a folder of huggingface_hub's assets (`HF_ASSETS_CACHE`, else within `HF_HOME`); it may be deleted at
    any time.

    Raises:
        CompileError: if there is no C++ compiler, it fails, or the cache cannot be written.
    """
    flags = _flags()
    described = repr((source_hash(), sorted(host().items()), flags))
    try:
        cached = cached_assets_path("optimum_opt_trn", "compiled", hashlib.sha256(described.encode()).hexdigest())
        library = cached / LIBRARY_NAME
        if not library.is_file():
            # Compiled beside and renamed, for other processes that want the same.
            with tempfile.TemporaryDirectory(dir=cached) as scratch:
                made = Path(scratch) / LIBRARY_NAME
                with tqdm(total=1, desc="Compiling kernels", unit="file", leave=False) as progress:
                    _compile([_compiler(), *flags, str(SOURCE), *_libraries(), "-o", str(made)])
                    progress.update()
                os.replace(made, library)
    except OSError as error:
        raise CompileError(
            f"their cache cannot be written ({error}): set HF_ASSETS_CACHE to another folder"
        ) from error
    return library


def load_kernels(file: Path) -> None:
    """Makes the operators of `file` known to torch, once a process: all files of one source define the same."""
    if not hasattr(torch.ops.optimum_opt_trn, "linears"):
        torch.ops.load_library(str(file))


def _compile(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        cause = next((line for line in said if "error" in line), said[-1] if said else "no message")
        raise CompileError(f"{command[0]} failed: {cause}") from error


def _compiler() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return str(get_cpp_compiler())
    except (InvalidCxxCompiler, OSError) as error:
        raise CompileError("no C++ compiler was found: install g++, or set CXX") from error


def _flags() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    # ATen's vector headers know these two by name, and all else by what the compiler says of the machine.
    vectors = capability if capability in ("AVX2", "AVX512") else "DEFAULT"
    include = Path(torch.__file__).parent / "include"
    return [
        *("-O3", "-std=c++20", "-march=native", "-fopenmp", "-fPIC", "-shared"),
        *(f"-DCPU_CAPABILITY={vectors}", f"-DCPU_CAPABILITY_{vectors}"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"),
    ]


def _libraries() -> list[str]:
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu"]


def _cpu_flags() -> str:
    """The processor's features as the system lists them; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
