"""A load generator in a process of its own: raw HTTP on asyncio, so that it costs as little as can be.

Reads {host, port, key, sandboxes, code, expected, seconds} as JSON from stdin, one client per entry of
`sandboxes`, and writes {seconds, cpu_ms, latencies_ms} to stdout. Fails on the first wrong answer.
"""

import asyncio
import json
import resource
import sys
import time
from typing import Any


async def _client(plan: dict[str, Any], sandbox_id: str, until: float, latencies: list[float]) -> None:
    body = json.dumps({"code": plan["code"]}).encode()
    head = [
        f"POST /v1/sandboxes/{sandbox_id}/exec HTTP/1.1",
        "Host: bench",
        f"Authorization: Bearer {plan['key']}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    request = "\r\n".join([*head, "", ""]).encode() + body
    reader, writer = await asyncio.open_connection(plan["host"], plan["port"])
    try:
        while (start := time.perf_counter()) < until:
            writer.write(request)
            answer_head = (await reader.readuntil(b"\r\n\r\n")).lower()
            size = int(answer_head.partition(b"content-length:")[2].partition(b"\r")[0])
            answer = await reader.readexactly(size)
            if b" 200 " not in answer_head[:16] or json.loads(answer)["stdout"] != plan["expected"]:
                raise SystemExit(f"wrong answer: {answer_head[:40]!r} {answer[:500]!r}")
            latencies.append((time.perf_counter() - start) * 1000)
    finally:
        writer.close()


async def _run(plan: dict[str, Any]) -> dict[str, Any]:
    latencies: list[float] = []
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for sandbox_id in plan["sandboxes"]:
            group.create_task(_client(plan, sandbox_id, start + plan["seconds"], latencies))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_ms": (usage.ru_utime + usage.ru_stime) * 1000,
        "latencies_ms": latencies,
    }


if __name__ == "__main__":
    json.dump(asyncio.run(_run(json.load(sys.stdin))), sys.stdout)
