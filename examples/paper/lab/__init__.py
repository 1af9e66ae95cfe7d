"""What the scripts of examples/paper share: data, networks, methods, cached runs, tables."""
