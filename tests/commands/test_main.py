"""`ether-diffusion`: one door for errors, and the quickstart from end to end."""

import pytest
from PIL import Image

from ether_diffusion.base_models import MINIATURES
from ether_diffusion.commands.main import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"ether-diffusion {command}" in capsys.readouterr().out


def test_a_flag_that_a_command_does_not_know_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", str(tmp_path), "--max_train_steps", "3"])
    assert "unrecognized arguments: --max_train_steps 3" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("base", MINIATURES)
def test_the_quickstart_goes_from_photographs_to_a_grid_and_passes_other_flags_on(base, tmp_path, capsys):
    flags = ("--base", base, "--seeds", "1", "--max_train_steps", "2", "--num_validation_images", "0", "--seed", "1")
    assert main(["quickstart", "--output_dir", str(tmp_path), *flags]) == 0
    printed = capsys.readouterr().out
    assert "similarity to the subject (CLIP-I)" in printed and printed.endswith(f"{tmp_path / 'grid.png'}\n")
    assert Image.open(tmp_path / "grid.png").width > 6 * 128
    with pytest.raises(SystemExit, match="2"):
        main(["quickstart", "--base", base, "--output_dir", str(tmp_path / "new"), "--max_train_steps", "none"])
