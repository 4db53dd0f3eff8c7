"""Recipes that ship with the package, addressed by name (`dsv3 recipes list`)."""
