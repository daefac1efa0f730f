"""Rollout: engines behind one contract, early exit on top of it, weights pushed into it. Called by `train` only.

Files: engine (the contract) · local (embedded engine) · sglang, vllm (servers) · pool (many engines) ·
early_exit (Step-GRPO's truncated rollout) · weight_sync.
"""
