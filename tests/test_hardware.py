import pytest

from optimum_opt_trn.configuration_opt import COMPILE_TARGETS
from optimum_opt_trn.hardware import INSTANCES, GiB, find_instance, largest_of_family


def test_names_and_families_are_those_of_exports():
    assert {i.family for i in INSTANCES.values()} | {"cpu"} == set(COMPILE_TARGETS)
    assert all(name == instance.name for name, instance in INSTANCES.items())


@pytest.mark.parametrize(
    ("name", "cores", "device_gib", "bandwidth_gib"),
    [
        # "AWS Trn1/Trn1n Architecture" and "AWS Inf2 Architecture": device memory and its bandwidth, of all chips.
        ("trn1.2xlarge", 2, 32, 820),
        ("trn1.32xlarge", 32, 512, 13120),
        ("trn1n.32xlarge", 32, 512, 13120),
        ("inf2.xlarge", 2, 32, 820),
        ("inf2.8xlarge", 2, 32, 820),
        ("inf2.24xlarge", 12, 192, 4920),
        ("inf2.48xlarge", 24, 384, 9840),
        # "Amazon EC2 Trn2 Architecture": 46.4 TB/s.
        ("trn2.48xlarge", 64, 1536, 46.4e12 / GiB),
    ],
)
def test_cores_add_up_to_what_aws_publishes_of_the_instance(name, cores, device_gib, bandwidth_gib):
    instance = find_instance(name)
    assert instance.cores == cores
    assert cores * instance.core_bytes == device_gib * GiB
    assert cores * instance.core_bandwidth == pytest.approx(bandwidth_gib * GiB)
    assert max(instance.tp_degrees) <= cores


def test_instances_with_fewer_chips_come_first():
    chips = [instance.chips for instance in INSTANCES.values()]
    assert chips == sorted(chips)


def test_an_unknown_instance_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'trn3\.big' is not known: choose cpu, inf2\.xlarge"):
        find_instance("trn3.big")


def test_the_largest_of_a_family():
    assert largest_of_family("trn1").name == "trn1.32xlarge"
    assert largest_of_family("cpu").core_bytes <= largest_of_family("cpu").host_bytes
