"""One module a table: `units(quick)`, `run(unit)` in a worker, `assemble(outputs)`."""
