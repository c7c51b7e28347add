"""Pictures that look the same are found, others are not: scenes of Emoji World, and noise as photographs have it."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from dataset.emoji_world import render, sample_scene
from scripts.data.check.lookalikes import Lookalikes, thumbnail

SCENES, COPIED = 300, 60


def photograph(seed: int) -> Image.Image:
    """Noise whose energy falls with its frequency, as in photographs, in colours that go together."""
    chance, side = np.random.default_rng(seed), 160
    frequencies = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequencies[0, 0] = 1
    common, channels = chance.normal(size=(side, side)), []
    for _ in range(3):
        noise = np.fft.ifft2(np.fft.fft2(common + 0.6 * chance.normal(size=(side, side))) / frequencies**1.1).real
        channels.append((noise - noise.mean()) / noise.std() * chance.uniform(30, 60) + chance.uniform(80, 170))
    return Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8))


def encoded_anew(picture: Image.Image, kind: str, **options) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return Image.open(file).convert("RGB")


COPIES = {
    "JPEG at 40": lambda picture: encoded_anew(picture, "JPEG", quality=40),
    "WEBP at 50": lambda picture: encoded_anew(picture, "WEBP", quality=50),
    "GIF": lambda picture: encoded_anew(picture.convert("P"), "GIF"),
    "half the size": lambda picture: picture.resize((112, 112), Image.Resampling.BICUBIC),
    "500 pixels wide": lambda picture: encoded_anew(picture.resize((500, 500)), "JPEG", quality=90),
    "other proportions": lambda picture: picture.resize((320, 200), Image.Resampling.BILINEAR),
    "5 % brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.05),
    "5 % darker": lambda picture: ImageEnhance.Brightness(picture).enhance(0.95),
    "darker, smaller, JPEG at 60": lambda picture: encoded_anew(
        ImageEnhance.Brightness(picture.resize((150, 150))).enhance(0.95), "JPEG", quality=60
    ),
}


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    scenes = [render(sample_scene(1, "train", number, 128))[0] for number in range(SCENES)]
    return scenes + [photograph(seed) for seed in range(COPIED)]


@pytest.fixture(scope="module")
def met(pictures) -> tuple[Lookalikes, list[int | None]]:
    """All of them, and for each what an earlier one was taken for it."""
    known, similar = Lookalikes(), []
    for number, picture in enumerate(pictures):
        small = thumbnail(picture)
        similar.append(known.find(small))
        known.add(number, small)
    return known, similar


def test_no_scene_and_no_photograph_looks_like_another(met):
    assert set(met[1]) == {None}


@pytest.mark.parametrize("change", COPIES)
def test_copies_are_found(change, met, pictures):
    numbers = [*range(COPIED), *range(SCENES, SCENES + COPIED)]
    found = [met[0].find(thumbnail(COPIES[change](pictures[number]))) for number in numbers]
    wrong = [(number, other) for number, other in zip(numbers, found, strict=True) if other not in (number, None)]
    assert not wrong and found.count(None) <= 0.04 * len(numbers)


def test_plain_grounds_are_told_apart_by_their_colour_and_light():
    known = Lookalikes()
    colours = [(0, 0, 0), (255, 255, 255), (128, 128, 128), (200, 40, 40), (40, 200, 40), (40, 40, 200)]
    for number, colour in enumerate(colours):
        small = thumbnail(Image.new("RGB", (64, 64), colour))
        assert known.find(small) is None
        known.add(number, small)
    for number, colour in enumerate(colours):
        noisy = np.array(Image.new("RGB", (300, 100), colour)) + np.random.default_rng(0).integers(-2, 3, (100, 300, 3))
        assert known.find(thumbnail(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))) == number


def test_few_pictures_share_a_hash():
    """So the work does not grow with the square of the pictures: 3,000 of coarse noise."""
    known = Lookalikes()
    for number in range(3000):
        small = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        known.add(number, small.tobytes())
    assert len(known.cells) > 1500 and max(map(len, known.cells.values())) < 30
