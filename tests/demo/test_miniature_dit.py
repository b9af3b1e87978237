"""The page's model on the miniature of a transformer."""

import numpy as np
import pytest
from helpers.demo import close, connect, generate, serve_page
from helpers.miniature_dit import save_own_adapter

from ether_diffusion.base_models import MINIATURES
from ether_diffusion.commands.demo import SHIPPED
from ether_diffusion.demo.jobs import Generated
from ether_diffusion.demo.library import Library
from ether_diffusion.demo.settings import Settings
from ether_diffusion.demo.training import Choices, Trainer
from ether_diffusion.demo.worker import Worker
from ether_diffusion.errors import InputError


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """With the adapters of the first miniature and one of its own."""
    folder = tmp_path_factory.mktemp("adapters")
    save_own_adapter(folder)
    worker = Worker(MINIATURES["miniature-dit"], Library(SHIPPED, folder), device="cpu", max_batch=1)
    yield worker
    worker.close()


def test_adapters_of_its_own_fit_and_those_of_the_other_miniature_do_not(worker):
    assert worker.usable() == ["own"]
    assert worker.fit(worker.library.get("toy-1")).startswith("does not fit")
    ((base, adapted),) = generate(worker, adapters=(("own", 1.0),)).images
    assert base.size == adapted.size == (64, 64) and not np.array_equal(np.asarray(base), np.asarray(adapted))
    ((again,),) = generate(worker).images
    assert np.array_equal(np.asarray(again), np.asarray(base))


def test_sizes_are_those_that_its_patches_and_positions_fit(worker):
    assert (worker.side, worker.unit) == (64, 8)
    for side in (32, 72, 128):
        assert generate(worker, width=side, height=64).images[0][0].size == (side, 64)
    with pytest.raises(InputError, match="Width: got 68, needs a multiple of 8 from 32 to 128"):
        generate(worker, width=68)


def test_a_preview_is_decoded_from_its_latents(worker):
    news = list(worker.generate(Settings(prompt="a toy", steps=6)))
    assert isinstance(news[-1], Generated) and any(each.preview is not None for each in news[:-1])


def test_the_page_offers_it_by_its_name(tmp_path):
    page = serve_page(tmp_path, base="miniature-dit")
    try:
        assert "the miniature-dit, a toy that comes with the package" in str(page.get_config_file())
        assert page.worker.library.adapters() == []  # those that are shipped are of the other
        connect(page).predict("", api_name="/refresh")
    finally:
        close(page)


@pytest.mark.slow
def test_photos_become_an_adapter_of_it(worker, photographs):
    trainer = Trainer(worker)
    photos = sorted(photographs.iterdir())
    try:
        *_, last = trainer.train(Choices(photos, "learned", "toy", method="ether_plus", steps=3))()
    finally:
        trainer.close()
    assert last.name == "learned" and len(last.losses) == 3
    assert worker.fit(worker.library.get("learned")) == "fits"
