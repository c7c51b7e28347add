"""A picture cut into tiles: whole, unsqueezed, in the grid that shows the most of it, each tile with its place."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers.data import TURNS, make_picture, turns
from helpers.models import IMAGE_SIZE, IMAGE_TOKENS
from model.pictures import SampleError, open_picture, upright_size
from model.processing import VLMProcessor
from model.views import BEYOND, UNCUT, Grid, Sight

SIDES = st.integers(1, 3000)


def cutting(tokenizer, tiles: int = 4) -> VLMProcessor:
    return VLMProcessor(tokenizer, IMAGE_TOKENS, IMAGE_SIZE, tiles=tiles)


@given(SIDES, SIDES, st.integers(1, 20))
def test_no_other_grid_shows_more_of_a_picture(width, height, tiles):
    side = 224
    grid = Sight(side, tiles=tiles).grid(width, height)
    if max(width, height) <= side:
        assert grid == UNCUT
        return

    def kept(rows: int, columns: int) -> int:
        scale = min(rows * side / height, columns * side / width)
        return min(width, max(1, round(width * scale))) * min(height, max(1, round(height * scale)))

    counts = [(rows, columns) for rows in range(1, tiles + 1) for columns in range(1, tiles + 1)]
    best = max(kept(*count) for count in counts if count[0] * count[1] <= tiles)
    assert grid.rows * grid.columns <= tiles
    assert kept(grid.rows, grid.columns) == best
    fewest = min(rows * columns for rows, columns in counts if kept(rows, columns) == best)
    assert grid.rows * grid.columns == fewest
    if grid != UNCUT:  # scaled alike in both directions, within the tiles
        assert grid.width <= grid.columns * side and grid.height <= grid.rows * side
        scale = min(grid.rows * side / height, grid.columns * side / width)
        assert abs(grid.width - width * scale) <= 0.5 or grid.width == 1
        assert abs(grid.height - height * scale) <= 0.5 or grid.height == 1


@given(SIDES, SIDES, st.integers(1, 20))
def test_what_is_kept_of_a_picture_is_cut_as_the_picture_is(width, height, tiles):
    sight = Sight(224, tiles=tiles)
    grid = sight.grid(width, height)
    if grid != UNCUT and width > grid.width:
        assert sight.grid(grid.width, grid.height) == grid


@pytest.mark.parametrize(
    ("size", "tiles", "grid"),
    [
        ((896, 896), 16, (4, 4)),
        ((896, 896), 15, (3, 3)),
        ((896, 448), 16, (2, 4)),
        ((448, 448), 16, (2, 2)),
        ((224, 100), 16, (1, 1)),
        ((300, 100), 16, (1, 2)),
        ((4000, 3000), 12, (3, 4)),
    ],
)
def test_grids_fit_the_shape(size, tiles, grid):
    assert Sight(224, tiles=tiles).grid(*size)[:2] == grid


def test_tiles_put_together_are_the_picture():
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (50, 90, 3), dtype=np.uint8))
    sight = Sight(32, tiles=6)
    grid = sight.grid(90, 50)
    assert grid == Grid(2, 3, 96, 53)
    whole, *tiles = map(np.asarray, sight.views(picture, grid))
    assert np.array_equal(whole, np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)))
    rows = [np.concatenate(tiles[3 * row : 3 * row + 3], axis=1) for row in range(2)]
    canvas = np.concatenate(rows)
    assert np.array_equal(canvas[:53], np.asarray(picture.resize((96, 53), Image.Resampling.BICUBIC)))
    assert (canvas[53:] == BEYOND).all()
    assert grid.headings == ("whole:", "1,1:", "1,2:", "1,3:", "2,1:", "2,2:", "2,3:")
    small = sight.views(sight.reduced(picture), grid)
    assert len(small) == 7


def test_views_stand_in_order_behind_their_places(tokenizer):
    processor, picture = cutting(tokenizer), make_picture(1, 50)
    grid = processor.sight.grid(*picture.size)
    rendered = processor.render(TURNS, headings=[grid.headings])
    text = tokenizer.decode(rendered.input_ids)
    span = "@" * IMAGE_TOKENS
    assert f"whole:{span}1,1:{span}1,2:{span}2,1:{span}2,2:{span}\nWhat is it?" in text
    assert rendered.image_mask.sum() == 5 * IMAGE_TOKENS and not rendered.trained[rendered.image_mask].any()
    plain = VLMProcessor(tokenizer, IMAGE_TOKENS, IMAGE_SIZE).render(TURNS)
    assert rendered.trained.sum() == plain.trained.sum()  # no place is learnt


def test_without_tiles_nothing_changes(tokenizer, processor):
    picture = make_picture(1, 50)
    assert processor.sight.grid(*picture.size) == UNCUT
    assert processor.render(TURNS, headings=[UNCUT.headings]) == processor.render(TURNS)
    (view,) = processor.views(picture)
    assert torch.equal(view, processor.pixels(picture))
    assert processor.fingerprint() != cutting(tokenizer).fingerprint() != cutting(tokenizer, 5).fingerprint()


def test_pictures_and_places_are_counted(tokenizer):
    processor = cutting(tokenizer)
    with pytest.raises(SampleError, match="the text holds 1 <image> but there are 2 pictures"):
        processor.prompts([(TURNS, [make_picture(1, 50), make_picture(2)])])
    inputs = processor.prompts([(turns(2), [make_picture(1, 50), make_picture(2)])])
    assert inputs["pixel_values"].shape[:2] == (1, 6)  # the second is small: one view


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_header_tells_how_a_turned_picture_is_cut(tokenizer, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (90, 40)).save(tmp_path / "a.jpg", exif=exif)
    header = open_picture(tmp_path / "a.jpg", decode=False)
    assert upright_size(header) == open_picture(tmp_path / "a.jpg").size
