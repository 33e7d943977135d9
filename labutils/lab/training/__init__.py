"""Training: the one loop that every chapter's training runs through, and the two losses that topics share."""
