"""The networks: the encoder that makes z, the denoiser that z guides, and how the two meet."""

from soda_engine.models.encoder import ResNetEncoder, load_resnet_weights
from soda_engine.models.unet import Denoiser

__all__ = ["Denoiser", "ResNetEncoder", "load_resnet_weights"]
