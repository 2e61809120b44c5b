"""One benchmark harness for `vlmfast bench` and for `benchmarks/`: same data, interleaved, medians and spreads."""
