#!/usr/bin/env python
"""Teach a diffusion model to follow control images: semantic maps, edges, poses, depth.

    accelerate launch train_controlnet_ether.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --train_data_dir data --validation_image map.png --validation_prompt "a red house" --output_dir out/maps

The same as `accelerate launch -m ether_diffusion.training.control`, where the training is; --help says the rest.
"""

from ether_diffusion.training.control import main

if __name__ == "__main__":
    main()
