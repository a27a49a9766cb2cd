"""Files that are written whole or not at all, or sealed with their own sha256.

A sealed file is one JSON object whose last key, sha256, is the digest of the text before it. Such
are meta.json of a data folder, manifest.json of a checkpoint and sha256.json of a model's folder.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

SEAL = "sha256.json"


class Lenient:
    """A text stream whose writes never fail: nobody may be listening, or its disk may be full."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:  # what it holds would be tried again at the process's end, and fail that
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def lenient_console():
    """No line that can't be printed, in its encoding or at all, ends what runs inside."""
    before = sys.stdout, sys.stderr
    for stream in before:
        with contextlib.suppress(AttributeError, ValueError, OSError):  # not a console's
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (stream and Lenient(stream) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream:
                stream.flush()
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def one_line_errors():
    """Decorate a script's main(): what is wrong with a file or a flag ends it with one line."""
    try:
        with lenient_console():
            yield
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise SystemExit(f"error: {place}{error.strerror or error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def one_line(error):
    """The message of an exception as one line, not too long."""
    return " ".join(str(error).split())[:300]


def script_parser(description):
    """The parser of a script's flags, whose --help begins with the script's docstring."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def shown(path):
    """A path as it is found from the current folder; relative to it, if it lies in it."""
    path = Path(path).absolute()
    return (path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path).as_posix()


def quoted(path):
    """shown(), as a shell takes it."""
    return shlex.quote(shown(path))


def take_lock(file):
    """Hold an open file for this process, as long as it is open.

    BlockingIOError if another process holds it. Where there are no locks, as on some network file
    systems, nothing is held.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        return take_windows_lock(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass


def take_windows_lock(file):
    """take_lock() of Windows: a byte far behind the file's end, since a held one can't be read."""
    try:
        import msvcrt
    except ModuleNotFoundError:
        return
    place = file.tell()
    file.seek(2**40)
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except PermissionError:
        raise BlockingIOError from None
    finally:
        file.seek(place)


def link_folder(place, target):
    """Make a link to a folder; Windows takes a junction, for which nobody needs a right."""
    try:
        place.symlink_to(target)
    except OSError:
        import _winapi

        _winapi.CreateJunction(str(target), str(place))


def progress(iterable, desc, total=None):
    """The iterable, with a progress bar that shows the time that remains."""
    return tqdm(iterable, desc=desc, total=total, mininterval=0.5)


def sha256_file(path):
    """The sha256 of a file's content, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- written whole


def sync_folder(path):
    """Wait until the names in a folder are on the disk."""
    # Windows opens no folder, and some network file systems cannot sync one.
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _part_of(path):
    """A temporary name. The finished file is renamed from it."""
    # Two nodes that share a disk may have equal process ids, so the name is random.
    return Path(f"{path}.part{os.urandom(4).hex()}")


def write_whole(path, *chunks):
    """Write bytes to a file that appears whole or not at all, whatever kills the process."""
    part = _part_of(path)
    try:
        with open(part, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(Path(path).parent)


@contextlib.contextmanager
def whole_folder(path):
    """Give a new folder to write into. It becomes `path` at the end, or vanishes on an error."""
    path = Path(path)
    if os.path.lexists(path):
        raise ValueError(f"{path} exists: remove it, or choose another --out")
    part = _part_of(path)
    part.mkdir(parents=True)
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    sync_folder(path.parent)


# ---- sealed


def _seal_of(text):
    """The last key and the closing brace of a sealed object that begins with these bytes."""
    return b'"sha256": "%s"}' % hashlib.sha256(text).hexdigest().encode()


def write_sealed(path, obj):
    """Write a dict as a sealed file. The dict has no key sha256 of its own."""
    assert "sha256" not in obj
    text = json.dumps(obj)[:-1].encode()
    if obj:
        text += b", "
    write_whole(path, text, _seal_of(text))


def read_sealed(path):
    """The dict of a sealed file. ValueError names the file and what is wrong with it."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    text = content[: -len(_seal_of(b""))]
    if content != text + _seal_of(text):
        raise ValueError(
            f"{path}: its last key is not the sha256 of the text before it, "
            "so it was damaged, or written by something else"
        )
    try:
        obj = json.loads(content)
        del obj["sha256"]
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON object ({error})") from None
    return obj


def seal_folder(folder):
    """Sync every file in a folder, then write their digests to its sha256.json."""
    folder = Path(folder)
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            digests[path.relative_to(folder).as_posix()] = sha256_file(path)
    write_sealed(folder / SEAL, digests)


def check_seal(folder):
    """ValueError names a file of a sealed folder that is missing or has changed."""
    folder = Path(folder)
    if not os.path.lexists(folder / SEAL):
        return
    for name, digest in read_sealed(folder / SEAL).items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != digest:
            raise ValueError(
                f"{path}: missing, or its sha256 is not the one in {SEAL}; fetch or make the "
                f"folder again, or remove {SEAL} if the file was meant to change"
            )
