"""Turn any vision-language data set into dense, memory-safe, faithful training batches."""
