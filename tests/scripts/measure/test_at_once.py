"""The benchmark of many who ask at once runs on a tiny model, and its figures are what they say."""

import json

import pytest

from helpers.models import enliven
from model.inference.answerer import Answerer
from scripts.measure import at_once


def test_all_kinds_are_measured(make_vlm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(at_once.Answerer, "from_weight", lambda *_, **__: Answerer(enliven(make_vlm())))
    sizes = ["--rows", "3", "--clients", "2", "--each", "2", "--new_tokens", "3", "--repetitions", "1"]
    at_once.main(["--weight", "any", *sizes, "--json", str(tmp_path / "new" / "figures.json")])
    found = json.loads((tmp_path / "new" / "figures.json").read_text())
    for kind in at_once.KINDS:
        assert found[kind]["ratio"] == pytest.approx(found[kind]["at_once"] / found[kind]["one_after_another"])
        assert 0 < found[kind]["idle_median"] <= found[kind]["idle_p95"] and found[kind]["burst_last"] > 0
    assert capsys.readouterr().out.count("x\n  first token, ms: alone ") == 3


def test_rounds_bring_other_pictures(make_vlm):
    answerer = Answerer(make_vlm())
    for kind, different in (("one_picture", 1), ("own_pictures", 4)):
        requests, seen = at_once.Requests(answerer, kind), []
        for _ in range(2):
            requests.next_round()
            seen.append({digest for row in range(4) for digest in requests.prompt(row).digests})
        assert len(seen[0]) == len(seen[1]) == different and not seen[0] & seen[1]


def test_wrong_weights_are_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="^at_once: "):
        at_once.main(["--weight", str(tmp_path / "none.safetensors")])
