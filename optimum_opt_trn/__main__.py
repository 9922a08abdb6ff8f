"""`python -m optimum_opt_trn …` is `optimum-cli …` without optimum-neuron's alarm on a host without Neuron devices.

optimum-cli imports optimum-neuron before it loads any plugin, so what that says cannot be dropped there.
"""

from __future__ import annotations

from .host_framework import without_alarm


def main() -> None:
    with without_alarm():
        from optimum.commands import optimum_cli
    optimum_cli.main()


if __name__ == "__main__":
    main()
