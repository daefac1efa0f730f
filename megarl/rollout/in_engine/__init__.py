"""What runs inside an engine's process, in the engine's environment: imports neither megarl nor the engine."""
