"""Tests here need a GPU with Transformer Engine; anywhere else they are skipped."""

import os

import pytest
import torch

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # minutes of compilation for seconds of tests


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "/gpu/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="no GPU"))
