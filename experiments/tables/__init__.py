"""One module a table: `jobs(quick)` says what is to be computed, `run(job)` computes it, `assemble(outputs)` reports it."""
