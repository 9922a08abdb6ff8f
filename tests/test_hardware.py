import pytest

from optimum_opt_trn.hardware import FAMILIES, INSTANCES, GiB


def test_names_and_families_are_those_of_exports():
    assert {i.family.name for i in INSTANCES.values()} | {"cpu"} == set(FAMILIES)
    assert all(name == family.name for name, family in FAMILIES.items())
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
    instance = INSTANCES[name]
    assert instance.cores == cores
    assert cores * instance.core_bytes == device_gib * GiB
    assert cores * instance.core_bandwidth == pytest.approx(bandwidth_gib * GiB)
    assert max(instance.tp_degrees) <= cores


def test_instances_with_fewer_chips_come_first():
    chips = [instance.chips for instance in INSTANCES.values()]
    assert chips == sorted(chips)


def test_an_instance_runs_the_degrees_of_its_family_that_it_has_cores_for():
    assert INSTANCES["trn1.2xlarge"].tp_degrees == (1, 2)
    for family in FAMILIES.values():
        largest = max((i.tp_degrees for i in INSTANCES.values() if i.family == family), key=len, default=())
        assert largest == family.tp_degrees
