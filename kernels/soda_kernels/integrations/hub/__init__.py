"""The kernels as a package in the layout of Hugging Face's `kernels`: `python -m soda_kernels.integrations.hub`."""
