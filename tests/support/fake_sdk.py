"""A stand-in for the Neuron SDK: importable and reported as installed, with nothing in it.

For what optimum-neuron does differently where the SDK is found, which is decided by looking for it. Importing this
module puts it in place, so only processes started for the purpose should: `python -c "import fake_sdk; …"`.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
import types


PACKAGES = {"libneuronxla", "neuronx_distributed", "neuronxcc", "torch_neuronx", "torch_xla"}


class Module(types.ModuleType):
    __version__ = "2.8.0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Finder(importlib.metadata.DistributionFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in PACKAGES:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        pass

    def find_distributions(self, context=importlib.metadata.DistributionFinder.Context()):  # noqa: B008
        if context.name in PACKAGES:
            yield Distribution(context.name)


class Distribution(importlib.metadata.Distribution):
    versions: dict[str, str] = {}  # where they are not the modules' common one

    def __init__(self, package):
        self.package = package

    def read_text(self, filename):
        version = self.versions.get(self.package, Module.__version__)
        return f"Metadata-Version: 2.1\nVersion: {version}\n" if filename == "METADATA" else None

    def locate_file(self, path):
        raise NotImplementedError


sys.meta_path.insert(0, Finder())
