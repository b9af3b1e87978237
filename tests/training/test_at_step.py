"""Adapters as they were after an earlier step of their training."""

from pathlib import Path

import pytest
import torch

from ether_diffusion import miniature
from ether_diffusion.adapters.locate import find_adapter_file
from ether_diffusion.adapters.writing import write_adapter_file
from ether_diffusion.errors import InputError
from ether_diffusion.training import dreambooth
from ether_diffusion.training.at_step import adapter_at_step


def train(photographs: Path, folder: Path, *flags: str) -> Path:
    dreambooth.main([
        "--pretrained_model_name_or_path", "miniature", "--instance_data_dir", str(photographs),
        "--instance_prompt", "a photo of sks toy", "--output_dir", str(folder), "--max_train_steps", "4",
        "--checkpointing_steps", "2", "--num_validation_images", "0", "--train_batch_size", "1", "--seed", "0", *flags,
    ])  # fmt: skip
    return folder


@pytest.mark.parametrize("method", ["ether", "ether_plus"])
def test_the_last_step_is_the_adapter_and_an_earlier_one_loads(photographs, tmp_path, method):
    run = train(photographs, tmp_path / "run", "--method", method, "--train_text_encoder")
    last = find_adapter_file(run).tensors
    assert set(last) == {"unet", "text_encoder"}
    again, earlier = (adapter_at_step(run, step) for step in (4, 2))
    assert all(torch.equal(again.tensors[c][key], last[c][key]) for c in last for key in last[c])
    assert not all(torch.equal(earlier.tensors[c][key], last[c][key]) for c in last for key in last[c])
    write_adapter_file(tmp_path / "earlier.safetensors", earlier)
    pipe = miniature.load_pipeline()
    pipe.load_ether_weights(tmp_path / "earlier.safetensors")
    state = pipe.ether_state_dict()
    assert all(torch.equal(state[f"{c}.{key}"], each) for c in last for key, each in earlier.tensors[c].items())


def test_what_has_no_such_step_is_refused(photographs, tmp_path):
    run = train(photographs, tmp_path / "run", "--use_ema")
    with pytest.raises(InputError, match="running average"):
        adapter_at_step(run, 2)
    with pytest.raises(InputError, match="checkpoint-3"):
        adapter_at_step(run, 3)


def test_what_a_transformer_does_not_train_is_as_it_was(photographs, tmp_path):
    run = train(photographs, tmp_path / "run", "--pretrained_model_name_or_path", "miniature-dit")
    last, again = find_adapter_file(run).tensors["transformer"], adapter_at_step(run, 4).tensors["transformer"]
    assert last.keys() == again.keys() and all(torch.equal(again[key], each) for key, each in last.items())
    earlier = adapter_at_step(run, 2).tensors["transformer"]
    assert torch.equal(earlier["transformer_blocks.5.attn.add_q_proj.ether_u"], last[
        "transformer_blocks.5.attn.add_q_proj.ether_u"
    ])  # fmt: skip
    assert not torch.equal(*(each["transformer_blocks.0.attn.to_q.ether_u"] for each in (earlier, last)))
