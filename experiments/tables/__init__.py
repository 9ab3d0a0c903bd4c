"""One module a table: `units(quick)` says what is to be computed, `run(unit)` computes it, `assemble(outputs)` reports it."""
