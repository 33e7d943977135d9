"""What every topic is tried on: models and their layers, texts, training, figures and widgets, languages and paths."""
