"""An export goes to the hub as a new repository, in one commit, where a person asked for it by name and at no other time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wandistiller.errors import UserError, first_line
from wandistiller.files.hub import HubError, is_hub_id


def check_repository(repo_id: str) -> None:
    """Refuse, before anything is written, a repository that cannot be made: a wrong name, no login, no network, one that is there.

    Raises:
        UserError: as above.
    """
    if not is_hub_id(repo_id):
        raise UserError(
            f"--push_to_hub {repo_id}: is no name of a repository; give OWNER/NAME, such as yourname/wan-student"
        )
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise HubError(
            f"--push_to_hub {repo_id}: nobody is logged in to the hub here; log in with `hf auth login`, or set HF_TOKEN"
        )
    with _told(repo_id, "nothing was written"):
        exists = HfApi().repo_exists(repo_id)
    if exists:
        raise HubError(f"--push_to_hub {repo_id}: is there already, and is not replaced; give another name")


def push(repo_id: str, files: dict[str, Path | bytes], local: Path) -> str:
    """Make a private repository of files by their names in it; return its address.

    Args:
        local: where the export lies here, for the message where the hub fails.

    Raises:
        HubError: the hub refused it, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with _told(repo_id, f"the export is in {local}, and `hf upload {repo_id} {local}` sends it"):
        address = api.create_repo(repo_id, private=True)
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        api.create_commit(repo_id, operations, commit_message="Export by WanDistiller")
    return str(address)


@contextmanager
def _told(repo_id: str, then: str) -> Iterator[None]:
    """Turn what the hub's library raises into one message."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    try:
        yield
    except (HfHubHTTPError, HFValidationError) as error:
        reason = f"the hub refuses it ({first_line(error)})"
    except (HTTPError, OSError) as error:
        reason = f"the hub cannot be reached ({type(error).__name__})"
    else:
        return
    raise HubError(f"--push_to_hub {repo_id}: {reason}; {then}")
