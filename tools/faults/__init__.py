"""What tools/chaos.py does to runs, a module for each kind of fault."""
