"""What runs inside an engine's process, in the engine's environment: imports nothing of megarl."""
