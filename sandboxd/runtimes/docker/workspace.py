"""Workspaces: one ext4 file per sandbox, loop-mounted. Its size is the byte quota, its inodes the file quota.

Only the daemon sees the root of that file system; the container gets the folders `home` and `tmp` in it,
made before any tenant code runs. Nothing here ever opens a path below those two.
"""

import asyncio
import os
from pathlib import Path

from sandboxd.runtimes.errors import RuntimeFaultError

_STEP_TIMEOUT_S = 30.0

# No journal: a workspace never outlives its sandbox by a crash of the host. No reserved blocks, and the
# inode tables are left for later: the kernel would write them in the background, per sandbox.
_MKFS = ["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal,^resize_inode"]
_MKFS_EXTENDED = "lazy_itable_init=1,nodiscard,root_owner=0:0"
# A small disk must not be filled by its own inode tables.
_INODES_PER_MB = 64
_MIN_INODES = 1024
# Name: mode, and whether the tenant owns it. Home is closed to the sandbox's second user. Not /tmp, which is
# for both: its owner may rename what is root's in there.
_FOLDERS = {"home": (0o700, True), "tmp": (0o1777, False)}
_MOUNT_OPTIONS = "loop,nosuid,nodev,noatime,noinit_itable"


class Workspaces:
    """The workspace files under one folder; a method per step, each of which may be repeated."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def mount_point(self, sandbox_id: str) -> Path:
        return self._folder / sandbox_id / "mnt"

    def prepare(self, sandbox_id: str, uid: int) -> None:
        """The two folders as they will be in the workspace, which is made from them. They also stand in for
        it until it is mounted: the engine wants to see the paths it is told about, at any moment."""
        for name, (mode, is_tenants) in _FOLDERS.items():
            folder = self.mount_point(sandbox_id) / name
            folder.mkdir(parents=True, exist_ok=True)
            owner = uid if is_tenants else 0
            os.chown(folder, owner, owner)
            folder.chmod(mode)

    async def create(self, sandbox_id: str, size_mb: int, max_files: int) -> None:
        """Makes and mounts a fresh workspace with what `prepare` has made. Raises RuntimeFaultError."""
        file = self._folder / sandbox_id / "workspace.ext4"
        mount_point = self.mount_point(sandbox_id)
        if mount_point.is_mount():
            return
        await asyncio.to_thread(_make_sparse, file, size_mb)
        inodes = min(max_files, max(_MIN_INODES, size_mb * _INODES_PER_MB))
        await _run(*_MKFS, "-N", str(inodes), "-E", _MKFS_EXTENDED, "-d", str(mount_point), str(file))
        await _run("mount", "-o", _MOUNT_OPTIONS, str(file), str(mount_point))

    async def remove(self, sandbox_id: str) -> None:
        """Unmounts and deletes; a workspace that is not there is success."""
        folder = self._folder / sandbox_id
        mount_point = self.mount_point(sandbox_id)
        if mount_point.is_mount():
            try:
                await _run("umount", str(mount_point))
            except RuntimeFaultError:
                # Busy for a moment after the container's end: it goes when its last user does.
                await _run("umount", "--lazy", str(mount_point))
        try:
            await asyncio.to_thread(_delete, folder)
        except OSError as error:
            raise RuntimeFaultError(f"cannot remove the workspace {folder}: {error}") from error

    def list(self) -> list[str]:
        return sorted(entry.name for entry in self._folder.iterdir())


def _make_sparse(file: Path, size_mb: int) -> None:
    with file.open("wb") as sparse:
        sparse.truncate(size_mb * 1024 * 1024)


def _delete(folder: Path) -> None:
    # Not a tree: a mount point that could not be unmounted must stop this, not be emptied.
    for path in (folder / "mnt" / "home", folder / "mnt" / "tmp", folder / "mnt"):
        if path.is_dir():
            path.rmdir()
    if folder.is_dir():
        (folder / "workspace.ext4").unlink(missing_ok=True)
        folder.rmdir()


async def _run(*argv: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_STEP_TIMEOUT_S):
            _, errors = await process.communicate()
    except TimeoutError as error:
        raise RuntimeFaultError(f"{argv[0]} took more than {_STEP_TIMEOUT_S:g} s") from error
    finally:
        if process.returncode is None:
            # A mount must not land after the clean-up that a cancelled create begins with.
            process.kill()
            await process.wait()
    if process.returncode:
        text = errors.decode("utf-8", "replace").strip()[:500]
        raise RuntimeFaultError(f"{argv[0]} failed with status {process.returncode}: {text}")
