"""Prometheus metrics of one daemon. An object, not module globals: every app has its own registry."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FAST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
AGE_BUCKETS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400, 86400)
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
        self.exec_rows_dropped = Counter(
            "sandboxd_exec_rows_dropped",
            "Executions missing in the history, because the store could not be written.",
            registry=self.registry,
        )
        self.exec_feeds = Gauge(
            "sandboxd_exec_feeds", "Executions whose events are followed.", registry=self.registry
        )
        self.exec_followers = Gauge(
            "sandboxd_exec_followers", "Clients that follow events of executions.", registry=self.registry
        )
        self.exec_gaps = Counter(
            "sandboxd_exec_gaps",
            "Followers who were too late for some of an execution's events.",
            registry=self.registry,
        )
        self.reaper_actions = Counter(
            "sandboxd_reaper_actions",
            "What the reaper and the reconciler did, by action.",
            ["action"],
            registry=self.registry,
        )
        self._add_pool()

    def render(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self.registry)

    def _add_pool(self) -> None:
        self.pool_claims = Counter(
            "sandboxd_pool_claims",
            "Creates, by whether the pool had a sandbox ready: hit or miss.",
            ["result"],
            registry=self.registry,
        )
        self.pool_ready = Gauge(
            "sandboxd_pool_ready", "Sandboxes that wait in the pool.", registry=self.registry
        )
        self.pool_target = Gauge(
            "sandboxd_pool_target", "Sandboxes that the pool would like to hold.", registry=self.registry
        )
        self.pool_refill_duration = Histogram(
            "sandboxd_pool_refill_duration_seconds",
            "Time to start a sandbox for the pool.",
            buckets=FAST_BUCKETS,
            registry=self.registry,
        )
        self.pool_age = Histogram(
            "sandboxd_pool_age_seconds",
            "How long a sandbox had waited in the pool when it was claimed.",
            buckets=AGE_BUCKETS,
            registry=self.registry,
        )
        self.pool_removals = Counter(
            "sandboxd_pool_removals",
            "Sandboxes taken out of the pool unclaimed, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self.admission_waits = Counter(
            "sandboxd_admission_waits",
            "Starts that had to wait for room on the host, by what was short.",
            ["resource"],
            registry=self.registry,
        )
        self.admission_refusals = Counter(
            "sandboxd_admission_refusals",
            "Starts refused because the host had no room, by what was short.",
            ["resource"],
            registry=self.registry,
        )
