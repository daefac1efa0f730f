"""Tensors in files: described in place, read piece by piece, written in any order."""
