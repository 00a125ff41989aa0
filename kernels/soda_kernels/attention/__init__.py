"""Non-causal attention for the short sequences of a U-Net."""
