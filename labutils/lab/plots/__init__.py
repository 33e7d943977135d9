"""Figures, drawn from records: the one speed-quality plot, the roofline, and those of each chapter."""
