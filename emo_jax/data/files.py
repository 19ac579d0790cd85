"""Files by path or by URL: local ones through the system, `scheme://` ones through Apache Beam's file systems."""

import contextlib
import glob
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import IO, Any

from emo_jax.errors import require

_CHUNK = 1 << 22
TEMPORARY = ".work/tmp"
"""Below a folder that is being written: files that are not complete yet."""


def is_remote(path: str) -> bool:
    """Whether a path names a scheme, as `gs://bucket/file` does."""
    return "://" in path


def join(folder: str, name: str) -> str:
    """The path of a file in a folder; an absolute or remote `name` stays as it is."""
    return name if is_remote(name) or name.startswith("/") else f"{folder.rstrip('/')}/{name}"


def open_file(path: str) -> IO[bytes]:
    """Opens a file to read its bytes as they are, from any place.

    Raises:
      FileNotFoundError: if there is none.
    """
    if not is_remote(path):
        return open(path, "rb")
    if not exists(path):
        raise FileNotFoundError(path)
    return _beam().open(path, compression_type="uncompressed")


def read_range(path: str, start: int, size: int) -> bytes:
    """`size` bytes from byte `start` on."""
    with open_file(path) as file:
        file.seek(start)
        return file.read(size)


def read_json(path: str) -> Any:
    """The contents of a JSON file."""
    with open_file(path) as file:
        return json.loads(file.read())


def exists(path: str) -> bool:
    """Whether there is such a file."""
    return _beam().exists(path) if is_remote(path) else os.path.exists(path)


def temporary(folder: str) -> pathlib.Path:
    """A new local path for a file that `publish` will put into `folder`."""
    made = pathlib.Path(tempfile.gettempdir() if is_remote(folder) else f"{folder}/{TEMPORARY}", uuid.uuid4().hex)
    made.parent.mkdir(parents=True, exist_ok=True)
    return made


def publish(made: pathlib.Path, folder: str, name: str) -> None:
    """Makes a complete `temporary` file appear as `folder/name`, at once."""
    path = join(folder, name)
    if is_remote(folder):
        with made.open("rb") as source, _beam().create(path, compression_type="uncompressed") as target:
            shutil.copyfileobj(source, target, _CHUNK)
        made.unlink()
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.replace(made, path)


@contextlib.contextmanager
def new_file(folder: str, name: str) -> Iterator[pathlib.Path]:
    """Yields a local path to write; what is there at the end appears as `folder/name` at once, or not at all."""
    made = temporary(folder)
    try:
        yield made
        publish(made, folder, name)
    finally:
        made.unlink(missing_ok=True)


def write_bytes(folder: str, name: str, data: bytes) -> None:
    """Writes `folder/name`, which appears when it is complete."""
    with new_file(folder, name) as path:
        path.write_bytes(data)


def write_json(folder: str, name: str, value: Any, indent: int | None = None) -> None:
    """Writes `folder/name`, which appears when it is complete."""
    write_bytes(folder, name, (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode())


def delete_file(path: str) -> None:
    """Deletes a file; there need not be one."""
    if not is_remote(path):
        pathlib.Path(path).unlink(missing_ok=True)
    elif exists(path):
        _beam().delete([path])


def delete_folder(path: str) -> None:
    """Deletes a folder with all that it holds; there need not be one."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    found = [metadata.path for metadata in _beam().match([f"{path.rstrip('/')}/**"])[0].metadata_list]
    if found:
        _beam().delete(found)


def list_folder(path: str) -> list[str]:
    """The names in a local folder, or of all files below a remote one; sorted; empty where there is none."""
    if not is_remote(path):
        return sorted(os.listdir(path)) if os.path.isdir(path) else []
    prefix = path.rstrip("/") + "/"
    return sorted(found.path.removeprefix(prefix) for found in _beam().match([f"{prefix}**"])[0].metadata_list)


def find_files(path: str, suffixes: tuple[str, ...]) -> tuple[str, bool, list[tuple[str, int]]]:
    """The files that a path names, sorted.

    Args:
      path: a file, a folder (searched recursively for `suffixes`), or a glob.
      suffixes: what names of files in a folder end in.

    Returns:
      The folder that names are relative to, whether `path` is that folder, and each file's name and size in bytes.

    Raises:
      UserError: if there are none.
    """
    if is_remote(path):
        root, is_folder, found = _find_remote(path, suffixes)
    else:
        root, is_folder, found = _find_local(str(pathlib.Path(path).expanduser()), suffixes)
    require(bool(found), f"--path={path!r} holds no files; expected names ending in {', '.join(suffixes)}.")
    return root, is_folder, sorted(found, key=lambda item: pathlib.PurePosixPath(item[0]).parts)


def sha256(path: str | pathlib.Path) -> str:
    """Of a local file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_local(path: str, suffixes: tuple[str, ...]) -> tuple[str, bool, list[tuple[str, int]]]:
    if os.path.isfile(path):
        return os.path.dirname(path) or ".", False, [(os.path.basename(path), os.path.getsize(path))]
    if os.path.isdir(path):
        below = (pathlib.Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        chosen = (file for file in below if file.name.endswith(suffixes) and file.is_file())
        return path, True, [(file.relative_to(path).as_posix(), file.stat().st_size) for file in chosen]
    require(glob.has_magic(path), f"--path={path!r} does not exist; give a file, a folder or a glob in quotes.")
    root = _fixed_part(path)
    names = [name for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
    return root, False, [(os.path.relpath(name, root), os.path.getsize(name)) for name in names]


def _find_remote(path: str, suffixes: tuple[str, ...]) -> tuple[str, bool, list[tuple[str, int]]]:
    root, chosen = path.rstrip("/"), []
    if not glob.has_magic(path):
        below = _beam().match([f"{root}/**"])[0].metadata_list
        chosen = [metadata for metadata in below if metadata.path.endswith(suffixes)]
    is_folder = bool(chosen)
    if not is_folder:
        root = _fixed_part(path) if glob.has_magic(path) else path.rpartition("/")[0]
        chosen = _beam().match([path])[0].metadata_list
    return root, is_folder, [(metadata.path.removeprefix(f"{root}/"), metadata.size_in_bytes) for metadata in chosen]


def _fixed_part(pattern: str) -> str:
    """The folder above the first part of a pattern that can match several names."""
    parts = pattern.split("/")
    fixed = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:fixed]) or ("/" if pattern.startswith("/") else ".")


def _beam() -> Any:
    from apache_beam.io.filesystems import FileSystems  # the trainer needs no Beam

    return FileSystems
