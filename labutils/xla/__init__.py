"""LabLM as a pure function for XLA: static shapes, compilation, a Pallas kernel, export, sharding. Needs the extra tpu."""
