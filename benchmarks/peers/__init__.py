"""Other people's models with the kernels in them, against the same models without."""
