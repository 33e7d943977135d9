"""What every topic is tried on: the model and its layers, texts, training, figures and widgets."""
