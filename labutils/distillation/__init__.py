"""Chapter 05: a small student learns from a teacher's distributions, hidden states or sequences."""
