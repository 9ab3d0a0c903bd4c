"""Many rows at once through Feast's online stores: serialised rows, and Feast's SQLite and Redis stores with a bulk path."""
