"""What an owner has generated today: a gallery, and all of it as one archive."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from ether_diffusion.demo.panels import Update, connect_download
from ether_diffusion.demo.results import Results
from ether_diffusion.demo.server import owner_of


class History:
    """Built where it is made; `refresh` shows it as it is now.

    Args:
        name: the id of the gallery; the button has `<name>-download`.
    """

    def __init__(self, results: Results, name: str):
        self.results = results
        with gr.Accordion("Images of today", open=False, elem_id=f"{name}-fold"):
            self.gallery = gr.Gallery(
                label="The newest first",
                columns=6,
                height="auto",
                format="png",
                object_fit="contain",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id=name,
                elem_classes=["ether-images", "ether-history"],
            )
            self.all = gr.Button("Download all", size="sm", interactive=False, elem_id=f"{name}-download")
            self.file = connect_download(self.all, self.download, None, [], api_name="download_all")

    def connect(self, done: gr.events.Dependency) -> None:
        """Show it anew after an event."""
        quiet = {"api_name": False, "show_progress": "hidden"}
        done.then(self.refresh, None, self.shown, **quiet)

    @property
    def shown(self) -> list[gr.components.Component]:
        """What `refresh` updates."""
        return [self.gallery, self.all]

    def refresh(self, request: gr.Request) -> Update:
        images = self.results.history(owner_of(request))
        return {
            self.gallery: [(path, Path(path).stem) for path in images],
            self.all: gr.update(interactive=bool(images)),
        }

    def download(self, request: gr.Request) -> Update:
        archive = self.results.archive(owner_of(request))
        return {self.file: archive and str(archive)}
