"""Choosing adapters: a gallery that one clicks, a list for several at once, and a strength for each."""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr

from ether_diffusion.demo.library import Adapter
from ether_diffusion.demo.markup import STRENGTH_NOTE, placeholder, thumbnail, tooltip
from ether_diffusion.demo.panels import Update
from ether_diffusion.demo.settings import HIGHEST_STRENGTH, MOST_ADAPTERS
from ether_diffusion.demo.worker import Worker


class AdapterPicker:
    """Built where it is made. Attributes `names` and `strengths`: what is chosen; `fill` puts a click into effect."""

    def __init__(self, worker: Worker):
        self.worker = worker
        offered = worker.usable()
        shown = self._found("")
        self.search = gr.Textbox(
            label="Adapters", placeholder="Filter by name or prompt", elem_id="adapter-filter", max_length=100
        )
        self.gallery = gr.Gallery(
            self._tiles(shown),
            show_label=False,
            label="Adapters on offer",
            columns=4,
            height="auto",
            allow_preview=False,
            preview=False,
            interactive=False,
            buttons=[],
            format="png",
            elem_id="adapter-gallery",
            elem_classes="ether-adapters",
        )
        self.unfit = gr.HTML(**self._describe_unfit(), elem_id="adapters-unfit")
        self.shown = gr.State([each.name for each in shown])
        self.names = gr.Dropdown(
            offered,
            value=offered[-1:],
            multiselect=True,
            max_choices=MOST_ADAPTERS,
            label=f"In use, up to {MOST_ADAPTERS}, in this order",
            elem_id="adapters",
        )
        self.strengths = [
            gr.Slider(0, HIGHEST_STRENGTH, value=1.0, step=0.05, **labels) for labels in strength_labels(offered[-1:])
        ]
        gr.HTML(tooltip("What do strengths mean?", STRENGTH_NOTE))

    def connect(self, prompt: gr.Textbox) -> None:
        """Let a click choose an adapter and write the prompt that it was trained with."""
        quiet = {"api_name": False, "show_progress": "hidden"}
        self.search.change(self.filter, self.search, [self.gallery, self.shown], trigger_mode="always_last", **quiet)
        self.gallery.select(self._choose, self.shown, [self.names, prompt], **quiet)
        self.names.change(
            lambda names: [gr.update(**labels) for labels in strength_labels(names or [])],
            self.names,
            self.strengths,
            queue=False,
            **quiet,
        )

    def filter(self, text: str | None) -> Update:
        """Those whose name or prompt has a text in it."""
        found = self._found(text or "")
        return {self.gallery: gr.update(value=self._tiles(found)), self.shown: [each.name for each in found]}

    def refresh(self, text: str | None) -> Update:
        """As the folder is now."""
        return {
            **self.filter(text),
            self.names: gr.update(choices=self.worker.usable()),
            self.unfit: gr.update(**self._describe_unfit()),
        }

    @property
    def refreshed(self) -> list[gr.components.Component]:
        """What `refresh` updates."""
        return [self.gallery, self.shown, self.names, self.unfit]

    def fill(self, name: str) -> Update:
        """One adapter alone is in use."""
        return {self.names: gr.update(choices=self.worker.usable(), value=[name])}

    def _choose(self, shown: list[str], clicked: gr.SelectData) -> tuple[list[str], str]:
        name = shown[clicked.index]
        return [name], self.worker.library.get(name).prompt or gr.skip()

    def _found(self, text: str) -> list[Adapter]:
        usable, wanted = set(self.worker.usable()), text.casefold()
        return [
            each
            for each in self.worker.library.adapters()
            if each.name in usable and (wanted in each.name.casefold() or wanted in each.prompt.casefold())
        ]

    @staticmethod
    def _tiles(adapters: Sequence[Adapter]) -> list:
        return [(thumbnail(each.image) or placeholder(), each.name) for each in adapters]

    def _describe_unfit(self) -> dict[str, object]:
        """Why the others are not on offer."""
        usable = {*self.worker.usable(), *self.worker.usable(control=True)}
        others = [each for each in self.worker.library.adapters() if each.name not in usable]
        lines = "\n".join(f"{each.name}: {self.worker.fit(each)}" for each in others)
        text = tooltip(f"{len(others)} more in the folder cannot be used here", lines)
        return {"value": text, "visible": bool(others)}


def strength_labels(names: Sequence[str]) -> list[dict[str, object]]:
    """Label and visibility of each strength."""
    return [
        {"label": f"Strength of {names[k]}" if k < len(names) else f"Strength {k + 1}", "visible": k < len(names)}
        for k in range(MOST_ADAPTERS)
    ]
