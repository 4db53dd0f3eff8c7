"""From text to micro-batches: tokenising, fill-in-the-middle, indexed datasets, packing, blending."""
