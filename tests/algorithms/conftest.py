"""Property tests draw the same cases everywhere, and are not judged by the speed of a shared machine."""

from hypothesis import settings

settings.register_profile("megarl", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("megarl")
