"""Settings from the environment (`SANDBOXD_*`). The only module that reads the environment."""

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from sandboxd.kit.postgres import check_url

ENV_PREFIX = "SANDBOXD_"


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True
    )

    host: str = Field("127.0.0.1", description="Address the HTTP API listens on.")
    port: int = Field(8080, ge=0, le=65535, description="Port of the HTTP API; 0 picks a free one.")
    state_dir: Path = Field(
        Path("/var/lib/sandboxd"), description="Database, workspaces, lock and logs (0700)."
    )
    run_dir: Path = Field(Path("/run/sandboxd"), description="Sockets of the running sandboxes.")
    database_url: str = Field(
        default_factory=lambda data: _default_database_url(data),
        repr=False,
        description="The store: `sqlite+aiosqlite:////path` or `postgresql://user:password@host/database`; "
        "default is `sandboxd.db` in the state folder.",
    )
    docker_url: str = Field(
        "unix:///var/run/docker.sock", description="Docker Engine that runs the sandboxes."
    )
    runtime: Literal["runc", "runsc"] = Field("runc", description="OCI runtime of new sandboxes.")
    default_image: str = Field("e80/default:latest", description="Image of a sandbox that names none.")
    log_format: Literal["json", "console"] = Field(
        "json", description="`json` lines or readable `console` text."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Lowest level logged."
    )
    drain_timeout_s: float = Field(20, ge=0, le=3600, description="Time running requests get after SIGTERM.")
    max_body_mb: int = Field(
        8, ge=1, le=16, description="Largest request body; file uploads stream and are exempt."
    )
    cpu_mhz: int = Field(2500, ge=100, description="CPU of a sandbox that asks for none, in MHz.")
    max_cpu_mhz: int = Field(10000, ge=100, description="Most CPU a sandbox may ask for.")
    reference_cpu_mhz: int = Field(2500, ge=100, description="MHz that count as one core.")
    memory_size_mb: int = Field(512, ge=64, description="Memory of a sandbox that asks for none.")
    max_memory_size_mb: int = Field(8192, ge=64, description="Most memory a sandbox may ask for.")
    disk_size_mb: int = Field(1024, ge=16, description="Workspace of a sandbox that asks for none.")
    max_disk_size_mb: int = Field(20480, ge=16, description="Largest workspace a sandbox may ask for.")
    max_files: int = Field(65536, ge=1024, description="Files, folders and links a workspace can hold.")
    max_processes: int = Field(256, ge=16, description="Processes and threads of tenant code in one sandbox.")
    max_timeout_s: int = Field(86400, ge=1, description="Longest life a sandbox may ask for.")
    allow_no_timeout: bool = Field(
        False, description="Accept `timeout_s: null`: sandboxes that live until stopped."
    )
    max_sandboxes: int = Field(500, ge=1, le=60000, description="Sandboxes alive at once on this server.")
    first_uid: int = Field(
        200000,
        ge=10000,
        description="Each sandbox has two host uids of its own: one from here up, one 60000 above it.",
    )
    start_timeout_s: float = Field(
        60, gt=0, description="Time a sandbox gets to start and its agent to answer."
    )
    warm_libraries: bool = Field(
        True,
        description="Load numpy, pandas and pyplot ahead in idle moments, so that importing them is quick.",
    )
    max_execs: int = Field(48, ge=1, le=56, description="Execs at once in one sandbox.")
    concurrent_starts: int = Field(
        4, ge=1, le=64, description="Sandboxes started at the same time; others wait."
    )
    exec_timeout_s: float = Field(60, gt=0, description="Time of an exec that asks for none.")
    max_exec_timeout_s: float = Field(3600, gt=0, description="Longest exec.")
    exec_output_mb: int = Field(4, ge=1, le=16, description="Output of an exec kept for the answer.")
    exec_spool_mb: int = Field(
        64, ge=0, description="Output of an exec kept in a file of the sandbox beyond that."
    )
    pool_size: int = Field(
        4, ge=0, le=500, description="Sandboxes of the default image and size kept ready to be claimed."
    )
    pool_max: int = Field(
        16,
        ge=0,
        le=500,
        description="Most sandboxes kept ready, of all images and sizes together; 0 switches the pool off.",
    )
    quota_sandboxes: int = Field(
        0, ge=0, description="Sandboxes a project may have alive at once; 0 for no limit of its own."
    )
    quota_cpu_mhz: int = Field(0, ge=0, description="CPU of a project's sandboxes together; 0 for no limit.")
    quota_memory_size_mb: int = Field(
        0, ge=0, description="Memory of a project's sandboxes together; 0 for no limit."
    )
    min_free_memory_mb: int = Field(
        1024, ge=0, description="No sandbox is started when the host has less memory available."
    )
    min_free_disk_mb: int = Field(
        2048, ge=0, description="No sandbox is started when the state folder's disk has less room."
    )
    min_free_processes: int = Field(
        2048, ge=0, description="No sandbox is started when the host has fewer process ids left."
    )
    min_free_inotify: int = Field(
        16, ge=0, description="No sandbox is started when root has fewer inotify instances left."
    )
    admission_wait_s: float = Field(
        10, ge=0, description="Time a create waits for room on the host before it is refused."
    )
    history_days: float = Field(
        30, gt=0, description="How long ended sandboxes, their execs and their events stay listed."
    )
    trusted_proxies: str = Field(
        "",
        description="Addresses of proxies and other nodes, parted by commas, whose `X-Forwarded-For` counts.",
    )
    node_url: str = Field(
        "", description="Where other daemons on the same store reach this one: `http://host:port`."
    )
    public_url: str = Field(
        "",
        description="Where clients reach the API, for signed URLs; the host that the client used by default.",
    )
    fail_point: str = Field(
        "", description="For tests only: the daemon kills itself at this step of a sandbox's life."
    )
    metrics_public: bool = Field(False, description="Serve `/metrics` to peers other than loopback, too.")

    @field_validator("state_dir", "run_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        if not value.is_absolute():
            raise ValueError(f"must be an absolute path, not {str(value)!r}")
        return value

    @field_validator("node_url")
    @classmethod
    def _http_address(cls, value: str) -> str:
        if value and not re.fullmatch(r"https?://[^\s/?#@]+/?", value):
            raise ValueError(f"must be http://host:port or https://host:port, not {value!r}")
        return value.rstrip("/")

    @field_validator("public_url")
    @classmethod
    def _http_url(cls, value: str) -> str:
        if value and not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", value):
            raise ValueError(f"must be http://host:port or https://host:port, not {value!r}")
        return value.rstrip("/")

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, value: str) -> str:
        if value.startswith("sqlite+aiosqlite:////"):
            return value
        if value.startswith(("postgresql:", "postgresql+")):
            return check_url(value)
        # The value may hold a password: it is not repeated.
        raise ValueError(
            "must be sqlite+aiosqlite:///<absolute path of a file>"
            " or postgresql://<user>:<password>@<host>:<port>/<database>"
        )


def variable_name(field: str) -> str:
    """Name of the environment variable of a settings field."""
    return f"{ENV_PREFIX}{field.upper()}"


def unknown_variables() -> list[str]:
    """Variables with our prefix that no setting reads: nearly always a typing error."""
    known = {variable_name(field) for field in Settings.model_fields}
    return sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known)


def _default_database_url(data: dict[str, Any]) -> str:
    return f"sqlite+aiosqlite:///{data.get('state_dir', '/')}/sandboxd.db"
