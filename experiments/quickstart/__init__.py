"""One complete training step for each way to use the library, as files that run on their own."""
