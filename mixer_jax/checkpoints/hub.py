"""Weights on the Hugging Face Hub, through its own library and its cache."""

from pathlib import Path
from typing import Any

from mixer_jax.checkpoints.model_info import read_metadata_json
from mixer_jax.checkpoints.resolve import HUB, HUB_FILE
from mixer_jax.errors import UserError, summarize_error

CONFIG_FILE = "config.json"


def download(name: str) -> str:
    """Returns the path of a repository's file of weights in the local cache; its config is beside.

    What the cache has is used as it is; only what it lacks is downloaded.

    Args:
        name: "OWNER/NAME", or "OWNER/NAME@REVISION".

    Raises:
        UserError: no such repository, no such file in it, or the Hub cannot be reached.
    """
    # Imported here: it costs half a second, which files on disk need not pay.
    import huggingface_hub
    from huggingface_hub import errors

    # Its retries would be told on standard error, line by line.
    huggingface_hub.logging.set_verbosity_error()
    repo, _, revision = name.partition("@")

    def get(local: bool) -> str:
        """Returns the path of the file of weights, the last one."""
        paths = [
            huggingface_hub.hf_hub_download(
                repo, file, revision=revision or None, local_files_only=local
            )
            for file in (CONFIG_FILE, HUB_FILE)
        ]
        return paths[-1]

    try:
        try:
            return get(local=True)
        except errors.LocalEntryNotFoundError:
            # Both are asked for again: they have to be of the same revision.
            return get(local=False)
    except errors.HFValidationError as error:
        raise UserError(f"{HUB}{name} is no name on the Hub; write {HUB}OWNER/NAME") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{HUB}{name} is not in the local cache, and the Hub cannot be reached; download its "
            f"{HUB_FILE} and {CONFIG_FILE} elsewhere, and name the folder they are in"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(f"{HUB}{name} does not exist, or is private; check the name") from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{HUB}{name} has no {HUB_FILE} and {CONFIG_FILE} as timm has") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise UserError(f"{HUB}{name} cannot be downloaded: {summarize_error(error)}") from error


def read_timm_config(weights_file: str) -> dict[str, Any]:
    """Returns the config beside a file of weights, as timm writes it; empty if there is none.

    Raises:
        UserError: it is no JSON object.
    """
    return read_metadata_json(Path(weights_file).with_name(CONFIG_FILE))
