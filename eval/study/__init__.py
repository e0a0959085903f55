"""Studies: the same training for several norms, learning rates and seeds, and what the differences are worth."""
