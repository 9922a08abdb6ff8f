"""`optimum-cli neuron doctor`: what this host has, what runs on it, and what is missing.

optimum-cli loads this file at every start, so whatever is heavy is imported when the command runs.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..hardware import GiB
from ..planning.host import host_memory, host_threads
from . import common


DESCRIPTION = """\
Look at this host: processor, packages, Neuron SDK and devices, caches. Says which targets run here, tries `cpu` with a
small model of random weights, and says what to do about what is missing."""

EPILOG = """\
examples:
  optimum-cli neuron doctor
  optimum-cli neuron doctor --json > doctor.json      # for a bug report

The exit status is 0 if models run on `cpu` here, otherwise 1."""

PACKAGES = ("optimum-opt-trn", "torch", "transformers", "optimum", "optimum-neuron")
SDK_PACKAGES = ("torch-neuronx", "neuronx-cc", "neuronx-distributed")
# Those that the kernels, or the products of torch, make use of.
INSTRUCTION_SETS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16"),  # x86-64
    *("asimd", "asimdhp", "bf16", "sve"),  # arm64
)


@dataclass
class Report:
    """What was found: lines by their names, in the sections of the output."""

    host: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    neuron: dict[str, str] = field(default_factory=dict)
    caches: dict[str, str] = field(default_factory=dict)
    runs_here: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    cpu_works: bool = False


class DoctorCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="doctor", help="Say what this host has, what runs here, and what is missing.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        common.describe(parser, DESCRIPTION, EPILOG)
        parser.add_argument("--json", action="store_true", help="Print one JSON object.")
        common.explain_errors(parser)

    def run(self) -> None:
        common.quiet()
        report = examine()
        print(json.dumps(asdict(report), indent=2) if self.args.json else "\n".join(describe(report)))
        if not report.cpu_works:
            raise SystemExit(1)


def examine() -> Report:
    """Looks at this host, and runs a small model on `cpu`."""
    report = Report()
    _host(report)
    _packages(report)
    _neuron(report)
    _cpu(report)
    _caches(report)
    return report


def describe(report: Report) -> Iterator[str]:
    """Lines for a terminal."""
    sections = ("host", "packages", "neuron", "caches", "runs_here")
    for section in sections:
        yield section.replace("_", " ")
        for name, value in getattr(report, section).items():
            yield f"  {name:<20}{value}"
        yield ""
    if report.missing:
        yield "missing"
        yield from (f"  - {line}" for line in report.missing)
    else:
        yield "nothing is missing"


def _host(report: Report) -> None:
    report.host["system"] = f"{platform.system()} {platform.release()}, {platform.machine()}"
    report.host["python"] = f"{platform.python_version()} ({sys.executable})"
    facts, count = _cpu_facts(), host_threads()
    model = facts.get("model name") or platform.processor() or "unknown"
    report.host["processor"] = f"{model}, {count} {'processor' if count == 1 else 'processors'} for this process"
    found = set(facts.get("flags", facts.get("features", "")).split())
    report.host["instruction sets"] = " ".join(name for name in INSTRUCTION_SETS if name in found) or "unknown"
    try:
        total, available = host_memory()
        report.host["memory"] = f"{total / GiB:.1f} GiB, {available / GiB:.1f} GiB available"
    except OSError:
        report.host["memory"] = "unknown"


def _cpu_facts(file: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """What the system says of its first processor, in lower case; empty where it says nothing."""
    try:
        lines = file.read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _packages(report: Report) -> None:
    for name in PACKAGES:
        report.packages[name] = _version(name) or "not installed"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _neuron(report: Report) -> None:
    absent = [name for name in SDK_PACKAGES if _version(name) is None]
    for name in SDK_PACKAGES:
        report.neuron[name] = _version(name) or "not installed"
    devices = _devices()
    report.neuron["devices"] = ", ".join(devices) or "none"
    framework = _version("optimum-neuron") is not None
    if absent or not framework:
        wanted = [*absent, *([] if framework else ["optimum-neuron"])]
        report.runs_here["trn1, inf2, trn2"] = f"no: {', '.join(wanted)} not installed"
        report.missing.append(
            f"For Neuron devices: {', '.join(wanted)}. Install optimum-opt-trn[neuronx] with "
            "--extra-index-url https://pip.repos.neuron.amazonaws.com; exports need no device."
        )
    elif not devices:
        report.runs_here["trn1, inf2, trn2"] = "exports only: this host has no Neuron device"
    else:
        report.runs_here["trn1, inf2, trn2"] = f"yes, on {len(devices)} devices"


def _devices() -> list[str]:
    return sorted(path.name for path in Path("/dev").glob("neuron[0-9]*"))


def _cpu(report: Report) -> None:
    try:
        _try_small_model()
    except Exception as error:  # whatever is wrong is what this command is there to say
        report.runs_here["cpu"] = f"no: {type(error).__name__}: {' '.join(str(error).split())}"
        report.missing.append("Models do not run on cpu here, see above.")
        return
    report.cpu_works = True
    kernels, absent = find_kernels()
    if kernels is None:
        report.runs_here["cpu"] = "yes, but without kernels: correct, and many times slower"
        report.missing.append(f"Kernels for cpu, which {absent}.")
    else:
        report.runs_here["cpu"] = f"yes, with kernels: {kernels}"


def find_kernels() -> tuple[str | None, str]:
    """The instruction set of the kernels that models run with on `cpu` here, None without; and why there are none."""
    from ..targets.cpu.kernels import chosen_variant, why_missing

    variant = chosen_variant()
    return variant, "" if variant else why_missing()


def _try_small_model() -> None:
    """Exports a model of random weights for `cpu` and generates; raises whatever is wrong."""
    with TemporaryDirectory(prefix="optimum_opt_trn-doctor-") as directory, redirect_stderr(StringIO()):
        import torch
        from transformers import OPTConfig, OPTForCausalLM

        from ..modeling_neuron_opt import NeuronOPTForCausalLM

        size = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_attention_heads": 4}
        config = OPTConfig(vocab_size=128, num_hidden_layers=2, max_position_embeddings=64, **size)
        OPTForCausalLM(config).save_pretrained(directory)
        model = NeuronOPTForCausalLM.from_pretrained(directory, instance_type="cpu")
        generated = model.generate(torch.tensor([[5, 6, 7]]), min_new_tokens=4, max_new_tokens=4, do_sample=False)
        if generated.shape != (1, 7):
            raise RuntimeError(f"4 tokens were asked for, and {generated.shape[1] - 3} were generated")


def _caches(report: Report) -> None:
    from huggingface_hub import constants

    caches = {
        "models": constants.HF_HUB_CACHE,
        # neuronx-cc's own variable and default (awsdocs-neuron, "Neuron Persistent Cache").
        "neuron graphs": os.environ.get("NEURON_COMPILE_CACHE_URL", "/var/tmp/neuron-compile-cache"),
    }
    for name, place in caches.items():
        report.caches[name] = f"{place}{'' if '://' in place or Path(place).is_dir() else ' (not there yet)'}"
