"""What is observed during training: the log line, metrics.jsonl, trackers, profiles and float8 health."""
