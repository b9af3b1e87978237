#!/usr/bin/env python
"""Teach a diffusion model a subject from a few photographs, with ETHER or ETHER+ (DreamBooth).

    accelerate launch train_dreambooth_ether.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --instance_data_dir photos --instance_prompt "a photo of sks dog" --output_dir out/dog

The same as `accelerate launch -m ether_diffusion.training.dreambooth`, where the training is; --help says the rest.
"""

from ether_diffusion.training.dreambooth import main

if __name__ == "__main__":
    main()
