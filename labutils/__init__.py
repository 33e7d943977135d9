"""Labs on LLM inference acceleration, in three rooms.

The topics, in the order of the course: `measurement` (00), `generation` (01), `quantization` (02, 03), `pruning` (04),
`distillation` (05), `acceleration` (06), `xla` (07), `fpga` (08), `distributed` (09), `decoding` (10), `serving` (11),
`applications` and `speech` (12), `capstone` (13). Every topic is tried on what `lab` holds, and taught by what `course`
holds.
"""

__version__ = "0.1.0"
