"""Every way to load and to save a checkpoint, as users do it: in fresh processes, far from the repository.

The functions `user_..` are what such a process does: `run_user` starts this file as a program that calls one of them.
They import Transformers themselves, because it reads the Hub's address when it is imported. Over HTTP they talk to the
look-alike of `hub.py`; any other address is refused.
"""

import ast
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub import Hub

REPOSITORY = Path(__file__).parent.parent
PROJECT_MODULES = (
    *("caption_metrics", "configuration_difnet", "convert_checkpoint", "dataset_difnet", "difnet_transformers"),
    *("model_card", "modeling_difnet", "pipeline_difnet", "processing_difnet", "segmentation_difnet"),
)
CLASSES = {
    "AutoConfig": "DifnetConfig",
    "AutoModel": "DifnetForConditionalGeneration",  # the class in `architectures`
    "AutoModelForImageTextToText": "DifnetForConditionalGeneration",
    "AutoModelForMultimodalLM": "DifnetForConditionalGeneration",
    "AutoTokenizer": "DifnetTokenizer",
    "AutoFeatureExtractor": "DifnetFeatureExtractor",
    "AutoProcessor": "DifnetProcessor",
}
MODEL_FILES = {
    *("cache_difnet.py", "checks_difnet.py", "dropout_difnet.py", "generation_difnet.py", "loss_difnet.py"),
    *("decoding_step_difnet.py", "linear_difnet.py", "modeling_difnet.py", "outputs_difnet.py"),
    *(
        "calibration_difnet.py",
        "confidence_difnet.py",
        "beam_search_difnet.py",
        "static_search_difnet.py",
        "token_log_probs_difnet.py",
    ),
}
PIPELINE_FILES = {
    *(
        "fast_segmentation_difnet.py",
        "feature_networks_difnet.py",
        "grid_backbone_difnet.py",
        "images_difnet.py",
        "pipeline_difnet.py",
    ),
    *("segmentation_difnet.py", "segmentation_models_difnet.py", "vision_backbone_difnet.py", "weights_difnet.py"),
}
CODE_FILES = {"configuration_difnet.py", "processing_difnet.py", *MODEL_FILES, *PIPELINE_FILES}
SETTINGS_FILES = {
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "vocab.json",
}
CHECKPOINT_FILES = {"README.md", "model.safetensors"} | CODE_FILES | SETTINGS_FILES


# ---------------------------------------------------------------------------------------------------------------------
# What users do, each in a process of their own
# ---------------------------------------------------------------------------------------------------------------------


def load_all(name: str, **kwargs: bool) -> dict[str, object]:
    """What each Auto class makes of a folder or a repository; the classes' names are checked."""
    import transformers

    loaded = {auto: getattr(transformers, auto).from_pretrained(name, **kwargs) for auto in CLASSES}
    assert {auto: type(thing).__name__ for auto, thing in loaded.items()} == CLASSES
    return loaded


def has_own_code(loaded: dict[str, object]) -> bool:
    """Whether the classes come from the checkpoint (True) or from the installed package (False); never from both."""
    (own_code,) = {type(thing).__module__.startswith("transformers_modules.") for thing in loaded.values()}
    return own_code


def check_captions(loaded: dict[str, object], features: str) -> None:
    """Both models, with the processor, caption the images as the original does and as they did before saving."""
    from safetensors.torch import load_file

    expected = json.loads(Path(features).with_suffix(".json").read_text())
    processor = loaded["AutoProcessor"]
    inputs = processor(**load_file(features), return_tensors="pt")
    for model in (loaded["AutoModel"], loaded["AutoModelForImageTextToText"], loaded["AutoModelForMultimodalLM"]):
        captions = {
            "generate": model.generate(**inputs),
            "original_beam_search": model.generate(**inputs, custom_generate=model.original_beam_search),
        }
        assert {how: processor.tokenizer.decode_captions(tokens) for how, tokens in captions.items()} == expected


def save_and_push(loaded: dict[str, object], folder: str, repository: str) -> None:
    for thing in (loaded["AutoModel"], loaded["AutoProcessor"]):
        thing.save_pretrained(folder)
        thing.push_to_hub(repository)


def hide_package() -> None:
    """As if the project were not installed, which it is where `make test` runs."""
    for module in PROJECT_MODULES:
        assert module not in sys.modules
        sys.modules[module] = None


def user_with_the_package(checkpoint: str, features: str) -> None:
    import torch
    from huggingface_hub import create_repo, upload_folder
    from transformers import AutoModel

    import modeling_difnet

    loaded = load_all(checkpoint)
    assert not has_own_code(loaded)
    assert isinstance(loaded["AutoModel"], modeling_difnet.DifnetForConditionalGeneration)
    check_captions(loaded, features)
    check_captions(load_all(checkpoint, trust_remote_code=True), features)

    save_and_push(loaded, "again", "user/again")
    for name in ("again", "user/again"):
        check_captions(load_all(name), features)
    create_repo("user/uploaded")
    upload_folder(repo_id="user/uploaded", folder_path=checkpoint)

    model = loaded["AutoModel"]
    model.model.save_pretrained("base")
    base = AutoModel.from_pretrained("base")
    assert type(base) is modeling_difnet.DifnetModel
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), model.model.parameters(), strict=True))

    model.save_pretrained("sharded", max_shard_size="2MB")
    assert len(list(Path("sharded").glob("model-*.safetensors"))) > 1
    sharded = AutoModel.from_pretrained("sharded").state_dict()
    assert all(torch.equal(tensor, sharded.pop(key)) for key, tensor in model.state_dict().items())
    assert not sharded

    model.bfloat16().save_pretrained("bfloat16")
    half = AutoModel.from_pretrained("bfloat16")
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, half.state_dict()[key]) for key, tensor in model.state_dict().items())
    inputs = loaded["AutoProcessor"](torch.zeros(1, 49, 2048), torch.zeros(1, 133, 7, 7), return_tensors="pt")
    assert torch.equal(half.generate(**inputs), model.generate(**inputs))


def user_with_one_auto_class(auto: str, name: str) -> None:
    import transformers

    hide_package()
    loaded = getattr(transformers, auto).from_pretrained(name, trust_remote_code=True)
    assert type(loaded).__name__ == CLASSES[auto]


def user_without_the_package(checkpoint: str, features: str) -> None:
    import transformers

    hide_package()
    for auto in CLASSES:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            getattr(transformers, auto).from_pretrained(checkpoint)
    loaded = load_all(checkpoint, trust_remote_code=True)
    assert has_own_code(loaded)
    check_captions(loaded, features)
    save_and_push(loaded, "again", "user/again")

    # Parts that are saved alone bring their code, too.
    loaded["AutoModel"].model.save_pretrained("base")
    base = transformers.AutoModel.from_pretrained("base", trust_remote_code=True)
    assert type(base).__name__ == "DifnetModel"
    for auto in ("AutoConfig", "AutoTokenizer", "AutoFeatureExtractor", "AutoProcessor"):
        loaded[auto].save_pretrained(auto)
        part = getattr(transformers, auto).from_pretrained(auto, trust_remote_code=True)
        assert type(part).__name__ == CLASSES[auto]


def user_of_the_pipeline(folder: str, image: str) -> None:
    """The pipeline comes from the checkpoint, takes features and images, and is saved with what it needs."""
    import torch
    from transformers import pipeline

    hide_package()
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("image-captioning", model=folder, trust_remote_code=False)
    captioner = pipeline("image-captioning", model=folder, trust_remote_code=True, untrained=True)
    assert type(captioner).__module__.startswith("transformers_modules.")
    features = {"grid_features": torch.rand(49, 2048), "segmentation_features": torch.rand(133, 7, 7)}
    captions = captioner([features, image], batch_size=2)
    assert all(each["generated_text"] for answer in captions for each in answer)
    (sure,) = captioner(features, return_confidence=True)
    assert sure["generated_text"] == captions[0][0]["generated_text"]
    assert 0 < sure["agreement"] <= 1

    captioner.save_pretrained("saved again")
    again = pipeline("image-captioning", model="saved again", trust_remote_code=True)
    assert again(features) == captions[0]


def user_without_pillow() -> None:
    """Everything but images works; where an image is needed, the error says what to install."""
    sys.modules["PIL"] = None
    from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration, GridFeatureBackbone  # noqa: F401
    from modeling_difnet.images_difnet import open_image

    with pytest.raises(ImportError, match=r"difnet-transformers\[images\]"):
        open_image("image.jpg")


def user_of_the_hub(features: str, *names: str) -> None:
    import transformers

    hide_package()
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.AutoModel.from_pretrained(names[0])
    for name in names:
        loaded = load_all(name, trust_remote_code=True)
        assert has_own_code(loaded)
        check_captions(loaded, features)
    save_and_push(loaded, "once more", "user/once-more")


def user_of_an_installed_copy(site_packages: str) -> None:
    import configuration_difnet
    import convert_checkpoint
    import modeling_difnet
    import processing_difnet

    for module in (configuration_difnet, convert_checkpoint, modeling_difnet, processing_difnet):
        assert Path(module.__file__).is_relative_to(site_packages), module
    with pytest.raises(SystemExit, match="0"):
        convert_checkpoint.main(["--help"])


# ---------------------------------------------------------------------------------------------------------------------
# The tests
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """A converted checkpoint and images with the captions that the original and our `generate` give them."""

    original: Path  # .pth
    vocabulary: Path
    folder: Path
    features: Path  # safetensors; the captions are beside it, in the .json of the same name
    num_heads: int

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    # Imported here because a fresh process, which runs this file too, must not find the project.
    import torch
    from conftest import golden_case
    from safetensors.torch import save_file

    from convert_checkpoint import convert
    from processing_difnet import DifnetTokenizer

    case = golden_case("difnet_lrp_small")
    root = tmp_path_factory.mktemp("checkpoint")
    original, vocabulary, folder = root / "original.pth", root / "words.json", root / "difnet"
    num_heads = case.meta["config"]["h"]
    torch.save({"state_dict": case.state_dict}, original)
    words = [f"word{index}" for index in range(case.meta["config"]["vocab_size"] - 4)]
    vocabulary.write_text(json.dumps(["<unk>", "<pad>", "<bos>", "<eos>", *words]))
    model = convert(original, folder, vocabulary, num_heads=num_heads).model()

    features = root / "features.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in case.features().items()}, features)
    captions = {
        "generate": model.generate(
            **case.features(), num_beams=5, max_new_tokens=20, length_penalty=0.0, early_stopping="never"
        ),
        "original_beam_search": case.outputs["beam5_out1_tokens"],
    }
    tokenizer = DifnetTokenizer(vocab_file=vocabulary)
    captions = {how: tokenizer.decode_captions(tokens) for how, tokens in captions.items()}
    features.with_suffix(".json").write_text(json.dumps(captions))
    return Checkpoint(original, vocabulary, folder, features, num_heads)


def clean_environment(home: Path, hub: Hub | None = None) -> dict[str, str]:
    """No setting of this machine reaches the process; its caches are new and below `home`."""
    settings = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "PYTHON")
    # `make test-versions` puts the Transformers that it tests in front, where a process must find it, too.
    tested = {}
    if "EXPECTED_TRANSFORMERS" in os.environ:
        tested["PYTHONPATH"] = str(Path(importlib.util.find_spec("transformers").origin).parents[1])
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(settings)},
        "HF_HOME": str(home),
        "HF_ENDPOINT": hub.endpoint if hub else "http://127.0.0.1:9",
        "HF_TOKEN": "any",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        **tested,
    }


def run_user(
    user: Callable[..., None],
    *arguments: str | Path,
    folder: Path,
    hub: Hub | None = None,
    python: str | Path = sys.executable,
    **environment: str,
) -> None:
    """Calls one of the functions above in a fresh process with the working directory `folder`."""
    home = folder / f"home of {user.__name__}"
    process = subprocess.run(
        [python, __file__, user.__name__, *map(str, arguments)],
        cwd=folder,
        env={**clean_environment(home, hub), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-10000:]


def check_same_checkpoint(files: dict[str, bytes], original: dict[str, bytes]) -> None:
    """All but the model card, which Transformers writes, and what it notes about the tokenizer's last load."""

    def comparable(name: str, content: bytes) -> object:
        if name != "tokenizer_config.json":
            return content
        return {
            key: value for key, value in json.loads(content).items() if key not in ("is_local", "local_files_only")
        }

    assert set(files) == set(original)
    for name in set(files) - {"README.md"}:
        assert comparable(name, files[name]) == comparable(name, original[name]), name


def test_a_converted_checkpoint_is_complete(checkpoint: Checkpoint) -> None:
    from huggingface_hub import ModelCard

    assert {path.name for path in checkpoint.folder.iterdir()} == CHECKPOINT_FILES
    for name in SETTINGS_FILES:
        json.loads((checkpoint.folder / name).read_text())
    card = ModelCard.load(checkpoint.folder / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.license is None, "no claim about weights of others"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "image-captioning" in card.data.tags
    assert "vocabulary of 60 tokens" in card.text


def test_users_with_the_package(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The package's classes load, save and push; nothing is lost or added on the way."""
    with Hub() as hub:
        arguments = (checkpoint.folder, checkpoint.features)
        run_user(user_with_the_package, *arguments, folder=tmp_path, hub=hub, PYTHONPATH=str(REPOSITORY))
        assert hub.files("user/uploaded") == checkpoint.files()
        check_same_checkpoint(hub.files("user/again"), checkpoint.files())


@pytest.mark.versions
def test_users_without_the_package(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A checkpoint brings its code, from a folder and over HTTP, and so does what is saved from there."""
    with Hub() as hub:
        hub.publish("user/difnet", checkpoint.folder)
        hub.publish("difnet", checkpoint.folder)
        # In the folder that holds it, the checkpoint goes by its bare name, and the Hub is not asked for it.
        root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
        elsewhere.mkdir()
        shutil.copytree(checkpoint.folder, root / "difnet")
        run_user(user_without_the_package, "difnet", checkpoint.features, folder=root, hub=hub)
        assert not any("/difnet/" in request for request in hub.requests)
        check_same_checkpoint(hub.files("user/again"), checkpoint.files())

        names = ("user/difnet", "difnet", "user/again", root / "again")
        run_user(user_of_the_hub, checkpoint.features, *names, folder=elsewhere, hub=hub)
        check_same_checkpoint(hub.files("user/once-more"), checkpoint.files())


@pytest.fixture(scope="module")
def captioner_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a processor that were saved, with weights so that captions have words."""
    from test_explain import speaking
    from test_images import save_captioner

    folder = tmp_path_factory.mktemp("captioner") / "difnet"
    save_captioner(folder)
    return speaking(folder)


def test_a_saved_model_names_and_carries_the_pipeline(captioner_folder: Path) -> None:
    config = json.loads((captioner_folder / "config.json").read_text())
    assert config["custom_pipelines"]["image-captioning"] == {
        "impl": "pipeline_difnet.DifnetImageCaptioningPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
    assert {path.name for path in captioner_folder.glob("*.py")} == CODE_FILES


def test_a_saved_model_carries_every_file_that_its_files_import(captioner_folder: Path) -> None:
    """Transformers follows `from .x import y` alone: another form would be missed on saving or on loading."""
    for path in captioner_folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, path.name
                assert node.module is not None, path.name
                assert (captioner_folder / f"{node.module}.py").is_file(), f"{path.name} imports {node.module}"


def test_the_pipeline_works_where_the_project_is_not_installed(captioner_folder: Path, tmp_path: Path) -> None:
    from test_images import noise

    noise().save(tmp_path / "image.png")
    run_user(user_of_the_pipeline, captioner_folder, tmp_path / "image.png", folder=tmp_path)


def test_the_package_imports_without_pillow(tmp_path: Path) -> None:
    run_user(user_without_pillow, folder=tmp_path, PYTHONPATH=str(REPOSITORY))


def test_with_the_package_the_pipeline_needs_no_trust(captioner_folder: Path) -> None:
    """The registered task is meant: the code of the checkpoint does not run."""
    from transformers import pipeline

    from modeling_difnet import DifnetImageCaptioningPipeline

    captioner = pipeline("image-captioning", model=str(captioner_folder))
    assert type(captioner) is DifnetImageCaptioningPipeline


@pytest.mark.slow
@pytest.mark.parametrize("over_http", [False, True], ids=["folder", "http"])
@pytest.mark.parametrize("auto", CLASSES)
def test_each_auto_class_alone(auto: str, over_http: bool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    with Hub() as hub:
        hub.publish("user/difnet", checkpoint.folder)
        name = "user/difnet" if over_http else checkpoint.folder
        run_user(user_with_one_auto_class, auto, name, folder=tmp_path, hub=hub)


@pytest.mark.slow
def test_a_downloaded_checkpoint_loads_offline(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with Hub() as hub:
        hub.publish("user/difnet", checkpoint.folder)
        for auto in ("AutoModel", "AutoProcessor"):
            run_user(user_with_one_auto_class, auto, "user/difnet", folder=tmp_path, hub=hub)
        hub.requests.clear()
        for auto in ("AutoModel", "AutoProcessor"):
            run_user(user_with_one_auto_class, auto, "user/difnet", folder=tmp_path, hub=hub, HF_HUB_OFFLINE="1")
        assert not hub.requests


def test_an_installed_copy(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """`pip install .` ships every module and the model card's template."""
    # Looked up, not imported: setuptools exchanges distutils for its own in the process that imports it.
    backends = importlib.metadata.distributions(name="setuptools")
    if not any(int(backend.version.split(".")[0]) >= 77 for backend in backends):
        pytest.skip("the build backend, setuptools 77 or newer, is not installed here")
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed here")
    no_source = shutil.ignore_patterns(".*", "tests", "benchmarks", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(REPOSITORY, tmp_path / "source", ignore=no_source)
    venv.create(tmp_path / "venv", symlinks=True, with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    dependencies = {str(Path(importlib.util.find_spec(name).origin).parents[1]) for name in ("torch", "numpy", "pip")}
    (site_packages / "dependencies.pth").write_text("\n".join(sorted(dependencies)))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    local = ["--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    subprocess.run([*pip, *local, tmp_path / "source"], check=True, env=clean_environment(tmp_path / "home"))

    run_user(user_of_an_installed_copy, site_packages, folder=tmp_path, python=python)
    command = [python, "-m", "convert_checkpoint", "--checkpoint", checkpoint.original, "--output", "difnet"]
    command += ["--vocab", checkpoint.vocabulary, "--num-heads", str(checkpoint.num_heads)]
    subprocess.run(command, check=True, cwd=tmp_path, env=clean_environment(tmp_path / "home"), capture_output=True)
    # As a program, the conversion also writes the recipe that repeats it.
    assert {path.name for path in (tmp_path / "difnet").iterdir()} == CHECKPOINT_FILES | {"recipe.yaml"}
    assert (tmp_path / "difnet" / "model.safetensors").read_bytes() == (
        checkpoint.folder / "model.safetensors"
    ).read_bytes()


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("load", "damage", "file", "message"),
    [
        ("load_captioner", truncate, "model.safetensors", "damaged/model.safetensors: truncated or damaged"),
        ("AutoModel", Path.unlink, "model.safetensors", "no file named model.safetensors.*damaged"),
        ("AutoModel", truncate, "config.json", "damaged/config.json"),
        ("AutoModel", Path.unlink, "config.json", "damaged.*config.json"),
        ("AutoProcessor", truncate, "vocab.json", "damaged/vocab.json is not JSON"),
        ("AutoProcessor", Path.unlink, "vocab.json", "damaged has no vocab.json"),
        ("AutoProcessor", truncate, "processor_config.json", "damaged/processor_config.json"),
        ("AutoProcessor", Path.unlink, "processor_config.json", "damaged.*preprocessor_config.json"),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(
    load: str, damage: Callable, file: str, message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    import transformers

    from difnet_transformers.checkpoints import load_captioner

    shutil.copytree(checkpoint.folder, tmp_path / "damaged")
    damage(tmp_path / "damaged" / file)
    loader = load_captioner if load == "load_captioner" else getattr(transformers, load).from_pretrained
    with pytest.raises((ValueError, OSError), match=message):
        loader(tmp_path / "damaged")


def refuse_other_addresses(event: str, arguments: tuple) -> None:
    """An audit hook: the process reaches this machine and no other."""
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in ("127.0.0.1", "::1"):
        raise OSError(f"A test tried to reach {arguments[1]}.")


if __name__ == "__main__":
    assert os.environ.get("EXPECTED_TRANSFORMERS") in (None, importlib.metadata.version("transformers"))
    sys.addaudithook(refuse_other_addresses)
    globals()[sys.argv[1]](*sys.argv[2:])
