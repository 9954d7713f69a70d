"""Web page, served to this machine only, that shows the predictions of one or two runs for an image."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from PIL import Image
from rich.console import Console

from starseg.data.images import SUFFIXES, image_size
from starseg.engine.checkpoint import StepInfo, load_info
from starseg.errors import UserError
from starseg.inference.files import class_shares, draw_overlay, mask_png
from starseg.inference.predictor import Prediction, Predictor, load
from starseg.report.cases import css_colour
from starseg.report.templating import template
from starseg.report.testset import finished_steps

HOST = "127.0.0.1"
MEGABYTES, MEGAPIXELS = 50, 40
LIMITS = f"At most {MEGABYTES} MB and {MEGAPIXELS} megapixels."
# The browser refuses what would come from another machine, or go there.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"  # gr.HTML compiles its template
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
_STYLE = """
.shares { width: 100%; max-width: 30rem; border-collapse: collapse; }
.shares, .shares tr { border: 0 !important; }
.shares tr > * { border: 0; border-bottom: 1px solid var(--border-color-primary); padding: 3px 0 3px 8px; }
.shares tr > * { text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.shares tr > :first-child { text-align: left; padding-left: 0; }
.shares th { font-size: .85em; font-weight: normal; vertical-align: bottom; }
.shares i { display: inline-block; width: .9em; height: .9em; margin-right: .5em; border: 1px solid; }
[role=alert] { color: var(--error-text-color); font-weight: 600; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Side:
    """Run, or one step of it, shown on the page.

    Attributes:
        label: what it is called there.
        steps: the folder and model.json of each of its steps, by number.
    """

    label: str
    steps: dict[int, tuple[Path, StepInfo]]

    def at(self, number: int) -> tuple[Path, StepInfo]:
        """Return the step with this number, or the nearest one."""
        return self.steps[min(self.steps, key=lambda step: abs(step - number))]


@dataclass(frozen=True)
class View:
    """Prediction of one side for an image.

    Attributes:
        caption: run, step and what the step learnt.
        overlay: the image, tinted.
        mask: file for downloading.
        percent: share of the pixels by class; the classes are those learnt so far.
    """

    caption: str
    overlay: Image.Image
    mask: Path
    percent: dict[str, float]


def open_side(path: Path) -> Side:
    """Read the metadata of a run directory or step directory, without weights.

    Raises:
        UserError: neither of them, or a damaged model.json.
    """
    folders = [path] if (path / "model.json").is_file() else finished_steps(path)
    steps = {info.step: (folder, info) for folder in folders for info in [load_info(folder)]}
    return Side("/".join(path.resolve().parts[-2:]), steps)


@lru_cache(maxsize=4)
def _predictor(folder: Path) -> Predictor:
    return load(folder)


@lru_cache(maxsize=6)
def segment(image: Path, folder: Path) -> tuple[Prediction, Path]:
    """Segment an image file with a step, and write the mask into a new folder next to the image.

    Raises:
        UserError: too many pixels, not an image, or a damaged model.
    """
    height, width = image_size(image, whole=False)
    if height * width > MEGAPIXELS * 10**6:
        raise UserError(f"{image}: {width}x{height} pixels are more than {MEGAPIXELS} megapixels; make it smaller")
    (done,) = _predictor(folder).stream([image])
    if done.error:
        raise done.error
    file = Path(mkdtemp(dir=image.parent)) / f"{image.stem}.png"
    file.write_bytes(mask_png(done.mask, _predictor(folder).palette))
    return done, file


def view(side: Side, image: Path, number: int, wanted: Sequence[str]) -> View:
    """Render a side at a step; only ``wanted`` classes are coloured.

    Raises:
        UserError: as :func:`segment`.
    """
    folder, info = side.at(number)
    done, file = segment(image, folder)
    names, background = info.predictable, info.predicted_ids[0]
    shown = [i for i, name in names.items() if name in wanted]
    mask = np.where(np.isin(done.mask, shown), done.mask, background).astype(np.uint8)
    image_hwc, palette = done.image.permute(1, 2, 0).numpy(), _predictor(folder).palette
    overlay = draw_overlay(image_hwc, mask, names, palette, background)
    learnt = ", ".join(info.names[-info.head_sizes[-1] :])
    return View(f"{side.label}, step {info.step}: {learnt}", overlay, file, class_shares(done.mask, names))


def _all_classes(sides: Sequence[Side]) -> dict[str, int]:
    """Return dataset ids by name, the background first, then in the order of learning."""
    infos = [info for side in sides for _, info in side.steps.values()]
    return {name: i for info in reversed(infos) for name, i in zip(info.names, info.dataset_ids, strict=True)}


def _shares_table(sides: Sequence[Side], views: Sequence[View]) -> str:
    rows = [(name, css_colour(i), [v.percent.get(name) for v in views]) for name, i in _all_classes(sides).items()]
    return template("shares.html.j2").render(heads=[side.label for side in sides], rows=rows)


def _gradio() -> Any:
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"app needs the package {error.name}, which is missing; pip install 'starseg[app]'") from error
    return gradio


def build_page(sides: Sequence[Side]) -> Any:
    """Build the page as gradio Blocks."""
    gr = _gradio()
    numbers = sorted({number for side in sides for number in side.steps})
    classes = list(_all_classes(sides))[1:]

    def show(upload: str | None, number: int, wanted: list[str]) -> list[Any]:
        """Return the values of the status, the table, and each side's caption, picture and button."""
        empty = [part for side in sides for part in (escape(side.label), None, gr.DownloadButton(interactive=False))]
        if upload is None:
            return [gr.HTML(visible=False), "", *empty]
        image = Path(upload)
        try:
            views = [view(side, image, number, wanted) for side in sides]
        except UserError as error:
            text = str(error).replace(upload, image.name)
            return [gr.HTML(Markup('<p role="alert">{}</p>').format(text), visible=True), "", *empty]
        parts = [
            p for v in views for p in (escape(v.caption), v.overlay, gr.DownloadButton(value=v.mask, interactive=True))
        ]
        return [gr.HTML(visible=False), _shares_table(sides, views), *parts]

    with gr.Blocks(title="starseg", analytics_enabled=False) as page, gr.Row():
        with gr.Column(scale=2, min_width=280):
            upload = gr.File(label="Image", file_types=list(SUFFIXES), height=160)
            gr.Markdown(f"{LIMITS} It does not leave this machine.")
            status = gr.HTML(visible=False, padding=False)
            if len(numbers) > 1:
                step = gr.Slider(numbers[0], numbers[-1], numbers[-1], step=1, label="Step")
            else:
                step = gr.State(numbers[0])
            chosen = gr.CheckboxGroup(classes, value=classes, label="Classes")
        with gr.Column(scale=5, min_width=280):
            parts = []
            with gr.Row():
                for side in sides:
                    with gr.Column(min_width=280):
                        parts.append(gr.HTML(escape(side.label), padding=False))
                        parts.append(
                            gr.Image(show_label=False, interactive=False, format="jpeg", buttons=["fullscreen"])
                        )
                        parts.append(gr.DownloadButton("Mask (PNG)", interactive=False, size="sm"))
            table = gr.HTML(padding=False)
        gr.on(
            [upload.change, step.change, chosen.change],
            show,
            [upload, step, chosen],
            [status, table, *parts],
            trigger_mode="always_last",
            show_progress_on=parts[1::3],
            api_visibility="private",
        )
    return page


def make_app(sides: Sequence[Side]) -> Any:
    """Build the ASGI application, whose headers restrict the browser to this machine."""
    gr = _gradio()
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # A page of another site cannot reach this one under a name of its own.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])

    @app.middleware("http")
    async def stay_here(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = _POLICY
        return response

    return gr.mount_gradio_app(
        app,
        build_page(sides),
        "/",
        server_name=HOST,
        footer_links=[],
        show_error=False,
        max_file_size=MEGABYTES * 10**6,
        ssr_mode=False,
        theme=gr.themes.Base(**_FONTS),
        css=_STYLE,
    )


def listen(port: int) -> socket.socket:
    """Open a listening socket on the loopback address; port 0 means any free port.

    Raises:
        UserError: the port is taken, or not allowed.
    """
    here = socket.socket()
    here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        here.bind((HOST, port))
        here.listen()
    except OSError as error:
        here.close()
        raise UserError(
            f"--port {port}: cannot be used on {HOST} ({error.strerror}); give another one, or 0 for any free one"
        ) from error
    return here


def serve(paths: Sequence[Path], port: int, console: Console) -> None:
    """Serve the page of one or two runs until Ctrl-C or SIGTERM, then remove uploaded files.

    Raises:
        UserError: no run, no gradio, a port that is taken.
    """
    sides = [open_side(path) for path in paths]
    _gradio()
    import uvicorn

    with listen(port) as here, TemporaryDirectory(prefix="starseg-app-") as folder, suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        os.environ["GRADIO_TEMP_DIR"] = folder
        app = make_app(sides)
        console.print(f"http://{HOST}:{here.getsockname()[1]} (Ctrl-C ends it)", highlight=False, soft_wrap=True)
        # Open pages keep a connection; uvicorn would wait for them, then log that it did not.
        uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)).run([here])
