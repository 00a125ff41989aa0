"""What the model is trained on and how it is sampled."""
