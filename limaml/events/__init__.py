"""Sources, the day-partitioned event store, its gates, the catalogue and the snapshots."""
