"""Recipe -> Megatron-core modules, stage by stage."""
