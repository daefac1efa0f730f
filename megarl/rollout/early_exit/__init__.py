"""Step-GRPO's dynamic truncated rollout: think, probe at step markers, decide, answer."""
