"""The embedded engine: a decoder in the learner's own process, or behind HTTP (`megarl serve`)."""
