"""Chapter 13: all of it. Designs of one service, judged by speed, quality, energy, fairness and privacy."""
