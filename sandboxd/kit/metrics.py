"""Prometheus metrics of one daemon. An object, not module globals: every app has its own registry."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FAST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
EXEC_BUCKETS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.http_requests = Counter(
            "sandboxd_http_requests",
            "HTTP requests answered.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.http_duration = Histogram(
            "sandboxd_http_request_duration_seconds",
            "Time from the request's head until its answer was written.",
            ["method", "route"],
            buckets=FAST_BUCKETS,
            registry=self.registry,
        )
        self.http_in_flight = Gauge(
            "sandboxd_http_requests_in_flight", "HTTP requests being answered.", registry=self.registry
        )
        self.sandboxes = Gauge(
            "sandboxd_sandboxes", "Sandboxes by status.", ["status"], registry=self.registry
        )
        self.sandbox_creates = Counter(
            "sandboxd_sandbox_creates", "Sandboxes asked for, by result.", ["result"], registry=self.registry
        )
        self.sandbox_create_duration = Histogram(
            "sandboxd_sandbox_create_duration_seconds",
            "Time to create a sandbox, by phase.",
            ["phase"],
            buckets=FAST_BUCKETS,
            registry=self.registry,
        )
        self.execs = Counter(
            "sandboxd_execs", "Executions ended, by status.", ["status"], registry=self.registry
        )
        self.exec_duration = Histogram(
            "sandboxd_exec_duration_seconds",
            "Run time of executions.",
            buckets=EXEC_BUCKETS,
            registry=self.registry,
        )
        self.reaper_actions = Counter(
            "sandboxd_reaper_actions",
            "What the reaper and the reconciler did, by action.",
            ["action"],
            registry=self.registry,
        )

    def render(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self.registry)
