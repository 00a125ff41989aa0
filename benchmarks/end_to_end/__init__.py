"""Training steps, sampling and encoding from end to end: this engine beside PyTorch as its users write it."""
