"""Tensors in files: described where they lie, read a piece at a time, written as they come."""
