"""The one loop that every chapter's training runs through, and the losses that topics share."""
