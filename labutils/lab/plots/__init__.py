"""Figures that several chapters share: the one speed-quality plot and the roofline."""
