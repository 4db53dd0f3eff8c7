"""What a recipe means on a cluster, worked out without one."""
