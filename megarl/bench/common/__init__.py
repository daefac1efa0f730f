"""What several benchmarks share: results, models, learners, runs, learning curves, a browser, option values."""
