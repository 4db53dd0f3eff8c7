"""YAML -> a typed, checked `Recipe`: the only configuration of a run."""
