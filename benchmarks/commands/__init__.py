"""The commands of `python -m benchmarks`: a module each, which adds its parser and runs it."""
