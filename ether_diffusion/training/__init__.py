"""What the training scripts are made of: options, data, model families, objective, loop, images and card."""
