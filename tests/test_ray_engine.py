"""`difnet caption --engine ray`: the same output, whoever is killed; mistakes in one line.

Ray takes ten seconds to start and to stop: what starts it is slow.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bulk_campaign import WIDTH, config_of, make_tars, rows_of, save_captioner

from difnet_transformers.bulk import ImageCaptioner, InputConfig, process_shards
from difnet_transformers.cli.main import main

ray_campaign = pytest.importorskip("ray_campaign")
WORKERS = 4
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}  # of the test's own cluster


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_captioner(tmp_path_factory.mktemp("captioner"))


class TestOptions:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--address", "auto"], "--address belongs to --engine ray"),
            (["--engine", "ray", "--shard", "0/2"], "--shard and --engine ray do not go together"),
            (["--engine", "ray", "--plan"], "--plan and --engine ray do not go together"),
            (["--engine", "ray", "--num-workers", "4-2"], "--num-workers is N or MIN-MAX"),
            (["--engine", "ray", "--cpus-per-worker", "0"], "--cpus-per-worker"),
            (["--engine", "ray", "--gpus-per-worker", "-1"], "--gpus-per-worker must be at least 0"),
        ],
    )
    def test_what_does_not_go_together(self, words, message, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["caption", "images", "--model", "m", "--output", "o", *words])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err

    def test_they_belong_to_an_output(self, capsys):
        with pytest.raises(SystemExit):
            main(["caption", "images", "--model", "m", "--engine", "ray"])
        assert "--engine belongs to --output" in capsys.readouterr().err


class TestAddress:
    """Ray itself would try for minutes."""

    @pytest.fixture(autouse=True)
    def needs_ray(self):
        pytest.importorskip("ray")

    @pytest.mark.parametrize(
        ("address", "message"),
        [
            ("cluster", "--address is HOST:PORT of a Ray cluster, such as 10.0.0.1:6379, or auto; not cluster"),
            ("localhost:99999", "--address is HOST:PORT"),
            ("auto", "no Ray cluster "),
        ],
    )
    def test_that_is_none(self, address, message, model, tmp_path, capsys):
        make_tars(tmp_path / "tars", 2, 2)
        words = ["caption", str(tmp_path / "tars"), "--model", str(model), "--output", str(tmp_path / "output")]
        assert main([*words, "--engine", "ray", "--address", address]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1

    def test_where_nothing_answers(self, model, tmp_path, capsys):
        make_tars(tmp_path / "tars", 2, 2)
        with socket.socket() as server:
            server.bind(("localhost", 0))
            port = server.getsockname()[1]
        words = ["caption", str(tmp_path / "tars"), "--model", str(model), "--output", str(tmp_path / "output")]
        assert main([*words, "--engine", "ray", "--address", f"localhost:{port}"]) == 2
        error = capsys.readouterr().err
        assert f"no Ray cluster at localhost:{port} (Connection refused): start one with `ray start --head`" in error


@pytest.mark.slow
class TestKills:
    @pytest.fixture(scope="class", autouse=True)
    def needs_ray(self):
        pytest.importorskip("ray")

    @pytest.fixture(scope="class")
    def tars(self, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("tars")
        make_tars(folder, 2000, 100)
        return folder

    @pytest.fixture(scope="class")
    def whole(self, model, tars, tmp_path_factory) -> dict[str, bytes]:
        """What one process writes without Ray."""
        output = tmp_path_factory.mktemp("whole")
        process_shards(ImageCaptioner(config_of(model)), InputConfig((str(tars),)), str(output))
        return ray_campaign.files_of(output)

    def test_two_of_four_workers(self, model, tars, whole, tmp_path):
        said = ray_campaign.run_with_killed_workers(model, tars, tmp_path / "output", WORKERS, kills=2)
        assert ray_campaign.files_of(tmp_path / "output") == whole
        assert "2,000 images, 20 of them with an error" in said
        summary = json.loads((tmp_path / "output" / "summary.json").read_text())
        assert (summary["shards"], summary["images"], summary["errors"]) == (20, 2000, 20)

    def test_the_driver(self, model, tars, whole, tmp_path):
        said = ray_campaign.run_with_killed_driver(model, tars, tmp_path / "output", WORKERS)
        assert ray_campaign.files_of(tmp_path / "output") == whole
        assert "of 20 shards are finished already" in said
        assert "20 of 20 shards are finished" in said


@pytest.mark.slow
class TestOneCluster:
    """A cluster that was started before, as on several machines."""

    @pytest.fixture(scope="class")
    def address(self):
        pytest.importorskip("ray")
        port = free_port()
        words = ["--head", "--port", str(port), "--num-cpus", "2", "--include-dashboard", "false"]
        program = [sys.executable, "-m", "ray.scripts.scripts", "start", *words, "--block", "--disable-usage-stats"]
        head = subprocess.Popen(
            program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**ray_campaign.environment(), **TOKEN}
        )
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            with socket.socket() as client:
                if client.connect_ex(("localhost", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"localhost:{port}"
        for process in psutil.Process(head.pid).children(recursive=True):
            process.kill()
        head.kill()
        head.wait()

    def test_relative_paths_mistakes_and_what_is_already_done(self, address, model, tmp_path):
        make_tars(tmp_path / "tars", 40, 10, broken=False)

        def caption(*words: str) -> subprocess.CompletedProcess:
            command = ray_campaign.command(model, Path("tars"), Path("output"), "--engine", "ray", *words)
            environment = {**ray_campaign.environment(), **TOKEN}
            return subprocess.run(
                [*command, "--address", address],
                cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
            )  # fmt: skip

        done = caption()
        assert done.returncode == 0, done.stderr
        assert rows_of(tmp_path / "output").num_rows == 40
        assert rows_of(tmp_path / "output")["source"][0].as_py().startswith("tars/")
        again = caption()
        assert "4 of 4 shards are finished already" in again.stderr
        other = caption("--num-captions", "2")
        assert other.returncode == 2
        assert "another --num-captions: 2, begun with 1" in other.stderr
        assert "Traceback" not in other.stderr


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.mark.slow
def test_a_mistake_that_a_worker_finds_is_one_line(tmp_path, capsys):
    """The features lack what the captioner's second flow needs, which shows when they are read."""
    pytest.importorskip("ray")
    both = save_captioner(tmp_path / "both", use_segmentation=True, encoder_layers=2)
    pq.write_table(pa.table({"key": ["1"], "grid_features": [[[0.5] * WIDTH] * 49]}), tmp_path / "features.parquet")
    words = ["caption", "--features", str(tmp_path / "features.parquet"), "--model", str(both), "--device", "cpu"]
    assert main([*words, "--output", str(tmp_path / "out"), "--engine", "ray", "--num-workers", "1"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("difnet caption: error:")]
    assert "features.parquet: this captioner needs the segmentation features too: give --segmentation" in line
    assert not (tmp_path / "out" / "run.json").exists()
