"""The implementations that the benchmark measures, and how it times them."""
