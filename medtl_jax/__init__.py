"""Transfer learning of ImageNet-pretrained CNNs for medical images, in JAX/Flax."""

__version__ = "0.1.0"
