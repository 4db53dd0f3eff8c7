"""Operators for GPUs in Triton, each beside the plain PyTorch that it stands for."""
