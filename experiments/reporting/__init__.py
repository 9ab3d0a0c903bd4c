"""The parts of the report: each takes the results mapping and gives lines of markdown, none where its table is absent."""
