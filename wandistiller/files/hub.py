"""Files of a hub repository: only those that are asked for are fetched, and one sentence tells where they cannot be had."""

import os
import re
from pathlib import Path

from wandistiller.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PICKLES = ["*.bin", "*.pt", "*.ckpt"]  # .pth only where a pattern names it: the original releases' encoder and VAE


def is_hub_id(text: str | Path) -> bool:
    """Return whether a text could name a hub repository, `owner/name`; callers look for a folder of that name first."""
    return _HUB_ID.fullmatch(str(text)) is not None


def local_path(path: str | Path) -> Path:
    """Return where a path that a person gave leads: ~ is the home folder, and of a hub's cache (models--OWNER--NAME) its snapshot."""
    folder = Path(os.path.expanduser(path))  # which leaves the ~ of an unknown user as it is
    if folder.is_dir() and (folder / "snapshots").is_dir() and not (folder / "model_index.json").exists():
        main = folder / "refs" / "main"
        named = main.open("rb").read(100).strip().decode(errors="replace") if main.is_file() else ""
        snapshots = sorted((folder / "snapshots").iterdir())
        chosen = [snapshot for snapshot in snapshots if snapshot.name == named] or snapshots
        if len(chosen) == 1:
            return chosen[0]
    return folder


def hub_id(path: str) -> str | None:
    """Return the hub repository that a path names; None where it is something on this machine."""
    return path if is_hub_id(path) and not Path(path).exists() else None


def place_of(path: str | Path, patterns: list[str], local: str) -> Path:
    """Return where a path that a person gave leads, on this machine or, where nothing is there, on the hub.

    Args:
        patterns: the files to fetch; other pickles than .pth are never among them.
        local: what works without the hub, for the message where it cannot be reached.

    Raises:
        UserError: there is no such repository, or it cannot be reached and is not in the cache.
    """
    place, repo_id = local_path(path), str(path)
    if os.path.exists(place) or not is_hub_id(path):
        return place
    from huggingface_hub import errors, snapshot_download

    try:
        # The person chose the repository; only safetensors and JSON of it are read, and tensors of a .pth.
        return Path(snapshot_download(repo_id, allow_patterns=patterns, ignore_patterns=_PICKLES))  # nosec B615
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        reason = f"the hub knows no such model, or it needs a login ({type(error).__name__})"
    except (errors.HfHubHTTPError, errors.HTTPError, errors.IncompleteSnapshotError, OSError) as error:
        reason = f"the hub cannot be reached and it is not in the local cache ({type(error).__name__})"
    raise UserError(
        f"{repo_id}: is no file or folder here, and as a hub id: {reason}. What works without the hub: {local}"
    )


def cached_snapshot(repo_id: str, cache: Path | None = None) -> Path | None:
    """Return the folder of a repository in the hub's local cache, asking no network; None where it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, IncompleteSnapshotError, LocalEntryNotFoundError

    try:  # no file pattern: whatever an earlier command fetched of it
        return Path(snapshot_download(repo_id, cache_dir=cache, local_files_only=True, allow_patterns=[]))  # nosec B615
    except (LocalEntryNotFoundError, IncompleteSnapshotError, HFValidationError):
        return None
