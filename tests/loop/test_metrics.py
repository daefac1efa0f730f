"""Figures of a step from those of its updates."""

from megarl.loop.metrics import learner_metrics


def test_means_are_over_updates_that_trained_something():
    """An update that pruning left nothing counts for nothing; the mismatch is that of the policy that sampled."""
    first = {"tokens_trained": 10.0, "entropy": 1.0, "mismatch_mean": 1e-6}
    second = {"tokens_trained": 30.0, "entropy": 3.0, "mismatch_mean": 5e-6}
    nothing = {"tokens_trained": 0.0, "entropy": 0.0}
    assert learner_metrics([first, second]) == {"tokens_trained": 40.0, "entropy": 2.0, "mismatch_mean": 1e-6}
    assert learner_metrics([first, nothing, second]) == learner_metrics([first, second])
    assert learner_metrics([nothing, second]) == {"tokens_trained": 30.0, "entropy": 3.0}
    assert learner_metrics([nothing]) == nothing
