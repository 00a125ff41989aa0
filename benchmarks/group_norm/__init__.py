"""Modulated group norm: its cases, tensors, providers, launches and bytes."""
