"""Engines behind HTTP (SGLang, vLLM, our own): their processes, their protocols, and one pool of all of them."""
