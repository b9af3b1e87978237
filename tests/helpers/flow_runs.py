"""Flags of quick runs on the small pipelines of `flow_zoo`."""

QUICK = ("--max_train_steps", 2, "--train_batch_size", 2)
IMAGES = ("--num_validation_images", 1, "--num_inference_steps", 1)
