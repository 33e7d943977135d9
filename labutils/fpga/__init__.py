"""Chapter 08: quantization as silicon area. A systolic array in HDL, simulated, synthesised, placed and routed."""
