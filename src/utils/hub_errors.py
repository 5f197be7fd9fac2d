"""What the Hugging Face hub's client raises, in words."""

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from src.utils.errors import UserError

# What its ready-made calls raise where the hub is out of reach, refuses, or answers with something else.
HUB_ERRORS = (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, RuntimeError)
CHECK_CONNECTION = "check the connection, or name a mirror in HF_ENDPOINT"


def failed(what: str, error: Exception, remedy: str) -> UserError:
    """The error of not being able to do `what`; `remedy` is for a hub that answers, but refuses."""
    advice = remedy if isinstance(error, HfHubHTTPError) else CHECK_CONNECTION
    return UserError(f"cannot {what} {constants.ENDPOINT} ({reason(error)}); {advice}")


def reason(error: Exception) -> str:
    """One line, short, and of a refusal with what the hub said."""
    if isinstance(error, HfHubHTTPError):
        said = f": {error.server_message}" if error.server_message else ""
        text = f"HTTP {error.response.status_code} {error.response.reason_phrase}{said}"
    else:
        text = f"{type(error).__name__}: {str(error).strip() or 'no details'}"
    return text.splitlines()[0][:200]
