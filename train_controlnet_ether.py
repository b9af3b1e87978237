#!/usr/bin/env python
"""Teach a diffusion model to follow control images: semantic maps, edges, poses, depth.

    accelerate launch train_controlnet_ether.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --train_data_dir data --validation_image map.png --validation_prompt "a red house" \\
        --mixed_precision fp16 --train_batch_size 8 --max_train_steps 20000 --output_dir out/maps

--control_type light, the paper's setting, trains a small encoder beside the reflections of a frozen UNet and leaves
one file; --control_type controlnet trains a ControlNet whose copied weights are frozen under reflections, and leaves a
stock ControlNet folder besides. Everything that can be wrong is checked before the weights are loaded. A run that was
stopped goes on with --resume_from_checkpoint latest.
"""

from ether_diffusion.training.control import main

if __name__ == "__main__":
    main()
