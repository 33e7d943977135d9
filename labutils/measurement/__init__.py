"""Chapter 00: honest measurement. Time, bytes, energy, the roofline of this machine, and the ledger that keeps them."""
