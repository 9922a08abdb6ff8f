"""Instance families and instances: what they are compiled for, and what AWS publishes of them.

Sources, pages of the AWS Neuron documentation (awsdocs-neuron.readthedocs-hosted.com):
"AWS Trn1/Trn1n Architecture", "AWS Inf2 Architecture" and "Amazon EC2 Trn2 Architecture" for chips, device memory,
its bandwidth and host memory; "Trainium Architecture" and "NeuronCore-v3 Architecture" for dense 16-bit FLOP/s;
"NeuronCore-v2 Architecture" for inf2 and trn1, which have the same core and the same compile target (optimum-neuron
maps them in the same way); "Logical NeuronCore configuration" for trn2, whose cores are counted as its SDK does by
default, two physical ones as one (LNC=2). Tensor-parallel degrees: "Transformers NeuronX Developer Guide" and
"Generative LLM inference with Neuron" for trn1 and inf2; for trn2 AWS names the largest (64, "Tutorial: Deploying
Llama3.1 405B"), the powers of two below it are an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass


GiB = 2**30


def unit_of(size: int) -> tuple[int, str]:
    """The largest unit, in bytes, of which `size` is at least one, and its name."""
    return next((unit for unit in ((GiB, "GiB"), (2**20, "MiB")) if abs(size) >= unit[0]), (2**10, "KiB"))


def in_units(size: int) -> str:
    """Bytes as text in the unit that suits them: `15.00 GiB`, `2.50 MiB`."""
    unit, name = unit_of(size)
    return f"{size / unit:.2f} {name}"


@dataclass(frozen=True)
class Family:
    """An instance family: what an export's `instance_type` names.

    Args:
        name: the family, such as `trn1`; `cpu` for any host.
        target: what the compiler calls it.
        tp_degrees: the tensor-parallel degrees that its runtime supports; empty for any.
        physical_cores: physical NeuronCores that the SDK counts as one logical core (optimum-neuron 0.4.5,
            models/inference/backend/config.py, logical_nc_config).
    """

    name: str
    target: str
    tp_degrees: tuple[int, ...] = ()
    physical_cores: int = 1

    @property
    def on_neuron(self) -> bool:
        return self.name != "cpu"


_TRN1_DEGREES = (1, 2, 8, 32)

FAMILIES = {
    family.name: family
    for family in (
        Family("cpu", "cpu"),
        Family("trn1", "trn1", _TRN1_DEGREES),
        Family("trn1n", "trn1", _TRN1_DEGREES),
        Family("inf2", "trn1", (1, 2, 4, 8, 12, 24)),
        Family("trn2", "trn2", (1, 2, 4, 8, 16, 32, 64), physical_cores=2),
    )
}


@dataclass(frozen=True)
class Instance:
    """What a plan needs to know of an instance.

    Args:
        name: the name that EC2 gives it; `cpu` for this host.
        family: its family.
        chips: accelerator chips.
        cores: NeuronCores; logical ones on trn2. On `cpu` one: its process holds all ranks.
        core_bytes: device memory of a core; on `cpu` the memory that is available now.
        core_bandwidth: bytes per second between a core and its memory; None where it is not published (`cpu`).
        core_flops: dense 16-bit operations per second of a core; None where it is not published (`cpu`).
        host_bytes: memory of the host.
    """

    name: str
    family: Family
    chips: int
    cores: int
    core_bytes: int
    core_bandwidth: float | None
    core_flops: float | None
    host_bytes: int

    @property
    def on_neuron(self) -> bool:
        return self.family.on_neuron

    @property
    def tp_degrees(self) -> tuple[int, ...]:
        """The tensor-parallel degrees of its family that it has cores for; empty for any."""
        return tuple(n for n in self.family.tp_degrees if n <= self.cores)


# A NeuronCore's device memory, bandwidth and 16-bit FLOP/s. A chip of trn1 and inf2 has two NeuronCore-v2, 32 GiB at
# 820 GiB/s and 190 TFLOP/s. A chip of trn2 has eight NeuronCore-v3 of 79 TFLOP/s in four logical cores, and 96 GiB at
# 2.9 TB/s.
_V2 = (16 * GiB, 410.0 * GiB, 95e12)
_V3 = (24 * GiB, 2.9e12 / 4, 2 * 79e12)


def _instance(name: str, chips: int, cores: int, core: tuple[int, float, float], host_gib: int) -> Instance:
    return Instance(name, FAMILIES[name.partition(".")[0]], chips, cores, *core, host_gib * GiB)


# In the order in which a plan prefers them: fewer chips first, then less host memory, then less of everything else.
# There are no prices here: they change, and differ by region.
INSTANCES = {
    instance.name: instance
    for instance in (
        _instance("inf2.xlarge", 1, 2, _V2, 16),
        _instance("trn1.2xlarge", 1, 2, _V2, 32),
        _instance("inf2.8xlarge", 1, 2, _V2, 128),
        _instance("inf2.24xlarge", 6, 12, _V2, 384),
        _instance("inf2.48xlarge", 12, 24, _V2, 768),
        _instance("trn1.32xlarge", 16, 32, _V2, 512),
        _instance("trn1n.32xlarge", 16, 32, _V2, 512),
        _instance("trn2.48xlarge", 16, 64, _V3, 2048),
    )
}
