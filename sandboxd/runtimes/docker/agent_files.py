"""The agent as it is mounted into sandboxes: compiled once for each image by that image's own Python.

Without the compiled files each sandbox would compile the agent at its start, on a read-only mount, for
nothing. What an image's Python writes is only ever mounted into sandboxes of that same image.
"""

import asyncio
import hashlib
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import docker

from sandboxd.runtimes.base import Image
from sandboxd.runtimes.docker.engine import AlreadyExists, Engine, Malformed, NotFound
from sandboxd.runtimes.errors import ImageNotFoundError, ImageUnusableError, RuntimeFaultError

PREPARE_TIMEOUT_S = 60.0
MIN_PYTHON = (3, 8)
_MAX_OUTPUT = 4096

# Unchecked hashes: the mount's time stamps must not decide whether the compiled files count.
_PREPARE = """
import compileall, json, py_compile, sys
ok = sys.version_info >= %r
mode = py_compile.PycInvalidationMode.UNCHECKED_HASH if ok else None
ok = ok and bool(compileall.compile_dir('/agent', quiet=1, invalidation_mode=mode))
facts = {'ok': ok, 'python': '.'.join(map(str, sys.version_info[:3]))}
open('/agent/image.json', 'w').write(json.dumps(facts))
"""


class AgentFiles:
    """The prepared copies, one folder for each pair of agent and image."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine = engine
        self._folder = folder
        self._source = agent_source()
        self._hash = _content_hash(self._source)
        self._locks: dict[str, asyncio.Lock] = {}
        self._images: dict[str, Image] = {}

    def path(self, digest: str) -> Path:
        return self._folder / f"{self._hash[:12]}-{digest.removeprefix('sha256:')[:20]}"

    async def ensure_image(self, ref: str) -> Image:
        """See runtimes.base.ImageStore. The name is looked up every time: it may point elsewhere by now."""
        try:
            facts = await self._engine.call(lambda client: client.inspect_image(ref))  # type: ignore[no-untyped-call]  # untyped in the stubs
        except NotFound as error:
            raise ImageNotFoundError(
                f"image {ref!r} is not in the engine; build or load it, or name another", param="image"
            ) from error
        except Malformed as error:
            raise ImageNotFoundError(
                f"image {ref!r}: that is not how images are named, `name`, `name:tag` and `name@sha256:...` "
                "are",
                param="image",
            ) from error
        digest = str(facts["Id"])
        known = self._images.get(digest)
        if known is not None:
            return known
        async with self._locks.setdefault(digest, asyncio.Lock()):
            if digest not in self._images:
                self._images[digest] = await self._prepare(ref, digest)
        return self._images[digest]

    async def _prepare(self, ref: str, digest: str) -> Image:
        target = self.path(digest)
        if not (target / "image.json").is_file():
            partial = target.with_suffix(".part")
            await asyncio.to_thread(_copy, self._source, partial)
            try:
                await self._compile(ref, digest, partial)
                # Root's from here on: the image's Python could write them while it ran.
                await asyncio.to_thread(_finish, partial, target)
            finally:
                await asyncio.to_thread(shutil.rmtree, partial, True)
        facts = _read_facts(target / "image.json")
        if not facts.get("ok"):
            raise ImageUnusableError(
                f"image {ref!r} has Python {str(facts.get('python'))[:20]}; the agent needs 3.8 or newer",
                param="image",
            )
        return Image(ref=ref, digest=digest, python=str(facts.get("python"))[:20])

    async def _compile(self, ref: str, digest: str, folder: Path) -> None:
        # Of this state folder: two installations on one engine must not remove each other's.
        name = f"sandboxd-prepare-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:24]}"
        config = {
            "Image": digest,
            "Entrypoint": ["python3", "-I", "-S", "-c", _PREPARE % (MIN_PYTHON,)],
            "Cmd": [],
            "User": "0:0",
            "WorkingDir": "/",
            "Labels": {"sandboxd.prepare": digest},
            "HostConfig": {
                "NetworkMode": "none",
                "CapDrop": ["ALL"],
                "SecurityOpt": ["no-new-privileges"],
                "ReadonlyRootfs": True,
                "PidsLimit": 32,
                "Memory": 256 * 1024 * 1024,
                "MemorySwap": 256 * 1024 * 1024,
                "LogConfig": {"Type": "none"},
                "Mounts": [{"Type": "bind", "Source": str(folder), "Target": "/agent", "ReadOnly": False}],
            },
        }

        def run(client: docker.APIClient) -> Any:
            client.create_container_from_config(config, name)  # type: ignore[no-untyped-call]  # untyped in the stubs
            client.start(name)
            return client.wait(name, timeout=int(PREPARE_TIMEOUT_S))

        remove = self._remove(name)
        try:
            await remove()
            result = await self._engine.call(run, PREPARE_TIMEOUT_S)
        except (RuntimeFaultError, NotFound, AlreadyExists) as error:
            # runc says so when there is no python3 to start.
            raise ImageUnusableError(
                f"image {ref!r} cannot start python3 (3.8 or newer is needed): {str(error)[:300]}",
                param="image",
            ) from error
        finally:
            await remove()
        if result.get("StatusCode") or not (folder / "image.json").is_file():
            raise ImageUnusableError(
                f"python3 of image {ref!r} failed to compile the agent: status {result.get('StatusCode')}",
                param="image",
            )

    def _remove(self, name: str) -> Any:
        async def remove() -> None:
            try:
                await self._engine.call(lambda client: client.remove_container(name, force=True))
            except (NotFound, AlreadyExists):
                return  # it is gone, or its removal is already in progress

        return remove


def agent_source() -> Path:
    """The agent's package as it is installed beside the daemon."""
    spec = find_spec("e80_agent")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _content_hash(source: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(source.rglob("*.py")):
        digest.update(f"{path.relative_to(source)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read_facts(path: Path) -> dict[str, Any]:
    """What the image's Python wrote, which is the image's word: bounded, and anything else is nothing."""
    try:
        with path.open("rb") as file:
            facts = json.loads(file.read(_MAX_OUTPUT))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(mode=0o700, parents=True)
    shutil.copytree(source, target / "e80_agent", ignore=shutil.ignore_patterns("__pycache__"))


def _finish(partial: Path, target: Path) -> None:
    for folder, _folders, names in os.walk(partial, followlinks=False):
        os.chmod(folder, 0o755)  # noqa: S103 - mounted read-only, and holds no secret
        for name in names:
            path = os.path.join(folder, name)
            if os.path.islink(path) or not os.path.isfile(path):
                os.unlink(path)
            else:
                os.chmod(path, 0o644)
    if target.exists():
        shutil.rmtree(target)
    os.rename(partial, target)
