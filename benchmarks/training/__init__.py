"""What a training step consists of, by phase."""
