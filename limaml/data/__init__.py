"""Sources, the day-partitioned event store, gates, snapshots and task batches."""
