"""From logged rows to tasks: splits, sampling, padded batches, streams of supports."""
