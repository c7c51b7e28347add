"""Four photographs that scikit-image brings, at the size of Emoji World's pictures: no training shows them."""

from PIL import Image, ImageOps

from dataset.emoji_world import IMAGE_SIZE

NAMES = ("chelsea", "coffee", "astronaut", "rocket")  # a cat, a cup, a woman, a rocket


def photographs() -> dict[str, Image.Image]:
    """By scikit-image's name. Raises ImportError where that package is not installed."""
    from skimage import data

    size = (IMAGE_SIZE, IMAGE_SIZE)
    return {name: ImageOps.fit(Image.fromarray(getattr(data, name)()).convert("RGB"), size) for name in NAMES}
