"""Engines behind HTTP, SGLang, vLLM and our own: their processes, their dialects, many as one pool."""
