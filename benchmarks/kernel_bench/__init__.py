"""Parts of `benchmarks/kernels.py`: what is measured, against whom, how, and the picture of it."""
