"""Archives and paths from strangers: read inside their folder and below a size, or refused in one clear line.

Real data sets come as zip and tar files, some of them cut into parts. Nothing in them is trusted: names that lead out
of the folder, links and devices, and files that unpack to far more than they are (decompression bombs) are refused
before anything of them is written.
"""

import contextlib
import errno
import io
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nmlib.runtime import RunError, atomic_folder

CHUNK = 1 << 20  # bytes read at a time
FREE_BYTES = 1 << 20  # a few kilobytes of text may compress a thousandfold; below this size it is no bomb
MAX_FILE_BYTES = 1 << 28  # of one picture or table in memory
UNSAFE_PLACES = {errno.ENAMETOOLONG: "is too long", errno.ELOOP: "is a link that leads back to itself"}
ARCHIVE_ERRORS = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    RuntimeError,
    NotImplementedError,
    UnicodeError,
)


class ArchiveError(ValueError):
    """An archive that is refused or damaged; the message names file, member, what was seen and what is allowed."""


@dataclass(frozen=True)
class Limits:
    """How much an archive may unpack to.

    Args:
        ratio: unpacked bytes for every packed byte; pictures hardly compress, text up to about 20 times.
        total: unpacked bytes in all.
    """

    ratio: float = 100.0
    total: int = 1 << 40


def unsafe_name(name: str) -> str | None:
    """Why a name must not be opened below a folder ("leads out of the folder", ...); None if it may be."""
    parts = re.split(r"[/\\]", name)
    if not name.strip() or "\0" in name or not _can_be_named(name):
        return "is no file name"
    if name[0] in "/\\" or re.match(r"[A-Za-z]:", name):
        return "is an absolute path"
    return "leads out of the folder" if ".." in parts else None


def _can_be_named(name: str) -> bool:
    """Whether the system can write a name; it cannot where a text holds half of a character (a lone surrogate)."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def inside(root: Path, name: str) -> Path:
    """The path of `name` below `root`, links followed.

    Raises:
        ArchiveError: the name is absolute, too long, or leads out of `root`, in words or by a link.
    """
    fault = unsafe_name(name)
    path = root / name if fault is None else root
    fault = fault or _unsafe_place(root, path)
    if fault is not None:
        raise ArchiveError(f"{root}: name {name!r:.200} {fault}; expected a path below it")
    return path


def _unsafe_place(root: Path, path: Path) -> str | None:
    """Why a path must not be opened although its name is safe; None if it may be."""
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            return "is a link that leads out of the folder"
        path.stat()
    except RuntimeError:  # of `resolve`, before Python 3.13
        return UNSAFE_PLACES[errno.ELOOP]
    except OSError as error:  # a file that is not there, or not for us, is no danger
        return UNSAFE_PLACES.get(error.errno or 0)
    return None


class _Budget:
    """Counts unpacked bytes against packed ones."""

    def __init__(self, where: str, limits: Limits) -> None:
        self.where, self.limits, self.total = where, limits, 0

    def spend(self, unpacked: int, packed: int) -> None:
        """Count `unpacked` more bytes; `packed` have been read so far in all."""
        self.total += unpacked
        if self.total > self.limits.total:
            raise ArchiveError(f"{self.where}: unpacks to more than {self.limits.total} bytes; refused as too large")
        check_ratio(self.total, packed, self.limits, self.where)


def check_ratio(unpacked: int, packed: int, limits: Limits, where: str) -> None:
    """Refuse what unpacks to suspiciously much; raises ArchiveError."""
    if unpacked > FREE_BYTES and unpacked > limits.ratio * max(packed, 1):
        raise ArchiveError(
            f"{where}: {packed} packed bytes unpack to {unpacked} or more, above a ratio of {limits.ratio:g}; "
            "refused as a decompression bomb"
        )


class SafeZip:
    """A zip file whose members were all looked at before the first is read.

    Args:
        path: the file.
        password: where it is encrypted.
        limits: how much it may unpack to.

    Raises:
        ArchiveError: no zip file; a member with a path that leads out, a link, or a bomb.
    """

    def __init__(self, path: Path, password: str | None = None, limits: Limits = Limits()) -> None:
        self.path, self._password = path, None if password is None else password.encode()
        try:
            self._zip = zipfile.ZipFile(path)
        except ARCHIVE_ERRORS as error:
            raise ArchiveError(f"{path}: cannot be read as a zip file ({error}); fetch it again") from None
        total = 0
        for item in self._zip.infolist():
            _check_member(path, item.filename, "a link" if stat.S_ISLNK(item.external_attr >> 16) else None)
            check_ratio(item.file_size, item.compress_size, limits, f"{path}, member {item.filename!r}")
            total += item.file_size
        _Budget(str(path), limits).spend(total, path.stat().st_size)

    def names(self) -> list[str]:
        """Names of the files in it, in their order."""
        return [item.filename for item in self._zip.infolist() if not item.is_dir()]

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            KeyError: there is none of that name.
            ArchiveError: it is damaged, too large for memory, or needs another password.
        """
        item = self._zip.getinfo(name)
        if item.file_size > MAX_FILE_BYTES:
            raise ArchiveError(f"{self.path}, member {name!r}: {item.file_size} bytes; at most {MAX_FILE_BYTES}")
        try:
            return self._zip.read(item, pwd=self._password)
        except ARCHIVE_ERRORS as error:
            raise ArchiveError(f"{self.path}, member {name!r}: cannot be read ({error})") from None

    def open(self, name: str) -> IO[bytes]:
        """A file of it as a stream."""
        return self._zip.open(name, pwd=self._password)


def _check_member(path: Path, name: str, special: str | None) -> None:
    fault = unsafe_name(name) or (special and f"is {special}")
    if fault:
        raise ArchiveError(f"{path}: member {name!r} {fault}; refused")


class _Parts(io.RawIOBase):
    """Files read one after another as one, with a count of the bytes read."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._left, self.count = list(paths), 0
        self._file: IO[bytes] | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._file is None:
                if not self._left:
                    return 0
                self._file = self._left.pop(0).open("rb")
            data = self._file.read(len(buffer))
            if data:
                buffer[: len(data)] = data
                self.count += len(data)
                return len(data)
            self._file.close()
            self._file = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


class _Unpacked:
    """The bytes of a tar file, unpacked if it is gzipped, against a budget: a bomb stops before it fills anything."""

    def __init__(self, parts: _Parts, budget: _Budget) -> None:
        self._parts, self._budget = parts, budget
        self._pending = parts.read(CHUNK) or b""
        self._gzip = zlib.decompressobj(wbits=31) if self._pending[:2] == b"\x1f\x8b" else None

    def read(self, size: int) -> bytes:
        data = self._plain(size) if self._gzip is None else self._inflated(size)
        self._budget.spend(len(data), self._parts.count)
        return data

    def _plain(self, size: int) -> bytes:
        data = self._pending or self._parts.read(size) or b""
        self._pending = data[size:]
        return data[:size]

    def _inflated(self, size: int) -> bytes:
        while self._gzip is not None:
            packed = self._pending or self._parts.read(CHUNK) or b""
            if self._gzip.eof:  # another gzip member may follow
                packed = self._gzip.unused_data + packed
                if not packed.startswith(b"\x1f\x8b"):
                    return b""
                self._gzip = zlib.decompressobj(wbits=31)
            data = self._gzip.decompress(packed, size)
            self._pending = self._gzip.unconsumed_tail
            if data:
                return data
            if not packed:
                raise EOFError("the file ends in the middle")
        return b""


def parts_of(path: Path) -> list[Path]:
    """The parts of an archive in order: `a.tar.gz.part-aa`, ... or `a.tar.split.000`, ...; a whole file alone.

    Raises:
        ArchiveError: no such file, or parts numbered with a gap.
    """
    if path.is_file():
        return [path]
    found = [
        item for item in path.parent.glob(f"{path.name}.*") if re.search(r"\.(part-[a-z]+|split\.\d+)$", item.name)
    ]
    parts = sorted(found, key=lambda item: (len(item.name), item.name))
    if not parts:
        raise ArchiveError(f"{path}: no such file, nor parts of it (.part-aa, .split.000)")
    digits = [re.search(r"split\.(\d+)$", item.name) for item in parts]
    numbers = [int(match.group(1)) for match in digits if match]
    if numbers and numbers != list(range(len(numbers))):
        raise ArchiveError(f"{path}: parts {numbers} are there; expected 0 to {len(numbers) - 1}, fetch the others")
    return parts


def extract(path: Path, folder: Path, password: str | None = None, limits: Limits = Limits()) -> int:
    """Unpack a zip, tar or tar.gz file, whole or in parts; the folder is complete or absent.

    Args:
        path: the archive; of one in parts, the name that they share (`multi_turn.tar.gz`).
        folder: where to; an older one is replaced.
        password: of an encrypted zip file.
        limits: how much it may unpack to.

    Returns:
        Number of files written.

    Raises:
        ArchiveError: a name that leads out of the folder, a link, a device, a bomb, or a damaged archive.
    """
    if path.suffix == ".zip":
        archive = SafeZip(path, password, limits)
        members: Iterator[tuple[str, IO[bytes]]] = ((name, archive.open(name)) for name in archive.names())
    else:
        members = _tar_members(path, limits)
    count = 0
    try:
        with atomic_folder(folder) as temporary:
            for name, stream in members:
                target = temporary / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with stream, target.open("wb") as file:
                    while data := stream.read(CHUNK):
                        file.write(data)
                count += 1
    except RunError:  # a full disk
        raise
    except ARCHIVE_ERRORS as error:
        raise ArchiveError(f"{path}: damaged or truncated ({error}); fetch it again") from None
    return count


def _tar_members(path: Path, limits: Limits) -> Iterator[tuple[str, IO[bytes]]]:
    parts = _Parts(parts_of(path))
    unpacked: Any = _Unpacked(parts, _Budget(str(path), limits))
    with contextlib.closing(parts), tarfile.open(fileobj=unpacked, mode="r|", bufsize=CHUNK) as archive:
        for member in archive:
            special = "a link" if member.issym() or member.islnk() else "a device" if member.isdev() else None
            _check_member(path, member.name, special or ("a sparse file" if member.issparse() else None))
            stream = archive.extractfile(member) if member.isfile() else None
            if stream is not None:
                yield member.name, stream
