"""pytest plugin of scripts/test: a run in which Docker tests were skipped, or none ran, has failed."""

import pytest

ran: set[str] = set()
skipped: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "docker" not in report.keywords:
        return
    if report.skipped:
        skipped.add(report.nodeid)
    elif report.when == "call":
        ran.add(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.exitstatus == pytest.ExitCode.OK and (skipped or not ran):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if skipped or not ran:
        terminalreporter.section("Docker tests must run", red=True)
        terminalreporter.line(f"{len(ran)} ran, {len(skipped)} were skipped: this run has failed")
        for nodeid in sorted(skipped):
            terminalreporter.line(f"skipped: {nodeid}")
