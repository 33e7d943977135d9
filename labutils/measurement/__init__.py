"""Honest measurement: time, roofline, threads, memory, energy, bytes, and the ledger that keeps them."""
