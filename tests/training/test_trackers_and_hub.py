"""What surrounds a run: trackers, memory, model card, and the way to the Hub."""

import base64
import contextlib
import io
import json
import re
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from helpers.pipelines import adapt
from huggingface_hub import ModelCard
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ether_diffusion import miniature
from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.errors import InputError
from ether_diffusion.training import memory
from ether_diffusion.training.card import CARD_NAME, figures_of, size_of, write_card
from ether_diffusion.training.entry import launch_command
from ether_diffusion.training.families import ModelSource
from ether_diffusion.training.hub import check_hub, log_patterns, upload
from ether_diffusion.training.loop import TrainingResult
from ether_diffusion.training.options import RunOptions
from ether_diffusion.training.trackers import (
    PROJECT,
    TRACKERS,
    check_trackers,
    init_kwargs,
    log_images,
    tracker_names,
)

PROMPT = "a photo of sks dog"
RED = Image.new("RGB", (8, 6), (200, 10, 10))
BLUE = Image.new("RGBA", (8, 6), (10, 10, 200, 255))


# Trackers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb_mode(tmp_path, monkeypatch):
    """W&B in a mode, with no account; it reads its surroundings once and has to be told to do so again."""
    wandb = pytest.importorskip("wandb")

    def switch(mode: str, **variables: str) -> None:
        for name, value in {"WANDB_MODE": mode, "WANDB_SILENT": "true", **variables}.items():
            monkeypatch.setenv(name, value)
        wandb.teardown()

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    switch("offline")
    yield switch
    monkeypatch.undo()
    wandb.teardown()


def hide(monkeypatch, *packages):
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


def test_report_to_stands_for_the_trackers_that_accelerate_gets(wandb_mode):
    assert tracker_names("none") == []
    assert tracker_names("tensorboard") == ["tensorboard"]
    assert tracker_names("all") == list(TRACKERS)
    for report_to in ("none", "all", *TRACKERS):
        check_trackers(report_to)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_missing_is_named_with_the_command_that_installs_it(monkeypatch, name):
    hide(monkeypatch, name)
    with pytest.raises(InputError, match=rf"^--report_to {name}: .*pip install {name}$"):
        check_trackers(name)


def test_all_is_what_is_installed_and_at_least_one(monkeypatch):
    hide(monkeypatch, "wandb")
    check_trackers("all")
    assert tracker_names("all") == ["tensorboard"]
    hide(monkeypatch, "tensorboard")
    with pytest.raises(InputError, match="^--report_to all: .*pip install tensorboard or wandb$"):
        check_trackers("all")


@pytest.mark.parametrize("variables", [{}, {"WANDB_API_KEY": "short"}], ids=["no key", "no real key"])
def test_wandb_online_needs_a_login_before_the_training(wandb_mode, variables):
    wandb_mode("online", **variables)
    for report_to in ("wandb", "all"):
        words = "API key must have" if variables else "nobody is logged in"
        with pytest.raises(
            InputError, match=f"^--report_to {report_to}: W&B: .*{words}.*`wandb login`, or set WANDB_M"
        ):
            check_trackers(report_to)


def test_a_folder_of_logs_is_not_taken_for_a_package(tmp_path, monkeypatch):
    (tmp_path / "mistaken").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="pip install mistaken"):
        check_trackers("mistaken")


def log_a_run(folder: Path, report_to: str) -> None:
    accelerator = Accelerator(cpu=True, log_with=tracker_names(report_to) or None, project_dir=str(folder))
    accelerator.init_trackers(PROJECT, config={"steps": 2}, init_kwargs=init_kwargs(folder))
    for step in (1, 2):
        accelerator.log({"train/loss": 0.5 / step}, step=step)
    log_images(accelerator, "samples", [RED, BLUE], step=2)
    accelerator.end_training()


def test_tensorboard_holds_the_loss_and_the_images(tmp_path):
    log_a_run(tmp_path / "logs", "tensorboard")
    events = EventAccumulator(str(tmp_path / "logs" / PROJECT), size_guidance={"images": 0}).Reload()
    assert [(each.step, each.value) for each in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]
    (image,) = events.Images("samples")
    assert image.step == 2
    generated = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert np.array_equal(generated, np.hstack([np.asarray(RED), np.asarray(BLUE.convert("RGB"))]))


def test_wandb_holds_the_loss_and_the_images(wandb_mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log_a_run(tmp_path / "logs", "wandb")
    sys.modules["wandb"].teardown()  # its own process writes the run's end, and is waited for here
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    (run,) = (tmp_path / "logs" / "wandb").glob("offline-run-*")
    images = [np.asarray(Image.open(path)) for path in sorted(run.glob("files/media/images/samples_2_*.png"))]
    assert {image[0, 0].tobytes() for image in images} == {bytes((200, 10, 10)), bytes((10, 10, 200))}
    (log,) = run.glob("*.wandb")
    assert b"train/loss" in log.read_bytes() and PROJECT.encode() in log.read_bytes()


def test_a_run_without_trackers_logs_images_nowhere(tmp_path):
    log_a_run(tmp_path, "none")
    assert list(tmp_path.iterdir()) == []


# Memory ---------------------------------------------------------------------------------------------------------


def test_the_peak_on_the_cpu_is_that_of_the_process():
    memory.start_measuring("cpu")
    before = memory.current_memory("cpu")
    held = np.ones(1 << 25)  # 256 MiB
    during = memory.current_memory("cpu")
    del held
    assert during - before > 200 << 20
    assert memory.peak_memory("cpu") >= during - (16 << 20)


def test_the_peak_on_systems_without_proc_is_in_bytes_too(monkeypatch):
    here = memory.peak_memory("cpu")
    monkeypatch.setattr(memory, "STATUS", Path("/nowhere"))
    assert 0.5 < memory.peak_memory("cpu") / here < 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_on_a_gpu_is_that_of_tensors_since_the_start():
    torch.ones(1 << 24, device="cuda")
    memory.start_measuring("cuda")
    held = torch.ones(1 << 20, device="cuda")  # 4 MiB
    assert memory.current_memory("cuda") >= 4 << 20
    del held
    assert 4 << 20 <= memory.peak_memory("cuda") < 32 << 20


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_999, "1.0 MB"), (123_456_789, "123 MB"), (4e9, "4.00 GB")],
)
def test_sizes_are_written_for_people(count, text):
    assert memory.format_bytes(int(count)) == text


# Model card -----------------------------------------------------------------------------------------------------

LOADING = "import ether_diffusion\n\npipe.load_ether_weights({where})"
NASTY = 'a `sks` "dog" | it\'s\n---\n```python {where} \\ # é 🐕 \x85'


def card(folder: Path, source: ModelSource, **changes) -> str:
    folder.mkdir(exist_ok=True)
    (folder / WEIGHTS_NAME).write_bytes(bytes(2500))
    given = {
        "title": "ETHER+",
        "tags": ["ether", "peft", "dreambooth"],
        "paper": "2405.20271",
        "loading": LOADING,
        "weights": folder / WEIGHTS_NAME,
        "prompt": PROMPT,
        "prompts": [PROMPT],
        "figures": {"steps": "200"},
        "command": launch_command("/somewhere/train.py", ["--instance_prompt", PROMPT]),
        "with_images": True,
    }
    return write_card(folder, source=source, **(given | changes)).read_text("utf-8")


def code_of(card: str) -> str:
    return re.search(r"^(`{3,})python\n(.*?)\n\1$", card, re.DOTALL | re.MULTILINE)[2]


def test_the_card_says_what_the_result_is_and_how_it_came_about(tmp_path):
    text = card(tmp_path / "toy", ModelSource("someone/model", revision="main"))
    header = yaml.safe_load(text.split("---")[1])
    assert header["base_model"] == "someone/model" and header["instance_prompt"] == PROMPT
    assert header["tags"] == ["diffusers", "text-to-image", "ether", "peft", "dreambooth"]
    assert "# ETHER+: `a photo of sks dog`" in text and "https://arxiv.org/abs/2405.20271" in text
    assert f"`{WEIGHTS_NAME}`: 2.5 kB" in text and "| steps | 200 |" in text and "![samples](grid.png)" in text
    assert "accelerate launch train.py --instance_prompt 'a photo of sks dog'" in text
    assert "DiffusionPipeline.from_pretrained('someone/model', revision='main')" in text


def test_the_card_of_an_upload_loads_from_the_hub(tmp_path):
    source = ModelSource("someone/model")
    assert 'pipe.load_ether_weights("toy")' in card(tmp_path / "toy", source)
    assert 'pipe.load_ether_weights("me/dog")' in card(tmp_path / "toy", source, hub_id="me/dog")


def test_the_card_of_another_method_says_nothing_of_ether(tmp_path):
    folder = tmp_path / "toy" / "unet"
    folder.mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(bytes(1500))
    (folder / "config.json").write_bytes(bytes(500))
    changes = {
        "title": "full finetuning",
        "tags": ["dreambooth"],
        "paper": None,
        "loading": "pipe.load_lora_weights({where})",
    }
    text = card(tmp_path / "toy", ModelSource("someone/model"), weights=folder, with_images=False, **changes)
    assert "arxiv" not in text and "ether" not in text and "Samples" not in text and "`unet`: 1.5 kB" in text


def test_no_prompt_breaks_the_card(tmp_path):
    text = card(
        tmp_path / "toy",
        ModelSource("someone/model"),
        prompt=NASTY,
        prompts=[NASTY],
        figures={"steps": NASTY},
        command=launch_command("train.py", [NASTY]),
    )
    read = ModelCard(text, ignore_metadata_errors=False)
    assert read.data.instance_prompt == NASTY and read.data.library_name == "diffusers"
    assert code_of(text).splitlines()[-1] == f"image = pipe({NASTY!r}).images[0]"
    compile(code_of(text), "card", "exec")
    (row,) = (line for line in read.text.splitlines() if line.startswith("| steps"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert sum(line.startswith("#") for line in read.text.splitlines()) == 4  # headings: title, samples, use, training


@pytest.mark.parametrize("kind", ["adapter", "miniature", "pipeline"])
def test_the_code_on_the_card_generates(tiny_pipeline, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline.save_pretrained("toy" if kind == "pipeline" else "base")
    loading = {
        "adapter": LOADING,
        "miniature": "pipe.set_progress_bar_config(disable=True)",
        "pipeline": "from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({where})",
    }[kind]
    source = ModelSource(str(miniature.FOLDER) if kind == "miniature" else "base")
    code = code_of(card(tmp_path / "toy", source, loading=loading))
    if kind == "adapter":
        adapt(tiny_pipeline, num_blocks=2).save_ether_weights("toy")
    names = {}
    exec(code.replace(f"pipe({PROMPT!r})", f"pipe({PROMPT!r}, num_inference_steps=1)"), names)
    assert names["image"].width == (64 if kind == "miniature" else 16)


def test_the_size_of_several_weights_is_without_checkpoints_and_other_files(tmp_path):
    folder = tmp_path / "toy"
    for path in ("unet/a.safetensors", "text_encoder/b.safetensors"):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_bytes(bytes(400))
    fill(folder, "grid.png", "checkpoint-5/vectors.safetensors", ".saving/c.safetensors")
    assert size_of(folder) == 800
    assert size_of(folder / "grid.png") == 24


def test_figures_are_those_of_the_run(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(1500))
    result = TrainingResult(losses=[1.0] * 50 + [9.0] + [0.5] * 50, seconds=202.0, peak_memory=3_210_000_000)
    given = {"images": "5", "parameters": 12345, "weights": tmp_path / "weights"}
    figures = figures_of(result, learning_rates={"denoiser": 1e-3}, **given)
    assert figures == {
        "images": "5",
        "trained parameters": "12,345",
        "size of the weights": "1.5 kB",
        "learning rate": "0.001",
        "steps": "101",
        "mean loss, first 50 steps": "1.0000",
        "mean loss, last 50 steps": "0.5000",
        "time": "202 s",
        "time per step, mean": "2 s",
        "peak memory": "3.21 GB",
    }
    short = TrainingResult(losses=[1.0, 0.5], seconds=1.0, peak_memory=1)
    figures = figures_of(short, learning_rates={"denoiser": 1e-3, "text encoder": 5e-4}, **given)
    assert figures["mean loss, first 2 steps"] == figures["mean loss, last 2 steps"] == "0.7500"
    assert figures["learning rate"] == "denoiser 0.001, text encoder 0.0005"


# The Hub --------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs. "me" owns one namespace; token "reader" may not write."""

    def do_GET(self):
        if self.token is None or self.path == "/api/whoami-v2" and self.token == "stale":
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/whoami-v2":
            return self.answer(200, {"name": "me", "type": "user", "auth": {}})
        if self.path.endswith("/auth-check/write"):
            return self.answer(200 if self.may_write(self.path.split("/")[3]) else 403, {"error": "no write access"})
        if self.path == "/api/models/them/theirs":  # to be seen by everyone
            return self.answer(200, {"id": "them/theirs", "siblings": []})
        self.answer(404, {"error": "Repository not found"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            if not self.may_write(asked["organization"]):
                return self.answer(403, {"error": "no right to create here"})
            repo_id = f"{asked['organization']}/{asked['name']}"
            known = repo_id in self.server.repositories
            self.server.repositories.setdefault(repo_id, {})
            return self.answer(409 if known else 200, {"url": f"{self.server.address}/{repo_id}"})
        _, _, _, owner, name, action, _ = self.path.split("?")[0].split("/")
        if not self.may_write(owner):
            return self.answer(403, {"error": "no write access"})
        if action == "preupload":
            files = [each["path"] for each in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            return self.answer(200, {"files": modes})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repositories[f"{owner}/{name}"][line["value"]["path"]] = content
            else:
                self.server.commits.append(line["value"]["summary"])
        url = f"{self.server.address}/{owner}/{name}/commit/{'0' * 40}"
        self.answer(200, {"commitUrl": url, "commitOid": "0" * 40})

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def may_write(self, owner: str | None) -> bool:
        return owner == "me" and self.token == "writer"

    def answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def go_online(monkeypatch, tmp_path, address: str, token: str | None) -> None:
    """What HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN_PATH set when the Hub's library is imported, and HF_TOKEN."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)


@contextlib.contextmanager
def serve():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.address = f"http://127.0.0.1:{server.server_port}"
        server.repositories, server.commits = {}, []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serve() as server:
        go_online(monkeypatch, tmp_path, server.address, "writer")
        yield server


def run_options(folder: Path | str, hub_model_id: str | None = None, **fields) -> RunOptions:
    return RunOptions(output_dir=str(folder), push_to_hub=True, hub_model_id=hub_model_id, **fields)


def test_without_push_to_hub_nobody_is_asked(hub, tmp_path):
    assert check_hub(RunOptions(output_dir=str(tmp_path))) is None
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("given", "repo_id"), [(None, "me/dog"), ("cat", "me/cat"), ("me/cat", "me/cat")], ids=["folder", "name", "id"]
)
def test_the_repository_is_there_before_the_training(hub, tmp_path, given, repo_id):
    run = run_options(tmp_path / "dog", given)
    assert check_hub(run) == repo_id
    assert check_hub(run) == repo_id  # of a second run
    assert hub.repositories == {repo_id: {}}


@pytest.mark.parametrize(
    ("token", "given", "words"),
    [
        (None, None, "^--push_to_hub with --output_dir .*no token.*`hf auth login`"),
        ("stale", None, "^--push_to_hub with --output_dir .*does not accept the token.*`hf auth login --force`"),
        ("reader", "cat", "^--hub_model_id cat: the token may not write to cat .*write access"),
        ("writer", "them/new", "^--hub_model_id them/new: the token may not write to them/new"),
        ("writer", "them/theirs", "^--hub_model_id them/theirs: the token may not write to them/theirs"),
        ("writer", "a dog", "^--hub_model_id a dog: 'a dog' is no repository id.*namespace/name"),
        ("writer", "a/b/c", "^--hub_model_id a/b/c: 'a/b/c' is no repository id"),
    ],
)
def test_what_would_fail_after_the_training_fails_before_it(hub, tmp_path, monkeypatch, token, given, words):
    go_online(monkeypatch, tmp_path, hub.address, token)
    with pytest.raises(InputError, match=words):
        check_hub(run_options(tmp_path / "dog", given))
    assert hub.repositories == {}


def test_a_hub_out_of_reach_is_an_error_of_the_user(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        go_online(monkeypatch, tmp_path, address, "writer")
        with pytest.raises(InputError, match=f"{address} is out of reach"):
            check_hub(run_options("dog"))  # nobody listens at the port, and nobody else gets it meanwhile
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        check_hub(run_options("dog"))


def fill(folder: Path, *paths: str) -> dict[str, bytes]:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(path.encode() * 3)
    return {path: path.encode() * 3 for path in paths}


def test_what_the_run_leaves_arrives_without_checkpoints_logs_and_hidden_files(hub, tmp_path):
    folder = tmp_path / "dog"
    left = fill(folder, WEIGHTS_NAME, "grid.png", "unet/config.json", "a.logs")
    fill(folder, "checkpoint-5/state.pt", "checkpoint-10.tmp/state.pt", ".hidden", "unet/.DS_Store")
    fill(folder, "logs/ether-diffusion/events", "logs/wandb/run/x")
    card(folder, ModelSource("someone/model"))
    left |= {name: (folder / name).read_bytes() for name in (CARD_NAME, WEIGHTS_NAME)}
    run = run_options(folder)
    repo_id = check_hub(run)
    assert upload(folder, repo_id, ignore=log_patterns(run)) == f"{hub.address}/me/dog"
    assert hub.repositories == {"me/dog": left}
    assert hub.commits == ["Upload the result of the training"]


def test_logs_are_left_out_wherever_they_are(hub, tmp_path):
    folder = tmp_path / "dog"
    outside = run_options(folder, logging_dir=str(tmp_path / "elsewhere"))
    assert log_patterns(outside) == ()
    for logging_dir, logs in (("a/[logs]", "a/[logs]"), (".", PROJECT), (str(folder / "own"), "own")):
        left = fill(folder, "grid.png", "wandb.txt", "a/l")
        fill(folder, f"{logs}/events")
        run = run_options(folder, logging_dir=logging_dir)
        upload(folder, check_hub(run), ignore=log_patterns(run))
        assert hub.repositories == {"me/dog": left}
        (folder / logs / "events").unlink()


def test_a_failed_upload_says_how_to_repeat_it(hub, tmp_path):
    folder = tmp_path / "dog"
    fill(folder, WEIGHTS_NAME)
    with pytest.raises(
        OSError, match=r"dog is complete, but (.|\n)*to repeat it: hf upload them/theirs .*dog \. --exclude"
    ):
        upload(folder, "them/theirs")
