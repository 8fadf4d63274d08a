"""A packed dataset says where it came from, and is held against its sources."""

import hashlib
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from packing_corpus import Corpus, segmentation

from difnet_transformers.cli import pack as pack_coco


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """12 images in the original's forms and the arguments that pack them; not to be changed."""
    corpus = Corpus(tmp_path_factory.mktemp("small"), 12)
    return corpus.arguments("original")


class TestVerify:
    @pytest.fixture
    def corpus(self, tmp_path):
        corpus = Corpus(tmp_path, 12)
        arguments = [*corpus.arguments("karpathy"), "--output", str(tmp_path / "packed")]
        assert pack_coco.main(arguments) == 0
        return arguments

    def test_a_changed_shard(self, corpus, tmp_path, capsys):
        path = tmp_path / "packed" / "test" / "data-00000-of-00001.arrow"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert pack_coco.main([*corpus, "--verify"]) == 2
        assert f"{path}: missing or changed" in capsys.readouterr().err

    def test_a_changed_source(self, corpus, tmp_path, capsys):
        with h5py.File(tmp_path / "grids.hdf5", "a") as file:
            file["5_features"][3, 2] += 0.5
        np.save(tmp_path / "segmentations" / "train2014" / "7.npy", segmentation(8))
        assert pack_coco.main([*corpus, "--verify"]) == 2
        error = capsys.readouterr().err
        assert "test: differs from its sources: image 5\n" in error
        assert "train: differs from its sources: image 7\n" in error

    def test_a_folder_of_something_else(self, small, tmp_path, capsys):
        assert pack_coco.main([*small, "--output", str(tmp_path), "--verify"]) == 2
        assert "not a packed folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"shards": {"../../../etc/passwd": {"sha256": "0"}}},
        {"shards": None},
        {"dtype": "int8"},
        {"grid_size": "7"},
        {"left_out": [1]},
        {"splits": []},
    ],
)
def test_a_provenance_of_wrong_types(small, tmp_path, capsys, change):
    packed = tmp_path / "packed"
    arguments = [*small, "--output", str(packed)]
    assert pack_coco.main(arguments) == 0
    path = packed / "provenance.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert pack_coco.main([*arguments, "--verify"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert str(packed) in line or "etc/passwd" in line
    assert "--debug" not in line


def test_a_folder_of_the_first_version(small, tmp_path, capsys):
    """It has the same identity, and is verified as it was packed."""
    packed = tmp_path / "packed"
    arguments = [*small, "--output", str(packed)]
    assert pack_coco.main(arguments) == 0
    provenance = json.loads((packed / "provenance.json").read_text())
    for name in ("grid_fit", "grids_of_another_size"):
        del provenance[name]
    (packed / "provenance.json").write_text(json.dumps(provenance))
    assert pack_coco.main([*arguments, "--verify"]) == 0
    assert pack_coco.main(arguments) == 0
    assert "is complete already" in capsys.readouterr().out


def test_provenance_names_sources_counts_and_shards(small, tmp_path):
    packed = tmp_path / "packed"
    assert pack_coco.main([*small, "--output", str(packed)]) == 0
    provenance = json.loads((packed / "provenance.json").read_text())
    assert provenance["splits"]["train"] == {"images": 8, "captions": 40, "restval_images": 2}
    assert provenance["splits"]["test"] == {"images": 2, "captions": 10, "restval_images": 0}
    source = Path(small[1])
    (features,) = provenance["sources"]["features"]
    assert features["bytes"] == source.stat().st_size
    assert features["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert provenance["sources"]["segmentation"]["files"] == 12
    assert {Path(entry["name"]).suffix for entry in provenance["sources"]["annotations"]} == {".npy", ".json"}
    for path, shard in provenance["shards"].items():
        assert hashlib.sha256((packed / path).read_bytes()).hexdigest() == shard["sha256"]
    card = (packed / "README.md").read_text()
    assert features["sha256"] in card
    assert "| train | 8 | 40 | 2 |" in card
