import platform
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext


CSRC = Path("optimum_opt_trn/targets/cpu/csrc")
FLAGS = [
    *("-O3", "-std=c++20", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics", "-fvisibility=hidden", "-g0"),
    # GCC 12 warns of its own headers of AVX-512.
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]

# kernels.cpp is compiled once for each instruction set; which one runs is decided when the package is imported.
VARIANTS = {
    "x86_64": {
        "avx2": "-DKERNELS_AVX2 -mavx2 -mfma -mf16c",
        "avx512": "-DKERNELS_AVX512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c",
    },
    "aarch64": {"neon": "-DKERNELS_NEON"},
}
MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


class BuildKernels(build_ext):
    """Builds the CPU target's kernels, or says once that they could not be built."""

    def build_extension(self, extension):
        try:
            for name, flags in VARIANTS[MACHINE].items():
                extension.extra_objects += self.compiler.compile(
                    [str(CSRC / "kernels.cpp")],
                    output_dir=str(Path(self.build_temp) / name),
                    extra_postargs=[*FLAGS, *flags.split()],
                    depends=extension.depends,
                )
            super().build_extension(extension)
        except Exception as error:  # of many kinds: no compiler, no headers of Python, a compiler that is too old
            print(
                f"optimum_opt_trn: the kernels for the CPU were not built ({error}). The package works without them, "
                "many times slower. Install g++ and the headers of Python (python3-dev), and install the package "
                "again.",
                file=sys.stderr,
            )


extension = Extension(
    "optimum_opt_trn.targets.cpu._kernels",
    [str(CSRC / name) for name in ("module.cpp", "pool.cpp", "encode.cpp")],
    depends=[str(file) for file in sorted(CSRC.glob("*.h"))],
    extra_compile_args=FLAGS,
    # Nothing of the C++ library is used: the package then runs on hosts with an older one.
    extra_link_args=["-Wl,--as-needed"] if sys.platform == "linux" else [],
    language="c++",
    optional=True,
    py_limited_api=True,
)

# optimum-cli finds its plugins as files in the namespace package optimum.commands.register, so ours goes there; the
# folder that holds it has no __init__.py, as that namespace must not have one (PEP 420).
setup(
    packages=[*find_packages(include=["optimum_opt_trn", "optimum_opt_trn.*"]), "optimum.commands.register"],
    package_dir={"optimum.commands.register": "optimum_opt_trn/commands/register"},
    ext_modules=[extension] if MACHINE in VARIANTS else [],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
