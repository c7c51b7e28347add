"""A cut-out thing on a ground, as pictures of it may look: large or smaller, anywhere, mirrored, turned a little."""

from random import Random

from PIL import Image, ImageOps

from dataset.emoji_world import IMAGE_SIZE

SMALLEST = 0.5  # of the picture's side
LARGEST_TURN = 15  # degrees


def place_plainly(cut_out: Image.Image, rng: Random) -> Image.Image:
    """As it is, large, somewhere on white; RGB, 224 x 224."""
    return _place(cut_out, Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white"), rng.uniform(0.6, 1.0), rng)


def place_variously(cut_out: Image.Image, mirrored: bool, rng: Random) -> Image.Image:
    """Another picture of the same thing; RGB, 224 x 224. mirrored: whether it may be, as a letter may not."""
    if mirrored and rng.random() < 0.5:
        cut_out = ImageOps.mirror(cut_out)
    if rng.random() < 0.5:
        angle = rng.uniform(-LARGEST_TURN, LARGEST_TURN)
        cut_out = cut_out.rotate(angle, expand=True, resample=Image.Resampling.BICUBIC)
    return _place(cut_out, _ground(rng), rng.uniform(SMALLEST, 1.0), rng)


def _ground(rng: Random) -> Image.Image:
    """Every other one white, the others from one light colour to one like it."""
    if rng.random() < 0.5:
        return Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
    first = tuple(rng.randint(90, 255) for _ in range(3))
    second = tuple(max(0, min(255, channel + rng.randint(-60, 60))) for channel in first)
    plain = [Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), colour) for colour in (first, second)]
    slope = Image.linear_gradient("L").resize((IMAGE_SIZE, IMAGE_SIZE)).rotate(rng.choice((0, 90, 180, 270)))
    return Image.composite(*plain, slope)


def _place(cut_out: Image.Image, ground: Image.Image, scale: float, rng: Random) -> Image.Image:
    """scale: of the thing's longer side to the ground's."""
    factor = scale * IMAGE_SIZE / max(cut_out.size)
    size = tuple(max(1, round(side * factor)) for side in cut_out.size)
    cut_out = cut_out.resize(size, Image.Resampling.LANCZOS)
    ground.paste(cut_out, tuple(rng.randint(0, IMAGE_SIZE - side) for side in size), cut_out)
    return ground
