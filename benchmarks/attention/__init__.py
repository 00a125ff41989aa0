"""Attention: its cases, tensors, providers, launches and bytes."""
