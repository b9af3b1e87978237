"""`ether-diffusion serve`: flags that cannot be used are told before anything is loaded."""

import importlib.util
import sys

import pytest

from ether_diffusion.commands.main import main
from ether_diffusion.commands.serve import read_replicas


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--adapters", "nowhere"], "there is no such folder"),
        (["--uploads"], "uploads: need adapters"),
        (["--port", "99999"], "--port 99999: needs a number from 0 to 65535"),
        (["--host", "256.0.0.1"], "--host 256.0.0.1 --port 8000"),
        (["--max_line", "0"], "--max_line=0: a positive whole number fits"),
        (["--max_batch", "0"], "--max_batch=0: a positive whole number, or auto fits"),
        (["--timeout", "nan"], "timeout=nan: a positive number fits"),
        (["--timeout", "-1"], "timeout=-1.0: a positive number fits"),
        (["--hang_after", "0"], "hang_after=0.0: a positive number fits"),
        (["--token_file", "nowhere.txt"], "nowhere.txt"),
        (["--replicas", "1:2"], "--replicas: belongs to --engine ray"),
        (["--adapters", ".", "--uploads", "--host", "0.0.0.0"], "anybody could change adapters; needs --token_file"),
    ],
)
def test_flags_that_cannot_be_used_are_told_in_a_sentence(flags, told, capsys):
    assert main(["serve", "--base", "nowhere/at-all", *flags]) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("engine", "module", "extra"), [("local", "uvicorn", "serve"), ("ray", "ray", "ray")])
def test_a_missing_package_is_told_with_the_extra_that_brings_it(engine, module, extra, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))
    assert main(["serve", "--engine", engine]) == 1
    assert f'the package {module} is missing; pip install "ether-diffusion[{extra}]"' in capsys.readouterr().err


def test_replicas_are_the_least_and_the_most():
    assert read_replicas("2:8") == (2, 8)
    for word in ("2", "0:1", "3:2", "a:b", ":", "1:2:3"):
        with pytest.raises(ValueError, match="needs two whole numbers from 1, as 2:8"):
            read_replicas(word)


def test_ray_without_its_part_for_serving_is_told_with_the_extra(tmp_path, monkeypatch, capsys):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").touch()
    (tmp_path / "ray" / "serve.py").write_text("import a_part_of_ray_serve")
    spec = importlib.util.spec_from_file_location(
        "ray", tmp_path / "ray" / "__init__.py", submodule_search_locations=[str(tmp_path / "ray")]
    )
    monkeypatch.setitem(sys.modules, "ray", importlib.util.module_from_spec(spec))
    monkeypatch.delitem(sys.modules, "ray.serve", raising=False)
    assert main(["serve", "--engine", "ray"]) == 1
    told = 'Ray Serve is not complete (a_part_of_ray_serve); pip install "ether-diffusion[ray]"'
    assert told in capsys.readouterr().err
