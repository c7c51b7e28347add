"""A picture in a request: its bytes are in its address, or it is fetched from a host that the server allows."""

import base64

from PIL import Image

from model.pictures import SampleError
from scripts.server.addresses import AllowedHosts, is_web_address
from scripts.server.errors import Refused
from scripts.server.limits import MEGABYTE, Limits, decode_picture


def read_picture(url: str, where: str, limits: Limits, hosts: AllowedHosts) -> Image.Image:
    """RGB. where: as messages[2].content[0]. Raises Refused."""
    place = f"{where}.image_url.url"
    if url[:5].lower() == "data:":
        content = from_data_url(url, place, limits)
    elif is_web_address(url):
        content = hosts.fetch(url, place, limits)
    else:
        raise Refused("is no address of a picture: send `data:image/png;base64,...`", place)
    try:
        return decode_picture(content)
    except SampleError as error:
        raise Refused(f"is no picture that can be used: {error.reason}", where) from None


def from_data_url(url: str, place: str, limits: Limits) -> bytes:
    """Raises Refused."""
    head, comma, text = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise Refused("is a data address, but not of the form `data:image/png;base64,...`", place)
    if len(text) * 3 // 4 > limits.picture_bytes + 2:  # what fills up the last four letters
        raise Refused(f"is a picture of more than {limits.picture_bytes // MEGABYTE} MB: scale it down", place)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise Refused(f"is not base64 behind its comma ({error}): encode the bytes of the file", place) from None
