"""What an installation consists of, and what importing it costs."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT.anchor
    )


def modules_after(code: str) -> set[str]:
    result = python(f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_import_is_silent():
    result = python("import optimum_opt_trn; optimum_opt_trn.__version__")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_import_leaves_the_heavy_modules_for_later():
    # `import optimum.neuron`, the measure, imports the first three.
    heavy = {"numpy", "torch", "transformers", "optimum.neuron", "accelerate", "safetensors", "tokenizers"}
    assert not heavy & modules_after("import optimum_opt_trn")
    ours = modules_after("import optimum_opt_trn.commands.export") - modules_after("import optimum.commands.base")
    roots = {name.partition(".")[0] for name in ours} - sys.stdlib_module_names
    assert roots == {"optimum_opt_trn"}, "optimum-cli loads our command at every start"


def test_a_configuration_does_not_need_the_model():
    assert "optimum_opt_trn.modeling_neuron_opt" not in modules_after("from optimum_opt_trn import OPTNeuronConfig")


@pytest.mark.parametrize("name", ["NeuronOPTForCausalLM", "OPTNeuronConfig", "pipeline", "save_pretrained_split"])
def test_public_names(name):
    import optimum_opt_trn

    assert name in dir(optimum_opt_trn)
    assert getattr(optimum_opt_trn, name).__module__.startswith("optimum_opt_trn.")


def test_version_is_that_of_the_distribution():
    import importlib.metadata

    import optimum_opt_trn

    assert importlib.metadata.version("optimum-opt-trn") == optimum_opt_trn.__version__


def test_wheel(tmp_path):
    """It holds every module, the kernels, the typing marker, the licence; the register file is in optimum's folder."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", ".*", "*.so")
    shutil.copytree(ROOT / "optimum_opt_trn", source / "optimum_opt_trn", ignore=ignored)
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(build, check=True, timeout=300)

    (wheel,) = tmp_path.glob("optimum_opt_trn-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {str(path.relative_to(source)) for path in (source / "optimum_opt_trn").rglob("*") if path.is_file()}
    register = "optimum_opt_trn/commands/register/register_opt_trn.py"
    assert register in code
    sources = {name for name in code if "/csrc/" in name}
    expected = code - sources - {register} | {"optimum/commands/register/register_opt_trn.py"}
    expected |= {"optimum_opt_trn/targets/cpu/_kernels.abi3.so"}
    assert "-cp310-abi3-" in wheel.name  # any Python and any torch
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert "optimum_opt_trn/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_loading_the_model_class_raises_no_alarm_on_a_host_without_devices():
    program = "import optimum_opt_trn; optimum_opt_trn.NeuronOPTForCausalLM"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "No major for neuron device" not in result.stderr and "CPU-only machine" not in result.stderr


def test_running_the_package_is_optimum_cli_without_alarm():
    command = [sys.executable, "-m", "optimum_opt_trn", "neuron", "doctor", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "No major for neuron device" not in result.stderr and "CPU-only machine" not in result.stderr
    assert result.stdout.startswith("usage: optimum-cli neuron doctor")


def test_the_two_commands_are_the_first_shell_lines_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    first, second = readme.split("```bash\n")[1].split("```")[0].splitlines()[-2:]
    assert first.startswith("python3 -m venv .venv && ") and first.endswith(
        "examples/demo.py examples/models/opt-austen"
    )
    assert second.startswith("python3 -m venv .venv && ") and "-m pytest" in second
    users = readme.split("```bash\n")[2].split("```")[0]
    assert ["install" in users, "export neuron" in users, "neuron generate" in users] == [True] * 3
