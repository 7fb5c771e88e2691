"""Files and folders on a disk or in an object store, by a path or a URI (s3://…, gs://…): pyarrow knows them all."""

import io
import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

from quiver.errors import ConfigError, MissingExtra, Refused

_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Location:
    """One place; it travels as its text."""

    uri: str

    @cached_property
    def _found(self) -> tuple[Any, str]:
        try:
            from pyarrow import fs  # noqa: PLC0415  an extra
        except ModuleNotFoundError as error:
            raise MissingExtra("parquet", "files of a cluster") from error
        if "://" not in self.uri:
            return fs.LocalFileSystem(), str(Path(self.uri).expanduser().absolute())
        try:
            store, path = fs.FileSystem.from_uri(self.uri)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.uri} names no file that can be reached: {error}") from error
        return store, path

    def __getstate__(self) -> dict[str, str]:
        return {"uri": self.uri}

    def __setstate__(self, state: dict[str, str]) -> None:
        object.__setattr__(self, "uri", state["uri"])

    def below(self, name: str) -> Self:
        """Return a place in this folder."""
        return type(self)(f"{self.uri.rstrip('/')}/{name}")

    def size(self) -> int:
        """Return a file's bytes. Raises `Refused` where there is none."""
        store, path = self._found
        try:
            (info,) = store.get_file_info([path])
        except OSError as error:
            raise Refused(f"cannot read {self.uri}: {error}") from error
        if not info.is_file:
            what = "it is a directory; name its files" if info.type.name == "Directory" else "there is no such file"
            raise Refused(f"cannot read {self.uri}: {what}")
        return int(info.size)

    def open(self) -> BinaryIO:
        """Open a file to read anywhere in it. Raises `Refused`."""
        store, path = self._found
        try:
            return cast(BinaryIO, io.BufferedReader(store.open_input_file(path), _BUFFER_BYTES))
        except OSError as error:
            raise Refused(f"cannot read {self.uri}: {error}") from error

    def names(self) -> Sequence[str]:
        """List the files of a folder; one that is not there has none."""
        store, path = self._found
        from pyarrow import fs  # noqa: PLC0415  an extra

        found = store.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return sorted(info.base_name for info in found if info.is_file)

    def read(self) -> bytes:
        """Return what is in a file."""
        with self.open() as file:
            return file.read()

    def write(self, data: bytes) -> None:
        """Write a file whole: whoever reads it sees the one before, or this one."""
        store, path = self._found
        store.create_dir(posixpath.dirname(path), recursive=True)
        if store.type_name == "local":
            new = Path(f"{path}.{os.getpid()}.new")
            with new.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
            return
        with store.open_output_stream(path) as stream:  # an object is there once it is whole
            stream.write(data)

    def put(self, local: Path) -> None:
        """Write what is in a file of this machine."""
        self.write(local.read_bytes())

    def remove(self) -> None:
        """Remove a file."""
        store, path = self._found
        store.delete_file(path)
