"""Quantization as silicon area: a systolic array in HDL, simulated, synthesised, placed and routed without a board."""
