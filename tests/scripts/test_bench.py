"""The benchmark's own arithmetic, and that its guide knows every row. scripts/bench --quick runs the rest."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from sandboxd.kit.ids import new_id
from scripts.benchlib.client import Api, made_at_ms
from scripts.benchlib.figures import BenchError, Row, Series, alternate, at_least, at_most
from scripts.benchlib.leftovers import paths_left
from scripts.benchlib.table import NAMED, ROWS

GUIDE = Path(__file__).parents[2] / "docs/benchmarks.md"


def test_percentiles_are_measured_values():
    series = Series("x", [5.0, 1.0, 4.0, 2.0, 3.0])
    assert [series.percentile(percent) for percent in (0, 50, 95, 99)] == [1.0, 3.0, 5.0, 5.0]
    assert Series("x", [7.0]).p50 == 7.0


def test_ours_and_the_reference_alternate():
    calls = []
    results = alternate(3, lambda: calls.append("a") or 1.0, lambda: calls.append("b") or 2.0)
    assert "".join(calls) == "abbaab"
    assert results == [[1.0] * 3, [2.0] * 3]


def test_a_goal_that_is_missed_is_said_to_be_missed():
    row = Row("r", "title", "ms", Series("ours", [10.0]), [Series("theirs", [4.0])])
    row.goals = [at_most("p50", row.ours.p50, 5), at_least("rate", 100, 50)]
    assert row.as_json()["references"][0]["ratio_of_p50"] == 2.5
    assert [goal["met"] for goal in row.as_json()["goals"]] == [False, True]
    assert "NOT MET  p50 at most 5: 10" in row.as_text()


def test_a_wrong_answer_ends_the_run():
    class Wrong(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            body = b'{"status": "completed", "stdout": "41\\n", "stderr": ""}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Wrong) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(BenchError, match="41"):
                Api(f"http://127.0.0.1:{server.server_port}", "key").check("sbx_1")
        finally:
            server.shutdown()


def test_the_guide_explains_every_row():
    guide = GUIDE.read_text(encoding="utf-8")
    assert [name for name in ROWS if f"`{name}`" not in guide] == []


def test_an_id_tells_a_hit_from_a_miss():
    assert made_at_ms(new_id("sbx", now_ms=1_700_000_000_123)) == 1_700_000_000_123


def test_rows_of_minutes_run_only_when_they_are_named():
    assert set(NAMED) < set(ROWS)


def test_what_sandboxes_left_is_found_and_those_alive_are_not(tmp_path):
    gone = {f"{tmp_path}/run/owner/sbx_gone", f"{tmp_path}/state/workspaces/sbx_gone"}
    for path in (*gone, f"{tmp_path}/run/owner/sbx_alive", f"{tmp_path}/run/owner/prepare"):
        Path(path).mkdir(parents=True)
    assert set(paths_left(tmp_path, {"sbx_alive"})) == gone
