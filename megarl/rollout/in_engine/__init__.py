"""Code that runs in an engine's process and environment. Imports nothing from megarl."""
