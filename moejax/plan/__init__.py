"""What a run will need, computed without its devices."""
