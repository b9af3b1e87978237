"""The kinds of control encoders by their names, for those who ask for one: what they are is in `encoder`."""

ENCODER_KINDS = ("conv", "latent")
