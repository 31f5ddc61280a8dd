"""Plots and photographs as text that stands inside an HTML page."""

import base64
import io
import re
from pathlib import Path

import matplotlib
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

INK = "#010203"  # stands for the page's text colour until the SVG is in the page
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
DASHES = ("-", "--", ":", "-.")
QUALITY = 82  # JPEG


def line(table: pd.DataFrame, name: str) -> Markup:
    """The last column against `step`; `name` keeps the plots of a page apart."""
    figure, axes = blank(3.6, 2.2)
    axes.plot(table["step"], table.iloc[:, -1], color=COLORS[0], linewidth=1.5)
    axes.set(xlabel="step")
    return svg(figure, name)


def blank(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    """An empty plot in the page's style."""
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def svg(figure: Figure, name: str) -> Markup:
    """The figure as inline SVG in the page's own ink; `name` keeps the ids of plots apart."""
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    text = drawn.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return Markup(text)  # noqa: S704 - matplotlib escapes the text it draws


def picture(file: Path, width_px: int, quality: int = QUALITY) -> str:
    """An image file as a data URI, at most `width_px` wide."""
    with Image.open(file) as image:
        return encode(image.convert("RGB"), width_px, quality)


def encode(image: Image.Image, width_px: int, quality: int = QUALITY) -> str:
    """An image as a JPEG data URI, at most `width_px` wide."""
    if image.width > width_px:
        height = max(1, round(image.height * width_px / image.width))
        image = image.resize((width_px, height), Image.Resampling.LANCZOS)
    coded = io.BytesIO()
    image.save(coded, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(coded.getvalue()).decode()
