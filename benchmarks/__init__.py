"""Speed, beside what people would use instead, in the same run."""
