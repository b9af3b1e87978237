#!/usr/bin/env python
"""Teach a diffusion model a subject from a few photographs, with ETHER or ETHER+ (DreamBooth).

    accelerate launch train_dreambooth_ether.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --instance_data_dir photos --instance_prompt "a photo of sks dog" \\
        --mixed_precision fp16 --train_batch_size 1 --output_dir out/dog

Without --pretrained_model_name_or_path it trains the miniature that comes with the package. Everything that can be
wrong is checked before the weights are loaded. A run that was stopped goes on with --resume_from_checkpoint latest.
Written to --output_dir: the adapter, a grid of sample images of base and tuned model, and a model card.
"""

from ether_diffusion.training.dreambooth import main

if __name__ == "__main__":
    main()
