"""3x3 convolution by Winograd's minimal filtering, which PyTorch has none of on a CPU."""
