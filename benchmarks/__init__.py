"""What is measured about the kernels and the engine, and how: `python -m benchmarks --help`."""
