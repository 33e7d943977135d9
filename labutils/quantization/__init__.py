"""Chapters 02 and 03: numbers in few bits. Formulas, calibration, packed weights, kernels that are really faster."""
