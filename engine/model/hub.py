"""Repositories of the Hugging Face hub, from its cache or into it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import ModelError

__all__ = ["fetch_file", "fetch_files"]


def fetch_files(
    name: str,
    revision: str | None,
    files: Collection[str],
    *,
    ignored: Collection[str] = (),
    what: str = "model",
    embedded: str | None = None,
) -> Path:
    """The repository's folder in the hub's cache, with those of its files that match.

    Args:
        name: owner/name.
        revision: branch, tag or commit.
        files, ignored: patterns.
        what: it is, for errors.
        embedded: the name that could have been given in place of a hub id, where there is one.

    Raises:
        ModelError: there is none such, or the hub cannot be reached; the text says what to do.
    """
    from huggingface_hub import snapshot_download

    with _explained(what, name, revision, embedded=embedded):
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(files), ignore_patterns=list(ignored)
            )
        )


def fetch_file(name: str, revision: str | None, file: str, *, embedded: str | None = None) -> Path:
    """One file of a model's repository, else as `fetch_files`.

    Raises:
        ModelError: as `fetch_files`, or there is no such file.
    """
    from huggingface_hub import hf_hub_download

    with _explained("model", name, revision, file=file, embedded=embedded):
        return Path(hf_hub_download(name, file, revision=revision))


@contextmanager
def _explained(
    what: str, name: str, revision: str | None, *, file: str | None = None, embedded: str | None = None
) -> Iterator[None]:
    from httpx import HTTPError
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        others = "" if embedded is None else f"{embedded!r}, nor "
        raise ModelError(
            f"{what} {name!r} is neither {others}a local folder, nor a hub id (owner/name)"
        ) from error
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{what} {name} is gated: accept its terms at https://huggingface.co/{name}, then set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{what} {name} has no revision {revision!r} on the hub") from error
    except errors.RemoteEntryNotFoundError as error:
        raise ModelError(f"{what} {name} holds no file {file} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{what} {name} is neither a local folder nor on the hub; if it is private there, set HF_TOKEN"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        others = "" if embedded is None else f", or use the embedded {embedded!r}"
        raise ModelError(
            f"{what} {name} is neither a local folder nor in the hub's cache, and the hub cannot be reached; "
            f"check the name, the connection and HF_HUB_OFFLINE{others}"
        ) from error
    except (errors.HfHubHTTPError, HTTPError, OSError) as error:
        raise ModelError(f"downloading {what} {name} failed: {error}") from error
