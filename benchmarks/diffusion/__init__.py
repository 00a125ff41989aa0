"""Noise-schedule sampling: its cases, tensors, providers, launches and bytes."""
