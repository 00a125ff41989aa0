"""The kernels in models that other people wrote; each part is imported by its own name, and only on use."""
