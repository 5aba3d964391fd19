"""A base model's files from afar, brought once a machine: from the Hugging Face Hub, or from an object store.

What was fetched whole is noted, with the digest of each file, in the folder of converted models; every process of the
machine then reads the local copy. Weights are taken from safetensors files alone, and no code of a model is fetched.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_path

from pipeline.contracts import write_atomic
from pipeline.errors import InputError, did_you_mean, masked
from pipeline.json_text import parse_json
from pipeline.modeling.config import BaseModelConfig
from pipeline.progress import say
from pipeline.retry import persistently
from pipeline.schemes import scheme_of
from pipeline.storage import exists, filesystem, join, stamp_of

SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
"""Files of a model that are fetched: weights, configuration, tokenizer. No pickle and no Python among them."""
_INDEX = "model.safetensors.index.json"
_NAMES = (
    *("config.json", "generation_config.json", "model.safetensors", _INDEX),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"),
)
"""Files of a model by the names that transformers and sentence-transformers give them."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_READ = 8 << 20


def cache_folder() -> Path:
    """Return the folder of converted and fetched models: ``MTL_LORA_CACHE`` or the user's cache folder."""
    return Path(os.environ.get("MTL_LORA_CACHE") or user_cache_path("mtl-lora"))


def fetched_base(config: BaseModelConfig) -> Path:
    """Return the local folder of a base that lies elsewhere, fetching it where this machine has none yet.

    Args:
        config: ``base`` is an id of the hub with a ``revision``, or the URL of a folder.

    Raises:
        InputError: there is no such model or revision, it has no safetensors weights, the network is refused
            (``HF_HUB_OFFLINE``) or fails, or a file has another digest than the hub says.
    """
    return _fetched(config.base, config.revision, cache_folder() / "bases")


@functools.lru_cache(maxsize=16)
def _fetched(base: str, revision: str | None, cache: Path) -> Path:
    if revision is not None:
        name = f"{base.replace('/', '--')}@{re.sub(r'[^A-Za-z0-9._-]', '-', revision)}"
        return _once(cache, name, lambda: _from_hub(base, revision))
    listed = _listing(base)
    # The listing is part of the name, so that a folder that has changed is fetched anew.
    name = hashlib.sha256(json.dumps([base, listed], sort_keys=True).encode()).hexdigest()[:32]
    return _once(cache, name, lambda: _from_store(base, listed, cache / name))


def _once(cache: Path, name: str, fetch: Callable[[], tuple[Path, dict[str, Any]]]) -> Path:
    """Return the folder that was noted under a name; fetch and note it where none is, one process at a time."""
    note = cache / f"{name}.json"
    if (folder := _noted(note)) is not None:
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{name}.lock"):
        if (folder := _noted(note)) is not None:
            return folder
        folder, facts = fetch()
        files = {path.relative_to(folder).as_posix(): path for path in sorted(_files(folder))}
        sizes = {key: path.stat().st_size for key, path in files.items()}
        digests = {key: _sha256(path) for key, path in files.items()}
        for key, expected in facts.pop("expected_sha256", {}).items():
            if digests.get(key) != expected:
                raise InputError(
                    f"{key} of model.base must have the digest {expected[:12]}… that the hub says, this machine's copy "
                    f"has {str(digests.get(key))[:12]}…; delete {folder / key} and run again"
                )
        write_atomic(
            note, json.dumps({**facts, "folder": str(folder), "bytes": sizes, "sha256": digests}, indent=2) + "\n"
        )
    return folder


def _noted(note: Path) -> Path | None:
    """Return the folder of a note if its files stand there with their sizes."""
    if not note.is_file():
        return None
    known = parse_json(note.read_text())
    folder = Path(known["folder"])
    whole = all((p := folder / key).is_file() and p.stat().st_size == size for key, size in known["bytes"].items())
    return folder if whole else None


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and path.suffix in SUFFIXES)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_names(base: str, names: Iterable[str]) -> None:
    names = list(names)
    if not any(name.endswith(".safetensors") for name in names):
        pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"))]
        raise InputError(
            f"model.base must have safetensors weights, {base!r} has {pickled or sorted(names)[:5]}; pickled weights "
            "are never loaded: convert them with model.save_pretrained(folder), and name that folder"
        )


def _from_hub(repo: str, revision: str) -> tuple[Path, dict[str, Any]]:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        try:
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise InputError(
                f"model.base {repo!r} at {revision!r} must be on this machine while HF_HUB_OFFLINE is set, it is not; "
                f"run once without it, or bring it: hf download {repo} --revision {revision}"
            ) from None
        _check_names(repo, (path.name for path in _files(folder)))
        return folder, {"repo": repo, "revision": revision, "commit": folder.name}
    try:
        api = HfApi()
        commit = revision if _COMMIT.fullmatch(revision) else _commit_of(api, repo, revision)
        entries = {e.path: e for e in api.list_repo_tree(repo, revision=commit, recursive=True) if hasattr(e, "size")}
        _check_names(repo, entries)
        names = [name for name in entries if PurePosixPath(name).suffix in SUFFIXES and _is_of_model(name)]
        say(f"{repo}: fetching {len(names)} files at commit {commit}")
        folder = Path(snapshot_download(repo, revision=commit, allow_patterns=names))
    except RepositoryNotFoundError as error:
        raise InputError(
            f"model.base must be a model of {constants.ENDPOINT} that the token at hand (HF_TOKEN) may read, {repo!r} "
            f"is none; fix the name, or write ./{repo} for a local folder"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise InputError(
            f"model.base {repo!r} at {revision!r} must come from {constants.ENDPOINT}, it did not: "
            f"{masked(str(error).splitlines()[0] if str(error) else type(error).__name__)}; fix the revision or the "
            "connection, or bring the model as a local folder"
        ) from error
    large = {name: getattr(entries[name], "lfs", None) for name in names}
    expected = {name: found.sha256 for name, found in large.items() if found}
    return folder, {"repo": repo, "revision": revision, "commit": commit, "expected_sha256": expected}


def _commit_of(api: Any, repo: str, revision: str) -> str:
    """Return the commit of a tag.

    Raises:
        InputError: it is a branch, or nothing.
    """
    refs = api.list_repo_refs(repo)
    tags = {ref.name: str(ref.target_commit) for ref in refs.tags}
    branches = {ref.name: str(ref.target_commit) for ref in refs.branches}
    if revision in branches:
        raise InputError(
            f"model.revision must be a commit or a tag, {revision!r} is a branch of {repo}, which moves; write the "
            f"commit that it is at now: {branches[revision]}"
        )
    if revision not in tags:
        raise InputError(
            f"model.revision must be a commit (40 hexadecimal digits) or a tag of {repo}, got "
            f"{revision!r}{did_you_mean(revision, tags)}"
        )
    return tags[revision]


def _is_of_model(name: str) -> bool:
    """Whether a file is the model's own, not of another format that lies beside it in a folder."""
    return name.count("/") == 0 or (name.endswith("config.json") and name.count("/") == 1)


def _listing(url: str) -> dict[str, list[Any]]:
    """Return name → size and version of each file of a model in an object store."""
    fs, path = filesystem(url.rstrip("/"))

    def found() -> Mapping[str, Any]:
        scheme = scheme_of(url)
        is_listed = scheme is None or scheme.is_listed
        return dict(fs.find(path, maxdepth=2, detail=True)) if is_listed else _asked(fs, path)

    entries = persistently(found, url)
    named = {name.removeprefix(f"{path}/"): info for name, info in entries.items()}
    if not named:
        raise InputError(f"model.base must hold a Hugging Face folder, found nothing at {url!r}; fix the URL")
    _check_names(url, named)
    return {
        name: [int(info["size"] or 0), str(info.get("ETag") or info.get("etag") or stamp_of(info))]
        for name, info in sorted(named.items())
        if PurePosixPath(name).suffix in SUFFIXES and _is_of_model(name)
    }


def _asked(fs: Any, path: str) -> dict[str, Any]:
    """Return what is known of a model's files where there is no list: of those with the names that models use."""
    found = {f"{path}/{name}": fs.info(f"{path}/{name}") for name in _NAMES if exists(fs, f"{path}/{name}")}
    index = f"{path}/{_INDEX}"
    if index in found:
        weights = sorted(set(parse_json(fs.cat_file(index))["weight_map"].values()))
        found |= {join(path, name): fs.info(join(path, name)) for name in weights}
    return found


def _from_store(url: str, listed: Mapping[str, list[Any]], target: Path) -> tuple[Path, dict[str, Any]]:
    fs, path = filesystem(url.rstrip("/"))
    say(f"{masked(url)}: fetching {len(listed)} files")
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        for name in listed:
            local = scratch / name
            local.parent.mkdir(parents=True, exist_ok=True)
            persistently(functools.partial(_copy, fs, f"{path}/{name}", local), f"{url}/{name}")
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target, {"url": masked(url)}


def _copy(fs: Any, path: str, local: Path) -> None:
    with fs.open(path, "rb") as source, local.open("wb") as copy:
        shutil.copyfileobj(source, copy, _READ)
