"""Kernels for NVIDIA's Hopper: raw arrays in and out. The operations that choose them, and the references, are in ops.

Modules here that import Triton are imported only where a program for a GPU is traced.
"""
