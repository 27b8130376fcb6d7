"""Arithmetic on local arrays: no modules, no mesh; where data crosses devices, an axis name is an argument."""
