"""What a run says at its start, and how long it will take."""

import re

from ether_diffusion.training.loop import in_words


def test_a_run_says_what_it_has_found_and_how_long_it_takes(train, photographs, caplog):
    caplog.set_level("INFO", "ether_diffusion.training")
    (photographs / "0.txt").write_text("a photo of sks toy on a shelf")
    try:
        train("--max_train_steps", 7, "--train_batch_size", 2, "--gradient_accumulation_steps", 3)
    finally:
        (photographs / "0.txt").unlink()
    lines = [record.getMessage() for record in caplog.records]
    rows = dict(re.fullmatch(r"  (\w+) +(.*)", line).groups() for line in lines if line.startswith("  "))
    assert rows["images"] == "3 images, 1 with captions" and rows["resolution"] == "16x16"
    assert rows["batch"] == "6 images (2 in a pass, 3 passes, 1 process)"
    assert rows["steps"] == "7, each image 14 times" and rows["device"].endswith("mixed precision no")
    assert rows["method"].startswith("ETHER+, ") and rows["base"].endswith("(StableDiffusionPipeline)")
    assert any(re.fullmatch(r"expected time: \d+ s for the 2 steps that are left", line) for line in lines)


def test_a_short_run_says_no_time(train, caplog):
    caplog.set_level("INFO", "ether_diffusion.training")
    train("--max_train_steps", 5)
    assert not any("expected time" in record.getMessage() for record in caplog.records)


def test_times_are_said_in_the_unit_that_people_use():
    assert [in_words(seconds) for seconds in (3.4, 89, 600, 12_000)] == ["3 s", "89 s", "10 min", "3 h 20 min"]
