"""The `dsv3` command: one file per sub-command, parsing and printing only."""
