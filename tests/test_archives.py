"""Archives from strangers: what is unpacked, and what is refused in which words before anything is written."""

import gzip
import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from toy import raised

from nmlib.archives import ArchiveError, Limits, SafeZip, extract, inside, parts_of, unsafe_name

FILES = {"data/a.txt": b"first", "data/deep/b.bin": os.urandom(3000)}


def write_tar(path: Path, files: dict[str, bytes], extra: tarfile.TarInfo | None = None) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        if extra is not None:
            archive.addfile(extra)
    return path


def write_zip(path: Path, files: dict[str, bytes], link: str | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        if link is not None:
            info = zipfile.ZipInfo(link)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, "/etc/passwd")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def split(path: Path, endings: list[str]) -> Path:
    """Cut a file into parts, as large data sets are handed out."""
    data = path.read_bytes()
    size = len(data) // len(endings) + 1
    for number, ending in enumerate(endings):
        path.with_name(f"{path.name}.{ending}").write_bytes(data[number * size : (number + 1) * size])
    path.unlink()
    return path


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz", "set.zip"])
def test_whole_archives_are_unpacked(tmp_path: Path, name: str) -> None:
    write = write_zip if name.endswith("zip") else write_tar
    assert extract(write(tmp_path / name, FILES), tmp_path / "out") == 2
    assert contents(tmp_path / "out") == FILES


@pytest.mark.parametrize(
    ("name", "endings"),
    [("multi_turn.tar.gz", ["part-aa", "part-ab", "part-ac"]), ("results.tar", ["split.000", "split.001"])],
)
def test_archives_in_parts_are_unpacked(tmp_path: Path, name: str, endings: list[str]) -> None:
    path = split(write_tar(tmp_path / name, FILES), endings)
    assert [part.name for part in parts_of(path)] == [f"{name}.{ending}" for ending in endings]
    extract(path, tmp_path / "out")
    assert contents(tmp_path / "out") == FILES


def test_several_gzip_members_are_one_stream(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "a.tar", FILES).read_bytes()
    path = tmp_path / "b.tar.gz"
    path.write_bytes(gzip.compress(plain[:700]) + gzip.compress(plain[700:]))
    extract(path, tmp_path / "out")
    assert contents(tmp_path / "out") == FILES


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    path = split(write_tar(tmp_path / "a.tar", FILES), ["split.000", "split.001", "split.002"])
    path.with_name("a.tar.split.001").unlink()
    assert "parts [0, 2] are there; expected 0 to 1" in raised(lambda: parts_of(path), ArchiveError)
    assert "no such file, nor parts" in raised(lambda: parts_of(tmp_path / "b.tar"), ArchiveError)


def test_a_truncated_archive_leaves_nothing(tmp_path: Path) -> None:
    for name in ("a.tar", "a.tar.gz"):
        path = write_tar(tmp_path / name, FILES)
        path.write_bytes(path.read_bytes()[:1800])
        assert f"{path}: damaged or truncated" in raised(lambda p=path: extract(p, tmp_path / "out"), ArchiveError)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("../evil.txt", "leads out of the folder"),
        ("a/../../evil.txt", "leads out of the folder"),
        ("a\\..\\evil.txt", "leads out of the folder"),
        ("/etc/evil.txt", "is an absolute path"),
        ("C:/evil.txt", "is an absolute path"),
        ("", "is no file name"),
    ],
)
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str, fault: str) -> None:
    assert unsafe_name(name) == fault
    assert fault in raised(lambda: inside(tmp_path, name), ArchiveError)
    if name:
        text = raised(lambda: extract(write_tar(tmp_path / "a.tar", {name: b"x"}), tmp_path / "out"), ArchiveError)
        assert text == f"{tmp_path / 'a.tar'}: member {name!r} {fault}; refused"
        shown = name.replace("\\", "/") if os.name == "nt" else name
        text = raised(lambda: SafeZip(write_zip(tmp_path / "a.zip", {name: b"x"})), ArchiveError)
        assert f"member {shown!r} {fault}; refused" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "fault"),
    [(tarfile.SYMTYPE, "is a link"), (tarfile.LNKTYPE, "is a link"), (tarfile.CHRTYPE, "is a device")],
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes, fault: str) -> None:
    info = tarfile.TarInfo("data/link")
    info.type, info.linkname = kind, "../../outside"
    path = write_tar(tmp_path / "a.tar", FILES, info)
    assert f"member 'data/link' {fault}; refused" in raised(lambda: extract(path, tmp_path / "out"), ArchiveError)
    assert not (tmp_path / "out").exists()


def test_links_in_zips_and_folders_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", FILES, link="data/link")
    assert "member 'data/link' is a link; refused" in raised(lambda: SafeZip(path), ArchiveError)
    (tmp_path / "secret").write_text("x")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "secret")
    assert "is a link that leads out" in raised(lambda: inside(tmp_path / "root", "link"), ArchiveError)


def test_bombs_are_refused_by_their_ratio(tmp_path: Path) -> None:
    bomb = {"zeros.png": bytes(8 << 20)}  # 8 MiB of zeros pack to 8 KiB
    text = raised(lambda: SafeZip(write_zip(tmp_path / "a.zip", bomb)), ArchiveError)
    assert "above a ratio of 100; refused as a decompression bomb" in text
    path = write_tar(tmp_path / "a.tar.gz", bomb)
    assert "decompression bomb" in raised(lambda: extract(path, tmp_path / "out"), ArchiveError)
    assert not (tmp_path / "out").exists()


def test_bombs_are_refused_by_their_total(tmp_path: Path) -> None:
    files = {f"{number}.bin": os.urandom(1000) for number in range(11)}
    limits = Limits(total=10_000)
    for path in (write_zip(tmp_path / "a.zip", files), write_tar(tmp_path / "a.tar.gz", files)):
        text = raised(lambda p=path: extract(p, tmp_path / "out", limits=limits), ArchiveError)
        assert text == f"{path}: unpacks to more than 10000 bytes; refused as too large"


def test_a_zip_that_lies_about_sizes_gives_no_more_than_it_says(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"a.txt": b"z" * 5000})
    data = path.read_bytes().replace((5000).to_bytes(4, "little"), (50).to_bytes(4, "little"))
    path.write_bytes(data)
    assert "cannot be read" in raised(lambda: SafeZip(path).read("a.txt"), ArchiveError)


@pytest.mark.parametrize("packing", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_damaged_members_of_any_packing_are_errors_that_name_them(tmp_path: Path, packing: int) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("b.bin", os.urandom(3000))
    data = bytearray(path.read_bytes())
    data[45:1000] = b"\xff" * 955  # behind the header of the member, 30 bytes and its name
    path.write_bytes(bytes(data))
    text = raised(lambda: SafeZip(path).read("b.bin"), ArchiveError)
    assert text.startswith(f"{path}, member 'b.bin': cannot be read (")
    assert "damaged or truncated" in raised(lambda: extract(path, tmp_path / "out"), ArchiveError)
    assert not (tmp_path / "out").exists()


def test_a_zip_with_names_of_no_text_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"\u00e4\u00e4.txt": b"x"})
    path.write_bytes(path.read_bytes().replace("\u00e4\u00e4".encode(), b"\xff" * 4))
    assert "cannot be read as a zip file" in raised(lambda: SafeZip(path), ArchiveError)


def test_names_that_no_system_takes_are_refused(tmp_path: Path) -> None:
    assert unsafe_name("half\ud800.png") == "is no file name"
    assert "'half\\ud800.png' is no file name" in raised(lambda: inside(tmp_path, "half\ud800.png"), ArchiveError)
    assert raised(lambda: inside(tmp_path, "x" * 300), ArchiveError).endswith("is too long; expected a path below it")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    assert "link that leads back to itself" in raised(lambda: inside(tmp_path, "round"), ArchiveError)
    assert inside(tmp_path, "not/there.png") == tmp_path / "not" / "there.png"


def test_what_is_no_zip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_text("<html>not found</html>")
    assert "cannot be read as a zip file" in raised(lambda: SafeZip(tmp_path / "a.zip"), ArchiveError)
