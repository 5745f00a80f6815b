from sandboxd.kit.metrics import Metrics


def test_two_daemons_do_not_share_counters():
    first, second = Metrics(), Metrics()
    first.execs.labels("completed").inc()
    assert b'sandboxd_execs_total{status="completed"} 1.0' in first.render()
    assert b"sandboxd_execs_total{" not in second.render()


def test_all_families_are_rendered():
    text = Metrics().render().decode()
    for name in (
        "sandboxd_http_requests_total",
        "sandboxd_http_request_duration_seconds",
        "sandboxd_http_requests_in_flight",
        "sandboxd_sandboxes",
        "sandboxd_sandbox_creates_total",
        "sandboxd_sandbox_create_duration_seconds",
        "sandboxd_execs_total",
        "sandboxd_exec_duration_seconds",
        "sandboxd_reaper_actions_total",
        "process_open_fds",
    ):
        assert f"# TYPE {name} " in text
