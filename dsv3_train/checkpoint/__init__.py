"""Saving and resuming through Megatron's dist_checkpointing."""
