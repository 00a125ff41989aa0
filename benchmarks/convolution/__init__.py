"""The 3x3 convolution of stride 1: its cases, tensors and providers. On GPUs it has no kernels of this project."""
