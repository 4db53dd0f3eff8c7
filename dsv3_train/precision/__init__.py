"""FP8 as the report uses it: reference arithmetic that the GPU code is held against."""
