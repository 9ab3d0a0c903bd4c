"""The tables: each module makes its units of work, computes one alone, and assembles their outputs."""
