"""Names of libraries that this one follows, for scripts that were written for them."""
