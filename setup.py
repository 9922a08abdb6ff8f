from setuptools import find_packages, setup


# optimum-cli finds its plugins as files in the namespace package optimum.commands.register, so ours goes there; the
# folder that holds it has no __init__.py, as that namespace must not have one (PEP 420).
setup(
    packages=[*find_packages(include=["optimum_opt_trn", "optimum_opt_trn.*"]), "optimum.commands.register"],
    package_dir={"optimum.commands.register": "optimum_opt_trn/commands/register"},
)
