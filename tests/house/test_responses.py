"""What one gateway stored the others know, also after it died, and nothing of it outlives the server."""

import json
import signal
from collections.abc import Callable
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from house import House, eventually

Start = Callable[..., House]


def call(house: House, method: str, path: str, **fields: object) -> tuple[int, Any]:
    """Over a connection of its own, so that it meets any of the gateways."""
    with closing(HTTPConnection(house.url.removeprefix("http://"), timeout=10)) as connection:
        connection.request(method, path, json.dumps(fields), {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.load(answer)


def ask(house: House, **fields: object) -> dict[str, Any]:
    status, answer = call(house, "POST", "/v1/responses", model="tiny", max_output_tokens=3, **fields)
    assert status == 200, answer
    return answer


def test_any_gateway_goes_on_from_what_another_stored(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    house = start({"TMPDIR": str(folder)}, gateway_processes=2).wait_greeted()
    [private] = folder.glob("tokenllm-*")
    assert private.stat().st_mode & 0o777 == 0o700
    first = last = ask(house, input="hello")
    for _ in range(10):
        last = ask(house, input="and then?", previous_response_id=last["id"])
    assert {call(house, "GET", f"/v1/responses/{last['id']}") == (200, last) for _ in range(10)} == {True}
    items = call(house, "GET", f"/v1/responses/{last['id']}/input_items?limit=100")[1]
    assert len(items["data"]) == 21
    house.members("gateway")[0].kill()
    eventually("a successor", lambda: len(house.members("gateway")) == 2)
    house.wait_ready()
    assert {call(house, "GET", f"/v1/responses/{first['id']}")[0] for _ in range(10)} == {200}
    assert call(house, "DELETE", f"/v1/responses/{first['id']}")[0] == 200
    assert {call(house, "GET", f"/v1/responses/{first['id']}")[0] for _ in range(10)} == {404}
    house.signal(signal.SIGTERM)
    assert house.wait() == 0
    assert list(folder.iterdir()) == []
