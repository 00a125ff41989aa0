"""Pretraining: the trainer, its optimizer, moving average, checkpoints, logs and processes."""
