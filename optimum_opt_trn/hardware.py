"""The instances that a model can be planned for: what AWS publishes of them, and what this host has.

Sources, pages of the AWS Neuron documentation (awsdocs-neuron.readthedocs-hosted.com):
"AWS Trn1/Trn1n Architecture", "AWS Inf2 Architecture" and "Amazon EC2 Trn2 Architecture" for chips, device memory,
its bandwidth and host memory; "Trainium Architecture" and "NeuronCore-v3 Architecture" for dense 16-bit FLOP/s;
"Logical NeuronCore configuration" for trn2, whose cores are counted as its SDK does by default, two physical ones as
one (LNC=2). Tensor-parallel degrees: "Transformers NeuronX Developer Guide" and "Generative LLM inference with
Neuron" for trn1 and inf2; for trn2 AWS names the largest (64, "Tutorial: Deploying Llama3.1 405B"), the powers of two
below it are an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass

from .planning.host_memory import host_memory


GiB = 2**30


@dataclass(frozen=True)
class Instance:
    """What a plan needs to know of an instance.

    Args:
        name: EC2's name of it; `cpu` for this host.
        family: the `instance_type` of an export for it.
        chips: accelerator chips.
        cores: NeuronCores; logical ones on trn2. On `cpu` one: its process holds all ranks.
        core_bytes: device memory of a core; on `cpu` the memory that is available now.
        core_bandwidth: bytes per second between a core and its memory; None where nobody publishes it (`cpu`).
        core_flops: dense 16-bit operations per second of a core; None likewise.
        host_bytes: memory of the host.
        tp_degrees: tensor-parallel degrees that the runtime supports on it; empty for any.
    """

    name: str
    family: str
    chips: int
    cores: int
    core_bytes: int
    core_bandwidth: float | None
    core_flops: float | None
    host_bytes: int
    tp_degrees: tuple[int, ...]

    @property
    def on_neuron(self) -> bool:
        return self.family != "cpu"


# Of one NeuronCore: device memory, bandwidth, 16-bit FLOP/s. A chip of trn1 and inf2 has two NeuronCore-v2, 32 GiB at
# 820 GiB/s and 190 TFLOP/s; one of trn2 eight NeuronCore-v3 of 79 TFLOP/s in four logical cores, 96 GiB at 2.9 TB/s.
_V2 = (16 * GiB, 410.0 * GiB, 95e12)
_V3 = (24 * GiB, 2.9e12 / 4, 2 * 79e12)

_TRN1 = (1, 2, 8, 32)
_INF2 = (1, 2, 4, 8, 12, 24)
_TRN2 = (1, 2, 4, 8, 16, 32, 64)


def _neuron(
    name: str, chips: int, cores: int, core: tuple[int, float, float], host_gib: int, degrees: tuple[int, ...]
) -> Instance:
    supported = tuple(n for n in degrees if n <= cores)
    return Instance(name, name.partition(".")[0], chips, cores, *core, host_gib * GiB, supported)


# In the order in which a plan prefers them: fewer chips first, then less host memory, then less of all else. There are
# no prices here, which change and differ by region.
_INSTANCES = (
    _neuron("inf2.xlarge", 1, 2, _V2, 16, _INF2),
    _neuron("trn1.2xlarge", 1, 2, _V2, 32, _TRN1),
    _neuron("inf2.8xlarge", 1, 2, _V2, 128, _INF2),
    _neuron("inf2.24xlarge", 6, 12, _V2, 384, _INF2),
    _neuron("inf2.48xlarge", 12, 24, _V2, 768, _INF2),
    _neuron("trn1.32xlarge", 16, 32, _V2, 512, _TRN1),
    _neuron("trn1n.32xlarge", 16, 32, _V2, 512, _TRN1),
    _neuron("trn2.48xlarge", 16, 64, _V3, 2048, _TRN2),
)
INSTANCES = {instance.name: instance for instance in _INSTANCES}


def find_instance(name: str) -> Instance:
    """The instance of that name; `cpu` is this host.

    Raises:
        ValueError: for a name that is not in the table, with the names that are.
    """
    if name == "cpu":
        return this_host()
    if name not in INSTANCES:
        raise ValueError(f"instance {name!r} is not known: choose cpu, {', '.join(INSTANCES)}.")
    return INSTANCES[name]


def largest_of_family(family: str) -> Instance:
    """The instance of `family` (`trn1`, `trn1n`, `inf2`, `trn2`, `cpu`) with the most cores."""
    if family == "cpu":
        return this_host()
    return max((i for i in INSTANCES.values() if i.family == family), key=lambda i: i.cores)


def this_host() -> Instance:
    """This host as an instance, with the memory that is available now."""
    total, available = host_memory()
    return Instance("cpu", "cpu", 0, 1, available, None, None, total, ())
