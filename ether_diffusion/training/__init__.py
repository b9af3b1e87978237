"""What the training scripts are made of: options, data, model families, objective, loop, pictures and card."""
