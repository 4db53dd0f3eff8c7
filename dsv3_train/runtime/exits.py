"""Exit codes of a rank, and of a run as a whole, beyond 0, 1 (a crash) and 2 (bad input)."""

PREEMPTED = 75
"""Asked to stop, and stopped with a checkpoint: start again to go on (EX_TEMPFAIL of sysexits.h). SLURM requeues."""
HUNG = 70
"""No progress within `faults.hang_seconds`: ended by the watchdog."""
CORRUPT = 74
"""Results differ that must be the same bit for bit: a machine computes wrongly."""

FINAL = (0, 2, PREEMPTED)
"""After these, starting again at once would be wrong or in vain."""
