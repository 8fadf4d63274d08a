"""`python -m caption_metrics` and the module of evaluate."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from caption_metrics import score_captions
from caption_metrics.__main__ import main

REPOSITORY = Path(__file__).parent.parent
PREDICTIONS = {"7": "a dog running on grass", "3": "two men sit on a bench"}
REFERENCES = {"3": ["two men on a bench", "men sit on a bench"], "7": ["a dog runs on grass", "a brown dog running"]}
FORMATS = {
    "COCO": (
        [{"image_id": int(image), "caption": caption} for image, caption in PREDICTIONS.items()],
        {
            "images": [{"id": 3}, {"id": 7}],
            "annotations": [
                {"id": n, "image_id": int(image), "caption": caption}
                for n, (image, captions) in enumerate(REFERENCES.items())
                for caption in captions
            ],
        },
    ),
    "objects": (PREDICTIONS, REFERENCES),
    "lists": (list(PREDICTIONS.values()), [REFERENCES[image] for image in PREDICTIONS]),
}


def write(folder, predictions, references):
    for name, content in (("predictions", predictions), ("references", references)):
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return ["--predictions", str(folder / "predictions.json"), "--references", str(folder / "references.json")]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_scores(name, tmp_path, capsys):
    assert main([*write(tmp_path, *FORMATS[name]), "--per-image"]) == 0
    written = json.loads((tmp_path / "predictions.scores.json").read_text())
    expected = score_captions(list(PREDICTIONS.values()), [REFERENCES[image] for image in PREDICTIONS], per_image=True)
    per_image = written.pop("per_image")
    first = next(iter(per_image))
    assert per_image[first]["cider_d"] == expected.pop("per_image")["cider_d"][0]
    assert written == {"images": 2, "images_without_prediction": 0, **expected}
    assert f"cider_d  {expected['cider_d']:8.4f}" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "predictions.json",
        "predictions.scores.json",
        "references.json",
    ]


def test_images_without_a_prediction_are_reported(tmp_path, capsys):
    arguments = write(tmp_path, [{"image_id": 3, "caption": "two men"}], FORMATS["COCO"][1])
    assert main(arguments) == 0
    assert "1 images of" in capsys.readouterr().err
    assert main([*arguments, "--all-images"]) == 2
    assert "no caption for 1 of 2 images, the first is image 7" in capsys.readouterr().err


ROW = {"image_id": 3, "caption": "a"}


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ("[", REFERENCES, "predictions.json: not JSON"),
        (PREDICTIONS, '{"3": ["a"', "references.json: not JSON"),
        ("3", REFERENCES, "neither a list nor an object"),
        ([], REFERENCES, "one file goes by position"),
        ({}, REFERENCES, "no captions to score"),
        ([ROW, ROW], REFERENCES, "image 3 has two captions"),
        ([{"image_id": 99, "caption": "a"}], REFERENCES, "no references for 1 of 1 predicted images"),
        ([{"caption": "a"}], REFERENCES, 'entry 0 has no "image_id" and "caption"'),
        ([{"image_id": None, "caption": "a"}], REFERENCES, "image_id of entry 0 is no number"),
        ([{"image_id": 3, "caption": 5}], REFERENCES, "the caption of image 3 is not a string but 5"),
        ([ROW, "a"], REFERENCES, "entry 1 has no"),
        (["a", None], [["a"], ["b"]], "the caption of image 1 is not a string but null"),
        (["a"], [["a"], ["b"]], "has 1 captions"),
        (["a"], [[]], "image 0 needs a list of captions"),
        (["a"], ["a"], "image 0 needs a list of captions"),
        ({"3": "a"}, {"3": [None]}, "the caption of image 3 is not a string but null"),
        (FORMATS["COCO"][1], REFERENCES, "this is an annotation file"),
        ("[" * 100_000, REFERENCES, "nested too deeply"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(predictions, references, message, tmp_path, capsys):
    assert main(write(tmp_path, predictions, references)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "predictions.scores.json").exists()


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([{**ROW, "caption": ["a"] * 500}], REFERENCES, "is not a string but a list of 500 entries"),
        ([{**ROW, "image_id": float("inf")}], REFERENCES, "image_id of entry 0 is no number and no name: Infinity"),
        ([ROW, {**ROW, "image_id": "003"}], REFERENCES, "image 3 has two captions"),
        ({"3": "a", "03": "b"}, REFERENCES, "image 3 has two captions"),
        ('{"3": "a", "3": "b"}', REFERENCES, 'predictions.json: "3" comes twice in one object'),
        ({"\x1b[31m": "a"}, REFERENCES, "the first is image \\x1b[31m"),
        ("[1" + "0" * 5000 + "]", REFERENCES, "predictions.json: not JSON"),
        ({"3": "a"}, {"annotations": None}, '"annotations" is not a list'),
        ({"3": "a"}, {"3": None}, "image 3 needs a list of captions, not null"),
    ],
)
def test_wrong_types_are_one_short_line(predictions, references, message, tmp_path, capsys):
    assert main(write(tmp_path, predictions, references)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert len(error) < 500


def test_files_of_other_tools(tmp_path):
    """A byte order mark, ids as texts with zeros before them, line ends after captions."""
    arguments = write(tmp_path, *FORMATS["COCO"])
    assert main([*arguments, "--output", str(tmp_path / "expected.json")]) == 0
    predictions = [{"image_id": f"{image:0>12}", "caption": f"{text}\r\n"} for image, text in PREDICTIONS.items()]
    (tmp_path / "predictions.json").write_text(json.dumps(predictions), encoding="utf-8-sig")
    assert main([*arguments, "--output", str(tmp_path / "scores.json")]) == 0
    assert (tmp_path / "scores.json").read_bytes() == (tmp_path / "expected.json").read_bytes()


def test_a_pipe_is_not_waited_for(tmp_path, capsys):
    arguments = write(tmp_path, *FORMATS["COCO"])
    (tmp_path / "predictions.json").unlink()
    os.mkfifo(tmp_path / "predictions.json")
    assert main(arguments) == 2
    assert "predictions.json: not a regular file" in capsys.readouterr().err


def test_an_error_that_nobody_foresaw_is_one_line(tmp_path, capsys):
    arguments = [*write(tmp_path, *FORMATS["COCO"]), "--output", str(tmp_path / "a\0b")]
    assert main(arguments) == 2
    assert (
        capsys.readouterr().err
        == "python -m caption_metrics: error: ValueError: embedded null byte (--debug shows where)\n"
    )
    assert main([*arguments, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path, capsys):
    left, young = tmp_path / ".scores.json-a.unfinished", tmp_path / ".scores.json-b.unfinished"
    left.touch()
    os.utime(left, (0, 0))
    young.touch()  # may belong to a run that is writing now
    arguments = write(tmp_path, *next(iter(FORMATS.values())))
    assert main([*arguments, "--output", str(tmp_path / "scores.json")]) == 0
    assert not left.exists()
    assert young.exists()


def test_files_that_cannot_be_read_or_written(tmp_path, capsys):
    arguments = write(tmp_path, *FORMATS["COCO"])
    assert main([*arguments, "--output", str(tmp_path / "no" / "scores.json")]) == 2
    assert "No such file or directory" in capsys.readouterr().err
    (tmp_path / "predictions.json").write_bytes(b'["caf\xe9"]')
    assert main(arguments) == 2
    assert "not UTF-8" in capsys.readouterr().err
    (tmp_path / "predictions.json").unlink()
    assert main(arguments) == 2
    assert "predictions.json: No such file" in capsys.readouterr().err


def test_the_command_and_its_imports():
    """Only numpy and safetensors are needed, and nothing of the model."""
    code = (
        "import sys, caption_metrics; print([m for m in ('torch', 'transformers', 'evaluate', 'datasets', 'spacy', "
        "'modeling_difnet') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    done = subprocess.run(
        [sys.executable, "-m", "caption_metrics", "--predictions", "missing.json", "--references", "missing.json"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_the_folder_stands_alone(tmp_path):
    """Taken out of the project, it works as it is, and says under which licence it is."""
    shutil.copytree(REPOSITORY / "caption_metrics", tmp_path / "alone" / "caption_metrics")
    code = "import caption_metrics.__main__ as m; print(m.__file__); raise SystemExit(m.main())"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [sys.executable, "-c", code, *write(tmp_path, *FORMATS["COCO"])]
    done = subprocess.run(words, cwd=tmp_path / "alone", env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path / 'alone' / 'caption_metrics'}")
    assert "cider_d" in done.stdout
    assert "Apache License" in (tmp_path / "alone" / "caption_metrics" / "NOTICE").read_text()


EVALUATE = """
import json, os, sys, caption_metrics, evaluate
predictions, references = json.loads(sys.argv[1])
results = []
for name in ("caption_metrics", "./caption_metrics"):
    metric = evaluate.load(name)
    results.append(metric.compute(predictions=predictions, references=references, per_image=True))
for prediction, group in zip(predictions, references):
    metric.add_batch(predictions=[prediction], references=[group])
results.append(metric.compute(per_image=True))
combined = evaluate.combine([metric])
combined.add_batch(predictions=predictions, references=references)
results.append(combined.compute(per_image=True))
os.chdir(os.environ["HF_HOME"])  # away from the clone, as one who installed the package
metric = evaluate.load(caption_metrics.module_path())
results.append(metric.compute(predictions=predictions, references=references, per_image=True))
print(json.dumps(results))
"""


def test_evaluate_loads_it_offline(tmp_path):
    pytest.importorskip("evaluate")
    captions = list(PREDICTIONS.values()), [[*REFERENCES[image], "A man's T.V., they said."] for image in PREDICTIONS]
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "HF_MODULES_CACHE": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE, json.dumps(captions)],
        cwd=REPOSITORY,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = json.loads(json.dumps(score_captions(*captions, per_image=True)))
    assert json.loads(done.stdout.splitlines()[-1]) == [expected] * 5
