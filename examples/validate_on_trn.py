#!/usr/bin/env python
"""Says whether this package works on your Trainium or Inferentia2 instance, how fast, and in how much memory.

    python examples/validate_on_trn.py                                    # opt-125m, then opt-13b, on all cores
    python examples/validate_on_trn.py --models facebook/opt-125m --batch_size 4
    python examples/validate_on_trn.py --weight_dtype int8 --output validation-int8
    python examples/validate_on_trn.py --cpu --models examples/models/opt-austen      # a rehearsal without devices

Each model is exported, loaded and compared with transformers on the CPU; its steps are timed and set against the
roofline, and the memory that the driver counts against the plan. A part that fails is reported, and the rest goes on.
On devices, each model is then exported once more for each of --switches, other ways to build its graphs
(neuron_switches.py): attention that waits for the cache's write, all-reduces in float32, the best words looked for in
the whole vocabulary on every rank, and prompts compiled with -O2. The report's last table sets them against the
package's own way; --switches none leaves them out.
--output gets report.json and report.md; attach both to a bug report. Exports are kept in the same directory, and the
next run uses them again. On a trn1.2xlarge, opt-13b takes 55 GB of disk, and its compilation more host memory than
there is: see docs/neuron.md for exporting elsewhere.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


PACKAGES = (
    *("optimum-opt-trn", "optimum", "optimum-neuron", "transformers", "torch", "torch-xla", "torch-neuronx"),
    *("neuronx-distributed", "neuronx-cc", "libneuronxla", "aws-neuronx-runtime-discovery", "safetensors"),
)
SWITCHES = ("attention_after_write", "all_reduce_f32", "topk_whole_vocabulary", "context_O2")
PROMPTS = ("It was a fine morning, and", "The capital of France is", "In the beginning", "To whom it may concern:")
NEW_TOKENS, TIMED_STEPS = 24, 64

# Largest difference of a logit, in standard deviations of the reference's (README, "How exact").
TOLERANCE = {"f32": 1e-3, "f16": 4e-2, "bf16": 16e-2}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=["facebook/opt-125m", "facebook/opt-13b"], help="(default: %(default)s)")
    add("--output", type=Path, default=Path("validation"), help="directory to write (default: %(default)s)")
    add("--batch_size", type=int, default=1, help="(default: %(default)s)")
    add("--sequence_length", type=int, default=512, help="(default: %(default)s)")
    add("--tensor_parallel_size", type=int, help="(default: all NeuronCores)")
    add("--auto_cast_type", default="f16", choices=TOLERANCE, help="(default: %(default)s)")
    add("--weight_dtype", choices=("int8",),
        help="int8 for the matrices of attention, MLP and head (default: the dtype of --auto_cast_type)")  # fmt: skip
    add("--switches", nargs="+", default=SWITCHES, choices=(*SWITCHES, "none"), metavar="SWITCH",
        help=f"of {', '.join(SWITCHES)}; none (default: all, on devices)")  # fmt: skip
    add("--cpu", action="store_true", help="on the host's CPU, uncompiled: whether the script itself works")
    return parser.parse_args()


def attempt(part: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `part` found, with the seconds that it took; or the error that it ended with."""
    start = time.perf_counter()
    try:
        found = part(*arguments)
    except Exception as error:  # whatever it is, it belongs into the report
        found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return {**found, "seconds": round(time.perf_counter() - start, 3)}


def environment() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    from optimum.neuron.utils.system import get_available_cores, get_instance_name, get_neuron_major

    on_neuron = get_neuron_major() != -1
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    listing = shutil.which("neuron-ls")
    return {
        "instance": get_instance_name().strip() if on_neuron else None,
        "neuron_cores": get_available_cores(),
        "versions": versions,
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith("NEURON_")},
        "system": platform.platform(),
        "python": platform.python_version(),
        "host_bytes": pages * size,
        "disk_free_bytes": shutil.disk_usage(".").free,
        "neuron-ls": subprocess.run([listing, "-j"], capture_output=True, text=True).stdout if listing else None,
    }


def folder(name: str, options: argparse.Namespace) -> str:
    """The directory of a model's export in --output; the next run uses it again."""
    of_weights = [options.weight_dtype] if options.weight_dtype else []
    return "--".join([*name.strip("/").split("/"), *of_weights])


def export(name: str, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    from optimum_opt_trn import NeuronOPTForCausalLM
    from optimum_opt_trn.export import export_opt

    if not directory.exists():
        config = NeuronOPTForCausalLM.get_neuron_config(
            name,
            instance_type="cpu" if options.cpu else None,
            batch_size=options.batch_size,
            sequence_length=options.sequence_length,
            tensor_parallel_size=options.tensor_parallel_size,
            amp=options.auto_cast_type,
            weight_dtype=options.weight_dtype,
        )
        export_opt(name, directory, config, eager=options.cpu)
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    return {"bytes": size, "neuron_config": json.loads((directory / "neuron_config.json").read_text())}


def parity(model: Any, directory: Path) -> dict[str, Any]:
    """Logits at the end of prompts, and greedy tokens, against float32 arithmetic on the same rounded weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = sum(file.stat().st_size for file in (directory / "checkpoint").glob("*.safetensors"))
    needed = weights * 4 // model.dtype.itemsize
    if model.neuron_config.weight_dtype == "int8":
        by = "this package's cpu target, float32 (transformers needs compressed-tensors to read int8)"
        reference = on_the_cpu(model, directory)
    elif needed < 0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        by = "transformers, float32"
        reference = AutoModelForCausalLM.from_pretrained(directory / "checkpoint", dtype=torch.float32)
    else:
        by = "this package's cpu target, float32 (transformers' weights do not fit the host)"
        reference = on_the_cpu(model, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    worst, equal, margins = 0.0, 0, []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        ours = model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        made = ours.sequences.shape[1] - inputs["input_ids"].shape[1]
        with torch.inference_mode():
            expected = reference(ours.sequences).logits[0, -made - 1 : -1]
        spread = expected.std()
        worst = max(worst, ((torch.cat(ours.logits) - expected).abs().max() / spread).item())
        tokens = ours.sequences[0, -made:]
        equal += int((expected.argmax(-1) == tokens).sum()) == made
        margins.append(((expected.amax(-1) - expected[torch.arange(made), tokens]).max() / spread).item())
    allowed = TOLERANCE[model.neuron_config.amp]
    return {
        "reference": by,
        "largest_logit_error_sigma": worst,
        "allowed_sigma": allowed,
        "prompts_with_equal_tokens": f"{equal} of {len(PROMPTS)}",
        "worst_token_behind_the_best_sigma": max(margins),
        "passed": worst <= allowed and max(margins) <= 2 * allowed,
    }


def on_the_cpu(model: Any, directory: Path) -> Any:
    """The export on the cpu target, whose weights are mapped files: slow, but in any memory."""
    from optimum_opt_trn import NeuronOPTForCausalLM, OPTNeuronConfig
    from optimum_opt_trn.targets.cpu import CPUTarget

    changes = {"instance_type": "cpu", "target": None, "tp_degree": 1, "kv_cache_dtype": "f32"}
    config = OPTNeuronConfig(**{**model.neuron_config.options(), **changes})
    runtime = CPUTarget().load(model.config, config, directory, eager=True)
    return NeuronOPTForCausalLM(model.config, config, directory, runtime)


def speed(model: Any, plan: Any, config: Any) -> dict[str, Any]:
    """Prefill and steps of the runtime, whole batches, in the middle of the sequence; and the roofline."""
    import torch

    from optimum_opt_trn.generation.inputs import pack
    from optimum_opt_trn.model.sampling import SamplingInputs

    rows, length = model.neuron_config.batch_size, model.neuron_config.sequence_length
    bucket = next(n for n in model.neuron_config.prompt_buckets if n >= length // 2)
    sampling = SamplingInputs.greedy(rows)

    def step(columns: int, filled: int) -> Any:
        ids, mask = torch.full((rows, columns), 5), torch.ones(rows, columns, dtype=torch.bool)
        return model.runtime.step(pack(ids, mask, list(range(rows)), torch.full((rows,), filled), 1, sampling))

    def timed(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    prefills = [timed(lambda: step(length // 2, 0)) for _ in range(4)][1:]
    steps = []
    for place in range(length // 2, min(length // 2 + TIMED_STEPS, length)):
        steps.append(timed(lambda at=place: step(1, at)))
    median = statistics.median(steps[2:] or steps)
    found = {
        "prefill_bucket": bucket,
        "prefill_ms": 1e3 * statistics.median(prefills),
        "decode_ms": 1e3 * median,
        "decode_ms_slowest": 1e3 * max(steps),
        "decode_tokens_per_second": rows / median,
    }
    if plan:
        from optimum_opt_trn.planning.roofline import roofline

        line = roofline(config, plan)
        found.update(roofline_decode_ms=1e3 * line.decode_seconds, share_of_roofline=line.decode_seconds / median)
    return found


def memory(plan: Any) -> dict[str, Any]:
    """What the driver counts on each core, and the plan's figure."""
    from optimum.neuron.utils.neuron_device_memory import get_neuron_device_memory

    cores = {
        f"{device}/{core}": {name: counter.total for name, counter in usage.categories.items()}
        for device, all_cores in get_neuron_device_memory().devices.items()
        for core, usage in all_cores.items()
    }
    totals = [sum(size or 0 for size in categories.values()) for categories in cores.values()]
    planned = {"weights": sum(plan.weights.values()), "cache": plan.cache, "workspace": plan.workspace}
    return {
        "planned_bytes_per_core": plan.total,
        "planned": planned,
        "fullest_core_bytes": max(totals),
        "cores": cores,
    }


def validate(name: str, options: argparse.Namespace, instance: str | None) -> dict[str, Any]:
    from optimum_opt_trn import NeuronOPTForCausalLM

    directory = options.output / folder(name, options)
    report: dict[str, Any] = {"export": attempt(export, name, directory, options)}
    if "error" in report["export"]:
        return report
    loaded: list[Any] = []

    def load() -> dict[str, Any]:
        loaded.append(NeuronOPTForCausalLM.from_pretrained(directory, eager=options.cpu))
        return {}

    report["load"] = attempt(load)
    if not loaded:
        return report
    model = loaded[0]
    plan = None
    if instance is not None:
        from optimum_opt_trn.planning.host import find_instance
        from optimum_opt_trn.planning.memory import plan_memory
        from optimum_opt_trn.planning.setup import Setup

        plan = plan_memory(model.config, Setup.of(model.neuron_config), find_instance(instance))
        report["memory"] = attempt(memory, plan)
    report["parity"] = attempt(parity, model, directory)
    report["speed"] = attempt(speed, model, plan, model.config)
    return report


def switches(name: str, options: argparse.Namespace, own: dict[str, Any]) -> dict[str, Any]:
    """Compile time, speed and parity of a model in each of `options.switches`, one after the other; `own` is the
    model's report in the package's way."""
    import gc

    from neuron_switches import switched

    from optimum_opt_trn import NeuronOPTForCausalLM

    def measure(switch: str) -> dict[str, Any]:
        directory = options.output / f"{folder(name, options)}--{switch}"
        with switched(switch):
            exported = attempt(export, name, directory, options)
        if "error" in exported:
            return exported
        model = NeuronOPTForCausalLM.from_pretrained(directory)
        found = {"export_seconds": exported["seconds"], **speed(model, None, model.config)}
        return {**found, **parity(model, directory)}

    ours = {"export_seconds": own["export"]["seconds"], **own.get("speed", {}), **own.get("parity", {})}
    found = {"none": ours}
    for switch in options.switches:
        found[switch] = attempt(measure, switch)
        gc.collect()  # the model's memory, on the cores too
    return found


def comparison(found: dict[str, Any]) -> list[str]:
    """A table of what `switches` found."""
    columns = ("export_seconds", "prefill_ms", "decode_ms", "largest_logit_error_sigma")
    lines = [f"| switch | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for switch, values in found.items():
        if "error" in values:
            lines.append(f"| {switch} | {values['error']} |")
        else:
            cells = (values.get(column) for column in columns)
            lines.append(f"| {switch} | {' | '.join('' if x is None else f'{x:.4g}' for x in cells)} |")
    return lines


def readable(report: dict[str, Any]) -> str:
    lines = [f"# Validation on {report['environment'].get('instance') or 'a host without Neuron devices'}", ""]
    for title, found in report.items():
        lines += [f"## {title}", ""]
        for part, values in found.items() if title != "environment" else [("", found)]:
            lines += [f"### {part}", ""] if part else []
            if part == "switches":
                lines += [*comparison({k: v for k, v in values.items() if isinstance(v, dict)}), ""]
                continue
            for key, value in values.items():
                if key == "traceback":
                    lines += ["", "```", str(value).rstrip(), "```"]
                elif not isinstance(value, dict):
                    lines.append(f"- {key}: {value:.4g}" if isinstance(value, float) else f"- {key}: {value}")
                elif key != "cores":
                    lines.append(f"- {key}: {', '.join(f'{k} {v}' for k, v in value.items())}")
            lines.append("")
    return "\n".join(lines)


def main() -> int:
    options = parse_arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"environment": attempt(environment)}
    for name in options.models:
        print(f"{name} …", flush=True)
        report[name] = validate(name, options, report["environment"].get("instance"))
        # After each model, in case the next one takes the machine down.
        (options.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        (options.output / "report.md").write_text(readable(report))
    for name in options.models if report["environment"].get("instance") and "none" not in options.switches else ():
        print(f"{name} in other ways …", flush=True)
        report[name]["switches"] = attempt(switches, name, options, report[name])
        (options.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        (options.output / "report.md").write_text(readable(report))
    models = [found for title, found in report.items() if title != "environment"]
    failed = [part for found in models for part, values in found.items() if "error" in values]
    wrong = sum(not found.get("parity", {}).get("passed", False) for found in models)
    print(f"{len(models) - wrong} of {len(models)} models agree with the reference; {len(failed)} parts failed.")
    print(f"Reports: {options.output / 'report.json'} and {options.output / 'report.md'}")
    return int(bool(failed or wrong))


if __name__ == "__main__":
    sys.exit(main())
