"""The rank program: what the ranks held here compute, the same for every target."""
