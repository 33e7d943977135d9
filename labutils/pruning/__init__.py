"""Pruning: which weights go (scores, masks), what the rest must do (OBS, recovery), and what then is really faster."""
