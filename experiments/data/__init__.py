"""Datasets: how they are prepared, read, divided and batched."""
