"""An exported folder to a model repository on the Hugging Face hub."""

import glob
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from src.utils.errors import UserError, hub_errors, hub_failure


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
    except hub_errors() as error:
        remedy = "Check the name, and that the token in HF_TOKEN or of `hf auth login` may write there"
        raise hub_failure(f"upload to {repository} at", error, remedy) from error
    return f"{constants.ENDPOINT}/{repository}"
