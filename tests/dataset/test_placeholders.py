"""A row of text in a parquet has a picture all the same, tiny and of one colour: MiniMind's sft_i2t.parquet."""

import json

import pytest
from PIL import Image

from dataset.readers.opening import read_samples
from dataset.samples import BadSample
from helpers.data import BLACK, encoded, make_picture, turns, write_parquet

PLAIN = encoded(Image.new("RGB", (8, 8), (200, 10, 10)))


@pytest.mark.parametrize(
    "picture",
    [BLACK, PLAIN, encoded(Image.new("L", (16, 16))), encoded(Image.new("P", (1, 1)))],
    ids=["black JPEG", "red PNG", "16 x 16", "1 x 1"],
)
def test_a_tiny_picture_of_one_colour_without_a_tag_is_a_row_of_text(picture, tmp_path):
    texts = [json.dumps(turns(0)), json.dumps(turns(1))]
    samples = read_samples(write_parquet(tmp_path / "a.parquet", texts, [picture, picture]))
    assert samples[0].messages == turns(0) and samples[0].pictures == ()
    assert samples[1].pictures == (picture,)  # where a tag asks for it, it is a picture


@pytest.mark.parametrize("pictures", [
    [encoded(make_picture(0, 8))], [encoded(Image.new("RGB", (17, 8)))], [encoded(Image.new("RGB", (64, 64)), "JPEG")],
    [BLACK, BLACK], [b"no picture"], [BLACK[:100]], [encoded(Image.new("RGB", (8, 8)), "JPEG", comment=bytes(5000))],
], ids=["noise", "17 x 8", "64 x 64", "two", "no picture", "half", "many bytes"])  # fmt: skip
def test_any_other_picture_without_a_tag_stays_an_error(pictures, tmp_path):
    samples = read_samples(write_parquet(tmp_path / "a.parquet", [json.dumps(turns(0))], [pictures]))
    with pytest.raises(
        BadSample, match=f"holds 0 <image> but the sample has {len(pictures)} pictures?: make them equal"
    ):
        samples[0]
