"""An exported folder to a model repository on the Hugging Face hub."""

import glob
from collections.abc import Iterable
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from src.utils.errors import UserError


def check_push(repository: str, uploading: bool) -> None:
    """Raises UserError for a text that is no OWNER/NAME and, where files shall be uploaded, without a token."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push {repository!r} cannot be a repository: {error}") from None
    if "/" not in repository:
        raise UserError(f"--push {repository!r} has no owner; give OWNER/NAME, where OWNER is you or an organization")
    if uploading and get_token() is None:
        raise UserError(f"--upload to {repository} takes a token that may write: set HF_TOKEN, or run: hf auth login")


def upload(folder: Path, files: Iterable[str], repository: str, message: str) -> str:
    """Uploads `files` of `folder`, into a new private repository where there is none; returns the page's address.

    Files of other names in the repository stay. Raises UserError where the hub is not reached or refuses.
    """
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in files],
            commit_message=message,
        )
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, RuntimeError) as error:
        reason, remedy = f"{type(error).__name__}: {error}", "check the connection, or name a mirror in HF_ENDPOINT"
        if isinstance(error, HfHubHTTPError):
            reason = f"HTTP {error.response.status_code}: {error.server_message or error.response.reason_phrase}"
            remedy = "check the name, and that the token in HF_TOKEN or of `hf auth login` may write there"
        raise UserError(
            f"cannot upload to {repository} at {constants.ENDPOINT} ({reason.splitlines()[0][:200]}); {remedy}; "
            "the same command goes on"
        ) from error
    return f"{constants.ENDPOINT}/{repository}"
