"""Whether a precision trains as well as BF16: losses of runs side by side, and errors of number formats."""
