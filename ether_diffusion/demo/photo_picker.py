"""Photographs to train on: shown once, the bad ones marked, cropped by dragging, each with a caption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ether_diffusion.demo.markup import status
from ether_diffusion.demo.panels import Update
from ether_diffusion.demo.photos import BAD, mark_bad, read_photo
from ether_diffusion.demo.results import Results
from ether_diffusion.demo.server import owner_of
from ether_diffusion.errors import InputError
from ether_diffusion.miniature.world import Subject, subjects

LARGEST = 2048
"""Pixels a side of what is kept of a photo."""
DRAWN = 5
"""Images of a drawn subject."""
ONLY_DRAWN = (
    "This base model knows its own drawn world alone: photographs become mush. Try one of its subjects; for "
    "photographs start the demo with `--base`."
)
Shown = list[tuple[str, str | None]]
"""Photos as a gallery has them: a file and what is written under it."""


class PhotoPicker:
    """Built where it is made. `gallery` and `captions` are inputs of a training; `chosen` reads the first."""

    def __init__(self, results: Results, *, is_miniature: bool):
        self.results = results
        self.examples: list[tuple[gr.Button, Subject]] = []
        if is_miniature:
            with gr.Column(elem_id="examples"):
                gr.Markdown(ONLY_DRAWN)
                with gr.Row():
                    for subject in subjects()[::3]:
                        button = gr.Button(f"A drawn {subject.class_name}", size="sm", min_width=90)
                        self.examples.append((button, subject))
        self.gallery = gr.Gallery(
            label="Photos; choose one to crop it",
            type="filepath",
            file_types=["image", ".heic", ".heif"],
            columns=4,
            height="auto",
            interactive=True,
            allow_preview=False,
            preview=False,
            buttons=[],
            elem_id="photos",
            elem_classes="ether-adapters",
        )
        self.told = gr.HTML(visible=False, elem_id="photos-status")
        self.index = gr.State(None)  # of the photo that is cropped
        with gr.Column(visible=False, elem_id="cropping") as self.cropping:
            self.editor = gr.ImageEditor(
                label="Drag the corners",
                type="pil",
                image_mode="RGB",
                sources=(),
                transforms=("crop",),
                layers=False,
                format="png",
                elem_id="crop",
            )
            with gr.Row():
                self.keep = gr.Button("Keep this part", size="sm", elem_id="keep-crop")
                self.leave = gr.Button("Leave it as it was", size="sm", elem_id="leave-crop")
        with gr.Accordion("Captions", open=False):
            self.captions = gr.Textbox(
                label="One line for each photo",
                info="An empty line takes the words above",
                lines=4,
                max_lines=8,
                elem_id="captions",
            )

    def connect(self, name: gr.Textbox, word: gr.Textbox) -> None:
        hidden = {"api_name": False, "show_progress": "hidden"}
        self.gallery.upload(
            self.prepare, self.gallery, [self.gallery, self.told], api_name="photos", show_progress="hidden"
        )
        self.gallery.select(self.open, self.gallery, [self.editor, self.index, self.cropping, self.told], **hidden)
        crop = [self.gallery, self.index, self.editor]
        self.keep.click(self.crop, crop, [self.gallery, self.cropping, self.told], api_name="crop")
        self.leave.click(lambda: gr.update(visible=False), None, self.cropping, **hidden)
        for button, subject in self.examples:
            outputs = [self.gallery, self.told, name, word]
            button.click(self.drawing(subject), None, outputs, **hidden)

    def prepare(self, shown: Shown | None, request: gr.Request) -> Update:
        """Photos as they would be trained on, upright and in a format that browsers show; the bad ones marked."""
        folder, kept, bad = self._folder(request), [], []
        for k, (path, caption) in enumerate(shown or []):
            if Path(path).stem.endswith(BAD):
                kept.append((path, caption))
                continue
            target = folder / f"{k}-{Path(path).stem[:40]}.png"
            try:
                read_photo(path, LARGEST).save(target)
                kept.append((str(target), None))
            except InputError as error:
                bad.append(str(error))
                kept.append((str(mark_bad(target)), f"✗ {Path(path).name}"))
        told = " ".join([*bad, "Remove what is marked with ✗."]) if bad else ""
        return {self.gallery: kept, self.told: _line(told)}

    def _folder(self, request: gr.Request) -> Path:
        """A new one, below those in which the history looks for images."""
        folder = self.results.folder(owner_of(request)) / "photos"
        folder.mkdir()
        return folder

    def chosen(self, shown: Shown | None) -> list[str]:
        """The files of the photos.

        Raises:
            InputError: a marked one is among them.
        """
        paths = [path for path, _ in shown or []]
        if bad := [path for path in paths if Path(path).stem.endswith(BAD)]:
            raise InputError(f"Photos: remove what is marked with ✗ ({len(bad)} of {len(paths)}) first")
        return paths

    def open(self, shown: Shown | None, selected: gr.SelectData) -> Update:
        """A photo in the editor."""
        path = (shown or [])[selected.index][0]
        if Path(path).stem.endswith(BAD):
            return {self.told: _line("This one cannot be read; remove it with its ×."), self.cropping: gr.skip()}
        return {
            self.editor: read_photo(path, LARGEST),
            self.index: selected.index,
            self.cropping: gr.update(visible=True),
        }

    def crop(self, shown: Shown | None, index: int | None, drawn: dict | None, request: gr.Request) -> Update:
        """The photos, with the part in the place of the photo that it was cut from."""
        part: Image.Image | None = (drawn or {}).get("composite")
        if not shown or index is None or not 0 <= index < len(shown) or part is None:
            raise gr.Error("Crop: choose a photo first", visible=False, print_exception=False)
        path = self._folder(request) / f"{Path(shown[index][0]).stem[:40]}-cut.png"
        part.convert("RGB").save(path)
        photos = [*shown[:index], (str(path), None), *shown[index + 1 :]]
        return {self.gallery: photos, self.cropping: gr.update(visible=False), self.told: _line("")}

    def drawing(self, subject: Subject) -> Callable[[gr.Request], tuple[Any, ...]]:
        """What draws a subject of the miniature's world, and says what it is called."""

        def draw(request: gr.Request) -> tuple[Any, ...]:
            folder, photos = self._folder(request), []
            for k in range(DRAWN):
                path = folder / f"{subject.name}-{k}.png"
                subject.view(k).render().image.save(path)
                photos.append((str(path), None))
            return photos, _line(""), f"my-{subject.class_name}", subject.class_name

        return draw


def _line(text: str) -> Any:
    return gr.update(value=status(text) if text else "", visible=bool(text))
