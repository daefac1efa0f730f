"""What several benchmarks share: results, models, training runs, a browser, made-up runs, names given to options."""
