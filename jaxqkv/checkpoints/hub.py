"""Fetches checkpoints from the Hugging Face hub or its local cache."""

import difflib
from collections.abc import Collection
from pathlib import Path

from jaxqkv.checkpoints.checkpoint import BUNDLED
from jaxqkv.errors import CheckpointError, first_line


def download(spec: str, revision: str | None, patterns: tuple[str, ...], known: Collection[str] = ()) -> Path:
    """Returns the local snapshot of a hub repository; missing files are fetched if possible.

    Args:
      spec: the repository.
      revision: branch, tag or commit.
      patterns: name patterns of the files to fetch.
      known: names of repositories to suggest for a wrong one.

    Raises:
      CheckpointError: when it cannot be fetched, with what to do.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = Path(huggingface_hub.snapshot_download(spec, revision=revision, allow_patterns=list(patterns)))
        # Offline, the library returns what is in the cache, perhaps config and tokenizer without weights.
        if folder.is_dir() and ("config.json" not in patterns or (folder / "config.json").exists()):
            return folder
        reason = "has no config.json; it is not a checkpoint, or only part of it is in the local cache"
    except errors.HFValidationError:
        reason = "neither a folder here nor a valid hub id"
    except errors.GatedRepoError:
        reason = "a gated repository; accept its terms on the hub and log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = f"no revision {revision!r} on the hub"
    except errors.RepositoryNotFoundError:
        reason = "neither a folder here nor a repository on the hub that you can read"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = (
            "not in the local cache, and the hub cannot be reached; go online once, or copy the checkpoint "
            "to a folder and give its path"
        )
        if "config.json" in patterns:
            reason += ", or try demo-gpt2, demo-bert or random:gpt2, which need no download"
    except Exception as error:  # the HTTP library below the hub's differs by version
        reason = f"cannot be fetched from the hub ({type(error).__name__}: {first_line(error)})"
    near = [] if spec in known else difflib.get_close_matches(spec, [*BUNDLED, *known], n=1, cutoff=0.8)
    raise CheckpointError(f"{spec}: {reason}" + "".join(f"; did you mean {name}?" for name in near))
