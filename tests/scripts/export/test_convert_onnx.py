"""`--to onnx` says what it needs before it writes anything; what it writes is tried by tests/engines/test_onnx.py."""

import pytest
import torch

from model.messages import UserError
from model.tokenizer_files import load_tokenizer
from scripts.export import onnx_files
from scripts.export.folder import MANIFEST, seal
from scripts.export.formats import Source, export_onnx


def test_missing_packages_are_named_with_what_installs_them(make_vlm, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "find_spec", lambda name: name == "onnx")
    with pytest.raises(UserError, match="needs onnxscript and onnxruntime: pip install -r requirements/onnx.txt"):
        export_onnx(Source(make_vlm(), load_tokenizer(), "tiny"), tmp_path)
    assert not any(tmp_path.iterdir())


def test_other_numbers_are_refused(make_vlm, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "find_spec", lambda name: True)
    with pytest.raises(UserError, match="writes float32"):
        export_onnx(Source(make_vlm(), load_tokenizer(), "tiny", torch.float16), tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_folder_in_the_folder_is_sealed_too(tmp_path):
    (tmp_path / "onnx").mkdir(mode=0o700)
    (tmp_path / "onnx/part.onnx").write_bytes(b"part")
    (tmp_path / "onnx/part.onnx").chmod(0o600)
    seal(tmp_path, {})
    assert (tmp_path / "onnx").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "onnx/part.onnx").stat().st_mode & 0o777 == 0o644
    assert '"onnx/part.onnx": "' in (tmp_path / MANIFEST).read_text()
