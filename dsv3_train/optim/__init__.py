"""The optimizer, and what changes over consumed tokens."""
