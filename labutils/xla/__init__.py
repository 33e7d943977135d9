"""LabLM as a pure function for XLA: static shapes, programs, a Pallas kernel, export, sharding. Needs the extra tpu."""
