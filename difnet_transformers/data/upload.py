"""Uploads a packed folder of Parquet files to the Hub, with its data card and its provenance.

The original (mrwu-mac/DIFNet, CVPR 2022) links its features as single files.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from ..command_line import reason_of
from ..files import atomic_write, printable
from .provenance import dataset_card, read_provenance


def push_folder(folder: Path, name: str, private: bool = False, license: str | None = None) -> str:
    """Makes the folder the content of a dataset of the Hub, in one commit. The token is that of the environment.

    Args:
        folder: what `difnet pack --parquet` wrote; only its card is written, where `license` is given.
        name: "user/name" of the dataset, which is made where it is not there.
        private: whether a new one is private.
        license: of the data, for the card.

    Returns:
        The URL of the dataset.

    Raises:
        ValueError: the upload failed, or the folder is none that was packed. It is as it was; the text says how to
            upload it again.
    """
    from huggingface_hub import HfApi

    provenance = read_provenance(folder)
    if license is not None:
        atomic_write(folder / "README.md", dataset_card(provenance, True, license))
    try:
        api = HfApi()
        url = api.create_repo(name, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            repo_type="dataset",
            commit_message="Packed features and captions",
            delete_patterns=["data/*.parquet"],  # shards of an earlier packing, which would be read beside these
        )
    except Exception as error:
        # The network, the token or the repository: huggingface_hub has errors of its own for each, and httpx others.
        shown = printable(folder, 300)
        raise ValueError(
            f"{shown} is packed and complete, and was not uploaded to {name} ({printable(reason_of(error), 300)}). "
            "Log in with `hf auth login` or HF_TOKEN, and give the same command again; nothing is packed twice. Or: "
            f"hf upload {name} {shlex.quote(shown)} . --repo-type dataset"
        ) from None
    return str(url)
