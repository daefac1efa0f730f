"""Rollout: engines behind one contract, early exit on top of it, weights pushed into it. Called by `loop`.

engine.py is the contract: token ids in, token ids out. groups.py rolls out a group of completions for every prompt.
stops and detokenize find where a response stops. local/ is the embedded engine, servers/ SGLang and vLLM, early_exit/
Step-GRPO's truncated rollout, weights/ the ways for weights, in_engine/ what runs inside a server's own process.
"""
