"""Upload of weights to a repository of the Hugging Face Hub, with a generated model card."""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mixer_jax.checkpoints.export import HUB_FOLDER, export_weights
from mixer_jax.checkpoints.model_card import CARD_FILE, make_model_card
from mixer_jax.checkpoints.resolve import HUB, TRANSIENT_CODES, check_connection
from mixer_jax.checkpoints.weights import PretrainedWeights
from mixer_jax.errors import (
    DiskFullError,
    RunError,
    UserError,
    no_space_reason,
    summarize_error,
)

_LOG_IN = "Run `hf auth login`, or set HF_TOKEN"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


class Upload(NamedTuple):
    """Result of an upload.

    Attributes:
        url: Address of the repository.
        kept_card: Whether the repository already had a model card, which was not replaced.
    """

    url: str
    kept_card: bool


def check_repo_name(name: str) -> None:
    """Raises UserError unless a name can be that of a repository on the Hub, OWNER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    rule, fix = "", ""
    try:
        validate_repo_id(name)
    except HFValidationError:
        rule = " of at most 96 letters, digits, '-', '_' and '.', without '--', '..' and '.git'"
    parts = str(name).split("/")
    if len(parts) != 2 or not all(parts):
        rule, fix = " with one slash", " OWNER is your user name or organization on the Hub."
    if rule:
        raise UserError(f"name on the Hub must be OWNER/NAME{rule}, got {name!r}.{fix}")


def check_license(card_license: str) -> None:
    """Raises UserError unless a license, or "" for none, can be an identifier of the Hub."""
    if card_license and not _LICENSE.fullmatch(card_license):
        raise UserError(
            "license must be an identifier of the Hub in lower case, such as apache-2.0 or other, "
            f"got {card_license!r}."
        )


def check_access(name: str) -> None:
    """Checks, before anything is computed, that the Hub is reached and accepts the user's token.

    Raises:
        UserError: There is no valid token.
        RunError: The Hub cannot be reached.
    """
    import huggingface_hub

    check_repo_name(name)
    with _upload_errors(name):
        if huggingface_hub.get_token() is None:
            raise UserError(f"uploading {HUB}{name} needs a token, got none. {_LOG_IN}.")
        check_connection(
            f"{HUB}{name} cannot be uploaded",
            "Check the network connection and run the same command again.",
        )
        huggingface_hub.HfApi().whoami()


@contextlib.contextmanager
def staged_repository(
    weights: PretrainedWeights, name: str, card_license: str = ""
) -> Iterator[Path]:
    """Yields a temporary folder with all files of a repository.

    Args:
        weights: Weights on the host.
        name: Name of the repository, OWNER/NAME.
        card_license: Identifier of the license in the model card; empty: none.

    Raises:
        UserError: The license is invalid, or the weights have parameters for which the format has
            no place.
        DiskFullError: There is no space for the temporary files.
    """
    check_license(card_license)
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()), "model")
            export_weights(weights, HUB_FOLDER, str(folder))
            card = make_model_card(weights, name, card_license)
            (folder / CARD_FILE).write_text(card, encoding="utf-8")
        except (DiskFullError, OSError) as error:
            problem = f"temporary files of {HUB}{name} cannot be written"
            fix = "set TMPDIR to a folder on another disk"
            # The cause of ours, which names the temporary target.
            if space := no_space_reason(error.__cause__ or error):
                raise DiskFullError(f"{problem} ({space}). Free space, or {fix}.") from error
            raise UserError(f"{problem}: {summarize_error(error)}. Instead, {fix}.") from error
        yield folder


def push_to_hub(
    weights: PretrainedWeights,
    name: str,
    *,
    card_license: str = "",
    private: bool = False,
    replace_card: bool = False,
) -> Upload:
    """Uploads weights, timm's config and a model card to the Hub, in one commit.

    The repository is created if it does not exist. The Hub's library finds the user's token.

    Args:
        weights: Weights on the host.
        name: Name of the repository, OWNER/NAME.
        card_license: Identifier of the license in the model card; empty: none.
        private: Whether a new repository is private.
        replace_card: Whether to replace a model card that the repository has.

    Raises:
        UserError: The name, the license or the token is invalid, or the token lacks write
            permission.
        DiskFullError: There is no space for temporary files.
        RunError: The Hub cannot be reached, or fails.
    """
    import huggingface_hub

    check_license(card_license)
    check_access(name)
    with (
        staged_repository(weights, name, card_license) as folder,
        _upload_errors(name),
        _without_warnings(),
    ):
        api = huggingface_hub.HfApi()
        url = api.create_repo(name, private=private or None, exist_ok=True)
        kept_card = not replace_card and api.file_exists(name, CARD_FILE)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=f"Upload {weights.model_info.name}",
            ignore_patterns=[CARD_FILE] if kept_card else None,
        )
        return Upload(str(url), kept_card)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences the warnings of the Hub's library, which would appear next to our errors."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextlib.contextmanager
def _upload_errors(name: str) -> Iterator[None]:
    """Translates errors of the Hub's library, whose commits are applied completely or not at all.

    Raises:
        UserError: The Hub rejects the request.
        RunError: The Hub cannot be reached, or fails.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        problem = f"{HUB}{name} cannot be uploaded"
        if isinstance(error, OfflineModeIsEnabled):
            raise UserError(f"{problem}: HF_HUB_OFFLINE forbids it. Unset it.") from error
        code = _status_code(error)
        if code == 401:
            raise UserError(
                f"{problem}: the Hub rejects the token (401). {_LOG_IN} to a valid one."
            ) from error
        if code in (403, 404):
            raise UserError(
                f"{problem}: the token must have write permission for {name.partition('/')[0]!r}, "
                f"and the Hub refuses it ({code}). Use your own name or organization as OWNER, or "
                "a token with the role write."
            ) from error
        reason = _summarize_without_token(error)
        if error.__cause__ and not isinstance(error, HfHubHTTPError):
            reason += f" ({_summarize_without_token(error.__cause__)})"
        is_rejected = 400 <= code < 500 and code not in TRANSIENT_CODES
        if is_rejected or (isinstance(error, ValueError) and CARD_FILE in str(error)):
            raise UserError(f"{problem}: {reason}.") from error
        raise RunError(
            f"{problem}: {reason}. The files on the Hub are unchanged. Run the same command again."
        ) from error


def _summarize_without_token(error: BaseException) -> str:
    """Shortens the message of an error; replaces the user's token, also as a part of it."""
    import huggingface_hub

    text = str(error)
    if token := huggingface_hub.get_token():
        # Errors show headers with escapes for characters that cannot be printed.
        for form in (token, repr(token)[1:-1]):
            text = text.replace(form, "TOKEN")
    # Without a message, an error is named by its type.
    return summarize_error(ValueError(text) if text else error)


def _status_code(error: BaseException | None) -> int:
    """Returns the HTTP status of a response that an error was caused by; 0 if there was none."""
    while error is not None:
        code = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(code, int):
            return code
        error = error.__cause__
    return 0
