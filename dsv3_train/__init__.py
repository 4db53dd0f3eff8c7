"""Training system behind DeepSeek-V3, built on Megatron-core."""

__version__ = "0.1.0"
