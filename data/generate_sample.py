"""Generate an image-classification sample: rendered scenes, one shape each, stored as JPEG files.

    python data/generate_sample.py ROOT [--images 4000] [--held-out 1000] [--seed 0]

A class is a shape and nothing else: colours, background, place, rotation, size, clutter, blur, noise and
light are drawn independently of it. Image i of a split depends on (seed, split, i) alone, whatever the
number of worker processes.
"""

import csv
import fcntl
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Annotated

import numpy
import tyro
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from rich.progress import Progress

Floats = NDArray[numpy.float32]
Points = NDArray[numpy.float64]
Patches = list[tuple[Points, bool]]
Random = numpy.random.Generator

VERSION = 1
CLASSES = "arrow", "checker", "crescent", "cross", "disc", "gear", "ring", "spiral", "star", "triangle"
SPLITS = "train", "val"
SUPERSAMPLING = 3
CHUNK = 50
DARK_SHARE = 0.15
MARKER = "generating.lock"
TURN = 2 * numpy.pi


@dataclass(frozen=True)
class Settings:
    """Generate a sample for image classification: rendered scenes in ten classes of shape."""

    root: Annotated[Path, tyro.conf.Positional]
    """Folder to create; a complete sample with the same settings is left as it is."""
    images: int = 4000
    """Training images, at least 10 (one per class)."""
    held_out: int = 1000
    """Held-out images, at least 10 (one per class)."""
    seed: int = 0
    """Seed, 0 to 2**64 - 1."""
    workers: int = 0
    """Worker processes; 0 takes one per usable core. Does not change the result."""


class Refusal(Exception):
    """Why nothing was generated, in one sentence."""


@dataclass(frozen=True)
class Difficulty:
    """What makes one image easy or hard, whatever its class."""

    hardness: float
    """Common part of the values below, 0 (easy) to 1 (hard)."""
    size: float
    """Radius of the shape as a share of the image's shorter side, 0.15 to 0.44."""
    clutter: int
    """Distracting strokes and blobs, 0 to 16, every third one in front of the shape."""
    blur: float
    """Standard deviation of the blur in pixels, 0 to 2.2."""
    contrast: float
    """Distance of the shape's colour from the background's in unit RGB, 0.15 to 0.75."""
    noise: float
    """Standard deviation of the noise as a share of the full range, 0 to 0.12."""


def draw_difficulty(random: Random) -> Difficulty:
    """Draw a common hardness, and as much again for each value of its own."""
    hardness, *own = random.uniform(0, 1, 6).tolist()
    size, clutter, blur, contrast, noise = ((hardness + value) / 2 for value in own)
    return Difficulty(
        hardness=round(hardness, 4),
        size=round(0.46 - 0.22 * size, 4),
        clutter=round(9 * clutter),
        blur=round(2.0 * blur**1.5, 4),
        contrast=round(0.85 - 0.60 * contrast, 4),
        noise=round(0.1 * noise**1.5, 4),
    )


def arc(radius: float | Points, angles: Points) -> Points:
    """Points (x, y) at the given radii and angles in radians around the origin."""
    return numpy.stack([radius * numpy.cos(angles), radius * numpy.sin(angles)], axis=1)


def circle(radius: float, centre: float = 0.0) -> Points:
    """A circle around (centre, 0)."""
    return arc(radius, numpy.linspace(0, TURN, 64, endpoint=False)) + (centre, 0.0)


def checker(cells: int) -> Patches:
    """A square board with that many cells a side, of which every second one is filled."""
    edges = numpy.linspace(-0.8, 0.8, cells + 1)
    filled = [(i, j) for i in range(cells) for j in range(cells) if (i + j) % 2 == 0]
    corners = numpy.array([(0, 0), (0, 1), (1, 1), (1, 0)])
    return [(edges[corners + cell], True) for cell in filled]


def spiral(turns: float, width: float) -> Patches:
    """A band wound around its start; width is a share of the distance between windings."""
    along = numpy.linspace(0, 1, 90)
    half = width / (2 * turns + width)
    middle = half + (1 - 2 * half) * along
    outer, inner = (arc(middle + side * half, along * turns * TURN) for side in (1, -1))
    return [(numpy.concatenate([outer, inner[::-1]]), True)]


def gear(teeth: int, root: float, hub: float) -> Patches:
    """A wheel of trapezoid teeth on a root radius, with a round hub hole."""
    phases = (numpy.arange(teeth)[:, None] + numpy.array([0.0, 0.12, 0.42, 0.54])).ravel()
    return [(arc(numpy.tile([root, 1, 1, root], teeth), phases * TURN / teeth), True), (circle(hub), False)]


def draw_shape(name: str, random: Random) -> Patches:
    """Draw one shape of a class within the unit circle: polygons to fill (True) or cut (False) in turn."""
    a, b, c = random.uniform(0, 1, 3)
    match name:
        case "arrow":
            shaft, head, neck = 0.13 + 0.13 * a, 0.5 + 0.3 * b, 0.4 * c - 0.1
            half = numpy.array([(-1, shaft), (neck, shaft), (neck, head), (1, 0)])
            return [(numpy.concatenate([half, half[-2::-1] * (1, -1)]), True)]
        case "checker":
            return checker(3 + int(3 * a))
        case "crescent":
            return [(circle(1), True), (circle(0.72 + 0.16 * a, 0.42 + 0.2 * b), False)]
        case "cross":
            bar = numpy.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (1, 0.18 + 0.18 * a)
            return [(bar, True), (bar[:, ::-1], True)]
        case "disc":
            return [(circle(1), True)]
        case "gear":
            return gear(teeth=7 + int(6 * a), root=0.68 + 0.1 * b, hub=0.15 + 0.17 * c)
        case "ring":
            return [(circle(1), True), (circle(0.5 + 0.28 * a), False)]
        case "spiral":
            return spiral(turns=1.8 + a, width=0.4 + 0.15 * b)
        case "star":
            spikes = 5 + int(3 * a)
            return [
                (
                    arc(
                        numpy.tile([1, 0.38 + 0.14 * b], spikes), numpy.arange(2 * spikes) * TURN / 2 / spikes
                    ),
                    True,
                )
            ]
        case "triangle":
            return [(arc(1, numpy.arange(3) * TURN / 3 + 0.5 * (numpy.array([a, b, c]) - 0.5)), True)]
    raise ValueError(name)


def place(
    points: Points, middle: Points, angle: float, scale: tuple[float, float], lean: float
) -> list[float]:
    """Scale along two axes that lean, rotate by an angle (radians) and move; flat, for ImageDraw."""
    for turn, factor in ((lean, scale), (angle - lean, (1, 1))):
        rotation = numpy.array([(numpy.cos(turn), numpy.sin(turn)), (-numpy.sin(turn), numpy.cos(turn))])
        points = points @ rotation * factor
    return [float(value) for value in (points + middle).ravel()]


def draw_mask(name: str, difficulty: Difficulty, width: int, height: int, random: Random) -> Floats:
    """Draw the shape somewhere: the share of each pixel it covers, 0 to 1."""
    radius = difficulty.size * min(width, height)
    stretch = random.uniform(0.75, 1.0, 2)
    drift = numpy.maximum(0.47 * numpy.array([width, height]) - radius, 3)
    middle = numpy.array([width, height]) / 2 + random.uniform(-1, 1, 2) * drift
    angle, lean = random.uniform(0, TURN, 2)
    sharp = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    pen = ImageDraw.Draw(sharp)
    for points, filled in draw_shape(name, random):
        corners = place(points * radius, middle, angle, (stretch[0], 1.0), lean)
        pen.polygon([SUPERSAMPLING * value for value in corners], fill=255 if filled else 0)
    return numpy.asarray(sharp.reduce(SUPERSAMPLING), numpy.float32) / 255


def clouds(width: int, height: int, cells: int, random: Random) -> Floats:
    """Smooth random field, about -1 to 1, with that many cells a side."""
    coarse = Image.fromarray(random.uniform(-1, 1, (cells, cells)).astype(numpy.float32))
    return numpy.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def ramp(width: int, height: int, angle: float) -> Floats:
    """Linear field that rises from -1 to 1 along an angle in radians."""
    across, down = numpy.linspace(-1, 1, width), numpy.linspace(-1, 1, height)[:, None]
    field = across * numpy.cos(angle) + down * numpy.sin(angle)
    return numpy.asarray(field / (abs(numpy.cos(angle)) + abs(numpy.sin(angle))), numpy.float32)


def draw_background(colour: Floats, width: int, height: int, random: Random) -> Floats:
    """Paint a wall with a gradient, clouds, often a floor and sometimes stripes around a colour (RGB, 0 to 1)."""
    canvas = numpy.empty((height, width, 3), numpy.float32)
    canvas[:] = colour
    slope, mottle, floor, stripe = random.uniform(0, 0.08, (4, 3)).astype(numpy.float32)
    canvas += ramp(width, height, random.uniform(0, TURN))[..., None] * slope
    canvas += clouds(width, height, int(random.integers(3, 12)), random)[..., None] * mottle
    tilt, level, angle, pitch, phase = random.uniform((1.3, -0.2, 0, 8, 0), (1.85, 0.8, TURN, 30, TURN))
    if random.uniform() < 0.5:
        below = numpy.clip((ramp(width, height, tilt) - level) * height / 2, 0, 1)
        canvas += below[..., None] * (floor - 0.06) * 2
    if random.uniform() < 0.3:
        waves = numpy.sin(ramp(width, height, angle) * pitch + phase)
        canvas += waves[..., None] * stripe * 0.7
    return canvas


def draw_clutter(canvas: Floats, count: int, random: Random) -> Floats:
    """Paint strokes and irregular blobs in colours near those already there."""
    height, width, _ = canvas.shape
    levels = Image.fromarray((numpy.clip(canvas, 0, 1) * 255).astype(numpy.uint8))
    large = levels.resize((width * SUPERSAMPLING, height * SUPERSAMPLING), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(large)
    for _ in range(count):
        x, y, angle, turn = random.uniform((0, 0, 0, 0), (*large.size, TURN, TURN))
        length, thickness = random.uniform((30, 4), (150, 16))
        colour = numpy.array(levels.getpixel((x // SUPERSAMPLING, y // SUPERSAMPLING)))
        fill = tuple(int(v) for v in numpy.clip(colour + random.normal(0, 35, 3), 0, 255))
        if random.uniform() < 0.6:
            bend = numpy.array([(-1, 0), (0, random.uniform(-0.4, 0.4)), (1, 0)]) * length / 2
            pen.line(place(bend, numpy.array([x, y]), angle, (1, 1), 0), fill, int(thickness), "curve")
        else:
            bumps = random.uniform(0.5, 1, 7).repeat(2)
            edge = arc(bumps * length / 3, numpy.arange(14) * TURN / 14)
            pen.polygon(place(edge, numpy.array([x, y]), angle, (random.uniform(0.3, 0.7), 1), turn), fill)
    return numpy.asarray(large.reduce(SUPERSAMPLING), numpy.float32) / 255


def soften(field: Floats, sigma: float) -> Floats:
    """Blur a field of 0 to 1 by about sigma pixels."""
    levels = Image.fromarray((field * 255).astype(numpy.uint8))
    return numpy.asarray(levels.filter(ImageFilter.GaussianBlur(sigma)), numpy.float32) / 255


def pick_colours(contrast: float, random: Random) -> tuple[Floats, Floats]:
    """Draw a background colour and one for the shape at that distance, both RGB in 0 to 1."""
    step = random.normal(1, 0.6, 3)
    step *= contrast / numpy.linalg.norm(step)
    ground = random.uniform(0.08, 0.92 - 0.58 * contrast, 3)
    if random.uniform() < DARK_SHARE:
        ground, step = 1 - ground, -step
    return ground.astype(numpy.float32), numpy.clip(ground + step, 0.02, 0.98).astype(numpy.float32)


def render(seed: int, split: str, index: int) -> tuple[Image.Image, Difficulty]:
    """Render image number `index` of a split; its class is CLASSES[index % 10]."""
    key = numpy.array([seed, SPLITS.index(split) << 32 | index], numpy.uint64)
    random = numpy.random.Generator(numpy.random.Philox(key=key))
    width, height = (int(side) for side in random.integers(96, 129, 2))
    difficulty = draw_difficulty(random)
    ground, colour = pick_colours(difficulty.contrast, random)
    in_front = difficulty.clutter // 3
    canvas = draw_background(ground, width, height, random)
    canvas = draw_clutter(canvas, difficulty.clutter - in_front, random)
    mask = draw_mask(CLASSES[index % 10], difficulty, width, height, random)
    canvas = paint_shape(canvas, mask, colour, random)
    canvas = draw_clutter(canvas, in_front, random)
    return photograph(canvas, difficulty, random), difficulty


def paint_shape(canvas: Floats, mask: Floats, colour: Floats, random: Random) -> Floats:
    """Paint the shape with a bevelled edge, a mottled surface and the shadow it casts."""
    height, width = mask.shape
    light, bevel, shade, mottle = random.uniform((0, 0, 0, 0), (TURN, 1.2, 0.5, 0.12))
    relief = soften(mask, 1.6)
    down, across = numpy.gradient(relief)
    facing = -(numpy.cos(light) * across + numpy.sin(light) * down) * bevel
    surface = colour + (facing + clouds(width, height, 9, random) * mottle)[..., None].astype(numpy.float32)
    offset = (round(4 * numpy.sin(light)), round(4 * numpy.cos(light)))
    shadow = numpy.roll(soften(mask, 2.5), offset, (0, 1)) * numpy.float32(shade)
    return canvas * (1 - shadow * (1 - mask))[..., None] * (1 - mask[..., None]) + surface * mask[..., None]


def photograph(canvas: Floats, difficulty: Difficulty, random: Random) -> Image.Image:
    """Light, blur and add noise to a scene."""
    height, width, _ = canvas.shape
    gain, slope, angle = random.uniform((0.75, 0, 0), (1.15, 0.3, TURN))
    lit = canvas * (gain * (1 + slope * ramp(width, height, angle)))[..., None]
    sharp = Image.fromarray((numpy.clip(lit, 0, 1) * 255).astype(numpy.uint8))
    blurred = numpy.asarray(sharp.filter(ImageFilter.GaussianBlur(difficulty.blur)), numpy.float32)
    grain = random.standard_normal(blurred.shape, numpy.float32) * (255 * difficulty.noise)
    return Image.fromarray(numpy.clip(blurred + grain, 0, 255).astype(numpy.uint8))
