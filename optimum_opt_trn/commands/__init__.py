"""What we add to `optimum-cli`; `register/` is installed as part of the namespace `optimum.commands.register`."""
