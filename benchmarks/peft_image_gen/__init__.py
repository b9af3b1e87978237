"""PEFT's benchmark of image generation (method_comparison/image-gen), for ETHER and for every method that PEFT has."""
