"""Commands of `optimum-cli`. `register/` is installed into the namespace package `optimum.commands.register`."""
