"""Chapter 07: TPU and XLA. LabLM as a pure function: static shapes, programs, Pallas, sharding. Needs the extra tpu."""
