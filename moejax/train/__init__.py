"""Training: the state, one step, the loop around it, and what a run writes."""
