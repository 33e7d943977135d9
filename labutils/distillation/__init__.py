"""Distillation: a small student learns from a teacher's distributions, hidden states or texts."""
