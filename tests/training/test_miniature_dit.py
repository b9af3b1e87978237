"""Training the miniature of a transformer by its name, as the script does it."""

import numpy as np
import pytest
from PIL import Image

from ether_diffusion import miniature
from ether_diffusion.miniature.world import subjects
from ether_diffusion.training import dreambooth
from ether_diffusion.training.methods.saving import load_trained

SUBJECT = subjects()[0]


@pytest.mark.parametrize("method", ["ether", "ether_plus", "lora", "oft", "full"])
def test_every_kind_of_method_trains_it_and_comes_back(method, tmp_path):
    (tmp_path / "seen").mkdir()
    for k in range(2):
        SUBJECT.view(k).render().image.save(tmp_path / "seen" / f"{k}.png")
    flags = {
        "pretrained_model_name_or_path": "miniature-dit",
        "instance_data_dir": tmp_path / "seen",
        "instance_prompt": "a photo of sks toy",
        "output_dir": tmp_path / "out",
        "method": method,
        "max_train_steps": 2,
        "num_validation_images": 1,
        "num_inference_steps": 2,
        "seed": 0,
    }
    dreambooth.main([f"--{name}={value}" for name, value in flags.items()])
    card = (tmp_path / "out/README.md").read_text()
    assert "ether-diffusion miniature-dit" in card
    opening = (
        "miniature.load_pipeline('miniature-dit')" if method != "full" else "text_encoder_3=None, tokenizer_3=None"
    )
    assert opening in card
    assert Image.open(tmp_path / "out/grid.png").height >= 64
    pipe = load_trained(miniature.FOLDERS["miniature-dit"], tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of sks toy", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3) and np.isfinite(image).all()
