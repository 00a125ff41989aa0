"""Noise schedules, counter-based noise, noising, the denoising loss, and sampler steps."""
