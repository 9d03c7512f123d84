"""tools/bench/bench kernels and serve: what runs in the Python that has torch."""
