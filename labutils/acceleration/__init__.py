"""Chapter 06: one GPU. A ladder of rungs, each checked; memory that fits; profiles read; kernels in Triton."""
