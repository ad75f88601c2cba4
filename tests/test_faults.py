"""Nothing is lost: processes killed at random moments, full and read-only disks, damaged files.

`make test-faults` runs these and prints how many kills, faults and files there were. What is on disk is always whole
or absent; what is damaged is refused by name or made anew, never used; and what is done again has the same bytes.
"""

import ctypes
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from artefacts import BY_NAME, KINDS, SHOWN, Kind, contents, flip, read_quietly
from kills import UNFINISHED, die_before, ended, forked, killed_after
from networks import make_data
from test_profiles import ARGUMENTS, Faulty
from test_profiles import run as call

from pss.__main__ import main
from pss.profiles import ProfileStore
from pss.storage.folder import partial_of

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
pytestmark = [pytest.mark.faults, needs_fork, pytest.mark.usefixtures("one_thread")]
KILLS, FLIPS, CUTS, FULL = 10, 120, 24, 7  # for each kind of artefact
every_kind = pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
every_written = pytest.mark.parametrize("kind", KINDS + SHOWN, ids=[kind.name for kind in KINDS + SHOWN])


@pytest.fixture
def count(record_property):
    """Count kills, faults and files for the summary that is printed at the end."""
    counts = Counter()
    yield counts
    for what, number in counts.items():
        record_property(f"count {what}", number)


def whole(kind: Kind, folder: Path) -> dict[int, tuple[dict[str, bytes], str]]:
    """Files of each version as an uninterrupted process writes them, and what is read from them."""
    found = {}
    for version in (0, 1):
        (folder / str(version)).mkdir(parents=True)
        kind.write(folder / str(version), version)
        found[version] = contents(folder / str(version)), kind.digest(folder / str(version))
    return found


def is_partial(name: str) -> bool:
    """Whether it is a file, or in a folder, on its way to its place or away from it."""
    return any(part.startswith(".") for part in Path(name).parts)


# --- killed -----------------------------------------------------------------------------------------------------------


def check_after_kill(kind: Kind, folder: Path, expected: dict) -> bool:
    """Nothing half-written is read; written again, the bytes are those of an uninterrupted run. Whether it was cut."""
    files = contents(folder)
    if kind.name == "profiles":  # many files that become one store: complete, or refused
        try:
            assert kind.digest(folder) in [digest for _, digest in expected.values()]
        except (ValueError, FileNotFoundError) as error:
            assert any(says in str(error) for says in UNFINISHED.split("|")), error
        cut = not any(files.items() >= content.items() for content, _ in expected.values())
    else:
        for name in kind.files:
            assert name not in files or files[name] in [content[name] for content, _ in expected.values()], name
        cut = any(map(is_partial, files))
    kind.write(folder, 0)
    again = {name: content for name, content in contents(folder).items() if not is_partial(name)}
    if kind.name == "sweep":  # the folder of a run that is not asked for any more stays
        again = {name: content for name, content in again.items() if name in expected[0][0]}
    assert again == expected[0][0]
    return cut


@every_written
def test_killed_at_random_moments(kind, tmp_path, count):
    """A process that writes one version after the other is killed in the middle."""
    expected, rng, folder = whole(kind, tmp_path / "whole"), random.Random(7), tmp_path / "killed"
    started = time.monotonic()
    kind.write(tmp_path / "whole" / "0", 1)
    one_write = time.monotonic() - started

    def work():
        for version in range(10**6):
            kind.write(folder, version % 2)

    folder.mkdir()
    for _ in range(KILLS):
        seconds = rng.uniform(0.2, 2.2) * max(one_write, 0.005)
        assert killed_after(seconds, work) == -signal.SIGKILL  # it would never have ended: every kill came before
        count["kills"] += 1
        count["cut off while writing"] += check_after_kill(kind, folder, expected)
    count["files"] += len(kind.files) * KILLS


@every_written
def test_killed_before_each_file_operation(kind, tmp_path, count):
    """Not by chance: before the first, the second, … change on disk, until none is left."""
    expected = whole(kind, tmp_path / "whole")
    cut = 0
    for before in (None, 1):  # the place is empty, or holds another version
        for number in range(200):
            folder = tmp_path / f"{before}-{number}"
            folder.mkdir()
            if before is not None:
                kind.write(folder, before)
            status = die_before(number, lambda f=folder: kind.write(f, 0))
            if status == 0:
                assert number >= 3, "hardly anything was seen to be written"
                check_after_kill(kind, folder, expected)
                break
            assert status == -signal.SIGKILL
            count["kills"] += 1
            cut += check_after_kill(kind, folder, expected)
        else:
            pytest.fail("never finished")
    count["cut off while writing"] += cut
    assert cut >= 2


class CutOff(Faulty):
    """A pass over it ends within the third batch."""

    def __getitem__(self, i):
        if i == 10:
            raise KeyboardInterrupt
        return super().__getitem__(i)


def state(path: Path) -> list[dict[str, bytes]]:
    """What is in the places of a store, finished and unfinished."""
    return [contents(path), contents(partial_of(path))]


def plain_call(path: Path, before: list, expected: dict[str, bytes], **options) -> bool:
    """A call without rebuild gives the bytes of an uninterrupted one, or is refused and changes nothing."""
    try:
        call(path, **options)
    except ValueError as error:
        assert "made of something else" in str(error) and state(path) == before, error
        return False
    assert state(path) == [expected, {}]
    return True


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_killed_rebuild_goes_on_with_a_plain_call(tmp_path, count, finished):
    """Killed before each file operation of a rebuild: only a store that is whole or begun is refused to others."""
    old, new = {"data_name": "old", "on_error": "skip"}, {"data_name": "new", "data": make_data(seed=1)}
    old["data"] = Faulty(bad=[1])
    call(tmp_path / "old", **old), call(tmp_path / "new", **new)
    whole_old, whole_new = contents(tmp_path / "old"), contents(tmp_path / "new")
    if not finished:
        with pytest.raises(KeyboardInterrupt):
            call(tmp_path / "begun", **old | {"data": CutOff(bad=[1])})
    went_on = 0
    for number in range(100):
        path, other = tmp_path / f"{number}", tmp_path / f"{number} other"
        if finished:
            shutil.copytree(tmp_path / "old", path)
        else:
            shutil.copytree(partial_of(tmp_path / "begun"), partial_of(path))
        if die_before(number, lambda p=path: call(p, **new, rebuild=True)) == 0:
            break
        count["kills"] += 1
        for place, copied in ((path, other), (partial_of(path), partial_of(other))):
            if place.exists():
                shutil.copytree(place, copied)
        before = state(path)
        accepted = [plain_call(path, before, whole_new, **new), plain_call(other, before, whole_old, **old)]
        assert any(accepted), before
        went_on += all(accepted)
    assert number >= 20 and went_on >= 5
    assert state(path) == [whole_new, {}]


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_command_line(tmp_path, count, ranks):
    """`python -m pss profile` and two ranks of it, killed as a whole process group, then run to the end."""
    arguments = [*ARGUMENTS, "--batch-size", "1"]
    main(["profile", *arguments, "--out", str(tmp_path / "whole")])
    launch = [sys.executable, "-m", "pss", "profile"]
    if ranks == 2:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        launch = [*torchrun, "-m", "pss", "profile"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command, path = [*launch, *arguments, "--out", str(tmp_path / "part")], tmp_path / "part"
    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for rows in (1, 9):  # killed once so many rows are there
        process = subprocess.Popen(command, start_new_session=True, **quiet)
        while process.poll() is None and rows_done(path) < rows:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        count["kills"] += 1
        with pytest.raises((ValueError, FileNotFoundError), match=UNFINISHED):
            ProfileStore.open(path)
    time.sleep(0.2)  # ranks that outlived their launcher by a moment
    assert subprocess.run(command, timeout=300, **quiet).returncode == 0
    assert contents(path) == contents(tmp_path / "whole")


def rows_done(path: Path) -> int:
    """Rows of an unfinished store."""
    try:
        ProfileStore.open(path)
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        return int(text.split("(")[1].split()[0]) if "is not finished" in text else 0
    return 10**6


def test_what_a_killed_process_left_is_taken_away(tmp_path, count):
    """The unfinished file stays for an hour (it may be that of a process at work), then the next writer removes it."""
    kind = BY_NAME["reference"]
    assert die_before(2, lambda: kind.write(tmp_path, 0)) == -signal.SIGKILL
    count["kills"] += 1
    (left,) = tmp_path.iterdir()
    assert is_partial(left.name)
    kind.write(tmp_path, 0)
    assert left.exists()
    os.utime(left, (time.time() - 7200,) * 2)
    other = left.with_name(f".other.{'0' * 32}.partial")
    other.touch()
    os.utime(other, (0, 0))
    kind.write(tmp_path, 0)
    assert not left.exists() and other.exists()


# --- disks that are full, or may not be written -----------------------------------------------------------------------


class Libc:
    """The two calls that Python lacks: a mount table of one's own, and a mount in it. For forked processes only."""

    NEW_MOUNTS, NEW_USER, PRIVATE, READ_ONLY, REMOUNT = 0x20000, 0x10000000, 0x44000, 1, 32

    def __init__(self):
        self.libc = ctypes.CDLL(None, use_errno=True)

    def _call(self, name, *arguments):
        if getattr(self.libc, name)(*arguments):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def unshare(self):
        """From now on mounts are seen by this process alone, and go with it."""
        root = os.geteuid() == 0
        self._call("unshare", self.NEW_MOUNTS | (0 if root else self.NEW_USER))
        self._call("mount", b"none", b"/", None, self.PRIVATE, None)

    @classmethod
    def disk(cls, folder: Path, size: int) -> "Libc":
        """A file system in memory of that size, seen by this process alone."""
        libc = cls()
        libc.unshare()
        libc.tmpfs(folder, size)
        return libc

    def tmpfs(self, folder: Path, size: int, read_only: bool = False):
        """Mount one; again with read_only to have it read-only."""
        flags = self.READ_ONLY | self.REMOUNT if read_only else 0
        self._call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", flags, f"size={size}".encode())


def can_mount() -> bool:
    """Whether this process, root or not, may mount a tmpfs in a mount table of its own."""

    if not sys.platform.startswith("linux"):
        return False
    return ended(forked(lambda: Libc.disk(Path("/tmp"), 1 << 16))) == 0


@pytest.fixture(scope="module")
def mounts():
    if not can_mount():
        pytest.skip("needs the right to mount a file system (root, or user namespaces)")


def fails_for_want_of_room(kind: Kind, folder: Path, before: dict[str, bytes]) -> None:
    """Writing version 0 raises OSError, leaves what was there, and nothing beside it."""
    try:
        kind.write(folder, 0)
    except OSError as error:
        assert error.errno in (errno.ENOSPC, errno.EFBIG, errno.EROFS), error
    else:
        raise AssertionError("it was written all the same")
    left = contents(folder)
    assert not [name for name in left if is_partial(name)], left.keys()
    if kind.replaces:  # profiles keep their finished rows
        assert left == before


@every_kind
def test_full_disk(kind, tmp_path, count, mounts):
    """A small file system, filled up to a few pages: an error, the old version whole, nothing left behind."""
    expected, disk = whole(kind, tmp_path / "whole"), tmp_path / "disk"
    page = 4096
    needed = sum(len(content) for content in expected[0][0].values()) // page
    disk.mkdir()

    def work(free: int, version: int | None):
        Libc.disk(disk, (2 * needed + 40) * page)
        folder = disk / "folder"
        folder.mkdir()
        if version is not None:
            kind.write(folder, version)
        room = os.statvfs(disk).f_bavail * page
        (disk / "filler").write_bytes(bytes(max(0, room - free * page)))
        if kind.name == "profiles":
            fails_in_the_middle(kind, folder)
        else:
            fails_for_want_of_room(kind, folder, contents(folder))
        if version is not None and kind.replaces:
            assert kind.digest(folder) == expected[version][1]
        (disk / "filler").unlink()
        kind.write(folder, 0)
        assert contents(folder) == expected[0][0]

    for version in (None, 1):
        for free in sorted({0, *(needed * i // FULL for i in range(FULL))}):
            status = ended(forked(lambda f=free, v=version: work(f, v)))
            assert status == 0, (version, free)
            count["faults"] += 1
            count["files"] += len(kind.files)


def fails_in_the_middle(kind: Kind, folder: Path) -> None:
    """A store asks for room before it begins; here the room goes afterwards."""
    with mock.patch("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 40)):
        fails_for_want_of_room(kind, folder, {})


@every_kind
def test_files_may_not_grow(kind, tmp_path, count):
    """The same by a limit on the size of files, which needs no rights: works on every machine."""
    expected = whole(kind, tmp_path / "whole")
    largest = max(len(content) for content in expected[0][0].values())

    def work(limit: int, folder: Path):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            fails_for_want_of_room(kind, folder, contents(folder))
        finally:  # else the message of a failure would be cut off too
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        kind.write(folder, 0)
        assert contents(folder) == expected[0][0]

    for number in range(FULL):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert ended(forked(lambda n=number, f=folder: work(largest * n // FULL, f))) == 0, number
        count["faults"] += 1
        count["files"] += len(kind.files)


@every_kind
def test_read_only_folder(kind, tmp_path, count, mounts):
    """What is there can be read; nothing can be written, and the error says so."""
    expected, disk = whole(kind, tmp_path / "whole"), tmp_path / "disk"
    disk.mkdir()

    def work(version: int | None):
        libc = Libc.disk(disk, 1 << 22)
        if version is not None:
            kind.write(disk, version)
        before = contents(disk)
        libc.tmpfs(disk, 1 << 22, read_only=True)
        if version is not None:
            assert kind.digest(disk) == expected[version][1]
        if version != 0 or kind.replaces:  # the others see that there is nothing to do
            fails_for_want_of_room(kind, disk, before)
        assert contents(disk) == before

    for version in (None, 0, 1):
        assert ended(forked(lambda v=version: work(v))) == 0
        count["faults"] += 1
        count["files"] += len(kind.files)


def test_cache_that_cannot_be_written_is_done_without(tmp_path, count, mounts):
    """A cache is a convenience: a full or read-only one is said so, and the data are there all the same."""
    kind, disk = BY_NAME["cached data"], tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "whole").mkdir()
    kind.write(tmp_path / "whole", 0)
    expected = kind.digest(tmp_path / "whole")

    def work(read_only: bool):
        libc = Libc.disk(disk, 8192)
        if read_only:
            libc.tmpfs(disk, 8192, read_only=True)
        digest, warned = read_quietly(kind, disk)
        assert digest == expected and contents(disk) == {}
        assert len(warned) == 1 and f"could not write {disk / 'digits.safetensors'}" in warned[0], warned

    for read_only in (False, True):
        assert ended(forked(lambda r=read_only: work(r))) == 0
        count["faults"] += 1


# --- damaged files ----------------------------------------------------------------------------------------------------


def check_damaged(kind: Kind, folder: Path, name: str, damaged: bytes, expected: str, what: str) -> bool:
    """A damaged file is refused by name, or made anew with a warning, or it made no difference. Whether detected."""
    (folder / name).write_bytes(damaged)
    file = Path(name).name
    try:
        digest, warned = read_quietly(kind, folder)
    except (ValueError, FileNotFoundError) as error:
        assert not kind.rebuilt, f"{what}: {error!r}"
        named = file in str(error) or kind.name == "profiles"
        assert named, f"{what}: the error does not name {file}: {error}"
        return True
    assert digest == expected, f"{what}: other values were read without a word"
    assert not warned or (kind.rebuilt and len(warned) == 1 and file in warned[0] and "damaged" in warned[0]), warned
    return bool(warned)


def flipped(original: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """One bit, anywhere; as often in the header, where a flip does most, as in the rest."""
    for number in range(FLIPS):
        bit = rng.randrange(8 * (min(len(original), 2048) if number % 2 else len(original)))
        yield f"bit {bit}", flip(original, bit)


def torn(original: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Cut short, grown, a page of zeros in it, or of another kind."""
    size = len(original)
    for length in (0, 1, 7, 8, 9, size - 1, *(rng.randrange(size) for _ in range(CUTS))):
        yield f"cut to {length}", original[:length]
    for start in (0, size // 2, max(0, size - 600)):
        zeros = bytes(len(original[start : start + 512]))
        yield f"zeros at {start}", original[:start] + zeros + original[start + 512 :]
    yield from {"text": b"not a file of ours\n", "zeros": bytes(size), "twice": original * 2}.items()


@pytest.mark.parametrize(("damages", "least"), [(flipped, 0.7), (torn, 1)])  # white space, dates and the like may flip
@every_kind
def test_damaged_files(kind, damages, least, tmp_path, count):
    """Never other values than were written."""
    kind.write(tmp_path, 0)
    expected, rng = kind.digest(tmp_path), random.Random(3)
    for name in kind.files:
        original = (tmp_path / name).read_bytes()
        faults = {what: found for what, found in damages(original, rng) if found.strip() != original.strip()}
        missed = [w for w, found in faults.items() if not check_damaged(kind, tmp_path, name, found, expected, w)]
        assert len(missed) <= (1 - least) * len(faults), f"{name}: not noticed: {missed}"
        (tmp_path / name).write_bytes(original)
        count["faults"] += len(faults)
        count["files"] += len(faults)
    assert kind.digest(tmp_path) == expected


def test_files_of_another_kind(tmp_path, count):
    """Safetensors of one kind in the place of another: each is refused."""
    kinds = [kind for kind in KINDS if kind.files[0].endswith(".safetensors") and not kind.rebuilt]
    for kind in kinds:
        kind.write(tmp_path, 0)
    held = {kind.name: (tmp_path / kind.files[0]).read_bytes() for kind in kinds}
    for kind in kinds:
        for other in kinds:
            if other is not kind:
                (tmp_path / kind.files[0]).write_bytes(held[other.name])
                with pytest.raises(ValueError, match=kind.files[0]):
                    kind.read(tmp_path)
                count["faults"] += 1
        (tmp_path / kind.files[0]).write_bytes(held[kind.name])
