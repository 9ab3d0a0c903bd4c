"""What batch verbs tell the monitoring: their metrics, offline/online consistency, drift of features and scores."""
