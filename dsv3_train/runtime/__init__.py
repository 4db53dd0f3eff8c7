"""Where a run happens: CPU or GPU, ranks and process groups, launchers."""
