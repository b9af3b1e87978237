"""Files that are kept for their owner: their names, the history, what goes after a day."""

import zipfile

import pytest
from PIL import Image

from ether_diffusion.demo.jobs import Generated
from ether_diffusion.demo.results import KEPT_SECONDS, Results, file_name
from ether_diffusion.demo.settings import Settings, read_image

TOY = (("toy-1", 1.0),)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"prompt": "A red cube!", "seed": 7}, "A-red-cube_base_seed-7.png"),
        ({"prompt": "../../etc/passwd", "adapters": TOY}, "etc-passwd_toy-1_seed-0.png"),
        ({"prompt": "ein Bär", "adapters": (("perro pequeño", 0.5),)}, "ein-Bär_perro-pequeño-0.5_seed-0.png"),
        ({"prompt": "狗", "adapters": (("a", 1.0), ("b", 0.0))}, "狗_a+b-0_seed-0.png"),
        ({"prompt": "?!"}, "image_base_seed-0.png"),
    ],
)
def test_a_name_says_prompt_adapter_and_seed(settings, name):
    assert file_name(Settings(**settings)) == name


def test_a_long_name_fits_every_file_system():
    adapters = tuple((letter * 40, 0.123456) for letter in "狗犬猫")
    assert len(file_name(Settings(prompt="狗" * 900, adapters=adapters)).encode()) <= 255


def grid(seeds: int, **settings) -> Generated:
    asked = Settings(prompt="a toy", images=seeds, **settings)
    rows = [tuple(Image.new("RGB", (8, 8), (k, c, 0)) for c in range(len(asked.columns))) for k in range(seeds)]
    return Generated(rows, asked, None, 1.0)


def test_each_image_says_how_it_alone_is_made_and_a_sheet_how_all_are(tmp_path):
    results = Results(tmp_path)
    files = results.keep(grid(2, adapters=TOY, seed=3), "me")
    assert [caption for _, caption in files] == [
        "base, seed 3", "adapted, seed 3", "base, seed 4", "adapted, seed 4", "all on one sheet",
    ]  # fmt: skip
    assert [read_image(path)[0].seed for path, _ in files] == [3, 3, 4, 4, 3]
    assert read_image(files[-1][0])[0].images == 2
    strengths = results.keep(grid(1, adapters=TOY, strengths=(0.0, 0.5)), "me")
    assert [caption for _, caption in strengths] == ["toy-1 at 0, seed 0", "toy-1 at 0.5, seed 0", "all on one sheet"]
    assert len({path for path, _ in files + strengths}) == 8


def test_owners_see_their_own_and_what_is_a_day_old_goes(tmp_path, monkeypatch):
    results = Results(tmp_path)
    assert results.archive("me") is None
    (old, _), *_ = results.keep(grid(1), "me")
    (new, _), *_ = results.keep(grid(1), "me")
    results.keep(grid(1), "you")
    assert results.history("me") == [new, old] and len(results.history("you")) == 1
    with zipfile.ZipFile(results.archive("me")) as archive:
        assert archive.namelist() == ["001_a-toy_base_seed-0.png", "002_a-toy_base_seed-0.png"]
    later = __import__("time").time() + KEPT_SECONDS + 60
    monkeypatch.setattr("ether_diffusion.demo.results.time.time", lambda: later)
    results.folder("you")
    assert results.history("me") == []
