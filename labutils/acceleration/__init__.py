"""GPU acceleration: the ladder of rungs, memory that fits, profiles read, costs, and Triton kernels of one's own."""
