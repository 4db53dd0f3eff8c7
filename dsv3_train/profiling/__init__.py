"""Traces in; how much communication is hidden out, as numbers and as pictures."""
